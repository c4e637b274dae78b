//! Connections from one target host to another: contents, and pulls for them. Each direction has a
//! connection of its own, which one thread owns.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use page::{EntryId, HostNo, PAGE_SIZE};
use wire::{
    Channel, ControlReply, FrameKind, Hello, MAX_ENTRIES, PROTOCOL_VERSION, RackHello,
    WireCompression, WireError, decode_contents, decode_entries, encode_entries,
};

use crate::link::{Buffer, Compressor, Decompressor, Link, LinkError, Pool, Security};

use super::rack::RackStore;
use super::session::lock;

/// Pages of one frame: a buffer like those of the source.
pub(super) const FRAME_PAGES: usize = 63;

/// Most bytes of frames of which a page waits for one host. What comes beyond is not passed on; the host pulls it
/// later. At 1 Gbit/s it is a quarter of a second.
const MAX_QUEUED: usize = 32 << 20;

/// Logarithm of the zstd window between target hosts, 2 MiB: there is one at both ends of each of
/// their connections, and what is passed on is chosen by need, not by neighbourhood.
pub(super) const WINDOW_LOG: u8 = 21;

/// How often a silent side says that it lives.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// A host whose sessions are not there yet refuses; it is asked again so often, for so long.
const RETRY: Duration = Duration::from_millis(100);
const RETRY_FOR: Duration = Duration::from_secs(10);

/// What a connection needs of its agent and group.
#[derive(Clone)]
pub(crate) struct PeerContext {
    pub(crate) host: String,
    pub(crate) security: Security,
    pub(crate) peer_timeout: Duration,
    pub(crate) compression: WireCompression,
}

/// The way to one other target host. A thread runs while there is something to send.
pub(crate) struct Outgoing {
    shared: Arc<Shared>,
    pool: Arc<Pool>,
}

struct Shared {
    queue: Mutex<Queue>,
    filled: Condvar,
    context: PeerContext,
    store: Weak<RackStore>,
    address: String,
    host: HostNo,
    me: HostNo,
}

#[derive(Default)]
struct Queue {
    pulls: Vec<EntryId>,
    missing: Vec<EntryId>,
    contents: VecDeque<Content>,
    /// The entries of `contents`: a pull for one of them is answered by waiting.
    waiting: HashSet<EntryId>,
    /// How many of `contents` keep each body, by where it is.
    bodies: HashMap<usize, usize>,
    /// Bytes that these bodies hold.
    held: usize,
    is_running: bool,
    is_closed: bool,
}

impl Queue {
    fn is_empty(&self) -> bool {
        self.pulls.is_empty() && self.missing.is_empty() && self.contents.is_empty()
    }

    /// Queues a content, unless it waits already or its body does not fit.
    fn put(&mut self, content: Content) {
        let (at, held) = (content.body_at(), content.body.held());
        let keepers = self.bodies.get(&at).copied().unwrap_or(0);
        let more = if keepers == 0 { held } else { 0 };
        if self.held + more > MAX_QUEUED || !self.waiting.insert(content.entry) {
            return;
        }
        self.held += more;
        self.bodies.insert(at, keepers + 1);
        self.contents.push_back(content);
    }

    /// The first contents.
    fn take(&mut self, count: usize) -> Vec<Content> {
        let taken: Vec<_> = self.contents.drain(..count).collect();
        for content in &taken {
            self.waiting.remove(&content.entry);
            let at = content.body_at();
            match self.bodies.get_mut(&at) {
                Some(keepers) if *keepers > 1 => *keepers -= 1,
                _ => {
                    self.bodies.remove(&at);
                    self.held -= content.body.held();
                }
            }
        }
        taken
    }

    /// Forgets all that waits.
    fn clear(&mut self) {
        self.pulls.clear();
        self.missing.clear();
        self.take(self.contents.len());
    }
}

/// A page on its way.
struct Content {
    entry: EntryId,
    body: Arc<Buffer>,
    at: usize,
}

impl Content {
    /// Tells bodies apart that somebody has.
    fn body_at(&self) -> usize {
        Arc::as_ptr(&self.body).addr()
    }
}

impl Outgoing {
    pub(crate) fn new(
        context: &PeerContext,
        store: &Weak<RackStore>,
        (host, address): (HostNo, &str),
        me: HostNo,
    ) -> Self {
        let shared = Shared {
            queue: Mutex::default(),
            filled: Condvar::new(),
            context: context.clone(),
            store: Weak::clone(store),
            address: address.to_owned(),
            host,
            me,
        };
        Self {
            shared: Arc::new(shared),
            pool: Pool::new(FRAME_PAGES * PAGE_SIZE),
        }
    }

    /// A buffer for pages that are read for this host.
    pub(crate) fn buffer(&self, len: usize) -> Buffer {
        self.pool.take(len)
    }

    /// Queues contents, each with the body in which it is and where; what does not fit is left out, and
    /// what waits already. All at once: a frame takes what is there when its thread wakes up.
    pub(crate) fn contents(&self, contents: impl Iterator<Item = (EntryId, Arc<Buffer>, usize)>) {
        self.queue(|queue| {
            for (entry, body, at) in contents {
                queue.put(Content { entry, body, at });
            }
        });
    }

    /// Asks the host for entries.
    pub(crate) fn pull(&self, entries: &[EntryId]) {
        self.queue(|queue| queue.pulls.extend(entries));
    }

    /// Tells the host that it asked in vain, except for what is on its way to it.
    pub(crate) fn missing(&self, entries: &[EntryId]) {
        self.queue(|queue| {
            let gone = entries.iter().filter(|one| !queue.waiting.contains(*one));
            queue.missing.extend(gone);
        });
    }

    /// Ends the connection.
    pub(crate) fn close(&self) {
        lock(&self.shared.queue).is_closed = true;
        self.shared.filled.notify_all();
    }

    fn queue(&self, put: impl FnOnce(&mut Queue)) {
        let mut queue = lock(&self.shared.queue);
        if queue.is_closed {
            return;
        }
        put(&mut queue);
        if queue.is_empty() {
            return;
        }
        if !queue.is_running {
            let shared = Arc::clone(&self.shared);
            let started = std::thread::Builder::new()
                .name("gw-peer-send".into())
                .spawn(move || shared.run());
            match started {
                Ok(_) => queue.is_running = true,
                Err(error) => tracing::error!(%error, "no thread for another target host"),
            }
        }
        drop(queue);
        self.shared.filled.notify_one();
    }
}

/// What is sent next.
enum Next {
    Entries(FrameKind, Vec<EntryId>),
    Contents(Vec<Content>),
    Nothing,
}

impl Shared {
    /// The thread of the connection; ends with it, and is started again by what is queued later.
    fn run(&self) {
        if let Err(error) = self.connect().and_then(|link| self.send_all(link)) {
            tracing::info!(
                host = self.host.0,
                "the way to another target host is gone: {error}"
            );
            if let Some(store) = self.store.upgrade() {
                store.host_gone(self.host);
            }
        }
        let mut queue = lock(&self.queue);
        queue.is_running = false;
        queue.clear();
    }

    /// The host's own session may be a moment later than ours.
    fn connect(&self) -> Result<Link, LinkError> {
        let since = Instant::now();
        loop {
            match self.open() {
                Err(LinkError::Refused(_))
                    if since.elapsed() < RETRY_FOR && !lock(&self.queue).is_closed =>
                {
                    std::thread::sleep(RETRY);
                }
                other => return other,
            }
        }
    }

    fn open(&self) -> Result<Link, LinkError> {
        let context = &self.context;
        let store = self.store.upgrade().ok_or(LinkError::Closed)?.name.clone();
        let mut link = Link::connect(&self.address, &context.security, context.peer_timeout)?;
        link.send_hello(&Hello {
            version: PROTOCOL_VERSION,
            session: String::new(),
            channel: Channel::Peer,
            source: context.host.clone(),
            compression: context.compression,
            domain_key: None,
            rack: Some(RackHello {
                store,
                host: self.me.0,
                peers: Vec::new(),
            }),
        })?;
        match link.receive()? {
            ControlReply::Welcome => Ok(link),
            ControlReply::Refused { reason } => Err(LinkError::Refused(reason)),
            other => Err(WireError::Control(format!("unexpected answer {other:?}")).into()),
        }
    }

    fn send_all(&self, mut link: Link) -> Result<(), LinkError> {
        let mut compressor = Compressor::new(self.context.compression)?;
        let mut packed = Vec::new();
        loop {
            let Some(next) = self.next() else {
                return Ok(());
            };
            let mut send = |kind, vm, pieces: &[&[u8]], packs: bool| {
                let compressor = compressor.as_mut().filter(|_| packs);
                let pieces = pieces.iter().copied();
                link.send_frame((kind, vm), pieces, compressor, &mut packed)
            };
            match next {
                Next::Entries(kind, entries) => {
                    send(kind, 0, &[&encode_entries(&entries)], false)?;
                }
                Next::Contents(contents) => {
                    let entries: Vec<_> = contents.iter().map(|c| c.entry).collect();
                    let front = encode_entries(&entries);
                    let mut pieces = vec![front.as_slice()];
                    pieces.extend(contents.iter().map(|c| &c.body[c.at..c.at + PAGE_SIZE]));
                    send(FrameKind::Contents, 0, &pieces, true)?;
                }
                Next::Nothing => {
                    let Some(store) = self.store.upgrade() else {
                        return Ok(());
                    };
                    send(FrameKind::Heartbeat, store.is_active().into(), &[], false)?;
                }
            }
        }
    }

    /// Requests first: somebody waits. None: the store is closed.
    fn next(&self) -> Option<Next> {
        let mut queue = lock(&self.queue);
        if queue.is_empty() && !queue.is_closed {
            let waited = self.filled.wait_timeout(queue, HEARTBEAT);
            queue = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        if queue.is_closed {
            return None;
        }
        let queue = &mut *queue;
        for (kind, entries) in [
            (FrameKind::Pull, &mut queue.pulls),
            (FrameKind::Missing, &mut queue.missing),
        ] {
            if !entries.is_empty() {
                let count = entries.len().min(MAX_ENTRIES);
                return Some(Next::Entries(kind, entries.drain(..count).collect()));
            }
        }
        let count = queue.contents.len().min(FRAME_PAGES);
        if count == 0 {
            return Some(Next::Nothing);
        }
        Some(Next::Contents(queue.take(count)))
    }
}

/// Owns a connection from another target host until it ends.
pub(crate) fn receive(
    mut link: Link,
    store: &Weak<RackStore>,
    from: HostNo,
    compression: WireCompression,
) -> Result<(), LinkError> {
    let pool = Pool::new((FRAME_PAGES + 1) * PAGE_SIZE);
    let mut unpacker = Decompressor::new(compression)?;
    let mut packed = Vec::new();
    loop {
        let (header, body) = link.receive_frame(&pool, unpacker.as_mut(), &mut packed)?;
        let Some(store) = store.upgrade() else {
            return Ok(());
        };
        match header.kind() {
            FrameKind::Heartbeat if header.vm() == 1 => store.heard(),
            FrameKind::Heartbeat => {}
            FrameKind::Contents => {
                let (entries, at) = decode_contents(&body)?;
                store.pushed(from, (&entries, at), &Arc::new(body));
            }
            FrameKind::Pull => store.pulled(from, &decode_entries(&body)?),
            FrameKind::Missing => store.missing(from, &decode_entries(&body)?),
            other => return Err(WireError::UnexpectedKind(other as u8).into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_for_a_host_keeps_no_more_memory_than_its_limit_however_few_pages_of_a_frame_it_needs()
     {
        let pool = Pool::new(MAX_QUEUED / 4);
        let mut queue = Queue::default();
        let mut entries = (0..).map(EntryId);
        for _ in 0..8 {
            let body = Arc::new(pool.take(MAX_QUEUED / 4));
            for at in [0, PAGE_SIZE] {
                let entry = entries.next().unwrap();
                let body = Arc::clone(&body);
                queue.put(Content { entry, body, at });
            }
        }
        assert_eq!((queue.contents.len(), queue.held), (8, MAX_QUEUED));
        // With one page of the first gone the other keeps it, and with both there is room for one more.
        for (taken, fits) in [(1, false), (1, true)] {
            queue.take(taken);
            let before = queue.contents.len();
            let (entry, body) = (entries.next().unwrap(), Arc::new(pool.take(MAX_QUEUED / 4)));
            queue.put(Content { entry, body, at: 0 });
            assert_eq!(queue.contents.len() > before, fits);
        }
        queue.clear();
        assert!(queue.is_empty() && queue.held == 0);
        assert!(queue.waiting.is_empty() && queue.bodies.is_empty());
    }
}
