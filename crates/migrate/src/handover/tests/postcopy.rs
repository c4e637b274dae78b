//! What is different when a VM goes before its memory.

use super::*;

#[test]
fn a_vm_in_post_copy_is_moved_only_when_its_memory_is_there() {
    let running = |answer| {
        let mut machine = machine_at(&[
            SourceEvent::TargetReady,
            SourceEvent::SourceHeld,
            SourceEvent::TargetSwitched,
        ]);
        assert_eq!(*machine.state(), SourceState::Committed);
        machine.handle(SourceEvent::Confirmed);
        let actions = machine.handle(SourceEvent::Answer(answer));
        (machine, actions)
    };
    let (mut machine, actions) = running(MoveState::Following);
    assert_eq!(actions, [SourceAction::Journal(SourceJournal::Following)]);
    assert_eq!(
        machine.handle(SourceEvent::TargetLoaded),
        [SourceAction::CompleteSource]
    );
    assert_eq!(*machine.state(), SourceState::Following);
    let actions = machine.handle(SourceEvent::SourceCompleted);
    assert_eq!(actions.first(), Some(&SourceAction::QuitSource));
}

/// A move whose VM runs at the target, before its memory is there.
fn following() -> SourceMove {
    machine_at(&following_events())
}

fn following_events() -> [SourceEvent; 5] {
    [
        SourceEvent::TargetReady,
        SourceEvent::SourceHeld,
        SourceEvent::TargetSwitched,
        SourceEvent::Confirmed,
        SourceEvent::Answer(MoveState::Following),
    ]
}

fn pause_of(actions: &[SourceAction]) -> Duration {
    match actions {
        [SourceAction::Resume { pause }, ..] => *pause,
        other => panic!("{other:?} does not resume"),
    }
}

#[test]
fn an_interrupted_post_copy_is_resumed_and_nothing_else_is_done_to_its_source() {
    let mut machine = following();
    let actions = machine.handle(SourceEvent::Failed("cut".into()));
    assert_eq!(actions.len(), 1);
    let mut before = pause_of(&actions);
    for second in 1..=600 {
        let (reason, now) = ("cut".to_owned(), Duration::from_secs(second));
        let actions = machine.handle(SourceEvent::NotResumed { reason, now });
        let pause = pause_of(&actions);
        assert!(pause >= before && pause <= Duration::from_secs(8));
        before = pause;
        assert_eq!(machine.handle(SourceEvent::Cancel), []);
    }
    assert_eq!(machine.handle(SourceEvent::Resumed), []);
    assert_eq!(*machine.state(), SourceState::Following);
    // It is as good as before, and can be lost again.
    let actions = machine.handle(SourceEvent::Failed("cut".into()));
    assert_eq!(actions.len(), 1);
    machine.handle(SourceEvent::Resumed);
    assert_eq!(
        machine.handle(SourceEvent::TargetLoaded),
        [SourceAction::CompleteSource]
    );
    let actions = machine.handle(SourceEvent::SourceCompleted);
    assert_eq!(actions.first(), Some(&SourceAction::QuitSource));
}

#[test]
fn a_post_copy_that_cannot_be_resumed_in_time_needs_a_person_and_keeps_its_source() {
    assert_eq!(RESUME_PATIENCE, Duration::from_secs(600));
    gives_up_after(following(), 600);
    let mut machine = SourceMove::with_patience(Duration::from_secs(20));
    for event in following_events() {
        machine.handle(event);
    }
    gives_up_after(machine, 20);
}

fn gives_up_after(mut machine: SourceMove, seconds: u64) {
    machine.handle(SourceEvent::Failed("cut".into()));
    let mut at = |second| {
        let (reason, now) = ("cut".to_owned(), Duration::from_secs(second));
        let actions = machine.handle(SourceEvent::NotResumed { reason, now });
        (actions, machine.state().clone())
    };
    at(100);
    assert_eq!(at(99 + seconds).0.len(), 1);
    let (actions, state) = at(100 + seconds);
    assert_eq!(actions, []);
    let SourceState::NeedsPerson { plight, reason } = state else {
        panic!("{state:?}")
    };
    assert_eq!(plight, Plight::Halved);
    assert!(reason.contains(&format!("{seconds} s")), "{reason}");
}

#[test]
fn a_vm_that_went_on_at_its_target_is_never_brought_back_whatever_the_target_says_later() {
    let mut machine = following();
    machine.handle(SourceEvent::Failed("cut".into()));
    let reason = "a wrong answer".to_owned();
    let actions = machine.handle(SourceEvent::Answer(MoveState::NeverRan { reason }));
    assert_eq!(actions, []);
    let state = machine.state();
    assert!(
        matches!(
            state,
            SourceState::NeedsPerson {
                plight: Plight::Unknown,
                ..
            }
        ),
        "{state:?}"
    );
}

#[test]
fn an_agent_that_comes_back_resumes_what_it_left_following() {
    let mut machine = SourceMove::default();
    let actions = machine.handle(SourceEvent::Restarted(SourceJournal::Following));
    pause_of(&actions);
    // Without the newer entry it asks first.
    let mut machine = SourceMove::default();
    let actions = machine.handle(SourceEvent::Restarted(SourceJournal::Releasing));
    assert_eq!(actions, [SourceAction::Release]);
    let actions = machine.handle(SourceEvent::Answer(MoveState::Following));
    pause_of(&actions);
    let written = SourceAction::Journal(SourceJournal::Following);
    assert_eq!(actions.last(), Some(&written));
    let full = SourceEvent::JournalFailed("full".into());
    assert_eq!(machine.handle(full), []);
    assert!(matches!(machine.state(), SourceState::Recovering { .. }));
}

#[test]
fn a_target_that_has_everything_ends_a_recovery_and_a_qemu_that_is_gone_ends_the_vm() {
    let recovering = || {
        let mut machine = following();
        machine.handle(SourceEvent::Failed("cut".into()));
        machine
    };
    let mut machine = recovering();
    let actions = machine.handle(SourceEvent::Answer(MoveState::Running));
    assert_eq!(actions.first(), Some(&SourceAction::QuitSource));
    let mut machine = recovering();
    let actions = machine.handle(SourceEvent::SourceCompleted);
    assert_eq!(actions.first(), Some(&SourceAction::QuitSource));

    let mut target = TargetMove::default();
    target.handle(TargetEvent::SwitchReported);
    target.handle(TargetEvent::Release);
    target.handle(TargetEvent::Continued);
    assert_eq!(target.answer(), Some(MoveState::Following));
    assert_eq!(target.handle(TargetEvent::QemuGone("killed".into())), []);
    let lost = SourceEvent::Answer(target.answer().unwrap());
    for gone in [lost, SourceEvent::SourceLost("killed".into())] {
        let mut machine = recovering();
        assert_eq!(machine.handle(gone), []);
        let SourceState::NeedsPerson { plight, .. } = machine.state() else {
            panic!("{machine:?}")
        };
        assert_eq!(*plight, Plight::Killed);
    }
}

#[test]
fn a_switch_of_a_guest_that_was_not_stopped_by_hand_is_undone() {
    let mut machine = machine_at(&[SourceEvent::TargetReady]);
    let actions = machine.handle(SourceEvent::TargetSwitched);
    assert_eq!(actions.first(), Some(&SourceAction::BringBack));
}

#[test]
fn a_vm_that_was_switched_and_not_let_go_goes_with_its_source() {
    let mut machine = TargetMove::default();
    machine.handle(TargetEvent::SwitchReported);
    assert_eq!(machine.answer(), Some(MoveState::Loaded));
    let now = Duration::from_secs(1);
    let actions = machine.handle(TargetEvent::SessionLost { now });
    assert_eq!(actions.first(), Some(&TargetAction::Kill));
    assert_eq!(machine.handle(TargetEvent::Release), []);
}

#[test]
fn a_vm_that_converges_while_it_is_told_to_go_over_is_moved_as_in_pre_copy() {
    let held = [SourceEvent::TargetReady, SourceEvent::SourceHeld];
    let mut machine = machine_at(&held);
    assert_eq!(
        machine.handle(SourceEvent::TargetLoaded),
        [
            SourceAction::Journal(SourceJournal::Completing),
            SourceAction::CompleteSource
        ]
    );
    assert_eq!(
        machine.handle(SourceEvent::SourceCompleted),
        [SourceAction::AwaitConfirmation]
    );
    machine.handle(SourceEvent::Confirmed);
    let actions = machine.handle(SourceEvent::Answer(MoveState::Running));
    assert_eq!(actions.first(), Some(&SourceAction::QuitSource));

    // Up to the release it goes back, as ever.
    let mut machine = machine_at(&held);
    machine.handle(SourceEvent::TargetLoaded);
    let actions = machine.handle(SourceEvent::Failed("cut".into()));
    assert_eq!(actions.first(), Some(&SourceAction::BringBack));
    assert!(!actions.contains(&SourceAction::Release));
}
