//! The RAM block list: what the START section announces and every record refers to.

use std::collections::HashSet;
use std::ops::Index;

use page::{BlockIndex, ByteLen, PAGE_SIZE, PageNo};

use crate::StreamError;
use crate::format::record;
use crate::reader::{Halt, Reader};

/// Most blocks that a list may have.
///
/// QEMU guests have tens: one for each memory backend (at most 256 DIMM slots), ROM and device
/// memory. 1024 of them take at most 272 KiB on the wire, which [`crate::MAX_ITEM`] includes.
pub const MAX_BLOCKS: usize = 1024;

/// One contiguous piece of guest memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// QEMU's name for it, 1 to 255 bytes: `pc.ram`, `0000:00:01.0/vga.vram`, ...
    pub name: Box<str>,
    /// Bytes in use, whole pages, at least one. Fixed for the life of the stream.
    pub used_len: ByteLen,
    /// Size of the host's pages that back it; other than 4 KiB only if the stream announces
    /// post-copy, which places whole pages of the host.
    pub host_page: ByteLen,
}

impl Block {
    /// The page that starts at byte `offset`, if it lies inside the block.
    #[inline]
    pub(crate) fn page_at(&self, offset: u64) -> Option<PageNo> {
        (offset < self.used_len.0)
            .then(|| PageNo::from_offset(offset))
            .flatten()
    }
}

/// The blocks of a VM in QEMU's order, largest first. Never empty, names are unique.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockList {
    blocks: Box<[Block]>,
}

impl BlockList {
    /// Checks the blocks of a VM.
    ///
    /// # Errors
    /// [`StreamError::BadBlockList`] if there is no block or more than [`MAX_BLOCKS`], if a name
    /// is not unique or not 1 to 255 bytes long, or if a length is not 1 to 2^32 whole pages.
    pub fn new(blocks: Vec<Block>) -> Result<Self, StreamError> {
        if blocks.is_empty() || blocks.len() > MAX_BLOCKS {
            return Err(StreamError::BadBlockList("no blocks, or too many"));
        }
        let mut names = HashSet::with_capacity(blocks.len());
        for Block { name, used_len, .. } in &blocks {
            if name.is_empty() || name.len() > usize::from(u8::MAX) {
                return Err(StreamError::BadBlockList("name not 1 to 255 bytes long"));
            }
            if !names.insert(name) {
                return Err(StreamError::BadBlockList("name occurs twice"));
            }
            let last = used_len.0.checked_sub(PAGE_SIZE as u64);
            if last.and_then(PageNo::from_offset).is_none() {
                return Err(StreamError::BadBlockList(
                    "length not 1 to 2^32 whole pages",
                ));
            }
        }
        Ok(Self {
            blocks: blocks.into(),
        })
    }

    /// The block at `index`.
    #[inline]
    #[must_use]
    pub fn get(&self, index: BlockIndex) -> Option<&Block> {
        self.blocks.get(usize::from(index.0))
    }

    /// All blocks with their indices, in order.
    pub fn iter(&self) -> impl Iterator<Item = (BlockIndex, &Block)> {
        (0..).map(BlockIndex).zip(&self.blocks)
    }

    /// The block of that name.
    #[must_use]
    pub fn index_of(&self, name: &str) -> Option<BlockIndex> {
        self.iter()
            .find(|(_, block)| *block.name == *name)
            .map(|(index, _)| index)
    }

    /// Whether the page lies in a block of the list: to be asked before a peer's page reaches
    /// [`crate::Encoder`].
    #[inline]
    #[must_use]
    pub fn holds(&self, block: BlockIndex, page: PageNo) -> bool {
        self.get(block)
            .is_some_and(|block| page.offset() < block.used_len.0)
    }

    /// Pages of all blocks together.
    #[must_use]
    pub fn total_pages(&self) -> u64 {
        self.blocks.iter().map(|block| block.used_len.pages()).sum()
    }

    /// Number of blocks, 1 to [`MAX_BLOCKS`].
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a list is never empty")]
    pub fn len(&self) -> usize {
        self.blocks.len()
    }
}

impl Index<BlockIndex> for BlockList {
    type Output = Block;

    /// # Panics
    /// If there is no such block.
    #[inline]
    fn index(&self, index: BlockIndex) -> &Block {
        &self.blocks[usize::from(index.0)]
    }
}

/// Reads the record with the total and the entries that add up to it.
pub(crate) fn decode(
    reader: &mut Reader<'_>,
    ignore_shared: bool,
    page_sizes: Option<u64>,
) -> Result<BlockList, Halt<StreamError>> {
    let bad = |what| Halt::Error(StreamError::BadBlockList(what));
    let word = reader.be64()?;
    if word & record::FLAGS != record::MEM_SIZE {
        return Err(bad("it does not start with the total size"));
    }
    let mut remaining = word & !record::FLAGS;
    let mut blocks = Vec::new();
    while remaining > 0 {
        if blocks.len() == MAX_BLOCKS {
            return Err(bad("too many blocks"));
        }
        let name = std::str::from_utf8(reader.counted()?).map_err(|_| bad("name not UTF-8"))?;
        let used_len = reader.be64()?;
        if used_len == 0 {
            return Err(bad("empty block"));
        }
        remaining = remaining
            .checked_sub(used_len)
            .ok_or(bad("lengths exceed the total"))?;
        if ignore_shared {
            // Guest physical address, for the target to compare. It is of no use to a proxy.
            reader.be64()?;
        }
        blocks.push(Block {
            name: name.into(),
            used_len: ByteLen(used_len),
            host_page: host_page(reader, page_sizes, remaining == 0)?,
        });
    }
    Ok(BlockList::new(blocks)?)
}

/// Reads the host's page size, which stands there only if it is not the guest's. Otherwise the next
/// entry follows, whose name has a length that is not 0 as the first byte of a page size is; or,
/// after the `last`, a record, which unlike a page size has flags.
fn host_page(
    reader: &mut Reader<'_>,
    page_sizes: Option<u64>,
    last: bool,
) -> Result<ByteLen, Halt<StreamError>> {
    let small = ByteLen(PAGE_SIZE as u64);
    if page_sizes.is_none_or(|sizes| sizes == small.0) || (!last && reader.peek()? != 0) {
        return Ok(small);
    }
    let mut ahead = *reader;
    let size = ahead.be64()?;
    if last && size & record::FLAGS != 0 {
        return Ok(small);
    }
    if !size.is_power_of_two() || size & page_sizes.unwrap_or(0) == 0 {
        return Err(StreamError::BadBlockList("page size that was not announced").into());
    }
    *reader = ahead;
    Ok(ByteLen(size))
}
