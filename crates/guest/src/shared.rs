//! Which pages of this host's VMs share a physical frame, whatever made them share it: KSM, a
//! template, a fork, or the pool of an earlier migration (SLM section III-A and III-C).
//!
//! A page table names the frame of each page, and says whether anything else maps it. Pages of a
//! private mapping of a file are known by file and offset instead: those that nobody has touched
//! yet have no frame, and share it nevertheless.
//!
//! All of this is a hint that is old when it is read: a frame can be given to another page at any
//! moment, also of a VM that stands still. Whoever acts on it compares the bytes.

use std::collections::HashMap;
use std::fs;
use std::io;

use page::{BlockIndex, HostAddr, PAGE_SIZE, PageNo, PageRun};
use sys::{Pagemap, PagemapEntry, zero_frame};

/// Set in the key of a page that is known by its file; the rest is a number of the file (15 bits)
/// and the page of the file (48 bits). Other keys are frame numbers, which have 55 bits.
const FILE_KEY: u64 = 1 << 63;
const FILE_PAGE_BITS: u32 = 48;
/// Most files: those beyond are left out.
const FILES_MAX: usize = 1 << 15;

/// No key, and no class.
const NONE: u64 = 0;
const NO_CLASS: u32 = u32::MAX;

/// A block of a VM's memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemoryBlock {
    /// Where it begins in QEMU's memory.
    pub addr: HostAddr,
    /// How many pages.
    pub pages: u32,
}

/// The memory of a VM.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VmMemory {
    /// QEMU's process.
    pub pid: u32,
    /// Its blocks, numbered in this order.
    pub blocks: Vec<MemoryBlock>,
}

/// A page of one of the VMs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FramePage {
    /// The VM's position in the list.
    pub vm: u16,
    /// The block's position in the VM.
    pub block: BlockIndex,
    /// The page in the block.
    pub page: PageNo,
}

/// A page and its key in one number, which sorts quickly: key, VM, block, page.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Found(u128);

impl Found {
    fn new(key: u64, page: FramePage) -> Self {
        let place =
            u64::from(page.vm) << 48 | u64::from(page.block.0) << 32 | u64::from(page.page.0);
        Self(u128::from(key) << 64 | u128::from(place))
    }

    fn key(&self) -> u64 {
        (self.0 >> 64) as u64
    }

    #[expect(clippy::cast_possible_truncation, reason = "its parts")]
    fn page(&self) -> FramePage {
        FramePage {
            vm: (self.0 >> 48) as u16,
            block: BlockIndex((self.0 >> 32) as u16),
            page: PageNo(self.0 as u32),
        }
    }
}

/// Number of a class of pages that share a frame, until the next [`SharedFrames::refresh`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ClassNo(pub u32);

/// What a refresh has found.
#[derive(Debug, Default)]
pub struct ScanReport {
    /// Pages that share their frame with another page of these VMs.
    pub shared_pages: u64,
    /// Frames that they share.
    pub frames: u64,
    /// VMs that could not be read, by position: their pages share nothing.
    pub unread: Vec<(u16, io::Error)>,
}

/// The classes of pages that share a frame.
#[derive(Debug, Default)]
pub struct SharedFrames {
    vms: Vec<VmMemory>,
    /// For each VM and block, the class of each page.
    class_of: Vec<Vec<Vec<u32>>>,
    /// What identifies each class, and where its pages begin in `members`.
    classes: Vec<(u64, u32)>,
    members: Vec<FramePage>,
    files: HashMap<(String, u64), u64>,
    zero_frame: Option<u64>,
}

impl SharedFrames {
    /// Looks at these VMs from the next refresh on.
    #[must_use]
    pub fn new(vms: Vec<VmMemory>) -> Self {
        Self {
            vms,
            ..Self::default()
        }
    }

    /// How many pages of a VM map a frame that something else maps too, or a file that it could: another
    /// VM, or this one again. What it is is not known before it is looked at as well.
    ///
    /// # Errors
    /// If a page table cannot be read.
    pub fn mapped_elsewhere(vm: VmMemory) -> io::Result<u64> {
        let mut frames = Self::new(vec![vm]);
        frames.zero_frame = zero_frame()?;
        let mut found = Vec::new();
        frames.read_vm(0, &mut found)?;
        Ok(found.len() as u64)
    }

    /// Looks at these VMs instead from the next refresh on; nothing is shared until then. Files keep
    /// their numbers.
    pub fn set_vms(&mut self, vms: Vec<VmMemory>) {
        self.vms = vms;
        self.class_of.clear();
        self.classes.clear();
        self.members.clear();
    }

    /// Reads every page table and joins. Half a millisecond for each 256 MiB of a VM's memory, and
    /// a few more for the join.
    ///
    /// # Errors
    /// Only if this process's own page table cannot be read. A VM that is gone is reported.
    pub fn refresh(&mut self) -> io::Result<ScanReport> {
        if self.zero_frame.is_none() {
            self.zero_frame = zero_frame()?;
        }
        let mut report = ScanReport::default();
        let mut found: Vec<Found> = Vec::with_capacity(self.members.len());
        self.class_of.clear();
        for vm in 0..self.vms.len() {
            let Ok(number) = u16::try_from(vm) else {
                break;
            };
            let before = found.len();
            if let Err(error) = self.read_vm(number, &mut found) {
                found.truncate(before);
                report.unread.push((number, error));
            }
            let blocks = self.vms.get(vm).into_iter().flat_map(|vm| &vm.blocks);
            let blocks = blocks.map(|block| vec![NO_CLASS; block.pages as usize]);
            self.class_of.push(blocks.collect());
        }
        found.sort_unstable();
        self.join(&found);
        report.shared_pages = self.members.len() as u64;
        report.frames = self.classes.len() as u64;
        Ok(report)
    }

    fn read_vm(&mut self, vm: u16, found: &mut Vec<Found>) -> io::Result<()> {
        let Some(memory) = self.vms.get(usize::from(vm)) else {
            return Ok(());
        };
        let areas = areas_of(memory, &mut self.files)?;
        let pagemap = Pagemap::open(memory.pid)?;
        let mut entries = Vec::new();
        for (block, number) in memory.blocks.iter().zip(0..) {
            entries.resize(block.pages as usize, PagemapEntry::default());
            pagemap.read(block.addr, &mut entries)?;
            let mut keys = Keys::new(&areas, self.zero_frame);
            for (entry, page) in entries.iter().zip(0_u32..) {
                let page = PageNo(page);
                let key = block
                    .addr
                    .of_page(page)
                    .map_or(NONE, |at| keys.of(at, *entry));
                if key != NONE {
                    let block = BlockIndex(number);
                    found.push(Found::new(key, FramePage { vm, block, page }));
                }
            }
        }
        Ok(())
    }

    /// Makes a class of every key that occurs twice; `found` is sorted.
    fn join(&mut self, found: &[Found]) {
        self.classes.clear();
        self.members.clear();
        for class in found
            .chunk_by(|a, b| a.key() == b.key())
            .filter(|class| class.len() > 1)
        {
            let (Ok(number), Ok(start)) = (
                u32::try_from(self.classes.len()),
                u32::try_from(self.members.len()),
            ) else {
                return;
            };
            self.classes.push((class[0].key(), start));
            for page in class.iter().map(Found::page) {
                self.members.push(page);
                if let Some(place) = place_of(&mut self.class_of, page) {
                    *place = number;
                }
            }
        }
    }

    /// The class of a page, if it shared its frame at the last refresh and still did when it was
    /// last rechecked.
    #[must_use]
    pub fn class_of(&self, page: FramePage) -> Option<ClassNo> {
        let blocks = self.class_of.get(usize::from(page.vm))?;
        let pages = blocks.get(usize::from(page.block.0))?;
        let class = *pages.get(page.page.0 as usize)?;
        (class != NO_CLASS).then_some(ClassNo(class))
    }

    /// The pages of a class as of the last refresh, two or more, in the order of VMs, blocks and
    /// pages. Some may have left it since: [`SharedFrames::class_of`].
    #[must_use]
    pub fn pages_of(&self, class: ClassNo) -> &[FramePage] {
        let at = class.0 as usize;
        let Some((_, start)) = self.classes.get(at) else {
            return &[];
        };
        let end = self.classes.get(at + 1).map(|(_, end)| *end as usize);
        let end = end.unwrap_or(self.members.len());
        self.members.get(*start as usize..end).unwrap_or_default()
    }

    /// The file whose page the pages of a class map, by number, and that page. None if their frame
    /// was merged.
    #[must_use]
    pub fn file_page(&self, class: ClassNo) -> Option<(u16, u64)> {
        let (key, _) = self.classes.get(class.0 as usize)?;
        let file = u16::try_from((key & !FILE_KEY) >> FILE_PAGE_BITS).ok()?;
        (key & FILE_KEY != 0).then_some((file, key & ((1 << FILE_PAGE_BITS) - 1)))
    }

    /// The pages of a VM that share their frame, in the order of blocks and pages.
    pub fn shared_of(&self, vm: u16) -> impl Iterator<Item = (BlockIndex, PageNo, ClassNo)> {
        let blocks = self.class_of.get(usize::from(vm)).into_iter().flatten();
        (0..).zip(blocks).flat_map(|(number, pages)| {
            let numbered = (0..).map(PageNo).zip(pages);
            let shared = numbered.filter(|(_, class)| **class != NO_CLASS);
            shared.map(move |(page, class)| (BlockIndex(number), page, ClassNo(*class)))
        })
    }

    /// All classes.
    pub fn classes(&self) -> impl Iterator<Item = (ClassNo, &[FramePage])> {
        let count = u32::try_from(self.classes.len()).unwrap_or(u32::MAX);
        (0..count).map(|class| (ClassNo(class), self.pages_of(ClassNo(class))))
    }

    /// Looks at the page table again for a few pages, as they are about to be sent: those that do
    /// not share the same frame any more leave their class. Returns how many left.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn recheck(&mut self, vm: u16, block: BlockIndex, run: PageRun) -> io::Result<u32> {
        let missing = || io::Error::from(io::ErrorKind::InvalidInput);
        let memory = self.vms.get(usize::from(vm)).ok_or_else(missing)?;
        let place = memory
            .blocks
            .get(usize::from(block.0))
            .ok_or_else(missing)?;
        if run.end().is_none_or(|end| end > place.pages) {
            return Err(missing());
        }
        let start = place.addr.of_page(run.start).ok_or_else(missing)?;
        let mut entries = vec![PagemapEntry::default(); run.count as usize];
        Pagemap::open(memory.pid)?.read(start, &mut entries)?;
        let areas = areas_of(memory, &mut self.files)?;
        let mut keys = Keys::new(&areas, self.zero_frame);
        let mut left = 0;
        for (entry, page) in entries.iter().zip(run.pages()) {
            let at = place.addr.of_page(page).ok_or_else(missing)?;
            let key = keys.of(at, *entry);
            let Some(class) = place_of(&mut self.class_of, FramePage { vm, block, page }) else {
                continue;
            };
            let known = self
                .classes
                .get(*class as usize)
                .map_or(NONE, |(key, _)| *key);
            if *class != NO_CLASS && key != known {
                *class = NO_CLASS;
                left += 1;
            }
        }
        Ok(left)
    }
}

fn place_of(classes: &mut [Vec<Vec<u32>>], page: FramePage) -> Option<&mut u32> {
    let blocks = classes.get_mut(usize::from(page.vm))?;
    let pages = blocks.get_mut(usize::from(page.block.0))?;
    pages.get_mut(page.page.0 as usize)
}

/// A mapping of a file in a VM's memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Area {
    start: u64,
    end: u64,
    /// Key of its first page; `NONE` for one whose pages are not looked at: shared mappings, into
    /// which a VM writes for others to see.
    key: u64,
}

/// The file mappings of a VM's memory, in order.
fn areas_of(memory: &VmMemory, files: &mut HashMap<(String, u64), u64>) -> io::Result<Vec<Area>> {
    let maps = fs::read_to_string(format!("/proc/{}/maps", memory.pid))?;
    let inside = |start: u64, end: u64| {
        memory.blocks.iter().any(|block| {
            let len = u64::from(block.pages) * PAGE_SIZE as u64;
            start < block.addr.0.saturating_add(len) && block.addr.0 < end
        })
    };
    let mut areas = Vec::new();
    for line in maps.lines() {
        if let Some(area) = file_area(line)
            && inside(area.start, area.end)
        {
            let key = file_key(files, &area);
            let (start, end) = (area.start, area.end);
            areas.push(Area { start, end, key });
        }
    }
    Ok(areas)
}

fn file_key(files: &mut HashMap<(String, u64), u64>, area: &FileArea<'_>) -> u64 {
    if !area.private {
        return NONE;
    }
    let count = files.len();
    let name = (area.device.to_owned(), area.inode);
    let number = match files.get(&name) {
        Some(number) => *number,
        None if count >= FILES_MAX => return NONE,
        None => {
            files.insert(name, count as u64);
            count as u64
        }
    };
    FILE_KEY | number << FILE_PAGE_BITS | area.page & ((1 << FILE_PAGE_BITS) - 1)
}

/// What a line of `/proc/PID/maps` says about memory of a file, or shared memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct FileArea<'a> {
    start: u64,
    end: u64,
    private: bool,
    device: &'a str,
    inode: u64,
    /// First page in the file.
    page: u64,
}

/// `None` for plain memory, and for a line that is not understood.
fn file_area(line: &str) -> Option<FileArea<'_>> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let private = words.next()?.ends_with('p');
    let offset = u64::from_str_radix(words.next()?, 16).ok()?;
    let device = words.next()?;
    let inode: u64 = words.next()?.parse().ok()?;
    let area = FileArea {
        start: u64::from_str_radix(start, 16).ok()?,
        end: u64::from_str_radix(end, 16).ok()?,
        private,
        device,
        inode,
        page: offset / PAGE_SIZE as u64,
    };
    (!private || inode != 0).then_some(area)
}

/// Gives pages in ascending order their keys.
struct Keys<'a> {
    areas: &'a [Area],
    zero_frame: Option<u64>,
}

impl<'a> Keys<'a> {
    fn new(areas: &'a [Area], zero_frame: Option<u64>) -> Self {
        Self { areas, zero_frame }
    }

    /// What the page at `at` shares with others that have the same key, or `NONE`.
    fn of(&mut self, at: HostAddr, entry: PagemapEntry) -> u64 {
        while let Some((_, rest)) = self
            .areas
            .split_first()
            .filter(|(area, _)| area.end <= at.0)
        {
            self.areas = rest;
        }
        let area = self.areas.first().filter(|area| area.start <= at.0);
        match area {
            Some(area) if area.key == NONE => NONE,
            // Written pages of a file mapping are plain memory, which KSM may have merged.
            // Their frame, while the kernel moves it, shows as one of a file in swap.
            Some(area) if entry.file_or_shared() || !(entry.present() || entry.swapped()) => {
                area.key + (at.0 - area.start) / PAGE_SIZE as u64
            }
            // Shown as of a file in plain memory: huge pages of zeros.
            None if entry.file_or_shared() => NONE,
            _ if entry.exclusive() => NONE,
            _ => entry
                .pfn()
                .filter(|&frame| Some(frame) != self.zero_frame)
                .unwrap_or(NONE),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn lines_of_the_kernels_list_are_read() {
        let pool = "7f00-7f10 rw-p 00003000 00:01 77   /memfd:gangway-pool (deleted)";
        let area = FileArea {
            start: 0x7f00,
            end: 0x7f10,
            private: true,
            device: "00:01",
            inode: 77,
            page: 3,
        };
        assert_eq!(file_area(pool), Some(area));
        let shared = "7f00-7f10 rw-s 00003000 00:01 77   /memfd:ram (deleted)";
        let private = false;
        assert_eq!(file_area(shared), Some(FileArea { private, ..area }));
        assert_eq!(file_area("7f00-7f10 rw-p 00000000 00:00 0 [heap]"), None);
        assert_eq!(file_area("7f00-zz rw-p 0 00:00 1"), None);
        assert_eq!(file_area(""), None);
    }

    #[test]
    fn a_page_is_known_by_its_file_until_it_is_written() {
        let areas = [
            Area {
                start: 0x2000,
                end: 0x4000,
                key: FILE_KEY | 5,
            },
            Area {
                start: 0x4000,
                end: 0x5000,
                key: NONE,
            },
        ];
        let key = |at, entry| Keys::new(&areas, Some(1)).of(HostAddr(at), PagemapEntry(entry));
        let (present, swapped, file, exclusive) = (1 << 63, 1 << 62, 1 << 61, 1 << 56);
        assert_eq!(key(0x3000, 0), FILE_KEY | 6);
        assert_eq!(key(0x3000, present | file | 9), FILE_KEY | 6);
        assert_eq!(key(0x3000, swapped), NONE);
        assert_eq!(key(0x3000, swapped | file), FILE_KEY | 6, "being moved");
        assert_eq!(key(0x3000, present | exclusive | 9), NONE);
        assert_eq!(key(0x3000, present | 9), 9);
        assert_eq!(key(0x4000, present | file | 9), NONE);
        assert_eq!(key(0x1000, present | 9), 9);
        assert_eq!(key(0x1000, present | 1), NONE, "the frame of zeros");
        assert_eq!(
            key(0x1000, present | file | 9),
            NONE,
            "a huge page of zeros"
        );
        assert_eq!(key(0x1000, 0), NONE);
    }

    #[test]
    fn eight_vms_of_256_mib_are_joined_in_a_moment() {
        const PAGES: u32 = 65_536;
        let blocks = vec![MemoryBlock {
            addr: HostAddr(0),
            pages: PAGES,
        }];
        let vms = vec![VmMemory { pid: 1, blocks }; 8];
        let mut frames = SharedFrames::new(vms);
        frames.class_of = vec![vec![vec![NO_CLASS; PAGES as usize]]; 8];
        let mut found = Vec::new();
        for vm in 0..8_u16 {
            for page in 0..PAGES {
                let key = u64::from(page.wrapping_mul(2_654_435_761)) + 1;
                let block = BlockIndex(0);
                let page = PageNo(page);
                found.push(Found::new(key, FramePage { vm, block, page }));
            }
        }
        let quickest = (0..5).map(|_| {
            let mut unsorted = found.clone();
            let start = Instant::now();
            unsorted.sort_unstable();
            frames.join(&unsorted);
            start.elapsed()
        });
        println!(
            "{:?} to join {} pages",
            quickest.min().unwrap(),
            found.len()
        );
        assert_eq!(frames.classes().count(), PAGES as usize);
        let any = FramePage {
            vm: 3,
            block: BlockIndex(0),
            page: PageNo(777),
        };
        let pages = frames.pages_of(frames.class_of(any).unwrap());
        assert!(pages.len() == 8 && pages.iter().all(|page| page.page == any.page));
    }
}
