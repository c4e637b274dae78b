//! Source role: the stream of a source QEMU becomes page operations.
//!
//! In two halves, so that the table shared by all VMs of a session is locked once a buffer, not
//! once a page: [`Packer::scan`] decodes and hashes without the table, [`Packer::resolve`] asks
//! the table and writes the operations. Page bytes stay where QEMU's stream put them; the
//! operations name their offsets.
//!
//! Succeeds or fails, the source VM is untouched: this machine only reads.

use std::collections::HashSet;
use std::ops::Range;

use content::{Claim, HostTable};
use page::{BlockIndex, ContentId, ContentKey, PAGE_SIZE, PageNo, fill_byte};
use qstream::{Decoder, Item, Step, StreamError};
use wire::OpWriter;

/// One step of the stream, as scanned from a buffer. Ranges and offsets are of that buffer.
#[derive(Debug)]
enum Piece {
    Page {
        block: BlockIndex,
        page: PageNo,
        at: u32,
        id: Option<ContentId>,
    },
    Zero {
        block: BlockIndex,
        page: PageNo,
    },
    Fill {
        block: BlockIndex,
        page: PageNo,
        byte: u8,
    },
    Raw(Range<usize>),
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
}

/// Milestones of the stream that the caller reacts to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Milestones {
    /// The last RAM section has begun: the guest is stopped.
    pub end_begun: bool,
    /// All RAM is through: what follows is device state.
    pub tail_begun: bool,
}

/// A buffer as operations.
#[derive(Debug)]
pub struct Packed {
    /// Front of the frame's body: position and operations.
    pub front: Vec<u8>,
    /// Offsets in the scanned buffer of the pages whose bytes follow, in order.
    pub pages: Vec<u32>,
    /// Position in the stream after this.
    pub position: u64,
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
    pieces: Vec<Piece>,
    milestones: Milestones,
    counts: PackCounts,
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
            pieces: Vec::new(),
            milestones: Milestones::default(),
            counts: PackCounts::default(),
        }
    }

    /// Decodes as much of `input` as there is and hashes its pages. Returns the bytes used; the
    /// caller keeps `input` for [`resolve`](Self::resolve), and offers the rest again, in front
    /// of what follows.
    ///
    /// # Errors
    /// A stream that is not QEMU's, or uses what cannot be carried.
    pub fn scan(&mut self, input: &[u8], from: usize) -> Result<usize, StreamError> {
        let mut at = from;
        while let Some(rest) = input.get(at..).filter(|rest| !rest.is_empty()) {
            match self.decoder.decode(rest)? {
                Step::NeedMore { .. } => break,
                Step::Item { item, consumed } => {
                    let range = at..at + consumed;
                    let piece = match item {
                        Item::Page { block, page, bytes } => {
                            let at = range.end - PAGE_SIZE;
                            Some(piece_of_page(
                                self.key
                                    .as_ref()
                                    .filter(|_| self.enters_table[usize::from(block.0)]),
                                block,
                                page,
                                bytes,
                                at,
                            ))
                        }
                        Item::Zero { block, page } => Some(Piece::Zero { block, page }),
                        Item::Header { .. } | Item::Command { .. } | Item::Opaque(_) => {
                            Some(Piece::Raw(range))
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
    }

    /// Whether a scan found something that has not been resolved.
    #[must_use]
    pub fn has_pieces(&self) -> bool {
        !self.pieces.is_empty()
    }

    /// Writes what was scanned from `input` as operations, asking and filling the table.
    ///
    /// The result must be on its way before another VM's buffer is resolved against the same
    /// table, so that bytes travel before references to them.
    pub fn resolve(&mut self, input: &[u8], table: &mut HostTable) -> Packed {
        let mut ops = OpWriter::new();
        let mut pages = Vec::new();
        for piece in self.pieces.drain(..) {
            match piece {
                Piece::Page {
                    block,
                    page,
                    at,
                    id,
                } => match id.map_or(Claim::Full, |id| table.claim(id)) {
                    Claim::Known(entry) => {
                        self.counts.reference += 1;
                        ops.reference(block, page, entry);
                    }
                    Claim::New(entry) => {
                        self.counts.literal += 1;
                        pages.push(at);
                        ops.literal(block, page, entry);
                    }
                    Claim::Full => {
                        self.counts.literal += 1;
                        pages.push(at);
                        ops.plain(block, page);
                    }
                },
                Piece::Zero { block, page } => {
                    self.counts.zero += 1;
                    ops.zero(block, page);
                }
                Piece::Fill { block, page, byte } => {
                    self.counts.fill += 1;
                    ops.fill(block, page, byte);
                }
                Piece::Raw(range) => ops.raw(&input[range]),
                Piece::RamStart(range) => ops.ram_start(&input[range]),
                Piece::EndBegin => ops.end_begin(),
                Piece::EndClosed => ops.end_closed(),
                Piece::Tail(range) => ops.tail(&input[range]),
            }
        }
        let position = self.decoder.position();
        Packed {
            front: ops.finish(position),
            pages,
            position,
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

    /// The counts since the last call.
    pub fn take_counts(&mut self) -> PackCounts {
        std::mem::take(&mut self.counts)
    }

    /// Names of the stream's blocks, in its order, once they are known.
    #[must_use]
    pub fn block_names(&self) -> Option<Vec<String>> {
        let blocks = self.decoder.blocks()?;
        Some(
            blocks
                .iter()
                .map(|(_, block)| block.name.to_string())
                .collect(),
        )
    }
}

fn piece_of_page(
    key: Option<&ContentKey>,
    block: BlockIndex,
    page: PageNo,
    bytes: &page::PageBytes,
    at: usize,
) -> Piece {
    match fill_byte(bytes) {
        Some(0) => Piece::Zero { block, page },
        Some(byte) => Piece::Fill { block, page, byte },
        None => {
            #[expect(
                clippy::cast_possible_truncation,
                reason = "buffers are far below 4 GiB"
            )]
            let at = at as u32;
            Piece::Page {
                block,
                page,
                at,
                id: key.map(|key| key.id_of(bytes)),
            }
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
    let mut ops = OpWriter::new();
    for page in pages {
        ops.plain(block, *page);
    }
    ops.finish(as_of)
}
