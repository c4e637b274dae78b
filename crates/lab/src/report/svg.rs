//! What the plots share: coordinates and axes. Colours come from the page's style sheet.

use maud::{Markup, html};

/// Width of every plot's drawing, in its own units; the page scales it.
pub(crate) const CARD_WIDTH: f64 = 520.0;
/// Width of a plot that spans the page.
pub(crate) const PAGE_WIDTH: f64 = 1064.0;

/// A coordinate as it stands in an attribute.
pub(crate) fn px(value: f64) -> String {
    format!("{value:.1}")
}

/// A linear scale from 0 to the first round number past the data.
pub(crate) struct Scale {
    from: f64,
    length: f64,
    top: f64,
    step: f64,
}

impl Scale {
    /// Over `length` from the coordinate `from` on, for values up to `largest` that are written
    /// in multiples of `unit`. Steps are 1, 2 or 5 times a power of ten of that unit.
    pub(crate) fn new((from, length): (f64, f64), largest: f64, unit: f64, most: f64) -> Self {
        let largest = if largest > 0.0 && largest.is_finite() {
            largest
        } else {
            unit
        };
        let rough = largest / most;
        let power = unit * 10f64.powf((rough / unit).log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0]
            .map(|factor| factor * power)
            .into_iter()
            .find(|step| *step >= rough)
            .unwrap_or(10.0 * power);
        Self {
            from,
            length,
            top: largest,
            step,
        }
    }

    pub(crate) fn at(&self, value: f64) -> f64 {
        self.from + self.length * (value / self.top).clamp(0.0, 1.0)
    }

    /// The round values from 0 up to the largest.
    pub(crate) fn ticks(&self) -> Vec<f64> {
        (0..=20u8)
            .map(|n| f64::from(n) * self.step)
            .take_while(|value| *value <= self.top * 1.0001)
            .collect()
    }
}

/// Vertical grid lines with their values below.
pub(crate) fn x_axis(
    scale: &Scale,
    top: f64,
    bottom: f64,
    write: impl Fn(f64) -> String,
) -> Markup {
    html! {
        @for value in scale.ticks() {
            @let x = px(scale.at(value));
            line class=(if value == 0.0 { "zero" } else { "grid" })
                x1=(x) x2=(x) y1=(px(top)) y2=(px(bottom)) {}
            text class="tick" x=(x) y=(px(bottom + 14.0)) text-anchor="middle" { (write(value)) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_end_within_the_data() {
        let scale = Scale::new((0.0, 100.0), 730.0, 1.0, 4.0);
        assert_eq!(scale.ticks(), [0.0, 200.0, 400.0, 600.0]);
        assert_eq!(scale.at(730.0), 100.0);
    }

    #[test]
    fn ticks_are_round_in_the_unit_that_is_written() {
        let mebibyte = 1_048_576.0;
        let scale = Scale::new((0.0, 100.0), 420.0 * mebibyte, mebibyte, 4.0);
        assert_eq!(
            scale
                .ticks()
                .iter()
                .map(|tick| tick / mebibyte)
                .collect::<Vec<_>>(),
            [0.0, 200.0, 400.0]
        );
    }

    #[test]
    fn a_scale_without_data_still_has_a_length() {
        let scale = Scale::new((10.0, 100.0), 0.0, 1.0, 4.0);
        assert_eq!(scale.at(0.0), 10.0);
        assert!(scale.ticks().len() > 1);
    }
}
