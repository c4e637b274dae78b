use page::{ContentId, EntryId, HostNo, HostSet};
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::WireError;

/// Kind and body of the only frame.
fn frame(bytes: &[u8]) -> (u8, Vec<u8>) {
    let mut buffer = FrameBuffer::default();
    buffer.push(bytes);
    let (kind, body) = buffer.next_frame().unwrap().unwrap();
    let frame = (kind, body.to_vec());
    assert_eq!(buffer.next_frame(), Ok(None));
    frame
}

fn request_again(request: &Request<'_>) -> Result<Request<'static>, WireError> {
    let mut out = Vec::new();
    request.encode(&mut out);
    let (kind, body) = frame(&out);
    Request::decode(kind, &body)
}

fn answer_body(answer: &Answer) -> (u8, Vec<u8>) {
    let mut out = Vec::new();
    answer.encode(&mut out);
    frame(&out)
}

fn entry() -> impl Strategy<Value = EntryId> {
    (
        0..EntryId::MAX_SHARDS,
        prop_oneof![0..20_u32, EntryId::MAX_IN_SHARD - 3..EntryId::MAX_IN_SHARD],
    )
        .prop_map(|(shard, number)| EntryId::of_shard(shard % 3 * 7, number).unwrap())
}

fn run() -> impl Strategy<Value = EntryRun> {
    (entry(), 1..3000_u32).prop_map(|(first, count)| EntryRun {
        first,
        count: count.min(EntryId::MAX_IN_SHARD - first.number()),
    })
}

/// Few different ones, so that runs occur.
fn verdict() -> impl Strategy<Value = Verdict> {
    let hosts = prop_oneof![Just(0), Just(6), any::<u64>()].prop_map(HostSet::from_bits);
    let carrier = prop_oneof![0..2_u16, any::<u16>()].prop_map(HostNo);
    prop_oneof![
        (entry(), hosts).prop_map(|(entry, hosts)| Verdict::Carry { entry, hosts }),
        (entry(), carrier, any::<bool>()).prop_map(|(entry, carrier, pushed)| Verdict::At {
            entry,
            carrier,
            pushed
        }),
        Just(Verdict::Full),
    ]
}

proptest! {
    #[test]
    fn requests_come_back(
        host: u16,
        ids in vec(any::<[u8; 16]>().prop_map(ContentId), 0..50),
        pages in 1..u32::MAX,
        runs in vec(run(), 0..20),
        group in "[a-zäöü0-9/-]{0,40}",
        domain: [u8; 16],
    ) {
        let target = HostNo(host);
        let items: Vec<_> = ids.iter().map(|id| Item { id: *id, pages }).collect();
        for request in [
            Request::Join(TableKey { group, domain }),
            Request::Register { target, items: items.into() },
            Request::Withdraw { target },
            Request::Claim { target, ids: (&ids).into() },
            Request::Carried { entries: (&runs).into() },
            Request::Lost { carrier: target, entries: (&runs).into() },
            Request::CarrierGone { host: target },
            Request::Seed { target, ids: (&ids).into() },
            Request::Shared { target, ids: (&ids).into() },
            Request::Summary,
            Request::EndGroup,
        ] {
            prop_assert_eq!(request_again(&request)?, request);
        }
    }

    #[test]
    fn answers_come_back(
        epoch: u64,
        shard in 0..EntryId::MAX_SHARDS,
        entries in vec(proptest::option::of(entry()), 0..60),
        verdicts in vec(verdict(), 0..60),
        by_hosts in vec(any::<u64>(), 0..=64),
        numbers: [u64; 5],
    ) {
        let [pages, unclaimed, in_flight, present, lost] = numbers;
        for answer in [
            Answer::Welcome { epoch, shard },
            Answer::Entries(entries),
            Answer::Verdicts(verdicts),
            Answer::Summary(Summary { by_hosts, pages, unclaimed, in_flight, present, lost }),
        ] {
            let (kind, body) = answer_body(&answer);
            prop_assert_eq!(Answer::decode(kind, &body)?, answer);
        }
    }

    #[test]
    fn no_bytes_make_a_decoder_panic(kind: u8, body: Vec<u8>) {
        let _ = Request::decode(kind % 12, &body);
        let _ = Answer::decode(33 + kind % 5, &body);
    }

    #[test]
    fn joined_runs_are_the_entries_in_their_order(entries in vec(entry(), 0..60)) {
        let runs = join_runs(entries.iter().copied());
        prop_assert!(runs.iter().all(|run| run.is_valid()));
        let again: Vec<_> = runs.into_iter().flat_map(EntryRun::entries).collect();
        prop_assert_eq!(again, entries);
    }
}

#[test]
fn verdicts_of_neighbours_cost_bytes_by_the_run_not_by_the_page() {
    let hosts = HostSet::from_bits(6);
    let carry = |n: u32| Verdict::Carry {
        entry: EntryId(1_000_000 + n),
        hosts,
    };
    let (_, body) = answer_body(&Answer::Verdicts((0..4096).map(carry).collect()));
    assert!(body.len() <= 8, "{} bytes", body.len());
}

#[test]
fn the_largest_messages_fit_a_frame() {
    let items: Vec<_> = (0..MAX_IDS)
        .map(|_| Item {
            id: ContentId([7; 16]),
            pages: u32::MAX,
        })
        .collect();
    let target = HostNo(u16::MAX);
    let register = Request::Register {
        target,
        items: items.into(),
    };
    assert_eq!(request_again(&register), Ok(register));
    let worst = |n: u32| Verdict::Carry {
        entry: EntryId::of_shard(if n.is_multiple_of(2) { 15 } else { 0 }, n).unwrap(),
        hosts: HostSet::from_bits(if n.is_multiple_of(2) { u64::MAX } else { 0 }),
    };
    let (_, body) = answer_body(&Answer::Verdicts((0..4096).map(worst).collect()));
    assert!(body.len() <= MAX_INDEX_BODY);
}

#[test]
fn more_than_the_limits_is_refused() {
    let mut body = vec![0];
    body.extend(vec![1; 16 * (MAX_IDS + 1)]);
    let too_long = |answer| matches!(answer, Err(WireError::TooLong { .. }));
    assert!(too_long(Request::decode(4, &body).map(|_| ())));
    assert!(too_long(
        Request::decode(1, &[b'x'; 17 + MAX_GROUP_NAME]).map(|_| ())
    ));
    let many = EntryRun {
        first: EntryId(0),
        count: MAX_RUN_ENTRIES,
    };
    let runs = |runs: &[EntryRun]| {
        request_again(&Request::Carried {
            entries: runs.to_vec().into(),
        })
        .map(|_| ())
    };
    assert_eq!(runs(&[many]), Ok(()));
    assert!(too_long(runs(&[many, many])));
    // Full, 4097 times, in one number.
    let head = (MAX_IDS as u64 + 1) << 3 | 4;
    let mut body = Vec::new();
    crate::varint::put(&mut body, head);
    assert!(too_long(Answer::decode(35, &body).map(|_| ())));
}

#[test]
fn a_run_cannot_leave_its_shard_or_be_local_or_empty() {
    let decode = |first, count| {
        let entries = vec![EntryRun {
            first: EntryId(first),
            count,
        }];
        request_again(&Request::Carried {
            entries: entries.into(),
        })
    };
    let last = EntryId::MAX_IN_SHARD - 1;
    assert!(decode(last, 1).is_ok());
    for (first, count) in [(last, 2), (EntryId::LOCAL_BIT, 1), (5, 0)] {
        assert_eq!(decode(first, count), Err(WireError::NumberTooLarge));
    }
}

#[test]
fn numbers_that_are_not_given_out_are_no_messages() {
    for kind in [0, 12, 32, 33, 255] {
        assert_eq!(
            Request::decode(kind, &[]),
            Err(WireError::UnexpectedKind(kind))
        );
    }
    for kind in [0, 1, 32, 37, 255] {
        assert_eq!(
            Answer::decode(kind, &[]),
            Err(WireError::UnexpectedKind(kind))
        );
    }
}
