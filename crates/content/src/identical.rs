//! Contents that share one page at the target, whatever their pages share at the source.

use hashbrown::HashTable;
use page::ContentId;

/// What the owner of the VMs wants shared: contents that two or more of their pages have.
#[derive(Clone, Debug)]
pub struct Identical {
    contents: HashTable<ContentId>,
    /// By byte: what is filled with it.
    fills: [bool; 256],
}

impl Default for Identical {
    fn default() -> Self {
        Self {
            contents: HashTable::new(),
            fills: [false; 256],
        }
    }
}

impl Identical {
    /// Adds a content.
    pub fn add(&mut self, id: ContentId) {
        let entry = self
            .contents
            .entry(id.hash64(), |known| *known == id, |known| known.hash64());
        entry.or_insert(id);
    }

    /// Adds pages with this byte all over.
    pub fn add_fill(&mut self, byte: u8) {
        self.fills[usize::from(byte)] = true;
    }

    /// Whether pages with this content share. About 40 ns once there are more than fit the cache.
    #[must_use]
    pub fn has(&self, id: ContentId) -> bool {
        self.contents
            .find(id.hash64(), |known| *known == id)
            .is_some()
    }

    /// Whether pages with this byte all over share.
    #[must_use]
    pub fn has_fill(&self, byte: u8) -> bool {
        self.fills[usize::from(byte)]
    }

    /// How many contents there are, fills not counted.
    #[must_use]
    pub fn len(&self) -> usize {
        self.contents.len()
    }

    /// Whether nothing shares.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.contents.is_empty() && !self.fills.contains(&true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_added_is_there_once_and_nothing_else() {
        let mut identical = Identical::default();
        assert!(identical.is_empty());
        for n in [1, 2, 1] {
            identical.add(ContentId([n; 16]));
        }
        identical.add_fill(0xcc);
        assert_eq!(identical.len(), 2);
        assert!(identical.has(ContentId([2; 16])) && !identical.has(ContentId([3; 16])));
        assert!(identical.has_fill(0xcc) && !identical.has_fill(0xcd));
        assert!(!identical.is_empty());
    }
}
