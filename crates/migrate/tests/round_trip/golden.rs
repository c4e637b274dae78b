//! Streams of real QEMUs through both machines.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use content::{HostTable, Recent};
use migrate::pack::{Packer, repair_front};
use migrate::unpack::{Batch, Contents, Found, Unpacker};
use page::{BlockIndex, EntryId, PAGE_SIZE, PageNo};
use qstream::{Decoder, Item, PreemptDecoder, PreemptItem, PreemptStep, Step};
use wire::Remote;

use crate::session::{Body, bytes_of_segment, bytes_written, literals};

struct All<'a>(&'a Recent<Body>);

impl Contents<Body> for All<'_> {
    fn find(
        &mut self,
        (first, count): (EntryId, u32),
        _remote: Option<&Remote<'_>>,
        _scratch: &mut Vec<u8>,
        found: &mut Vec<Found<Body>>,
    ) {
        found.extend((0..count).map(|index| {
            let page = self
                .0
                .find(first.plus(index))
                .expect("nothing is forgotten");
            Found::Held(Arc::clone(page.body), page.offset)
        }));
    }
}

/// A page that is read from memory and sent before all others after the switch, with its body;
/// and whether the packer is told.
type Urgent = (Option<(BlockIndex, PageNo)>, Body);

/// What a target QEMU reads, on its first channel and on its second.
type Read = [Vec<u8>; 2];

/// Packs the stream in buffers of 256 KiB and unpacks it again. The target QEMU has asked for every other page that is
/// urgent.
fn carry(stream: &[u8], urgent: Vec<Urgent>) -> Vec<u8> {
    let [out, second] = carry_with(Unpacker::default(), stream, urgent);
    assert!(second.is_empty());
    out
}

fn carry_with(mut unpacker: Unpacker, stream: &[u8], mut urgent: Vec<Urgent>) -> Read {
    const BUFFER: usize = 256 << 10;
    let mut packer = Packer::new(crate::key(), HashSet::from(["pc.ram".to_owned()]));
    let mut table = HostTable::default();
    let mut second = Vec::new();
    let (mut recent, mut out) = (Recent::with_limit(1 << 30), Vec::new());
    let mut rest = stream;
    while !rest.is_empty() {
        let buffer = &rest[..rest.len().min(BUFFER)];
        let used = packer.scan(buffer, 0).expect("QEMU's stream");
        if packer.awaits_switch(buffer, used) {
            assert_eq!(unpacker.waiting(), 0);
            packer.pass_switch();
        } else {
            assert!(used > 0);
        }
        let packed = packer.take().resolve(buffer, &mut table, &[]);
        let pages = packed.pages.iter();
        let pages = pages.flat_map(|at| &buffer[*at as usize..][..PAGE_SIZE]);
        let body: Body = packed.front.iter().chain(pages).copied().collect();
        recent.push(literals(&body), &body, body.len());
        let mut batch = Batch::default();
        unpacker
            .apply(&body, false, &mut All(&recent), &mut batch)
            .expect("an honest frame");
        out.extend(bytes_written(&batch, &body));
        second.extend(bytes_preempted(&batch, &body));
        // The target asks for pages once it has the package.
        if unpacker.has_switched() {
            for (ahead, body) in urgent.drain(..) {
                let mut batch = Batch::default();
                unpacker
                    .apply_urgent(&body, |_, p| p.0 % 2 == 0, &mut All(&recent), &mut batch)
                    .expect("an honest frame");
                assert!(batch.preempt.is_empty() || batch.given.is_empty());
                out.extend(bytes_written(&batch, &body));
                second.extend(bytes_preempted(&batch, &body));
                // Without this QEMU's own copy comes as well, and is swallowed.
                packer.sent_ahead(ahead);
            }
        }
        rest = &rest[used..];
    }
    [out, second]
}

/// What a target QEMU has after a stream.
#[derive(Clone, PartialEq)]
struct Outcome {
    /// Pages after the switch to post-copy, each of them once.
    after: BTreeSet<(u16, u32)>,
    pages: BTreeMap<(u16, u32), Vec<u8>>,
    /// Everything else in order, but for our pings.
    other: Vec<u8>,
}

fn outcome(stream: &[u8]) -> Outcome {
    let (mut decoder, mut rest) = (Decoder::new(), stream);
    let (mut pages, mut other) = (BTreeMap::new(), Vec::new());
    let mut after = BTreeSet::new();
    while let Step::Item { item, consumed } = decoder.decode(rest).expect("a valid stream") {
        rest = &rest[consumed..];
        if let Item::Page { block, page, .. } | Item::Zero { block, page } = item
            && decoder.has_switched()
        {
            assert!(after.insert((block.0, page.0)), "twice after the switch");
        }
        match item {
            Item::Page { block, page, bytes } => {
                pages.insert((block.0, page.0), bytes.to_vec());
            }
            Item::Zero { block, page } => {
                pages.insert((block.0, page.0), vec![0; PAGE_SIZE]);
            }
            Item::Command {
                command: qstream::Command::Ping(value),
                ..
            } if Unpacker::is_our_ping(value) => {}
            Item::Header { raw, .. }
            | Item::Command { raw, .. }
            | Item::Discard { raw, .. }
            | Item::PackageBegin { raw, .. }
            | Item::RamStart { raw } => {
                other.extend_from_slice(raw);
            }
            Item::Tail(raw) | Item::Opaque(raw) | Item::Package(raw) => {
                other.extend_from_slice(raw)
            }
            Item::PartBegin | Item::PartClosed | Item::EndBegin | Item::EndClosed => {}
        }
    }
    assert!(rest.is_empty(), "the stream ends inside an item");
    Outcome {
        after,
        pages,
        other,
    }
}

/// The bytes of a batch for the second channel.
fn bytes_preempted(batch: &Batch<Body>, own: &[u8]) -> Vec<u8> {
    let pieces = batch.preempt.iter();
    let pieces = pieces.flat_map(|segment| bytes_of_segment(segment, batch, own));
    pieces.copied().collect()
}

/// What the second channel adds; its last item is its end. Returns how many pages.
fn add_second(second: &[u8], stream: &[u8], outcome: &mut Outcome) -> usize {
    let mut main = Decoder::new();
    let mut rest = stream;
    while main.blocks().is_none() {
        match main.decode(rest).expect("a valid stream") {
            Step::Item { consumed, .. } => rest = &rest[consumed..],
            Step::NeedMore { .. } => panic!("no block list"),
        }
    }
    let mut decoder = PreemptDecoder::new(Arc::clone(main.blocks().expect("seen")));
    let (mut at, mut pages) = (0, 0);
    loop {
        match decoder.decode(&second[at..]).expect("a valid channel") {
            PreemptStep::Item { item, consumed } => {
                at += consumed;
                match item {
                    PreemptItem::Page { block, page, bytes } => {
                        let place = (block.0, page.0);
                        assert!(outcome.after.insert(place), "on both channels");
                        outcome.pages.insert(place, bytes.to_vec());
                        pages += 1;
                    }
                    PreemptItem::Zero { .. } => panic!("urgent pages have bytes"),
                    PreemptItem::End => break,
                }
            }
            PreemptStep::NeedMore { .. } => panic!("no end"),
        }
    }
    assert_eq!(at, second.len());
    pages
}

/// Every seventh page that comes after the switch, as if a processor waited for it; and pages that
/// nobody owes.
fn urgent_pages(outcome: &Outcome) -> Vec<Urgent> {
    let one = |&(block, page): &(u16, u32), as_of| {
        let bytes = &outcome.pages[&(block, page)];
        let (block, page) = (BlockIndex(block), PageNo(page));
        let mut body = repair_front(as_of, block, &[page]);
        body.extend_from_slice(bytes);
        ((block, page), Body::from(body))
    };
    let asked = outcome.after.iter().step_by(7).enumerate();
    let asked = asked.map(|(nth, place)| {
        let (place, body) = one(place, u64::MAX);
        ((nth % 2 == 0).then_some(place), body)
    });
    // Read before the guest stopped, by what they say: they must not arrive.
    let stale = outcome.after.iter().skip(3).step_by(7).map(|place| {
        let (_, mut body) = one(place, 1);
        let at = body.len() - PAGE_SIZE;
        Arc::make_mut(&mut body)[at..].fill(0xbb);
        (None, body)
    });
    let not_owed = outcome
        .pages
        .keys()
        .filter(|place| !outcome.after.contains(place));
    let not_owed = not_owed.take(5).map(|place| (None, one(place, u64::MAX).1));
    asked.chain(stale).chain(not_owed).collect()
}

#[test]
fn a_real_stream_arrives_with_the_same_pages_and_the_same_device_state() {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../qstream/tests/golden");
    let (mut streams, mut switched) = (0, 0);
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if !path.to_str().unwrap().ends_with(".main.zst") {
            continue;
        }
        println!("{}", path.display());
        let stream = zstd::decode_all(&*fs::read(&path).unwrap()).unwrap();
        let expected = outcome(&stream);
        assert!(outcome(&carry(&stream, vec![])) == expected);
        let urgent = urgent_pages(&expected);
        if !expected.after.is_empty() {
            assert!(urgent.len() > 20);
            let [first, second] = carry_with(Unpacker::preempting(), &stream, urgent.clone());
            let mut preempted = outcome(&first);
            assert!(add_second(&second, &stream, &mut preempted) > 0);
            assert!(preempted == expected);
            assert!(outcome(&carry(&stream, urgent)) == expected);
            switched += 1;
        }
        streams += 1;
    }
    assert!(streams > 5 && switched > 2, "only {streams} streams");
}

/// The last page that a source QEMU owes comes on its second channel, and may be read after the end of the first.
#[test]
fn ram_does_not_end_before_the_last_page_of_the_second_channel() {
    let golden = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../qstream/tests/golden");
    let stream = fs::read(golden.join("10.0-pc-postcopy.main.zst")).unwrap();
    let stream = zstd::decode_all(&*stream).unwrap();
    let expected = outcome(&stream);
    let late = *expected
        .after
        .iter()
        .find(|place| place.1 % 2 == 0)
        .unwrap();
    let (stream, bytes) = without(&stream, late);
    // Asked for, or only near what was.
    for is_asked in [true, false] {
        let mut unpacker = Unpacker::preempting();
        let (mut first, mut second) = (Vec::new(), Vec::new());
        let mut apply = |unpacker: &mut Unpacker, body: &[u8], is_urgent| {
            let (none, mut batch) = (Recent::with_limit(0), Batch::default());
            let contents = &mut All(&none);
            match is_urgent {
                true => unpacker.apply_urgent(body, |_, _| is_asked, contents, &mut batch),
                false => unpacker.apply(body, false, contents, &mut batch),
            }
            .expect("an honest frame");
            first.extend(bytes_written(&batch, body));
            second.extend(bytes_preempted(&batch, body));
            (first.clone(), second.clone())
        };
        for body in plain_frames(&stream) {
            apply(&mut unpacker, &body, false);
        }
        assert_eq!(unpacker.owed(), 1);
        assert!(!unpacker.is_past_memory());
        let mut body = repair_front(u64::MAX, BlockIndex(late.0), &[PageNo(late.1)]);
        body.extend_from_slice(&bytes);
        apply(&mut unpacker, &body, true);
        assert!(unpacker.is_past_memory());
        // Its second copy finds everything ended.
        let (first, second) = apply(&mut unpacker, &body, true);
        let mut found = outcome(&first);
        assert_eq!(
            add_second(&second, &stream, &mut found),
            usize::from(is_asked)
        );
        assert!(found == expected);
    }
}

/// The stream without a page of its post-copy, and that page.
fn without(stream: &[u8], place: (u16, u32)) -> (Vec<u8>, Vec<u8>) {
    let (mut decoder, mut rest) = (Decoder::new(), stream);
    let (mut out, mut found) = (Vec::new(), None);
    let mut encoder = None;
    while let Step::Item { item, consumed } = decoder.decode(rest).unwrap() {
        let raw = &rest[..consumed];
        rest = &rest[consumed..];
        if !decoder.has_switched() {
            out.extend_from_slice(raw);
            continue;
        }
        let encoder = encoder.get_or_insert_with(|| {
            let blocks = Arc::clone(decoder.blocks().unwrap());
            let (id, footers) = (decoder.ram_section_id(), decoder.footers());
            qstream::Encoder::new(blocks, id.unwrap(), footers.unwrap())
        });
        match item {
            Item::Page { block, page, bytes } if (block.0, page.0) == place => {
                found = Some(bytes.to_vec());
            }
            Item::Zero { block, page } if (block.0, page.0) == place => {
                found = Some(vec![0; PAGE_SIZE]);
            }
            Item::Page { block, page, bytes } => {
                encoder.page(block, page, &mut out);
                out.extend_from_slice(bytes);
            }
            Item::Zero { block, page } => encoder.zero(block, page, &mut out),
            Item::PartBegin => encoder.begin_part(&mut out),
            Item::EndBegin => encoder.begin_end(&mut out),
            Item::PartClosed | Item::EndClosed => encoder.close(&mut out),
            _ => out.extend_from_slice(raw),
        }
    }
    (out, found.unwrap())
}

/// The frames of a stream that is packed without a table.
fn plain_frames(stream: &[u8]) -> Vec<Vec<u8>> {
    let mut packer = Packer::new(None, HashSet::new());
    let (mut table, mut frames, mut rest) = (HostTable::default(), Vec::new(), stream);
    while !rest.is_empty() {
        let buffer = &rest[..rest.len().min(256 << 10)];
        let used = packer.scan(buffer, 0).unwrap();
        if packer.awaits_switch(buffer, used) {
            packer.pass_switch();
        }
        let packed = packer.take().resolve(buffer, &mut table, &[]);
        let pages = packed.pages.iter();
        let pages = pages.flat_map(|at| &buffer[*at as usize..][..PAGE_SIZE]);
        frames.push(packed.front.iter().chain(pages).copied().collect());
        rest = &rest[used..];
    }
    frames
}
