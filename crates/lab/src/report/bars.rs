//! One measure of all techniques: a bar for the mean, a whisker for the range over the
//! repetitions, a dot for each of them.

use maud::{Markup, html};

use super::metric::{BASELINE, Metric};
use super::spread::Spread;
use super::svg::{CARD_WIDTH, Scale, px, x_axis};
use super::text;
use crate::results::Technique;

const ROW: f64 = 34.0;
const BAR: f64 = 16.0;
const LABELS: f64 = 132.0;
/// Room to the right for a value and its ratio.
const VALUES: f64 = 118.0;
const TOP: f64 = 6.0;
const AXIS: f64 = 22.0;

/// The drawing, or `None` if no run has the measure.
pub(crate) fn draw(metric: &Metric, techniques: &[Technique<'_>]) -> Option<Markup> {
    let rows: Vec<(&Technique<'_>, Option<Spread>)> = techniques
        .iter()
        .map(|technique| (technique, metric.spread(technique)))
        .collect();
    let largest = rows
        .iter()
        .filter_map(|(_, spread)| spread.map(|s| s.max))
        .reduce(f64::max)?;
    let baseline = rows
        .iter()
        .find(|(technique, _)| technique.name == BASELINE)
        .and_then(|(_, s)| *s);

    let scale = Scale::new(
        (LABELS, CARD_WIDTH - LABELS - VALUES),
        largest,
        metric.unit.step(),
        4.0,
    );
    let bottom = TOP + ROW * rows.len() as f64;
    let view_box = format!("0 0 {CARD_WIDTH} {}", bottom + AXIS);
    Some(html! {
        svg viewBox=(view_box) role="img" aria-label=(metric.title) {
            (x_axis(&scale, TOP, bottom, |value| metric.unit.write(value)))
            @for (at, (technique, spread)) in rows.iter().enumerate() {
                @let middle = TOP + ROW * (at as f64 + 0.5);
                text class="label" x=(px(LABELS - 10.0)) y=(px(middle + 4.0)) text-anchor="end" {
                    (technique.name)
                }
                @if let Some(spread) = spread {
                    (bar(metric, technique, &scale, middle))
                    (value(metric, spread, baseline, (scale.at(spread.max), middle)))
                } @else {
                    text class="tick" x=(px(LABELS + 8.0)) y=(px(middle + 4.0)) { "not measured" }
                }
            }
        }
    })
}

/// The mark itself.
fn bar(metric: &Metric, technique: &Technique<'_>, scale: &Scale, middle: f64) -> Markup {
    let Some(spread) = metric.spread(technique) else {
        return Markup::default();
    };
    let class = if technique.name.starts_with(BASELINE) {
        "bar stock"
    } else {
        "bar"
    };
    let (start, end) = (scale.at(0.0), scale.at(spread.mean));
    html! {
        path class=(class) d=(rounded(start, end, middle)) {
            title { (technique.name) ": " (metric.unit.write(spread.mean)) }
        }
        @if spread.is_known() {
            line class="whisker" x1=(px(scale.at(spread.min))) x2=(px(scale.at(spread.max)))
                y1=(px(middle)) y2=(px(middle)) {}
            @for run in technique.completed() {
                @if let Some(value) = (metric.read)(run) {
                    circle class="dot" cx=(px(scale.at(value))) cy=(px(middle)) r="3.5" {
                        title { "repeat " (run.repeat) ": " (metric.unit.write(value)) }
                    }
                }
            }
        }
    }
}

/// The mean beside its bar, and what part of the baseline it is.
fn value(metric: &Metric, spread: &Spread, baseline: Option<Spread>, end: (f64, f64)) -> Markup {
    let ratio = baseline.and_then(|baseline| spread.ratio_to(&baseline));
    html! {
        text class="value" x=(px(end.0 + 9.0)) y=(px(end.1 + 4.0)) {
            (metric.unit.write(spread.mean))
            @if let Some(ratio) = ratio {
                tspan class="ratio" dx="7" { "×" (text::ratio(ratio)) }
            }
        }
    }
}

/// A bar that stands square on the axis and is rounded at its end.
fn rounded(start: f64, end: f64, middle: f64) -> String {
    let (top, bottom) = (middle - BAR / 2.0, middle + BAR / 2.0);
    let end = end.max(start + 1.0);
    let r = (end - start).min(3.0);
    let flat = end - r;
    format!(
        "M{start:.1},{top:.1} H{flat:.1} Q{end:.1},{top:.1} {end:.1},{:.1} \
         V{:.1} Q{end:.1},{bottom:.1} {flat:.1},{bottom:.1} H{start:.1} Z",
        top + r,
        bottom - r
    )
}
