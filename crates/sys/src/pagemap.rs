//! `/proc/PID/pagemap`: which physical frame backs each page of a process.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use page::{HostAddr, PAGE_SIZE};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// Bytes of one entry.
const ENTRY_BYTES: usize = 8;

/// Entries read by one system call: a buffer of 64 KiB describes 32 MiB of guest memory.
const ENTRIES_PER_READ: usize = 8192;

/// What the kernel says about one virtual page. A hint: it may be outdated when it is read.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct PagemapEntry(pub u64);

impl PagemapEntry {
    /// Whether the page is in memory (bit 63).
    #[must_use]
    pub fn present(self) -> bool {
        self.bit(63)
    }

    /// Whether the page is in swap (bit 62).
    #[must_use]
    pub fn swapped(self) -> bool {
        self.bit(62)
    }

    /// Whether it belongs to a file or to shared anonymous memory (bit 61). The anonymous huge
    /// zero page shows it too.
    #[must_use]
    pub fn file_or_shared(self) -> bool {
        self.bit(61)
    }

    /// Whether this is the frame's only mapping (bit 56, since Linux 4.2). The zero page is not
    /// exclusive: test for zero before calling a page shared.
    #[must_use]
    pub fn exclusive(self) -> bool {
        self.bit(56)
    }

    /// Number of the physical frame (bits 0-54) of a present page; `None` if the kernel hides it,
    /// as it does without `CAP_SYS_ADMIN`.
    #[must_use]
    pub fn pfn(self) -> Option<u64> {
        const PFN_BITS: u64 = (1 << 55) - 1;
        Some(self.0 & PFN_BITS).filter(|&pfn| pfn != 0 && self.present())
    }

    fn bit(self, number: u32) -> bool {
        self.0 >> number & 1 == 1
    }
}

/// Reads the page table of one process.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
}

impl Pagemap {
    /// Opens the page table of process `pid`; it keeps naming that process.
    ///
    /// # Errors
    /// `NotFound` if there is none, `PermissionDenied` without the right to trace it.
    pub fn open(pid: u32) -> io::Result<Self> {
        Ok(Self {
            file: File::open(format!("/proc/{pid}/pagemap"))?,
        })
    }

    /// Reads the entries of `out.len()` pages from `start`, which must be page aligned. Pages
    /// that are not mapped have entries without any bit.
    ///
    /// # Errors
    /// `InvalidInput` for an unaligned start; `UnexpectedEof` beyond the address space, or when
    /// the process is gone.
    pub fn read(&self, start: HostAddr, out: &mut [PagemapEntry]) -> io::Result<()> {
        let page_size = PAGE_SIZE as u64;
        if !start.0.is_multiple_of(page_size) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut offset = start.0 / page_size * ENTRY_BYTES as u64;
        let mut buffer = vec![0; out.len().min(ENTRIES_PER_READ) * ENTRY_BYTES];
        for part in out.chunks_mut(ENTRIES_PER_READ) {
            let bytes = &mut buffer[..part.len() * ENTRY_BYTES];
            self.file.read_exact_at(bytes, offset)?;
            let (entries, _) = bytes.as_chunks::<ENTRY_BYTES>();
            for (entry, raw) in part.iter_mut().zip(entries) {
                *entry = PagemapEntry(u64::from_ne_bytes(*raw));
            }
            offset += bytes.len() as u64;
        }
        Ok(())
    }
}

/// The frame that the kernel lets every page of zeros that was only read share; `None` without the
/// right to see frames.
///
/// # Errors
/// What the kernel reports.
pub fn zero_frame() -> io::Result<Option<u64>> {
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let page =
        unsafe { mmap_anonymous(std::ptr::null_mut(), PAGE_SIZE, access, MapFlags::PRIVATE)? };
    // SAFETY: the page mapped above, which nothing else knows.
    std::hint::black_box(unsafe { page.cast::<u8>().read_volatile() });
    let mut entry = [PagemapEntry::default()];
    let read = Pagemap::open(std::process::id())
        .and_then(|map| map.read(HostAddr(page.addr() as u64), &mut entry));
    // SAFETY: as above, and not used after this.
    unsafe { munmap(page, PAGE_SIZE)? };
    read?;
    Ok(entry[0].pfn())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Memfd;
    use page::ByteLen;

    const PAGE: u64 = PAGE_SIZE as u64;

    fn entries(mapping: &crate::Mapping, pages: usize) -> Vec<PagemapEntry> {
        let mut out = vec![PagemapEntry::default(); pages];
        Pagemap::open(std::process::id())
            .unwrap()
            .read(mapping.addr(), &mut out)
            .unwrap();
        out
    }

    /// Reads a byte, also where an optimiser sees that nobody wants it.
    fn touch(mapping: &crate::Mapping) {
        let mut byte = [0];
        mapping.read(0, &mut byte).unwrap();
        std::hint::black_box(byte);
    }

    #[test]
    fn only_touched_pages_are_present() {
        let mapping = Memfd::create("touched", ByteLen(4 * PAGE))
            .unwrap()
            .map()
            .unwrap();
        mapping.write(2 * PAGE, b"x").unwrap();
        let present: Vec<_> = entries(&mapping, 4).iter().map(|e| e.present()).collect();
        assert_eq!(present, [false, false, true, false]);
    }

    #[test]
    fn two_mappings_of_one_page_show_one_frame_that_is_not_exclusive() {
        let file = Memfd::create("twice", ByteLen(PAGE)).unwrap();
        let one = file.map().unwrap();
        one.write(0, b"x").unwrap();
        let alone = entries(&one, 1)[0];
        assert!(alone.exclusive() && alone.file_or_shared() && !alone.swapped());

        let other = file.map().unwrap();
        touch(&other);
        let (a, b) = (entries(&one, 1)[0], entries(&other, 1)[0]);
        assert!(!a.exclusive() && !b.exclusive());
        // Frame numbers are for root only; without the right both are hidden.
        assert_eq!(a.pfn(), b.pfn());
        assert_eq!(a.pfn().is_some(), rustix::process::geteuid().is_root());
    }

    #[test]
    fn a_copy_on_write_page_gets_a_frame_of_its_own() {
        let file = Memfd::create("private", ByteLen(PAGE)).unwrap();
        let pool = file.map().unwrap();
        pool.write(0, b"pool").unwrap();
        let private = file.map_private().unwrap();
        touch(&private);
        assert!(entries(&private, 1)[0].file_or_shared());
        private.write(0, b"mine").unwrap();
        let written = entries(&private, 1)[0];
        assert!(written.present() && !written.file_or_shared() && written.exclusive());
        let mut bytes = [0; 4];
        pool.read(0, &mut bytes).unwrap();
        assert_eq!(&bytes, b"pool");
    }

    #[test]
    fn entries_beyond_one_read_are_in_place() {
        let pages = ENTRIES_PER_READ + 3;
        let mapping = Memfd::create("long", ByteLen(pages as u64 * PAGE))
            .unwrap()
            .map()
            .unwrap();
        mapping.write((pages as u64 - 1) * PAGE, b"x").unwrap();
        let found = entries(&mapping, pages);
        assert_eq!(found.iter().filter(|e| e.present()).count(), 1);
        assert!(found[pages - 1].present());
    }

    #[test]
    fn the_frame_of_zeros_is_the_same_each_time() {
        let frame = zero_frame().unwrap();
        assert_eq!(frame, zero_frame().unwrap());
        assert_eq!(frame.is_some(), rustix::process::geteuid().is_root());
    }

    #[test]
    fn an_unaligned_start_and_a_hidden_frame_are_told() {
        let map = Pagemap::open(std::process::id()).unwrap();
        let error = map
            .read(HostAddr(1), &mut [PagemapEntry::default()])
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        assert_eq!(PagemapEntry(1 << 63).pfn(), None);
        assert_eq!(PagemapEntry(1 << 62 | 5).pfn(), None);
        assert_eq!(PagemapEntry(1 << 63 | 1 << 61 | 5).pfn(), Some(5));
    }
}
