//! Operations: the body of a `Pages` or `Repair` frame.
//!
//! ```text
//! position (LEB128) · length of the operations (LEB128) · operations · page bytes
//! ```
//! Operations are applied in order. Pages are coded as runs; the start of a run is coded as
//! its distance from the end of the run before, so that a sweep over memory costs one byte a
//! run for it. Page bytes stand at the end, in the order of the operations that need them.

use page::{BlockIndex, ContentId, EntryId, FrameSharing, HostNo, HostSet, PageRun};

use crate::MAX_BODY;

mod read;
mod write;

pub use read::{OpReader, PagesBody, split_pages_body};
pub use write::OpWriter;

/// Most bytes of operations in one body: every page of a full read buffer (28 thousand zero
/// records of 9 bytes) as a run of its own takes under 8 bytes each.
pub const MAX_OPS: usize = MAX_BODY / 2;

/// One step of rebuilding a VM's stream at the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op<'a> {
    /// Bytes that are not RAM and stand before its end, whole items, to be passed on verbatim.
    Raw(&'a [u8]),
    /// The RAM section's start with its block list, verbatim.
    RamStart(&'a [u8]),
    /// The pages that follow belong to this block.
    Block(BlockIndex),
    /// Zero pages.
    Zero(PageRun),
    /// Pages filled with one byte.
    Fill(PageRun, u8),
    /// Pages with their bytes; nobody will refer to them.
    Plain(PageRun),
    /// Literals that follow in this body are to be passed on to these target hosts, until
    /// another operation of this kind; at the start of a body to none.
    Forward(HostSet),
    /// How the pages of the fills, literals and references that follow in this body, and after a switch to post-copy of
    /// the plain ones, share their frame with other pages at the source (SLM section III-B); at the start of a body they
    /// do not.
    Shared(FrameSharing),
    /// Pages with their bytes, which become the entries from this one on.
    Literal(PageRun, EntryId),
    /// Pages whose bytes are those of the entries from this one on.
    Reference(PageRun, EntryId),
    /// Pages whose contents another connection brings, or brought, to this target host or to
    /// another one (IRLM section 2.5: the remote flag).
    Remote(Remote<'a>),
    /// A piece of the package with which a switch to post-copy hands over the device state,
    /// verbatim; nothing may come between two pieces. What begins it is `Raw`.
    Package(&'a [u8]),
    /// The last RAM section begins: everything before must have been delivered.
    EndBegin,
    /// The last RAM section ends.
    EndClosed,
    /// Bytes after RAM: device state, verbatim.
    Tail(&'a [u8]),
}

/// Pages by the names of contents that this session does not carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remote<'a> {
    /// The pages.
    pub run: PageRun,
    /// Entry of the first page; the others follow it.
    pub first: EntryId,
    /// The target host that has the contents, or is about to.
    pub carrier: HostNo,
    /// Whether the carrier passes them on without being asked.
    pub pushed: bool,
    /// What the bytes must hash to: `run.count` ids of 16 bytes.
    pub ids: &'a [[u8; 16]],
}

impl Remote<'_> {
    /// The entries and their ids, in order.
    pub fn contents(&self) -> impl Iterator<Item = (EntryId, ContentId)> {
        (0..)
            .map(|index| self.first.plus(index))
            .zip(self.ids.iter().map(|id| ContentId(*id)))
    }
}

impl Op<'_> {
    /// Pages that the operation is about.
    #[must_use]
    pub fn pages(&self) -> u32 {
        match self {
            Self::Zero(run)
            | Self::Fill(run, _)
            | Self::Plain(run)
            | Self::Literal(run, _)
            | Self::Reference(run, _) => run.count,
            Self::Remote(remote) => remote.run.count,
            _ => 0,
        }
    }

    /// Pages whose bytes stand at the end of the body.
    #[must_use]
    pub fn pages_with_bytes(&self) -> u32 {
        match self {
            Self::Plain(run) | Self::Literal(run, _) => run.count,
            _ => 0,
        }
    }
}

mod tag {
    pub(super) const RAW: u8 = 1;
    pub(super) const RAM_START: u8 = 2;
    pub(super) const BLOCK: u8 = 3;
    pub(super) const ZERO: u8 = 4;
    pub(super) const FILL: u8 = 5;
    pub(super) const PLAIN: u8 = 6;
    pub(super) const LITERAL: u8 = 7;
    pub(super) const REFERENCE: u8 = 8;
    pub(super) const END_BEGIN: u8 = 9;
    pub(super) const END_CLOSED: u8 = 10;
    pub(super) const TAIL: u8 = 11;
    pub(super) const FORWARD: u8 = 12;
    pub(super) const REMOTE: u8 = 13;
    /// As `REMOTE`, of contents that the carrier passes on by itself.
    pub(super) const REMOTE_PUSHED: u8 = 14;
    pub(super) const SHARED: u8 = 15;
    pub(super) const NOT_SHARED: u8 = 16;
    pub(super) const SHARED_FILE: u8 = 18;
    pub(super) const PACKAGE: u8 = 17;
}

/// Where a content that another connection brings is to be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoteContent {
    /// Its entry.
    pub entry: EntryId,
    /// Its id.
    pub id: ContentId,
    /// The target host that has it, or is about to.
    pub carrier: HostNo,
    /// Whether the carrier passes it on without being asked.
    pub pushed: bool,
}

#[cfg(test)]
mod tests;
