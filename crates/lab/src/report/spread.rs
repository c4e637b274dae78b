//! One measure over the repetitions of a technique.

/// Mean and range of a measure over repeated runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    pub(crate) runs: usize,
    pub(crate) mean: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

/// How one spread lies to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Relation {
    /// Every run is below every run of the other.
    Below,
    /// Every run is above every run of the other.
    Above,
    /// The ranges touch: the runs do not tell the two apart.
    Within,
}

impl Spread {
    /// Over the values that were measured; `None` if there is none.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let values: Vec<f64> = values
            .into_iter()
            .filter(|value| value.is_finite())
            .collect();
        let runs = values.len();
        let min = values.iter().copied().reduce(f64::min)?;
        let max = values.iter().copied().reduce(f64::max)?;
        let mean = values.iter().sum::<f64>() / runs as f64;
        Some(Self {
            runs,
            mean,
            min,
            max,
        })
    }

    /// Where this spread lies, seen from `other`.
    pub(crate) fn relation_to(&self, other: &Self) -> Relation {
        if self.max < other.min {
            Relation::Below
        } else if self.min > other.max {
            Relation::Above
        } else {
            Relation::Within
        }
    }

    /// Whether there are runs enough to know a range at all.
    pub(crate) fn is_known(&self) -> bool {
        self.runs > 1
    }

    /// This mean as a part of the other's; `None` against zero.
    pub(crate) fn ratio_to(&self, other: &Self) -> Option<f64> {
        (other.mean > 0.0).then(|| self.mean / other.mean)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spread(values: &[f64]) -> Spread {
        Spread::of(values.iter().copied()).unwrap()
    }

    #[test]
    fn ranges_that_touch_do_not_count_as_a_difference() {
        assert_eq!(
            spread(&[1.0, 3.0]).relation_to(&spread(&[3.0, 5.0])),
            Relation::Within
        );
        assert_eq!(
            spread(&[1.0, 2.0]).relation_to(&spread(&[3.0, 5.0])),
            Relation::Below
        );
        assert_eq!(
            spread(&[6.0, 7.0]).relation_to(&spread(&[3.0, 5.0])),
            Relation::Above
        );
    }

    #[test]
    fn nothing_measured_gives_no_spread() {
        assert_eq!(Spread::of([]), None);
        assert_eq!(Spread::of([f64::NAN]), None);
    }

    #[test]
    fn one_run_has_no_known_range_and_zero_no_ratio() {
        assert!(!spread(&[4.0]).is_known());
        assert_eq!(spread(&[4.0]).ratio_to(&spread(&[0.0])), None);
        assert_eq!(spread(&[1.0, 3.0]).ratio_to(&spread(&[8.0])), Some(0.25));
    }
}
