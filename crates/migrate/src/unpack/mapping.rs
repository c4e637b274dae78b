//! Which pages may be mapped from the host's pool instead of being written to the target QEMU.
//!
//! A page is mapped at most once, and only as the first that is heard of it: a copy that is on its
//! way into QEMU could land before the mapping and be lost under it. Every later version is written,
//! which gives the page memory of its own, as the guest's write did at the source (SLM section III-A).
//!
//! After a switch to post-copy QEMU must know of every page that it has, and a processor may be waiting
//! for it. So pages are written, and the library in QEMU is told before what it may map in place of
//! the copy ([`ExpectedPage`]). A page that the switch made QEMU forget counts as untouched again.

use std::collections::HashMap;

use page::{BlockIndex, EntryId, FrameSharing, PageNo, PageRun};
use qstream::BlockList;

use super::batch::Segment;

/// A page that the caller maps, or says that it cannot.
#[derive(Clone, Debug)]
pub struct SharedPage<B> {
    /// Entry of its content; none for a fill page.
    pub entry: Option<EntryId>,
    /// Where it is.
    pub block: BlockIndex,
    /// Where it is.
    pub page: PageNo,
    /// How it shares its frame at the source: where it should lie here, whoever says so.
    pub sharing: FrameSharing,
    /// Its bytes. Those of a literal are [`Segment::Own`] and have yet to be hashed.
    pub bytes: Segment<B>,
}

/// A page that a batch writes to a QEMU in post-copy, and that may be mapped when QEMU places it. The
/// caller tells the library before it writes anything of the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpectedPage {
    /// Entry of its content; none for a fill page, and for one that was sent ahead of the stream.
    pub entry: Option<EntryId>,
    /// Where it is.
    pub block: BlockIndex,
    /// Where it is.
    pub page: PageNo,
    /// How it shares its frame at the source.
    pub sharing: FrameSharing,
    /// Which of the batch's segments are its bytes.
    pub segment: usize,
}

/// Pages of which nothing was written yet, in blocks that can be mapped.
#[derive(Debug, Default)]
pub(super) struct Untouched {
    /// By block index, a bit for each page that was touched; none for blocks that are not mapped.
    blocks: Vec<Vec<u64>>,
}

impl Untouched {
    /// All pages of those blocks of the stream that the target QEMU has as `mappable`, with as many
    /// pages.
    pub(super) fn new(blocks: &BlockList, mappable: &HashMap<String, u32>) -> Self {
        let words = |pages: u32| vec![0; pages.div_ceil(u64::BITS) as usize];
        let blocks = blocks.iter().map(|(index, block)| {
            let pages = mappable.get(&*block.name).copied().unwrap_or(0);
            let fits = pages > 0 && blocks.holds(index, PageNo(pages - 1));
            if fits { words(pages) } else { Vec::new() }
        });
        Self {
            blocks: blocks.collect(),
        }
    }

    /// Something is written to the page, or it is to be mapped; whether it can be mapped: it is the
    /// first time.
    pub(super) fn touch(&mut self, block: BlockIndex, page: PageNo) -> bool {
        let words = self.blocks.get_mut(usize::from(block.0));
        let word = words.and_then(|words| words.get_mut((page.0 / u64::BITS) as usize));
        let Some(word) = word else {
            return false;
        };
        let bit = 1 << (page.0 % u64::BITS);
        let first = *word & bit == 0;
        *word |= bit;
        first
    }

    /// QEMU forgets these pages.
    pub(super) fn forget(&mut self, block: BlockIndex, run: PageRun) {
        let Some(words) = self.blocks.get_mut(usize::from(block.0)) else {
            return;
        };
        for page in run.pages() {
            if let Some(word) = words.get_mut((page.0 / u64::BITS) as usize) {
                *word &= !(1 << (page.0 % u64::BITS));
            }
        }
    }
}
