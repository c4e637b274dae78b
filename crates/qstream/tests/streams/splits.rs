//! Where the input is cut must not matter.

use crate::common::{decode_all, golden};
use crate::shortened::shortened;
use page::PAGE_SIZE;
use qstream::{Decoder, Item, ReturnDecoder, ReturnStep, Step};

/// What an item is and where its bytes are: equal addresses are equal bytes, not copied.
fn describe(item: &Item<'_>) -> String {
    match item {
        Item::Header { machine, raw } => format!("header {machine} {:?}", raw.as_ptr_range()),
        Item::RamStart { raw } => format!("start {:?}", raw.as_ptr_range()),
        Item::Opaque(raw) => format!("opaque {:?}", raw.as_ptr_range()),
        Item::Tail(raw) => format!("tail {:?}", raw.as_ptr_range()),
        // It comes in the pieces in which it arrives: see `joined`.
        Item::Package(raw) => format!("package of {}", raw.len()),
        Item::Page { block, page, bytes } => {
            format!("{block:?} {page:?} {:?}", bytes.as_ptr_range())
        }
        other => format!("{other:?}"),
    }
}

/// The pieces of a package as one.
fn joined(items: Vec<String>) -> Vec<String> {
    let mut out: Vec<String> = vec![];
    let length = |item: &str| item.strip_prefix("package of ")?.parse::<usize>().ok();
    for item in items {
        if let (Some(len), Some(last)) = (length(&item), out.last_mut())
            && let Some(before) = length(last)
        {
            *last = format!("package of {}", before + len);
        } else {
            out.push(item);
        }
    }
    out
}

/// How much of the stream is its tail.
fn tail_of(stream: &[u8]) -> usize {
    let mut tail = 0;
    decode_all(stream, |item, _| {
        if let Item::Tail(raw) = item {
            tail = raw.len();
        }
    })
    .unwrap();
    tail
}

/// Decodes `input` as if it arrived in two pieces.
fn decode_split(input: &[u8], split: usize) -> Vec<String> {
    let (mut decoder, mut items) = (Decoder::new(), vec![]);
    let (mut start, mut end) = (0, split);
    loop {
        match decoder.decode(&input[start..end]).unwrap() {
            Step::Item { item, consumed } => {
                start += consumed;
                items.push(describe(&item));
            }
            Step::NeedMore { at_least } => {
                assert!(at_least > end - start, "no more than there is");
                if end == input.len() {
                    return items;
                }
                // All that `at_least` promises: one byte less does not suffice.
                let less = (start + at_least - 1).clamp(end, input.len());
                assert!(matches!(
                    decoder.decode(&input[start..less]),
                    Ok(Step::NeedMore { .. })
                ));
                end = input.len();
            }
        }
    }
}

#[test]
fn a_split_at_any_byte_gives_the_same_items() {
    for (name, stream) in golden("main") {
        let input = shortened(&stream);
        let tail_len = tail_of(&input);
        assert!(
            (PAGE_SIZE..256 << 10).contains(&input.len()),
            "{name}: {}",
            input.len()
        );
        let mut whole = vec![];
        assert_eq!(
            decode_all(&input, |item, _| whole.push(describe(item))),
            Ok(&[][..])
        );
        let tail = whole.pop().unwrap();
        for split in 0..=input.len() {
            let mut parts = joined(decode_split(&input, split));
            let last = parts.pop().unwrap();
            // The tail comes in the pieces in which it arrives.
            if split <= input.len() - tail_len || split == input.len() {
                assert_eq!(last, tail, "{name} split at {split}");
            } else {
                parts.pop();
            }
            assert!(parts == whole, "{name} split at {split}");
        }
    }
}

#[test]
fn a_stream_that_arrives_byte_by_byte_gives_the_same_items() {
    for (name, stream) in golden("main") {
        let stream = shortened(&stream);
        let mut whole = vec![];
        decode_all(&stream, |item, _| match item {
            Item::Tail(_) => {}
            other => whole.push(describe(other)),
        })
        .unwrap();
        let (mut decoder, mut items, mut start) = (Decoder::new(), vec![], 0);
        for end in 0..=stream.len() {
            match decoder.decode(&stream[start..end]).unwrap() {
                Step::Item {
                    item: Item::Tail(raw),
                    consumed,
                } => {
                    assert_eq!((raw.len(), consumed), (1, 1), "{name}");
                    start += 1;
                }
                Step::Item { item, consumed } => {
                    // Two items need the byte that follows them.
                    let spare = end - start - consumed;
                    let ahead = matches!(item, Item::Header { .. } | Item::RamStart { .. });
                    assert!(spare <= usize::from(ahead), "{name}: {item:?} came late");
                    items.push(describe(&item));
                    start += consumed;
                }
                Step::NeedMore { at_least } => assert!(at_least > end - start, "{name}"),
            }
        }
        assert!(joined(items) == whole, "{name}");
        assert_eq!(start, stream.len());
    }
}

#[test]
fn a_truncated_stream_asks_for_more_and_never_ends_early() {
    for (name, stream) in golden("main") {
        let input = shortened(&stream);
        let end_of_ram = input.len() - tail_of(&input);
        for len in 0..end_of_ram {
            let mut closed = false;
            let left = decode_all(&input[..len], |item, _| closed |= *item == Item::EndClosed);
            assert!(left.is_ok() && !closed, "{name} cut at {len}: {left:?}");
        }
    }
}

#[test]
fn a_return_path_that_arrives_byte_by_byte_gives_the_same_messages() {
    for (name, stream) in golden("return") {
        let (mut decoder, mut raws, mut start) = (ReturnDecoder::new(), vec![], 0);
        for end in 0..=stream.len() {
            match decoder.decode(&stream[start..end]).unwrap() {
                ReturnStep::Message { raw, .. } => {
                    start += raw.len();
                    raws.extend_from_slice(raw);
                }
                ReturnStep::NeedMore { at_least } => assert!(at_least > end - start, "{name}"),
            }
        }
        assert_eq!(raws, stream, "{name}");
    }
}
