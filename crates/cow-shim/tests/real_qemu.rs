//! The library in real QEMUs, with real Linux guests.
//!
//! Needs root, a QEMU and the guests' image: `scripts/setup`, `scripts/build-guest-image`.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{flags_in, has_thread, library, near_dir, pool, rollup_kib, root, within};
use cow_abi::{Features, MapRun, Outcome};
use guest::{CowLibrary, CowListener, QemuBinary, RamBlock, SourceGuest};
use page::{ByteLen, HostAddr, PAGE_SIZE, PageBytes};
use serde_json::Value;
use sys::ProcessMemory;

const SECONDS_20: Duration = Duration::from_secs(20);
const MEMORY_MB: u64 = 160;

/// libvirt's.
const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

/// The distribution's QEMU and 7.2, with what tells them where their data is.
fn qemu(old: bool) -> Vec<String> {
    let path = if old {
        let unpacked = root().join(".lab/qemu-7.2/usr/bin/qemu-system-x86_64");
        std::env::var_os("GANGWAY_QEMU_72").map_or(unpacked, PathBuf::from)
    } else {
        let search = std::env::var_os("PATH").unwrap();
        QemuBinary::find(&search).remove(0).path
    };
    let mut argv = vec![path.display().to_string()];
    argv.extend(QemuBinary::data_args(&path));
    argv
}

struct Vm {
    child: Child,
    dir: tempfile::TempDir,
}

impl Vm {
    /// Starts a VM with the library, and a listener for it.
    fn start(old: bool, extra: &[&str]) -> (Self, CowListener) {
        let dir = near_dir();
        let listener = CowListener::bind(&dir.path().join("cow"), &library()).unwrap();
        let vm = Self::launch(old, extra, dir, |command| {
            command.envs(listener.environment().iter().map(|(n, v)| (n, v)));
        });
        (vm, listener)
    }

    fn launch(
        old: bool,
        extra: &[&str],
        dir: tempfile::TempDir,
        set_up: impl FnOnce(&mut Command),
    ) -> Self {
        let argv = qemu(old);
        let path = |name: &str| dir.path().join(name).display().to_string();
        let mut command = Command::new(&argv[0]);
        command
            .args(&argv[1..])
            .args(["-machine", "pc", "-accel", "tcg,tb-size=32", "-nodefaults"])
            .args([
                "-display",
                "none",
                "-no-reboot",
                "-m",
                &format!("{MEMORY_MB}M"),
            ])
            .args(["-serial", &format!("file:{}", path("serial"))])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", path("qmp"))])
            .args(extra)
            .stdin(Stdio::null());
        set_up(&mut command);
        let child = command.spawn().unwrap();
        Self { child, dir }
    }

    fn attach(&self) -> SourceGuest {
        let qmp = self.dir.path().join("qmp");
        within(SECONDS_20, || SourceGuest::attach(&qmp).ok()).0
    }

    fn serial(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("serial")).unwrap_or_default()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn main_block(guest: &SourceGuest) -> RamBlock {
    let blocks = guest.ram_blocks().unwrap();
    let main = blocks.into_iter().find(|block| block.name == "pc.ram");
    main.unwrap()
}

fn stop(guest: &SourceGuest) {
    guest.qmp().execute("stop", Value::Null).unwrap();
}

fn memory_of(pid: u32, at: HostAddr, len: ByteLen) -> Vec<u8> {
    let addrs: Vec<_> = (0..len.pages())
        .map(|page| HostAddr(at.0 + page * PAGE_SIZE as u64))
        .collect();
    let mut bytes = vec![0; addrs.len() * PAGE_SIZE];
    let read = ProcessMemory::open(pid)
        .unwrap()
        .read_pages(&addrs, &mut bytes);
    assert_eq!(read.unwrap(), addrs.len());
    bytes
}

fn pages(bytes: &[u8]) -> &[PageBytes] {
    bytes.as_chunks::<PAGE_SIZE>().0
}

/// Runs of one VM: its pages whose content the pool has, neighbours together.
fn runs_of(memory: &[u8], places: &HashMap<&PageBytes, u64>) -> Vec<MapRun> {
    let mut runs: Vec<MapRun> = Vec::new();
    for (content, page) in pages(memory).iter().zip(0_u32..) {
        let Some(&pool_page) = places.get(content) else {
            continue;
        };
        match runs.last_mut() {
            Some(run)
                if run.page + run.pages == page
                    && run.pool_page + u64::from(run.pages) == pool_page =>
            {
                run.pages += 1;
            }
            _ => runs.push(MapRun {
                block: 0,
                page,
                pages: 1,
                pool_page,
            }),
        }
    }
    runs
}

/// Boots two Linux guests, maps what they have in common, and lets them run on.
#[test]
fn two_linux_guests_share_their_common_pages_and_run_on() {
    let image = root().join(".lab/image");
    let (kernel, initrd) = (image.join("vmlinuz"), image.join("initrd"));
    let arguments = |id: &'static str| {
        vec![
            "-kernel".to_owned(),
            kernel.display().to_string(),
            "-initrd".to_owned(),
            initrd.display().to_string(),
            "-append".to_owned(),
            format!("console=ttyS0 panic=-1 lab.id={id} lab.mode=idle lab.heartbeat_ms=100"),
        ]
    };
    let start = |id| {
        let arguments = arguments(id);
        let extra: Vec<_> = arguments.iter().map(String::as_str).collect();
        Vm::start(false, &extra)
    };
    let ((mut one, one_cow), (mut two, two_cow)) = (start("vm1"), start("vm2"));
    let (guest_one, guest_two) = (one.attach(), two.attach());
    // The library waits for its agent a few seconds only.
    let libraries = [(&guest_one, &one_cow), (&guest_two, &two_cow)]
        .map(|(guest, cow)| cow.accept(guest.pid()).unwrap());
    for vm in [&one, &two] {
        within(Duration::from_secs(120), || {
            vm.serial().contains("lab").then_some(())
        });
    }
    std::thread::sleep(Duration::from_secs(8));
    let mut served = Vec::new();
    for (guest, mut library) in [&guest_one, &guest_two].into_iter().zip(libraries) {
        stop(guest);
        assert!(library.features().has(Features::NO_HUGE_PAGES));
        let block = main_block(guest);
        library.add_block(0, &block).unwrap();
        served.push((library, block));
    }
    let pids = [guest_one.pid(), guest_two.pid()];
    let snapshot = |i: usize| {
        let block = &served[i].1;
        memory_of(pids[i], block.hva.unwrap(), block.used_len)
    };
    let before = [snapshot(0), snapshot(1)];

    // What both have, and is not zero, in the order of the first.
    let in_two: std::collections::HashSet<_> = pages(&before[1]).iter().collect();
    let mut places = HashMap::new();
    let mut contents = Vec::new();
    for content in pages(&before[0]) {
        if in_two.contains(content) && content.iter().any(|&byte| byte != 0) {
            places.entry(content).or_insert_with(|| {
                contents.push(*content);
                contents.len() as u64 - 1
            });
        }
    }
    let pool = pool(&contents);
    let pss_before: Vec<_> = pids.iter().map(|&pid| rollup_kib(pid, "Pss")).collect();
    let mut mapped_pages = 0;
    let mut mapped_runs = 0;
    for (i, (library, _)) in served.iter_mut().enumerate() {
        library.set_pool(&pool).unwrap();
        let runs = runs_of(&before[i], &places);
        let outcomes = library.map(&runs, false).unwrap();
        assert!(outcomes.iter().all(|outcome| *outcome == Outcome::Mapped));
        assert!(library.settle().unwrap());
        mapped_runs += runs.len();
        mapped_pages += runs.iter().map(|run| u64::from(run.pages)).sum::<u64>();
    }
    let after = [
        snapshot_again(&served, pids, 0),
        snapshot_again(&served, pids, 1),
    ];
    assert!(before == after, "not a byte has changed");
    let pss_after: Vec<_> = pids.iter().map(|&pid| rollup_kib(pid, "Pss")).collect();
    println!(
        "{mapped_pages} pages in {mapped_runs} runs of 2 VMs, {} contents; PSS {pss_before:?} -> \
         {pss_after:?} KiB",
        contents.len()
    );
    let saved: u64 = pss_before.iter().sum::<u64>() - pss_after.iter().sum::<u64>();
    assert!(
        saved > mapped_pages * 4 / 4,
        "{saved} KiB saved of {mapped_pages} pages mapped"
    );
    assert_advice_kept(&served, pids);

    a_write_of_one_is_not_seen_by_the_other(&guest_one, &served, pids, &before);
    // Both run on, and their kernels find nothing wrong.
    for guest in [&guest_one, &guest_two] {
        guest.cont().unwrap();
    }
    std::thread::sleep(Duration::from_secs(5));
    for (vm, guest) in [(&mut one, &guest_one), (&mut two, &guest_two)] {
        assert!(vm.child.try_wait().unwrap().is_none(), "QEMU lives");
        assert_eq!(guest.run_state().unwrap(), guest::RunState::Running);
        let serial = vm.serial();
        assert!(!serial.contains("panic:") && !serial.contains("BUG") && !serial.contains("Oops"));
    }
    for (library, _) in served {
        assert_eq!(library.close().unwrap().runs_refused, 0);
    }
}

fn snapshot_again(served: &[(CowLibrary, RamBlock)], pids: [u32; 2], i: usize) -> Vec<u8> {
    let block = &served[i].1;
    memory_of(pids[i], block.hva.unwrap(), block.used_len)
}

/// What QEMU had advised about memory holds for the mappings, too.
fn assert_advice_kept(served: &[(CowLibrary, RamBlock)], pids: [u32; 2]) {
    for ((_, block), pid) in served.iter().zip(pids) {
        let areas = flags_in(pid, block.hva.unwrap(), block.used_len);
        let plain = areas.iter().find(|(area, _)| area.contains(" 00:00 0"));
        for advice in ["dc", "dd", "mg"] {
            let wanted = plain.unwrap().1.contains(advice);
            for (area, flags) in &areas {
                assert_eq!(
                    flags.contains(advice),
                    wanted,
                    "{advice} of {area}: {flags}"
                );
            }
        }
    }
}

/// The test writes through QEMU's monitor's debugger-free way: the guest's own processor would
/// write the same way, through QEMU's mapping. Here the first VM runs alone for a while.
fn a_write_of_one_is_not_seen_by_the_other(
    one: &SourceGuest,
    served: &[(CowLibrary, RamBlock)],
    pids: [u32; 2],
    before: &[Vec<u8>; 2],
) {
    one.cont().unwrap();
    std::thread::sleep(Duration::from_secs(3));
    stop(one);
    let ran = snapshot_again(served, pids, 0);
    let stood = snapshot_again(served, pids, 1);
    assert!(ran != before[0], "the first has run and written");
    assert!(stood == before[1], "the second has not seen a byte of it");
}

fn is_served(vm: &Vm, cow: &CowListener, guest: &SourceGuest) {
    let mut library = cow.accept(guest.pid()).unwrap();
    let block = main_block(guest);
    let unknown = RamBlock {
        hva: None,
        ..block.clone()
    };
    // QEMU itself knows where its blocks lie.
    if library.features().has(Features::BLOCK_LOOKUP) {
        assert_eq!(library.add_block(0, &unknown).unwrap(), block.hva.unwrap());
    } else {
        library.add_block(0, &block).unwrap();
    }
    library.set_pool(&pool(&[[7; PAGE_SIZE]])).unwrap();
    let run = MapRun {
        block: 0,
        page: 9000,
        pages: 1,
        pool_page: 0,
    };
    assert_eq!(library.map(&[run], false).unwrap(), [Outcome::Mapped]);
    assert!(library.settle().unwrap());
    let at = block.hva.unwrap().of_page(page::PageNo(9000)).unwrap();
    let bytes = memory_of(guest.pid(), at, ByteLen(PAGE_SIZE as u64));
    assert!(bytes.iter().all(|&byte| byte == 7));
    library.close().unwrap();
    drop(vm.serial());
}

#[test]
fn qemus_of_each_version_in_libvirts_sandbox_are_served() {
    for old in [false, true] {
        let (vm, cow) = Vm::start(old, &["-S", "-sandbox", SANDBOX]);
        let guest = vm.attach();
        is_served(&vm, &cow, &guest);
        guest.cont().unwrap();
        assert_eq!(guest.run_state().unwrap(), guest::RunState::Running);
    }
}

/// With the stricter rules of libvirt's a QEMU cannot put itself into the background at all.
#[test]
fn a_qemu_that_goes_into_the_background_is_served_there() {
    for old in [false, true] {
        for sandbox in [&[][..], &["-sandbox", "on"][..]] {
            let mut extra = vec!["-S", "-daemonize"];
            extra.extend(sandbox);
            let (mut vm, cow) = Vm::start(old, &extra);
            let status = vm.child.wait().unwrap();
            assert!(status.success(), "its first generation ends well");
            let guest = vm.attach();
            assert_ne!(guest.pid(), vm.child.id());
            is_served(&vm, &cow, &guest);
            guest.process().kill().unwrap();
            assert!(guest.process().wait_gone(SECONDS_20).unwrap());
        }
    }
}

#[test]
fn a_qemu_without_an_agent_runs_as_without_the_library() {
    let nowhere = Path::new("/nonexistent/gangway/cow");
    let vm = Vm::launch(false, &["-S"], near_dir(), |command| {
        command
            .env("LD_PRELOAD", library())
            .env("GANGWAY_COW_SOCKET", nowhere);
    });
    let guest = vm.attach();
    within(SECONDS_20, || (!has_thread(guest.pid())).then_some(()));
    guest.cont().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(guest.run_state().unwrap(), guest::RunState::Running);
    let status = std::fs::read_to_string(format!("/proc/{}/status", guest.pid())).unwrap();
    assert!(
        status.contains("THP_enabled:\t1"),
        "huge pages are as they were"
    );
}

/// As the agents start a target, and with QEMU's own stream: what comes after a mapping counts.
#[test]
fn a_page_that_the_stream_brings_after_its_mapping_is_the_streams() {
    let source_vm = Vm::launch(false, &[], near_dir(), |_| ());
    let (source, dir) = (source_vm.attach(), near_dir());
    std::thread::sleep(Duration::from_secs(2));
    stop(&source);
    let place = |from: &tempfile::TempDir| from.path().display().to_string();
    let moved = [(place(&source_vm.dir), place(&dir))];
    let argv = guest::target_argv(source.argv(), &moved).unwrap();
    let listener = CowListener::bind(&dir.path().join("cow"), &library()).unwrap();
    let log = dir.path().join("log");
    let target =
        guest::TargetGuest::start_with(&argv, &log, listener.environment(), |_, _| {}).unwrap();
    let mut library = listener.accept(target.pid()).unwrap();
    let blocks = target.ram_blocks().unwrap();
    let block = blocks.iter().find(|block| block.name == "pc.ram").unwrap();
    library.add_block(0, block).unwrap();
    library
        .set_pool(&pool(&vec![[0x5a; PAGE_SIZE]; 256]))
        .unwrap();
    // The first megabyte has the firmware's data, more is zeros; both come as records.
    let runs: Vec<_> = (0..4)
        .map(|i| MapRun {
            block: 0,
            page: i * 1000,
            pages: 256,
            pool_page: 0,
        })
        .collect();
    assert_eq!(library.map(&runs, false).unwrap(), [Outcome::Mapped; 4]);
    assert!(library.settle().unwrap());

    let incoming = dir.path().join("in");
    target.listen(&incoming, false, false).unwrap();
    source
        .start_migration(&incoming, &guest::MigrationParameters::default())
        .unwrap();
    within(SECONDS_20, || {
        let status = target.migration().unwrap().status;
        (status == guest::MigrationStatus::Completed).then_some(())
    });
    let main = main_block(&source);
    let sent = memory_of(source.pid(), main.hva.unwrap(), main.used_len);
    let loaded = memory_of(target.pid(), block.hva.unwrap(), block.used_len);
    assert!(sent == loaded, "the target has the source's memory");
    target.cont().unwrap();
    assert_eq!(target.run_state().unwrap(), guest::RunState::Running);
    library.close().unwrap();
    target.kill().unwrap();
}
