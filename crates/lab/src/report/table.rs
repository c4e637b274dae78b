//! The comparison of techniques: once computed, shown on the page and on the terminal.

use super::faults;
use super::metric::{self, BASELINE, Metric};
use super::spread::Spread;
use super::text;
use crate::results::{Results, Run, Technique, Topology};

/// Headings of [`Row::cells`].
pub(crate) const COLUMNS: [&str; 8] = [
    "core bytes",
    "x stock",
    "total time",
    "x stock",
    "downtime mean / max",
    "pages compared",
    "differ",
    "VMs lost",
];

/// Written for a value that was not measured.
pub(super) const NOTHING: &str = "–";

/// One technique.
pub(crate) struct Row {
    pub(crate) technique: String,
    runs: usize,
    /// As [`COLUMNS`].
    pub(crate) cells: [String; COLUMNS.len()],
    pub(crate) integrity: Integrity,
}

impl Row {
    /// How many runs, and how many of them failed.
    pub(crate) fn runs_text(&self) -> String {
        runs_text(self.runs, self.integrity.failures)
    }
}

/// "3", or "3, 1 failed".
pub(crate) fn runs_text(runs: usize, failed: usize) -> String {
    match failed {
        0 => runs.to_string(),
        failed => format!("{runs}, {failed} failed"),
    }
}

/// Whether anything went wrong, over all repetitions of a technique or of all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Integrity {
    pub(crate) compared: Option<u64>,
    pub(crate) mismatched: Option<u64>,
    pub(crate) lost: Option<u64>,
    pub(crate) stamp_errors: Option<u64>,
    pub(crate) failures: usize,
    /// Completed runs in which VMs moved and neither memory was compared nor stamps were checked.
    pub(crate) unchecked: usize,
}

/// What [`Integrity`] comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// In every run memory was compared or stamps were checked, and VMs were counted, and all is well.
    Whole,
    /// Nothing is known to be wrong, but not everything was looked at.
    Open,
    /// Something is known to be wrong.
    Broken,
}

impl Integrity {
    pub(crate) fn of<'a>(runs: impl IntoIterator<Item = &'a Run>) -> Self {
        runs.into_iter().fold(Self::default(), |all, run| Self {
            compared: add(all.compared, run.compared_pages),
            mismatched: add(all.mismatched, run.mismatched_pages),
            lost: add(all.lost, run.vms_lost.map(u64::from)),
            stamp_errors: add(all.stamp_errors, run.stamp_errors),
            failures: all.failures + usize::from(run.failure.is_some()),
            unchecked: all.unchecked + usize::from(is_unchecked(run)),
        })
    }

    pub(crate) fn verdict(&self) -> Verdict {
        let wrong = [self.mismatched, self.lost, self.stamp_errors];
        if self.failures > 0 || wrong.into_iter().flatten().any(|count| count > 0) {
            Verdict::Broken
        } else if self.unchecked == 0 && self.lost.is_some() {
            Verdict::Whole
        } else {
            Verdict::Open
        }
    }
}

/// Whether nothing tells that what was moved has arrived whole. Runs that measure preparation move nothing,
/// and of those that failed that is known.
fn is_unchecked(run: &Run) -> bool {
    let moves = run.technique != crate::overhead::TECHNIQUE;
    moves && run.failure.is_none() && !run.is_checked()
}

/// A sum of what was measured: absent only if nothing was.
fn add(sum: Option<u64>, value: Option<u64>) -> Option<u64> {
    match (sum, value) {
        (Some(sum), Some(value)) => Some(sum + value),
        (sum, value) => sum.or(value),
    }
}

/// A row for each technique, in the order in which they ran.
pub(crate) fn rows(techniques: &[Technique<'_>]) -> Vec<Row> {
    let baseline = techniques
        .iter()
        .find(|technique| technique.name == BASELINE);
    techniques
        .iter()
        .map(|technique| row(technique, baseline))
        .collect()
}

fn row(technique: &Technique<'_>, baseline: Option<&Technique<'_>>) -> Row {
    let value = |metric: &Metric| {
        metric
            .spread(technique)
            .map_or(NOTHING.to_owned(), |spread| write(metric, spread))
    };
    let ratio = |metric: &Metric| {
        let ratio = metric
            .spread(technique)?
            .ratio_to(&metric.spread(baseline?)?);
        ratio.map(text::ratio)
    };
    let ratio = |metric: &Metric| ratio(metric).unwrap_or_else(|| NOTHING.to_owned());
    let mean = |metric: &Metric| metric.spread(technique).map(|spread| spread.mean);
    let downtime = match (mean(&metric::DOWNTIME_MEAN), mean(&metric::DOWNTIME_MAX)) {
        (Some(mean), Some(max)) => {
            format!("{} / {}", text::milliseconds(mean), text::milliseconds(max))
        }
        _ => NOTHING.to_owned(),
    };
    let integrity = Integrity::of(technique.runs.iter().copied());
    let count = |count: Option<u64>| count.map_or(NOTHING.to_owned(), text::count);
    Row {
        technique: technique.name.clone(),
        runs: technique.runs.len(),
        cells: [
            value(&metric::CORE_BYTES),
            ratio(&metric::CORE_BYTES),
            value(&metric::TOTAL_TIME),
            ratio(&metric::TOTAL_TIME),
            downtime,
            count(integrity.compared),
            count(integrity.mismatched),
            count(integrity.lost),
        ],
        integrity,
    }
}

/// The mean, and how far the runs lie from it at most.
fn write(metric: &Metric, spread: Spread) -> String {
    let mean = metric.unit.write(spread.mean);
    let away = (spread.max - spread.mean).max(spread.mean - spread.min);
    if spread.is_known() && spread.mean > 0.0 {
        format!("{mean} ± {}", text::percent(away / spread.mean))
    } else {
        mean
    }
}

/// "2 source hosts and 2 target hosts, 2 VMs of 256 MiB on each source host, ...".
pub(crate) fn topology(topology: &Topology) -> String {
    let rate = |rate: Option<u64>| {
        rate.map_or("unshaped".to_owned(), |bits| {
            text::bits_per_second(bits as f64)
        })
    };
    format!(
        "{} and {}, {} of {} on each source host, core link {}, edge links {}",
        text::plural(topology.source_hosts.into(), "source host"),
        text::plural(topology.target_hosts.into(), "target host"),
        text::plural(topology.vms_per_host.into(), "VM"),
        text::memory_bytes(topology.vm_memory_bytes as f64),
        rate(topology.core_bits_per_second),
        rate(topology.edge_bits_per_second),
    )
}

/// The table for a terminal, with a line about the lab above and about failures below.
#[must_use]
pub fn table(results: &Results) -> String {
    let mut out = format!("{}: {}\n\n", results.scenario, topology(&results.topology));
    if faults::are_in(results) {
        let (lines, summary) = faults::lines(results);
        out += &align(&lines);
        out += "\n";
        out += &summary;
    } else {
        out += &align(&technique_lines(results));
    }
    for run in &results.runs {
        if let Some(failure) = &run.failure {
            out += &format!(
                "\n{} (repeat {}) failed: {failure}\n",
                run.name(),
                run.repeat
            );
        }
    }
    out
}

fn technique_lines(results: &Results) -> Vec<Vec<String>> {
    let mut lines = vec![vec!["technique".to_owned(), "runs".to_owned()]];
    lines[0].extend(COLUMNS.map(str::to_owned));
    for row in rows(&results.techniques()) {
        let mut line = vec![row.technique.clone(), row.runs_text()];
        line.extend(row.cells);
        lines.push(line);
    }
    lines
}

/// Columns to their widest cell: the first to the left, numbers to the right.
pub(crate) fn align(lines: &[Vec<String>]) -> String {
    let columns = lines.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|at| {
            let cells = lines.iter().filter_map(|line| line.get(at));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        })
        .collect();
    let mut out = String::new();
    for line in lines {
        let cells = line
            .iter()
            .zip(&widths)
            .enumerate()
            .map(|(at, (cell, &width))| {
                if at == 0 {
                    format!("{cell:<width$}")
                } else {
                    format!("{cell:>width$}")
                }
            });
        out += cells.collect::<Vec<_>>().join("  ").trim_end();
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(compared: Option<u64>, stamp_errors: Option<u64>) -> Run {
        Run {
            technique: "slm".into(),
            compared_pages: compared,
            mismatched_pages: compared.map(|_| 0),
            stamp_errors,
            vms_lost: Some(0),
            ..Run::default()
        }
    }

    #[test]
    fn all_is_well_only_if_every_run_was_looked_at() {
        let verdict = |runs: &[Run]| Integrity::of(runs).verdict();
        let (compared, stamped) = (run(Some(7), None), run(None, Some(0)));
        let both = [compared.clone(), stamped];
        assert_eq!(verdict(&both), Verdict::Whole);
        let one_unchecked = [compared.clone(), run(None, None)];
        assert_eq!(verdict(&one_unchecked), Verdict::Open);
        assert_eq!(verdict(&[run(None, Some(1))]), Verdict::Broken);
        let stays = Run {
            technique: crate::overhead::TECHNIQUE.into(),
            ..run(None, None)
        };
        assert_eq!(verdict(&[compared, stays]), Verdict::Whole);
        assert_eq!(verdict(&[]), Verdict::Open);
    }

    #[test]
    fn failed_runs_are_counted_beside_the_others() {
        assert_eq!(runs_text(3, 0), "3");
        assert_eq!(runs_text(3, 1), "3, 1 failed");
    }
}
