//! Decoding a source's RAM sections and encoding them again, as the two agents do, on one core.
//!
//! Bytes per second are those of the stream that is decoded. Run with
//! `cargo bench -p qstream`.

use std::hint::black_box;
use std::sync::Arc;

use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use page::{BlockIndex, ByteLen, PAGE_SIZE, PageNo};
use qstream::{Block, BlockList, Decoder, Encoder, Item, Step};

/// 64 MiB of guest memory: the stream comes from memory and not from the cache.
const PAGES: u32 = 16 * 1024;
const SECTION_ID: u32 = 1;
const BLOCK: BlockIndex = BlockIndex(0);

fn main() {
    divan::main();
}

/// The RAM of a guest with one block, cut into what precedes its records and the records.
struct Stream {
    blocks: Arc<BlockList>,
    start: Vec<u8>,
    ram: Vec<u8>,
}

fn stream(zeros_in_100: u32) -> Stream {
    let len = ByteLen(u64::from(PAGES) * PAGE_SIZE as u64);
    let list = BlockList::new(vec![Block {
        name: "pc.ram".into(),
        used_len: len,
        host_page: ByteLen(PAGE_SIZE as u64),
    }]);
    let blocks = Arc::new(list.expect("one block"));
    let mut start =
        b"QEVM\0\0\0\x03\x07\0\0\0\x02pc\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04".to_vec();
    start.extend_from_slice(&(len.0 | 4).to_be_bytes());
    start.extend_from_slice(b"\x06pc.ram");
    start.extend_from_slice(&len.0.to_be_bytes());
    start.extend_from_slice(b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x01");

    let mut encoder = Encoder::new(Arc::clone(&blocks), SECTION_ID, true);
    let mut ram = Vec::new();
    for page in 0..PAGES {
        if page % 100 < zeros_in_100 {
            encoder.zero(BLOCK, PageNo(page), &mut ram);
        } else {
            encoder.page(BLOCK, PageNo(page), &mut ram);
            ram.resize(ram.len() + PAGE_SIZE, 0xa5);
        }
        // QEMU ends a section after about 818 pages at 32 MiB/s.
        if page % 818 == 0 {
            encoder.close(&mut ram);
        }
    }
    encoder.close(&mut ram);
    Stream { blocks, start, ram }
}

impl Stream {
    /// A decoder that has read the start of the stream.
    fn decoder(&self) -> Decoder {
        let (mut decoder, mut rest) = (Decoder::new(), &self.start[..]);
        while decoder.blocks().is_none() {
            let Ok(Step::Item { consumed, .. }) = decoder.decode(rest) else {
                panic!("the start of the stream is not valid");
            };
            rest = &rest[consumed..];
        }
        decoder
    }
}

/// Hands every RAM item of `input` to `each`.
fn decode(decoder: &mut Decoder, mut input: &[u8], mut each: impl FnMut(Item<'_>)) {
    while let Step::Item { item, consumed } = decoder.decode(input).expect("a valid stream") {
        each(item);
        input = &input[consumed..];
    }
}

/// Share of zero pages, in percent: none; as in idle guests; all.
const ZEROS: [u32; 3] = [0, 65, 100];

#[divan::bench(args = ZEROS)]
fn decode_only(bencher: Bencher<'_, '_>, zeros: u32) {
    let stream = stream(zeros);
    bencher
        .counter(BytesCount::new(stream.ram.len()))
        .counter(ItemsCount::new(PAGES))
        .with_inputs(|| stream.decoder())
        .bench_local_values(|mut decoder| {
            decode(&mut decoder, &stream.ram, |item| {
                black_box(item);
            });
        });
}

/// With a copy of every page into an output buffer, which is flushed as a socket's would be.
#[divan::bench(args = ZEROS)]
fn decode_and_encode(bencher: Bencher<'_, '_>, zeros: u32) {
    const FLUSH: usize = 256 << 10;
    let stream = stream(zeros);
    let mut out = Vec::with_capacity(FLUSH + 2 * PAGE_SIZE);
    bencher
        .counter(BytesCount::new(stream.ram.len()))
        .counter(ItemsCount::new(PAGES))
        .with_inputs(|| {
            let blocks = Arc::clone(&stream.blocks);
            (stream.decoder(), Encoder::new(blocks, SECTION_ID, true))
        })
        .bench_local_values(|(mut decoder, mut encoder)| {
            decode(&mut decoder, &stream.ram, |item| {
                match item {
                    Item::Page { block, page, bytes } => {
                        encoder.page(block, page, &mut out);
                        out.extend_from_slice(bytes);
                    }
                    Item::Zero { block, page } => encoder.zero(block, page, &mut out),
                    Item::PartBegin => encoder.begin_part(&mut out),
                    _ => encoder.close(&mut out),
                }
                if out.len() >= FLUSH {
                    black_box(&out);
                    out.clear();
                }
            });
        });
}
