//! The target QEMU: loads a stream, and checks what it is given against the source's history.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use page::{BlockIndex, PageBytes, PageNo};
use qstream::{Command, Decoder, Item, Step};

use crate::guest::{Content, Layout, SourceQemu, bytes_of, content_of};

/// What the guest's page holds at the target.
#[derive(Clone, Copy)]
struct Page {
    content: Content,
    /// The oldest version of the source's page that the stream can have put here. A repair may
    /// be newer, and is replaced by what the stream has: QEMU sends the newer version again.
    version: usize,
}

pub(crate) struct TargetQemu {
    layout: Arc<Layout>,
    decoder: Decoder,
    unread: Vec<u8>,
    /// Position in the stream where each piece that was written ends, and of what age it is.
    pieces: VecDeque<(u64, Option<u64>)>,
    written: u64,
    pages: Vec<Option<Page>>,
    /// For each page that was mapped, how much had been written before.
    mapped: HashMap<usize, u64>,
    /// Pages that it was told to forget, and has not got since.
    pub(crate) forgotten: BTreeSet<usize>,
    pub(crate) package: Vec<u8>,
    pub(crate) tail: Vec<u8>,
    /// Pings that it has answered, oldest first.
    pub(crate) pongs: Vec<u32>,
}

impl TargetQemu {
    pub(crate) fn new(layout: Arc<Layout>) -> Self {
        Self {
            decoder: Decoder::new(),
            unread: Vec::new(),
            pieces: VecDeque::new(),
            written: 0,
            pages: vec![None; layout.len()],
            mapped: HashMap::new(),
            forgotten: BTreeSet::new(),
            package: Vec::new(),
            tail: Vec::new(),
            pongs: Vec::new(),
            layout,
        }
    }

    /// Takes bytes; those of a repair with the position up to which the stream had been read
    /// before the repair was.
    pub(crate) fn write(&mut self, bytes: &[u8], repair_as_of: Option<u64>) {
        self.unread.extend_from_slice(bytes);
        self.written += bytes.len() as u64;
        self.pieces.push_back((self.written, repair_as_of));
    }

    /// The age of the piece that holds the item before the decoder's position.
    fn repair_as_of(&mut self) -> Option<u64> {
        let position = self.decoder.position();
        while self.pieces.front()?.0 < position {
            self.pieces.pop_front();
        }
        self.pieces.front()?.1
    }

    /// Puts `content` into a page: it must be a version that is not older than what the stream
    /// has put there before, and a repair not older than what the stream had before it was read.
    fn put(&mut self, row: usize, content: Content, source: &SourceQemu) {
        if self.has_switched() {
            return self.put_once(row, content, source);
        }
        self.is_written(row);
        let as_of = self.repair_as_of();
        let page = self.pages[row];
        let mut oldest = page.map_or(0, |page| page.version);
        if let Some(position) = as_of {
            let wanted = source.version_at(row, position);
            oldest = oldest.max(wanted.expect("a repair of a page that was never sent"));
        }
        let newer = source.versions_from(row, oldest);
        let Some(index) = newer.iter().position(|version| *version == content) else {
            panic!("page {row} becomes {content}, which is older than {newer:?}");
        };
        self.pages[row] = Some(Page {
            content,
            version: oldest + if as_of.is_some() { 0 } else { index },
        });
    }

    /// Whether the guest could run here, before its memory.
    pub(crate) fn has_switched(&self) -> bool {
        self.decoder.has_switched()
    }

    /// After a switch: a page that was forgotten, once, as it was when the guest stopped.
    fn put_once(&mut self, row: usize, content: Content, source: &SourceQemu) {
        assert!(self.forgotten.remove(&row), "page {row} comes twice");
        assert_eq!(content, source.read(row), "page {row} is stale");
        let version = source.versions_from(row, 0).len() - 1;
        self.pages[row] = Some(Page { content, version });
    }

    /// Maps a page from the pool: nothing may have been written to it, nor any device state.
    pub(crate) fn map(&mut self, row: usize, content: Content, source: &SourceQemu) {
        assert!(self.tail.is_empty(), "device state came before a mapping");
        assert!(self.pages[row].is_none(), "page {row} was written already");
        assert_ne!(content, 0, "zero pages take no memory");
        let versions = source.versions_from(row, 0);
        let version = versions.iter().position(|version| *version == content);
        let version = version.expect("a content that the page never had");
        self.pages[row] = Some(Page { content, version });
        let twice = self.mapped.insert(row, self.written);
        assert_eq!(twice, None, "page {row} is mapped twice");
    }

    /// Writing to a page that was mapped gives it memory of its own; what is older than the mapping
    /// would have been lost under it.
    fn is_written(&self, row: usize) {
        let mapped = self.mapped.get(&row);
        assert!(
            mapped.is_none_or(|before| self.decoder.position() > *before),
            "page {row} was mapped over a copy on its way"
        );
    }

    pub(crate) fn unread(&self) -> usize {
        self.unread.len()
    }

    /// Loads the items in the first `most` bytes.
    pub(crate) fn load(&mut self, most: usize, source: &SourceQemu) {
        let unread = std::mem::take(&mut self.unread);
        let (mut rest, not_yet) = unread.split_at(most.min(unread.len()));
        while let Step::Item { item, consumed } = self.decoder.decode(rest).expect("a valid stream")
        {
            rest = &rest[consumed..];
            match item {
                Item::Page { block, page, bytes } => {
                    self.put(self.layout.row(block, page), content_of(bytes), source);
                }
                Item::Zero { block, page } => self.put(self.layout.row(block, page), 0, source),
                Item::Command {
                    command: Command::Ping(value),
                    ..
                } => self.pongs.push(value),
                Item::Command {
                    command: Command::PostcopyAdvise { .. },
                    ..
                } => self.pages.fill(None),
                Item::Discard { discard, .. } => {
                    assert!(self.package.is_empty());
                    for page in discard.runs().flat_map(|run| run.pages()) {
                        let row = self.layout.row(discard.block, page);
                        self.pages[row] = None;
                        self.forgotten.insert(row);
                    }
                }
                Item::Package(bytes) => self.package.extend_from_slice(bytes),
                Item::Tail(bytes) => self.tail.extend_from_slice(bytes),
                _ => {}
            }
        }
        self.unread = [rest, not_yet].concat();
    }

    pub(crate) fn content(&self, row: usize) -> Option<Content> {
        self.pages[row].map(|page| page.content)
    }

    /// The page as another process would read it.
    pub(crate) fn read(&self, block: BlockIndex, page: PageNo) -> PageBytes {
        bytes_of(self.content(self.layout.row(block, page)).unwrap_or(0))
    }
}
