//! The second channel of a source QEMU in post-copy, on which it sends the pages that it was asked for.
//!
//! They are those for which a request has passed here, and [`super::urgent`] has sent them from memory when it
//! did. So most of what comes is left out. What could not be read in memory comes from QEMU alone, here: it
//! goes ahead of everything, too.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use migrate::pack::{Packed, urgent_front};
use page::{BlockIndex, FrameSharing, PAGE_SIZE, PageNo};
use qstream::{PreemptDecoder, PreemptItem, PreemptStep, StreamError};
use wire::FrameKind;

use crate::link::Pool;

use super::listening::Listening;
use super::outbox::{OutFrame, Outbox};
use super::reader::{ReadError, Received, receive};
use super::stream::Stream;

/// Bytes that are read at once: the pages of a few requests.
const PIECE: usize = 32 << 10;

/// Waits for QEMU to open the channel, and reads it to its end.
pub(super) fn run(
    listening: Listening,
    stream: &Arc<Stream>,
    outbox: &Outbox,
) -> Result<(), ReadError> {
    match accept(listening, stream)? {
        Some(socket) => read(&socket, stream, outbox),
        None => Ok(()),
    }
}

/// Waits for QEMU to open the channel; in vain if the stream is closed first.
fn accept(listening: Listening, stream: &Stream) -> Result<Option<UnixStream>, ReadError> {
    let Some(socket) = listening.accept_while(|| !stream.is_closed())? else {
        return Ok(None);
    };
    stream.attach_second(socket.try_clone()?);
    Ok(Some(socket))
}

fn read(socket: &UnixStream, stream: &Arc<Stream>, outbox: &Outbox) -> Result<(), ReadError> {
    let pool = Pool::new(PAGE_SIZE);
    let (mut buffer, mut filled) = (vec![0; PIECE], 0);
    let mut decoder = None;
    loop {
        match receive(socket, &mut buffer[filled..], false)? {
            Received::Bytes(n) => filled += n,
            Received::Nothing => continue,
            // That it pauses, or is done, shows on its first channel.
            Received::End => return Ok(()),
        }
        let decoder = match &mut decoder {
            Some(decoder) => decoder,
            // Nothing can have been asked for before the target had the blocks.
            none => none.insert(PreemptDecoder::new(
                stream.blocks().ok_or(StreamError::PostcopyOutOfPlace)?,
            )),
        };
        let mut at = 0;
        while let PreemptStep::Item { item, consumed } = decoder.decode(&buffer[at..filled])? {
            at += consumed;
            match item {
                PreemptItem::Page { block, page, bytes } => {
                    pass((block, page), bytes, stream, (outbox, &pool));
                }
                PreemptItem::Zero { block, page } => {
                    pass((block, page), &[0; PAGE_SIZE], stream, (outbox, &pool));
                }
                PreemptItem::End => return Ok(()),
            }
        }
        buffer.copy_within(at..filled, 0);
        filled -= at;
    }
}

/// Sends a page ahead of everything else, unless it was sent when it was asked for.
fn pass(
    (block, page): (BlockIndex, PageNo),
    bytes: &[u8; PAGE_SIZE],
    stream: &Arc<Stream>,
    (outbox, pool): (&Outbox, &Arc<Pool>),
) {
    if stream.came_aside(block, page) || stream.is_drained() {
        return;
    }
    let mut buffer = pool.take(PAGE_SIZE);
    buffer[..PAGE_SIZE].copy_from_slice(bytes);
    let pages = std::iter::once((page, FrameSharing::No));
    let packed = Packed {
        front: urgent_front(stream.flow().0, block, pages),
        pages: vec![0],
        ..Packed::default()
    };
    outbox.push_urgent(OutFrame {
        kind: FrameKind::Urgent,
        stream: Arc::clone(stream),
        packed,
        buffer: Some(Arc::new(buffer)),
    });
}

/// Waits for a QEMU that goes on with a post-copy to open the channel, and passes on what it writes as it is.
pub(super) fn relay(
    listening: Listening,
    stream: &Arc<Stream>,
    outbox: &Outbox,
) -> Result<(), ReadError> {
    let Some(socket) = accept(listening, stream)? else {
        return Ok(());
    };
    let mut piece = vec![0; PIECE];
    while let Received::Bytes(n) = receive(&socket, &mut piece, false)? {
        let front = piece[..n].to_vec();
        outbox.push_urgent(OutFrame {
            kind: FrameKind::RelayPreempt,
            stream: Arc::clone(stream),
            packed: Packed {
                front,
                ..Packed::default()
            },
            buffer: None,
        });
    }
    Ok(())
}
