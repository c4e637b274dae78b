//! What the papers do not have.

use super::super::claim::Claim;
use super::{CLAIM, CORE, DOWNTIME, Exhibit, Plot, TOTAL, sweep};
use crate::report::metric::Unit;

const BYTES: Plot = sweep(
    "Bytes on the core link",
    "core_bytes",
    Unit::WireBytes,
    CORE,
);
const TIME: Plot = sweep(
    "Total migration time",
    "total_migration_time_s",
    Unit::Seconds,
    TOTAL,
);

pub(super) const ALL: &[Exhibit] = &[
    Exhibit {
        title: "Peers: everything that a user could pick",
        scenario: "peers",
        paper: "Not in the papers.",
        plots: &[
            BYTES,
            TIME,
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
        plots: &[BYTES, TIME],
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
    Exhibit {
        title: "Guests with the kernels of two Debians",
        scenario: "unlike-kernels",
        paper: "Not in the papers.",
        plots: &[BYTES, TIME],
        claims: &[
            Claim {
                what: "core traffic with two kernels",
                field: "core_bytes",
                of: "full",
                against: Some("stock"),
                ..CLAIM
            },
            Claim {
                what: "core traffic with two kernels, not compressed",
                field: "core_bytes",
                of: "irlm",
                against: Some("stock"),
                ..CLAIM
            },
            Claim {
                what: "total migration time with two kernels",
                field: "total_migration_time_s",
                read: TOTAL,
                of: "full",
                against: Some("stock"),
                ..CLAIM
            },
        ],
    },
];
