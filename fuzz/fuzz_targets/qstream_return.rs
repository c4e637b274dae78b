//! The return path: any bytes a target QEMU, or whoever speaks in its place, may send.

#![no_main]

use libfuzzer_sys::fuzz_target;
use qstream::{MAX_RETURN_ITEM, ReturnDecoder, ReturnError, ReturnStep, encode_return};

/// Decodes `input` as if it arrived in pieces of `piece` bytes, and encodes it again.
fn rewrite(input: &[u8], piece: usize) -> (Vec<u8>, usize, Result<(), ReturnError>) {
    let (mut decoder, mut out) = (ReturnDecoder::new(), Vec::new());
    let (mut start, mut end) = (0, 0);
    loop {
        match decoder.decode(&input[start..end]) {
            Ok(ReturnStep::Message { message, raw }) => {
                assert!(!raw.is_empty());
                encode_return(&message, &mut out);
                start += raw.len();
            }
            Ok(ReturnStep::NeedMore { at_least }) => {
                assert!(at_least > end - start && at_least <= MAX_RETURN_ITEM);
                if end == input.len() {
                    return (out, start, Ok(()));
                }
                end = end.saturating_add(piece).min(input.len());
            }
            Err(error) => return (out, start, Err(error)),
        }
    }
}

fuzz_target!(|input: &[u8]| {
    let whole = rewrite(input, usize::MAX);
    assert_eq!(whole.0, &input[..whole.1], "encoding differs");
    let piece = 1 + usize::from(input.last().copied().unwrap_or(0));
    assert_eq!(rewrite(input, piece), whole, "in pieces of {piece}");
});
