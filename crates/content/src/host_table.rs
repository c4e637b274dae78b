//! The source's table of what the target host has been sent.

use hashbrown::HashTable;
use page::{ContentId, EntryId};

/// Most entries of one table: 8 GiB of distinct contents for 64 MB of table at most (20 bytes
/// a row, 5 bytes a slot, half of the slots free after growth). Beyond that, contents go
/// without an entry: more bytes, same result.
pub(crate) const MAX_ENTRIES: u32 = 2 << 20;

/// A content and its entry.
#[derive(Clone, Copy)]
struct Row {
    id: ContentId,
    entry: EntryId,
}

/// Content id to entry id, for the contents that this session's target host has been told of.
pub struct HostTable {
    rows: Vec<Row>,
    /// Numbers of rows.
    slots: HashTable<u32>,
    next_local: u32,
    max_entries: u32,
}

/// What the table says of a content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// The target was told of it before, as this entry.
    Known(EntryId),
    /// It is new and gets this entry, which only this session knows: the caller sends its bytes
    /// before anybody refers to it.
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
            rows: Vec::new(),
            slots: HashTable::new(),
            next_local: 0,
            max_entries,
        }
    }

    /// The entry of a content that the target was told of. About 40 ns once the table is larger
    /// than the cache.
    #[must_use]
    pub fn find(&self, id: ContentId) -> Option<EntryId> {
        let same = |row: &u32| self.row(*row).is_some_and(|row| row.id == id);
        let row = self.slots.find(id.hash64(), same)?;
        self.row(*row).map(|row| row.entry)
    }

    /// Looks the content up, and gives it an entry of this session if it is new.
    pub fn claim(&mut self, id: ContentId) -> Claim {
        if let Some(entry) = self.find(id) {
            return Claim::Known(entry);
        }
        let entry = EntryId(self.next_local | EntryId::LOCAL_BIT);
        if !self.enter(id, entry) {
            return Claim::Full;
        }
        self.next_local += 1;
        Claim::New(entry)
    }

    /// Enters a content that is not in the table, as an entry of the rack index or of this
    /// session. False: the table is full, and stays as it is.
    pub fn enter(&mut self, id: ContentId, entry: EntryId) -> bool {
        let Some(number) = u32::try_from(self.rows.len())
            .ok()
            .filter(|n| *n < self.max_entries)
        else {
            return false;
        };
        self.rows.push(Row { id, entry });
        let rows = &self.rows;
        let rehash = |row: &u32| rows.get(*row as usize).map_or(0, |row| row.id.hash64());
        self.slots.insert_unique(id.hash64(), number, rehash);
        true
    }

    /// Forgets contents whose entries turned out to be lost. Rare, and as long as the table.
    pub fn forget(&mut self, lost: &[EntryId]) {
        let mut lost = lost.to_vec();
        lost.sort_unstable();
        let rows = &self.rows;
        self.slots.retain(|row| {
            rows.get(*row as usize)
                .is_some_and(|row| lost.binary_search(&row.entry).is_err())
        });
    }

    /// Contents in the table, forgotten ones not counted.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    fn row(&self, number: u32) -> Option<&Row> {
        self.rows.get(number as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn local(number: u32) -> EntryId {
        EntryId(number | EntryId::LOCAL_BIT)
    }

    #[test]
    fn a_lost_entry_of_the_rack_is_new_again_and_nothing_else_is() {
        let mut table = HostTable::default();
        for n in 0..50 {
            assert!(table.enter(ContentId([n; 16]), EntryId(n.into())));
        }
        table.forget(&[EntryId(3), EntryId(4)]);
        assert_eq!(table.find(ContentId([3; 16])), None);
        assert_eq!(table.claim(ContentId([4; 16])), Claim::New(local(0)));
        assert_eq!(table.claim(ContentId([5; 16])), Claim::Known(EntryId(5)));
        assert_eq!(table.len(), 49);
    }

    proptest! {
        #[test]
        fn a_content_is_new_once_and_then_known_by_the_same_entry(contents in proptest::collection::vec(0_u8..20, 0..100)) {
            let mut table = HostTable::default();
            let mut model: Vec<u8> = Vec::new();
            for c in contents {
                let claim = table.claim(ContentId([c; 16]));
                match model.iter().position(|m| *m == c) {
                    Some(at) => prop_assert_eq!(claim, Claim::Known(local(u32::try_from(at)?))),
                    None => {
                        prop_assert_eq!(claim, Claim::New(local(u32::try_from(model.len())?)));
                        model.push(c);
                    }
                }
            }
        }
    }

    #[test]
    fn a_full_table_gives_no_entry_but_still_knows_its_own() {
        let mut table = HostTable::with_limit(1);
        assert_eq!(table.claim(ContentId([1; 16])), Claim::New(local(0)));
        assert_eq!(table.claim(ContentId([2; 16])), Claim::Full);
        assert_eq!(table.claim(ContentId([1; 16])), Claim::Known(local(0)));
    }
}
