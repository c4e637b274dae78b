//! However the lab ends, nothing of it stays on the machine.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use lab::session::Session;
use rustix::process::{Pid, Signal, kill_process};

/// Starts a run with stock QEMU.
fn start_lab(scenario: &str, settings: &[&str], out: &Path) -> Child {
    // Who runs the tests may have them outlive a terminal.
    let mut lab = Command::new("env");
    lab.args(["--default-signal=HUP", env!("CARGO_BIN_EXE_gangway-lab")]);
    lab.args(["run", scenario, "--set", "techniques=stock"]);
    for setting in settings {
        lab.args(["--set", setting]);
    }
    lab.arg("--out").arg(out);
    let lab = lab.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    lab.expect("the lab starts")
}

fn wait_for(what: &str, patience: Duration, come: impl Fn() -> bool) {
    let deadline = Instant::now() + patience;
    while !come() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Starts two runs, so that guests will be kept, and waits until they are being booted.
fn lab_with_booting_guests(out: &Path) -> Child {
    let child = start_lab("pair", &["repeats=2"], out);
    let console = format!("/tmp/gw{}/s1/vm1", child.id());
    let kept = format!("/tmp/gw{}-kept", child.id());
    wait_for("no guest was started", Duration::from_secs(40), || {
        Path::new(&console).exists() && Path::new(&kept).exists()
    });
    child
}

/// Settings of KSM that the lab changes.
fn ksm_settings() -> Vec<String> {
    let read = |name| std::fs::read_to_string(format!("/sys/kernel/mm/ksm/{name}"));
    ["run", "pages_to_scan", "sleep_millisecs"]
        .map(|name| read(name).expect("this kernel has KSM"))
        .to_vec()
}

/// Starts a run with a small guest and waits until KSM has been set to merge it.
fn lab_with_merging_guest(out: &Path) -> Child {
    let before = ksm_settings();
    let settings = ["hosts.vms_per_host=1", "vm.memory_mb=128", "settle_s=1"];
    let child = start_lab("slm-downtime", &settings, out);
    wait_for("KSM was not changed", Duration::from_secs(120), || {
        ksm_settings() != before
    });
    child
}

/// Names that carry the session of the process `pid`, and its QEMUs.
fn leftovers(pid: u32) -> Vec<String> {
    let prefix = format!("gw{pid}");
    let mut found = Vec::new();
    for dir in [
        "/run/netns",
        "/tmp",
        "/sys/fs/cgroup",
        "/sys/fs/cgroup/memory",
        "/sys/fs/cgroup/cpu",
    ] {
        let Ok(entries) = std::fs::read_dir(dir) else {
            continue;
        };
        let names = entries
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned());
        found.extend(
            names.filter(|name| *name == prefix || name.starts_with(&format!("{prefix}-"))),
        );
    }
    let in_our_directory = format!("/tmp/{prefix}/");
    for process in std::fs::read_dir("/proc")
        .expect("/proc is there")
        .flatten()
    {
        let command = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        if String::from_utf8_lossy(&command).contains(&in_our_directory) {
            found.push(process.file_name().to_string_lossy().into_owned());
        }
    }
    found
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).expect("it runs");
}

#[test]
fn real_interrupted_lab_removes_its_guests_and_networks() {
    let out = tempfile::tempdir().unwrap();
    let mut lab = lab_with_booting_guests(out.path());
    assert!(!leftovers(lab.id()).is_empty());
    signal(&lab, Signal::INT);
    assert_eq!(lab.wait().unwrap().code(), Some(130));
    assert_eq!(leftovers(lab.id()), Vec::<String>::new());
}

/// As when its terminal is closed: what it says goes nowhere.
#[test]
fn real_lab_whose_terminal_is_closed_removes_its_guests_and_networks() {
    let out = tempfile::tempdir().unwrap();
    let mut lab = lab_with_booting_guests(out.path());
    assert!(!leftovers(lab.id()).is_empty());
    signal(&lab, Signal::HUP);
    assert_eq!(lab.wait().unwrap().code(), Some(129));
    assert_eq!(leftovers(lab.id()), Vec::<String>::new());
}

#[test]
fn real_next_lab_removes_what_a_killed_one_left() {
    let out = tempfile::tempdir().unwrap();
    let mut lab = lab_with_booting_guests(out.path());
    signal(&lab, Signal::KILL);
    lab.wait().unwrap();
    assert!(!leftovers(lab.id()).is_empty());
    drop(Session::start().unwrap());
    assert_eq!(leftovers(lab.id()), Vec::<String>::new());
}

#[test]
fn real_interrupted_and_killed_labs_leave_ksm_as_they_found_it() {
    let out = tempfile::tempdir().unwrap();
    let found = ksm_settings();
    let mut interrupted = lab_with_merging_guest(out.path());
    signal(&interrupted, Signal::INT);
    assert_eq!(interrupted.wait().unwrap().code(), Some(130));
    assert_eq!(ksm_settings(), found);

    let mut killed = lab_with_merging_guest(out.path());
    signal(&killed, Signal::KILL);
    killed.wait().unwrap();
    assert_ne!(ksm_settings(), found);
    drop(Session::start().unwrap());
    assert_eq!(ksm_settings(), found);
}
