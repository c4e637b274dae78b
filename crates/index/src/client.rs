//! An agent's end of one connection to the index.

use std::borrow::Cow;
use std::collections::VecDeque;

use page::{ContentId, HostNo};
use wire::WireError;
use wire::index::{
    Answer, EntryRun, FrameBuffer, Item, MAX_IDS, MAX_RUN_ENTRIES, MAX_RUNS, Request, TableKey,
};

/// Number of a request that has an answer; ascending.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Ticket(pub u64);

impl Ticket {
    /// Gives out this number, and moves on.
    pub(crate) fn take(&mut self) -> Self {
        let ticket = *self;
        self.0 += 1;
        ticket
    }
}

/// Why a connection to the index must be closed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The index's bytes are not a message.
    #[error("the index's message cannot be read")]
    Wire(#[from] WireError),
    /// An answer to nothing, or of another kind or length than what was asked.
    #[error("the index answers something that was not asked")]
    Unasked,
    /// The server at this place in the list of shards is another shard.
    #[error("the index is another shard than it was taken for")]
    WrongShard,
}

/// What an answer must be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Asked {
    Welcome,
    Entries(usize),
    Verdicts(usize),
    Summary,
}

/// An answer that is still missing, at least in part.
struct Pending {
    ticket: Ticket,
    asked: Asked,
    /// What came of a batch that went in several messages.
    part: Option<Answer>,
}

/// One connection: encodes requests, and gives the answers in the order of the requests.
///
/// Batches of any length go in as many messages as they need; the answer is whole again.
#[derive(Default)]
pub struct Client {
    next: Ticket,
    pending: VecDeque<Pending>,
    input: FrameBuffer,
}

impl Client {
    /// A new connection; [`join`](Self::join) comes first.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Joins the table that everything after is about. Answer: `Welcome`.
    pub fn join(&mut self, key: TableKey, out: &mut Vec<u8>) -> Ticket {
        Request::Join(key).encode(out);
        self.expect(Asked::Welcome)
    }

    /// These contents are in VMs that will run on `target`. Answer: `Entries`.
    pub fn register(&mut self, target: HostNo, items: &[Item], out: &mut Vec<u8>) -> Ticket {
        for items in items.chunks(MAX_IDS) {
            let items = Cow::Borrowed(items);
            Request::Register { target, items }.encode(out);
        }
        self.expect(Asked::Entries(items.len()))
    }

    /// Forget what was registered for `target`.
    pub fn withdraw(&mut self, target: HostNo, out: &mut Vec<u8>) {
        Request::Withdraw { target }.encode(out);
    }

    /// Pages with these contents are about to go to `target`. Answer: `Verdicts`.
    pub fn claim(&mut self, target: HostNo, ids: &[ContentId], out: &mut Vec<u8>) -> Ticket {
        for ids in ids.chunks(MAX_IDS) {
            let ids = Cow::Borrowed(ids);
            Request::Claim { target, ids }.encode(out);
        }
        self.expect(Asked::Verdicts(ids.len()))
    }

    /// These entries, claimed here, have reached their carrier. Local entries, here and in
    /// [`lost`](Self::lost), are not the index's business and are left out.
    pub fn carried(&mut self, entries: &[EntryRun], out: &mut Vec<u8>) {
        for entries in bounded(entries) {
            let entries = entries.into();
            Request::Carried { entries }.encode(out);
        }
    }

    /// `carrier` does not have these entries.
    pub fn lost(&mut self, carrier: HostNo, entries: &[EntryRun], out: &mut Vec<u8>) {
        for entries in bounded(entries) {
            let entries = entries.into();
            Request::Lost { carrier, entries }.encode(out);
        }
    }

    /// Nothing is at the target host any more.
    pub fn carrier_gone(&mut self, host: HostNo, out: &mut Vec<u8>) {
        Request::CarrierGone { host }.encode(out);
    }

    /// VMs that run on `target` already hold these contents. Answer: `Entries`.
    pub fn seed(&mut self, target: HostNo, ids: &[ContentId], out: &mut Vec<u8>) -> Ticket {
        for ids in ids.chunks(MAX_IDS) {
            let ids = Cow::Borrowed(ids);
            Request::Seed { target, ids }.encode(out);
        }
        self.expect(Asked::Entries(ids.len()))
    }

    /// Which of these contents is any other host than `target` registered to need? Answer:
    /// `Entries`, with those of the ones that are.
    pub fn shared(&mut self, target: HostNo, ids: &[ContentId], out: &mut Vec<u8>) -> Ticket {
        for ids in ids.chunks(MAX_IDS) {
            let ids = Cow::Borrowed(ids);
            Request::Shared { target, ids }.encode(out);
        }
        self.expect(Asked::Entries(ids.len()))
    }

    /// What is in the table? Answer: `Summary`.
    pub fn summary(&mut self, out: &mut Vec<u8>) -> Ticket {
        Request::Summary.encode(out);
        self.expect(Asked::Summary)
    }

    /// The group is done.
    pub fn end_group(&mut self, out: &mut Vec<u8>) {
        Request::EndGroup.encode(out);
    }

    /// Takes what was received, in pieces of any length.
    pub fn handle(&mut self, input: &[u8]) {
        self.input.push(input);
    }

    /// The next answer, in the order of the requests; `None` until more is received. To be
    /// called until then after every [`handle`](Self::handle), and after a request of an empty
    /// batch, whose answer needs no message.
    ///
    /// # Errors
    /// The connection is of no use any more: close it.
    pub fn poll_answer(&mut self) -> Result<Option<(Ticket, Answer)>, ClientError> {
        loop {
            if let Some(front) = self.pending.front()
                && let Some(empty) = empty_answer(front.asked)
            {
                let ticket = front.ticket;
                self.pending.pop_front();
                return Ok(Some((ticket, empty)));
            }
            let Some((kind, body)) = self.input.next_frame()? else {
                return Ok(None);
            };
            let answer = Answer::decode(kind, body)?;
            let pending = self.pending.front_mut().ok_or(ClientError::Unasked)?;
            let whole = join_parts(pending.part.take(), answer)?;
            if is_whole(pending.asked, &whole)? {
                let ticket = pending.ticket;
                self.pending.pop_front();
                return Ok(Some((ticket, whole)));
            }
            pending.part = Some(whole);
        }
    }

    /// Requests whose answers have not come.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.pending.len()
    }

    fn expect(&mut self, asked: Asked) -> Ticket {
        let ticket = self.next.take();
        let part = None;
        self.pending.push_back(Pending {
            ticket,
            asked,
            part,
        });
        ticket
    }
}

/// The answer to an empty batch, for which no message goes out.
pub(crate) fn empty_answer(asked: Asked) -> Option<Answer> {
    match asked {
        Asked::Entries(0) => Some(Answer::Entries(Vec::new())),
        Asked::Verdicts(0) => Some(Answer::Verdicts(Vec::new())),
        _ => None,
    }
}

fn join_parts(part: Option<Answer>, next: Answer) -> Result<Answer, ClientError> {
    match (part, next) {
        (None, next) => Ok(next),
        (Some(Answer::Entries(mut all)), Answer::Entries(next)) => {
            all.extend(next);
            Ok(Answer::Entries(all))
        }
        (Some(Answer::Verdicts(mut all)), Answer::Verdicts(next)) => {
            all.extend(next);
            Ok(Answer::Verdicts(all))
        }
        _ => Err(ClientError::Unasked),
    }
}

/// Whether this is all that was asked; an error if it is something else, or more, or nothing.
fn is_whole(asked: Asked, answer: &Answer) -> Result<bool, ClientError> {
    let (asked, has) = match (asked, answer) {
        (Asked::Welcome, Answer::Welcome { .. }) | (Asked::Summary, Answer::Summary(_)) => (1, 1),
        (Asked::Entries(asked), Answer::Entries(entries)) => (asked, entries.len()),
        (Asked::Verdicts(asked), Answer::Verdicts(verdicts)) => (asked, verdicts.len()),
        _ => return Err(ClientError::Unasked),
    };
    if has > asked || has == 0 {
        return Err(ClientError::Unasked);
    }
    Ok(has == asked)
}

/// Cuts runs into lists that fit a message each.
fn bounded(runs: &[EntryRun]) -> Vec<Vec<EntryRun>> {
    let (mut lists, mut list, mut room) = (Vec::new(), Vec::new(), MAX_RUN_ENTRIES);
    for run in runs.iter().filter(|run| !run.first.is_local()) {
        let mut rest = *run;
        while rest.count > 0 {
            if room == 0 || list.len() == MAX_RUNS {
                lists.push(std::mem::take(&mut list));
                room = MAX_RUN_ENTRIES;
            }
            let count = rest.count.min(room);
            let first = rest.first;
            list.push(EntryRun { first, count });
            room -= count;
            rest = EntryRun {
                first: first.plus(count),
                count: rest.count - count,
            };
        }
    }
    if !list.is_empty() {
        lists.push(list);
    }
    lists
}
