//! Host sets, each distinct one stored once: an entry names its sets with a number.

use hashbrown::HashTable;
use page::{HostNo, HostSet};

/// Most distinct sets: every one of 20 hosts, in 32 MB. A rack of more hosts reaches it only if
/// contents are shared at random; then a host that would need a new set is left out, and pulls.
pub(crate) const MAX_SETS: u32 = 1 << 20;

/// Number of a set.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct SetNo(pub(crate) u32);

impl SetNo {
    pub(crate) const EMPTY: Self = Self(0);
}

/// A set and how many records name it; free when none does.
#[derive(Clone, Copy, Default)]
struct Slot {
    hosts: HostSet,
    needed: u32,
    given: u32,
}

/// All sets that records name. The first slot is the empty set, for good.
pub(crate) struct Sets {
    slots: Vec<Slot>,
    free: Vec<u32>,
    by_hosts: HashTable<u32>,
    /// The set that was looked up last: pages that follow each other are often alike.
    last: u32,
    limit: u32,
}

impl Sets {
    pub(crate) fn with_limit(limit: u32) -> Self {
        Self {
            slots: vec![Slot::default()],
            free: Vec::new(),
            by_hosts: HashTable::new(),
            last: 0,
            limit,
        }
    }

    pub(crate) fn hosts(&self, set: SetNo) -> HostSet {
        self.slots
            .get(set.0 as usize)
            .map_or(HostSet::EMPTY, |slot| slot.hosts)
    }

    /// A record that needed `set` needs `host` too: the set that it names from now on.
    pub(crate) fn add_host(&mut self, set: SetNo, host: HostNo) -> SetNo {
        let mut hosts = self.hosts(set);
        if hosts.contains(host) || !hosts.insert(host) {
            return set;
        }
        let Some(wider) = self.intern(hosts) else {
            return set;
        };
        self.slots[wider as usize].needed += 1;
        if set != SetNo::EMPTY {
            self.slots[set.0 as usize].needed -= 1;
            self.release(set);
        }
        SetNo(wider)
    }

    /// A record that had given out `old` gives out `new`.
    pub(crate) fn give(&mut self, old: SetNo, new: SetNo) {
        if new != SetNo::EMPTY {
            self.slots[new.0 as usize].given += 1;
        }
        if old != SetNo::EMPTY {
            self.slots[old.0 as usize].given -= 1;
            self.release(old);
        }
    }

    /// Takes the host out of every set: at once for all records that name them.
    pub(crate) fn withdraw(&mut self, host: HostNo) {
        self.by_hosts.clear();
        for number in 1..self.slots.len() {
            let hosts = &mut self.slots[number].hosts;
            hosts.remove(host);
            let (hosts, number) = (*hosts, u32::try_from(number).unwrap_or(0));
            // Sets that have become equal stay apart; the first is the one to be found.
            if !hosts.is_empty() && self.find(hosts).is_none() {
                self.enter(hosts, number);
            }
        }
    }

    /// How many records need `n + 1` hosts, at position `n`.
    pub(crate) fn records_by_hosts(&self) -> Vec<u64> {
        let mut counts = Vec::new();
        for slot in self.slots.iter().filter(|slot| slot.needed > 0) {
            let Some(at) = slot.hosts.len().checked_sub(1) else {
                continue;
            };
            let at = at as usize;
            counts.resize(counts.len().max(at + 1), 0);
            counts[at] += u64::from(slot.needed);
        }
        counts
    }

    /// The number of this set, which is not empty; `None` if there is no room for it.
    fn intern(&mut self, hosts: HostSet) -> Option<u32> {
        if self.slots[self.last as usize].hosts == hosts {
            return Some(self.last);
        }
        let known = self.find(hosts);
        let number = known.or_else(|| self.free.pop()).or_else(|| {
            let next = u32::try_from(self.slots.len()).ok();
            let next = next.filter(|next| *next < self.limit)?;
            self.slots.push(Slot::default());
            Some(next)
        })?;
        if known.is_none() {
            self.slots[number as usize].hosts = hosts;
            self.enter(hosts, number);
        }
        self.last = number;
        Some(number)
    }

    fn find(&self, hosts: HostSet) -> Option<u32> {
        let same = |number: &u32| self.slots[*number as usize].hosts == hosts;
        self.by_hosts.find(hash(hosts), same).copied()
    }

    fn enter(&mut self, hosts: HostSet, number: u32) {
        let slots = &self.slots;
        let rehash = |number: &u32| hash(slots[*number as usize].hosts);
        self.by_hosts.insert_unique(hash(hosts), number, rehash);
    }

    /// Frees the set if nobody names it any more.
    fn release(&mut self, set: SetNo) {
        let slot = &mut self.slots[set.0 as usize];
        if slot.needed > 0 || slot.given > 0 {
            return;
        }
        let hosts = std::mem::take(&mut slot.hosts);
        if let Ok(entry) = self.by_hosts.find_entry(hash(hosts), |n| *n == set.0) {
            entry.remove();
        }
        self.free.push(set.0);
    }
}

/// Spreads the bits of a set over the hash (the finalizer of `MurmurHash3`).
fn hash(hosts: HostSet) -> u64 {
    let mut bits = hosts.bits();
    for factor in [0xff51_afd7_ed55_8ccd, 0xc4ce_b9fe_1a85_ec53] {
        bits = (bits ^ bits >> 33).wrapping_mul(factor);
    }
    bits ^ bits >> 33
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_that_nobody_names_make_room_for_others() {
        let mut sets = Sets::with_limit(3);
        // One record passes through all sets {0}, {0, 1}, ...: two slots are enough.
        let mut set = SetNo::EMPTY;
        for host in 0..64 {
            set = sets.add_host(set, HostNo(host));
            assert_eq!(sets.hosts(set).len(), u32::from(host) + 1);
        }
        assert_eq!(sets.slots.len(), 3);
    }

    #[test]
    fn a_host_without_room_for_its_set_is_left_out() {
        let mut sets = Sets::with_limit(2);
        let first = sets.add_host(SetNo::EMPTY, HostNo(1));
        assert_eq!(sets.add_host(SetNo::EMPTY, HostNo(2)), SetNo::EMPTY);
        assert_eq!(sets.add_host(first, HostNo(2)), first);
        assert_eq!(sets.records_by_hosts(), [1]);
    }
}
