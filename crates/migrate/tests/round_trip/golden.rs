//! Streams of real QEMUs through both machines.

use std::collections::BTreeMap;
use std::collections::HashSet;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use content::{HostTable, Recent};
use migrate::pack::Packer;
use migrate::unpack::{Batch, Contents, Found, Unpacker};
use page::{EntryId, PAGE_SIZE};
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

/// Packs the stream in buffers of 256 KiB and unpacks it again.
fn carry(stream: &[u8]) -> Vec<u8> {
    const BUFFER: usize = 256 << 10;
    let mut packer = Packer::new(crate::key(), HashSet::from(["pc.ram".to_owned()]));
    let (mut unpacker, mut table) = (Unpacker::default(), HostTable::default());
    let (mut recent, mut out) = (Recent::with_limit(1 << 30), Vec::new());
    let mut rest = stream;
    while !rest.is_empty() {
        let buffer = &rest[..rest.len().min(BUFFER)];
        let used = packer.scan(buffer, 0).expect("QEMU's stream");
        assert!(used > 0);
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
        rest = &rest[used..];
    }
    out
}

/// What a target QEMU has after a stream.
#[derive(PartialEq)]
struct Outcome {
    pages: BTreeMap<(u16, u32), Vec<u8>>,
    /// Everything else in order, but for our pings.
    other: Vec<u8>,
}

fn outcome(stream: &[u8]) -> Outcome {
    let (mut decoder, mut rest) = (Decoder::new(), stream);
    let (mut pages, mut other) = (BTreeMap::new(), Vec::new());
    while let Step::Item { item, consumed } = decoder.decode(rest).expect("a valid stream") {
        rest = &rest[consumed..];
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
            Item::Header { raw, .. } | Item::Command { raw, .. } | Item::RamStart { raw } => {
                other.extend_from_slice(raw);
            }
            Item::Tail(raw) | Item::Opaque(raw) => other.extend_from_slice(raw),
            Item::PartBegin | Item::PartClosed | Item::EndBegin | Item::EndClosed => {}
        }
    }
    assert!(rest.is_empty(), "the stream ends inside an item");
    Outcome { pages, other }
}

#[test]
fn a_real_stream_arrives_with_the_same_pages_and_the_same_device_state() {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../qstream/tests/golden");
    let mut streams = 0;
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if !path.to_str().unwrap().ends_with(".main.zst") {
            continue;
        }
        println!("{}", path.display());
        let stream = zstd::decode_all(&*fs::read(&path).unwrap()).unwrap();
        let carried = carry(&stream);
        assert!(outcome(&carried) == outcome(&stream));
        streams += 1;
    }
    assert!(streams > 5, "only {streams} streams");
}
