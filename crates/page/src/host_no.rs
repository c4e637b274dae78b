//! Hosts of a group, and small sets of them.

use std::fmt;

/// Number of a host in its group, in the order of the plan.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct HostNo(pub u16);

/// A set of the hosts numbered 0 to 63: what fits one machine word.
///
/// Hosts with higher numbers cannot be members. Nothing is pushed to them: they pull.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct HostSet(u64);

impl HostSet {
    /// No host.
    pub const EMPTY: Self = Self(0);

    /// Numbers below this one can be members.
    pub const CAPACITY: u16 = 64;

    /// The set whose member `n` is bit `n`.
    #[must_use]
    pub fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// Bit `n` is member `n`.
    #[must_use]
    pub fn bits(self) -> u64 {
        self.0
    }

    /// Adds the host. False, and nothing happens, if its number is [`CAPACITY`](Self::CAPACITY)
    /// or above.
    pub fn insert(&mut self, host: HostNo) -> bool {
        self.0 |= bit(host);
        host.0 < Self::CAPACITY
    }

    /// Takes the host out, if it was in.
    pub fn remove(&mut self, host: HostNo) {
        self.0 &= !bit(host);
    }

    /// This set without the host.
    #[must_use]
    pub fn without(mut self, host: HostNo) -> Self {
        self.remove(host);
        self
    }

    /// Whether the host is a member.
    #[must_use]
    pub fn contains(self, host: HostNo) -> bool {
        self.0 & bit(host) != 0
    }

    /// Whether there is no member.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Number of members.
    #[must_use]
    pub fn len(self) -> u32 {
        self.0.count_ones()
    }

    /// The members, ascending.
    pub fn iter(self) -> impl Iterator<Item = HostNo> {
        (0..Self::CAPACITY)
            .map(HostNo)
            .filter(move |host| self.contains(*host))
    }
}

fn bit(host: HostNo) -> u64 {
    1_u64.checked_shl(host.0.into()).unwrap_or(0)
}

impl FromIterator<HostNo> for HostSet {
    /// Numbers that cannot be members are left out.
    fn from_iter<I: IntoIterator<Item = HostNo>>(hosts: I) -> Self {
        Self(hosts.into_iter().fold(0, |bits, host| bits | bit(host)))
    }
}

impl fmt::Debug for HostSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter().map(|h| h.0)).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_beyond_the_capacity_is_never_a_member() {
        let mut set = HostSet::EMPTY;
        assert!(set.insert(HostNo(63)));
        for beyond in [64, 65, 127, u16::MAX] {
            assert!(!set.insert(HostNo(beyond)));
            assert!(!set.contains(HostNo(beyond)));
            set.remove(HostNo(beyond));
        }
        assert_eq!(set.bits(), 1 << 63);
    }

    #[test]
    fn members_come_back_in_ascending_order_and_go_when_removed() {
        let mut set: HostSet = [5, 0, 63, 900].map(HostNo).into_iter().collect();
        assert_eq!(set.iter().collect::<Vec<_>>(), [0, 5, 63].map(HostNo));
        assert_eq!((set.len(), set.without(HostNo(0)).len()), (3, 2));
        [0, 5, 63].map(HostNo).iter().for_each(|h| set.remove(*h));
        assert!(set.is_empty());
    }
}
