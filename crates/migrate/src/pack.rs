//! Source role: the stream of a source QEMU becomes page operations.
//!
//! In two halves, so that the table shared by all VMs of a session is locked once a buffer, not
//! once a page: [`Packer::scan`] decodes and hashes without the table, [`Scan::resolve`] asks
//! the table and writes the operations. Page bytes stay where QEMU's stream put them; the
//! operations name their offsets.
//!
//! Between the halves the rack index may be asked about the contents that the table does not
//! know ([`Scan::unknown`]), many at once and while the next buffer is read (IRLM section 2.5,
//! which asks for each page):
//!
//! ```text
//!  scan ──► table knows it? ── yes ─────────────────────────────────► reference
//!                 │ no
//!                 ├─ asked: carry it ────────────► literal of the rack, passed on to some hosts
//!                 ├─ asked: another target has it ──────────────────► remote reference
//!                 └─ not asked, or no answer ────► literal of this session
//! ```
//!
//! Pages that share their frame with others at the source ([`SharedPages`]) are marked on the way, so
//! that the target can have them share again. What is said of frames is a hint that is old when it
//! is used: whether two pages are the same is decided by their content here, too. Pages can be marked
//! for what they hold as well ([`IdenticalPages`]).
//!
//! Succeeds or fails, the source VM is untouched: this machine only reads.

mod identical;
mod shared;

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use content::{Claim, HostTable};
use page::{
    BlockIndex, ContentId, ContentKey, EntryId, FrameSharing, PAGE_SIZE, PageBytes, PageNo,
    fill_byte,
};
use qstream::{BlockList, Decoder, Item, Step, StreamError};
use wire::index::Verdict;
use wire::{OpWriter, RemoteContent};

pub use identical::IdenticalPages;
pub use shared::SharedPages;

/// One step of the stream, as scanned from a buffer. Ranges and offsets are of that buffer.
#[derive(Debug)]
enum Piece {
    Page {
        block: BlockIndex,
        page: PageNo,
        at: u32,
        id: Option<ContentId>,
        sharing: FrameSharing,
    },
    Zero {
        block: BlockIndex,
        page: PageNo,
    },
    Fill {
        block: BlockIndex,
        page: PageNo,
        byte: u8,
        sharing: FrameSharing,
    },
    Raw(Range<usize>),
    Package(Range<usize>),
    RamStart(Range<usize>),
    EndBegin,
    EndClosed,
    Tail(Range<usize>),
}

/// How many pages went in which way, since the last time it was asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PackCounts {
    /// Zero pages.
    pub zero: u64,
    /// Other fill pages.
    pub fill: u64,
    /// Pages with bytes.
    pub literal: u64,
    /// Pages by reference.
    pub reference: u64,
    /// Pages by reference to what another connection brings.
    pub remote: u64,
}

impl std::ops::AddAssign for PackCounts {
    fn add_assign(&mut self, other: Self) {
        self.zero += other.zero;
        self.fill += other.fill;
        self.literal += other.literal;
        self.reference += other.reference;
        self.remote += other.remote;
    }
}

/// Milestones of the stream that the caller reacts to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Milestones {
    /// The last RAM section has begun: the guest is stopped.
    pub end_begun: bool,
    /// All RAM is through: what follows is device state, or the end.
    pub tail_begun: bool,
    /// The device state is through, and RAM follows: post-copy.
    pub switched: bool,
}

/// A buffer as operations.
#[derive(Debug, Default)]
pub struct Packed {
    /// Front of the frame's body: position and operations.
    pub front: Vec<u8>,
    /// Offsets in the scanned buffer of the pages whose bytes follow, in order.
    pub pages: Vec<u32>,
    /// Position in the stream after this.
    pub position: u64,
    /// Entries of the rack whose bytes are among the pages.
    pub carried: Vec<EntryId>,
    /// How the pages went.
    pub counts: PackCounts,
}

impl Packed {
    /// Bytes of the frame's body, before compression.
    #[must_use]
    pub fn raw_len(&self) -> usize {
        self.front.len() + self.pages.len() * PAGE_SIZE
    }
}

/// Turns one VM's stream into operations.
pub struct Packer {
    decoder: Decoder,
    /// Absent: no deduplication, nothing is hashed.
    key: Option<ContentKey>,
    /// Names of the blocks that can be read again from the source QEMU's memory. Only their
    /// contents become entries: a reference must be repairable.
    repairable: HashSet<String>,
    /// By block index, filled when the block list is known.
    enters_table: Vec<bool>,
    /// Whether only pages that share their frame are hashed: the others go plain.
    shared_only: bool,
    shared: Arc<SharedPages>,
    /// By block index, the block's position in `shared`.
    shared_at: Vec<Option<usize>>,
    /// What is to share beside that, for what it holds.
    identical: Option<IdenticalPages>,
    pieces: Vec<Piece>,
    milestones: Milestones,
    /// A switch to post-copy may be read.
    may_switch: bool,
    /// Pages that were sent ahead of the stream, and do not go again.
    ahead: HashSet<(BlockIndex, PageNo)>,
}

/// What was scanned from one buffer.
#[derive(Debug)]
pub struct Scan {
    pieces: Vec<Piece>,
    position: u64,
}

impl Packer {
    /// A packer at the start of a stream. With a `key`, contents of the `repairable` blocks are
    /// deduplicated.
    #[must_use]
    pub fn new(key: Option<ContentKey>, repairable: HashSet<String>) -> Self {
        Self {
            decoder: Decoder::new(),
            key,
            repairable,
            enters_table: Vec::new(),
            shared_only: false,
            shared: Arc::default(),
            shared_at: Vec::new(),
            identical: None,
            pieces: Vec::new(),
            milestones: Milestones::default(),
            may_switch: false,
            ahead: HashSet::new(),
        }
    }

    /// Compares only contents of pages that share their frame, or are to share a page at the target.
    #[must_use]
    pub fn shared_only(mut self) -> Self {
        self.shared_only = true;
        self
    }

    /// Has pages share at the target for what they hold, too.
    #[must_use]
    pub fn share_identical(mut self, pages: IdenticalPages) -> Self {
        self.identical = Some(pages);
        self
    }

    /// Takes over what is known of shared frames, for the pages that are scanned from now on.
    pub fn set_shared(&mut self, shared: Arc<SharedPages>) {
        self.shared = shared;
        self.find_shared();
    }

    /// Whether a switch to post-copy stands at `from`, which is not scanned before
    /// [`Packer::pass_switch`]: all that is before it must be complete at the target, whose
    /// QEMU takes no page twice afterwards and none that is older than the switch.
    #[must_use]
    pub fn awaits_switch(&self, input: &[u8], from: usize) -> bool {
        !self.may_switch
            && input
                .get(from..)
                .is_some_and(|rest| self.decoder.switches(rest))
    }

    /// Everything before the switch is complete at the target.
    pub fn pass_switch(&mut self) {
        self.may_switch = true;
    }

    /// These pages were read from memory and sent ahead, after the switch: QEMU's own copies are left out.
    pub fn sent_ahead(&mut self, pages: impl IntoIterator<Item = (BlockIndex, PageNo)>) {
        self.ahead.extend(pages);
    }

    /// These pages came on a second channel of QEMU's: no copies of them come here.
    pub fn came_otherwise(&mut self, pages: impl IntoIterator<Item = (BlockIndex, PageNo)>) {
        for page in pages {
            self.ahead.remove(&page);
        }
    }

    /// Decodes as much of `input` as there is and hashes its pages. Returns the bytes used; the caller keeps
    /// `input` for [`Scan::resolve`], and offers the rest again, in front of what follows.
    ///
    /// # Errors
    /// A stream that is not QEMU's, or uses what cannot be carried.
    pub fn scan(&mut self, input: &[u8], from: usize) -> Result<usize, StreamError> {
        let mut at = from;
        while let Some(rest) = input.get(at..).filter(|rest| !rest.is_empty()) {
            if self.awaits_switch(input, at) {
                break;
            }
            match self.decoder.decode(rest)? {
                Step::NeedMore { .. } => break,
                Step::Item { item, consumed } => {
                    let range = at..at + consumed;
                    let piece = match item {
                        Item::Page { block, page, .. } | Item::Zero { block, page }
                            if self.is_ahead(block, page) =>
                        {
                            None
                        }
                        Item::Page { block, page, bytes } => {
                            let at = range.end - PAGE_SIZE;
                            Some(self.piece_of_page((block, page), bytes, at))
                        }
                        Item::Zero { block, page } => Some(Piece::Zero { block, page }),
                        Item::Header { .. }
                        | Item::Command { .. }
                        | Item::Discard { .. }
                        | Item::PackageBegin { .. }
                        | Item::Opaque(_) => Some(Piece::Raw(range)),
                        Item::Package(_) => {
                            self.milestones.switched = self.decoder.has_switched();
                            Some(Piece::Package(range))
                        }
                        Item::RamStart { .. } => {
                            self.learn_blocks();
                            Some(Piece::RamStart(range))
                        }
                        Item::PartBegin | Item::PartClosed => None,
                        Item::EndBegin => {
                            self.milestones.end_begun = true;
                            Some(Piece::EndBegin)
                        }
                        Item::EndClosed => {
                            self.milestones.tail_begun = true;
                            Some(Piece::EndClosed)
                        }
                        Item::Tail(_) => Some(Piece::Tail(range)),
                    };
                    self.pieces.extend(piece);
                    at += consumed;
                }
            }
        }
        Ok(at)
    }

    fn learn_blocks(&mut self) {
        let Some(blocks) = self.decoder.blocks() else {
            return;
        };
        self.enters_table = blocks
            .iter()
            .map(|(_, block)| self.repairable.contains(&*block.name))
            .collect();
        self.find_shared();
    }

    fn find_shared(&mut self) {
        let Some(blocks) = self.decoder.blocks() else {
            return;
        };
        if let Some(identical) = &mut self.identical {
            identical.learn_blocks(blocks.iter().map(|(_, block)| &*block.name));
        }
        self.shared_at = blocks
            .iter()
            .map(|(_, block)| self.shared.position_of(&block.name))
            .collect();
    }

    fn is_ahead(&mut self, block: BlockIndex, page: PageNo) -> bool {
        !self.ahead.is_empty() && self.milestones.switched && self.ahead.remove(&(block, page))
    }

    fn piece_of_page(
        &self,
        (block, page): (BlockIndex, PageNo),
        bytes: &PageBytes,
        at: usize,
    ) -> Piece {
        let enters = self.enters_table.get(usize::from(block.0)) == Some(&true);
        let key = self.key.as_ref().filter(|_| enters);
        let mut sharing = match key {
            Some(_) => self.sharing(block, page),
            None => FrameSharing::No,
        };
        let identical = self.identical.as_ref().filter(|identical| {
            key.is_some() && !sharing.is_shared() && identical.may_share(block.0.into(), page)
        });
        match fill_byte(bytes) {
            Some(0) => Piece::Zero { block, page },
            Some(byte) => {
                if identical.is_some_and(|identical| identical.has_fill(byte)) {
                    sharing = FrameSharing::Merged;
                }
                Piece::Fill {
                    block,
                    page,
                    byte,
                    sharing,
                }
            }
            None => {
                let is_hashed = !self.shared_only || sharing.is_shared() || identical.is_some();
                let id = key.filter(|_| is_hashed).map(|key| key.id_of(bytes));
                if id.is_some_and(|id| identical.is_some_and(|identical| identical.has(id))) {
                    sharing = FrameSharing::Merged;
                }
                #[expect(
                    clippy::cast_possible_truncation,
                    reason = "buffers are far below 4 GiB"
                )]
                let at = at as u32;
                Piece::Page {
                    block,
                    page,
                    at,
                    id: id.filter(|_| sharing.is_shared() || !self.shared_only),
                    sharing,
                }
            }
        }
    }

    fn sharing(&self, block: BlockIndex, page: PageNo) -> FrameSharing {
        let position = self.shared_at.get(usize::from(block.0)).copied().flatten();
        position.map_or(FrameSharing::No, |position| {
            self.shared.sharing(position, page)
        })
    }

    /// Whether a scan found something that has not been taken.
    #[must_use]
    pub fn has_pieces(&self) -> bool {
        !self.pieces.is_empty()
    }

    /// How many steps of the stream were scanned and not taken.
    #[must_use]
    pub fn pieces(&self) -> usize {
        self.pieces.len()
    }

    /// Takes what was scanned since the last call.
    pub fn take(&mut self) -> Scan {
        // As many again, probably: the next buffer is as long.
        let next = Vec::with_capacity(self.pieces.len());
        Scan {
            pieces: std::mem::replace(&mut self.pieces, next),
            position: self.decoder.position(),
        }
    }

    /// Bytes of the stream decoded so far.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.decoder.position()
    }

    /// How far the stream is.
    #[must_use]
    pub fn milestones(&self) -> Milestones {
        self.milestones
    }

    /// The stream's blocks, once they are known.
    #[must_use]
    pub fn blocks(&self) -> Option<&Arc<BlockList>> {
        self.decoder.blocks()
    }
}

impl Scan {
    /// Contents that the table does not know, in order; those that come twice are there twice.
    pub fn unknown<'a>(&'a self, table: &'a HostTable) -> impl Iterator<Item = ContentId> + 'a {
        let ids = self.pieces.iter().filter_map(|piece| match piece {
            Piece::Page { id, .. } => *id,
            _ => None,
        });
        ids.filter(|id| table.find(*id).is_none())
    }

    /// Writes what was scanned from `input` as operations, asking and filling the table.
    /// `answers` are what the index says of some of the contents, in their order.
    ///
    /// The result must be on its way before another VM's buffer is resolved against the same
    /// table, so that bytes travel before references to them.
    pub fn resolve(
        self,
        input: &[u8],
        table: &mut HostTable,
        answers: &[(ContentId, Verdict)],
    ) -> Packed {
        let mut out = Resolver {
            ops: OpWriter::new(),
            pages: Vec::new(),
            carried: Vec::new(),
            counts: PackCounts::default(),
            table,
            answers: answers.iter(),
        };
        for piece in self.pieces {
            match piece {
                Piece::Page {
                    block,
                    page,
                    at,
                    id,
                    sharing,
                } => out.page((block, page), at, id, sharing),
                Piece::Zero { block, page } => {
                    out.counts.zero += 1;
                    out.ops.zero(block, page);
                }
                Piece::Fill {
                    block,
                    page,
                    byte,
                    sharing,
                } => {
                    out.counts.fill += 1;
                    out.ops.shared(sharing);
                    out.ops.fill(block, page, byte);
                }
                Piece::Raw(range) => out.ops.raw(&input[range]),
                Piece::Package(range) => out.ops.package(&input[range]),
                Piece::RamStart(range) => out.ops.ram_start(&input[range]),
                Piece::EndBegin => out.ops.end_begin(),
                Piece::EndClosed => out.ops.end_closed(),
                Piece::Tail(range) => out.ops.tail(&input[range]),
            }
        }
        Packed {
            front: out.ops.finish(self.position),
            pages: out.pages,
            position: self.position,
            carried: out.carried,
            counts: out.counts,
        }
    }
}

/// A buffer on its way from pieces to operations.
struct Resolver<'a> {
    ops: OpWriter,
    pages: Vec<u32>,
    carried: Vec<EntryId>,
    counts: PackCounts,
    table: &'a mut HostTable,
    answers: std::slice::Iter<'a, (ContentId, Verdict)>,
}

impl Resolver<'_> {
    fn page(
        &mut self,
        (block, page): (BlockIndex, PageNo),
        at: u32,
        id: Option<ContentId>,
        sharing: FrameSharing,
    ) {
        // A plain page, too: after a switch it would share as the one before it.
        self.ops.shared(sharing);
        let Some(id) = id else {
            self.counts.literal += 1;
            self.pages.push(at);
            self.ops.plain(block, page);
            return;
        };
        let known = self.table.find(id);
        match (self.answer(id), known) {
            // Nobody else sends the bytes, even if another VM of this session has named the
            // entry in the meantime.
            (Verdict::Carry { entry, hosts }, _) => {
                if known.is_none() {
                    self.table.enter(id, entry);
                }
                self.counts.literal += 1;
                self.pages.push(at);
                self.carried.push(entry);
                self.ops.literal_for(block, page, entry, hosts);
            }
            (_, Some(entry)) => {
                self.counts.reference += 1;
                self.ops.reference(block, page, entry);
            }
            (
                Verdict::At {
                    entry,
                    carrier,
                    pushed,
                },
                None,
            ) => {
                self.table.enter(id, entry);
                self.counts.remote += 1;
                let content = RemoteContent {
                    entry,
                    id,
                    carrier,
                    pushed,
                };
                self.ops.remote(block, page, &content);
            }
            (Verdict::Full, None) => {
                self.counts.literal += 1;
                self.pages.push(at);
                match self.table.claim(id) {
                    Claim::New(entry) => self.ops.literal(block, page, entry),
                    Claim::Known(_) | Claim::Full => self.ops.plain(block, page),
                }
            }
        }
    }

    /// The index's answer about this page's content; not being asked is like a full index.
    fn answer(&mut self, id: ContentId) -> Verdict {
        match self.answers.as_slice().first() {
            Some((asked, verdict)) if *asked == id => {
                self.answers.next();
                *verdict
            }
            _ => Verdict::Full,
        }
    }
}

/// Front of a `Repair` body for `pages` of one block; their bytes follow in this order.
///
/// `as_of` is the packer's [`position`](Packer::position), or that of the newest frame on its
/// way, taken after the request came and before the pages are read from memory: they are at
/// least as new as anything in the stream up to there, and the target does not put them in the
/// place of what came later.
#[must_use]
pub fn repair_front(as_of: u64, block: BlockIndex, pages: &[PageNo]) -> Vec<u8> {
    urgent_front(
        as_of,
        block,
        pages.iter().map(|page| (*page, FrameSharing::No)),
    )
}

/// As [`repair_front`], of pages that were read after a switch to post-copy, and how each shares its
/// frame: the guest is stopped, so that they are what they will be.
#[must_use]
pub fn urgent_front(
    as_of: u64,
    block: BlockIndex,
    pages: impl Iterator<Item = (PageNo, FrameSharing)>,
) -> Vec<u8> {
    let mut ops = OpWriter::new();
    for (page, sharing) in pages {
        ops.shared(sharing);
        ops.plain(block, page);
    }
    ops.finish(as_of)
}
