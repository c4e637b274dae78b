//! What is mapped where, and the kernel calls that map, copy and discard.
//!
//! One table for the process, behind one lock. Calls of QEMU's take the lock only while something
//! is mapped ([`anything_mapped`]).

use std::cell::UnsafeCell;
use std::ffi::c_void;
use std::ptr::{null_mut, without_provenance_mut};
use std::sync::atomic::{AtomicU64, Ordering};

use cow_abi::{BLOCKS_MAX, MapRun, Outcome, Statistics};

use crate::areas::Advice;
use crate::{PAGE, code, errno};

/// Pages that are mapped from the pool, or about to be.
static MAPPED: AtomicU64 = AtomicU64::new(0);

/// Pages that will be mapped when QEMU places them.
static EXPECTED: AtomicU64 = AtomicU64::new(0);

/// Whether QEMU's copies for faults concern this library.
#[inline]
pub(crate) fn minds_copies() -> bool {
    anything_mapped() || EXPECTED.load(Ordering::Relaxed) != 0
}

/// Whether any page of the process is mapped from the pool.
#[inline]
pub(crate) fn anything_mapped() -> bool {
    MAPPED.load(Ordering::Relaxed) != 0
}

/// A block of guest memory in which pages can be mapped.
#[derive(Clone, Copy)]
struct Block {
    addr: usize,
    pages: usize,
    advice: Advice,
    /// Something was mapped since advice was last given.
    unsettled: bool,
    /// A bit for each page, set while it is mapped from the pool: memory of our own.
    bits: *mut u64,
    /// For each page, where in the pool the content is that it is expected with, plus one; 0 for none.
    /// Memory of our own, null until something is expected.
    expected: *mut u64,
}

/// The table.
pub(crate) struct Table {
    blocks: [Option<Block>; BLOCKS_MAX],
    statistics: Statistics,
    /// The pool that expected pages are mapped from, which outlives the connection; -1 for none.
    pool: libc::c_int,
}

/// `struct uffdio_copy`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct FaultCopy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

const _: () = assert!(size_of::<FaultCopy>() == 40);

/// What becomes of a copy for a fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Placed {
    /// The page is there without it: who waits is to be woken.
    There,
    /// The kernel is to make it.
    ByCopy,
}

struct Registry {
    lock: UnsafeCell<libc::pthread_mutex_t>,
    table: UnsafeCell<Table>,
}

// SAFETY: the table is reached through `with` alone, which holds the lock; the lock is only
// handed to libc, which is made for sharing it.
unsafe impl Sync for Registry {}

static REGISTRY: Registry = Registry {
    lock: UnsafeCell::new(libc::PTHREAD_MUTEX_INITIALIZER),
    table: UnsafeCell::new(Table {
        blocks: [None; BLOCKS_MAX],
        statistics: Statistics {
            runs_mapped: 0,
            pages_mapped: 0,
            pages_copied: 0,
            runs_refused: 0,
            pages_discarded: 0,
            discards_failed: 0,
            fault_copies: 0,
            fault_maps: 0,
            fault_maps_failed: 0,
        },
        pool: -1,
    }),
};

/// Works on the table, alone.
pub(crate) fn with<T>(work: impl FnOnce(&mut Table) -> T) -> T {
    // SAFETY: a valid mutex; it is not held by this thread, because `work` never comes here again.
    unsafe { libc::pthread_mutex_lock(REGISTRY.lock.get()) };
    // SAFETY: the lock makes this the only reference.
    let result = work(unsafe { &mut *REGISTRY.table.get() });
    // SAFETY: locked above by this thread.
    unsafe { libc::pthread_mutex_unlock(REGISTRY.lock.get()) };
    result
}

/// In the child of a fork, where no other thread exists: frees the lock, whoever had it.
pub(crate) fn unlock_after_fork() {
    // SAFETY: the only thread of this process is here, so nobody uses the lock or waits for it.
    unsafe { *REGISTRY.lock.get() = libc::PTHREAD_MUTEX_INITIALIZER };
}

impl Table {
    /// Adds a block that was found fit.
    ///
    /// # Errors
    /// `EEXIST` if the number or a part of the place is taken, `ENOMEM` without room for its bits.
    pub(crate) fn add(
        &mut self,
        index: u16,
        addr: usize,
        len: usize,
        advice: Advice,
    ) -> Result<(), u16> {
        let pages = len >> PAGE.trailing_zeros();
        let end = addr.saturating_add(len);
        let overlaps = |other: &Block| addr < other.end() && other.addr < end;
        let taken = self.blocks.iter().flatten().any(overlaps);
        let slot = self.blocks.get_mut(usize::from(index));
        let slot = slot.ok_or(code(libc::EINVAL))?;
        if taken || slot.is_some() {
            return Err(code(libc::EEXIST));
        }
        let bytes = (pages >> 3).saturating_add(PAGE);
        let bits = anonymous(null_mut(), bytes, 0)?;
        *slot = Some(Block {
            addr,
            pages,
            advice,
            unsettled: false,
            bits: bits.cast(),
            expected: null_mut(),
        });
        Ok(())
    }

    /// Maps or copies one run; the pool has `pool_pages` pages now.
    pub(crate) fn place(
        &mut self,
        run: &MapRun,
        copy: bool,
        pool: libc::c_int,
        pool_pages: u64,
    ) -> Outcome {
        let outcome = self.try_place(run, copy, pool, pool_pages);
        let outcome = outcome.unwrap_or_else(Outcome::Refused);
        let pages = u64::from(run.pages);
        let s = &mut self.statistics;
        match outcome {
            Outcome::Mapped => {
                s.runs_mapped = s.runs_mapped.wrapping_add(1);
                s.pages_mapped = s.pages_mapped.wrapping_add(pages);
            }
            Outcome::Copied => s.pages_copied = s.pages_copied.wrapping_add(pages),
            Outcome::Refused(_) => s.runs_refused = s.runs_refused.wrapping_add(1),
            Outcome::Expected => {}
        }
        outcome
    }

    /// The block of a run, and the run's first page and the one past it.
    fn block_of(
        &mut self,
        run: &MapRun,
        pool_pages: u64,
    ) -> Result<(&mut Block, usize, usize), u16> {
        let invalid = code(libc::EINVAL);
        let block = self.blocks.get_mut(usize::from(run.block));
        let block = block.and_then(Option::as_mut).ok_or(invalid)?;
        let first = run.page as usize;
        let past = first.checked_add(run.pages as usize).ok_or(invalid)?;
        let pool_past = run.pool_page.checked_add(u64::from(run.pages));
        // A page mapped beyond the end of the pool would end QEMU when it is touched.
        if past > block.pages || pool_past.is_none_or(|past| past > pool_pages) {
            return Err(invalid);
        }
        Ok((block, first, past))
    }

    fn try_place(
        &mut self,
        run: &MapRun,
        copy: bool,
        pool: libc::c_int,
        pool_pages: u64,
    ) -> Result<Outcome, u16> {
        let (block, first, past) = self.block_of(run, pool_pages)?;
        let addr = block.addr.wrapping_add(first.wrapping_mul(PAGE));
        let len = past.wrapping_sub(first).wrapping_mul(PAGE);
        let offset = offset_of(run.pool_page)?;
        if !copy {
            // Marked first: once a page of the pool is there, a discard must find it marked.
            block.mark(first, past);
            if map_pool(addr, len, pool, offset) {
                block.unsettled = true;
                return Ok(Outcome::Mapped);
            }
            // No mapping is left, or no memory for one: bytes do as well. Pages that were mapped
            // before keep their marks; the others were never in the pool, which harms nobody.
        }
        copy_from_pool(addr, len, pool, offset).map(|()| Outcome::Copied)
    }

    /// QEMU will place the pages of a run, whose contents the pool has. All of the run is expected, or
    /// nothing.
    pub(crate) fn expect(&mut self, run: &MapRun, pool: libc::c_int, pool_pages: u64) -> Outcome {
        match self.try_expect(run, pool, pool_pages) {
            Ok(()) => Outcome::Expected,
            Err(error) => {
                let s = &mut self.statistics;
                s.runs_refused = s.runs_refused.wrapping_add(1);
                Outcome::Refused(error)
            }
        }
    }

    fn try_expect(&mut self, run: &MapRun, pool: libc::c_int, pool_pages: u64) -> Result<(), u16> {
        offset_of(run.pool_page.saturating_add(run.pages.into()))?;
        self.keep_pool(pool)?;
        let (block, first, past) = self.block_of(run, pool_pages)?;
        if block.expected.is_null() {
            let bytes = block.pages.wrapping_mul(size_of::<u64>());
            block.expected = anonymous(null_mut(), bytes, 0)?.cast();
        }
        let mut place = run.pool_page;
        for page in first..past {
            place = place.wrapping_add(1);
            block.set_expected(page, place);
        }
        Ok(())
    }

    /// Keeps the pool open for as long as the process lives.
    fn keep_pool(&mut self, pool: libc::c_int) -> Result<(), u16> {
        if self.pool < 0 {
            // SAFETY: plain numbers.
            self.pool = unsafe { libc::fcntl(pool, libc::F_DUPFD_CLOEXEC, 0) };
        }
        if self.pool < 0 { Err(errno()) } else { Ok(()) }
    }

    /// QEMU places a page on which a fault may wait.
    pub(crate) fn fault_copy(&mut self, copy: &FaultCopy) -> Placed {
        let s = &mut self.statistics;
        s.fault_copies = s.fault_copies.wrapping_add(1);
        let (to, pool) = (usize::try_from(copy.to).unwrap_or(0), self.pool);
        let is_page = copy.len == PAGE as u64 && to & PAGE.wrapping_sub(1) == 0;
        let mut blocks = self.blocks.iter_mut().flatten();
        let block = blocks.find(|block| block.addr <= to && to < block.end());
        let Some(block) = block.filter(|_| is_page && copy.mode == 0) else {
            return Placed::ByCopy;
        };
        let page = to.wrapping_sub(block.addr) >> PAGE.trailing_zeros();
        if block.marked(page) {
            // The guest has it, and may have written to it.
            return Placed::There;
        }
        let Some(at) = block.take_expected(page) else {
            return Placed::ByCopy;
        };
        let is_mapped = block.map_same(page, at, pool, without_provenance_mut(copy.source()));
        let s = &mut self.statistics;
        if is_mapped {
            s.fault_maps = s.fault_maps.wrapping_add(1);
            Placed::There
        } else {
            s.fault_maps_failed = s.fault_maps_failed.wrapping_add(1);
            Placed::ByCopy
        }
    }

    /// Gives the advice of every block again where something was mapped over it.
    ///
    /// # Errors
    /// The first error number; the other blocks get theirs nevertheless.
    pub(crate) fn settle(&mut self) -> Result<(), u16> {
        let mut result = Ok(());
        for block in self.blocks.iter_mut().flatten() {
            if block.unsettled {
                block.unsettled = false;
                result = result.and(advise(block.addr, block.len(), block.advice));
            }
        }
        result
    }

    /// Puts empty memory where pages of the pool are mapped between `addr` and `addr + len`.
    ///
    /// # Errors
    /// An error number. Some of the pages are still the pool's then.
    pub(crate) fn discard(&mut self, addr: usize, len: usize) -> Result<(), u16> {
        let end = addr.saturating_add(len);
        let mut result = Ok(());
        let mut discarded = 0_u64;
        for block in self.blocks.iter_mut().flatten() {
            if addr < block.end() && block.addr < end {
                let first = addr.saturating_sub(block.addr) >> PAGE.trailing_zeros();
                let past = end.min(block.end()).saturating_sub(block.addr);
                let past = past.div_ceil(PAGE).min(block.pages);
                let done = block.discard(first, past, &mut discarded);
                result = result.and(done);
            }
        }
        let s = &mut self.statistics;
        s.pages_discarded = s.pages_discarded.wrapping_add(discarded);
        if result.is_err() {
            s.discards_failed = s.discards_failed.wrapping_add(1);
        }
        result
    }

    /// What was done so far.
    pub(crate) fn statistics(&self) -> Statistics {
        self.statistics
    }
}

impl Block {
    fn len(&self) -> usize {
        self.pages.wrapping_mul(PAGE)
    }

    fn end(&self) -> usize {
        self.addr.wrapping_add(self.len())
    }

    /// Where the bit of `page` is: its word, and a mask.
    fn bit(&self, page: usize) -> (*mut u64, u64) {
        let word = self.bits.wrapping_add(page >> 6);
        (
            word,
            1_u64.wrapping_shl(u32::try_from(page & 63).unwrap_or(0)),
        )
    }

    fn marked(&self, page: usize) -> bool {
        let (word, mask) = self.bit(page);
        // SAFETY: callers ask for pages of the block only; the memory of its bits has a word for
        // each of them, is never freed, and is reached under the lock alone.
        page < self.pages && unsafe { *word } & mask != 0
    }

    fn mark(&mut self, first: usize, past: usize) {
        let mut new = 0_u64;
        for page in first..past.min(self.pages) {
            let (word, mask) = self.bit(page);
            // SAFETY: as in `marked`.
            let word = unsafe { &mut *word };
            if *word & mask == 0 {
                *word |= mask;
                new = new.wrapping_add(1);
            }
        }
        MAPPED.fetch_add(new, Ordering::Relaxed);
    }

    fn unmark(&mut self, first: usize, past: usize) {
        for page in first..past.min(self.pages) {
            let (word, mask) = self.bit(page);
            // SAFETY: as in `marked`.
            unsafe { *word &= !mask };
        }
        let pages = past.saturating_sub(first) as u64;
        MAPPED.fetch_sub(pages, Ordering::Relaxed);
    }

    fn set_expected(&mut self, page: usize, place: u64) {
        if page < self.pages && !self.expected.is_null() {
            // SAFETY: the memory has a word for each page of the block, is never freed, and is reached
            // under the lock alone.
            let word = unsafe { &mut *self.expected.wrapping_add(page) };
            if *word == 0 {
                EXPECTED.fetch_add(1, Ordering::Relaxed);
            }
            *word = place;
        }
    }

    /// Where in the pool the content is that the page is expected with; it is not any more.
    fn take_expected(&mut self, page: usize) -> Option<u64> {
        if page >= self.pages || self.expected.is_null() {
            return None;
        }
        // SAFETY: as in `set_expected`.
        let word = unsafe { &mut *self.expected.wrapping_add(page) };
        let at = word.checked_sub(1)?;
        *word = 0;
        EXPECTED.fetch_sub(1, Ordering::Relaxed);
        Some(at)
    }

    /// Maps the page from the pool if what is there is what QEMU has at `from`.
    fn map_same(&mut self, page: usize, at: u64, pool: libc::c_int, from: *mut c_void) -> bool {
        let Ok(offset) = offset_of(at) else {
            return false;
        };
        if !pool_has(pool, offset, from) {
            return false;
        }
        let addr = self.addr.wrapping_add(page.wrapping_mul(PAGE));
        let past = page.wrapping_add(1);
        self.mark(page, past);
        let is_mapped = map_pool(addr, PAGE, pool, offset);
        if is_mapped {
            self.unsettled = true;
        } else {
            self.unmark(page, past);
        }
        is_mapped
    }

    fn discard(&mut self, first: usize, past: usize, discarded: &mut u64) -> Result<(), u16> {
        let mut page = first;
        let mut result = Ok(());
        while page < past {
            let start = page;
            while page < past && self.marked(page) {
                page = page.wrapping_add(1);
            }
            if page == start {
                page = page.wrapping_add(1);
                continue;
            }
            let addr = self.addr.wrapping_add(start.wrapping_mul(PAGE));
            let len = page.wrapping_sub(start).wrapping_mul(PAGE);
            match anonymous(without_provenance_mut(addr), len, libc::MAP_FIXED) {
                Ok(_) => {
                    self.unmark(start, page);
                    *discarded = discarded.wrapping_add(page.wrapping_sub(start) as u64);
                    // Without its advice the memory still is what QEMU asked for.
                    let _ = advise(addr, len, self.advice);
                }
                Err(error) => result = result.and(Err(error)),
            }
        }
        result
    }
}

impl FaultCopy {
    /// Address of the bytes.
    fn source(&self) -> usize {
        usize::try_from(self.from).unwrap_or(0)
    }

    /// Where the page is that it fills.
    pub(crate) fn to(&self) -> u64 {
        self.to
    }

    /// As the kernel leaves it when all was copied.
    pub(crate) fn done(self) -> Self {
        let copied = i64::try_from(self.len).unwrap_or(0);
        Self { copied, ..self }
    }
}

/// Where a page of the pool begins.
fn offset_of(pool_page: u64) -> Result<libc::off_t, u16> {
    let offset = pool_page.checked_mul(PAGE as u64);
    let offset = offset.and_then(|offset| libc::off_t::try_from(offset).ok());
    offset.ok_or(code(libc::EINVAL))
}

/// Whether the page at `offset` of the pool has the bytes at `from`.
fn pool_has(pool: libc::c_int, offset: libc::off_t, from: *mut c_void) -> bool {
    let mut bytes = [0_u8; PAGE];
    // SAFETY: pointer and length are those of `bytes`.
    let read = unsafe { libc::pread(pool, bytes.as_mut_ptr().cast(), PAGE, offset) };
    if usize::try_from(read) != Ok(PAGE) || from.is_null() {
        return false;
    }
    // SAFETY: QEMU has asked the kernel to copy a page from there: it is its own memory, and stays as
    // it is until the call returns.
    unsafe { libc::memcmp(bytes.as_ptr().cast(), from, PAGE) == 0 }
}

/// Anonymous private memory, at `addr` with `MAP_FIXED` in `flags`.
fn anonymous(addr: *mut c_void, len: usize, flags: libc::c_int) -> Result<*mut c_void, u16> {
    let flags = flags | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: without `MAP_FIXED` nothing is replaced. With it, the caller names pages of a block
    // of guest memory: memory that QEMU reaches through its address, with no Rust reference to it,
    // and that stays readable and writable.
    let mapped = unsafe { libc::mmap(addr, len, access, flags, -1, 0) };
    if mapped == libc::MAP_FAILED {
        Err(errno())
    } else {
        Ok(mapped)
    }
}

fn map_pool(addr: usize, len: usize, pool: libc::c_int, offset: libc::off_t) -> bool {
    // Without a reservation, so that a host that forbids overcommitment cannot fail half way,
    // with the old memory gone and the new not there.
    let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_NORESERVE;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let place = without_provenance_mut(addr);
    // SAFETY: the range is pages of a registered block of guest memory: as in `anonymous`. The
    // pool's pages are there, because it is sealed against shrinking and the caller has compared
    // the end of the run with its size.
    unsafe { libc::mmap(place, len, access, flags, pool, offset) != libc::MAP_FAILED }
}

fn copy_from_pool(
    addr: usize,
    len: usize,
    pool: libc::c_int,
    offset: libc::off_t,
) -> Result<(), u16> {
    match read_pool(addr, len, pool, offset) {
        // Only if the kernel failed in the middle of a mapping.
        Err(error) if error == code(libc::EFAULT) => {
            anonymous(without_provenance_mut(addr), len, libc::MAP_FIXED)?;
            read_pool(addr, len, pool, offset)
        }
        other => other,
    }
}

/// The kernel writes into guest memory; where there is none that is an error return.
fn read_pool(addr: usize, len: usize, pool: libc::c_int, offset: libc::off_t) -> Result<(), u16> {
    let mut done = 0_usize;
    while done < len {
        let to = without_provenance_mut(addr.wrapping_add(done));
        let from = offset.wrapping_add(libc::off_t::try_from(done).unwrap_or(libc::off_t::MAX));
        // SAFETY: the range is pages of a block of guest memory, which QEMU expects to change while
        // it waits for its stream; no Rust reference to it exists.
        let read = unsafe { libc::pread(pool, to, len.wrapping_sub(done), from) };
        match usize::try_from(read) {
            Ok(0) => return Err(code(libc::EIO)),
            Ok(read) => done = done.wrapping_add(read),
            Err(_) if errno() == code(libc::EINTR) => {}
            Err(_) => return Err(errno()),
        }
    }
    Ok(())
}

fn advise(addr: usize, len: usize, advice: Advice) -> Result<(), u16> {
    let mut result = Ok(());
    for advice in advice.each() {
        if crate::interpose::raw_madvise(without_provenance_mut(addr), len, advice) != 0 {
            result = result.and(Err(errno()));
        }
    }
    result
}
