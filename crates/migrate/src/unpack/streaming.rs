//! One VM's stream from its block list on.

use std::collections::HashMap;
use std::sync::Arc;

use page::{BlockIndex, EntryId, FrameSharing, PAGE_SIZE, PageNo, PageRun};
use qstream::{BlockList, Command, Decoder, Encoder, Item, PreemptEncoder, Step, encode_command};
use wire::Remote;

use super::batch::{Ack, Batch, Contents, Found, Placed, Segment};
use super::mapping::{ExpectedPage, SharedPage, Untouched};
use super::owed::Owed;
use super::waiting::{Cause, Version, Waiting};
use super::{MAX_HELD_TAIL, MAX_WAITING, OUR_PING, UnpackError};

pub(super) struct Streaming {
    pub(super) encoder: Encoder,
    /// Of the second channel, until its end.
    pub(super) preempt: Option<PreemptEncoder>,
    pub(super) blocks: Arc<BlockList>,
    /// Checks what is forwarded between sections.
    pub(super) decoder: Decoder,
    pub(super) waiting: Waiting,
    pub(super) untouched: Untouched,
    pub(super) phase: Phase,
    /// Once a switch to post-copy has begun.
    pub(super) owed: Option<Owed>,
    /// Whether the target QEMU empties its memory, and when it has.
    pub(super) emptied: Emptied,
}

/// A QEMU that is told that post-copy may follow empties its memory, when it gets to that: nothing is
/// mapped before.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Emptied {
    /// It does not.
    Never,
    /// It may not even have been told.
    NotYet,
    /// It has, once it answers this ping.
    Before(u32),
}

/// Where a frame's pages come from, and how new they are as a position of the source QEMU's
/// stream.
#[derive(Clone, Copy)]
pub(super) enum Origin {
    /// From the stream, which stands at `position` after this frame.
    Stream { position: u64 },
    /// Read again from the source QEMU's memory, when the stream had been read up to `as_of`.
    Memory { as_of: u64 },
}

/// What the operations of one frame are applied with.
pub(super) struct Frame {
    pub(super) origin: Origin,
    pub(super) block: BlockIndex,
    /// How the pages share their frames at the source.
    pub(super) sharing: FrameSharing,
    pub(super) bytes: PageCursor,
}

impl Frame {
    /// Which version its pages have.
    pub(super) fn version(&self) -> Version {
        let position = match self.origin {
            Origin::Stream { position } => position,
            Origin::Memory { as_of } => as_of,
        };
        Version {
            block: self.block,
            position,
            sharing: self.sharing,
        }
    }
}

pub(super) enum Phase {
    /// PARTs.
    Parts,
    /// Inside the package with the device state: so many bytes are to come, and nothing else.
    Package { left: u32 },
    /// Inside the END section.
    End,
    /// The END section is complete but for pages that wait; device state is held back.
    Flushing { tail: Vec<u8> },
    /// Device state.
    Tail,
}

impl Streaming {
    pub(super) fn begin(
        decoder: Decoder,
        empties: bool,
        mappable: &HashMap<String, u32>,
    ) -> Result<Self, UnpackError> {
        let none = || UnpackError::OutOfPlace {
            what: "something else than a block list",
        };
        let blocks = Arc::clone(decoder.blocks().ok_or_else(none)?);
        let section = decoder.ram_section_id().ok_or_else(none)?;
        let footers = decoder.footers().ok_or_else(none)?;
        let encoder = Encoder::new(Arc::clone(&blocks), section, footers);
        Ok(Self {
            encoder,
            preempt: None,
            untouched: Untouched::new(&blocks, mappable),
            blocks,
            decoder,
            waiting: Waiting::default(),
            phase: Phase::Parts,
            owed: None,
            emptied: if empties {
                Emptied::NotYet
            } else {
                Emptied::Never
            },
        })
    }

    /// After the operations of a frame: what can be flushed is, and what is complete is
    /// acknowledged.
    pub(super) fn finish_frame<B>(
        &mut self,
        origin: Origin,
        next_ping: &mut u32,
        batch: &mut Batch<B>,
    ) -> Result<(), UnpackError> {
        if self.waiting.len() > MAX_WAITING {
            return Err(UnpackError::TooManyWaiting);
        }
        if let Origin::Stream { position } = origin {
            self.waiting.frame_ends(position);
            if let Some(owed) = self.owed.as_mut().filter(|_| self.decoder.has_switched()) {
                owed.since.get_or_insert(position);
            }
        }
        self.flush_unless_shared(next_ping, batch);
        Ok(())
    }

    /// With pages to be mapped, that is done when they are.
    pub(super) fn flush_unless_shared<B>(&mut self, next_ping: &mut u32, batch: &mut Batch<B>) {
        if batch.shared.is_empty() {
            self.flush(next_ping, batch);
        }
    }

    pub(super) fn flush<B>(&mut self, next_ping: &mut u32, batch: &mut Batch<B>) {
        let is_owing = self.is_owing();
        match &mut self.phase {
            Phase::Parts => {
                if let Some(reached) = self.waiting.progress() {
                    self.encoder.close(&mut batch.head);
                    let ping = *next_ping;
                    encode_command(Command::Ping(ping), &mut batch.head);
                    batch.ack = Some(Ack::OnPong { ping, reached });
                    if self.emptied == Emptied::NotYet {
                        self.emptied = Emptied::Before(ping);
                    }
                    *next_ping = ping.wrapping_add(1) | OUR_PING;
                }
                return;
            }
            Phase::Flushing { tail } if self.waiting.is_empty() && !is_owing => {
                self.encoder.close(&mut batch.head);
                batch.head.append(tail);
                self.phase = Phase::Tail;
                self.end_preempt(batch);
            }
            // Inside a package no ping can be put in between either; QEMU reads it in one go.
            Phase::Package { .. } | Phase::End | Phase::Flushing { .. } | Phase::Tail => {}
        }
        if let Some(reached) = self.waiting.progress() {
            batch.ack = Some(Ack::OnWrite { reached });
        }
    }

    /// Whether pages are to come, on a second channel, behind the end of the first.
    fn is_owing(&self) -> bool {
        self.preempt.is_some() && self.owed.as_ref().is_some_and(|owed| owed.left() > 0)
    }

    /// Nothing more goes on the second channel; one that was never used is left alone.
    fn end_preempt<B>(&mut self, batch: &mut Batch<B>) {
        if let Some(encoder) = self.preempt.take().filter(|_| self.owed.is_some()) {
            batch.push_preempt(|out| encoder.end(out));
        }
    }

    /// Writes a page.
    pub(super) fn put<B>(
        &mut self,
        block: BlockIndex,
        page: PageNo,
        bytes: Segment<B>,
        batch: &mut Batch<B>,
    ) {
        self.untouched.touch(block, page);
        if let Some(encoder) = &mut self.preempt
            && batch.asked.contains(&(block, page))
        {
            batch.push_preempt(|out| encoder.page(block, page, out));
            batch.preempt.push(bytes);
            batch.preempted.push((block, page));
            if let Some(owed) = &mut self.owed {
                owed.give(block, page);
            }
            return;
        }
        self.give(block, page, batch);
        self.encoder.page(block, page, &mut batch.head);
        batch.push_page(bytes);
    }

    /// Writes a zero page.
    pub(super) fn put_zero<B>(&mut self, block: BlockIndex, page: PageNo, batch: &mut Batch<B>) {
        self.untouched.touch(block, page);
        self.give(block, page, batch);
        self.encoder.zero(block, page, &mut batch.head);
    }

    fn give<B>(&mut self, block: BlockIndex, page: PageNo, batch: &mut Batch<B>) {
        if let Some(owed) = &mut self.owed {
            owed.give(block, page);
            batch.given.push((block, page));
        }
    }

    /// Has a page mapped if it shared its frame and nothing was written to it yet; else, and always
    /// after a switch, writes it. False: it is to be mapped.
    pub(super) fn share_or_put<B>(
        &mut self,
        version: Version,
        page: PageNo,
        (entry, bytes): (Option<EntryId>, Segment<B>),
        batch: &mut Batch<B>,
    ) -> bool {
        let block = version.block;
        let sharing = version.sharing;
        // What was read again from memory while the guest ran is not marked.
        let is_mappable = sharing.is_shared()
            && self.untouched.touch(block, page)
            && self.emptied != Emptied::NotYet;
        if is_mappable && self.owed.is_none() {
            self.waiting.wait(version, page, Cause::Mapping);
            batch.shared.push(SharedPage {
                entry,
                block,
                page,
                sharing,
                bytes,
            });
            return false;
        }
        self.put(block, page, bytes, batch);
        if is_mappable {
            batch.expected.push(ExpectedPage {
                entry,
                block,
                page,
                sharing,
                segment: batch.segments.len() - 1,
            });
        }
        true
    }

    /// Checks that the run may be written now.
    fn check(&self, frame: &Frame, run: PageRun) -> Result<(), UnpackError> {
        match (&self.phase, frame.origin) {
            (Phase::Parts | Phase::End, _) => {}
            // A repair that was overtaken before the switch.
            (Phase::Package { .. }, Origin::Memory { .. }) => {}
            (Phase::Package { .. }, Origin::Stream { .. }) => {
                return Err(UnpackError::OutOfPlace {
                    what: "pages inside of a package",
                });
            }
            (Phase::Flushing { .. }, Origin::Memory { .. }) => {}
            // A repair that was overtaken by newer versions of all its pages.
            (Phase::Tail, Origin::Memory { .. }) => {}
            (Phase::Flushing { .. } | Phase::Tail, Origin::Stream { .. }) => {
                return Err(UnpackError::OutOfPlace {
                    what: "pages after the end of RAM",
                });
            }
        }
        let (block, last) = (frame.block, run.start.plus(run.count - 1));
        if self.blocks.holds(block, run.start) && self.blocks.holds(block, last) {
            Ok(())
        } else {
            Err(UnpackError::NoSuchPage { block, page: last })
        }
    }

    /// Whether the page is to be written: a new version always, which ends its wait; a repair
    /// only if the page still waits, and for a version that is not newer than the repair. After a
    /// switch to post-copy: the first that comes of a page that QEMU waits for.
    fn takes(&mut self, frame: &Frame, page: PageNo) -> bool {
        let key = (frame.block, page);
        if let Some(owed) = &self.owed {
            let is_final = match (frame.origin, owed.since) {
                (Origin::Stream { .. }, _) => true,
                (Origin::Memory { as_of }, Some(since)) => as_of >= since,
                (Origin::Memory { .. }, None) => false,
            };
            // Nothing can be put behind the end.
            let is_open = !matches!(self.phase, Phase::Tail);
            let takes = is_final && is_open && owed.has(frame.block, page);
            if takes {
                self.waiting.replaced(key);
            }
            return takes;
        }
        match frame.origin {
            Origin::Stream { .. } => {
                self.waiting.replaced(key);
                true
            }
            Origin::Memory { as_of } => self.waiting.repaired(key, as_of),
        }
    }

    pub(super) fn pages(
        &mut self,
        frame: &Frame,
        run: PageRun,
        mut write: impl FnMut(&mut Self, PageNo),
    ) -> Result<(), UnpackError> {
        self.check(frame, run)?;
        for page in run.pages() {
            if self.takes(frame, page) {
                write(self, page);
            }
        }
        Ok(())
    }

    pub(super) fn pages_with_bytes<B>(
        &mut self,
        frame: &mut Frame,
        run: PageRun,
        first: Option<EntryId>,
        batch: &mut Batch<B>,
    ) -> Result<(), UnpackError> {
        self.check(frame, run)?;
        let block = frame.block;
        for (page, index) in run.pages().zip(0..) {
            let at = frame.bytes.next()?;
            if !self.takes(frame, page) {
                continue;
            }
            let entry = first.map(|first| first.plus(index));
            let bytes = Segment::Own(at);
            let is_written = match entry {
                Some(_) => self.share_or_put(frame.version(), page, (entry, bytes), batch),
                // Sent ahead of the stream.
                None if self.owed.is_some() => {
                    self.share_or_put(frame.version(), page, (entry, bytes), batch)
                }
                None => {
                    self.put(block, page, bytes, batch);
                    true
                }
            };
            if let Some(entry) = entry.filter(|_| is_written) {
                batch.placed.push(Placed {
                    entry,
                    block,
                    page,
                    literal_at: Some(at),
                });
            }
        }
        Ok(())
    }

    pub(super) fn references<B>(
        &mut self,
        frame: &Frame,
        (run, first): (PageRun, EntryId),
        remote: Option<&Remote<'_>>,
        contents: &mut impl Contents<B>,
        batch: &mut Batch<B>,
    ) -> Result<(), UnpackError> {
        self.check(frame, run)?;
        if matches!(frame.origin, Origin::Memory { .. }) {
            return Err(UnpackError::OutOfPlace {
                what: "a reference as a repair",
            });
        }
        let mut found = std::mem::take(&mut batch.found);
        contents.find((first, run.count), remote, &mut batch.scratch, &mut found);
        self.put_found(frame.version(), (run, first), &mut found, batch);
        batch.found = found;
        Ok(())
    }

    /// Writes the pages whose contents were found, and has the others wait.
    fn put_found<B>(
        &mut self,
        version: Version,
        (run, first): (PageRun, EntryId),
        found: &mut Vec<Found<B>>,
        batch: &mut Batch<B>,
    ) {
        let block = version.block;
        found.resize_with(run.count as usize, || Found::Missing);
        for ((page, index), found) in run.pages().zip(0..).zip(found.drain(..)) {
            let entry = first.plus(index);
            if self
                .owed
                .as_ref()
                .is_some_and(|owed| !owed.has(block, page))
            {
                continue;
            }
            let segment = match found {
                Found::Held(body, at) => Segment::Held(body, at),
                Found::Scratch(at) => Segment::Scratch(at),
                Found::Coming => {
                    self.waiting.wait(version, page, Cause::Entry(entry));
                    continue;
                }
                Found::Missing => {
                    self.waiting.wait(version, page, Cause::Repair);
                    batch.ask_for(block, page);
                    continue;
                }
            };
            self.waiting.replaced((block, page));
            if self.share_or_put(version, page, (Some(entry), segment), batch) {
                batch.placed.push(Placed {
                    entry,
                    block,
                    page,
                    literal_at: None,
                });
            }
        }
    }

    pub(super) fn raw<B>(&mut self, bytes: &[u8], batch: &mut Batch<B>) -> Result<(), UnpackError> {
        if !matches!(self.phase, Phase::Parts) {
            return Err(UnpackError::OutOfPlace {
                what: "a command after the end of RAM",
            });
        }
        let (blocks, waits) = (&self.blocks, !self.waiting.is_empty());
        let (owed, untouched, mut package) = (&mut self.owed, &mut self.untouched, None);
        feed(&mut self.decoder, bytes, |item| match item {
            Item::Command { .. } | Item::Opaque(_) => package.is_none(),
            // The source has waited for what comes before.
            Item::Discard { .. } | Item::PackageBegin { .. } if waits || package.is_some() => false,
            Item::Discard { discard, .. } => {
                let owed = owed.get_or_insert_with(|| Owed::new(blocks));
                for run in discard.runs() {
                    owed.add(discard.block, run);
                    untouched.forget(discard.block, run);
                    batch.forgotten.push((discard.block, run));
                }
                true
            }
            Item::PackageBegin { len, .. } => {
                owed.get_or_insert_with(|| Owed::new(blocks));
                package = Some(*len);
                true
            }
            _ => false,
        })?;
        if let Some(left) = package {
            self.phase = Phase::Package { left };
        }
        self.encoder.close(&mut batch.head);
        batch.head.extend_from_slice(bytes);
        Ok(())
    }

    pub(super) fn package<B>(
        &mut self,
        bytes: &[u8],
        batch: &mut Batch<B>,
    ) -> Result<(), UnpackError> {
        let out_of_place = UnpackError::OutOfPlace { what: "a package" };
        let Phase::Package { left } = &mut self.phase else {
            return Err(out_of_place);
        };
        let rest = u32::try_from(bytes.len())
            .ok()
            .and_then(|len| left.checked_sub(len));
        *left = rest.ok_or(out_of_place)?;
        if *left == 0 {
            self.phase = Phase::Parts;
            self.encoder.name_again();
        }
        // It knows the length as well.
        self.decoder.decode(bytes)?;
        batch.head.extend_from_slice(bytes);
        Ok(())
    }

    pub(super) fn begin_end<B>(&mut self, batch: &mut Batch<B>) -> Result<(), UnpackError> {
        if !matches!(self.phase, Phase::Parts) {
            return Err(UnpackError::OutOfPlace {
                what: "a second end of RAM",
            });
        }
        self.encoder.begin_end(&mut batch.head);
        self.phase = Phase::End;
        Ok(())
    }

    pub(super) fn close_end<B>(&mut self, batch: &mut Batch<B>) -> Result<(), UnpackError> {
        if !matches!(self.phase, Phase::End) {
            return Err(UnpackError::OutOfPlace {
                what: "the end of RAM",
            });
        }
        self.phase = if self.waiting.is_empty() && !self.is_owing() {
            self.encoder.close(&mut batch.head);
            self.end_preempt(batch);
            Phase::Tail
        } else {
            Phase::Flushing { tail: Vec::new() }
        };
        Ok(())
    }

    pub(super) fn tail<B>(
        &mut self,
        bytes: &[u8],
        batch: &mut Batch<B>,
    ) -> Result<(), UnpackError> {
        match &mut self.phase {
            Phase::Tail => batch.head.extend_from_slice(bytes),
            Phase::Flushing { tail } if tail.len() + bytes.len() <= MAX_HELD_TAIL => {
                tail.extend_from_slice(bytes)
            }
            Phase::Flushing { .. } => return Err(UnpackError::TailTooLong),
            Phase::Parts | Phase::Package { .. } | Phase::End => {
                return Err(UnpackError::OutOfPlace {
                    what: "device state before the end of RAM",
                });
            }
        }
        Ok(())
    }
}

/// Takes page bytes off the end of a body, in order.
pub(super) struct PageCursor {
    pub(super) at: usize,
    pub(super) end: usize,
}

impl PageCursor {
    fn next(&mut self) -> Result<usize, UnpackError> {
        let at = self.at;
        if self.end - at < PAGE_SIZE {
            return Err(UnpackError::PageBytes);
        }
        self.at += PAGE_SIZE;
        Ok(at)
    }
}

/// Lets the decoder see what is forwarded: it checks it and learns the block list. Only whole
/// items that are `allowed` here pass, so that no page gets past the checks as raw bytes.
pub(super) fn feed(
    decoder: &mut Decoder,
    bytes: &[u8],
    mut allowed: impl FnMut(&Item<'_>) -> bool,
) -> Result<(), UnpackError> {
    // The decoder looks one byte ahead, for a subsection or a footer; a zero is neither.
    let mut ahead = bytes.to_vec();
    ahead.push(0);
    let mut at = 0;
    while at < bytes.len() {
        match decoder.decode(&ahead[at..])? {
            Step::Item { item, consumed } if at + consumed <= bytes.len() && allowed(&item) => {
                at += consumed
            }
            Step::Item { .. } => {
                return Err(UnpackError::OutOfPlace {
                    what: "another section than announced",
                });
            }
            Step::NeedMore { .. } => {
                return Err(UnpackError::OutOfPlace {
                    what: "half a section",
                });
            }
        }
    }
    Ok(())
}
