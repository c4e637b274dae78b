//! The measures that table, plots and comparison show, as data.

use super::spread::Spread;
use super::text;
use crate::load::{BACKGROUND, Throughput, WORKLOAD};
use crate::results::{Run, Technique};
use crate::touch::TouchLatency;

/// Technique that all others are set against.
pub(crate) const BASELINE: &str = "stock";

/// One number of a run; less is better for all of them.
pub(crate) struct Metric {
    /// Where it stands in `results.json`, below `runs[]`.
    pub(crate) field: &'static str,
    /// Heading of its plot.
    pub(crate) title: &'static str,
    /// As it stands in a sentence: "the ... of gang".
    pub(crate) noun: &'static str,
    /// What is counted, in a few words.
    pub(crate) meaning: &'static str,
    pub(crate) unit: Unit,
    pub(crate) read: fn(&Run) -> Option<f64>,
}

/// How a measure is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Powers of 1000, as links are sold.
    WireBytes,
    /// Powers of 1024, as memory is.
    MemoryBytes,
    Seconds,
    Milliseconds,
    /// Of 4 KiB.
    Pages,
    /// A part of a whole, or of another measure.
    Share,
    /// A difference in percent.
    Percent,
    BitsPerSecond,
    /// Of whatever an application counts.
    PerSecond,
}

impl Unit {
    /// What the steps of an axis are multiples of.
    pub(crate) fn step(self) -> f64 {
        if self == Self::MemoryBytes {
            1_048_576.0
        } else {
            1.0
        }
    }

    pub(crate) fn write(self, value: f64) -> String {
        match self {
            Self::WireBytes => text::wire_bytes(value),
            Self::MemoryBytes => text::memory_bytes(value),
            Self::Seconds => text::seconds(value),
            Self::Milliseconds => text::milliseconds(value),
            Self::Pages => text::pages(value),
            Self::Share => text::ratio(value),
            Self::Percent => format!("{value:.2} %"),
            Self::BitsPerSecond => text::bits_per_second(value),
            Self::PerSecond => format!("{}/s", text::pages(value)),
        }
    }
}

pub(crate) const CORE_BYTES: Metric = Metric {
    field: "core_bytes",
    title: "Bytes on the core link",
    noun: "core traffic",
    meaning: "Both ways, headers included, from the interface counters",
    unit: Unit::WireBytes,
    read: |run| run.core_bytes.map(|bytes| bytes as f64),
};

pub(crate) const TOTAL_TIME: Metric = Metric {
    field: "total_migration_time_s",
    title: "Total migration time",
    noun: "total migration time",
    meaning: "From the first start to the last VM running at its target, and its source free of it \
              where memory follows",
    unit: Unit::Seconds,
    read: |run| run.total_migration_time_s,
};

/// Of moves in which that is not the end.
pub(crate) const RUNNING_TIME: Metric = Metric {
    field: "running_at_target_s",
    title: "Time until all VMs run at their targets",
    noun: "time until all VMs run at their targets",
    meaning: "From the first start, whatever memory is still to follow",
    unit: Unit::Seconds,
    read: |run| run.running_at_target_s.filter(|_| run.mode != "pre-copy"),
};

pub(crate) const MEAN_TIME: Metric = Metric {
    field: "mean_migration_time_s",
    title: "Mean migration time of a VM",
    noun: "mean migration time",
    meaning: "From a VM's start to the end of its move",
    unit: Unit::Seconds,
    read: |run| run.mean_migration_time_s,
};

pub(crate) const EVICTION_TIME: Metric = Metric {
    field: "eviction_time_s",
    title: "Eviction time",
    noun: "eviction time",
    meaning: "Until the source hosts are free of the VMs",
    unit: Unit::Seconds,
    read: |run| run.eviction_time_s,
};

pub(crate) const DOWNTIME_MEAN: Metric = Metric {
    field: "downtime_ms.mean",
    title: "Downtime, mean over the VMs",
    noun: "mean downtime",
    meaning: "Gap in the heartbeats that an observer sees",
    unit: Unit::Milliseconds,
    read: |run| run.downtime_ms.map(|downtime| downtime.mean),
};

pub(crate) const DOWNTIME_MAX: Metric = Metric {
    field: "downtime_ms.max",
    title: "Downtime, worst VM",
    noun: "longest downtime",
    meaning: "Gap in the heartbeats that an observer sees",
    unit: Unit::Milliseconds,
    read: |run| run.downtime_ms.map(|downtime| downtime.max),
};

pub(crate) const SOURCE_FOOTPRINT: Metric = Metric {
    field: "source_footprint_bytes",
    title: "Memory footprint, source hosts",
    noun: "source footprint",
    meaning: "Largest memory of QEMUs and agents, all hosts together",
    unit: Unit::MemoryBytes,
    read: |run| run.source_footprint_bytes.map(|bytes| bytes as f64),
};

pub(crate) const TARGET_FOOTPRINT: Metric = Metric {
    field: "target_footprint_bytes",
    title: "Memory footprint, target hosts",
    noun: "target footprint",
    meaning: "Largest memory of QEMUs and agents, all hosts together",
    unit: Unit::MemoryBytes,
    read: |run| run.target_footprint_bytes.map(|bytes| bytes as f64),
};

pub(crate) const CPU_TIME: Metric = Metric {
    field: "cpu_seconds",
    title: "CPU time",
    noun: "CPU time",
    meaning: "QEMUs and agents of both racks together",
    unit: Unit::Seconds,
    // What the agents used is in there.
    read: |run| Some(run.cpu_seconds.get("all_source")? + run.cpu_seconds.get("all_target")?),
};

pub(crate) const WORK_LOST: Metric = Metric {
    field: "application.workload.lost_s",
    title: "Work lost to the move",
    noun: "work lost to the move",
    meaning: "How much later the guests' work is done that had to be done meanwhile",
    unit: Unit::Seconds,
    read: |run| Throughput::of_run(run, WORKLOAD)?.lost_s,
};

pub(crate) const BACKGROUND_LOST: Metric = Metric {
    field: "application.background.lost_s",
    title: "Traffic of other hosts lost to the move",
    noun: "traffic of other hosts lost to the move",
    meaning: "How much later other hosts' data arrives that was sent meanwhile",
    unit: Unit::Seconds,
    read: |run| Throughput::of_run(run, BACKGROUND)?.lost_s,
};

pub(crate) const TOUCH_MEDIAN: Metric = Metric {
    field: "application.touch_latency.median_ms",
    title: "Wait for a page, median",
    noun: "median wait for a page",
    meaning: "Touches of pages that were not there yet, timed inside the guests",
    unit: Unit::Milliseconds,
    read: |run| TouchLatency::of_run(run)?.median_ms,
};

pub(crate) const TOUCH_P99: Metric = Metric {
    field: "application.touch_latency.p99_ms",
    title: "Wait for a page, 99th percentile",
    noun: "99th percentile of the wait for a page",
    meaning: "Touches of pages that were not there yet, timed inside the guests",
    unit: Unit::Milliseconds,
    read: |run| TouchLatency::of_run(run)?.p99_ms,
};

/// In the order in which they are plotted and compared.
pub(crate) const ALL: &[Metric] = &[
    CORE_BYTES,
    TOTAL_TIME,
    RUNNING_TIME,
    DOWNTIME_MEAN,
    DOWNTIME_MAX,
    EVICTION_TIME,
    MEAN_TIME,
    SOURCE_FOOTPRINT,
    TARGET_FOOTPRINT,
    CPU_TIME,
    TOUCH_MEDIAN,
    TOUCH_P99,
    WORK_LOST,
    BACKGROUND_LOST,
];

impl Metric {
    /// Over the completed repetitions of a technique in which it was measured.
    pub(crate) fn spread(&self, technique: &Technique<'_>) -> Option<Spread> {
        Spread::of(technique.completed().filter_map(self.read))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_time_of_agents_is_counted_once() {
        let times = [
            ("agents_source", 1.0),
            ("agents_target", 2.0),
            ("all_source", 10.0),
            ("all_target", 20.0),
        ];
        let run = |cpu: &[(&str, f64)]| Run {
            cpu_seconds: cpu.iter().map(|&(of, s)| (of.to_owned(), s)).collect(),
            ..Run::default()
        };
        assert_eq!((CPU_TIME.read)(&run(&times)), Some(30.0));
        assert_eq!((CPU_TIME.read)(&run(&times[..2])), None);
    }

    #[test]
    fn what_a_failed_run_measured_is_in_no_mean() {
        let run = |core_bytes, failure: Option<&str>| Run {
            core_bytes: Some(core_bytes),
            failure: failure.map(str::to_owned),
            ..Run::default()
        };
        let runs = [run(10, None), run(1000, Some("a VM stayed")), run(20, None)];
        let technique = |runs: &'_ [Run]| -> Option<Spread> {
            CORE_BYTES.spread(&Technique {
                name: "gang".into(),
                runs: runs.iter().collect(),
            })
        };
        let spread = technique(&runs).unwrap();
        assert_eq!((spread.runs, spread.mean, spread.max), (2, 15.0, 20.0));
        assert_eq!(technique(&runs[1..2]), None);
    }
}
