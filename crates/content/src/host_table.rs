//! The source's table of what the target host has been sent.

use hashbrown::HashTable;
use page::{ContentId, EntryId};

/// Most entries of one table: 8 GiB of distinct contents for 52 MB of table at most (16 bytes
/// an id, 5 bytes a slot, half of the slots free after growth). Beyond that, contents go
/// without an entry: more bytes, same result.
pub(crate) const MAX_ENTRIES: u32 = 2 << 20;

/// Content id to entry id, for the contents that this session carried.
pub struct HostTable {
    ids: Vec<ContentId>,
    slots: HashTable<EntryId>,
    max_entries: u32,
}

/// What the table says of a content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// It was sent before, as this entry.
    Known(EntryId),
    /// It is new and gets this entry: the caller sends its bytes before anybody refers to it.
    New(EntryId),
    /// It is new, and the table is full: its bytes go without an entry.
    Full,
}

impl Default for HostTable {
    fn default() -> Self {
        Self::with_limit(MAX_ENTRIES)
    }
}

impl HostTable {
    /// A table of at most `max_entries`.
    #[must_use]
    pub fn with_limit(max_entries: u32) -> Self {
        Self {
            ids: Vec::new(),
            slots: HashTable::new(),
            max_entries,
        }
    }

    /// Looks the content up, and enters it if it is new. About 40 ns once the table is larger
    /// than the cache.
    pub fn claim(&mut self, id: ContentId) -> Claim {
        let ids = &self.ids;
        let same = |entry: &EntryId| ids.get(entry.0 as usize) == Some(&id);
        if let Some(&entry) = self.slots.find(id.hash64(), same) {
            return Claim::Known(entry);
        }
        let Some(entry) = u32::try_from(self.ids.len())
            .ok()
            .filter(|n| *n < self.max_entries)
        else {
            return Claim::Full;
        };
        let entry = EntryId(entry);
        self.ids.push(id);
        let ids = &self.ids;
        let rehash = |entry: &EntryId| ids.get(entry.0 as usize).map_or(0, |id| id.hash64());
        self.slots.insert_unique(id.hash64(), entry, rehash);
        Claim::New(entry)
    }

    /// Entries given out.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether nothing was entered.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_content_is_new_once_and_then_known_by_the_same_entry(contents in proptest::collection::vec(0_u8..20, 0..100)) {
            let mut table = HostTable::default();
            let mut model: Vec<u8> = Vec::new();
            for c in contents {
                let claim = table.claim(ContentId([c; 16]));
                match model.iter().position(|m| *m == c) {
                    Some(at) => prop_assert_eq!(claim, Claim::Known(EntryId(u32::try_from(at)?))),
                    None => {
                        prop_assert_eq!(claim, Claim::New(EntryId(u32::try_from(model.len())?)));
                        model.push(c);
                    }
                }
            }
        }
    }

    #[test]
    fn a_full_table_gives_no_entry_but_still_knows_its_own() {
        let mut table = HostTable::with_limit(1);
        assert_eq!(table.claim(ContentId([1; 16])), Claim::New(EntryId(0)));
        assert_eq!(table.claim(ContentId([2; 16])), Claim::Full);
        assert_eq!(table.claim(ContentId([1; 16])), Claim::Known(EntryId(0)));
    }
}
