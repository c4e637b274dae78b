//! How far each technique is from the least that it could have sent.

use maud::{Markup, html};

use super::spread::Spread;
use super::text;
use crate::results::{Bounds, Run, Technique};

/// One technique, mean over its runs with bounds: each run is set against its own guests.
struct Row {
    technique: String,
    core_bytes: f64,
    of_nonfill: f64,
    to_bound_1: f64,
    to_bound_2: f64,
}

impl Row {
    fn of(technique: &Technique<'_>) -> Option<Self> {
        let mean = |read: fn(f64, &Bounds) -> f64| {
            let both = |run: &Run| Some(read(run.core_bytes? as f64, run.bounds.as_ref()?));
            let values = technique.completed().filter_map(both);
            Some(Spread::of(values)?.mean)
        };
        Some(Self {
            technique: technique.name.clone(),
            core_bytes: mean(|bytes, _| bytes)?,
            of_nonfill: mean(|bytes, bounds| bytes / bounds.nonfill_bytes as f64)?,
            to_bound_1: mean(|bytes, bounds| bytes / bounds.host_pairs_zstd_bytes as f64)?,
            to_bound_2: mean(|bytes, bounds| bytes / bounds.rack_zstd_bytes as f64)?,
        })
    }
}

/// Sentence and tables; nothing if no run has bounds.
pub(crate) fn section(techniques: &[Technique<'_>]) -> Markup {
    let rows: Vec<Row> = techniques.iter().filter_map(Row::of).collect();
    let runs = techniques.iter().flat_map(|technique| &technique.runs);
    let all: Vec<Bounds> = runs.filter_map(|run| run.bounds).collect();
    html! {
        @if !all.is_empty() {
            section {
                h2 { "Against the least possible" }
                @if let Some(sentence) = sentence(&rows, &all) { p { (sentence) } }
                (contents(&all))
                div.scroll {
                    table {
                        thead {
                            tr {
                                @for column in ["technique", "core bytes", "of the non-fill bytes",
                                                "× bound 1", "× bound 2"] {
                                    th { (column) }
                                }
                            }
                        }
                        tbody {
                            @for row in &rows {
                                tr {
                                    th scope="row" { (row.technique) }
                                    td { (text::wire_bytes(row.core_bytes)) }
                                    td { (format!("{:.3}", row.of_nonfill)) }
                                    td { (text::ratio(row.to_bound_1)) }
                                    td { (text::ratio(row.to_bound_2)) }
                                }
                            }
                        }
                    }
                }
                p.source {
                    "Bound 1: the rack's unique contents through zstd level 1 with a window of \
                     128 MiB, one stream for each host pair, each content in the first that has it. \
                     Bound 2: all in one stream. Neither has headers, references or pages sent \
                     again. " code { "runs[].bounds" }
                }
            }
        }
    }
}

type Count = fn(&Bounds) -> u64;

/// Means over the runs: every run has guests of its own.
fn mean(all: &[Bounds], read: Count) -> f64 {
    Spread::of(all.iter().map(|bounds| read(bounds) as f64)).map_or(0.0, |spread| spread.mean)
}

fn contents(all: &[Bounds]) -> Markup {
    let lines: [(&str, Count); 5] = [
        ("all pages", |bounds| bounds.pages),
        ("non-fill pages", |bounds| bounds.nonfill_pages),
        ("unique within each VM", |bounds| bounds.vm_contents),
        ("unique within each host", |bounds| bounds.host_contents),
        ("unique within the rack", |bounds| bounds.rack_contents),
    ];
    let nonfill = mean(all, |bounds| bounds.nonfill_pages).max(1.0);
    html! {
        div.scroll {
            table {
                thead { tr { th { "pages" } th { "number" } th { "of the non-fill pages" } } }
                tbody {
                    @for (name, read) in lines {
                        tr {
                            th scope="row" { (name) }
                            td { (text::pages(mean(all, read))) }
                            td { (format!("{:.3}", mean(all, read) / nonfill)) }
                        }
                    }
                }
            }
        }
    }
}

fn sentence(rows: &[Row], all: &[Bounds]) -> Option<String> {
    let best = rows
        .iter()
        .min_by(|a, b| a.to_bound_1.total_cmp(&b.to_bound_1))?;
    let share =
        |read: fn(&Bounds) -> u64| mean(all, read) / mean(all, |b| b.nonfill_bytes).max(1.0);
    Some(format!(
        "{} sends {} times bound 1 and {} times bound 2; the bounds are {:.3} and {:.3} of the \
         non-fill pages' bytes.",
        best.technique,
        text::ratio(best.to_bound_1),
        text::ratio(best.to_bound_2),
        share(|bounds| bounds.host_pairs_zstd_bytes),
        share(|bounds| bounds.rack_zstd_bytes),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{html, sample};

    #[test]
    fn each_run_is_set_against_the_bounds_of_its_own_guests() {
        let mut results = sample::results();
        results.runs.retain(|run| run.name() == "gang+zstd");
        results.runs.truncate(2);
        for (run, bound) in results.runs.iter_mut().zip([100_000_000, 50_000_000]) {
            run.core_bytes = Some(100_000_000);
            run.bounds = Some(Bounds {
                nonfill_bytes: 1_000_000_000,
                nonfill_pages: 1000,
                rack_contents: 420,
                host_pairs_zstd_bytes: bound,
                rack_zstd_bytes: 50_000_000,
                ..Bounds::default()
            });
        }
        let page = html(&results);
        assert!(
            page.contains(
                "gang+zstd sends 1.50 times bound 1 and 2.00 times bound 2; the bounds are 0.075 \
                 and 0.050"
            ),
            "{page}"
        );
        assert!(page.contains("<td>0.420</td>"));
        assert!(!html(&sample::results()).contains("Against the least possible"));
    }
}
