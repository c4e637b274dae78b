//! Clients and servers with nothing but memory between them.

use std::time::Duration;

use index::{
    Answer, Client, ClientError, Groups, GroupsError, Item, LEASE, MAX_TABLES, Server, ServerError,
    Shards, TableKey, Ticket, Verdict, shard_of,
};
use page::{ContentId, EntryId, HostNo, HostSet};
use proptest::prelude::*;
use wire::index::join_runs;

const T0: Duration = Duration::from_secs(1000);
const A: HostNo = HostNo(0);
const B: HostNo = HostNo(1);

fn key(group: &str) -> TableKey {
    TableKey {
        group: group.into(),
        domain: [1; 16],
    }
}

fn id(n: u64) -> ContentId {
    let n = u128::from(n).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835);
    ContentId(n.to_be_bytes())
}

fn ids(numbers: std::ops::Range<u64>) -> Vec<ContentId> {
    numbers.map(id).collect()
}

/// One connection, both ends.
struct Line {
    client: Client,
    server: Server,
    out: Vec<u8>,
    /// Bytes of each read, at both ends.
    piece: usize,
}

impl Line {
    fn open(groups: &mut Groups, group: &str, epoch: u64) -> (Self, Answer) {
        let (client, server) = (Client::new(), Server::new(epoch));
        let mut line = Self {
            client,
            server,
            out: Vec::new(),
            piece: usize::MAX,
        };
        line.client.join(key(group), &mut line.out);
        let (_, welcome) = line.exchange(groups).expect("welcome").remove(0);
        (line, welcome)
    }

    fn exchange(&mut self, groups: &mut Groups) -> Result<Vec<(Ticket, Answer)>, ServerError> {
        let sent = std::mem::take(&mut self.out);
        let (mut back, mut answers) = (Vec::new(), Vec::new());
        for piece in sent.chunks(self.piece) {
            self.server.handle(groups, piece, &mut back)?;
        }
        for piece in back.chunks(self.piece) {
            self.client.handle(piece);
            while let Some(answer) = self.client.poll_answer().expect("valid answers") {
                answers.push(answer);
            }
        }
        Ok(answers)
    }

    fn claim(&mut self, groups: &mut Groups, target: HostNo, n: u64) -> Verdict {
        self.client.claim(target, &[id(n)], &mut self.out);
        match self.exchange(groups).expect("an answer").remove(0).1 {
            Answer::Verdicts(verdicts) => verdicts[0],
            other => panic!("{other:?}"),
        }
    }
}

fn carry(entry: u32, hosts: &[HostNo]) -> Verdict {
    Verdict::Carry {
        entry: EntryId(entry),
        hosts: hosts.iter().copied().collect(),
    }
}

#[test]
fn answers_come_in_the_order_of_the_requests_however_the_bytes_are_cut() {
    for piece in [1, 7, 100, 4096, usize::MAX] {
        let mut groups = Groups::new(0);
        let (mut line, welcome) = Line::open(&mut groups, "g", 42);
        assert_eq!(
            welcome,
            Answer::Welcome {
                epoch: 42,
                shard: 0
            }
        );
        line.piece = piece;
        let Line { client, out, .. } = &mut line;
        let items = ids(0..3).into_iter().map(|id| Item { id, pages: 1 });
        let register = client.register(A, &items.collect::<Vec<_>>(), out);
        client.withdraw(A, out);
        let empty = client.claim(A, &[], out);
        // More than fits a message.
        let claim = client.claim(A, &ids(0..10_000), out);
        let local = EntryId(EntryId::LOCAL_BIT);
        client.carried(&join_runs((0..9_000).map(EntryId).chain([local])), out);
        let seed = client.seed(B, &ids(9_999..10_001), out);
        let summary = client.summary(out);
        let answers = line.exchange(&mut groups).unwrap();
        let tickets: Vec<_> = answers.iter().map(|(ticket, _)| *ticket).collect();
        assert_eq!(tickets, [register, empty, claim, seed, summary]);
        let expected: Vec<_> = (0..10_000).map(|n| carry(n, &[])).collect();
        assert_eq!(answers[2].1, Answer::Verdicts(expected));
        let entries = vec![Some(EntryId(9_999)), Some(EntryId(10_000))];
        assert_eq!(answers[3].1, Answer::Entries(entries));
        let Answer::Summary(summary) = &answers[4].1 else {
            panic!("{answers:?}");
        };
        assert_eq!((summary.in_flight, summary.present), (1_000, 9_001));
        assert_eq!(line.client.waiting(), 0);
    }
}

#[test]
fn clients_of_one_group_share_a_table_and_others_do_not() {
    let mut groups = Groups::new(0);
    let (mut one, _) = Line::open(&mut groups, "g", 1);
    let (mut two, welcome) = Line::open(&mut groups, "g", 2);
    let (mut other, _) = Line::open(&mut groups, "h", 3);
    assert_eq!(welcome, Answer::Welcome { epoch: 1, shard: 0 });
    assert_eq!(one.claim(&mut groups, A, 5), carry(0, &[]));
    assert!(matches!(two.claim(&mut groups, B, 5), Verdict::At { .. }));
    assert_eq!(other.claim(&mut groups, A, 5), carry(0, &[]));
}

#[test]
fn claims_of_a_connection_that_ends_can_be_claimed_by_others() {
    let mut groups = Groups::new(0);
    let (mut one, _) = Line::open(&mut groups, "g", 1);
    let (mut two, _) = Line::open(&mut groups, "g", 2);
    one.claim(&mut groups, A, 5);
    one.server.closed(&mut groups, T0);
    assert_eq!(two.claim(&mut groups, B, 5), carry(0, &[]));
    // The number of the client that left is given out again; its claims are not.
    let (mut three, _) = Line::open(&mut groups, "g", 3);
    three
        .client
        .carried(&join_runs([EntryId(0)]), &mut three.out);
    three.client.summary(&mut three.out);
    let answers = three.exchange(&mut groups).unwrap();
    assert!(matches!(&answers[0].1, Answer::Summary(s) if s.in_flight == 1));
}

#[test]
fn a_table_goes_with_its_lease_or_when_its_group_is_ended_and_not_before() {
    let mut groups = Groups::new(0);
    let (one, _) = Line::open(&mut groups, "g", 1);
    let (mut two, _) = Line::open(&mut groups, "g", 2);
    one.server.closed(&mut groups, T0);
    groups.tick(T0 + LEASE * 2);
    assert_eq!(two.claim(&mut groups, A, 1), carry(0, &[]));
    two.server.closed(&mut groups, T0);
    groups.tick(T0 + LEASE - Duration::from_millis(1));
    // Who comes back in time finds the same table.
    let (mut three, welcome) = Line::open(&mut groups, "g", 3);
    assert_eq!(welcome, Answer::Welcome { epoch: 1, shard: 0 });
    groups.tick(T0 + LEASE * 3);
    let (four, _) = Line::open(&mut groups, "g", 4);
    three.client.end_group(&mut three.out);
    three.client.summary(&mut three.out);
    assert!(matches!(
        three.exchange(&mut groups),
        Err(ServerError::Ended)
    ));
    assert!(groups.is_empty());
    // A table made anew is another one; the late client of the old one does it no harm.
    let (mut five, welcome) = Line::open(&mut groups, "g", 5);
    assert_eq!(welcome, Answer::Welcome { epoch: 5, shard: 0 });
    five.claim(&mut groups, A, 1);
    four.server.closed(&mut groups, T0);
    assert!(matches!(five.claim(&mut groups, A, 1), Verdict::At { .. }));
    five.server.closed(&mut groups, T0);
    groups.tick(T0 + LEASE);
    assert!(groups.is_empty());
}

#[test]
fn the_number_of_tables_is_bounded() {
    let mut groups = Groups::new(0);
    for n in 0..MAX_TABLES {
        groups.join(&key(&n.to_string()), 1).unwrap();
    }
    let refused = groups.join(&key("one more"), 1);
    assert_eq!(refused, Err(GroupsError::TooManyTables));
    assert!(groups.join(&key("0"), 1).is_ok());
}

#[test]
fn the_limit_on_entries_is_for_all_tables_together() {
    let mut groups = Groups::with_limit(0, 3);
    let (mut one, _) = Line::open(&mut groups, "g", 1);
    let (mut two, _) = Line::open(&mut groups, "h", 2);
    assert_eq!(one.claim(&mut groups, A, 1), carry(0, &[]));
    assert_eq!(one.claim(&mut groups, A, 2), carry(1, &[]));
    assert_eq!(two.claim(&mut groups, A, 1), carry(0, &[]));
    assert_eq!(two.claim(&mut groups, A, 2), Verdict::Full);
    assert_eq!(one.claim(&mut groups, A, 3), Verdict::Full);
    one.client.end_group(&mut one.out);
    one.exchange(&mut groups).unwrap();
    assert_eq!(two.claim(&mut groups, A, 2), carry(1, &[]));
}

#[test]
fn a_client_that_does_not_join_or_joins_twice_is_cut_off() {
    let mut groups = Groups::new(0);
    let (mut client, mut out) = (Client::new(), Vec::new());
    client.summary(&mut out);
    let answer = Server::new(1).handle(&mut groups, &out, &mut Vec::new());
    assert!(matches!(answer, Err(ServerError::OutOfOrder)));
    let (mut line, _) = Line::open(&mut groups, "g", 1);
    line.client.join(key("h"), &mut line.out);
    let answer = line.exchange(&mut groups);
    assert!(matches!(answer, Err(ServerError::OutOfOrder)));
}

#[test]
fn an_answer_that_was_not_asked_for_is_an_error() {
    let answer = |verdicts: usize| {
        let mut bytes = Vec::new();
        Answer::Verdicts(vec![Verdict::Full; verdicts]).encode(&mut bytes);
        bytes
    };
    for (contents, answered) in [(None, 1), (Some(3), 4), (Some(3), 0)] {
        let (mut client, mut out) = (Client::new(), Vec::new());
        match contents {
            Some(n) => client.claim(A, &ids(0..n), &mut out),
            None => client.summary(&mut out),
        };
        client.handle(&answer(answered));
        assert!(matches!(client.poll_answer(), Err(ClientError::Unasked)));
    }
    let mut client = Client::new();
    client.handle(&answer(1));
    assert!(matches!(client.poll_answer(), Err(ClientError::Unasked)));
}

/// Servers of all shards, and the client of them all.
struct Rack {
    shards: Shards,
    servers: Vec<(Groups, Server)>,
}

impl Rack {
    fn open(count: u8) -> Self {
        let server = |n: u8| (Groups::new(n), Server::new(100 + u64::from(n)));
        let mut rack = Self {
            shards: Shards::new(count),
            servers: (0..count).map(server).collect(),
        };
        rack.shards.join(&key("g"));
        rack.exchange();
        assert!(matches!(
            rack.shards.poll_answer(),
            Some((_, Answer::Welcome { .. }))
        ));
        rack
    }

    /// The last shard answers first.
    fn exchange(&mut self) {
        let count = self.shards.count();
        for (n, (groups, server)) in (0..count).zip(&mut self.servers).rev() {
            let Some(out) = self.shards.output(n) else {
                continue;
            };
            let (sent, mut back) = (std::mem::take(out), Vec::new());
            server
                .handle(groups, &sent, &mut back)
                .expect("valid requests");
            self.shards.handle(n, &back).expect("valid answers");
        }
    }

    fn answer(&mut self) -> Answer {
        self.exchange();
        self.shards.poll_answer().expect("an answer").1
    }

    fn verdicts(&mut self, target: HostNo, ids: &[ContentId]) -> Vec<Verdict> {
        self.shards.claim(target, ids);
        match self.answer() {
            Answer::Verdicts(verdicts) => verdicts,
            other => panic!("{other:?}"),
        }
    }
}

/// A verdict, but for the number of the entry.
fn essence(verdict: &Verdict) -> (Option<HostNo>, HostSet, bool) {
    match *verdict {
        Verdict::Carry { hosts, .. } => (None, hosts, false),
        Verdict::At {
            carrier, pushed, ..
        } => (Some(carrier), HostSet::EMPTY, pushed),
        Verdict::Full => panic!("the table is not full"),
    }
}

proptest! {
    #[test]
    fn many_shards_answer_as_one_does(count in 2..=16_u8, batches in proptest::collection::vec((0..3_u16, 0..3_u8, proptest::collection::vec(0..40_u64, 0..20)), 1..20)) {
        let (mut one, mut many) = (Rack::open(1), Rack::open(count));
        for (host, what, numbers) in batches {
            let host = HostNo(host);
            let ids: Vec<_> = numbers.into_iter().map(id).collect();
            let items: Vec<_> = ids.iter().map(|id| Item { id: *id, pages: 1 }).collect();
            if what == 0 {
                one.shards.register(host, &items);
                many.shards.register(host, &items);
                let (Answer::Entries(of_one), Answer::Entries(entries)) = (one.answer(), many.answer()) else {
                    panic!("not entries");
                };
                prop_assert_eq!(of_one.len(), entries.len());
                for (entry, id) in entries.iter().zip(&ids) {
                    prop_assert_eq!(entry.expect("room").shard(), shard_of(*id, count));
                }
                continue;
            }
            let (of_one, of_many) = (one.verdicts(host, &ids), many.verdicts(host, &ids));
            prop_assert_eq!(
                of_one.iter().map(essence).collect::<Vec<_>>(),
                of_many.iter().map(essence).collect::<Vec<_>>()
            );
            if what == 1 {
                for (rack, verdicts) in [(&mut one, of_one), (&mut many, of_many)] {
                    let carried = verdicts.into_iter().filter_map(|verdict| match verdict {
                        Verdict::Carry { entry, .. } => Some(entry),
                        _ => None,
                    });
                    rack.shards.carried(&join_runs(carried));
                }
            }
        }
        one.shards.summary();
        many.shards.summary();
        prop_assert_eq!(one.answer(), many.answer());
        prop_assert_eq!((one.shards.waiting(), many.shards.waiting()), (0, 0));
    }
}

#[test]
fn contents_of_a_shard_that_is_gone_go_without_an_entry() {
    let mut rack = Rack::open(2);
    let ids = ids(0..100);
    rack.shards.claim(A, &ids);
    let sent = std::mem::take(rack.shards.output(0).unwrap());
    let mut back = Vec::new();
    let (groups, server) = &mut rack.servers[0];
    server.handle(groups, &sent, &mut back).unwrap();
    rack.shards.handle(0, &back).unwrap();
    assert_eq!(rack.shards.poll_answer(), None);
    rack.shards.shard_gone(1);
    for _ in 0..2 {
        let Some((_, Answer::Verdicts(verdicts))) = rack.shards.poll_answer() else {
            panic!("the shard that is there has answered");
        };
        for (verdict, id) in verdicts.iter().zip(&ids) {
            assert_eq!(*verdict == Verdict::Full, shard_of(*id, 2) == 1);
        }
        assert_eq!(verdicts.len(), 100);
        rack.shards.claim(A, &ids);
        rack.exchange();
    }
    rack.shards.shard_gone(0);
    rack.shards.poll_answer();
    rack.shards.claim(A, &ids);
    let nothing = Answer::Verdicts(vec![Verdict::Full; 100]);
    assert_eq!(rack.shards.poll_answer().unwrap().1, nothing);
}

#[test]
fn a_server_of_another_shard_is_refused() {
    let mut shards = Shards::new(2);
    shards.join(&key("g"));
    let sent = std::mem::take(shards.output(1).unwrap());
    let mut back = Vec::new();
    let mut groups = Groups::new(0);
    Server::new(1)
        .handle(&mut groups, &sent, &mut back)
        .unwrap();
    let taken = shards.handle(1, &back);
    assert!(matches!(taken, Err(ClientError::WrongShard)));
}

#[test]
fn the_epoch_of_all_shards_changes_with_that_of_any() {
    let epoch = |epochs: [u64; 3]| {
        let mut shards = Shards::new(3);
        shards.join(&key("g"));
        for (n, epoch) in (0..).zip(epochs) {
            let sent = std::mem::take(shards.output(n).unwrap());
            let mut back = Vec::new();
            let mut groups = Groups::new(n);
            Server::new(epoch)
                .handle(&mut groups, &sent, &mut back)
                .unwrap();
            shards.handle(n, &back).unwrap();
        }
        shards.poll_answer().unwrap().1
    };
    let all = epoch([5, 6, 7]);
    assert_eq!(all, epoch([5, 6, 7]));
    for other in [[9, 6, 7], [5, 9, 7], [5, 6, 9], [6, 5, 7]] {
        assert_ne!(all, epoch(other));
    }
}
