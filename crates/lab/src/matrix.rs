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
    /// Seconds between the beginning of a phase and the fault; the least of them with `tries`.
    #[serde(default = "into_a_phase_s")]
    pub into_phase_s: f64,
    /// Each fault that strikes in a phase is tried so often, at random times between `into_phase_s` and
    /// `until_s`: others for each fault, the same in every run with this `seed`. 0: once, at `into_phase_s`.
    #[serde(default)]
    pub tries: u32,
    /// See `tries`; seconds.
    #[serde(default)]
    pub until_s: f64,
    /// See `tries`.
    #[serde(default)]
    pub seed: u64,
    /// As [`Fault::still`], for each.
    #[serde(default)]
    pub still: bool,
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
    /// As [`Fault::vm`].
    #[serde(default = "first_vm")]
    pub vm: String,
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
    /// The chosen faults with their names, `FAULT@INSTANT` or `FAULT@INSTANT+SECONDS`, instant by instant.
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
                    cells.extend(self.tried(row, (name, at), *expect));
                }
            }
        }
        if let Some(unused) = used.iter().position(|used| !used) {
            bail!("matrix.only: no fault is `{}`", self.only[unused]);
        }
        ensure!(!cells.is_empty(), "a matrix needs a fault");
        Ok(cells)
    }

    /// A fault at an instant, as often as it is tried.
    fn tried(
        &self,
        row: &Row,
        (name, at): (String, &Moment),
        expect: Expect,
    ) -> Vec<(String, Fault)> {
        let strike = |after_s| Fault {
            vm: row.vm.clone(),
            at: at.clone(),
            after_s,
            action: row.action,
            on: row.on,
            for_s: row.for_s,
            expect: Some(expect),
            still: self.still,
        };
        if !matches!(at, Moment::Phase(_) | Moment::All(_)) {
            return vec![(name, strike(0.0))];
        }
        if self.tries == 0 {
            return vec![(name, strike(self.into_phase_s))];
        }
        let times = (0..self.tries).map(|nth| {
            let span = (self.until_s - self.into_phase_s).max(0.0);
            self.into_phase_s + span * fraction(self.seed, &name, nth)
        });
        // Hundredths, so that the name says all.
        let times = times.map(|time| (time * 100.0).round() / 100.0);
        times
            .map(|time| (format!("{name}+{time:.2}"), strike(time)))
            .collect()
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

/// A number from 0 to 1, the same for the same arguments (FNV-1a, mixed as in SplitMix64).
fn fraction(seed: u64, name: &str, nth: u32) -> f64 {
    let bytes = seed.to_le_bytes().into_iter().chain(nth.to_le_bytes());
    let hash = bytes
        .chain(name.bytes())
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
    let mixed = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    f64::from((mixed >> 32) as u32) / f64::from(u32::MAX)
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
    fn tries_are_spread_over_the_phase_and_the_same_in_every_run() {
        let settings = [
            "matrix.only=kill-index",
            "matrix.tries=20",
            "matrix.until_s=4",
        ];
        let settings = settings.map(str::to_owned);
        let cells = || {
            let scenario = Scenario::load("postcopy-rack-faults", &settings, false).unwrap();
            scenario.matrix.unwrap().cells().unwrap()
        };
        let times: Vec<f64> = cells().iter().map(|(_, fault)| fault.after_s).collect();
        assert_eq!(times.len(), 20);
        assert!(
            times.iter().all(|time| (0.1..=4.0).contains(time)),
            "{times:?}"
        );
        let late = times.iter().filter(|&&time| time > 2.0).count();
        assert!((5..=15).contains(&late), "{times:?}");
        let (name, fault) = &cells()[7];
        assert_eq!(*name, format!("kill-index@post-copy+{:.2}", fault.after_s));
        assert_eq!(cells()[7].1, *fault);
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
