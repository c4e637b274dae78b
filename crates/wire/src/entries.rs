//! Lists of entries, as runs: what target hosts say to each other about contents.
//!
//! ```text
//! number of runs (LEB128) · for each: distance from the end of the run before, length (LEB128)
//! ```

use page::{EntryId, PAGE_SIZE};

use crate::frame::take_u32;
use crate::{MAX_BODY, WireError, varint};

/// Most entries of one list: a frame full of pages.
pub const MAX_ENTRIES: usize = MAX_BODY / PAGE_SIZE;

/// Appends a list of at most [`MAX_ENTRIES`], the sender's business to keep.
pub(crate) fn put(out: &mut Vec<u8>, entries: &[EntryId]) {
    let runs = || entries.chunk_by(|a, b| a.0.checked_add(1) == Some(b.0));
    varint::put(out, runs().count() as u64);
    let mut end = 0_i64;
    for run in runs() {
        let first = i64::from(run[0].0);
        varint::put(out, varint::zigzag(first - end));
        varint::put(out, run.len() as u64);
        end = first + run.len() as i64;
    }
}

/// Takes a list off the front of `input`.
pub(crate) fn take(input: &mut &[u8]) -> Result<Vec<EntryId>, WireError> {
    let mut entries = Vec::new();
    let mut end = 0_i64;
    for _ in 0..varint::take(input)? {
        let first = end
            .checked_add(varint::unzigzag(varint::take(input)?))
            .and_then(|first| u32::try_from(first).ok())
            .ok_or(WireError::NumberTooLarge)?;
        let count = take_u32(input)?;
        let after = first.checked_add(count).ok_or(WireError::NumberTooLarge)?;
        let length = entries.len() as u64 + u64::from(count);
        if count == 0 || length > MAX_ENTRIES as u64 {
            return Err(WireError::TooLong {
                what: "a list of entries",
                length,
                limit: MAX_ENTRIES as u64,
            });
        }
        entries.extend((first..after).map(EntryId));
        end = after.into();
    }
    Ok(entries)
}

/// The list as a body of its own: `Pull` and `Missing`.
#[must_use]
pub fn encode_entries(entries: &[EntryId]) -> Vec<u8> {
    let mut out = Vec::with_capacity(2 + 2 * entries.len());
    put(&mut out, entries);
    out
}

/// Reads the body of a `Pull` or `Missing` frame.
///
/// # Errors
/// Whatever a hostile peer can put there; at most [`MAX_ENTRIES`] are allocated for.
pub fn decode_entries(mut body: &[u8]) -> Result<Vec<EntryId>, WireError> {
    let entries = take(&mut body)?;
    if body.is_empty() {
        Ok(entries)
    } else {
        Err(WireError::Control("bytes after the end".into()))
    }
}

/// Reads the body of a `Contents` frame: the entries, and where in the body the first one's page
/// starts; the others follow it.
///
/// # Errors
/// As [`decode_entries`]; and page bytes that are not one page for each entry.
pub fn decode_contents(body: &[u8]) -> Result<(Vec<EntryId>, usize), WireError> {
    let mut rest = body;
    let entries = take(&mut rest)?;
    let (held, needed) = (rest.len() as u64, (entries.len() * PAGE_SIZE) as u64);
    if held == needed {
        Ok((entries, body.len() - rest.len()))
    } else {
        Err(WireError::PageBytes { held, needed })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn lists_come_back_in_their_order(numbers in proptest::collection::vec(0_u32..40, 0..200)) {
            let entries: Vec<_> = numbers.iter().map(|n| EntryId(*n | (n & 1) << 31)).collect();
            let body = encode_entries(&entries);
            prop_assert_eq!(decode_entries(&body)?, entries.clone());
            let mut contents = body.clone();
            contents.resize(body.len() + entries.len() * PAGE_SIZE, 7);
            prop_assert_eq!(decode_contents(&contents)?, (entries, body.len()));
        }

        #[test]
        fn no_bytes_make_the_decoder_panic_or_take_more_than_its_limit(body: Vec<u8>) {
            if let Ok(entries) = decode_entries(&body) {
                prop_assert!(entries.len() <= MAX_ENTRIES);
            }
            let _ = decode_contents(&body);
        }
    }

    #[test]
    fn a_short_message_cannot_claim_a_million_entries() {
        let mut body = vec![1, 0];
        varint::put(&mut body, 1_000_000);
        assert!(matches!(
            decode_entries(&body),
            Err(WireError::TooLong { .. })
        ));
    }
}
