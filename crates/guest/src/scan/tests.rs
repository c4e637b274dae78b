use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;

use page::ContentId;
use proptest::prelude::*;

use super::*;

const BASE: u64 = 1 << 30;
const PAGE: u64 = PAGE_SIZE as u64;

/// A process in memory: pages with frames, some of them shared.
#[derive(Default)]
struct Fake {
    pages: BTreeMap<u64, (u64, Vec<u8>)>,
    shared: std::collections::BTreeSet<u64>,
    reads: Cell<u64>,
}

impl Fake {
    fn page_of(&self, addr: HostAddr) -> Option<&(u64, Vec<u8>)> {
        self.pages.get(&((addr.0 - BASE) / PAGE))
    }

    fn set(&mut self, page: u64, frame: u64, bytes: Vec<u8>) {
        self.pages.insert(page, (frame, bytes));
    }

    fn write(&mut self, page: u64, offset: usize, byte: u8) {
        self.pages.get_mut(&page).unwrap().1[offset] = byte;
    }
}

impl VmMemory for Fake {
    fn page_table(&self, start: HostAddr, out: &mut [PagemapEntry]) -> io::Result<()> {
        for (at, entry) in out.iter_mut().enumerate() {
            let found = self.page_of(address(start, at));
            *entry = PagemapEntry(found.map_or(0, |(frame, _)| {
                1 << 63 | u64::from(!self.shared.contains(frame)) << 56 | frame
            }));
        }
        Ok(())
    }

    fn pages(&self, addrs: &[HostAddr], out: &mut [u8]) -> io::Result<usize> {
        let shared = |addr| self.shared.contains(&self.page_of(addr).unwrap().0);
        assert!(
            addrs.iter().all(|&addr| !shared(addr)),
            "it would be copied"
        );
        self.shared_pages(addrs, out)
    }

    fn shared_pages(&self, addrs: &[HostAddr], out: &mut [u8]) -> io::Result<usize> {
        for (addr, page) in addrs.iter().zip(out.chunks_mut(PAGE_SIZE)) {
            let (_, bytes) = self
                .page_of(*addr)
                .expect("an untouched page is left alone");
            page.copy_from_slice(bytes);
        }
        self.reads.set(self.reads.get() + addrs.len() as u64);
        Ok(addrs.len())
    }

    fn samples(&self, addrs: &[HostAddr], piece: usize, out: &mut [u8]) -> io::Result<usize> {
        for (addr, line) in addrs.iter().zip(out.chunks_mut(piece)) {
            let from = usize::try_from(addr.0 % PAGE).unwrap();
            line.copy_from_slice(&self.page_of(*addr).unwrap().1[from..from + piece]);
        }
        Ok(addrs.len())
    }
}

fn key() -> ContentKey {
    ContentKey::new([5; 32])
}

fn content(seed: u8) -> Vec<u8> {
    let mut page = vec![seed; PAGE_SIZE];
    page[100] = !seed;
    page
}

fn id(bytes: &[u8]) -> ContentId {
    key().id_of(bytes.try_into().unwrap())
}

fn scan_all(scan: &mut Scan, vms: &[(&str, &Fake)], pages: u32) -> Effort {
    let (cancelled, progress) = (AtomicBool::new(false), ScanProgress::default());
    let bounds = Bounds {
        cpu_percent: 100,
        read_bytes_per_s: u64::MAX,
    };
    let mut pace = Pace::new(bounds, &cancelled, &progress);
    let region = Region {
        start: HostAddr(BASE),
        pages,
    };
    let mut effort = Effort::default();
    scan.begin();
    for (name, vm) in vms {
        effort.add(scan.scan_vm((name, 7), *vm, &[region], &mut pace).unwrap());
    }
    scan.end();
    assert_eq!(progress.pages(), u64::from(pages) * vms.len() as u64);
    effort
}

#[test]
fn pages_are_told_apart_and_untouched_ones_are_not_brought_into_being() {
    let mut vm = Fake::default();
    vm.set(1, 11, vec![0; PAGE_SIZE]);
    vm.set(2, 12, vec![9; PAGE_SIZE]);
    vm.set(3, 13, content(1));
    vm.set(1500, 14, content(1));
    vm.set(1501, 15, content(2));
    let mut scan = Scan::new(key());
    let effort = scan_all(&mut scan, &[("vm", &vm)], 2000);
    let expected = Tally {
        total: 2000,
        untouched: 1995,
        zero: 1,
        fill: 1,
        content: 3,
        distinct: 2,
        unknown: 0,
    };
    assert_eq!(scan.tally(|_| true), expected);
    assert_eq!(effort.read, 5);
    let distinct = scan.distinct(|_| true);
    let ids: Vec<_> = distinct
        .iter()
        .map(|one| (scan.contents().id(one.no).unwrap(), one.pages))
        .collect();
    assert_eq!(ids, [(id(&content(1)), 2), (id(&content(2)), 1)]);
    assert_eq!(distinct[1].addr, HostAddr(BASE + 1501 * PAGE));
    assert_eq!(scan.contents().pages(distinct[0].no), 2);
}

#[test]
fn a_frame_that_several_vms_map_is_read_once() {
    let (mut one, mut other) = (Fake::default(), Fake::default());
    for page in 0..100 {
        one.set(
            page,
            500 + page % 10,
            content(u8::try_from(page % 10).unwrap()),
        );
        other.set(
            page,
            500 + page % 10,
            content(u8::try_from(page % 10).unwrap()),
        );
    }
    let shared: std::collections::BTreeSet<_> = (500..510).collect();
    (one.shared, other.shared) = (shared.clone(), shared);
    let mut scan = Scan::new(key());
    let vms = [("one", &one), ("other", &other)];
    let effort = scan_all(&mut scan, &vms, 100);
    assert_eq!((effort.read, effort.joined), (10, 190));
    assert_eq!(one.reads.get() + other.reads.get(), 10);
    let tally = scan.tally(|_| true);
    assert_eq!((tally.content, tally.distinct), (200, 10));
    // Again: a frame that is copied before it is written needs no look at all.
    assert_eq!(scan_all(&mut scan, &vms, 100), Effort::default());
    assert_eq!(scan.tally(|_| true), tally);
}

#[test]
fn a_page_that_was_joined_is_read_when_its_frame_becomes_its_own() {
    let mut vm = Fake::default();
    vm.set(0, 50, content(1));
    vm.set(1, 50, content(1));
    vm.shared.insert(50);
    let mut scan = Scan::new(key());
    scan_all(&mut scan, &[("vm", &vm)], 2);
    // The other page went away, and this one was written in place: no copy, the same frame.
    vm.pages.remove(&0);
    vm.shared.clear();
    vm.write(1, 3000, 77);
    let effort = scan_all(&mut scan, &[("vm", &vm)], 2);
    assert_eq!(effort.read, 1);
    let found = scan.distinct(|_| true);
    assert_eq!(scan.contents().id(found[0].no), Some(id(&vm.pages[&1].1)));
}

#[test]
fn another_process_of_the_same_name_is_read_from_scratch() {
    let mut vm = Fake::default();
    vm.set(0, 50, content(1));
    let mut scan = Scan::new(key());
    scan_all(&mut scan, &[("vm", &vm)], 1);
    let (cancelled, progress) = (AtomicBool::new(false), ScanProgress::default());
    let mut pace = Pace::new(Bounds::default(), &cancelled, &progress);
    let region = Region {
        start: HostAddr(BASE),
        pages: 1,
    };
    let effort = scan.scan_vm(("vm", 8), &vm, &[region], &mut pace).unwrap();
    assert_eq!((effort.read, effort.sampled), (1, 0));
}

#[test]
fn a_cancelled_scan_ends_and_knows_nothing_of_its_vm() {
    let mut vm = Fake::default();
    vm.set(0, 50, content(1));
    let (cancelled, progress) = (AtomicBool::new(true), ScanProgress::default());
    let mut pace = Pace::new(Bounds::default(), &cancelled, &progress);
    let region = Region {
        start: HostAddr(BASE),
        pages: 1,
    };
    let mut scan = Scan::new(key());
    let ended = scan.scan_vm(("vm", 7), &vm, &[region], &mut pace);
    assert!(matches!(ended, Err(ScanError::Cancelled)));
    assert_eq!(scan.tally(|_| true).total, 0);
}

#[test]
fn a_change_that_a_scan_passes_over_is_found_when_its_page_has_its_turn() {
    let mut vm = Fake::default();
    for page in 0..64 {
        vm.set(page, 100 + page, content(1));
    }
    let mut scan = Scan::new(key());
    let first = scan_all(&mut scan, &[("vm", &vm)], 64);
    assert_eq!((first.read, first.sampled), (64, 0));
    let line = |page: u64| sample_offset(HostAddr(BASE + page * PAGE));
    vm.write(5, line(5), 99);
    vm.write(60, line(60), 99);
    let mut found = 0;
    for _ in 0..SAMPLE_EVERY {
        let effort = scan_all(&mut scan, &[("vm", &vm)], 64);
        assert!(effort.sampled <= 8 + 2 * 28, "{effort:?}");
        found += effort.read;
    }
    assert_eq!(found, 2);
}

#[test]
fn a_cluster_of_changes_is_found_at_once() {
    let mut vm = Fake::default();
    for page in 0..64 {
        vm.set(page, 100 + page, content(1));
    }
    let mut scan = Scan::new(key());
    scan_all(&mut scan, &[("vm", &vm)], 64);
    for page in 32..48 {
        vm.write(page, sample_offset(HostAddr(BASE + page * PAGE)), 99);
    }
    let effort = scan_all(&mut scan, &[("vm", &vm)], 64);
    assert_eq!((effort.read, effort.sampled), (16, 8 + 28));
}

/// What may happen to a page between two scans.
#[derive(Clone, Debug)]
enum Change {
    /// Written in the line that is looked at.
    Sampled(u64, u8),
    /// Replaced: other bytes in another frame.
    Moved(u64, u8),
    Gone(u64),
    Merged(u64, u64),
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let page = || 0..40_u64;
    let one = prop_oneof![
        (page(), any::<u8>()).prop_map(|(page, byte)| Change::Sampled(page, byte)),
        (page(), 0..6_u8).prop_map(|(page, seed)| Change::Moved(page, seed)),
        page().prop_map(Change::Gone),
        (page(), page()).prop_map(|(page, other)| Change::Merged(page, other)),
    ];
    prop::collection::vec(one, 0..30)
}

impl Fake {
    fn apply(&mut self, change: &Change, fresh: &mut u64) {
        *fresh += 1;
        match *change {
            Change::Sampled(page, byte) => {
                let offset = sample_offset(HostAddr(BASE + page * PAGE));
                let Some((frame, bytes)) = self.pages.get_mut(&page) else {
                    return;
                };
                bytes[offset + 1] = byte;
                // Copy on write.
                if self.shared.contains(frame) {
                    *frame = *fresh;
                }
            }
            Change::Moved(page, seed) => self.set(page, *fresh, content(seed)),
            Change::Gone(page) => drop(self.pages.remove(&page)),
            Change::Merged(page, other) => {
                let Some((frame, bytes)) = self.pages.get(&other).cloned() else {
                    return;
                };
                self.shared.insert(frame);
                self.set(page, frame, bytes);
            }
        }
    }
}

proptest! {
    #[test]
    fn a_repeated_scan_finds_what_a_scan_from_scratch_finds(rounds in prop::collection::vec(changes(), 1..6)) {
        let mut vm = Fake::default();
        let mut fresh = 100;
        for page in 0..30 {
            vm.apply(&Change::Moved(page, u8::try_from(page % 7).unwrap()), &mut fresh);
        }
        let mut scan = Scan::new(key()).sampling_every(1);
        for round in rounds {
            for change in &round {
                vm.apply(change, &mut fresh);
            }
            scan_all(&mut scan, &[("vm", &vm)], 40);
            let mut scratch = Scan::new(key());
            scan_all(&mut scratch, &[("vm", &vm)], 40);
            prop_assert_eq!(scan.tally(|_| true), scratch.tally(|_| true));
            let ids = |scan: &Scan| {
                let found = scan.distinct(|_| true);
                let with_id = |one: Distinct| (scan.contents().id(one.no), one.pages, one.addr);
                found.into_iter().map(with_id).collect::<Vec<_>>()
            };
            prop_assert_eq!(ids(&scan), ids(&scratch));
        }
    }
}
