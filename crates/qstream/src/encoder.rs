//! RAM sections for a target QEMU.

use std::sync::Arc;

use page::{BlockIndex, PageNo};

use crate::BlockList;
use crate::format::{record, section};

/// Writes RAM sections in QEMU's own way: a block is named only when it changes.
///
/// It trusts its caller, who has validated what came from a peer (see [`BlockList::holds`]).
/// After the END section is closed no RAM may follow: the target would take it for device state.
#[derive(Debug)]
pub struct Encoder {
    blocks: Arc<BlockList>,
    section_id: u32,
    footers: bool,
    /// Block of the last record; the target remembers it across sections.
    current: Option<BlockIndex>,
    section_open: bool,
}

impl Encoder {
    /// An encoder whose target has read the header and the RAM START section.
    ///
    /// `blocks`, `ram_section_id` and `footers` are those of that START section.
    #[must_use]
    pub fn new(blocks: Arc<BlockList>, ram_section_id: u32, footers: bool) -> Self {
        Self {
            blocks,
            section_id: ram_section_id,
            footers,
            current: None,
            section_open: false,
        }
    }

    /// Appends what must precede the 4096 bytes of the page, opening a PART if no section is
    /// open. The caller writes the bytes next, from where they are.
    ///
    /// # Panics
    /// If `block` is not in the block list.
    #[inline]
    pub fn page(&mut self, block: BlockIndex, page: PageNo, out: &mut Vec<u8>) {
        self.record(record::PAGE, block, page, out);
    }

    /// Appends a record for a page of zeros, opening a PART if no section is open.
    ///
    /// # Panics
    /// If `block` is not in the block list.
    #[inline]
    pub fn zero(&mut self, block: BlockIndex, page: PageNo, out: &mut Vec<u8>) {
        self.record(record::ZERO, block, page, out);
        out.push(0);
    }

    /// Names the block of the next record even if it did not change, as QEMU does after a switch
    /// to post-copy.
    pub fn name_again(&mut self) {
        self.current = None;
    }

    /// Opens a PART section if no section is open.
    pub fn begin_part(&mut self, out: &mut Vec<u8>) {
        if !self.section_open {
            self.begin(section::PART, out);
        }
    }

    /// Closes an open PART and opens the END section.
    pub fn begin_end(&mut self, out: &mut Vec<u8>) {
        self.close(out);
        self.begin(section::END, out);
    }

    /// Ends the open section, if there is one.
    pub fn close(&mut self, out: &mut Vec<u8>) {
        if !self.section_open {
            return;
        }
        out.extend_from_slice(&record::EOS.to_be_bytes());
        if self.footers {
            out.push(section::FOOTER);
            out.extend_from_slice(&self.section_id.to_be_bytes());
        }
        self.section_open = false;
    }

    fn begin(&mut self, kind: u8, out: &mut Vec<u8>) {
        out.push(kind);
        out.extend_from_slice(&self.section_id.to_be_bytes());
        self.section_open = true;
    }

    #[inline]
    fn record(&mut self, kind: u64, block: BlockIndex, page: PageNo, out: &mut Vec<u8>) {
        self.begin_part(out);
        write_record(&self.blocks, &mut self.current, kind, (block, page), out);
    }
}

/// Appends the head of a record; `current` is the block of the one before.
#[inline]
pub(crate) fn write_record(
    blocks: &BlockList,
    current: &mut Option<BlockIndex>,
    kind: u64,
    (block, page): (BlockIndex, PageNo),
    out: &mut Vec<u8>,
) {
    if *current == Some(block) {
        out.extend_from_slice(&(page.offset() | kind | record::CONTINUE).to_be_bytes());
    } else {
        out.extend_from_slice(&(page.offset() | kind).to_be_bytes());
        let name = blocks[block].name.as_bytes();
        #[expect(
            clippy::cast_possible_truncation,
            reason = "a list's names have 1 to 255 bytes"
        )]
        out.push(name.len() as u8);
        out.extend_from_slice(name);
        *current = Some(block);
    }
}
