//! The main channel: any bytes a source QEMU, or whoever speaks in its place, may send.

#![no_main]

use libfuzzer_sys::fuzz_target;
use qstream::{Decoder, MAX_ITEM, Step, StreamError};

#[path = "../../crates/qstream/tests/streams/rewriter.rs"]
mod rewriter;
use rewriter::Rewriter;

/// Rewrites `stream` as if it arrived in pieces of `piece` bytes.
fn rewrite(stream: &[u8], piece: usize) -> (Vec<u8>, Result<(), StreamError>) {
    let (mut decoder, mut rewriter) = (Decoder::new(), Rewriter::default());
    let (mut start, mut end) = (0, 0);
    loop {
        match decoder.decode(&stream[start..end]) {
            Ok(Step::Item { item, consumed }) => {
                assert!(consumed > 0);
                rewriter.item(&item, &decoder);
                start += consumed;
                assert_eq!(decoder.position(), start as u64);
            }
            Ok(Step::NeedMore { at_least }) => {
                assert!(at_least > end - start && at_least <= MAX_ITEM);
                if end == stream.len() {
                    return (rewriter.out, Ok(()));
                }
                end = end.saturating_add(piece).min(stream.len());
            }
            Err(error) => return (rewriter.out, Err(error)),
        }
    }
}

fuzz_target!(|stream: &[u8]| {
    let whole = rewrite(stream, usize::MAX);
    let piece = 1 + usize::from(stream.last().copied().unwrap_or(0));
    assert_eq!(rewrite(stream, piece), whole, "in pieces of {piece}");

    // What was written is valid, and written again it stays as it is; the last item may need
    // another byte to be seen.
    let (out, outcome) = rewrite(&whole.0, usize::MAX);
    assert_eq!(outcome, Ok(()));
    assert!(whole.0.starts_with(&out));
});
