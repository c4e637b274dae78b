//! Results as a run of `racks-small` might give them, for the tests of the report.

use std::collections::BTreeMap;

use serde_json::json;

use crate::load::{BACKGROUND, Throughput, WORKLOAD};
use crate::results::{Downtime, Pages, Results, Run, Sample, Topology, VmResult, VmTimeline};
use crate::touch::{self, TouchLatency};

/// What sets one technique of the sample apart.
struct Shape {
    technique: &'static str,
    compression: &'static str,
    core_mb: f64,
    seconds: f64,
    downtime_ms: f64,
    literal: Option<u64>,
    reference: Option<u64>,
}

const SHAPES: [Shape; 4] = [
    Shape {
        technique: "stock",
        compression: "none",
        core_mb: 702.0,
        seconds: 61.0,
        downtime_ms: 182.0,
        literal: None,
        reference: None,
    },
    Shape {
        technique: "oc",
        compression: "none",
        core_mb: 655.0,
        seconds: 58.0,
        downtime_ms: 179.0,
        literal: Some(158_000),
        reference: Some(0),
    },
    Shape {
        technique: "gang",
        compression: "none",
        core_mb: 452.0,
        seconds: 40.5,
        downtime_ms: 150.0,
        literal: Some(108_300),
        reference: Some(49_700),
    },
    Shape {
        technique: "gang",
        compression: "zstd",
        core_mb: 98.0,
        seconds: 12.5,
        downtime_ms: 121.0,
        literal: Some(108_300),
        reference: Some(49_700),
    },
];

/// Four techniques, three runs of each, nothing lost.
pub(crate) fn results() -> Results {
    let runs = SHAPES
        .iter()
        .flat_map(|shape| (0..3).map(|repeat| run(shape, repeat)))
        .collect();
    Results {
        scenario: "racks-small".into(),
        versions: BTreeMap::from([
            ("gangway".into(), "0.1.0".into()),
            ("kernel".into(), "6.1.0-56-cloud-amd64".into()),
            ("qemu_source".into(), "10.0.2".into()),
            ("qemu_target".into(), "10.0.2".into()),
        ]),
        topology: Topology {
            source_hosts: 2,
            target_hosts: 2,
            vms_per_host: 2,
            vm_memory_bytes: 256 << 20,
            core_bits_per_second: Some(1_000_000_000),
            edge_bits_per_second: Some(100_000_000),
        },
        runs,
        command: ["gangway-lab", "run", "racks-small"]
            .map(String::from)
            .to_vec(),
        started_unix_s: Some(1_760_000_000),
    }
}

fn run(shape: &Shape, repeat: u32) -> Run {
    let factor = [1.0, 0.96, 1.03][repeat as usize % 3];
    let seconds = shape.seconds * factor;
    let core_mb = shape.core_mb * (1.0 + (factor - 1.0) / 10.0);
    let each_ms = |vm: u32| shape.downtime_ms * factor * (0.9 + 0.1 * f64::from(vm));
    let (total, zero, fill) = (263_400, 90_000, 15_400);
    Run {
        technique: shape.technique.into(),
        mode: "pre-copy".into(),
        compression: shape.compression.into(),
        repeat,
        vms: 4,
        core_bytes: Some(megabytes(core_mb)),
        target_to_target_bytes: Some(0),
        index_bytes: Some(0),
        total_migration_time_s: Some(seconds),
        running_at_target_s: Some(seconds),
        mean_migration_time_s: Some(seconds * 0.93),
        eviction_time_s: Some(seconds + 0.4),
        downtime_ms: Downtime::of((0..4).map(each_ms).collect()),
        source_footprint_bytes: Some(420 << 20),
        target_footprint_bytes: Some(megabytes(430.0 * factor)),
        pages: Some(Pages {
            total,
            zero: Some(zero),
            fill: shape.literal.map(|_| fill),
            literal: Some(shape.literal.unwrap_or(total - zero)),
            reference: shape.reference,
            ..Pages::default()
        }),
        compared_pages: Some(262_144),
        mismatched_pages: Some(0),
        vms_lost: Some(0),
        stamp_errors: Some(0),
        per_vm: (0..4)
            .map(|vm| VmResult {
                vm: format!("vm{vm}"),
                source_host: format!("s{}", vm / 2),
                target_host: format!("t{}", vm / 2),
                migration_time_s: Some(seconds * (0.85 + 0.05 * f64::from(vm))),
                downtime_ms: Some(each_ms(vm)),
                hold_ms: Some(310.0),
                stamp_errors: Some(0),
                remark: None,
            })
            .collect(),
        timeline: (0..4).map(|vm| timeline(vm, seconds, core_mb)).collect(),
        application: [WORKLOAD, BACKGROUND]
            .map(|key| (key.to_owned(), json!(throughput(seconds))))
            .into_iter()
            .chain([(touch::NAME.to_owned(), json!(touches(factor)))])
            .collect(),
        cpu_seconds: [
            ("all_source", 3.1),
            ("all_target", 2.9),
            ("agents_source", 0.8),
            ("agents_target", 0.6),
        ]
        .map(|(of, seconds)| (of.to_owned(), seconds))
        .into(),
        ..Run::default()
    }
}

/// Of something that does 100 a second, and 60 while the VMs move.
fn throughput(seconds: f64) -> Throughput {
    Throughput {
        before_per_s: 100.0,
        during_per_s: 60.0,
        after_per_s: 100.0,
        during_of_before: Some(0.6),
        lost_s: Some(0.4 * seconds),
        ..Throughput::default()
    }
}

/// Of guests that waited for pages now and then.
fn touches(factor: f64) -> TouchLatency {
    TouchLatency {
        touches: 5000,
        faults: 400,
        median_ms: Some(2.1 * factor),
        p99_ms: Some(9.0 * factor),
        longest_ms: Some(12.0 * factor),
        threshold_ms: 0.2,
        slow_before_permille: Some(1.0),
        histogram: vec![[2.1 * factor, 390.0], [12.0 * factor, 10.0]],
    }
}

fn timeline(vm: u32, seconds: f64, core_mb: f64) -> VmTimeline {
    let end = seconds * (0.85 + 0.05 * f64::from(vm));
    let samples = (0..=60)
        .map(|at| {
            let part = f64::from(at) / 60.0;
            Sample {
                t_s: end * part,
                wire_bytes: megabytes(core_mb / 4.0 * part.powf(0.85 + 0.1 * f64::from(vm))),
                remaining_bytes: Some(megabytes(256.0 * (1.0 - part))),
                phase: match at {
                    60 => "moved",
                    58.. => "switch-over",
                    _ => "bulk",
                }
                .into(),
            }
        })
        .collect();
    VmTimeline {
        vm: format!("vm{vm}"),
        samples,
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the sample's own small positive numbers"
)]
fn megabytes(value: f64) -> u64 {
    (value * 1e6) as u64
}
