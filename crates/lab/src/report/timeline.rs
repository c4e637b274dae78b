//! What each VM had sent at which time: a panel for each technique, all on the same scales, so
//! that steeper is faster and shorter is sooner done.

use maud::{Markup, html};

use super::svg::{PAGE_WIDTH, Scale, px, x_axis};
use super::text;
use crate::results::{Run, Sample, Technique, VmTimeline};

const PANEL: f64 = 104.0;
/// Between two panels: room for the title of the lower one.
const BETWEEN: f64 = 30.0;
const LEFT: f64 = 66.0;
const RIGHT: f64 = 20.0;
const AXIS: f64 = 24.0;
/// Two for each unit of width are more than a screen can show.
const POINTS_MAX: usize = 400;

/// The run of a technique that is drawn: its first completed one with a timeline.
pub(crate) fn run_shown<'a>(technique: &Technique<'a>) -> Option<&'a Run> {
    let has_samples = |run: &&Run| run.timeline.iter().any(|vm| !vm.samples.is_empty());
    technique.completed().find(has_samples)
}

/// When the last sample of a VM was taken.
pub(crate) fn end_of(vm: &VmTimeline) -> Option<f64> {
    vm.samples.last().map(|sample| sample.t_s)
}

/// The panels, or `None` if no run has a timeline.
pub(crate) fn draw(techniques: &[Technique<'_>]) -> Option<Markup> {
    let shown: Vec<(&str, &Run)> = techniques
        .iter()
        .filter_map(|technique| Some((technique.name.as_str(), run_shown(technique)?)))
        .collect();
    let samples = || {
        shown
            .iter()
            .flat_map(|(_, run)| &run.timeline)
            .flat_map(|vm| &vm.samples)
    };
    let last = samples().map(|sample| sample.t_s).reduce(f64::max)?;
    let most = samples()
        .map(|sample| sample.wire_bytes as f64)
        .reduce(f64::max)?;

    let x = Scale::new((LEFT, PAGE_WIDTH - LEFT - RIGHT), last, 1.0, 10.0);
    let y = Scale::new((0.0, PANEL), most, 1.0, 4.0);
    let height = (PANEL + BETWEEN) * shown.len() as f64 + AXIS;
    let view_box = format!("0 0 {PAGE_WIDTH} {height}");
    Some(html! {
        svg viewBox=(view_box) role="img" aria-label="Bytes sent for each VM over time" {
            @for (at, (name, run)) in shown.iter().enumerate() {
                @let top = BETWEEN + (PANEL + BETWEEN) * at as f64;
                @let is_last = at + 1 == shown.len();
                text class="label" x=(px(LEFT)) y=(px(top - 9.0)) { (name) }
                (x_axis(&x, top, top + PANEL, |value| {
                    if is_last { text::seconds(value) } else { String::new() }
                }))
                (y_axis(&y, top))
                (curves(name, run, (&x, &y), top))
            }
        }
    })
}

fn y_axis(y: &Scale, top: f64) -> Markup {
    html! {
        @for value in y.ticks() {
            @let at = px(top + PANEL - y.at(value));
            line class=(if value == 0.0 { "zero" } else { "grid" })
                x1=(px(LEFT)) x2=(px(PAGE_WIDTH - RIGHT)) y1=(at) y2=(at) {}
            text class="tick" x=(px(LEFT - 8.0)) y=(px(top + PANEL - y.at(value) + 4.0))
                text-anchor="end" { (text::wire_bytes(value)) }
        }
    }
}

/// A line for each VM; a ring where it stopped at the source, a dot where all is sent.
fn curves(technique: &str, run: &Run, (x, y): (&Scale, &Scale), top: f64) -> Markup {
    let stock = if technique.starts_with(super::metric::BASELINE) {
        " stock"
    } else {
        ""
    };
    let place = |sample: &Sample| {
        (
            px(x.at(sample.t_s)),
            px(top + PANEL - y.at(sample.wire_bytes as f64)),
        )
    };
    let points = |samples: &[Sample]| {
        let step = samples.len().div_ceil(POINTS_MAX).max(1);
        let thinned = samples.iter().step_by(step).chain(samples.last());
        thinned
            .map(place)
            .map(|(x, y)| format!("{x},{y}"))
            .collect::<Vec<_>>()
            .join(" ")
    };
    html! {
        @for vm in &run.timeline {
            polyline class={ "curve" (stock) } points=(points(&vm.samples)) {
                title { (vm.vm) }
            }
            @if let Some(stop) = vm.samples.iter().find(|sample| sample.phase == "switch-over") {
                @let (x, y) = place(stop);
                circle class={ "ring" (stock) } cx=(x) cy=(y) r="4" {
                    title { (vm.vm) " stops at the source after " (text::seconds(stop.t_s)) }
                }
            }
            @if let Some(end) = vm.samples.last() {
                @let (x, y) = place(end);
                circle class={ "end" (stock) } cx=(x) cy=(y) r="4" {
                    title {
                        (vm.vm) ": " (end.phase) " after " (text::seconds(end.t_s)) ", "
                        (text::wire_bytes(end.wire_bytes as f64)) " sent"
                    }
                }
            }
        }
    }
}
