//! Whatever the encoder writes, the decoder reads; whatever else comes, it refuses.

use std::sync::Arc;

use crate::common::{decode_all, golden};
use crate::rewriter::Rewriter;
use crate::shortened::shortened;
use page::{BlockIndex, ByteLen, PAGE_SIZE, PageNo};
use proptest::prelude::*;
use qstream::{
    Block, BlockList, Command, Encoder, Item, ReturnDecoder, ReturnMessage, ReturnStep,
    encode_command, encode_return,
};

const SECTION_ID: u32 = 0x0102_0304;

/// What an agent can ask of the encoder.
#[derive(Debug, Clone, PartialEq)]
enum Action {
    Begin,
    Page(BlockIndex, PageNo, u8),
    Zero(BlockIndex, PageNo),
    Close,
    Command(Command),
}

fn blocks() -> impl Strategy<Value = BlockList> {
    prop::collection::btree_map("[a-z0-9:./@]{1,255}", 1..=u64::from(u16::MAX), 1..20).prop_map(
        |blocks| {
            let blocks = blocks.into_iter().map(|(name, pages)| Block {
                name: name.into(),
                used_len: ByteLen(pages * PAGE_SIZE as u64),
                host_page: ByteLen(PAGE_SIZE as u64),
            });
            BlockList::new(blocks.collect()).unwrap()
        },
    )
}

fn actions() -> impl Strategy<Value = Vec<(usize, u64, u8)>> {
    prop::collection::vec((any::<usize>(), any::<u64>(), any::<u8>()), 0..80)
}

fn action(blocks: &BlockList, (block, page, kind): (usize, u64, u8)) -> Action {
    let index = BlockIndex(u16::try_from(block % blocks.len()).unwrap());
    let pages = blocks.get(index).unwrap().used_len.pages();
    let page = PageNo(u32::try_from(page % pages).unwrap());
    match kind {
        0..=19 => Action::Begin,
        20..=39 => Action::Close,
        40..=49 => Action::Command(Command::Ping(u32::from(kind) << 24)),
        50..=59 => Action::Command(Command::OpenReturnPath),
        60..=69 => Action::Command(Command::SwitchoverStart),
        70..=160 => Action::Page(index, page, kind),
        _ => Action::Zero(index, page),
    }
}

/// The start of a stream with these blocks, built as QEMU does.
fn start(blocks: &BlockList, footers: bool) -> Vec<u8> {
    let mut out = b"QEVM\0\0\0\x03\x07\0\0\0\x02pc".to_vec();
    out.extend_from_slice(&[1]);
    out.extend_from_slice(&SECTION_ID.to_be_bytes());
    out.extend_from_slice(b"\x03ram\0\0\0\0\0\0\0\x04");
    out.extend_from_slice(&((blocks.total_pages() * PAGE_SIZE as u64) | 4).to_be_bytes());
    for (_, block) in blocks.iter() {
        out.push(u8::try_from(block.name.len()).unwrap());
        out.extend_from_slice(block.name.as_bytes());
        out.extend_from_slice(&block.used_len.0.to_be_bytes());
    }
    out.extend_from_slice(&0x10_u64.to_be_bytes());
    if footers {
        out.push(0x7e);
        out.extend_from_slice(&SECTION_ID.to_be_bytes());
    }
    out
}

proptest! {
    #[test]
    fn the_decoder_reads_what_the_encoder_writes(
        blocks in blocks(), choices in actions(), footers: bool, tail in "[a-z]{1,9}",
    ) {
        let mut stream = start(&blocks, footers);
        let blocks = Arc::new(blocks);
        let mut encoder = Encoder::new(Arc::clone(&blocks), SECTION_ID, footers);
        let (mut expected, mut open) = (vec![], false);
        for choice in choices {
            let action = action(&blocks, choice);
            match action {
                Action::Begin => encoder.begin_part(&mut stream),
                Action::Close => encoder.close(&mut stream),
                Action::Page(block, page, fill) => {
                    encoder.page(block, page, &mut stream);
                    stream.resize(stream.len() + PAGE_SIZE, fill);
                }
                Action::Zero(block, page) => encoder.zero(block, page, &mut stream),
                Action::Command(command) => {
                    encoder.close(&mut stream);
                    encode_command(command, &mut stream);
                }
            }
            // The sections that the encoder opens and closes by itself.
            match action {
                Action::Begin if open => continue,
                Action::Close if !open => continue,
                Action::Page(..) | Action::Zero(..) if !open => expected.push(Action::Begin),
                Action::Command(_) if open => expected.push(Action::Close),
                _ => {}
            }
            open = !matches!(action, Action::Close | Action::Command(_));
            expected.push(action);
        }
        encoder.begin_end(&mut stream);
        encoder.close(&mut stream);
        stream.extend_from_slice(tail.as_bytes());
        if open {
            expected.push(Action::Close);
        }
        expected.extend([Action::Begin, Action::Close]);

        let (mut decoded, mut found) = (vec![], vec![]);
        let rest = decode_all(&stream, |item, decoder| match *item {
            Item::Header { machine, .. } => assert_eq!(machine, "pc"),
            Item::RamStart { .. } => assert_eq!(decoder.blocks(), Some(&blocks)),
            Item::PartBegin | Item::EndBegin => decoded.push(Action::Begin),
            Item::PartClosed | Item::EndClosed => decoded.push(Action::Close),
            Item::Command { command, .. } => decoded.push(Action::Command(command)),
            Item::Zero { block, page } => decoded.push(Action::Zero(block, page)),
            Item::Page { block, page, bytes } => {
                decoded.push(Action::Page(block, page, page::fill_byte(bytes).unwrap()));
            }
            Item::Tail(bytes) => found.extend_from_slice(bytes),
            Item::Opaque(_) | Item::Discard { .. } | Item::PackageBegin { .. } | Item::Package(_) => {
                unreachable!("none was written")
            }
        });
        prop_assert_eq!(rest, Ok(&[][..]));
        prop_assert_eq!(decoded, expected);
        prop_assert_eq!(found, tail.as_bytes());
    }

    #[test]
    fn the_return_decoder_reads_what_was_encoded(
        values: [u32; 3], start: u64, len: u32, block in "[ -~]{1,255}",
        words in prop::collection::vec(any::<[u8; 8]>(), 1..100),
    ) {
        let (block, bitmap) = (&*block, words.as_flattened());
        let messages = [
            ReturnMessage::Shut(values[0]),
            ReturnMessage::Pong(values[1]),
            ReturnMessage::ReqPagesId { start, len, block },
            ReturnMessage::ReqPages { start, len },
            ReturnMessage::RecvBitmap { block, bitmap },
            ReturnMessage::ResumeAck(values[2]),
            ReturnMessage::SwitchoverAck,
        ];
        let mut bytes = vec![];
        for message in &messages {
            encode_return(message, &mut bytes);
        }
        let (mut decoder, mut rest) = (ReturnDecoder::new(), &bytes[..]);
        for expected in messages {
            let ReturnStep::Message { message, raw } = decoder.decode(rest).unwrap() else {
                panic!("{expected:?} is not complete");
            };
            prop_assert_eq!(message, expected);
            rest = &rest[raw.len()..];
        }
        prop_assert_eq!(rest, []);
    }

    /// A corrupted stream is either refused, or it is another valid stream: then the rewritten
    /// bytes are a valid stream with the same pages.
    #[test]
    fn a_corrupted_stream_is_refused_or_rewritten_faithfully(
        which: prop::sample::Index, at: prop::sample::Index, byte: u8,
    ) {
        thread_local!(static STREAMS: Vec<Vec<u8>> = golden("main")
            .into_iter()
            .map(|(name, mut stream)| {
                // Of post-copy, with the switch and what follows it.
                if name.ends_with("postcopy") {
                    stream = shortened(&stream);
                }
                stream.truncate(64 << 10);
                stream
            })
            .collect());
        let mut stream = STREAMS.with(|streams| which.get(streams).clone());
        // Half of the time in the start of the stream, where the structure is.
        let reach = if byte % 2 == 0 { 512 } else { stream.len() };
        stream[at.index(reach)] = byte;
        let (mut rewriter, mut items) = (Rewriter::default(), vec![]);
        let refused = decode_all(&stream, |item, decoder| {
            rewriter.item(item, decoder);
            items.push(format!("{item:?}"));
        });
        let mut again = vec![];
        let rest = decode_all(&rewriter.out, |item, _| again.push(format!("{item:?}")));
        // Two items need the byte that follows them, and an error may stand there.
        prop_assert!(items.starts_with(&again) && again.len() + 1 >= items.len());
        prop_assert!(rest == Ok(&[]) || refused.is_err(), "{:?}", rest);
    }
}
