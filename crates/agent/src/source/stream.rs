//! One VM's stream as its session, its reader and its mover share it.

use std::collections::{HashSet, VecDeque};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use migrate::pack::{PackCounts, SharedPages};
use migrate::window::{Rates, Window};
use page::{BlockIndex, EntryId, PageNo, PageRun};
use qstream::BlockList;
use wire::{FaultTimes, Reached};

use crate::link::Bucket;

pub(crate) use super::guest_memory::GuestMemory;
use super::right_of_way::Place;
use super::run::Input;
use super::urgent::Requests;

/// How often a reader that waits looks again although nobody told it to: for the window, which
/// acknowledgements open, and for the wire, which is given free without a word.
const WINDOW_POLL: Duration = Duration::from_millis(200);
const YIELD_POLL: Duration = Duration::from_millis(10);

/// Where pages are.
pub(crate) type PlacesOfPages = Vec<(BlockIndex, PageNo)>;

/// What is known of a stream that may go over to post-copy.
#[derive(Default)]
struct Postcopy {
    requests: Requests,
    /// Names of the stream's blocks.
    blocks: Vec<String>,
    /// Pages that were sent ahead, until the reader takes them.
    ahead: PlacesOfPages,
    /// Those of them that were asked for and that QEMU's second channel, if it has one, has not brought.
    asked: HashSet<(BlockIndex, PageNo)>,
    /// Those that it has brought, until the reader takes them.
    aside: PlacesOfPages,
    /// Groups of neighbours that were sent ahead.
    groups: HashSet<(BlockIndex, u32)>,
    /// How long faults took, once the target has said so.
    faults: Option<FaultTimes>,
}

/// One VM's stream.
pub(crate) struct Stream {
    /// Number of the VM in its session.
    pub(crate) vm: u16,
    /// Name of the VM, for logs.
    pub(crate) name: String,
    pub(crate) memory: GuestMemory,
    pub(crate) bucket: Bucket,
    place: Place,
    started: Instant,
    window: Mutex<Flow>,
    moved: Condvar,
    socket: Mutex<Option<UnixStream>>,
    /// QEMU's second channel, once it is open.
    second: Mutex<Option<UnixStream>>,
    /// QEMU has, or will have, a second channel.
    preempts: AtomicBool,
    blocks: OnceLock<Arc<BlockList>>,
    /// Who is told, and as which of the VM's streams.
    mover: Mutex<(Sender<Input>, u32)>,
    /// Bytes of QEMU's streams before this one.
    earlier: AtomicU64,
    pub(crate) wire_bytes: AtomicU64,
    /// Pages that the target has mapped.
    pub(crate) mapped: AtomicU64,
    /// What is known of shared frames, and whether the reader has taken it.
    shared: Mutex<(Arc<SharedPages>, bool)>,
    counts: Mutex<PackCounts>,
    repaired: AtomicU64,
    /// Entries of the rack in frames that are not acknowledged, with the frames' ends.
    carried: Mutex<VecDeque<(u64, Vec<EntryId>)>>,
    /// QEMU has sent all memory once: what comes is pages that were written since.
    is_late_round: AtomicBool,
    /// When the last section of its memory began.
    ending: OnceLock<Instant>,
    /// A switch to post-copy was ordered and is not read yet.
    is_switching: AtomicBool,
    /// QEMU was told that everything has arrived.
    is_told: AtomicBool,
    postcopy: Mutex<Postcopy>,
}

struct Flow {
    window: Window,
    /// Scans that wait for the index: they are not in the window yet.
    unresolved: usize,
    /// Set once the stream is over; everybody who waits goes home.
    closed: bool,
    /// What QEMU still writes goes nowhere: it is to complete, and to run on here.
    drained: bool,
    /// Nothing is read until then: a switch to post-copy is near.
    held_until: Option<Instant>,
    /// When the target last acknowledged something, or had nothing to.
    progress: Instant,
}

impl Flow {
    fn is_complete(&self) -> bool {
        self.unresolved == 0 && self.window.backlog() == 0
    }

    fn is_held(&self) -> bool {
        self.held_until.is_some_and(|until| Instant::now() < until)
    }
}

impl Stream {
    pub(crate) fn new(
        vm: u16,
        name: String,
        memory: GuestMemory,
        limit: u64,
        place: Place,
        mover: (Sender<Input>, u32),
    ) -> Self {
        let started = Instant::now();
        Self {
            vm,
            name,
            memory,
            bucket: Bucket::default(),
            place,
            started,
            window: Mutex::new(Flow {
                window: Window::new(limit),
                unresolved: 0,
                closed: false,
                drained: false,
                held_until: None,
                progress: started,
            }),
            moved: Condvar::new(),
            socket: Mutex::new(None),
            second: Mutex::new(None),
            preempts: AtomicBool::new(false),
            blocks: OnceLock::new(),
            mover: Mutex::new(mover),
            earlier: AtomicU64::new(0),
            wire_bytes: AtomicU64::new(0),
            mapped: AtomicU64::new(0),
            shared: Mutex::default(),
            counts: Mutex::new(PackCounts::default()),
            repaired: AtomicU64::new(0),
            carried: Mutex::default(),
            is_late_round: AtomicBool::new(false),
            ending: OnceLock::new(),
            is_switching: AtomicBool::new(false),
            is_told: AtomicBool::new(false),
            postcopy: Mutex::default(),
        }
    }

    /// Tells the mover.
    pub(crate) fn tell(&self, input: Input) {
        let mover = lock(&self.mover);
        // A mover that has ended wants to hear nothing.
        let _ = mover.0.send(Input::Of(mover.1, Box::new(input)));
    }

    /// Goes on counting where an earlier stream of the VM stopped.
    pub(crate) fn count_from(&self, earlier: &Self) {
        let bytes = earlier.earlier.load(Ordering::Relaxed) + earlier.flow().0;
        self.earlier.store(bytes, Ordering::Relaxed);
        for (ours, theirs) in [
            (&self.wire_bytes, &earlier.wire_bytes),
            (&self.mapped, &earlier.mapped),
            (&self.repaired, &earlier.repaired),
        ] {
            ours.store(theirs.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        *lock(&self.counts) = *lock(&earlier.counts);
    }

    /// Bytes of QEMU's streams before this one.
    pub(crate) fn earlier_bytes(&self) -> u64 {
        self.earlier.load(Ordering::Relaxed)
    }

    /// QEMU is about to be told that everything has arrived.
    pub(crate) fn set_told(&self) {
        self.is_told.store(true, Ordering::Relaxed);
    }

    /// Whether it was.
    pub(crate) fn is_told(&self) -> bool {
        self.is_told.load(Ordering::Relaxed)
    }

    /// The QEMU socket, to write the return path to and to close.
    pub(crate) fn attach(&self, socket: UnixStream) {
        *lock(&self.socket) = Some(socket);
    }

    /// QEMU has a second channel, or will have one.
    pub(crate) fn set_preempts(&self) {
        self.preempts.store(true, Ordering::Relaxed);
    }

    /// QEMU's second channel, to close with the first.
    pub(crate) fn attach_second(&self, socket: UnixStream) {
        let mut second = lock(&self.second);
        if self.is_closed() {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
        *second = Some(socket);
    }

    /// Passes a return-path message on to the source QEMU.
    pub(crate) fn write_return_path(&self, message: &[u8]) {
        let mut socket = lock(&self.socket);
        if let Some(socket) = socket.as_mut()
            && let Err(error) = socket.write_all(message)
        {
            tracing::debug!(vm = self.name, %error, "the source QEMU does not take its return path");
        }
    }

    /// Waits until the window is open and the wire not another VM's. False: the stream is closed.
    pub(crate) fn wait_open(&self) -> bool {
        let mut flow = lock(&self.window);
        let mut since = Instant::now();
        while !flow.closed && !flow.drained {
            let yields = self.place.must_yield(Instant::now());
            flow.window.set_near_end(self.place.is_any_near_end());
            let is_held = flow.is_held();
            if !yields && !is_held && flow.window.is_open() {
                break;
            }
            let patience = if yields || is_held {
                YIELD_POLL
            } else {
                WINDOW_POLL
            };
            flow = self
                .moved
                .wait_timeout(flow, patience)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            let waited = since.elapsed();
            since += waited;
            if !yields && !is_held {
                // Standing back says nothing about what the path can do.
                flow.window.waited(waited);
            }
        }
        !flow.closed
    }

    /// Has nothing read from QEMU for some time. Never for ever: a QEMU that holds its lock while it
    /// writes answers nobody until it is read.
    pub(crate) fn hold(&self, time: Duration) {
        lock(&self.window).held_until = Some(Instant::now() + time);
        self.moved.notify_all();
    }

    /// Whether nothing is to be read for the moment.
    pub(crate) fn is_held(&self) -> bool {
        lock(&self.window).is_held()
    }

    /// A scan waits for the index.
    pub(crate) fn unresolved(&self) {
        lock(&self.window).unresolved += 1;
    }

    /// A scan that waited for the index is on its way.
    pub(crate) fn resolved(&self) {
        let mut flow = lock(&self.window);
        flow.unresolved = flow.unresolved.saturating_sub(1);
        drop(flow);
        self.moved.notify_all();
    }

    /// Waits until nothing that was read waits for the index any more. False: the stream is closed.
    pub(crate) fn wait_resolved(&self) -> bool {
        self.wait_while(|flow| flow.unresolved > 0)
    }

    /// Waits until all that was read is complete at the target. False: the stream is closed.
    pub(crate) fn wait_complete(&self) -> bool {
        self.wait_while(|flow| !flow.is_complete())
    }

    fn wait_while(&self, waits: impl Fn(&Flow) -> bool) -> bool {
        let mut flow = lock(&self.window);
        while !flow.closed && !flow.drained && waits(&flow) {
            flow = self
                .moved
                .wait_timeout(flow, WINDOW_POLL)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        !flow.closed
    }

    /// Whether all that was read is complete at the target.
    pub(crate) fn is_complete(&self) -> bool {
        lock(&self.window).is_complete()
    }

    /// A switch to post-copy is ordered: what is read before it must be complete soon.
    pub(crate) fn set_switching(&self) {
        self.is_switching.store(true, Ordering::Relaxed);
    }

    /// Whether a switch to post-copy is ordered and not passed yet.
    pub(crate) fn is_switching(&self) -> bool {
        self.is_switching.load(Ordering::Relaxed)
    }

    /// The switch to post-copy is passed: the guest goes ahead of its memory.
    pub(crate) fn pass_switch(&self) {
        lock(&self.window).window.set_guest_ahead();
        self.is_switching.store(false, Ordering::Relaxed);
    }

    /// From here on nothing is sent of what QEMU writes.
    pub(crate) fn drain(&self) {
        lock(&self.window).drained = true;
        self.moved.notify_all();
    }

    /// Waits until the stream is drained. False: it is closed.
    pub(crate) fn wait_drained(&self) -> bool {
        let mut flow = lock(&self.window);
        while !flow.closed && !flow.drained {
            flow = self
                .moved
                .wait(flow)
                .unwrap_or_else(PoisonError::into_inner);
        }
        flow.drained
    }

    pub(crate) fn is_drained(&self) -> bool {
        lock(&self.window).drained
    }

    /// The stream's blocks are known.
    pub(crate) fn set_blocks(&self, blocks: &Arc<BlockList>) {
        let _ = self.blocks.set(Arc::clone(blocks));
        let names = blocks.iter().map(|(_, block)| block.name.to_string());
        let names: Vec<String> = names.collect();
        let (layout, known) = &self.memory.layout;
        let lengths = names.iter().map(|name| {
            let at = known.iter().position(|known| known == name);
            at.and_then(|at| layout.blocks.get(at))
                .map_or(0, |block| block.pages)
        });
        *lock(&self.memory.lengths) = lengths.collect();
        let addresses = &self.memory.addresses;
        let bases = names.iter().map(|name| addresses.get(name).copied());
        *lock(&self.memory.bases) = bases.collect();
        lock(&self.postcopy).blocks = names;
    }

    /// The stream's blocks, once they are known.
    pub(crate) fn blocks(&self) -> Option<Arc<BlockList>> {
        self.blocks.get().cloned()
    }

    /// Pages that a message of the target QEMU asks for.
    pub(crate) fn asked(&self, message: &[u8]) -> Option<(BlockIndex, PageRun)> {
        let mut postcopy = lock(&self.postcopy);
        let Postcopy {
            requests, blocks, ..
        } = &mut *postcopy;
        requests.asked(message, blocks)
    }

    /// Whether a group of neighbours was not sent ahead before; it counts as sent now.
    pub(crate) fn is_new_group(&self, block: BlockIndex, group: u32) -> bool {
        lock(&self.postcopy).groups.insert((block, group))
    }

    /// These pages are on their way ahead of the stream; the first of them, so many, were asked for.
    pub(crate) fn went_ahead(&self, block: BlockIndex, pages: &[PageNo], asked: usize) {
        let mut postcopy = lock(&self.postcopy);
        let pages = pages.iter().map(|page| (block, *page));
        if self.preempts.load(Ordering::Relaxed) {
            postcopy.asked.extend(pages.clone().take(asked));
        }
        postcopy.ahead.extend(pages);
    }

    /// QEMU's second channel has brought a page. Whether it went ahead when it was asked for.
    pub(crate) fn came_aside(&self, block: BlockIndex, page: PageNo) -> bool {
        let mut postcopy = lock(&self.postcopy);
        postcopy.aside.push((block, page));
        postcopy.asked.remove(&(block, page))
    }

    /// Pages that went ahead since the last call, and those of which QEMU's copy came on its second channel.
    pub(crate) fn take_ahead(&self) -> (PlacesOfPages, PlacesOfPages) {
        let mut postcopy = lock(&self.postcopy);
        let ahead = std::mem::take(&mut postcopy.ahead);
        (ahead, std::mem::take(&mut postcopy.aside))
    }

    pub(crate) fn set_faults(&self, times: FaultTimes) {
        lock(&self.postcopy).faults = Some(times);
    }

    /// How long faults took at the target.
    pub(crate) fn faults(&self) -> Option<FaultTimes> {
        lock(&self.postcopy).faults
    }

    /// Whether the stream is over.
    pub(crate) fn is_closed(&self) -> bool {
        lock(&self.window).closed
    }

    /// Counts a frame that was queued.
    pub(crate) fn sent(&self, position: u64, wire_estimate: u64, page_bytes: u64) {
        let mut flow = lock(&self.window);
        if flow.window.backlog() == 0 {
            flow.progress = Instant::now();
        }
        flow.window.sent(position, wire_estimate, page_bytes);
    }

    /// The target QEMU is so far.
    pub(crate) fn acknowledged(&self, reached: Reached) {
        let mut flow = lock(&self.window);
        let before = flow.window.acked();
        flow.window.acknowledged(reached, self.started.elapsed());
        if flow.window.acked() > before {
            flow.progress = Instant::now();
        }
        drop(flow);
        self.moved.notify_all();
    }

    /// Whether QEMU may soon stop its guest.
    pub(crate) fn set_near_end(&self, near_end: bool) {
        self.place.set_near_end(near_end);
    }

    /// Whether the guest is stopped and waits for its last pages.
    pub(crate) fn set_stopped(&self, stopped: bool) {
        self.place.set_stopped(stopped);
    }

    /// How long the target has not acknowledged anything of what it should.
    pub(crate) fn stalled_for(&self) -> Duration {
        let flow = lock(&self.window);
        if flow.window.backlog() == 0 {
            Duration::ZERO
        } else {
            flow.progress.elapsed()
        }
    }

    /// How long the target has acknowledged nothing since the last section of memory began, whether it should or not; none
    /// before.
    pub(crate) fn quiet_at_end(&self) -> Option<Duration> {
        let ending = self.ending.get()?.elapsed();
        Some(ending.min(lock(&self.window).progress.elapsed()))
    }

    /// What the target is behind with, for people.
    pub(crate) fn behind(&self) -> String {
        let flow = lock(&self.window);
        let (unreceived, incomplete) = flow.window.behind();
        format!(
            "of QEMU's stream {unreceived} bytes have not reached its QEMU, {incomplete} bytes wait \
             there for contents, {} reads wait here for the index",
            flow.unresolved
        )
    }

    /// Ends the stream: the reader goes home, and the socket is closed, which makes a source QEMU that
    /// has not completed resume its guest, or pause its post-copy.
    pub(crate) fn close(&self) {
        lock(&self.window).closed = true;
        self.place.set_near_end(false);
        self.place.set_stopped(false);
        self.moved.notify_all();
        let sockets = [&self.socket, &self.second];
        for socket in sockets {
            if let Some(socket) = lock(socket).take() {
                let _ = socket.shutdown(std::net::Shutdown::Both);
            }
        }
    }

    pub(crate) fn count(&self, counts: PackCounts) {
        *lock(&self.counts) += counts;
    }

    /// A frame that ends at `position` carries these entries.
    pub(crate) fn carries(&self, position: u64, entries: Vec<EntryId>) {
        if !entries.is_empty() {
            lock(&self.carried).push_back((position, entries));
        }
    }

    /// Entries that have reached the target since the last call.
    pub(crate) fn take_carried(&self) -> Vec<EntryId> {
        let acked = lock(&self.window).window.acked();
        let mut carried = lock(&self.carried);
        let count = carried.partition_point(|(position, _)| *position <= acked);
        carried
            .drain(..count)
            .flat_map(|(_, entries)| entries)
            .collect()
    }

    /// Says in which of QEMU's rounds the stream is.
    pub(crate) fn set_round(&self, round: u64) {
        self.is_late_round.store(round > 1, Ordering::Relaxed);
    }

    /// Whether QEMU has sent all memory once.
    pub(crate) fn is_late_round(&self) -> bool {
        self.is_late_round.load(Ordering::Relaxed)
    }

    /// Says that the last section of memory has begun. QEMU holds its lock from then on, and may tell
    /// of the stop only when it has written everything.
    pub(crate) fn set_ending(&self) {
        let _ = self.ending.set(Instant::now());
    }

    /// Whether the last section of memory has begun.
    pub(crate) fn is_ending(&self) -> bool {
        self.ending.get().is_some()
    }

    /// Has the reader know what is known of shared frames.
    pub(crate) fn set_shared(&self, pages: SharedPages) {
        *lock(&self.shared) = (Arc::new(pages), false);
    }

    /// What has become known of shared frames since the last call.
    pub(crate) fn take_shared(&self) -> Option<Arc<SharedPages>> {
        let (pages, is_taken) = &mut *lock(&self.shared);
        (!std::mem::replace(is_taken, true)).then(|| Arc::clone(pages))
    }

    /// What is known of shared frames, and the name of a block.
    pub(crate) fn shared_in(&self, block: BlockIndex) -> Option<(Arc<SharedPages>, String)> {
        let name = lock(&self.postcopy)
            .blocks
            .get(usize::from(block.0))
            .cloned()?;
        let pages = Arc::clone(&lock(&self.shared).0);
        Some((pages, name))
    }

    pub(crate) fn count_repaired(&self, pages: u64) {
        self.repaired.fetch_add(pages, Ordering::Relaxed);
    }

    /// Pages by kind so far, and how many were repaired.
    pub(crate) fn counts(&self) -> (PackCounts, u64) {
        (*lock(&self.counts), self.repaired.load(Ordering::Relaxed))
    }

    /// The rate that QEMU should plan its switch-over with, and that of its stream.
    pub(crate) fn planning_rates(&self, limit_ms: u64) -> (u64, u64) {
        let mut flow = lock(&self.window);
        flow.window.set_near_end(self.place.is_any_near_end());
        let stream = flow.window.capable_rates().stream;
        (flow.window.planning_rate(limit_ms), stream)
    }

    /// Position, backlog, rates now, rates the path can do.
    pub(crate) fn flow(&self) -> (u64, u64, Rates, Rates) {
        let flow = lock(&self.window);
        let window = &flow.window;
        (
            window.acked() + window.backlog(),
            window.backlog(),
            window.rates(),
            window.capable_rates(),
        )
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
