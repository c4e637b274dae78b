//! How long touches of pages took, as guests with `vm.touch_mb` count them: most of all those of pages
//! that were not there yet.

use std::collections::BTreeMap;

use lab_init::agreed::{TOUCH_FIRST, TOUCH_PER_DOUBLING};
use serde::{Deserialize, Serialize};

use crate::bench::Bench;
use crate::clock::UnixMs;
use crate::observer::Track;
use crate::outcome::Outcome;
use crate::results::Run;

/// Name of the figure.
pub const NAME: &str = "touch_latency";
/// How long before its move it is read what a guest at rest counts.
const BEFORE_MS: f64 = 3e3;

/// Touches by bucket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts(BTreeMap<u32, u64>);

impl Counts {
    /// Reads `BUCKET:COUNT,...`, or `-`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        if text == "-" {
            return Some(Self::default());
        }
        let pairs = text.split(',').map(|pair| {
            let (bucket, count) = pair.split_once(':')?;
            Some((bucket.parse().ok()?, count.parse().ok()?))
        });
        pairs.collect::<Option<_>>().map(Self)
    }

    /// What was counted since `earlier`.
    fn since(&self, earlier: &Self) -> Self {
        let of = |(bucket, count): (&u32, &u64)| {
            let before = earlier.0.get(bucket).copied().unwrap_or(0);
            (*bucket, count.saturating_sub(before))
        };
        Self(
            self.0
                .iter()
                .map(of)
                .filter(|(_, count)| *count > 0)
                .collect(),
        )
    }

    fn add(&mut self, other: &Self) {
        for (bucket, count) in &other.0 {
            *self.0.entry(*bucket).or_default() += count;
        }
    }

    fn all(&self) -> u64 {
        self.0.values().sum()
    }

    /// Those that waited, shortest first.
    fn slow(&self) -> impl DoubleEndedIterator<Item = (u32, u64)> {
        self.0.range(1..).map(|(bucket, count)| (*bucket, *count))
    }

    /// The end of the bucket below which this part of those that waited lies.
    fn slow_at(&self, part: f64) -> Option<f64> {
        let slow: u64 = self.slow().map(|(_, count)| count).sum();
        let mut left = (slow as f64 * part).ceil().max(1.0);
        self.slow().find_map(|(bucket, count)| {
            left -= count as f64;
            (left <= 0.0).then(|| end_ms(bucket))
        })
    }
}

fn end_ms(bucket: u32) -> f64 {
    first_ms() * (f64::from(bucket) / TOUCH_PER_DOUBLING).exp2()
}

/// End of the first bucket: what took longer waited for something.
fn first_ms() -> f64 {
    // As a fraction of a millisecond in one step: 200 us are 0.2 ms, not a little more.
    TOUCH_FIRST.as_micros() as f64 / 1e3
}

/// Touches between the VM's start at its target and the arrival of all of its memory, of all VMs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TouchLatency {
    /// Touches of pages.
    pub touches: u64,
    /// Of these, those that took longer than `threshold_ms`. What follows is about them.
    pub faults: u64,
    /// Half of them took at most so long, to 9 %.
    pub median_ms: Option<f64>,
    /// 99 of 100.
    pub p99_ms: Option<f64>,
    /// All of them.
    pub longest_ms: Option<f64>,
    /// What a touch must take longer than, to count as a fault.
    pub threshold_ms: f64,
    /// Of a thousand touches at the source, in the seconds before the move, so many took longer than that.
    pub slow_before_permille: Option<f64>,
    /// End of each bucket in ms, and faults in it.
    pub histogram: Vec<[f64; 2]>,
}

impl TouchLatency {
    /// What the guests of a run have counted; `None` if they do not touch pages.
    #[must_use]
    pub fn measure(bench: &Bench<'_>, outcome: &Outcome) -> Option<Self> {
        let (mut before, mut during) = (Counts::default(), Counts::default());
        for (vm, moved) in bench.vms.iter().zip(&outcome.moved) {
            let track = bench.observer.track(&vm.name);
            let at_rest = UnixMs(moved.started.0 - BEFORE_MS);
            before.add(&between(&track, at_rest, moved.started));
            if let (Some(left), Some(ended)) = (left(&track, vm.target.name()), moved.ended) {
                during.add(&between(&track, left, ended));
            }
        }
        (during.all() > 0).then(|| Self::of(&before, &during))
    }

    fn of(before: &Counts, during: &Counts) -> Self {
        let slow = |counts: &Counts| counts.slow().map(|(_, count)| count).sum::<u64>();
        let permille = 1e3 * slow(before) as f64 / before.all() as f64;
        Self {
            touches: during.all(),
            faults: slow(during),
            median_ms: during.slow_at(0.5),
            p99_ms: during.slow_at(0.99),
            longest_ms: during.slow().next_back().map(|(bucket, _)| end_ms(bucket)),
            threshold_ms: first_ms(),
            slow_before_permille: (before.all() > 0).then_some(permille),
            histogram: during
                .slow()
                .map(|(bucket, count)| [end_ms(bucket), count as f64])
                .collect(),
        }
    }

    /// What a run has in its results.
    #[must_use]
    pub fn of_run(run: &Run) -> Option<Self> {
        serde_json::from_value(run.application.get(NAME)?.clone()).ok()
    }
}

/// When a VM was last heard before it was heard from `target`.
fn left(track: &Track, target: &str) -> Option<UnixMs> {
    let first = track.0.iter().position(|beat| beat.host == target)?;
    Some(track.0.get(first.checked_sub(1)?)?.at)
}

/// What was counted from the last heartbeat at or before `from` to the first at or after `to`.
fn between(track: &Track, from: UnixMs, to: UnixMs) -> Counts {
    let beats = &track.0;
    let first = beats.partition_point(|beat| beat.at <= from);
    let last = beats.partition_point(|beat| beat.at < to);
    let first = first.checked_sub(1).and_then(|at| beats.get(at));
    match (first, beats.get(last).or(beats.last())) {
        (Some(first), Some(last)) => last.touches.since(&first.touches),
        _ => Counts::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observer::Beat;

    fn beat(at: f64, host: &str, touches: &str) -> Beat {
        Beat {
            at: UnixMs(at),
            host: host.to_owned(),
            touches: Counts::parse(touches).unwrap(),
            ..Beat::default()
        }
    }

    #[test]
    fn only_what_was_touched_at_the_target_before_all_was_there_counts() {
        let track = Track(vec![
            beat(0.0, "s1", "0:10"),
            beat(10.0, "s1", "0:20,1:1"),
            beat(500.0, "t1", "0:22,1:1,8:3,24:1"),
            beat(600.0, "t1", "0:30,1:1,8:5,24:1"),
            beat(900.0, "t1", "0:900,1:9,8:5,24:1"),
        ]);
        let left = left(&track, "t1").unwrap();
        assert_eq!(left, UnixMs(10.0));
        let during = between(&track, left, UnixMs(590.0));
        let before = between(&track, UnixMs(0.0), UnixMs(10.0));
        let latency = TouchLatency::of(&before, &during);
        assert_eq!((latency.touches, latency.faults), (16, 6));
        assert_eq!(latency.median_ms, Some(0.4));
        assert_eq!(latency.p99_ms, Some(1.6));
        assert_eq!(latency.longest_ms, Some(1.6));
        assert_eq!(latency.histogram, [[0.4, 5.0], [1.6, 1.0]]);
        assert!((latency.slow_before_permille.unwrap() - 1e3 / 11.0).abs() < 1e-9);
    }

    #[test]
    fn counts_are_read_as_the_guest_writes_them() {
        assert_eq!(Counts::parse("-"), Some(Counts::default()));
        let counts = Counts::parse("0:7,153:2").unwrap();
        assert_eq!((counts.all(), counts.slow().count()), (9, 1));
        for junk in ["", "x", "1", "1:", "1:2,", "-1:2"] {
            assert_eq!(Counts::parse(junk), None, "{junk}");
        }
    }

    #[test]
    fn without_a_fault_there_is_no_median() {
        let latency = TouchLatency::of(&Counts::default(), &Counts::parse("0:5").unwrap());
        assert_eq!((latency.touches, latency.faults), (5, 0));
        assert_eq!(latency.median_ms, None);
        assert_eq!(latency.slow_before_permille, None);
    }
}
