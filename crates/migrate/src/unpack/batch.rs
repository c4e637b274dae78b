//! What a frame turns into: bytes to write, contents placed, pages to ask for, and when to
//! acknowledge.

use std::ops::Range;

use page::{BlockIndex, EntryId, PageNo, PageRun};
use wire::{Reached, Remote};

use super::mapping::{ExpectedPage, SharedPage};

/// Where the bytes of an entry are.
#[derive(Clone, Debug)]
pub enum Found<B> {
    /// In the body of a frame, at this offset.
    Held(B, usize),
    /// In the scratch memory that was passed along, at this offset.
    Scratch(usize),
    /// Not here yet: it is on its way, or asked for, and will be said to have
    /// [`arrived`](super::Unpacker::arrived), or not to be
    /// [`coming`](super::Unpacker::not_coming).
    Coming,
    /// Nowhere at this host.
    Missing,
}

/// A content that came for pages that wait for it, checked by its id.
#[derive(Clone, Debug)]
pub struct Arrived<B> {
    /// Its entry.
    pub entry: EntryId,
    /// The frame that brought it.
    pub body: B,
    /// Where in the body it starts.
    pub at: usize,
}

/// The contents that this host has.
pub trait Contents<B> {
    /// Finds `entries` (the first one and how many), checked by their ids; appends one [`Found`] each.
    /// Bytes that are not held by a frame are appended to `scratch`. `remote` says where to get
    /// them if another connection brings them.
    fn find(
        &mut self,
        entries: (EntryId, u32),
        remote: Option<&Remote<'_>>,
        scratch: &mut Vec<u8>,
        found: &mut Vec<Found<B>>,
    );
}

/// A piece of what is written to the target QEMU.
#[derive(Clone, Debug)]
pub enum Segment<B> {
    /// Bytes of [`Batch::head`].
    Head(Range<usize>),
    /// One page of the frame that the batch was made from, at this offset of its body.
    Own(usize),
    /// One page of an earlier frame's body.
    Held(B, usize),
    /// One page of [`Batch::scratch`].
    Scratch(usize),
}

/// A content that a batch puts into a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// The entry.
    pub entry: EntryId,
    /// Where it is put.
    pub block: BlockIndex,
    /// Where it is put.
    pub page: PageNo,
    /// For a literal, where its bytes stand in the frame's body; they have yet to be hashed.
    pub literal_at: Option<usize>,
}

/// What one frame turns into.
#[derive(Debug)]
pub struct Batch<B> {
    /// Bytes that are not pages.
    pub head: Vec<u8>,
    /// What to write, in order.
    pub segments: Vec<Segment<B>>,
    /// What to write on the second channel, before that: pages that a processor waits for, or the end of the
    /// channel. Empty unless the machine [preempts](super::Unpacker::preempting).
    pub preempt: Vec<Segment<B>>,
    /// Pages that were read or made for this batch.
    pub scratch: Vec<u8>,
    /// Contents and where they are now.
    pub placed: Vec<Placed>,
    /// Pages to be mapped before anything of this batch is written; see
    /// [`shared_done`](super::Unpacker::shared_done).
    pub shared: Vec<SharedPage<B>>,
    /// Pages that this batch writes to a QEMU in post-copy, which may map them instead of copying.
    pub expected: Vec<ExpectedPage>,
    /// Pages that the target QEMU is told to forget by this batch. From before it is written until
    /// they are given to it again, reading them would wait for them.
    pub forgotten: Vec<(BlockIndex, PageRun)>,
    /// Pages that are given to a target QEMU that waits for them, after a switch to post-copy.
    pub given: Vec<(BlockIndex, PageNo)>,
    /// Those of them that go on the second channel, of which a ping on the first says nothing.
    pub preempted: Vec<(BlockIndex, PageNo)>,
    /// Pages to ask the source for.
    pub repair: Vec<(BlockIndex, PageRun)>,
    /// To be acknowledged once the batch is loaded.
    pub ack: Option<Ack>,
    /// Pages of this frame that a processor waits for.
    pub(super) asked: Vec<(BlockIndex, PageNo)>,
    pub(super) found: Vec<Found<B>>,
    /// End of the last head segment.
    head_done: usize,
}

/// How far the stream is known to be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ack {
    /// So far when the target QEMU answers this ping.
    OnPong {
        /// Value of the ping.
        ping: u32,
        /// How far.
        reached: Reached,
    },
    /// So far when it is written: at the end of RAM no ping can be put in between.
    OnWrite {
        /// How far.
        reached: Reached,
    },
}

impl<B> Default for Batch<B> {
    fn default() -> Self {
        Self {
            head: Vec::new(),
            segments: Vec::new(),
            preempt: Vec::new(),
            scratch: Vec::new(),
            placed: Vec::new(),
            shared: Vec::new(),
            expected: Vec::new(),
            forgotten: Vec::new(),
            given: Vec::new(),
            preempted: Vec::new(),
            repair: Vec::new(),
            ack: None,
            asked: Vec::new(),
            found: Vec::new(),
            head_done: 0,
        }
    }
}

impl<B> Batch<B> {
    /// Empties the batch for another frame, keeping its memory.
    pub fn clear(&mut self) {
        self.head.clear();
        self.segments.clear();
        self.preempt.clear();
        self.scratch.clear();
        self.placed.clear();
        self.shared.clear();
        self.expected.clear();
        self.forgotten.clear();
        self.given.clear();
        self.preempted.clear();
        self.asked.clear();
        self.repair.clear();
        self.found.clear();
        self.ack = None;
        self.head_done = 0;
    }

    pub(super) fn close_head(&mut self) {
        if self.head_done < self.head.len() {
            self.segments
                .push(Segment::Head(self.head_done..self.head.len()));
            self.head_done = self.head.len();
        }
    }

    pub(super) fn push_page(&mut self, segment: Segment<B>) {
        self.close_head();
        self.segments.push(segment);
    }

    /// Bytes of the second channel that `write` appends to the head.
    pub(super) fn push_preempt(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        self.close_head();
        write(&mut self.head);
        let range = self.head_done..self.head.len();
        self.head_done = self.head.len();
        self.preempt.push(Segment::Head(range));
    }

    pub(super) fn ask_for(&mut self, block: BlockIndex, page: PageNo) {
        match self.repair.last_mut() {
            Some((b, run)) if *b == block && run.end() == Some(page.0) => run.count += 1,
            _ => self.repair.push((
                block,
                PageRun {
                    start: page,
                    count: 1,
                },
            )),
        }
    }
}
