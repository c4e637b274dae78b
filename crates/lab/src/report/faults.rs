//! What each fault of a matrix came to: a table instead of the techniques' comparison.

use maud::{Markup, html};

use super::table::{Integrity, NOTHING, Verdict};
use super::text;
use crate::results::{Results, Run};

/// Headings of [`Row::cells`].
const COLUMNS: [&str; 7] = [
    "exit code",
    "VM then",
    "took",
    "VM silent for",
    "moved again",
    "pages compared",
    "differ",
];

/// One fault at one instant.
struct Row {
    fault: String,
    /// As [`COLUMNS`].
    cells: [String; COLUMNS.len()],
    holds: bool,
    message: String,
}

/// Whether the runs are those of a matrix.
pub(super) fn are_in(results: &Results) -> bool {
    results.runs.iter().any(|run| run.fault.is_some())
}

/// For the page.
pub(super) fn section(results: &Results) -> Markup {
    html! {
        section {
            h2 { "Faults" }
            div.scroll {
                table {
                    thead {
                        tr {
                            th { "fault" }
                            @for column in COLUMNS { th { (column) } }
                            th { "holds" }
                            th { "said" }
                        }
                    }
                    tbody {
                        @for row in rows(results) {
                            tr.broken[!row.holds] {
                                th scope="row" { (row.fault) }
                                @for cell in &row.cells { td { (cell) } }
                                td { (if row.holds { "yes" } else { "no" }) }
                                td { (row.message) }
                            }
                        }
                    }
                }
            }
            p.source {
                "FAULT@INSTANT. A fault holds if place, exit code and message are as the scenario \
                 wants them, one VM runs with its stamps intact, and it could be moved again (back, \
                 if it had arrived). "
                code { "runs[].fault, application, failure" }
            }
        }
    }
}

/// For the terminal: the lines of the table, and how many hold.
pub(super) fn lines(results: &Results) -> (Vec<Vec<String>>, String) {
    let rows = rows(results);
    let holding = rows.iter().filter(|row| row.holds).count();
    let mut lines = vec![vec!["fault".to_owned(), "holds".to_owned()]];
    lines[0].extend(COLUMNS.map(str::to_owned));
    let summary = format!(
        "{holding} of {} hold.\n",
        text::plural(rows.len() as u64, "fault")
    );
    for row in rows {
        let mut line = vec![row.fault, if row.holds { "yes" } else { "NO" }.to_owned()];
        line.extend(row.cells);
        lines.push(line);
    }
    (lines, summary)
}

fn rows(results: &Results) -> Vec<Row> {
    let of_runs = results.runs.iter();
    of_runs
        .filter_map(|run| Some(row(run.fault.clone()?, run)))
        .collect()
}

fn row(fault: String, run: &Run) -> Row {
    let figure = |name: &str| run.application.get(name);
    let number = |name: &str| figure(name).and_then(serde_json::Value::as_i64);
    let place = match number("vms_moved_under_fault") {
        Some(0) => "stayed".to_owned(),
        Some(moved) if moved < i64::from(run.vms) => format!("{moved} of {} moved", run.vms),
        Some(_) => "moved".to_owned(),
        None => NOTHING.to_owned(),
    };
    let again = match number("exit_code") {
        Some(0) => "yes",
        Some(_) => "no",
        None => NOTHING,
    };
    let time = |name: &str, write: fn(f64) -> String| {
        let value = figure(name).and_then(serde_json::Value::as_f64);
        value.map_or(NOTHING.to_owned(), write)
    };
    let count = |count: Option<u64>| count.map_or(NOTHING.to_owned(), text::count);
    let message = figure("message_under_fault").and_then(serde_json::Value::as_str);
    Row {
        fault,
        cells: [
            number("exit_code_under_fault").map_or(NOTHING.to_owned(), |code| code.to_string()),
            place,
            time("time_under_fault_s", text::seconds),
            time("silence_under_fault_ms", text::milliseconds),
            again.to_owned(),
            count(run.compared_pages),
            count(run.mismatched_pages),
        ],
        holds: Integrity::of([run]).verdict() == Verdict::Whole,
        message: message.unwrap_or_default().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::report;

    fn results() -> Results {
        let run = |fault: &str, failure: Option<&str>| Run {
            technique: "gang".into(),
            fault: Some(fault.into()),
            vms_lost: Some(0),
            compared_pages: Some(49_152),
            mismatched_pages: Some(0),
            application: [
                ("exit_code_under_fault".to_owned(), json!(1)),
                ("vms_moved_under_fault".to_owned(), json!(0)),
                (
                    "message_under_fault".to_owned(),
                    json!("runs at the source"),
                ),
                ("exit_code".to_owned(), json!(0)),
            ]
            .into(),
            failure: failure.map(str::to_owned),
            ..Run::default()
        };
        Results {
            scenario: "faults".into(),
            runs: vec![run("cut@bulk", None), run("cancel@bulk", Some("it moved"))],
            ..Results::default()
        }
    }

    #[test]
    fn a_matrix_is_shown_fault_by_fault_and_says_which_do_not_hold() {
        let table = report::table(&results());
        let line = |name: &str| table.lines().find(|line| line.starts_with(name)).unwrap();
        assert!(line("cut@bulk").contains("yes"), "{table}");
        assert!(line("cancel@bulk").contains("NO"), "{table}");
        assert!(table.contains("1 of 2 faults hold."), "{table}");
        assert!(table.contains("it moved"), "{table}");
        let page = report::html(&results());
        assert!(page.contains("cut@bulk") && page.contains("runs at the source"));
    }
}
