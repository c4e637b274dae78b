//! A limit in bytes per second.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Burst that a limit lets through at once: what 20 ms at the limit would carry.
const BURST: Duration = Duration::from_millis(20);

/// Counts bytes against a rate; shared by the threads that it limits.
#[derive(Default)]
pub(crate) struct Bucket {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Absent: no limit.
    rate: Option<u64>,
    /// When everything counted so far is paid for.
    paid_until: Option<Instant>,
}

impl Bucket {
    pub(crate) fn set_rate(&self, bytes_per_s: Option<u64>) {
        self.lock().rate = bytes_per_s;
    }

    /// Counts `bytes`, and says how long to wait before the next are sent.
    pub(crate) fn take(&self, bytes: u64, now: Instant) -> Duration {
        let mut state = self.lock();
        let Some(rate) = state.rate.filter(|rate| *rate > 0) else {
            return Duration::ZERO;
        };
        let cost = Duration::from_nanos(bytes.saturating_mul(1_000_000_000) / rate);
        let start = state
            .paid_until
            .unwrap_or(now)
            .max(now.checked_sub(BURST).unwrap_or(now));
        let paid_until = start + cost;
        state.paid_until = Some(paid_until);
        paid_until.saturating_duration_since(now)
    }

    /// How long what was counted so far takes to be paid for.
    pub(crate) fn owed(&self) -> Duration {
        self.take(0, Instant::now())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_of_bytes_takes_a_second() {
        let bucket = Bucket::default();
        let start = Instant::now();
        assert_eq!(bucket.take(1 << 30, start), Duration::ZERO);
        bucket.set_rate(Some(1_000_000));
        let mut now = start;
        for _ in 0..10 {
            now += bucket.take(100_000, now);
        }
        let took = now.duration_since(start);
        assert!(
            took >= Duration::from_millis(979) && took <= Duration::from_secs(1),
            "{took:?}"
        );
    }

    #[test]
    fn an_idle_time_is_not_saved_up_beyond_the_burst() {
        let bucket = Bucket::default();
        bucket.set_rate(Some(1_000_000));
        let start = Instant::now();
        bucket.take(1000, start);
        let later = start + Duration::from_secs(60);
        assert!(bucket.take(1_000_000, later) >= Duration::from_millis(979));
    }
}
