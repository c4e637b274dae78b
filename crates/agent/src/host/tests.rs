//! Both roles in one process, around real QEMUs with firmware and loaded data.

mod following;
mod lanes;
mod resumed;

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use guest::SourceGuest;
use page::HostAddr;
use sys::ProcessMemory;

use super::*;
use crate::types::{Compression, PageCounts, Preset, Progress, Replace, Settings};

/// Memory of the test's VMs.
const MEMORY_MIB: usize = 64;

struct Vm {
    name: String,
    qmp: PathBuf,
    child: Child,
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // A VM that has moved belongs to nobody but the test.
        if let Ok((moved, _events)) = SourceGuest::attach(&moved_qmp(self)) {
            let _ = moved.quit();
        }
    }
}

/// A VM with `data` in its memory from 16 MiB on.
fn vm(dir: &Path, name: &str, data: &Path, extra: &[&str]) -> Vm {
    let qmp = dir.join(format!("{name}.qmp"));
    let child = Command::new("qemu-system-x86_64")
        .args([
            "-name",
            name,
            "-machine",
            "pc",
            "-accel",
            "tcg",
            "-nodefaults",
            "-display",
            "none",
        ])
        .args([
            "-m",
            &MEMORY_MIB.to_string(),
            "-qmp",
            &format!("unix:{},server=on,wait=off", qmp.display()),
        ])
        .args([
            "-device",
            &format!("loader,file={},addr=0x1000000,force-raw=on", data.display()),
        ])
        .args(extra)
        .stdin(Stdio::null())
        .spawn()
        .expect("QEMU starts");
    let deadline = Instant::now() + Duration::from_secs(20);
    while !qmp.exists() {
        assert!(Instant::now() < deadline, "QEMU makes no QMP socket");
        std::thread::sleep(Duration::from_millis(10));
    }
    // The firmware comes to rest.
    std::thread::sleep(Duration::from_millis(1500));
    Vm {
        name: name.to_owned(),
        qmp,
        child,
    }
}

struct Agents {
    source: HostMover,
    target: HostMover,
    target_bulk: SocketAddr,
    dir: tempfile::TempDir,
}

fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
}

fn agents() -> Agents {
    agents_with(Path::new("/nowhere/cow.so"))
}

/// Two agents whose mapping library is that file.
fn agents_with(library: &Path) -> Agents {
    agents_set(&format!("cow_library = \"{}\"\n", library.display()))
}

/// Two agents with these lines in their configuration.
fn agents_set(lines: &str) -> Agents {
    let dir = tempfile::tempdir().unwrap();
    let agent = |name: &str, bulk: SocketAddr| {
        let text = format!(
            "name = \"{name}\"\nbulk = \"{bulk}\"\ninsecure_plaintext = true\nstate_dir = \"{0}/{name}/state\"\nrun_dir = \"{0}/{name}/run\"\n{lines}",
            dir.path().display()
        );
        let config = Config::parse(Path::new("test.toml"), &text).unwrap();
        HostMover::start(&config, None).unwrap()
    };
    let target_bulk = free_address();
    let (source, target) = (agent("s", free_address()), agent("t", target_bulk));
    Agents {
        source,
        target,
        target_bulk,
        dir,
    }
}

impl Agents {
    fn spec(&self, vm: &Vm, settings: Settings) -> MoveSpec {
        MoveSpec {
            id: format!("g/{}", vm.name),
            group: "g".into(),
            vm: vm.name.clone(),
            qmp: vm.qmp.clone(),
            target_name: "t".into(),
            target_bulk: self.target_bulk.to_string(),
            settings,
            domain_key: "42".repeat(32),
            replace: vec![Replace {
                from: ".qmp".into(),
                to: ".moved.qmp".into(),
            }],
            definition: None,
            max_bandwidth_bytes_per_s: None,
            group_bandwidth_bytes_per_s: None,
            downtime_limit_ms: None,
            postcopy_after_s: None,
            postcopy_preempt: false,
            confirm_handover: true,
            rack: None,
        }
    }
}

/// Collects a move's events.
fn events() -> (EventSink, Receiver<Happening>) {
    let (sender, receiver) = channel();
    (
        Box::new(move |happening| drop(sender.send(happening))),
        receiver,
    )
}

/// Waits for a phase; returns the newest progress before it, and the phase's message.
fn wait_for(events: &Receiver<Happening>, wanted: Phase) -> (Progress, String) {
    let mut newest = Progress::default();
    let mut seen = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match events.recv_timeout(left) {
            Ok(Happening::Progress { progress }) => newest = progress,
            Ok(Happening::Phase { phase, message }) if phase == wanted => return (newest, message),
            Ok(Happening::Phase { phase, message }) => {
                assert!(
                    !phase.is_final(),
                    "{phase:?} instead of {wanted:?}: {message}"
                );
                seen.push(phase);
            }
            Ok(Happening::Note { .. }) => {}
            Err(_) => panic!("no {wanted:?} after {seen:?}"),
        }
    }
}

/// Pages that all differ, a part that repeats them, and a part filled with one byte.
fn test_data(dir: &Path, seed: u64) -> PathBuf {
    let mut bytes = Vec::new();
    let mut state = seed;
    for _ in 0..(8 << 20) / 8 {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&(state ^ (state >> 29)).to_le_bytes());
    }
    bytes.extend_from_within(..4 << 20);
    bytes.extend_from_slice(&[0x5a; 4 << 20]);
    let path = dir.join(format!("data-{seed}"));
    std::fs::write(&path, bytes).unwrap();
    path
}

/// Moves VMs with the same data under `settings`, compares, lets them run; returns their pages.
fn move_and_compare(settings: Settings, count: usize) -> Vec<(String, PageCounts)> {
    let agents = agents();
    let data = test_data(agents.dir.path(), 7);
    let vms: Vec<Vm> = (0..count)
        .map(|i| vm(agents.dir.path(), &format!("v{i}"), &data, &[]))
        .collect();
    let moves: Vec<_> = vms
        .iter()
        .map(|vm| {
            let (sink, receiver) = events();
            agents.source.check(&agents.spec(vm, settings)).unwrap();
            agents
                .source
                .start(agents.spec(vm, settings), sink)
                .unwrap();
            receiver
        })
        .collect();
    let mut pages = Vec::new();
    for (vm, events) in vms.iter().zip(&moves) {
        pages.push((vm.name.clone(), wait_for(events, Phase::Held).0.pages));
    }
    for (vm, events) in vms.iter().zip(&moves) {
        let before = source_memory(vm);
        let after = target_memory(&agents, vm);
        let odd = before
            .chunks(4096)
            .zip(after.chunks(4096))
            .filter(|(a, b)| a != b)
            .count();
        assert_eq!(
            (odd, before.len()),
            (0, after.len()),
            "pages of {} differ",
            vm.name
        );
        agents
            .source
            .resume_held(&format!("g/{}", vm.name))
            .unwrap();
        wait_for(events, Phase::Moved);
    }
    assert!(agents.target.incoming().is_empty());
    for vm in &vms {
        let (guest, _events) = SourceGuest::attach(&moved_qmp(vm)).unwrap();
        assert_eq!(guest.run_state().unwrap(), guest::RunState::Running);
        guest.quit().unwrap();
    }
    pages
}

/// The RAM of a process whose monitor is taken: the one mapping of its size.
fn memory_of(pid: u32) -> Vec<u8> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let size = (MEMORY_MIB as u64) << 20;
    let base = maps
        .lines()
        .filter_map(|line| {
            let (range, _) = line.split_once(' ')?;
            let (start, end) = range.split_once('-')?;
            let start = u64::from_str_radix(start, 16).ok()?;
            let end = u64::from_str_radix(end, 16).ok()?;
            (end - start == size && line.contains("rw-p")).then_some(start)
        })
        .next()
        .expect("a mapping of the RAM's size");
    let count = u32::try_from(size / 4096).unwrap();
    let addresses: Vec<HostAddr> = (0..count)
        .map(|p| HostAddr(base).of_page(page::PageNo(p)).unwrap())
        .collect();
    let mut bytes = vec![0; addresses.len() * page::PAGE_SIZE];
    let read = ProcessMemory::open(pid)
        .unwrap()
        .read_pages(&addresses, &mut bytes)
        .unwrap();
    assert_eq!(read, addresses.len());
    bytes
}

fn moved_qmp(vm: &Vm) -> PathBuf {
    vm.qmp.with_extension("moved.qmp")
}

fn source_memory(vm: &Vm) -> Vec<u8> {
    memory_of(vm.child.id())
}

fn target_memory(agents: &Agents, vm: &Vm) -> Vec<u8> {
    memory_of(
        agents
            .target
            .arrivals
            .pid_of(&format!("g/{}", vm.name))
            .unwrap(),
    )
}

#[test]
fn real_a_vm_arrives_page_for_page_with_online_compression() {
    let pages = move_and_compare(Preset::Oc.settings(), 1);
    let (_, pages) = &pages[0];
    assert!(pages.fill >= 1024, "{pages:?}");
    assert_eq!(pages.reference, 0);
}

#[test]
fn real_a_gang_sends_each_content_once() {
    let pages = move_and_compare(Preset::Gang.settings(), 2);
    let literal: u64 = pages.iter().map(|(_, p)| p.literal).sum();
    let reference: u64 = pages.iter().map(|(_, p)| p.reference).sum();
    // 2048 pages of data that each VM has in full and again in half.
    assert!(reference >= 1024 + 3072, "{pages:?}");
    assert!(literal < 2048 + 1024, "{pages:?}");
}

#[test]
fn real_a_gang_arrives_compressed() {
    let settings = Settings {
        compression: Compression::Zstd,
        ..Preset::Gang.settings()
    };
    move_and_compare(settings, 2);
}

#[test]
fn real_a_hybrid_move_goes_over_when_a_person_says_so_and_not_in_pre_copy() {
    let agents = agents();
    let data = test_data(agents.dir.path(), 9);
    let vm = vm(agents.dir.path(), "v", &data, &[]);
    let spec = |mode| MoveSpec {
        // Half a minute of memory: it does not converge before it is told.
        max_bandwidth_bytes_per_s: Some(400_000),
        confirm_handover: false,
        ..agents.spec(
            &vm,
            Settings {
                mode,
                ..Preset::Oc.settings()
            },
        )
    };
    let id = format!("g/{}", vm.name);
    let (sink, receiver) = events();
    agents.source.start(spec(Mode::PreCopy), sink).unwrap();
    wait_for(&receiver, Phase::Bulk);
    let refusal = agents.source.go_over(&id).unwrap_err();
    assert_eq!(refusal.code, RefusalCode::NotHybrid);
    agents.source.cancel(&id).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while !agents.target.incoming().is_empty()
        || lock(&agents.source.moves)
            .values()
            .any(|m| !m.phase.is_final())
    {
        assert!(Instant::now() < deadline, "it is not cancelled");
        std::thread::sleep(Duration::from_millis(20));
    }

    let (sink, receiver) = events();
    let hybrid = MoveSpec {
        id: "h/v".into(),
        ..spec(Mode::Hybrid)
    };
    agents.source.start(hybrid, sink).unwrap();
    wait_for(&receiver, Phase::Bulk);
    agents.source.go_over("h/v").unwrap();
    wait_for(&receiver, Phase::PostCopy);
    assert_eq!(
        agents.source.go_over("h/v").unwrap_err().code,
        RefusalCode::TooLate
    );
    agents
        .source
        .set_bandwidth("h/v", Bandwidth::default())
        .unwrap();
    wait_for(&receiver, Phase::Moved);
    let (guest, _events) = SourceGuest::attach(&moved_qmp(&vm)).unwrap();
    assert_eq!(guest.run_state().unwrap(), guest::RunState::Running);
    guest.quit().unwrap();
}

#[test]
fn real_a_vm_that_was_stopped_at_its_target_stays_so_when_the_agent_there_starts_again() {
    let agents = agents();
    let data = test_data(agents.dir.path(), 15);
    let vm = vm(agents.dir.path(), "v", &data, &[]);
    let spec = MoveSpec {
        confirm_handover: false,
        ..agents.spec(&vm, Preset::Oc.settings())
    };
    let (sink, receiver) = events();
    agents.source.start(spec, sink).unwrap();
    wait_for(&receiver, Phase::Moved);
    let (guest, events) = SourceGuest::attach(&moved_qmp(&vm)).unwrap();
    assert_eq!(guest.run_state().unwrap(), guest::RunState::Running);
    guest.stop().unwrap();
    // As an agent does that starts: what the journal says is taken up.
    let context = agents.target.arrivals.context.clone();
    drop((guest, events));
    let again = crate::target::Arrivals::start(context).unwrap();
    assert!(again.pid_of("g/v").is_some(), "it is in the journal");
    let (guest, _events) = SourceGuest::attach(&moved_qmp(&vm)).unwrap();
    assert_eq!(guest.run_state().unwrap(), guest::RunState::Paused);
    guest.quit().unwrap();
}

#[test]
fn a_group_that_shares_is_admitted_by_what_it_holds_and_refused_with_the_numbers() {
    let free = HostMemory::now().for_guests().0;
    let ask = |agents: &Agents, shared: u64| {
        let vms = ["a", "b"].map(|name| MoveCheck {
            vm: name.into(),
            // As large as the host: only sharing makes two of them fit.
            memory_bytes: free,
            shared_bytes: Some(shared),
            expanded_bytes: Some(free),
            program: "/bin/true".into(),
            machine: "pc".into(),
            qemu_version: "10.0.2".into(),
        });
        let (group, vms) = ("g".to_owned(), vms.to_vec());
        agents.target.admit(&Admission { group, vms })
    };
    let here = std::env::current_exe().unwrap();
    let agents = agents_with(&here);
    ask(&agents, free / 5).unwrap();
    let refusal = ask(&agents, free / 5 * 4).unwrap_err();
    assert_eq!(refusal.code, RefusalCode::NoMemory);
    let whole = page::ByteLen(2 * free).to_string();
    assert!(refusal.message.contains(&whole), "{}", refusal.message);
    let without = ask(&agents_with(Path::new("/nowhere/cow.so")), free / 5).unwrap_err();
    assert_eq!(without.code, RefusalCode::NoMemory, "it cannot share here");
}

#[test]
fn two_groups_admitted_at_once_are_not_promised_the_same_memory() {
    let agents = agents();
    let ask = |group: &str| {
        let vm = MoveCheck {
            vm: "vm".into(),
            // Of what is free, too much to fit twice.
            memory_bytes: HostMemory::now().for_guests().0 / 5 * 3,
            shared_bytes: None,
            expanded_bytes: None,
            program: "/bin/true".into(),
            machine: "pc".into(),
            qemu_version: "10.0.2".into(),
        };
        let vms = vec![vm];
        let group = group.to_owned();
        agents.target.admit(&Admission { group, vms })
    };
    ask("first").unwrap();
    let refusal = ask("second").unwrap_err();
    assert_eq!(refusal.code, RefusalCode::NoMemory);
    ask("first").expect("a group that asks again has its promise already");
}

#[test]
fn real_a_prepared_vm_is_in_the_index_of_another_agent() {
    use crate::types::{PrepareState, PrepareVm};
    let agents = agents();
    let data = agents.dir.path().join("data");
    let page = |n: u8| [vec![n; 2048], vec![n + 1; 2048]].concat();
    std::fs::write(&data, (0..100).flat_map(page).collect::<Vec<u8>>()).unwrap();
    let vm = vm(agents.dir.path(), "v", &data, &[]);
    let spec = PrepareSpec {
        group: "g".into(),
        vms: vec![PrepareVm {
            vm: vm.name.clone(),
            qmp: vm.qmp.clone(),
            domain_key: "42".repeat(32),
            target: 1,
        }],
        index: vec![agents.target_bulk.to_string()],
        targets: 2,
        bounds: crate::types::PrepareBounds::default(),
        resident: false,
        seeded: false,
        identical: false,
    };
    let settled = || {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let status = agents.source.preparation("g").unwrap();
            if status.state.is_settled() {
                return status;
            }
            assert!(Instant::now() < deadline, "{status:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    agents.source.prepare(spec).unwrap();
    let status = settled();
    assert_eq!(status.state, PrepareState::Registered, "{status:?}");
    assert_eq!(status.message, "");
    agents
        .source
        .resolve_preparation("g", ResolveSpec::default())
        .unwrap();
    assert_eq!(settled().state, PrepareState::Ready);
    let prepared = agents
        .source
        .preparations
        .prepared("g", &[0x42; 32])
        .unwrap();
    let bytes: [u8; 4096] = page(7).try_into().unwrap();
    let id = page::ContentKey::new([0x42; 32]).id_of(&bytes);
    assert!(matches!(
        prepared.lookup(id),
        Some(crate::prepare::Need::One(page::HostNo(1)))
    ));
}
