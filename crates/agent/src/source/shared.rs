//! Which pages of a session's VMs share frames: read from the page tables, for the readers to mark.
//!
//! What is found is a hint. It is looked up again while the VMs' memory goes over for the first
//! time; later rounds bring pages that were written, which share nothing.
//!
//! A process may have only so many mappings. If a VM's shared pages lie in more runs than that, the
//! longest are marked, and the choice is made for each content: KSM at the target can merge the pages
//! of a content that stays out of the pool altogether, never a private page with one of the pool.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use content::pool::{Candidate, PoolPage, VmCandidates, plan_runs, runs_in};
use guest::{ClassNo, SharedFrames};
use migrate::pack::SharedPages;
use page::{FileRange, FrameSharing, PageNo};

use super::stream::Stream;

/// Least time between two scans: pages that are written meanwhile are sent as if they were shared
/// still, which costs the target host some memory for a while.
const PAUSE: Duration = Duration::from_secs(1);

/// A scan may take this part of the time: one of a terabyte takes seconds.
const LOAD: u32 = 20;

/// Most runs of shared pages of a VM that are marked: what a target QEMU can have mapped with the
/// kernel's usual limit of 65 530 mappings, at two a run, and some left for QEMU itself.
pub(crate) const RUNS_MAX: usize = 30_000;

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
        self.frames.set_vms(memories.collect());
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

    /// Has the streams know which of their pages share, and how.
    fn tell(&self) {
        let left_out = self.left_out();
        for (vm, stream) in (0..).zip(&self.streams) {
            let (memory, names) = &stream.memory.layout;
            let blocks = names.iter().zip(&memory.blocks);
            let blocks = blocks.map(|(name, block)| (name.as_str(), block.pages));
            let mut pages = SharedPages::of_blocks(blocks);
            let left_out = left_out.get(usize::from(vm)).map_or(&[][..], Vec::as_slice);
            let mut left_out = left_out.iter().peekable();
            for (block, page, class) in self.frames.shared_of(vm) {
                if left_out
                    .next_if(|out| (out.block, out.page) == (block, page))
                    .is_none()
                {
                    pages.mark(usize::from(block.0), page, self.sharing(class, page));
                }
            }
            stream.set_shared(pages);
        }
    }

    fn sharing(&self, class: ClassNo, page: PageNo) -> FrameSharing {
        let Some((file, at)) = self.frames.file_page(class) else {
            return FrameSharing::Merged;
        };
        let ahead = at.cast_signed() - i64::from(page.0);
        FrameSharing::File(FileRange { file, ahead })
    }

    /// The pages of each VM that are not to be mapped, because there are more runs than can be; in
    /// order.
    fn left_out(&self) -> Vec<Vec<Candidate>> {
        let vms = || (0..).zip(&self.streams).map(|(vm, _)| vm);
        if vms().all(|vm| runs_in(self.candidates(vm)) <= RUNS_MAX) {
            return Vec::new();
        }
        let lists: Vec<Vec<Candidate>> = vms().map(|vm| self.candidates(vm).collect()).collect();
        let runs_max = RUNS_MAX;
        let vms = lists.iter().map(|pages| VmCandidates { pages, runs_max });
        let plans = plan_runs(&vms.collect::<Vec<_>>());
        plans.into_iter().map(|plan| plan.plain).collect()
    }

    fn candidates(&self, vm: u16) -> impl Iterator<Item = Candidate> {
        let shared = self.frames.shared_of(vm);
        shared.map(|(block, page, class)| Candidate {
            block,
            page,
            at: self.expected_place(class),
        })
    }

    /// Where a class will lie, so far as it matters which lie beside each other: a file in its order,
    /// merged pages at the first page that has them.
    fn expected_place(&self, class: ClassNo) -> PoolPage {
        const OF_FILE: u64 = 1 << 63;
        let place = |high: u16, middle: u16, page: u64| {
            u64::from(high & 0x7fff) << 48 | u64::from(middle) << 32 | page
        };
        PoolPage(match self.frames.file_page(class) {
            Some((file, at)) => OF_FILE | place(file, 0, at),
            None => self.frames.pages_of(class).first().map_or(0, |first| {
                place(first.vm, first.block.0, u64::from(first.page.0))
            }),
        })
    }
}
