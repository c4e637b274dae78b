//! How far the source QEMU may be ahead of the target QEMU.
//!
//! QEMU believes that what a socket accepted has arrived: it plans its switch-over by the rate
//! at which it can write. So what was read from it and is not yet loaded by the target QEMU is
//! bounded in bytes and in time; and the rate that QEMU is told for its planning is that of
//! page bytes end to end, not that of references.

use std::collections::VecDeque;
use std::time::Duration;

use wire::Reached;

/// How much the wire may be behind, while the end of the migration is far and once it is near.
struct Lead {
    /// Time at the rate that the path has shown.
    time_ms: u64,
    /// Below this the window never closes on time alone.
    floor_bytes: u64,
    /// Most bytes of the stream that are not complete, references included.
    incomplete_bytes: u64,
}

/// Far from its end a migration wants throughput: an answer may take long because both hosts
/// are busy, and a window of less than that time would make itself smaller and smaller. It is
/// about what a TCP socket buffers by itself. A VM whose contents others bring goes far ahead, to
/// contents that nobody carries yet: else the first sources of a rack carry all of them.
const FAR: Lead = Lead {
    time_ms: 400,
    floor_bytes: 1 << 20,
    incomplete_bytes: 32 << 20,
};

/// Near its end the backlog is downtime: a third of QEMU's default limit of 300 ms, and no less
/// than one read buffer, or nothing would move. Pages that wait for contents of other hosts take no
/// time on this wire and count by their number: 512 of them at most are left to the switch-over.
const NEAR: Lead = Lead {
    time_ms: 100,
    floor_bytes: 256 << 10,
    incomplete_bytes: 2 << 20,
};

/// After a switch to post-copy nobody waits for what is under way: what a processor needs overtakes it.
/// So pages may wait for contents of other hosts as long as far from the end.
const AHEAD: Lead = Lead {
    incomplete_bytes: FAR.incomplete_bytes,
    ..NEAR
};

/// Memory that a guest may have left when it is stopped far from the end. Not nothing: with less
/// than a page QEMU would not look for written pages again before it stops the guest, and all that
/// was written in the first round would be left for the pause.
const FAR_REST: u64 = 64 << 10;

/// On a path so slow that the window's floor takes all of the downtime limit, QEMU plans with this
/// part of the rate: a VM that converges slowly is worth a longer pause.
const LEAST_SHARE: u64 = 4;

/// Interval over which rates are measured; QEMU uses the same.
const MEASURE: Duration = Duration::from_millis(250);

/// Something sent and not acknowledged.
struct Flight {
    position: u64,
    wire_bytes: u64,
    page_bytes: u64,
}

/// The window of one VM's stream.
pub struct Window {
    limit_bytes: u64,
    position: u64,
    /// What the target has received.
    received: u64,
    /// What is complete there.
    acked: u64,
    flights: VecDeque<Flight>,
    wire_in_flight: u64,
    meter: Meter,
    near_end: bool,
    guest_ahead: bool,
}

/// Rates as the acknowledgements show them, bytes per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    /// On the wire.
    pub wire: u64,
    /// Page bytes that crossed as bytes: what a unique page gets.
    pub unique: u64,
    /// Of QEMU's stream.
    pub stream: u64,
}

impl Window {
    /// A window of at most `limit_bytes` of QEMU's stream that the target has not received.
    #[must_use]
    pub fn new(limit_bytes: u64) -> Self {
        Self {
            limit_bytes,
            position: 0,
            received: 0,
            acked: 0,
            flights: VecDeque::new(),
            wire_in_flight: 0,
            meter: Meter::default(),
            near_end: false,
            guest_ahead: false,
        }
    }

    /// A frame was queued: it ends at `position` of the stream, takes about `wire_bytes` on the
    /// wire, and holds `page_bytes` of pages.
    pub fn sent(&mut self, position: u64, wire_bytes: u64, page_bytes: u64) {
        self.position = self.position.max(position);
        self.wire_in_flight += wire_bytes;
        self.flights.push_back(Flight {
            position,
            wire_bytes,
            page_bytes,
        });
    }

    /// The target QEMU is so far. What it has received leaves the wire's window; what is not
    /// complete counts as backlog, because pages in front of it wait for contents that others bring.
    pub fn acknowledged(&mut self, reached: Reached, now: Duration) {
        self.acked = self.acked.max(reached.complete.min(self.position));
        let before = self.received;
        self.received = before.max(reached.received.min(self.position));
        let (mut wire, mut pages) = (0, 0);
        while let Some(flight) = self.flights.front().filter(|f| f.position <= self.received) {
            wire += flight.wire_bytes;
            pages += flight.page_bytes;
            self.flights.pop_front();
        }
        self.wire_in_flight -= wire;
        self.meter.add(
            Rates {
                wire,
                unique: pages,
                stream: self.received - before,
            },
            now,
        );
    }

    /// Whether more may be read from QEMU.
    #[must_use]
    pub fn is_open(&self) -> bool {
        let lead = match (self.guest_ahead, self.near_end) {
            (true, _) => AHEAD,
            (false, true) => NEAR,
            (false, false) => FAR,
        };
        let in_time = self.meter.best.wire.saturating_mul(lead.time_ms) / 1000;
        self.position - self.received < self.limit_bytes
            && self.backlog() < lead.incomplete_bytes
            && self.wire_in_flight < in_time.max(lead.floor_bytes)
    }

    /// Whether QEMU may soon stop its guest: the window is smaller then.
    pub fn set_near_end(&mut self, near_end: bool) {
        self.near_end = near_end;
    }

    /// The guest went ahead of its memory: a switch to post-copy is passed.
    pub fn set_guest_ahead(&mut self) {
        self.guest_ahead = true;
    }

    /// The reader waited for the window for this long.
    pub fn waited(&mut self, time: Duration) {
        self.meter.waited += time;
    }

    /// Bytes of QEMU's stream that the target QEMU has not loaded.
    #[must_use]
    pub fn backlog(&self) -> u64 {
        self.position - self.acked
    }

    /// Of the backlog, bytes that the target has not received, and bytes that it has and that wait
    /// for contents in front of them.
    #[must_use]
    pub fn behind(&self) -> (u64, u64) {
        let received = self.received.max(self.acked);
        (self.position - received, received - self.acked)
    }

    /// Position that the target QEMU has loaded.
    #[must_use]
    pub fn acked(&self) -> u64 {
        self.acked
    }

    /// The rate, in page bytes per second, that QEMU should plan with so that its guest stands still
    /// for at most `limit_ms`: what is on its way when the guest stops is part of that time. Far
    /// from the end too much is on its way, and QEMU stops only a guest that has next to nothing
    /// left.
    #[must_use]
    pub fn planning_rate(&self, limit_ms: u64) -> u64 {
        let far = FAR_REST * 1000 / limit_ms.max(1);
        if !self.near_end || self.backlog() > 2 * NEAR.incomplete_bytes {
            return far;
        }
        let Rates {
            wire,
            unique,
            stream,
        } = self.meter.best;
        if unique == 0 {
            // No page had to go as bytes: the path has not been a limit.
            return stream.max(NEAR.floor_bytes);
        }
        let left_of_limit = |ahead_bytes: u64| {
            let ahead_ms = ahead_bytes.saturating_mul(1000) / wire.max(1);
            unique.saturating_mul(limit_ms.saturating_sub(ahead_ms)) / limit_ms.max(1)
        };
        let narrow = NEAR.floor_bytes.max(wire * NEAR.time_ms / 1000);
        if self.wire_in_flight > narrow {
            // Left from when the window was wide: that drains before the guest is stopped.
            return left_of_limit(self.wire_in_flight).max(far);
        }
        left_of_limit(narrow).max(unique / LEAST_SHARE)
    }

    /// Rates of the last interval, for people.
    #[must_use]
    pub fn rates(&self) -> Rates {
        self.meter.last
    }

    /// Rates that the path has shown it can do, for QEMU's planning. A slow interval in which
    /// QEMU was the slow one says nothing about the path.
    #[must_use]
    pub fn capable_rates(&self) -> Rates {
        self.meter.best
    }
}

#[derive(Default)]
struct Meter {
    since: Option<Duration>,
    sum: Rates,
    /// Time in this interval that the reader waited for the window.
    waited: Duration,
    last: Rates,
    best: Rates,
}

impl Meter {
    fn add(&mut self, bytes: Rates, now: Duration) {
        let Some(since) = self.since else {
            // The first acknowledgement only starts the clock: its bytes came before it.
            self.since = Some(now);
            return;
        };
        self.sum.wire += bytes.wire;
        self.sum.unique += bytes.unique;
        self.sum.stream += bytes.stream;
        let elapsed = now.saturating_sub(since);
        if elapsed < MEASURE {
            return;
        }
        let elapsed_ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
        let per_second = |bytes: u64| bytes.saturating_mul(1000) / elapsed_ms;
        self.last = Rates {
            wire: per_second(self.sum.wire),
            unique: per_second(self.sum.unique),
            stream: per_second(self.sum.stream),
        };
        let path_was_the_limit = self.waited * 2 > elapsed;
        self.best = if path_was_the_limit {
            // Smoothed: intervals are short against the queues in between.
            Rates {
                wire: self.best.wire.midpoint(self.last.wire),
                unique: self.best.unique.midpoint(self.last.unique),
                stream: self.best.stream.midpoint(self.last.stream),
            }
        } else {
            Rates {
                wire: self.best.wire.max(self.last.wire),
                unique: self.best.unique.max(self.last.unique),
                stream: self.best.stream.max(self.last.stream),
            }
        };
        self.sum = Rates::default();
        self.waited = Duration::ZERO;
        self.since = Some(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(position: u64) -> Reached {
        Reached {
            received: position,
            complete: position,
        }
    }

    #[test]
    fn pages_that_wait_for_others_close_the_window_by_their_bytes_and_not_by_wire_time() {
        let mut w = Window::new(8 << 20);
        for mib in 1..=64_u64 {
            w.sent(mib << 20, 1 << 20, 1 << 20);
            let reached = Reached {
                received: mib << 20,
                complete: 1 << 20,
            };
            w.acknowledged(reached, ms(100 * mib));
            assert_eq!(w.is_open(), mib <= 32, "{mib} MiB");
        }
        w.set_near_end(true);
        w.acknowledged(up_to(64, 61), ms(8000));
        assert!(!w.is_open(), "3 MiB are much for a pause");
        w.sent(65 << 20, 1 << 20, 1 << 20);
        assert_eq!(w.behind(), (1 << 20, 3 << 20));
        w.acknowledged(up_to(65, 62), ms(8050));
        w.set_guest_ahead();
        assert!(w.is_open(), "the guest runs already");
        w.acknowledged(all(64 << 20), ms(8100));
        assert!(w.is_open());
    }

    fn up_to(received_mib: u64, complete_mib: u64) -> Reached {
        Reached {
            received: received_mib << 20,
            complete: complete_mib << 20,
        }
    }

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn the_window_closes_on_stream_bytes_even_if_nothing_is_on_the_wire() {
        let mut w = Window::new(8 << 20);
        w.sent(8 << 20, 100, 0);
        assert!(!w.is_open());
        w.acknowledged(all(1), ms(0));
        assert!(w.is_open());
        assert_eq!(w.backlog(), (8 << 20) - 1);
    }

    #[test]
    fn the_window_closes_on_wire_time() {
        let mut w = Window::new(8 << 20);
        w.set_near_end(true);
        w.sent(1, NEAR.floor_bytes, 0);
        assert!(!w.is_open(), "nothing is known of the path yet");
        // 10 MB a second: 1 MB may be under way.
        for step in 1..=20 {
            w.sent(step + 1, 1_000_000, 1_000_000);
            w.acknowledged(all(step + 1), ms(100 * step));
        }
        w.sent(100, 900_000, 0);
        assert!(w.is_open());
        w.sent(101, 200_000, 0);
        assert!(!w.is_open());
        w.set_near_end(false);
        assert!(w.is_open(), "far from the end more may be under way");
    }

    #[test]
    fn qemu_plans_with_what_is_left_of_the_limit_beside_the_window() {
        let mut w = Window::new(8 << 20);
        w.set_near_end(true);
        let far = FAR_REST * 1000 / 300;
        assert!(
            w.planning_rate(300) > far,
            "nothing is known of the path yet"
        );
        for step in 1..=20 {
            w.sent(step, 1_000_000, 2_000_000);
            w.acknowledged(all(step), ms(100 * step));
        }
        let able = w.capable_rates().unique;
        assert_eq!(w.planning_rate(300), able * 200 / 300);
        assert_eq!(w.planning_rate(50), able / LEAST_SHARE);
        w.set_near_end(false);
        assert_eq!(w.planning_rate(300), far, "far from the end QEMU goes on");
    }

    #[test]
    fn a_pause_of_qemu_does_not_lower_what_the_path_can_do() {
        let mut w = Window::new(8 << 20);
        for step in 1..=20 {
            w.sent(step, 1_000_000, 1_000_000);
            w.acknowledged(all(step), ms(100 * step));
        }
        let able = w.capable_rates().wire;
        w.sent(30, 10, 0);
        w.acknowledged(all(30), ms(5000));
        assert_eq!(w.capable_rates().wire, able);
        assert!(w.rates().wire < able);
    }

    #[test]
    fn an_acknowledgement_of_what_was_never_sent_is_not_believed() {
        let mut w = Window::new(8 << 20);
        w.sent(10, 10, 10);
        w.acknowledged(all(u64::MAX), ms(1));
        assert_eq!(w.backlog(), 0);
    }
}
