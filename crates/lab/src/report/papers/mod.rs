//! One page over all scenarios of the papers' evaluation: for each table and figure what the paper
//! has, what was measured here, and what it comes to.

mod claim;
mod exhibits;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use maud::{DOCTYPE, Markup, PreEscaped, html};

use self::claim::{Claim, Value, plain_name, runs, spread, word};
use self::exhibits::{Exhibit, IRLM_HARDWARE, Measure, Plot, SLM_HARDWARE};
use super::lines::{self, Series};
use super::metric::{Metric, Unit};
use super::page::{STYLE, integrity_sentence};
use super::spread::Spread;
use super::table::{self, Integrity, Verdict};
use super::{FILE_NAME, WriteError, bars, scale, text};
use crate::catalog;
use crate::gangway::PLAN_SETTINGS;
use crate::load::Throughput;
use crate::results::{self, FileError, Point, Results, Run, Technique};
use crate::scenario::Accel;
use crate::stock;

/// Reads the results of those scenarios of the papers that `dir` has.
pub fn load(dir: &Path) -> Result<Vec<Results>, FileError> {
    load_of(dir, catalog::PAPERS)
}

/// Reads those of some scenarios, as far as `dir` has them.
pub fn load_of(dir: &Path, names: &[&str]) -> Result<Vec<Results>, FileError> {
    let dirs = names.iter().map(|name| dir.join(name));
    dirs.filter(|dir| dir.join(results::FILE_NAME).exists())
        .map(|dir| Results::load(&dir))
        .collect()
}

/// Writes the page into `dir` and returns its path.
pub fn write(all: &[Results], dir: &Path) -> Result<PathBuf, WriteError> {
    let path = dir.join(FILE_NAME);
    match std::fs::write(&path, html(all)) {
        Ok(()) => Ok(path),
        Err(source) => Err(WriteError { path, source }),
    }
}

/// The page itself.
#[must_use]
pub fn html(all: &[Results]) -> String {
    let shown: Vec<(&Exhibit, &Results)> = exhibits::all()
        .filter_map(|exhibit| {
            let results = all.iter().find(|one| one.scenario == exhibit.scenario)?;
            Some((exhibit, results))
        })
        .collect();
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { "Gangway lab: the papers' evaluation" }
                style { (PreEscaped(STYLE)) }
            }
            body {
                header {
                    p.eyebrow { "Gangway lab" }
                    h1 { "The papers' evaluation" }
                    p.lead { (lead(all)) }
                }
                main {
                    (verdict(all))
                    (summary(&shown))
                    @for (exhibit, results) in &shown { (section(exhibit, results)) }
                    (scale::section(all))
                    (settings(all))
                    (origin(all))
                }
            }
        }
    };
    page.into_string()
}

/// What of the papers is here, and what is not.
fn lead(all: &[Results]) -> String {
    let is_measured = |exhibit: &&Exhibit| {
        let results = all.iter().find(|one| one.scenario == exhibit.scenario);
        results.is_some_and(|one| one.runs.iter().any(|run| run.failure.is_none()))
    };
    let (here, missing): (Vec<_>, Vec<_>) = exhibits::of_papers().partition(is_measured);
    let missing = match &missing[..] {
        [] => String::new(),
        missing => {
            let named = missing
                .iter()
                .map(|one| format!("{} ({})", one.title, one.scenario));
            format!(
                " Without a completed run: {}.",
                named.collect::<Vec<_>>().join("; ")
            )
        }
    };
    let mut accelerators = all.iter().filter_map(|one| one.versions.get("accelerator"));
    let emulated = accelerators.all(|name| name == Accel::Tcg.name());
    format!(
        "The tables and figures of IRLM section 3 and SLM section IV, {} of {} of them or groups of them, \
         measured on one machine{}, beside the techniques that QEMU brings.{missing}",
        here.len(),
        exhibits::of_papers().count(),
        if emulated {
            " with emulated guests"
        } else {
            ""
        },
    )
}

fn verdict(all: &[Results]) -> Markup {
    let every = || all.iter().flat_map(|results| &results.runs);
    let integrity = Integrity::of(every());
    let (class, mark) = match integrity.verdict() {
        Verdict::Whole => ("whole", "✓"),
        Verdict::Open => ("open", "?"),
        Verdict::Broken => ("broken", "✕"),
    };
    let failed: Vec<&Run> = every().filter(|run| run.failure.is_some()).collect();
    html! {
        section class={ "verdict " (class) } {
            p.state { span.mark { (mark) } (integrity_sentence(&integrity)) }
            p {
                (text::plural(every().count() as u64, "run")) " of "
                (text::plural(all.len() as u64, "scenario")) ", "
                (text::plural(failed.len() as u64, "failure")) "."
            }
        }
        @for run in failed {
            p.failure {
                strong { (run.name()) " failed: " } (run.failure.as_deref().unwrap_or_default())
            }
        }
    }
}

/// All claims with a number, in one table.
fn summary(shown: &[(&Exhibit, &Results)]) -> Markup {
    html! {
        section {
            h2 { "What the papers say, and what is so here" }
            p.lead {
                "Numbers in the column “paper” are typed from the papers and were measured on their \
                 hardware. " (IRLM_HARDWARE) " " (SLM_HARDWARE) " All others are computed from this \
                 page's results; in parentheses the range that the runs allow, where a technique \
                 ran more than once."
            }
            div.scroll { table {
                thead { tr {
                    th { "measure" } th { "technique" } th { "against" } th { "paper" }
                    th { "here" } th { "full, here" }
                } }
                tbody { @for (exhibit, results) in shown {
                    @for claim in exhibit.claims.iter().filter(|claim| claim.paper.is_some()) {
                        (claim_row(claim, results))
                    }
                } }
            } }
        }
    }
}

fn claim_row(claim: &Claim, results: &Results) -> Markup {
    let write = |value: Option<Value>| {
        value.map_or_else(|| "–".to_owned(), |value| value.write(claim.unit))
    };
    let paper = claim.paper.map(|mean| Value { mean, range: None });
    html! {
        tr {
            th scope="row" { (claim.what) br; code { (claim.field) } }
            td { (claim.of) }
            td { (claim.against.unwrap_or("–")) }
            td { (write(paper)) }
            td { (write(claim.of_technique(results, claim.of))) }
            td { (write(claim.of_technique(results, "full"))) }
        }
    }
}

fn section(exhibit: &Exhibit, results: &Results) -> Markup {
    html! {
        section {
            h2 { (exhibit.title) }
            @for claim in exhibit.claims {
                @if let Some(sentence) = claim.sentence(results) { p { (sentence) } }
            }
            @if exhibit.scenario == "peers" {
                @for sentence in best_of_stock(results) { p { (sentence) } }
            }
            p.source {
                "The paper: " (exhibit.paper) " Here: " code { (exhibit.scenario) } ", "
                (table::topology(&results.topology)) "."
            }
            div.cards { @for plot in exhibit.plots { (draw(plot, results)) } }
        }
    }
}

/// Full against the best that QEMU offers, for each of what ran beside.
fn best_of_stock(results: &Results) -> Vec<String> {
    besides(results)
        .into_iter()
        .filter_map(|beside| {
            let core = |run: &Run| run.core_bytes.map(|bytes| bytes as f64);
            let full = spread(results, ("full", beside), core)?;
            let stock = techniques(results, beside).into_iter();
            let (name, best) = stock
                .filter(|technique| technique.name.starts_with("stock"))
                .filter_map(|technique| {
                    let of = spread(results, (&technique.name, beside), core)?;
                    Some((technique.name, of))
                })
                .min_by(|a, b| a.1.mean.total_cmp(&b.1.mean))?;
            Some(format!(
                "With {} guests {name} sends least of QEMU's own, {}; full's {} is {} it.",
                beside.unwrap_or("all"),
                text::wire_bytes(best.mean),
                text::wire_bytes(full.mean),
                word(full.relation_to(&best)),
            ))
        })
        .collect()
}

/// What ran beside the moves, in the order of the runs.
fn besides(results: &Results) -> Vec<Option<&str>> {
    let mut found = Vec::new();
    for run in &results.runs {
        let beside = run.beside.as_deref();
        if !found.contains(&beside) {
            found.push(beside);
        }
    }
    found
}

fn draw(plot: &Plot, results: &Results) -> Markup {
    match plot {
        Plot::Sweep(measure) => html! {
            @for beside in besides(results) { (measured(measure, results, beside)) }
        },
        Plot::Seconds { title, key, unit } => seconds(results, (title, key, *unit)),
    }
}

/// Lines over the topologies, or bars if there is one.
fn measured(measure: &Measure, results: &Results, beside: Option<&str>) -> Markup {
    let title = match beside {
        Some(beside) => format!("{}, {beside}", measure.title),
        None => measure.title.to_owned(),
    };
    let mut points = results.points();
    points.sort_unstable();
    let drawing = if points.len() > 1 {
        let by_hosts = points.iter().any(|point| point.hosts != points[0].hosts);
        let label = if by_hosts { "hosts" } else { "VMs" };
        let all = series(results, (measure, beside), &points, by_hosts);
        lines::draw(&title, label, measure.unit, &all)
    } else {
        let metric = Metric {
            field: measure.field,
            title: measure.title,
            noun: measure.title,
            meaning: "",
            unit: measure.unit,
            read: measure.read,
        };
        bars::draw(&metric, &techniques(results, beside))
    };
    html! {
        @if let Some(drawing) = drawing {
            figure {
                h3 { (title) }
                (drawing)
                figcaption { code { "runs[]." (measure.field) } }
            }
        }
    }
}

fn series(
    results: &Results,
    (measure, beside): (&Measure, Option<&str>),
    points: &[Point],
    by_hosts: bool,
) -> Vec<Series> {
    let names = techniques(results, beside).into_iter().map(|one| one.name);
    names
        .map(|technique| {
            let at = |point: &Point| {
                let here = runs(results, &technique, beside);
                let here = here.filter(|run| results.point(run) == *point);
                let counted = if by_hosts {
                    point.hosts
                } else {
                    point.vms_per_host
                };
                Some((
                    f64::from(counted),
                    Spread::of(here.filter_map(measure.read))?,
                ))
            };
            Series {
                points: points.iter().filter_map(at).collect(),
                technique: technique.clone(),
                end: None,
            }
        })
        .filter(|series| !series.points.is_empty())
        .collect()
}

/// The runs of the largest topology by technique, without what ran beside in the name. What a run that
/// failed measured says nothing: it is named above.
fn techniques<'a>(results: &'a Results, beside: Option<&str>) -> Vec<Technique<'a>> {
    let largest = results.points().into_iter().max_by_key(Point::vms);
    let mut found: Vec<Technique<'a>> = Vec::new();
    for run in &results.runs {
        let is_meant = run.beside.as_deref() == beside && run.failure.is_none();
        if !is_meant || Some(results.point(run)) != largest {
            continue;
        }
        let name = plain_name(run);
        match found.iter_mut().find(|one| one.name == name) {
            Some(technique) => technique.runs.push(run),
            None => found.push(Technique {
                name,
                runs: vec![run],
            }),
        }
    }
    found
}

/// The first run of each technique, second by second.
fn seconds(results: &Results, (title, key, unit): (&str, &str, Unit)) -> Markup {
    let all: Vec<Series> = besides(results)
        .into_iter()
        .flat_map(|beside| techniques(results, beside))
        .filter_map(|technique| {
            let measured = technique
                .runs
                .iter()
                .find_map(|run| Throughput::of_run(run, key))?;
            let at = |[second, rate]: &[f64; 2]| Some((*second, Spread::of([*rate])?));
            Some(Series {
                technique: technique.name,
                end: None,
                points: measured.series.iter().filter_map(at).collect(),
            })
        })
        .collect();
    html! {
        @if let Some(drawing) = lines::draw(title, "seconds from the first start", unit, &all) {
            figure {
                h3 { (title) }
                (drawing)
                figcaption {
                    "First run of each technique. "
                    code { "runs[].application." (key) ".series" }
                }
            }
        }
    }
}

/// What QEMU and Gangway were told, as they were told.
fn settings(all: &[Results]) -> Markup {
    let mut said: Vec<(String, String)> = Vec::new();
    for run in all.iter().flat_map(|results| &results.runs) {
        let told = |name: &str| run.application.get(name);
        let settings = told(stock::SETTINGS).or(told(PLAN_SETTINGS));
        if let Some(settings) = settings.and_then(serde_json::Value::as_str) {
            let pair = (plain_name(run), settings.to_owned());
            if !said.contains(&pair) {
                said.push(pair);
            }
        }
    }
    said.sort();
    html! {
        @if !said.is_empty() {
            section {
                h2 { "Settings of QEMU and of the plans" }
                dl { @for (name, settings) in &said { dt { (name) } dd { code { (settings) } } } }
                p.source { code { "runs[].application.{qemu_settings,plan_settings}" } }
            }
        }
    }
}

fn origin(all: &[Results]) -> Markup {
    html! {
        section {
            h2 { "Where it comes from" }
            div.scroll { table {
                thead { tr { th { "scenario" } th { "runs" } th { "command" } } }
                tbody { @for results in all { tr {
                    th scope="row" { (results.scenario) }
                    td { (results.runs.len()) }
                    td { code { (command(results)) } }
                } } }
            } }
            dl { @for (name, version) in versions(all) { dt { (name) } dd { (version) } } }
            p.source {
                "Each scenario has a directory with its " code { (results::FILE_NAME) }
                " and a report of its own beside this page."
            }
        }
    }
}

/// Each version; where scenarios differ, each with those that had it.
fn versions(all: &[Results]) -> Vec<(&str, String)> {
    let names: BTreeSet<&str> = all
        .iter()
        .flat_map(|results| results.versions.keys().map(String::as_str))
        .collect();
    let said = |name: &str| {
        let mut by_version: Vec<(&str, Vec<&str>)> = Vec::new();
        for results in all {
            let version = results.versions.get(name);
            let version = version.map_or("not known", String::as_str);
            let scenario = results.scenario.as_str();
            match by_version.iter_mut().find(|(known, _)| *known == version) {
                Some((_, scenarios)) => scenarios.push(scenario),
                None => by_version.push((version, vec![scenario])),
            }
        }
        match &by_version[..] {
            [(version, _)] => (*version).to_owned(),
            several => several
                .iter()
                .map(|(version, of)| format!("{version} ({})", of.join(", ")))
                .collect::<Vec<_>>()
                .join("; "),
        }
    };
    names.into_iter().map(|name| (name, said(name))).collect()
}

/// The command without the directory that the program stands in.
fn command(results: &Results) -> String {
    let mut words = results.command.iter();
    let program = words.next().map_or("", String::as_str);
    let name = program.rsplit('/').next().unwrap_or_default();
    std::iter::once(name)
        .chain(words.map(String::as_str))
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::Scenario;
    use crate::technique;

    fn run(technique: &str, beside: Option<&str>, core_mb: u64) -> Run {
        Run {
            technique: technique.into(),
            mode: "pre-copy".into(),
            beside: beside.map(str::to_owned),
            core_bytes: Some(core_mb * 1_000_000),
            total_migration_time_s: Some(3.0),
            vms: 4,
            vms_lost: Some(0),
            ..Run::default()
        }
    }

    fn results(scenario: &str, runs: Vec<Run>) -> Results {
        Results {
            scenario: scenario.into(),
            runs,
            ..Results::default()
        }
    }

    #[test]
    fn every_claim_is_about_techniques_that_its_scenario_runs() {
        for exhibit in exhibits::all() {
            let scenario = Scenario::load(exhibit.scenario, &[], false).unwrap();
            let name = |one: &technique::Technique| Run::of(*one, Run::default()).name();
            let mut known: Vec<String> = scenario.techniques.iter().map(name).collect();
            if scenario.preparation.is_some() {
                known.push("prepare".to_owned());
            }
            for claim in exhibit.claims {
                for name in [Some(claim.of), claim.against].into_iter().flatten() {
                    assert!(
                        known.iter().any(|one| one == name),
                        "{}: {name} is none of {known:?}",
                        exhibit.title
                    );
                }
            }
        }
    }

    #[test]
    fn nothing_is_drawn_of_a_run_that_failed() {
        let broken = Run {
            failure: Some("it did not converge".into()),
            ..run("irlm", None, 40)
        };
        let all = results("irlm-fig4", vec![run("stock", None, 100), broken]);
        let drawn = techniques(&all, None).into_iter().map(|one| one.name);
        assert_eq!(drawn.collect::<Vec<_>>(), ["stock"]);
        assert!(html(&[all]).contains("irlm failed:"));
    }

    #[test]
    fn a_figure_shows_the_papers_value_beside_ours() {
        let runs = vec![
            run("stock", None, 100),
            run("irlm", None, 40),
            run("full", None, 6),
        ];
        let page = html(&[results("irlm-fig4", runs)]);
        let said = "Core traffic with irlm set against stock is 0.40, the paper has 0.56; full comes \
                    to 0.06.";
        assert!(page.contains(said), "{page}");
        for outside in ["http:", "https:", "<script", "@import", "url(", "<link"] {
            assert!(!page.contains(outside), "the page contains {outside}");
        }
        let section = "<h2>SLM figure 5";
        assert!(!page.contains(section), "nothing of it was measured");
    }

    #[test]
    fn the_lead_names_what_has_no_completed_run() {
        let broken = Run {
            failure: Some("it did not converge".into()),
            ..run("stock", Some("iperf3"), 40)
        };
        let all = [
            results("irlm-fig4", vec![run("stock", None, 100)]),
            results("slm-fig6", vec![broken]),
        ];
        let said = lead(&all);
        // Figures 4 and 5.
        assert!(said.contains(", 2 of 11 of them"), "{said}");
        let missing = said.split_once("Without a completed run: ").unwrap().1;
        assert!(missing.contains("(slm-fig6)") && missing.contains("(irlm-table1)"));
        assert!(!missing.contains("(irlm-fig4)"), "{missing}");
    }

    #[test]
    fn versions_in_which_scenarios_differ_are_said_with_them() {
        let of = |scenario: &str, kernel: &str| Results {
            versions: [("host_kernel", kernel), ("machine", "10.0")]
                .map(|(name, version)| (name.to_owned(), version.to_owned()))
                .into(),
            ..results(scenario, Vec::new())
        };
        let all = [
            of("irlm-fig4", "6.18"),
            of("peers", "6.17"),
            of("unlike", "6.18"),
        ];
        let expected = [
            (
                "host_kernel",
                "6.18 (irlm-fig4, unlike); 6.17 (peers)".to_owned(),
            ),
            ("machine", "10.0".to_owned()),
        ];
        assert_eq!(versions(&all), expected);
    }

    #[test]
    fn results_of_an_earlier_version_of_the_lab_are_still_shown() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/results/papers");
        let all = load(&dir).unwrap();
        assert!(!all.is_empty());
        let page = html(&all);
        assert!(page.contains("SLM figure 5") && !page.contains("NaN"));
    }

    #[test]
    fn peers_are_told_apart_by_what_their_guests_do() {
        let of = |beside| {
            [("stock", 100), ("stock-multifd-zstd", 50), ("full", 6)]
                .map(|(name, core)| run(name, Some(beside), core))
        };
        let runs = [of("idle"), of("dirty")].concat();
        let page = html(&[results("peers", runs)]);
        assert!(page.contains("Bytes on the core link, idle"), "{page}");
        assert!(page.contains(
            "With dirty guests stock-multifd-zstd sends least of QEMU's own, 50 MB; full's 6 MB is \
             below it."
        ));
    }

    #[test]
    fn every_exhibit_is_of_a_scenario_that_is_run() {
        for exhibit in exhibits::all() {
            assert!(
                catalog::PAPERS.contains(&exhibit.scenario),
                "{}",
                exhibit.title
            );
        }
    }
}
