//! Target role: page operations become a stream for the target QEMU.
//!
//! Pages whose content is not here yet go on the *waiting list* (IRLM section 2.5). Two things end
//! a wait: the content comes, from another connection or another target host; or the page comes,
//! as a newer version in the stream or read again from the source, which is asked for contents
//! that this host should have and does not. A newer version takes the page off the list whatever
//! comes later; a page that was read again only if it was read after the version that waits.
//!
//! What is acknowledged ends before the first page that waits, so that a long list closes the
//! source's window. Before the last RAM section ends the list must be empty, because device state
//! is loaded next and reads guest memory.
//!
//! ```text
//!  Opening ─RamStart─► Streaming ─EndClosed─┬─ nothing waits ─────────────► Tail
//!                                           └─ pages wait ─► Flushing ─last one came─► Tail
//! ```
//!
//! Pages that share their frame at the source can be mapped from the host's pool instead of being
//! written (SLM section III-B). They stand in [`Batch::shared`] and wait, like any other, until the
//! caller says how it went: in between, device state is held back and nothing is acknowledged.
//!
//! After a switch to post-copy the package with the device state goes through in one piece, and each
//! page that the switch made the target QEMU forget is given to it once (`owed`):
//!
//! ```text
//!  Streaming ─discards, package begins─► Package ─last byte─► Streaming ─EndClosed─► ... ─► Tail
//! ```
//!
//! With a second channel ([`Unpacker::preempting`]) the pages that a processor waits for go there, behind
//! nothing else. RAM ends when each page that is owed was given, whichever way it came: what is on the second channel
//! of the source may come behind the end of the first.
//!
//! Succeeds or fails, the target QEMU stays stopped: this machine only feeds it.

mod batch;
mod mapping;
mod owed;
mod streaming;
mod waiting;

use std::collections::HashMap;
use std::sync::Arc;

use page::{BlockIndex, EntryId, FrameSharing, HostSet, PAGE_SIZE, PageNo};
use qstream::{BlockList, Command, Decoder, Item, PreemptEncoder, StreamError};
use wire::{MAX_BODY, Op, OpReader, Remote, WireError, split_pages_body};

pub use batch::{Ack, Arrived, Batch, Contents, Found, Placed, Segment};
pub use mapping::{ExpectedPage, SharedPage};
use streaming::{Emptied, Frame, Origin, PageCursor, Phase, Streaming, feed};

/// Most device state that is held back while pages wait: large guests have a few MiB.
const MAX_HELD_TAIL: usize = 64 << 20;

/// Most pages in one frame: a source's read buffer of 256 KiB holds 29 thousand zero records.
const MAX_PAGES: u32 = 1 << 16;

/// Most of them that are not zero: each was 4 KiB of the source's read buffer, which is not
/// longer than a body may be. So a frame of a few bytes cannot make this host read or fill more
/// than 1 MiB.
const MAX_CONTENT_PAGES: u32 = 256;

const _: () = assert!(MAX_CONTENT_PAGES as usize * PAGE_SIZE == MAX_BODY);

/// Most pages that may wait: an honest source's window of 64 MiB of the stream holds 16 thousand.
const MAX_WAITING: usize = 1 << 17;

/// Most pages by which a guest may be longer than the target QEMU's, all blocks together: 64 MiB. Tables of its
/// firmware may be, by 2 MiB each; QEMU makes room for them. Whatever else differs QEMU refuses, too.
const MAX_GROWTH: u64 = 1 << 14;

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
    #[error("more than {MAX_WAITING} pages wait for their contents")]
    TooManyWaiting,
    /// A guest that is not the one for which the target QEMU was started.
    #[error(
        "the guest has {pages} pages for which its QEMU here has no room; {MAX_GROWTH} of firmware may be"
    )]
    OtherGuest {
        /// Pages of blocks that are longer than the target QEMU's, or that it does not have.
        pages: u64,
    },
    /// Too much device state while pages wait.
    #[error("more than {MAX_HELD_TAIL} bytes of device state came while pages were waiting")]
    TailTooLong,
}

#[expect(
    clippy::large_enum_variant,
    reason = "one for each VM, and mostly the large one"
)]
enum State {
    Opening {
        decoder: Decoder,
        /// The target QEMU was told that post-copy may follow: it empties its memory then.
        empties: bool,
    },
    Streaming(Streaming),
}

impl State {
    fn new() -> Self {
        Self::Opening {
            decoder: Decoder::new(),
            empties: false,
        }
    }
}

/// Rebuilds one VM's stream.
pub struct Unpacker {
    state: State,
    next_ping: u32,
    mappable: HashMap<String, u32>,
    /// Pages of the target QEMU's blocks, if they are known.
    here: Option<HashMap<String, u64>>,
    preempts: bool,
}

impl Default for Unpacker {
    fn default() -> Self {
        Self {
            state: State::new(),
            next_ping: OUR_PING,
            mappable: HashMap::new(),
            here: None,
            preempts: false,
        }
    }
}

impl Unpacker {
    /// One for a target QEMU that takes pages on a second channel, and in which nothing is mapped.
    #[must_use]
    pub fn preempting() -> Self {
        Self {
            preempts: true,
            ..Self::default()
        }
    }

    /// One for a VM in which pages can be mapped, of blocks with these names and numbers of pages,
    /// as the target QEMU has them.
    #[must_use]
    pub fn mapping(mappable: HashMap<String, u32>) -> Self {
        Self {
            mappable,
            ..Self::default()
        }
    }

    /// Has it take no guest but one with these blocks, by name and number of pages: a source decides what
    /// is kept for each page of its guest.
    #[must_use]
    pub fn only_for(self, blocks: HashMap<String, u64>) -> Self {
        Self {
            here: Some(blocks),
            ..self
        }
    }

    /// Whether all memory is through: what is written next is device state.
    #[must_use]
    pub fn is_past_memory(&self) -> bool {
        matches!(&self.state, State::Streaming(s) if matches!(s.phase, Phase::Tail))
    }

    /// Whether the guest is stopped: the last round of its memory has begun, or is through.
    #[must_use]
    pub fn is_in_last_round(&self) -> bool {
        matches!(&self.state, State::Streaming(s) if !matches!(s.phase, Phase::Parts))
    }

    /// Whether the target QEMU was given the device state of a switch to post-copy.
    #[must_use]
    pub fn has_switched(&self) -> bool {
        matches!(&self.state, State::Streaming(s) if s.decoder.has_switched())
    }

    /// Pages that the target QEMU still has to get after a switch to post-copy.
    #[must_use]
    pub fn owed(&self) -> u64 {
        match &self.state {
            State::Streaming(s) => s.owed.as_ref().map_or(0, owed::Owed::left),
            State::Opening { .. } => 0,
        }
    }

    /// Our ping that must have been answered before a page of [`Batch::shared`] is mapped. A QEMU that is
    /// told that post-copy may follow empties its memory: what was mapped before would be lost.
    #[must_use]
    pub fn maps_after(&self) -> Option<u32> {
        match &self.state {
            State::Streaming(Streaming {
                emptied: Emptied::Before(ping),
                ..
            }) => Some(*ping),
            _ => None,
        }
    }

    /// Whether a return-path PONG answers one of our pings; the source must not see those.
    #[must_use]
    pub fn is_our_ping(value: u32) -> bool {
        value & OUR_PING != 0
    }

    /// Pages that wait for their content.
    #[must_use]
    pub fn waiting(&self) -> usize {
        match &self.state {
            State::Opening { .. } => 0,
            State::Streaming(s) => s.waiting.len(),
        }
    }

    /// The guest's blocks, once they are known.
    #[must_use]
    pub fn blocks(&self) -> Option<&Arc<BlockList>> {
        match &self.state {
            State::Opening { .. } => None,
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
            sharing: FrameSharing::No,
            bytes: PageCursor {
                at: body.len() - parts.pages.len(),
                end: body.len(),
            },
        };
        for op in OpReader::new(parts.ops) {
            match op? {
                Op::Block(block) => frame.block = block,
                Op::Shared(sharing) => frame.sharing = sharing,
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

    /// Applies an `Urgent` frame to `batch`, which is empty. Those of its pages for which the target QEMU has
    /// `asked` go on its second channel, if it has one. No others: QEMU closes that channel once it has what it
    /// asked for, with what is left in it.
    ///
    /// # Errors
    /// As [`Unpacker::apply`].
    pub fn apply_urgent<B>(
        &mut self,
        body: &[u8],
        asked: impl Fn(BlockIndex, PageNo) -> bool,
        contents: &mut impl Contents<B>,
        batch: &mut Batch<B>,
    ) -> Result<(), UnpackError> {
        if self.preempts && self.has_switched() {
            let parts = split_pages_body(body)?;
            check_counts(parts.ops)?;
            let mut block = BlockIndex(0);
            for op in OpReader::new(parts.ops) {
                match op? {
                    Op::Block(now) => block = now,
                    Op::Plain(run) => {
                        let pages = run.pages().filter(|page| asked(block, *page));
                        batch.asked.extend(pages.map(|page| (block, page)));
                    }
                    _ => {}
                }
            }
        }
        self.apply(body, true, contents, batch)
    }

    /// Says how it went with the pages of [`Batch::shared`], in their order: those that were not
    /// mapped are written, unless a newer version came in the meantime.
    ///
    /// To be called before anything of the batch is written, and before the next frame is applied:
    /// a newer copy of a page may be forwarded only when its mapping is through, and device state
    /// only when all are.
    pub fn shared_done<B>(&mut self, is_mapped: &[bool], batch: &mut Batch<B>) {
        let State::Streaming(streaming) = &mut self.state else {
            return;
        };
        let shared = std::mem::take(&mut batch.shared);
        let mut is_mapped = is_mapped.iter().copied();
        for page in shared {
            let is_mapped = is_mapped.next().unwrap_or(false);
            if streaming.waiting.mapping_done((page.block, page.page)) && !is_mapped {
                streaming.put(page.block, page.page, page.bytes, batch);
            }
        }
        streaming.flush(&mut self.next_ping, batch);
        batch.close_head();
    }

    /// Contents came, from another connection or another host: pages that wait for them are
    /// written to `batch`, which is empty, or to be mapped as those of a frame are.
    pub fn arrived<B>(
        &mut self,
        contents: impl IntoIterator<Item = Arrived<B>>,
        batch: &mut Batch<B>,
    ) where
        B: Clone,
    {
        let State::Streaming(streaming) = &mut self.state else {
            return;
        };
        for Arrived { entry, body, at } in contents {
            for (version, page) in streaming.waiting.take_for(entry) {
                let bytes = Segment::Held(body.clone(), at);
                if streaming.share_or_put(version, page, (Some(entry), bytes), batch) {
                    batch.placed.push(Placed {
                        entry,
                        block: version.block,
                        page,
                        literal_at: None,
                    });
                }
            }
        }
        streaming.flush_unless_shared(&mut self.next_ping, batch);
        batch.close_head();
    }

    /// These entries will not come: the source is asked for the pages that wait for them.
    pub fn not_coming<B>(&mut self, entries: &[EntryId], batch: &mut Batch<B>) {
        if let State::Streaming(streaming) = &mut self.state {
            for (block, page) in entries
                .iter()
                .flat_map(|entry| streaming.waiting.give_up(*entry))
            {
                batch.ask_for(block, page);
            }
        }
    }

    /// The entries that keep the stream from its end; none until the guest is stopped, which it is
    /// once its last RAM section begins. Not only when that section has come: the source may not be
    /// allowed to send more before these are here. None after a switch to post-copy: the guest runs, and
    /// what it needs is sent ahead.
    pub fn last_wanted(&self) -> impl Iterator<Item = EntryId> {
        let is_stopped = self.is_in_last_round() && !self.has_switched();
        self.wanted().take_while(move |_| is_stopped)
    }

    /// The entries that pages wait for.
    pub fn wanted(&self) -> impl Iterator<Item = EntryId> {
        let streaming = match &self.state {
            State::Streaming(streaming) => Some(streaming),
            State::Opening { .. } => None,
        };
        streaming.into_iter().flat_map(|s| s.waiting.entries())
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
            State::Opening { decoder, empties } => {
                let (Op::Raw(bytes) | Op::RamStart(bytes)) = op else {
                    return Err(UnpackError::OutOfPlace {
                        what: "pages before the block list",
                    });
                };
                feed(decoder, bytes, |item| match item {
                    Item::Header { .. } | Item::Command { .. } => {
                        *empties |= matches!(
                            item,
                            Item::Command {
                                command: Command::PostcopyAdvise { .. },
                                ..
                            }
                        );
                        matches!(op, Op::Raw(_))
                    }
                    Item::RamStart { .. } => matches!(op, Op::RamStart(_)),
                    _ => false,
                })?;
                batch.head.extend_from_slice(bytes);
                if matches!(op, Op::RamStart(_)) {
                    let decoder = std::mem::take(decoder);
                    check_blocks(decoder.blocks(), self.here.as_ref())?;
                    let mut begun = Streaming::begin(decoder, *empties, &self.mappable)?;
                    if self.preempts {
                        begun.preempt = Some(PreemptEncoder::new(Arc::clone(&begun.blocks)));
                    }
                    self.state = State::Streaming(begun);
                }
                return Ok(());
            }
        };
        match op {
            Op::Zero(run) => streaming.pages(frame, run, |s, page| {
                s.put_zero(frame.block, page, batch);
            }),
            Op::Fill(run, byte) => {
                let at = batch.scratch.len();
                batch.scratch.resize(at + PAGE_SIZE, byte);
                streaming.pages(frame, run, |s, page| {
                    s.share_or_put(frame.version(), page, (None, Segment::Scratch(at)), batch);
                })
            }
            Op::Plain(run) => streaming.pages_with_bytes(frame, run, None, batch),
            Op::Literal(run, entry) => streaming.pages_with_bytes(frame, run, Some(entry), batch),
            Op::Reference(run, entry) => {
                streaming.references(frame, (run, entry), None, contents, batch)
            }
            Op::Remote(remote) => {
                let pages = (remote.run, remote.first);
                streaming.references(frame, pages, Some(&remote), contents, batch)
            }
            // The receiver's business.
            Op::Forward(_) => Ok(()),
            Op::Raw(bytes) => streaming.raw(bytes, batch),
            Op::Package(bytes) => streaming.package(bytes, batch),
            Op::EndBegin => streaming.begin_end(batch),
            Op::EndClosed => streaming.close_end(batch),
            Op::Tail(bytes) => streaming.tail(bytes, batch),
            Op::RamStart(_) | Op::Block(_) | Op::Shared(_) => Err(UnpackError::OutOfPlace {
                what: "a second block list",
            }),
        }
    }
}

/// Checks that the guest is not much longer than the target QEMU's.
fn check_blocks(
    blocks: Option<&Arc<BlockList>>,
    here: Option<&HashMap<String, u64>>,
) -> Result<(), UnpackError> {
    let (Some(blocks), Some(here)) = (blocks, here) else {
        return Ok(());
    };
    let growth = blocks.iter().map(|(_, block)| {
        let known = here.get(&*block.name).copied().unwrap_or(0);
        block.used_len.pages().saturating_sub(known)
    });
    let pages: u64 = growth.sum();
    if pages > MAX_GROWTH {
        return Err(UnpackError::OtherGuest { pages });
    }
    Ok(())
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

/// Literals of a body that stand one after another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LiteralRun {
    /// First entry.
    pub first: EntryId,
    /// Number of pages.
    pub count: u32,
    /// Offset of the first page's bytes.
    pub at: usize,
    /// Target hosts to pass them on to.
    pub forward: HostSet,
}

/// Contents that a body names and another connection brings. The receiver tells the store of them
/// in the order of arrival: a reference of another VM may rely on it.
///
/// # Errors
/// A malformed body.
pub fn remotes(body: &[u8]) -> Result<Vec<Remote<'_>>, UnpackError> {
    let mut remotes = Vec::new();
    for op in OpReader::new(split_pages_body(body)?.ops) {
        if let Op::Remote(remote) = op? {
            remotes.push(remote);
        }
    }
    Ok(remotes)
}

impl LiteralRun {
    /// The entries, and where in the body their pages start.
    pub fn contents(self) -> impl Iterator<Item = (EntryId, usize)> {
        (0..self.count).map(move |i| (self.first.plus(i), self.at + i as usize * PAGE_SIZE))
    }
}

/// Runs of literals in a body. The target's receiver enters them into its store in the order of
/// arrival, before any VM's thread can ask for them.
///
/// # Errors
/// A malformed body.
pub fn literal_runs(body: &[u8]) -> Result<Vec<LiteralRun>, UnpackError> {
    let parts = split_pages_body(body)?;
    let mut at = body.len() - parts.pages.len();
    let (mut runs, mut forward) = (Vec::new(), HostSet::EMPTY);
    for op in OpReader::new(parts.ops) {
        let op = op?;
        let needed = op.pages_with_bytes() as usize * PAGE_SIZE;
        if body.len() - at < needed {
            return Err(UnpackError::PageBytes);
        }
        match op {
            Op::Forward(hosts) => forward = hosts,
            Op::Literal(run, first) => runs.push(LiteralRun {
                first,
                count: run.count,
                at,
                forward,
            }),
            _ => {}
        }
        at += needed;
    }
    Ok(runs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use page::ByteLen;
    use qstream::Block;

    #[test]
    fn a_guest_that_its_target_qemu_has_no_room_for_is_refused_before_anything_is_kept_for_it() {
        let guest = |blocks: &[(&str, u64)]| {
            let block = |&(name, pages): &(&str, u64)| Block {
                name: name.into(),
                used_len: ByteLen(pages * PAGE_SIZE as u64),
                host_page: ByteLen(PAGE_SIZE as u64),
            };
            Arc::new(BlockList::new(blocks.iter().map(block).collect()).unwrap())
        };
        let here = [("pc.ram", 1 << 20), ("/rom@etc/acpi/tables", 32)];
        let here = HashMap::from(here.map(|(name, pages)| (name.to_owned(), pages)));
        let check = |blocks: &[(&str, u64)]| check_blocks(Some(&guest(blocks)), Some(&here));
        assert!(check(&[("pc.ram", 1 << 20), ("/rom@etc/acpi/tables", 512)]).is_ok());
        for hostile in [("pc.ram", 1 << 32), ("more", 1 << 20)] {
            let refused = check(&[hostile]);
            assert!(matches!(refused, Err(UnpackError::OtherGuest { .. })));
        }
    }
}
