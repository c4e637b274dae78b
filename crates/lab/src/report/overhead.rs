//! What preparation costs the guests, beside the figures of the paper.

use maud::{Markup, html};

use super::text;
use crate::overhead::{FIGURES, Overhead};
use crate::results::Results;

/// Table 2 of IRLM, in percent: with free processors, and without.
const PAPER: [(&str, [f64; 2]); 2] = [
    ("subset-sum", [0.34, 5.85]),
    ("random-writes", [1.99, 3.93]),
];

/// Sentence and table; nothing if it was not measured.
pub(crate) fn section(results: &Results) -> Markup {
    let measured: Vec<Overhead> = results
        .runs
        .iter()
        .filter_map(|run| serde_json::from_value(run.application.get(FIGURES)?.clone()).ok())
        .collect();
    html! {
        @if !measured.is_empty() {
            section {
                h2 { "What preparation costs the guests" }
                @if let Some(sentence) = sentence(&measured) { p { (sentence) } }
                div.scroll {
                    table {
                        thead {
                            tr {
                                @for column in ["workload", "guests", "processors", "pairs",
                                                "a round without", "with", "preparations",
                                                "longer by", "95 % interval", "IRLM table 2"] {
                                    th { (column) }
                                }
                            }
                        }
                        tbody { @for one in &measured { (row(one)) } }
                    }
                }
                p.source {
                    "The same work with and without gangway prepare beside it, guests of one \
                     processor; the interval is Student's over the pairs. The last column is the \
                     paper's, on other hardware: 4 and 8 guests on 8 processors. "
                    code { "runs[].application." (FIGURES) }
                }
            }
        }
    }
}

fn row(one: &Overhead) -> Markup {
    let mean = |of: fn(&crate::overhead::Pair) -> f64| {
        one.pairs.iter().map(of).sum::<f64>() / one.pairs.len().max(1) as f64
    };
    let percent = |value: f64| format!("{value:+.2} %");
    html! {
        tr {
            th scope="row" { (one.workload) }
            td { (one.guests) }
            td { (one.cores) }
            td { (one.pairs.len()) }
            td { (text::seconds(mean(|pair| pair.without_s))) }
            td { (text::seconds(mean(|pair| pair.with_s))) }
            td { (one.prepare_s.len()) }
            td { (one.overhead_percent.map_or("–".to_owned(), percent)) }
            td {
                @match one.ci95_percent {
                    Some([low, high]) => { (percent(low)) " to " (percent(high)) }
                    None => "–",
                }
            }
            td { (paper(one).map_or("–".to_owned(), |value| format!("{value} %"))) }
        }
    }
}

/// The paper's figure for such a workload with processors free, or not.
fn paper(one: &Overhead) -> Option<f64> {
    let (_, [free, busy]) = PAPER.iter().find(|(name, _)| *name == one.workload)?;
    Some(if one.guests < one.cores { *free } else { *busy })
}

fn sentence(measured: &[Overhead]) -> Option<String> {
    let worst = measured
        .iter()
        .filter(|one| one.overhead_percent.is_some())
        .max_by(|a, b| {
            a.overhead_percent
                .partial_cmp(&b.overhead_percent)
                .unwrap_or(std::cmp::Ordering::Equal)
        })?;
    let within = measured
        .iter()
        .all(|one| match (one.ci95_percent, paper(one)) {
            (Some([_, high]), Some(paper)) => high <= paper,
            _ => false,
        });
    let within = if within {
        "every interval lies at or below the paper's value"
    } else {
        "not every interval lies at or below the paper's value"
    };
    Some(format!(
        "Preparation makes the work of {} with {} longer by {:.2} % at most; {within}.",
        text::plural(worst.guests.into(), "guest"),
        worst.workload,
        worst.overhead_percent?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::overhead::{Pair, TECHNIQUE, Times};
    use crate::report::{html, sample};
    use crate::results::Run;

    fn overhead(guests: u32, percent: f64, high: f64) -> Overhead {
        Overhead {
            workload: "subset-sum".into(),
            guests,
            cores: 2,
            run: Times::Loop,
            pairs: vec![Pair {
                without_s: 2.0,
                with_s: 2.1,
            }],
            overhead_percent: Some(percent),
            ci95_percent: Some([-0.1, high]),
            prepare_s: vec![0.5],
            agents_cpu_s: 0.3,
        }
    }

    fn page(all: &[Overhead]) -> String {
        let mut results = sample::results();
        results.runs.extend(all.iter().map(|one| Run {
            technique: TECHNIQUE.into(),
            application: [(FIGURES.to_owned(), serde_json::to_value(one).unwrap())].into(),
            ..Run::default()
        }));
        html(&results)
    }

    #[test]
    fn the_papers_value_is_that_for_free_or_for_busy_processors() {
        assert_eq!(paper(&overhead(1, 0.0, 0.0)), Some(0.34));
        assert_eq!(paper(&overhead(2, 0.0, 0.0)), Some(5.85));
    }

    #[test]
    fn the_verdict_goes_by_the_end_of_the_interval() {
        let good = page(&[overhead(1, 0.2, 0.3), overhead(2, 4.0, 5.8)]);
        assert!(good.contains("2 guests with subset-sum longer by 4.00 % at most; every interval"));
        let bad = page(&[overhead(1, 0.2, 0.4)]);
        assert!(bad.contains("not every interval lies"));
        assert!(bad.contains("-0.10 % to +0.40 %"));
    }
}
