//! Streams captured from real QEMUs by `scripts/capture-golden`.

use std::collections::HashSet;

use crate::common::{decode_all, golden};
use crate::rewriter::Rewriter;
use page::PAGE_SIZE;
use qstream::{Command, Feature, Item, ReturnDecoder, ReturnMessage, ReturnStep, StreamError};

/// Whether the stream was switched to post-copy, and not only might have been.
fn is_postcopy(name: &str) -> bool {
    name.ends_with("postcopy")
}

#[test]
fn what_comes_after_a_switch_is_what_was_discarded_each_page_once() {
    let mut tried = 0;
    for (name, stream) in golden("main")
        .into_iter()
        .filter(|(name, _)| is_postcopy(name))
    {
        let (mut owed, mut sent, mut package) = (HashSet::new(), vec![], 0);
        let mut announced = 0;
        decode_all(&stream, |item, decoder| match *item {
            Item::Discard { discard, .. } => {
                for page in discard.runs().flat_map(page::PageRun::pages) {
                    assert!(
                        owed.insert((discard.block, page)),
                        "{name}: discarded twice"
                    );
                }
            }
            Item::PackageBegin { len, .. } => announced = len as usize,
            Item::Package(bytes) => package += bytes.len(),
            Item::Page { block, page, .. } | Item::Zero { block, page }
                if decoder.has_switched() =>
            {
                sent.push((block, page));
            }
            _ => {}
        })
        .unwrap();
        assert_eq!(package, announced, "{name}");
        let once: HashSet<_> = sent.iter().copied().collect();
        assert_eq!(once.len(), sent.len(), "{name}: sent twice");
        assert_eq!(once, owed, "{name}");
        tried += 1;
    }
    assert!(tried >= 4, "captured streams are missing");
}

#[test]
fn decoding_and_encoding_gives_back_every_byte_of_a_real_stream() {
    let streams = golden("main");
    assert!(streams.len() >= 23, "captured streams are missing");
    for (name, stream) in streams {
        let mut rewriter = Rewriter::default();
        let rest = decode_all(&stream, |item, decoder| rewriter.item(item, decoder));
        assert_eq!(rest, Ok(&[][..]), "{name}");
        assert!(rewriter.out == stream, "{name} differs");
    }
}

#[test]
fn a_real_stream_names_its_machine_and_sends_every_page() {
    for (name, stream) in golden("main") {
        let (mut machines, mut pages, mut parts, mut ends, mut tail) = (vec![], 0_u64, 0, 0, 0);
        let mut total = 0;
        decode_all(&stream, |item, decoder| match *item {
            Item::Header { machine, .. } => machines.push(machine),
            Item::Page { .. } | Item::Zero { .. } => pages += 1,
            Item::PartBegin => parts += 1,
            Item::EndClosed => ends += 1,
            Item::Tail(bytes) => tail += bytes.len(),
            Item::RamStart { .. } => total = decoder.blocks().unwrap().total_pages(),
            _ => {}
        })
        .unwrap();
        let expected = if name.contains("q35") {
            "pc-q35-"
        } else {
            "pc-i440fx-"
        };
        assert!(
            machines.len() == 1 && machines[0].starts_with(expected),
            "{name}: {machines:?}"
        );
        assert_eq!(ends, 1, "{name}");
        assert!(parts > 0, "{name}");
        if is_postcopy(&name) {
            assert_eq!(tail, 1, "{name}: only the end of the stream");
        } else {
            assert!(
                tail > 10_000,
                "{name}: device state and description of {tail} bytes"
            );
        }
        // The first pass has every page, unless it is shared with the target or not plugged.
        if name.contains("ignore-shared") {
            assert!(pages < (8 << 20) / PAGE_SIZE as u64, "{name}: {pages}");
        } else if !name.contains("virtio-mem") {
            assert!(
                pages > total || (is_postcopy(&name) && pages == total),
                "{name}: {pages} records for {total} pages in several rounds"
            );
        }
    }
}

#[test]
fn commands_are_those_that_the_capabilities_and_versions_ask_for() {
    for (name, stream) in golden("main") {
        let mut commands = vec![];
        decode_all(&stream, |item, _| {
            if let Item::Command { command, .. } = item {
                commands.push(*command);
            }
        })
        .unwrap();
        let mut expected = vec![];
        if ["return-path", "switchover-ack", "old-machine", "postcopy"]
            .iter()
            .any(|with| name.contains(with))
        {
            expected.extend([Command::OpenReturnPath, Command::Ping(1)]);
        }
        if name.contains("postcopy") {
            let page_sizes = PAGE_SIZE as u64;
            expected.push(Command::PostcopyAdvise { page_sizes });
        }
        if name.starts_with("10.0") && !name.contains("old-machine") {
            expected.push(Command::SwitchoverStart);
        }
        if is_postcopy(&name) {
            expected.extend([Command::Ping(2), Command::Ping(4)]);
        }
        assert_eq!(commands, expected, "{name}");
    }
}

#[test]
fn the_early_state_of_virtio_mem_passes_as_opaque_bytes() {
    let streams = golden("main");
    let (_, stream) = streams
        .iter()
        .find(|(name, _)| name.contains("virtio-mem"))
        .unwrap();
    let mut opaque = vec![];
    decode_all(stream, |item, _| {
        if let Item::Opaque(raw) = item {
            opaque.push(raw.to_vec());
        }
    })
    .unwrap();
    assert_eq!(opaque.len(), 1);
    assert!(
        opaque[0]
            .windows(23)
            .any(|part| part == b"virtio-mem-device-early")
    );
}

#[test]
fn a_stream_without_footers_is_recognised() {
    for (name, stream) in golden("main") {
        let mut footers = None;
        decode_all(&stream, |_, decoder| footers = decoder.footers()).unwrap();
        assert_eq!(footers, Some(!name.contains("no-footers")), "{name}");
    }
}

#[test]
fn what_is_not_carried_is_refused_by_name() {
    let streams = golden("refused");
    assert!(streams.len() >= 6, "captured streams are missing");
    for (name, stream) in streams {
        let (_, variant) = name.split_once("-pc-").unwrap();
        let expected = match variant {
            "xbzrle" => Feature::Xbzrle,
            "compress" => Feature::Compress,
            "multifd" => Feature::Multifd,
            "dirty-bitmaps" => Feature::DirtyBitmaps,
            other => panic!("no expectation for {other}"),
        };
        let error = decode_all(&stream, |_, _| {}).unwrap_err();
        assert_eq!(error, StreamError::Unsupported(expected), "{name}");
        let text = error.to_string();
        assert!(
            text.contains("turn it off with migrate-set-capabilities"),
            "{text}"
        );
    }
}

#[test]
fn a_real_return_path_is_decoded_and_encoded_byte_for_byte() {
    let streams = golden("return");
    assert!(streams.len() >= 6, "captured streams are missing");
    let mut requests = 0;
    for (name, stream) in streams {
        let (mut decoder, mut rest) = (ReturnDecoder::new(), &stream[..]);
        let (mut messages, mut out) = (vec![], vec![]);
        while let ReturnStep::Message { message, raw } = decoder.decode(rest).unwrap() {
            rest = &rest[raw.len()..];
            messages.push(message);
            qstream::encode_return(&message, &mut out);
        }
        assert_eq!(rest, [], "{name}");
        assert_eq!(out, stream, "{name}");
        if is_postcopy(&name) {
            let is_request = |message: &&ReturnMessage<'_>| {
                matches!(
                    message,
                    ReturnMessage::ReqPagesId { len: 4096, .. }
                        | ReturnMessage::ReqPages { len: 4096, .. }
                )
            };
            requests += messages.iter().filter(is_request).count();
            messages.retain(|m| !is_request(&m));
            // Two threads answer: the order of 3 and 4 is not given.
            messages[2..4].sort_by_key(|m| *m != ReturnMessage::Pong(3));
        }
        let mut expected = vec![ReturnMessage::Pong(1), ReturnMessage::Shut(0)];
        if is_postcopy(&name) {
            let pongs = (2..5).map(ReturnMessage::Pong);
            expected.splice(1..1, pongs);
        }
        if name.contains("switchover-ack") {
            expected.insert(0, ReturnMessage::SwitchoverAck);
        }
        assert_eq!(messages, expected, "{name}");
    }
    assert!(requests > 5, "hardly a request for a page: {requests}");
}
