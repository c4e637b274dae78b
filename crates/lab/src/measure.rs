//! Turns what was seen of a run into its entry in `results.json`.

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::bench::Bench;
use crate::clock::UnixMs;
use crate::guest::{Running, Vm};
use crate::memory::Compared;
use crate::net::{Counters, Rack};
use crate::observer::{Life, Track};
use crate::outcome::{Moved, Outcome, PREPARE_TIME};
use crate::process;
use crate::results::{Downtime, Pages, Run, STAMPS_CHECKED, Sample, VmResult, VmTimeline};
use crate::touch::{self, TouchLatency};

/// Interval between readings of the hosts' memory.
const FOOTPRINT_EVERY: Duration = Duration::from_millis(250);
/// How long a VM that has arrived may take to be heard, with its workload going on.
const REVIVAL_PATIENCE: Duration = Duration::from_secs(30);
/// How long the guests are listened to after the last of them has arrived: a second instance
/// would be heard within a few heartbeats.
const LISTEN: Duration = Duration::from_secs(2);

/// Readings taken before a migration, to be compared with those after it.
#[derive(Debug)]
pub struct Before {
    counters: Counters,
    processor_s: [Option<f64>; 2],
    source_pss_bytes: Option<u64>,
    /// By VM, those that stay after those that move.
    checked: Vec<u64>,
}

impl Before {
    /// Reads everything.
    pub fn read(bench: &Bench<'_>) -> anyhow::Result<Self> {
        let checked = bench.all_vms().map(|vm| {
            bench
                .observer
                .track(&vm.name)
                .0
                .last()
                .map_or(0, |beat| beat.checked)
        });
        Ok(Self {
            checked: checked.collect(),
            processor_s: [Rack::Source, Rack::Target].map(|rack| bench.processor_s(rack)),
            source_pss_bytes: bench
                .running
                .iter()
                .map(|qemu| process::pss_bytes(qemu.pid))
                .sum(),
            counters: bench.counters()?,
        })
    }
}

/// Runs `work` and reports the largest memory that source and target hosts held meanwhile.
pub fn with_footprints<T>(bench: &Bench<'_>, work: impl FnOnce() -> T) -> (T, [Option<u64>; 2]) {
    let done = AtomicBool::new(false);
    let largest = [AtomicU64::new(0), AtomicU64::new(0)];
    let result = thread::scope(|scope| {
        scope.spawn(|| {
            loop {
                for (rack, largest) in [Rack::Source, Rack::Target].into_iter().zip(&largest) {
                    let bytes = bench.footprint_bytes(rack).unwrap_or(0);
                    largest.fetch_max(bytes, Ordering::Relaxed);
                }
                if done.load(Ordering::Relaxed) {
                    return;
                }
                thread::sleep(FOOTPRINT_EVERY);
            }
        });
        let result = work();
        done.store(true, Ordering::Relaxed);
        result
    });
    // A rack with running guests never holds nothing: 0 means that there is no such measure here.
    (
        result,
        largest.map(|bytes| Some(bytes.into_inner()).filter(|bytes| *bytes > 0)),
    )
}

/// Waits until every VM that should have arrived is heard from its target, then listens a little.
pub fn listen(bench: &Bench<'_>, outcome: &Outcome) {
    let (since, was_struck) = (UnixMs::now(), bench.scenario.fault.is_some());
    for (vm, moved) in bench.vms.iter().zip(&outcome.moved) {
        if moved.remark.is_none() {
            // After a fault a VM may be back where it came from. One that stays silent shows in its
            // track.
            let _ = bench.observer.wait_for(&vm.name, REVIVAL_PATIENCE, |beat| {
                beat.host == vm.target.name() || (was_struck && beat.at >= since)
            });
        }
    }
    thread::sleep(LISTEN);
}

/// Everything measured, except what only the caller knows (technique, repeat). `follows`: VMs may run
/// before their memory, so that their moves end with the source's being free of them.
pub fn run(
    bench: &Bench<'_>,
    before: &Before,
    (outcome, follows): (&Outcome, bool),
) -> anyhow::Result<Run> {
    let counters = bench.counters()?.since(before.counters);
    let (moving, staying) = before.checked.split_at(bench.vms.len());
    let lives: Vec<VmLife> = (0..)
        .zip(moving)
        .map(|(nth, checked)| VmLife::judge(bench, (outcome, follows), nth, *checked))
        .collect();
    let residents = residents(bench, staying);
    let started = start_of(bench, outcome);
    let since_start =
        |life: &VmLife, at: Option<UnixMs>| Some(at?.s_since(started) - life.hold_s());
    let all = || lives.iter().chain(&residents);
    let times: Vec<f64> = lives
        .iter()
        .filter_map(|life| life.result.migration_time_s)
        .collect();
    let compared = outcome.moved.iter().filter_map(|moved| moved.compared);
    let compared = compared.reduce(Compared::and);
    Ok(Run {
        vms: bench.scenario.vms(),
        core_bytes: Some(counters.core()),
        target_to_target_bytes: Some(counters.target_to_target()),
        index_bytes: Some(counters.source_to_source()),
        total_migration_time_s: latest(lives.iter().map(|life| since_start(life, life.end))),
        running_at_target_s: latest(lives.iter().map(|life| since_start(life, life.running))),
        mean_migration_time_s: mean_of_all(&times, lives.len()),
        eviction_time_s: eviction_s(bench, started, &lives),
        downtime_ms: Downtime::of(
            lives
                .iter()
                .filter_map(|life| life.result.downtime_ms)
                .collect(),
        ),
        prepare_time_s: figure_of(outcome, PREPARE_TIME),
        agent_peak_bytes: outcome.agent_peak,
        pages: total_pages(&outcome.moved),
        compared_pages: compared.map(|found| found.pages),
        mismatched_pages: compared.map(|found| found.mismatched),
        vms_lost: Some(u32::try_from(all().filter(|life| life.lost).count())?),
        stamp_errors: all()
            .filter_map(|life| life.result.stamp_errors)
            .reduce(|sum, errors| sum + errors),
        application: application(
            (bench, before),
            all().map(|life| life.checked).sum(),
            (counters, outcome),
        ),
        cpu_seconds: cpu_seconds(bench, before, outcome),
        timeline: timeline(started, outcome),
        per_vm: lives
            .into_iter()
            .chain(residents)
            .map(|life| life.result)
            .collect(),
        ..Run::default()
    })
}

/// Those that stay, of whose pages so many were checked before.
fn residents(bench: &Bench<'_>, checked: &[u64]) -> Vec<VmLife> {
    let residents = bench.residents.iter().zip(checked);
    residents
        .map(|(vm, checked)| {
            let names = (vm.name.as_str(), vm.source.name());
            VmLife::of_resident(names, &bench.observer.track(&vm.name), *checked)
        })
        .collect()
}

/// What became of one VM.
struct VmLife {
    result: VmResult,
    /// First heartbeat from the target.
    running: Option<UnixMs>,
    /// When its move was over.
    end: Option<UnixMs>,
    lost: bool,
    /// Pages that the guest has checked since the migration began.
    checked: u64,
}

impl VmLife {
    fn judge(
        bench: &Bench<'_>,
        (outcome, follows): (&Outcome, bool),
        nth: usize,
        checked_before: u64,
    ) -> Self {
        let (vm, moved) = (&bench.vms[nth], &outcome.moved[nth]);
        let track = bench.observer.track(&vm.name);
        let arrived = moved.remark.is_none();
        let by_move = if arrived { &vm.target } else { &vm.source };
        let expected = moved.runs_on.as_deref().unwrap_or(by_move.name());
        let trouble = trouble(&track, expected);
        let running = track
            .first_from(vm.target.name())
            .map(|beat| beat.at)
            .filter(|_| arrived);
        let free = bench.running.get(nth).and_then(Running::gone_at);
        let end = end_of(running, free, follows);
        let hold_ms = moved.hold.map(|hold| hold.ms());
        let without_hold = |ms: f64| ms - hold_ms.unwrap_or(0.0);
        let (checked, stamp_errors) = checks(&track, checked_before);
        let result = VmResult {
            vm: vm.name.clone(),
            source_host: vm.source.name().to_owned(),
            target_host: vm.target.name().to_owned(),
            migration_time_s: end.map(|at| without_hold(at.ms_since(moved.started)) / 1e3),
            downtime_ms: track
                .gap_ms(vm.target.name())
                .filter(|_| arrived)
                .map(without_hold),
            hold_ms,
            stamp_errors,
            remark: join(trouble.clone(), moved.remark.clone()),
        };
        Self {
            result,
            running,
            end,
            lost: trouble.is_some(),
            checked,
        }
    }

    /// Of a VM that runs at a target host and must go on there.
    fn of_resident((vm, host): (&str, &str), track: &Track, checked_before: u64) -> Self {
        let trouble = trouble(track, host);
        let (checked, stamp_errors) = checks(track, checked_before);
        let result = VmResult {
            vm: vm.to_owned(),
            source_host: host.to_owned(),
            target_host: host.to_owned(),
            stamp_errors,
            remark: trouble.clone(),
            ..VmResult::default()
        };
        Self {
            result,
            running: None,
            end: None,
            lost: trouble.is_some(),
            checked,
        }
    }

    fn hold_s(&self) -> f64 {
        self.result.hold_ms.unwrap_or(0.0) / 1e3
    }
}

/// When the move of a VM is over that runs at its target since `running`, and whose source has been free
/// of it since `free`. With memory that follows it is over when both are so (SLM, section IV).
fn end_of(running: Option<UnixMs>, free: Option<UnixMs>, follows: bool) -> Option<UnixMs> {
    if follows {
        Some(running?.later(free?))
    } else {
        running
    }
}

/// Stamped pages that a guest has checked since it had checked `before` of them, and how many were
/// damaged, if it has.
fn checks(track: &Track, before: u64) -> (u64, Option<u64>) {
    let (checked, errors) = track
        .0
        .last()
        .map_or((0, 0), |beat| (beat.checked, beat.errors));
    let checked = checked.saturating_sub(before);
    (checked, (checked > 0 || errors > 0).then_some(errors))
}

/// Why a VM counts as lost, if it does.
fn trouble(track: &Track, expected_host: &str) -> Option<String> {
    let recently = UnixMs(UnixMs::now().0 - LISTEN.as_secs_f64() * 1e3);
    match track.life(recently) {
        Life::Runs { host } if host == expected_host => None,
        Life::Runs { host } => Some(format!("runs on {host}, should run on {expected_host}")),
        Life::Silent => Some("is not heard any more".into()),
        Life::Twice(how) => Some(format!("ran twice: {how}")),
        Life::Rebooted => Some("is not the instance that was started".into()),
    }
}

fn join(first: Option<String>, second: Option<String>) -> Option<String> {
    match (first, second) {
        (Some(first), Some(second)) => Some(format!("{first}; {second}")),
        (first, second) => first.or(second),
    }
}

/// The latest of all, if all are known.
fn latest(times: impl Iterator<Item = Option<f64>>) -> Option<f64> {
    times
        .collect::<Option<Vec<f64>>>()?
        .into_iter()
        .reduce(f64::max)
}

fn mean_of_all(times: &[f64], expected: usize) -> Option<f64> {
    (times.len() == expected).then(|| times.iter().sum::<f64>() / expected as f64)
}

/// When migration time begins. With a fault, what it interrupted counts too.
fn start_of(bench: &Bench<'_>, outcome: &Outcome) -> UnixMs {
    match bench.scenario.fault {
        Some(_) => outcome.started,
        None => outcome.first_start(),
    }
}

fn timeline(started: UnixMs, outcome: &Outcome) -> Vec<VmTimeline> {
    let moved = outcome.moved.iter();
    moved
        .map(|moved| VmTimeline {
            vm: moved.vm.clone(),
            samples: samples_since(started, outcome, moved),
        })
        .collect()
}

/// The samples of a VM, with times from `started` on.
fn samples_since(started: UnixMs, outcome: &Outcome, moved: &Moved) -> Vec<Sample> {
    let late_s = started.s_since(outcome.started);
    let samples = moved.samples.iter().cloned();
    samples
        .map(|sample| Sample {
            t_s: sample.t_s - late_s,
            ..sample
        })
        .collect()
}

fn figure_of(outcome: &Outcome, name: &str) -> Option<f64> {
    let figure = outcome.figures.iter().find(|(of, _)| of == name);
    figure?.1.as_f64()
}

fn eviction_s(bench: &Bench<'_>, started: UnixMs, lives: &[VmLife]) -> Option<f64> {
    latest(bench.running.iter().zip(lives).map(|(running, life)| {
        running
            .gone_at()
            .map(|at| at.s_since(started) - life.hold_s())
    }))
}

fn total_pages(moved: &[Moved]) -> Option<Pages> {
    let mut all = moved.iter().filter_map(|moved| moved.pages);
    let first = all.next()?;
    let plus = |a: Option<u64>, b: Option<u64>| a.zip(b).map(|(a, b)| a + b);
    Some(all.fold(first, |sum, one| Pages {
        total: sum.total + one.total,
        zero: plus(sum.zero, one.zero),
        fill: plus(sum.fill, one.fill),
        literal: plus(sum.literal, one.literal),
        reference: plus(sum.reference, one.reference),
        remote_reference: plus(sum.remote_reference, one.remote_reference),
        mapped: plus(sum.mapped, one.mapped),
    }))
}

fn application(
    (bench, before): (&Bench<'_>, &Before),
    checked: u64,
    (counters, outcome): (Counters, &Outcome),
) -> BTreeMap<String, Value> {
    let touches = TouchLatency::measure(bench, outcome);
    let figure = |name: &str, value: Value| (name.to_owned(), value);
    [
        figure(STAMPS_CHECKED, json!(checked)),
        figure(
            "core_bytes_source_to_target",
            json!(counters.core_to_target),
        ),
        figure(
            "core_bytes_target_to_source",
            json!(counters.core_to_source),
        ),
        figure("source_to_source_bytes", json!(counters.source_to_source())),
        figure("qemu_pss_bytes_source", json!(before.source_pss_bytes)),
        figure("qemu_pss_bytes_target", json!(target_pss_bytes(bench))),
    ]
    .into_iter()
    .chain(touches.map(|touches| figure(touch::NAME, json!(touches))))
    .chain(outcome.figures.iter().cloned())
    .collect()
}

/// Memory of the target QEMUs, if all VMs have one.
fn target_pss_bytes(bench: &Bench<'_>) -> Option<u64> {
    let of = |vm: &Vm| {
        let stream = UnixStream::connect(vm.lab_socket(&vm.target)).ok()?;
        process::pss_bytes(process::peer_pid(&stream).ok()?)
    };
    bench.vms.iter().map(of).sum()
}

fn cpu_seconds(bench: &Bench<'_>, before: &Before, outcome: &Outcome) -> BTreeMap<String, f64> {
    let racks = [(Rack::Source, "all_source"), (Rack::Target, "all_target")];
    racks
        .into_iter()
        .zip(before.processor_s)
        .filter_map(|((rack, name), before)| {
            Some((name.to_owned(), bench.processor_s(rack)? - before?))
        })
        .chain(outcome.cpu_seconds.iter().cloned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observer::Beat;

    fn beat(host: &str, sequence: u64, (checked, errors): (u64, u64)) -> Beat {
        Beat {
            at: UnixMs::now(),
            host: host.to_owned(),
            sequence,
            checked,
            errors,
            ..Beat::default()
        }
    }

    #[test]
    fn a_move_whose_memory_follows_ends_when_the_source_is_free() {
        let at = |second: f64| Some(UnixMs(second * 1e3));
        assert_eq!(end_of(at(2.0), at(3.0), false), at(2.0));
        assert_eq!(end_of(at(2.0), at(9.0), true), at(9.0));
        assert_eq!(end_of(at(2.0), at(1.0), true), at(2.0));
        assert_eq!(end_of(at(2.0), None, true), None);
        assert_eq!(end_of(None, at(9.0), true), None);
    }

    #[test]
    fn a_guest_that_has_checked_nothing_says_nothing_of_its_stamps() {
        let track = |checked, errors| Track(vec![beat("t1", 1, (checked, errors))]);
        assert_eq!(checks(&track(7, 0), 7), (0, None));
        assert_eq!(checks(&track(9, 0), 7), (2, Some(0)));
        assert_eq!(checks(&track(7, 1), 7), (0, Some(1)));
        assert_eq!(checks(&Track::default(), 0), (0, None));
    }

    #[test]
    fn a_resident_that_falls_silent_or_runs_elsewhere_is_lost() {
        let life = |track: &Track| VmLife::of_resident(("stays5", "t1"), track, 0);
        let whole = life(&Track(vec![beat("t1", 1, (5, 0))]));
        assert!(!whole.lost && whole.result.stamp_errors == Some(0));
        assert_eq!(whole.result.remark, None);
        let silent = life(&Track::default());
        assert!(silent.lost && silent.result.remark.is_some());
        assert!(life(&Track(vec![beat("elsewhere", 1, (5, 0))])).lost);
    }
}
