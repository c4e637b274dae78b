//! A move's control connection to the target agent.

use std::time::{Duration, Instant};

use wire::{
    Channel, ControlReply, ControlRequest, Hello, MoveState, OpenMove, PROTOCOL_VERSION,
    WireCompression, WireError,
};

use crate::link::{Link, LinkError};

use super::session::{SessionContext, spawn};

/// How long the target may take to start a QEMU: a large guest's memory is prepared then, for which the target gives it
/// 60 s, and some more to what comes after.
const OPEN_TIMEOUT: Duration = Duration::from_secs(90);

/// How long an answer to a release may take: `cont` opens disks.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);

/// How long a target QEMU may take to notice the loss of its stream and to wait for another; its agent
/// may have to find its monitor first.
const RESUME_TIMEOUT: Duration = Duration::from_secs(40);

/// How long the end of a move waits for the target to hear that it is off, which it may also be
/// told later. Often the target is unreachable then: that is why the move is off.
const ABORT_TIMEOUT: Duration = Duration::from_secs(3);

/// How long a target that could not be told that it will not be released is told again: a loaded
/// VM whose source cannot be heard gives up by itself after that time.
const ABORT_PATIENCE: Duration = Duration::from_secs(120);

/// Pause between two tries.
const ABORT_PAUSE: Duration = Duration::from_secs(2);

/// Talks to the target agent about one move. Connects anew when the last connection failed.
pub(crate) struct Control {
    address: String,
    session: String,
    context: SessionContext,
    link: Option<Link>,
}

impl Control {
    pub(crate) fn new(address: &str, session: &str, context: &SessionContext) -> Self {
        Self {
            address: address.to_owned(),
            session: session.to_owned(),
            context: context.clone(),
            link: None,
        }
    }

    /// Has the target QEMU started; returns what a person should know of it, and whether it has a second channel
    /// for post-copy, as was asked for. A target of a version that does not know of that closes the connection;
    /// one that has begun something refuses the second request.
    pub(crate) fn open(
        &mut self,
        mut request: OpenMove,
    ) -> Result<(Option<String>, bool), LinkError> {
        let asks = request.preempt;
        let mut reply = self.ask(&ControlRequest::Open(request.clone()), OPEN_TIMEOUT);
        if asks && matches!(reply, Err(LinkError::Closed)) {
            request.preempt = false;
            reply = self.ask(&ControlRequest::Open(request), OPEN_TIMEOUT);
        }
        match reply? {
            ControlReply::Ready { note, preempt, .. } => Ok((note, asks && preempt)),
            ControlReply::Refused { reason } => Err(LinkError::Refused(reason)),
            other => Err(unexpected(&other)),
        }
    }

    /// Lets the VM go.
    pub(crate) fn release(&mut self, id: &str) -> Result<MoveState, LinkError> {
        let request = ControlRequest::Release { id: id.to_owned() };
        self.state(&request, ANSWER_TIMEOUT)
    }

    /// Has the target QEMU of an interrupted post-copy wait for the rest of its stream, as VM `vm` of the
    /// session; returns what the move is in, if that is not what it needs.
    pub(crate) fn resume(&mut self, id: &str, vm: u16) -> Result<Option<MoveState>, LinkError> {
        let id = id.to_owned();
        match self.ask(&ControlRequest::Resume { id, vm }, RESUME_TIMEOUT)? {
            ControlReply::Ready { .. } => Ok(None),
            ControlReply::State(state) => Ok(Some(state)),
            ControlReply::Refused { reason } => Err(LinkError::Refused(reason)),
            other => Err(unexpected(&other)),
        }
    }

    /// Asks how the move stands there.
    pub(crate) fn query(&mut self, id: &str) -> Result<MoveState, LinkError> {
        let request = ControlRequest::Query { id: id.to_owned() };
        self.state(&request, ANSWER_TIMEOUT)
    }

    /// Takes the move back.
    pub(crate) fn abort(&mut self, id: &str, reason: &str) -> Result<MoveState, LinkError> {
        let request = ControlRequest::Abort {
            id: id.to_owned(),
            reason: reason.to_owned(),
        };
        self.state(&request, ABORT_TIMEOUT)
    }

    /// Takes the move back in the background, until the target has heard it. Otherwise a target
    /// agent that was away for a moment would hold the VM's name, and its memory, for minutes.
    pub(crate) fn abort_until_heard(&self, id: &str, reason: &str) {
        let mut control = Self::new(&self.address, "none", &self.context);
        let (id, reason) = (id.to_owned(), reason.to_owned());
        let started = spawn("gw-abort", move || {
            let begin = Instant::now();
            while begin.elapsed() < ABORT_PATIENCE {
                std::thread::sleep(ABORT_PAUSE);
                if let Ok(state) = control.abort(&id, &reason) {
                    tracing::info!(id, ?state, "the target knows that the move is off");
                    return;
                }
            }
            tracing::info!(id, "the target was not told that the move is off");
        });
        if let Err(error) = started {
            tracing::warn!(%error, "no thread to tell the target that a move is off");
        }
    }

    fn state(
        &mut self,
        request: &ControlRequest,
        timeout: Duration,
    ) -> Result<MoveState, LinkError> {
        match self.ask(request, timeout)? {
            ControlReply::State(state) => Ok(state),
            other => Err(unexpected(&other)),
        }
    }

    fn ask(
        &mut self,
        request: &ControlRequest,
        timeout: Duration,
    ) -> Result<ControlReply, LinkError> {
        let mut link = match self.link.take() {
            Some(link) => link,
            None => self.connect()?,
        };
        link.set_timeout(timeout);
        link.send(request)?;
        let reply = link.receive()?;
        // A connection that failed is dropped above: answers must not get out of step.
        self.link = Some(link);
        Ok(reply)
    }

    fn connect(&self) -> Result<Link, LinkError> {
        let mut link = Link::connect(
            &self.address,
            &self.context.security,
            self.context.peer_timeout,
        )?;
        link.send_hello(&Hello {
            version: PROTOCOL_VERSION,
            session: self.session.clone(),
            channel: Channel::Control,
            source: self.context.host.clone(),
            compression: WireCompression::None,
            domain_key: None,
            rack: None,
        })?;
        match link.receive()? {
            ControlReply::Welcome => Ok(link),
            ControlReply::Refused { reason } => Err(LinkError::Refused(reason)),
            other => Err(unexpected(&other)),
        }
    }
}

fn unexpected(reply: &ControlReply) -> LinkError {
    WireError::Control(format!("unexpected answer {reply:?}")).into()
}
