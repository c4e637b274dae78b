//! A survey as one page of HTML, readable without a network.

use agent::types::{GroupSurvey, PageKinds};
use maud::{DOCTYPE, Markup, PreEscaped, html};

use crate::render::{bytes, seconds};

const PAGE_BYTES: u64 = 4096;
/// Sizes of the drawings, in their own units.
const LABELS: f64 = 130.0;
const BARS: f64 = 520.0;
const VALUES: f64 = 110.0;
const ROW: f64 = 28.0;

const STYLE: &str = "body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:52rem;\
padding:0 1rem;color:#1d2733;background:#fff}h1{font-size:1.5rem}h2{font-size:1.1rem;\
margin-top:2rem}svg{width:100%;height:auto}text{font-size:12px;fill:currentColor}\
.key i{display:inline-block;width:.8em;height:.8em;margin:0 .35em 0 1em}\
table{border-collapse:collapse;width:100%}td,th{text-align:right;padding:.2rem .5rem;\
border-bottom:1px solid #8884}td:first-child,th:first-child{text-align:left}\
@media(prefers-color-scheme:dark){body{color:#dde3ea;background:#14191f}}";

/// Kinds of pages: what they are called, their colour, and how many there are.
type Part = (&'static str, &'static str, fn(&PageKinds) -> u64);

const PARTS: [Part; 5] = [
    ("distinct", "#2a6fb0", |pages| pages.distinct),
    ("duplicate", "#8fbfe8", |pages| {
        pages.content.saturating_sub(pages.distinct)
    }),
    ("fill", "#d9a441", |pages| pages.fill),
    ("zero", "#b9c2cc", |pages| pages.zero),
    ("untouched", "#e6eaee", |pages| pages.untouched),
];

/// The page.
pub(crate) fn page(survey: &GroupSurvey) -> String {
    let title = format!("Survey of {} hosts", survey.hosts.len());
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width";
                title { (title) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                h1 { (title) }
                p {
                    "Memory of " (vms(survey)) " VMs, hashed in " (format!("{:.1}", survey.seconds))
                    " s with " (format!("{:.2}", survey.cpu_seconds)) " s of processor time. "
                    (bytes(survey.shared_by_targets * PAGE_BYTES))
                    " are needed by several target hosts."
                    @if !survey.exact { " Distinct contents of the rack are estimated, to about 1 %." }
                }
                @for problem in &survey.failed { p { strong { (problem) } } }
                h2 { "Core bytes of a migration now, forecast for idle guests" }
                (costs(survey))
                h2 { "What memory holds" }
                (key())
                (memory(survey))
                (numbers(survey))
            }
        }
    };
    page.into_string()
}

fn vms(survey: &GroupSurvey) -> usize {
    survey.hosts.iter().map(|host| host.vms.len()).sum()
}

fn costs(survey: &GroupSurvey) -> Markup {
    let most = survey.forecast.iter().map(|one| one.core_bytes).max();
    let rows = survey.forecast.iter().map(|one| {
        let time = one
            .seconds
            .map_or(String::new(), |time| format!(", {}", seconds(time)));
        Row {
            label: one.technique.clone(),
            parts: vec![("#2a6fb0", one.core_bytes)],
            value: format!("{}{time}", bytes(one.core_bytes)),
        }
    });
    chart("core bytes by technique", &rows.collect::<Vec<_>>(), most)
}

fn memory(survey: &GroupSurvey) -> Markup {
    let row = |label: String, pages: &PageKinds| Row {
        label,
        parts: PARTS
            .iter()
            .map(|(_, colour, count)| (*colour, count(pages)))
            .collect(),
        value: bytes(pages.total * PAGE_BYTES),
    };
    let hosts = survey.hosts.iter();
    let mut rows: Vec<_> = hosts
        .map(|host| row(host.host.clone(), &host.pages))
        .collect();
    rows.push(row("rack".to_owned(), &survey.rack));
    chart("memory by what it holds", &rows, Some(survey.rack.total))
}

fn key() -> Markup {
    html! {
        p class="key" {
            @for (name, colour, _) in PARTS {
                i style=(format!("background:{colour}")) {}
                (name)
            }
        }
    }
}

/// One bar, in parts.
struct Row {
    label: String,
    parts: Vec<(&'static str, u64)>,
    value: String,
}

fn chart(title: &str, rows: &[Row], most: Option<u64>) -> Markup {
    let most = most.unwrap_or(0).max(1);
    #[expect(clippy::cast_precision_loss, reason = "a drawing")]
    let width = |count: u64| BARS * count as f64 / most as f64;
    #[expect(clippy::cast_precision_loss, reason = "a drawing of few rows")]
    let top = |at: usize| ROW * at as f64;
    let view = format!("0 0 {} {}", LABELS + BARS + VALUES, top(rows.len()));
    html! {
        svg viewBox=(view) role="img" aria-label=(title) {
            @for (at, row) in rows.iter().enumerate() {
                @let baseline = format!("{:.1}", top(at) + 18.0);
                text x=(LABELS - 8.0) y=(baseline) text-anchor="end" { (row.label) }
                @for (before, (colour, count)) in starts(&row.parts) {
                    rect x=(format!("{:.1}", LABELS + width(before))) y=(format!("{:.1}", top(at) + 5.0))
                        width=(format!("{:.1}", width(count))) height="18" fill=(colour) {}
                }
                @let end = row.parts.iter().map(|(_, count)| count).sum();
                text x=(format!("{:.1}", LABELS + width(end) + 6.0)) y=(baseline) { (row.value) }
            }
        }
    }
}

/// Each part with the sum of those before it.
fn starts(parts: &[(&'static str, u64)]) -> Vec<(u64, (&'static str, u64))> {
    let add = |sum: &mut u64, part: &(&'static str, u64)| {
        let before = *sum;
        *sum += part.1;
        Some((before, *part))
    };
    parts.iter().scan(0, add).collect()
}

fn numbers(survey: &GroupSurvey) -> Markup {
    let line = |name: String, pages: &PageKinds| {
        html! {
            tr {
                td { (name) }
                td { (bytes(pages.total * PAGE_BYTES)) }
                @for (_, _, count) in PARTS { td { (bytes(count(pages) * PAGE_BYTES)) } }
            }
        }
    };
    html! {
        table {
            tr { th {} th { "memory" } @for (name, _, _) in PARTS { th { (name) } } }
            @for host in &survey.hosts {
                @for vm in &host.vms { (line(vm.vm.clone(), &vm.pages)) }
                (line(format!("host {}", host.host), &host.pages))
            }
            (line("rack".to_owned(), &survey.rack))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use agent::types::{Forecast, HostSurvey};

    #[test]
    fn a_page_needs_nothing_from_elsewhere_and_a_name_is_only_text() {
        let pages = PageKinds {
            total: 100,
            content: 40,
            distinct: 10,
            untouched: 60,
            ..PageKinds::default()
        };
        let survey = GroupSurvey {
            group: "g".to_owned(),
            hosts: vec![HostSurvey {
                host: "<b>".to_owned(),
                vms: Vec::new(),
                pages,
                pairs: Vec::new(),
                seconds: 0.0,
                cpu_seconds: 0.0,
                pages_read: 0,
            }],
            rack: pages,
            exact: true,
            shared_by_targets: 0,
            forecast: vec![Forecast {
                technique: "full".to_owned(),
                core_bytes: 5_000_000,
                seconds: None,
            }],
            seconds: 1.0,
            cpu_seconds: 1.0,
            failed: vec!["host `c`: <gone>".to_owned()],
        };
        let page = page(&survey);
        for elsewhere in ["http:", "https:", "<script", "<link", "<b>", "<gone>"] {
            assert!(!page.contains(elsewhere), "{elsewhere}");
        }
        assert!(
            page.contains("5.00 MB") && page.contains("width=\"52.0\""),
            "{page}"
        );
    }
}
