//! What waits to be sent in a session, and the table that decides what needs to be.
//!
//! Both are behind one lock: a page is entered into the table and its bytes are queued in one
//! step, so that no other VM's reference to it can overtake them.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use content::HostTable;
use migrate::pack::{Packed, Scan};
use page::{ContentId, EntryId, PAGE_SIZE};
use wire::FrameKind;
use wire::index::Verdict;

use crate::link::Buffer;

use super::stream::Stream;

/// Frames of fewer bytes say little about what compression achieves. Those of post-copy have about
/// twice as many.
const RATIO_FROM: usize = 16 << 10;

/// A frame on its way to the sender.
pub(crate) struct OutFrame {
    pub(crate) kind: FrameKind,
    pub(crate) stream: Arc<Stream>,
    pub(crate) packed: Packed,
    /// What the offsets of the packed pages refer to.
    pub(crate) buffer: Option<Arc<Buffer>>,
}

/// The body of a frame, piece by piece: neighbouring pages of the buffer are apart by QEMU's record
/// headers.
pub(crate) fn pieces<'a>(
    packed: &'a Packed,
    buffer: Option<&'a Arc<Buffer>>,
) -> impl Iterator<Item = &'a [u8]> + Clone {
    let pages = packed.pages.iter().filter_map(move |at| {
        let at = *at as usize;
        buffer.map(|buffer| &buffer[at..at + PAGE_SIZE])
    });
    std::iter::once(packed.front.as_slice()).chain(pages)
}

/// The queue. Its length is bounded by the windows of the streams that fill it.
#[derive(Default)]
pub(crate) struct Outbox {
    inner: Mutex<Inner>,
    filled: Condvar,
}

#[derive(Default)]
struct Inner {
    table: HostTable,
    frames: VecDeque<OutFrame>,
    /// What processors of guests wait for; one for each fault that is not served.
    urgent: VecDeque<OutFrame>,
    /// Wire bytes for a thousand bytes of frames, as compression lately achieved.
    ratio_permille: u64,
    closed: bool,
}

impl Outbox {
    /// Contents of a scan that the table does not know.
    pub(crate) fn unknown(&self, scan: &Scan) -> Vec<ContentId> {
        scan.unknown(&self.lock().table).collect()
    }

    /// Forgets contents whose entries are lost.
    pub(crate) fn forget(&self, lost: &[EntryId]) {
        self.lock().table.forget(lost);
    }

    /// Resolves what was scanned from `buffer` and queues it, in one step.
    pub(crate) fn submit(
        &self,
        stream: &Arc<Stream>,
        scan: Scan,
        buffer: Arc<Buffer>,
        answers: &[(ContentId, Verdict)],
    ) {
        let mut inner = self.lock();
        if inner.closed {
            return;
        }
        let mut packed = scan.resolve(&buffer, &mut inner.table, answers);
        stream.count(packed.counts);
        stream.carries(packed.position, std::mem::take(&mut packed.carried));
        stream.sent(
            packed.position,
            inner.estimate(packed.raw_len()),
            packed.pages.len() as u64 * PAGE_SIZE as u64,
        );
        inner.frames.push_back(OutFrame {
            kind: FrameKind::Pages,
            stream: Arc::clone(stream),
            packed,
            buffer: Some(buffer),
        });
        drop(inner);
        self.filled.notify_one();
    }

    /// Queues a frame that does not concern the table.
    pub(crate) fn push(&self, frame: OutFrame) {
        let mut inner = self.lock();
        if !inner.closed {
            inner.frames.push_back(frame);
        }
        drop(inner);
        self.filled.notify_one();
    }

    /// Queues a frame ahead of all that are not urgent.
    pub(crate) fn push_urgent(&self, frame: OutFrame) {
        let mut inner = self.lock();
        if !inner.closed {
            inner.urgent.push_back(frame);
        }
        drop(inner);
        self.filled.notify_one();
    }

    /// Waits, as long as nothing is urgent.
    pub(crate) fn rest(&self, time: Duration) {
        let deadline = Instant::now() + time;
        let mut inner = self.lock();
        while inner.urgent.is_empty() && !inner.closed {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            inner = self
                .filled
                .wait_timeout(inner, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// The next frame; `None` after a while without one. `Err`: the session is over.
    pub(crate) fn pop(&self, patience: Duration) -> Result<Option<OutFrame>, ()> {
        let mut inner = self.lock();
        if inner.urgent.is_empty() && inner.frames.is_empty() && !inner.closed {
            inner = self
                .filled
                .wait_timeout(inner, patience)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        if inner.closed {
            return Err(());
        }
        let urgent = inner.urgent.pop_front();
        Ok(urgent.or_else(|| inner.frames.pop_front()))
    }

    /// What the VM's pages wait for at the target is wanted at once, by the pages of the frames that are
    /// queued.
    pub(crate) fn hurry(&self, stream: &Arc<Stream>) {
        self.push(OutFrame {
            kind: FrameKind::Hurry,
            stream: Arc::clone(stream),
            packed: Packed::default(),
            buffer: None,
        });
    }

    /// Learns what a frame took on the wire.
    pub(crate) fn learn_ratio(&self, raw: usize, wire: usize) {
        if raw < RATIO_FROM {
            return;
        }
        let mut inner = self.lock();
        let now = (wire as u64 * 1000) / raw as u64;
        inner.ratio_permille = if inner.ratio_permille == 0 {
            now
        } else {
            (inner.ratio_permille * 3 + now) / 4
        };
    }

    /// Wire bytes for a thousand bytes of frames, as compression lately achieved.
    pub(crate) fn ratio_permille(&self) -> u64 {
        self.lock().ratio_permille()
    }

    /// Ends the session: nothing is queued or sent any more.
    pub(crate) fn close(&self) {
        let mut inner = self.lock();
        inner.closed = true;
        inner.frames.clear();
        inner.urgent.clear();
        drop(inner);
        self.filled.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn ratio_permille(&self) -> u64 {
        match self.ratio_permille {
            0 => 1000,
            ratio => ratio,
        }
    }

    fn estimate(&self, raw: usize) -> u64 {
        raw as u64 * self.ratio_permille() / 1000
    }
}
