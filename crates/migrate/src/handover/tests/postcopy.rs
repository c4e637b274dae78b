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
    assert_eq!(actions, []);
    assert_eq!(
        machine.handle(SourceEvent::TargetLoaded),
        [SourceAction::CompleteSource]
    );
    assert_eq!(*machine.state(), SourceState::Following);
    let actions = machine.handle(SourceEvent::SourceCompleted);
    assert_eq!(actions.first(), Some(&SourceAction::QuitSource));
    // The stream is lost, and the target does not have everything: nobody may touch the source.
    let (mut machine, _) = running(MoveState::Following);
    let actions = machine.handle(SourceEvent::Failed("cut".into()));
    assert_eq!(actions, [SourceAction::Release]);
    assert_eq!(
        machine.handle(SourceEvent::Answer(MoveState::Following)),
        []
    );
    assert!(matches!(machine.state(), SourceState::NeedsPerson { .. }));
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
        [SourceAction::CompleteSource]
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
