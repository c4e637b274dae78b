//! Wall-clock time. Everything of a run takes place on one machine, so the wall clock is common to
//! the lab, to QEMU's QMP events and to Gangway's events.

use std::time::{SystemTime, UNIX_EPOCH};

/// A moment, in milliseconds since 1970 with a fraction.
#[derive(Clone, Copy, Debug, Default, PartialEq, PartialOrd)]
pub struct UnixMs(pub f64);

impl UnixMs {
    /// This moment.
    #[must_use]
    pub fn now() -> Self {
        // A clock before 1970 makes times wrong, and nothing else.
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Self(since.as_secs_f64() * 1e3)
    }

    /// Milliseconds from `earlier` to this moment; negative if it lies after.
    #[must_use]
    pub fn ms_since(self, earlier: Self) -> f64 {
        self.0 - earlier.0
    }

    /// As [`Self::ms_since`], in seconds.
    #[must_use]
    pub fn s_since(self, earlier: Self) -> f64 {
        self.ms_since(earlier) / 1e3
    }

    /// The later of two moments.
    #[must_use]
    pub fn later(self, other: Self) -> Self {
        Self(self.0.max(other.0))
    }
}
