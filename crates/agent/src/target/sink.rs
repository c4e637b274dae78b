//! Feeds one target QEMU: frames in, QEMU's stream out; acknowledgements back.

mod queue;

use std::collections::HashMap;
use std::io::{self, IoSlice, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crossbeam_channel::{Receiver, select_biased};
use guest::CowError;
use migrate::unpack::{Ack, Batch, Segment, UnpackError, Unpacker};
use page::{
    BlockIndex, ContentId, EntryId, FrameSharing, HostNo, PAGE_SIZE, PageBytes, PageNo, fill_byte,
};
use wire::{BackMessage, MAX_ENTRIES};

use crate::link::Buffer;

use super::contents::SessionContents;
use super::mapper::{Mapper, Wanted, spot};
use super::pressure::{Pressure, UnderPressure};
use super::returns::{Ping, Returns};
use super::session::{GuestMemory, TargetSession};

pub(super) use queue::MAX_QUEUED;
pub(crate) use queue::{SinkFrame, SinkHandle};

/// Slices of one write: the kernel's limit for one call.
const MAX_SLICES: usize = 1024;

/// How long a QEMU that is told that post-copy may follow may take to empty its memory, before pages
/// are copied: it takes milliseconds, on a host without memory perhaps a second.
const EMPTIED: Duration = Duration::from_secs(10);

/// The source hears of so many more pages that were mapped: 16 MiB.
const SAY_MAPPED: u64 = 4096;

/// Why a target QEMU was not fed to the end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SinkError {
    #[error("the target QEMU does not take its stream: {0}")]
    Write(#[from] io::Error),
    #[error("{0}")]
    Unpack(#[from] UnpackError),
    #[error("frames were dropped")]
    Dropped,
    #[error("frames came that belong to another stream")]
    Unexpected,
    #[error("it is not known which pages were mapped: {0}")]
    Mapping(#[source] CowError),
}

/// What is done once the target QEMU was given the device state of a switch to post-copy.
pub(crate) type WhenSwitched = Box<dyn FnOnce() + Send>;

/// What feeds one QEMU.
pub(crate) struct Sink {
    frames: Receiver<SinkFrame>,
    urgent: Receiver<SinkFrame>,
    queued: Arc<AtomicUsize>,
    returns: Arc<Returns>,
    when_switched: Option<WhenSwitched>,
    /// Pages that were given to QEMU since the last ping.
    given: Vec<(BlockIndex, PageNo)>,
    session: Arc<TargetSession>,
    vm: u16,
    socket: UnixStream,
    /// QEMU's second channel, for pages that it has asked for.
    preempt: Option<UnixStream>,
    memory: Option<MemorySource>,
    /// Pages of the QEMU's blocks, by name.
    blocks: Option<HashMap<String, u64>>,
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
        let (handle, frames, urgent, queued) = SinkHandle::new();
        let sink = Self {
            frames,
            urgent,
            queued,
            returns: Arc::default(),
            when_switched: None,
            given: Vec::new(),
            session: Arc::clone(session),
            vm,
            socket,
            preempt: None,
            memory: Some(memory),
            blocks: None,
            has_memory: Vec::new(),
            mapper,
            pressure: pressure.arriving(),
            mapped_said: 0,
            fills: HashMap::new(),
        };
        (sink, handle)
    }

    /// Has pages that QEMU has asked for go over its second channel. Only if nothing is mapped.
    pub(crate) fn preempt_on(&mut self, socket: UnixStream) {
        self.preempt = Some(socket);
    }

    /// Has it take no guest but one with these blocks, by name and number of pages.
    pub(crate) fn only_for(&mut self, blocks: HashMap<String, u64>) {
        self.blocks = Some(blocks);
    }

    /// What the reader of the return path shares with this.
    pub(crate) fn returns(&self) -> Arc<Returns> {
        Arc::clone(&self.returns)
    }

    /// Has something done once the target QEMU was given the device state of a switch.
    pub(crate) fn when_switched(&mut self, act: WhenSwitched) {
        self.when_switched = Some(act);
    }

    /// Feeds QEMU until the source closes the VM's stream or the session ends.
    pub(crate) fn run(mut self) -> Result<(), SinkError> {
        let mappable = self.mapper.as_ref().map(Mapper::mappable);
        let mut unpacker = match self.preempt {
            Some(_) => Unpacker::preempting(),
            None => Unpacker::mapping(mappable.unwrap_or_default()),
        };
        if let Some(blocks) = self.blocks.take() {
            unpacker = unpacker.only_for(blocks);
        }
        let fed = self.feed_all(&mut unpacker);
        // In post-copy QEMU has placed everything only when the source has heard so, and says no more. What
        // an interrupted one still gets was announced, and stays.
        if let Some(mapper) = self.mapper.as_mut().filter(|_| unpacker.has_switched()) {
            mapper.finish();
        }
        fed
    }

    fn feed_all(&mut self, unpacker: &mut Unpacker) -> Result<(), SinkError> {
        let mut batch = Batch::default();
        while let Some(frame) = self.next() {
            // What was pushed to the one queue before a frame to the other is seen before it: the end
            // of RAM does not pass a page that was sent ahead.
            while !matches!(frame, SinkFrame::Urgent(_))
                && let Ok(urgent) = self.urgent.try_recv()
            {
                self.feed(unpacker, &urgent, &mut batch)?;
            }
            if !unpacker.is_in_last_round() && !unpacker.has_switched() {
                self.wait_for_memory();
            }
            self.feed(unpacker, &frame, &mut batch)?;
        }
        Ok(())
    }

    /// The next frame; none when nobody is left who sends any.
    fn next(&self) -> Option<SinkFrame> {
        select_biased! {
            recv(self.urgent) -> frame => frame.ok(),
            recv(self.frames) -> frame => frame.ok(),
        }
    }

    fn feed(
        &mut self,
        unpacker: &mut Unpacker,
        frame: &SinkFrame,
        batch: &mut Batch<Arc<Buffer>>,
    ) -> Result<(), SinkError> {
        let left = self.queued.fetch_sub(frame.counted(), Ordering::Relaxed);
        if left > MAX_QUEUED {
            return Err(SinkError::Dropped);
        }
        batch.clear();
        let body = self.unpack(unpacker, frame, batch)?;
        if self.memory.is_some() {
            self.find_memory(unpacker);
        }
        self.share(unpacker, batch, body)?;
        if !batch.forgotten.is_empty()
            && let Some(memory) = self.session.memory(self.vm)
        {
            memory.forget(&batch.forgotten);
        }
        self.given.extend_from_slice(&batch.given);
        if let Some(Ack::OnPong { ping, reached }) = batch.ack {
            let given = std::mem::take(&mut self.given);
            self.returns.expect(Ping {
                value: ping,
                reached,
                given,
            });
        }
        if let Some(second) = self.preempt.as_mut().filter(|_| !batch.preempt.is_empty()) {
            write_batch(second, &batch.preempt, batch, body)?;
            self.returns.given(&batch.preempted);
        }
        write_batch(&mut self.socket, &batch.segments, batch, body)?;
        self.returns.given(&batch.given);
        self.tell(unpacker, batch);
        self.remember(batch, body);
        self.hurry(unpacker.last_wanted());
        if matches!(frame, SinkFrame::Hurry) {
            self.hurry(unpacker.wanted());
        }
        Ok(())
    }

    /// What is on its way, or quicker read again from the source: a guest stands still, or soon will.
    fn hurry(&self, entries: impl Iterator<Item = EntryId>) {
        let mut entries = entries.peekable();
        if let Some((rack, _)) = self.session.member(self.vm)
            && entries.peek().is_some()
        {
            rack.hurry(entries);
        }
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

    /// Says what a batch that was written means.
    fn tell(&mut self, unpacker: &Unpacker, batch: &Batch<Arc<Buffer>>) {
        // While QEMU loads its devices: every mapping is through, and the guest waits.
        let is_over = unpacker.is_past_memory() && !unpacker.has_switched();
        if let Some(mapper) = self.mapper.as_mut().filter(|_| is_over) {
            mapper.finish();
        }
        if unpacker.has_switched()
            && let Some(act) = self.when_switched.take()
        {
            act();
        }
        if let Some(Ack::OnWrite { reached }) = batch.ack {
            self.session.say(self.vm, BackMessage::Ack(reached));
        }
        for runs in batch.repair.chunks(1024) {
            self.session
                .say(self.vm, BackMessage::RepairRequest(runs.to_vec()));
        }
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
            SinkFrame::Urgent(body) => {
                let mut contents = SessionContents {
                    session: &self.session,
                    vm: self.vm,
                    pool: None,
                };
                let asked = |block, page| self.returns.is_asked(block, page);
                unpacker.apply_urgent(body, asked, &mut contents, batch)?;
                Ok(body)
            }
            SinkFrame::Relay(_) => Err(SinkError::Unexpected),
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
            SinkFrame::Hurry => Ok(&[]),
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
        self.returns.set_blocks(names.clone());
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
        if !batch.expected.is_empty() {
            let pages = batch.expected.iter().map(|page| {
                let place = (page.block, page.page, page.sharing);
                (page.entry, place, &batch.segments[page.segment])
            });
            // A page that was sent ahead may have become zero since its frame was looked at.
            let pages = pages.filter(|(_, _, segment)| {
                let bytes = bytes_of(segment, batch, body).try_into();
                bytes.is_ok_and(|bytes: &PageBytes| fill_byte(bytes) != Some(0))
            });
            mapper.expect(&wanted(
                &self.session,
                &mut self.fills,
                pages,
                (batch, body),
            ));
        }
        if !batch.shared.is_empty() {
            let pages = batch.shared.iter().map(|page| {
                let place = (page.block, page.page, page.sharing);
                (page.entry, place, &page.bytes)
            });
            let wanted = wanted(&self.session, &mut self.fills, pages, (batch, body));
            let is_empty = unpacker.maps_after().is_none() || self.returns.wait_answer(EMPTIED);
            let is_mapped = if is_empty {
                mapper.map(&wanted).map_err(SinkError::Mapping)?
            } else {
                vec![false; wanted.len()]
            };
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

/// A page of a batch that is to be mapped: the entry of its content, where it is and how it shares, and
/// its bytes.
type ToMap<'a> = (
    Option<EntryId>,
    (BlockIndex, PageNo, FrameSharing),
    &'a Segment<Arc<Buffer>>,
);

/// Pages of a batch that are to be mapped, with the ids of their contents.
fn wanted<'a>(
    session: &TargetSession,
    fills: &mut HashMap<u8, ContentId>,
    pages: impl Iterator<Item = ToMap<'a>>,
    (batch, body): (&'a Batch<Arc<Buffer>>, &'a [u8]),
) -> Vec<Wanted<'a>> {
    let pages = pages.filter_map(|(entry, (block, page, sharing), segment)| {
        let bytes = bytes_of(segment, batch, body);
        let bytes: &PageBytes = bytes.try_into().ok()?;
        // What somebody else could map must be hashed here: the source's word is not enough.
        let fill = match entry {
            None => fill_byte(bytes),
            Some(_) => None,
        };
        let content = match fill {
            Some(byte) => {
                let id = fills.entry(byte);
                *id.or_insert_with(|| session.key.id_of(bytes))
            }
            None => session.key.id_of(bytes),
        };
        Some(Wanted {
            block,
            page,
            content,
            bytes,
            spot: spot(session.number, (sharing, page), fill),
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

/// Writes segments of a batch.
fn write_batch(
    socket: &mut UnixStream,
    segments: &[Segment<Arc<Buffer>>],
    batch: &Batch<Arc<Buffer>>,
    body: &[u8],
) -> io::Result<()> {
    let mut slices = Vec::with_capacity(segments.len().min(MAX_SLICES));
    for chunk in segments.chunks(MAX_SLICES) {
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
