//! The memory of a QEMU process, for a scan.

use std::io;

use page::{HostAddr, PAGE_SIZE, PageNo};
use sys::{Pagemap, PagemapEntry, Process, ProcessMemory};

use super::{Region, VmMemory};
use crate::{GuestError, SourceGuest};

/// Memory of one QEMU.
#[derive(Debug)]
pub struct QemuMemory {
    memory: ProcessMemory,
    table: Pagemap,
}

/// What a scan needs to know of a QEMU.
#[derive(Debug)]
pub struct Examined {
    /// Its memory.
    pub memory: QemuMemory,
    /// Where guest memory is in it, in the order of its RAM blocks. Blocks whose address this
    /// QEMU does not tell are left out: before version 8.0 all but the main one.
    pub regions: Vec<Region>,
    /// Names the process for ever: its pid and when it was started.
    pub process: u64,
}

impl QemuMemory {
    /// Opens the memory of process `pid`.
    ///
    /// # Errors
    /// If there is none, or we have no right to read it.
    pub fn open(pid: u32) -> io::Result<Self> {
        Ok(Self {
            memory: ProcessMemory::open(pid)?,
            table: Pagemap::open(pid)?,
        })
    }
}

impl SourceGuest {
    /// Finds this VM's memory. The monitor is not needed after that.
    ///
    /// # Errors
    /// If the monitor fails or the process cannot be examined.
    pub fn examine_memory(&self) -> Result<Examined, GuestError> {
        let pid = self.pid();
        let examine = |source| GuestError::Process { pid, source };
        let regions = self.ram_blocks()?.into_iter().filter_map(|block| {
            let pages = u32::try_from(block.used_len.0 / PAGE_SIZE as u64).ok()?;
            let start = block.hva?;
            start.0.checked_add(block.used_len.0)?;
            Some(Region { start, pages })
        });
        Ok(Examined {
            regions: regions.collect(),
            memory: QemuMemory::open(pid).map_err(examine)?,
            process: unique_number(self.process()).map_err(examine)?,
        })
    }
}

impl Examined {
    /// The process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        (self.process & PID_MASK) as u32
    }

    /// Where an address is: the place of its region, and the page there.
    #[must_use]
    pub fn locate(&self, addr: HostAddr) -> Option<(usize, PageNo)> {
        let page = |region: &Region| {
            let at = addr.0.checked_sub(region.start.0)? / PAGE_SIZE as u64;
            let at = u32::try_from(at).ok()?;
            (at < region.pages).then_some(PageNo(at))
        };
        let mut found = self.regions.iter().map(page).enumerate();
        found.find_map(|(at, page)| Some((at, page?)))
    }
}

/// The pid's part of a process's number.
const PID_MASK: u64 = (1 << 22) - 1;

/// Ticks since boot fill 42 bits in 1400 years, a pid has at most 22.
fn unique_number(process: &Process) -> io::Result<u64> {
    Ok(process.start_time()? << 22 | u64::from(process.pid()))
}

impl VmMemory for QemuMemory {
    fn page_table(&self, start: HostAddr, out: &mut [PagemapEntry]) -> io::Result<()> {
        self.table.read(start, out)
    }

    fn pages(&self, addrs: &[HostAddr], out: &mut [u8]) -> io::Result<usize> {
        self.memory.read_pages(addrs, out)
    }

    fn shared_pages(&self, addrs: &[HostAddr], out: &mut [u8]) -> io::Result<usize> {
        self.memory.read_shared_pages(addrs, out)
    }

    fn samples(&self, addrs: &[HostAddr], piece: usize, out: &mut [u8]) -> io::Result<usize> {
        self.memory.read_samples(addrs, piece, out)
    }
}
