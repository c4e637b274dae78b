//! A post-copy that was interrupted goes on, over a session of its own.
//!
//! Both QEMUs pause when their streams close, and keep what they have. The target's waits for the source's
//! again, they agree on what is missing, and the rest follows. A try changes nothing that the next one
//! would miss.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use migrate::handover::{SourceEvent, SourceState};
use wire::MoveState;

use super::super::home::{Paused, guest_memory};
use super::super::listening::NAMED;
use super::super::preempt;
use super::super::relay;
use super::super::right_of_way::Place;
use super::super::session::{Session, SessionKey, describe, spawn};
use super::super::stream::Stream;
use super::{Control, Input, Run, plain};

/// How long two QEMUs may take to agree on what is missing: a bitmap of 32 MiB for each TiB crosses.
const AGREEMENT: Duration = Duration::from_secs(60);

/// Where a recovery stands.
#[derive(Clone, Copy, Debug, Default)]
pub(super) enum Resume {
    /// There is none.
    #[default]
    None,
    /// The next try is then.
    At(Instant),
    /// Both QEMUs are connected; by then they have agreed, or never will.
    Agreeing(Instant),
}

impl Run {
    /// Closes what is left of the stream, so that both QEMUs pause, and has it resumed later.
    pub(super) fn resume_after(&mut self, pause: Duration) {
        self.leave_stream();
        self.resume = Resume::At(Instant::now() + pause);
    }

    /// Does what is due.
    pub(super) fn go_on_resuming(&mut self) {
        let now = Instant::now();
        match self.resume {
            Resume::At(at) if now >= at => {
                self.resume = Resume::None;
                match self.try_to_resume() {
                    Ok(None) => self.resume = Resume::Agreeing(Instant::now() + AGREEMENT),
                    Ok(Some(event)) => self.handle(event),
                    Err(error) => self.not_resumed(format!("{error:#}")),
                }
            }
            Resume::Agreeing(until) if now >= until => {
                self.not_resumed("its QEMUs do not agree on what is missing".into());
            }
            _ => {}
        }
    }

    /// Something failed; in a recovery that is no news, but for the try under way.
    pub(super) fn failed(&mut self, reason: String) {
        if !matches!(self.machine.state(), SourceState::Recovering { .. }) {
            self.handle(SourceEvent::Failed(reason));
        } else if matches!(self.resume, Resume::Agreeing(_)) {
            self.not_resumed(reason);
        }
    }

    /// Memory follows again.
    pub(super) fn resumed(&mut self) {
        self.resume = Resume::None;
        self.handle(SourceEvent::Resumed);
    }

    fn not_resumed(&mut self, reason: String) {
        tracing::info!(vm = self.spec.vm, reason, "not resumed yet");
        self.resume = Resume::None;
        let now = self.started.elapsed();
        self.handle(SourceEvent::NotResumed { reason, now });
    }

    /// Lets go of the stream: what becomes of it is no news any more.
    fn leave_stream(&mut self) {
        self.feed += 1;
        let Some(stream) = self.stream.take() else {
            return;
        };
        stream.close();
        if let Some(session) = self.session.take() {
            session.remove(&stream);
        }
        self.earlier = Some(stream);
    }

    /// Connects both QEMUs anew; an event if there is nothing to go on with.
    fn try_to_resume(&mut self) -> anyhow::Result<Option<SourceEvent>> {
        match self.home.paused(&self.spec.qmp, &self.sender) {
            Ok(Paused::Yes) => {}
            Ok(Paused::Complete) => return Ok(Some(SourceEvent::SourceCompleted)),
            Ok(Paused::Gone) => {
                let gone = || SourceEvent::SourceLost("its process has ended".into());
                return Ok(Some(self.target_has_more()?.unwrap_or_else(gone)));
            }
            // Perhaps it was ended when the target had everything, by an agent that then died.
            Err(error) => return self.target_has_more()?.map(Some).ok_or(error),
        }
        let guest = self.home.guest().cloned();
        let guest = guest.ok_or_else(|| anyhow!("no QEMU"))?;
        let key = SessionKey {
            group: self.spec.group.clone(),
            target_bulk: self.spec.target_bulk.clone(),
            domain_key: self.spec.domain_key.clone(),
            window_log: None,
            index: None,
            is_sharing: false,
        };
        let session = Session::connect(&key, None, &self.context.session);
        let session = session.map_err(|error| anyhow!(describe(&error)))?;
        session.expect_urgent();
        let stream = Stream::new(
            session.number(),
            self.spec.vm.clone(),
            guest_memory(&guest).context("finding the guest's memory")?,
            self.context.window_bytes,
            Place::new(Arc::clone(&session.right_of_way)),
            (self.sender.clone(), self.feed),
        );
        if let Some(earlier) = &self.earlier {
            stream.count_from(earlier);
        }
        let stream = Arc::new(stream);
        stream.set_near_end(true);
        stream.bucket.set_rate(self.spec.max_bandwidth_bytes_per_s);
        session.add(&stream);
        self.control = Control::new(&self.spec.target_bulk, &session.id, &self.context.session);
        let answer = self.control.resume(&self.spec.id, stream.vm);
        let answer =
            answer.map_err(|error| anyhow!("the target cannot go on: {}", plain(&error)))?;
        if let Some(state) = answer {
            return Ok(Some(SourceEvent::Answer(state)));
        }
        let name = format!("{NAMED}{}-{}.sock", stream.vm, &session.id[..8]);
        let preempts = self.home.preempts()?;
        let (socket, listening) = self.home.resume(&self.context.run_dir.join(name))?;
        stream.attach(socket.try_clone()?);
        if preempts {
            let (reads, outbox) = (Arc::clone(&stream), Arc::clone(&session.outbox));
            spawn("gw-relay-2", move || {
                if let Err(error) = preempt::relay(listening, &reads, &outbox) {
                    reads.tell(Input::Failed(error.to_string()));
                }
            })?;
        }
        let (reads, outbox) = (Arc::clone(&stream), Arc::clone(&session.outbox));
        self.session = Some(session);
        self.stream = Some(stream);
        spawn("gw-relay", move || {
            if let Err(error) = relay::run(&socket, &reads, &outbox) {
                reads.tell(Input::Failed(error.to_string()));
            }
        })?;
        Ok(None)
    }

    /// What the target says, unless that is that it needs the memory that is here.
    fn target_has_more(&mut self) -> anyhow::Result<Option<SourceEvent>> {
        let mut control = Control::new(&self.spec.target_bulk, "none", &self.context.session);
        let state = control.query(&self.spec.id);
        let state = state.map_err(|error| anyhow!("asking the target: {}", plain(&error)))?;
        let needs_us = matches!(
            state,
            MoveState::Following | MoveState::Loaded | MoveState::Loading
        );
        Ok((!needs_us).then_some(SourceEvent::Answer(state)))
    }
}
