//! More connections for a session's frames, for links that others fill.
//!
//! Such a link is shared out by connections, and stock QEMU has one for each VM. A session has a forward
//! connection and a lane for each VM but the first, up to a limit. A lane takes a frame only when the
//! forward connection has no room: while that keeps up, lanes stay empty. Frames are packed and numbered by
//! one thread, and the target takes them in the order of their numbers, so what they say does not depend
//! on which way they went.

use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TrySendError, bounded};
use migrate::pack::Packed;
use wire::{FrameHeader, FrameKind, Hello};

use crate::link::{Buffer, Link, LinkError};

use super::outbox::pieces;
use super::session::{HEARTBEAT, SessionContext, open, spawn};

/// A frame that is numbered.
pub(crate) struct Load {
    pub(crate) header: FrameHeader,
    /// The body, if it is not compressed, and what the offsets of its pages refer to.
    pub(crate) packed: Packed,
    pub(crate) buffer: Option<Arc<Buffer>>,
    /// The body, if it is.
    pub(crate) compressed: Vec<u8>,
}

impl Load {
    /// Sends it over `link`.
    pub(crate) fn send(&self, link: &mut Link) -> Result<(), LinkError> {
        let pieces = pieces(&self.packed, self.buffer.as_ref());
        link.send_packed(self.header, pieces, &self.compressed)
    }
}

/// How a lane is opened.
pub(crate) struct Way {
    pub(crate) address: String,
    pub(crate) context: SessionContext,
    pub(crate) hello: Hello,
}

/// The lanes of a session. They end with the [`Loads`] that fills them.
pub(crate) struct Lanes {
    way: Way,
    loads: Receiver<Load>,
    /// Connections that were begun, and those that the target welcomed. Nothing ends but with the session.
    begun: AtomicUsize,
    open: AtomicUsize,
    is_closed: AtomicBool,
    sockets: Mutex<Vec<TcpStream>>,
    /// Memory of compressed bodies that are sent.
    spare: Mutex<Vec<Vec<u8>>>,
}

/// The end at which lanes are filled.
pub(crate) struct Loads {
    lanes: Arc<Lanes>,
    queue: Sender<Load>,
}

impl Lanes {
    /// No lanes yet.
    pub(crate) fn new(way: Way) -> (Arc<Self>, Loads) {
        // Each lane has one frame at work and one that waits.
        let (queue, loads) = bounded(way.context.connections_max);
        let lanes = Arc::new(Self {
            way,
            loads,
            begun: AtomicUsize::new(0),
            open: AtomicUsize::new(0),
            is_closed: AtomicBool::new(false),
            sockets: Mutex::default(),
            spare: Mutex::default(),
        });
        let loads = Loads {
            lanes: Arc::clone(&lanes),
            queue,
        };
        (lanes, loads)
    }

    /// Opens lanes for so many VMs, in threads of their own. One that cannot be opened is done
    /// without: an older target knows none. `lost` is told why one ended that was open.
    pub(crate) fn grow(
        self: &Arc<Self>,
        vms: usize,
        lost: impl Fn(LinkError) + Clone + Send + 'static,
    ) {
        let wanted = vms.min(self.way.context.connections_max).saturating_sub(1);
        while self.begun.load(Ordering::Relaxed) < wanted {
            self.begun.fetch_add(1, Ordering::Relaxed);
            let (lanes, lost) = (Arc::clone(self), lost.clone());
            let started = spawn("gw-lane", move || match lanes.connect() {
                Err(error) => tracing::debug!(%error, "a session does without another connection"),
                Ok(link) => {
                    if let Err(error) = lanes.run(link) {
                        lost(error);
                    }
                }
            });
            if let Err(error) = started {
                tracing::debug!(%error, "no thread for another connection of a session");
            }
        }
    }

    fn connect(&self) -> Result<Link, LinkError> {
        let Way {
            address,
            context,
            hello,
        } = &self.way;
        let link = open(address, context, hello)?;
        let mut sockets = lock(&self.sockets);
        if self.is_closed.load(Ordering::Acquire) {
            return Err(LinkError::Closed);
        }
        sockets.push(link.socket()?);
        Ok(link)
    }

    fn run(&self, mut link: Link) -> Result<(), LinkError> {
        self.open.fetch_add(1, Ordering::Release);
        loop {
            match self.loads.recv_timeout(HEARTBEAT) {
                Ok(load) => {
                    load.send(&mut link)?;
                    lock(&self.spare).push(load.compressed);
                }
                Err(RecvTimeoutError::Timeout) => {
                    let heartbeat = FrameHeader::new(FrameKind::Heartbeat, 0, 0, 0);
                    link.write_all(&heartbeat.to_bytes())?;
                }
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
        }
    }

    /// Takes no more frames: from here on some are urgent, and what is on another connection is in
    /// front of them.
    pub(crate) fn close_to_more(&self) {
        self.is_closed.store(true, Ordering::Release);
    }

    /// Cuts all of them.
    pub(crate) fn cut(&self) {
        let sockets = {
            let mut sockets = lock(&self.sockets);
            self.is_closed.store(true, Ordering::Release);
            std::mem::take(&mut *sockets)
        };
        for socket in sockets {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
    }
}

impl Loads {
    /// Gives a frame to a lane. It comes back if there is none that has room.
    #[must_use]
    pub(crate) fn give(&self, load: Load) -> Option<Load> {
        let lanes = &self.lanes;
        let takes_more = !lanes.is_closed.load(Ordering::Acquire)
            && self.queue.len() < lanes.open.load(Ordering::Acquire);
        if !takes_more {
            return Some(load);
        }
        self.queue
            .try_send(load)
            .err()
            .map(TrySendError::into_inner)
    }

    /// Memory for a compressed body.
    pub(crate) fn spare(&self) -> Vec<u8> {
        lock(&self.lanes.spare).pop().unwrap_or_default()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::{Duration, Instant};

    use wire::{Channel, ControlReply, PROTOCOL_VERSION, WireCompression};

    use super::*;
    use crate::link::{Hold, Pool, Security, Serve, Terms, listen};

    const PATIENCE: Duration = Duration::from_secs(10);

    /// Welcomes lanes and tells the numbers and bodies of their frames; or refuses them.
    struct Target(Option<mpsc::SyncSender<(u32, Vec<u8>)>>);

    impl Serve for Target {
        fn serve(&self, mut link: Link, hello: &Hello) -> anyhow::Result<()> {
            assert_eq!(hello.channel, Channel::Lane);
            let Some(told) = &self.0 else {
                return Ok(());
            };
            link.send(&ControlReply::Welcome)?;
            loop {
                let (header, body) = link.receive_frame(&Pool::new(64), None, &mut Vec::new())?;
                if header.kind() != FrameKind::Heartbeat {
                    told.send((header.order(), body.to_vec()))?;
                }
            }
        }
    }

    /// Welcomes a lane, and cuts it.
    struct Cutter;

    impl Serve for Cutter {
        fn serve(&self, mut link: Link, _: &Hello) -> anyhow::Result<()> {
            Ok(link.send(&ControlReply::Welcome)?)
        }
    }

    fn lanes(target: impl Serve, connections_max: usize) -> (Arc<Lanes>, Loads) {
        let terms = Terms {
            security: Security::Plaintext,
            peer_timeout: PATIENCE,
        };
        let address = listen(([127, 0, 0, 1], 0).into(), terms, target).unwrap();
        Lanes::new(Way {
            address: address.to_string(),
            context: SessionContext {
                host: "s1".into(),
                security: Security::Plaintext,
                peer_timeout: PATIENCE,
                hold: Hold(None),
                connections_max,
                budget: Arc::default(),
            },
            hello: Hello {
                version: PROTOCOL_VERSION,
                session: "s".into(),
                channel: Channel::Lane,
                source: "s1".into(),
                compression: WireCompression::None,
                domain_key: None,
                rack: None,
            },
        })
    }

    fn load(order: u32) -> Load {
        let front = vec![7; order as usize];
        let len = u32::try_from(front.len()).unwrap();
        Load {
            header: FrameHeader::new(FrameKind::Pages, 0, len, len).with_order(order),
            packed: Packed {
                front,
                ..Packed::default()
            },
            buffer: None,
            compressed: Vec::new(),
        }
    }

    fn wait_for(what: impl Fn() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !what() {
            assert!(Instant::now() < deadline, "it never happens");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn there_is_a_lane_for_each_vm_but_the_first_and_they_take_frames_until_some_are_urgent() {
        let (told, frames) = mpsc::sync_channel(8);
        let (lanes, loads) = lanes(Target(Some(told)), 3);
        let grow = |vms| lanes.grow(vms, |error| panic!("a lane is lost: {error}"));
        grow(1);
        assert!(loads.give(load(1)).is_some(), "one VM has no lane");
        for vms in [2, 3, 9] {
            grow(vms);
            let wanted = vms.min(3) - 1;
            wait_for(|| lanes.open.load(Ordering::Acquire) == wanted);
        }
        for order in 1..=4 {
            wait_for(|| lanes.loads.is_empty());
            assert!(
                loads.give(load(order)).is_none(),
                "frame {order} comes back"
            );
        }
        let mut came: Vec<_> = (0..4)
            .map(|_| frames.recv_timeout(PATIENCE).unwrap())
            .collect();
        came.sort_unstable();
        let sent: Vec<_> = (1..=4).map(|n| (n, vec![7; n as usize])).collect();
        assert_eq!(came, sent);
        lanes.close_to_more();
        assert!(loads.give(load(5)).is_some());
    }

    #[test]
    fn a_lane_that_breaks_is_told_of() {
        let (lanes, _loads) = lanes(Cutter, 4);
        let (told, lost) = mpsc::channel();
        lanes.grow(2, move |error| told.send(error).unwrap());
        // Its heartbeats find out.
        let error = lost.recv_timeout(PATIENCE).unwrap();
        assert!(matches!(error, LinkError::Io(_)), "{error}");
    }

    #[test]
    fn a_target_that_knows_no_lanes_is_done_without() {
        let (lanes, loads) = lanes(Target(None), 4);
        lanes.grow(2, |error| panic!("a lane is lost: {error}"));
        // Its thread lets go.
        wait_for(|| Arc::strong_count(&lanes) == 2);
        assert_eq!(lanes.open.load(Ordering::Acquire), 0);
        assert!(loads.give(load(1)).is_some());
    }
}
