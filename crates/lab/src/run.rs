//! Runs a scenario: each technique, each repeat, on guests that begin alike; writes the results.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use serde_json::{Value, json};

use crate::after::{self, Afterwards};
use crate::balloon;
use crate::bench::{Bench, Programs};
use crate::bounds::{self, Bounds};
use crate::clock::UnixMs;
use crate::footprint::Footprint;
use crate::frozen::{self, Frozen};
use crate::gangway::{self, Agents};
use crate::guest::Vm;
use crate::install::{self, Image, Suite};
use crate::ksm::{self, Merged};
use crate::load::Load;
use crate::measure::{self, Before};
use crate::memory::PAGE;
use crate::net::Rack;
use crate::outcome::{EventLog, Figures, Outcome};
use crate::overhead;
use crate::results::{self, Results, Run, Topology};
use crate::saved::Saved;
use crate::scenario::{Preset, Scenario, Stock, Technique};
use crate::session::Session;
use crate::shell::{output, say};
use crate::stock;
use crate::technique::{Extras, Mode};

/// Name of the kernel's congestion control: namespaces are made with it.
const TCP_CONGESTION: &str = "/proc/sys/net/ipv4/tcp_congestion_control";

/// Runs all of `scenario` and leaves `results.json` and `events.jsonl` in `out`. A run that fails
/// is part of the results; only what keeps the lab itself from working is an error.
pub fn scenario(name: &str, scenario: &Scenario, out: &Path) -> anyhow::Result<Results> {
    std::fs::create_dir_all(out).with_context(|| format!("making {}", out.display()))?;
    // What an earlier invocation left is not to be taken for this one's, whatever becomes of it.
    for name in [results::FILE_NAME, "events.jsonl"] {
        let _ = std::fs::remove_file(out.join(name));
    }
    let programs = programs(scenario)?;
    let session = Session::start()?;
    let mut results = Results {
        scenario: name.to_owned(),
        versions: versions(scenario, &programs)?,
        topology: topology(&scenario.largest()),
        runs: Vec::new(),
        command: std::env::args().collect(),
        started_unix_s: Some(seconds(UnixMs::now())),
    };
    let mut saved = is_run_again(scenario)?
        .then(|| Saved::place(&session))
        .transpose()?;
    for (repeat, scenario) in scenario.rounds() {
        let scenario = &scenario;
        for run in overheads(&session, scenario, &programs, (repeat, out))? {
            results.runs.push(run);
            results.save(out)?;
        }
        for &technique in &scenario.techniques {
            for Variant {
                beside,
                fault,
                scenario,
            } in variants(scenario)?
            {
                let mut what = technique.to_string();
                for more in [&beside, &fault].into_iter().flatten() {
                    what += &format!(", {more}");
                }
                let (nth, of) = (repeat + 1, scenario.repeats);
                say(&format!("{name}: {what}, run {nth} of {of}"));
                let log = EventLog::open(out, what.clone(), repeat)?;
                let of = (&session, &programs);
                let run = one(of, &scenario, technique, saved.as_mut(), &log);
                let run = run.unwrap_or_else(|error| failed(&scenario, &error));
                if let Some(failure) = &run.failure {
                    say(&format!("{what} failed: {failure}"));
                }
                results.runs.push(Run {
                    beside,
                    fault,
                    repeat,
                    source_hosts: Some(scenario.hosts.source),
                    vms_per_host: Some(scenario.hosts.vms_per_host),
                    ..Run::of(technique, run)
                });
                // What is measured is kept, whatever happens to the runs that follow.
                results.save(out)?;
            }
        }
    }
    Ok(results)
}

/// The runs that measure what preparation costs, if the scenario asks for them.
fn overheads(
    session: &Session,
    scenario: &Scenario,
    programs: &Programs,
    (repeat, out): (u32, &Path),
) -> anyhow::Result<Vec<Run>> {
    let Some(preparation) = &scenario.preparation else {
        return Ok(Vec::new());
    };
    let mut runs = Vec::new();
    for workload in &preparation.workloads {
        let vms = scenario.vms();
        say(&format!("preparation beside {vms} guests with {workload}"));
        let log = EventLog::open(out, overhead::TECHNIQUE.to_owned(), repeat)?;
        let of = (preparation, workload.as_str());
        let run = overhead::run(session, scenario, programs, of, &log).unwrap_or_else(|error| {
            say(&format!("{workload} failed: {error:#}"));
            Run {
                vms,
                failure: Some(format!("{workload}: {error:#}")),
                ..Run::default()
            }
        });
        runs.push(Run {
            technique: overhead::TECHNIQUE.to_owned(),
            compression: "none".into(),
            repeat,
            source_hosts: Some(scenario.hosts.source),
            vms_per_host: Some(scenario.hosts.vms_per_host),
            ..run
        });
    }
    Ok(runs)
}

fn programs(scenario: &Scenario) -> anyhow::Result<Programs> {
    Ok(Programs {
        source: install::qemu(&scenario.qemu.source)?,
        target: install::qemu(&scenario.qemu.target)?,
        images: images(scenario)?,
    })
}

/// Finds everything that a scenario starts, and starts nothing.
pub fn look_for_programs(scenario: &Scenario) -> anyhow::Result<()> {
    programs(scenario)?;
    if needs_gangway(scenario) {
        install::gangway(scenario.gangway.as_deref())?;
    }
    Ok(())
}

fn needs_gangway(scenario: &Scenario) -> bool {
    let mut techniques = scenario.techniques.iter();
    techniques.any(|technique| matches!(technique, Technique::Gangway { .. }))
        || scenario.preparation.is_some()
}

/// What the guests boot in turn: with applications, if any guest needs one.
fn images(scenario: &Scenario) -> anyhow::Result<Vec<Image>> {
    let mut images = vec![image(scenario)?];
    if scenario.vm.kernels > 1 {
        images.push(install::image(Suite::Backports)?);
    }
    Ok(images)
}

fn image(scenario: &Scenario) -> anyhow::Result<Image> {
    let image = install::image(Suite::Release)?;
    let busy = scenario
        .each_beside()
        .iter()
        .any(|(_, one)| one.beside().pairs > 0);
    if !busy && !scenario.guests_share_links() {
        return Ok(image);
    }
    let workloads = install::workloads()?;
    if scenario.guests_share_links() {
        image.with(&workloads)
    } else {
        // The hosts alone run some of it.
        Ok(image)
    }
}

/// One way in which a technique runs.
struct Variant {
    beside: Option<String>,
    fault: Option<String>,
    scenario: Scenario,
}

/// Whether guests are wanted more than once.
fn is_run_again(scenario: &Scenario) -> anyhow::Result<bool> {
    let each = scenario.rounds().map(|(_, one)| Ok(variants(&one)?.len()));
    let rounds: usize = each.sum::<anyhow::Result<usize>>()?;
    Ok(rounds * scenario.techniques.len() > 1)
}

/// The scenario as it is, with each of what runs beside it, or with each fault of its matrix.
fn variants(scenario: &Scenario) -> anyhow::Result<Vec<Variant>> {
    let Some(matrix) = &scenario.matrix else {
        let each = scenario.each_beside().into_iter();
        let variant = |(beside, scenario): (Option<&str>, Scenario)| Variant {
            beside: beside.map(str::to_owned),
            fault: None,
            scenario,
        };
        return Ok(each.map(variant).collect());
    };
    let with = |(name, fault)| Variant {
        beside: None,
        fault: Some(name),
        scenario: Scenario {
            fault: Some(fault),
            matrix: None,
            ..scenario.clone()
        },
    };
    Ok(matrix.cells()?.into_iter().map(with).collect())
}

fn failed(scenario: &Scenario, error: &anyhow::Error) -> Run {
    Run {
        vms: scenario.vms(),
        failure: Some(format!("{error:#}")),
        ..Run::default()
    }
}

/// Whether every run came to its end with every VM intact, as far as its scenario looks.
#[must_use]
pub fn all_intact(results: &Results) -> bool {
    results.runs.iter().all(|run| {
        run.failure.is_none()
            && run.vms_lost == Some(0)
            && run.mismatched_pages.unwrap_or(0) == 0
            && run.stamp_errors.unwrap_or(0) == 0
    })
}

fn one(
    (session, programs): (&Session, &Programs),
    scenario: &Scenario,
    technique: Technique,
    saved: Option<&mut Saved>,
    log: &EventLog,
) -> anyhow::Result<Run> {
    let mut saved = saved.filter(|_| Saved::can_hold(scenario, programs));
    if let Some(saved) = &mut saved {
        saved.complete(session, scenario, programs)?;
    }
    let bench = Bench::start(session, scenario, programs, saved.as_deref())?;
    let pids: Vec<u32> = bench.running.iter().map(|running| running.pid).collect();
    if scenario.agent.contains_key("ksm") {
        // Agents that drive KSM are ended without having put it back.
        ksm::save(session)?;
    }
    let merged = scenario
        .ksm
        .then(|| ksm::merge(session, &pids, scenario.ksm_goes_on))
        .transpose()?;
    let load = Load::start(&bench).context("starting what runs beside the move")?;
    let mut mover = Mover::start(technique, &bench)?;
    rest(scenario, scenario.stay_s)?;
    let source_footprint = Footprint::read(&bench, Rack::Source, &mover.agents(Rack::Source));
    let before = Before::read(&bench)?;
    say(&format!("moving {} VMs with {technique}", bench.vms.len()));
    let (moved, witnessed) = witness(&bench, || {
        measure::with_footprints(&bench, || mover.migrate(&bench, log))
    });
    let (outcome, [source_footprint_bytes, target_footprint_bytes]) = moved;
    let (outcome, witnessed) = (outcome?, witnessed?);
    say("listening to the guests after their move");
    measure::listen(&bench, &outcome);
    if scenario.check_stamps {
        frozen::wait_for_rounds(&bench)?;
    }
    let follows = technique.memory_may_follow();
    let mut run = measure::run(&bench, &before, (&outcome, follows))?;
    if !technique.has_index() {
        run.index_bytes = None;
    }
    run.source_footprint = Some(source_footprint);
    rest(scenario, scenario.rest_s)?;
    run.target_footprint = Some(Footprint::read(
        &bench,
        Rack::Target,
        &mover.agents(Rack::Target),
    ));
    if scenario.check_stamps {
        let checked = frozen::check_all(&bench, &witnessed.frozen)?;
        say(&format!("stamped pages: {checked:?}"));
        run.compared_pages = Some(checked.stamped);
        run.mismatched_pages = Some(checked.wrong);
        run.application
            .insert("stamps_checked".to_owned(), json!(checked));
    }
    if !witnessed.balloons.is_empty() {
        let balloons = Value::Array(witnessed.balloons);
        run.application.insert("balloons".to_owned(), balloons);
    }
    run.application.extend(load.figures(&outcome, &run)?);
    if scenario.guests_share_links() {
        // The guests' own traffic is on the same links.
        run.core_bytes = None;
        run.target_to_target_bytes = None;
        run.index_bytes = None;
    }
    run.application.extend(merged.iter().flat_map(ksm_figures));
    let mappings = json!(after::pool_mappings(&bench.vms));
    run.application
        .insert("pool_mappings_max".to_owned(), mappings);
    if scenario.bounds {
        run.bounds = bounds(&bench, saved);
    }
    say(&summary(&run));
    let (figures, trouble) = mover.afterwards(&bench, log)?;
    run.application.extend(figures);
    let remarks = run
        .per_vm
        .iter()
        .filter_map(|vm| Some(format!("{}: {}", vm.vm, vm.remark.as_ref()?)));
    let wrong = outcome.unexpected.into_iter().chain(trouble).chain(remarks);
    let mut wrong: Vec<String> = wrong.collect();
    if wrong.is_empty() {
        wrong.extend(left_out(scenario, technique, run.compared_pages));
    }
    let failure = (!wrong.is_empty()).then(|| wrong.join("; "));
    Ok(Run {
        source_footprint_bytes,
        target_footprint_bytes,
        failure,
        ..run
    })
}

/// What is wrong with so many `compared` pages, where all should have been.
fn left_out(scenario: &Scenario, technique: Technique, compared: Option<u64>) -> Option<String> {
    if !scenario.compare || scenario.check_stamps || !technique.can_be_compared() {
        return None;
    }
    let wanted = u64::from(scenario.vms()) * (scenario.vm.memory_mb << 20) / PAGE as u64;
    let found = compared.unwrap_or(0);
    // Where a fault strikes, VMs move twice, and some are compared both times.
    let is_all = match &scenario.fault {
        Some(_) => found >= wanted,
        None => found == wanted,
    };
    (!is_all).then(|| format!("{found} pages were compared, and should have been {wanted}"))
}

/// What the guests' memory comes to at best. Guests that begin alike and do nothing are measured once.
fn bounds(bench: &Bench<'_>, mut saved: Option<&mut Saved>) -> Option<Bounds> {
    let known = saved
        .as_deref()
        .and_then(|saved| saved.bounds(bench.scenario));
    known.or_else(|| {
        say("computing what the guests' memory comes to at best");
        // What the move was measured to be holds without them.
        let found = bounds::compute(bench)
            .inspect_err(|error| say(&format!("they are not known: {error:#}")))
            .ok()?;
        if let Some(saved) = &mut saved {
            saved.set_bounds(bench.scenario, found);
        }
        Some(found)
    })
}

/// What was seen and done beside a move.
struct Witnessed<'a> {
    /// What the guests had when they stopped.
    frozen: Vec<(&'a Vm, Frozen)>,
    /// What was done with their balloons.
    balloons: Vec<Value>,
}

/// Does `work` with what the scenario wants beside it.
fn witness<'a, T>(
    bench: &'a Bench<'_>,
    work: impl FnOnce() -> T,
) -> (T, anyhow::Result<Witnessed<'a>>) {
    let is_over = AtomicBool::new(false);
    let scenario = bench.scenario;
    thread::scope(|scope| {
        let patience = Duration::from_secs(scenario.patience_s);
        let stops = bench.vms.iter().filter(|_| scenario.check_stamps);
        let stops: Vec<_> = stops
            .map(|vm| (vm, scope.spawn(move || Frozen::when_stopped(vm, patience))))
            .collect();
        let balloons = scenario.balloon.iter().flat_map(|balloon| {
            let is_over = &is_over;
            bench
                .vms
                .iter()
                .map(move |vm| scope.spawn(move || balloon::work(bench, balloon, vm, is_over)))
        });
        let balloons: Vec<_> = balloons.collect();
        let worked = work();
        is_over.store(true, Ordering::Release);
        let joined = |result: thread::Result<anyhow::Result<Value>>| {
            result.map_err(|_| anyhow::anyhow!("a balloon's thread panicked"))?
        };
        let frozen = stops.into_iter().map(|(vm, thread)| {
            let frozen = thread.join();
            let frozen =
                frozen.map_err(|_| anyhow::anyhow!("the thread of {} panicked", vm.name))?;
            Ok((vm, frozen?))
        });
        let frozen = frozen.collect::<anyhow::Result<Vec<_>>>();
        let balloons = balloons.into_iter().map(|thread| joined(thread.join()));
        let balloons = balloons.collect::<anyhow::Result<Vec<_>>>();
        let witnessed = frozen.and_then(|frozen| {
            Ok(Witnessed {
                frozen,
                balloons: balloons?,
            })
        });
        (worked, witnessed)
    })
}

/// Lets the guests run for so long. KSM that goes on does so at the pace of a machine in use.
fn rest(scenario: &Scenario, seconds: u64) -> anyhow::Result<()> {
    if seconds == 0 {
        return Ok(());
    }
    if scenario.ksm && scenario.ksm_goes_on {
        ksm::slow_down()?;
    }
    say(&format!("the guests run for {seconds} s"));
    std::thread::sleep(Duration::from_secs(seconds));
    Ok(())
}

fn ksm_figures(merged: &Merged) -> [(String, Value); 3] {
    [
        ("ksm_merge_s".to_owned(), json!(merged.seconds)),
        ("ksm_merged_pages".to_owned(), json!(merged.pages)),
        ("ksm_shared_pages".to_owned(), json!(merged.shared)),
    ]
}

/// What carries out a technique, ready to begin.
enum Mover {
    Stock(Stock),
    Gangway {
        agents: Agents,
        preset: Preset,
        extras: Extras,
        mode: Mode,
    },
}

impl Mover {
    fn start(technique: Technique, bench: &Bench<'_>) -> anyhow::Result<Self> {
        Ok(match technique {
            Technique::Stock(stock) => Self::Stock(stock),
            Technique::Gangway {
                preset,
                extras,
                mode,
            } => Self::Gangway {
                agents: Agents::start(bench)?,
                preset,
                extras,
                mode,
            },
        })
    }

    /// Processes of the agents of a rack.
    fn agents(&self, rack: Rack) -> Vec<u32> {
        match self {
            Self::Stock(_) => Vec::new(),
            Self::Gangway { agents, .. } => agents.pids(rack),
        }
    }

    fn migrate(&mut self, bench: &Bench<'_>, log: &EventLog) -> anyhow::Result<Outcome> {
        match self {
            Self::Stock(stock) => Ok(stock::migrate(bench, *stock, log)),
            Self::Gangway {
                agents,
                preset,
                extras,
                mode,
            } => gangway::migrate(agents, bench, (*preset, *extras, *mode), log),
        }
    }
}

impl Mover {
    /// What the scenario does once the group has arrived.
    fn afterwards(
        &self,
        bench: &Bench<'_>,
        log: &EventLog,
    ) -> anyhow::Result<(Figures, Option<String>)> {
        match self {
            Self::Gangway {
                agents,
                preset,
                extras,
                ..
            } => {
                let preset = (*preset, *extras);
                let afterwards = Afterwards {
                    agents,
                    bench,
                    preset,
                    log,
                };
                afterwards.run(&bench.scenario.after)
            }
            Self::Stock(_) => Ok((Figures::new(), None)),
        }
    }
}

/// One line for the terminal.
fn summary(run: &Run) -> String {
    let mb = |bytes: Option<u64>| bytes.map_or("?".into(), |b| format!("{:.1}", b as f64 / 1e6));
    let s = |time: Option<f64>| time.map_or("?".into(), |time| format!("{time:.2}"));
    let count = |count: Option<u64>| count.map_or("?".into(), |count| count.to_string());
    let agents = run.agent_peak_bytes.map_or(String::new(), |peak| {
        let [source, target] = [peak.source, peak.target].map(|bytes| mb(Some(bytes)));
        format!(", agents at most {source} / {target} MB")
    });
    format!(
        "core {} MB, total {} s, mean downtime {} ms, {} pages compared, {} differ, {} VMs lost{agents}",
        mb(run.core_bytes),
        s(run.total_migration_time_s),
        run.downtime_ms
            .map_or("?".into(), |downtime| format!("{:.0}", downtime.mean)),
        count(run.compared_pages),
        count(run.mismatched_pages),
        count(run.vms_lost.map(u64::from)),
    )
}

fn versions(scenario: &Scenario, programs: &Programs) -> anyhow::Result<BTreeMap<String, String>> {
    let mut versions = BTreeMap::from([
        ("qemu_source".to_owned(), programs.source.version.clone()),
        ("qemu_target".to_owned(), programs.target.version.clone()),
        ("machine".to_owned(), scenario.qemu.machine.clone()),
        (
            "accelerator".to_owned(),
            scenario.vm.accel.name().to_owned(),
        ),
        ("guest_kernel".to_owned(), programs.kernels()),
        ("lab".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
    ]);
    let kernel = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    versions.insert("host_kernel".to_owned(), kernel);
    // What share a move gets beside others depends on it.
    if let Ok(name) = std::fs::read_to_string(TCP_CONGESTION) {
        versions.insert("tcp_congestion_control".to_owned(), name.trim().to_owned());
    }
    if needs_gangway(scenario) {
        let program = install::gangway(scenario.gangway.as_deref())?;
        let version = output(std::process::Command::new(program).arg("--version"))?;
        versions.insert("gangway".to_owned(), version.trim().to_owned());
    }
    Ok(versions)
}

fn topology(scenario: &Scenario) -> Topology {
    let bits = |mbit: u64| (mbit > 0).then_some(mbit * 1_000_000);
    Topology {
        source_hosts: scenario.hosts.source,
        target_hosts: scenario.hosts.target,
        vms_per_host: scenario.hosts.vms_per_host,
        vm_memory_bytes: scenario.vm.memory_mb << 20,
        core_bits_per_second: bits(scenario.links.core_mbit),
        edge_bits_per_second: bits(scenario.links.edge_mbit),
    }
}

fn seconds(at: UnixMs) -> u64 {
    std::time::Duration::try_from_secs_f64(at.0 / 1e3)
        .unwrap_or_default()
        .as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_in_which_pages_were_left_out_of_the_comparison_is_a_failed_one() {
        let load = |name: &str, settings: &[&str]| {
            let settings: Vec<String> = settings.iter().map(|&s| s.to_owned()).collect();
            Scenario::load(name, &settings, false).unwrap()
        };
        let technique = |name: &str| name.parse::<Technique>().unwrap();
        let pair = load("pair", &[]);
        let all = 2 * (256 << 20) / 4096;
        let of_pair = |name: &str, compared| left_out(&pair, technique(name), compared).is_some();
        assert!(!of_pair("gang", Some(all)));
        for too_few in [None, Some(0), Some(all - 1), Some(all / 2)] {
            assert!(of_pair("gang", too_few), "{too_few:?}");
            assert!(of_pair("gang+postcopy-held", too_few), "{too_few:?}");
            assert!(!of_pair("stock-postcopy", too_few), "{too_few:?}");
        }
        let alone = load("pair", &["compare=false"]);
        assert_eq!(left_out(&alone, technique("gang"), None), None);
        // Compared under the fault and after it.
        let fault = load("fault", &[]);
        let one = (192 << 20) / 4096;
        assert_eq!(left_out(&fault, technique("gang"), Some(2 * one)), None);
        assert!(left_out(&fault, technique("gang"), Some(one - 1)).is_some());
    }
}
