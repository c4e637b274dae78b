//! Hashing the memory of VMs from outside QEMU (the preparation phase of IRLM, section 2.4).
//!
//! A [`Scan`] looks at the VMs of one trust domain on this host. It finds what each page holds:
//! nothing (never touched), one byte all over, or a content with an id. Pages that were never
//! touched are left alone; a physical frame that several pages map (KSM, fork, template) is read
//! once.
//!
//! **Again, and cheaply.** No tracker of writes works on another process. So each page's frame is
//! remembered with a checksum of one cache line of it; the same frame with the same line counts
//! as unchanged. A frame mapped more than once is copied before it is written, so it needs no
//! look at all. Even so, looking costs a quarter of reading: of the other pages one in
//! `SAMPLE_EVERY` is looked at, another one each time; if one has changed, so are the rest of
//! its `GROUP_PAGES`, because guests write in clusters.
//!
//! What this misses: a write into a page's other 63 lines, for ever (until a scan from scratch);
//! and a write into a few pages of a group, until their turn comes. Such a page keeps its old id.
//! That costs bytes, never content: the migration hashes what the stream holds, and a stale id
//! merely matches nothing.
//!
//! Goals: no page of the guest is brought into being, and none that is shared gets a copy; memory is bounded (16 bytes a page of guest
//! memory, at most [`CONTENT_BYTES_MAX`] a distinct content); the thread that scans stays within
//! [`Bounds`]. Non-goals: an exact picture of a running guest, and knowing what a duplicate is
//! good for.
//!
//! Limit: memory shared with other processes (`share=on`) that QEMU itself never touched looks
//! untouched here.

mod contents;
mod pace;
mod page_state;
mod process;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use hashbrown::{HashMap, HashSet};
use page::{ContentKey, HostAddr, PAGE_SIZE, PageBytes, PageNo};
use sys::PagemapEntry;

pub use contents::{CONTENT_BYTES_MAX, ContentNo, Contents};
pub use pace::{Bounds, Pace, ScanProgress};
pub use page_state::PageKind;
pub use process::{Examined, QemuMemory};

use page_state::{PageState, SAMPLE_BYTES, Step, copied_before_writing, sample_offset, sample_sum};

/// Pages looked at in one step: the buffer of 4 MiB stays in the last cache of most processors,
/// and one system call takes as many samples.
const STEP_PAGES: usize = 1024;

/// One page in so many is looked at in a repeated scan, if its frame is the same: a repeated scan
/// of idle guests then takes a twentieth of the first, where all pages would take a quarter.
const SAMPLE_EVERY: u32 = 8;

/// Pages that are all looked at once one of them has changed: 128 KiB.
const GROUP_PAGES: u64 = 32;

/// Why a VM's memory could not be scanned to its end.
#[derive(Debug, thiserror::Error)]
pub enum ScanError {
    /// It was told to end.
    #[error("the scan was cancelled")]
    Cancelled,
    /// Page table or memory cannot be read.
    #[error("cannot read the memory of QEMU")]
    Read(#[source] io::Error),
}

/// Memory of one VM as the scan reads it.
pub trait VmMemory {
    /// The page table's entries from `start` on.
    ///
    /// # Errors
    /// What keeps it from being read.
    fn page_table(&self, start: HostAddr, out: &mut [PagemapEntry]) -> io::Result<()>;

    /// The pages at these addresses; returns how many leading ones could be read.
    ///
    /// # Errors
    /// As above.
    fn pages(&self, addrs: &[HostAddr], out: &mut [u8]) -> io::Result<usize>;

    /// The same of pages that several processes share, which must stay shared.
    ///
    /// # Errors
    /// As above.
    fn shared_pages(&self, addrs: &[HostAddr], out: &mut [u8]) -> io::Result<usize>;

    /// `piece` bytes at each of these addresses; returns how many leading ones could be read.
    ///
    /// # Errors
    /// As above.
    fn samples(&self, addrs: &[HostAddr], piece: usize, out: &mut [u8]) -> io::Result<usize>;
}

/// One contiguous piece of a VM's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Where it begins in QEMU's memory, page aligned.
    pub start: HostAddr,
    /// Its length.
    pub pages: u32,
}

/// What was done in a scan of one VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Effort {
    /// Pages whose bytes were read.
    pub read: u64,
    /// Pages of which a sample was read.
    pub sampled: u64,
    /// Pages known from another page of the same frame.
    pub joined: u64,
}

/// Pages of one or several VMs by what they hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// All.
    pub total: u64,
    /// Never touched: zero without a frame.
    pub untouched: u64,
    /// Touched, and zero.
    pub zero: u64,
    /// Another byte all over.
    pub fill: u64,
    /// With a content.
    pub content: u64,
    /// Different contents among those.
    pub distinct: u64,
    /// Could not be read.
    pub unknown: u64,
}

/// One VM, as the last scan found it.
struct Vm {
    name: String,
    process: u64,
    regions: Vec<Region>,
    pages: Vec<PageState>,
}

/// The VMs of one trust domain on this host.
pub struct Scan {
    key: ContentKey,
    contents: Arc<Contents>,
    /// Changes when contents get other numbers.
    generation: u64,
    vms: Vec<Vm>,
    /// What the frames hold that are mapped more than once, as far as this scan has read them;
    /// `None` while it is about to.
    frames: HashMap<u64, Option<PageKind>>,
    /// Scans begun; chooses the pages that are looked at.
    round: u64,
    sample_every: u32,
}

impl Scan {
    /// Nothing scanned yet; ids are made with `key`.
    #[must_use]
    pub fn new(key: ContentKey) -> Self {
        Self {
            key,
            contents: Arc::default(),
            generation: 0,
            vms: Vec::new(),
            frames: HashMap::new(),
            round: 0,
            sample_every: SAMPLE_EVERY,
        }
    }

    /// The same, looking at one page in `n` when its frame is the same; at all with 1.
    #[must_use]
    pub fn sampling_every(mut self, n: u32) -> Self {
        self.sample_every = n.max(1);
        self
    }

    /// Begins a scan of all VMs: what frames hold is asked again, what pages hold is remembered.
    pub fn begin(&mut self) {
        self.frames.clear();
        self.round += 1;
        if self.contents.mostly_unused() {
            self.contents = Arc::default();
            self.generation += 1;
            self.vms.clear();
        }
    }

    /// Ends a scan: counts the pages of each content.
    pub fn end(&mut self) {
        self.frames = HashMap::new();
        // A copy, if somebody still holds those of the scan before.
        let contents = Arc::make_mut(&mut self.contents);
        contents.clear_counts();
        for state in self.vms.iter().flat_map(|vm| &vm.pages) {
            if let PageKind::Content(no) = state.kind() {
                contents.count(no);
            }
        }
    }

    /// Scans one VM, `name`, whose QEMU is `process` (a number that no other process ever has
    /// had). Its results replace those of before.
    ///
    /// # Errors
    /// If cancelled or the process has gone; what was known of the VM is forgotten then.
    pub fn scan_vm(
        &mut self,
        who: (&str, u64),
        memory: &dyn VmMemory,
        regions: &[Region],
        pace: &mut Pace<'_>,
    ) -> Result<Effort, ScanError> {
        let (name, process) = who;
        let known = self.vms.iter().position(|vm| vm.name == name);
        let mut vm = match known.map(|at| self.vms.remove(at)) {
            Some(vm) if vm.process == process && vm.regions == regions => vm,
            _ => Vm::new(name, process, regions),
        };
        let mut effort = Effort::default();
        let mut base = 0;
        for region in regions {
            let end = base + region.pages as usize;
            let mut start = region.start;
            for states in vm.pages[base..end].chunks_mut(STEP_PAGES) {
                let done = self.step(memory, start, states)?;
                effort.add(done);
                pace.after(states.len() as u64, done)?;
                start = HostAddr(start.0 + (states.len() * PAGE_SIZE) as u64);
            }
            base = end;
        }
        let at = known.unwrap_or(self.vms.len()).min(self.vms.len());
        self.vms.insert(at, vm);
        Ok(effort)
    }

    /// Forgets all VMs but these.
    pub fn retain(&mut self, names: &[&str]) {
        self.vms.retain(|vm| names.contains(&vm.name.as_str()));
    }

    /// Looks at the pages from `start` on.
    fn step(
        &mut self,
        memory: &dyn VmMemory,
        start: HostAddr,
        states: &mut [PageState],
    ) -> Result<Effort, ScanError> {
        let mut table = vec![PagemapEntry::default(); states.len()];
        memory
            .page_table(start, &mut table)
            .map_err(ScanError::Read)?;
        let (mut reads, mut joins) = (Vec::new(), Vec::new());
        let (mut samples, mut spared) = (Vec::new(), Vec::new());
        let mut effort = Effort::default();
        for (at, (state, entry)) in states.iter_mut().zip(&table).enumerate() {
            match state.next(*entry) {
                Step::Done => {}
                Step::Verify => samples.push(at),
                Step::Sample if self.has_its_turn(address(start, at)) => samples.push(at),
                Step::Sample => spared.push(at),
                Step::Read => reads.push(at),
                Step::ReadFrame(frame) => match self.frames.get(&frame) {
                    Some(Some(kind)) => {
                        state.joined(frame, *kind);
                        effort.joined += 1;
                    }
                    Some(None) => joins.push((at, frame)),
                    None => {
                        self.frames.insert(frame, None);
                        reads.push(at);
                    }
                },
            }
        }
        let mut stale = changed(memory, start, states, &samples)?;
        if !stale.is_empty() {
            let group = |&at: &usize| address(start, at).0 / PAGE_SIZE as u64 / GROUP_PAGES;
            let groups: HashSet<_> = stale.iter().map(group).collect();
            spared.retain(|at| groups.contains(&group(at)));
            stale.extend(changed(memory, start, states, &spared)?);
            effort.sampled = spared.len() as u64;
        }
        effort.sampled += samples.len() as u64;
        reads.extend(stale);
        reads.sort_unstable();
        let (shared, own): (Vec<_>, Vec<_>) = reads
            .into_iter()
            .partition(|&at| copied_before_writing(table[at]));
        let mut batch = Batch {
            start,
            table: &table,
            states: &mut *states,
        };
        let read_shared = |addrs: &[HostAddr], out: &mut [u8]| memory.shared_pages(addrs, out);
        effort.read = self.read(read_shared, &shared, &mut batch)?;
        let read_own = |addrs: &[HostAddr], out: &mut [u8]| memory.pages(addrs, out);
        effort.read += self.read(read_own, &own, &mut batch)?;
        for (at, frame) in joins {
            // A page that could not be read leaves its frame unknown to the others, too.
            let kind = self.frames.get(&frame).copied().flatten();
            states[at].joined(frame, kind.unwrap_or(PageKind::Unknown));
            effort.joined += 1;
        }
        Ok(effort)
    }

    /// Whether the page at `addr` is looked at in this scan although its frame is the same.
    fn has_its_turn(&self, addr: HostAddr) -> bool {
        let number = addr.0 / PAGE_SIZE as u64;
        number
            .wrapping_add(self.round)
            .is_multiple_of(u64::from(self.sample_every))
    }

    /// Reads and classifies the pages `reads`; returns how many could be read.
    fn read(
        &mut self,
        from: impl Fn(&[HostAddr], &mut [u8]) -> io::Result<usize>,
        reads: &[usize],
        batch: &mut Batch<'_>,
    ) -> Result<u64, ScanError> {
        let Batch {
            start,
            table,
            states,
        } = batch;
        let start = *start;
        let addrs: Vec<_> = reads.iter().map(|&at| address(start, at)).collect();
        let mut bytes = vec![0; addrs.len() * PAGE_SIZE];
        let mut done = 0;
        let mut readable = 0;
        while done < addrs.len() {
            let room = &mut bytes[done * PAGE_SIZE..];
            let count = from(&addrs[done..], room).map_err(ScanError::Read)?;
            let (pages, _) = room[..count * PAGE_SIZE].as_chunks::<PAGE_SIZE>();
            for (&at, page) in reads[done..].iter().zip(pages) {
                let kind = self.classify(page);
                states[at].found(table[at], kind, sample_of(address(start, at), page));
                if let Some(known) = table[at].pfn().and_then(|pfn| self.frames.get_mut(&pfn)) {
                    *known = Some(kind);
                }
            }
            readable += count as u64;
            done += count;
            if let Some(&hole) = reads.get(done) {
                states[hole].found(table[hole], PageKind::Unknown, 0);
                done += 1;
            }
        }
        Ok(readable)
    }

    fn classify(&mut self, page: &PageBytes) -> PageKind {
        match page::fill_byte(page) {
            Some(0) => PageKind::Zero,
            Some(byte) => PageKind::Fill(byte),
            None => Arc::make_mut(&mut self.contents).enter(self.key.id_of(page)),
        }
    }

    /// The contents found. Their numbers stay the same as long as [`Self::generation`] does.
    #[must_use]
    pub fn contents(&self) -> &Arc<Contents> {
        &self.contents
    }

    /// Changes when contents get other numbers; only [`Self::begin`] does that.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Names of the VMs scanned, in scan order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.vms.iter().map(|vm| vm.name.as_str())
    }

    /// What each page of a VM holds, in the order of its regions, which are numbered; nothing if it was
    /// not scanned.
    pub fn pages_of(&self, name: &str) -> impl Iterator<Item = (u16, PageNo, PageKind)> {
        let vm = self.vms.iter().find(|vm| vm.name == name);
        let regions = vm.into_iter().flat_map(|vm| (0..).zip(&vm.regions));
        let places = regions
            .flat_map(|(number, region)| (0..region.pages).map(move |page| (number, PageNo(page))));
        let states = vm.into_iter().flat_map(|vm| &vm.pages);
        places
            .zip(states)
            .map(|((region, page), state)| (region, page, state.kind()))
    }

    /// Pages of those of the scanned VMs that `which` names, by kind.
    #[must_use]
    pub fn tally(&self, which: impl Fn(&str) -> bool) -> Tally {
        let mut seen = vec![false; self.contents.len()];
        let mut tally = Tally::default();
        for vm in self.vms.iter().filter(|vm| which(&vm.name)) {
            for state in &vm.pages {
                tally.add(state.kind(), &mut seen);
            }
        }
        tally
    }

    /// The different contents of those VMs in scan order, each with its number of pages there
    /// and the address of the first.
    #[must_use]
    pub fn distinct(&self, which: impl Fn(&str) -> bool) -> Vec<Distinct> {
        let mut places = vec![u32::MAX; self.contents.len()];
        let mut found: Vec<Distinct> = Vec::new();
        for (vm_at, vm) in self.vms.iter().enumerate() {
            if !which(&vm.name) {
                continue;
            }
            for (addr, state) in vm.addresses().zip(&vm.pages) {
                let PageKind::Content(no) = state.kind() else {
                    continue;
                };
                let place = &mut places[no.0 as usize];
                if let Some(distinct) = found.get_mut(*place as usize) {
                    distinct.pages += 1;
                } else {
                    // As many as contents, whose numbers have 32 bits.
                    *place = u32::try_from(found.len()).unwrap_or(u32::MAX);
                    found.push(Distinct {
                        no,
                        pages: 1,
                        vm: vm_at,
                        addr,
                    });
                }
            }
        }
        found
    }
}

/// A content among several VMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Distinct {
    /// Which content.
    pub no: ContentNo,
    /// How many pages of those VMs have it.
    pub pages: u32,
    /// The VM of the first, by its place in [`Scan::names`].
    pub vm: usize,
    /// Where the first is in that VM's memory.
    pub addr: HostAddr,
}

impl Vm {
    fn new(name: &str, process: u64, regions: &[Region]) -> Self {
        let pages = regions.iter().map(|region| region.pages as usize).sum();
        Self {
            name: name.to_owned(),
            process,
            regions: regions.to_vec(),
            pages: vec![PageState::default(); pages],
        }
    }

    fn addresses(&self) -> impl Iterator<Item = HostAddr> + '_ {
        let of_region = |region: &Region| {
            let start = region.start;
            (0..region.pages).map(move |page| HostAddr(start.0 + PageNo(page).offset()))
        };
        self.regions.iter().flat_map(of_region)
    }
}

impl Effort {
    fn add(&mut self, other: Self) {
        self.read += other.read;
        self.sampled += other.sampled;
        self.joined += other.joined;
    }
}

impl Tally {
    fn add(&mut self, kind: PageKind, seen: &mut [bool]) {
        self.total += 1;
        match kind {
            PageKind::Untouched => self.untouched += 1,
            PageKind::Zero => self.zero += 1,
            PageKind::Fill(_) => self.fill += 1,
            PageKind::Unknown => self.unknown += 1,
            PageKind::Content(no) => {
                self.content += 1;
                let before = std::mem::replace(&mut seen[no.0 as usize], true);
                self.distinct += u64::from(!before);
            }
        }
    }
}

/// Pages looked at in one step.
struct Batch<'a> {
    start: HostAddr,
    table: &'a [PagemapEntry],
    states: &'a mut [PageState],
}

/// Those of `samples` whose line is not what it was.
fn changed(
    memory: &dyn VmMemory,
    start: HostAddr,
    states: &[PageState],
    samples: &[usize],
) -> Result<Vec<usize>, ScanError> {
    let addrs: Vec<_> = samples
        .iter()
        .map(|&at| {
            let page = address(start, at);
            HostAddr(page.0 + sample_offset(page) as u64)
        })
        .collect();
    let mut lines = vec![0; addrs.len() * SAMPLE_BYTES];
    let read = memory
        .samples(&addrs, SAMPLE_BYTES, &mut lines)
        .map_err(ScanError::Read)?;
    let (lines, _) = lines.as_chunks::<SAMPLE_BYTES>();
    let same =
        |place: usize, at: usize| place < read && states[at].sample() == sample_sum(&lines[place]);
    let changed = samples.iter().enumerate();
    Ok(changed
        .filter(|&(place, &at)| !same(place, at))
        .map(|(_, &at)| at)
        .collect())
}

fn sample_of(addr: HostAddr, page: &PageBytes) -> u32 {
    let from = sample_offset(addr);
    let (lines, _) = page[from..].as_chunks::<SAMPLE_BYTES>();
    lines.first().map_or(0, sample_sum)
}

/// The address of page `at`; the caller has read its page table entry, so it exists.
fn address(start: HostAddr, at: usize) -> HostAddr {
    HostAddr(start.0 + (at * PAGE_SIZE) as u64)
}
