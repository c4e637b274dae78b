use super::*;
use crate::WireError;
use page::{FileRange, PageNo};
use proptest::prelude::*;

fn read(body: &[u8]) -> Vec<Op<'_>> {
    OpReader::new(split_pages_body(body).unwrap().ops)
        .collect::<Result<_, _>>()
        .unwrap()
}

#[test]
fn neighbours_of_one_kind_become_one_run() {
    let mut w = OpWriter::new();
    let b = BlockIndex(0);
    for i in 0..5 {
        w.literal(b, PageNo(10 + i), EntryId(7 + i));
    }
    w.reference(b, PageNo(15), EntryId(1));
    w.reference(b, PageNo(16), EntryId(2));
    w.reference(b, PageNo(17), EntryId(9));
    w.zero(b, PageNo(3));
    let body = w.finish(99);
    assert_eq!(
        read(&body),
        [
            Op::Block(b),
            Op::Literal(
                PageRun {
                    start: PageNo(10),
                    count: 5
                },
                EntryId(7)
            ),
            Op::Reference(
                PageRun {
                    start: PageNo(15),
                    count: 2
                },
                EntryId(1)
            ),
            Op::Reference(
                PageRun {
                    start: PageNo(17),
                    count: 1
                },
                EntryId(9)
            ),
            Op::Zero(PageRun {
                start: PageNo(3),
                count: 1
            }),
        ]
    );
    assert_eq!(split_pages_body(&body).unwrap().position, 99);
}

#[test]
fn a_run_beyond_the_page_space_is_an_error() {
    let mut w = OpWriter::new();
    w.zero(BlockIndex(0), PageNo(u32::MAX));
    let body = w.finish(0);
    let ops = split_pages_body(&body).unwrap().ops;
    assert_eq!(
        OpReader::new(ops).last(),
        Some(Err(WireError::NumberTooLarge))
    );
}

#[derive(Clone, Debug)]
enum Step {
    Zero,
    Fill(u8),
    Plain,
    Literal(u32),
    Reference(u32),
    LiteralFor(u32, u64),
    Remote(u32, u16, bool),
    Shared(FrameSharing),
    Raw(Vec<u8>),
    End,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        Just(Step::Zero),
        (0_u8..3).prop_map(Step::Fill),
        Just(Step::Plain),
        (0_u32..50).prop_map(Step::Literal),
        (0_u32..50).prop_map(Step::Reference),
        (0_u32..50, 0_u64..3).prop_map(|(e, hosts)| Step::LiteralFor(e, hosts)),
        (0_u32..50, 0_u16..2, any::<bool>()).prop_map(|(e, c, p)| Step::Remote(e, c, p)),
        sharing().prop_map(Step::Shared),
        proptest::collection::vec(any::<u8>(), 0..20).prop_map(Step::Raw),
        Just(Step::End),
    ]
}

fn sharing() -> impl Strategy<Value = FrameSharing> {
    prop_oneof![
        Just(FrameSharing::No),
        Just(FrameSharing::Merged),
        (0_u16..2, any::<i64>())
            .prop_map(|(file, ahead)| FrameSharing::File(FileRange { file, ahead })),
    ]
}

/// A page operation with all that belongs to it.
#[derive(Clone, Debug, PartialEq)]
struct Flat {
    block: u16,
    page: u32,
    kind: u8,
    value: u32,
    /// Whom it is passed on to, or who has it and whether it is pushed.
    hosts: u64,
    id: [u8; 16],
    sharing: FrameSharing,
}

/// Pages one by one, whatever the runs.
fn flat(ops: &[Op<'_>]) -> Vec<Flat> {
    let (mut block, mut forward, mut out) = (0, 0, Vec::new());
    let mut sharing = FrameSharing::No;
    for op in ops {
        let (run, kind, value, hosts) = match *op {
            Op::Block(b) => {
                block = b.0;
                continue;
            }
            Op::Forward(hosts) => {
                forward = hosts.bits();
                continue;
            }
            Op::Shared(shared) => {
                sharing = shared;
                continue;
            }
            Op::Zero(run) => (run, 0, 0, 0),
            Op::Fill(run, byte) => (run, 1, u32::from(byte), 0),
            Op::Plain(run) => (run, 2, 0, 0),
            Op::Literal(run, entry) => (run, 3, entry.0, forward),
            Op::Reference(run, entry) => (run, 4, entry.0, 0),
            Op::Remote(r) => (r.run, 5, r.first.0, hosts_of(r.carrier.0, r.pushed)),
            _ => continue,
        };
        for (page, index) in run.pages().zip(0..) {
            let id = match op {
                Op::Remote(remote) => remote.ids[index as usize],
                _ => [0; 16],
            };
            let value = value + if kind >= 3 { index } else { 0 };
            let page = page.0;
            out.push(Flat {
                block,
                page,
                kind,
                value,
                hosts,
                id,
                sharing,
            });
        }
    }
    out
}

fn hosts_of(carrier: u16, pushed: bool) -> u64 {
    u64::from(carrier) * 2 + u64::from(pushed)
}

/// Some entries are of the session, some of the rack.
fn entry(number: u32) -> EntryId {
    EntryId(if number.is_multiple_of(2) {
        number
    } else {
        number | EntryId::LOCAL_BIT
    })
}

proptest! {
    #[test]
    fn what_was_written_is_read(steps in proptest::collection::vec((step(), 0_u16..3, 0_u32..6), 0..60)) {
        let mut w = OpWriter::new();
        let mut expected = Vec::new();
        let mut sharing = FrameSharing::No;
        for (step, block, page) in &steps {
            let (b, p) = (BlockIndex(*block), PageNo(*page));
            if let Step::Shared(shared) = step {
                sharing = *shared;
            }
            let mut is = |kind, value, hosts, id| {
                expected.push(Flat { block: *block, page: *page, kind, value, hosts, id, sharing });
            };
            let none = [0; 16];
            match step {
                Step::Zero => { w.zero(b, p); is(0, 0, 0, none); }
                Step::Fill(v) => { w.fill(b, p, *v); is(1, u32::from(*v), 0, none); }
                Step::Plain => { w.plain(b, p); is(2, 0, 0, none); }
                Step::Literal(e) => { w.literal(b, p, entry(*e)); is(3, entry(*e).0, 0, none); }
                Step::Reference(e) => { w.reference(b, p, entry(*e)); is(4, entry(*e).0, 0, none); }
                Step::LiteralFor(e, hosts) => {
                    w.literal_for(b, p, entry(*e), HostSet::from_bits(*hosts));
                    is(3, entry(*e).0, *hosts, none);
                }
                Step::Remote(e, carrier, pushed) => {
                    let id = [e.to_le_bytes()[0]; 16];
                    let (carrier, pushed) = (HostNo(*carrier), *pushed);
                    w.remote(b, p, &RemoteContent { entry: entry(*e), id: ContentId(id), carrier, pushed });
                    is(5, entry(*e).0, hosts_of(carrier.0, pushed), id);
                }
                Step::Shared(shared) => w.shared(*shared),
                Step::Raw(bytes) => w.raw(bytes),
                Step::End => w.end_begin(),
            }
        }
        let body = w.finish(1);
        prop_assert_eq!(flat(&read(&body)), expected);
    }

    #[test]
    fn no_bytes_make_the_reader_panic_or_run_forever(body: Vec<u8>) {
        if let Ok(parts) = split_pages_body(&body) {
            prop_assert!(OpReader::new(parts.ops).count() <= parts.ops.len());
        }
    }
}
