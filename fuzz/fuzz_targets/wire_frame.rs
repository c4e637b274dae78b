//! Everything a peer says on the bulk and control channels, each decoder on the same bytes.

#![no_main]

use std::fmt::Debug;

use libfuzzer_sys::fuzz_target;
use page::{BlockIndex, ContentId, EntryId, FrameSharing, HostSet, PageNo};
use serde::Serialize;
use serde::de::DeserializeOwned;
use wire::{
    BackMessage, ControlReply, ControlRequest, FrameHeader, HEADER_LEN, Hello, MAX_BODY, MAX_OPS,
    Op, OpReader, OpWriter, RemoteContent, WireError, decode_control, encode_control,
    split_pages_body,
};

/// More pages than this are counted and not looked at one by one.
const MAX_PAGES: u64 = 10_000;

fuzz_target!(|input: &[u8]| {
    header(input);
    back_message(input);
    pages_body(input);
    control::<Hello>(input);
    control::<ControlRequest>(input);
    control::<ControlReply>(input);
});

fn header(input: &[u8]) {
    let Some(bytes) = input.first_chunk::<HEADER_LEN>() else {
        return;
    };
    let Ok(header) = FrameHeader::parse(*bytes) else {
        return;
    };
    let (body_len, raw_len) = (header.body_len(), header.raw_len());
    assert!(body_len <= MAX_BODY && raw_len <= MAX_BODY);
    assert!(header.is_compressed() || body_len == raw_len);
    let again = FrameHeader::new(header.kind(), header.vm(), body_len as u32, raw_len as u32)
        .with_compression(header.is_compressed());
    // The last four bytes are reserved.
    assert_eq!(again.to_bytes()[..12], bytes[..12]);
}

fn back_message(input: &[u8]) {
    let Ok(message) = BackMessage::decode(input) else {
        return;
    };
    let mut bytes = Vec::new();
    message.encode(&mut bytes);
    assert_eq!(BackMessage::decode(&bytes), Ok(message));
}

/// An operation on one page with all that belongs to it, or another one.
#[derive(Debug, PartialEq)]
enum Single<'a> {
    Page(FrameSharing, BlockIndex, PageNo, Kind),
    Other(Op<'a>),
}

#[derive(Debug, PartialEq)]
enum Kind {
    Zero,
    Fill(u8),
    Plain,
    Literal(EntryId, HostSet),
    Reference(EntryId),
    Remote(RemoteContent),
}

fn pages_body(input: &[u8]) {
    let Ok(parts) = split_pages_body(input) else {
        return;
    };
    assert!(parts.ops.len() <= MAX_OPS);
    assert!(parts.ops.len() + parts.pages.len() < input.len());
    let ops: Result<Vec<_>, WireError> = OpReader::new(parts.ops).collect();
    let Ok(ops) = ops else {
        return;
    };
    if ops.iter().map(|op| u64::from(op.pages())).sum::<u64>() > MAX_PAGES {
        return;
    }
    let expected = singles(&ops);
    let mut writer = OpWriter::new();
    expected
        .iter()
        .for_each(|single| write(single, &mut writer));
    let body = writer.finish(parts.position);
    let again = split_pages_body(&body).expect("what was written");
    assert_eq!(again.position, parts.position);
    let ops: Vec<_> = OpReader::new(again.ops)
        .map(|op| op.expect("what was written"))
        .collect();
    assert_eq!(singles(&ops), expected);
}

/// Whom a literal is passed on to and how its frame is shared is said once for many.
fn singles<'a>(ops: &[Op<'a>]) -> Vec<Single<'a>> {
    let mut block = BlockIndex(0);
    let (mut forward, mut sharing) = (HostSet::default(), FrameSharing::default());
    let mut out = Vec::new();
    for op in ops {
        let (run, kind): (_, Box<dyn Fn(u32) -> Kind>) = match *op {
            Op::Block(b) => {
                block = b;
                continue;
            }
            Op::Forward(hosts) => {
                forward = hosts;
                continue;
            }
            Op::Shared(shared) => {
                sharing = shared;
                continue;
            }
            Op::Zero(run) => (run, Box::new(|_| Kind::Zero)),
            Op::Fill(run, byte) => (run, Box::new(move |_| Kind::Fill(byte))),
            Op::Plain(run) => (run, Box::new(|_| Kind::Plain)),
            Op::Literal(run, first) => (
                run,
                Box::new(move |i| Kind::Literal(first.plus(i), forward)),
            ),
            Op::Reference(run, first) => (run, Box::new(move |i| Kind::Reference(first.plus(i)))),
            Op::Remote(remote) => {
                let kind = move |i: u32| {
                    Kind::Remote(RemoteContent {
                        entry: remote.first.plus(i),
                        id: ContentId(remote.ids[i as usize]),
                        carrier: remote.carrier,
                        pushed: remote.pushed,
                    })
                };
                (remote.run, Box::new(kind))
            }
            Op::Raw(_)
            | Op::RamStart(_)
            | Op::Package(_)
            | Op::EndBegin
            | Op::EndClosed
            | Op::Tail(_) => {
                out.push(Single::Other(*op));
                continue;
            }
        };
        let page = |(page, i)| Single::Page(sharing, block, page, kind(i));
        out.extend(run.pages().zip(0..).map(page));
    }
    out
}

fn write(single: &Single<'_>, writer: &mut OpWriter) {
    match single {
        Single::Page(sharing, block, page, kind) => {
            writer.shared(*sharing);
            match kind {
                Kind::Zero => writer.zero(*block, *page),
                Kind::Fill(byte) => writer.fill(*block, *page, *byte),
                Kind::Plain => writer.plain(*block, *page),
                Kind::Literal(entry, hosts) => writer.literal_for(*block, *page, *entry, *hosts),
                Kind::Reference(entry) => writer.reference(*block, *page, *entry),
                Kind::Remote(content) => writer.remote(*block, *page, content),
            }
        }
        Single::Other(Op::Raw(bytes)) => writer.raw(bytes),
        Single::Other(Op::RamStart(bytes)) => writer.ram_start(bytes),
        Single::Other(Op::Package(bytes)) => writer.package(bytes),
        Single::Other(Op::Tail(bytes)) => writer.tail(bytes),
        Single::Other(Op::EndBegin) => writer.end_begin(),
        Single::Other(Op::EndClosed) => writer.end_closed(),
        Single::Other(op) => unreachable!("{op:?} is taken apart"),
    }
}

fn control<T: Serialize + DeserializeOwned + PartialEq + Debug>(json: &[u8]) {
    let Ok(message) = decode_control::<T>(json) else {
        return;
    };
    let bytes = encode_control(&message).expect("not longer than it was");
    let again: T = decode_control(&bytes[4..]).expect("what was encoded");
    assert_eq!(again, message);
}
