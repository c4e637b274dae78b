//! Coding of page operations, on one core: items are pages. Run with `cargo bench -p wire`.

use std::hint::black_box;

use divan::Bencher;
use divan::counter::ItemsCount;
use page::{BlockIndex, EntryId, PageNo};
use wire::{OpReader, OpWriter, split_pages_body};

fn main() {
    divan::main();
}

/// Zero pages of one read buffer of 256 KiB, and more than it can hold of any other kind.
const PAGES: u32 = 28 * 1024;

/// Pages in a run: none is a neighbour of another; as in idle guests; a sweep over zeros.
const RUNS: [u32; 3] = [1, 8, PAGES];

/// Writes references to pages and entries in runs of this length, with gaps in between.
fn write(run: u32) -> Vec<u8> {
    let mut ops = OpWriter::new();
    for i in 0..PAGES {
        let at = i + i / run * 3;
        ops.reference(BlockIndex(0), PageNo(at), EntryId(at));
    }
    ops.finish(1 << 30)
}

#[divan::bench(args = RUNS)]
fn encode(bencher: Bencher<'_, '_>, run: u32) {
    bencher
        .counter(ItemsCount::new(PAGES))
        .bench_local(|| write(black_box(run)));
}

#[divan::bench(args = RUNS)]
fn decode(bencher: Bencher<'_, '_>, run: u32) {
    let body = write(run);
    bencher.counter(ItemsCount::new(PAGES)).bench_local(|| {
        let parts = split_pages_body(black_box(&body)).expect("a valid body");
        OpReader::new(parts.ops)
            .map(|op| op.expect("a valid operation").pages())
            .sum::<u32>()
    });
}
