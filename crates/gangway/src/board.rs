//! What is known about the moves of a group while it is watched: the state behind every display.

use std::collections::BTreeMap;

use agent::types::{GroupEvent, GroupMove, GroupStatus, Happening, Phase, Progress};

/// The group.
#[derive(Debug)]
pub(crate) struct Board {
    /// Its moves, in the plan's order.
    pub(crate) rows: Vec<Row>,
    by_id: BTreeMap<String, usize>,
    eta: Eta,
}

/// One move.
#[derive(Debug)]
pub(crate) struct Row {
    /// Name of the VM.
    pub(crate) vm: String,
    /// Where it stands.
    pub(crate) phase: Phase,
    /// How far it is.
    pub(crate) progress: Progress,
    eta: Eta,
}

/// When a move, or a group, is done; as it may be shown.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Outlook {
    /// Nothing can be said yet, or nothing needs to be.
    Unknown,
    /// Seconds to go.
    Seconds(f64),
    /// The guest dirties memory faster than the link carries it; bytes per second.
    NotConverging {
        /// Speed at which the guest dirties memory.
        dirty: u64,
        /// Speed at which its memory crosses.
        link: u64,
    },
}

/// Samples without an estimate until what is shown is withdrawn: two seconds of them. In a single one
/// the stream may have stood still.
const MISSED_MAX: u8 = 4;

/// Seconds to go, that never grow.
///
/// An estimate above the one on display does not replace it: the display stands still until the
/// estimates come down to it again. When a move stops converging, that is said instead, and nothing is
/// shown again before the estimates are below what was shown last.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Eta {
    shown: Option<f64>,
    /// What was shown last.
    least: Option<f64>,
    missed: u8,
}

impl Eta {
    /// Takes a new sample, with its estimate if it has one.
    pub(crate) fn update(&mut self, estimate: Option<f64>) {
        let estimate = estimate.filter(|seconds| seconds.is_finite() && *seconds >= 0.0);
        let Some(estimate) = estimate else {
            self.missed = self.missed.saturating_add(1);
            if self.missed > MISSED_MAX {
                self.withdraw();
            }
            return;
        };
        self.missed = 0;
        if self.least.is_none_or(|least| estimate <= least) {
            self.least = Some(estimate);
            self.shown = self.least;
        }
    }

    /// There is nothing to estimate.
    pub(crate) fn withdraw(&mut self) {
        self.shown = None;
    }

    /// What may be shown.
    pub(crate) fn shown(&self) -> Option<f64> {
        self.shown
    }
}

impl Board {
    pub(crate) fn new(status: &GroupStatus) -> Self {
        let rows: Vec<_> = status.moves.iter().map(Row::new).collect();
        let ids = status.moves.iter().enumerate();
        let by_id = ids.map(|(at, one)| (one.status.id.clone(), at)).collect();
        Self {
            rows,
            by_id,
            eta: Eta::default(),
        }
    }

    /// Takes over an event.
    pub(crate) fn apply(&mut self, event: &GroupEvent) {
        let GroupEvent::Move(event) = event else {
            return;
        };
        let Some(row) = self
            .by_id
            .get(&event.id)
            .and_then(|&at| self.rows.get_mut(at))
        else {
            return;
        };
        match &event.what {
            Happening::Phase { phase, .. } => row.phase = *phase,
            Happening::Progress { progress } => row.progress = *progress,
            Happening::Note { .. } => {}
        }
        if !row.is_estimated() {
            row.eta.withdraw();
        } else if matches!(event.what, Happening::Progress { .. }) {
            row.eta.update(row.progress.eta_s);
        }
        match self.slowest() {
            Some(seconds) => self.eta.update(Some(seconds)),
            None => self.eta.withdraw(),
        }
    }

    /// The group's outlook: its slowest move's, once every move has one.
    pub(crate) fn outlook(&self) -> Outlook {
        self.eta.shown().map_or(Outlook::Unknown, Outlook::Seconds)
    }

    /// All moves together.
    pub(crate) fn total(&self) -> Progress {
        self.rows
            .iter()
            .fold(Progress::default(), |mut total, row| {
                let progress = &row.progress;
                total.stream_bytes += progress.stream_bytes;
                total.wire_bytes += progress.wire_bytes;
                if !row.phase.is_final() {
                    total.remaining_bytes += progress.remaining_bytes;
                    total.wire_bytes_per_s += progress.wire_bytes_per_s;
                }
                total
            })
    }

    /// Number of moves that have ended.
    pub(crate) fn ended(&self) -> usize {
        self.rows.iter().filter(|row| row.phase.is_final()).count()
    }

    fn slowest(&self) -> Option<f64> {
        let unfinished = self.rows.iter().filter(|row| !row.phase.is_final());
        let mut slowest = None;
        for row in unfinished {
            let seconds = row.eta.shown()?;
            slowest = Some(slowest.map_or(seconds, |slowest: f64| slowest.max(seconds)));
        }
        slowest
    }
}

impl Row {
    fn new(one: &GroupMove) -> Self {
        let status = &one.status;
        let mut row = Self {
            vm: status.vm.clone(),
            phase: status.phase,
            progress: status.progress,
            eta: Eta::default(),
        };
        if row.is_estimated() {
            row.eta.update(row.progress.eta_s);
        }
        row
    }

    pub(crate) fn outlook(&self) -> Outlook {
        let Progress {
            round,
            dirty_bytes_per_s: dirty,
            stream_bytes_per_s: link,
            ..
        } = self.progress;
        match self.eta.shown() {
            Some(seconds) => Outlook::Seconds(seconds),
            // QEMU knows the dirty rate from the second round on.
            None if self.phase == Phase::Bulk && round > 1 && link > 0 && dirty >= link => {
                Outlook::NotConverging { dirty, link }
            }
            None => Outlook::Unknown,
        }
    }

    /// Before its memory moves and after its end there is nothing to estimate.
    fn is_estimated(&self) -> bool {
        self.phase == Phase::Bulk || self.phase == Phase::SwitchOver
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use agent::types::{MoveEvent, MoveStatus};

    fn group(vms: &[&str]) -> GroupStatus {
        let one = |vm: &&str| GroupMove {
            status: MoveStatus {
                id: format!("g/{vm}"),
                group: "g".to_owned(),
                vm: (*vm).to_owned(),
                target: "b".to_owned(),
                phase: Phase::Bulk,
                message: String::new(),
                note: None,
                progress: Progress::default(),
            },
            source: "a".to_owned(),
            reachable: true,
            elapsed_s: 0.0,
        };
        let moves = vms.iter().map(one).collect();
        GroupStatus {
            group: "g".to_owned(),
            accepted_unix_ms: 0.0,
            finished: false,
            moves,
        }
    }

    fn event(vm: &str, what: Happening) -> GroupEvent {
        let (id, vm) = (format!("g/{vm}"), vm.to_owned());
        GroupEvent::Move(MoveEvent {
            seq: 0,
            at_unix_ms: 0.0,
            id,
            vm,
            what,
        })
    }

    fn progress(vm: &str, eta_s: Option<f64>) -> GroupEvent {
        event(
            vm,
            Happening::Progress {
                progress: Progress {
                    eta_s,
                    ..Progress::default()
                },
            },
        )
    }

    fn seconds(outlook: Outlook) -> Option<f64> {
        match outlook {
            Outlook::Seconds(seconds) => Some(seconds),
            _ => None,
        }
    }

    proptest! {
        #[test]
        fn an_eta_on_display_never_grows(
            events in prop::collection::vec((0..3_usize, prop::option::of(-1.0..1e6_f64)), 0..200)
        ) {
            let vms = ["x", "y", "z"];
            let mut board = Board::new(&group(&vms));
            let (mut rows, mut total) = ([None; 3], None);
            for (vm, eta) in events {
                board.apply(&progress(vms[vm], eta));
                let row = seconds(board.rows[vm].outlook());
                if let (Some(before), Some(now)) = (rows[vm], row) {
                    prop_assert!(now <= before);
                }
                // What was shown before it was withdrawn counts, too.
                rows[vm] = row.or(rows[vm]);
                let now_total = seconds(board.outlook());
                if let (Some(before), Some(now)) = (total, now_total) {
                    prop_assert!(now <= before);
                }
                total = now_total.or(total);
            }
        }

        #[test]
        fn an_eta_follows_estimates_that_fall(mut estimates in prop::collection::vec(0.0..1e6_f64, 1..50)) {
            estimates.sort_by(|a, b| b.total_cmp(a));
            let mut eta = Eta::default();
            for estimate in estimates {
                eta.update(Some(estimate));
                prop_assert_eq!(eta.shown(), Some(estimate));
            }
        }
    }

    #[test]
    fn an_eta_outlives_samples_in_which_the_stream_stood_still_but_not_many() {
        let mut board = Board::new(&group(&["x"]));
        board.apply(&progress("x", Some(5.0)));
        for _ in 0..MISSED_MAX {
            board.apply(&progress("x", None));
            assert_eq!(board.rows[0].outlook(), Outlook::Seconds(5.0));
            assert_eq!(board.outlook(), Outlook::Seconds(5.0));
        }
        board.apply(&progress("x", None));
        assert_eq!(board.rows[0].outlook(), Outlook::Unknown);
        board.apply(&progress("x", Some(8.0)));
        assert_eq!(board.rows[0].outlook(), Outlook::Unknown, "it would grow");
        board.apply(&progress("x", Some(4.0)));
        assert_eq!(board.rows[0].outlook(), Outlook::Seconds(4.0));
    }

    #[test]
    fn a_move_that_does_not_converge_says_so_with_both_rates() {
        let mut board = Board::new(&group(&["x"]));
        let stuck = Progress {
            round: 3,
            dirty_bytes_per_s: 30_000_000,
            stream_bytes_per_s: 11_000_000,
            ..Progress::default()
        };
        board.apply(&event("x", Happening::Progress { progress: stuck }));
        let expected = Outlook::NotConverging {
            dirty: 30_000_000,
            link: 11_000_000,
        };
        assert_eq!(board.rows[0].outlook(), expected);
    }

    #[test]
    fn the_group_has_an_outlook_once_every_unfinished_move_has_one() {
        let mut board = Board::new(&group(&["x", "y"]));
        board.apply(&progress("x", Some(5.0)));
        assert_eq!(board.outlook(), Outlook::Unknown);
        board.apply(&progress("y", Some(9.0)));
        assert_eq!(board.outlook(), Outlook::Seconds(9.0));
        let message = String::new();
        board.apply(&event(
            "y",
            Happening::Phase {
                phase: Phase::Moved,
                message,
            },
        ));
        assert_eq!((board.ended(), board.outlook()), (1, Outlook::Seconds(5.0)));
    }
}
