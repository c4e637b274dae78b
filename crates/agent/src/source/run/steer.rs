//! What the source QEMU says while it copies, and what it is told.

use std::time::{Duration, Instant};

use guest::QmpEvent;
use migrate::handover::{SourceEvent, SourceState};

use super::super::stream::Stream;
use super::{Run, parameters};
use crate::types::{Happening, Mode, Phase};

/// How often progress is reported.
const REPORT: Duration = Duration::from_millis(500);

/// How long a target QEMU that has all of the stream may take to load its devices, with the guest stopped. Longer than
/// a switch-over may stand still otherwise: it is at work, and says nothing until it is done.
const LOAD_LIMIT: Duration = Duration::from_secs(30);

impl Run {
    /// Takes an event of the source QEMU.
    pub(super) fn take_qmp(&mut self, event: &QmpEvent) {
        match event.name.as_str() {
            "STOP" if *self.machine.state() == SourceState::Copying && self.home.was_running => {
                self.stopped = true;
                if let Some(stream) = &self.stream {
                    stream.set_stopped(true);
                    // The guest would wait for other hosts as long as one that runs may.
                    if let Some(session) = self.session.as_ref().filter(|s| s.rack.is_some()) {
                        session.outbox.hurry(stream);
                    }
                }
                self.enter(
                    Phase::SwitchOver,
                    "the guest is stopped; its last pages are on their way".into(),
                );
            }
            // Somebody had stopped it, or it did not get over: it is copied on.
            "RESUME" if self.stopped && self.is_copied_on() => {
                self.stopped = false;
                if let Some(stream) = &self.stream {
                    stream.set_stopped(false);
                }
                self.enter(Phase::Bulk, "memory is being copied".into());
            }
            // A round has ended: QEMU may stop its guest when it next looks.
            "MIGRATION_PASS" => self.tick(),
            "MIGRATION" => match event.data.get("status").and_then(|s| s.as_str()) {
                Some("active") if self.spec.settings.mode == Mode::PostCopy => {
                    self.switch_to_postcopy();
                }
                Some("completed") => self.handle(SourceEvent::SourceCompleted),
                Some("failed" | "cancelled") => {
                    let why = self.home.migration().and_then(|info| info.error_desc);
                    let why = why.unwrap_or_else(|| "no reason given".into());
                    self.failed(format!("the source QEMU ended its migration: {why}"));
                }
                _ => {}
            },
            _ => {}
        }
    }

    pub(super) fn tick(&mut self) {
        self.go_on_resuming();
        if *self.machine.state() == SourceState::Following {
            if let Some(stream) = self.stream.clone() {
                self.steer(&stream);
            }
            return;
        }
        if *self.machine.state() != SourceState::Copying {
            return;
        }
        if let Some(stream) = self.stream.clone() {
            let waits = self.stopped || stream.is_ending();
            if waits && let Some(limit) = self.stall(&stream) {
                let reason = format!(
                    "the target made no progress for {} s while the guest was stopped: {}",
                    limit.as_secs(),
                    stream.behind()
                );
                self.handle(SourceEvent::Failed(reason));
                return;
            }
            self.steer(&stream);
        }
    }

    /// The limit that a switch-over without progress is beyond.
    fn stall(&self, stream: &Stream) -> Option<Duration> {
        let limit = self.context.stall_limit;
        let load_limit = LOAD_LIMIT.max(limit);
        if stream.stalled_for() > limit {
            Some(limit)
        } else if stream
            .quiet_at_end()
            .is_some_and(|quiet| quiet > load_limit)
        {
            Some(load_limit)
        } else {
            None
        }
    }

    /// Whether the guest may run while its memory is copied.
    fn is_copied_on(&self) -> bool {
        let is_ending = self.stream.as_ref().is_some_and(|s| s.is_ending());
        *self.machine.state() == SourceState::Copying && !self.switched && !is_ending
    }

    /// Asks QEMU how far it is, and has it know what the path can do.
    fn steer(&mut self, stream: &Stream) {
        // While the guest is stopped QEMU may be unable to answer until we have read its stream.
        let following = *self.machine.state() == SourceState::Following;
        let waits = self.stopped || stream.is_ending();
        let info = if waits && !following {
            None
        } else {
            self.home.glance()
        };
        if let Some(info) = &info {
            let round = info.dirty_sync_count;
            if !self.switched {
                // After it comes what was left then: memory that was never sent, or was written.
                stream.set_round(round);
            }
            self.approach.observe(round, info.remaining, Instant::now());
            stream.set_near_end(self.approach.is_near());
            if round <= 1
                && let Some(frames) = self.session.as_ref().and_then(|s| s.frames.as_ref())
            {
                frames.refresh();
            }
            if !waits {
                self.tell_rate(stream);
                self.weigh(stream, info);
            }
        }
        if self.reported.elapsed() >= REPORT {
            self.reported = Instant::now();
            let progress = self.meter.sample(stream, info.as_ref());
            (self.events)(Happening::Progress { progress });
        }
    }

    fn tell_rate(&self, stream: &Stream) {
        let limit_ms = parameters(&self.spec).downtime_limit_ms;
        let (planned, logical) = stream.planning_rates(limit_ms);
        if let Some(guest) = self.home.guest()
            && let Err(error) = guest.set_wire_rate(planned, logical)
        {
            tracing::debug!(vm = self.spec.vm, %error, "QEMU does not take the wire's rate");
        }
    }
}
