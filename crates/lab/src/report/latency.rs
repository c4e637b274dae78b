//! How long guests waited for pages: a histogram for each technique, all on the same logarithmic axis.

use maud::{Markup, html};

use super::svg::{PAGE_WIDTH, px};
use super::text;
use crate::results::Technique;
use crate::touch::TouchLatency;

const PANEL: f64 = 64.0;
/// Between two panels: room for the title of the lower one.
const BETWEEN: f64 = 30.0;
const LEFT: f64 = 66.0;
const RIGHT: f64 = 20.0;
const AXIS: f64 = 24.0;

/// For the page; nothing if no guest timed its touches.
pub(super) fn section(techniques: &[Technique<'_>]) -> Markup {
    let shown: Vec<(&str, TouchLatency)> = techniques
        .iter()
        .filter_map(|technique| Some((technique.name.as_str(), first_of(technique)?)))
        .collect();
    html! {
        @if !shown.is_empty() {
            section {
                h2 { "What guests waited for" }
                figure {
                    @for (name, latency) in &shown { p { (sentence(name, latency)) } }
                    (draw(&shown))
                    figcaption {
                        "Touches of pages between a VM's start at its target and the arrival of all of \
                         its memory that took longer than "
                        (text::milliseconds(shown[0].1.threshold_ms))
                        ", timed inside the guests; a bar is the share of 9 % more time. First run of \
                         each technique. "
                        code { "runs[].application." (crate::touch::NAME) }
                    }
                }
            }
        }
    }
}

fn first_of(technique: &Technique<'_>) -> Option<TouchLatency> {
    technique.completed().find_map(TouchLatency::of_run)
}

fn sentence(name: &str, latency: &TouchLatency) -> String {
    let ms = |value: Option<f64>| value.map_or("–".to_owned(), text::milliseconds);
    format!(
        "{name}: {} of {} touches waited, half of them at most {}, 99 of 100 at most {}, the longest {}.",
        text::count(latency.faults),
        text::count(latency.touches),
        ms(latency.median_ms),
        ms(latency.p99_ms),
        ms(latency.longest_ms),
    )
}

/// The horizontal axis: whole powers of ten around all of the values.
struct Axis {
    first: i32,
    last: i32,
}

impl Axis {
    fn over(values: impl Iterator<Item = f64> + Clone) -> Self {
        let least = values
            .clone()
            .fold(f64::INFINITY, f64::min)
            .clamp(1e-3, 1e6);
        let most = values.fold(0.0, f64::max).clamp(least, 1e6);
        #[expect(clippy::cast_possible_truncation, reason = "at most 6 either way")]
        let power = |value: f64| value as i32;
        let first = power(least.log10().floor());
        let last = power(most.log10().ceil()).max(first + 1);
        Self { first, last }
    }

    fn at(&self, ms: f64) -> f64 {
        let part = (ms.log10() - f64::from(self.first)) / f64::from(self.last - self.first);
        LEFT + (PAGE_WIDTH - LEFT - RIGHT) * part.clamp(0.0, 1.0)
    }
}

fn draw(shown: &[(&str, TouchLatency)]) -> Markup {
    let ends = shown
        .iter()
        .flat_map(|(_, latency)| latency.histogram.iter().map(|[end, _]| *end));
    let axis = Axis::over(ends.chain([1.0]));
    let shares = |latency: &TouchLatency| {
        let all = latency.faults.max(1) as f64;
        latency
            .histogram
            .iter()
            .map(move |[end, count]| (*end, count / all))
            .collect::<Vec<_>>()
    };
    let highest = shown
        .iter()
        .flat_map(|(_, latency)| shares(latency))
        .fold(0.01, |highest: f64, (_, share)| highest.max(share));
    let view_box = format!(
        "0 0 {PAGE_WIDTH} {}",
        (PANEL + BETWEEN) * shown.len() as f64 + AXIS
    );
    html! {
        svg viewBox=(view_box) role="img" aria-label="Histogram of the time that touches of pages took" {
            @for (nth, (name, latency)) in shown.iter().enumerate() {
                @let top = BETWEEN + (PANEL + BETWEEN) * nth as f64;
                text class="label" x=(px(LEFT)) y=(px(top - 9.0)) { (name) }
                (grid(&axis, top, nth + 1 == shown.len()))
                @for (end, share) in shares(latency) {
                    (bar(name, &axis, (end, share), (top, PANEL * share / highest)))
                }
            }
        }
    }
}

fn grid(axis: &Axis, top: f64, is_last: bool) -> Markup {
    html! {
        @for power in axis.first..=axis.last {
            @let value = 10f64.powi(power);
            @let x = px(axis.at(value));
            line class="grid" x1=(x) x2=(x) y1=(px(top)) y2=(px(top + PANEL)) {}
            @if is_last {
                text class="tick" x=(x) y=(px(top + PANEL + 14.0)) text-anchor="middle" {
                    (text::milliseconds(value))
                }
            }
        }
        line class="zero" x1=(px(LEFT)) x2=(px(PAGE_WIDTH - RIGHT)) y1=(px(top + PANEL)) y2=(px(top + PANEL)) {}
    }
}

fn bar(name: &str, axis: &Axis, (end, share): (f64, f64), (top, height): (f64, f64)) -> Markup {
    let class = match name.starts_with(super::metric::BASELINE) {
        true => "bar stock",
        false => "bar",
    };
    let (left, right) = (axis.at(end * (-1.0f64 / 8.0).exp2()), axis.at(end));
    html! {
        rect class=(class) x=(px(left)) width=(px((right - left - 0.5).max(0.5)))
            y=(px(top + PANEL - height)) height=(px(height)) {
            title { "up to " (text::milliseconds(end)) ": " (text::percent(share)) }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::report;
    use crate::results::{Results, Run};

    #[test]
    fn a_technique_whose_guests_timed_their_touches_has_a_histogram() {
        let latency = TouchLatency {
            touches: 50,
            faults: 10,
            median_ms: Some(2.0),
            p99_ms: Some(40.0),
            longest_ms: Some(40.0),
            threshold_ms: 0.2,
            slow_before_permille: Some(1.0),
            histogram: vec![[2.0, 7.0], [40.0, 3.0]],
        };
        let run = |technique: &str, latency: Option<&TouchLatency>| Run {
            technique: technique.into(),
            application: latency
                .map(|latency| (crate::touch::NAME.to_owned(), json!(latency)))
                .into_iter()
                .collect(),
            ..Run::default()
        };
        let runs = vec![run("stock-postcopy", Some(&latency)), run("gang", None)];
        let page = report::html(&Results {
            runs,
            ..Results::default()
        });
        assert!(page.contains("10 of 50 touches waited"));
        assert_eq!(page.matches("<rect class=\"bar stock\"").count(), 2);
        let without = report::html(&Results {
            runs: vec![run("gang", None)],
            ..Results::default()
        });
        assert!(!without.contains("What guests waited for"));
    }

    #[test]
    fn the_axis_has_all_values_between_powers_of_ten() {
        let axis = Axis::over([0.3, 45.0].into_iter());
        assert_eq!((axis.first, axis.last), (-1, 2));
        assert!(axis.at(0.3) > LEFT && axis.at(45.0) < PAGE_WIDTH - RIGHT);
    }
}
