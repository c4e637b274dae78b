//! One outgoing move: what the hand-over machine wants is done here, in one thread.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::Context;
use guest::{MigrationParameters, QmpEvent, SavedSettings};
use migrate::handover::{SourceAction, SourceEvent, SourceJournal, SourceMove, SourceState};
use serde::{Deserialize, Serialize};

use crate::api::mover::EventSink;
use crate::journal::{Journal, QemuProcess};
use crate::prepare::Preparations;
use crate::types::{Happening, MoveSpec, Phase};

use super::approach::Approach;
use super::control::Control;
use super::convergence::Convergence;
use super::home::{Home, NotBack, Quit};
use super::index_link::IndexLinks;
use super::progress::ProgressMeter;
use super::session::{Session, SessionContext, Sessions, spawn};
use super::stream::Stream;

mod prepare;
mod resume;
mod show;
mod steer;
mod switch;

use resume::Resume;

/// Pause before a release is repeated.
const RELEASE_PAUSE: Duration = Duration::from_millis(500);

/// What the mover's thread reacts to.
pub(crate) enum Input {
    /// The target QEMU has loaded everything.
    Loaded,
    /// The target QEMU went over to post-copy, and could run.
    Switched,
    /// An interrupted post-copy goes on.
    Resumed,
    /// The stream, the link or a QEMU failed.
    Failed(String),
    /// What a person should know; nothing changes.
    Note(String),
    /// Somebody wants the VM to stay.
    Cancel,
    /// The hand-over is confirmed.
    Confirmed,
    /// A person wants the VM to go over to post-copy.
    GoOver,
    /// The VM's own limit on the wire, bytes per second.
    Limit(Option<u64>),
    /// News of the VM's stream of this number.
    Of(u32, Box<Input>),
    /// An event of the source QEMU.
    Qmp(QmpEvent),
    /// The source QEMU's monitor is gone.
    QmpClosed,
}

/// What a move needs of its agent.
#[derive(Clone)]
pub(crate) struct MoveContext {
    pub(crate) sessions: Arc<Sessions>,
    pub(crate) indexes: Arc<IndexLinks>,
    pub(crate) preparations: Arc<Preparations>,
    pub(crate) session: SessionContext,
    pub(crate) journal: Journal,
    pub(crate) run_dir: PathBuf,
    pub(crate) window_log: u8,
    pub(crate) window_bytes: u64,
    pub(crate) stall_limit: Duration,
    /// How long an interrupted post-copy is resumed before a person is asked.
    pub(crate) recovery_limit: Duration,
}

/// The journal's entry of an outgoing move.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Entry {
    pub(crate) spec: MoveSpec,
    state: SourceJournal,
    /// Whether the guest ran when the move began.
    was_running: bool,
    /// The source QEMU's own migration settings, which the move changes.
    #[serde(default)]
    settings: Option<SavedSettings>,
    /// The source QEMU.
    #[serde(default)]
    process: Option<QemuProcess>,
}

/// A running mover, as the API holds it.
pub(crate) struct MoveRun {
    input: Sender<Input>,
}

impl MoveRun {
    /// Starts a move.
    pub(crate) fn start(
        context: MoveContext,
        spec: MoveSpec,
        events: EventSink,
    ) -> std::io::Result<Self> {
        Self::spawn(context, spec, events, None)
    }

    /// Goes on with a move that was interrupted.
    pub(crate) fn recover(
        context: MoveContext,
        entry: Entry,
        events: EventSink,
    ) -> std::io::Result<Self> {
        let spec = entry.spec.clone();
        Self::spawn(context, spec, events, Some(entry))
    }

    fn spawn(
        context: MoveContext,
        spec: MoveSpec,
        events: EventSink,
        entry: Option<Entry>,
    ) -> std::io::Result<Self> {
        let (input, inputs) = channel();
        let sender = input.clone();
        spawn("gw-move", move || {
            let mut run = Run::new(context, spec, events, (sender, inputs));
            run.carry_out(entry);
        })?;
        Ok(Self { input })
    }

    /// Tells the mover's thread something. False: it has ended.
    pub(crate) fn tell(&self, input: Input) -> bool {
        self.input.send(input).is_ok()
    }
}

/// State of the mover's thread.
struct Run {
    context: MoveContext,
    spec: MoveSpec,
    events: EventSink,
    sender: Sender<Input>,
    inputs: Receiver<Input>,
    machine: SourceMove,
    home: Home,
    session: Option<Arc<Session>>,
    stream: Option<Arc<Stream>>,
    control: Control,
    meter: ProgressMeter,
    started: Instant,
    phase: Phase,
    /// The guest was seen to stop for its switch-over.
    stopped: bool,
    approach: Approach,
    convergence: Convergence,
    reported: Instant,
    /// Its QEMU was told to go over to post-copy.
    switched: bool,
    /// Both QEMUs have a second channel in post-copy.
    preempts: bool,
    /// Number of the stream, whose news count; those of earlier ones do not.
    feed: u32,
    resume: Resume,
    /// The stream before this one.
    earlier: Option<Arc<Stream>>,
}

impl Run {
    fn new(
        context: MoveContext,
        spec: MoveSpec,
        events: EventSink,
        (sender, inputs): (Sender<Input>, Receiver<Input>),
    ) -> Self {
        let control = Control::new(&spec.target_bulk, "none", &context.session);
        let spec_vm = spec.vm.clone();
        let machine = SourceMove::with_patience(context.recovery_limit);
        let limit = spec.postcopy_after_s.map(Duration::from_secs);
        Self {
            context,
            spec,
            events,
            sender,
            inputs,
            machine,
            home: Home::new(&spec_vm),
            session: None,
            stream: None,
            control,
            meter: ProgressMeter::new(0),
            started: Instant::now(),
            phase: Phase::Queued,
            stopped: false,
            approach: Approach::default(),
            convergence: Convergence::new(limit),
            reported: Instant::now(),
            switched: false,
            preempts: false,
            feed: 0,
            resume: Resume::None,
            earlier: None,
        }
    }

    /// The whole life of the move.
    fn carry_out(&mut self, entry: Option<Entry>) {
        let first = match entry {
            Some(entry) => self.reattach(entry),
            None => {
                self.enter(
                    Phase::Preparing,
                    "the target's QEMU is being started".into(),
                );
                match self.prepare() {
                    Ok(()) => SourceEvent::TargetReady,
                    Err(error) => SourceEvent::Failed(format!("{error:#}")),
                }
            }
        };
        self.handle(first);
        while !self.phase.is_final() {
            match self.inputs.recv_timeout(self.approach.tick()) {
                Ok(input) => self.take(input),
                Err(RecvTimeoutError::Timeout) => self.tick(),
                // Cannot be: we hold a sender ourselves.
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        if let Some(stream) = &self.stream {
            stream.close();
            if let Some(session) = &self.session {
                session.remove(stream);
            }
        }
    }

    /// Says what a person should know.
    fn note(&self, message: String) {
        tracing::warn!(vm = self.spec.vm, message);
        (self.events)(Happening::Note { message });
    }

    /// After a restart of the agent.
    fn reattach(&mut self, entry: Entry) -> SourceEvent {
        self.home = Home::interrupted(&self.spec.vm, entry.was_running, entry.process);
        self.phase = match entry.state {
            SourceJournal::Begun => Phase::Preparing,
            SourceJournal::Completing => Phase::SwitchOver,
            SourceJournal::Releasing => Phase::Loaded,
            SourceJournal::Following => Phase::PostCopy,
        };
        if entry.state != SourceJournal::Begun {
            self.home.let_complete();
        }
        self.home.settings = entry.settings;
        if let Err(error) = self.home.attach(&self.spec.qmp, self.sender.clone()) {
            // Without a source QEMU a release can still be answered; bringing it back cannot.
            tracing::warn!(vm = self.spec.vm, "cannot reach the source QEMU: {error:#}");
        }
        SourceEvent::Restarted(entry.state)
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Loaded => {
                if let Some(stream) = &self.stream {
                    stream.set_stopped(false);
                }
                self.handle(SourceEvent::TargetLoaded);
            }
            Input::Switched => {
                if let Some(stream) = &self.stream {
                    stream.set_stopped(false);
                }
                self.handle(SourceEvent::TargetSwitched);
            }
            Input::Resumed => self.resumed(),
            Input::Of(feed, news) if feed == self.feed => self.take(*news),
            Input::Of(..) => {}
            Input::Failed(reason) => self.failed(reason),
            Input::Note(message) => self.note(message),
            Input::Cancel => self.handle(SourceEvent::Cancel),
            Input::Confirmed if *self.machine.state() == SourceState::Committed => {
                self.handle(SourceEvent::Confirmed)
            }
            Input::Confirmed => {}
            Input::GoOver => {
                self.convergence.order();
                self.tick();
            }
            Input::Limit(bytes_per_s) => {
                self.spec.max_bandwidth_bytes_per_s = bytes_per_s;
                if let Some(stream) = &self.stream {
                    stream.bucket.set_rate(bytes_per_s);
                }
            }
            Input::QmpClosed => self.failed("the source QEMU has ended".into()),
            Input::Qmp(event) => self.take_qmp(&event),
        }
    }

    /// Gives the machine an event, does what it wants, and shows where that leads.
    fn handle(&mut self, event: SourceEvent) {
        let mut events = std::collections::VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            tracing::debug!(vm = self.spec.vm, ?event, state = ?self.machine.state(), "source");
            for action in self.machine.handle(event) {
                tracing::debug!(vm = self.spec.vm, ?action, "source");
                let answer = self.act(action);
                let stop = matches!(answer, Some(SourceEvent::JournalFailed(_)));
                events.extend(answer);
                if stop {
                    break;
                }
            }
        }
        self.show();
    }

    fn act(&mut self, action: SourceAction) -> Option<SourceEvent> {
        match action {
            SourceAction::StartStream => match self.start_stream() {
                Ok(()) => None,
                Err(error) => Some(SourceEvent::Failed(format!("{error:#}"))),
            },
            SourceAction::CompleteSource => {
                self.context.session.hold.at("loaded", &self.spec.vm);
                self.home.let_complete();
                let mut message = Vec::new();
                qstream::encode_return(&qstream::ReturnMessage::Shut(0), &mut message);
                if let Some(stream) = &self.stream {
                    stream.set_told();
                    stream.write_return_path(&message);
                }
                None
            }
            SourceAction::Resume { pause } => {
                self.resume_after(pause);
                None
            }
            SourceAction::Journal(state) => {
                if state != SourceJournal::Completing {
                    self.context.session.hold.at("committed", &self.spec.vm);
                }
                self.write_journal(state)
                    .err()
                    .map(|error| SourceEvent::JournalFailed(format!("{error:#}")))
            }
            SourceAction::AwaitConfirmation => self.await_confirmation(),
            SourceAction::Release => {
                self.enter(Phase::Released, "the target was let go".into());
                Some(self.release())
            }
            SourceAction::ReleaseAgain => {
                std::thread::sleep(RELEASE_PAUSE);
                Some(self.release())
            }
            SourceAction::AbortTarget(reason) => {
                if let Err(error) = self.control.abort(&self.spec.id, &reason) {
                    tracing::info!(
                        vm = self.spec.vm,
                        "the target was not told: {}; it will be told again",
                        plain(&error)
                    );
                    self.control.abort_until_heard(&self.spec.id, &reason);
                }
                None
            }
            SourceAction::BringBack => {
                let stream = self.stream.clone();
                if self.switched
                    && let Some(stream) = &stream
                {
                    self.home.end_postcopy(stream);
                }
                let stopped = self.stopped || stream.as_ref().is_some_and(|s| s.is_ending());
                let close = || {
                    if let Some(stream) = stream {
                        stream.close();
                    }
                };
                let back = self.home.bring_back(&self.context.run_dir, stopped, close);
                Some(match back {
                    Ok(()) => SourceEvent::SourceRuns,
                    Err(NotBack::Gone { went_on }) => SourceEvent::SourceGone {
                        reason: "the source QEMU has ended".into(),
                        went_on,
                    },
                    Err(NotBack::Lost(error)) => SourceEvent::SourceLost(format!("{error:#}")),
                })
            }
            SourceAction::QuitSource => {
                self.context.session.hold.at("complete", &self.spec.vm);
                match self.home.quit(&self.spec.qmp, &self.sender) {
                    Quit::Gone => None,
                    Quit::Runs => Some(SourceEvent::SourceRuns),
                    Quit::Lost(why) => Some(SourceEvent::SourceLost(why)),
                }
            }
            SourceAction::ForgetJournal => {
                self.context.journal.forget(&self.spec.id);
                None
            }
        }
    }

    fn await_confirmation(&mut self) -> Option<SourceEvent> {
        if let Some(stream) = self.stream.clone() {
            let progress = self.meter.sample(&stream, None);
            (self.events)(Happening::Progress { progress });
        }
        self.enter(
            Phase::Loaded,
            "the target has loaded it; stopped at both ends".into(),
        );
        if !self.spec.confirm_handover {
            return Some(SourceEvent::Confirmed);
        }
        self.enter(
            Phase::Held,
            "stopped at both ends, loaded at the target; waits for `gangway continue`".into(),
        );
        None
    }

    fn release(&mut self) -> SourceEvent {
        let answer = self.control.release(&self.spec.id);
        self.context.session.hold.at("released", &self.spec.vm);
        match answer {
            Ok(state) => SourceEvent::Answer(state),
            Err(error) => SourceEvent::NoAnswer {
                reason: plain(&error),
                now: self.started.elapsed(),
            },
        }
    }

    fn write_journal(&self, state: SourceJournal) -> anyhow::Result<()> {
        let entry = Entry {
            spec: self.spec.clone(),
            state,
            was_running: self.home.was_running,
            settings: self.home.settings.clone(),
            process: self.home.process(),
        };
        self.context
            .journal
            .write(&self.spec.id, &entry)
            .context("writing the journal")
    }

    fn enter(&mut self, phase: Phase, message: String) {
        if self.phase == phase {
            return;
        }
        tracing::info!(vm = self.spec.vm, ?phase, message, "move");
        self.phase = phase;
        (self.events)(Happening::Phase { phase, message });
    }
}

fn parameters(spec: &MoveSpec) -> MigrationParameters {
    let default = MigrationParameters::default();
    MigrationParameters {
        downtime_limit_ms: spec.downtime_limit_ms.unwrap_or(default.downtime_limit_ms),
        postcopy: spec.settings.mode.may_go_first(),
        ..default
    }
}

fn plain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
