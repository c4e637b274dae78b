//! Frames for a VM's thread at the target, after a valid opening: whatever a source agent sends,
//! the target QEMU gets a valid stream with pages that the guest has.
//!
//! The input is a list of frames: a byte of flags, a byte that says what the target host has,
//! a byte for the number of pages whose bytes follow, the length of the operations (u16,
//! little-endian), the operations. It is tried in pre-copy, where post-copy may follow, and where that has a
//! second channel.

#![no_main]

use std::collections::HashMap;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use migrate::unpack::{
    Arrived, Batch, Contents, Found, Segment, UnpackError, Unpacker, literal_runs,
};
use page::{EntryId, PAGE_SIZE};
use qstream::{Command, Decoder, Step, encode_command};
use wire::{MAX_BODY, OpWriter, Remote};

#[path = "../../crates/migrate/tests/round_trip/opening.rs"]
#[expect(dead_code, reason = "only the opening is needed")]
mod opening;

const IS_REPAIR: u8 = 1;
/// The operations are a whole body.
const IS_RAW: u8 = 2;
/// It is of pages that were sent ahead; the target QEMU has asked for every other one.
const IS_URGENT: u8 = 4;
/// Before it, half of the contents that pages wait for come, and the others will not.
const IS_AFTER_OTHERS: u8 = 8;

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
    flags: u8,
    mut contents: Anything,
    body: &[u8],
) -> Result<Vec<u8>, UnpackError> {
    for run in literal_runs(body)? {
        assert!(run.at + run.count as usize * PAGE_SIZE <= body.len());
    }
    let mut batch = Batch::default();
    let outcome = if flags & IS_URGENT != 0 {
        let asked = |_, page: page::PageNo| page.0 % 2 == 0;
        unpacker.apply_urgent(body, asked, &mut contents, &mut batch)
    } else {
        unpacker.apply(body, flags & IS_REPAIR != 0, &mut contents, &mut batch)
    };
    assert!(batch.scratch.len() <= 2 * MAX_BODY && batch.head.len() <= 2 * MAX_BODY);
    outcome?;
    Ok(written(unpacker, batch, body))
}

/// Contents come from elsewhere, or will not.
fn hear_of_others(unpacker: &mut Unpacker) -> Vec<u8> {
    let wanted: Vec<EntryId> = unpacker.wanted().take(16).collect();
    let (come, lost) = wanted.split_at(wanted.len() / 2);
    let page: Body = Arc::from([7; PAGE_SIZE]);
    let come = come.iter().map(|entry| Arrived {
        entry: *entry,
        body: Arc::clone(&page),
        at: 0,
    });
    let mut batch = Batch::default();
    unpacker.arrived(come, &mut batch);
    let out = written(unpacker, batch, &[]);
    unpacker.not_coming(lost, &mut Batch::<Body>::default());
    out
}

/// What the target QEMU gets on its first channel.
fn written(unpacker: &mut Unpacker, mut batch: Batch<Body>, body: &[u8]) -> Vec<u8> {
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
    out
}

fn opening_body(may_switch: bool) -> Vec<u8> {
    let blocks = opening::block_list(&[("pc.ram", 300), ("vga.vram", 3)]);
    let mut ops = OpWriter::new();
    let mut head = opening::header();
    if may_switch {
        let page_sizes = PAGE_SIZE as u64;
        encode_command(Command::PostcopyAdvise { page_sizes }, &mut head);
    }
    ops.raw(&head);
    ops.ram_start(&opening::ram_start(&blocks, true));
    ops.finish(0)
}

/// Applies the frames of an input after an opening.
fn drive(mut unpacker: Unpacker, may_switch: bool, mut input: &[u8]) {
    let opening = apply(&mut unpacker, 0, Anything(0), &opening_body(may_switch));
    let (mut decoder, mut stream) = (Decoder::new(), opening.expect("a valid opening"));
    while let Some((flags, contents, body)) = take_frame(&mut input) {
        if flags & IS_AFTER_OTHERS != 0 {
            stream.extend(hear_of_others(&mut unpacker));
        }
        match apply(&mut unpacker, flags, contents, &body) {
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
}

fuzz_target!(|input: &[u8]| {
    let mappable = || HashMap::from([("pc.ram".to_owned(), 300)]);
    drive(Unpacker::mapping(mappable()), false, input);
    drive(Unpacker::mapping(mappable()), true, input);
    drive(Unpacker::preempting(), true, input);
});
