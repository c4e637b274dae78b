//! The machines of both roles, on one core: items are pages. Run with `cargo bench -p migrate`.
//!
//! The source scans and resolves buffers of 256 KiB of a stream of 64 MiB, which comes from
//! memory and not from the cache. What a known page costs beyond its hash is
//! `resolve_known` and `source_without_deduplication` together.

use std::cell::RefCell;
use std::collections::HashSet;
use std::hint::black_box;
use std::ops::Range;
use std::sync::Arc;

use content::HostTable;
use divan::Bencher;
use divan::counter::ItemsCount;
use migrate::pack::{Packed, Packer};
use migrate::unpack::{Batch, Contents, Found, Unpacker};
use page::{BlockIndex, ContentId, ContentKey, EntryId, PAGE_SIZE, PageBytes, PageNo};
use wire::Remote;

#[path = "../tests/round_trip/opening.rs"]
mod opening;

const PAGES: u32 = 16 * 1024;
const BUFFER: usize = 256 << 10;
const RAM: BlockIndex = BlockIndex(0);

/// Contents that the table knows already: more than the caches hold.
const TABLE: u64 = 1 << 20;

fn main() {
    divan::main();
}

#[derive(Clone, Copy)]
enum Kind {
    Unique,
    Fill,
    Zero,
}

fn key() -> ContentKey {
    ContentKey::new([3; 32])
}

const FILLED: PageBytes = [0xa5; PAGE_SIZE];

fn unique_page(number: u32) -> PageBytes {
    let mut bytes = FILLED;
    bytes[..4].copy_from_slice(&number.to_le_bytes());
    bytes
}

/// The RAM of a guest with one block, cut into what precedes its records and the records.
fn stream(kind: Kind) -> (Vec<u8>, Vec<u8>) {
    let blocks = opening::block_list(&[("pc.ram", PAGES.into())]);
    let start = [opening::header(), opening::ram_start(&blocks, true)].concat();
    let mut encoder = opening::encoder(&blocks, true);
    let mut ram = Vec::new();
    for page in 0..PAGES {
        if matches!(kind, Kind::Zero) {
            encoder.zero(RAM, PageNo(page), &mut ram);
        } else {
            encoder.page(RAM, PageNo(page), &mut ram);
            let is_unique = matches!(kind, Kind::Unique);
            ram.extend(if is_unique { unique_page(page) } else { FILLED });
        }
        // QEMU ends a section after about 818 pages at 32 MiB/s.
        if page % 818 == 0 {
            encoder.close(&mut ram);
        }
    }
    encoder.close(&mut ram);
    (start, ram)
}

/// A packer that has read the start of the stream.
fn packer(start: &[u8], key: Option<ContentKey>) -> Packer {
    let mut packer = Packer::new(key, HashSet::from(["pc.ram".to_owned()]));
    packer.scan(start, 0).expect("a valid start");
    packer.take();
    packer
}

/// Packs the records buffer by buffer, and hands each frame to `each`.
fn pack(
    packer: &mut Packer,
    ram: &[u8],
    table: &mut HostTable,
    mut each: impl FnMut(Range<usize>, Packed),
) {
    let mut at = 0;
    while at < ram.len() {
        let end = ram.len().min(at + BUFFER);
        let buffer = &ram[at..end];
        let used = packer.scan(buffer, 0).expect("a valid stream");
        each(at..end, packer.take().resolve(buffer, table, &[]));
        at += used;
    }
}

fn bench_source(
    bencher: Bencher<'_, '_>,
    kind: Kind,
    key: Option<ContentKey>,
    mut table: impl FnMut() -> HostTable,
) {
    let (start, ram) = stream(kind);
    bencher
        .counter(ItemsCount::new(PAGES))
        .with_inputs(|| (packer(&start, key.clone()), table()))
        .bench_local_values(|(mut packer, mut table)| {
            pack(&mut packer, &ram, &mut table, |_, packed| {
                black_box(packed);
            });
            table
        });
}

fn full_table(more: impl Iterator<Item = ContentId>) -> HostTable {
    let mut table = HostTable::with_limit(u32::MAX);
    for i in 0..TABLE {
        let scattered = u128::from(i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835);
        table.claim(ContentId(scattered.to_le_bytes()));
    }
    more.for_each(|id| {
        table.claim(id);
    });
    table
}

#[divan::bench]
fn source_unique(bencher: Bencher<'_, '_>) {
    bench_source(bencher, Kind::Unique, Some(key()), HostTable::default);
}

/// What a known page costs after its hash, in a large table; what it costs before is
/// `source_without_deduplication`. A sample is one buffer, which was hashed just before.
#[divan::bench(sample_count = 2000, sample_size = 1)]
fn resolve_known(bencher: Bencher<'_, '_>) {
    let (start, ram) = stream(Kind::Unique);
    let ids = (0..PAGES).map(|number| key().id_of(&unique_page(number)));
    let mut table = full_table(ids);
    let state = RefCell::new((packer(&start, Some(key())), &ram[..]));
    bencher
        .counter(ItemsCount::new(BUFFER / (PAGE_SIZE + 8)))
        .with_inputs(|| {
            let (packer, rest) = &mut *state.borrow_mut();
            if rest.len() < BUFFER {
                (*packer, *rest) = (self::packer(&start, Some(key())), &ram[..]);
            }
            let buffer = &rest[..BUFFER];
            let used = packer.scan(buffer, 0).expect("a valid stream");
            *rest = &rest[used..];
            buffer
        })
        .bench_local_values(|buffer| state.borrow_mut().0.take().resolve(buffer, &mut table, &[]));
}

#[divan::bench]
fn source_without_deduplication(bencher: Bencher<'_, '_>) {
    bench_source(bencher, Kind::Unique, None, HostTable::default);
}

#[divan::bench]
fn source_fill(bencher: Bencher<'_, '_>) {
    bench_source(bencher, Kind::Fill, Some(key()), HostTable::default);
}

#[divan::bench]
fn source_zero(bencher: Bencher<'_, '_>) {
    bench_source(bencher, Kind::Zero, Some(key()), HostTable::default);
}

/// The hash alone, over the same pages.
#[divan::bench]
fn hash(bencher: Bencher<'_, '_>) {
    let (_, ram) = stream(Kind::Unique);
    let key = key();
    bencher.counter(ItemsCount::new(PAGES)).bench_local(|| {
        for bytes in ram.as_chunks().0 {
            black_box(key.id_of(bytes));
        }
    });
}

/// Finds every entry in one body.
struct Everything(Arc<[u8]>);

impl Contents<Arc<[u8]>> for Everything {
    fn find(
        &mut self,
        (_first, count): (EntryId, u32),
        _remote: Option<&Remote<'_>>,
        _scratch: &mut Vec<u8>,
        found: &mut Vec<Found<Arc<[u8]>>>,
    ) {
        found.extend((0..count).map(|_| Found::Held(Arc::clone(&self.0), 0)));
    }
}

/// Applies the frames of a whole stream; bytes are not written anywhere.
fn bench_target(bencher: Bencher<'_, '_>, kind: Kind, table: &mut HostTable) {
    let (start, ram) = stream(kind);
    let mut frames: Vec<Vec<u8>> = Vec::new();
    let mut first = Packer::new(Some(key()), HashSet::from(["pc.ram".to_owned()]));
    first.scan(&start, 0).expect("a valid start");
    frames.push(first.take().resolve(&start, table, &[]).front);
    pack(&mut first, &ram, table, |range, packed| {
        let buffer = &ram[range];
        let mut body = packed.front;
        for at in packed.pages {
            body.extend_from_slice(&buffer[at as usize..][..PAGE_SIZE]);
        }
        frames.push(body);
    });
    let mut everything = Everything(Arc::from([1; PAGE_SIZE]));
    let mut batch = Batch::default();
    bencher
        .counter(ItemsCount::new(PAGES))
        .with_inputs(Unpacker::default)
        .bench_local_values(|mut unpacker| {
            for body in &frames {
                batch.clear();
                unpacker
                    .apply(body, false, &mut everything, &mut batch)
                    .expect("an honest frame");
                black_box(&batch);
            }
        });
}

#[divan::bench]
fn target_literal(bencher: Bencher<'_, '_>) {
    bench_target(bencher, Kind::Unique, &mut HostTable::default());
}

#[divan::bench]
fn target_reference(bencher: Bencher<'_, '_>) {
    let (start, ram) = stream(Kind::Unique);
    let mut table = HostTable::default();
    let mut packer = packer(&start, Some(key()));
    pack(&mut packer, &ram, &mut table, |_, _| {});
    bench_target(bencher, Kind::Unique, &mut table);
}

#[divan::bench]
fn target_zero(bencher: Bencher<'_, '_>) {
    bench_target(bencher, Kind::Zero, &mut HostTable::default());
}
