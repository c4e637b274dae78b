use super::*;
use page::HostSet;

const A: HostNo = HostNo(0);
const B: HostNo = HostNo(1);
const C: HostNo = HostNo(2);
const AGENT: ClientNo = ClientNo(7);

fn id(n: u64) -> ContentId {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    id[8..].copy_from_slice(&n.to_le_bytes());
    ContentId(id)
}

fn register(table: &mut Table, target: HostNo, ids: &[u64]) -> Vec<Option<EntryId>> {
    let items = ids.iter().map(|n| Item {
        id: id(*n),
        pages: 2,
    });
    let mut out = Vec::new();
    table.register(target, &items.collect::<Vec<_>>(), &mut out);
    out
}

fn claim(table: &mut Table, target: HostNo, n: u64) -> Verdict {
    let mut out = Vec::new();
    table.claim(target, AGENT, &[id(n)], &mut out);
    out[0]
}

fn hosts(hosts: &[HostNo]) -> HostSet {
    hosts.iter().copied().collect()
}

fn one(entry: u32) -> EntryRun {
    EntryRun {
        first: EntryId(entry),
        count: 1,
    }
}

fn carry(entry: u32, to: &[HostNo]) -> Verdict {
    Verdict::Carry {
        entry: EntryId(entry),
        hosts: hosts(to),
    }
}

fn at(entry: u32, carrier: HostNo, pushed: bool) -> Verdict {
    Verdict::At {
        entry: EntryId(entry),
        carrier,
        pushed,
    }
}

#[test]
fn a_content_is_carried_once_and_forwarded_to_the_others_that_need_it() {
    let mut table = Table::new(1, 0);
    register(&mut table, A, &[10, 11]);
    register(&mut table, B, &[11, 12]);
    assert_eq!(claim(&mut table, B, 11), carry(1, &[A]));
    assert_eq!(claim(&mut table, B, 11), at(1, B, false));
    assert_eq!(claim(&mut table, A, 11), at(1, B, true));
    assert_eq!(claim(&mut table, C, 11), at(1, B, false));
    assert_eq!(claim(&mut table, C, 99), carry(3, &[]));
}

#[test]
fn entries_ascend_in_the_order_of_their_first_registration() {
    let mut table = Table::new(1, 3);
    let base = 3 << 27;
    let ids = |n: &[u32]| {
        n.iter()
            .map(|n| Some(EntryId(base + n)))
            .collect::<Vec<_>>()
    };
    assert_eq!(register(&mut table, A, &[5, 6, 5, 7]), ids(&[0, 1, 0, 2]));
    assert_eq!(register(&mut table, B, &[7, 8]), ids(&[2, 3]));
}

#[test]
fn only_who_claimed_can_say_that_it_was_carried() {
    let mut table = Table::new(1, 0);
    claim(&mut table, A, 1);
    table.carried(ClientNo(8), one(0));
    assert_eq!(table.summary().in_flight, 1);
    table.carried(AGENT, one(0));
    assert_eq!(table.summary().present, 1);
    table.client_gone(AGENT);
    assert_eq!(table.summary().present, 1);
}

#[test]
fn only_the_current_carrier_can_lose_an_entry() {
    let mut table = Table::new(1, 0);
    register(&mut table, B, &[1]);
    claim(&mut table, A, 1);
    table.lost(B, one(0));
    assert_eq!(claim(&mut table, C, 1), at(0, A, false));
    table.lost(A, one(0));
    assert_eq!(claim(&mut table, C, 1), carry(0, &[B]));
    assert_eq!(claim(&mut table, B, 1), at(0, C, true));
}

#[test]
fn claims_of_a_client_that_is_gone_can_be_claimed_again() {
    let mut table = Table::new(1, 0);
    (0..3).for_each(|n| {
        assert_eq!(
            claim(&mut table, A, n),
            carry(u32::try_from(n).unwrap(), &[])
        )
    });
    table.carried(AGENT, one(1));
    table.client_gone(AGENT);
    assert_eq!(claim(&mut table, B, 0), carry(0, &[]));
    assert_eq!(claim(&mut table, B, 1), at(1, A, false));
    assert_eq!(claim(&mut table, B, 2), carry(2, &[]));
}

#[test]
fn nothing_is_at_a_carrier_that_is_gone() {
    let mut table = Table::new(1, 0);
    for (n, target) in [(0, A), (1, A), (2, B)] {
        claim(&mut table, target, n);
    }
    table.carried(AGENT, one(0));
    table.carrier_gone(A);
    assert_eq!(claim(&mut table, C, 0), carry(0, &[]));
    assert_eq!(claim(&mut table, C, 1), carry(1, &[]));
    assert_eq!(claim(&mut table, C, 2), at(2, B, false));
}

#[test]
fn a_seed_is_present_where_it_is_and_nobody_is_told_to_forward_it() {
    let mut table = Table::new(1, 0);
    register(&mut table, A, &[1, 2]);
    claim(&mut table, C, 2);
    let mut entries = Vec::new();
    table.seed(B, &[id(1), id(2), id(3)], &mut entries);
    assert_eq!(entries, [0, 1, 2].map(|n| Some(EntryId(n))));
    assert_eq!(claim(&mut table, A, 1), at(0, B, false));
    assert_eq!(claim(&mut table, A, 2), at(1, C, true));
    assert_eq!(claim(&mut table, A, 3), at(2, B, false));
    assert_eq!(table.summary().contents(), 2);
}

#[test]
fn what_is_at_a_target_host_counts_as_needed_elsewhere() {
    let mut table = Table::new(1, 0);
    register(&mut table, A, &[1, 2]);
    table.seed(A, &[id(1)], &mut Vec::new());
    let mut entries = Vec::new();
    table.shared(A, &[id(1), id(2)], &mut entries);
    assert_eq!(entries, [Some(EntryId(0)), None]);
}

#[test]
fn preparing_again_replaces_what_was_registered_for_that_host_only() {
    let mut table = Table::new(1, 0);
    register(&mut table, A, &[1, 2, 3]);
    register(&mut table, B, &[2, 3]);
    assert_eq!(table.summary().by_hosts, [1, 2]);
    table.withdraw(A);
    assert_eq!(
        (table.summary().by_hosts, table.summary().pages),
        (vec![2], 4)
    );
    register(&mut table, A, &[3, 4]);
    let summary = table.summary();
    assert_eq!((&summary.by_hosts, summary.pages), (&vec![2, 1], 8));
    assert_eq!(
        (summary.contents(), summary.shared(), summary.entries()),
        (3, 1, 4)
    );
    assert_eq!(claim(&mut table, C, 1), carry(0, &[]));
    assert_eq!(claim(&mut table, C, 2), carry(1, &[B]));
    assert_eq!(claim(&mut table, C, 3), carry(2, &[A, B]));
}

#[test]
fn beyond_its_limit_a_table_still_answers_for_what_it_knows() {
    let mut table = Table::with_limit(1, 0, 2);
    assert_eq!(register(&mut table, A, &[1, 2, 3])[2], None);
    assert_eq!(claim(&mut table, B, 3), Verdict::Full);
    assert_eq!(claim(&mut table, B, 2), carry(1, &[A]));
}

#[test]
fn a_host_beyond_the_sets_counts_its_pages_and_is_never_forwarded_to() {
    let (mut table, far) = (Table::new(1, 0), HostNo(64));
    register(&mut table, far, &[1]);
    assert_eq!(claim(&mut table, A, 1), carry(0, &[]));
    assert_eq!(claim(&mut table, far, 1), at(0, A, false));
    assert_eq!((table.summary().pages, table.summary().contents()), (2, 0));
    assert_eq!(claim(&mut table, far, 2), carry(1, &[]));
    assert_eq!(claim(&mut table, A, 2), at(1, far, false));
}

#[test]
fn entries_of_other_shards_and_beyond_the_end_are_ignored() {
    let mut table = Table::new(1, 1);
    claim(&mut table, A, 1);
    let first = EntryId(0);
    table.carried(AGENT, EntryRun { first, count: 1 });
    let first = EntryId::of_shard(1, 5).unwrap();
    table.carried(AGENT, EntryRun { first, count: 1000 });
    assert_eq!(table.summary().in_flight, 1);
    let first = EntryId::of_shard(1, 0).unwrap();
    let count = EntryId::MAX_IN_SHARD;
    table.carried(AGENT, EntryRun { first, count });
    assert_eq!(table.summary().present, 1);
}
