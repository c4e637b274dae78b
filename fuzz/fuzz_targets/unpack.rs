//! Frames for a VM's thread at the target, after a valid opening: whatever a source agent sends,
//! the target QEMU gets a valid stream with pages that the guest has.
//!
//! The input is a list of frames: a byte of flags, a byte that says what the target host has,
//! a byte for the number of pages whose bytes follow, the length of the operations (u16,
//! little-endian), the operations.

#![no_main]

use std::collections::HashMap;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use migrate::unpack::{Batch, Contents, Found, Segment, UnpackError, Unpacker, literal_runs};
use page::{EntryId, PAGE_SIZE};
use qstream::{Decoder, Step};
use wire::{MAX_BODY, OpWriter, Remote};

#[path = "../../crates/migrate/tests/round_trip/opening.rs"]
#[expect(dead_code, reason = "only the opening is needed")]
mod opening;

const IS_REPAIR: u8 = 1;
/// The operations are a whole body.
const IS_RAW: u8 = 2;

type Body = Arc<[u8]>;

/// Has contents as the bits of a byte say, in turn.
struct Anything(u8);

impl Contents<Body> for Anything {
    fn find(
        &mut self,
        (_first, count): (EntryId, u32),
        _remote: Option<&Remote<'_>>,
        scratch: &mut Vec<u8>,
        found: &mut Vec<Found<Body>>,
    ) {
        for _ in 0..count {
            self.0 = self.0.rotate_left(3);
            match self.0 % 8 {
                0 => return,
                1..3 => found.push(Found::Missing),
                3 => found.push(Found::Coming),
                4..6 => found.push(Found::Held(Arc::from([9; PAGE_SIZE]), 0)),
                _ => {
                    found.push(Found::Scratch(scratch.len()));
                    scratch.resize(scratch.len() + PAGE_SIZE, 8);
                }
            }
        }
    }
}

/// Takes a frame off the input: flags, what the host has, and the body.
fn take_frame(input: &mut &[u8]) -> Option<(u8, Anything, Vec<u8>)> {
    let (&[flags, has, pages, low, high], rest) = input.split_first_chunk()?;
    let length = usize::from(u16::from_le_bytes([low, high])).min(rest.len());
    let (ops, rest) = rest.split_at(length);
    *input = rest;
    let mut body = Vec::new();
    if flags & IS_RAW == 0 {
        // Position, then the length of the operations, in two groups of seven bits each.
        let length = length.min(0x3fff);
        body.extend([has | 0x80, 0]);
        body.extend([(length & 0x7f) as u8 | 0x80, (length >> 7) as u8]);
        body.extend(&ops[..length]);
        body.resize(body.len() + usize::from(pages) * PAGE_SIZE, pages);
    } else {
        body.extend(ops);
    }
    Some((flags, Anything(has), body))
}

fn apply(
    unpacker: &mut Unpacker,
    is_repair: bool,
    mut contents: Anything,
    body: &[u8],
) -> Result<Vec<u8>, UnpackError> {
    for run in literal_runs(body)? {
        assert!(run.at + run.count as usize * PAGE_SIZE <= body.len());
    }
    let mut batch = Batch::default();
    let outcome = unpacker.apply(body, is_repair, &mut contents, &mut batch);
    assert!(batch.scratch.len() <= 2 * MAX_BODY && batch.head.len() <= 2 * MAX_BODY);
    outcome?;
    if !batch.shared.is_empty() {
        // Some are mapped, some are not.
        let is_mapped: Vec<bool> = batch.shared.iter().map(|s| s.page.0 % 2 == 0).collect();
        unpacker.shared_done(&is_mapped, &mut batch);
    }
    for expected in &batch.expected {
        assert!(!matches!(
            batch.segments[expected.segment],
            Segment::Head(_)
        ));
        assert!(batch.given.contains(&(expected.block, expected.page)));
    }
    let mut out = Vec::new();
    for segment in &batch.segments {
        out.extend_from_slice(match segment {
            Segment::Head(range) => &batch.head[range.clone()],
            Segment::Own(at) => &body[*at..][..PAGE_SIZE],
            Segment::Held(body, at) => &body[*at..][..PAGE_SIZE],
            Segment::Scratch(at) => &batch.scratch[*at..][..PAGE_SIZE],
        });
    }
    Ok(out)
}

fn opening_body() -> Vec<u8> {
    let blocks = opening::block_list(&[("pc.ram", 300), ("vga.vram", 3)]);
    let mut ops = OpWriter::new();
    ops.raw(&opening::header());
    ops.ram_start(&opening::ram_start(&blocks, true));
    ops.finish(0)
}

fuzz_target!(|input: &[u8]| {
    let mut unpacker = Unpacker::mapping(HashMap::from([("pc.ram".to_owned(), 300)]));
    let opening = apply(&mut unpacker, false, Anything(0), &opening_body());
    let (mut decoder, mut stream) = (Decoder::new(), opening.expect("a valid opening"));
    let mut input = input;
    while let Some((flags, contents, body)) = take_frame(&mut input) {
        match apply(&mut unpacker, flags & IS_REPAIR != 0, contents, &body) {
            Ok(bytes) => stream.extend(bytes),
            Err(_) => break,
        }
        let mut used = 0;
        while let Step::Item { consumed, .. } =
            decoder.decode(&stream[used..]).expect("a valid stream")
        {
            used += consumed;
        }
        stream.drain(..used);
    }
});
