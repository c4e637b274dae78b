//! What this host offers: for `gangway doctor`, and to decide whether another guest fits.

use std::fs;
use std::path::Path;

use page::{ByteLen, HostAddr, PAGE_SIZE};

use crate::{MemoryCgroup, QemuBinary};

/// Bit of `CAP_SYS_PTRACE` in a capability mask.
const CAP_SYS_PTRACE: u32 = 19;

/// Bit of `CAP_SYS_ADMIN`.
const CAP_SYS_ADMIN: u32 = 21;

/// Memory for new guests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostMemory {
    /// What the host could give without swapping (`MemAvailable`); 0 if it cannot be told.
    pub available: ByteLen,
    /// The memory cgroup with the least left among those that hold this process. Guests that it
    /// starts are in it, too.
    pub cgroup: Option<MemoryCgroup>,
}

impl HostMemory {
    /// Reads it now.
    #[must_use]
    pub fn now() -> Self {
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        Self {
            available: mem_available(&meminfo).unwrap_or_default(),
            cgroup: MemoryCgroup::tightest(Path::new("/")),
        }
    }

    /// Bytes that new guests can use.
    #[must_use]
    pub fn for_guests(&self) -> ByteLen {
        let limited = self.cgroup.as_ref().map(MemoryCgroup::available);
        limited.map_or(self.available, |limit| limit.min(self.available))
    }
}

/// Whose memory this process may read. The repair of pages needs that of its guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryReading {
    /// Everybody's (`CAP_SYS_PTRACE`).
    Everybody,
    /// That of processes of the same user, if they are dumpable.
    SameUser,
    /// Its own descendants' only (Yama's `ptrace_scope` 1): not that of guests started by others.
    Descendants,
    /// Nobody's: Yama or a seccomp filter forbids it.
    Nobody,
}

/// Kernel same-page merging.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KsmState {
    /// Whether it merges now.
    pub running: bool,
    /// Frames that are shared.
    pub pages_shared: u64,
    /// Pages that share them, beyond one for each frame.
    pub pages_sharing: u64,
}

/// What this host offers. `None` where the kernel does not tell.
#[derive(Clone, Debug)]
pub struct HostReport {
    /// Release of the kernel.
    pub kernel: String,
    /// User of this process.
    pub uid: u32,
    /// Memory for new guests.
    pub memory: HostMemory,
    /// QEMU programs on this process's `PATH`.
    pub qemu: Vec<QemuBinary>,
    /// Whether `/dev/kvm` can be opened. Without it guests are emulated.
    pub kvm: bool,
    /// Whose memory can be read.
    pub memory_reading: MemoryReading,
    /// Whether the numbers of physical frames are visible, which tell what guests share.
    pub frame_numbers: bool,
    /// Whether page faults can be served, as post-copy needs.
    pub userfaultfd: bool,
    /// Kernel same-page merging; `None` if the kernel has none.
    pub ksm: Option<KsmState>,
    /// Mappings that a process may have (`vm.max_map_count`).
    pub max_map_count: Option<u64>,
    /// When the kernel uses huge pages by itself: `always`, `madvise`, `never`.
    pub transparent_hugepages: Option<String>,
}

/// Looks at this host. Starts each QEMU found, to ask for its version: some tens of milliseconds.
#[must_use]
pub fn host_report() -> HostReport {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    HostReport {
        kernel: read_word("/proc/sys/kernel/osrelease").unwrap_or_default(),
        uid: rustix::process::geteuid().as_raw(),
        memory: HostMemory::now(),
        qemu: QemuBinary::find(&std::env::var_os("PATH").unwrap_or_default()),
        kvm: fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_ok(),
        memory_reading: memory_reading(&status),
        frame_numbers: has_capability(&status, CAP_SYS_ADMIN),
        userfaultfd: sys::userfaultfd_usable(),
        ksm: ksm_state(),
        max_map_count: read_number("/proc/sys/vm/max_map_count"),
        transparent_hugepages: read_word("/sys/kernel/mm/transparent_hugepage/enabled")
            .and_then(|line| chosen(&line)),
    }
}

fn memory_reading(status: &str) -> MemoryReading {
    if !can_call_process_vm_readv() {
        return MemoryReading::Nobody;
    }
    let yama = read_number("/proc/sys/kernel/yama/ptrace_scope").unwrap_or(0);
    match (yama, has_capability(status, CAP_SYS_PTRACE)) {
        (0..=2, true) => MemoryReading::Everybody,
        (0, false) => MemoryReading::SameUser,
        (1, false) => MemoryReading::Descendants,
        _ => MemoryReading::Nobody,
    }
}

/// A seccomp filter can forbid the call altogether: tried on a page of our own.
fn can_call_process_vm_readv() -> bool {
    let try_it = || {
        let page = sys::Memfd::create("gangway-probe", ByteLen(PAGE_SIZE as u64))?.map()?;
        let memory = sys::ProcessMemory::open(std::process::id())?;
        memory.read_pages(&[page.addr()] as &[HostAddr], &mut [0; PAGE_SIZE])
    };
    try_it().is_ok_and(|pages: usize| pages == 1)
}

/// Whether `/proc/PID/status` shows the capability as effective.
fn has_capability(status: &str, bit: u32) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> bit & 1 == 1)
}

fn mem_available(meminfo: &str) -> Option<ByteLen> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024).map(ByteLen)
}

fn ksm_state() -> Option<KsmState> {
    let number = |name: &str| read_number(&format!("/sys/kernel/mm/ksm/{name}"));
    Some(KsmState {
        running: number("run")? == 1,
        pages_shared: number("pages_shared")?,
        pages_sharing: number("pages_sharing")?,
    })
}

/// The word in brackets of `always [madvise] never`.
fn chosen(line: &str) -> Option<String> {
    let (_, rest) = line.split_once('[')?;
    rest.split_once(']').map(|(word, _)| word.to_owned())
}

fn read_word(path: &str) -> Option<String> {
    fs::read_to_string(path)
        .ok()
        .map(|text| text.trim().to_owned())
}

fn read_number(path: &str) -> Option<u64> {
    read_word(path)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smaller_of_host_and_cgroup_is_left_for_guests() {
        let cgroup = |limit| {
            Some(MemoryCgroup {
                path: "/c".into(),
                limit: ByteLen(limit),
                used: ByteLen(10),
            })
        };
        let memory = |limit| HostMemory {
            available: ByteLen(100),
            cgroup: cgroup(limit),
        };
        assert_eq!(memory(50).for_guests(), ByteLen(40));
        assert_eq!(memory(500).for_guests(), ByteLen(100));
        let unlimited = HostMemory {
            available: ByteLen(100),
            cgroup: None,
        };
        assert_eq!(unlimited.for_guests(), ByteLen(100));
    }

    #[test]
    fn the_kernels_texts_are_read() {
        let meminfo = "MemTotal:  24 kB\nMemAvailable:   12345 kB\n";
        assert_eq!(mem_available(meminfo), Some(ByteLen(12_345 * 1024)));
        assert_eq!(mem_available("MemAvailable: much kB"), None);
        assert_eq!(chosen("always [madvise] never").as_deref(), Some("madvise"));
        assert_eq!(chosen("none"), None);
        let status = "Name:\tx\nCapEff:\t0000000000080000\n";
        assert!(has_capability(status, CAP_SYS_PTRACE) && !has_capability(status, CAP_SYS_ADMIN));
        assert!(!has_capability("CapEff:\tzz", CAP_SYS_PTRACE));
    }

    #[test]
    fn this_host_has_memory_for_a_guest_and_a_kernel() {
        let report = host_report();
        assert!(report.memory.for_guests() > ByteLen(0));
        assert!(report.memory.for_guests() <= report.memory.available);
        assert!(!report.kernel.is_empty());
        assert!(report.max_map_count.is_some_and(|count| count > 0));
    }
}
