//! Section IV of the SLM paper.

use super::super::claim::Claim;
use super::{
    CLAIM, DOWNTIME, Exhibit, FOOTPRINT, GUESTS_PSS, KEPT, LITERAL, LOST, Plot, RUNNING, TOTAL,
    sweep,
};
use crate::load::WORKLOAD;
use crate::report::metric::Unit;

const SLM: Claim = Claim {
    of: "slm",
    against: Some("stock"),
    ..CLAIM
};

const POSTCOPY: Claim = Claim {
    of: "slm post-copy",
    against: Some("stock-postcopy"),
    ..CLAIM
};

pub(super) const ALL: &[Exhibit] = &[
    Exhibit {
        title: "SLM figures 2 and 4: memory after the move, set against before",
        scenario: "slm-fig5",
        paper: "No significant increase with SLM, a significant one without.",
        plots: &[
            sweep(
                "Guests' memory at the target as a part of that at the source, shared pages by their share",
                "target_footprint.guest_pss_bytes / source_footprint.guest_pss_bytes",
                Unit::Share,
                GUESTS_PSS,
            ),
            sweep(
                "Memory of all QEMUs and agents at the target as a part of that at the source",
                "target_footprint.cgroup_bytes / source_footprint.cgroup_bytes",
                Unit::Share,
                FOOTPRINT,
            ),
        ],
        claims: &[
            Claim {
                what: "guests' memory at the target set against the source",
                field: "{target,source}_footprint.guest_pss_bytes",
                read: GUESTS_PSS,
                against: None,
                ..SLM
            },
            Claim {
                what: "guests' memory at the target set against the source",
                field: "{target,source}_footprint.guest_pss_bytes",
                read: GUESTS_PSS,
                of: "stock",
                against: None,
                ..SLM
            },
            Claim {
                what: "footprint at the target set against the source",
                field: "{target,source}_footprint.cgroup_bytes",
                read: FOOTPRINT,
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
                "Total migration time: with post-copy until the source host is free",
                "total_migration_time_s",
                Unit::Seconds,
                TOTAL,
            ),
            sweep(
                "Time until all VMs run at the target",
                "running_at_target_s",
                Unit::Seconds,
                RUNNING,
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
            Claim {
                what: "total migration time",
                paper: Some(0.43),
                field: "total_migration_time_s",
                read: TOTAL,
                ..POSTCOPY
            },
            Claim {
                what: "pages sent with their bytes",
                paper: Some(0.38),
                field: "pages.literal",
                read: LITERAL,
                ..POSTCOPY
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
            Claim {
                what: "mean downtime",
                paper: Some(300.0),
                unit: Unit::Milliseconds,
                field: "downtime_ms.mean",
                read: DOWNTIME,
                against: None,
                ..POSTCOPY
            },
            Claim {
                what: "mean downtime",
                paper: Some(290.0),
                unit: Unit::Milliseconds,
                field: "downtime_ms.mean",
                read: DOWNTIME,
                of: "stock-postcopy",
                against: None,
                ..POSTCOPY
            },
            Claim {
                what: "mean downtime",
                unit: Unit::Milliseconds,
                field: "downtime_ms.mean",
                read: DOWNTIME,
                of: "stock-postcopy-preempt",
                against: None,
                ..POSTCOPY
            },
        ],
    },
    Exhibit {
        title: "SLM figure 6: iperf3 in the guests",
        scenario: "slm-fig6",
        paper: "940 Mbit/s fall to about 650 with both pre-copies, which take 19.1 s without SLM and \
                14.8 s with it. Of its post-copies there are no runs here.",
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
                it; about 5 s are lost at its end. Of its post-copies there are no runs here.",
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
                what: "time in which the cluster said that it had failed, or nothing",
                unit: Unit::Seconds,
                field: "application.redis_cluster_failed_s",
                read: |run| run.application.get("redis_cluster_failed_s")?.as_f64(),
                against: None,
                beside: Some("redis-cluster"),
                ..SLM
            },
        ],
    },
];
