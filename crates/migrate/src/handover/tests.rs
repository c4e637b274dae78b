//! The machines of both ends, one by one; and [`world`], in which everything fails.

use std::time::Duration;

use wire::MoveState;

use super::target::LEASE;
use super::*;

mod postcopy;
mod world;

fn machine_at(events: &[SourceEvent]) -> SourceMove {
    let mut machine = SourceMove::default();
    for event in events {
        machine.handle(event.clone());
    }
    machine
}

#[test]
fn a_failure_before_the_release_brings_the_source_back() {
    let steps = [
        SourceEvent::TargetReady,
        SourceEvent::TargetLoaded,
        SourceEvent::SourceCompleted,
    ];
    for done in 0..=steps.len() {
        for failure in [SourceEvent::Failed("x".into()), SourceEvent::Cancel] {
            let mut machine = machine_at(&steps[..done]);
            let actions = machine.handle(failure);
            assert_eq!(
                actions.first(),
                Some(&SourceAction::BringBack),
                "after {done} steps"
            );
            assert!(!actions.iter().any(|a| matches!(a, SourceAction::Release)));
            machine.handle(SourceEvent::SourceRuns);
            assert!(matches!(machine.state(), SourceState::Stayed { .. }));
        }
    }
}

#[test]
fn after_the_release_nothing_but_the_targets_word_brings_the_source_back() {
    let released = [
        SourceEvent::TargetReady,
        SourceEvent::TargetLoaded,
        SourceEvent::SourceCompleted,
        SourceEvent::Confirmed,
    ];
    for event in [SourceEvent::Cancel, SourceEvent::Failed("link".into())] {
        let mut machine = machine_at(&released);
        assert_eq!(machine.handle(event), []);
    }
    let mut machine = machine_at(&released);
    let never = MoveState::NeverRan {
        reason: "killed".into(),
    };
    assert_eq!(
        machine.handle(SourceEvent::Answer(never)),
        [SourceAction::BringBack]
    );
}

#[test]
fn a_release_that_is_never_answered_ends_with_a_person_and_a_journal() {
    let mut machine = machine_at(&[
        SourceEvent::TargetReady,
        SourceEvent::TargetLoaded,
        SourceEvent::SourceCompleted,
        SourceEvent::Confirmed,
    ]);
    for second in 1..=61 {
        let now = Duration::from_secs(second);
        let actions = machine.handle(SourceEvent::NoAnswer {
            reason: "cut".into(),
            now,
        });
        assert!(!actions.contains(&SourceAction::ForgetJournal));
        assert!(!actions.contains(&SourceAction::BringBack));
    }
    assert!(matches!(machine.state(), SourceState::NeedsPerson { .. }));
}

#[test]
fn a_loaded_vm_that_nobody_releases_goes_after_its_lease() {
    let mut machine = TargetMove::default();
    machine.handle(TargetEvent::LoadReported);
    let lost = Duration::from_secs(10);
    machine.handle(TargetEvent::SessionLost { now: lost });
    assert_eq!(machine.handle(TargetEvent::Tick { now: lost + LEASE }), []);
    let actions = machine.handle(TargetEvent::Tick {
        now: lost + LEASE + Duration::from_secs(1),
    });
    assert_eq!(actions.first(), Some(&TargetAction::Kill));
    // A release that comes too late changes nothing.
    assert_eq!(machine.handle(TargetEvent::Release), []);
    assert!(matches!(machine.answer(), Some(MoveState::NeverRan { .. })));
}
