//! The scan of real QEMUs' memory, against reading and hashing all of it.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use crate::common::{Qemu, Vm};
use guest::scan::{Bounds, Effort, Examined, Pace, Scan, ScanProgress, Tally};
use page::{ContentId, ContentKey, HostAddr, PAGE_SIZE};
use serde_json::Value;
use sys::ProcessMemory;

fn key() -> ContentKey {
    ContentKey::new([3; 32])
}

/// A stopped VM with 2000 pages of its own kind, half of them the same in every VM.
fn vm(qemu: &Qemu, own: u8) -> Vm {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("data");
    let page = |number: u16| {
        let mut page = vec![if number < 1000 { 1 } else { own }; PAGE_SIZE];
        page[..2].copy_from_slice(&(number / 2).to_le_bytes());
        page
    };
    std::fs::write(&file, (0..2000).flat_map(page).collect::<Vec<u8>>()).unwrap();
    let loader = format!("loader,file={},addr=0x1000000,force-raw=on", file.display());
    let vm = qemu.start(&["-device", &loader]);
    std::thread::sleep(Duration::from_millis(700));
    vm.attach().qmp().execute("stop", Value::Null).unwrap();
    vm
}

fn scan(scan: &mut Scan, vms: &[(&str, &Examined)]) -> Effort {
    let (cancelled, progress) = (AtomicBool::new(false), ScanProgress::default());
    let mut pace = Pace::new(Bounds::default(), &cancelled, &progress);
    let mut sum = Effort::default();
    scan.begin();
    for (name, vm) in vms {
        let who = (*name, vm.process);
        let effort = scan
            .scan_vm(who, &vm.memory, &vm.regions, &mut pace)
            .unwrap();
        sum.read += effort.read;
        sum.sampled += effort.sampled;
    }
    scan.end();
    sum
}

/// All pages of a VM, read one by one: each content's number of pages, and the other pages.
fn read_all(pid: u32, vm: &Examined, contents: &mut BTreeMap<ContentId, u32>) -> [u64; 2] {
    let (mut zero, mut fill) = (0, 0);
    let memory = ProcessMemory::open(pid).unwrap();
    for region in &vm.regions {
        for page in 0..region.pages {
            let addr = HostAddr(region.start.0 + u64::from(page) * PAGE_SIZE as u64);
            let mut bytes = [0; PAGE_SIZE];
            assert_eq!(memory.read_pages(&[addr], &mut bytes).unwrap(), 1);
            match page::fill_byte(&bytes) {
                Some(0) => zero += 1,
                Some(_) => fill += 1,
                None => *contents.entry(key().id_of(&bytes)).or_default() += 1,
            }
        }
    }
    [zero, fill]
}

fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    line.unwrap()
        .split_whitespace()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap()
}

#[test]
fn real_a_scan_finds_what_reading_all_memory_finds_and_again_reads_nothing() {
    let qemu = Qemu::current();
    let (one, other) = (vm(&qemu, 7), vm(&qemu, 8));
    let guests = [one.attach(), other.attach()];
    let examined = guests
        .each_ref()
        .map(|guest| guest.examine_memory().unwrap());
    let vms = [("one", &examined[0]), ("other", &examined[1])];
    let before = resident_kib(guests[0].pid());

    let mut found = Scan::new(key());
    let first = scan(&mut found, &vms);
    assert!(first.read > 4000 && first.sampled == 0, "{first:?}");
    let grown = resident_kib(guests[0].pid()) - before;
    assert!(grown < 64, "the scan brought {grown} KiB into being");
    let tally = found.tally(|_| true);
    let again = scan(&mut found, &vms);
    assert!(again.read < 20, "{again:?}");
    assert_eq!(found.tally(|_| true), tally);

    let mut contents = BTreeMap::new();
    let mut others = [0; 2];
    for (guest, vm) in guests.iter().zip(&examined) {
        let [zero, fill] = read_all(guest.pid(), vm, &mut contents);
        others = [others[0] + zero, others[1] + fill];
    }
    let pages: u32 = contents.values().sum();
    let expected = Tally {
        total: u64::from(pages) + others[0] + others[1],
        untouched: tally.untouched,
        zero: others[0] - tally.untouched,
        fill: others[1],
        content: u64::from(pages),
        distinct: contents.len() as u64,
        unknown: 0,
    };
    assert_eq!(tally, expected);
    let distinct = found.distinct(|_| true);
    assert_eq!(distinct.len(), contents.len());
    for one in distinct {
        let id = found.contents().id(one.no).unwrap();
        assert_eq!(contents.get(&id), Some(&one.pages));
        assert_eq!(found.contents().find(id), Some(one.no));
    }
    // Each VM's 500 pairs of common pages are among the 1500 contents that they brought.
    let of_one = found.tally(|name| name == "one");
    assert!(of_one.distinct >= 1000 && tally.distinct < 2 * of_one.distinct);
}
