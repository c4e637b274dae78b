//! Streams short enough to try every split of them. They are the seeds of the fuzz targets, too.

use qstream::Item;

use crate::common::decode_all;
use crate::rewriter::Rewriter;

/// Bytes that are kept of the tail, which after post-copy is shorter.
pub(crate) const TAIL: usize = 100;

/// A stream cut down to the first records of its first sections and blocks and the start of its
/// tail, so that all splits can be tried.
pub(crate) fn shortened(stream: &[u8]) -> Vec<u8> {
    let mut rewriter = Rewriter::default();
    let (mut records, mut sections, mut current) = (0, 0, None);
    decode_all(stream, |item, decoder| match *item {
        Item::Tail(raw) => rewriter.out.extend_from_slice(&raw[..raw.len().min(TAIL)]),
        Item::PackageBegin { .. } => {
            sections = 0;
            rewriter.item(item, decoder);
        }
        Item::PartBegin if sections == 2 => records = usize::MAX,
        Item::PartBegin | Item::EndBegin => {
            records = 0;
            sections += 1;
            rewriter.item(item, decoder);
        }
        Item::Page { block, .. } | Item::Zero { block, .. } => {
            records = records.saturating_add(1);
            if records <= 2 || (current != Some(block) && records < usize::MAX) {
                rewriter.item(item, decoder);
            }
            current = Some(block);
        }
        _ => rewriter.item(item, decoder),
    })
    .unwrap();
    rewriter.out
}
