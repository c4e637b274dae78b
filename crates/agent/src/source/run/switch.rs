//! From pre-copy to post-copy.

use std::sync::Arc;
use std::time::{Duration, Instant};

use guest::MigrationInfo;
use migrate::handover::{SourceEvent, SourceState};

use crate::types::Mode;

use super::super::stream::Stream;
use super::{Run, parameters};

/// How long a source QEMU is not read before its guest is stopped, with the guest running. QEMU
/// writes for up to 50 ms before it looks at what it was told, and time in which it waits for us counts: so
/// it looks as soon as it is read again. And what was read is complete at the target then.
const REST: Duration = Duration::from_millis(50);
/// On a slow link the rest lasts until all is complete, but no longer than this.
const REST_MAX: Duration = Duration::from_millis(500);
/// How long it is not read from the order to stop on: several times what the two orders take. One
/// that holds its lock, because it has just converged, must be read before it can take them.
const ORDERS: Duration = Duration::from_millis(20);

impl Run {
    /// The guest stops, and its QEMU goes over to post-copy.
    pub(super) fn switch_to_postcopy(&mut self) {
        if *self.machine.state() != SourceState::Copying || self.switched {
            return;
        }
        self.switched = true;
        if let Some(session) = &self.session {
            session.expect_urgent();
        }
        let stream = self.stream.clone();
        if let Some(stream) = &stream {
            self.approach.set_near();
            stream.set_near_end(true);
            stream.set_switching();
            self.rest(stream);
            stream.hold(ORDERS);
        }
        let machine = &mut self.machine;
        let switched = self.home.switch(|| {
            machine.handle(SourceEvent::SourceHeld);
        });
        if let Some(stream) = &stream {
            stream.hold(Duration::ZERO);
        }
        if let Err(error) = switched {
            self.handle(SourceEvent::Failed(format!("{error:#}")));
        }
    }

    /// Leaves the source QEMU alone until it looks for orders and nothing is under way. What waits for
    /// other hosts longer than that is read from the source, while the guest runs.
    fn rest(&self, stream: &Arc<Stream>) {
        let since = Instant::now();
        stream.hold(REST_MAX);
        let mut is_hurried = false;
        while since.elapsed() < REST || (since.elapsed() < REST_MAX && !stream.is_complete()) {
            if since.elapsed() >= REST && !is_hurried {
                is_hurried = true;
                if let Some(session) = self.session.as_ref().filter(|s| s.rack.is_some()) {
                    session.outbox.hurry(stream);
                }
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// In hybrid mode a move that does not converge goes over to post-copy, and one that is told to.
    pub(super) fn weigh(&mut self, stream: &Stream, info: &MigrationInfo) {
        if self.spec.settings.mode != Mode::Hybrid
            || self.switched
            || self.stopped
            || stream.is_ending()
        {
            return;
        }
        let limit_ms = parameters(&self.spec).downtime_limit_ms;
        let (planned, _) = stream.planning_rates(limit_ms);
        let leaves = planned.saturating_mul(limit_ms) / 1000;
        let since = self.started.elapsed();
        if let Some(why) = self.convergence.observe(info, leaves, since) {
            let link = stream.flow().3.unique;
            self.note(format!(
                "{why}; the guest writes {} MB/s and the link carries {} MB/s of its pages: it goes over to post-copy",
                info.dirty_bytes_per_s / 1_000_000,
                link / 1_000_000
            ));
            self.switch_to_postcopy();
        }
    }
}
