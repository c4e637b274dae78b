//! Before and after: two or more result directories side by side.
//!
//! Each later directory is set against the first, technique by technique and measure by
//! measure. A change counts only if the ranges of the runs do not touch; with a single run on
//! either side the range is not known, and the table says so.

use std::path::PathBuf;

use crate::catalog;
use crate::report::metric::{self, Metric};
use crate::report::spread::{Relation, Spread};
use crate::report::table::{self, Integrity};
use crate::report::text;
use crate::results::{FILE_NAME, FileError, Results, Technique};

/// Results could not be compared.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    /// There is nothing to set the first against.
    #[error("a comparison needs two or more result directories")]
    TooFew,
    /// One of them could not be read.
    #[error("results of a run cannot be read")]
    Read(#[from] FileError),
}

/// Reads the results of `dirs` and writes the comparison as text for a terminal. Directories of the
/// papers' evaluation are compared scenario by scenario, those that all of them have.
pub fn run(dirs: &[PathBuf]) -> Result<String, CompareError> {
    if dirs.len() < 2 {
        return Err(CompareError::TooFew);
    }
    let has = |dir: &PathBuf| dir.join(FILE_NAME).exists();
    if dirs.iter().any(|dir| dir.is_file() || has(dir)) {
        return one(dirs);
    }
    let within = |name: &str| dirs.iter().map(|dir| dir.join(name)).collect::<Vec<_>>();
    let common = catalog::PAPERS.iter().map(|name| within(name));
    let common: Vec<_> = common.filter(|dirs| dirs.iter().all(has)).collect();
    if common.is_empty() {
        // Its error names what is missing.
        return one(dirs);
    }
    let texts = common.iter().map(|dirs| one(dirs));
    Ok(texts.collect::<Result<Vec<_>, _>>()?.join("\n"))
}

fn one(dirs: &[PathBuf]) -> Result<String, CompareError> {
    let load = |dir: &PathBuf| {
        Ok(Named {
            name: dir.display().to_string(),
            results: Results::load(dir)?,
        })
    };
    let all = dirs
        .iter()
        .map(load)
        .collect::<Result<Vec<_>, FileError>>()?;
    Ok(compare(&all))
}

/// Written for a value that was not measured.
const NOTHING: &str = "–";

/// Results and what to call them.
struct Named {
    name: String,
    results: Results,
}

fn compare(all: &[Named]) -> String {
    let mut out = String::new();
    for (at, named) in all.iter().enumerate() {
        out += &format!("[{}] {}: {}", at + 1, named.name, named.results.scenario);
        out += &format!(", {}\n", table::topology(&named.results.topology));
    }
    for warning in unlike(all) {
        out += &format!("note: {warning}\n");
    }
    for name in technique_names(all) {
        out += &format!("\n{}", technique(&name, all));
    }
    out
}

/// What else than the measures differs, and so may be the cause.
fn unlike(all: &[Named]) -> Vec<String> {
    let Some((first, rest)) = all.split_first() else {
        return Vec::new();
    };
    let mut notes = Vec::new();
    for (at, named) in rest.iter().enumerate() {
        let label = format!("[{}]", at + 2);
        if named.results.scenario != first.results.scenario {
            notes.push(format!("{label} ran another scenario than [1]"));
        }
        if named.results.topology != first.results.topology {
            notes.push(format!("{label} ran on another topology than [1]"));
        }
        for (what, before) in &first.results.versions {
            let after = named
                .results
                .versions
                .get(what)
                .map_or("absent", String::as_str);
            if after != before {
                notes.push(format!("{what} is {before} in [1] and {after} in {label}"));
            }
        }
    }
    notes
}

fn technique_names(all: &[Named]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for technique in all.iter().flat_map(|named| named.results.techniques()) {
        if !names.contains(&technique.name) {
            names.push(technique.name);
        }
    }
    names
}

/// The table of one technique: a line for each measure, a column for each directory and, from
/// the second on, one for the change.
fn technique(name: &str, all: &[Named]) -> String {
    let found: Vec<Option<Technique<'_>>> = all
        .iter()
        .map(|named| {
            named
                .results
                .techniques()
                .into_iter()
                .find(|one| one.name == name)
        })
        .collect();
    let mut heading = vec![name.to_owned()];
    for (at, technique) in found.iter().enumerate() {
        let runs = technique.as_ref().map_or(0, |one| one.runs.len());
        let completed = technique.as_ref().map_or(0, |one| one.completed().count());
        let mut said = text::plural(runs as u64, "run");
        if completed < runs {
            said += &format!(", {} failed", runs - completed);
        }
        heading.push(format!("[{}] {said}", at + 1));
        heading.extend((at > 0).then(|| "against [1]".to_owned()));
    }
    let mut lines = vec![heading];
    lines.extend(metric::ALL.iter().filter_map(|metric| line(metric, &found)));
    lines.extend(integrity_lines(&found));
    table::align(&lines)
}

/// One measure; `None` if no directory has it.
fn line(metric: &Metric, found: &[Option<Technique<'_>>]) -> Option<Vec<String>> {
    let spreads: Vec<Option<Spread>> = found
        .iter()
        .map(|one| one.as_ref().and_then(|one| metric.spread(one)))
        .collect();
    spreads.iter().any(Option::is_some).then(|| {
        let mut line = vec![format!("  {}", metric.noun)];
        for (at, after) in spreads.iter().enumerate() {
            line.push(after.map_or(NOTHING.to_owned(), |after| metric.unit.write(after.mean)));
            line.extend((at > 0).then(|| match (spreads[0], after) {
                (Some(before), Some(after)) => change(before, *after),
                _ => NOTHING.to_owned(),
            }));
        }
        line
    })
}

/// What became of a measure, in as many words as the runs bear out.
fn change(before: Spread, after: Spread) -> String {
    let relation = after.relation_to(&before);
    if relation == Relation::Within {
        return "no difference beyond the spread".to_owned();
    }
    let size = after.ratio_to(&before).map_or_else(
        || "from nothing".to_owned(),
        |ratio| {
            let sign = if ratio < 1.0 { '−' } else { '+' };
            format!("{sign}{}", text::percent((ratio - 1.0).abs()))
        },
    );
    if before.is_known() && after.is_known() {
        size
    } else {
        format!("{size}, spread unknown")
    }
}

/// Counts of what must be zero, where any directory measured them.
fn integrity_lines(found: &[Option<Technique<'_>>]) -> Vec<Vec<String>> {
    type Count = fn(&Integrity) -> Option<u64>;
    let counts: [(&str, Count); 4] = [
        ("  different pages", |integrity| integrity.mismatched),
        ("  VMs lost", |integrity| integrity.lost),
        ("  broken stamps", |integrity| integrity.stamp_errors),
        ("  failed runs", |integrity| Some(integrity.failures as u64)),
    ];
    let integrities: Vec<Option<Integrity>> = found
        .iter()
        .map(|one| {
            one.as_ref()
                .map(|one| Integrity::of(one.runs.iter().copied()))
        })
        .collect();
    counts
        .iter()
        .map(|(name, count)| {
            let cells = integrities
                .iter()
                .map(|integrity| integrity.as_ref().and_then(count));
            (name, cells.collect::<Vec<_>>())
        })
        .filter(|(_, cells)| cells.iter().any(Option::is_some))
        .map(|(name, cells)| {
            let mut line = vec![(*name).to_owned()];
            for (at, cell) in cells.iter().enumerate() {
                line.push(cell.map_or(NOTHING.to_owned(), text::count));
                line.extend((at > 0).then(String::new));
            }
            line
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample;

    fn named(name: &str, results: Results) -> Named {
        Named {
            name: name.into(),
            results,
        }
    }

    /// The sample with every core byte count of gang+zstd scaled.
    fn with_core_bytes(percent: u64) -> Results {
        let mut results = sample::results();
        for run in results
            .runs
            .iter_mut()
            .filter(|run| run.name() == "gang+zstd")
        {
            run.core_bytes = run.core_bytes.map(|bytes| bytes * percent / 100);
        }
        results
    }

    fn line_of<'a>(comparison: &'a str, technique: &str, measure: &str) -> &'a str {
        let at = comparison.find(&format!("\n{technique} ")).unwrap();
        let lines = comparison[at + 1..].lines();
        lines
            .into_iter()
            .find(|line| line.trim_start().starts_with(measure))
            .unwrap()
    }

    #[test]
    fn evaluations_are_compared_scenario_by_scenario() {
        let dirs = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let save = |dir: &std::path::Path, name: &str| {
            let results = Results {
                scenario: name.into(),
                ..sample::results()
            };
            std::fs::create_dir(dir.join(name)).unwrap();
            results.save(&dir.join(name)).unwrap();
        };
        for dir in &dirs {
            save(dir.path(), "irlm-fig4");
        }
        save(dirs[0].path(), "peers");
        let paths = dirs.each_ref().map(|dir| dir.path().to_owned());
        let comparison = run(&paths).unwrap();
        assert!(comparison.contains("irlm-fig4") && !comparison.contains("peers"));
        assert!(comparison.contains("work lost to the move"), "{comparison}");
        let empty = [(); 2].map(|()| tempfile::tempdir().unwrap());
        assert!(run(&empty.each_ref().map(|dir| dir.path().to_owned())).is_err());
    }

    #[test]
    fn equal_results_show_no_difference_beyond_the_spread() {
        let all = [named("a", sample::results()), named("b", sample::results())];
        let comparison = compare(&all);
        let line = line_of(&comparison, "gang+zstd", "total migration time");
        assert!(line.ends_with("no difference beyond the spread"), "{line}");
        assert!(!comparison.contains("note:"), "{comparison}");
    }

    #[test]
    fn a_change_beyond_the_spread_is_given_in_percent_of_the_first() {
        let all = [
            named("a", sample::results()),
            named("b", with_core_bytes(50)),
        ];
        let comparison = compare(&all);
        assert!(line_of(&comparison, "gang+zstd", "core traffic").ends_with("−50 %"));
        assert!(line_of(&comparison, "stock", "core traffic").ends_with("spread"));
    }

    #[test]
    fn a_single_run_on_either_side_is_said_to_have_no_known_spread() {
        let mut one = with_core_bytes(50);
        one.runs.retain(|run| run.repeat == 0);
        let all = [named("a", sample::results()), named("b", one)];
        let comparison = compare(&all);
        let line = line_of(&comparison, "gang+zstd", "core traffic");
        assert!(line.ends_with("spread unknown"), "{line}");
    }

    #[test]
    fn failed_runs_are_in_no_mean_and_are_counted() {
        let mut failed = sample::results();
        let run = failed.runs.iter_mut().find(|run| run.name() == "gang+zstd");
        let run = run.unwrap();
        run.core_bytes = Some(1 << 50);
        run.failure = Some("a VM stayed".into());
        let comparison = compare(&[named("a", sample::results()), named("b", failed)]);
        let line = line_of(&comparison, "gang+zstd", "core traffic");
        assert!(line.ends_with("no difference beyond the spread"), "{line}");
        let heading = line_of(&comparison, "gang+zstd", "gang+zstd");
        assert!(heading.contains("[2] 3 runs, 1 failed"), "{heading}");
    }

    #[test]
    fn other_versions_and_topologies_are_pointed_out() {
        let mut other = sample::results();
        other.versions.insert("qemu_target".into(), "7.2".into());
        other.topology.vms_per_host = 4;
        let comparison = compare(&[named("a", sample::results()), named("b", other)]);
        assert!(comparison.contains("note: qemu_target is 10.0.2 in [1] and 7.2 in [2]"));
        assert!(comparison.contains("note: [2] ran on another topology than [1]"));
    }

    #[test]
    fn a_technique_that_only_one_directory_has_is_still_listed() {
        let mut fewer = sample::results();
        fewer.runs.retain(|run| run.technique != "oc");
        let comparison = compare(&[named("a", fewer), named("b", sample::results())]);
        let line = line_of(&comparison, "oc", "core traffic");
        assert!(line.contains('–') && line.contains("MB"), "{line}");
    }

    #[test]
    fn one_directory_is_not_a_comparison() {
        assert!(matches!(
            run(&[PathBuf::from("a")]),
            Err(CompareError::TooFew)
        ));
    }
}
