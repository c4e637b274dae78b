//! The first bytes of a QEMU stream: header and START section.

use std::sync::Arc;

use page::{ByteLen, PAGE_SIZE};
use qstream::{Block, BlockList, Encoder};

pub(crate) const SECTION_ID: u32 = 2;

/// A block list of named blocks, with their lengths in pages.
pub(crate) fn block_list(blocks: &[(&str, u64)]) -> Arc<BlockList> {
    let block = |&(name, pages): &(&str, u64)| Block {
        name: name.into(),
        used_len: ByteLen(pages * PAGE_SIZE as u64),
        host_page: ByteLen(PAGE_SIZE as u64),
    };
    Arc::new(BlockList::new(blocks.iter().map(block).collect()).expect("valid blocks"))
}

/// Magic, version and configuration section.
pub(crate) fn header() -> Vec<u8> {
    b"QEVM\0\0\0\x03\x07\0\0\0\x0bpc-q35-10.0".to_vec()
}

/// The START section, with a footer if the stream has footers.
pub(crate) fn ram_start(blocks: &BlockList, footers: bool) -> Vec<u8> {
    let mut out = vec![1];
    out.extend(SECTION_ID.to_be_bytes());
    out.extend(b"\x03ram\0\0\0\0\0\0\0\x04");
    let total: u64 = blocks.iter().map(|(_, block)| block.used_len.0).sum();
    out.extend((total | 4).to_be_bytes());
    for (_, block) in blocks.iter() {
        out.push(u8::try_from(block.name.len()).expect("a short name"));
        out.extend(block.name.as_bytes());
        out.extend(block.used_len.0.to_be_bytes());
    }
    out.extend(16_u64.to_be_bytes());
    if footers {
        out.push(0x7e);
        out.extend(SECTION_ID.to_be_bytes());
    }
    out
}

/// An encoder for what follows.
pub(crate) fn encoder(blocks: &Arc<BlockList>, footers: bool) -> Encoder {
    Encoder::new(Arc::clone(blocks), SECTION_ID, footers)
}
