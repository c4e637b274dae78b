//! Writing operations.

use page::{BlockIndex, EntryId, FrameSharing, HostNo, HostSet, PageNo, PageRun};

use super::{RemoteContent, tag};
use crate::varint;

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

    /// Says how the pages that follow share their frames at the source, after a switch to post-copy plain ones, too.
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
