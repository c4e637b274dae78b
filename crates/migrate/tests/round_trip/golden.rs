//! Streams of real QEMUs through both machines.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use content::{HostTable, Recent};
use migrate::pack::{Packer, repair_front};
use migrate::unpack::{Batch, Contents, Found, Unpacker};
use page::{BlockIndex, EntryId, PAGE_SIZE, PageNo};
use qstream::{Decoder, Item, Step};
use wire::Remote;

use crate::session::{Body, bytes_written, literals};

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

/// Packs the stream in buffers of 256 KiB and unpacks it again.
fn carry(stream: &[u8], mut urgent: Vec<Urgent>) -> Vec<u8> {
    const BUFFER: usize = 256 << 10;
    let mut packer = Packer::new(crate::key(), HashSet::from(["pc.ram".to_owned()]));
    let (mut unpacker, mut table) = (Unpacker::default(), HostTable::default());
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
        // The target asks for pages once it has the package.
        if unpacker.has_switched() {
            for (ahead, body) in urgent.drain(..) {
                let mut batch = Batch::default();
                unpacker
                    .apply(&body, true, &mut All(&recent), &mut batch)
                    .expect("an honest frame");
                out.extend(bytes_written(&batch, &body));
                // Without this QEMU's own copy comes as well, and is swallowed.
                packer.sent_ahead(ahead);
            }
        }
        rest = &rest[used..];
    }
    out
}

/// What a target QEMU has after a stream.
#[derive(PartialEq)]
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
            assert!(outcome(&carry(&stream, urgent)) == expected);
            switched += 1;
        }
        streams += 1;
    }
    assert!(streams > 5 && switched > 2, "only {streams} streams");
}
