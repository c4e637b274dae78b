//! However the lab ends, nothing of it stays on the machine.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use lab::session::Session;
use rustix::process::{Pid, Signal, kill_process};

/// Starts a run and waits until its guests are being booted.
fn lab_with_booting_guests(out: &Path) -> Child {
    let child = Command::new(env!("CARGO_BIN_EXE_gangway-lab"))
        .args(["run", "pair", "--set", "techniques=stock", "--out"])
        .arg(out)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the lab starts");
    let console = format!("/tmp/gw{}/s1/vm1", child.id());
    let deadline = Instant::now() + Duration::from_secs(40);
    while !Path::new(&console).exists() {
        assert!(Instant::now() < deadline, "no guest was started");
        std::thread::sleep(Duration::from_millis(20));
    }
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
