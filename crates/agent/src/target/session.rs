//! What the VMs of one session share at the target.

use std::collections::HashMap;
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use content::{Place, Places, Recent};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use page::{
    BlockIndex, ContentId, ContentKey, EntryId, HostAddr, PAGE_SIZE, PageBytes, PageNo, PageRun,
};
use sys::ProcessMemory;
use wire::{BackMessage, FrameHeader, FrameKind};

use crate::link::{Buffer, Decompressor, Link, LinkError, Pool};

use super::rack::RackStore;
use super::sink::SinkHandle;
use super::turns::Turns;

/// How often the back connection says that it lives.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// Acknowledgements are sent no more often than this: each takes a packet, and 100 bytes of the path back.
const ACK_PAUSE: Duration = Duration::from_millis(2);

/// Most messages that are sent in one go.
const GATHERED: usize = 64;

/// Messages that wait for the back connection. Acknowledgements are a few a second and VM; a
/// connection that is this far behind is as good as dead.
const BACK_QUEUE: usize = 4096;

/// Size of the buffers that go round: a source's read buffer with its operations. Longer
/// frames, which are rare, get a buffer of their own.
const BODY: usize = 320 << 10;

/// Number of the next session; 0 is none.
static NEXT: AtomicU64 = AtomicU64::new(1);

/// A message about the VM of this number.
type ToSource = (u16, BackMessage);

/// A VM's memory as other VMs of its session can read it.
pub(crate) struct GuestMemory {
    pub(crate) memory: ProcessMemory,
    /// Address of each block, by the stream's index; absent if QEMU does not tell it.
    pub(crate) bases: Vec<Option<HostAddr>>,
    /// Pages that its QEMU does not have, in post-copy: who reads one waits until it is there, and may
    /// be the one who is to bring it. Held while memory is read.
    missing: RwLock<Missing>,
}

/// Pages that are missing: by block index a bit for each page, as far as one was missing. Blocks are as long as
/// the stream says, which is checked before pages of them are forgotten: 2 MiB for 64 GiB.
#[derive(Default)]
struct Missing(Vec<Vec<u64>>);

impl Missing {
    fn add(&mut self, block: BlockIndex, run: PageRun) {
        let block = usize::from(block.0);
        let end = run.end().map_or(0, |end| end.div_ceil(u64::BITS) as usize);
        if self.0.len() <= block {
            self.0.resize_with(block + 1, Vec::new);
        }
        let words = &mut self.0[block];
        if words.len() < end {
            words.resize(end, 0);
        }
        for page in run.pages() {
            if let Some(word) = words.get_mut(word_of(page)) {
                *word |= bit_of(page);
            }
        }
    }

    fn remove(&mut self, (block, page): (BlockIndex, PageNo)) {
        let words = self.0.get_mut(usize::from(block.0));
        if let Some(word) = words.and_then(|words| words.get_mut(word_of(page))) {
            *word &= !bit_of(page);
        }
    }

    fn has(&self, block: BlockIndex, page: PageNo) -> bool {
        let words = self.0.get(usize::from(block.0));
        let word = words.and_then(|words| words.get(word_of(page)));
        word.is_some_and(|word| word & bit_of(page) != 0)
    }
}

fn word_of(page: PageNo) -> usize {
    (page.0 / u64::BITS) as usize
}

fn bit_of(page: PageNo) -> u64 {
    1 << (page.0 % u64::BITS)
}

/// One session, for as long as one of its connections or VMs is there.
pub(crate) struct TargetSession {
    /// Tells the files of its source host from those of others.
    pub(crate) number: u64,
    pub(crate) key: ContentKey,
    pub(crate) places: Mutex<Places>,
    pub(crate) recent: Mutex<Recent<Arc<Buffer>>>,
    /// What is shared with the other target hosts of the group.
    pub(crate) rack: Option<Arc<RackStore>>,
    memories: Mutex<HashMap<u16, Arc<GuestMemory>>>,
    sinks: Mutex<HashMap<u16, SinkHandle>>,
    /// Numbers of the VMs in the rack's store.
    members: Mutex<HashMap<u16, u16>>,
    back: (Sender<ToSource>, Receiver<ToSource>),
    over: AtomicBool,
    /// In what order frames are taken, whatever connection brings them.
    pub(crate) turns: Turns,
    /// Buffers for the frames of all connections.
    pub(crate) bodies: Arc<Pool>,
    /// The connections that bring frames.
    sockets: Mutex<Vec<TcpStream>>,
}

impl TargetSession {
    pub(crate) fn new(
        key: ContentKey,
        store_bytes: usize,
        rack: Option<Arc<RackStore>>,
        unpacker: Option<Decompressor>,
    ) -> Self {
        Self {
            number: NEXT.fetch_add(1, Ordering::Relaxed),
            key,
            places: Mutex::default(),
            recent: Mutex::new(Recent::with_limit(store_bytes)),
            rack,
            memories: Mutex::default(),
            sinks: Mutex::default(),
            members: Mutex::default(),
            back: bounded(BACK_QUEUE),
            over: AtomicBool::new(false),
            turns: Turns::new(unpacker),
            bodies: Pool::new(BODY),
            sockets: Mutex::default(),
        }
    }

    /// Queues a message for the source. A queue that is full is a session that is dead.
    pub(crate) fn say(&self, vm: u16, message: BackMessage) {
        if self.back.0.try_send((vm, message)).is_err() {
            self.end();
        }
    }

    pub(crate) fn add_sink(&self, vm: u16, sink: SinkHandle) {
        if let Some(number) = self.rack.as_ref().and_then(|rack| rack.add(sink.clone())) {
            lock(&self.members).insert(vm, number);
        }
        lock(&self.sinks).insert(vm, sink);
    }

    /// The VM's number in the rack's store.
    pub(crate) fn member(&self, vm: u16) -> Option<(&Arc<RackStore>, u16)> {
        let number = lock(&self.members).get(&vm).copied()?;
        Some((self.rack.as_ref()?, number))
    }

    pub(crate) fn sink(&self, vm: u16) -> Option<SinkHandle> {
        lock(&self.sinks).get(&vm).cloned()
    }

    pub(crate) fn remove_sink(&self, vm: u16) {
        if let Some((rack, number)) = self.member(vm) {
            rack.remove(number);
        }
        lock(&self.sinks).remove(&vm);
    }

    pub(crate) fn add_memory(&self, vm: u16, memory: GuestMemory) {
        let memory = Arc::new(memory);
        if let Some((rack, number)) = self.member(vm) {
            rack.add_memory(number, Arc::clone(&memory));
        }
        lock(&self.memories).insert(vm, memory);
    }

    pub(crate) fn memory(&self, vm: u16) -> Option<Arc<GuestMemory>> {
        lock(&self.memories).get(&vm).cloned()
    }

    /// Remembers where contents are now; without an id those that are known already. The newest
    /// place is the likeliest to last.
    pub(crate) fn place(
        &self,
        vm: u16,
        placed: impl Iterator<Item = (EntryId, Option<ContentId>, BlockIndex, page::PageNo)>,
    ) {
        let mut places = lock(&self.places);
        for (entry, id, block, page) in placed {
            if let Some(id) = id.or_else(|| places.id(entry)) {
                places.put(entry, id, Place { vm, block, page });
            }
        }
    }

    /// Cuts this connection when the session ends.
    pub(crate) fn cut_at_end(&self, socket: TcpStream) {
        let mut sockets = lock(&self.sockets);
        if self.is_over() {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        } else {
            sockets.push(socket);
        }
    }

    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// Ends the session: the connections that bring frames are cut, sinks go home when they have
    /// nothing left to do.
    pub(crate) fn end(&self) {
        if self.over.swap(true, Ordering::AcqRel) {
            return;
        }
        for socket in std::mem::take(&mut *lock(&self.sockets)) {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
        let sinks = std::mem::take(&mut *lock(&self.sinks));
        if let Some(rack) = &self.rack {
            for vm in sinks.keys() {
                if let Some((_, number)) = self.member(*vm) {
                    rack.remove(number);
                }
            }
            rack.leave();
        }
    }

    /// The thread that owns the back connection; returns when the session is over.
    pub(crate) fn answer(&self, mut link: Link) -> Result<(), LinkError> {
        let (mut body, mut frames) = (Vec::new(), Vec::new());
        let mut acknowledged = Instant::now();
        while !self.is_over() {
            let gathered = match self.back.1.recv_timeout(HEARTBEAT) {
                Ok(first) => gather(first, &self.back.1, acknowledged + ACK_PAUSE),
                Err(RecvTimeoutError::Timeout) => Vec::new(),
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            };
            frames.clear();
            if gathered.is_empty() {
                let heartbeat = FrameHeader::new(FrameKind::BackHeartbeat, 0, 0, 0);
                frames.extend_from_slice(&heartbeat.to_bytes());
            }
            for (vm, message) in &gathered {
                body.clear();
                message.encode(&mut body);
                let len = u32::try_from(body.len()).unwrap_or(u32::MAX);
                let header = FrameHeader::new(FrameKind::Back, *vm, len, len);
                frames.extend_from_slice(&header.to_bytes());
                frames.extend_from_slice(&body);
            }
            link.write_all(&frames)?;
            if gathered.iter().any(is_ack) {
                acknowledged = Instant::now();
            }
        }
        Ok(())
    }

    /// Reads contents from guests' memory into `out`, one page each, and checks them; says for
    /// each whether it is what its id says.
    pub(crate) fn read_checked(&self, wanted: &[(ContentId, Place)], out: &mut [u8]) -> Vec<bool> {
        read_checked(&self.key, |vm| self.memory(vm), wanted, out)
    }
}

fn is_ack((_, message): &ToSource) -> bool {
    matches!(message, BackMessage::Ack(_))
}

/// What is sent in one go: what waits, and as long as it is acknowledgements only, what comes until `due`. Of
/// those about one VM the last says what the others say.
fn gather(first: ToSource, queue: &Receiver<ToSource>, due: Instant) -> Vec<ToSource> {
    let mut gathered = vec![first];
    while gathered.len() < GATHERED {
        let next = match gathered.iter().all(is_ack) {
            true => queue.recv_deadline(due).ok(),
            false => queue.try_recv().ok(),
        };
        let Some(next) = next else { break };
        if is_ack(&next) {
            gathered.retain(|earlier| !(is_ack(earlier) && earlier.0 == next.0));
        }
        gathered.push(next);
    }
    gathered
}

/// Reads the contents of places in guests' memory, which `memory` gives by their VMs' numbers.
pub(crate) fn read_checked(
    key: &ContentKey,
    memory: impl Fn(u16) -> Option<Arc<GuestMemory>>,
    wanted: &[(ContentId, Place)],
    out: &mut [u8],
) -> Vec<bool> {
    let mut good = vec![false; wanted.len()];
    let mut start = 0;
    // Neighbours are usually of one VM: read them in one go.
    for of_one in wanted.chunk_by(|a, b| a.1.vm == b.1.vm) {
        let end = start + of_one.len();
        if let Some(guest) = memory(of_one[0].1.vm) {
            let out = &mut out[start * PAGE_SIZE..end * PAGE_SIZE];
            guest.read_checked(key, of_one, out, &mut good[start..end]);
        }
        start = end;
    }
    good
}

impl GuestMemory {
    pub(crate) fn new(memory: ProcessMemory, bases: Vec<Option<HostAddr>>) -> Self {
        Self {
            memory,
            bases,
            missing: RwLock::default(),
        }
    }

    /// QEMU is about to forget these pages.
    pub(crate) fn forget(&self, runs: &[(BlockIndex, PageRun)]) {
        let mut missing = self.missing.write().unwrap_or_else(PoisonError::into_inner);
        for (block, run) in runs {
            missing.add(*block, *run);
        }
    }

    /// QEMU has these pages.
    pub(crate) fn has(&self, pages: &[(BlockIndex, PageNo)]) {
        let mut missing = self.missing.write().unwrap_or_else(PoisonError::into_inner);
        for page in pages {
            missing.remove(*page);
        }
    }

    fn read_checked(
        &self,
        key: &ContentKey,
        wanted: &[(ContentId, Place)],
        out: &mut [u8],
        good: &mut [bool],
    ) {
        let address = |place: &Place| {
            let base = self
                .bases
                .get(usize::from(place.block.0))
                .copied()
                .flatten()?;
            base.of_page(place.page)
        };
        let missing = self.missing.read().unwrap_or_else(PoisonError::into_inner);
        let is_there = |place: &Place| !missing.has(place.block, place.page);
        let mut start = 0;
        // All of one VM have an address or none: places are made only of blocks that have one.
        for there in wanted.chunk_by(|a, b| is_there(&a.1) == is_there(&b.1)) {
            let end = start + there.len();
            let (out, good) = (
                &mut out[start * PAGE_SIZE..end * PAGE_SIZE],
                &mut good[start..end],
            );
            start = end;
            if !is_there(&there[0].1) {
                continue;
            }
            let addresses: Vec<HostAddr> = there
                .iter()
                .map_while(|(_, place)| address(place))
                .collect();
            let read = self
                .memory
                .read_pages(&addresses, &mut out[..addresses.len() * PAGE_SIZE])
                .unwrap_or(0);
            let pages = out.as_chunks::<PAGE_SIZE>().0.iter();
            for ((bytes, (id, _)), good) in pages.zip(there).zip(good).take(read) {
                let bytes: &PageBytes = bytes;
                *good = key.id_of(bytes) == *id;
            }
        }
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::Reached;

    #[test]
    fn what_a_qemu_has_forgotten_is_missing_until_it_has_it_again_and_takes_a_bit_a_page() {
        let mut missing = Missing::default();
        let (ram, other) = (BlockIndex(2), BlockIndex(0));
        let run = PageRun {
            start: PageNo(60),
            count: 70,
        };
        missing.add(ram, run);
        let is_in = |missing: &Missing, page| missing.has(ram, PageNo(page));
        assert!(is_in(&missing, 60) && is_in(&missing, 64) && is_in(&missing, 129));
        assert!(!is_in(&missing, 59) && !is_in(&missing, 130) && !is_in(&missing, 1 << 31));
        assert!(!missing.has(other, PageNo(60)));
        missing.remove((ram, PageNo(64)));
        missing.remove((BlockIndex(9), PageNo(1)));
        assert!(!is_in(&missing, 64) && is_in(&missing, 65));
        let whole = PageRun {
            start: PageNo(0),
            count: 1 << 20,
        };
        missing.add(ram, whole);
        assert_eq!(missing.0[2].len(), (1 << 20) / 64);
    }

    fn ack(vm: u16, position: u64) -> ToSource {
        let (received, complete) = (position, position);
        (vm, BackMessage::Ack(Reached { received, complete }))
    }

    #[test]
    fn of_many_acknowledgements_of_a_vm_the_last_goes_and_nothing_else_is_left_out_or_waits() {
        let (sender, queue) = bounded(16);
        let asks = |page| (1, BackMessage::ReturnPath(vec![page]));
        for message in [ack(2, 7), ack(1, 20), asks(1), ack(1, 30), asks(2)] {
            sender.send(message).unwrap();
        }
        let far = Instant::now() + Duration::from_secs(3600);
        let gathered = gather(ack(1, 10), &queue, far);
        assert_eq!(gathered, [ack(2, 7), asks(1), ack(1, 30), asks(2)]);
    }

    #[test]
    fn acknowledgements_alone_wait_until_they_are_due_and_no_longer() {
        let (sender, queue) = bounded(16);
        let since = Instant::now();
        assert_eq!(gather(ack(1, 10), &queue, since), [ack(1, 10)]);
        sender.send(ack(1, 20)).unwrap();
        let due = Instant::now() + Duration::from_millis(20);
        assert_eq!(gather(ack(1, 10), &queue, due), [ack(1, 20)]);
        assert!(Instant::now() >= due);
    }
}
