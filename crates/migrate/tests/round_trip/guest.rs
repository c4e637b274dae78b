//! A guest, and the source QEMU that writes its stream.

use std::sync::Arc;

use content::Identical;
use migrate::pack::{IdenticalPages, SharedPages};
use page::{BlockIndex, ContentKey, FileRange, FrameSharing, PAGE_SIZE, PageBytes, PageNo};
use qstream::{BlockList, Command, Encoder, encode_command};

use crate::opening;
use crate::rng::Rng;

/// A page content by its number: the small ones are fill pages, 0 is the zero page.
pub(crate) type Content = u32;

/// Contents below this are fill pages.
const FILLS: Content = 4;

/// Contents that guests have: few, so that pages are often equal, in one guest and across them.
const CONTENTS: usize = 40;

/// The block that cannot be read again from the source QEMU.
pub(crate) const NOT_REPAIRABLE: BlockIndex = BlockIndex(1);

pub(crate) fn bytes_of(content: Content) -> PageBytes {
    if content < FILLS {
        return [content.to_le_bytes()[0]; PAGE_SIZE];
    }
    let mut bytes = [0xee; PAGE_SIZE];
    bytes[..4].copy_from_slice(&content.to_le_bytes());
    bytes
}

/// The content with these bytes; no guest has any others.
pub(crate) fn content_of(bytes: &PageBytes) -> Content {
    let number = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    let content = match number.to_le_bytes() {
        [a, b, c, d] if u32::from(a) < FILLS && a == b && b == c && c == d => a.into(),
        _ => number,
    };
    assert!(*bytes == bytes_of(content), "bytes that no guest has");
    content
}

pub(crate) fn is_fill(content: Content) -> bool {
    content < FILLS
}

/// All pages of a guest in one row.
pub(crate) struct Layout {
    pub(crate) blocks: Arc<BlockList>,
    pub(crate) footers: bool,
    rows: Vec<(BlockIndex, PageNo)>,
}

impl Layout {
    pub(crate) fn random(rng: &mut Rng) -> Self {
        let pages = |rng: &mut Rng, most| 1 + rng.below(most) as u64;
        let blocks = opening::block_list(&[
            ("pc.ram", pages(rng, 40)),
            ("0000:00:01.0/vga.vram", pages(rng, 6)),
            ("dimm0", pages(rng, 10)),
        ]);
        let rows = blocks.iter().flat_map(|(index, block)| {
            let pages = u32::try_from(block.used_len.pages()).unwrap();
            (0..pages).map(move |page| (index, PageNo(page)))
        });
        Self {
            rows: rows.collect(),
            footers: rng.chance(80),
            blocks: Arc::clone(&blocks),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.rows.len()
    }

    pub(crate) fn address(&self, row: usize) -> (BlockIndex, PageNo) {
        self.rows[row]
    }

    pub(crate) fn row(&self, block: BlockIndex, page: PageNo) -> usize {
        self.rows.binary_search(&(block, page)).unwrap()
    }
}

/// A page of the guest: every content it ever had; the last is the present one.
#[derive(Default)]
struct Page {
    versions: Vec<Content>,
    is_dirty: bool,
    /// What the stream said of it: position after the record, and version.
    sent: Vec<(u64, usize)>,
}

/// The source QEMU with its guest.
pub(crate) struct SourceQemu {
    pub(crate) layout: Arc<Layout>,
    pages: Vec<Page>,
    encoder: Encoder,
    /// Everything written so far.
    pub(crate) stream: Vec<u8>,
    /// The page that the round is at.
    next: usize,
    rounds_left: usize,
    rounds: usize,
    /// Where device state starts, once it is written; after a switch, where memory ends.
    pub(crate) tail_at: Option<u64>,
    /// It goes over to post-copy after its rounds.
    goes_over: bool,
    /// Where the package with the device state ends, once it has gone over.
    pub(crate) switched_at: Option<u64>,
    /// That device state.
    pub(crate) package: Vec<u8>,
}

impl SourceQemu {
    pub(crate) fn new(rng: &mut Rng) -> Self {
        Self::with_mode(false, rng)
    }

    /// One that goes over to post-copy after its rounds, if it is told to.
    pub(crate) fn with_mode(goes_over: bool, rng: &mut Rng) -> Self {
        let layout = Arc::new(Layout::random(rng));
        let mut stream = opening::header();
        if goes_over {
            let page_sizes = PAGE_SIZE as u64;
            encode_command(Command::PostcopyAdvise { page_sizes }, &mut stream);
        }
        if rng.chance(50) {
            encode_command(Command::OpenReturnPath, &mut stream);
            encode_command(Command::Ping(1), &mut stream);
        }
        stream.extend(opening::ram_start(&layout.blocks, layout.footers));
        let rounds = 1 + rng.below(4);
        let pages = (0..layout.len()).map(|_| Page {
            versions: vec![random_content(rng)],
            is_dirty: true,
            sent: Vec::new(),
        });
        Self {
            pages: pages.collect(),
            encoder: opening::encoder(&layout.blocks, layout.footers),
            layout,
            stream,
            next: 0,
            rounds_left: rounds,
            rounds,
            tail_at: None,
            goes_over,
            switched_at: None,
            package: Vec::new(),
        }
    }

    /// Whether the stream's end is in QEMU's first round over the memory.
    pub(crate) fn is_first_round(&self) -> bool {
        self.rounds_left == self.rounds
    }

    /// The guest writes to a page, unless it is stopped.
    pub(crate) fn guest_writes(&mut self, rng: &mut Rng) {
        if self.tail_at.is_none() && self.switched_at.is_none() {
            let row = rng.below(self.pages.len());
            self.pages[row].versions.push(random_content(rng));
            self.pages[row].is_dirty = true;
        }
    }

    /// QEMU writes a page, a command, or everything that follows the guest's stop.
    pub(crate) fn writes(&mut self, rng: &mut Rng) {
        if self.tail_at.is_some() {
            return;
        }
        if self.switched_at.is_some() {
            return self.follows(rng);
        }
        if self.goes_over && rng.chance(3) {
            self.encoder.close(&mut self.stream);
            (self.next, self.rounds_left) = (0, 0);
            self.switch(rng);
        } else if self.next == self.pages.len() {
            self.next = 0;
            self.rounds_left -= 1;
            self.encoder.close(&mut self.stream);
            if self.rounds_left == 0 && self.goes_over {
                self.switch(rng);
            } else if self.rounds_left == 0 {
                self.finish(rng);
            }
        } else if rng.chance(10) {
            self.encoder.close(&mut self.stream);
            if rng.chance(50) {
                encode_command(Command::Ping(2), &mut self.stream);
            }
        } else {
            if self.pages[self.next].is_dirty {
                self.send(self.next, rng);
            }
            self.next += 1;
        }
    }

    /// The guest stops and goes ahead: what the target has to forget, and the device state.
    fn switch(&mut self, rng: &mut Rng) {
        let command = |number: u16, payload: &[u8], stream: &mut Vec<u8>| {
            stream.push(8);
            stream.extend(number.to_be_bytes());
            stream.extend(u16::try_from(payload.len()).unwrap().to_be_bytes());
            stream.extend(payload);
        };
        let dirty = (0..self.pages.len()).filter(|row| self.pages[*row].is_dirty);
        for row in dirty.collect::<Vec<_>>() {
            let (block, page) = self.layout.address(row);
            let name = self.layout.blocks[block].name.as_bytes();
            let mut payload = vec![0, u8::try_from(name.len()).unwrap()];
            payload.extend(name);
            payload.push(0);
            payload.extend(page.offset().to_be_bytes());
            payload.extend((PAGE_SIZE as u64).to_be_bytes());
            command(6, &payload, &mut self.stream);
        }
        encode_command(Command::Ping(2), &mut self.stream);
        let length = 1 + rng.below(3000);
        self.package = rng.bytes(length);
        let length = u32::try_from(length).unwrap().to_be_bytes();
        command(7, &length, &mut self.stream);
        self.stream.extend(&self.package);
        self.encoder.name_again();
        self.switched_at = Some(self.stream.len() as u64);
    }

    /// Memory that follows the guest: each page that was to be forgotten, once, and the end.
    fn follows(&mut self, rng: &mut Rng) {
        if rng.chance(10) {
            self.encoder.close(&mut self.stream);
        }
        if self.next == self.pages.len() || rng.chance(2) {
            return self.finish(rng);
        }
        if rng.chance(10) {
            // A processor waits for a page: the sweep goes on from there.
            self.next = rng.below(self.pages.len());
        }
        let row = self.next;
        self.next += 1;
        if self.pages[row].is_dirty {
            self.send(row, rng);
        }
    }

    /// Whether the page has followed the guest by `position` of the stream.
    pub(crate) fn has_followed(&self, row: usize, position: u64) -> bool {
        let mut sent = self.pages[row].sent.iter();
        self.switched_at
            .is_some_and(|switch| sent.any(|(at, _)| *at > switch && *at <= position))
    }

    /// The guest stops: the END section and device state.
    fn finish(&mut self, rng: &mut Rng) {
        if rng.chance(50) && self.switched_at.is_none() {
            encode_command(Command::SwitchoverStart, &mut self.stream);
        }
        self.encoder.begin_end(&mut self.stream);
        for row in 0..self.pages.len() {
            if self.pages[row].is_dirty {
                self.send(row, rng);
            }
        }
        self.encoder.close(&mut self.stream);
        self.tail_at = Some(self.stream.len() as u64);
        let tail = 1 + rng.below(3000);
        self.stream.extend(rng.bytes(tail));
    }

    fn send(&mut self, row: usize, rng: &mut Rng) {
        let (block, number) = self.layout.address(row);
        let page = &mut self.pages[row];
        page.is_dirty = false;
        let content = page.versions[page.versions.len() - 1];
        if content == 0 && rng.chance(80) {
            self.encoder.zero(block, number, &mut self.stream);
        } else {
            self.encoder.page(block, number, &mut self.stream);
            self.stream.extend(bytes_of(content));
        }
        page.sent
            .push((self.stream.len() as u64, page.versions.len() - 1));
    }

    /// What is in the page now, as another process would read it.
    pub(crate) fn read(&self, row: usize) -> Content {
        let versions = &self.pages[row].versions;
        versions[versions.len() - 1]
    }

    /// All contents that the page had from `version` on.
    pub(crate) fn versions_from(&self, row: usize, version: usize) -> &[Content] {
        &self.pages[row].versions[version..]
    }

    /// The newest version of the page that the stream has up to `position`.
    pub(crate) fn version_at(&self, row: usize, position: u64) -> Option<usize> {
        let sent = &self.pages[row].sent;
        let count = sent.partition_point(|(at, _)| *at <= position);
        Some(sent[count.checked_sub(1)?].1)
    }

    /// Contents that the stream carried as pages of repairable blocks.
    pub(crate) fn contents_sent(&self) -> impl Iterator<Item = Content> {
        let rows =
            (0..self.pages.len()).filter(|row| self.layout.address(*row).0 != NOT_REPAIRABLE);
        rows.flat_map(|row| {
            let page = &self.pages[row];
            page.sent.iter().map(|(_, version)| page.versions[*version])
        })
    }
}

fn random_content(rng: &mut Rng) -> Content {
    u32::try_from(rng.below(CONTENTS)).unwrap()
}

/// Says of some pages that they share their frame.
pub(crate) fn marks(source: &SourceQemu, percent: usize, rng: &mut Rng) -> Arc<SharedPages> {
    let blocks: Vec<_> = source.layout.blocks.iter().collect();
    let pages = |len: page::ByteLen| u32::try_from(len.pages()).unwrap();
    let shapes = blocks.iter().map(|(_, b)| (&*b.name, pages(b.used_len)));
    let mut marks = SharedPages::of_blocks(shapes);
    for (position, (_, block)) in blocks.iter().enumerate() {
        for page in 0..pages(block.used_len) {
            if rng.chance(percent) {
                let range = FileRange { file: 0, ahead: 7 };
                let of_file = rng.chance(50);
                let sharing = if of_file {
                    FrameSharing::File(range)
                } else {
                    FrameSharing::Merged
                };
                marks.mark(position, page::PageNo(page), sharing);
            }
        }
    }
    Arc::new(marks)
}

/// Whether pages with this content share for what they hold.
pub(crate) fn is_alike(content: Content) -> bool {
    content.is_multiple_of(2)
}

/// Whether a page does not share for what it holds.
pub(crate) fn is_left_out(row: usize) -> bool {
    row.is_multiple_of(5)
}

/// What shares for what it holds.
pub(crate) fn alike(source: &SourceQemu, key: &ContentKey) -> IdenticalPages {
    let mut contents = Identical::default();
    let most = Content::try_from(CONTENTS).unwrap();
    for content in (1..most).filter(|content| is_alike(*content)) {
        match u8::try_from(content) {
            Ok(byte) if is_fill(content) => contents.add_fill(byte),
            _ => contents.add(key.id_of(&bytes_of(content))),
        }
    }
    let layout = &source.layout;
    let pages = |len: page::ByteLen| u32::try_from(len.pages()).unwrap();
    let blocks = layout.blocks.iter();
    let shapes = blocks.map(|(_, block)| (&*block.name, pages(block.used_len)));
    let mut left_out = SharedPages::of_blocks(shapes);
    for row in (0..layout.len()).filter(|row| is_left_out(*row)) {
        let (block, page) = layout.address(row);
        left_out.mark(usize::from(block.0), page, FrameSharing::Merged);
    }
    IdenticalPages::new(Arc::new(contents), left_out)
}
