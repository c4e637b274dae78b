//! The index's end of one connection.

use std::time::Duration;

use page::{ContentId, EntryId};
use wire::WireError;
use wire::index::{Answer, FrameBuffer, Request, TableKey, Verdict};

use crate::groups::{Groups, GroupsError};
use crate::table::{ClientNo, Table};

/// Why a connection must be closed.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The client's bytes are not a message.
    #[error("the client's message cannot be read")]
    Wire(#[from] WireError),
    /// The first message is not `Join`, or a later one is.
    #[error("the client joins no table, or a second one")]
    OutOfOrder,
    /// The client cannot join.
    #[error("the client is refused")]
    Refused(#[from] GroupsError),
    /// The group was ended by another client.
    #[error("the group was ended")]
    Ended,
}

/// The table that this connection is about.
struct Joined {
    key: TableKey,
    epoch: u64,
    client: ClientNo,
}

/// One connection. It begins after the `Hello`, with the client's `Join`.
///
/// After an error, and when the connection ends, [`closed`](Self::closed) must be called.
pub struct Server {
    /// Of a table that this connection makes.
    epoch: u64,
    input: FrameBuffer,
    joined: Option<Joined>,
    verdicts: Vec<Verdict>,
}

impl Server {
    /// A new connection. `epoch` is random, and becomes that of the table if this connection's
    /// client is the first.
    #[must_use]
    pub fn new(epoch: u64) -> Self {
        Self {
            epoch,
            input: FrameBuffer::default(),
            joined: None,
            verdicts: Vec::new(),
        }
    }

    /// Takes what was received, in pieces of any length, and appends the answers to `out`.
    /// Answers are shorter than requests, except that a `Summary` has some 100 bytes.
    ///
    /// # Errors
    /// The connection is of no use any more: close it.
    pub fn handle(
        &mut self,
        groups: &mut Groups,
        input: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(), ServerError> {
        self.input.push(input);
        while let Some((kind, body)) = self.input.next_frame()? {
            let request = Request::decode(kind, body)?;
            match (&self.joined, request) {
                (None, Request::Join(key)) => {
                    self.joined = Some(join(groups, key, self.epoch, out)?);
                }
                (None, _) | (Some(_), Request::Join(_)) => return Err(ServerError::OutOfOrder),
                (Some(joined), Request::EndGroup) => groups.end(&joined.key.group),
                (Some(joined), request) => {
                    let table = groups
                        .table(&joined.key, joined.epoch)
                        .ok_or(ServerError::Ended)?;
                    apply(table, joined.client, request, &mut self.verdicts, out);
                }
            }
        }
        Ok(())
    }

    /// The connection is over, in whatever way.
    pub fn closed(self, groups: &mut Groups, now: Duration) {
        if let Some(joined) = self.joined {
            groups.leave(&joined.key, joined.epoch, joined.client, now);
        }
    }
}

fn join(
    groups: &mut Groups,
    key: TableKey,
    epoch: u64,
    out: &mut Vec<u8>,
) -> Result<Joined, GroupsError> {
    let (client, epoch) = groups.join(&key, epoch)?;
    let shard = groups.shard();
    Answer::Welcome { epoch, shard }.encode(out);
    Ok(Joined { key, epoch, client })
}

/// Applies a request to the table, and appends the answer if it has one.
fn apply(
    table: &mut Table,
    client: ClientNo,
    request: Request<'_>,
    verdicts: &mut Vec<Verdict>,
    out: &mut Vec<u8>,
) {
    match request {
        Request::Register { target, items } => {
            answer_entries(out, |entries| table.register(target, &items, entries));
        }
        Request::Withdraw { target } => table.withdraw(target),
        Request::Claim { target, ids } => {
            verdicts.clear();
            table.claim(target, client, &ids, verdicts);
            Answer::encode_verdicts(verdicts, out);
        }
        Request::Carried { entries } => {
            entries.iter().for_each(|run| table.carried(client, *run));
        }
        Request::Lost { carrier, entries } => {
            entries.iter().for_each(|run| table.lost(carrier, *run));
        }
        Request::CarrierGone { host } => table.carrier_gone(host),
        Request::Seed { target, ids } => {
            let ids: &[ContentId] = &ids;
            answer_entries(out, |entries| table.seed(target, ids, entries));
        }
        Request::Shared { target, ids } => {
            let ids: &[ContentId] = &ids;
            answer_entries(out, |entries| table.shared(target, ids, entries));
        }
        Request::Summary => Answer::Summary(table.summary()).encode(out),
        // Not about the table's contents: answered before.
        Request::Join(_) | Request::EndGroup => {}
    }
}

fn answer_entries(out: &mut Vec<u8>, fill: impl FnOnce(&mut Vec<Option<EntryId>>)) {
    let mut entries = Vec::new();
    fill(&mut entries);
    Answer::Entries(entries).encode(out);
}
