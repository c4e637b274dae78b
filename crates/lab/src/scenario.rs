//! Scenarios: what is built, what runs on it and which techniques move it. Files in `scenarios/`.

use std::path::PathBuf;

use anyhow::{Context, ensure};
use serde::Deserialize;
use toml::Table;

use crate::after::After;
use crate::balloon::Balloon;
use crate::catalog;
use crate::fault::Fault;
pub use crate::load::{Background, Workload};
use crate::matrix::Matrix;
use crate::net::{Beside, Links};
use crate::overhead::Preparation;
pub use crate::technique::{Preset, Stock, Technique};

/// One experiment.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// One line for `gangway-lab list`.
    pub title: String,
    /// In the order in which they run, each on guests of its own, which begin alike.
    pub techniques: Vec<Technique>,
    /// How often each technique runs.
    #[serde(default = "once")]
    pub repeats: u32,
    /// Seconds between the last guest's being ready and the migration.
    #[serde(default = "settle")]
    pub settle_s: u64,
    /// Seconds for which the guests stay at their sources, merged, before it is read what they hold
    /// there and they are moved.
    #[serde(default)]
    pub stay_s: u64,
    /// Seconds for which the guests run at their targets before it is read what they hold there.
    #[serde(default)]
    pub rest_s: u64,
    /// Whether plans with scope `rack` name the VMs that stay on target hosts.
    #[serde(default)]
    pub seeds: bool,
    /// A run that takes longer has failed.
    #[serde(default = "patience")]
    pub patience_s: u64,
    /// How many of them.
    pub hosts: Hosts,
    /// Speed of the network.
    pub links: Links,
    /// What the VMs are.
    pub vm: Vm,
    /// Which QEMUs run them.
    #[serde(default)]
    pub qemu: Versions,
    /// What goes wrong, and when.
    #[serde(default)]
    pub fault: Option<Fault>,
    /// Whether the source hosts' guests are merged by KSM before they are moved.
    #[serde(default)]
    pub ksm: bool,
    /// Whether KSM goes on while they move.
    #[serde(default)]
    pub ksm_goes_on: bool,
    /// Whether the least that `full` could send is computed from the guests' memory.
    #[serde(default)]
    pub bounds: bool,
    /// What the preparation phase costs the guests is measured, instead of moving them.
    #[serde(default)]
    pub preparation: Option<Preparation>,
    /// Faults that are tried one after the other, each on guests of its own, which begin alike.
    #[serde(default)]
    pub matrix: Option<Matrix>,
    /// What happens to the group once it has arrived; with Gangway's techniques only.
    #[serde(default)]
    pub after: After,
    /// Whether what the guests had when they stopped at their sources is compared with what they have at
    /// their targets, after they have run there. With Gangway's techniques only.
    #[serde(default)]
    pub check_stamps: bool,
    /// What is done with the guests' balloons; `vm.balloon` gives them some.
    #[serde(default)]
    pub balloon: Option<Balloon>,
    /// Longest switch-over that plans allow, and what stock QEMU is told; its own 300 ms if absent.
    #[serde(default)]
    pub downtime_limit_ms: Option<u64>,
    /// What each VM's memory may take of the links, in Mbit/s: in post-copy of stock QEMU, in all of a move
    /// of Gangway's. Without, there is no limit.
    #[serde(default)]
    pub push_mbit: Option<u64>,
    /// Processes of a stand-alone index in the source rack; with none, an agent has the index.
    #[serde(default)]
    pub index: u32,
    /// The group is prepared so many seconds before it is migrated, which then does not look at
    /// the memory again.
    #[serde(default)]
    pub stale_s: Option<f64>,
    /// Before a move with Gangway `gangway survey` forecasts what it will send.
    #[serde(default)]
    pub survey: bool,
    /// What the guests do, each in runs of its own, with its throughput measured.
    #[serde(default)]
    pub workloads: Vec<Workload>,
    /// What other hosts send over the core link, each kind in runs of its own.
    #[serde(default)]
    pub background: Vec<Background>,
    /// Seconds for which what runs beside the move is measured before it.
    #[serde(default = "measure")]
    pub measure_s: u64,
    /// Whether each VM is held at hand-over until its memory has been compared. Without, what an
    /// application sees is the technique's own.
    #[serde(default = "yes")]
    pub compare: bool,
    /// Keys of the agents' configuration, beside those that the lab sets.
    #[serde(default)]
    pub agent: Table,
    /// `gangway` to test; the one beside `gangway-lab` if absent.
    #[serde(default)]
    pub gangway: Option<PathBuf>,
}

/// Counts.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hosts {
    /// Hosts in the source rack.
    pub source: u32,
    /// Hosts in the target rack.
    pub target: u32,
    /// VMs on each source host.
    pub vms_per_host: u32,
    /// VMs on each target host that run there already, and stay.
    #[serde(default)]
    pub residents_per_host: u32,
    /// Memory of each target host, in MiB; all of the machine's if absent.
    #[serde(default)]
    pub target_memory_mb: Option<u64>,
    /// Runs with so many hosts in each rack, one set of runs for each count.
    #[serde(default)]
    pub sweep: Vec<u32>,
    /// As `sweep`, for the VMs on each source host.
    #[serde(default)]
    pub vms_sweep: Vec<u32>,
    /// Of a sweep only the largest topology is repeated, the others run once.
    #[serde(default)]
    pub sweep_once: bool,
}

/// What each VM is. The workload's keys are those of the guest's kernel command line.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vm {
    /// Memory in MiB.
    pub memory_mb: u64,
    /// Virtual processors.
    #[serde(default = "one_cpu")]
    pub cpus: u32,
    /// Chipset.
    #[serde(default)]
    pub machine: Machine,
    /// What carries out their instructions.
    #[serde(default)]
    pub accel: Accel,
    /// Whether it has a virtio-blk disk on storage that both racks share.
    #[serde(default)]
    pub disk: bool,
    /// Whether all VMs begin as copies of one that was booted, its memory mapped copy-on-write.
    #[serde(default)]
    pub template: bool,
    /// Whether it has a virtio balloon that reports free pages.
    #[serde(default)]
    pub balloon: bool,
    /// Kernels that the VMs have in turn: Debian 12's alone, or with 2 the next Debian's, too.
    #[serde(default = "one_kernel")]
    pub kernels: u32,
    /// Trust domains, to which the VMs belong in turn.
    #[serde(default = "one_domain")]
    pub domains: u32,
    /// `idle`, `stamp`, `dirty`, `alike` (as `dirty`, with the same bytes in every guest), `stress`, `churn`,
    /// `cpu`, `random`, `cache`, `subset-sum` or `random-writes`. A scenario's workloads are in its place.
    pub mode: String,
    /// Only every so many-th VM has the mode, the others are idle.
    #[serde(default = "every_one")]
    pub busy_every: u32,
    /// `subset-sum` does 2 to the power of this many steps a round, `random-writes` a sixteenth of them.
    #[serde(default)]
    pub work_log2: u32,
    /// MiB that are stamped and checked.
    #[serde(default)]
    pub stamp_mb: u32,
    /// Whether these are checked slowly and never written, so that a guest stays as good as idle.
    #[serde(default)]
    pub stamp_still: bool,
    /// MiB that are stamped once, and whose pages are touched one after the other, each touch timed.
    #[serde(default)]
    pub touch_mb: u32,
    /// MiB that `dirty`, `stress`, `churn`, `random`, `cache` and `random-writes` fill.
    #[serde(default)]
    pub dirty_mb: u32,
    /// MiB/s that `dirty` writes, and that `stress` visits.
    #[serde(default)]
    pub dirty_rate_mb: u32,
    /// Interval between heartbeats.
    #[serde(default = "heartbeat")]
    pub heartbeat_ms: u32,
}

/// Chipset of the VMs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Machine {
    /// i440FX.
    #[default]
    Pc,
    /// Q35.
    Q35,
}

/// What carries out the guests' instructions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// QEMU.
    #[default]
    Tcg,
    /// The processor, where the kernel lets QEMU use it.
    Kvm,
}

impl Accel {
    /// As scenarios and QEMU write it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcg => "tcg",
            Self::Kvm => "kvm",
        }
    }
}

/// Versions of QEMU, like `10.0`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Versions {
    /// At the source.
    pub source: String,
    /// At the target.
    pub target: String,
    /// Of the machine type, which both must know.
    pub machine: String,
}

impl Default for Versions {
    fn default() -> Self {
        let version = || "10.0".to_owned();
        Self {
            source: version(),
            target: version(),
            machine: version(),
        }
    }
}

fn once() -> u32 {
    1
}

fn settle() -> u64 {
    3
}

fn patience() -> u64 {
    600
}

fn measure() -> u64 {
    8
}

fn yes() -> bool {
    true
}

fn one_cpu() -> u32 {
    1
}

fn heartbeat() -> u32 {
    10
}

fn one_domain() -> u32 {
    1
}

fn one_kernel() -> u32 {
    1
}

fn every_one() -> u32 {
    1
}

impl Scenario {
    /// Loads a scenario by name, or from a file, with `KEY=VALUE` settings on top; its quick
    /// variant with what the scenario changes for it.
    pub fn load(name: &str, settings: &[String], quick: bool) -> anyhow::Result<Self> {
        let mut table = catalog::text_of(name)?
            .parse::<Table>()
            .with_context(|| format!("reading {name}"))?;
        catalog::shorten(&mut table, quick).with_context(|| format!("shortening {name}"))?;
        for setting in settings {
            catalog::apply(&mut table, setting).with_context(|| format!("--set {setting}"))?;
        }
        let scenario: Self = table
            .try_into()
            .with_context(|| format!("understanding scenario {name}"))?;
        scenario.check()?;
        Ok(scenario)
    }

    /// Whether the guests have a card in the network that the migration takes.
    #[must_use]
    pub fn guests_share_links(&self) -> bool {
        self.workloads.iter().any(|one| one.shares_links())
    }

    /// What stands beside the hosts of the migration.
    #[must_use]
    pub fn beside(&self) -> Beside {
        let busy = self.background.iter().any(|one| *one != Background::None);
        let Links {
            core_mbit,
            edge_mbit,
        } = self.links;
        Beside {
            // As in section 3.4 of the IRLM paper: 7 of 10 parts of the core link.
            pairs: if busy && edge_mbit > 0 {
                u32::try_from(core_mbit * 7 / 10 / edge_mbit).unwrap_or(0)
            } else {
                0
            },
            server: self.guests_share_links(),
        }
    }

    /// Each of what runs beside the moves, by itself, with its name.
    #[must_use]
    pub fn each_beside(&self) -> Vec<(Option<&'static str>, Self)> {
        let workloads: Vec<Option<Workload>> = some_or_none(&self.workloads);
        let background: Vec<Option<Background>> = some_or_none(&self.background);
        let both = workloads
            .into_iter()
            .flat_map(|workload| background.iter().map(move |kind| (workload, *kind)));
        both.map(|(workload, kind)| {
            let mut one = self.clone();
            one.workloads = workload.into_iter().collect();
            one.background = kind.into_iter().collect();
            if let Some(workload) = workload {
                workload.name().clone_into(&mut one.vm.mode);
            }
            let named = workload.map(Workload::name).or(kind
                .filter(|kind| *kind != Background::None)
                .map(Background::name));
            (named, one)
        })
        .collect()
    }

    /// VMs of all hosts.
    #[must_use]
    pub fn vms(&self) -> u32 {
        self.hosts.source * self.hosts.vms_per_host
    }

    /// Names and titles of the built-in scenarios.
    pub fn list() -> anyhow::Result<Vec<(&'static str, String)>> {
        let titled =
            |(name, _): (&'static str, &str)| Ok((name, Self::load(name, &[], false)?.title));
        catalog::all().map(titled).collect()
    }

    /// The scenario once for each repeat and each of the sweep's points, in the order of running.
    pub fn rounds(&self) -> impl Iterator<Item = (u32, Self)> {
        let largest = self.largest().vms();
        let runs = move |repeat: u32, one: &Self| {
            repeat == 0 || !self.hosts.sweep_once || one.vms() == largest
        };
        (0..self.repeats).flat_map(move |repeat| {
            let points = self.points().into_iter();
            points
                .filter(move |one| runs(repeat, one))
                .map(move |one| (repeat, one))
        })
    }

    /// The scenario with each of its topologies, smallest first as the scenario lists them.
    #[must_use]
    pub fn points(&self) -> Vec<Self> {
        let hosts = &self.hosts;
        let racks: Vec<(u32, u32)> = if hosts.sweep.is_empty() {
            vec![(hosts.source, hosts.target)]
        } else {
            hosts.sweep.iter().map(|&count| (count, count)).collect()
        };
        let vms = if hosts.vms_sweep.is_empty() {
            vec![hosts.vms_per_host]
        } else {
            hosts.vms_sweep.clone()
        };
        let with = |((source, target), vms_per_host)| Self {
            hosts: Hosts {
                residents_per_host: hosts.residents_per_host,
                source,
                target,
                vms_per_host,
                target_memory_mb: hosts.target_memory_mb,
                sweep: Vec::new(),
                vms_sweep: Vec::new(),
                sweep_once: false,
            },
            ..self.clone()
        };
        racks
            .into_iter()
            .flat_map(|rack| vms.iter().map(move |&vms| (rack, vms)))
            .map(with)
            .collect()
    }

    /// The point with the most VMs: what the results are headed with.
    #[must_use]
    pub fn largest(&self) -> Self {
        let largest = self.points().into_iter().max_by_key(Self::vms);
        largest.unwrap_or_else(|| self.clone())
    }

    fn check(&self) -> anyhow::Result<()> {
        ensure!(
            !self.techniques.is_empty() || self.preparation.is_some(),
            "a scenario needs a technique"
        );
        if let Some(preparation) = &self.preparation {
            preparation.check()?;
        }
        for (name, value, most) in [
            ("repeats", self.repeats, 100),
            ("hosts.source", self.hosts.source, 64),
            ("hosts.target", self.hosts.target, 64),
            ("hosts.vms_per_host", self.hosts.vms_per_host, 64),
            ("vm.cpus", self.vm.cpus, 16),
            ("vm.busy_every", self.vm.busy_every, 64),
            ("vm.kernels", self.vm.kernels, 2),
            ("vm.domains", self.vm.domains, 64),
        ]
        .into_iter()
        .chain(swept("hosts.sweep", &self.hosts.sweep))
        .chain(swept("hosts.vms_sweep", &self.hosts.vms_sweep))
        {
            ensure!(
                (1..=most).contains(&value),
                "{name} = {value}: must be 1 to {most}"
            );
        }
        for seconds in self
            .fault
            .iter()
            .flat_map(|fault| [Some(fault.after_s), fault.for_s])
        {
            let seconds = seconds.unwrap_or(0.0);
            ensure!(
                (0.0..=600.0).contains(&seconds),
                "a fault's time is {seconds} s: it must be 0 to 600"
            );
        }
        ensure!(self.index <= 16, "index = {}: must be 0 to 16", self.index);
        let stale = self.stale_s.unwrap_or(0.0);
        ensure!(
            (0.0..=600.0).contains(&stale),
            "stale_s = {stale}: must be 0 to 600"
        );
        ensure!(
            !self.vm.template || !self.vm.disk,
            "vm.template: copies of one guest have no disk of their own"
        );
        ensure!(
            !self.vm.template || self.workloads.is_empty(),
            "vm.template: copies of one guest have no workload"
        );
        ensure!(
            self.vm.kernels == 1 || !(self.vm.template || self.guests_share_links()),
            "vm.kernels: copies of one guest have one kernel, and applications the modules of one"
        );
        ensure!(
            self.workloads.is_empty() || self.background.iter().all(|k| *k == Background::None),
            "a scenario has workloads or background traffic"
        );
        ensure!(
            self.background.iter().all(|kind| *kind == Background::None)
                || (self.links.edge_mbit > 0 && (1..=200).contains(&self.beside().pairs)),
            "background: 7 of 10 parts of the core link must be 1 to 200 edge links"
        );
        ensure!(
            (1..=120).contains(&self.measure_s),
            "measure_s = {}: must be 1 to 120",
            self.measure_s
        );
        if let Some(balloon) = &self.balloon {
            ensure!(
                self.vm.balloon && (1..=60_000).contains(&balloon.turn_ms),
                "balloon: needs vm.balloon, and turn_ms of 1 to 60000"
            );
        }
        let are_gangways = |technique: &Technique| matches!(technique, Technique::Gangway { .. });
        ensure!(
            !(self.check_stamps || self.balloon.is_some())
                || self.techniques.iter().all(are_gangways),
            "check_stamps and balloon are for Gangway's techniques"
        );
        if let Some(matrix) = &self.matrix {
            ensure!(
                self.fault.is_none(),
                "a scenario has a fault or a matrix of them"
            );
            matrix.cells()?;
        }
        let vm = &self.vm;
        let filled: u64 = [vm.stamp_mb, vm.dirty_mb, vm.touch_mb]
            .map(u64::from)
            .iter()
            .sum();
        // What the guest's kernel, programs and file system were seen to need.
        let own = 100 + self.vm.memory_mb / 8;
        ensure!(
            self.vm.memory_mb >= filled + own,
            "vm.memory_mb = {}: {filled} MiB of workload need {own} MiB more than that",
            self.vm.memory_mb
        );
        Ok(())
    }
}

/// All of them, or that there is none.
fn some_or_none<T: Copy>(all: &[T]) -> Vec<Option<T>> {
    if all.is_empty() {
        vec![None]
    } else {
        all.iter().copied().map(Some).collect()
    }
}

/// The counts of a sweep, to be checked as those of its single points.
fn swept(name: &'static str, counts: &[u32]) -> impl Iterator<Item = (&'static str, u32, u32)> {
    counts.iter().map(move |&count| (name, count, 64))
}

#[cfg(test)]
mod tests;
