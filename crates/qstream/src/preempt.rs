//! The second channel of post-copy, with the capability `postcopy-preempt`: pages that a processor waits for.
//!
//! Nothing but records, as in a RAM section, without anything around them. The block of the record before is
//! remembered per channel: neither end knows what the main channel named last. QEMU 7.2, and newer ones with a
//! machine type as old, say with an end mark that no more comes; the others close the channel.

use std::sync::Arc;

use page::{BlockIndex, PageBytes, PageNo};

use crate::decoder::{address, end_of_section, zero_fill};
use crate::encoder::write_record;
use crate::format::record;
use crate::reader::{Halt, Reader};
use crate::{BlockList, StreamError};

/// What comes on the channel, in order.
#[derive(Debug, PartialEq, Eq)]
pub enum PreemptItem<'a> {
    /// A page with its bytes.
    Page {
        /// Block of the page; always in the list.
        block: BlockIndex,
        /// Page inside the block.
        page: PageNo,
        /// The content.
        bytes: &'a PageBytes,
    },
    /// A page of zeros.
    Zero {
        /// Block of the page; always in the list.
        block: BlockIndex,
        /// Page inside the block.
        page: PageNo,
    },
    /// No more comes.
    End,
}

/// What [`PreemptDecoder::decode`] found.
#[derive(Debug, PartialEq, Eq)]
pub enum PreemptStep<'a> {
    /// The item at the start of the input.
    Item {
        /// What it is.
        item: PreemptItem<'a>,
        /// Bytes that it has.
        consumed: usize,
    },
    /// The input ends inside an item.
    NeedMore {
        /// Total length that the input must have before another attempt can get further; more than it has
        /// now, and less than 4400 bytes.
        at_least: usize,
    },
}

/// Decodes what a source QEMU writes into the channel.
#[derive(Debug)]
pub struct PreemptDecoder {
    blocks: Arc<BlockList>,
    current: Option<BlockIndex>,
    is_over: bool,
}

impl PreemptDecoder {
    /// At the first byte of the channel; `blocks` are those of the main channel.
    #[must_use]
    pub fn new(blocks: Arc<BlockList>) -> Self {
        Self {
            blocks,
            current: None,
            is_over: false,
        }
    }

    /// Decodes the item at the start of `input`, which begins where the last item ended.
    ///
    /// # Errors
    /// Anything else than records of pages, or what follows the end mark.
    pub fn decode<'a>(&mut self, input: &'a [u8]) -> Result<PreemptStep<'a>, StreamError> {
        let mut reader = Reader::new(input);
        match self.item(&mut reader) {
            Ok(item) => Ok(PreemptStep::Item {
                item,
                consumed: reader.position(),
            }),
            Err(Halt::NeedMore(at_least)) => Ok(PreemptStep::NeedMore { at_least }),
            Err(Halt::Error(error)) => Err(error),
        }
    }

    fn item<'a>(&mut self, reader: &mut Reader<'a>) -> Result<PreemptItem<'a>, Halt<StreamError>> {
        let word = reader.be64()?;
        if self.is_over {
            return Err(StreamError::BadRecord(word).into());
        }
        match word & record::FLAGS {
            record::PAGE | record::PAGE_CONTINUE => {
                let (block, page) = address(&self.blocks, self.current, reader, word)?;
                let bytes = reader.array()?;
                self.current = Some(block);
                Ok(PreemptItem::Page { block, page, bytes })
            }
            record::ZERO | record::ZERO_CONTINUE => {
                let (block, page) = address(&self.blocks, self.current, reader, word)?;
                zero_fill(reader)?;
                self.current = Some(block);
                Ok(PreemptItem::Zero { block, page })
            }
            _ => {
                end_of_section(word)?;
                self.is_over = true;
                Ok(PreemptItem::End)
            }
        }
    }
}

/// Writes the channel for a target QEMU. Trusts its caller, as [`crate::Encoder`] does.
#[derive(Debug)]
pub struct PreemptEncoder {
    blocks: Arc<BlockList>,
    current: Option<BlockIndex>,
}

impl PreemptEncoder {
    /// At the first byte of the channel.
    #[must_use]
    pub fn new(blocks: Arc<BlockList>) -> Self {
        Self {
            blocks,
            current: None,
        }
    }

    /// Appends what must precede the 4096 bytes of the page, which the caller writes next.
    ///
    /// # Panics
    /// If `block` is not in the block list.
    pub fn page(&mut self, block: BlockIndex, page: PageNo, out: &mut Vec<u8>) {
        let place = (block, page);
        write_record(&self.blocks, &mut self.current, record::PAGE, place, out);
    }

    /// Appends the end mark, behind which nothing may come. Every version takes it, and 7.2 waits for it.
    pub fn end(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&record::EOS.to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Block, Feature};
    use page::{ByteLen, PAGE_SIZE};

    fn blocks() -> Arc<BlockList> {
        let block = |name: &str, pages: u64| Block {
            name: name.into(),
            used_len: ByteLen(pages * PAGE_SIZE as u64),
            host_page: ByteLen(PAGE_SIZE as u64),
        };
        let blocks = vec![block("pc.ram", 8), block("rom", 1)];
        Arc::new(BlockList::new(blocks).unwrap())
    }

    /// What an input decodes to, up to where it ends or is wrong.
    fn decoded(input: &[u8]) -> (Vec<String>, Result<usize, StreamError>) {
        let (mut decoder, mut at, mut items) = (PreemptDecoder::new(blocks()), 0, Vec::new());
        loop {
            match decoder.decode(&input[at..]) {
                Ok(PreemptStep::Item { item, consumed }) => {
                    items.push(match item {
                        PreemptItem::Page { block, page, bytes } => {
                            format!("page {} {} of {}", block.0, page.0, bytes[0])
                        }
                        PreemptItem::Zero { block, page } => format!("zero {} {}", block.0, page.0),
                        PreemptItem::End => "end".to_owned(),
                    });
                    at += consumed;
                }
                Ok(PreemptStep::NeedMore { at_least }) => {
                    assert!(at_least > input.len() - at && at_least < 4400);
                    return (items, Ok(input.len() - at));
                }
                Err(error) => return (items, Err(error)),
            }
        }
    }

    fn page(word: u64, name: &[u8], byte: u8) -> Vec<u8> {
        [&word.to_be_bytes(), name, &[byte; PAGE_SIZE]].concat()
    }

    #[test]
    fn records_come_as_they_are_and_the_block_is_remembered_on_this_channel() {
        let input = [
            page(0x3008, b"\x06pc.ram", 7),
            page(0x4028, b"", 8),
            b"\0\0\0\0\0\0\0\x02\x03rom\0".to_vec(),
            b"\0\0\0\0\0\0\0\x22\0".to_vec(),
            b"\0\0\0\0\0\0\0\x10".to_vec(),
        ]
        .concat();
        let expected = [
            "page 0 3 of 7",
            "page 0 4 of 8",
            "zero 1 0",
            "zero 1 0",
            "end",
        ];
        assert_eq!(
            decoded(&input),
            (expected.map(str::to_owned).to_vec(), Ok(0))
        );
        for cut in 0..input.len() {
            let (items, rest) = decoded(&input[..cut]);
            assert!(
                items
                    .iter()
                    .zip(expected)
                    .all(|(found, item)| found == item)
            );
            assert!(rest.is_ok(), "at {cut}");
        }
    }

    #[test]
    fn what_is_no_page_of_the_guest_is_refused() {
        let error = |input: &[u8]| decoded(input).1.expect_err("it was accepted");
        let cases = [
            (page(0x3028, b"", 0), StreamError::NoCurrentBlock),
            (page(0x8, b"\x03ram", 0), StreamError::UnknownBlock),
            (
                b"\0\0\0\0\0\0\0\x02\x03rom\x01".to_vec(),
                StreamError::BadFill(1),
            ),
            (
                b"\0\0\0\0\0\0\0\x40".to_vec(),
                StreamError::Unsupported(Feature::Xbzrle),
            ),
            (
                b"\0\0\0\0\0\0\x10\x10".to_vec(),
                StreamError::BadRecord(0x1010),
            ),
            (
                b"\0\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x10".to_vec(),
                StreamError::BadRecord(0x10),
            ),
        ];
        for (input, expected) in cases {
            assert_eq!(error(&input), expected);
        }
        let outside = error(&page(0x1008, b"\x03rom", 0));
        assert!(matches!(
            outside,
            StreamError::PageOutside { offset: 0x1000, .. }
        ));
    }

    #[test]
    fn what_is_written_is_read_again() {
        let (mut encoder, mut out) = (PreemptEncoder::new(blocks()), Vec::new());
        let pages = [(0, 3, 1), (0, 1, 2), (1, 0, 3), (0, 7, 4)];
        for (block, page, byte) in pages {
            encoder.page(BlockIndex(block), PageNo(page), &mut out);
            out.extend_from_slice(&[byte; PAGE_SIZE]);
        }
        encoder.end(&mut out);
        let mut expected = pages
            .map(|(b, p, byte)| format!("page {b} {p} of {byte}"))
            .to_vec();
        expected.push("end".to_owned());
        assert_eq!(decoded(&out), (expected, Ok(0)));
        // Four words, three names, four pages, the end mark.
        assert_eq!(out.len(), 4 * 8 + 7 + 4 + 7 + 4 * PAGE_SIZE + 8);
    }
}
