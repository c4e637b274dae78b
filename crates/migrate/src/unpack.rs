//! Target role: page operations become a stream for the target QEMU.
//!
//! Pages whose content the target should have and cannot produce go on the *waiting list*, and
//! are asked for again from the source; a newer version of the page that comes first takes it
//! off, a repair only if it was read after the version that waits. While the list is long
//! nothing is acknowledged, so the source's window closes; repairs do not count in it. Before
//! the last RAM section ends the list must be empty, because device state is loaded next and
//! reads guest memory.
//!
//! ```text
//!  Opening ─RamStart─► Streaming ─EndClosed─┬─ nothing waits ─────────────► Tail
//!                                           └─ pages wait ─► Flushing ─last repair─► Tail
//! ```
//!
//! Succeeds or fails, the target QEMU stays stopped: this machine only feeds it.

mod batch;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use page::{BlockIndex, EntryId, PAGE_SIZE, PageNo, PageRun};
use qstream::{BlockList, Command, Decoder, Encoder, Item, Step, StreamError, encode_command};
use wire::{MAX_BODY, Op, OpReader, WireError, split_pages_body};

pub use batch::{Ack, Batch, Contents, Found, Placed, Segment};

/// Most device state that is held back while pages wait: large guests have a few MiB.
const MAX_HELD_TAIL: usize = 64 << 20;

/// Most pages in one frame: a source's read buffer of 256 KiB holds 29 thousand zero records.
const MAX_PAGES: u32 = 1 << 16;

/// Most of them that are not zero: each was 4 KiB of the source's read buffer, which is not
/// longer than a body may be. So a frame of a few bytes cannot make this host read or fill more
/// than 1 MiB.
const MAX_CONTENT_PAGES: u32 = 256;

const _: () = assert!(MAX_CONTENT_PAGES as usize * PAGE_SIZE == MAX_BODY);

/// Most pages that may wait while positions are acknowledged: their repairs (4 MiB) delay the
/// switch-over, by 36 ms at 1 Gbit/s.
const MAX_WAITING_ACKED: usize = 1024;

/// Most pages that may wait at all: those and as many as an honest source's window can add
/// come nowhere near. They take 36 MiB here.
const MAX_WAITING: usize = 1 << 20;

/// Our pings carry this bit; QEMU's own are 1 to 4.
const OUR_PING: u32 = 0x8000_0000;

/// What a frame cannot be applied for.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The body is malformed.
    #[error("the source agent sent a malformed frame")]
    Wire(#[from] WireError),
    /// What the source agent forwards from its QEMU does not decode.
    #[error("the source agent forwarded a stream that does not decode")]
    Stream(#[from] StreamError),
    /// An operation that may not come here.
    #[error("the source agent sent {what} out of place")]
    OutOfPlace {
        /// Which.
        what: &'static str,
    },
    /// A page that is not in the block list.
    #[error(
        "the source agent sent page {page:?} of block {block:?}, which the guest does not have"
    )]
    NoSuchPage {
        /// Block.
        block: BlockIndex,
        /// Page.
        page: PageNo,
    },
    /// Fewer page bytes than the operations need, or more.
    #[error("a frame's page bytes and operations do not add up")]
    PageBytes,
    /// More pages than a source's buffer can hold.
    #[error("a frame has more than {MAX_PAGES} pages, or {MAX_CONTENT_PAGES} that are not zero")]
    TooManyPages,
    /// The source goes on although nothing is acknowledged.
    #[error("more than {MAX_WAITING} pages wait for the source agent to send them again")]
    TooManyWaiting,
    /// Too much device state while pages wait.
    #[error("more than {MAX_HELD_TAIL} bytes of device state came while pages were waiting")]
    TailTooLong,
}

enum State {
    Opening(Decoder),
    Streaming(Streaming),
}

struct Streaming {
    encoder: Encoder,
    blocks: Arc<BlockList>,
    /// Checks what is forwarded between sections.
    decoder: Decoder,
    /// Pages that wait, with the position of the frame that wanted them last.
    waiting: HashMap<(BlockIndex, PageNo), u64>,
    /// Position that was not acknowledged, because the list was long.
    unacked: Option<u64>,
    phase: Phase,
}

/// Where a frame's pages come from, and how new they are as a position of the source QEMU's
/// stream.
#[derive(Clone, Copy)]
enum Origin {
    /// From the stream, which stands at `position` after this frame.
    Stream { position: u64 },
    /// Read again from the source QEMU's memory, when the stream had been read up to `as_of`.
    Memory { as_of: u64 },
}

/// What the operations of one frame are applied with.
struct Frame {
    origin: Origin,
    block: BlockIndex,
    bytes: PageCursor,
}

enum Phase {
    /// PARTs.
    Parts,
    /// Inside the END section.
    End,
    /// The END section is complete but for pages that wait; device state is held back.
    Flushing { tail: Vec<u8> },
    /// Device state.
    Tail,
}

/// Rebuilds one VM's stream.
pub struct Unpacker {
    state: State,
    next_ping: u32,
}

impl Default for Unpacker {
    fn default() -> Self {
        Self {
            state: State::Opening(Decoder::new()),
            next_ping: OUR_PING,
        }
    }
}

impl Unpacker {
    /// Whether a return-path PONG answers one of our pings; the source must not see those.
    #[must_use]
    pub fn is_our_ping(value: u32) -> bool {
        value & OUR_PING != 0
    }

    /// Pages that wait for a repair.
    #[must_use]
    pub fn waiting(&self) -> usize {
        match &self.state {
            State::Opening(_) => 0,
            State::Streaming(s) => s.waiting.len(),
        }
    }

    /// The guest's blocks, once they are known.
    #[must_use]
    pub fn blocks(&self) -> Option<&Arc<BlockList>> {
        match &self.state {
            State::Opening(_) => None,
            State::Streaming(s) => Some(&s.blocks),
        }
    }

    /// Applies a `Pages` frame (or a `Repair` frame) to `batch`, which is empty.
    ///
    /// # Errors
    /// A frame that no honest source sends. Nothing of the batch may be used then.
    pub fn apply<B>(
        &mut self,
        body: &[u8],
        is_repair: bool,
        contents: &mut impl Contents<B>,
        batch: &mut Batch<B>,
    ) -> Result<(), UnpackError> {
        let parts = split_pages_body(body)?;
        check_counts(parts.ops)?;
        let position = parts.position;
        let mut frame = Frame {
            origin: if is_repair {
                Origin::Memory { as_of: position }
            } else {
                Origin::Stream { position }
            },
            block: BlockIndex(0),
            bytes: PageCursor {
                at: body.len() - parts.pages.len(),
                end: body.len(),
            },
        };
        for op in OpReader::new(parts.ops) {
            match op? {
                Op::Block(block) => frame.block = block,
                op => self.apply_op(op, &mut frame, contents, batch)?,
            }
        }
        if frame.bytes.at != frame.bytes.end {
            return Err(UnpackError::PageBytes);
        }
        if let State::Streaming(streaming) = &mut self.state {
            streaming.finish_frame(frame.origin, &mut self.next_ping, batch)?;
        }
        batch.close_head();
        Ok(())
    }

    fn apply_op<B>(
        &mut self,
        op: Op<'_>,
        frame: &mut Frame,
        contents: &mut impl Contents<B>,
        batch: &mut Batch<B>,
    ) -> Result<(), UnpackError> {
        let streaming = match &mut self.state {
            State::Streaming(streaming) => streaming,
            State::Opening(decoder) => {
                let (Op::Raw(bytes) | Op::RamStart(bytes)) = op else {
                    return Err(UnpackError::OutOfPlace {
                        what: "pages before the block list",
                    });
                };
                feed(decoder, bytes, |item| match item {
                    Item::Header { .. } | Item::Command { .. } => matches!(op, Op::Raw(_)),
                    Item::RamStart { .. } => matches!(op, Op::RamStart(_)),
                    _ => false,
                })?;
                batch.head.extend_from_slice(bytes);
                if matches!(op, Op::RamStart(_)) {
                    self.state = State::Streaming(Streaming::begin(std::mem::take(decoder))?);
                }
                return Ok(());
            }
        };
        match op {
            Op::Zero(run) => streaming.pages(frame, run, |s, page| {
                s.encoder.zero(frame.block, page, &mut batch.head)
            }),
            Op::Fill(run, byte) => {
                let at = batch.scratch.len();
                batch.scratch.resize(at + PAGE_SIZE, byte);
                streaming.pages(frame, run, |s, page| {
                    s.encoder.page(frame.block, page, &mut batch.head);
                    batch.push_page(Segment::Scratch(at));
                })
            }
            Op::Plain(run) => streaming.pages_with_bytes(frame, run, None, batch),
            Op::Literal(run, entry) => streaming.pages_with_bytes(frame, run, Some(entry), batch),
            Op::Reference(run, entry) => streaming.references(frame, run, entry, contents, batch),
            Op::Raw(bytes) => streaming.raw(bytes, batch),
            Op::EndBegin => streaming.begin_end(batch),
            Op::EndClosed => streaming.close_end(batch),
            Op::Tail(bytes) => streaming.tail(bytes, batch),
            Op::RamStart(_) | Op::Block(_) => Err(UnpackError::OutOfPlace {
                what: "a second block list",
            }),
        }
    }
}

/// Checks that a frame has no more pages than a source's buffer can hold.
fn check_counts(ops: &[u8]) -> Result<(), UnpackError> {
    let (mut pages, mut with_content) = (0_u32, 0_u32);
    for op in OpReader::new(ops) {
        let op = op?;
        pages = pages.saturating_add(op.pages());
        if !matches!(op, Op::Zero(_)) {
            with_content = with_content.saturating_add(op.pages());
        }
    }
    if pages > MAX_PAGES || with_content > MAX_CONTENT_PAGES {
        return Err(UnpackError::TooManyPages);
    }
    Ok(())
}

/// Takes page bytes off the end of a body, in order.
struct PageCursor {
    at: usize,
    end: usize,
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
fn feed(
    decoder: &mut Decoder,
    bytes: &[u8],
    allowed: impl Fn(&Item<'_>) -> bool,
) -> Result<(), UnpackError> {
    // The decoder looks one byte ahead, for a subsection or a footer; a zero is neither.
    let mut ahead = bytes.to_vec();
    ahead.push(0);
    let mut at = 0;
    while at < bytes.len() {
        match decoder.decode(&ahead[at..])? {
            Step::Item { item, consumed } if allowed(&item) && at + consumed <= bytes.len() => {
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

impl Streaming {
    fn begin(decoder: Decoder) -> Result<Self, UnpackError> {
        let none = || UnpackError::OutOfPlace {
            what: "something else than a block list",
        };
        let blocks = Arc::clone(decoder.blocks().ok_or_else(none)?);
        let section = decoder.ram_section_id().ok_or_else(none)?;
        let footers = decoder.footers().ok_or_else(none)?;
        let encoder = Encoder::new(Arc::clone(&blocks), section, footers);
        Ok(Self {
            encoder,
            blocks,
            decoder,
            waiting: HashMap::new(),
            unacked: None,
            phase: Phase::Parts,
        })
    }

    /// After the operations of a frame: what can be flushed is, and the position is acknowledged.
    fn finish_frame<B>(
        &mut self,
        origin: Origin,
        next_ping: &mut u32,
        batch: &mut Batch<B>,
    ) -> Result<(), UnpackError> {
        if self.waiting.len() > MAX_WAITING {
            return Err(UnpackError::TooManyWaiting);
        }
        if let Origin::Stream { position } = origin {
            self.unacked = Some(position);
        }
        match &mut self.phase {
            Phase::Parts if self.waiting.len() > MAX_WAITING_ACKED => return Ok(()),
            Phase::Parts => {
                if let Some(position) = self.unacked.take() {
                    self.encoder.close(&mut batch.head);
                    let ping = *next_ping;
                    encode_command(Command::Ping(ping), &mut batch.head);
                    batch.ack = Some(Ack::OnPong { ping, position });
                    *next_ping = ping.wrapping_add(1) | OUR_PING;
                }
                return Ok(());
            }
            Phase::End | Phase::Tail => {}
            Phase::Flushing { .. } if !self.waiting.is_empty() => return Ok(()),
            Phase::Flushing { tail } => {
                self.encoder.close(&mut batch.head);
                batch.head.append(tail);
                self.phase = Phase::Tail;
            }
        }
        batch.ack = self
            .unacked
            .take()
            .map(|position| Ack::OnWrite { position });
        Ok(())
    }

    /// Checks that the run may be written now.
    fn check(&self, frame: &Frame, run: PageRun) -> Result<(), UnpackError> {
        match (&self.phase, frame.origin) {
            (Phase::Parts | Phase::End, _) => {}
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
    /// only if the page still waits, and for a version that is not newer than the repair.
    fn takes(&mut self, frame: &Frame, page: PageNo) -> bool {
        let key = (frame.block, page);
        match frame.origin {
            Origin::Stream { .. } => {
                if !self.waiting.is_empty() {
                    self.waiting.remove(&key);
                }
                true
            }
            Origin::Memory { as_of } => match self.waiting.entry(key) {
                Entry::Occupied(wanted) if *wanted.get() <= as_of => {
                    wanted.remove();
                    true
                }
                _ => false,
            },
        }
    }

    fn pages(
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

    fn pages_with_bytes<B>(
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
            self.encoder.page(block, page, &mut batch.head);
            batch.push_page(Segment::Own(at));
            if let Some(first) = first {
                batch.placed.push(Placed {
                    entry: first.plus(index),
                    block,
                    page,
                    literal_at: Some(at),
                });
            }
        }
        Ok(())
    }

    fn references<B>(
        &mut self,
        frame: &Frame,
        run: PageRun,
        first: EntryId,
        contents: &mut impl Contents<B>,
        batch: &mut Batch<B>,
    ) -> Result<(), UnpackError> {
        self.check(frame, run)?;
        let Origin::Stream { position } = frame.origin else {
            return Err(UnpackError::OutOfPlace {
                what: "a reference as a repair",
            });
        };
        let block = frame.block;
        let mut found = std::mem::take(&mut batch.found);
        contents.find(first, run.count, &mut batch.scratch, &mut found);
        found.resize_with(run.count as usize, || Found::Missing);
        for ((page, index), found) in run.pages().zip(0..).zip(found.drain(..)) {
            let segment = match found {
                Found::Held(body, at) => Segment::Held(body, at),
                Found::Scratch(at) => Segment::Scratch(at),
                Found::Missing => {
                    self.waiting.insert((block, page), position);
                    batch.ask_for(block, page);
                    continue;
                }
            };
            self.waiting.remove(&(block, page));
            self.encoder.page(block, page, &mut batch.head);
            batch.push_page(segment);
            batch.placed.push(Placed {
                entry: first.plus(index),
                block,
                page,
                literal_at: None,
            });
        }
        batch.found = found;
        Ok(())
    }

    fn raw<B>(&mut self, bytes: &[u8], batch: &mut Batch<B>) -> Result<(), UnpackError> {
        if !matches!(self.phase, Phase::Parts) {
            return Err(UnpackError::OutOfPlace {
                what: "a command after the end of RAM",
            });
        }
        feed(&mut self.decoder, bytes, |item| {
            matches!(item, Item::Command { .. } | Item::Opaque(_))
        })?;
        self.encoder.close(&mut batch.head);
        batch.head.extend_from_slice(bytes);
        Ok(())
    }

    fn begin_end<B>(&mut self, batch: &mut Batch<B>) -> Result<(), UnpackError> {
        if !matches!(self.phase, Phase::Parts) {
            return Err(UnpackError::OutOfPlace {
                what: "a second end of RAM",
            });
        }
        self.encoder.begin_end(&mut batch.head);
        self.phase = Phase::End;
        Ok(())
    }

    fn close_end<B>(&mut self, batch: &mut Batch<B>) -> Result<(), UnpackError> {
        if !matches!(self.phase, Phase::End) {
            return Err(UnpackError::OutOfPlace {
                what: "the end of RAM",
            });
        }
        self.phase = if self.waiting.is_empty() {
            self.encoder.close(&mut batch.head);
            Phase::Tail
        } else {
            Phase::Flushing { tail: Vec::new() }
        };
        Ok(())
    }

    fn tail<B>(&mut self, bytes: &[u8], batch: &mut Batch<B>) -> Result<(), UnpackError> {
        match &mut self.phase {
            Phase::Tail => batch.head.extend_from_slice(bytes),
            Phase::Flushing { tail } if tail.len() + bytes.len() <= MAX_HELD_TAIL => {
                tail.extend_from_slice(bytes)
            }
            Phase::Flushing { .. } => return Err(UnpackError::TailTooLong),
            Phase::Parts | Phase::End => {
                return Err(UnpackError::OutOfPlace {
                    what: "device state before the end of RAM",
                });
            }
        }
        Ok(())
    }
}

/// Runs of literals in a body: first entry, number of pages, offset of the first page's bytes.
/// The target's receiver enters them into its store in the order of arrival, before any VM's
/// thread can ask for them.
///
/// # Errors
/// A malformed body.
pub fn literal_runs(body: &[u8]) -> Result<Vec<(EntryId, u32, usize)>, UnpackError> {
    let parts = split_pages_body(body)?;
    let mut at = body.len() - parts.pages.len();
    let mut runs = Vec::new();
    for op in OpReader::new(parts.ops) {
        let op = op?;
        let needed = op.pages_with_bytes() as usize * PAGE_SIZE;
        if body.len() - at < needed {
            return Err(UnpackError::PageBytes);
        }
        if let Op::Literal(run, first) = op {
            runs.push((first, run.count, at));
        }
        at += needed;
    }
    Ok(runs)
}
