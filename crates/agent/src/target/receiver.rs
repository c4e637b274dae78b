//! The forward connection: frames come in, are unpacked, and go to their VM's sink.

use std::sync::Arc;

use migrate::unpack::{UnpackError, literal_runs};
use wire::{FrameHeader, FrameKind, HEADER_LEN, WireCompression, WireError};
use zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer};

use crate::link::{Buffer, Link, LinkError, Pool};

use super::session::{TargetSession, lock};
use super::sink::SinkFrame;

/// Size of the buffers that go round: a source's read buffer with its operations. Longer
/// frames, which are rare, get a buffer of their own.
const BODY: usize = 320 << 10;

/// Why a session's stream of frames ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReceiveError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error("a frame is malformed: {0}")]
    Frame(#[from] UnpackError),
    #[error("a frame does not unpack: {0}")]
    Compression(String),
}

/// Owns the forward connection until it ends.
pub(crate) fn run(
    mut link: Link,
    session: &TargetSession,
    compression: WireCompression,
) -> Result<(), ReceiveError> {
    let pool = Pool::new(BODY);
    let mut packed = Vec::new();
    let mut unpacker = match compression {
        WireCompression::None => None,
        WireCompression::Zstd { window_log } => Some(decompressor(window_log)?),
    };
    while !session.is_over() {
        let mut header = [0; HEADER_LEN];
        link.read_exact(&mut header)?;
        let header = FrameHeader::parse(header).map_err(LinkError::from)?;
        let mut body = pool.take(header.raw_len());
        if header.is_compressed() {
            packed.resize(header.body_len(), 0);
            link.read_exact(&mut packed)?;
            let context = unpacker
                .as_mut()
                .ok_or_else(|| ReceiveError::Compression("none was agreed".into()))?;
            decompress(context, &packed, &mut body)?;
        } else {
            link.read_exact(&mut body)?;
        }
        match header.kind() {
            FrameKind::Heartbeat => {}
            FrameKind::Pages => deliver(session, header.vm(), Arc::new(body), false)?,
            FrameKind::Repair => deliver(session, header.vm(), Arc::new(body), true)?,
            FrameKind::Close => session.remove_sink(header.vm()),
            other @ (FrameKind::Back | FrameKind::BackHeartbeat) => {
                return Err(LinkError::from(WireError::UnexpectedKind(other as u8)).into());
            }
        }
    }
    Ok(())
}

/// Enters new contents, whoever they belong to, and hands the frame on. Never waits: one VM's
/// QEMU must not hold up the others'.
fn deliver(
    session: &TargetSession,
    vm: u16,
    body: Arc<Buffer>,
    is_repair: bool,
) -> Result<(), ReceiveError> {
    if !is_repair {
        let runs = literal_runs(&body)?;
        lock(&session.recent).push(&runs, &body, body.held());
    }
    if let Some(sink) = session.sink(vm) {
        sink.push(SinkFrame { body, is_repair });
    }
    Ok(())
}

fn decompressor(window_log: u8) -> Result<DCtx<'static>, ReceiveError> {
    let mut context = DCtx::create();
    // Also what bounds the memory that a hostile source can make us take.
    let limit = u32::from(window_log.clamp(10, 27));
    context
        .set_parameter(DParameter::WindowLogMax(limit))
        .map_err(failed)?;
    Ok(context)
}

fn failed(code: usize) -> ReceiveError {
    ReceiveError::Compression(zstd_safe::get_error_name(code).into())
}

/// Unpacks a flushed piece of the stream, which must fill `out`.
fn decompress(
    context: &mut DCtx<'static>,
    packed: &[u8],
    out: &mut [u8],
) -> Result<(), ReceiveError> {
    let expected = out.len();
    let mut input = InBuffer::around(packed);
    let mut output = OutBuffer::around(out);
    loop {
        let before = (input.pos(), output.pos());
        context
            .decompress_stream(&mut output, &mut input)
            .map_err(failed)?;
        let stuck = before == (input.pos(), output.pos());
        if output.pos() == expected && input.pos() == packed.len() {
            return Ok(());
        }
        if stuck {
            let text = format!(
                "{} of {} bytes in, {} of {expected} out",
                input.pos(),
                packed.len(),
                output.pos()
            );
            return Err(ReceiveError::Compression(text));
        }
    }
}
