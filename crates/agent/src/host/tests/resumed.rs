//! A journal's entry that is older than what people have done with the VM.

use serde_json::{Value, json};

use crate::journal::QemuProcess;

use super::*;

/// Moves a VM; leaves it at the target, with its source's entry as it was after the release.
fn moved_with_its_entry(agents: &Agents, vm: &Vm) -> Value {
    let (sink, receiver) = events();
    let settings = Preset::Oc.settings();
    agents
        .source
        .start(agents.spec(vm, settings), sink)
        .unwrap();
    wait_for(&receiver, Phase::Held);
    let mut entry: Value = agents.source.context.journal.read("g/v").unwrap();
    entry["state"] = "releasing".into();
    agents.source.resume_held("g/v").unwrap();
    wait_for(&receiver, Phase::Moved);
    entry
}

/// Recovers the move by this entry; the phase that it ends in, and what people are told.
fn recovered(agents: &Agents, entry: &Value) -> (Phase, String) {
    agents.source.context.journal.write("g/v", entry).unwrap();
    let (sink, receiver) = events();
    agents.source.recover("g/v", sink).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match receiver.recv_timeout(left).expect("an end") {
            Happening::Phase { phase, message } if phase.is_final() => return (phase, message),
            _ => {}
        }
    }
}

#[test]
fn real_a_vm_that_runs_here_again_is_not_ended_by_a_recovery_of_its_move_away() {
    let agents = agents();
    let data = test_data(agents.dir.path(), 15);
    let first = vm(agents.dir.path(), "v", &data, &[]);
    let mut entry = moved_with_its_entry(&agents, &first);
    let _ = std::fs::remove_file(&first.qmp);
    let mut again = vm(agents.dir.path(), "v", &data, &[]);

    // Another QEMU at the same path is not the one that moved, which has ended.
    let (phase, message) = recovered(&agents, &entry);
    assert_eq!(phase, Phase::Moved, "{message}");
    assert!(again.child.try_wait().unwrap().is_none(), "it was ended");

    // As if it were the same one, and somebody had resumed it.
    let process = sys::Process::open(again.child.id()).unwrap();
    entry["process"] = json!(QemuProcess::of(&process).unwrap());
    for _ in 0..2 {
        let (phase, message) = recovered(&agents, &entry);
        assert_eq!(phase, Phase::NeedsPerson, "{message}");
        assert!(message.contains("somebody has resumed it"), "{message}");
        assert!(message.contains("`gangway recover g --vm v`"), "{message}");
        assert!(again.child.try_wait().unwrap().is_none(), "it was ended");
        let kept: Option<Value> = agents.source.context.journal.read("g/v");
        assert!(kept.is_some(), "it can be recovered again");
    }
}
