//! A measure against what a sweep varies: a line for each technique through the means, a whisker
//! for the range over the repetitions.

use maud::{Markup, html};

use super::metric::Unit;
use super::spread::Spread;
use super::svg::{CARD_WIDTH, Scale, px};

const PANEL: f64 = 210.0;
const TOP: f64 = 10.0;
const LEFT: f64 = 70.0;
/// Room to the right for the lines' names.
const RIGHT: f64 = 104.0;
const AXIS: f64 = 40.0;
/// Values that are written below the axis.
const MOST_TICKS: usize = 12;
/// Between the baselines of two names.
const NAME: f64 = 14.0;

/// One line.
pub(crate) struct Series {
    /// Technique, as [`crate::results::Run::name`].
    pub(crate) technique: String,
    /// What sets it apart from other lines of its technique; it is dashed then.
    pub(crate) end: Option<&'static str>,
    /// By the value on the horizontal axis.
    pub(crate) points: Vec<(f64, Spread)>,
}

impl Series {
    pub(crate) fn name(&self) -> String {
        match self.end {
            Some(end) => format!("{}, {end}", self.technique),
            None => self.technique.clone(),
        }
    }

    /// Style of everything that belongs to it: the colour is the technique's.
    fn class(&self) -> String {
        let base = self.technique.split(['+', ' ', '-']).next();
        format!("t-{}", base.unwrap_or_default())
    }

    fn dashes(&self) -> &'static str {
        match self.end {
            Some(_) => " dashed",
            None if self.technique.contains('+') => " dotted",
            None => "",
        }
    }
}

/// The drawing; `None` without a point. `axis` says what is counted to the right.
pub(crate) fn draw(title: &str, axis: &str, unit: Unit, all: &[Series]) -> Option<Markup> {
    let points = || all.iter().flat_map(|series| &series.points);
    let largest = points().map(|(_, spread)| spread.max).reduce(f64::max)?;
    let mut values: Vec<f64> = points().map(|(value, _)| *value).collect();
    values.sort_by(f64::total_cmp);
    values.dedup();
    let (first, last) = (*values.first()?, *values.last()?);
    let width = CARD_WIDTH - LEFT - RIGHT;
    let x = |value: f64| LEFT + width * (value - first) / (last - first).max(1.0);
    let y = Scale::new((0.0, PANEL), largest, unit.step(), 4.0);
    let bottom = TOP + PANEL;
    let place = |(value, spread): &(f64, Spread)| (x(*value), bottom - y.at(spread.mean));
    let view_box = format!("0 0 {CARD_WIDTH} {}", bottom + AXIS);
    Some(html! {
        svg viewBox=(view_box) role="img" aria-label=(title) {
            @for tick in y.ticks() {
                @let at = bottom - y.at(tick);
                line class=(if tick == 0.0 { "zero" } else { "grid" })
                    x1=(px(LEFT)) x2=(px(LEFT + width)) y1=(px(at)) y2=(px(at)) {}
                text class="tick" x=(px(LEFT - 8.0)) y=(px(at + 4.0)) text-anchor="end" {
                    (unit.write(tick))
                }
            }
            @for value in values.iter().step_by(values.len().div_ceil(MOST_TICKS)) {
                text class="tick" x=(px(x(*value))) y=(px(bottom + 16.0)) text-anchor="middle" {
                    (value)
                }
            }
            text class="tick" x=(px(LEFT + width / 2.0)) y=(px(bottom + 33.0))
                text-anchor="middle" { (axis) }
            @for series in all {
                g class=(series.class()) { (line(series, unit, (&x, &|mean| bottom - y.at(mean)))) }
            }
            (names(all, (LEFT + width + 10.0, bottom), place))
        }
    })
}

type Place<'a> = &'a dyn Fn(f64) -> f64;

fn line(series: &Series, unit: Unit, (x, y): (Place<'_>, Place<'_>)) -> Markup {
    let places = series
        .points
        .iter()
        .map(|(value, spread)| format!("{},{}", px(x(*value)), px(y(spread.mean))));
    html! {
        polyline class={ "series" (series.dashes()) }
            points=(places.collect::<Vec<_>>().join(" ")) {}
        @for (value, spread) in &series.points {
            @if spread.is_known() {
                line class="spread" x1=(px(x(*value))) x2=(px(x(*value)))
                    y1=(px(y(spread.min))) y2=(px(y(spread.max))) {}
            }
            circle class="point" cx=(px(x(*value))) cy=(px(y(spread.mean))) r="3.5" {
                title { (series.name()) " at " (value) ": " (unit.write(spread.mean)) }
            }
        }
    }
}

/// Each line's name at its end; names that would overlap are moved apart.
fn names(
    all: &[Series],
    (left, bottom): (f64, f64),
    place: impl Fn(&(f64, Spread)) -> (f64, f64),
) -> Markup {
    let mut ends: Vec<(f64, &Series)> = all
        .iter()
        .filter_map(|series| Some((place(series.points.last()?).1, series)))
        .collect();
    ends.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut heights: Vec<f64> = ends.iter().map(|(y, _)| *y).collect();
    spread_out(&mut heights, bottom);
    html! {
        @for ((_, series), y) in ends.iter().zip(heights) {
            g class=(series.class()) {
                text class="name" x=(px(left)) y=(px(y + 4.0)) { (series.name()) }
            }
        }
    }
}

/// Moves sorted heights apart by at least [`NAME`], the last one no lower than `bottom`.
fn spread_out(heights: &mut [f64], bottom: f64) {
    let mut least = f64::NEG_INFINITY;
    for height in heights.iter_mut() {
        *height = height.max(least);
        least = *height + NAME;
    }
    let mut most = bottom;
    for height in heights.iter_mut().rev() {
        *height = height.min(most);
        most = *height - NAME;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_would_overlap_are_moved_apart_and_stay_above_the_axis() {
        let mut heights = [100.0, 101.0, 150.0, 219.0, 220.0];
        spread_out(&mut heights, 220.0);
        assert_eq!(heights, [100.0, 114.0, 150.0, 206.0, 220.0]);
    }

    #[test]
    fn a_line_goes_through_the_means_and_shows_the_range() {
        let at = |value: f64, runs: &[f64]| (value, Spread::of(runs.iter().copied()).unwrap());
        let series = Series {
            technique: "gang+zstd".into(),
            end: None,
            points: vec![at(1.0, &[10.0]), at(3.0, &[40.0, 60.0])],
        };
        let drawing = draw("t", "hosts", Unit::Seconds, &[series]).unwrap();
        let text = drawing.into_string();
        // 50 of 60 over a height of 210, above an axis at 220.
        assert!(text.contains(r#"points="70.0,185.0 416.0,45.0""#), "{text}");
        assert_eq!(text.matches(r#"class="spread""#).count(), 1);
        assert!(text.contains("t-gang") && text.contains("series dotted"));
        assert!(draw("t", "hosts", Unit::Seconds, &[]).is_none());
    }
}
