//! The forward connection and its lanes: frames come in, are unpacked in their order, and go to their
//! VM's sink.

use std::sync::Arc;

use migrate::unpack::{UnpackError, literal_runs, remotes};
use wire::{FrameHeader, FrameKind, WireError};

use crate::link::{Buffer, Link, LinkError, unpack};

use super::session::{TargetSession, lock};
use super::sink::SinkFrame;
use super::turns::Waited;

/// Why a session's stream of frames ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReceiveError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error("a frame is malformed: {0}")]
    Frame(#[from] UnpackError),
    #[error("frame {0} of the session came twice")]
    Twice(u32),
}

/// Owns the forward connection, or a lane, until it ends.
pub(crate) fn run(mut link: Link, session: &TargetSession) -> Result<(), ReceiveError> {
    let pool = &session.bodies;
    let mut packed = Vec::new();
    while !session.is_over() {
        let (header, plain) = link.receive_packed(pool, &mut packed)?;
        let order = header.order();
        let mut turn = match session.turns.wait(order, || session.is_over()) {
            Waited::Due(turn) => turn,
            Waited::Passed => return Err(ReceiveError::Twice(order)),
            Waited::Over => return Ok(()),
        };
        let body = unpack(&header, plain, pool, turn.unpacker.as_mut(), &packed)?;
        take(session, &header, body)?;
        session.turns.pass(order, turn);
    }
    Ok(())
}

/// Hands a frame on. Never waits: one VM's QEMU must not hold up the others'.
fn take(session: &TargetSession, header: &FrameHeader, body: Buffer) -> Result<(), ReceiveError> {
    let vm = header.vm();
    match header.kind() {
        FrameKind::Heartbeat => {}
        FrameKind::Pages => deliver(session, vm, Arc::new(body), false)?,
        FrameKind::Repair => deliver(session, vm, Arc::new(body), true)?,
        // Nothing of it is entered anywhere: it overtakes what is in the store.
        FrameKind::Urgent => {
            if let Some(sink) = session.sink(vm) {
                sink.push_urgent(SinkFrame::Urgent(Arc::new(body)));
            }
        }
        FrameKind::Hurry => {
            if let Some(sink) = session.sink(vm) {
                sink.push(SinkFrame::Hurry);
            }
        }
        FrameKind::Relay => {
            if let Some(sink) = session.sink(vm) {
                sink.push(SinkFrame::Relay(Arc::new(body)));
            }
        }
        FrameKind::RelayPreempt => {
            if let Some(sink) = session.sink(vm) {
                sink.push_urgent(SinkFrame::Relay(Arc::new(body)));
            }
        }
        FrameKind::Close => session.remove_sink(vm),
        other => return Err(LinkError::from(WireError::UnexpectedKind(other as u8)).into()),
    }
    Ok(())
}

/// Enters new contents, whoever they belong to, and hands the frame on.
fn deliver(
    session: &TargetSession,
    vm: u16,
    body: Arc<Buffer>,
    is_repair: bool,
) -> Result<(), ReceiveError> {
    let sink = session.sink(vm);
    if !is_repair {
        let runs = literal_runs(&body)?;
        let local = runs.iter().filter(|run| run.first.is_local());
        let local = local.map(|run| (run.first, run.count, run.at));
        lock(&session.recent).push(local, &body, body.held());
        if let Some(rack) = &session.rack {
            rack.brought(&runs, &body);
            // Nobody waits for what is named for a VM that is not here.
            if sink.is_some() {
                rack.named(&remotes(&body)?);
            }
        }
    }
    if let Some(sink) = sink {
        sink.push(SinkFrame::Frame { body, is_repair });
    }
    Ok(())
}
