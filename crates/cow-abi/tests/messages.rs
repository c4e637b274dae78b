//! Every message survives its packet; nothing else is let in.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use cow_abi::{
    AbiError, BlockAnswer, BlockOffer, Features, FromAgent, FromLibrary, HEADER_BYTES, Hello,
    MapBatch, MapRun, MapRunBytes, Outcome, OutcomeBytes, Outcomes, PACKET_BYTES_MAX, RUNS_MAX,
    Refusal, Statistics, VERSION,
};
use proptest::prelude::*;

const RUN: MapRun = MapRun {
    block: 3,
    page: 70_000,
    pages: 9,
    pool_page: 1 << 33,
};

fn agent_packet(message: FromAgent<'_>) -> Vec<u8> {
    let mut packet = vec![0; PACKET_BYTES_MAX];
    let len = message.encode(7, &mut packet).unwrap();
    packet.truncate(len);
    packet
}

fn library_packet(message: FromLibrary<'_>) -> Vec<u8> {
    let mut packet = vec![0; PACKET_BYTES_MAX];
    let len = message.encode(7, &mut packet).unwrap();
    packet.truncate(len);
    packet
}

fn agent_messages(runs: &[MapRunBytes]) -> Vec<FromAgent<'_>> {
    vec![
        FromAgent::Welcome { version: VERSION },
        FromAgent::Block(BlockOffer {
            index: 63,
            name: b"0000:00:02.0/vga.vram",
            addr: 0x7f00_0000_0000,
            len: 16 << 20,
        }),
        FromAgent::Pool { inode: u64::MAX },
        FromAgent::Map(MapBatch::new(true, runs).unwrap()),
        FromAgent::Expect(MapBatch::new(false, runs).unwrap()),
        FromAgent::Settle,
        FromAgent::Statistics,
        FromAgent::Close,
    ]
}

fn library_messages(outcomes: &[OutcomeBytes]) -> Vec<FromLibrary<'_>> {
    let statistics = Statistics {
        runs_mapped: 1,
        pages_mapped: 2,
        pages_copied: 3,
        runs_refused: 4,
        pages_discarded: 5,
        discards_failed: 6,
        fault_copies: 7,
        fault_maps: 8,
        fault_maps_failed: 9,
    };
    let refused = |refusal| FromLibrary::Refused(refusal);
    vec![
        FromLibrary::Hello(Hello {
            version: VERSION,
            pid: 4711,
            page_bytes: 4096,
            features: Features::NO_HUGE_PAGES.with(Features::BLOCK_LOOKUP),
        }),
        FromLibrary::BlockAnswer(BlockAnswer {
            index: 1,
            errno: 14,
            addr: 0x7f00_0000_0000,
        }),
        FromLibrary::PoolAnswer { errno: 22 },
        FromLibrary::MapAnswer(Outcomes::new(outcomes).unwrap()),
        FromLibrary::Settled { errno: 0 },
        FromLibrary::StatisticsAnswer(statistics),
        FromLibrary::Closed(statistics),
        refused(Refusal::Packet(AbiError::TooMany)),
        refused(Refusal::Version),
        refused(Refusal::State),
    ]
}

#[test]
fn every_message_is_read_as_it_was_written() {
    for message in agent_messages(&[RUN.into(); RUNS_MAX]) {
        let packet = agent_packet(message);
        assert_eq!(FromAgent::decode(&packet), Ok((7, message)));
        assert_eq!(FromLibrary::decode(&packet), Err(AbiError::Kind));
    }
    let outcomes = [
        Outcome::Mapped,
        Outcome::Copied,
        Outcome::Refused(12),
        Outcome::Expected,
    ]
    .map(Into::into);
    for message in library_messages(&outcomes) {
        let packet = library_packet(message);
        assert_eq!(FromLibrary::decode(&packet), Ok((7, message)));
        assert_eq!(FromAgent::decode(&packet), Err(AbiError::Kind));
    }
}

#[test]
fn a_packet_cut_or_lengthened_anywhere_is_refused() {
    let mut packets: Vec<_> = agent_messages(&[RUN.into()])
        .into_iter()
        .map(agent_packet)
        .collect();
    packets.extend(
        library_messages(&[Outcome::Mapped.into()])
            .into_iter()
            .map(library_packet),
    );
    for packet in packets {
        let refused =
            |bytes: &[u8]| FromAgent::decode(bytes).is_err() && FromLibrary::decode(bytes).is_err();
        assert!((0..packet.len()).all(|cut| refused(&packet[..cut])));
        let mut longer = packet.clone();
        longer.push(0);
        assert!(refused(&longer));
        // Also with a header that knows of it.
        let len = u32::try_from(longer.len()).unwrap();
        longer[4..8].copy_from_slice(&len.to_le_bytes());
        // A block's name or a list may end anywhere else; their counts say where.
        assert!(refused(&longer), "{longer:?}");
    }
}

#[test]
fn runs_that_leave_a_block_or_the_pool_or_are_empty_are_refused() {
    let wrong = [
        MapRun { block: 64, ..RUN },
        MapRun { pages: 0, ..RUN },
        MapRun {
            page: u32::MAX,
            pages: 2,
            ..RUN
        },
        MapRun {
            pool_page: (1 << 50) - 8,
            ..RUN
        },
        MapRun {
            pool_page: u64::MAX,
            ..RUN
        },
    ];
    for run in wrong {
        let runs = [RUN.into(), run.into()];
        let packet = agent_packet(FromAgent::Map(MapBatch::new(false, &runs).unwrap()));
        assert_eq!(FromAgent::decode(&packet), Err(AbiError::Value), "{run:?}");
    }
    let last = MapRun {
        page: u32::MAX,
        pages: 1,
        pool_page: (1 << 50) - 1,
        ..RUN
    };
    let runs = [last.into()];
    let packet = agent_packet(FromAgent::Map(MapBatch::new(false, &runs).unwrap()));
    assert!(FromAgent::decode(&packet).is_ok());
}

#[test]
fn more_runs_than_a_batch_takes_are_neither_made_nor_read() {
    let runs = vec![MapRunBytes::from(RUN); RUNS_MAX + 1];
    assert_eq!(MapBatch::new(false, &runs), None);
    let mut packet = agent_packet(FromAgent::Map(MapBatch::new(false, &runs[1..]).unwrap()));
    packet[HEADER_BYTES..HEADER_BYTES + 4].copy_from_slice(&1025_u32.to_le_bytes());
    assert_eq!(FromAgent::decode(&packet), Err(AbiError::TooMany));
    packet[HEADER_BYTES..HEADER_BYTES + 4].copy_from_slice(&1023_u32.to_le_bytes());
    assert_eq!(FromAgent::decode(&packet), Err(AbiError::Length));
}

#[test]
fn blocks_with_a_wrong_place_or_name_are_refused() {
    let good = BlockOffer {
        index: 0,
        name: b"pc.ram",
        addr: 0,
        len: 4096,
    };
    let name = [b'n'; 256];
    let wrong = [
        BlockOffer { index: 64, ..good },
        BlockOffer { addr: 1, ..good },
        BlockOffer { len: 0, ..good },
        BlockOffer { len: 4097, ..good },
        BlockOffer {
            len: (1 << 44) + 4096,
            ..good
        },
        BlockOffer {
            addr: 0xffff_ffff_ffff_f000,
            ..good
        },
        BlockOffer { name: b"", ..good },
        BlockOffer {
            name: b"a\0b",
            ..good
        },
        BlockOffer {
            name: &name,
            ..good
        },
    ];
    assert!(FromAgent::decode(&agent_packet(FromAgent::Block(good))).is_ok());
    for offer in wrong {
        let packet = agent_packet(FromAgent::Block(offer));
        assert_eq!(
            FromAgent::decode(&packet),
            Err(AbiError::Value),
            "{offer:?}"
        );
    }
}

#[test]
fn a_stray_client_is_told_apart() {
    let mut hello = agent_packet(FromAgent::Welcome { version: 1 });
    hello[HEADER_BYTES] ^= 1;
    assert_eq!(FromAgent::decode(&hello), Err(AbiError::Magic));
}

#[test]
fn too_short_a_buffer_is_not_written_beyond() {
    let whole = agent_packet(FromAgent::Pool { inode: 5 });
    for len in 0..whole.len() {
        assert_eq!(
            FromAgent::Pool { inode: 5 }.encode(7, &mut vec![0; len]),
            None
        );
    }
}

proptest! {
    /// What was let in is written again as the same bytes.
    #[test]
    fn any_bytes_are_refused_or_mean_exactly_themselves(
        kind in 0_u16..18,
        body in proptest::collection::vec(prop_oneof![Just(0_u8), Just(1), any::<u8>()], 0..120),
    ) {
        let len = u32::try_from(HEADER_BYTES + body.len()).unwrap();
        let mut packet = kind.to_le_bytes().to_vec();
        packet.extend([0, 0]);
        packet.extend(len.to_le_bytes());
        packet.extend(9_u64.to_le_bytes());
        packet.extend(body);
        if let Ok((sequence, message)) = FromLibrary::decode(&packet) {
            let mut again = vec![0; packet.len()];
            prop_assert_eq!(message.encode(sequence, &mut again), Some(packet.len()));
            prop_assert_eq!(FromLibrary::decode(&again), Ok((sequence, message)));
        }
        if let Ok((sequence, message)) = FromAgent::decode(&packet) {
            let mut again = vec![0; packet.len()];
            prop_assert_eq!(message.encode(sequence, &mut again), Some(packet.len()));
            prop_assert_eq!(FromAgent::decode(&again), Ok((sequence, message)));
        }
    }
}
