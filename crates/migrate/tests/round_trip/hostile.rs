//! Frames that no honest source sends.

use std::sync::Arc;

use migrate::unpack::{Ack, Batch, Contents, Found, UnpackError, Unpacker, literal_runs};
use page::{BlockIndex, EntryId, PAGE_SIZE, PageNo};
use qstream::{Decoder, Item, Step};
use wire::{FrameKind, MAX_BODY, OpWriter, Remote};

use crate::opening;
use crate::rng::Rng;
use crate::session::{Body, Faults, Session, bytes_written};

/// Where an opening ends in the stream, as far as these tests say.
const OPENED_AT: u64 = 100;

/// Finds anything, or nothing, and sometimes says less than it was asked.
struct Anything<'a>(&'a mut Rng);

impl Contents<Body> for Anything<'_> {
    fn find(
        &mut self,
        (_first, count): (EntryId, u32),
        _remote: Option<&Remote<'_>>,
        scratch: &mut Vec<u8>,
        found: &mut Vec<Found<Body>>,
    ) {
        for _ in 0..count {
            match self.0.below(50) {
                0 => return,
                1..15 => found.push(Found::Missing),
                15..20 => found.push(Found::Coming),
                20..35 => found.push(Found::Held(Arc::from([9; PAGE_SIZE]), 0)),
                _ => {
                    found.push(Found::Scratch(scratch.len()));
                    scratch.resize(scratch.len() + PAGE_SIZE, 8);
                }
            }
        }
    }
}

/// Applies a frame; the bytes for the target QEMU are bounded.
fn apply(
    unpacker: &mut Unpacker,
    kind: FrameKind,
    body: &Body,
    rng: &mut Rng,
) -> Result<Vec<u8>, UnpackError> {
    literal_runs(body)?;
    let mut batch = Batch::default();
    let outcome = unpacker.apply(
        body,
        kind == FrameKind::Repair,
        &mut Anything(rng),
        &mut batch,
    );
    assert!(batch.scratch.len() <= 2 * MAX_BODY);
    assert!(batch.head.len() <= 2 * MAX_BODY);
    outcome.map(|()| bytes_written(&batch, body))
}

/// Decodes all there is of what was written to the target QEMU; every page that the decoder
/// lets through is in the block list. Returns how many there were.
fn pages_of(stream: &[u8]) -> usize {
    let (mut decoder, mut rest, mut pages) = (Decoder::new(), stream, 0);
    while let Step::Item { item, consumed } = decoder.decode(rest).expect("a valid stream") {
        pages += usize::from(matches!(item, Item::Page { .. } | Item::Zero { .. }));
        rest = &rest[consumed..];
    }
    pages
}

fn mutate(body: &mut Vec<u8>, rng: &mut Rng) {
    // Mostly in the operations, which stand in front of the page bytes.
    let end = if rng.chance(80) { 60 } else { body.len() };
    for _ in 0..1 + rng.below(3) {
        if body.is_empty() {
            return;
        }
        let at = rng.below(end.min(body.len()));
        match rng.below(8) {
            0 => body.truncate(at),
            1 => body.insert(at, rng.next().to_le_bytes()[0]),
            2 => body.extend(rng.bytes(at)),
            3..6 => body[at] ^= 1 << rng.below(8),
            _ => body[at] = rng.next().to_le_bytes()[0],
        }
    }
}

#[test]
fn a_changed_frame_is_refused_or_becomes_a_valid_stream_of_pages_in_the_block_list() {
    let (mut refused, mut passed, mut pages) = (0, 0, 0);
    for seed in 0..40 {
        let mut rng = Rng::new(seed);
        let mut faults = Faults::NONE;
        faults.lost_percent = 10;
        let mut session = Session::new(seed, 1, crate::key(), faults);
        session.run();
        for _ in 0..100 {
            let mut frames = session.frames.clone();
            for _ in 0..1 + rng.below(3) {
                let at = rng.below(frames.len());
                let mut body = frames[at].2.to_vec();
                mutate(&mut body, &mut rng);
                frames[at].2 = body.into();
            }
            if rng.chance(20) {
                let (a, b) = (rng.below(frames.len()), rng.below(frames.len()));
                frames.swap(a, b);
            }
            let (mut unpacker, mut stream) = (Unpacker::default(), Vec::new());
            let outcome = frames.iter().try_for_each(|(_, kind, body)| {
                stream.extend(apply(&mut unpacker, *kind, body, &mut rng)?);
                Ok::<_, UnpackError>(())
            });
            pages += pages_of(&stream);
            *if outcome.is_err() {
                &mut refused
            } else {
                &mut passed
            } += 1;
        }
    }
    assert!(
        refused > 500 && passed > 100,
        "{refused} refused, {passed} passed"
    );
    assert!(pages > 10_000, "{pages} pages");
}

/// An unpacker of a guest with one block of so many pages, after the opening.
fn opened(pages: u64) -> Unpacker {
    let blocks = opening::block_list(&[("pc.ram", pages)]);
    let mut ops = OpWriter::new();
    ops.raw(&opening::header());
    ops.ram_start(&opening::ram_start(&blocks, true));
    let mut unpacker = Unpacker::default();
    let body = Body::from(ops.finish(OPENED_AT));
    apply(&mut unpacker, FrameKind::Pages, &body, &mut Rng::new(0)).unwrap();
    unpacker
}

/// Applies a frame of operations without page bytes.
fn apply_ops(
    unpacker: &mut Unpacker,
    write: impl FnOnce(&mut OpWriter),
) -> Result<Vec<u8>, UnpackError> {
    let mut ops = OpWriter::new();
    write(&mut ops);
    let body = Body::from(ops.finish(200));
    apply(unpacker, FrameKind::Pages, &body, &mut Rng::new(0))
}

const RAM: BlockIndex = BlockIndex(0);

#[test]
fn a_small_frame_cannot_ask_for_more_than_a_buffer_of_contents() {
    let references = |count: u32| {
        move |ops: &mut OpWriter| {
            (0..count).for_each(|i| ops.reference(RAM, PageNo(i), EntryId(i)));
        }
    };
    let fills = |count: u32| {
        move |ops: &mut OpWriter| {
            (0..count).for_each(|i| ops.fill(RAM, PageNo(2 * i), 1));
        }
    };
    assert!(apply_ops(&mut opened(1 << 20), references(256)).is_ok());
    assert!(apply_ops(&mut opened(1 << 20), fills(256)).is_ok());
    for outcome in [
        apply_ops(&mut opened(1 << 20), references(257)),
        apply_ops(&mut opened(1 << 20), fills(257)),
    ] {
        assert!(matches!(outcome, Err(UnpackError::TooManyPages)));
    }
}

#[test]
fn raw_bytes_cannot_carry_pages_past_the_checks() {
    let blocks = opening::block_list(&[("pc.ram", 8)]);
    let mut part = Vec::new();
    let mut encoder = opening::encoder(&blocks, true);
    encoder.zero(RAM, PageNo(1), &mut part);
    encoder.close(&mut part);
    for bytes in [&part[..], &part[..5], b"\x08\0\x02\0\x04\0\0", b"junk"] {
        assert!(apply_ops(&mut opened(8), |ops| ops.raw(bytes)).is_err());
    }
    let start = opening::ram_start(&blocks, true);
    for (raw, start) in [
        (opening::header(), [&start[..], &part].concat()),
        (opening::header(), [&start[..], &part[..5]].concat()),
        ([opening::header(), start.clone()].concat(), part),
        (Vec::new(), start),
    ] {
        let mut ops = OpWriter::new();
        ops.raw(&raw);
        ops.ram_start(&start);
        let body = Body::from(ops.finish(OPENED_AT));
        let mut unpacker = Unpacker::default();
        assert!(apply(&mut unpacker, FrameKind::Pages, &body, &mut Rng::new(0)).is_err());
    }
    let ping = b"\x08\0\x02\0\x04\0\0\0\x01";
    assert!(apply_ops(&mut opened(8), |ops| ops.raw(ping)).is_ok());
}

#[test]
fn the_list_of_waiting_pages_is_bounded() {
    struct Nothing;
    impl Contents<Body> for Nothing {
        fn find(
            &mut self,
            _: (EntryId, u32),
            _: Option<&Remote<'_>>,
            _: &mut Vec<u8>,
            _: &mut Vec<Found<Body>>,
        ) {
        }
    }
    let mut unpacker = opened(1 << 22);
    let mut batch = Batch::default();
    for frame in 0_u32.. {
        let mut ops = OpWriter::new();
        for i in 0..256 {
            ops.reference(RAM, PageNo(frame * 256 + i), EntryId(i));
        }
        batch.clear();
        let position = OPENED_AT + 1 + u64::from(frame);
        let outcome = unpacker.apply(&ops.finish(position), false, &mut Nothing, &mut batch);
        // What waits is not complete: the source's window closes.
        if let Some(Ack::OnPong { reached, .. } | Ack::OnWrite { reached }) = batch.ack {
            assert_eq!((reached.complete, reached.received), (OPENED_AT, position));
        }
        if outcome.is_err() {
            assert!(matches!(outcome, Err(UnpackError::TooManyWaiting)));
            assert_eq!(unpacker.waiting(), (1 << 17) + 256);
            return;
        }
    }
}
