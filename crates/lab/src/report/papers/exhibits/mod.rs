//! The papers' tables and figures. The numbers in the field `paper` are the papers'; everything else
//! on the page is computed from results.

mod irlm;
mod own;
mod slm;

use super::claim::{Claim, Read};
use crate::load::{BACKGROUND, Throughput, WORKLOAD};
use crate::overhead::{FIGURES, Overhead};
use crate::report::metric::Unit;
use crate::results::Run;

/// A table or figure.
pub(super) struct Exhibit {
    pub(super) title: &'static str,
    /// Scenario whose runs it is drawn from.
    pub(super) scenario: &'static str,
    /// What the paper says of it beyond the claims' numbers.
    pub(super) paper: &'static str,
    pub(super) plots: &'static [Plot],
    pub(super) claims: &'static [Claim],
}

/// All of them, in the papers' order, and ours after them.
pub(super) fn all() -> impl Iterator<Item = &'static Exhibit> {
    [irlm::ALL, slm::ALL, own::ALL].into_iter().flatten()
}

/// Those of the papers, without ours.
pub(super) fn of_papers() -> impl Iterator<Item = &'static Exhibit> {
    [irlm::ALL, slm::ALL].into_iter().flatten()
}

/// What is drawn.
pub(super) enum Plot {
    /// Against the number of hosts, or of VMs on a host; bars where there is one topology only.
    Sweep(Measure),
    /// Throughput second by second.
    Seconds {
        title: &'static str,
        key: &'static str,
        unit: Unit,
    },
}

pub(super) struct Measure {
    pub(super) title: &'static str,
    pub(super) field: &'static str,
    pub(super) unit: Unit,
    pub(super) read: Read,
}

/// Hardware of the papers, as they describe it.
pub(super) const IRLM_HARDWARE: &str = "IRLM: 13 hosts with two quad-core 2 GHz processors, 16 GB \
    and Gigabit Ethernet, a core link of 10 Gbit/s; 4 KVM guests of 1 GB with 2 processors on each \
    host; OC is the online compression of QEMU, GM gang migration.";
pub(super) const SLM_HARDWARE: &str = "SLM: 3 hosts with two Xeon E5-2620 v2, 128 GB and Gigabit \
    Ethernet; KVM guests of 1 GB (4 GB for Redis), at least five repeats.";

const fn sweep(title: &'static str, field: &'static str, unit: Unit, read: Read) -> Plot {
    Plot::Sweep(Measure {
        title,
        field,
        unit,
        read,
    })
}

const CORE: Read = |run| run.core_bytes.map(|bytes| bytes as f64);
const TOTAL: Read = |run| run.total_migration_time_s;
const MEAN: Read = |run| run.mean_migration_time_s;
const RUNNING: Read = |run| run.running_at_target_s;
const DOWNTIME: Read = |run| run.downtime_ms.map(|downtime| downtime.mean);
const LITERAL: Read = |run| Some(run.pages?.literal? as f64);
const FOOTPRINT: Read = |run| {
    let of = |footprint: Option<crate::results::Footprint>| Some(footprint?.cgroup_bytes? as f64);
    Some(of(run.target_footprint)? / of(run.source_footprint)?)
};
const GUESTS_PSS: Read = |run| {
    let of =
        |footprint: Option<crate::results::Footprint>| Some(footprint?.guest_pss_bytes? as f64);
    Some(of(run.target_footprint)? / of(run.source_footprint)?)
};
const KEPT: Read = |run| Throughput::of_run(run, WORKLOAD)?.during_of_before;
/// While a preparation phase ran before the moves.
const PREPARE_KEPT: Read = |run| Throughput::of_run(run, WORKLOAD)?.prepare_of_before;
const LOST: Read = |run| Throughput::of_run(run, WORKLOAD)?.lost_s;
const BESIDE_KEPT: Read = |run| Throughput::of_run(run, BACKGROUND)?.during_of_before;
const COMPUTING: Read = |run| overhead(run, "subset-sum");
const WRITING: Read = |run| overhead(run, "random-writes");

fn overhead(run: &Run, workload: &str) -> Option<f64> {
    let measured = run.application.get(FIGURES)?.clone();
    let measured: Overhead = serde_json::from_value(measured).ok()?;
    measured
        .overhead_percent
        .filter(|_| measured.workload == workload)
}

const CLAIM: Claim = Claim {
    what: "",
    paper: None,
    unit: Unit::Share,
    field: "",
    read: CORE,
    of: "irlm",
    against: None,
    beside: None,
};
