//! What is known of the frames that a VM's pages share.

use page::{FileRange, FrameSharing, PageNo, PageRun};

/// Which pages of a VM share their frame with another page that moves along, as far as is known.
#[derive(Debug, Default)]
pub struct SharedPages {
    blocks: Vec<SharedBlock>,
}

#[derive(Debug)]
struct SharedBlock {
    name: String,
    /// A bit for each page.
    shared: Vec<u64>,
    /// In order: those of them that map pages of a file.
    of_files: Vec<(PageRun, FileRange)>,
}

impl SharedPages {
    /// None yet, of blocks with these names and numbers of pages.
    #[must_use]
    pub fn of_blocks<'a>(blocks: impl Iterator<Item = (&'a str, u32)>) -> Self {
        let words = |pages: u32| vec![0; pages.div_ceil(u64::BITS) as usize];
        let block = |(name, pages): (&str, u32)| SharedBlock {
            name: name.to_owned(),
            shared: words(pages),
            of_files: Vec::new(),
        };
        Self {
            blocks: blocks.map(block).collect(),
        }
    }

    /// Marks a page of a block, which is given by its position in the list. Pages of a block come
    /// in order.
    pub fn mark(&mut self, position: usize, page: PageNo, sharing: FrameSharing) {
        let Some(block) = self.blocks.get_mut(position) else {
            return;
        };
        let Some(word) = block.shared.get_mut(word_of(page)) else {
            return;
        };
        if sharing.is_shared() {
            *word |= bit_of(page);
        }
        let FrameSharing::File(range) = sharing else {
            return;
        };
        match block.of_files.last_mut() {
            Some((run, last)) if *last == range && run.end() == Some(page.0) => run.count += 1,
            _ => {
                let (start, count) = (page, 1);
                block.of_files.push((PageRun { start, count }, range));
            }
        }
    }

    /// How pages of the block of this name share their frames.
    pub fn of_block(&self, name: &str) -> impl Fn(PageNo) -> FrameSharing {
        let position = self.position_of(name);
        move |page| position.map_or(FrameSharing::No, |position| self.sharing(position, page))
    }

    /// How a page shares its frame.
    pub(super) fn sharing(&self, position: usize, page: PageNo) -> FrameSharing {
        let Some(block) = self.blocks.get(position) else {
            return FrameSharing::No;
        };
        let word = block.shared.get(word_of(page));
        if word.is_none_or(|word| word & bit_of(page) == 0) {
            return FrameSharing::No;
        }
        let next = block.of_files.partition_point(|(run, _)| run.start <= page);
        let last = next.checked_sub(1).and_then(|at| block.of_files.get(at));
        match last {
            Some((run, range)) if run.end().is_some_and(|end| page.0 < end) => {
                FrameSharing::File(*range)
            }
            _ => FrameSharing::Merged,
        }
    }

    /// Position of a block in the list.
    pub(super) fn position_of(&self, name: &str) -> Option<usize> {
        self.blocks.iter().position(|block| block.name == name)
    }
}

fn word_of(page: PageNo) -> usize {
    (page.0 / u64::BITS) as usize
}

fn bit_of(page: PageNo) -> u64 {
    1 << (page.0 % u64::BITS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_page_is_known_by_what_it_was_marked_with_and_others_share_nothing() {
        let mut pages = SharedPages::of_blocks([("a", 100), ("b", 200)].into_iter());
        let range = |ahead| FileRange { file: 1, ahead };
        let marks = [
            (3, FrameSharing::File(range(5))),
            (4, FrameSharing::File(range(5))),
            (5, FrameSharing::File(range(9))),
            (6, FrameSharing::Merged),
            (7, FrameSharing::No),
            (8, FrameSharing::File(range(9))),
        ];
        for (page, sharing) in marks {
            pages.mark(1, PageNo(page), sharing);
        }
        pages.mark(1, PageNo(2000), FrameSharing::Merged);
        assert_eq!(pages.position_of("b"), Some(1));
        for page in 0..200 {
            let marked = marks.iter().find(|(marked, _)| *marked == page);
            let expected = marked.map_or(FrameSharing::No, |(_, sharing)| *sharing);
            assert_eq!(pages.sharing(1, PageNo(page)), expected, "{page}");
            assert_eq!(pages.sharing(0, PageNo(page)), FrameSharing::No);
        }
        assert_eq!(pages.blocks[1].of_files.len(), 3);
    }
}
