//! A source agent's connections to the rack index: one for each shard, owned by one thread.
//!
//! What many readers ask goes in one batch: while an answer is awaited, the next batch gathers.
//! So the wait is one or two round trips, whatever the rate, and nobody waits for each page.
//!
//! An index that is gone answers like a full one: contents go as the session's own, which costs
//! bytes. It is not asked again in the life of the sessions that used it, because a new index
//! would give the same entry ids to other contents.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use index::{Shards, Ticket};
use page::{ContentId, ContentKey, EntryId, HostNo};
use wire::index::{Answer, EntryRun, Item, TableKey, Verdict, join_runs};
use wire::{Channel, ControlReply, Hello, PROTOCOL_VERSION, WireCompression, WireError};

use crate::link::{Link, LinkError};

use super::kept::Kept;
use super::session::{SessionContext, spawn};

/// Requests that wait for the thread: some for each reader and each acknowledgement.
const QUEUE: usize = 4096;

/// Requests that go in one batch: a frame of the index's channel holds 4096 ids, 65 buffers.
const BATCH: usize = 64;

/// Bytes read at once.
const READ: usize = 64 << 10;

/// How long an answer may take until the contents go without it: pages wait meanwhile.
const PATIENCE: Duration = Duration::from_secs(2);

/// How long a registration's answer may take: it is many batches, and nobody is stopped.
const REGISTER_PATIENCE: Duration = Duration::from_secs(60);

/// Why the index cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IndexError {
    #[error("the index at {address} cannot be reached")]
    Reach { address: String, source: LinkError },
    #[error("the index does not answer")]
    Silent,
    #[error("the thread for the index cannot be started")]
    Thread(#[from] std::io::Error),
}

/// Indexes that share a table share a link.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct IndexKey {
    pub(crate) group: String,
    /// Secret of the trust domain, 64 hex digits.
    pub(crate) domain_key: String,
    /// Addresses of the shards.
    pub(crate) shards: Vec<String>,
}

/// The links under way, kept by the sessions that use them.
#[derive(Default)]
pub(crate) struct IndexLinks {
    open: Kept<IndexKey, IndexLink>,
}

impl IndexLinks {
    /// The link for `key`; connects if there is none.
    pub(crate) fn get(
        &self,
        key: &IndexKey,
        secret: &ContentKey,
        context: &SessionContext,
    ) -> Result<Arc<IndexLink>, IndexError> {
        self.open.get(
            key,
            |_| true,
            || Ok(Arc::new(IndexLink::connect(key, secret, context)?)),
        )
    }
}

/// The way to the index of one group and trust domain.
pub(crate) struct IndexLink {
    requests: Sender<Request>,
    /// An answer was late, and none has come since: nobody waits for it in the meantime.
    is_late: Arc<AtomicBool>,
    /// Entry ids mean something only within one epoch.
    pub(crate) epoch: u64,
}

enum Request {
    Claim(HostNo, Vec<ContentId>, Sender<Vec<Verdict>>),
    Register(HostNo, Vec<Item>, Sender<Vec<Option<EntryId>>>),
    Seed(HostNo, Vec<ContentId>, Sender<Vec<Option<EntryId>>>),
    Shared(HostNo, Vec<ContentId>, Sender<Vec<Option<EntryId>>>),
    Carried(Vec<EntryId>),
    Lost(HostNo, Vec<EntryId>),
    CarrierGone(HostNo),
}

/// Whom an answer is for.
enum Asker {
    Claim(HostNo, Sender<Vec<Verdict>>),
    Register(Sender<Vec<Option<EntryId>>>),
}

/// A claim under way.
pub(crate) struct Claim {
    target: HostNo,
    ids: Vec<ContentId>,
    verdicts: Receiver<Vec<Verdict>>,
    requests: Sender<Request>,
    is_late: Arc<AtomicBool>,
}

impl Claim {
    /// The contents that were asked for with their verdicts; none if the index does not answer.
    pub(crate) fn wait(mut self) -> Vec<(ContentId, Verdict)> {
        // Claims that were under way when one came late do not each wait as long: its guest may be stopped.
        let patience = match self.is_late.load(Ordering::Relaxed) {
            true => Duration::ZERO,
            false => PATIENCE,
        };
        let verdicts = match self.verdicts.recv_timeout(patience) {
            Ok(verdicts) => verdicts,
            Err(RecvTimeoutError::Timeout) => {
                self.is_late.store(true, Ordering::Relaxed);
                Vec::new()
            }
            Err(RecvTimeoutError::Disconnected) => Vec::new(),
        };
        std::mem::take(&mut self.ids)
            .into_iter()
            .zip(verdicts)
            .collect()
    }
}

impl Drop for Claim {
    /// An answer that nobody has taken.
    fn drop(&mut self) {
        if let Ok(verdicts) = self.verdicts.try_recv() {
            let lost = Request::Lost(self.target, to_carry(&verdicts));
            // As in `IndexLink::send`.
            let _ = self.requests.try_send(lost);
        }
    }
}

/// What the asker is to carry.
fn to_carry(verdicts: &[Verdict]) -> Vec<EntryId> {
    let entry = |verdict: &Verdict| match verdict {
        Verdict::Carry { entry, .. } => Some(*entry),
        _ => None,
    };
    verdicts.iter().filter_map(entry).collect()
}

impl IndexLink {
    fn connect(
        key: &IndexKey,
        secret: &ContentKey,
        context: &SessionContext,
    ) -> Result<Self, IndexError> {
        let mut links = Vec::new();
        for address in &key.shards {
            let link = open(address, context).map_err(|source| IndexError::Reach {
                address: address.clone(),
                source,
            })?;
            links.push(Some(link));
        }
        let mut shards = Shards::new(u8::try_from(links.len()).unwrap_or(u8::MAX));
        shards.join(&TableKey {
            group: key.group.clone(),
            domain: secret.name("index", &[key.group.as_bytes()]),
        });
        let mut talk = Talk {
            shards,
            links,
            askers: VecDeque::new(),
            buffer: vec![0; READ],
            is_late: Arc::default(),
        };
        let Some((_, Answer::Welcome { epoch, .. })) = talk.exchange_one() else {
            return Err(IndexError::Silent);
        };
        if talk.links.iter().any(Option::is_none) {
            return Err(IndexError::Silent);
        }
        let (requests, queue) = bounded(QUEUE);
        let is_late = Arc::clone(&talk.is_late);
        spawn("gw-index", move || talk.run(&queue))?;
        Ok(Self {
            requests,
            is_late,
            epoch,
        })
    }

    /// Asks for contents that pages for `target` have.
    pub(crate) fn claim(&self, target: HostNo, ids: Vec<ContentId>) -> Claim {
        let (sender, verdicts) = bounded(1);
        if !self.is_late.load(Ordering::Relaxed) {
            self.send(Request::Claim(target, ids.clone(), sender));
        }
        Claim {
            target,
            ids,
            verdicts,
            requests: self.requests.clone(),
            is_late: Arc::clone(&self.is_late),
        }
    }

    /// Registers contents of VMs that will run on `target`; the entry of each, none if the index
    /// is full or gone.
    pub(crate) fn register(&self, target: HostNo, items: Vec<Item>) -> Vec<Option<EntryId>> {
        let count = items.len();
        let (sender, entries) = bounded(1);
        self.send(Request::Register(target, items, sender));
        let mut entries = entries.recv_timeout(REGISTER_PATIENCE).unwrap_or_default();
        entries.resize(count, None);
        entries
    }

    /// VMs that stay on `target` have these contents; the entry of each, none if the index is full.
    /// Nothing if it does not answer.
    pub(crate) fn seed(&self, target: HostNo, ids: Vec<ContentId>) -> Option<Vec<Option<EntryId>>> {
        let (sender, entries) = bounded(1);
        self.send(Request::Seed(target, ids, sender));
        entries.recv_timeout(REGISTER_PATIENCE).ok()
    }

    /// The entry of each of these contents that are at a target host, or that other target hosts than `target` need; nothing if
    /// the index does not answer.
    pub(crate) fn shared(
        &self,
        target: HostNo,
        ids: Vec<ContentId>,
    ) -> Option<Vec<Option<EntryId>>> {
        let (sender, entries) = bounded(1);
        self.send(Request::Shared(target, ids, sender));
        entries.recv_timeout(REGISTER_PATIENCE).ok()
    }

    /// These entries have reached their carrier.
    pub(crate) fn carried(&self, entries: Vec<EntryId>) {
        self.send(Request::Carried(entries));
    }

    /// The carrier does not have these entries.
    pub(crate) fn lost(&self, carrier: HostNo, entries: Vec<EntryId>) {
        self.send(Request::Lost(carrier, entries));
    }

    /// Nothing is at the target host any more.
    pub(crate) fn carrier_gone(&self, host: HostNo) {
        self.send(Request::CarrierGone(host));
    }

    /// A full queue is an index that does not answer: what is asked goes without it.
    fn send(&self, request: Request) {
        let _ = self.requests.try_send(request);
    }
}

fn open(address: &str, context: &SessionContext) -> Result<Link, LinkError> {
    let mut link = Link::connect(address, &context.security, context.peer_timeout)?;
    link.send_hello(&Hello {
        version: PROTOCOL_VERSION,
        session: String::new(),
        channel: Channel::Index,
        source: context.host.clone(),
        compression: WireCompression::None,
        domain_key: None,
        rack: None,
    })?;
    match link.receive()? {
        ControlReply::Welcome => Ok(link),
        ControlReply::Refused { reason } => Err(LinkError::Refused(reason)),
        other => Err(WireError::Control(format!("unexpected answer {other:?}")).into()),
    }
}

/// The thread's end.
struct Talk {
    shards: Shards,
    /// None once a shard is gone.
    links: Vec<Option<Link>>,
    askers: VecDeque<Asker>,
    buffer: Vec<u8>,
    is_late: Arc<AtomicBool>,
}

impl Talk {
    /// Until all who use the link have let go.
    fn run(mut self, queue: &Receiver<Request>) {
        while let Ok(first) = queue.recv() {
            self.take(first);
            for request in queue.try_iter().take(BATCH) {
                self.take(request);
            }
            while let Some((_, answer)) = self.exchange_one() {
                self.answer(answer);
            }
            self.flush();
        }
    }

    fn take(&mut self, request: Request) {
        let shards = &mut self.shards;
        match request {
            Request::Claim(target, ids, asker) => {
                shards.claim(target, &ids);
                self.askers.push_back(Asker::Claim(target, asker));
            }
            Request::Register(target, items, asker) => {
                shards.register(target, &items);
                self.askers.push_back(Asker::Register(asker));
            }
            Request::Seed(target, ids, asker) => {
                shards.seed(target, &ids);
                self.askers.push_back(Asker::Register(asker));
            }
            Request::Shared(target, ids, asker) => {
                shards.shared(target, &ids);
                self.askers.push_back(Asker::Register(asker));
            }
            Request::Carried(entries) => shards.carried(&runs_of(&entries)),
            Request::Lost(carrier, entries) => shards.lost(carrier, &runs_of(&entries)),
            Request::CarrierGone(host) => shards.carrier_gone(host),
        }
    }

    fn answer(&mut self, answer: Answer) {
        self.is_late.store(false, Ordering::Relaxed);
        match (self.askers.pop_front(), answer) {
            (Some(Asker::Claim(target, asker)), Answer::Verdicts(verdicts)) => {
                // Nobody waits for it any more: the contents have gone without their entries. What
                // was to be carried is not, and who was told so would wait in vain.
                if let Err(unheard) = asker.try_send(verdicts) {
                    let entries = to_carry(&unheard.into_inner());
                    self.shards.lost(target, &runs_of(&entries));
                }
            }
            (Some(Asker::Register(asker)), Answer::Entries(entries)) => {
                // Whoever does not wait any more has gone on without.
                let _ = asker.try_send(entries);
            }
            _ => {}
        }
    }

    /// The next answer; None: nothing is awaited.
    fn exchange_one(&mut self) -> Option<(Ticket, Answer)> {
        loop {
            self.flush();
            if let Some(answer) = self.shards.poll_answer() {
                return Some(answer);
            }
            let owes = |shard: &u8| self.shards.owes(*shard);
            let shard = (0..self.shards.count()).find(owes)?;
            let Some(link) = self
                .links
                .get_mut(usize::from(shard))
                .and_then(Option::as_mut)
            else {
                self.shards.shard_gone(shard);
                continue;
            };
            let result = match link.read_some(&mut self.buffer) {
                Ok(count) => self
                    .shards
                    .handle(shard, &self.buffer[..count])
                    .map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            };
            if let Err(error) = result {
                self.lose(shard, &error);
            }
        }
    }

    /// Sends what is to be sent.
    fn flush(&mut self) {
        for shard in 0..self.shards.count() {
            let Some(output) = self.shards.output(shard).filter(|out| !out.is_empty()) else {
                continue;
            };
            let output = std::mem::take(output);
            let link = self.links.get_mut(usize::from(shard));
            if let Some(Err(error)) = link
                .and_then(Option::as_mut)
                .map(|link| link.write_all(&output))
            {
                self.lose(shard, &error.to_string());
            }
        }
    }

    fn lose(&mut self, shard: u8, error: &str) {
        tracing::warn!(
            shard,
            "the index is gone; contents of other hosts are not used from now on: {error}"
        );
        self.shards.shard_gone(shard);
        if let Some(link) = self.links.get_mut(usize::from(shard)) {
            *link = None;
        }
    }
}

fn runs_of(entries: &[EntryId]) -> Vec<EntryRun> {
    join_runs(entries.iter().copied())
}

#[cfg(test)]
mod tests;
