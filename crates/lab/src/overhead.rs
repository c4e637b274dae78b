//! What the preparation phase costs the guests: the same work with and without `gangway prepare`
//! running beside it (table 2 of IRLM).
//!
//! The guests do a fixed amount of work round after round and say how long each round took. Only
//! rounds that lie wholly in a measurement count. Measurements with and without follow each other
//! in pairs, every other pair in the opposite order, so that a drift of the machine does not look
//! like an effect. The result is the mean over the pairs of the difference in percent, with its
//! confidence interval by Student's t.
//!
//! Every preparation is the first one of its group, as before a migration, and hashes all memory: the
//! agents forget each as soon as it has ended. Those that follow it would look at an eighth.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::bench::{Bench, Programs};
use crate::clock::UnixMs;
use crate::gangway::{Agents, prepare};
use crate::outcome::EventLog;
use crate::results::Run;
use crate::scenario::Scenario;
use crate::session::Session;
use crate::shell::say;

/// Name of the runs in the results.
pub const TECHNIQUE: &str = "prepare";
/// Name of the figures in a run's `application`.
pub const FIGURES: &str = "preparation";
/// How often the lab looks whether the rounds are complete.
const LOOK: Duration = Duration::from_millis(200);
/// A guest that was not heard for so long does not run any more.
const SILENCE_MS: f64 = 2_000.0;

/// What is measured.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Preparation {
    /// Modes of the guests, one after the other, each on freshly booted guests.
    pub workloads: Vec<String>,
    /// How often with and without are measured.
    pub pairs: u32,
    /// Rounds of work that each guest must complete in a measurement.
    pub rounds: u32,
    /// How often `gangway prepare` runs in a measurement.
    #[serde(default)]
    pub run: Times,
}

/// How often.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Times {
    /// Anew whenever it has ended: the guests hardly ever work without it.
    #[default]
    Loop,
    /// One time, however many rounds follow it.
    Once,
}

impl Preparation {
    /// Whether it makes sense.
    pub fn check(&self) -> anyhow::Result<()> {
        ensure!(!self.workloads.is_empty(), "`preparation` needs a workload");
        for workload in &self.workloads {
            ensure!(
                ["subset-sum", "random-writes"].contains(&workload.as_str()),
                "preparation.workloads: `{workload}` has no rounds; subset-sum and random-writes do"
            );
        }
        for (name, value, least, most) in [
            // One pair has no spread.
            ("pairs", self.pairs, 2, 100),
            ("rounds", self.rounds, 1, 1000),
        ] {
            ensure!(
                (least..=most).contains(&value),
                "preparation.{name} = {value}: must be {least} to {most}"
            );
        }
        Ok(())
    }
}

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Overhead {
    /// What the guests did.
    pub workload: String,
    /// How many of them, with one processor each.
    pub guests: u32,
    /// Processors of the machine.
    pub cores: u32,
    /// How often `gangway prepare` ran in a measurement.
    pub run: Times,
    /// Mean time of a round, measurement by measurement.
    pub pairs: Vec<Pair>,
    /// Mean over the pairs of what preparation adds to the time of a round.
    pub overhead_percent: Option<f64>,
    /// Where that mean lies with a confidence of 95 %.
    pub ci95_percent: Option<[f64; 2]>,
    /// Length of each preparation, all of which hashed all memory, in the order in which they ran.
    pub prepare_s: Vec<f64>,
    /// Processor time of all agents during the measurements with preparation.
    pub agents_cpu_s: f64,
}

/// A measurement without and one with preparation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Pair {
    /// Mean time of a round over the guests.
    pub without_s: f64,
    /// The same while `gangway prepare` ran.
    pub with_s: f64,
}

impl Pair {
    fn percent(self) -> f64 {
        (self.with_s / self.without_s - 1.0) * 100.0
    }
}

/// Measures one workload on freshly booted guests.
pub fn run(
    session: &Session,
    scenario: &Scenario,
    programs: &Programs,
    (preparation, workload): (&Preparation, &str),
    log: &EventLog,
) -> anyhow::Result<Run> {
    let mut scenario = scenario.clone();
    workload.clone_into(&mut scenario.vm.mode);
    let bench = Bench::start(session, &scenario, programs, None)?;
    let agents = Agents::start(&bench)?;
    let mut measured = Overhead {
        workload: workload.to_owned(),
        guests: scenario.vms(),
        cores: u32::try_from(thread::available_parallelism().map_or(1, usize::from))?,
        run: preparation.run,
        pairs: Vec::new(),
        overhead_percent: None,
        ci95_percent: None,
        prepare_s: Vec::new(),
        agents_cpu_s: 0.0,
    };
    let plan = prepare::Plan::write(&agents, &bench)?;
    let experiment = Experiment {
        bench: &bench,
        agents: &agents,
        preparation,
        plan,
    };
    experiment.settle()?;
    for nth in 0..preparation.pairs {
        let mut pair = Pair::default();
        for with in order(nth) {
            if with {
                pair.with_s = experiment.with(&mut measured)?;
            } else {
                pair.without_s = experiment.rounds_s(UnixMs::now())?;
            }
        }
        say(&format!(
            "{workload}, pair {} of {}: {:.3} s without, {:.3} s with ({:+.2} %)",
            nth + 1,
            preparation.pairs,
            pair.without_s,
            pair.with_s,
            pair.percent()
        ));
        log.note("", "pair", serde_json::to_value(pair).context("noting it")?);
        measured.pairs.push(pair);
    }
    let percents: Vec<f64> = measured.pairs.iter().map(|pair| pair.percent()).collect();
    if let Some((mean, interval)) = mean_with_interval(&percents) {
        measured.overhead_percent = Some(mean);
        measured.ci95_percent = Some(interval);
    }
    let lost = bench.vms.iter().filter(|vm| !is_heard(&bench, &vm.name));
    Ok(Run {
        vms: scenario.vms(),
        vms_lost: Some(u32::try_from(lost.count())?),
        application: [(
            FIGURES.to_owned(),
            serde_json::to_value(measured).context("keeping the figures")?,
        )]
        .into(),
        ..Run::default()
    })
}

/// Whether each measurement of a pair is with preparation.
fn order(pair: u32) -> [bool; 2] {
    if pair.is_multiple_of(2) {
        [false, true]
    } else {
        [true, false]
    }
}

fn is_heard(bench: &Bench<'_>, vm: &str) -> bool {
    let last = bench.observer.track(vm).0.last().map(|beat| beat.at);
    last.is_some_and(|at| UnixMs::now().ms_since(at) < SILENCE_MS)
}

struct Experiment<'a> {
    bench: &'a Bench<'a>,
    agents: &'a Agents,
    preparation: &'a Preparation,
    plan: prepare::Plan,
}

impl Experiment<'_> {
    /// Rounds that are not measured: translated code and page tables are in place afterwards.
    fn settle(&self) -> anyhow::Result<()> {
        self.rounds_s(UnixMs::now())?;
        Ok(())
    }

    /// How long one preparation takes, which is the group's first.
    fn prepare_s(&self) -> anyhow::Result<f64> {
        let began = Instant::now();
        let group = self.plan.run(self.agents)?;
        let took = began.elapsed().as_secs_f64();
        prepare::Plan::forget(self.agents, &group)?;
        Ok(took)
    }

    /// Mean time of a round while preparation runs.
    fn with(&self, measured: &mut Overhead) -> anyhow::Result<f64> {
        let done = AtomicBool::new(false);
        let processor_before = self.agents.processor_s();
        let since = UnixMs::now();
        let times = thread::scope(|scope| {
            let preparing = scope.spawn(|| {
                let mut times = Vec::new();
                loop {
                    times.push(self.prepare_s()?);
                    let once = self.preparation.run == Times::Once;
                    if once || done.load(Ordering::Relaxed) {
                        return Ok::<_, anyhow::Error>(times);
                    }
                }
            });
            let rounds = self.wait_for_rounds(since);
            done.store(true, Ordering::Relaxed);
            let times = preparing
                .join()
                .map_err(|_| anyhow::anyhow!("the preparing thread panicked"));
            rounds.and(times?)
        })?;
        // While the last preparation came to its end the guests did some more of them.
        let mean = match self.preparation.run {
            Times::Loop => self.mean_round_s(since, usize::MAX)?,
            Times::Once => self.mean_round_s(since, self.preparation.rounds as usize)?,
        };
        measured.prepare_s.extend(times);
        let used = self.agents.processor_s_since(&processor_before);
        measured.agents_cpu_s += used.iter().map(|(_, seconds)| seconds).sum::<f64>();
        Ok(mean)
    }

    /// Mean time of the next complete rounds of all guests.
    fn rounds_s(&self, since: UnixMs) -> anyhow::Result<f64> {
        self.wait_for_rounds(since)?;
        self.mean_round_s(since, self.preparation.rounds as usize)
    }

    /// Waits until each guest has done its rounds.
    fn wait_for_rounds(&self, since: UnixMs) -> anyhow::Result<()> {
        let wanted = self.preparation.rounds as usize;
        let deadline = Instant::now() + Duration::from_secs(self.bench.scenario.patience_s);
        for vm in &self.bench.vms {
            while self.bench.observer.rounds_ms(&vm.name, since).len() < wanted {
                if Instant::now() >= deadline {
                    bail!("{} has not done {wanted} rounds of work in time", vm.name);
                }
                thread::sleep(LOOK);
            }
        }
        Ok(())
    }

    /// Mean over the guests of the mean time of their first rounds since then, at most `most`.
    fn mean_round_s(&self, since: UnixMs, most: usize) -> anyhow::Result<f64> {
        let mut means = Vec::new();
        for vm in &self.bench.vms {
            let mut rounds = self.bench.observer.rounds_ms(&vm.name, since);
            rounds.truncate(most);
            ensure!(!rounds.is_empty(), "{} has done no work", vm.name);
            means.push(rounds.iter().sum::<f64>() / rounds.len() as f64 / 1e3);
        }
        ensure!(!means.is_empty(), "there are no guests");
        Ok(means.iter().sum::<f64>() / means.len() as f64)
    }
}

/// Mean of a few values, and where it lies with a confidence of 95 %; `None` for fewer than two.
fn mean_with_interval(values: &[f64]) -> Option<(f64, [f64; 2])> {
    let freedom = values.len().checked_sub(1).filter(|freedom| *freedom > 0)?;
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    let error = (squares / freedom as f64 / count).sqrt();
    let half = student_t(freedom) * error;
    Some((mean, [mean - half, mean + half]))
}

/// Quantile 0.975 of Student's t, from the usual table; a little too wide between its lines.
fn student_t(freedom: usize) -> f64 {
    const TABLE: [f64; 15] = [
        12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
        2.145, 2.131,
    ];
    match freedom {
        1..=15 => TABLE[freedom - 1],
        0 => f64::INFINITY,
        16..=29 => 2.120,
        30..=59 => 2.042,
        _ => 2.000,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_is_that_of_students_t() {
        // Five values with mean 3 and a standard deviation of sqrt(2.5).
        let (mean, [low, high]) = mean_with_interval(&[1.0, 2.0, 3.0, 4.0, 5.0]).unwrap();
        assert!((mean - 3.0).abs() < 1e-12);
        let half = 2.776 * (2.5f64 / 5.0).sqrt();
        assert!((high - mean - half).abs() < 1e-9 && (mean - low - half).abs() < 1e-9);
        assert_eq!(mean_with_interval(&[1.0]), None);
        assert_eq!(mean_with_interval(&[]), None);
        let (_, [low, high]) = mean_with_interval(&[2.0, 2.0]).unwrap();
        assert_eq!([low, high], [2.0, 2.0]);
    }

    #[test]
    fn the_quantile_only_falls_with_more_values() {
        let quantiles: Vec<f64> = (1..100).map(student_t).collect();
        assert!(quantiles.windows(2).all(|pair| pair[0] >= pair[1]));
        assert!(quantiles.iter().all(|quantile| *quantile > 1.96));
    }

    #[test]
    fn every_other_pair_is_measured_in_the_opposite_order() {
        assert_eq!(order(0), [false, true]);
        assert_eq!(order(1), [true, false]);
        assert_eq!(order(2), order(0));
    }

    #[test]
    fn overhead_is_what_preparation_adds() {
        let pair = Pair {
            without_s: 2.0,
            with_s: 2.1,
        };
        assert!((pair.percent() - 5.0).abs() < 1e-9);
    }
}
