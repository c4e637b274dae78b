//! Which pages of a session's VMs share frames: read from the page tables, for the readers to mark.
//!
//! What is found is a hint. It is looked up again while the VMs' memory goes over for the first
//! time; later rounds bring pages that were written, which share nothing.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use guest::SharedFrames;
use migrate::pack::SharedPages;

use super::stream::Stream;

/// Least time between two scans: pages that are written meanwhile are sent as if they were shared
/// still, which costs the target host some memory for a while.
const PAUSE: Duration = Duration::from_secs(1);

/// A scan may take this part of the time: one of a terabyte takes seconds.
const LOAD: u32 = 20;

/// Looks for shared frames among the VMs of a session.
#[derive(Default)]
pub(crate) struct FrameScan {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    streams: Vec<Arc<Stream>>,
    frames: SharedFrames,
    /// When the last scan ended, and how long it took.
    last: Option<(Instant, Duration)>,
}

impl FrameScan {
    /// A VM joins: all are looked at again.
    pub(crate) fn add(&self, stream: &Arc<Stream>) {
        let mut inner = self.lock();
        inner.streams.push(Arc::clone(stream));
        inner.begin_anew();
        inner.scan();
    }

    /// A VM has left.
    pub(crate) fn remove(&self, vm: u16) {
        let mut inner = self.lock();
        inner.streams.retain(|stream| stream.vm != vm);
        inner.begin_anew();
    }

    /// Looks again, unless that was done a moment ago.
    pub(crate) fn refresh(&self) {
        let mut inner = self.lock();
        let is_due = inner
            .last
            .is_none_or(|(ended, took)| ended.elapsed() >= PAUSE.max(took.saturating_mul(LOAD)));
        if is_due {
            inner.scan();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn begin_anew(&mut self) {
        let memories = self.streams.iter().map(|s| s.memory.layout.0.clone());
        self.frames = SharedFrames::new(memories.collect());
    }

    fn scan(&mut self) {
        let begin = Instant::now();
        let report = match self.frames.refresh() {
            Ok(report) => report,
            Err(error) => {
                tracing::warn!("shared frames cannot be looked for: {error}");
                return;
            }
        };
        for (vm, error) in &report.unread {
            let vm = self.streams.get(usize::from(*vm)).map(|s| &s.name);
            tracing::warn!(?vm, "its page table cannot be read: {error}");
        }
        self.tell();
        let took = begin.elapsed();
        self.last = Some((Instant::now(), took));
        tracing::debug!(
            pages = report.shared_pages,
            frames = report.frames,
            ?took,
            "looked for shared frames"
        );
    }

    /// Has the streams know which of their pages share.
    fn tell(&self) {
        let mut pages: Vec<SharedPages> = self
            .streams
            .iter()
            .map(|stream| {
                let (memory, names) = &stream.memory.layout;
                let blocks = names.iter().zip(&memory.blocks);
                SharedPages::of_blocks(blocks.map(|(name, block)| (name.as_str(), block.pages)))
            })
            .collect();
        for (_, members) in self.frames.classes() {
            for member in members {
                if let Some(pages) = pages.get_mut(usize::from(member.vm)) {
                    pages.mark(usize::from(member.block.0), member.page);
                }
            }
        }
        for (stream, pages) in self.streams.iter().zip(pages) {
            stream.set_shared(pages);
        }
    }
}
