//! The Prometheus page.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::moves::Moves;
use crate::types::Phase;

/// All metrics in Prometheus' text format.
pub(super) fn page(moves: &Moves) -> String {
    let totals = moves.totals();
    let pages = totals.pages;
    let [moved, stayed, needs_person] = totals.ended;
    let mut page = Page::default();
    page.counter(
        "gangway_wire_bytes_total",
        "Bytes written to the network by moves from this host, before encryption.",
        &[("", totals.wire_bytes)],
    );
    page.counter(
        "gangway_stream_bytes_total",
        "Bytes that QEMU wrote into the migration streams of moves from this host.",
        &[("", totals.stream_bytes)],
    );
    page.counter(
        "gangway_pages_total",
        "Pages of the migration streams by how they crossed the wire.",
        &[
            ("kind=\"zero\"", pages.zero),
            ("kind=\"fill\"", pages.fill),
            ("kind=\"literal\"", pages.literal),
            ("kind=\"reference\"", pages.reference),
            ("kind=\"remote-reference\"", pages.remote_reference),
            ("kind=\"repaired\"", pages.repaired),
            ("kind=\"mapped\"", pages.mapped),
        ],
    );
    page.counter(
        "gangway_moves_ended_total",
        "Moves from this host by how they ended; one that needed a person and was recovered ended twice.",
        &[
            ("outcome=\"moved\"", moved),
            ("outcome=\"stayed\"", stayed),
            ("outcome=\"needs-person\"", needs_person),
        ],
    );
    page.gauge(
        "gangway_moves",
        "Moves from this host under way, by phase.",
        &under_way(moves),
    );
    page.gauge(
        "gangway_incoming_moves",
        "Moves that arrive at this host.",
        &[(
            String::new(),
            u64::try_from(moves.incoming().len()).unwrap_or(u64::MAX),
        )],
    );
    page.text
}

fn under_way(moves: &Moves) -> Vec<(String, u64)> {
    use Phase::{
        Bulk, Held, Loaded, PostCopy, Preparing, Queued, Recovering, Released, SwitchOver,
    };
    let all = [
        Queued, Preparing, Bulk, SwitchOver, Loaded, Held, Released, PostCopy, Recovering,
    ];
    let mut counts: BTreeMap<Phase, u64> = all.into_iter().map(|phase| (phase, 0)).collect();
    for status in moves.list() {
        counts.entry(status.phase).and_modify(|count| *count += 1);
    }
    let name = |phase| serde_json::to_string(&phase).unwrap_or_default();
    counts
        .into_iter()
        .map(|(phase, count)| (format!("phase={}", name(phase)), count))
        .collect()
}

#[derive(Default)]
struct Page {
    text: String,
}

impl Page {
    fn counter(&mut self, name: &str, help: &str, samples: &[(&str, u64)]) {
        self.family(name, "counter", help, samples);
    }

    fn gauge(&mut self, name: &str, help: &str, samples: &[(String, u64)]) {
        self.family(name, "gauge", help, samples);
    }

    fn family<L: AsRef<str>>(&mut self, name: &str, kind: &str, help: &str, samples: &[(L, u64)]) {
        let text = &mut self.text;
        // Writing to a string cannot fail.
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (label, value) in samples {
            let label = label.as_ref();
            let label = if label.is_empty() {
                String::new()
            } else {
                format!("{{{label}}}")
            };
            let _ = writeln!(text, "{name}{label} {value}");
        }
    }
}
