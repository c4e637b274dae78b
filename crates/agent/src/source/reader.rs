//! Reads one source QEMU's stream into the outbox.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use crossbeam_channel::{Sender, bounded};
use migrate::pack::{Milestones, Packer, Scan};
use page::HostNo;
use qstream::{MAX_ITEM, StreamError};
use rustix::net::RecvFlags;

use crate::link::{Buffer, Hold, Pool};

use crate::prepare::{Need, Prepared};

use super::index_link::{Claim, IndexLink};
use super::outbox::Outbox;
use super::session::spawn;
use super::stream::Stream;

/// Bytes of QEMU's stream in one frame: 63 pages or 29 thousand zero records. What a unix
/// socket holds is about as much, so a frame is one system call or two.
pub(crate) const BUFFER: usize = 256 << 10;

/// Bytes of a frame on the wire after a switch to post-copy: 0.3 ms at 1 Gbit/s, which is what
/// an urgent page may wait for the frame in front of it.
const SHORT_FRAME: usize = 32 << 10;

/// Most bytes of QEMU's stream in such a frame, however well it compresses: 23 pages. Each frame begins a block of
/// the compressed stream anew and is acknowledged; with 8 pages that was a sixth of all bytes of 24 VMs.
const SHORT_STREAM: usize = 96 << 10;

/// A frame after a switch ends with so many steps of the stream: if there are many, most are zero pages, which
/// the target QEMU places one by one.
const SHORT_STEPS: usize = 1024;

/// Bytes read at once after a switch: 1800 zero pages.
const SHORT_READ: usize = 16 << 10;

/// Why a stream ended before its time.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    #[error("reading from the source QEMU failed")]
    Io(#[from] io::Error),
    #[error("the stream cannot be carried: {0}")]
    Stream(#[from] StreamError),
    #[error("the source QEMU closed its stream before its end")]
    Early,
}

/// Where scans go: to the outbox at once, or by way of the index.
pub(crate) struct Way {
    pub(crate) outbox: Arc<Outbox>,
    pub(crate) rack: Option<RackWay>,
    /// What preparation found.
    pub(crate) prepared: Option<Arc<Prepared>>,
}

/// A session's place in its group.
#[derive(Clone)]
pub(crate) struct RackWay {
    pub(crate) index: Arc<IndexLink>,
    /// Number of the session's target host.
    pub(crate) target: HostNo,
}

/// A scan whose unknown contents the index was asked for.
struct Asked {
    scan: Scan,
    buffer: Arc<Buffer>,
    claim: Option<Claim>,
}

/// Scans that wait for the index, which the window does not see: 512 KiB of QEMU's stream. At
/// 10 Gbit/s that is four times a round trip in the rack.
const ASKED: usize = 2;

/// Reads until QEMU closes or the stream is closed from our side.
pub(crate) fn run(
    socket: &UnixStream,
    stream: &Arc<Stream>,
    way: &Way,
    mut packer: Packer,
    hold: &Hold,
) -> Result<(), ReadError> {
    let asked = match &way.rack {
        Some(_) => Some(start_resolver(stream, way)?),
        None => None,
    };
    let pool = Pool::new(BUFFER);
    let mut buffer = pool.take(BUFFER);
    let (mut filled, mut scanned) = (0, 0);
    let mut blocks_known = false;
    let mut stopped = false;
    loop {
        // What was read goes before the reader rests.
        let is_last = packer.has_pieces() && stream.is_held();
        if !is_last && !stream.wait_open() {
            return Ok(());
        }
        if stream.is_drained() {
            return drain(socket);
        }
        // QEMU may have written all that it will before it hears of a switch.
        let rests = is_last || packer.awaits_switch(&buffer[..filled], scanned);
        let received = match &mut buffer[filled..] {
            // Full of what stood behind a switch.
            [] => Received::Nothing,
            _ if rests => Received::Nothing,
            room => {
                let len = match packer.milestones().switched {
                    true => room.len().min(SHORT_READ),
                    false => room.len(),
                };
                receive(socket, &mut room[..len], packer.has_pieces())?
            }
        };
        let n = match received {
            Received::Nothing => 0,
            Received::End if packer.milestones().tail_begun || stream.is_closed() => return Ok(()),
            Received::End => return Err(ReadError::Early),
            Received::Bytes(n) => n,
        };
        filled += n;
        if let Some(shared) = stream.take_shared() {
            packer.set_shared(shared);
        }
        let (ahead, aside) = stream.take_ahead();
        packer.sent_ahead(ahead);
        packer.came_otherwise(aside);
        scanned = packer.scan(&buffer[..filled], scanned)?;
        let switches = packer.awaits_switch(&buffer[..filled], scanned);
        if !blocks_known {
            blocks_known = learn_blocks(&packer, stream);
        }
        if packer.milestones().end_begun && !stopped {
            stopped = true;
            stream.set_ending();
            hold.at("switch-over", &stream.name);
        }
        let many = packer.milestones().switched && packer.pieces() >= SHORT_STEPS;
        let full = many || buffer.len() - filled < page::PAGE_SIZE * 2;
        if packer.has_pieces() && (full || switches || n == 0) {
            // What is left of a record moves on to the next buffer. What is urgent overtakes frames,
            // and waits for the one under way.
            let left = filled - scanned;
            let size = match packer.milestones().switched {
                true => short_len(way.outbox.ratio_permille()).max(left + 2 * page::PAGE_SIZE),
                false => BUFFER,
            };
            let mut next = pool.take(size);
            next[..left].copy_from_slice(&buffer[scanned..filled]);
            let done = Arc::new(std::mem::replace(&mut buffer, next));
            let scan = packer.take();
            match (&asked, &way.rack) {
                (Some(asked), Some(rack)) => {
                    let claim = ask(stream, way, rack, (&scan, packer.milestones()));
                    let buffer = done;
                    stream.unresolved();
                    // A resolver that is gone was told that the stream is over.
                    let _ = asked.send(Asked {
                        scan,
                        buffer,
                        claim,
                    });
                }
                _ => way.outbox.submit(stream, scan, done, &[]),
            }
            (filled, scanned) = (left, 0);
            pace(stream);
        } else if switches {
            hold.at("switch-over", &stream.name);
            if !complete(stream, way) {
                return Ok(());
            }
            packer.pass_switch();
            stream.pass_switch();
            scanned = packer.scan(&buffer[..filled], scanned)?;
        } else if full && scanned > 0 {
            // Only empty sections so far: what they took is free again.
            buffer.copy_within(scanned..filled, 0);
            (filled, scanned) = (filled - scanned, 0);
        } else if full {
            // One item fills the buffer: a block list of many blocks.
            let mut next = pool.take(MAX_ITEM);
            next[..filled].copy_from_slice(&buffer[..filled]);
            buffer = next;
        }
    }
}

/// Bytes of QEMU's stream that take no more than a short frame on the wire, by what compression lately achieved.
fn short_len(ratio_permille: u64) -> usize {
    let per_byte = usize::try_from(ratio_permille.clamp(1, 1000)).unwrap_or(1000);
    (SHORT_FRAME * 1000 / per_byte).min(SHORT_STREAM)
}

/// Waits until all that was read is complete at the target, for a guest that is stopped. False: the
/// stream is closed.
fn complete(stream: &Arc<Stream>, way: &Way) -> bool {
    if way.rack.is_some() && stream.wait_resolved() && !stream.is_complete() {
        way.outbox.hurry(stream);
    }
    stream.wait_complete()
}

/// After a failure: QEMU may have to be brought to the end of a migration in post-copy.
pub(crate) fn drain_if_asked(socket: &UnixStream, stream: &Stream) {
    if stream.wait_drained()
        && let Err(error) = drain(socket)
    {
        tracing::debug!(vm = stream.name, %error, "the source QEMU's stream ends");
    }
}

/// Reads what QEMU still writes, to its end, and forgets it.
fn drain(socket: &UnixStream) -> Result<(), ReadError> {
    let mut nowhere = vec![0; BUFFER];
    loop {
        match receive(socket, &mut nowhere, false)? {
            Received::Bytes(_) | Received::Nothing => {}
            Received::End => return Ok(()),
        }
    }
}

/// Asks the index for contents that the target was not told of. Not for those that nobody else
/// needs, as preparation has found. Not once memory was sent, when
/// contents are those of written pages, which other VMs hardly have; and not for a stopped guest,
/// which would wait: before a switch to post-copy, and at the end.
fn ask(
    stream: &Stream,
    way: &Way,
    rack: &RackWay,
    (scan, milestones): (&Scan, Milestones),
) -> Option<Claim> {
    if stream.is_late_round() || stream.is_switching() || milestones.end_begun {
        return None;
    }
    let mut unknown = way.outbox.unknown(scan);
    if let Some(prepared) = &way.prepared {
        unknown.retain(|id| !matches!(prepared.lookup(*id), Some(Need::One(_))));
    }
    (!unknown.is_empty()).then(|| rack.index.claim(rack.target, unknown))
}

/// Submits scans in their order, each once the index has answered.
fn start_resolver(stream: &Arc<Stream>, way: &Way) -> io::Result<Sender<Asked>> {
    let (sender, scans) = bounded::<Asked>(ASKED);
    let (stream, outbox) = (Arc::clone(stream), Arc::clone(&way.outbox));
    spawn("gw-resolve", move || {
        for Asked {
            scan,
            buffer,
            claim,
        } in scans
        {
            let answers = claim.map(Claim::wait).unwrap_or_default();
            outbox.submit(&stream, scan, buffer, &answers);
            stream.resolved();
        }
    })?;
    Ok(sender)
}

pub(super) enum Received {
    Bytes(usize),
    /// Nothing is there now, and there is something to send in the meantime.
    Nothing,
    End,
}

/// Reads what is there; waits for something only if there is nothing to send.
pub(super) fn receive(
    socket: &UnixStream,
    out: &mut [u8],
    have_something: bool,
) -> io::Result<Received> {
    let flags = if have_something {
        RecvFlags::DONTWAIT
    } else {
        RecvFlags::empty()
    };
    loop {
        match rustix::net::recv(socket, &mut *out, flags) {
            Ok((0, _)) => return Ok(Received::End),
            Ok((n, _)) => return Ok(Received::Bytes(n)),
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => return Ok(Received::Nothing),
            // The other side of a unix socket went away with data unread.
            Err(rustix::io::Errno::CONNRESET) => return Ok(Received::End),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Tells repairs where the blocks are.
fn learn_blocks(packer: &Packer, stream: &Stream) -> bool {
    let Some(blocks) = packer.blocks() else {
        return false;
    };
    stream.set_blocks(blocks);
    true
}

/// Keeps to the VM's own limit, counted on what it has put on the wire.
pub(super) fn pace(stream: &Stream) {
    let wait = stream.bucket.owed();
    if !wait.is_zero() {
        std::thread::sleep(wait);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_frame_is_short_on_the_wire_and_holds_what_compression_lets_it() {
        assert_eq!(short_len(1000), SHORT_FRAME);
        assert_eq!(short_len(1020), SHORT_FRAME);
        assert_eq!(short_len(500), 2 * SHORT_FRAME);
        for ratio in [0, 1, 200] {
            assert_eq!(short_len(ratio), SHORT_STREAM);
        }
    }
}
