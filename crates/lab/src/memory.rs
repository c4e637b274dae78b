//! Compares the memory of a guest between its source QEMU and its target QEMU, every page of its RAM.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};

use crate::cgroup::{self, Part};
use crate::process;
use crate::qmp::Qmp;
use crate::session;

pub(crate) const PAGE: usize = 4096;
/// An entry of `/proc/PID/pagemap`: the page is in memory, and then in which frame.
const ENTRY: usize = 8;
const PRESENT: u64 = 1 << 63;
const FRAME: u64 = (1 << 55) - 1;
/// Bytes read at a time: large enough that system calls do not count, small enough that what was
/// read of both sides is still in the processor's cache when it is compared.
const CHUNK: usize = 256 << 10;
/// How long a comparison has only what no host wants: guests that take all processors would keep a VM
/// from its target for good.
const LONGEST_BEHIND: Duration = Duration::from_secs(5);
/// Name of the RAM block that holds all of a guest's RAM on pc and q35. Those of the video card and of
/// firmware are not looked at.
const BLOCK: &str = "pc.ram";

/// A guest's memory inside its QEMU.
#[derive(Debug)]
pub struct GuestMemory {
    pid: u32,
    file: File,
    frames: File,
    base: u64,
    length: u64,
}

/// What a comparison found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compared {
    /// Pages looked at: all of the guest's.
    pub pages: u64,
    /// Of these, how many differ.
    pub mismatched: u64,
}

impl Compared {
    /// Both comparisons.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            pages: self.pages + other.pages,
            mismatched: self.mismatched + other.mismatched,
        }
    }
}

impl GuestMemory {
    /// Finds the guest's memory in the QEMU at the other end of `qmp`.
    pub fn of(qmp: &mut Qmp) -> anyhow::Result<Self> {
        let pid = qmp.peer_pid()?;
        let blocks = qmp.human("info ramblock")?;
        let block = parse_block(&blocks).with_context(|| format!("no {BLOCK} in `{blocks}`"))?;
        let base = match block.address {
            Some(address) => address,
            // QEMU before 8.x does not list addresses. The block is contiguous in QEMU's memory,
            // and guest address 0 is its beginning.
            None => parse_gpa2hva(&qmp.human("gpa2hva 0")?)?,
        };
        let path = format!("/proc/{pid}/mem");
        let mut options = File::options();
        let file = options.read(true).write(true).open(&path);
        let file = file.with_context(|| format!("opening {path}"))?;
        let path = format!("/proc/{pid}/pagemap");
        let frames = File::open(&path).with_context(|| format!("opening {path}"))?;
        Ok(Self {
            pid,
            file,
            frames,
            base,
            length: block.length,
        })
    }

    /// What of it the host holds, with pages that others hold too counted by the share in them.
    #[must_use]
    pub fn pss_bytes(&self) -> Option<u64> {
        process::pss_bytes_within(self.pid, self.base..self.base + self.length)
    }

    /// Hands every page to `take`, in the order of addresses.
    pub fn for_each_page(
        &self,
        mut take: impl FnMut(&[u8]) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let mut buffer = vec![0; CHUNK];
        let mut at = 0;
        while at < self.length {
            let length = usize::try_from(self.length - at)
                .unwrap_or(CHUNK)
                .min(CHUNK);
            self.read(at, &mut buffer[..length])?;
            buffer[..length].chunks(PAGE).try_for_each(&mut take)?;
            at += length as u64;
        }
        Ok(())
    }

    /// Writes a guest's memory, while the guest stands still.
    pub fn write(&self, at: u64, bytes: &[u8]) -> anyhow::Result<()> {
        let end = at.checked_add(bytes.len() as u64);
        ensure!(
            end.is_some_and(|end| end <= self.length),
            "{at:#x} is outside the guest's memory"
        );
        self.file
            .write_all_at(bytes, self.base + at)
            .with_context(|| format!("writing guest memory at {at:#x}"))
    }

    /// The frame of each page from `at` on; 0 for a page that has none, or whose frame is not shown.
    fn frames(&self, at: u64, into: &mut [u64]) -> anyhow::Result<()> {
        let mut raw = vec![0; into.len() * ENTRY];
        let offset = (self.base + at) / PAGE as u64 * ENTRY as u64;
        self.frames
            .read_exact_at(&mut raw, offset)
            .with_context(|| format!("reading the frames of guest memory at {at:#x}"))?;
        let (entries, _) = raw.as_chunks::<ENTRY>();
        for (frame, raw) in into.iter_mut().zip(entries) {
            let entry = u64::from_ne_bytes(*raw);
            *frame = if entry & PRESENT == 0 {
                0
            } else {
                entry & FRAME
            };
        }
        Ok(())
    }

    fn read(&self, at: u64, into: &mut [u8]) -> anyhow::Result<()> {
        self.file
            .read_exact_at(into, self.base + at)
            .with_context(|| format!("reading {} bytes of guest memory at {at:#x}", into.len()))
    }
}

/// Compares all pages of two guests that are both stopped. Pages in one frame, which is mostly the
/// kernel's frame of zeros, are the same without being read; all others are read.
///
/// In one thread, since two readers of one process wait for each other's locks; in one of its own, which
/// stays behind the other VMs' migrations: its time is taken off what is measured of this VM, and not
/// of them.
pub fn compare(source: &GuestMemory, target: &GuestMemory) -> anyhow::Result<Compared> {
    thread::scope(|scope| {
        let comparing = scope.spawn(|| compare_here(source, target));
        comparing
            .join()
            .map_err(|_| anyhow!("the comparing thread panicked"))?
    })
}

fn compare_here(source: &GuestMemory, target: &GuestMemory) -> anyhow::Result<Compared> {
    ensure!(
        source.length == target.length,
        "the VM has {:#x} bytes at the source and {:#x} at the target",
        source.length,
        target.length
    );
    ensure!(
        source.length.is_multiple_of(PAGE as u64),
        "the VM has a broken page at its end"
    );
    fall_back_to(Part::Rest);
    let mut part = Part::Rest;
    let begun = Instant::now();
    let mut frames = [vec![0; CHUNK / PAGE], vec![0; CHUNK / PAGE]];
    let mut buffers = [vec![0; CHUNK], vec![0; CHUNK]];
    let mut found = Compared::default();
    while found.pages * (PAGE as u64) < source.length {
        if part == Part::Rest && begun.elapsed() > LONGEST_BEHIND {
            part = Part::OfAHost;
            fall_back_to(part);
        }
        let at = found.pages * PAGE as u64;
        let left = (source.length - at) / PAGE as u64;
        let count = usize::try_from(left).map_or(CHUNK / PAGE, |left| left.min(CHUNK / PAGE));
        let [ours, theirs] = &mut frames;
        let (ours, theirs) = (&mut ours[..count], &mut theirs[..count]);
        source.frames(at, ours)?;
        target.frames(at, theirs)?;
        let is_read: Vec<bool> = ours
            .iter()
            .zip(&*theirs)
            .map(|(a, b)| a != b || *a == 0)
            .collect();
        let mut first = 0;
        for run in is_read.chunk_by(|a, b| a == b) {
            if run[0] {
                let [ours, theirs] = &mut buffers;
                let length = run.len() * PAGE;
                let (ours, theirs) = (&mut ours[..length], &mut theirs[..length]);
                let at = at + (first * PAGE) as u64;
                source.read(at, ours)?;
                target.read(at, theirs)?;
                if ours != theirs {
                    let pairs = ours.chunks(PAGE).zip(theirs.chunks(PAGE));
                    found.mismatched += pairs.filter(|(a, b)| a != b).count() as u64;
                }
            }
            first += run.len();
        }
        found.pages += count as u64;
    }
    Ok(found)
}

/// Leaves the calling thread this part of the processors, until it ends.
fn fall_back_to(part: Part) {
    let nice = match part {
        Part::Rest => 19,
        Part::OfAHost => 0,
    };
    // On Linux a priority belongs to a thread. It is all that there is where a cgroup cannot hold one, and
    // where neither may be changed a comparison finds the same.
    let _ = rustix::process::setpriority_process(None, nice);
    let _ = cgroup::yield_to_hosts(&session::own_prefix(), part);
}

struct Block {
    length: u64,
    address: Option<u64>,
}

/// Finds the block in the output of `info ramblock`. Its columns with `0x` are offset, used, total
/// and, where the header names it, the address in QEMU.
fn parse_block(text: &str) -> Option<Block> {
    let has_address = text.lines().next()?.contains("HVA");
    let line = text
        .lines()
        .find(|line| line.split_whitespace().next() == Some(BLOCK))?;
    let numbers: Vec<u64> = line
        .split_whitespace()
        .filter_map(|word| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok())
        .collect();
    let address = if has_address {
        Some(*numbers.get(3)?)
    } else {
        None
    };
    Some(Block {
        length: *numbers.get(1)?,
        address,
    })
}

/// Reads `Host virtual address for 0x0 (pc.ram) is 0x7f..`.
fn parse_gpa2hva(text: &str) -> anyhow::Result<u64> {
    text.trim()
        .rsplit_once("is 0x")
        .and_then(|(_, number)| u64::from_str_radix(number, 16).ok())
        .with_context(|| format!("`gpa2hva 0` answers `{text}`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEW: &str = "\
              Block Name    PSize              Offset               Used              Total                HVA  RO
                  pc.ram    4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000 0x00007f5a3fe00000  rw
                vga.vram    4 KiB  0x0000000010080000 0x0000000001000000 0x0000000001000000 0x00007f5a3ec00000  rw
";
    const OLD: &str = "\
              Block Name    PSize              Offset               Used              Total
                  pc.ram    4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000
";

    #[test]
    fn the_memory_is_found_in_the_listings_of_both_generations_of_qemu() {
        let new = parse_block(NEW).unwrap();
        assert_eq!(
            (new.length, new.address),
            (0x1000_0000, Some(0x7f5a_3fe0_0000))
        );
        let old = parse_block(OLD).unwrap();
        assert_eq!((old.length, old.address), (0x1000_0000, None));
        let text = "Host virtual address for 0x0 (pc.ram) is 0x7f0000400000\r\n";
        assert_eq!(parse_gpa2hva(text).unwrap(), 0x7f00_0040_0000);
        assert!(parse_block("").is_none());
        assert!(parse_gpa2hva("Memory at address 0x0 is not RAM").is_err());
    }

    struct Files(tempfile::TempDir);

    impl Files {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        /// A memory of these bytes, whose first pages have these entries in the page table.
        fn memory(&self, name: &str, bytes: &[u8], entries: &[u64]) -> GuestMemory {
            let write = |name: &str, bytes: &[u8]| {
                let path = self.0.path().join(name);
                std::fs::write(&path, bytes).unwrap();
                File::open(path).unwrap()
            };
            let mut table: Vec<u8> = entries.iter().flat_map(|e| e.to_ne_bytes()).collect();
            table.resize(bytes.len() / PAGE * ENTRY, 0);
            GuestMemory {
                pid: std::process::id(),
                file: write(name, bytes),
                frames: write(&format!("{name}.frames"), &table),
                base: 0,
                length: bytes.len() as u64,
            }
        }
    }

    fn compared(pages: u64, mismatched: u64) -> Compared {
        Compared { pages, mismatched }
    }

    #[test]
    fn every_page_that_differs_is_counted_once() {
        let files = Files::new();
        let mut bytes = vec![7; 9 * (1 << 20)];
        let source = files.memory("source", &bytes, &[]);
        let same = compare(&source, &files.memory("same", &bytes, &[])).unwrap();
        assert_eq!(same, compared(2304, 0));
        for at in [0, 1, PAGE, bytes.len() - 1] {
            bytes[at] = 8;
        }
        let other = compare(&source, &files.memory("other", &bytes, &[])).unwrap();
        assert_eq!(other, compared(2304, 3));
    }

    #[test]
    fn only_pages_in_one_frame_are_not_read() {
        let files = Files::new();
        let ours = [PRESENT | 5, PRESENT | 6, 7, PRESENT, PRESENT | 9];
        let theirs = [PRESENT | 5, PRESENT | 8, 7, PRESENT, PRESENT | 1 << 61 | 9];
        let source = files.memory("source", &[1; 5 * PAGE], &ours);
        let target = files.memory("target", &[2; 5 * PAGE], &theirs);
        assert_eq!(compare(&source, &target).unwrap(), compared(5, 3));
    }
}
