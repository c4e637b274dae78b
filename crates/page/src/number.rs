//! Newtypes for everything that is counted.

use std::fmt;

/// Size of a target page on x86, in bytes (QEMU's `TARGET_PAGE_SIZE`).
pub const PAGE_SIZE: usize = 4096;

/// Number of a page inside one RAM block: byte offset divided by [`PAGE_SIZE`].
///
/// 32 bits address 16 TiB in one block, four times what x86 guests can have today.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct PageNo(pub u32);

impl PageNo {
    /// The page that starts at `offset`, or `None` if the offset is unaligned or beyond 16 TiB.
    #[must_use]
    pub fn from_offset(offset: u64) -> Option<Self> {
        if !offset.is_multiple_of(PAGE_SIZE as u64) {
            return None;
        }
        u32::try_from(offset / PAGE_SIZE as u64).ok().map(Self)
    }

    /// Byte offset of the page inside its block.
    #[must_use]
    pub fn offset(self) -> u64 {
        u64::from(self.0) * PAGE_SIZE as u64
    }

    /// The page `n` after this one; saturates at the last number.
    #[must_use]
    pub fn plus(self, n: u32) -> Self {
        Self(self.0.saturating_add(n))
    }
}

/// Position of a RAM block in the list that a stream opens with.
///
/// 16 bits: QEMU guests have tens of blocks, one for each DIMM, ROM and device memory.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct BlockIndex(pub u16);

/// Number of a content: in the rack index, or in the table shared by the two ends of a session.
///
/// Given out in scan or stream order, so that neighbouring pages get neighbouring ids and
/// references to them code as runs (the role of the `(bucketid, index)` pair in IRLM section
/// 2.4).
///
/// | bits | meaning |
/// |---|---|
/// | 31 | set: a *local entry*, which only one session knows; clear: an entry of the rack index |
/// | 27..=30 | of the rack index: the shard, 16 at most |
/// | 0..=26 | of the rack index: number within the shard, 134 million (512 GiB of contents) |
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct EntryId(pub u32);

impl EntryId {
    /// Set in the ids of local entries.
    pub const LOCAL_BIT: u32 = 1 << 31;

    /// Shards of a rack index have numbers below this one.
    pub const MAX_SHARDS: u8 = 16;

    /// Entries of one shard have numbers below this one.
    pub const MAX_IN_SHARD: u32 = 1 << 27;

    /// The entry of the rack index with this number in this shard; `None` if either is too high.
    #[must_use]
    pub fn of_shard(shard: u8, number: u32) -> Option<Self> {
        (shard < Self::MAX_SHARDS && number < Self::MAX_IN_SHARD)
            .then(|| Self(u32::from(shard) * Self::MAX_IN_SHARD + number))
    }

    /// Whether only one session knows this entry.
    #[must_use]
    pub fn is_local(self) -> bool {
        self.0 & Self::LOCAL_BIT != 0
    }

    /// The shard of an entry of the rack index; meaningless for a local entry.
    #[must_use]
    pub fn shard(self) -> u8 {
        ((self.0 >> Self::MAX_IN_SHARD.trailing_zeros()) & 0xf) as u8
    }

    /// The number within its shard of an entry of the rack index.
    #[must_use]
    pub fn number(self) -> u32 {
        self.0 % Self::MAX_IN_SHARD
    }

    /// The entry `n` after this one; saturates at the last id.
    #[must_use]
    pub fn plus(self, n: u32) -> Self {
        Self(self.0.saturating_add(n))
    }
}

/// A number of bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct ByteLen(pub u64);

impl ByteLen {
    /// How many whole pages fit.
    #[must_use]
    pub fn pages(self) -> u64 {
        self.0 / PAGE_SIZE as u64
    }
}

impl fmt::Display for ByteLen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(&str, u64); 3] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
        for (name, size) in UNITS {
            if self.0 >= size {
                #[expect(clippy::cast_precision_loss, reason = "one decimal is shown")]
                return write!(f, "{:.1} {name}", self.0 as f64 / size as f64);
            }
        }
        write!(f, "{} B", self.0)
    }
}

/// An address in the virtual memory of a QEMU process.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct HostAddr(pub u64);

impl HostAddr {
    /// The address of `page` in a block that starts here; `None` on overflow.
    #[must_use]
    pub fn of_page(self, page: PageNo) -> Option<Self> {
        self.0.checked_add(page.offset()).map(Self)
    }
}

/// Consecutive pages of one block.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PageRun {
    /// First page of the run.
    pub start: PageNo,
    /// Number of pages, at least one.
    pub count: u32,
}

impl PageRun {
    /// One page past the last; `None` if the run leaves the 32-bit page space.
    #[must_use]
    pub fn end(self) -> Option<u32> {
        self.start.0.checked_add(self.count)
    }

    /// The pages of the run, ascending.
    pub fn pages(self) -> impl Iterator<Item = PageNo> {
        (0..self.count).map(move |i| self.start.plus(i))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unaligned_or_huge_offset_is_no_page() {
        assert_eq!(PageNo::from_offset(4097), None);
        assert_eq!(PageNo::from_offset(u64::MAX - 4095), None);
        assert_eq!(PageNo::from_offset(8192), Some(PageNo(2)));
        assert_eq!(PageNo(2).offset(), 8192);
    }

    #[test]
    fn an_entry_of_the_index_keeps_its_shard_and_number_and_is_not_local() {
        let last = EntryId::of_shard(15, EntryId::MAX_IN_SHARD - 1).expect("in range");
        assert_eq!(
            (last.shard(), last.number()),
            (EntryId::MAX_SHARDS - 1, (1 << 27) - 1)
        );
        assert_eq!(last.0, EntryId::LOCAL_BIT - 1);
        assert!(!last.is_local() && last.plus(1).is_local());
        assert_eq!(EntryId::of_shard(16, 0), None);
        assert_eq!(EntryId::of_shard(0, EntryId::MAX_IN_SHARD), None);
    }

    #[test]
    fn a_run_that_leaves_the_page_space_has_no_end() {
        let run = PageRun {
            start: PageNo(u32::MAX),
            count: 1,
        };
        assert_eq!(run.end(), None);
    }

    #[test]
    fn byte_lengths_read_in_binary_units() {
        assert_eq!(ByteLen(512).to_string(), "512 B");
        assert_eq!(ByteLen(3 << 19).to_string(), "1.5 MiB");
    }
}
