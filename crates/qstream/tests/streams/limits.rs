//! Every limit of the main channel, at its edge and one beyond.

use crate::common::decode_all;
use page::{ByteLen, PAGE_SIZE};
use qstream::{Block, BlockList, Decoder, Feature, Item, MAX_BLOCKS, MAX_ITEM, Step, StreamError};

const PAGE: u64 = PAGE_SIZE as u64;
const HEADER: &[u8] = b"QEVM\0\0\0\x03\x07\0\0\0\x02pc";

fn counted(name: &str) -> Vec<u8> {
    [&[u8::try_from(name.len()).unwrap()], name.as_bytes()].concat()
}

fn section(kind: u8, id: u32, name: &str) -> Vec<u8> {
    let version: u32 = if name == "ram" { 4 } else { 1 };
    [
        &[kind][..],
        &id.to_be_bytes(),
        &counted(name),
        &[0; 4],
        &version.to_be_bytes(),
    ]
    .concat()
}

fn footer(id: u32) -> Vec<u8> {
    [&[0x7e][..], &id.to_be_bytes()].concat()
}

/// A RAM START section with this total and these entries.
fn ram_start(total: u64, entries: &[(&str, u64)]) -> Vec<u8> {
    let mut out = section(1, 2, "ram");
    out.extend_from_slice(&(total | 4).to_be_bytes());
    for (name, len) in entries {
        out.extend_from_slice(&counted(name));
        out.extend_from_slice(&len.to_be_bytes());
    }
    out.extend_from_slice(&0x10_u64.to_be_bytes());
    out.extend_from_slice(&footer(2));
    out
}

/// A stream with two blocks of 2 and 1 pages in which a PART has begun.
fn in_part(records: &[&[u8]]) -> Vec<u8> {
    let start = ram_start(3 * PAGE, &[("a", 2 * PAGE), ("b", PAGE)]);
    [HEADER, &start, b"\x02\0\0\0\x02", &records.concat()].concat()
}

fn record(word: u64) -> [u8; 8] {
    word.to_be_bytes()
}

fn error(stream: &[u8]) -> StreamError {
    decode_all(stream, |_, _| {}).expect_err("the stream was accepted")
}

fn items(stream: &[u8]) -> usize {
    let mut count = 0;
    assert_eq!(decode_all(stream, |_, _| count += 1), Ok(&[][..]));
    count
}

#[test]
fn what_is_no_migration_stream_is_recognised_by_its_first_bytes() {
    let unsupported = [
        (&b"\x11\x22\x33\x44"[..], Feature::Multifd),
        (b"\x16\x03\x01\x02", Feature::Tls),
        (b"\x08\x00\x0a\x00", Feature::PostcopyRecovery),
        (b"QEVM\0\0\0\x03\x01", Feature::NoConfiguration),
    ];
    for (bytes, feature) in unsupported {
        assert_eq!(error(bytes), StreamError::Unsupported(feature));
    }
    assert_eq!(error(b"GET "), StreamError::BadMagic(0x4745_5420));
    assert_eq!(error(b"QEVM\0\0\0\x02"), StreamError::BadVersion(2));
}

#[test]
fn configuration_subsections_are_checked() {
    let bad = |bytes: &[u8]| error(&[HEADER, bytes].concat());
    let sub = |name: &str| [&[5][..], &counted(name), &[0, 0, 0, 1]].concat();
    assert!(matches!(
        error(b"QEVM\0\0\0\x03\x07\0\0\x01\0"),
        StreamError::BadConfiguration(_)
    ));
    assert!(matches!(
        bad(&sub("configuration/new")),
        StreamError::BadConfiguration(_)
    ));
    let uuid = [sub("configuration/uuid"), vec![0; 16]].concat();
    assert!(matches!(
        bad(&[&*uuid, &*uuid].concat()),
        StreamError::BadConfiguration(_)
    ));
    let capabilities = sub("configuration/capabilities");
    assert!(matches!(
        bad(&[&*capabilities, &[0, 0, 0, 33]].concat()),
        StreamError::BadConfiguration(_)
    ));
    assert_eq!(
        bad(&[&*capabilities, &[0, 0, 0, 1], &counted("mapped-ram")].concat()),
        StreamError::Unsupported(Feature::Capability("mapped-ram".into())),
    );
    assert_eq!(
        bad(&sub("configuration/target-page-bits")),
        StreamError::Unsupported(Feature::TargetPageBits),
    );
}

#[test]
fn commands_that_are_not_carried_are_refused_by_name_and_unknown_ones_by_number() {
    let command = |number: u8, len: u8| error(&[HEADER, &[8, 0, number, 0, len]].concat());
    for (number, len, feature) in [
        (3, 0, Feature::DirtyBitmaps),
        (8, 0, Feature::Colo),
        (9, 0, Feature::PostcopyRecovery),
        (10, 3, Feature::PostcopyRecovery),
    ] {
        assert_eq!(
            command(number, len),
            StreamError::Unsupported(feature),
            "{number}"
        );
    }
    // Listen and run stand inside of packages alone; a switch needs blocks.
    for (number, len) in [
        (0, 0),
        (1, 1),
        (2, 3),
        (3, 8),
        (4, 0),
        (5, 0),
        (6, 30),
        (7, 4),
        (11, 1),
        (12, 0),
    ] {
        let expected = StreamError::BadCommand {
            number: number.into(),
            len: len.into(),
        };
        assert_eq!(command(number, len), expected);
    }
}

#[test]
fn block_lists_must_add_up_and_have_plain_entries() {
    let start = |total, entries: &[_]| [HEADER, &ram_start(total, entries)].concat();
    assert_eq!(items(&start(PAGE, &[("a", PAGE)])), 2);
    let bad = [
        start(0, &[]),
        start(PAGE, &[("a", 2 * PAGE)]),
        start(2 * PAGE, &[("a", PAGE), ("a", PAGE)]),
        start(PAGE, &[("", PAGE)]),
        start(PAGE, &[("a", 0), ("b", PAGE)]),
        start(2 * PAGE, &[("a", PAGE + 512), ("b", PAGE - 512)]),
        start((1 << 44) + PAGE, &[("a", (1 << 44) + PAGE)]),
    ];
    for stream in bad {
        let error = error(&stream);
        assert!(matches!(error, StreamError::BadBlockList(_)), "{error}");
    }
    assert_eq!(items(&start(1 << 44, &[("a", 1 << 44)])), 2);
    // The total says that the list ends here, so what follows is taken for a record.
    assert!(matches!(
        error(&start(PAGE, &[("a", PAGE), ("b", PAGE)])),
        StreamError::BadRecord(_)
    ));
}

#[test]
fn the_largest_block_list_fits_into_the_largest_item() {
    let names: Vec<_> = (0..=MAX_BLOCKS).map(|n| format!("{n:0>255}")).collect();
    let entries: Vec<_> = names.iter().map(|name| (&**name, PAGE)).collect();
    let largest = ram_start(MAX_BLOCKS as u64 * PAGE, &entries[..MAX_BLOCKS]);
    assert!(largest.len() <= MAX_ITEM);
    assert_eq!(items(&[HEADER, &largest].concat()), 2);
    let beyond = ram_start((MAX_BLOCKS as u64 + 1) * PAGE, &entries);
    assert_eq!(
        error(&[HEADER, &beyond].concat()),
        StreamError::BadBlockList("too many blocks")
    );
}

#[test]
fn a_block_list_made_by_hand_is_checked_as_well() {
    let block = |name: &str, len| Block {
        name: name.into(),
        used_len: ByteLen(len),
        host_page: ByteLen(PAGE),
    };
    assert!(BlockList::new(vec![block(&"n".repeat(255), PAGE)]).is_ok());
    for blocks in [
        vec![],
        vec![block("a", PAGE); MAX_BLOCKS + 1],
        vec![block(&"n".repeat(256), PAGE)],
        vec![block("a", PAGE - 1)],
        vec![block("a", 0)],
    ] {
        assert!(matches!(
            BlockList::new(blocks),
            Err(StreamError::BadBlockList(_))
        ));
    }
}

#[test]
fn records_must_lie_in_a_known_block() {
    let page = [0; PAGE_SIZE];
    assert_eq!(items(&in_part(&[&record(PAGE | 0x08), b"\x01a", &page])), 4);
    assert_eq!(
        items(&in_part(&[
            &record(PAGE | 0x02),
            b"\x01a\0",
            &record(0x22),
            b"\0"
        ])),
        5
    );
    assert_eq!(
        error(&in_part(&[&record(PAGE | 0x02), b"\x01b"])),
        StreamError::PageOutside {
            offset: PAGE,
            block: "b".into()
        },
    );
    // The current block changes with the name.
    assert_eq!(
        error(&in_part(&[
            &record(0x02),
            b"\x01b\0",
            &record(PAGE | 0x22),
            b"\0"
        ])),
        StreamError::PageOutside {
            offset: PAGE,
            block: "b".into()
        },
    );
    assert!(matches!(
        error(&in_part(&[&record(!0xfff | 0x02), b"\x01a"])),
        StreamError::PageOutside { .. }
    ));
    assert_eq!(
        error(&in_part(&[&record(0x08), b"\x01c"])),
        StreamError::UnknownBlock
    );
    assert_eq!(
        error(&in_part(&[&record(0x08), b"\x01\xff"])),
        StreamError::UnknownBlock
    );
    assert_eq!(
        error(&in_part(&[&record(0x28)])),
        StreamError::NoCurrentBlock
    );
    assert_eq!(
        error(&in_part(&[&record(0x02), b"\x01a\x01"])),
        StreamError::BadFill(1)
    );
}

#[test]
fn records_with_other_flags_are_refused() {
    for (flags, feature) in [
        (0x40, Feature::Xbzrle),
        (0x60, Feature::Xbzrle),
        (0x80, Feature::Rdma),
        (0x100, Feature::Compress),
        (0x120, Feature::Compress),
        (0x200, Feature::Multifd),
    ] {
        assert_eq!(
            error(&in_part(&[&record(flags)])),
            StreamError::Unsupported(feature)
        );
    }
    for word in [0, 0x01, 0x04, 0x0a, 0x18, 0x20, 0x30, 0x400, PAGE | 0x10] {
        assert_eq!(
            error(&in_part(&[&record(word)])),
            StreamError::BadRecord(word)
        );
    }
}

#[test]
fn sections_must_be_those_of_the_ram_handler() {
    let started = [HEADER, &ram_start(PAGE, &[("a", PAGE)])].concat();
    let after = |bytes: &[u8]| error(&[&*started, bytes].concat());
    let wrong = |found, expected| StreamError::WrongSection { found, expected };
    assert_eq!(error(&[HEADER, b"\x02\0\0\0\x02"].concat()), wrong(2, None));
    assert_eq!(after(b"\x02\0\0\0\x03"), wrong(3, Some(2)));
    assert_eq!(after(b"\x03\0\0\0\x03"), wrong(3, Some(2)));
    assert_eq!(
        after(&ram_start(PAGE, &[("a", PAGE)])),
        StreamError::SecondRamStart
    );
    for byte in [0x00, 0x05, 0x06, 0x07, 0x09, 0x7e] {
        assert_eq!(after(&[byte]), StreamError::UnexpectedSection(byte));
        assert_eq!(
            error(&[HEADER, &[9]].concat()),
            StreamError::UnexpectedSection(9)
        );
    }
    let eos = record(0x10);
    assert_eq!(
        error(&in_part(&[&eos, b"\x7e\0\0\0\x03"])),
        wrong(3, Some(2))
    );
    assert_eq!(error(&in_part(&[&eos, b"\x02"])), StreamError::NoFooter(2));
    let mut version = section(1, 2, "ram");
    *version.last_mut().unwrap() = 5;
    assert_eq!(
        error(&[HEADER, &version].concat()),
        StreamError::BadRamVersion {
            instance: 0,
            version: 5
        },
    );
}

#[test]
fn sections_of_other_handlers_are_refused_by_name() {
    let started = [HEADER, &ram_start(PAGE, &[("a", PAGE)])].concat();
    for name in [
        "block",
        "dirty-bitmap",
        "0000:00:04.0/vfio",
        "pbs-state",
        "new",
    ] {
        let expected = StreamError::Unsupported(Feature::Section(name.into()));
        assert_eq!(error(&[HEADER, &section(1, 1, name)].concat()), expected);
        assert_eq!(error(&[&*started, &section(1, 1, name)].concat()), expected);
        assert_eq!(error(&[&*started, &section(4, 1, name)].concat()), expected);
        assert!(expected.to_string().contains(name));
    }
}

#[test]
fn the_bitmap_of_virtio_mem_is_measured_and_bounded() {
    let early = |region: u64, block: u64| {
        let mut out = [HEADER, &ram_start(PAGE, &[("a", PAGE)])].concat();
        out.extend_from_slice(&section(4, 9, "0000:00:03.0/virtio-mem-device-early"));
        for word in [0, region, block] {
            out.extend_from_slice(&record(word));
        }
        out.extend_from_slice(&[0; 12]);
        out
    };
    let fits = [early(65 << 21, 1 << 21), vec![0xff; 16], footer(9)].concat();
    assert_eq!(items(&fits), 3);
    let wrong_footer = [early(65 << 21, 1 << 21), vec![0xff; 16], footer(2)].concat();
    assert!(matches!(
        error(&wrong_footer),
        StreamError::WrongSection { found: 2, .. }
    ));
    for (region, block) in [(1 << 21, 0), (u64::MAX, 1), (MAX_ITEM as u64 * 4 + 1, 1)] {
        assert!(matches!(
            error(&early(region, block)),
            StreamError::BadVirtioMem(_)
        ));
    }
}

#[test]
fn an_error_stays_an_error() {
    let mut decoder = Decoder::new();
    assert!(matches!(
        decoder.decode(HEADER),
        Ok(Step::NeedMore { at_least: 16 })
    ));
    let Ok(Step::Item {
        item: Item::Header { .. },
        consumed,
    }) = decoder.decode(&[HEADER, &[0]].concat())
    else {
        panic!("header not decoded");
    };
    assert_eq!((consumed, decoder.position()), (15, 15));
    for _ in 0..2 {
        assert_eq!(decoder.decode(&[0]), Err(StreamError::UnexpectedSection(0)));
    }
    assert_eq!(decoder.position(), 15);
}

fn advise(page_sizes: u64) -> Vec<u8> {
    let mut out = vec![8, 0, 3, 0, 16];
    out.extend_from_slice(&page_sizes.to_be_bytes());
    out.extend_from_slice(&PAGE.to_be_bytes());
    out
}

/// A stream of blocks `a` of 2 pages and `b` of 1 that announces post-copy.
fn advised(rest: &[&[u8]]) -> Vec<u8> {
    let start = ram_start(3 * PAGE, &[("a", 2 * PAGE), ("b", PAGE)]);
    [HEADER, &advise(PAGE), &start, &rest.concat()].concat()
}

fn discard(block: &str, ranges: &[(u64, u64)]) -> Vec<u8> {
    let mut payload = [&[0][..], &counted(block), &[0]].concat();
    for (start, len) in ranges {
        payload.extend_from_slice(&start.to_be_bytes());
        payload.extend_from_slice(&len.to_be_bytes());
    }
    let len = u16::try_from(payload.len()).unwrap();
    [&[8, 0, 6][..], &len.to_be_bytes(), &payload].concat()
}

fn package(len: u32) -> Vec<u8> {
    [&[8, 0, 7, 0, 4][..], &len.to_be_bytes()].concat()
}

#[test]
fn page_sizes_of_blocks_are_read_where_post_copy_announces_them() {
    let large = 2_u64 << 20;
    let entry = |name: &str, len: u64, size: Option<u64>| {
        let size = size.map_or(vec![], |size| size.to_be_bytes().to_vec());
        [counted(name), len.to_be_bytes().to_vec(), size].concat()
    };
    let list = |entries: &[Vec<u8>], total: u64| {
        let total = (total | 4).to_be_bytes();
        let eos = record(0x10);
        let head = section(1, 2, "ram");
        let entries = entries.concat();
        let start = [&*head, &total, &entries, &eos, &footer(2)].concat();
        [HEADER, &advise(large | PAGE), &start].concat()
    };
    let sizes = |stream: &[u8]| {
        let mut sizes = vec![];
        let rest = decode_all(stream, |item, decoder| {
            if matches!(item, Item::RamStart { .. }) {
                let blocks = decoder.blocks().unwrap().iter();
                sizes.extend(blocks.map(|(_, block)| block.host_page.0));
            }
        });
        assert_eq!(rest, Ok(&[][..]));
        sizes
    };
    let (a, b) = (entry("a", large, Some(large)), entry("b", PAGE, None));
    let total = large + PAGE;
    assert_eq!(sizes(&list(&[a.clone(), b.clone()], total)), [large, PAGE]);
    assert_eq!(sizes(&list(&[b.clone(), a], total)), [PAGE, large]);
    for wrong in [1 << 30, large | PAGE, 3 << 20] {
        let wrong = list(&[b.clone(), entry("a", large, Some(wrong))], total);
        assert!(matches!(error(&wrong), StreamError::BadBlockList(_)));
    }
    for sizes in [0, 1, PAGE + 1] {
        let stream = [HEADER, &advise(sizes)].concat();
        assert_eq!(error(&stream), StreamError::BadPageSizes(sizes));
    }
}

#[test]
fn discards_must_lie_in_their_blocks_and_come_before_the_package() {
    let whole = discard("a", &[(0, PAGE), (PAGE, PAGE)]);
    let stream = advised(&[&whole]);
    let mut found = vec![];
    decode_all(&stream, |item, _| {
        if let Item::Discard { discard, .. } = item {
            let runs = discard.runs().map(|run| (run.start.0, run.count));
            found.extend(runs);
        }
    })
    .unwrap();
    assert_eq!(found, [(0, 1), (1, 1)]);
    let wrong = [
        discard("c", &[(0, PAGE)]),
        discard("b", &[(0, 2 * PAGE)]),
        discard("b", &[(PAGE, PAGE)]),
        discard("a", &[(0, 0)]),
        discard("a", &[(1, PAGE)]),
        discard("a", &[(0, PAGE + 1)]),
        discard("a", &[(u64::MAX - PAGE + 1, PAGE)]),
        discard("a", &[]),
        discard("a", &[(0, PAGE); 13]),
        vec![8, 0, 6, 0, 2, 0, 9],
        vec![8, 0, 6, 0xff, 0xff],
    ];
    for command in wrong {
        let error = error(&advised(&[&command]));
        assert!(matches!(error, StreamError::BadDiscard(_)), "{error}");
    }
    let late = advised(&[&package(1), b"x", &whole]);
    assert_eq!(error(&late), StreamError::PostcopyOutOfPlace);
}

#[test]
fn a_package_is_announced_bounded_and_comes_once() {
    let most = qstream::MAX_PACKAGE;
    assert_eq!(items(&advised(&[&package(most), b"begins"])), 5);
    for len in [0, most + 1, u32::MAX] {
        assert_eq!(
            error(&advised(&[&package(len)])),
            StreamError::BadPackage(len)
        );
    }
    let twice = advised(&[&package(1), b"x", &package(1)]);
    assert_eq!(error(&twice), StreamError::PostcopyOutOfPlace);
    let start = ram_start(PAGE, &[("a", PAGE)]);
    let unannounced = [HEADER, &start, &package(1)].concat();
    assert_eq!(error(&unannounced), StreamError::PostcopyOutOfPlace);
}
