//! What a paper says in numbers, and the same measured here.

use crate::report::metric::Unit;
use crate::report::spread::{Relation, Spread};
use crate::report::text;
use crate::results::{Point, Results, Run};

/// A number of a run.
pub(super) type Read = fn(&Run) -> Option<f64>;

/// Something that a paper has measured.
pub(super) struct Claim {
    /// What it is, without the technique.
    pub(super) what: &'static str,
    /// As the paper gives it; absent where a figure has no numbers beside its drawing.
    pub(super) paper: Option<f64>,
    pub(super) unit: Unit,
    /// Below `runs[]` in `results.json`.
    pub(super) field: &'static str,
    pub(super) read: Read,
    /// The technique that it is about.
    pub(super) of: &'static str,
    /// It is a ratio to this technique's.
    pub(super) against: Option<&'static str>,
    /// What ran beside.
    pub(super) beside: Option<&'static str>,
}

/// A claim's value here.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Value {
    pub(super) mean: f64,
    /// Least and most that the runs allow, where there are enough to know.
    pub(super) range: Option<(f64, f64)>,
}

impl Value {
    pub(super) fn write(self, unit: Unit) -> String {
        let write = |value: f64| match unit {
            Unit::Share => text::ratio(value),
            other => other.write(value),
        };
        match self.range {
            Some((least, most)) if write(least) != write(most) => {
                format!("{} ({} to {})", write(self.mean), write(least), write(most))
            }
            _ => write(self.mean),
        }
    }
}

impl Claim {
    /// The claim's value for `technique`, from the largest topology.
    pub(super) fn of_technique(&self, results: &Results, technique: &str) -> Option<Value> {
        let own = spread(results, (technique, self.beside), self.read)?;
        let Some(against) = self.against else {
            return Some(Value {
                mean: own.mean,
                range: own.is_known().then_some((own.min, own.max)),
            });
        };
        let other = spread(results, (against, self.beside), self.read)?;
        let known = own.is_known() && other.is_known() && other.min > 0.0;
        Some(Value {
            mean: own.ratio_to(&other)?,
            range: known.then(|| (own.min / other.max, own.max / other.min)),
        })
    }

    /// One sentence: ours, the paper's, and what `full` does.
    pub(super) fn sentence(&self, results: &Results) -> Option<String> {
        let own = self.of_technique(results, self.of)?;
        let of = match self.against {
            Some(against) => format!("{} with {} set against {against}", self.what, self.of),
            None => format!("{} with {}", self.what, self.of),
        };
        let mut said = format!("{of} is {}", own.write(self.unit));
        if let Some(paper) = self.paper {
            let paper = Value {
                mean: paper,
                range: None,
            };
            said += &format!(", the paper has {}", paper.write(self.unit));
        }
        if self.of != "full"
            && let Some(full) = self.of_technique(results, "full")
        {
            said += &format!("; full comes to {}", full.write(self.unit));
        }
        let mut letters = said.chars();
        let first = letters.next()?.to_uppercase();
        Some(format!("{first}{}.", letters.as_str()))
    }
}

/// The measure of a technique at the largest topology that it ran on.
pub(super) fn spread(
    results: &Results,
    (technique, beside): (&str, Option<&str>),
    read: Read,
) -> Option<Spread> {
    let largest = results.points().into_iter().max_by_key(Point::vms)?;
    let runs = runs(results, technique, beside);
    Spread::of(
        runs.filter(|run| results.point(run) == largest)
            .filter_map(read),
    )
}

/// All runs of a technique without further settings.
pub(super) fn runs<'a>(
    results: &'a Results,
    technique: &'a str,
    beside: Option<&'a str>,
) -> impl Iterator<Item = &'a Run> {
    results.runs.iter().filter(move |run| {
        let plain = plain_name(run);
        plain == technique && run.beside.as_deref() == beside && run.failure.is_none()
    })
}

/// Name of a run without what ran beside it.
pub(super) fn plain_name(run: &Run) -> String {
    let without = Run {
        technique: run.technique.clone(),
        mode: run.mode.clone(),
        compression: run.compression.clone(),
        ..Run::default()
    };
    without.name()
}

/// How two techniques lie to each other, in words, for a sentence over peers.
pub(super) fn word(relation: Relation) -> &'static str {
    match relation {
        Relation::Below => "below",
        Relation::Above => "above",
        Relation::Within => "within the spread of",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CORE: Claim = Claim {
        what: "core traffic",
        paper: Some(0.56),
        unit: Unit::Share,
        field: "core_bytes",
        read: |run| run.core_bytes.map(|bytes| bytes as f64),
        of: "irlm",
        against: Some("stock"),
        beside: None,
    };

    fn results(runs: &[(&str, u64)]) -> Results {
        let run = |&(technique, core): &(&str, u64)| Run {
            technique: technique.into(),
            mode: "pre-copy".into(),
            core_bytes: Some(core),
            ..Run::default()
        };
        Results {
            runs: runs.iter().map(run).collect(),
            ..Results::default()
        }
    }

    #[test]
    fn a_ratio_has_the_range_that_the_runs_allow() {
        let results = results(&[("stock", 100), ("stock", 200), ("irlm", 50), ("irlm", 70)]);
        let value = CORE.of_technique(&results, "irlm").unwrap();
        assert_eq!(value.mean, 0.4);
        assert_eq!(value.range, Some((0.25, 0.7)));
        assert_eq!(value.write(Unit::Share), "0.40 (0.25 to 0.70)");
    }

    #[test]
    fn a_claim_is_said_with_the_papers_value_and_fulls() {
        let all = results(&[("stock", 100), ("irlm", 40), ("full", 6)]);
        assert_eq!(
            CORE.sentence(&all).unwrap(),
            "Core traffic with irlm set against stock is 0.40, the paper has 0.56; full comes to \
             0.06."
        );
        assert_eq!(CORE.sentence(&results(&[("stock", 100)])), None);
    }

    #[test]
    fn a_failed_run_counts_for_nothing() {
        let mut all = results(&[("stock", 100), ("irlm", 40)]);
        all.runs[1].failure = Some("it broke".into());
        assert_eq!(CORE.of_technique(&all, "irlm"), None);
    }
}
