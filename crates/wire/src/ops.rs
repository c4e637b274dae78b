//! Operations: the body of a `Pages` or `Repair` frame.
//!
//! ```text
//! position (LEB128) · length of the operations (LEB128) · operations · page bytes
//! ```
//! Operations are applied in order. Pages are coded as runs; the start of a run is coded as
//! its distance from the end of the run before, so that a sweep over memory costs one byte a
//! run for it. Page bytes stand at the end, in the order of the operations that need them.

use page::{
    BlockIndex, ContentId, EntryId, FileRange, FrameSharing, HostNo, HostSet, PageNo, PageRun,
};

use crate::frame::take_u32;
use crate::{MAX_BODY, WireError, varint};

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
    /// How the pages of the fills, literals and references that follow in this body share their frame
    /// with other pages at the source (SLM section III-B); at the start of a body they do not.
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

/// Kinds of page operations that extend a run.
#[derive(Clone, Copy, PartialEq, Eq)]
enum RunKind {
    Zero,
    Fill(u8),
    Plain,
    /// First entry of the run.
    Literal(EntryId),
    /// First entry of the run.
    Reference(EntryId),
    Remote(RemoteKind),
}

/// What the pages of a run of remote references have in common.
#[derive(Clone, Copy, PartialEq, Eq)]
struct RemoteKind {
    /// First entry of the run.
    first: EntryId,
    carrier: HostNo,
    pushed: bool,
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

/// Writes operations, joining neighbouring pages into runs.
#[derive(Default)]
pub struct OpWriter {
    out: Vec<u8>,
    open: Option<(RunKind, PageRun)>,
    /// Ids of the open run of remote references.
    open_ids: Vec<u8>,
    /// Whom literals are passed on to.
    forward: HostSet,
    /// How the pages share their frames at the source.
    sharing: FrameSharing,
    block: Option<BlockIndex>,
    /// End of the run before, as in the module's page.
    last_end: u32,
}

impl OpWriter {
    /// A writer for a new body. The current block does not carry over from body to body.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether nothing was written.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.out.is_empty() && self.open.is_none()
    }

    /// Bytes written so far, the open run not counted.
    #[must_use]
    pub fn len(&self) -> usize {
        self.out.len()
    }

    /// A zero page.
    pub fn zero(&mut self, block: BlockIndex, page: PageNo) {
        self.page(block, page, RunKind::Zero);
    }

    /// A page filled with `byte`.
    pub fn fill(&mut self, block: BlockIndex, page: PageNo, byte: u8) {
        self.page(block, page, RunKind::Fill(byte));
    }

    /// A page with bytes and no entry.
    pub fn plain(&mut self, block: BlockIndex, page: PageNo) {
        self.page(block, page, RunKind::Plain);
    }

    /// A page with bytes that becomes `entry`.
    pub fn literal(&mut self, block: BlockIndex, page: PageNo, entry: EntryId) {
        self.literal_for(block, page, entry, HostSet::default());
    }

    /// A page with bytes that becomes `entry`, to be passed on to `hosts`.
    pub fn literal_for(&mut self, block: BlockIndex, page: PageNo, entry: EntryId, hosts: HostSet) {
        if hosts != self.forward {
            self.close_run();
            self.out.push(tag::FORWARD);
            varint::put(&mut self.out, hosts.bits());
            self.forward = hosts;
        }
        self.page(block, page, RunKind::Literal(entry));
    }

    /// Says how the pages that are not plain and follow share their frames at the source.
    pub fn shared(&mut self, sharing: FrameSharing) {
        if sharing == self.sharing {
            return;
        }
        self.close_run();
        match sharing {
            FrameSharing::No => self.out.push(tag::NOT_SHARED),
            FrameSharing::Merged => self.out.push(tag::SHARED),
            FrameSharing::File(range) => {
                self.out.push(tag::SHARED_FILE);
                varint::put(&mut self.out, range.file.into());
                varint::put(&mut self.out, varint::zigzag(range.ahead));
            }
        }
        self.sharing = sharing;
    }

    /// A page whose content another connection brings.
    pub fn remote(&mut self, block: BlockIndex, page: PageNo, content: &RemoteContent) {
        let kind = RemoteKind {
            first: content.entry,
            carrier: content.carrier,
            pushed: content.pushed,
        };
        self.page(block, page, RunKind::Remote(kind));
        self.open_ids.extend_from_slice(&content.id.0);
    }

    /// A page with the bytes of `entry`.
    pub fn reference(&mut self, block: BlockIndex, page: PageNo, entry: EntryId) {
        self.page(block, page, RunKind::Reference(entry));
    }

    /// Bytes to pass on verbatim, before RAM.
    pub fn raw(&mut self, bytes: &[u8]) {
        self.bytes(tag::RAW, bytes);
    }

    /// The start of the RAM section.
    pub fn ram_start(&mut self, bytes: &[u8]) {
        self.bytes(tag::RAM_START, bytes);
    }

    /// Bytes to pass on verbatim, after RAM.
    pub fn tail(&mut self, bytes: &[u8]) {
        self.bytes(tag::TAIL, bytes);
    }

    /// A piece of a package.
    pub fn package(&mut self, bytes: &[u8]) {
        self.bytes(tag::PACKAGE, bytes);
    }

    /// The last RAM section begins.
    pub fn end_begin(&mut self) {
        self.close_run();
        self.out.push(tag::END_BEGIN);
    }

    /// The last RAM section ends.
    pub fn end_closed(&mut self) {
        self.close_run();
        self.out.push(tag::END_CLOSED);
    }

    /// The front of a body, up to the page bytes.
    #[must_use]
    pub fn finish(mut self, position: u64) -> Vec<u8> {
        self.close_run();
        let mut body = Vec::with_capacity(self.out.len() + 16);
        varint::put(&mut body, position);
        varint::put(&mut body, self.out.len() as u64);
        body.extend_from_slice(&self.out);
        body
    }

    fn page(&mut self, block: BlockIndex, page: PageNo, kind: RunKind) {
        if let Some((open, run)) = &mut self.open
            && self.block == Some(block)
            && run.end() == Some(page.0)
            && extends(*open, run.count, kind)
        {
            run.count += 1;
            return;
        }
        self.close_run();
        if self.block != Some(block) {
            self.out.push(tag::BLOCK);
            varint::put(&mut self.out, block.0.into());
            self.block = Some(block);
            self.last_end = 0;
        }
        self.open = Some((
            kind,
            PageRun {
                start: page,
                count: 1,
            },
        ));
    }

    fn close_run(&mut self) {
        let Some((kind, run)) = self.open.take() else {
            return;
        };
        let (tag, entry) = match kind {
            RunKind::Zero => (tag::ZERO, None),
            RunKind::Fill(_) => (tag::FILL, None),
            RunKind::Plain => (tag::PLAIN, None),
            RunKind::Literal(entry) => (tag::LITERAL, Some(entry)),
            RunKind::Reference(entry) => (tag::REFERENCE, Some(entry)),
            RunKind::Remote(kind) if kind.pushed => (tag::REMOTE_PUSHED, Some(kind.first)),
            RunKind::Remote(kind) => (tag::REMOTE, Some(kind.first)),
        };
        self.out.push(tag);
        varint::put(
            &mut self.out,
            varint::zigzag(i64::from(run.start.0) - i64::from(self.last_end)),
        );
        varint::put(&mut self.out, run.count.into());
        if let RunKind::Fill(byte) = kind {
            self.out.push(byte);
        }
        if let Some(entry) = entry {
            varint::put(&mut self.out, entry_code(entry));
        }
        if let RunKind::Remote(kind) = kind {
            varint::put(&mut self.out, kind.carrier.0.into());
            self.out.append(&mut self.open_ids);
        }
        self.last_end = run.start.0.saturating_add(run.count);
    }

    fn bytes(&mut self, tag: u8, bytes: &[u8]) {
        self.close_run();
        self.out.push(tag);
        varint::put(&mut self.out, bytes.len() as u64);
        self.out.extend_from_slice(bytes);
    }
}

fn extends(open: RunKind, count: u32, next: RunKind) -> bool {
    match (open, next) {
        (RunKind::Literal(first), RunKind::Literal(entry))
        | (RunKind::Reference(first), RunKind::Reference(entry)) => {
            first.0.checked_add(count) == Some(entry.0)
        }
        (RunKind::Remote(open), RunKind::Remote(next)) => {
            let expected = RemoteKind {
                first: next.first,
                ..open
            };
            next == expected && open.first.0.checked_add(count) == Some(next.first.0)
        }
        _ => open == next,
    }
}

/// Entries of one session have the highest bit set; turned to the lowest, they are short too.
fn entry_code(entry: EntryId) -> u64 {
    entry.0.rotate_left(1).into()
}

/// A body taken apart.
#[derive(Clone, Copy, Debug)]
pub struct PagesBody<'a> {
    /// Position in the source QEMU's stream after this body.
    pub position: u64,
    /// The operations.
    pub ops: &'a [u8],
    /// The page bytes.
    pub pages: &'a [u8],
}

/// Takes a body apart without looking into the operations.
///
/// # Errors
/// Lengths that do not fit the body.
pub fn split_pages_body(body: &[u8]) -> Result<PagesBody<'_>, WireError> {
    let mut rest = body;
    let position = varint::take(&mut rest)?;
    let length = varint::take(&mut rest)?;
    if length > rest.len() as u64 {
        return Err(WireError::Truncated);
    }
    #[expect(
        clippy::cast_possible_truncation,
        reason = "at most the length of a slice"
    )]
    let (ops, pages) = rest.split_at(length as usize);
    if ops.len() > MAX_OPS {
        return Err(WireError::TooLong {
            what: "a list of operations",
            length,
            limit: MAX_OPS as u64,
        });
    }
    Ok(PagesBody {
        position,
        ops,
        pages,
    })
}

/// Reads operations one by one.
pub struct OpReader<'a> {
    rest: &'a [u8],
    last_end: u32,
}

impl<'a> OpReader<'a> {
    /// Reads the operations of a body.
    #[must_use]
    pub fn new(ops: &'a [u8]) -> Self {
        Self {
            rest: ops,
            last_end: 0,
        }
    }

    fn run(&mut self) -> Result<PageRun, WireError> {
        let distance = varint::unzigzag(varint::take(&mut self.rest)?);
        let start = i64::from(self.last_end)
            .checked_add(distance)
            .ok_or(WireError::NumberTooLarge)?;
        let start = PageNo(u32::try_from(start).map_err(|_| WireError::NumberTooLarge)?);
        let run = PageRun {
            start,
            count: take_u32(&mut self.rest)?,
        };
        match run.end() {
            Some(end) if run.count > 0 => self.last_end = end,
            _ => return Err(WireError::NumberTooLarge),
        }
        Ok(run)
    }

    fn entries(&mut self, run: PageRun) -> Result<EntryId, WireError> {
        let first = take_u32(&mut self.rest)?.rotate_right(1);
        first
            .checked_add(run.count)
            .ok_or(WireError::NumberTooLarge)?;
        Ok(EntryId(first))
    }

    fn remote(&mut self, pushed: bool) -> Result<Remote<'a>, WireError> {
        let run = self.run()?;
        let first = self.entries(run)?;
        let carrier =
            u16::try_from(varint::take(&mut self.rest)?).map_err(|_| WireError::NumberTooLarge)?;
        let (ids, _) = self.rest.as_chunks::<16>();
        let ids = ids.get(..run.count as usize).ok_or(WireError::Truncated)?;
        self.rest = &self.rest[ids.len() * 16..];
        Ok(Remote {
            run,
            first,
            carrier: HostNo(carrier),
            pushed,
            ids,
        })
    }

    fn bytes(&mut self) -> Result<&'a [u8], WireError> {
        let length = varint::take(&mut self.rest)?;
        if length > self.rest.len() as u64 {
            return Err(WireError::Truncated);
        }
        #[expect(
            clippy::cast_possible_truncation,
            reason = "at most the length of a slice"
        )]
        let (bytes, rest) = self.rest.split_at(length as usize);
        self.rest = rest;
        Ok(bytes)
    }

    fn op(&mut self, tag: u8) -> Result<Op<'a>, WireError> {
        Ok(match tag {
            tag::RAW => Op::Raw(self.bytes()?),
            tag::RAM_START => Op::RamStart(self.bytes()?),
            tag::BLOCK => {
                let block = u16::try_from(varint::take(&mut self.rest)?)
                    .map_err(|_| WireError::NumberTooLarge)?;
                self.last_end = 0;
                Op::Block(BlockIndex(block))
            }
            tag::ZERO => Op::Zero(self.run()?),
            tag::FILL => {
                let run = self.run()?;
                let (&byte, rest) = self.rest.split_first().ok_or(WireError::Truncated)?;
                self.rest = rest;
                Op::Fill(run, byte)
            }
            tag::PLAIN => Op::Plain(self.run()?),
            tag::LITERAL => {
                let run = self.run()?;
                Op::Literal(run, self.entries(run)?)
            }
            tag::REFERENCE => {
                let run = self.run()?;
                Op::Reference(run, self.entries(run)?)
            }
            tag::FORWARD => Op::Forward(HostSet::from_bits(varint::take(&mut self.rest)?)),
            tag::SHARED => Op::Shared(FrameSharing::Merged),
            tag::NOT_SHARED => Op::Shared(FrameSharing::No),
            tag::SHARED_FILE => {
                let file = u16::try_from(varint::take(&mut self.rest)?)
                    .map_err(|_| WireError::NumberTooLarge)?;
                let ahead = varint::unzigzag(varint::take(&mut self.rest)?);
                Op::Shared(FrameSharing::File(FileRange { file, ahead }))
            }
            tag::REMOTE => Op::Remote(self.remote(false)?),
            tag::REMOTE_PUSHED => Op::Remote(self.remote(true)?),
            tag::END_BEGIN => Op::EndBegin,
            tag::END_CLOSED => Op::EndClosed,
            tag::TAIL => Op::Tail(self.bytes()?),
            tag::PACKAGE => Op::Package(self.bytes()?),
            other => return Err(WireError::UnknownOp(other)),
        })
    }
}

impl<'a> Iterator for OpReader<'a> {
    type Item = Result<Op<'a>, WireError>;

    fn next(&mut self) -> Option<Self::Item> {
        let (&tag, rest) = self.rest.split_first()?;
        self.rest = rest;
        let op = self.op(tag);
        if op.is_err() {
            self.rest = &[];
        }
        Some(op)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(body: &[u8]) -> Vec<Op<'_>> {
        OpReader::new(split_pages_body(body).unwrap().ops)
            .collect::<Result<_, _>>()
            .unwrap()
    }

    #[test]
    fn neighbours_of_one_kind_become_one_run() {
        let mut w = OpWriter::new();
        let b = BlockIndex(0);
        for i in 0..5 {
            w.literal(b, PageNo(10 + i), EntryId(7 + i));
        }
        w.reference(b, PageNo(15), EntryId(1));
        w.reference(b, PageNo(16), EntryId(2));
        w.reference(b, PageNo(17), EntryId(9));
        w.zero(b, PageNo(3));
        let body = w.finish(99);
        assert_eq!(
            read(&body),
            [
                Op::Block(b),
                Op::Literal(
                    PageRun {
                        start: PageNo(10),
                        count: 5
                    },
                    EntryId(7)
                ),
                Op::Reference(
                    PageRun {
                        start: PageNo(15),
                        count: 2
                    },
                    EntryId(1)
                ),
                Op::Reference(
                    PageRun {
                        start: PageNo(17),
                        count: 1
                    },
                    EntryId(9)
                ),
                Op::Zero(PageRun {
                    start: PageNo(3),
                    count: 1
                }),
            ]
        );
        assert_eq!(split_pages_body(&body).unwrap().position, 99);
    }

    #[test]
    fn a_run_beyond_the_page_space_is_an_error() {
        let mut w = OpWriter::new();
        w.zero(BlockIndex(0), PageNo(u32::MAX));
        let body = w.finish(0);
        let ops = split_pages_body(&body).unwrap().ops;
        assert_eq!(
            OpReader::new(ops).last(),
            Some(Err(WireError::NumberTooLarge))
        );
    }

    #[derive(Clone, Debug)]
    enum Step {
        Zero,
        Fill(u8),
        Plain,
        Literal(u32),
        Reference(u32),
        LiteralFor(u32, u64),
        Remote(u32, u16, bool),
        Shared(FrameSharing),
        Raw(Vec<u8>),
        End,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            Just(Step::Zero),
            (0_u8..3).prop_map(Step::Fill),
            Just(Step::Plain),
            (0_u32..50).prop_map(Step::Literal),
            (0_u32..50).prop_map(Step::Reference),
            (0_u32..50, 0_u64..3).prop_map(|(e, hosts)| Step::LiteralFor(e, hosts)),
            (0_u32..50, 0_u16..2, any::<bool>()).prop_map(|(e, c, p)| Step::Remote(e, c, p)),
            sharing().prop_map(Step::Shared),
            proptest::collection::vec(any::<u8>(), 0..20).prop_map(Step::Raw),
            Just(Step::End),
        ]
    }

    fn sharing() -> impl Strategy<Value = FrameSharing> {
        prop_oneof![
            Just(FrameSharing::No),
            Just(FrameSharing::Merged),
            (0_u16..2, any::<i64>())
                .prop_map(|(file, ahead)| FrameSharing::File(FileRange { file, ahead })),
        ]
    }

    /// A page operation with all that belongs to it.
    #[derive(Clone, Debug, PartialEq)]
    struct Flat {
        block: u16,
        page: u32,
        kind: u8,
        value: u32,
        /// Whom it is passed on to, or who has it and whether it is pushed.
        hosts: u64,
        id: [u8; 16],
        sharing: FrameSharing,
    }

    /// Pages one by one, whatever the runs.
    fn flat(ops: &[Op<'_>]) -> Vec<Flat> {
        let (mut block, mut forward, mut out) = (0, 0, Vec::new());
        let mut sharing = FrameSharing::No;
        for op in ops {
            let (run, kind, value, hosts) = match *op {
                Op::Block(b) => {
                    block = b.0;
                    continue;
                }
                Op::Forward(hosts) => {
                    forward = hosts.bits();
                    continue;
                }
                Op::Shared(shared) => {
                    sharing = shared;
                    continue;
                }
                Op::Zero(run) => (run, 0, 0, 0),
                Op::Fill(run, byte) => (run, 1, u32::from(byte), 0),
                Op::Plain(run) => (run, 2, 0, 0),
                Op::Literal(run, entry) => (run, 3, entry.0, forward),
                Op::Reference(run, entry) => (run, 4, entry.0, 0),
                Op::Remote(r) => (r.run, 5, r.first.0, hosts_of(r.carrier.0, r.pushed)),
                _ => continue,
            };
            for (page, index) in run.pages().zip(0..) {
                let id = match op {
                    Op::Remote(remote) => remote.ids[index as usize],
                    _ => [0; 16],
                };
                let value = value + if kind >= 3 { index } else { 0 };
                let page = page.0;
                out.push(Flat {
                    block,
                    page,
                    kind,
                    value,
                    hosts,
                    id,
                    sharing,
                });
            }
        }
        out
    }

    fn hosts_of(carrier: u16, pushed: bool) -> u64 {
        u64::from(carrier) * 2 + u64::from(pushed)
    }

    /// Some entries are of the session, some of the rack.
    fn entry(number: u32) -> EntryId {
        EntryId(if number.is_multiple_of(2) {
            number
        } else {
            number | EntryId::LOCAL_BIT
        })
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(steps in proptest::collection::vec((step(), 0_u16..3, 0_u32..6), 0..60)) {
            let mut w = OpWriter::new();
            let mut expected = Vec::new();
            let mut sharing = FrameSharing::No;
            for (step, block, page) in &steps {
                let (b, p) = (BlockIndex(*block), PageNo(*page));
                if let Step::Shared(shared) = step {
                    sharing = *shared;
                }
                let mut is = |kind, value, hosts, id| {
                    expected.push(Flat { block: *block, page: *page, kind, value, hosts, id, sharing });
                };
                let none = [0; 16];
                match step {
                    Step::Zero => { w.zero(b, p); is(0, 0, 0, none); }
                    Step::Fill(v) => { w.fill(b, p, *v); is(1, u32::from(*v), 0, none); }
                    Step::Plain => { w.plain(b, p); is(2, 0, 0, none); }
                    Step::Literal(e) => { w.literal(b, p, entry(*e)); is(3, entry(*e).0, 0, none); }
                    Step::Reference(e) => { w.reference(b, p, entry(*e)); is(4, entry(*e).0, 0, none); }
                    Step::LiteralFor(e, hosts) => {
                        w.literal_for(b, p, entry(*e), HostSet::from_bits(*hosts));
                        is(3, entry(*e).0, *hosts, none);
                    }
                    Step::Remote(e, carrier, pushed) => {
                        let id = [e.to_le_bytes()[0]; 16];
                        let (carrier, pushed) = (HostNo(*carrier), *pushed);
                        w.remote(b, p, &RemoteContent { entry: entry(*e), id: ContentId(id), carrier, pushed });
                        is(5, entry(*e).0, hosts_of(carrier.0, pushed), id);
                    }
                    Step::Shared(shared) => w.shared(*shared),
                    Step::Raw(bytes) => w.raw(bytes),
                    Step::End => w.end_begin(),
                }
            }
            let body = w.finish(1);
            prop_assert_eq!(flat(&read(&body)), expected);
        }

        #[test]
        fn no_bytes_make_the_reader_panic_or_run_forever(body: Vec<u8>) {
            if let Ok(parts) = split_pages_body(&body) {
                prop_assert!(OpReader::new(parts.ops).count() <= parts.ops.len());
            }
        }
    }
}
