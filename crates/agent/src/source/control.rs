//! A move's control connection to the target agent.

use std::time::Duration;

use wire::{
    Channel, ControlReply, ControlRequest, Hello, MoveState, OpenMove, PROTOCOL_VERSION,
    WireCompression, WireError,
};

use crate::link::{Link, LinkError};

use super::session::SessionContext;

/// How long the target may take to start a QEMU: a large guest's memory is prepared then.
const OPEN_TIMEOUT: Duration = Duration::from_secs(60);

/// How long an answer to a release or an abort may take: `cont` opens disks, a kill frees
/// memory.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);

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

    /// Has the target QEMU started; returns its process id.
    pub(crate) fn open(&mut self, request: OpenMove) -> Result<u32, LinkError> {
        match self.ask(&ControlRequest::Open(request), OPEN_TIMEOUT)? {
            ControlReply::Ready { pid } => Ok(pid),
            ControlReply::Refused { reason } => Err(LinkError::Refused(reason)),
            other => Err(unexpected(&other)),
        }
    }

    /// Lets the VM go.
    pub(crate) fn release(&mut self, id: &str) -> Result<MoveState, LinkError> {
        self.state(&ControlRequest::Release { id: id.to_owned() })
    }

    /// Takes the move back.
    pub(crate) fn abort(&mut self, id: &str, reason: &str) -> Result<MoveState, LinkError> {
        self.state(&ControlRequest::Abort {
            id: id.to_owned(),
            reason: reason.to_owned(),
        })
    }

    fn state(&mut self, request: &ControlRequest) -> Result<MoveState, LinkError> {
        match self.ask(request, ANSWER_TIMEOUT)? {
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
