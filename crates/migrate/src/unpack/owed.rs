//! What the source still owes to a target QEMU after a switch to post-copy.
//!
//! A target QEMU takes each page that it was told to forget exactly once, and stops if it gets one
//! twice. The source QEMU sends each once; but a page that a processor waits for is sent ahead,
//! and pages are repaired. So the first version that comes is given to QEMU and the others are
//! swallowed. They are all the same, because the source's guest is stopped for good.

use page::{BlockIndex, PageNo, PageRun};
use qstream::BlockList;

/// The pages, once a switch has begun.
#[derive(Debug)]
pub(super) struct Owed {
    /// By block index, a bit for each page.
    blocks: Vec<Vec<u64>>,
    left: u64,
    /// Where the switch ends in the stream, once it has: what was read from memory before may be
    /// older than the guest's stop.
    pub(super) since: Option<u64>,
}

impl Owed {
    /// None yet.
    pub(super) fn new(blocks: &BlockList) -> Self {
        let words = |pages: u64| {
            let words = pages.div_ceil(u64::BITS.into());
            // A block has at most 2^32 pages.
            vec![0; usize::try_from(words).unwrap_or(0)]
        };
        Self {
            blocks: blocks
                .iter()
                .map(|(_, block)| words(block.used_len.pages()))
                .collect(),
            left: 0,
            since: None,
        }
    }

    /// QEMU forgets these pages.
    pub(super) fn add(&mut self, block: BlockIndex, run: PageRun) {
        for page in run.pages() {
            let bit = bit_of(page);
            if let Some(word) = self.word(block, page)
                && *word & bit == 0
            {
                *word |= bit;
                self.left += 1;
            }
        }
    }

    /// Whether QEMU waits for the page.
    pub(super) fn has(&self, block: BlockIndex, page: PageNo) -> bool {
        let words = self.blocks.get(usize::from(block.0));
        words
            .and_then(|words| words.get((page.0 / u64::BITS) as usize))
            .is_some_and(|word| word & bit_of(page) != 0)
    }

    /// The page is given to QEMU.
    pub(super) fn give(&mut self, block: BlockIndex, page: PageNo) {
        let bit = bit_of(page);
        if let Some(word) = self.word(block, page)
            && *word & bit != 0
        {
            *word &= !bit;
            self.left -= 1;
        }
    }

    /// Pages that QEMU does not have.
    pub(super) fn left(&self) -> u64 {
        self.left
    }

    fn word(&mut self, block: BlockIndex, page: PageNo) -> Option<&mut u64> {
        let words = self.blocks.get_mut(usize::from(block.0))?;
        words.get_mut((page.0 / u64::BITS) as usize)
    }
}

fn bit_of(page: PageNo) -> u64 {
    1 << (page.0 % u64::BITS)
}
