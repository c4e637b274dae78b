//! The different contents found, numbered in the order in which they were found.

use hashbrown::HashTable;
use page::ContentId;

use super::PageKind;

/// Most bytes that a distinct content takes in memory: 16 of id, 4 of count and 5 of table (a
/// number and a tag), all with room for growth by doubling.
pub const CONTENT_BYTES_MAX: usize = 50;

/// Contents that are remembered: 256 GiB of distinct pages, 3.4 GB at most. Later ones count as
/// unknown, which costs only what knowing them would save.
const CONTENTS_MAX: usize = 1 << 26;

/// Number of a content in one scan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContentNo(pub u32);

/// The contents of a scan.
#[derive(Clone, Debug, Default)]
pub struct Contents {
    ids: Vec<ContentId>,
    pages: Vec<u32>,
    table: HashTable<u32>,
}

impl Contents {
    /// How many there are. Some may have no page any more.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// The number of a content, if it was found.
    #[must_use]
    pub fn find(&self, id: ContentId) -> Option<ContentNo> {
        let same = |&no: &u32| self.ids[no as usize] == id;
        self.table.find(id.hash64(), same).map(|&no| ContentNo(no))
    }

    /// Id of a content.
    #[must_use]
    pub fn id(&self, no: ContentNo) -> Option<ContentId> {
        self.ids.get(no.0 as usize).copied()
    }

    /// Pages with that content when the last scan ended.
    #[must_use]
    pub fn pages(&self, no: ContentNo) -> u32 {
        self.pages.get(no.0 as usize).copied().unwrap_or(0)
    }

    /// Finds a content or gives it the next number.
    pub(super) fn enter(&mut self, id: ContentId) -> PageKind {
        if let Some(no) = self.find(id) {
            return PageKind::Content(no);
        }
        if self.ids.len() >= CONTENTS_MAX {
            return PageKind::Unknown;
        }
        let Ok(no) = u32::try_from(self.ids.len()) else {
            return PageKind::Unknown;
        };
        self.ids.push(id);
        self.pages.push(0);
        let ids = &self.ids;
        self.table
            .insert_unique(id.hash64(), no, |&no| ids[no as usize].hash64());
        PageKind::Content(ContentNo(no))
    }

    pub(super) fn clear_counts(&mut self) {
        self.pages.fill(0);
    }

    pub(super) fn count(&mut self, no: ContentNo) {
        if let Some(pages) = self.pages.get_mut(no.0 as usize) {
            *pages = pages.saturating_add(1);
        }
    }

    /// Whether more than half of them have no page any more.
    pub(super) fn mostly_unused(&self) -> bool {
        self.pages.iter().filter(|&&pages| pages == 0).count() * 2 > self.ids.len()
    }
}
