//! The papers' tables and figures. The numbers in the field `paper` are the papers'; everything else
//! on the page is computed from results.

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
const DOWNTIME: Read = |run| run.downtime_ms.map(|downtime| downtime.mean);
const LITERAL: Read = |run| Some(run.pages?.literal? as f64);
const FOOTPRINT: Read = |run| {
    let of = |footprint: Option<crate::results::Footprint>| Some(footprint?.cgroup_bytes? as f64);
    Some(of(run.target_footprint)? / of(run.source_footprint)?)
};
const KEPT: Read = |run| Throughput::of_run(run, WORKLOAD)?.during_of_before;
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

const TABLE_1: Claim = Claim {
    field: "application.workload.during_of_before",
    read: KEPT,
    ..CLAIM
};

const NFS: Claim = Claim {
    what: "part of its NFS write bandwidth that a guest keeps, with the move",
    beside: Some("nfs"),
    ..TABLE_1
};

const RR: Claim = Claim {
    what: "part of its TCP request-response rate that a guest keeps, with the move",
    beside: Some("tcp-rr"),
    ..TABLE_1
};

const SLM: Claim = Claim {
    of: "slm",
    against: Some("stock"),
    ..CLAIM
};

pub(super) const ALL: &[Exhibit] = &[
    Exhibit {
        title: "IRLM figure 4: bytes on the core link, idle guests",
        scenario: "irlm-fig4",
        paper: "The difference between gang migration and IRLM grows with the number of hosts.",
        plots: &[sweep(
            "Bytes on the core link",
            "core_bytes",
            Unit::WireBytes,
            CORE,
        )],
        claims: &[
            Claim {
                what: "core traffic",
                paper: Some(0.56),
                field: "core_bytes",
                against: Some("stock"),
                ..CLAIM
            },
            Claim {
                what: "core traffic",
                paper: Some(0.83),
                field: "core_bytes",
                against: Some("gang"),
                ..CLAIM
            },
        ],
    },
    Exhibit {
        title: "IRLM figure 5: migration time, idle guests",
        scenario: "irlm-fig4",
        paper: "The paper's total migration time is the mean over the VMs.",
        plots: &[
            sweep(
                "Mean migration time of a VM",
                "mean_migration_time_s",
                Unit::Seconds,
                MEAN,
            ),
            sweep(
                "Total migration time",
                "total_migration_time_s",
                Unit::Seconds,
                TOTAL,
            ),
        ],
        claims: &[
            Claim {
                what: "mean migration time",
                paper: Some(0.74),
                field: "mean_migration_time_s",
                read: MEAN,
                against: Some("stock"),
                ..CLAIM
            },
            Claim {
                what: "mean migration time",
                paper: Some(1.07),
                field: "mean_migration_time_s",
                read: MEAN,
                against: Some("gang"),
                ..CLAIM
            },
        ],
    },
    Exhibit {
        title: "IRLM table 1: applications in the guests that move",
        scenario: "irlm-table1",
        paper: "NFS, Mbit/s for each VM: 40.93 without migration, 32.16 OC, 33.92 GM, 39.36 IRLM. \
                TCP-RR, transactions a second: 1270 without, 307.85 OC, 399.29 GM, 454.65 IRLM.",
        plots: &[
            sweep(
                "Part of the throughput that is kept",
                "application.workload.during_of_before",
                Unit::Share,
                KEPT,
            ),
            sweep(
                "Work lost to the move",
                "application.workload.lost_s",
                Unit::Seconds,
                LOST,
            ),
        ],
        claims: &[
            Claim {
                paper: Some(39.36 / 40.93),
                ..NFS
            },
            Claim {
                of: "gang",
                paper: Some(33.92 / 40.93),
                ..NFS
            },
            Claim {
                of: "stock",
                paper: Some(32.16 / 40.93),
                ..NFS
            },
            Claim {
                paper: Some(454.65 / 1270.0),
                ..RR
            },
            Claim {
                of: "gang",
                paper: Some(399.29 / 1270.0),
                ..RR
            },
            Claim {
                of: "stock",
                paper: Some(307.85 / 1270.0),
                ..RR
            },
        ],
    },
    Exhibit {
        title: "IRLM figures 6 and 7: beside UDP streams",
        scenario: "irlm-fig6",
        paper: "From 4 x 4 VMs on the link is full; migration gives way to UDP in proportion to what \
                it sends, and IRLM less than the others.",
        plots: &[
            sweep(
                "Mean migration time of a VM",
                "mean_migration_time_s",
                Unit::Seconds,
                MEAN,
            ),
            sweep(
                "Part of the UDP data that still arrives",
                "application.background.during_of_before",
                Unit::Share,
                BESIDE_KEPT,
            ),
        ],
        claims: &[
            Claim {
                what: "UDP data received",
                paper: Some(1.11),
                field: "application.background.during_of_before",
                read: BESIDE_KEPT,
                against: Some("stock"),
                beside: Some("udp"),
                ..CLAIM
            },
            Claim {
                what: "UDP data received",
                paper: Some(1.057),
                field: "application.background.during_of_before",
                read: BESIDE_KEPT,
                against: Some("gang"),
                beside: Some("udp"),
                ..CLAIM
            },
            Claim {
                what: "part of the UDP data that still arrives",
                field: "application.background.during_of_before",
                read: BESIDE_KEPT,
                of: "full",
                beside: Some("udp"),
                ..CLAIM
            },
        ],
    },
    Exhibit {
        title: "IRLM figures 8 and 9: beside TCP streams",
        scenario: "irlm-fig8",
        paper: "Migration takes almost the time that it takes without the streams.",
        plots: &[
            sweep(
                "Part of the TCP goodput that is kept",
                "application.background.during_of_before",
                Unit::Share,
                BESIDE_KEPT,
            ),
            sweep(
                "Mean migration time of a VM",
                "mean_migration_time_s",
                Unit::Seconds,
                MEAN,
            ),
        ],
        claims: &[
            Claim {
                what: "TCP goodput",
                paper: Some(1.18),
                field: "application.background.during_of_before",
                read: BESIDE_KEPT,
                against: Some("stock"),
                beside: Some("tcp"),
                ..CLAIM
            },
            Claim {
                what: "TCP goodput",
                paper: Some(1.04),
                field: "application.background.during_of_before",
                read: BESIDE_KEPT,
                against: Some("gang"),
                beside: Some("tcp"),
                ..CLAIM
            },
            Claim {
                what: "part of the TCP goodput that is kept",
                field: "application.background.during_of_before",
                read: BESIDE_KEPT,
                of: "full",
                beside: Some("tcp"),
                ..CLAIM
            },
        ],
    },
    Exhibit {
        title: "IRLM table 2: what preparation costs the guests",
        scenario: "irlm-table2",
        paper: "With as many guests as half of the processors 0.34 % computing and 1.99 % writing, \
                with as many as processors 5.85 % and 3.93 %. Here the largest number of guests.",
        plots: &[],
        claims: &[
            Claim {
                what: "overhead for computing guests",
                paper: Some(5.85),
                unit: Unit::Percent,
                field: "application.preparation.overhead_percent",
                read: COMPUTING,
                of: "prepare",
                ..CLAIM
            },
            Claim {
                what: "overhead for writing guests",
                paper: Some(3.93),
                unit: Unit::Percent,
                field: "application.preparation.overhead_percent",
                read: WRITING,
                of: "prepare",
                ..CLAIM
            },
        ],
    },
    Exhibit {
        title: "SLM figures 2 and 4: memory after the move, set against before",
        scenario: "slm-fig4",
        paper: "No significant increase with SLM, a significant one without.",
        plots: &[sweep(
            "Memory at the target as a part of that at the source",
            "target_footprint.cgroup_bytes / source_footprint.cgroup_bytes",
            Unit::Share,
            FOOTPRINT,
        )],
        claims: &[
            Claim {
                what: "footprint at the target set against the source",
                field: "{target,source}_footprint.cgroup_bytes",
                read: FOOTPRINT,
                against: None,
                ..SLM
            },
            Claim {
                what: "footprint at the target set against the source",
                field: "{target,source}_footprint.cgroup_bytes",
                read: FOOTPRINT,
                of: "stock",
                against: None,
                ..SLM
            },
        ],
    },
    Exhibit {
        title: "SLM figure 5: time and pages",
        scenario: "slm-fig5",
        paper: "Reductions of up to 59 % (pre-copy) and 57 % (post-copy) of the time, and 60 % and \
                62 % of the pages.",
        plots: &[
            sweep(
                "Total migration time",
                "total_migration_time_s",
                Unit::Seconds,
                TOTAL,
            ),
            sweep(
                "Pages sent with their bytes",
                "pages.literal",
                Unit::Pages,
                LITERAL,
            ),
        ],
        claims: &[
            Claim {
                what: "total migration time",
                paper: Some(0.41),
                field: "total_migration_time_s",
                read: TOTAL,
                ..SLM
            },
            Claim {
                what: "pages sent with their bytes",
                paper: Some(0.40),
                field: "pages.literal",
                read: LITERAL,
                ..SLM
            },
        ],
    },
    Exhibit {
        title: "SLM section IV-B: downtime",
        scenario: "slm-downtime",
        paper: "Pre-copy: 93 ms without SLM, 96 ms with it; post-copy 290 ms and 300 ms.",
        plots: &[sweep(
            "Mean downtime",
            "downtime_ms.mean",
            Unit::Milliseconds,
            DOWNTIME,
        )],
        claims: &[
            Claim {
                what: "mean downtime",
                paper: Some(96.0),
                unit: Unit::Milliseconds,
                field: "downtime_ms.mean",
                read: DOWNTIME,
                against: None,
                ..SLM
            },
            Claim {
                what: "mean downtime",
                paper: Some(93.0),
                unit: Unit::Milliseconds,
                field: "downtime_ms.mean",
                read: DOWNTIME,
                of: "stock",
                against: None,
                ..SLM
            },
        ],
    },
    Exhibit {
        title: "SLM figure 6: iperf3 in the guests",
        scenario: "slm-fig6",
        paper: "940 Mbit/s fall to about 650 with both pre-copies, which take 19.1 s without SLM and \
                14.8 s with it.",
        plots: &[Plot::Seconds {
            title: "Goodput of all guests, second by second",
            key: WORKLOAD,
            unit: Unit::BitsPerSecond,
        }],
        claims: &[
            Claim {
                what: "total migration time",
                paper: Some(14.8 / 19.1),
                field: "total_migration_time_s",
                read: TOTAL,
                beside: Some("iperf3"),
                ..SLM
            },
            Claim {
                what: "part of the goodput that is kept",
                paper: Some(650.0 / 940.0),
                field: "application.workload.during_of_before",
                read: KEPT,
                against: None,
                beside: Some("iperf3"),
                ..SLM
            },
            Claim {
                what: "work lost to the move",
                unit: Unit::Seconds,
                field: "application.workload.lost_s",
                read: LOST,
                against: None,
                beside: Some("iperf3"),
                ..SLM
            },
        ],
    },
    Exhibit {
        title: "SLM figure 7: a Redis cluster",
        scenario: "slm-fig7",
        paper: "Throughput falls by 40 % during pre-copy, which takes 87 s without SLM and 77 s with \
                it; about 5 s are lost at its end.",
        plots: &[Plot::Seconds {
            title: "Requests of all clients, second by second",
            key: WORKLOAD,
            unit: Unit::PerSecond,
        }],
        claims: &[
            Claim {
                what: "total migration time",
                paper: Some(77.0 / 87.0),
                field: "total_migration_time_s",
                read: TOTAL,
                beside: Some("redis-cluster"),
                ..SLM
            },
            Claim {
                what: "part of the requests that is kept",
                paper: Some(0.6),
                field: "application.workload.during_of_before",
                read: KEPT,
                against: None,
                beside: Some("redis-cluster"),
                ..SLM
            },
            Claim {
                what: "work lost to the move",
                unit: Unit::Seconds,
                field: "application.workload.lost_s",
                read: LOST,
                against: None,
                beside: Some("redis-cluster"),
                ..SLM
            },
            Claim {
                what: "time in which the cluster said that it had failed",
                unit: Unit::Seconds,
                field: "application.redis_cluster_failed_s",
                read: |run| run.application.get("redis_cluster_failed_s")?.as_f64(),
                against: None,
                beside: Some("redis-cluster"),
                ..SLM
            },
        ],
    },
    Exhibit {
        title: "Peers: everything that a user could pick",
        scenario: "peers",
        paper: "Not in the papers.",
        plots: &[
            sweep(
                "Bytes on the core link",
                "core_bytes",
                Unit::WireBytes,
                CORE,
            ),
            sweep(
                "Total migration time",
                "total_migration_time_s",
                Unit::Seconds,
                TOTAL,
            ),
            sweep(
                "Mean downtime",
                "downtime_ms.mean",
                Unit::Milliseconds,
                DOWNTIME,
            ),
        ],
        claims: &[
            Claim {
                what: "core traffic with guests that dirty memory",
                field: "core_bytes",
                of: "full",
                against: Some("stock-multifd-zstd"),
                beside: Some("dirty"),
                ..CLAIM
            },
            Claim {
                what: "total migration time with guests that dirty memory",
                field: "total_migration_time_s",
                read: TOTAL,
                of: "full",
                against: Some("stock-multifd-zstd"),
                beside: Some("dirty"),
                ..CLAIM
            },
            Claim {
                what: "core traffic with idle guests",
                field: "core_bytes",
                of: "full",
                against: Some("stock-multifd-zstd"),
                beside: Some("idle"),
                ..CLAIM
            },
        ],
    },
    Exhibit {
        title: "Guests that deduplication cannot help, and guests with common files",
        scenario: "unlike",
        paper: "Not in the papers.",
        plots: &[
            sweep(
                "Bytes on the core link",
                "core_bytes",
                Unit::WireBytes,
                CORE,
            ),
            sweep(
                "Total migration time",
                "total_migration_time_s",
                Unit::Seconds,
                TOTAL,
            ),
        ],
        claims: &[
            Claim {
                what: "core traffic with unlike guests",
                field: "core_bytes",
                of: "full",
                against: Some("stock"),
                beside: Some("random"),
                ..CLAIM
            },
            Claim {
                what: "total migration time with unlike guests",
                field: "total_migration_time_s",
                read: TOTAL,
                of: "full",
                against: Some("stock"),
                beside: Some("random"),
                ..CLAIM
            },
            Claim {
                what: "core traffic with common files",
                field: "core_bytes",
                of: "full",
                against: Some("stock"),
                beside: Some("cache"),
                ..CLAIM
            },
        ],
    },
];
