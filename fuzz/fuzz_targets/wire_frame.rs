//! Everything a peer says on the bulk and control channels, each decoder on the same bytes.

#![no_main]

use std::fmt::Debug;

use libfuzzer_sys::fuzz_target;
use page::{BlockIndex, EntryId, PageNo};
use serde::Serialize;
use serde::de::DeserializeOwned;
use wire::{
    BackMessage, ControlReply, ControlRequest, FrameHeader, HEADER_LEN, Hello, MAX_BODY, MAX_OPS,
    Op, OpReader, OpWriter, WireError, decode_control, encode_control, split_pages_body,
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

/// An operation on one page, or another one.
#[derive(Debug, PartialEq)]
enum Single<'a> {
    Zero(BlockIndex, PageNo),
    Fill(BlockIndex, PageNo, u8),
    Plain(BlockIndex, PageNo),
    Literal(BlockIndex, PageNo, EntryId),
    Reference(BlockIndex, PageNo, EntryId),
    Other(Op<'a>),
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

fn singles<'a>(ops: &[Op<'a>]) -> Vec<Single<'a>> {
    let mut block = BlockIndex(0);
    let mut out = Vec::new();
    for op in ops {
        match *op {
            Op::Block(b) => block = b,
            Op::Zero(run) => out.extend(run.pages().map(|page| Single::Zero(block, page))),
            Op::Fill(run, byte) => {
                out.extend(run.pages().map(|page| Single::Fill(block, page, byte)));
            }
            Op::Plain(run) => out.extend(run.pages().map(|page| Single::Plain(block, page))),
            Op::Literal(run, first) => out.extend(
                run.pages()
                    .zip(0..)
                    .map(|(page, i)| Single::Literal(block, page, first.plus(i))),
            ),
            Op::Reference(run, first) => out.extend(
                run.pages()
                    .zip(0..)
                    .map(|(page, i)| Single::Reference(block, page, first.plus(i))),
            ),
            other => out.push(Single::Other(other)),
        }
    }
    out
}

fn write(single: &Single<'_>, writer: &mut OpWriter) {
    match *single {
        Single::Zero(block, page) => writer.zero(block, page),
        Single::Fill(block, page, byte) => writer.fill(block, page, byte),
        Single::Plain(block, page) => writer.plain(block, page),
        Single::Literal(block, page, entry) => writer.literal(block, page, entry),
        Single::Reference(block, page, entry) => writer.reference(block, page, entry),
        Single::Other(Op::Raw(bytes)) => writer.raw(bytes),
        Single::Other(Op::RamStart(bytes)) => writer.ram_start(bytes),
        Single::Other(Op::Tail(bytes)) => writer.tail(bytes),
        Single::Other(Op::EndBegin) => writer.end_begin(),
        Single::Other(Op::EndClosed) => writer.end_closed(),
        Single::Other(_) => unreachable!("operations on pages are taken apart"),
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
