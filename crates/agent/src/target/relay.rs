//! The rest of a post-copy that was interrupted: what the source QEMU writes goes to the target QEMU as it is.
//!
//! The two QEMUs agree by themselves on what is missing, and each page comes once. Nothing that was
//! queued for the earlier stream gets here: that has a queue and a socket of its own, and both are closed.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crossbeam_channel::Receiver;
use wire::{BackMessage, Reached};

use super::session::TargetSession;
use super::sink::{MAX_QUEUED, SinkError, SinkFrame};

/// The source hears of so many bytes at once, or of fewer when nothing else is to be written.
const SAY_EVERY: u64 = 128 << 10;

/// What feeds a QEMU that goes on with its migration.
pub(super) struct Relay {
    pub(super) frames: Receiver<SinkFrame>,
    pub(super) queued: Arc<AtomicUsize>,
    pub(super) session: Arc<TargetSession>,
    pub(super) vm: u16,
}

impl Relay {
    /// Feeds QEMU until the source closes the VM's stream or the session ends. `connect` is called when the
    /// first bytes are there: until then the QEMU goes on waiting, and another try finds it so.
    pub(super) fn run(
        self,
        connect: impl FnOnce() -> Result<UnixStream, SinkError>,
    ) -> Result<(), SinkError> {
        let (mut reached, mut said) = (0, 0);
        let mut waits = Some(connect);
        let mut socket = None;
        for frame in &self.frames {
            let left = self.queued.fetch_sub(frame.counted(), Ordering::Relaxed);
            let SinkFrame::Relay(body) = frame else {
                return Err(SinkError::Unexpected);
            };
            if left > MAX_QUEUED {
                return Err(SinkError::Dropped);
            }
            if let Some(connect) = waits.take() {
                socket = Some(connect()?);
            }
            if let Some(socket) = &mut socket {
                socket.write_all(&body)?;
            }
            reached += body.len() as u64;
            if reached - said >= SAY_EVERY || self.frames.is_empty() {
                said = reached;
                let (received, complete) = (reached, reached);
                let ack = BackMessage::Ack(Reached { received, complete });
                self.session.say(self.vm, ack);
            }
        }
        Ok(())
    }
}

/// Passes on what comes for the second channel of a QEMU, in a thread of its own, until nobody is left who sends any.
/// If it cannot be written, QEMU has closed both of its channels: that is told of the first.
pub(super) fn pass_on(
    urgent: Receiver<SinkFrame>,
    queued: Arc<AtomicUsize>,
    mut socket: UnixStream,
) -> io::Result<()> {
    std::thread::Builder::new()
        .name("gw-relay-2".into())
        .spawn(move || {
            for frame in urgent {
                queued.fetch_sub(frame.counted(), Ordering::Relaxed);
                if let SinkFrame::Relay(body) = frame
                    && let Err(error) = socket.write_all(&body)
                {
                    tracing::debug!(%error, "the target QEMU does not take what it asked for");
                    return;
                }
            }
        })
        .map(drop)
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use page::ContentKey;

    use super::super::sink::SinkHandle;
    use super::*;
    use crate::link::Pool;

    fn relay() -> (SinkHandle, Relay) {
        let session = Arc::new(TargetSession::new(ContentKey::new([1; 32]), 0, None, None));
        let (handle, frames, _, queued) = SinkHandle::new();
        let relay = Relay {
            frames,
            queued,
            session,
            vm: 3,
        };
        (handle, relay)
    }

    fn frame(bytes: &[u8]) -> SinkFrame {
        let pool = Pool::new(64);
        let mut body = pool.take(bytes.len());
        body[..bytes.len()].copy_from_slice(bytes);
        SinkFrame::Relay(Arc::new(body))
    }

    #[test]
    fn bytes_reach_qemu_in_their_order_and_it_is_connected_to_with_the_first() {
        let (handle, relay) = relay();
        let (ours, mut qemu) = UnixStream::pair().unwrap();
        handle.push(frame(b"ab"));
        handle.push(frame(b"c"));
        drop(handle);
        relay.run(|| Ok(ours)).unwrap();
        let mut read = Vec::new();
        qemu.read_to_end(&mut read).unwrap();
        assert_eq!(read, b"abc");
    }

    #[test]
    fn a_session_that_ends_before_its_first_byte_leaves_the_qemu_alone() {
        let (handle, relay) = relay();
        drop(handle);
        relay.run(|| panic!("it is connected to")).unwrap();
    }

    #[test]
    fn pages_of_the_earlier_stream_are_refused() {
        let (handle, relay) = relay();
        let body = Arc::new(Pool::new(64).take(1));
        handle.push(SinkFrame::Frame {
            body,
            is_repair: false,
        });
        let (ours, _qemu) = UnixStream::pair().unwrap();
        let refused = relay.run(|| Ok(ours));
        assert!(matches!(refused, Err(SinkError::Unexpected)));
    }
}
