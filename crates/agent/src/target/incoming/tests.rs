//! Moves as an agent finds them, with a process that is no QEMU and has no monitor.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::mpsc;
use std::time::SystemTime;

use page::ByteLen;

use super::*;
use crate::journal::QemuProcess;

/// The test fails, and does not hang.
const PATIENCE: Duration = Duration::from_secs(10);

struct Bench {
    dir: tempfile::TempDir,
    context: TargetContext,
    child: Child,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let context = TargetContext {
            host: "t1".into(),
            run_dir: path("run"),
            log_dir: path("log"),
            journal: Journal::open(path("journal")).unwrap(),
            hold: Hold::default(),
            store_bytes: 1 << 20,
            pools: Pools::start(ByteLen(1 << 20)).unwrap(),
            pressure: Arc::default(),
            cow_library: None,
        };
        let child = Command::new("sleep").arg("600").spawn().unwrap();
        Self {
            dir,
            context,
            child,
        }
    }

    fn entry(&self, id: &str, state: TargetJournal) -> Entry {
        let process = Process::open(self.child.id()).unwrap();
        Entry {
            id: id.into(),
            vm_name: id.into(),
            resume: true,
            process: QemuProcess::of(&process).unwrap(),
            qmp: self.dir.path().join("no.qmp"),
            memory_bytes: 0,
            state,
            monitor: None,
            preempts: false,
        }
    }

    fn found(&self, state: TargetJournal) -> Arc<Incoming> {
        Incoming::found(self.entry("g/v", state), &self.context, Instant::now())
    }

    fn journal_of(&self, id: &str) -> std::path::PathBuf {
        let journal = self.dir.path().join("journal");
        journal.join(format!("{}.json", file_name(id)))
    }

    fn lives(&self) -> bool {
        Process::open(self.child.id()).is_ok_and(|process| process.is_alive())
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn tick(incoming: &Incoming, seconds: u64) {
    let now = Duration::from_secs(seconds);
    incoming.handle(TargetEvent::Tick { now });
}

fn request(id: &str) -> OpenMove {
    OpenMove {
        id: id.into(),
        vm_name: id.into(),
        vm: 0,
        argv: Vec::new(),
        resume: true,
        memory_bytes: 0,
        share: false,
        postcopy: false,
        preempt: false,
    }
}

#[test]
fn a_release_that_cannot_be_written_down_ends_the_qemu_and_does_not_start_it() {
    let bench = Bench::new();
    let incoming = bench.found(TargetJournal::Loaded);
    assert_eq!(incoming.answer(), MoveState::Loaded);
    std::fs::remove_dir_all(bench.dir.path().join("journal")).unwrap();
    incoming.handle(TargetEvent::Release);
    assert!(matches!(incoming.answer(), MoveState::NeverRan { .. }));
    assert!(!bench.lives());
}

#[test]
fn a_qemu_that_cannot_be_asked_is_neither_said_to_run_nor_to_be_lost_before_it_is_gone() {
    for state in [TargetJournal::Loaded, TargetJournal::Released] {
        let mut bench = Bench::new();
        let incoming = bench.found(state);
        incoming.handle(TargetEvent::Release);
        assert_eq!(incoming.answer(), MoveState::Loaded);
        tick(&incoming, 10);
        tick(&incoming, 20);
        assert_eq!(incoming.answer(), MoveState::Loaded);
        assert!(bench.lives());
        bench.kill();
        tick(&incoming, 30);
        tick(&incoming, 40);
        assert!(matches!(incoming.answer(), MoveState::Lost { .. }));
    }
}

#[test]
fn a_move_that_has_ended_keeps_no_way_into_its_qemu() {
    let bench = Bench::new();
    let incoming = bench.found(TargetJournal::Loaded);
    let (ours, mut qemu) = UnixStream::pair().unwrap();
    incoming.begin_feed(vec![ours]);
    incoming.handle(TargetEvent::Abort("cancelled".into()));
    qemu.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(qemu.read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn a_move_is_forgotten_with_the_last_that_is_known_of_it() {
    let mut bench = Bench::new();
    let reason = "x".to_owned();
    let journal = TargetJournal::NeverRan { reason };
    for id in ["g/old", "g/new"] {
        let entry = bench.entry(id, journal.clone());
        bench.context.journal.write(id, &entry).unwrap();
    }
    bench.kill();
    let long_ago = SystemTime::now() - TOMBSTONE_AGE - Duration::from_secs(60);
    let old = File::options().write(true).open(bench.journal_of("g/old"));
    old.unwrap().set_modified(long_ago).unwrap();
    let arrivals = Arrivals::start(bench.context.clone()).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while arrivals.query("g/old") != MoveState::Unknown {
        assert!(Instant::now() < deadline, "it stays for ever");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(matches!(
        arrivals.query("g/new"),
        MoveState::NeverRan { .. }
    ));
    assert!(!Path::exists(&bench.journal_of("g/old")));
}

#[test]
fn one_slow_move_does_not_keep_others_from_being_answered() {
    let bench = Bench::new();
    let entry = bench.entry("g/slow", TargetJournal::Loaded);
    bench.context.journal.write(&entry.id, &entry).unwrap();
    let arrivals = Arrivals::start(bench.context.clone()).unwrap();
    let slow = arrivals.found_move("g/slow").unwrap();
    let busy = lock(&slow.machine);
    let asks = Arc::clone(&arrivals);
    let all = std::thread::spawn(move || asks.under_way());
    std::thread::sleep(Duration::from_millis(200));
    let (says, hears) = mpsc::channel();
    let asks = Arc::clone(&arrivals);
    std::thread::spawn(move || says.send(asks.query("g/other")));
    assert_eq!(hears.recv_timeout(PATIENCE).unwrap(), MoveState::Unknown);
    drop(busy);
    assert_eq!(all.join().unwrap(), ["g/slow"]);
}

#[test]
fn a_move_that_is_taken_back_while_its_qemu_starts_is_not_forgotten_to_be() {
    let bench = Bench::new();
    let arrivals = Arrivals::start(bench.context.clone()).unwrap();
    assert_eq!(arrivals.abort("g/v", "early"), MoveState::Unknown);
    let starting = arrivals.reserve(&request("g/v")).unwrap();
    assert_eq!(starting.aborted(), None);
    assert_eq!(arrivals.abort("g/other", "cancelled"), MoveState::Unknown);
    assert_eq!(arrivals.abort("g/v", "cancelled"), MoveState::Loading);
    assert_eq!(starting.aborted().as_deref(), Some("cancelled"));
}

#[test]
fn real_a_qemu_that_no_move_takes_is_ended_and_forgotten() {
    let bench = Bench::new();
    std::fs::create_dir(&bench.context.log_dir).unwrap();
    let qmp = bench.dir.path().join("qmp");
    let qmp = format!("unix:{},server=on,wait=off", qmp.display());
    let argv = ["qemu-system-x86_64", "-machine", "none", "-qmp", &qmp];
    let argv = argv.map(str::to_owned).to_vec();
    let request = OpenMove {
        argv: [argv, vec!["-display".into(), "none".into()]].concat(),
        ..request("g/v")
    };
    let domain = page::ContentKey::new([1; 32]);
    let (fresh, entry, _) = Fresh::start(&request, &domain, &bench.context).unwrap();
    let written: Entry = bench.context.journal.read("g/v").unwrap();
    assert_eq!(written.process, entry.process);
    assert!(entry.process.is_alive());
    // As if the move could not be made.
    drop(fresh);
    assert!(!entry.process.is_alive());
    assert!(bench.context.journal.read::<Entry>("g/v").is_none());
}
