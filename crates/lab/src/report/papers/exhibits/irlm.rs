//! Section 3 of the IRLM paper.

use super::super::claim::Claim;
use super::{
    BESIDE_KEPT, CLAIM, COMPUTING, CORE, Exhibit, KEPT, LOST, MEAN, PREPARE_KEPT, TOTAL, WRITING,
    sweep,
};
use crate::report::metric::Unit;

const TABLE_1: Claim = Claim {
    field: "application.workload.during_of_before",
    read: KEPT,
    ..CLAIM
};

const NFS: Claim = Claim {
    what: "part of the NFS write bandwidth that is kept",
    beside: Some("nfs"),
    ..TABLE_1
};

const RR: Claim = Claim {
    what: "part of the TCP request-response rate that is kept",
    beside: Some("tcp-rr"),
    ..TABLE_1
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
                "Part of the throughput that is kept in the preparation phase before that",
                "application.workload.prepare_of_before",
                Unit::Share,
                PREPARE_KEPT,
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
];
