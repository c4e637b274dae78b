//! The page: verdict, table, plots, and where it all comes from.

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::faults;
use super::kinds::{self, Mix};
use super::metric::{self, Metric};
use super::table::{self, COLUMNS, Integrity, Verdict};
use super::{bars, bounds, latency, overhead, sentence, sweep, text, timeline};
use crate::results::{Results, Run, Technique};

pub(super) const STYLE: &str = include_str!("style.css");

pub(crate) fn render(results: &Results) -> Markup {
    let techniques = results.techniques();
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { "Gangway lab: " (results.scenario) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                header {
                    p.eyebrow { "Gangway lab" }
                    h1 { (results.scenario) }
                    p.lead { (table::topology(&results.topology)) "." }
                }
                main {
                    (verdict(results))
                    (failures(results))
                    @if faults::are_in(results) {
                        (faults::section(results))
                    } @else {
                        @if techniques.iter().any(|one| one.name != crate::overhead::TECHNIQUE) {
                            (headline(results, &techniques))
                        }
                        (sweep::section(results))
                        (overhead::section(results))
                        (bounds::section(&techniques))
                        @if techniques.iter().any(|one| one.name != crate::overhead::TECHNIQUE) {
                            (measures(&techniques))
                        }
                        (latency::section(&techniques))
                        (page_kinds(&techniques))
                        (timelines(&techniques))
                    }
                    (every_run(results))
                    (origin(results))
                }
            }
        }
    }
}

/// What matters most: is every VM whole, and what was saved.
fn verdict(results: &Results) -> Markup {
    let techniques = results.techniques();
    let integrity = Integrity::of(&results.runs);
    let (class, mark) = match integrity.verdict() {
        Verdict::Whole => ("whole", "✓"),
        Verdict::Open => ("open", "?"),
        Verdict::Broken => ("broken", "✕"),
    };
    let sentences = [
        metric::CORE_BYTES,
        metric::TOTAL_TIME,
        metric::DOWNTIME_MEAN,
    ]
    .iter()
    .filter(|_| !faults::are_in(results))
    .filter_map(|metric| sentence::of_metric(metric, &techniques))
    .collect::<Vec<_>>();
    html! {
        section class={ "verdict " (class) } {
            p.state {
                span.mark { (mark) }
                (integrity_sentence(&integrity))
            }
            @for sentence in &sentences { p { (sentence) } }
            @if techniques.iter().all(|technique| technique.runs.len() < 2) {
                p.note { "One run of each technique: how far runs lie apart is not known here." }
            }
        }
    }
}

pub(super) fn integrity_sentence(integrity: &Integrity) -> String {
    let compared = match (integrity.compared, integrity.mismatched) {
        (Some(compared), Some(mismatched)) => format!(
            "{} compared between source and target, {} different",
            text::plural(compared, "page"),
            if mismatched == 0 {
                "none".to_owned()
            } else {
                text::count(mismatched)
            }
        ),
        _ => "Memory was not compared".to_owned(),
    };
    let lost = match integrity.lost {
        Some(0) => "no VM lost".to_owned(),
        Some(lost) => format!("{} lost", text::plural(lost, "VM")),
        None => "lost VMs were not counted".to_owned(),
    };
    let stamps = match integrity.stamp_errors {
        Some(0) => ", every stamp that guests checked intact".to_owned(),
        Some(errors) => format!(
            ", {} found by the guests",
            text::plural(errors, "broken stamp")
        ),
        None => ", no stamps checked in the guests".to_owned(),
    };
    let unchecked = match integrity.unchecked {
        0 => String::new(),
        runs => format!(
            " In {} neither was memory compared nor were stamps checked.",
            text::plural(runs as u64, "run")
        ),
    };
    format!("{compared}; {lost}{stamps}.{unchecked}")
}

fn failures(results: &Results) -> Markup {
    html! {
        @for run in &results.runs {
            @if let Some(failure) = &run.failure {
                p.failure {
                    strong { (run.name()) " (repeat " (run.repeat) ") failed: " } (failure)
                }
            }
        }
    }
}

fn headline(results: &Results, techniques: &[Technique<'_>]) -> Markup {
    html! {
        section {
            h2 { "Techniques" }
            @if results.points().len() > 1 {
                p.lead {
                    "Table and measures are of the largest of the topologies; the sweep over all \
                     of them has its own section."
                }
            }
            div.scroll {
                table {
                    thead {
                        tr {
                            th { "technique" }
                            th { "runs" }
                            @for column in COLUMNS { th { (column) } }
                        }
                    }
                    tbody {
                        @for row in table::rows(techniques) {
                            tr.broken[row.integrity.verdict() == Verdict::Broken] {
                                th scope="row" { (row.technique) }
                                td { (row.runs_text()) }
                                @for cell in &row.cells { td { (cell) } }
                            }
                        }
                    }
                }
            }
            p.source {
                "Means over the runs that did not fail, ± the farthest run. "
                code { "runs[].core_bytes, total_migration_time_s, downtime_ms, compared_pages, \
                        mismatched_pages, vms_lost" }
            }
        }
    }
}

fn measures(techniques: &[Technique<'_>]) -> Markup {
    let missing: Vec<&str> = metric::ALL
        .iter()
        // In pre-copy it is the total time.
        .filter(|metric| metric.field != metric::RUNNING_TIME.field)
        .filter(|metric| {
            !techniques
                .iter()
                .any(|technique| metric.spread(technique).is_some())
        })
        .map(|metric| metric.field)
        .collect();
    html! {
        section {
            h2 { "Measures" }
            div.cards { @for metric in metric::ALL { (measure(metric, techniques)) } }
            @if !missing.is_empty() {
                p.source { "Not measured in these runs: " code { (missing.join(", ")) } "." }
            }
        }
    }
}

fn measure(metric: &Metric, techniques: &[Technique<'_>]) -> Markup {
    html! {
        @if let Some(drawing) = bars::draw(metric, techniques) {
            figure {
                h3 { (metric.title) }
                @if let Some(sentence) = sentence::of_metric(metric, techniques) {
                    p { (sentence) }
                }
                (drawing)
                figcaption { (metric.meaning) ". " code { "runs[]." (metric.field) } }
            }
        }
    }
}

fn page_kinds(techniques: &[Technique<'_>]) -> Markup {
    let mixes: Vec<Mix> = techniques.iter().filter_map(Mix::of).collect();
    html! {
        @if let Some(drawing) = kinds::draw(&mixes) {
            section {
                h2 { "How the pages crossed" }
                figure {
                    @if let Some(sentence) = sentence::of_mixes(&mixes) { p { (sentence) } }
                    @if let Some(sentence) = sentence::of_mapped(&mixes) { p { (sentence) } }
                    (drawing)
                    figcaption {
                        "Pages that QEMU sent, pages sent again included; mean of the runs. "
                        code { "runs[].pages" }
                    }
                }
            }
        }
    }
}

fn timelines(techniques: &[Technique<'_>]) -> Markup {
    html! {
        @if let Some(drawing) = timeline::draw(techniques) {
            section {
                h2 { "VM by VM over time" }
                figure {
                    @if let Some(sentence) = sentence::of_timelines(techniques) { p { (sentence) } }
                    ul.legend {
                        li { span.key.line {} "bytes sent for one VM" }
                        li { span.key.ring {} "stops at the source" }
                        li { span.key.end {} "all sent" }
                    }
                    (drawing)
                    figcaption {
                        "First run of each technique that has a timeline. "
                        code { "runs[].timeline" }
                    }
                }
            }
        }
    }
}

/// The numbers behind the means.
fn every_run(results: &Results) -> Markup {
    html! {
        section {
            h2 { "Every run" }
            details {
                summary { (text::plural(results.runs.len() as u64, "run")) }
                div.scroll {
                    table {
                        thead {
                            tr {
                                th { "technique" }
                                th { "repeat" }
                                th { "hosts × VMs" }
                                @for metric in metric::ALL { th { (metric.field) } }
                            }
                        }
                        tbody { @for run in &results.runs { (run_row(results, run)) } }
                    }
                }
            }
            @for run in results.runs.iter().filter(|run| !run.per_vm.is_empty()) { (vm_table(run)) }
        }
    }
}

fn run_row(results: &Results, run: &Run) -> Markup {
    let point = results.point(run);
    html! {
        tr {
            th scope="row" { (run.name()) }
            td { (run.repeat) }
            td { (point.hosts) " × " (point.vms_per_host) }
            @for metric in metric::ALL {
                td { ((metric.read)(run).map_or("–".to_owned(), |value| metric.unit.write(value))) }
            }
        }
    }
}

fn vm_table(run: &Run) -> Markup {
    let write =
        |value: Option<f64>, write: fn(f64) -> String| value.map_or_else(|| "–".to_owned(), write);
    html! {
        details {
            summary { "VMs of " (run.name()) ", repeat " (run.repeat) }
            div.scroll {
                table {
                    thead {
                        tr {
                            @for column in ["VM", "from", "to", "migration time", "downtime",
                                            "hold", "broken stamps", "remark"] {
                                th { (column) }
                            }
                        }
                    }
                    tbody {
                        @for vm in &run.per_vm {
                            tr {
                                th scope="row" { (vm.vm) }
                                td { (vm.source_host) }
                                td { (vm.target_host) }
                                td { (write(vm.migration_time_s, text::seconds)) }
                                td { (write(vm.downtime_ms, text::milliseconds)) }
                                td { (write(vm.hold_ms, text::milliseconds)) }
                                td { (vm.stamp_errors.map_or("–".to_owned(), text::count)) }
                                td { (vm.remark.as_deref().unwrap_or("")) }
                            }
                        }
                    }
                }
            }
        }
    }
}

fn origin(results: &Results) -> Markup {
    html! {
        section {
            h2 { "What took part" }
            dl {
                @for (name, version) in &results.versions { dt { (name) } dd { (version) } }
                @if !results.command.is_empty() {
                    dt { "command" }
                    dd { code { (results.command.join(" ")) } }
                }
            }
            p.source {
                "Everything on this page is computed from " code { (crate::results::FILE_NAME) }
                " beside it."
            }
        }
    }
}
