//! How pages share their frames.

use crate::PageNo;

/// How a page shares its frame with other pages at the source (SLM section III-A): a hint, which says
/// where the target should have it share again.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub enum FrameSharing {
    /// It does not, as far as is known.
    #[default]
    No,
    /// Frames were merged because they are the same, whatever page they belong to: KSM, a fork.
    Merged,
    /// Both map the same page of a file privately: a template, or the pool of an earlier migration.
    File(FileRange),
}

/// Neighbouring pages that map neighbouring pages of one file.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FileRange {
    /// Which file: a number of the session.
    pub file: u16,
    /// Page of the file less page of the block.
    pub ahead: i64,
}

impl FrameSharing {
    /// Whether it shares.
    #[must_use]
    pub fn is_shared(self) -> bool {
        self != Self::No
    }

    /// File and page of the file that `page` maps.
    #[must_use]
    pub fn file_page(self, page: PageNo) -> Option<(u16, u64)> {
        match self {
            Self::File(range) => {
                let at = range.ahead.checked_add(i64::from(page.0))?;
                Some((range.file, u64::try_from(at).ok()?))
            }
            Self::No | Self::Merged => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_of_a_file_is_known_by_its_distance_and_none_is_before_the_file() {
        let at = |ahead| FrameSharing::File(FileRange { file: 3, ahead });
        assert_eq!(at(5).file_page(PageNo(2)), Some((3, 7)));
        assert_eq!(at(-2).file_page(PageNo(2)), Some((3, 0)));
        assert_eq!(at(-3).file_page(PageNo(2)), None);
        assert_eq!(at(i64::MAX).file_page(PageNo(1)), None);
        assert_eq!(FrameSharing::Merged.file_page(PageNo(1)), None);
    }
}
