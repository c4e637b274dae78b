//! Touches pages one after the other and keeps account of how long that took: what a processor waits
//! for a page that is not there yet, as the guest sees it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lab_init::agreed::{TOUCH_FIRST, TOUCH_PER_DOUBLING};
use lab_init::stamp::{Noise, PAGE, Page, Stamp};

use crate::heartbeat::Health;

/// Pause between two touches, so that a guest whose pages are there is nearly idle.
const PAUSE: Duration = Duration::from_millis(1);
/// Buckets: the last ends at 110 s, and has what took longer, too.
const BUCKETS: usize = 154;

/// How long touches took, counted since the guest booted.
#[derive(Debug)]
pub(crate) struct Touches {
    /// As [`TOUCH_PER_DOUBLING`] says.
    buckets: [AtomicU64; BUCKETS],
}

impl Default for Touches {
    fn default() -> Self {
        Self {
            buckets: [const { AtomicU64::new(0) }; BUCKETS],
        }
    }
}

impl Touches {
    fn count(&self, took: Duration) {
        self.buckets[bucket_of(took)].fetch_add(1, Ordering::Relaxed);
    }
}

impl std::fmt::Display for Touches {
    /// `BUCKET:COUNT` for each that is not empty, with commas; `-` if all are.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let counts = self
            .buckets
            .iter()
            .map(|count| count.load(Ordering::Relaxed));
        let mut separator = "";
        for (bucket, count) in counts.enumerate().filter(|(_, count)| *count > 0) {
            write!(f, "{separator}{bucket}:{count}")?;
            separator = ",";
        }
        f.write_str(if separator.is_empty() { "-" } else { "" })
    }
}

fn bucket_of(took: Duration) -> usize {
    let of_first = took.as_secs_f64() / TOUCH_FIRST.as_secs_f64();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between 0 and the number of buckets"
    )]
    let bucket = (of_first.log2() * TOUCH_PER_DOUBLING)
        .ceil()
        .clamp(0.0, (BUCKETS - 1) as f64) as usize;
    bucket
}

/// Memory that is stamped once, never written again, and touched in an order without pattern.
pub(crate) struct Touched {
    owner: u64,
    pages: Vec<Page>,
    order: Vec<usize>,
    noise: Noise,
}

impl Touched {
    /// Fills `count` pages.
    pub(crate) fn new(owner: u64, count: usize) -> Self {
        let mut touched = Self {
            owner,
            pages: vec![Page::ZERO; count],
            order: (0..count).collect(),
            noise: Noise::new(owner),
        };
        for at in 0..count {
            touched.stamp(at).write(&mut touched.pages[at]);
        }
        touched
    }

    fn stamp(&self, at: usize) -> Stamp {
        Stamp {
            owner: self.owner,
            index: at as u64,
            generation: 0,
        }
    }

    /// Touches every page once, in an order of its own each time, and so on for ever.
    pub(crate) fn tend(mut self, health: &Health) {
        while !self.pages.is_empty() {
            self.noise.shuffle(&mut self.order);
            for &at in &self.order {
                self.touch(at, health);
                std::thread::sleep(PAUSE);
            }
        }
    }

    fn touch(&self, at: usize, health: &Health) {
        let page = &self.pages[at];
        let began = Instant::now();
        // A read that is carried out, of a byte anywhere in the page.
        std::hint::black_box(*std::hint::black_box(&page.0[at % PAGE]));
        health.touches.count(began.elapsed());
        health.checked.fetch_add(1, Ordering::Relaxed);
        if !self.stamp(at).matches(page) {
            health.errors.fetch_add(1, Ordering::Relaxed);
            eprintln!("lab-init: touched page {at} is damaged");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_touch_is_counted_in_the_bucket_that_ends_above_it() {
        assert_eq!(bucket_of(Duration::ZERO), 0);
        assert_eq!(bucket_of(TOUCH_FIRST), 0);
        assert_eq!(bucket_of(TOUCH_FIRST + Duration::from_micros(1)), 1);
        assert_eq!(bucket_of(2 * TOUCH_FIRST), 8);
        assert_eq!(bucket_of(Duration::from_secs(3600)), BUCKETS - 1);
        let touches = Touches::default();
        assert_eq!(touches.to_string(), "-");
        touches.count(2 * TOUCH_FIRST);
        touches.count(Duration::from_micros(1));
        touches.count(Duration::from_micros(2));
        assert_eq!(touches.to_string(), "0:2,8:1");
    }

    #[test]
    fn a_damaged_page_is_found_when_it_is_touched() {
        let health = Health::default();
        let mut touched = Touched::new(7, 3);
        (0..3).for_each(|at| touched.touch(at, &health));
        assert_eq!(health.errors.load(Ordering::Relaxed), 0);
        touched.pages.swap(0, 2);
        (0..3).for_each(|at| touched.touch(at, &health));
        assert_eq!(health.errors.load(Ordering::Relaxed), 2);
        assert_eq!(health.checked.load(Ordering::Relaxed), 6);
    }
}
