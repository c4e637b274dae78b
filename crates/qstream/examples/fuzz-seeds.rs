//! Writes the seeds of the decoder's fuzz targets from the captured streams:
//! `cargo run -p qstream --example fuzz-seeds`, after a stream was captured anew.

#![expect(clippy::unwrap_used, reason = "a tool for those who see its panics")]

#[path = "../tests/streams/common.rs"]
mod common;
#[path = "../tests/streams/rewriter.rs"]
mod rewriter;
#[path = "../tests/streams/shortened.rs"]
mod shortened;

use std::fs;
use std::path::Path;

use common::golden;
use qstream::{ReturnMessage, encode_return};
use shortened::shortened;

/// Of a stream that is refused: its refusal comes in the first sections.
const REFUSED_BYTES: usize = 8 << 10;

/// Messages of post-copy's recovery, of which there is no capture, and its requests.
const POST_COPY: [ReturnMessage<'_>; 4] = [
    ReturnMessage::ReqPagesId {
        start: 0x1000,
        len: 0x1000,
        block: "pc.ram",
    },
    ReturnMessage::ReqPages {
        start: 0x2000,
        len: 0x1000,
    },
    ReturnMessage::RecvBitmap {
        block: "pc.bios",
        bitmap: &[0xff; 8],
    },
    ReturnMessage::ResumeAck(1),
];

/// Commands of a stream that goes on, of which there is no capture: for each block what the target has, and
/// that it goes on; and such that are cut or wrong.
const RECOVERY: [(&str, &[&[u8]]); 5] = [
    ("bitmaps-and-resume", &[ASKS_RAM, ASKS_ROM, RESUMES]),
    ("resume", &[RESUMES]),
    ("then-ram", &[RESUMES, b"\x02\x00\x00\x00\x02"]),
    ("cut", &[ASKS_RAM, b"\x08\x00\x0a\x00\x08\x07pc.b"]),
    ("wrong-length", &[b"\x08\x00\x0a\x00\x07\x05pc.ram"]),
];
const ASKS_RAM: &[u8] = b"\x08\x00\x0a\x00\x07\x06pc.ram";
const ASKS_ROM: &[u8] = b"\x08\x00\x0a\x00\x08\x07pc.bios";
const RESUMES: &[u8] = b"\x08\x00\x09\x00\x00";

/// Heads of records of the second channel: which page with its bytes, of which block; the last one is an end mark.
/// There is no capture of it.
const PREEMPT: [(&str, &[&[u8]]); 4] = [
    ("pages", &[PREEMPT_NAMED, PREEMPT_NEXT]),
    (
        "pages-and-end",
        &[
            PREEMPT_NAMED,
            PREEMPT_ZERO,
            PREEMPT_NEXT,
            b"\0\0\0\0\0\0\0\x10",
        ],
    ),
    ("no-block", &[PREEMPT_NEXT]),
    ("outside", &[b"\0\0\0\0\x10\0\0\x02\x06pc.ram\0"]),
];
const PREEMPT_NAMED: &[u8] = b"\0\0\0\0\0\x01\x20\x08\x06pc.ram";
const PREEMPT_NEXT: &[u8] = b"\0\0\0\0\0\0\x30\x28";
const PREEMPT_ZERO: &[u8] = b"\0\0\0\0\0\0\0\x02\x07pc.bios\0";

fn main() {
    let refused = golden("refused").into_iter().map(|(name, mut stream)| {
        stream.truncate(REFUSED_BYTES);
        (name, stream)
    });
    let main = golden("main")
        .into_iter()
        .map(|(name, stream)| (name, shortened(&stream)));
    write("qstream_main", main.chain(refused));
    let mut post_copy = vec![];
    for message in &POST_COPY {
        encode_return(message, &mut post_copy);
    }
    let answers = golden("return").into_iter();
    write(
        "qstream_return",
        answers.chain([("postcopy".to_owned(), post_copy)]),
    );
    let recovery = RECOVERY.map(|(name, commands)| (name.to_owned(), commands.concat()));
    write("qstream_recovery", recovery.into_iter());
    let preempt = PREEMPT.map(|(name, heads)| {
        let records = heads.iter().flat_map(|head| {
            // The low bits of a word say whether a page's bytes follow.
            let bytes = if head[7] & 0x08 != 0 { 4096 } else { 0 };
            [*head, &[0x5a; 4096][..bytes]].concat()
        });
        (name.to_owned(), records.collect())
    });
    write("qstream_preempt", preempt.into_iter());
}

fn write(target: &str, seeds: impl Iterator<Item = (String, Vec<u8>)>) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus");
    let directory = corpus.join(target);
    fs::create_dir_all(&directory).unwrap();
    for (name, bytes) in seeds {
        fs::write(directory.join(format!("seed-{name}")), bytes).unwrap();
    }
}
