//! The pools of this host: contents that its VMs share, in one file for each trust domain, which their
//! QEMUs map. A QEMU can read the whole file, so that it holds nothing of another domain.
//!
//! Contents are placed by whoever brings them first, and stay as they are while a page may use them.
//! A thread looks from time to time which pages were written since, and gives back what nobody uses
//! any more. It leaves VMs alone that are arriving: their page tables do not say yet what they use.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use content::pool::{Pool, PoolError, PoolPage, PoolRun, PoolSpot, PoolUser, PoolVm, uses_pool};
use page::{BlockIndex, ByteLen, ContentId, ContentKey, HostAddr, PageBytes, PageNo};
use sys::{Memfd, Pagemap, PagemapEntry, Process};

use super::mapper::Trouble;
use super::session::lock;

/// How often it is looked whether pages still use the pool. Reading the page tables of 100 GiB of
/// pages that do takes 0.2 s.
const SWEEP: Duration = Duration::from_secs(10);

/// Name of the file, as `/proc/PID/maps` shows it.
const NAME: &str = "gangway-pool";

/// Pages of one read of a page table.
const SWEEP_PAGES: usize = 4096;

/// The pools of all trust domains.
pub(crate) struct Pools {
    /// By what names the domain. A pool stays while a VM may use it.
    open: Mutex<HashMap<[u8; 16], Arc<HostPool>>>,
    /// Most that each may hold.
    limit: ByteLen,
}

impl Pools {
    /// No pools yet, and the thread that looks after them.
    pub(crate) fn start(limit: ByteLen) -> io::Result<Arc<Self>> {
        let pools = Arc::new(Self::new(limit));
        let weak = Arc::downgrade(&pools);
        std::thread::Builder::new()
            .name("gw-pools".into())
            .spawn(move || look_after(&weak))?;
        Ok(pools)
    }

    fn new(limit: ByteLen) -> Self {
        Self {
            open: Mutex::default(),
            limit,
        }
    }

    /// The pool of the trust domain with this secret.
    pub(super) fn of(&self, domain: &ContentKey) -> io::Result<Arc<HostPool>> {
        let name = domain.name("pool", &[]);
        let mut open = lock(&self.open);
        if let Some(pool) = open.get(&name) {
            return Ok(Arc::clone(pool));
        }
        let pool = Arc::new(HostPool::new(self.limit)?);
        open.insert(name, Arc::clone(&pool));
        Ok(pool)
    }

    /// Looks after every VM once, and lets go of pools that nobody uses.
    fn sweep(&self) {
        let pools: Vec<_> = lock(&self.open).values().cloned().collect();
        for pool in pools {
            pool.sweep();
        }
        // Whoever wants a pool gets it with the list locked, too.
        lock(&self.open).retain(|_, pool| Arc::strong_count(pool) > 1 || !pool.is_unused());
    }
}

/// The pool of a trust domain.
pub(crate) struct HostPool {
    pub(super) file: Memfd,
    inner: Mutex<Inner>,
}

struct Inner {
    pool: Pool,
    /// Length of the file.
    pages: u64,
    next_vm: u32,
    vms: HashMap<PoolVm, Sharer>,
}

/// A VM that may have pages of the pool.
struct Sharer {
    process: Process,
    started: u64,
    /// By block.
    blocks: Vec<HostAddr>,
    /// It has arrived: nothing more will be mapped.
    is_complete: bool,
}

impl HostPool {
    /// An empty pool of at most `limit`. It never holds more than its VMs have memory, because a content
    /// goes with the last page that uses it.
    fn new(limit: ByteLen) -> io::Result<Self> {
        Ok(Self {
            file: Memfd::create_growing(NAME)?,
            inner: Mutex::new(Inner {
                pool: Pool::new(limit),
                pages: 0,
                next_vm: 0,
                vms: HashMap::new(),
            }),
        })
    }

    fn is_unused(&self) -> bool {
        lock(&self.inner).vms.is_empty()
    }

    /// Gives a VM, whose QEMU is process `pid` and has blocks of these addresses and lengths, its
    /// place.
    pub(super) fn join(&self, pid: u32, blocks: &[(HostAddr, ByteLen)]) -> io::Result<PoolVm> {
        let process = Process::open(pid)?;
        let sharer = Sharer {
            started: process.start_time()?,
            process,
            blocks: blocks.iter().map(|(addr, _)| *addr).collect(),
            is_complete: false,
        };
        let lengths: Vec<ByteLen> = blocks.iter().map(|(_, len)| *len).collect();
        let mut inner = lock(&self.inner);
        let vm = PoolVm(inner.next_vm);
        inner.next_vm = inner.next_vm.wrapping_add(1);
        let added = inner.pool.add_vm(vm, &lengths);
        added.map_err(io::Error::other)?;
        self.grow(&mut inner)?;
        inner.vms.insert(vm, sharer);
        Ok(vm)
    }

    /// Has the file be as long as its book-keeping says.
    fn grow(&self, inner: &mut Inner) -> io::Result<()> {
        let pages = inner.pool.file_pages();
        if pages > inner.pages {
            self.file.set_len(ByteLen(PoolPage(pages).offset()))?;
            inner.pages = pages;
        }
        Ok(())
    }

    /// Where a page with these bytes, of this id, is to be mapped from, at `spot` if there is one that
    /// is free. `None`: it is to be written, because a page that is used is in its place.
    pub(super) fn place(
        &self,
        user: PoolUser,
        (spot, content): (Option<PoolSpot>, ContentId),
        bytes: &PageBytes,
    ) -> Result<Option<PoolPage>, Trouble> {
        // Locked while the bytes are written, so that nobody maps the place before.
        let mut inner = lock(&self.inner);
        let placed = match spot {
            Some(spot) => inner.pool.place_at(spot, content, user),
            None => inner.pool.place(content, user),
        };
        let placed = match placed {
            Ok(placed) => placed,
            Err(PoolError::Full | PoolError::NoRoom) => return Err(Trouble::PoolFull),
            Err(_) => return Ok(None),
        };
        let written = self.grow(&mut inner).and_then(|()| {
            if placed.new {
                self.file.write_at(placed.at.offset(), bytes)?;
            }
            Ok(())
        });
        if let Err(error) = written {
            tracing::warn!("the pool cannot be written: {error}");
            inner.pool.release(user);
            return Err(Trouble::PoolUnwritable);
        }
        // What the page had before: nobody can read it there any more.
        if let Some(freed) = placed.freed {
            self.give_back(&[single(freed)]);
        }
        Ok(Some(placed.at))
    }

    /// Reads a content that is here.
    pub(super) fn read(&self, content: ContentId, out: &mut [u8]) -> bool {
        let inner = lock(&self.inner);
        let at = inner.pool.find(content);
        at.is_some_and(|at| self.file.read_at(at.offset(), out).is_ok())
    }

    /// The page was not mapped.
    pub(super) fn release(&self, user: PoolUser) {
        let mut inner = lock(&self.inner);
        if let Some(freed) = inner.pool.release(user) {
            self.give_back(&[single(freed)]);
        }
    }

    #[cfg(test)]
    pub(super) fn is_complete(&self, vm: PoolVm) -> bool {
        let inner = lock(&self.inner);
        inner.vms.get(&vm).is_some_and(|sharer| sharer.is_complete)
    }

    /// Nothing more of this VM will be mapped.
    pub(super) fn complete(&self, vm: PoolVm) {
        if let Some(sharer) = lock(&self.inner).vms.get_mut(&vm) {
            sharer.is_complete = true;
        }
    }

    /// What nobody uses becomes holes. Called with the pool locked: nothing is placed there before.
    fn give_back(&self, runs: &[PoolRun]) {
        for run in runs {
            if let Err(error) = self.file.punch_hole(run.start.offset(), run.len()) {
                tracing::warn!("memory of the pool cannot be given back: {error}");
            }
        }
    }

    /// Looks after every VM once, with the pool locked for one at a time: others are arriving.
    fn sweep(&self) {
        let numbers: Vec<PoolVm> = lock(&self.inner).vms.keys().copied().collect();
        for vm in numbers {
            self.sweep_vm(vm);
        }
        let inner = lock(&self.inner);
        tracing::trace!(live = %inner.pool.live(), users = inner.pool.users(), "pool");
    }

    fn sweep_vm(&self, vm: PoolVm) {
        let mut inner = lock(&self.inner);
        let freed = if inner.vms.get(&vm).is_some_and(Sharer::is_gone) {
            inner.vms.remove(&vm);
            inner.pool.remove_vm(vm)
        } else if let Some(left) = inner.privatised(vm) {
            inner.pool.sweep(vm, |block, page| {
                left.binary_search(&(block, page)).is_err()
            })
        } else {
            return;
        };
        self.give_back(&freed);
    }
}

fn single(start: PoolPage) -> PoolRun {
    PoolRun { start, pages: 1 }
}

impl Sharer {
    fn is_gone(&self) -> bool {
        let is_same = || {
            let started = self.process.start_time();
            started.is_ok_and(|started| started == self.started)
        };
        !(self.process.is_alive() && is_same())
    }
}

impl Inner {
    /// Pages of a VM that use the pool no more, in order; none while it arrives.
    fn privatised(&self, vm: PoolVm) -> Option<Vec<(BlockIndex, PageNo)>> {
        let sharer = self.vms.get(&vm).filter(|sharer| sharer.is_complete)?;
        let pagemap = Pagemap::open(sharer.process.pid()).ok()?;
        let mut users = self.pool.users_of(vm).map(|(block, page, _)| (block, page));
        let mut left = Vec::new();
        let mut entries = vec![PagemapEntry::default(); SWEEP_PAGES];
        let mut next = users.next();
        while let Some((block, first)) = next {
            // One read for all that follow closely.
            let start = sharer.blocks.get(usize::from(block.0))?.of_page(first)?;
            pagemap.read(start, &mut entries).ok()?;
            while let Some((b, page)) = next.filter(|(b, _)| *b == block) {
                let Some(entry) = entries.get((page.0 - first.0) as usize) else {
                    break;
                };
                if !uses_pool(entry.present(), entry.swapped(), entry.file_or_shared()) {
                    left.push((b, page));
                }
                next = users.next();
            }
        }
        Some(left)
    }
}

/// Until the agent ends. What QEMUs have mapped stays mapped then.
fn look_after(pools: &Weak<Pools>) {
    while let Some(pools) = pools.upgrade() {
        pools.sweep();
        drop(pools);
        std::thread::sleep(SWEEP);
    }
}

#[cfg(test)]
mod tests {
    use page::PAGE_SIZE;

    use super::*;

    /// This process stands for a QEMU: it maps the pool, writes a page, and the page is given back.
    #[test]
    fn a_content_is_given_back_when_its_last_sharer_has_written_its_page() {
        let pool = HostPool::new(ByteLen(u64::MAX)).unwrap();
        let arriving = pool.join(std::process::id(), &[(HostAddr(0), ByteLen(4096))]);
        let user = |vm, page| PoolUser {
            vm,
            block: BlockIndex(0),
            page: PageNo(page),
        };
        let bytes = [7; PAGE_SIZE];
        let (kept, left) = (ContentId([1; 16]), ContentId([2; 16]));
        let at = pool.place(user(arriving.unwrap(), 0), (None, kept), &bytes);
        assert!(matches!(at, Ok(Some(PoolPage(0)))));
        pool.file.set_len(ByteLen(3 * 4096)).unwrap();
        let memory = pool.file.map_private().unwrap();
        let here = HostAddr(memory.addr().0 + 4096);
        let vm = pool
            .join(std::process::id(), &[(here, ByteLen(2 * 4096))])
            .unwrap();
        for (page, content) in [(0, left), (1, kept)] {
            assert!(pool.place(user(vm, page), (None, content), &bytes).is_ok());
        }
        memory.write(4096, b"new").unwrap();
        pool.sweep();
        let mut out = [0; PAGE_SIZE];
        assert!(pool.read(left, &mut out), "nobody looks while it arrives");
        pool.complete(vm);
        pool.sweep();
        assert!(!pool.read(left, &mut out));
        assert!(pool.read(kept, &mut out) && out == bytes);
        assert_eq!(pool.file.allocated().unwrap(), ByteLen(4096));
    }

    #[test]
    fn a_content_is_given_back_when_its_last_page_gets_another() {
        let pool = HostPool::new(ByteLen(u64::MAX)).unwrap();
        let join = || pool.join(std::process::id(), &[(HostAddr(0), ByteLen(4096))]);
        let [one, other] = [(); 2].map(|()| PoolUser {
            vm: join().unwrap(),
            block: BlockIndex(0),
            page: PageNo(0),
        });
        let (kept, left) = (ContentId([1; 16]), ContentId([2; 16]));
        for (user, content) in [(one, kept), (other, left), (other, kept)] {
            let placed = pool.place(user, (None, content), &[7; PAGE_SIZE]);
            assert!(matches!(placed, Ok(Some(_))));
        }
        assert_eq!(pool.file.allocated().unwrap(), ByteLen(4096));
    }

    #[test]
    fn domains_have_pools_of_their_own_which_go_when_nobody_uses_them() {
        let pools = Pools::new(ByteLen(u64::MAX));
        let domains = [1, 2].map(|n| ContentKey::new([n; 32]));
        let [one, other] = domains.each_ref().map(|domain| pools.of(domain).unwrap());
        assert!(!Arc::ptr_eq(&one, &other));
        assert!(Arc::ptr_eq(&one, &pools.of(&domains[0]).unwrap()));
        let length = [(HostAddr(0), ByteLen(4096))];
        one.join(std::process::id(), &length).unwrap();
        let inode = one.file.inode().unwrap();
        drop((one, other));
        pools.sweep();
        assert_eq!(lock(&pools.open).len(), 1);
        let one = pools.of(&domains[0]).unwrap();
        assert_eq!(one.file.inode().unwrap(), inode);
    }
}
