//! The pool of a target host: page contents that two or more pages of its VMs share.
//!
//! The pool is one file in memory. Each VM owns a linear region of it, as long as its memory: the
//! content that its page `p` brings in lies at the region's start plus `p`, so that neighbouring
//! pages lie beside each other and one mapping covers them. A page elsewhere with the same content
//! refers to that place. What is not used is a hole, which costs nothing.
//!
//! Pages that map one file at the source (a template, the pool of an earlier migration) lie in a
//! region of that file instead, in its order ([`Pool::place_at`]): as few mappings as there cover
//! them here, whichever VM comes first, and contents that the file has twice are here twice. What
//! is filled with one byte has a small region too, in which it lies several times in a row.
//!
//! Here is the book-keeping: no memory, no file, no kernel. The caller writes bytes where it is
//! told, lets the file grow to [`Pool::file_pages`], and makes holes of the runs that come back.
//!
//! - A content stays as it is while a page refers to it. It is in the pool at most once, and once
//!   for each place of a file that has it.
//! - Contents are named by their id: those of different trust domains never meet.
//! - Which contents are worth it (two sharers or more) the caller knows; see [`plan_runs`].

mod plan;

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};

use page::{BlockIndex, ByteLen, ContentId, PAGE_SIZE, PageNo};

pub use plan::{Candidate, VmCandidates, VmPlan, mapping_budget, plan_runs, runs_in};

/// Number of a page of the pool's file.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PoolPage(pub u64);

impl PoolPage {
    /// Where it begins in the file.
    #[must_use]
    pub fn offset(self) -> u64 {
        self.0.saturating_mul(PAGE_SIZE as u64)
    }
}

/// Consecutive pages of the pool.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PoolRun {
    /// The first.
    pub start: PoolPage,
    /// How many, at least one.
    pub pages: u64,
}

impl PoolRun {
    /// Its length in the file.
    #[must_use]
    pub fn len(self) -> ByteLen {
        ByteLen(self.pages.saturating_mul(PAGE_SIZE as u64))
    }

    /// Never true.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.pages == 0
    }
}

/// Number of a VM in the pool, chosen by the caller.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PoolVm(pub u32);

/// A region of the pool that belongs to no VM: a part of a file that VMs map.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PoolSpace {
    /// Who gives the numbers, as known to the caller.
    pub owner: u64,
    /// Which of theirs.
    pub number: u64,
}

/// Pages of each [`PoolSpace`]: 1 GiB of a file, of which only what is used costs anything.
pub const SPACE_PAGES: u64 = 1 << 18;

/// A place in a [`PoolSpace`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PoolSpot {
    /// Where.
    pub space: PoolSpace,
    /// The page there, below [`SPACE_PAGES`].
    pub page: u64,
}

/// A page of a VM.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PoolUser {
    /// The VM.
    pub vm: PoolVm,
    /// Its block.
    pub block: BlockIndex,
    /// The page in the block.
    pub page: PageNo,
}

/// Where a page's content lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Placed {
    /// The page of the pool.
    pub at: PoolPage,
    /// Nothing is there yet: the bytes must be written before anybody maps them.
    pub new: bool,
    /// The content that this page had before is used by nobody any more. It may become a hole once
    /// the page is mapped elsewhere.
    pub freed: Option<PoolPage>,
}

/// Why a content is not in the pool: its page is sent plainly.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PoolError {
    /// The VM has no region.
    #[error("the VM has no region in the pool")]
    UnknownVm,
    /// The VM has one already.
    #[error("the VM has a region in the pool already")]
    KnownVm,
    /// The block or the page is none of the VM's.
    #[error("the page is outside the VM's region of the pool")]
    Outside,
    /// Its place holds another content that is used: an older version of the page.
    #[error("the page's place in the pool holds an older content that is still used")]
    Occupied,
    /// The pool holds as much as it may.
    #[error("the pool is full")]
    Full,
    /// No room in the file for the region.
    #[error("there is no room for the VM's region in the pool")]
    NoRoom,
}

/// Longest file: as `cow_abi::POOL_PAGES_MAX` allows.
const FILE_PAGES_MAX: u64 = cow_abi::POOL_PAGES_MAX;

/// What is where, and who uses it.
#[derive(Debug)]
pub struct Pool {
    live_pages_max: u64,
    file_pages: u64,
    regions: BTreeMap<u64, Region>,
    vms: HashMap<PoolVm, Vm>,
    slots: HashMap<PoolPage, Slot>,
    contents: HashMap<ContentId, PoolPage>,
    spaces: HashMap<PoolSpace, u64>,
}

#[derive(Debug)]
struct Region {
    pages: u64,
    /// Its VM is here. A region without one stays while others use contents in it.
    owned: bool,
    space: Option<PoolSpace>,
    live: u64,
}

#[derive(Debug)]
struct Vm {
    /// First page of its region.
    start: u64,
    /// First page of each block in the region, and the end of the last.
    blocks: Vec<u64>,
    users: BTreeMap<(BlockIndex, PageNo), PoolPage>,
}

#[derive(Debug)]
struct Slot {
    content: ContentId,
    users: u64,
}

impl Pool {
    /// An empty pool that holds at most `limit` of contents.
    #[must_use]
    pub fn new(limit: ByteLen) -> Self {
        Self {
            live_pages_max: limit.pages(),
            file_pages: 0,
            regions: BTreeMap::new(),
            vms: HashMap::new(),
            slots: HashMap::new(),
            contents: HashMap::new(),
            spaces: HashMap::new(),
        }
    }

    /// How long the file must be, in pages. Never less than before.
    #[must_use]
    pub fn file_pages(&self) -> u64 {
        self.file_pages
    }

    /// Memory that contents take.
    #[must_use]
    pub fn live(&self) -> ByteLen {
        ByteLen(self.slots.len() as u64 * PAGE_SIZE as u64)
    }

    /// Pages of VMs that use a content: what they would take without the pool.
    #[must_use]
    pub fn users(&self) -> u64 {
        self.slots.values().map(|slot| slot.users).sum()
    }

    /// Where a content lies, if it is here.
    #[must_use]
    pub fn find(&self, content: ContentId) -> Option<PoolPage> {
        self.contents.get(&content).copied()
    }

    /// Gives a VM, with blocks of these lengths, its region; returns its first page.
    ///
    /// # Errors
    /// [`PoolError::KnownVm`], [`PoolError::NoRoom`].
    pub fn add_vm(&mut self, vm: PoolVm, blocks: &[ByteLen]) -> Result<PoolPage, PoolError> {
        if self.vms.contains_key(&vm) {
            return Err(PoolError::KnownVm);
        }
        let mut starts = vec![0_u64];
        for len in blocks {
            let end = starts.last().and_then(|end| end.checked_add(len.pages()));
            starts.push(end.ok_or(PoolError::NoRoom)?);
        }
        let pages = starts.last().copied().unwrap_or(0).max(1);
        let start = self.gap(pages).ok_or(PoolError::NoRoom)?;
        let region = Region {
            pages,
            owned: true,
            space: None,
            live: 0,
        };
        self.regions.insert(start, region);
        self.file_pages = self.file_pages.max(start + pages);
        let entry = Vm {
            start,
            blocks: starts,
            users: BTreeMap::new(),
        };
        self.vms.insert(vm, entry);
        Ok(PoolPage(start))
    }

    /// The first place where `pages` pages are free.
    fn gap(&self, pages: u64) -> Option<u64> {
        let mut free = 0_u64;
        for (&start, region) in &self.regions {
            if start - free >= pages {
                break;
            }
            free = start + region.pages;
        }
        let end = free.checked_add(pages)?;
        (end <= FILE_PAGES_MAX).then_some(free)
    }

    /// Says that `user` has `content`, and where that lies.
    ///
    /// # Errors
    /// If it cannot be in the pool; nothing has changed then, and what the page used before it
    /// uses still.
    pub fn place(&mut self, content: ContentId, user: PoolUser) -> Result<Placed, PoolError> {
        let home = self.home(user)?;
        let at = match self.contents.get(&content) {
            Some(&at) => at,
            None if self.slots.contains_key(&home) => return Err(PoolError::Occupied),
            None if self.is_full() => return Err(PoolError::Full),
            None => home,
        };
        self.put(content, user, at)
    }

    /// As [`Pool::place`], at a place that the caller knows: there if it is free, or holds just this
    /// content; else as if none had been named.
    ///
    /// # Errors
    /// As [`Pool::place`].
    pub fn place_at(
        &mut self,
        spot: PoolSpot,
        content: ContentId,
        user: PoolUser,
    ) -> Result<Placed, PoolError> {
        self.home(user)?;
        let Some(at) = self.page_of(spot) else {
            return self.place(content, user);
        };
        match self.slots.get(&at) {
            Some(slot) if slot.content == content => self.put(content, user, at),
            None if !self.is_full() => {
                self.open_space(spot.space, at.0 - spot.page);
                self.put(content, user, at)
            }
            _ => self.place(content, user),
        }
    }

    fn is_full(&self) -> bool {
        self.slots.len() as u64 >= self.live_pages_max
    }

    /// The page of the file for a spot; none if there is no room for its space.
    fn page_of(&self, spot: PoolSpot) -> Option<PoolPage> {
        let start = match self.spaces.get(&spot.space) {
            Some(&start) => start,
            None => self.gap(SPACE_PAGES)?,
        };
        (spot.page < SPACE_PAGES).then(|| PoolPage(start + spot.page))
    }

    fn open_space(&mut self, space: PoolSpace, start: u64) {
        if self.spaces.insert(space, start).is_some() {
            return;
        }
        let region = Region {
            pages: SPACE_PAGES,
            owned: false,
            space: Some(space),
            live: 0,
        };
        self.regions.insert(start, region);
        self.file_pages = self.file_pages.max(start + SPACE_PAGES);
    }

    /// Has `user` use `at`, which holds `content` or is free.
    fn put(
        &mut self,
        content: ContentId,
        user: PoolUser,
        at: PoolPage,
    ) -> Result<Placed, PoolError> {
        let vm = self.vms.get_mut(&user.vm).ok_or(PoolError::UnknownVm)?;
        let before = vm.users.insert((user.block, user.page), at);
        if before == Some(at) {
            return Ok(Placed {
                at,
                new: false,
                freed: None,
            });
        }
        let new = match self.slots.entry(at) {
            Entry::Occupied(mut slot) => {
                slot.get_mut().users += 1;
                false
            }
            Entry::Vacant(slot) => {
                slot.insert(Slot { content, users: 1 });
                self.contents.entry(content).or_insert(at);
                if let Some(region) = region_of(&mut self.regions, at) {
                    region.live += 1;
                }
                true
            }
        };
        let freed = before.filter(|&before| self.leave(before));
        Ok(Placed { at, new, freed })
    }

    /// The place in the pool that belongs to a page.
    fn home(&self, user: PoolUser) -> Result<PoolPage, PoolError> {
        let vm = self.vms.get(&user.vm).ok_or(PoolError::UnknownVm)?;
        let block = usize::from(user.block.0);
        let bounds = vm.blocks.get(block).zip(vm.blocks.get(block + 1));
        let (&start, &end) = bounds.ok_or(PoolError::Outside)?;
        let page = start + u64::from(user.page.0);
        if page < end {
            Ok(PoolPage(vm.start + page))
        } else {
            Err(PoolError::Outside)
        }
    }

    /// Says that a page does not use the pool any more: it was not mapped, or has a newer content.
    /// Returns the page of the pool that nobody uses now.
    pub fn release(&mut self, user: PoolUser) -> Option<PoolPage> {
        let vm = self.vms.get_mut(&user.vm)?;
        let at = vm.users.remove(&(user.block, user.page))?;
        self.leave(at).then_some(at)
    }

    /// Forgets a VM: it has ended, or its migration has failed. Its QEMU must be gone, or have no
    /// page mapped. Returns what nobody uses any more; contents in its region that others use
    /// stay there.
    pub fn remove_vm(&mut self, vm: PoolVm) -> Vec<PoolRun> {
        let Some(entry) = self.vms.remove(&vm) else {
            return Vec::new();
        };
        if let Some(region) = self.regions.get_mut(&entry.start) {
            region.owned = false;
        }
        let freed = entry.users.into_values().filter(|&at| self.leave(at));
        let freed = runs_of(freed.collect());
        self.drop_empty_region(entry.start);
        freed
    }

    /// Looks at every page of `vm` that uses the pool: `uses` says whether it still does (see
    /// [`uses_pool`]). Returns what nobody uses any more.
    pub fn sweep(
        &mut self,
        vm: PoolVm,
        mut uses: impl FnMut(BlockIndex, PageNo) -> bool,
    ) -> Vec<PoolRun> {
        let Some(entry) = self.vms.get_mut(&vm) else {
            return Vec::new();
        };
        let mut left = Vec::new();
        entry.users.retain(|&(block, page), at| {
            let stays = uses(block, page);
            if !stays {
                left.push(*at);
            }
            stays
        });
        left.retain(|&at| self.leave(at));
        runs_of(left)
    }

    /// The pages of a VM that use the pool, in order, and what they use.
    pub fn users_of(&self, vm: PoolVm) -> impl Iterator<Item = (BlockIndex, PageNo, PoolPage)> {
        let users = self.vms.get(&vm).into_iter().flat_map(|vm| &vm.users);
        users.map(|(&(block, page), &at)| (block, page, at))
    }

    /// One user less; whether it was the last.
    fn leave(&mut self, at: PoolPage) -> bool {
        let Entry::Occupied(mut slot) = self.slots.entry(at) else {
            return false;
        };
        slot.get_mut().users -= 1;
        if slot.get().users > 0 {
            return false;
        }
        let slot = slot.remove();
        if self.contents.get(&slot.content) == Some(&at) {
            self.contents.remove(&slot.content);
        }
        if let Some(region) = region_of(&mut self.regions, at) {
            region.live -= 1;
        }
        if let Some((&start, _)) = self.regions.range(..=at.0).next_back() {
            self.drop_empty_region(start);
        }
        true
    }

    fn drop_empty_region(&mut self, start: u64) {
        let region = self.regions.get(&start);
        let Some(region) = region.filter(|region| !region.owned && region.live == 0) else {
            return;
        };
        if let Some(space) = region.space {
            self.spaces.remove(&space);
        }
        self.regions.remove(&start);
    }
}

fn region_of(regions: &mut BTreeMap<u64, Region>, at: PoolPage) -> Option<&mut Region> {
    let (_, region) = regions.range_mut(..=at.0).next_back()?;
    Some(region)
}

/// Pages as runs.
fn runs_of(mut pages: Vec<PoolPage>) -> Vec<PoolRun> {
    pages.sort_unstable();
    let mut runs: Vec<PoolRun> = Vec::new();
    for page in pages {
        match runs.last_mut() {
            Some(run) if run.start.0 + run.pages == page.0 => run.pages += 1,
            _ => runs.push(PoolRun {
                start: page,
                pages: 1,
            }),
        }
    }
    runs
}

/// Whether a page that was mapped from the pool still uses it, by its entry in the page table. A
/// page that was written belongs to no file, wherever it is; one that is neither present nor in swap was
/// not even read yet. A page of the pool shows as one of a file in swap while the kernel moves its frame.
#[must_use]
pub fn uses_pool(present: bool, swapped: bool, file_or_shared: bool) -> bool {
    file_or_shared || !(present || swapped)
}

#[cfg(test)]
mod tests;
