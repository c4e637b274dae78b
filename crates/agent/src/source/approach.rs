//! How near the end of a move is, as far as its QEMU tells.
//!
//! Until it is near, QEMU is told a low rate, at which it stops only a guest with next to nothing
//! left (`docs/decisions/0004`).

use std::time::{Duration, Instant};

use page::ByteLen;

/// How often QEMU is asked how far it is and told the wire's rate, and how often near the end, where
/// it waits for that word before it stops its guest.
const TICK: Duration = Duration::from_millis(500);
const TICK_NEAR: Duration = Duration::from_millis(100);

/// The end is near from the second round on, or with less than this to go, or less than what QEMU
/// passes in this time: three ticks, and a stretch of zero pages that it passes in one.
const NEAR_END: ByteLen = ByteLen(8 << 20);
const NEAR_END_TIME: Duration = Duration::from_millis(1500);

/// What is known of one move.
#[derive(Default)]
pub(crate) struct Approach {
    is_near: bool,
    /// What QEMU had to send when it was last asked.
    remaining: Option<(Instant, ByteLen)>,
}

impl Approach {
    /// Whether QEMU may soon stop its guest.
    pub(crate) fn is_near(&self) -> bool {
        self.is_near
    }

    /// From now on it is, whatever QEMU says of itself.
    pub(crate) fn set_near(&mut self) {
        self.is_near = true;
    }

    /// How long to wait before QEMU is asked again.
    pub(crate) fn tick(&self) -> Duration {
        if self.is_near { TICK_NEAR } else { TICK }
    }

    /// QEMU is in its `round`th pass over memory, with `remaining` to send.
    pub(crate) fn observe(&mut self, round: u64, remaining: ByteLen, now: Instant) {
        let before = self.remaining.replace((now, remaining));
        self.is_near |= match round {
            0 => false,
            1 => remaining < NEAR_END || before.is_some_and(|b| ends_soon(b, (now, remaining))),
            _ => true,
        };
    }
}

/// Whether going on as between the two looks takes less than [`NEAR_END_TIME`].
fn ends_soon((then, before): (Instant, ByteLen), (now, remaining): (Instant, ByteLen)) -> bool {
    let passed = u128::from(before.0.saturating_sub(remaining.0));
    let took = now.saturating_duration_since(then).as_millis();
    u128::from(remaining.0) * took < passed * NEAR_END_TIME.as_millis()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn the_end_is_near_by_bytes_by_time_and_from_the_second_round_on() {
        let now = Instant::now();
        let after = |ms| now + Duration::from_millis(ms);
        let mut by_bytes = Approach::default();
        by_bytes.observe(0, ByteLen(0), now);
        assert!(!by_bytes.is_near(), "nothing has been sent yet");
        by_bytes.observe(1, ByteLen(7 * MIB), now);
        assert!(by_bytes.is_near());
        assert_eq!(by_bytes.tick(), TICK_NEAR);

        let mut by_time = Approach::default();
        by_time.observe(1, ByteLen(400 * MIB), now);
        by_time.observe(1, ByteLen(380 * MIB), after(500));
        assert!(!by_time.is_near(), "9.5 s to go");
        by_time.observe(1, ByteLen(200 * MIB), after(1000));
        assert!(by_time.is_near(), "0.6 s to go");

        let mut by_round = Approach::default();
        by_round.observe(2, ByteLen(400 * MIB), now);
        assert!(by_round.is_near());
        by_round.observe(2, ByteLen(500 * MIB), after(500));
        assert!(by_round.is_near(), "it stays near");
    }

    #[test]
    fn a_guest_that_writes_more_than_is_sent_does_not_end_soon() {
        let now = Instant::now();
        let mut growing = Approach::default();
        growing.observe(1, ByteLen(100 * MIB), now);
        growing.observe(1, ByteLen(120 * MIB), now + Duration::from_millis(500));
        assert!(!growing.is_near());
    }
}
