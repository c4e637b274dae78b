//! Target role: page operations become a stream for the target QEMU.
//!
//! Pages whose content the target should have and cannot produce go on the *waiting list*, and
//! are asked for again from the source; a newer version of the page that comes first takes it
//! off. Before the last RAM section ends the list must be empty, because device state is
//! loaded next and reads guest memory.
//!
//! ```text
//!  Opening ─RamStart─► Streaming ─EndClosed─┬─ nothing waits ─────────────► Tail
//!                                           └─ pages wait ─► Flushing ─last repair─► Tail
//! ```
//!
//! Succeeds or fails, the target QEMU stays stopped: this machine only feeds it.

mod batch;

use std::collections::HashSet;
use std::sync::Arc;

use page::{BlockIndex, EntryId, PAGE_SIZE, PageNo, PageRun};
use qstream::{BlockList, Command, Decoder, Encoder, StreamError, encode_command};
use wire::{Op, OpReader, WireError, split_pages_body};

pub use batch::{Ack, Batch, Contents, Found, Placed, Segment};

/// Most device state that is held back while pages wait: large guests have a few MiB.
const MAX_HELD_TAIL: usize = 64 << 20;

/// Most pages in one frame: a source's read buffer of 256 KiB holds 29 thousand zero records.
/// A frame can thus make this host write 256 MiB at most, and read 256 MiB of references.
const MAX_PAGES: u32 = 1 << 16;

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
    #[error("a frame has more than {MAX_PAGES} pages")]
    TooManyPages,
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
    waiting: HashSet<(BlockIndex, PageNo)>,
    phase: Phase,
}

enum Phase {
    /// PARTs.
    Parts,
    /// Inside the END section.
    End,
    /// The END section is complete but for pages that wait; device state is held back.
    Flushing { tail: Vec<u8>, position: u64 },
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
        let mut cursor = PageCursor {
            at: body.len() - parts.pages.len(),
            end: body.len(),
        };
        let mut block = BlockIndex(0);
        let mut pages = 0_u32;
        for op in OpReader::new(parts.ops) {
            let op = op?;
            pages = pages.saturating_add(op.pages());
            if pages > MAX_PAGES {
                return Err(UnpackError::TooManyPages);
            }
            match op {
                Op::Block(b) => block = b,
                op => self.apply_op(op, block, (&mut cursor, is_repair), contents, batch)?,
            }
        }
        if cursor.at != cursor.end {
            return Err(UnpackError::PageBytes);
        }
        self.finish_frame(parts.position, is_repair, batch)
    }

    fn apply_op<B>(
        &mut self,
        op: Op<'_>,
        block: BlockIndex,
        (cursor, is_repair): (&mut PageCursor, bool),
        contents: &mut impl Contents<B>,
        batch: &mut Batch<B>,
    ) -> Result<(), UnpackError> {
        let streaming = match (&mut self.state, op) {
            (State::Opening(decoder), Op::Raw(bytes)) => {
                feed(decoder, bytes)?;
                batch.head.extend_from_slice(bytes);
                return Ok(());
            }
            (State::Opening(decoder), Op::RamStart(bytes)) => {
                feed(decoder, bytes)?;
                batch.head.extend_from_slice(bytes);
                self.state = State::Streaming(Streaming::begin(decoder)?);
                return Ok(());
            }
            (State::Opening(_), _) => {
                return Err(UnpackError::OutOfPlace {
                    what: "pages before the block list",
                });
            }
            (State::Streaming(streaming), _) => streaming,
        };
        match op {
            Op::Zero(run) => streaming.pages(block, run, is_repair, |s, page| {
                s.encoder.zero(block, page, &mut batch.head)
            }),
            Op::Fill(run, byte) => {
                let at = batch.scratch.len();
                batch.scratch.resize(at + PAGE_SIZE, byte);
                streaming.pages(block, run, is_repair, |s, page| {
                    s.encoder.page(block, page, &mut batch.head);
                    batch.push_page(Segment::Scratch(at));
                })
            }
            Op::Plain(run) => {
                streaming.pages_with_bytes(block, run, None, (cursor, is_repair), batch)
            }
            Op::Literal(run, entry) => {
                streaming.pages_with_bytes(block, run, Some(entry), (cursor, is_repair), batch)
            }
            Op::Reference(run, entry) => {
                if is_repair {
                    return Err(UnpackError::OutOfPlace {
                        what: "a reference as a repair",
                    });
                }
                streaming.references(block, run, entry, contents, batch)
            }
            Op::Raw(bytes) => streaming.raw(bytes, batch),
            Op::EndBegin => streaming.begin_end(batch),
            Op::EndClosed => streaming.close_end(batch),
            Op::Tail(bytes) => streaming.tail(bytes, batch),
            Op::RamStart(_) | Op::Block(_) => Err(UnpackError::OutOfPlace {
                what: "a second block list",
            }),
        }
    }

    /// After the operations of a frame: what can be flushed is, and the position is acknowledged.
    fn finish_frame<B>(
        &mut self,
        position: u64,
        is_repair: bool,
        batch: &mut Batch<B>,
    ) -> Result<(), UnpackError> {
        let State::Streaming(streaming) = &mut self.state else {
            batch.close_head();
            return Ok(());
        };
        match &mut streaming.phase {
            // A repair has no position of its own.
            Phase::Parts if is_repair => {}
            Phase::Parts => {
                streaming.encoder.close(&mut batch.head);
                encode_command(Command::Ping(self.next_ping), &mut batch.head);
                batch.ack = Some(Ack::OnPong {
                    ping: self.next_ping,
                    position,
                });
                self.next_ping = self.next_ping.wrapping_add(1) | OUR_PING;
            }
            Phase::End if is_repair => {}
            Phase::End | Phase::Tail => batch.ack = Some(Ack::OnWrite { position }),
            Phase::Flushing {
                tail,
                position: held,
            } => {
                if !is_repair {
                    *held = position;
                }
                if streaming.waiting.is_empty() {
                    streaming.encoder.close(&mut batch.head);
                    batch.head.append(tail);
                    batch.ack = Some(Ack::OnWrite { position: *held });
                    streaming.phase = Phase::Tail;
                }
            }
        }
        batch.close_head();
        Ok(())
    }
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

/// Lets the decoder see what is forwarded before RAM: it checks it and learns the block list.
fn feed(decoder: &mut Decoder, mut bytes: &[u8]) -> Result<(), UnpackError> {
    while !bytes.is_empty() {
        match decoder.decode(bytes)? {
            qstream::Step::Item { consumed, .. } => bytes = &bytes[consumed..],
            qstream::Step::NeedMore { .. } => {
                return Err(UnpackError::OutOfPlace {
                    what: "half a section",
                });
            }
        }
    }
    Ok(())
}

impl Streaming {
    fn begin(decoder: &Decoder) -> Result<Self, UnpackError> {
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
            waiting: HashSet::new(),
            phase: Phase::Parts,
        })
    }

    /// Checks that the run may be written now.
    fn check(&self, block: BlockIndex, run: PageRun, is_repair: bool) -> Result<(), UnpackError> {
        match self.phase {
            Phase::Parts | Phase::End => {}
            Phase::Flushing { .. } if is_repair => {}
            // A repair that was overtaken by newer versions of all its pages.
            Phase::Tail if is_repair => {}
            Phase::Flushing { .. } | Phase::Tail => {
                return Err(UnpackError::OutOfPlace {
                    what: "pages after the end of RAM",
                });
            }
        }
        let last = run.start.plus(run.count - 1);
        if self.blocks.holds(block, run.start) && self.blocks.holds(block, last) {
            Ok(())
        } else {
            Err(UnpackError::NoSuchPage { block, page: last })
        }
    }

    /// Whether the page is to be written: a new version always, which ends its wait; a repair
    /// only if the page still waits.
    fn takes(&mut self, block: BlockIndex, page: PageNo, is_repair: bool) -> bool {
        if self.waiting.is_empty() {
            return !is_repair;
        }
        self.waiting.remove(&(block, page)) || !is_repair
    }

    fn pages(
        &mut self,
        block: BlockIndex,
        run: PageRun,
        is_repair: bool,
        mut write: impl FnMut(&mut Self, PageNo),
    ) -> Result<(), UnpackError> {
        self.check(block, run, is_repair)?;
        for page in run.pages() {
            if self.takes(block, page, is_repair) {
                write(self, page);
            }
        }
        Ok(())
    }

    fn pages_with_bytes<B>(
        &mut self,
        block: BlockIndex,
        run: PageRun,
        first: Option<EntryId>,
        (cursor, is_repair): (&mut PageCursor, bool),
        batch: &mut Batch<B>,
    ) -> Result<(), UnpackError> {
        self.check(block, run, is_repair)?;
        for (page, index) in run.pages().zip(0..) {
            let at = cursor.next()?;
            if !self.takes(block, page, is_repair) {
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
        block: BlockIndex,
        run: PageRun,
        first: EntryId,
        contents: &mut impl Contents<B>,
        batch: &mut Batch<B>,
    ) -> Result<(), UnpackError> {
        self.check(block, run, false)?;
        let mut found = std::mem::take(&mut batch.found);
        contents.find(first, run.count, &mut batch.scratch, &mut found);
        for ((page, index), found) in run.pages().zip(0..).zip(found.drain(..)) {
            let segment = match found {
                Found::Held(body, at) => Segment::Held(body, at),
                Found::Scratch(at) => Segment::Scratch(at),
                Found::Missing => {
                    self.waiting.insert((block, page));
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
            Phase::Flushing {
                tail: Vec::new(),
                position: 0,
            }
        };
        Ok(())
    }

    fn tail<B>(&mut self, bytes: &[u8], batch: &mut Batch<B>) -> Result<(), UnpackError> {
        match &mut self.phase {
            Phase::Tail => batch.head.extend_from_slice(bytes),
            Phase::Flushing { tail, .. } if tail.len() + bytes.len() <= MAX_HELD_TAIL => {
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
