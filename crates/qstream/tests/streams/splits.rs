//! Where the input is cut must not matter.

use std::fs;
use std::path::Path;

use crate::common::{decode_all, golden};
use crate::rewriter::Rewriter;
use page::PAGE_SIZE;
use qstream::{Decoder, Item, ReturnDecoder, ReturnMessage, ReturnStep, Step, encode_return};

/// What an item is and where its bytes are: equal addresses are equal bytes, not copied.
fn describe(item: &Item<'_>) -> String {
    match item {
        Item::Header { machine, raw } => format!("header {machine} {:?}", raw.as_ptr_range()),
        Item::RamStart { raw } => format!("start {:?}", raw.as_ptr_range()),
        Item::Opaque(raw) => format!("opaque {:?}", raw.as_ptr_range()),
        Item::Tail(raw) => format!("tail {:?}", raw.as_ptr_range()),
        Item::Page { block, page, bytes } => {
            format!("{block:?} {page:?} {:?}", bytes.as_ptr_range())
        }
        other => format!("{other:?}"),
    }
}

/// Bytes that are kept of the tail.
const TAIL: usize = 100;

/// A stream cut down to the first records of its first sections and blocks and the start of its
/// tail, so that all splits can be tried.
fn shortened(stream: &[u8]) -> Vec<u8> {
    let mut rewriter = Rewriter::default();
    let (mut records, mut sections, mut current) = (0, 0, None);
    decode_all(stream, |item, decoder| match *item {
        Item::Tail(raw) => rewriter.out.extend_from_slice(&raw[..TAIL]),
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
            let mut parts = decode_split(&input, split);
            let last = parts.pop().unwrap();
            // The tail comes in the pieces in which it arrives.
            if split <= input.len() - TAIL || split == input.len() {
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
        assert!(items == whole, "{name}");
        assert_eq!(start, stream.len());
    }
}

#[test]
fn a_truncated_stream_asks_for_more_and_never_ends_early() {
    for (name, stream) in golden("main") {
        let input = shortened(&stream);
        let end_of_ram = input.len() - TAIL;
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

/// Seeds of the fuzz targets: `cargo test -p qstream -- --ignored write_fuzz_seeds`.
#[test]
#[ignore = "writes to fuzz/corpus"]
fn write_fuzz_seeds() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus");
    let refused = golden("refused").into_iter().map(|(name, mut stream)| {
        stream.truncate(8 << 10);
        (name, stream)
    });
    let main = golden("main")
        .into_iter()
        .map(|(name, stream)| (name, shortened(&stream)));
    let mut every_message = vec![];
    for message in [
        ReturnMessage::ReqPagesId {
            start: 0x1000,
            len: 0x1000,
            block: "pc.ram",
        },
        ReturnMessage::ReqPages {
            start: 0x2000,
            len: 0x1000,
        },
        ReturnMessage::RecvBitmap {
            block: "pc.bios",
            bitmap: &[0xff; 8],
        },
        ReturnMessage::ResumeAck(1),
    ] {
        encode_return(&message, &mut every_message);
    }
    let mut answers = golden("return");
    answers.push(("postcopy".to_owned(), every_message));
    let targets: [(&str, Vec<_>); 2] = [
        ("qstream_main", main.chain(refused).collect()),
        ("qstream_return", answers),
    ];
    for (target, seeds) in targets {
        fs::create_dir_all(corpus.join(target)).unwrap();
        for (name, bytes) in seeds {
            fs::write(corpus.join(target).join(format!("seed-{name}")), bytes).unwrap();
        }
    }
}
