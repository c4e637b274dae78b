//! A migration that a fault strikes; then, with everything healed, another one of the same VMs.
//! Those that stayed go again, those that arrived go back: both must still work.

use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use serde_json::{Value, json};

use super::agents::{Agents, control_socket};
use super::migration::{Attempt, Attempted};
use super::plan::Settings;
use super::still;
use crate::bench::Bench;
use crate::clock::UnixMs;
use crate::fault::{Action, Armed, Fault, Victim};
use crate::guest::Vm;
use crate::matrix::{Arrived, Seen};
use crate::outcome::{Figures, Moved};
use crate::session::spawn;
use crate::shell::say;
use crate::technique::Mode;

/// Time between the end of a migration that a fault has struck and the look at who runs where.
const AFTERMATH: Duration = Duration::from_secs(3);

/// What came of both migrations.
pub(super) struct Struck {
    pub(super) moved: Vec<Moved>,
    pub(super) figures: Figures,
    /// What the first came to, if it is not what the fault is to come to.
    pub(super) unexpected: Option<String>,
}

/// Carries out both.
pub(super) fn run(
    attempt: &Attempt<'_>,
    fault: &Fault,
    settings: Settings,
) -> anyhow::Result<Struck> {
    let (agents, bench) = (attempt.agents, attempt.bench);
    let armed = Armed::arm(fault, bench)?;
    let all: Vec<&Vm> = bench.vms.iter().collect();
    // Who would let a held VM go may be the victim; the guests' own checks must suffice there. Not
    // where contents come from other hosts: there the bytes under the fault are the question.
    let is_held = bench.scenario.hosts.target > 1 && settings.mode == Mode::PreCopy;
    let first_settings = Settings {
        confirm_handover: is_held,
        ..settings
    };
    let settings_before = migration_settings(&bench.vms.iter().collect::<Vec<_>>())?;
    let (began, began_at) = (Instant::now(), UnixMs::now());
    let first = move_first(attempt, (&all, first_settings), (fault, &armed))?;
    let took_s = began.elapsed().as_secs_f64();
    if fault.on == Victim::Cli && fault.action == Action::Kill {
        wait_for_sources_to_go(bench);
    }
    thread::sleep(AFTERMATH);
    let arrived = |vm: &Vm| bench.observer.track(&vm.name).ends_at(vm.target.name());
    let message = message_for(&first.moved, &fault.vm);
    let seen = Seen {
        exit_code: first.exit_code,
        arrived: who_arrived(bench, &fault.vm, arrived),
        message: message.as_deref(),
    };
    let unexpected = fault.expect.and_then(|expect| expect.problem(fault, seen));
    let silences = bench.vms.iter().filter_map(|vm| {
        let track = bench.observer.track(&vm.name);
        // A VM that waits for a person is still silent.
        let until_now = UnixMs::now().ms_since(track.0.last()?.at);
        Some(track.longest_gap_ms(began_at)?.max(until_now))
    });
    let silence = silences.reduce(f64::max);
    let mut figures = vec![
        figure("exit_code_under_fault", json!(first.exit_code)),
        figure("time_under_fault_s", json!(took_s)),
        // With the hold it is the lab's own.
        figure(
            "silence_under_fault_ms",
            json!(silence.filter(|_| !is_held && !fault.still)),
        ),
        figure(
            "vms_moved_under_fault",
            json!(bench.vms.iter().filter(|vm| arrived(vm)).count()),
        ),
        figure("message_under_fault", json!(message)),
    ];
    if !first.notes.is_empty() {
        figures.push(figure("notes", json!(first.notes)));
    }
    armed.heal(agents)?;
    agents.restart_dead()?;
    figures.push(figure("recover_exit_code", json!(recover(agents)?)));
    thread::sleep(AFTERMATH);
    let unexpected = unexpected.or(changed_settings(bench, settings_before, arrived)?);
    let again: Vec<Vm> = bench
        .vms
        .iter()
        .map(|vm| if arrived(vm) { vm.back() } else { vm.clone() })
        .collect();
    say("moving the VMs again, after the fault");
    let second = attempt.run(&again.iter().collect::<Vec<_>>(), settings, None)?;
    let unexpected = unexpected.or_else(|| second.ended_otherwise());
    figures.push(figure("exit_code", json!(second.exit_code)));
    let moved = first
        .moved
        .into_iter()
        .zip(second.moved)
        .zip(bench.vms.iter().zip(&again));
    let moved = moved.map(|((first, second), (vm, again))| {
        if again.target.name() == vm.target.name() {
            second
        } else {
            came_back(first, second, again)
        }
    });
    Ok(Struck {
        moved: moved.collect(),
        figures,
        unexpected,
    })
}

/// The migration that the fault strikes; what was compared of guests that stood still.
fn move_first(
    attempt: &Attempt<'_>,
    (vms, settings): (&[&Vm], Settings),
    (fault, armed): (&Fault, &Armed<'_>),
) -> anyhow::Result<Attempted> {
    if !fault.still {
        return attempt.run(vms, settings, Some(armed));
    }
    still::stop(attempt.bench)?;
    let over = AtomicBool::new(false);
    let (first, compared) = thread::scope(|scope| {
        let comparing = scope.spawn(|| still::compare_all(attempt.bench, &over));
        let first = attempt.run(vms, settings, Some(armed));
        over.store(true, Ordering::Relaxed);
        (first, comparing.join())
    });
    let mut first = first?;
    let compared = compared.map_err(|_| anyhow::anyhow!("comparing panicked"))?;
    for ((vm, compared), moved) in vms.iter().zip(compared).zip(&mut first.moved) {
        let compared = compared.with_context(|| format!("comparing {}", vm.name))?;
        still::go_on(vm, compared.is_some())?;
        moved.compared = compared;
    }
    Ok(first)
}

/// Which VMs have arrived, seen from that which the fault has struck.
fn who_arrived(bench: &Bench<'_>, struck: &str, arrived: impl Fn(&Vm) -> bool) -> Arrived {
    let target = bench.vms.iter().find(|vm| vm.name == struck);
    let target = target.map_or("", |vm| vm.target.name());
    let (there, not): (Vec<&Vm>, Vec<&Vm>) = bench.vms.iter().partition(|vm| arrived(vm));
    let of_target = |vm: &&Vm| vm.target.name() == target;
    if not.is_empty() {
        Arrived::All
    } else if there.is_empty() {
        Arrived::None
    } else if not.iter().all(of_target) && !there.iter().any(of_target) {
        Arrived::OfOtherTargets
    } else {
        Arrived::Some
    }
}

/// What a person, or libvirt, has set in each VM's QEMU for its migrations.
fn migration_settings(vms: &[&Vm]) -> anyhow::Result<Vec<[Value; 2]>> {
    let of = |vm: &&Vm| {
        let mut qmp = vm.qmp(&vm.source)?;
        Ok([
            qmp.execute("query-migrate-parameters", json!({}))?,
            qmp.execute("query-migrate-capabilities", json!({}))?,
        ])
    };
    vms.iter().map(of).collect()
}

/// A VM that stayed must be left as it was found.
fn changed_settings(
    bench: &Bench<'_>,
    before: Vec<[Value; 2]>,
    arrived: impl Fn(&Vm) -> bool,
) -> anyhow::Result<Option<String>> {
    let (stayed, before): (Vec<&Vm>, Vec<_>) = bench
        .vms
        .iter()
        .zip(before)
        .filter(|(vm, _)| !arrived(vm))
        .unzip();
    let after = migration_settings(&stayed)?;
    Ok((after != before).then(|| {
        format!("the migration settings of a source QEMU were {before:?}, and are {after:?}")
    }))
}

/// The times of a VM's move to its target, and what was compared on its way there and back.
fn came_back(first: Moved, second: Moved, way: &Vm) -> Moved {
    let end = if second.remark.is_none() {
        &way.target
    } else {
        &way.source
    };
    Moved {
        compared: match (first.compared, second.compared) {
            (Some(first), Some(second)) => Some(first.and(second)),
            (first, second) => second.or(first),
        },
        // Of a VM that was held it says that something went wrong then.
        remark: second
            .remark
            .or(first.remark.filter(|_| first.hold.is_some())),
        runs_on: Some(end.name().to_owned()),
        ..first
    }
}

fn message_for(moved: &[Moved], vm: &str) -> Option<String> {
    moved.iter().find(|moved| moved.vm == vm)?.remark.clone()
}

fn figure(name: &str, value: Value) -> (String, Value) {
    (name.to_owned(), value)
}

/// A migration goes on without the CLI that asked for it.
fn wait_for_sources_to_go(bench: &Bench<'_>) {
    let deadline = Instant::now() + Duration::from_secs(bench.scenario.patience_s);
    while Instant::now() < deadline && bench.running.iter().any(|r| r.gone_at().is_none()) {
        thread::sleep(Duration::from_millis(100));
    }
}

/// Has the agents finish or undo what the fault left to a person; returns the CLI's exit code.
/// That there is nothing to recover is one of its answers.
fn recover(agents: &Agents) -> anyhow::Result<Option<i32>> {
    let host = agents.coordinator()?;
    let mut command = host.command(agents.program());
    command
        .args(["recover", "--socket"])
        .arg(control_socket(host))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = spawn(&mut command).context("running `gangway recover`")?;
    let ended = child.wait().context("waiting for `gangway recover`")?;
    Ok(ended.code())
}
