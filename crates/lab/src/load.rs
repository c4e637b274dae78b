//! What runs beside a migration: applications in the guests, and traffic between other hosts.
//!
//! Throughput is measured before the move, during it and shortly after it. "During" is from the
//! start of the first VM's move to the end of the last one's: the preparation phase comes before it,
//! and has a figure of its own.

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use lab_init::agreed::{IPERF_FIRST_PORT, NFS_PIECE};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::bench::Bench;
use crate::clock::UnixMs;
use crate::install;
use crate::meter::{self, CLUSTER_SILENT, Meter, Rates, Reading};
use crate::net::{HostAddress, Net};
use crate::outcome::{Figures, Outcome};
use crate::results::Run;
use crate::scenario::Scenario;
use crate::shell::{output_on_host, say};

/// Name of the figures of an application in a run's `application`.
pub const WORKLOAD: &str = "workload";
/// Name of the figures of the traffic between other hosts.
pub const BACKGROUND: &str = "background";
/// Part of an edge link that a UDP stream's data takes: headers come to it.
const UDP_SHARE: f64 = 0.95;
/// Bytes of a datagram, so that it needs no fragments.
const UDP_BYTES: u32 = 1400;
/// Of a piece that the NFS client of the guests counts.
const NFS_PIECE_BITS: f64 = 8.0 * NFS_PIECE as f64;
/// How long servers in emulated guests may take to answer.
const READY_PATIENCE: Duration = Duration::from_secs(120);
/// How long a node of a cluster may take to tell its state, until another one is asked: one that is being
/// moved may stand still.
const NODE_PATIENCE_S: u32 = 1;
/// How many seconds what is run on a host to its end may take.
const PATIENCE_S: &str = "90";
/// Keys of each Redis server, and bytes of a value: 10 MB beside what the server itself needs.
const REDIS_KEYS: u32 = 20_000;
const REDIS_VALUE_BYTES: u32 = 512;
/// As the SLM paper has it.
const REDIS_CLIENTS: u32 = 50;
const REDIS_PIPELINE: u32 = 16;
/// Seconds after the end that count as recovery, and before the start that are drawn.
const AFTER_S: i32 = 5;
const BEFORE_S: i32 = 5;

/// What the guests do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Workload {
    /// Half of the guests exchange single bytes with the other half, as netperf's TCP RR does.
    TcpRr,
    /// Each guest writes files of 100 MB to a server in the source rack.
    Nfs,
    /// Each guest sends to a server in the source rack.
    Iperf3,
    /// Each guest is a Redis server with 50 clients outside.
    Redis,
    /// The guests are one Redis cluster with 50 clients outside.
    RedisCluster,
    /// Each guest computes.
    SubsetSum,
    /// Each guest writes into its memory.
    RandomWrites,
    /// The guests do nothing; like the next ones, no throughput is measured.
    Idle,
    /// Memory is written at the scenario's rate.
    Dirty,
    /// Memory is full of data that no other guest has.
    Random,
    /// The page cache is full of files that every guest has.
    Cache,
}

impl Workload {
    /// As scenarios and the guests' command line write it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::TcpRr => "tcp-rr",
            Self::Nfs => "nfs",
            Self::Iperf3 => "iperf3",
            Self::Redis => "redis",
            Self::RedisCluster => "redis-cluster",
            Self::SubsetSum => "subset-sum",
            Self::RandomWrites => "random-writes",
            Self::Idle => "idle",
            Self::Dirty => "dirty",
            Self::Random => "random",
            Self::Cache => "cache",
        }
    }

    /// Whether it uses the network that the migration uses.
    #[must_use]
    pub fn shares_links(self) -> bool {
        !matches!(self, Self::SubsetSum | Self::RandomWrites) && self.unit().is_some()
    }

    /// What its throughput is measured in, if it is.
    fn unit(self) -> Option<&'static str> {
        match self {
            Self::TcpRr => Some("transactions/s"),
            Self::Nfs | Self::Iperf3 => Some("bit/s"),
            Self::Redis | Self::RedisCluster => Some("requests/s"),
            Self::SubsetSum | Self::RandomWrites => Some("rounds/s"),
            Self::Idle | Self::Dirty | Self::Random | Self::Cache => None,
        }
    }

    /// Guests that the work is counted by.
    fn workers(self, vms: u32) -> u32 {
        match self {
            Self::TcpRr => vms / 2,
            _ => vms,
        }
    }
}

/// Traffic between hosts that do not migrate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Background {
    /// There is none.
    None,
    /// Streams that do not mind losses.
    Udp,
    /// Streams that give way.
    Tcp,
}

impl Background {
    /// As scenarios write it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Udp => "udp",
            Self::Tcp => "tcp",
        }
    }
}

/// The guest that answers guest `number` in the request-response test.
#[must_use]
pub fn partner(number: u32, vms: u32) -> Option<u32> {
    let half = vms / 2;
    (number <= half).then_some(number + half)
}

/// Throughput around a move.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Throughput {
    /// What does the work.
    pub name: String,
    /// Of all rates.
    pub unit: String,
    /// Guests or streams that the rates are the sums of.
    pub workers: u32,
    /// Mean rate before the move.
    pub before_per_s: f64,
    /// From the first VM's start to the end of the last one's move.
    pub during_per_s: f64,
    /// In the seconds after that.
    pub after_per_s: f64,
    /// `during_per_s / before_per_s`.
    pub during_of_before: Option<f64>,
    /// The rate in the preparation phase before that, where there is one, as a part of `before_per_s`.
    #[serde(default)]
    pub prepare_of_before: Option<f64>,
    /// How much later work is done that had to be done meanwhile, recovery included.
    pub lost_s: Option<f64>,
    /// Mean rate of each second, counted from the first VM's start.
    pub series: Vec<[f64; 2]>,
}

impl Throughput {
    /// What a run has under a key of its `application`.
    #[must_use]
    pub fn of_run(run: &Run, key: &str) -> Option<Self> {
        serde_json::from_value(run.application.get(key)?.clone()).ok()
    }

    fn of(rates: &Rates, times: &Times) -> Self {
        let Times {
            before: [zero, before],
            prepare_s,
            start,
            end,
        } = *times;
        let recovered = UnixMs(end.0 + f64::from(AFTER_S) * 1e3);
        let [before_per_s, during_per_s, after_per_s, all] = [
            (zero, before),
            (start, end),
            (end, recovered),
            (start, recovered),
        ]
        .map(|(from, to)| rates.per_s(from, to));
        let known = before_per_s > 0.0;
        let preparing = prepare_s.filter(|seconds| *seconds > 0.0).map(|seconds| {
            let from = UnixMs(start.0 - seconds * 1e3);
            rates.per_s(from, start)
        });
        // The seconds of a migration fit.
        #[allow(clippy::cast_possible_truncation)]
        let last = recovered.s_since(start).ceil() as i32;
        Self {
            before_per_s,
            during_per_s,
            after_per_s,
            during_of_before: known.then(|| during_per_s / before_per_s),
            prepare_of_before: preparing.filter(|_| known).map(|rate| rate / before_per_s),
            lost_s: known.then(|| (1.0 - all / before_per_s) * recovered.s_since(start)),
            series: rates.series(start, (-BEFORE_S, last)),
            ..Self::default()
        }
    }
}

/// When what happened around a move.
#[derive(Clone, Copy, Debug)]
struct Times {
    /// Begin and end of what is measured before it.
    before: [UnixMs; 2],
    /// Length of the preparation phase, which ends as the first VM starts.
    prepare_s: Option<f64>,
    /// Start of the first VM's move.
    start: UnixMs,
    /// End of the last one's.
    end: UnixMs,
}

/// Servers that guests need when they boot, and whose output may be the measure.
pub fn servers(net: &Net, scenario: &Scenario, prefix: &str) -> anyhow::Result<Vec<Meter>> {
    let Some(host) = net.server() else {
        return Ok(Vec::new());
    };
    match scenario.workloads.first() {
        Some(Workload::Nfs) => {
            let pid = format!("-p /run/ganesha/{prefix}.pid");
            let line = format!("/usr/bin/ganesha.nfsd -F -L /dev/null {pid}");
            Ok(vec![keep_on(host, &line, meter::nothing)?])
        }
        Some(Workload::Iperf3) => (1..=scenario.vms())
            .map(|number| {
                let port = IPERF_FIRST_PORT + number;
                let line = format!("/usr/bin/iperf3 -s -p {port} -i 0.5 -f k --forceflush");
                keep_on(host, &line, meter::iperf3)
            })
            .collect(),
        _ => Ok(Vec::new()),
    }
}

/// A program of the applications' tree.
fn program(line: &str) -> anyhow::Result<Command> {
    let mut command = Command::new("chroot");
    command
        .arg(install::workloads()?.root)
        .args(line.split(' '));
    Ok(command)
}

/// Runs a program of that tree on a host, to its end.
fn run_on(host: &HostAddress, line: &str) -> anyhow::Result<String> {
    let program = program(line)?;
    let mut command = host.cgroup.enter(&host.namespace);
    command.args(["timeout", PATIENCE_S]);
    command.arg(program.get_program()).args(program.get_args());
    output_on_host(&mut command)
}

/// Asks the nodes of a Redis cluster for its state, one after the other until one answers.
fn cluster_state(nodes: &[String]) -> anyhow::Result<Command> {
    let script = format!(
        r#"root=$1; shift; for node in "$@"; do
timeout --foreground {NODE_PATIENCE_S} chroot "$root" /usr/bin/redis-cli -h "$node" cluster info |
    grep ^cluster_state: && exit; done; echo {CLUSTER_SILENT}"#
    );
    let mut command = Command::new("sh");
    command
        .args(["-c", &script, "sh"])
        .arg(install::workloads()?.root)
        .args(nodes);
    Ok(command)
}

/// Has a program of that tree run on a host, again whenever it ends.
fn keep_on(
    host: &HostAddress,
    line: &str,
    read: fn(&str) -> Option<Reading>,
) -> anyhow::Result<Meter> {
    Meter::start(Some(host), &program(line)?, read)
}

/// What runs beside a move, running.
pub struct Load<'a> {
    bench: &'a Bench<'a>,
    workload: Vec<Meter>,
    background: Vec<Meter>,
    failures: Option<Meter>,
    from: UnixMs,
    to: UnixMs,
}

impl<'a> Load<'a> {
    /// Starts everything that the scenario wants, and measures it for a while.
    pub fn start(bench: &'a Bench<'a>) -> anyhow::Result<Self> {
        let mut load = Self {
            bench,
            workload: Vec::new(),
            background: Vec::new(),
            failures: None,
            from: UnixMs::now(),
            to: UnixMs::now(),
        };
        load.start_workload()?;
        if let Some(kind) = load.background_kind() {
            load.background = background(bench, kind)?;
        }
        if load.is_any() {
            let seconds = bench.scenario.measure_s;
            say(&format!("measuring what runs beside the move, {seconds} s"));
            // Streams begin slowly.
            thread::sleep(Duration::from_secs(2));
            load.from = UnixMs::now();
            thread::sleep(Duration::from_secs(seconds));
            load.to = UnixMs::now();
            load.must_be_under_way()?;
        }
        Ok(load)
    }

    /// What does nothing before the move cannot suffer from it.
    fn must_be_under_way(&self) -> anyhow::Result<()> {
        let rate = |rates: Rates| rates.per_s(self.from, self.to);
        if let Some((kind, _)) = self.workload_kind() {
            under_way(kind.name(), rate(self.workload_rates(kind)))?;
        }
        if let Some(kind) = self.background_kind() {
            under_way(kind.name(), rate(self.background_rates()))?;
        }
        Ok(())
    }

    fn background_rates(&self) -> Rates {
        let mut rates = Rates::default();
        let meters = self.background.iter();
        meters.for_each(|meter| rates.add(meter.rates()));
        rates
    }

    fn is_any(&self) -> bool {
        self.workload_kind().is_some() || !self.background.is_empty()
    }

    /// The application and the unit of its throughput.
    fn workload_kind(&self) -> Option<(Workload, &'static str)> {
        let kind = self.bench.scenario.workloads.first().copied()?;
        Some((kind, kind.unit()?))
    }

    fn background_kind(&self) -> Option<Background> {
        let kind = self.bench.scenario.background.first().copied();
        kind.filter(|kind| *kind != Background::None)
    }

    fn start_workload(&mut self) -> anyhow::Result<()> {
        let Some(server) = self.bench.net.server() else {
            return Ok(());
        };
        let cluster = match self.bench.scenario.workloads.first() {
            Some(Workload::Redis) => false,
            Some(Workload::RedisCluster) => true,
            _ => return Ok(()),
        };
        say("filling the guests' Redis");
        for vm in &self.bench.vms {
            wait_for(
                server,
                &format!("redis-cli -h {} ping", vm.rack_ip()),
                "PONG",
            )
            .with_context(|| format!("waiting for the Redis of {}", vm.name))?;
        }
        let ips: Vec<String> = self
            .bench
            .vms
            .iter()
            .map(|vm| vm.rack_ip().to_string())
            .collect();
        if cluster {
            let nodes: Vec<String> = ips.iter().map(|ip| format!("{ip}:6379")).collect();
            let line = format!(
                "redis-cli --cluster create {} --cluster-yes",
                nodes.join(" ")
            );
            run_on(server, &format!("/usr/bin/{line}"))?;
            let info = format!("redis-cli -h {} cluster info", ips[0]);
            wait_for(server, &info, "cluster_state:ok")?;
        }
        let (of, flag) = if cluster {
            (&ips[..1], " --cluster")
        } else {
            (&ips[..], "")
        };
        for ip in of {
            let base = format!(
                "/usr/bin/redis-benchmark -h {ip}{flag} -c {REDIS_CLIENTS} -P {REDIS_PIPELINE} \
                 -r {REDIS_KEYS}"
            );
            let fill = format!(
                "{base} -q -t set -d {REDIS_VALUE_BYTES} -n {}",
                2 * REDIS_KEYS
            );
            // Its threads were seen to wait for each other for ever.
            run_on(server, &fill).or_else(|_| run_on(server, &fill))?;
            let get = format!("{base} -t get -n 1000000000");
            self.workload
                .push(keep_on(server, &get, meter::redis_benchmark)?);
        }
        if cluster {
            let asked = cluster_state(&ips)?;
            self.failures = Some(Meter::start(Some(server), &asked, meter::cluster_failures)?);
        }
        Ok(())
    }

    fn workload_rates(&self, kind: Workload) -> Rates {
        let mut rates = Rates::default();
        match kind {
            Workload::Redis | Workload::RedisCluster => {
                self.workload
                    .iter()
                    .for_each(|meter| rates.add(meter.rates()));
            }
            Workload::Iperf3 => {
                let meters = self.bench.servers.iter();
                meters.for_each(|meter| rates.add(meter.rates()));
            }
            _ => {
                for vm in &self.bench.vms {
                    rates.add(Rates::of_beats(&self.bench.observer.track(&vm.name).0));
                }
            }
        }
        if kind == Workload::Nfs {
            rates.times(NFS_PIECE_BITS)
        } else {
            rates
        }
    }

    /// What was measured around a move that has ended.
    pub fn figures(&self, outcome: &Outcome, run: &Run) -> anyhow::Result<Figures> {
        let mut figures = Figures::new();
        if !self.is_any() {
            return Ok(figures);
        }
        let start = outcome.first_start();
        let end = run
            .total_migration_time_s
            .map_or_else(UnixMs::now, |seconds| UnixMs(start.0 + seconds * 1e3));
        let recovered = UnixMs(end.0 + f64::from(AFTER_S) * 1e3);
        // Half a second for what is still to be said.
        let rest = recovered.s_since(UnixMs::now()) + 0.5;
        thread::sleep(Duration::try_from_secs_f64(rest).unwrap_or_default());
        let times = Times {
            before: [self.from, self.to],
            prepare_s: run.prepare_time_s,
            start,
            end,
        };
        if let Some((kind, unit)) = self.workload_kind() {
            let measured = Throughput {
                name: kind.name().into(),
                unit: unit.into(),
                workers: kind.workers(self.bench.scenario.vms()),
                ..Throughput::of(&self.workload_rates(kind), &times)
            };
            say(&describe(&measured));
            figures.push((WORKLOAD.into(), serde_json::to_value(measured)?));
        }
        if let Some(kind) = self.background_kind() {
            let measured = Throughput {
                name: kind.name().into(),
                unit: "bit/s".into(),
                workers: self.bench.scenario.beside().pairs,
                ..Throughput::of(&self.background_rates(), &times)
            };
            say(&describe(&measured));
            figures.push((BACKGROUND.into(), serde_json::to_value(measured)?));
        }
        if let Some(meter) = &self.failures {
            let seconds = recovered.s_since(start);
            let failed = meter.rates().per_s(start, recovered) * seconds;
            figures.push(("redis_cluster_failed_s".into(), json!(failed)));
        }
        Ok(figures)
    }
}

fn under_way(what: &str, per_s: f64) -> anyhow::Result<()> {
    ensure!(
        per_s > 0.0,
        "{what} was to run beside the move, and did nothing before it"
    );
    Ok(())
}

fn describe(measured: &Throughput) -> String {
    format!(
        "{}: {:.0} {} before the move, {:.0} during it, {:.0} after",
        measured.name,
        measured.before_per_s,
        measured.unit,
        measured.during_per_s,
        measured.after_per_s
    )
}

fn background(bench: &Bench<'_>, kind: Background) -> anyhow::Result<Vec<Meter>> {
    let mut meters = Vec::new();
    for [from, to] in bench.net.pairs() {
        let line = "/usr/bin/iperf3 -s -i 0.5 -f k --forceflush";
        meters.push(keep_on(to, line, meter::iperf3)?);
        let udp = match kind {
            Background::Udp => {
                let kbit = bench.scenario.links.edge_mbit as f64 * 1e3 * UDP_SHARE;
                format!(" -u -l {UDP_BYTES} -b {kbit:.0}K")
            }
            _ => String::new(),
        };
        let line = format!("/usr/bin/iperf3 -c {} -t 86400 -i 0{udp}", to.ip);
        meters.push(keep_on(from, &line, meter::nothing)?);
    }
    Ok(meters)
}

/// Asks until the answer contains `wanted`.
fn wait_for(host: &HostAddress, line: &str, wanted: &str) -> anyhow::Result<()> {
    let deadline = Instant::now() + READY_PATIENCE;
    let mut said = String::new();
    while Instant::now() < deadline {
        match run_on(host, &format!("/usr/bin/{line}")) {
            Ok(answer) if answer.contains(wanted) => return Ok(()),
            Ok(answer) => said = answer,
            Err(error) => said = format!("{error:#}"),
        }
        thread::sleep(Duration::from_millis(300));
    }
    bail!("`{line}` does not say {wanted}, but: {}", said.trim())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observer::Beat;

    #[test]
    fn half_of_the_guests_ask_the_other_half() {
        let partners: Vec<_> = (1..=4).map(|number| partner(number, 4)).collect();
        assert_eq!(partners, [Some(3), Some(4), None, None]);
        assert_eq!(partner(1, 1), None);
    }

    #[test]
    fn what_a_move_costs_an_application_is_counted_until_it_has_recovered() {
        // 10 rounds a second, none between second 10 and 12.
        let beats: Vec<Beat> = (0..30u32)
            .map(|second| {
                let stopped = second.clamp(10, 12) - 10;
                Beat {
                    at: UnixMs(f64::from(second) * 1e3),
                    host: "s1".into(),
                    boot: "b".into(),
                    sequence: second.into(),
                    ready: true,
                    rounds: u64::from(10 * (second - stopped)),
                    round_ms: 100.0,
                    ..Beat::default()
                }
            })
            .collect();
        let at = |second: f64| UnixMs(second * 1e3);
        let rates = Rates::of_beats(&beats);
        let times = Times {
            before: [at(0.0), at(8.0)],
            prepare_s: None,
            start: at(9.0),
            end: at(13.0),
        };
        let measured = Throughput::of(&rates, &times);
        assert!((measured.before_per_s - 10.0).abs() < 1e-9);
        assert!((measured.during_of_before.unwrap() - 0.5).abs() < 1e-9);
        assert!((measured.after_per_s - 10.0).abs() < 1e-9);
        assert!((measured.lost_s.unwrap() - 2.0).abs() < 1e-9);
        assert_eq!(measured.series[0], [-5.0, 10.0]);
        assert_eq!(measured.series.len(), 14);
        assert_eq!(measured.prepare_of_before, None);
        // The preparation phase had the two seconds in which nothing was done, and two others.
        let prepared = Times {
            prepare_s: Some(4.0),
            start: at(13.0),
            end: at(14.0),
            ..times
        };
        let part = Throughput::of(&rates, &prepared).prepare_of_before.unwrap();
        assert!((part - 0.5).abs() < 1e-9, "{part}");
    }

    #[test]
    fn what_did_nothing_before_the_move_fails_the_run() {
        assert!(under_way("udp", 0.1).is_ok());
        let error = under_way("udp", 0.0).unwrap_err();
        assert!(error.to_string().starts_with("udp was to run"), "{error}");
    }
}
