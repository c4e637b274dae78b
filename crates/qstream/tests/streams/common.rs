//! What the tests of whole streams share.

use std::fs;
use std::path::PathBuf;

use qstream::{Decoder, Item, Step, StreamError};

/// The captured streams of a kind (`main`, `return` or `refused`) with their names.
pub(crate) fn golden(kind: &str) -> Vec<(String, Vec<u8>)> {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let suffix = format!(".{kind}.zst");
    let mut streams: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter_map(|path| {
            let name = path
                .file_name()?
                .to_str()?
                .strip_suffix(&suffix)?
                .to_owned();
            Some((name, zstd::decode_all(&*fs::read(path).unwrap()).unwrap()))
        })
        .collect();
    streams.sort();
    streams
}

/// Decodes a stream that is completely there and hands each item to `each`; returns what is left
/// when more input would be needed.
pub(crate) fn decode_all<'a>(
    input: &'a [u8],
    mut each: impl FnMut(&Item<'a>, &Decoder),
) -> Result<&'a [u8], StreamError> {
    let mut decoder = Decoder::new();
    let mut rest = input;
    loop {
        match decoder.decode(rest)? {
            Step::Item { item, consumed } => {
                assert!(consumed > 0, "no progress at {}", decoder.position());
                rest = &rest[consumed..];
                each(&item, &decoder);
            }
            Step::NeedMore { at_least } => {
                assert!(at_least > rest.len());
                assert!(at_least <= qstream::MAX_ITEM);
                return Ok(rest);
            }
        }
    }
}
