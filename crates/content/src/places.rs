//! The target's memory of where contents were put.

use std::collections::HashMap;

use page::{BlockIndex, ContentId, EntryId, PageNo};

/// Where a content was put: a page of one of the session's VMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Number of the VM in its session.
    pub vm: u16,
    /// RAM block.
    pub block: BlockIndex,
    /// Page of the block.
    pub page: PageNo,
}

/// Most entries: the same as the source's table has, so a hostile id cannot grow it further.
const MAX_ENTRIES: usize = crate::host_table::MAX_ENTRIES as usize;

/// Marks an entry that has no place; sessions number their VMs below it.
const NO_VM: u16 = u16::MAX;

/// 24 bytes an entry.
#[derive(Clone, Copy)]
struct Slot {
    id: [u64; 2],
    vm: u16,
    block: u16,
    page: u32,
}

const _: () = assert!(size_of::<Slot>() == 24);

const NOWHERE: Slot = Slot {
    id: [0; 2],
    vm: NO_VM,
    block: 0,
    page: 0,
};

/// Entry id to content id and the place where it was put last. The newest place is the
/// likeliest to hold it still.
///
/// Entries of a session count from zero and stand in a row; of the rack's, a host has some.
#[derive(Default)]
pub struct Places {
    slots: Vec<Slot>,
    of_rack: HashMap<EntryId, Slot>,
}

impl Places {
    /// Remembers that `entry`, whose bytes have this `id`, was put at `place`.
    /// An entry beyond the limit is not remembered: it will be repaired if somebody asks.
    pub fn put(&mut self, entry: EntryId, id: ContentId, place: Place) {
        let (low, high) = halves(id);
        let slot = Slot {
            id: [low, high],
            vm: place.vm,
            block: place.block.0,
            page: place.page.0,
        };
        if place.vm == NO_VM {
            return;
        }
        if !entry.is_local() {
            if self.of_rack.len() < MAX_ENTRIES || self.of_rack.contains_key(&entry) {
                self.of_rack.insert(entry, slot);
            }
            return;
        }
        let at = (entry.0 & !EntryId::LOCAL_BIT) as usize;
        if at >= MAX_ENTRIES {
            return;
        }
        if at >= self.slots.len() {
            self.slots.resize(at + 1, NOWHERE);
        }
        self.slots[at] = slot;
    }

    /// Remembers what an entry of the rack must hash to, which may have no place here.
    pub fn learn(&mut self, entry: EntryId, id: ContentId) {
        if entry.is_local() || self.of_rack.len() >= MAX_ENTRIES {
            return;
        }
        let (low, high) = halves(id);
        let id = [low, high];
        let slot = self.of_rack.entry(entry).or_insert(Slot { id, ..NOWHERE });
        if slot.id != id {
            *slot = Slot { id, ..NOWHERE };
        }
    }

    /// What an entry must hash to, if that is known.
    #[must_use]
    pub fn id(&self, entry: EntryId) -> Option<ContentId> {
        self.slot(entry).map(Slot::id)
    }

    /// The id that the content of `entry` must hash to, and where to look for it.
    #[must_use]
    pub fn find(&self, entry: EntryId) -> Option<(ContentId, Place)> {
        let slot = self.slot(entry).filter(|slot| slot.vm != NO_VM)?;
        let place = Place {
            vm: slot.vm,
            block: BlockIndex(slot.block),
            page: PageNo(slot.page),
        };
        Some((slot.id(), place))
    }

    fn slot(&self, entry: EntryId) -> Option<&Slot> {
        if entry.is_local() {
            let at = (entry.0 & !EntryId::LOCAL_BIT) as usize;
            self.slots.get(at).filter(|slot| slot.vm != NO_VM)
        } else {
            self.of_rack.get(&entry)
        }
    }
}

impl Slot {
    fn id(&self) -> ContentId {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&self.id[0].to_le_bytes());
        id[8..].copy_from_slice(&self.id[1].to_le_bytes());
        ContentId(id)
    }
}

fn halves(id: ContentId) -> (u64, u64) {
    let value = u128::from_le_bytes(id.0);
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the two halves of 128 bits"
    )]
    (value as u64, (value >> 64) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn local(number: u32) -> EntryId {
        EntryId(number | EntryId::LOCAL_BIT)
    }

    fn at(page: u32) -> Place {
        Place {
            vm: 1,
            block: BlockIndex(2),
            page: PageNo(page),
        }
    }

    #[test]
    fn the_newest_place_counts_and_gaps_are_nowhere() {
        let id = ContentId(*b"0123456789abcdef");
        for entry in [local as fn(u32) -> EntryId, EntryId] {
            let mut places = Places::default();
            places.put(entry(5), id, at(10));
            places.put(entry(5), id, at(11));
            assert_eq!(places.find(entry(5)), Some((id, at(11))));
            assert_eq!(places.find(entry(4)), None);
            assert_eq!(places.find(entry(6)), None);
        }
    }

    #[test]
    fn an_entry_of_the_session_is_not_one_of_the_rack() {
        let mut places = Places::default();
        places.put(local(5), ContentId([1; 16]), at(1));
        assert_eq!(places.find(EntryId(5)), None);
    }

    #[test]
    fn an_id_may_be_known_before_there_is_a_place_and_another_id_has_no_place() {
        let (entry, id) = (EntryId(5), ContentId([1; 16]));
        let mut places = Places::default();
        places.learn(entry, id);
        assert_eq!((places.id(entry), places.find(entry)), (Some(id), None));
        places.put(entry, id, at(1));
        places.learn(entry, id);
        assert_eq!(places.find(entry), Some((id, at(1))));
        places.learn(entry, ContentId([2; 16]));
        assert_eq!(places.find(entry), None);
    }

    #[test]
    fn an_entry_beyond_the_limit_takes_no_memory() {
        let mut places = Places::default();
        places.put(EntryId(u32::MAX), ContentId([1; 16]), at(0));
        assert!(places.slots.is_empty());
        assert_eq!(places.find(EntryId(u32::MAX)), None);
    }
}
