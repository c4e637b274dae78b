//! Guests of real QEMUs, the distribution's and 7.2.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;
mod scan;

use std::collections::BTreeMap;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use common::{Qemu, Target, Vm, relay, within};
use guest::{
    ArgvError, GuestError, MigrationParameters, MigrationStatus, Qmp, QmpError, RunState,
    SourceGuest, TargetGuest, target_argv,
};
use page::{ByteLen, HostAddr, PAGE_SIZE};
use serde_json::{Value, json};
use sys::ProcessMemory;

const SECONDS_10: Duration = Duration::from_secs(10);

/// Makes of each function a test on either QEMU.
macro_rules! on_each_qemu {
    ($($name:ident)*) => { $(
        mod $name {
            use super::common::Qemu;
            #[test]
            fn current() {
                super::$name(&Qemu::current());
            }
            #[test]
            fn qemu_7_2() {
                super::$name(&Qemu::old());
            }
        }
    )* };
}

on_each_qemu! {
    attaching_learns_who_the_guest_is
    the_address_of_main_memory_is_where_its_bytes_are
    each_capability_that_cannot_be_carried_is_refused_by_name
    what_blocks_a_migration_is_told_before_it_starts
    a_migration_under_way_is_refused_and_cancelling_gives_settings_back
    a_socket_where_nobody_listens_fails_the_migration_and_not_the_guest
    the_wire_rate_reaches_qemu_and_is_taken_back
    a_monitor_in_use_is_called_busy
    a_target_that_cannot_start_says_why_and_leaves_nothing
    a_target_never_takes_over_a_running_guests_monitor
    a_target_outlives_its_handle_and_is_adopted_again
    a_target_whose_stream_breaks_is_gone
    until_the_target_runs_the_source_can_go_on_with_its_disks
    memory_that_cannot_be_mapped_is_told_by_a_running_qemu
}

/// What the guest under test has as capabilities and parameters.
fn settings(qmp: &Qmp) -> (Value, BTreeMap<String, Value>) {
    let capabilities = qmp
        .execute("query-migrate-capabilities", Value::Null)
        .unwrap();
    let parameters = qmp
        .execute("query-migrate-parameters", Value::Null)
        .unwrap();
    (capabilities, serde_json::from_value(parameters).unwrap())
}

fn set_capability(qmp: &Qmp, name: &str, on: bool) -> Result<Value, QmpError> {
    let list = json!([{ "capability": name, "state": on }]);
    qmp.execute("migrate-set-capabilities", json!({ "capabilities": list }))
}

/// A command line for the target of `source`, with its files in another directory.
fn argv_beside(source: &SourceGuest, vm: &Vm, dir: &tempfile::TempDir) -> Vec<String> {
    let path = |dir: &tempfile::TempDir| dir.path().display().to_string();
    target_argv(source.argv(), &[(path(&vm.dir), path(dir))]).unwrap()
}

fn attaching_learns_who_the_guest_is(qemu: &Qemu) {
    let vm = qemu.start(&[]);
    let guest = vm.attach();
    assert_eq!(guest.name(), "vm");
    assert_eq!(guest.pid(), vm.child.id());
    assert_eq!(guest.memory_bytes(), ByteLen(64 << 20));
    assert_eq!(guest.run_state().unwrap(), RunState::Running);
    guest.check().unwrap();

    let (major, minor, _) = guest.version();
    let machine = guest.argv().iter().position(|a| a == "-machine").unwrap() + 1;
    let expected = match qemu.machine {
        "pc" => format!("pc-i440fx-{major}.{minor},accel=tcg"),
        versioned => format!("{versioned},accel=tcg"),
    };
    assert_eq!(guest.argv()[machine], expected);
}

fn the_address_of_main_memory_is_where_its_bytes_are(qemu: &Qemu) {
    let vm = qemu.start(&[]);
    let guest = vm.attach();
    // The firmware has copied itself to the end of the first megabyte by then.
    std::thread::sleep(Duration::from_millis(500));
    guest.qmp().execute("stop", Value::Null).unwrap();

    let blocks = guest.ram_blocks().unwrap();
    let main = blocks.iter().find(|block| block.name == "pc.ram").unwrap();
    assert_eq!((main.used_len, main.page_size), (ByteLen(64 << 20), 4096));
    let dump = vm.dir.path().join("dump");
    let arguments = json!({ "val": 0, "size": 0xa_0000, "filename": dump.to_str().unwrap() });
    guest.qmp().execute("pmemsave", arguments).unwrap();

    let read = read_memory(guest.pid(), main.hva.unwrap(), 0xa0);
    assert!(std::fs::read(dump).unwrap() == read);
    assert!(
        read.iter().any(|&byte| byte != 0),
        "the firmware has written something"
    );
}

fn read_memory(pid: u32, start: HostAddr, pages: u64) -> Vec<u8> {
    let addrs: Vec<_> = (0..pages)
        .map(|page| HostAddr(start.0 + page * PAGE_SIZE as u64))
        .collect();
    let mut bytes = vec![0; addrs.len() * PAGE_SIZE];
    let memory = ProcessMemory::open(pid).unwrap();
    assert_eq!(memory.read_pages(&addrs, &mut bytes).unwrap(), addrs.len());
    bytes
}

fn each_capability_that_cannot_be_carried_is_refused_by_name(qemu: &Qemu) {
    let vm = qemu.start(&[]);
    let guest = vm.attach();
    let mut tried = 0;
    for name in [
        "xbzrle",
        "compress",
        "multifd",
        "mapped-ram",
        "postcopy-ram",
        "release-ram",
        "background-snapshot",
        "x-ignore-shared",
        "rdma-pin-all",
        "dirty-bitmaps",
        "block",
    ] {
        // Not every version has, or was built with, each of them.
        if set_capability(guest.qmp(), name, true).is_err() {
            continue;
        }
        tried += 1;
        let error = guest.check().unwrap_err();
        assert!(matches!(error, GuestError::Capability { capability, .. } if capability == name));
        assert!(
            error
                .to_string()
                .contains(&format!("migrate_set_capability {name} off"))
        );
        set_capability(guest.qmp(), name, false).unwrap();
    }
    assert!(tried >= 7, "only {tried} capabilities could be turned on");
    guest.check().unwrap();

    let tls = json!({ "tls-creds": "tls0" });
    guest.qmp().execute("migrate-set-parameters", tls).unwrap();
    assert!(matches!(guest.check(), Err(GuestError::TlsCreds)));
}

fn what_blocks_a_migration_is_told_before_it_starts(qemu: &Qemu) {
    let disk = tempfile::tempdir().unwrap();
    let drive = format!(
        "file=fat:rw:{},format=raw,if=none,id=d",
        disk.path().display()
    );
    let blocked = qemu.start(&["-drive", &drive]);
    let error = blocked.attach().check().unwrap_err();
    assert!(
        matches!(&error, GuestError::Blocked { reasons } if !reasons.is_empty()),
        "{error}"
    );

    assert!(error.to_string().contains("vvfat"), "{error}");

    let never_run = qemu.start(&["-S"]);
    let guest = never_run.attach();
    let error = guest.check().unwrap_err();
    assert!(
        matches!(
            error,
            GuestError::NotMigratable {
                state: RunState::Prelaunch
            }
        ),
        "{error}"
    );
    guest.cont().unwrap();
    guest.check().unwrap();
}

fn a_migration_under_way_is_refused_and_cancelling_gives_settings_back(qemu: &Qemu) {
    let vm = qemu.start(&[]);
    let guest = vm.attach();
    let odd = json!({ "max-bandwidth": 77_777, "downtime-limit": 123 });
    guest.qmp().execute("migrate-set-parameters", odd).unwrap();
    set_capability(guest.qmp(), "pause-before-switchover", true).unwrap();
    let before = settings(guest.qmp());

    // It accepts and never reads: the migration stays in its first round.
    let socket = vm.dir.path().join("stream");
    let listener = UnixListener::bind(&socket).unwrap();
    let parameters = MigrationParameters {
        downtime_limit_ms: 200,
        ..Default::default()
    };
    guest.start_migration(&socket, &parameters).unwrap();
    let (_stream, _) = listener.accept().unwrap();
    within(SECONDS_10, || guest.check().is_err().then_some(()));
    assert!(matches!(
        guest.check(),
        Err(GuestError::MigrationActive { .. })
    ));
    let during = settings(guest.qmp());
    assert_eq!(
        (&during.1["max-bandwidth"], &during.1["downtime-limit"]),
        (&json!(0), &json!(200))
    );
    assert_ne!(during.0, before.0);

    guest.cancel().unwrap();
    guest.restore_settings().unwrap();
    // Cancelling shuts the stream down, and 7.2's migration thread may see that first and call it
    // a failure. Either way it is over and the guest is where it was.
    let ended = guest.migration().unwrap().status;
    assert!(
        matches!(ended, MigrationStatus::Cancelled | MigrationStatus::Failed),
        "{ended:?}"
    );
    assert_eq!(settings(guest.qmp()), before);
    assert_eq!(guest.run_state().unwrap(), RunState::Running);
    guest.check().unwrap();
}

fn a_socket_where_nobody_listens_fails_the_migration_and_not_the_guest(qemu: &Qemu) {
    let vm = qemu.start(&[]);
    let guest = vm.attach();
    let before = settings(guest.qmp());
    let nowhere = vm.dir.path().join("nowhere");
    // A version may refuse the command at once; these accept it and fail the migration.
    if guest
        .start_migration(&nowhere, &MigrationParameters::default())
        .is_ok()
    {
        let failed = within(SECONDS_10, || {
            Some(guest.migration().unwrap()).filter(|migration| migration.status.is_over())
        });
        assert_eq!(failed.status, MigrationStatus::Failed);
        assert!(
            failed
                .error_desc
                .is_some_and(|text| text.contains("nowhere"))
        );
        guest.restore_settings().unwrap();
    }
    assert_eq!(settings(guest.qmp()), before);
    assert_eq!(guest.run_state().unwrap(), RunState::Running);

    let long = vm.dir.path().join("x".repeat(108));
    let error = guest
        .start_migration(&long, &MigrationParameters::default())
        .unwrap_err();
    assert!(matches!(error, GuestError::SocketPath { .. }), "{error}");
}

fn the_wire_rate_reaches_qemu_and_is_taken_back(qemu: &Qemu) {
    let vm = qemu.start(&[]);
    let guest = vm.attach();
    let before = settings(guest.qmp());
    let socket = vm.dir.path().join("stream");
    let listener = UnixListener::bind(&socket).unwrap();
    guest
        .start_migration(&socket, &MigrationParameters::default())
        .unwrap();
    let (_stream, _) = listener.accept().unwrap();

    guest.set_wire_rate(10_000_000, 100_000_000).unwrap();
    let (_, during) = settings(guest.qmp());
    match during.get("avail-switchover-bandwidth") {
        Some(bandwidth) => {
            assert_eq!(
                (bandwidth, &during["downtime-limit"]),
                (&json!(10_000_000), &json!(300))
            );
        }
        None => assert_eq!(during["downtime-limit"], 30),
    }
    guest.cancel().unwrap();
    guest.restore_settings().unwrap();
    assert_eq!(settings(guest.qmp()), before);
}

fn a_monitor_in_use_is_called_busy(qemu: &Qemu) {
    let vm = qemu.start(&[]);
    let held = vm.attach();
    let wait = Duration::from_millis(300);
    // Some wait in the listener's queue, the later ones find it full.
    let waiting: Vec<_> = (0..4)
        .map(|_| {
            let path = vm.qmp();
            std::thread::spawn(move || Qmp::connect(&path, wait).map(drop))
        })
        .collect();
    for thread in waiting {
        let error = thread.join().unwrap().unwrap_err();
        assert!(matches!(error, QmpError::Busy { .. }), "{error}");
    }
    drop(held);
    within(SECONDS_10, || SourceGuest::attach(&vm.qmp()).ok());
}

fn a_target_that_cannot_start_says_why_and_leaves_nothing(qemu: &Qemu) {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    std::fs::write(&log, "from an earlier start\n").unwrap();

    let error = TargetGuest::start(&qemu.argv(dir.path(), &["-device", "no-such"]), &log);
    let Err(GuestError::EndedEarly { status, log_tail }) = error else {
        panic!("{error:?}")
    };
    assert!(!status.success());
    assert!(
        log_tail.contains("'no-such' is not a valid device model name"),
        "{log_tail}"
    );
    assert!(!log_tail.contains("earlier"));

    let mut argv = qemu.argv(dir.path(), &[]);
    argv.retain(|argument| argument != "-qmp");
    assert!(matches!(
        TargetGuest::start(&argv, &log),
        Err(GuestError::NoQmpSocket)
    ));
    let argv = ["/nonexistent/qemu", "-qmp", "unix:/nonexistent/q,server"].map(str::to_owned);
    assert!(matches!(
        TargetGuest::start(&argv, &log),
        Err(GuestError::Launch { .. })
    ));
    assert!(matches!(
        TargetGuest::start(&[], &log),
        Err(GuestError::Argv(ArgvError::Empty))
    ));
}

fn a_target_never_takes_over_a_running_guests_monitor(qemu: &Qemu) {
    let vm = qemu.start(&[]);
    let log = vm.dir.path().join("log");
    let argv = {
        let guest = vm.attach();
        let argv = target_argv(guest.argv(), &[]).unwrap();
        let error = TargetGuest::start(&argv, &log).unwrap_err();
        assert!(matches!(error, GuestError::SocketInUse { .. }), "{error}");
        guest.check().unwrap();
        argv
    };
    let error = TargetGuest::start(&argv, &log).unwrap_err();
    assert!(matches!(error, GuestError::SocketInUse { .. }), "{error}");
    let guest = within(SECONDS_10, || SourceGuest::attach(&vm.qmp()).ok());
    assert_eq!(guest.0.pid(), vm.child.id());
}

fn a_target_outlives_its_handle_and_is_adopted_again(qemu: &Qemu) {
    let dir = tempfile::tempdir().unwrap();
    let pidfile = dir.path().join("pid");
    let pidfile_text = pidfile.display().to_string();
    let argv = qemu.argv(dir.path(), &["-daemonize", "-pidfile", &pidfile_text, "-S"]);
    let log = dir.path().join("log");
    let target = TargetGuest::start(&argv, &log).unwrap();
    let (pid, qmp) = (target.pid(), target.qmp_path().to_owned());
    assert_eq!(
        std::fs::read_to_string(&pidfile).unwrap().trim(),
        pid.to_string()
    );
    let pid_of_session = {
        let raw = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap());
        rustix::process::getsid(raw).unwrap().as_raw_nonzero().get()
    };
    assert_eq!(u32::try_from(pid_of_session).unwrap(), pid);
    assert!(target.take_events().is_some() && target.take_events().is_none());
    drop(target);

    let adopted = within(SECONDS_10, || TargetGuest::adopt(pid, &qmp).ok());
    assert_eq!(adopted.run_state().unwrap(), RunState::InMigrate);
    drop(adopted);
    let own = std::process::id();
    let error = within(SECONDS_10, || match TargetGuest::adopt(own, &qmp) {
        Err(GuestError::Qmp(QmpError::Busy { .. })) => None,
        other => Some(other.unwrap_err()),
    });
    assert!(
        matches!(error, GuestError::OtherProcess { found, .. } if found == pid),
        "{error}"
    );

    let adopted = within(SECONDS_10, || TargetGuest::adopt(pid, &qmp).ok());
    adopted.kill().unwrap();
    assert!(!adopted.process().is_alive());
    adopted.kill().unwrap();
    assert!(matches!(
        adopted.cont(),
        Err(GuestError::Qmp(QmpError::Closed { .. }))
    ));
    // Also reaped: no zombie keeps the pid.
    within(SECONDS_10, || {
        (!std::path::Path::new(&format!("/proc/{pid}")).exists()).then_some(())
    });
}

fn a_target_whose_stream_breaks_is_gone(qemu: &Qemu) {
    let dir = tempfile::tempdir().unwrap();
    let argv = qemu.argv(dir.path(), &[]);
    let target = Target::start(&argv, dir);
    let socket = target.dir.path().join("in");
    target.guest.listen(&socket, false, false).unwrap();
    assert!(socket.exists());
    drop(std::os::unix::net::UnixStream::connect(&socket).unwrap());
    assert!(target.guest.process().wait_gone(SECONDS_10).unwrap());
}

#[test]
fn a_running_guest_moves_between_current_qemus() {
    migrate(&Qemu::current(), &Qemu::current(), true);
}

#[test]
fn a_running_guest_moves_from_the_current_to_the_old_qemu() {
    migrate(&Qemu::current().with_common_machine(), &Qemu::old(), true);
}

/// Stopped, because 7.2 without KVM loses pages that a guest writes during its migration.
#[test]
fn a_stopped_guest_moves_between_old_qemus() {
    migrate(&Qemu::old(), &Qemu::old(), false);
}

fn migrate(from: &Qemu, to: &Qemu, running: bool) {
    let vm = from.start(&[]);
    let (source, events) = SourceGuest::attach(&vm.qmp()).unwrap();
    // With its owner's limit QEMU 7.2 would take 25 seconds.
    let slow = json!({ "max-bandwidth": 10_000 });
    let parameters = "migrate-set-parameters";
    source.qmp().execute(parameters, slow).unwrap();
    if !running {
        source.qmp().execute("stop", Value::Null).unwrap();
    }
    source.check().unwrap();

    let start = Instant::now();
    let target = load_target(&vm, &source, to);
    let took = start.elapsed();
    assert!(took < SECONDS_10, "QEMU's own bandwidth limit holds");
    let done = source.migration().unwrap();
    assert!(done.transferred.0 > 0 && done.total.0 >= 64 << 20);
    assert!(done.downtime_ms.is_some());
    assert_eq!(source.run_state().unwrap(), RunState::PostMigrate);
    assert_same_memory(&source, &target.guest);

    let target_events = target.guest.take_events().unwrap();
    target.guest.cont().unwrap();
    assert_eq!(target.guest.run_state().unwrap(), RunState::Running);
    source.quit().unwrap();
    assert!(source.process().wait_gone(SECONDS_10).unwrap());
    assert!(events.try_iter().any(|event| event.name == "MIGRATION"));
    assert!(target_events.try_iter().any(|event| event.name == "RESUME"));
}

/// A loaded target that was not let go has not taken the disks yet.
fn until_the_target_runs_the_source_can_go_on_with_its_disks(qemu: &Qemu) {
    let disks = tempfile::tempdir().unwrap();
    let disk = disks.path().join("disk");
    std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let drive = format!("file={},format=raw,if=virtio", disk.display());
    let vm = qemu.start(&["-drive", &drive]);
    let source = vm.attach();
    source.qmp().execute("stop", Value::Null).unwrap();
    let target = load_target(&vm, &source, qemu);

    source.cont().unwrap();
    assert_eq!(source.run_state().unwrap(), RunState::Running);
    source.restore_settings().unwrap();
    source.check().unwrap();
    // Rule of QEMU's image locks: the target cannot have them now.
    assert!(target.guest.cont().is_err());
}

/// Migrates into a new target of `to` and waits until both sides are done: both stand still.
fn load_target(vm: &Vm, source: &SourceGuest, to: &Qemu) -> Target {
    let dir = tempfile::tempdir().unwrap();
    let mut argv = argv_beside(source, vm, &dir);
    argv.splice(..program_len(&argv), to.program());
    let target = Target::start(&argv, dir);
    let outgoing = vm.dir.path().join("out");
    let incoming = target.dir.path().join("in");
    target.guest.listen(&incoming, false, false).unwrap();
    relay(&outgoing, &incoming);
    let parameters = MigrationParameters::default();
    source.start_migration(&outgoing, &parameters).unwrap();

    let ended = within(Duration::from_secs(30), || {
        Some(source.migration().unwrap()).filter(|migration| migration.status.is_over())
    });
    assert_eq!(ended.status, MigrationStatus::Completed, "{ended:?}");
    within(SECONDS_10, || {
        let status = target.guest.migration().unwrap().status;
        (status == MigrationStatus::Completed).then_some(())
    });
    assert_eq!(target.guest.run_state().unwrap(), RunState::Paused);
    target
}

/// How many arguments name the program and its data.
fn program_len(argv: &[String]) -> usize {
    argv.iter()
        .position(|argument| argument == "-machine")
        .unwrap()
}

/// Compares the guest's whole memory, both sides stopped.
fn assert_same_memory(source: &SourceGuest, target: &TargetGuest) {
    let main = |blocks: Vec<guest::RamBlock>| {
        blocks
            .into_iter()
            .find(|block| block.name == "pc.ram")
            .unwrap()
    };
    let (a, b) = (
        main(source.ram_blocks().unwrap()),
        main(target.ram_blocks().unwrap()),
    );
    assert_eq!(a.used_len, b.used_len);
    let left = read_memory(source.pid(), a.hva.unwrap(), a.used_len.pages());
    let right = read_memory(target.pid(), b.hva.unwrap(), b.used_len.pages());
    let differ = left
        .chunks(PAGE_SIZE)
        .zip(right.chunks(PAGE_SIZE))
        .filter(|(a, b)| a != b)
        .count();
    assert_eq!(differ, 0, "pages that differ");
    assert!(left.iter().any(|&byte| byte != 0));
}

fn memory_that_cannot_be_mapped_is_told_by_a_running_qemu(qemu: &Qemu) {
    let plain = qemu.start(&[]);
    assert_eq!(plain.attach().mapping_obstacle().unwrap(), None);
    drop(plain);
    let backend = "memory-backend-ram,id=dimm,size=64M,share=on";
    let shared = qemu.start(&["-object", backend, "-machine", "memory-backend=dimm"]);
    let guest = shared.attach();
    let obstacle = guest.mapping_obstacle().unwrap().unwrap();
    assert_eq!(obstacle.what, "memory backend dimm");
    // A command line says it before there is a process.
    assert!(
        guest::mapping_obstacle(guest.argv())
            .unwrap()
            .what
            .contains(backend)
    );
}
