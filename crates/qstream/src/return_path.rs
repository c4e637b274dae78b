//! The return path: what a target QEMU says to the source, on the same socket.
//!
//! | number | message | payload |
//! |---|---|---|
//! | 0 | invalid | |
//! | 1 | `Shut` | be32 status |
//! | 2 | `Pong` | be32 value |
//! | 3 | `ReqPagesId` | be64 start, be32 length, counted block name |
//! | 4 | `ReqPages` | be64 start, be32 length |
//! | 5 | `RecvBitmap` | counted block name; behind the counted length be64 size, bitmap, be64 mark |
//! | 6 | `ResumeAck` | be32 value |
//! | 7 | `SwitchoverAck` | none |
//!
//! All messages are decoded, those of post-copy too: whether one may come now is for the state
//! machine above to say.

use thiserror::Error;

use crate::reader::{Halt, Reader};

/// Longest bitmap, in bytes: that of a block of 1 TiB.
pub const MAX_BITMAP: usize = (1 << 40) / page::PAGE_SIZE / 8;

/// No message is longer: number and length, QEMU's limit of 512 bytes, and a bitmap with its size
/// and mark.
pub const MAX_RETURN_ITEM: usize = 4 + 512 + 8 + MAX_BITMAP + 8;

const BITMAP_MARK: u64 = 0x0123_4567_89ab_cdef;

/// A message of the target QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReturnMessage<'a> {
    /// The last message: 0 if the target loaded everything and runs (or waits, if it was started
    /// paused), anything else if it failed.
    Shut(u32),
    /// The answer to a ping: everything before it has been loaded.
    Pong(u32),
    /// A request for pages of the named block.
    ReqPagesId {
        /// Byte offset in the block.
        start: u64,
        /// Bytes wanted.
        len: u32,
        /// Name of the block.
        block: &'a str,
    },
    /// A request for pages of the block that was named last.
    ReqPages {
        /// Byte offset in the block.
        start: u64,
        /// Bytes wanted.
        len: u32,
    },
    /// The pages that the target has, for the recovery of a post-copy migration.
    RecvBitmap {
        /// Name of the block.
        block: &'a str,
        /// A bit for each page, least significant first; a multiple of 8 bytes.
        bitmap: &'a [u8],
    },
    /// The target is ready to resume a post-copy migration.
    ResumeAck(u32),
    /// All devices of the target agree to the switch-over.
    SwitchoverAck,
}

/// What [`ReturnDecoder::decode`] found.
#[derive(Debug, PartialEq, Eq)]
pub enum ReturnStep<'a> {
    /// The message at the start of the input.
    Message {
        /// What it says.
        message: ReturnMessage<'a>,
        /// The whole message, to be forwarded verbatim: as many bytes are consumed.
        raw: &'a [u8],
    },
    /// The input ends inside a message.
    NeedMore {
        /// Total length that the input must have before another attempt can get further; more
        /// than it has now, at most [`MAX_RETURN_ITEM`].
        at_least: usize,
    },
}

/// Why a return path cannot be decoded. It is lost from here on.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ReturnError {
    /// An unknown message, or a known one with a payload of a wrong length.
    #[error("return path message {number} with {len} bytes of payload is unknown")]
    BadMessage {
        /// Message number.
        number: u16,
        /// Payload length.
        len: u16,
    },
    /// A block name that is empty, not UTF-8, or does not fill the payload.
    #[error("malformed block name in return path message {0}")]
    BadName(u16),
    /// A request relies on the block of an earlier one, but there was none.
    #[error("the first page request names no block")]
    NoCurrentBlock,
    /// A bitmap that is empty, no multiple of 8 bytes, or longer than [`MAX_BITMAP`].
    #[error("received-page bitmap of {0} bytes")]
    BadBitmapSize(u64),
    /// A bitmap is not followed by its end mark.
    #[error("received-page bitmap ends with {0:#018x}")]
    BadBitmapMark(u64),
}

/// Decodes what a target QEMU writes, message by message. Used as [`crate::Decoder`] is.
#[derive(Debug, Default)]
pub struct ReturnDecoder {
    /// Whether a request has named a block.
    block_named: bool,
}

impl ReturnDecoder {
    /// A decoder that expects the first byte of a return path.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Decodes the message at the start of `input`, which begins where the last one ended.
    ///
    /// # Errors
    /// The return path is malformed.
    pub fn decode<'a>(&mut self, input: &'a [u8]) -> Result<ReturnStep<'a>, ReturnError> {
        let mut reader = Reader::new(input);
        match self.message(&mut reader) {
            Ok(message) => Ok(ReturnStep::Message {
                message,
                raw: reader.consumed(),
            }),
            Err(Halt::NeedMore(at_least)) => Ok(ReturnStep::NeedMore { at_least }),
            Err(Halt::Error(error)) => Err(error),
        }
    }

    fn message<'a>(
        &mut self,
        reader: &mut Reader<'a>,
    ) -> Result<ReturnMessage<'a>, Halt<ReturnError>> {
        let number = reader.be16()?;
        let len = reader.be16()?;
        let message = match (number, len) {
            (1, 4) => ReturnMessage::Shut(reader.be32()?),
            (2, 4) => ReturnMessage::Pong(reader.be32()?),
            (3, 14..=268) => {
                let (start, bytes) = (reader.be64()?, reader.be32()?);
                let block = name(reader, number, len - 12)?;
                self.block_named = true;
                ReturnMessage::ReqPagesId {
                    start,
                    len: bytes,
                    block,
                }
            }
            (4, 12) if !self.block_named => return Err(ReturnError::NoCurrentBlock.into()),
            (4, 12) => ReturnMessage::ReqPages {
                start: reader.be64()?,
                len: reader.be32()?,
            },
            (5, 2..=256) => {
                let block = name(reader, number, len)?;
                ReturnMessage::RecvBitmap {
                    block,
                    bitmap: bitmap(reader)?,
                }
            }
            (6, 4) => ReturnMessage::ResumeAck(reader.be32()?),
            (7, 0) => ReturnMessage::SwitchoverAck,
            _ => return Err(ReturnError::BadMessage { number, len }.into()),
        };
        Ok(message)
    }
}

impl From<ReturnError> for Halt<ReturnError> {
    fn from(error: ReturnError) -> Self {
        Self::Error(error)
    }
}

/// Reads a counted name that fills the `rest` bytes left of the payload.
fn name<'a>(reader: &mut Reader<'a>, number: u16, rest: u16) -> Result<&'a str, Halt<ReturnError>> {
    let bad = Halt::Error(ReturnError::BadName(number));
    if u16::from(reader.peek()?) + 1 != rest {
        return Err(bad);
    }
    std::str::from_utf8(reader.counted()?).map_err(|_| bad)
}

fn bitmap<'a>(reader: &mut Reader<'a>) -> Result<&'a [u8], Halt<ReturnError>> {
    let size = reader.be64()?;
    let len = usize::try_from(size)
        .ok()
        .filter(|len| *len > 0 && len % 8 == 0 && *len <= MAX_BITMAP)
        .ok_or(ReturnError::BadBitmapSize(size))?;
    let bitmap = reader.bytes(len)?;
    let mark = reader.be64()?;
    if mark != BITMAP_MARK {
        return Err(ReturnError::BadBitmapMark(mark).into());
    }
    Ok(bitmap)
}

/// Appends a message. Block names must have 1 to 255 bytes, as those of a decoded message and of
/// a [`crate::BlockList`] do.
pub fn encode_return(message: &ReturnMessage<'_>, out: &mut Vec<u8>) {
    match *message {
        ReturnMessage::Shut(status) => word_message(1, status, out),
        ReturnMessage::Pong(value) => word_message(2, value, out),
        ReturnMessage::ReqPagesId { start, len, block } => {
            let name = counted(block);
            head(3, 13 + u16::from(name), out);
            out.extend_from_slice(&start.to_be_bytes());
            out.extend_from_slice(&len.to_be_bytes());
            out.push(name);
            out.extend_from_slice(block.as_bytes());
        }
        ReturnMessage::ReqPages { start, len } => {
            head(4, 12, out);
            out.extend_from_slice(&start.to_be_bytes());
            out.extend_from_slice(&len.to_be_bytes());
        }
        ReturnMessage::RecvBitmap { block, bitmap } => {
            let name = counted(block);
            head(5, 1 + u16::from(name), out);
            out.push(name);
            out.extend_from_slice(block.as_bytes());
            out.extend_from_slice(&(bitmap.len() as u64).to_be_bytes());
            out.extend_from_slice(bitmap);
            out.extend_from_slice(&BITMAP_MARK.to_be_bytes());
        }
        ReturnMessage::ResumeAck(value) => word_message(6, value, out),
        ReturnMessage::SwitchoverAck => head(7, 0, out),
    }
}

fn head(number: u16, len: u16, out: &mut Vec<u8>) {
    out.extend_from_slice(&number.to_be_bytes());
    out.extend_from_slice(&len.to_be_bytes());
}

fn word_message(number: u16, word: u32, out: &mut Vec<u8>) {
    head(number, 4, out);
    out.extend_from_slice(&word.to_be_bytes());
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "names have at most 255 bytes"
)]
fn counted(name: &str) -> u8 {
    debug_assert!(
        (1..=255).contains(&name.len()),
        "block name of {} bytes",
        name.len()
    );
    name.len() as u8
}
