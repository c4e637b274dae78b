//! Shared frames of real mappings and processes.
//!
//! Frame numbers are visible to root only.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use guest::{FramePage, MemoryBlock, SharedFrames, VmMemory};
use page::{BlockIndex, ByteLen, HostAddr, PAGE_SIZE, PageNo, PageRun};
use sys::{Mapping, Memfd};

const PAGES: u32 = 64;

/// A file whose pages differ, as a template or a pool has them.
fn template() -> Memfd {
    let len = ByteLen(u64::from(PAGES) * PAGE_SIZE as u64);
    let file = Memfd::create("gangway-test-template", len).unwrap();
    for page in 0..PAGES {
        let byte = u8::try_from(page + 1).unwrap();
        let offset = PageNo(page).offset();
        file.write_at(offset, &[byte; PAGE_SIZE]).unwrap();
    }
    file
}

/// What this process has mapped, as if it were a VM.
fn vm_of(mapping: &Mapping) -> VmMemory {
    memory(std::process::id(), mapping.addr(), PAGES)
}

fn memory(pid: u32, addr: HostAddr, pages: u32) -> VmMemory {
    let blocks = vec![MemoryBlock { addr, pages }];
    VmMemory { pid, blocks }
}

fn at(vm: u16, page: u32) -> FramePage {
    FramePage {
        vm,
        block: BlockIndex(0),
        page: PageNo(page),
    }
}

fn read(mapping: &Mapping, page: u32) {
    let mut byte = [0];
    mapping.read(PageNo(page).offset(), &mut byte).unwrap();
    std::hint::black_box(byte);
}

fn write(mapping: &Mapping, page: u32) {
    mapping.write(PageNo(page).offset(), b"x").unwrap();
}

#[test]
fn pages_of_a_template_are_shared_touched_or_not_until_they_are_written() {
    let file = template();
    let (one, two) = (file.map_private().unwrap(), file.map_private().unwrap());
    read(&one, 1);
    read(&two, 2);
    write(&one, 3);
    let alone = SharedFrames::mapped_elsewhere(vm_of(&one));
    assert_eq!(
        alone.unwrap(),
        63,
        "the page that it has written is its own"
    );
    let mut frames = SharedFrames::new(vec![vm_of(&one), vm_of(&two)]);
    let report = frames.refresh().unwrap();
    assert!(report.unread.is_empty());
    assert_eq!((report.frames, report.shared_pages), (63, 126));
    for page in [0, 1, 2, 4, 63] {
        let class = frames.class_of(at(0, page)).unwrap();
        assert_eq!(frames.pages_of(class), [at(0, page), at(1, page)]);
    }
    assert_eq!(frames.class_of(at(0, 3)), None);
    assert_eq!(frames.class_of(at(1, 3)), None);

    // A write during the round is seen when the page is about to be sent.
    write(&two, 5);
    let run = PageRun {
        start: PageNo(4),
        count: 3,
    };
    assert_eq!(frames.recheck(1, BlockIndex(0), run).unwrap(), 1);
    assert_eq!(frames.class_of(at(1, 5)), None);
    assert!(frames.class_of(at(0, 5)).is_some() && frames.class_of(at(1, 4)).is_some());
    assert_eq!(frames.refresh().unwrap().frames, 62);
    assert_eq!(frames.class_of(at(0, 5)), None);
}

#[test]
fn memory_that_is_written_for_others_to_see_is_not_shared_memory() {
    let file = template();
    let (one, two) = (file.map().unwrap(), file.map().unwrap());
    read(&one, 1);
    read(&two, 1);
    let mut frames = SharedFrames::new(vec![vm_of(&one), vm_of(&two)]);
    assert_eq!(frames.refresh().unwrap().frames, 0);
}

/// A shell and its subshell; killed when dropped.
struct Shells {
    parent: Child,
    child: u32,
}

impl Shells {
    fn start() -> Self {
        // A long value makes pages that neither has a reason to write.
        let parent = Command::new("sh")
            .args([
                "-c",
                "X=$(head -c 100000 /dev/zero | tr '\\0' x); (while :; do sleep 1; done) & wait",
            ])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let pid = parent.id();
        // The pipe's processes are its children, too, until the value is there.
        thread::sleep(Duration::from_millis(500));
        let children = format!("/proc/{pid}/task/{pid}/children");
        let child = (0..500).find_map(|_| {
            thread::sleep(Duration::from_millis(10));
            let listed = std::fs::read_to_string(&children).unwrap();
            listed.split_whitespace().next()?.parse().ok()
        });
        let child = child.unwrap();
        Self { parent, child }
    }
}

impl Drop for Shells {
    fn drop(&mut self) {
        let _ = self.parent.kill();
        let _ = sys::Process::open(self.child).and_then(|child| child.kill());
        let _ = self.parent.wait();
    }
}

/// Where the heap of a process is, whose pages a fork shares.
fn heap_of(pid: u32) -> (HostAddr, u32) {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let line = maps.lines().find(|line| line.ends_with("[heap]")).unwrap();
    let (range, _) = line.split_once(' ').unwrap();
    let (start, end) = range.split_once('-').unwrap();
    let number = |digits| u64::from_str_radix(digits, 16).unwrap();
    let pages = (number(end) - number(start)) / PAGE_SIZE as u64;
    (HostAddr(number(start)), u32::try_from(pages).unwrap())
}

#[test]
fn a_fork_shares_what_neither_has_written() {
    let shells = Shells::start();
    let (heap, pages) = heap_of(shells.parent.id());
    let vms = vec![
        memory(shells.parent.id(), heap, pages),
        memory(shells.child, heap, pages),
    ];
    let mut frames = SharedFrames::new(vms);
    let report = frames.refresh().unwrap();
    assert!(
        report.frames > 0 && report.shared_pages == 2 * report.frames,
        "{report:?}"
    );
    assert_eq!(frames.classes().count() as u64, report.frames);
    for (class, pages) in frames.classes() {
        assert_eq!(pages, [at(0, pages[0].page.0), at(1, pages[0].page.0)]);
        assert_eq!(frames.class_of(pages[1]), Some(class));
    }
}

#[test]
fn a_vm_that_is_gone_shares_nothing_and_does_not_keep_the_others_from_it() {
    let file = template();
    let (one, two) = (file.map_private().unwrap(), file.map_private().unwrap());
    let mut gone = Command::new("true").spawn().unwrap();
    gone.wait().unwrap();
    let dead = memory(gone.id(), one.addr(), PAGES);
    let mut frames = SharedFrames::new(vec![dead, vm_of(&one), vm_of(&two)]);
    let report = frames.refresh().unwrap();
    assert_eq!(
        (report.frames, report.unread.len(), report.unread[0].0),
        (64, 1, 0)
    );
    assert_eq!(frames.class_of(at(0, 0)), None);
    let outside = PageRun {
        start: PageNo(63),
        count: 2,
    };
    assert!(frames.recheck(1, BlockIndex(0), outside).is_err());
    assert!(frames.recheck(9, BlockIndex(0), outside).is_err());
}

/// Time that this thread has spent on a processor, whatever else the machine does.
fn thread_time() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
}

#[test]
fn eight_vms_of_256_mib_are_read_and_joined_in_moments() {
    const PAGES: u32 = 65_536;
    let len = ByteLen(u64::from(PAGES) * PAGE_SIZE as u64);
    let file = Memfd::create("gangway-test-template", len).unwrap();
    let mappings: Vec<_> = (0..8).map(|_| file.map_private().unwrap()).collect();
    // Every second page is one of its own in the first VM, and read in the second.
    for page in (0..PAGES).step_by(2) {
        write(&mappings[0], page);
        read(&mappings[1], page);
    }
    let pid = std::process::id();
    let vms = mappings
        .iter()
        .map(|mapping| memory(pid, mapping.addr(), PAGES));
    let mut frames = SharedFrames::new(vms.collect());
    let times = (0..5).map(|_| {
        let start = thread_time();
        let report = frames.refresh().unwrap();
        assert_eq!(u64::from(PAGES), report.frames);
        assert_eq!(u64::from(PAGES) * 15 / 2, report.shared_pages);
        thread_time() - start
    });
    let quickest = times.min().unwrap();
    println!("{quickest:?} for 8 VMs of {PAGES} pages");
    // Several times what a quiet machine takes.
    assert!(quickest < Duration::from_millis(400), "{quickest:?}");
}
