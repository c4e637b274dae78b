//! What a source QEMU says first when it goes on with a post-copy that was interrupted.
//!
//! Its new stream has no header. For each block it asks what the target has received (command 10), and when all
//! answers are there it says that it goes on (command 9); the target acknowledges that. RAM sections follow, in the
//! same stream. Whoever lets two QEMUs talk to each other needs none of this.

use page::PageNo;

use crate::StreamError;
use crate::command::{POSTCOPY_RESUME, RECV_BITMAP};
use crate::format::section;
use crate::reader::{Halt, Reader};

/// No command is longer: type, number, length, and a counted name.
const MAX_COMMAND: usize = 1 + 2 + 2 + 1 + u8::MAX as usize;

/// A command of a stream that goes on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Recovery<'a> {
    /// Which pages of the named block has the target? Answer: [`crate::ReturnMessage::RecvBitmap`].
    Bitmap {
        /// Name of the block.
        block: &'a str,
    },
    /// It goes on. Answer: [`crate::ReturnMessage::ResumeAck`].
    Resume,
}

/// What [`decode_recovery`] found.
#[derive(PartialEq, Eq, Debug)]
pub enum RecoveryStep<'a> {
    /// The command at the start of the input.
    Command {
        /// What it says.
        command: Recovery<'a>,
        /// Bytes that it has.
        consumed: usize,
    },
    /// The input ends inside a command.
    NeedMore {
        /// Total length that the input must have before another attempt can get further; more than it
        /// has now, and some hundred bytes at most.
        at_least: usize,
    },
}

/// Decodes the command at the start of `input`, which begins where the last one ended. Behind
/// [`Recovery::Resume`] there are none.
///
/// # Errors
/// Anything else than these two commands.
pub fn decode_recovery(input: &[u8]) -> Result<RecoveryStep<'_>, StreamError> {
    let mut reader = Reader::new(input);
    match command(&mut reader) {
        Ok(command) => Ok(RecoveryStep::Command {
            command,
            consumed: reader.position(),
        }),
        Err(Halt::NeedMore(at_least)) => Ok(RecoveryStep::NeedMore {
            at_least: at_least.min(MAX_COMMAND),
        }),
        Err(Halt::Error(error)) => Err(error),
    }
}

fn command<'a>(reader: &mut Reader<'a>) -> Result<Recovery<'a>, Halt<StreamError>> {
    let kind = reader.u8()?;
    if kind != section::COMMAND {
        return Err(StreamError::UnexpectedSection(kind).into());
    }
    let (number, len) = (reader.be16()?, reader.be16()?);
    match (number, len) {
        (POSTCOPY_RESUME, 0) => Ok(Recovery::Resume),
        (RECV_BITMAP, 2..=256) if u16::from(reader.peek()?) + 1 == len => {
            let block = std::str::from_utf8(reader.counted()?);
            let block = block.map_err(|_| StreamError::UnknownBlock)?;
            Ok(Recovery::Bitmap { block })
        }
        _ => Err(StreamError::BadCommand { number, len }.into()),
    }
}

/// The answer of a target that has all pages of a block of so many: a bit for each, in whole words of
/// 64.
#[must_use]
pub fn full_bitmap(pages: PageNo) -> Vec<u8> {
    let words = pages.0.div_ceil(u64::BITS) as usize;
    vec![u8::MAX; words * 8]
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASKS: &[u8] = b"\x08\x00\x0a\x00\x07\x06pc.ram";

    #[test]
    fn a_stream_that_goes_on_asks_for_each_block_and_then_says_so() {
        let step = decode_recovery(ASKS).unwrap();
        let (command, consumed) = (Recovery::Bitmap { block: "pc.ram" }, ASKS.len());
        assert_eq!(step, RecoveryStep::Command { command, consumed });
        let step = decode_recovery(b"\x08\x00\x09\x00\x00\x02").unwrap();
        let (command, consumed) = (Recovery::Resume, 5);
        assert_eq!(step, RecoveryStep::Command { command, consumed });
    }

    #[test]
    fn every_prefix_of_a_command_needs_more_than_it_has() {
        for end in 0..ASKS.len() {
            let step = decode_recovery(&ASKS[..end]).unwrap();
            let RecoveryStep::NeedMore { at_least } = step else {
                panic!("{end} bytes are {step:?}")
            };
            assert!(at_least > end && at_least <= MAX_COMMAND);
        }
    }

    #[test]
    fn what_is_no_command_of_a_recovery_is_refused() {
        for bytes in [
            &b"QEVM\x00"[..],
            b"\x02\x00\x00\x00\x02",
            b"\x08\x00\x02\x00\x04",
            b"\x08\x00\x09\x00\x01\x00",
            b"\x08\x00\x0a\x00\x07\x05pc.ram",
            b"\x08\x00\x0a\x01\x01\xff",
            b"\x08\x00\x0a\x00\x02\x01\xff",
        ] {
            assert!(decode_recovery(bytes).is_err(), "{bytes:x?}");
        }
    }

    #[test]
    fn a_full_bitmap_has_a_bit_for_each_page_in_whole_words() {
        for (pages, bytes) in [(1, 8), (64, 8), (65, 16), (49152, 6144)] {
            let bitmap = full_bitmap(PageNo(pages));
            assert_eq!(bitmap.len(), bytes);
            assert!(bitmap.iter().all(|byte| *byte == 0xff));
        }
    }
}
