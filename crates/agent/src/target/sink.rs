//! Feeds one target QEMU: frames in, QEMU's stream out; acknowledgements back.

use std::collections::{HashMap, VecDeque};
use std::io::{self, IoSlice, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use crossbeam_channel::{Receiver, Sender, unbounded};
use guest::CowError;
use migrate::unpack::{Ack, Arrived, Batch, Segment, UnpackError, Unpacker};
use page::{BlockIndex, ContentId, EntryId, HostNo, PAGE_SIZE, PageBytes, PageNo};
use qstream::{ReturnDecoder, ReturnMessage, ReturnStep};
use wire::{BackMessage, MAX_ENTRIES, Reached};

use crate::link::Buffer;

use super::contents::SessionContents;
use super::mapper::{Mapper, Wanted, spot};
use super::pressure::{Pressure, UnderPressure};
use super::session::{GuestMemory, TargetSession, lock};

/// Most bytes that wait for one QEMU. The source's window keeps far below it (8 MiB of QEMU's
/// stream, and repairs); beyond it the source is not honest, and the VM's move fails.
const MAX_QUEUED: usize = 128 << 20;

/// Slices of one write: the kernel's limit for one call.
const MAX_SLICES: usize = 1024;

/// The source hears of so many more pages that were mapped: 16 MiB.
const SAY_MAPPED: u64 = 4096;

/// What comes for one VM.
pub(crate) enum SinkFrame {
    /// From its source.
    Frame { body: Arc<Buffer>, is_repair: bool },
    /// Contents that it waits for.
    Arrived(Vec<Arrived<Arc<Buffer>>>),
    /// Contents that it waits for in vain.
    NotComing {
        carrier: HostNo,
        entries: Vec<EntryId>,
    },
}

impl SinkFrame {
    /// Bytes that count against the queue's limit: contents are bounded by the pages that wait.
    fn counted(&self) -> usize {
        match self {
            Self::Frame { body, .. } => body.len(),
            Self::Arrived(_) | Self::NotComing { .. } => 0,
        }
    }
}

/// The receiver's end of a sink.
#[derive(Clone)]
pub(crate) struct SinkHandle {
    frames: Sender<SinkFrame>,
    queued: Arc<AtomicUsize>,
}

impl SinkHandle {
    /// Of no QEMU: what comes is for a test.
    #[cfg(test)]
    pub(crate) fn alone() -> (Self, Receiver<SinkFrame>) {
        let (frames, receiver) = unbounded();
        let queued = Arc::default();
        (Self { frames, queued }, receiver)
    }

    /// The queue is bounded in bytes: above the limit frames are dropped, and the sink fails on
    /// the gap that they leave.
    pub(crate) fn push(&self, frame: SinkFrame) {
        let len = frame.counted();
        if self.queued.fetch_add(len, Ordering::Relaxed) + len > MAX_QUEUED {
            tracing::error!("a source sends faster than its window allows; its VM's move fails");
            return;
        }
        let _ = self.frames.send(frame);
    }
}

/// Why a target QEMU was not fed to the end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SinkError {
    #[error("the target QEMU does not take its stream: {0}")]
    Write(#[from] io::Error),
    #[error("{0}")]
    Unpack(#[from] UnpackError),
    #[error("frames were dropped")]
    Dropped,
    #[error("it is not known which pages were mapped: {0}")]
    Mapping(#[source] CowError),
}

/// Pings on their way, with how far the stream is once they are answered.
type Pings = Arc<Mutex<VecDeque<(u32, Reached)>>>;

/// What feeds one QEMU.
pub(crate) struct Sink {
    frames: Receiver<SinkFrame>,
    queued: Arc<AtomicUsize>,
    pings: Pings,
    session: Arc<TargetSession>,
    vm: u16,
    socket: UnixStream,
    memory: Option<MemorySource>,
    /// Blocks whose contents can be found again, by index.
    has_memory: Vec<bool>,
    /// Maps pages that are shared.
    mapper: Option<Mapper>,
    pressure: UnderPressure,
    /// Mapped pages that the source was told of.
    mapped_said: u64,
    /// Ids of fill pages, by their byte.
    fills: HashMap<u8, ContentId>,
}

/// Finds the guest's memory once the block list is known.
pub(crate) type MemorySource = Box<dyn FnOnce(&[String]) -> Option<GuestMemory> + Send>;

impl Sink {
    pub(crate) fn new(
        session: &Arc<TargetSession>,
        vm: u16,
        socket: UnixStream,
        (memory, mapper): (MemorySource, Option<Mapper>),
        pressure: &Arc<Pressure>,
    ) -> (Self, SinkHandle) {
        let (sender, frames) = unbounded();
        let queued = Arc::new(AtomicUsize::new(0));
        let handle = SinkHandle {
            frames: sender,
            queued: Arc::clone(&queued),
        };
        let pings = Pings::default();
        let sink = Self {
            frames,
            queued,
            pings,
            session: Arc::clone(session),
            vm,
            socket,
            memory: Some(memory),
            has_memory: Vec::new(),
            mapper,
            pressure: pressure.arriving(),
            mapped_said: 0,
            fills: HashMap::new(),
        };
        (sink, handle)
    }

    pub(crate) fn pings(&self) -> Pings {
        Arc::clone(&self.pings)
    }

    /// Feeds QEMU until the source closes the VM's stream or the session ends.
    pub(crate) fn run(mut self) -> Result<(), SinkError> {
        let mappable = self.mapper.as_ref().map(Mapper::mappable);
        let mut unpacker = Unpacker::mapping(mappable.unwrap_or_default());
        let mut batch = Batch::default();
        while let Ok(frame) = self.frames.recv() {
            let left = self.queued.fetch_sub(frame.counted(), Ordering::Relaxed);
            if left > MAX_QUEUED {
                return Err(SinkError::Dropped);
            }
            if !unpacker.is_in_last_round() {
                self.wait_for_memory();
            }
            batch.clear();
            let body = self.unpack(&mut unpacker, &frame, &mut batch)?;
            if self.memory.is_some() {
                self.find_memory(&unpacker);
            }
            self.share(&mut unpacker, &mut batch, body)?;
            if let Some(Ack::OnPong { ping, reached }) = batch.ack {
                lock(&self.pings).push_back((ping, reached));
            }
            write_batch(&mut self.socket, &batch, body)?;
            // While QEMU loads its devices: every mapping is through, and the guest waits.
            if let Some(mapper) = self.mapper.as_mut().filter(|_| unpacker.is_past_memory()) {
                mapper.finish();
            }
            if let Some(Ack::OnWrite { reached }) = batch.ack {
                self.session.say(self.vm, BackMessage::Ack(reached));
            }
            for runs in batch.repair.chunks(1024) {
                self.session
                    .say(self.vm, BackMessage::RepairRequest(runs.to_vec()));
            }
            self.remember(&batch, body);
            if let Some((rack, _)) = self.session.member(self.vm) {
                let mut last = unpacker.last_wanted().peekable();
                if last.peek().is_some() {
                    rack.hurry(last);
                }
            }
        }
        Ok(())
    }

    /// Waits a little if memory is scarce: what is not acknowledged slows the source.
    fn wait_for_memory(&mut self) {
        let Some((pause, note)) = self.pressure.pause() else {
            return;
        };
        if let Some(note) = note {
            self.session.say(self.vm, BackMessage::Note(note));
        }
        std::thread::sleep(pause);
    }

    /// Turns what came into a batch; returns the body that the batch refers to.
    fn unpack<'a>(
        &self,
        unpacker: &mut Unpacker,
        frame: &'a SinkFrame,
        batch: &mut Batch<Arc<Buffer>>,
    ) -> Result<&'a [u8], SinkError> {
        match frame {
            SinkFrame::Frame { body, is_repair } => {
                let mut contents = SessionContents {
                    session: &self.session,
                    vm: self.vm,
                    pool: self.mapper.as_ref().map(|mapper| &*mapper.pool),
                };
                unpacker.apply(body, *is_repair, &mut contents, batch)?;
                Ok(body)
            }
            SinkFrame::Arrived(contents) => {
                unpacker.arrived(contents.iter().cloned(), batch);
                Ok(&[])
            }
            SinkFrame::NotComing { carrier, entries } => {
                unpacker.not_coming(entries, batch);
                for lost in losses(*carrier, entries) {
                    self.session.say(self.vm, lost);
                }
                Ok(&[])
            }
        }
    }

    /// Once the block list is known, so is where the guest's memory is.
    fn find_memory(&mut self, unpacker: &Unpacker) {
        let Some(blocks) = unpacker.blocks() else {
            return;
        };
        let Some(find) = self.memory.take() else {
            return;
        };
        let names: Vec<String> = blocks
            .iter()
            .map(|(_, block)| block.name.to_string())
            .collect();
        if let Some(mapper) = &mut self.mapper {
            mapper.learn_blocks(blocks);
        }
        if let Some(memory) = find(&names) {
            self.has_memory = memory.bases.iter().map(Option::is_some).collect();
            self.session.add_memory(self.vm, memory);
        }
    }

    /// Maps the pages of a batch that are shared, before any of it is written. Device state comes only
    /// when all are through.
    fn share(
        &mut self,
        unpacker: &mut Unpacker,
        batch: &mut Batch<Arc<Buffer>>,
        body: &[u8],
    ) -> Result<(), SinkError> {
        let Some(mut mapper) = self.mapper.take() else {
            return Ok(());
        };
        if !batch.shared.is_empty() {
            let wanted = wanted(&self.session, &mut self.fills, batch, body);
            let is_mapped = mapper.map(&wanted).map_err(SinkError::Mapping)?;
            let pages = batch.shared.iter().zip(&wanted);
            let entries = pages.filter(|(_, wanted)| self.is_findable(wanted.block));
            let placed = entries.filter_map(|(shared, wanted)| {
                let id = Some(wanted.content);
                Some((shared.entry?, id, wanted.block, wanted.page))
            });
            let placed: Vec<_> = placed.collect();
            self.place(&placed);
            unpacker.shared_done(&is_mapped, batch);
        }
        for note in mapper.take_notes() {
            self.session.say(self.vm, BackMessage::Note(note));
        }
        let pages = mapper.mapped();
        let is_over = unpacker.is_past_memory();
        self.mapper = Some(mapper);
        if pages >= self.mapped_said + SAY_MAPPED || (is_over && pages > self.mapped_said) {
            self.mapped_said = pages;
            self.session.say(self.vm, BackMessage::Mapped { pages });
        }
        Ok(())
    }

    /// Remembers where the batch put contents. Literals are hashed here, by this VM's thread;
    /// a reference moves its entry to the newer place.
    fn remember(&self, batch: &Batch<Arc<Buffer>>, body: &[u8]) {
        let placed = batch.placed.iter().filter(|p| self.is_findable(p.block));
        let placed: Vec<_> = placed
            .map(|p| {
                let bytes = p.literal_at.and_then(|at| body.get(at..at + PAGE_SIZE));
                let bytes: Option<&PageBytes> = bytes.and_then(|bytes| bytes.try_into().ok());
                let id = bytes.map(|bytes| self.session.key.id_of(bytes));
                (p.entry, id, p.block, p.page)
            })
            .collect();
        self.place(&placed);
    }

    /// Whether contents of the block can be read again.
    fn is_findable(&self, block: BlockIndex) -> bool {
        let has_memory = self.has_memory.get(usize::from(block.0));
        has_memory.copied().unwrap_or(false)
    }

    fn place(&self, placed: &[(EntryId, Option<ContentId>, BlockIndex, PageNo)]) {
        if placed.is_empty() {
            return;
        }
        let local = placed.iter().filter(|(entry, ..)| entry.is_local());
        self.session.place(self.vm, local.copied());
        if let Some((rack, number)) = self.session.member(self.vm) {
            let of_rack = placed.iter().filter(|(entry, ..)| !entry.is_local());
            rack.place(number, of_rack.copied());
        }
    }
}

/// What is said of entries that do not come. A carrier that is gone can owe many.
fn losses(carrier: HostNo, entries: &[EntryId]) -> impl Iterator<Item = BackMessage> {
    let lost = move |entries: &[EntryId]| BackMessage::Lost {
        carrier,
        entries: entries.to_vec(),
    };
    entries.chunks(MAX_ENTRIES).map(lost)
}

/// The pages of a batch that are to be mapped, with the ids of their contents.
fn wanted<'a>(
    session: &TargetSession,
    fills: &mut HashMap<u8, ContentId>,
    batch: &'a Batch<Arc<Buffer>>,
    body: &'a [u8],
) -> Vec<Wanted<'a>> {
    let pages = batch.shared.iter().filter_map(|shared| {
        let bytes = bytes_of(&shared.bytes, batch, body);
        let bytes: &PageBytes = bytes.try_into().ok()?;
        // What somebody else could map must be hashed here: the source's word is not enough.
        let (content, fill) = match shared.entry {
            None => {
                let id = fills.entry(bytes[0]);
                (
                    *id.or_insert_with(|| session.key.id_of(bytes)),
                    Some(bytes[0]),
                )
            }
            Some(_) => (session.key.id_of(bytes), None),
        };
        Some(Wanted {
            block: shared.block,
            page: shared.page,
            content,
            bytes,
            spot: spot(session.number, shared, fill),
        })
    });
    pages.collect()
}

fn bytes_of<'a>(
    segment: &'a Segment<Arc<Buffer>>,
    batch: &'a Batch<Arc<Buffer>>,
    body: &'a [u8],
) -> &'a [u8] {
    match segment {
        Segment::Head(range) => &batch.head[range.clone()],
        Segment::Own(at) => &body[*at..*at + PAGE_SIZE],
        Segment::Held(held, at) => &held[*at..*at + PAGE_SIZE],
        Segment::Scratch(at) => &batch.scratch[*at..*at + PAGE_SIZE],
    }
}

fn write_batch(socket: &mut UnixStream, batch: &Batch<Arc<Buffer>>, body: &[u8]) -> io::Result<()> {
    let mut slices = Vec::with_capacity(batch.segments.len().min(MAX_SLICES));
    for chunk in batch.segments.chunks(MAX_SLICES) {
        slices.clear();
        slices.extend(
            chunk
                .iter()
                .map(|segment| IoSlice::new(bytes_of(segment, batch, body))),
        );
        let mut rest = slices.as_mut_slice();
        while !rest.is_empty() {
            match socket.write_vectored(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => IoSlice::advance_slices(&mut rest, n),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

/// How a target QEMU's return path ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ReturnEnd {
    /// It said whether it has loaded everything.
    Shut(u32),
    /// It closed without a word.
    Closed,
    /// It said what it should not.
    Broken(String),
}

/// Reads a target QEMU's return path to its end; own pongs become acknowledgements.
pub(crate) fn read_return_path(
    mut socket: UnixStream,
    session: &TargetSession,
    vm: u16,
    pings: &Pings,
) -> ReturnEnd {
    let mut decoder = ReturnDecoder::new();
    let (mut buffer, mut filled) = (vec![0; 4096], 0);
    loop {
        match socket.read(&mut buffer[filled..]) {
            Ok(0) => return ReturnEnd::Closed,
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return ReturnEnd::Closed,
        }
        let mut at = 0;
        while at < filled {
            match decoder.decode(&buffer[at..filled]) {
                Err(error) => return ReturnEnd::Broken(error.to_string()),
                Ok(ReturnStep::NeedMore { at_least }) => {
                    if at_least > buffer.len() {
                        buffer.resize(at_least, 0);
                    }
                    break;
                }
                Ok(ReturnStep::Message {
                    message: ReturnMessage::Shut(status),
                    ..
                }) => return ReturnEnd::Shut(status),
                Ok(ReturnStep::Message { message, raw }) => {
                    at += raw.len();
                    match message {
                        ReturnMessage::Pong(value) if Unpacker::is_our_ping(value) => {
                            acknowledge(session, vm, pings, value)
                        }
                        _ => session.say(vm, BackMessage::ReturnPath(raw.to_vec())),
                    }
                }
            }
        }
        buffer.copy_within(at..filled, 0);
        filled -= at;
    }
}

fn acknowledge(session: &TargetSession, vm: u16, pings: &Pings, value: u32) {
    let mut pings = lock(pings);
    let mut answered = None;
    while let Some((ping, reached)) = pings.front().copied() {
        pings.pop_front();
        answered = Some(reached);
        if ping == value {
            break;
        }
    }
    drop(pings);
    if let Some(reached) = answered {
        session.say(vm, BackMessage::Ack(reached));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn however_much_a_carrier_owes_each_message_about_it_can_be_read() {
        let entries: Vec<_> = (0..2000).map(|n| EntryId(n * 3)).collect();
        let mut heard = Vec::new();
        for message in losses(HostNo(2), &entries) {
            let mut body = Vec::new();
            message.encode(&mut body);
            match BackMessage::decode(&body) {
                Ok(BackMessage::Lost { carrier, entries }) => {
                    assert_eq!(carrier, HostNo(2));
                    heard.extend(entries);
                }
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(heard, entries);
    }
}
