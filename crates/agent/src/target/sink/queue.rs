//! What waits for one target QEMU.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crossbeam_channel::{Receiver, Sender, unbounded};
use migrate::unpack::Arrived;
use page::{EntryId, HostNo, PAGE_SIZE};

use crate::link::Buffer;

/// Most bytes that wait for one QEMU. The source's window keeps below it (64 MiB of QEMU's stream if it is
/// configured so, usually 8, in buffers of twice that at most; and repairs, and contents for the pages of it that
/// wait); beyond it the source is not honest, and the VM's move fails.
pub(in crate::target) const MAX_QUEUED: usize = 256 << 20;

/// What a frame takes besides its bytes, in the queue and in its buffer: so that empty ones are bounded, too.
const FRAME: usize = 256;

/// What comes for one VM.
pub(crate) enum SinkFrame {
    /// From its source.
    Frame { body: Arc<Buffer>, is_repair: bool },
    /// From its source, before all others: a processor waits for it.
    Urgent(Arc<Buffer>),
    /// From its source QEMU, as it is.
    Relay(Arc<Buffer>),
    /// Contents that it waits for.
    Arrived(Vec<Arrived<Arc<Buffer>>>),
    /// Contents that it waits for in vain.
    NotComing {
        carrier: HostNo,
        entries: Vec<EntryId>,
    },
    /// What it waits for is to come at once, or not at all.
    Hurry,
}

impl SinkFrame {
    /// Bytes that count against the queue's limit. Of contents that arrive only those of the pages that need
    /// them: what else is in their frames is kept, and bounded, by the store of the rack.
    pub(in crate::target) fn counted(&self) -> usize {
        let bytes = match self {
            Self::Frame { body, .. } | Self::Urgent(body) | Self::Relay(body) => body.held(),
            Self::Arrived(contents) => contents.len() * PAGE_SIZE,
            Self::NotComing { entries, .. } => size_of_val(entries.as_slice()),
            Self::Hurry => 0,
        };
        FRAME + bytes
    }
}

/// The receiver's end of a sink.
#[derive(Clone)]
pub(crate) struct SinkHandle {
    frames: Sender<SinkFrame>,
    urgent: Sender<SinkFrame>,
    queued: Arc<AtomicUsize>,
}

impl SinkHandle {
    /// Of no QEMU: what comes is for a test.
    #[cfg(test)]
    pub(crate) fn alone() -> (Self, Receiver<SinkFrame>) {
        let (handle, frames, _, _) = Self::new();
        (handle, frames)
    }

    /// Of two queues, the second of which overtakes the first; the last counts the bytes of both.
    pub(crate) fn new() -> (
        Self,
        Receiver<SinkFrame>,
        Receiver<SinkFrame>,
        Arc<AtomicUsize>,
    ) {
        let (frames, receiver) = unbounded();
        let (urgent, urgent_receiver) = unbounded();
        let queued = Arc::<AtomicUsize>::default();
        let handle = Self {
            frames,
            urgent,
            queued: Arc::clone(&queued),
        };
        (handle, receiver, urgent_receiver, queued)
    }

    /// The queue is bounded in bytes: above the limit frames are dropped, and the sink fails on
    /// the gap that they leave.
    pub(crate) fn push(&self, frame: SinkFrame) {
        self.push_to(&self.frames, frame);
    }

    /// As [`SinkHandle::push`], before everything that waits.
    pub(crate) fn push_urgent(&self, frame: SinkFrame) {
        self.push_to(&self.urgent, frame);
    }

    fn push_to(&self, queue: &Sender<SinkFrame>, frame: SinkFrame) {
        let len = frame.counted();
        if self.queued.fetch_add(len, Ordering::Relaxed) + len > MAX_QUEUED {
            tracing::error!("a source sends faster than its window allows; its VM's move fails");
            return;
        }
        let _ = queue.send(frame);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::Pool;

    #[test]
    fn frames_without_bytes_fill_a_queue_as_well() {
        let pool = Pool::new(1 << 10);
        let empty = || Arc::new(pool.take(0));
        for make in [&(|| SinkFrame::Hurry) as &dyn Fn() -> SinkFrame, &|| {
            SinkFrame::Urgent(empty())
        }] {
            let (handle, frames, urgent, queued) = SinkHandle::new();
            for _ in 0..=MAX_QUEUED / FRAME {
                handle.push(make());
            }
            assert_eq!(frames.len() + urgent.len(), MAX_QUEUED / FRAME);
            // So that the sink sees that something was left out.
            assert!(queued.load(Ordering::Relaxed) > MAX_QUEUED);
        }
    }
}
