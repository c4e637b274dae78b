//! Real VMs that write, and give memory back, while the rest of it follows them.
//!
//! Needs the `gangway` binary and the mapping library of the same target directory (`make test` builds
//! them first).

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use lab::frozen::Checked;
use lab::results::Run;
use lab::run;
use lab::scenario::Scenario;
use lab::touch::TouchLatency;

fn run_of(name: &str, settings: &[&str]) -> Run {
    let settings: Vec<String> = settings.iter().map(|&setting| setting.to_owned()).collect();
    let scenario = Scenario::load(name, &settings, false).expect("the scenario is valid");
    let out = tempfile::tempdir().expect("a directory for results");
    let mut results = run::scenario(name, &scenario, out.path()).expect("the lab works");
    let run = results.runs.pop().expect("one run");
    assert_eq!(run.failure, None);
    assert_eq!(run.vms_lost, Some(0));
    assert_eq!(run.stamp_errors, Some(0));
    assert_eq!(run.mismatched_pages, Some(0));
    run
}

fn checked(run: &Run) -> Checked {
    let checked = run.application["stamps_checked"].clone();
    serde_json::from_value(checked).expect("pages were compared")
}

#[test]
fn real_vms_that_write_while_their_memory_follows_them_have_every_page_right() {
    let run = run_of(
        "postcopy-stress",
        &[
            "techniques=full+postcopy",
            "hosts.vms_per_host=2",
            "vm.memory_mb=160",
            "vm.dirty_mb=16",
            "vm.touch_mb=8",
        ],
    );
    let checked = checked(&run);
    assert_eq!(checked.wrong, 0);
    // Half of what is written at random is left alone, and so is what is touched.
    assert!(checked.same > 2 * (8 + 8) * 256 - 8, "{checked:?}");
    assert!(checked.written_since > 1000, "{checked:?}");
    let touches = TouchLatency::of_run(&run).expect("the guests touch pages");
    assert!(touches.touches > 0, "{touches:?}");
}

#[test]
fn real_vms_that_give_shared_memory_back_and_take_it_again_see_nothing_stale() {
    let run = run_of(
        "postcopy-balloon",
        &[
            "techniques=slm+postcopy",
            "after.write_shared=false",
            "links.edge_mbit=100",
            "balloon.after=1",
            "settle_s=1",
        ],
    );
    assert!(
        run.pages.unwrap().mapped.unwrap() > 10_000,
        "{:?}",
        run.pages
    );
    assert_eq!(checked(&run).wrong, 0);
    let balloons = run.application["balloons"].as_array().expect("balloons");
    assert_eq!(balloons.len(), 2);
    for balloon in balloons {
        assert_eq!(balloon["blown_up_after"], 1, "{balloon}");
        let before = balloon["blown_up_before_all_was_there"].as_u64();
        assert!(before > Some(0), "{balloon}");
    }
}

/// Whether a QEMU of this process's racks has a thread of that name.
fn has_thread(name: &str) -> bool {
    let ours = format!("/gw{}/", std::process::id());
    let read = |path| fs::read(path).unwrap_or_default();
    let processes = fs::read_dir("/proc").expect("processes").flatten();
    let mut processes = processes
        .map(|entry| entry.path())
        .filter(|process| String::from_utf8_lossy(&read(process.join("cmdline"))).contains(&ours));
    processes.any(|process| {
        let threads = fs::read_dir(process.join("task")).into_iter().flatten();
        let mut names = threads
            .flatten()
            .map(|thread| read(thread.path().join("comm")));
        names.any(|found| found.trim_ascii_end() == name.as_bytes())
    })
}

/// Looks for the thread that a target QEMU from 8.0 on has for its second channel, until it is seen or this is over.
struct Look<'a>(&'a AtomicBool);

impl Look<'_> {
    fn look(is_over: &AtomicBool) -> bool {
        while !is_over.load(Ordering::Relaxed) {
            if has_thread("mig/dst/preempt") {
                return true;
            }
            thread::sleep(Duration::from_millis(20));
        }
        false
    }
}

impl Drop for Look<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn real_pages_that_were_asked_for_come_on_a_channel_of_their_own_and_every_page_is_right() {
    let is_over = AtomicBool::new(false);
    let (run, is_seen) = thread::scope(|scope| {
        let look = scope.spawn(|| Look::look(&is_over));
        let over = Look(&is_over);
        let settings = [
            "techniques=gang+preempt+postcopy",
            "hosts.vms_per_host=1",
            "vm.memory_mb=160",
            "vm.dirty_mb=16",
            "vm.touch_mb=8",
            "links.edge_mbit=100",
        ];
        let run = run_of("postcopy-stress", &settings);
        drop(over);
        (run, look.join().expect("the watcher"))
    });
    assert!(is_seen);
    assert_eq!(checked(&run).wrong, 0);
    let touches = TouchLatency::of_run(&run).expect("the guests touch pages");
    assert!(touches.touches > 0, "{touches:?}");
}
