//! Every fault at every instant, and what each must come to.

use std::collections::BTreeMap;

use anyhow::{bail, ensure};
use serde::Deserialize;

use crate::fault::{Action, Fault, Moment, Victim, first_vm};

/// Time between the beginning of a phase and the fault, if the scenario says nothing else: so that the phase
/// is well under way. An agent that is held at an instant needs none.
const INTO_A_PHASE_S: f64 = 0.5;

fn into_a_phase_s() -> f64 {
    INTO_A_PHASE_S
}

/// The faults of a scenario, each of which is tried by itself at each instant that it names.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Matrix {
    /// When faults strike, by name.
    pub instants: BTreeMap<String, Moment>,
    /// What strikes.
    pub faults: Vec<Row>,
    /// Seconds between the beginning of a phase and the fault.
    #[serde(default = "into_a_phase_s")]
    pub into_phase_s: f64,
    /// The cells to be run: `FAULT`, `INSTANT` or `FAULT@INSTANT`; all if absent.
    #[serde(default)]
    pub only: Vec<String>,
}

/// One fault.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// Its name.
    pub name: String,
    /// What happens.
    pub action: Action,
    /// To whom.
    pub on: Victim,
    /// As [`Fault::for_s`].
    #[serde(default)]
    pub for_s: Option<f64>,
    /// What it must come to, by the names of instants.
    pub expect: BTreeMap<String, Expect>,
}

/// What a migration that a fault strikes must come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Expect {
    /// The VM runs at its target, exit code 0.
    Moved,
    /// It runs at its source, exit code 1.
    Stayed,
    /// One of these two.
    Either,
    /// It waits for a person, exit code 4.
    Person,
    /// The VMs of its target host run at their sources, all others at their targets; exit code 1.
    TargetStays,
}

/// Which VMs of the group are heard from their targets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrived {
    /// All of them.
    All,
    /// None.
    None,
    /// All but those of the struck VM's target host.
    OfOtherTargets,
    /// Others.
    Some,
}

/// What came of a migration that a fault struck.
#[derive(Clone, Copy, Debug)]
pub struct Seen<'a> {
    /// Exit code of the command that asked for it; absent if a signal ended it.
    pub exit_code: Option<i32>,
    /// Which VMs have arrived.
    pub arrived: Arrived,
    /// What the person was told.
    pub message: Option<&'a str>,
}

impl Matrix {
    /// The chosen faults with their names, `FAULT@INSTANT`, instant by instant.
    pub fn cells(&self) -> anyhow::Result<Vec<(String, Fault)>> {
        let mut used = vec![false; self.only.len()];
        let mut cells = Vec::new();
        for row in &self.faults {
            for (instant, expect) in &row.expect {
                let Some(at) = self.instants.get(instant) else {
                    bail!(
                        "fault {} is to strike at `{instant}`, which is no instant",
                        row.name
                    );
                };
                let name = format!("{}@{instant}", row.name);
                if self.is_chosen([&name, &row.name, instant], &mut used) {
                    cells.push((name, row.at(at, self.into_phase_s, *expect)));
                }
            }
        }
        if let Some(unused) = used.iter().position(|used| !used) {
            bail!("matrix.only: no fault is `{}`", self.only[unused]);
        }
        ensure!(!cells.is_empty(), "a matrix needs a fault");
        Ok(cells)
    }

    fn is_chosen(&self, names: [&str; 3], used: &mut [bool]) -> bool {
        let mut chosen = self.only.is_empty();
        for (wanted, used) in self.only.iter().zip(used) {
            if names.contains(&wanted.as_str()) {
                (chosen, *used) = (true, true);
            }
        }
        chosen
    }
}

impl Row {
    fn at(&self, at: &Moment, into_phase_s: f64, expect: Expect) -> Fault {
        let is_phase = matches!(at, Moment::Phase(_));
        Fault {
            vm: first_vm(),
            at: at.clone(),
            after_s: if is_phase { into_phase_s } else { 0.0 },
            action: self.action,
            on: self.on,
            for_s: self.for_s,
            expect: Some(expect),
        }
    }
}

impl Expect {
    /// What is wrong with what was seen of a migration that `fault` struck.
    #[must_use]
    pub fn problem(self, fault: &Fault, seen: Seen<'_>) -> Option<String> {
        let no_exit_code = fault.action == Action::Kill && fault.on == Victim::Cli;
        let says = |words| seen.message.is_some_and(|message| message.contains(words));
        let moved = seen.arrived == Arrived::All && (no_exit_code || seen.exit_code == Some(0));
        let stays = seen.exit_code == Some(1) && says("runs at the source");
        let stayed = seen.arrived == Arrived::None && stays;
        // The message names the command that looks further.
        let person = seen.exit_code == Some(4) && says("gangway ");
        let as_expected = match self {
            Self::Moved => moved,
            Self::Stayed => stayed,
            Self::Either => moved || stayed,
            Self::Person => person,
            Self::TargetStays => seen.arrived == Arrived::OfOtherTargets && stays,
        };
        (!as_expected).then(|| {
            format!(
                "expected {self:?} under the fault; exit code {}, VMs at their targets: {:?}, said: {}",
                seen.exit_code.map_or("none".into(), |code| code.to_string()),
                seen.arrived,
                seen.message.unwrap_or("nothing"),
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::Scenario;

    fn matrix(settings: &[&str]) -> anyhow::Result<Matrix> {
        let settings: Vec<String> = settings.iter().map(|&s| s.to_owned()).collect();
        Ok(Scenario::load("faults", &settings, false)?.matrix.unwrap())
    }

    #[test]
    fn a_subset_is_chosen_by_fault_by_instant_and_by_both() {
        let names = |only: &str| {
            let cells = matrix(&[&format!("matrix.only={only}")]).unwrap().cells();
            let cells = cells.unwrap();
            cells.into_iter().map(|(name, _)| name).collect::<Vec<_>>()
        };
        assert_eq!(names("cancel@bulk"), ["cancel@bulk"]);
        assert!(names("cut,sent").contains(&"cut@bulk".to_owned()));
        assert!(names("cut,sent").contains(&"cancel@sent".to_owned()));
        assert!(!names("cut,sent").contains(&"cancel@bulk".to_owned()));
        let error = matrix(&["matrix.only=cut@nowhere"]).unwrap_err();
        assert!(format!("{error:#}").contains("cut@nowhere"));
    }

    #[test]
    fn each_fault_of_the_matrix_strikes_before_and_after_the_load_report() {
        let matrix = matrix(&[]).unwrap();
        let must = [
            "kill-source-agent",
            "kill-target-agent",
            "kill-target-qemu",
            "kill-cli",
            "cut-2s",
            "cut",
            "cancel",
            "stop-target-agent-10s",
        ];
        for name in must {
            let row = matrix.faults.iter().find(|row| row.name == name).unwrap();
            for instant in ["bulk", "switch-over", "loaded"] {
                assert!(row.expect.contains_key(instant), "{name} at {instant}");
            }
        }
    }

    #[test]
    fn an_outcome_counts_only_if_exit_code_place_and_message_agree() {
        let fault = |name: &str| {
            let cells = matrix(&[&format!("matrix.only={name}")]).unwrap().cells();
            cells.unwrap().remove(0).1
        };
        let seen = |exit_code, arrived, message| Seen {
            exit_code,
            arrived,
            message,
        };
        let stays = Some("runs at the source as before: cancelled");
        let cancel = fault("cancel@bulk");
        let good = |expect: Expect, seen| expect.problem(&cancel, seen).is_none();
        assert!(good(Expect::Stayed, seen(Some(1), Arrived::None, stays)));
        assert!(good(Expect::Either, seen(Some(1), Arrived::None, stays)));
        assert!(good(Expect::Either, seen(Some(0), Arrived::All, None)));
        assert!(!good(Expect::Either, seen(Some(0), Arrived::None, stays)));
        assert!(!good(Expect::Stayed, seen(Some(1), Arrived::All, stays)));
        assert!(!good(Expect::Stayed, seen(Some(1), Arrived::None, None)));
        assert!(!good(Expect::Stayed, seen(Some(4), Arrived::None, stays)));
        assert!(!good(Expect::Moved, seen(None, Arrived::All, None)));
        assert!(!good(Expect::Person, seen(Some(4), Arrived::None, None)));
        let others = Arrived::OfOtherTargets;
        assert!(good(Expect::TargetStays, seen(Some(1), others, stays)));
        assert!(!good(Expect::TargetStays, seen(Some(0), others, stays)));
        assert!(!good(
            Expect::TargetStays,
            seen(Some(1), Arrived::Some, stays)
        ));
        assert!(!good(Expect::Either, seen(Some(1), others, stays)));
        let killed = fault("kill-cli@bulk");
        let moved = seen(None, Arrived::All, None);
        assert_eq!(Expect::Moved.problem(&killed, moved), None);
    }
}
