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
fn the_target_hears_that_a_move_is_off_only_when_the_source_runs() {
    let mut machine = machine_at(&[SourceEvent::TargetReady, SourceEvent::TargetLoaded]);
    assert_eq!(
        machine.handle(SourceEvent::Cancel),
        [SourceAction::BringBack]
    );
    let mut unsure = machine_at(&[
        SourceEvent::TargetReady,
        SourceEvent::TargetLoaded,
        SourceEvent::Cancel,
    ]);
    assert_eq!(unsure.handle(SourceEvent::SourceLost("busy".into())), []);
    assert_eq!(
        machine.handle(SourceEvent::SourceRuns),
        [
            SourceAction::AbortTarget("cancelled".into()),
            SourceAction::ForgetJournal
        ]
    );
}

#[test]
fn a_vm_whose_source_is_gone_is_saved_at_a_target_that_has_all_of_it() {
    let ended = |went_on| SourceEvent::SourceGone {
        reason: "killed".into(),
        went_on,
    };
    let gone = || ended(false);
    let failed = || SourceEvent::Failed("the source QEMU has ended".into());
    let mut steps = vec![
        SourceEvent::TargetReady,
        SourceEvent::TargetLoaded,
        SourceEvent::SourceCompleted,
    ];
    let mut machine = machine_at(&steps);
    machine.handle(failed());
    assert_eq!(machine.handle(gone()), [SourceAction::Release]);
    let mut given_up = machine_at(&steps);
    given_up.handle(failed());
    given_up.handle(gone());
    machine.handle(SourceEvent::Answer(MoveState::Running));
    assert_eq!(*machine.state(), SourceState::Moved);

    // Of one that may have gone on since, what is there is old: its disks have gone on, too.
    let mut resumed = machine_at(&steps);
    resumed.handle(failed());
    let mut uncompleted = machine_at(&steps[..2]);
    uncompleted.handle(failed());
    // If not all of it is there, it is nowhere.
    steps.truncate(1);
    let mut early = machine_at(&steps);
    early.handle(failed());
    let restarted = machine_at(&[SourceEvent::Restarted(SourceJournal::Completing)]);
    for (mut machine, went_on) in [
        (resumed, true),
        (uncompleted, false),
        (early, false),
        (restarted, false),
    ] {
        let actions = machine.handle(ended(went_on));
        assert!(
            matches!(
                actions[..],
                [SourceAction::AbortTarget(_), SourceAction::ForgetJournal]
            ),
            "{actions:?}"
        );
    }
    let never = MoveState::NeverRan {
        reason: "lease".into(),
    };
    given_up.handle(SourceEvent::Answer(never));
    assert_eq!(given_up.handle(gone()), [SourceAction::ForgetJournal]);
    let SourceState::NeedsPerson { plight, .. } = given_up.state() else {
        panic!("{:?}", given_up.state())
    };
    assert_eq!(*plight, Plight::Ended);
}

#[test]
fn a_vm_that_somebody_resumed_here_is_left_alone_and_a_person_asked() {
    let mut machine = machine_at(&[
        SourceEvent::Restarted(SourceJournal::Releasing),
        SourceEvent::Answer(MoveState::Running),
    ]);
    assert_eq!(*machine.state(), SourceState::Moved);
    let actions = machine.handle(SourceEvent::SourceRuns);
    assert_eq!(actions, [SourceAction::Journal(SourceJournal::Releasing)]);
    let plight = match machine.state() {
        SourceState::NeedsPerson { plight, .. } => *plight,
        state => panic!("{state:?}"),
    };
    assert_eq!(plight, Plight::Left);
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

/// A target machine that is about to write something down that it cannot write.
fn target_at(events: &[TargetEvent]) -> TargetMove {
    let mut machine = TargetMove::default();
    for event in events {
        machine.handle(event.clone());
    }
    machine
}

#[test]
fn a_target_that_cannot_write_down_that_it_lets_a_vm_go_ends_it_before_it_runs() {
    let (loaded, switched) = (TargetEvent::LoadReported, TargetEvent::SwitchReported);
    let before_it_runs: [&[TargetEvent]; 3] = [
        std::slice::from_ref(&loaded),
        &[loaded.clone(), TargetEvent::Release],
        &[switched.clone(), TargetEvent::Release],
    ];
    let full = TargetEvent::JournalFailed("full".into());
    for events in before_it_runs {
        let mut machine = target_at(events);
        let actions = machine.handle(full.clone());
        assert_eq!(actions.first(), Some(&TargetAction::Kill), "{events:?}");
        assert!(matches!(machine.answer(), Some(MoveState::NeverRan { .. })));
    }
    for (first, answer) in [
        (loaded, MoveState::Running),
        (switched, MoveState::Following),
    ] {
        let mut machine = target_at(&[first, TargetEvent::Release, TargetEvent::Continued]);
        assert_eq!(machine.handle(full.clone()), [], "it runs");
        assert_eq!(machine.answer(), Some(answer));
    }
}

#[test]
fn a_vm_that_runs_is_never_ended_by_an_agent_that_comes_back_and_that_it_runs_is_written_down() {
    use TargetJournal as J;
    for (journal, found, written) in [
        (J::Loading, FoundQemu::Running, J::RunsAhead),
        (J::Loading, FoundQemu::Complete, J::Runs),
        (J::Loaded, FoundQemu::Running, J::Runs),
        (J::Released, FoundQemu::Running, J::Runs),
        (J::Released, FoundQemu::Complete, J::Runs),
        (J::Following, FoundQemu::Complete, J::Runs),
        (J::RunsAhead, FoundQemu::Complete, J::Runs),
    ] {
        let mut machine = TargetMove::default();
        let actions = machine.handle(TargetEvent::Restarted(journal.clone(), found));
        assert_eq!(actions, [TargetAction::Journal(written)], "{journal:?}");
        assert!(matches!(
            machine.answer(),
            Some(MoveState::Running | MoveState::Following)
        ));
    }
}

#[test]
fn of_a_vm_that_was_let_go_and_cannot_be_asked_nothing_is_said_until_it_answers() {
    let at = |seconds| TargetEvent::Tick {
        now: Duration::from_secs(seconds),
    };
    let busy = || TargetEvent::Unreached("busy".into());
    let (loaded, release) = (TargetEvent::LoadReported, TargetEvent::Release);
    let restarted = TargetEvent::Restarted(TargetJournal::Released, FoundQemu::Unreachable);
    for events in [vec![loaded, release, busy()], vec![restarted]] {
        let mut machine = target_at(&events);
        assert_eq!(machine.answer(), None);
        assert_eq!(machine.handle(at(10)), []);
        assert_eq!(machine.handle(at(11)), [], "not at once again");
        assert_eq!(machine.handle(at(20)), [TargetAction::Continue]);
        // It may have obeyed the first time: it is not ended whatever it says.
        let refused = TargetEvent::ContinueRefused("locked".into());
        assert_eq!(machine.handle(refused), []);
        assert_eq!(machine.answer(), None);
        machine.handle(at(30));
        assert_eq!(machine.handle(at(40)), [TargetAction::Continue]);
        let actions = machine.handle(TargetEvent::Continued);
        assert_eq!(actions, [TargetAction::Journal(TargetJournal::Runs)]);
        assert_eq!(machine.answer(), Some(MoveState::Running));
    }
}
