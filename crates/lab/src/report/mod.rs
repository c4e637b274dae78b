//! What a run's results look like to people: a page with plots, and a table for the terminal.
//!
//! Goals: readable offline and without scripts, on light and dark screens, every number traced
//! to its field of `results.json`, every sentence computed. Non-goals: interaction, archives of
//! many runs (see [`crate::compare`] for two or more).

mod bars;
mod bounds;
mod faults;
mod kinds;
mod latency;
mod lines;
pub(crate) mod metric;
mod overhead;
mod page;
pub mod papers;
#[cfg(test)]
pub(crate) mod sample;
mod scale;
mod sentence;
pub(crate) mod spread;
mod svg;
mod sweep;
pub(crate) mod table;
pub(crate) mod text;
mod timeline;

use std::path::{Path, PathBuf};

use crate::results::Results;

pub use table::table;

/// Name of the page inside a run's output directory.
pub const FILE_NAME: &str = "report.html";

/// The page could not be written.
#[derive(Debug, thiserror::Error)]
#[error("{path} cannot be written")]
pub struct WriteError {
    path: PathBuf,
    #[source]
    source: std::io::Error,
}

/// Writes `report.html` into `dir` and returns its path.
pub fn write(results: &Results, dir: &Path) -> Result<PathBuf, WriteError> {
    let path = dir.join(FILE_NAME);
    match std::fs::write(&path, html(results)) {
        Ok(()) => Ok(path),
        Err(source) => Err(WriteError { path, source }),
    }
}

/// The page itself.
#[must_use]
pub fn html(results: &Results) -> String {
    page::render(results).into_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_needs_no_network_and_no_script() {
        let page = html(&sample::results());
        for outside in ["http:", "https:", "<script", "@import", "url(", "<link"] {
            assert!(!page.contains(outside), "the page contains {outside}");
        }
    }

    #[test]
    fn every_plot_names_its_field_and_says_what_it_shows() {
        let page = html(&sample::results());
        // In pre-copy it is the total time.
        let is_shown = |metric: &&metric::Metric| metric.field != metric::RUNNING_TIME.field;
        for metric in metric::ALL.iter().filter(is_shown) {
            assert!(
                page.contains(&format!("runs[].{}", metric.field)),
                "{}",
                metric.field
            );
        }
        assert!(page.contains("The core traffic of gang+zstd is 14 % of stock's"));
        assert!(page.contains("With gang+zstd all VMs are sent after 12.5 s"));
    }

    #[test]
    fn a_measure_that_no_run_has_is_named_and_not_plotted() {
        let mut results = sample::results();
        results
            .runs
            .iter_mut()
            .for_each(|run| run.target_footprint_bytes = None);
        let page = html(&results);
        assert!(!page.contains(metric::TARGET_FOOTPRINT.title));
        assert!(page.contains("Not measured in these runs: <code>target_footprint_bytes</code>"));
    }

    #[test]
    fn a_different_page_turns_the_verdict() {
        let mut results = sample::results();
        assert!(html(&results).contains("verdict whole"));
        results.runs[0].mismatched_pages = Some(1);
        assert!(html(&results).contains("verdict broken"));
    }

    #[test]
    fn how_long_memory_follows_is_shown_beside_when_vms_run() {
        let mut results = sample::results();
        for run in &mut results.runs {
            run.mode = "post-copy".into();
            run.running_at_target_s = Some(0.5);
        }
        let page = html(&results);
        assert!(page.contains("runs[].running_at_target_s"));
        assert!(page.contains("Time until all VMs run at their targets"));
    }

    #[test]
    fn stamps_are_said_to_be_intact_only_where_some_were_checked() {
        let mut results = sample::results();
        assert!(html(&results).contains("every stamp that guests checked intact"));
        results
            .runs
            .iter_mut()
            .for_each(|run| run.stamp_errors = None);
        let page = html(&results);
        assert!(page.contains("no stamps checked in the guests"), "{page}");
        results.runs[0].compared_pages = None;
        let page = html(&results);
        assert!(page.contains("In 1 run neither was memory compared"));
        assert!(page.contains("verdict open"));
    }

    #[test]
    fn a_failed_run_is_shown_with_its_reason() {
        let mut results = sample::results();
        results.runs[0].failure = Some("vm1 <did> not start".into());
        assert!(html(&results).contains("vm1 &lt;did&gt; not start"));
        let table = table(&results);
        assert!(table.contains("stock (repeat 0) failed: vm1 <did> not start"));
        assert!(table.contains("3, 1 failed"), "{table}");
    }

    #[test]
    fn the_table_has_a_line_for_each_technique_with_its_ratio_to_stock() {
        let table = table(&sample::results());
        let line = |name: &str| table.lines().find(|line| line.starts_with(name)).unwrap();
        assert!(line("stock ").contains("1.00"));
        assert!(line("gang+zstd ").contains("0.14"));
        assert!(line("gang+zstd ").trim_end().ends_with('0'));
    }

    #[test]
    fn results_without_a_single_measure_still_make_a_page() {
        let mut results = sample::results();
        results.runs = vec![crate::results::Run {
            technique: "oc".into(),
            ..Default::default()
        }];
        assert!(html(&results).contains("Memory was not compared"));
        assert!(html(&results).contains("verdict open"));
        results.runs.clear();
        assert!(html(&results).contains("racks-small"));
    }

    #[test]
    fn the_page_is_written_beside_the_results() {
        let dir = tempfile::tempdir().unwrap();
        let path = write(&sample::results(), dir.path()).unwrap();
        assert_eq!(path, dir.path().join(FILE_NAME));
        assert!(std::fs::read_to_string(path).unwrap().ends_with("</html>"));
    }
}
