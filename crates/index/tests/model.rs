//! The table against a model that a page of code can hold.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use index::{ClientNo, EntryRun, Item, Summary, Table, Verdict};
use page::{ContentId, EntryId, HostNo};
use proptest::prelude::*;

/// Fewer than there are contents, so that the table fills up.
const LIMIT: u32 = 12;

#[derive(Clone, Copy, PartialEq, Default, Debug)]
enum State {
    #[default]
    Unclaimed,
    InFlight,
    Present,
    Lost,
}

#[derive(Clone, Default, Debug)]
struct Entry {
    number: u32,
    needed: BTreeSet<u16>,
    given: BTreeSet<u16>,
    state: State,
    carrier: u16,
    client: u16,
}

#[derive(Default)]
struct Model {
    entries: HashMap<u8, Entry>,
    pages: BTreeMap<u16, u64>,
}

#[derive(Clone, Debug)]
enum Step {
    Register(u16, Vec<u8>),
    Withdraw(u16),
    Claim(u16, u16, Vec<u8>),
    Carried(u16, u32, u32),
    Lost(u16, u32, u32),
    ClientGone(u16),
    CarrierGone(u16),
    Seed(u16, Vec<u8>),
}

fn step() -> impl Strategy<Value = Step> {
    // Host 64 cannot be a member of a set.
    let host = || prop_oneof![0..4_u16, Just(63), Just(64)];
    let client = || 0..3_u16;
    let ids = || proptest::collection::vec(0..16_u8, 0..6);
    let runs = || (0..LIMIT + 2, 1..5_u32);
    prop_oneof![
        3 => (host(), ids()).prop_map(|(h, ids)| Step::Register(h, ids)),
        1 => host().prop_map(Step::Withdraw),
        4 => (host(), client(), ids()).prop_map(|(h, c, ids)| Step::Claim(h, c, ids)),
        3 => (client(), runs()).prop_map(|(c, (n, len))| Step::Carried(c, n, len)),
        2 => (host(), runs()).prop_map(|(h, (n, len))| Step::Lost(h, n, len)),
        1 => client().prop_map(Step::ClientGone),
        1 => host().prop_map(Step::CarrierGone),
        1 => (host(), ids()).prop_map(|(h, ids)| Step::Seed(h, ids)),
    ]
}

fn id(n: u8) -> ContentId {
    ContentId([n; 16])
}

impl Model {
    fn entry(&mut self, content: u8) -> Option<&mut Entry> {
        let number = u32::try_from(self.entries.len()).expect("few");
        if !self.entries.contains_key(&content) && number == LIMIT {
            return None;
        }
        Some(self.entries.entry(content).or_insert(Entry {
            number,
            ..Entry::default()
        }))
    }

    fn register(&mut self, host: u16, contents: &[u8]) -> Vec<Option<EntryId>> {
        let add = |content: &u8| {
            *self.pages.entry(host).or_default() += 3;
            let entry = self.entry(*content)?;
            if host < 64 {
                entry.needed.insert(host);
            }
            Some(EntryId(entry.number))
        };
        contents.iter().map(add).collect()
    }

    fn claim(&mut self, host: u16, client: u16, content: u8) -> Verdict {
        let Some(e) = self.entry(content) else {
            return Verdict::Full;
        };
        let entry = EntryId(e.number);
        if matches!(e.state, State::InFlight | State::Present) {
            return Verdict::At {
                entry,
                carrier: HostNo(e.carrier),
                pushed: e.given.contains(&host),
            };
        }
        let mut given = e.needed.clone();
        given.remove(&host);
        *e = Entry {
            given: given.clone(),
            state: State::InFlight,
            carrier: host,
            client,
            ..e.clone()
        };
        Verdict::Carry {
            entry,
            hosts: given.into_iter().map(HostNo).collect(),
        }
    }

    fn seed(&mut self, host: u16, content: u8) -> Option<EntryId> {
        let e = self.entry(content)?;
        if matches!(e.state, State::Unclaimed | State::Lost) {
            e.given.clear();
            (e.state, e.carrier) = (State::Present, host);
        }
        Some(EntryId(e.number))
    }

    fn lose(&mut self, which: impl Fn(&Entry) -> bool) {
        for e in self.entries.values_mut().filter(|e| which(e)) {
            if matches!(e.state, State::InFlight | State::Present) {
                e.state = State::Lost;
            }
        }
    }

    fn shared(&self, host: u16, content: u8) -> Option<EntryId> {
        let entry = self.entries.get(&content)?;
        let elsewhere = entry.needed.iter().any(|other| *other != host);
        let is_there = matches!(entry.state, State::Present);
        (elsewhere || is_there).then_some(EntryId(entry.number))
    }

    fn summary(&self) -> Summary {
        let mut summary = Summary {
            pages: self.pages.values().sum(),
            ..Summary::default()
        };
        for e in self.entries.values() {
            if let Some(at) = e.needed.len().checked_sub(1) {
                let length = summary.by_hosts.len().max(at + 1);
                summary.by_hosts.resize(length, 0);
                summary.by_hosts[at] += 1;
            }
            *match e.state {
                State::Unclaimed => &mut summary.unclaimed,
                State::InFlight => &mut summary.in_flight,
                State::Present => &mut summary.present,
                State::Lost => &mut summary.lost,
            } += 1;
        }
        summary
    }
}

fn apply(step: Step, table: &mut Table, model: &mut Model) -> Result<(), TestCaseError> {
    let run = |first, count| EntryRun {
        first: EntryId(first),
        count,
    };
    match step {
        Step::Register(host, contents) => {
            let item = |n: &u8| Item {
                id: id(*n),
                pages: 3,
            };
            let items: Vec<_> = contents.iter().map(item).collect();
            let mut entries = Vec::new();
            table.register(HostNo(host), &items, &mut entries);
            prop_assert_eq!(entries, model.register(host, &contents));
        }
        Step::Withdraw(host) => {
            table.withdraw(HostNo(host));
            model.pages.remove(&host);
            for e in model.entries.values_mut() {
                e.needed.remove(&host);
                // Who is not registered is not waited for: see `Table`.
                e.given.remove(&host);
            }
        }
        Step::Claim(host, client, contents) => {
            let ids: Vec<_> = contents.iter().map(|n| id(*n)).collect();
            let mut verdicts = Vec::new();
            table.claim(HostNo(host), ClientNo(client), &ids, &mut verdicts);
            let claim = |n: &u8| model.claim(host, client, *n);
            prop_assert_eq!(verdicts, contents.iter().map(claim).collect::<Vec<_>>());
        }
        Step::Carried(client, first, count) => {
            table.carried(ClientNo(client), run(first, count));
            let in_flight = |e: &&mut Entry| e.state == State::InFlight && e.client == client;
            let range = first..first + count;
            let of_run = |e: &&mut Entry| range.contains(&e.number);
            let entries = model.entries.values_mut().filter(in_flight);
            entries
                .filter(of_run)
                .for_each(|e| e.state = State::Present);
        }
        Step::Lost(host, first, count) => {
            table.lost(HostNo(host), run(first, count));
            let range = first..first + count;
            model.lose(|e| e.carrier == host && range.contains(&e.number));
        }
        Step::ClientGone(client) => {
            table.client_gone(ClientNo(client));
            model.lose(|e| e.state == State::InFlight && e.client == client);
        }
        Step::CarrierGone(host) => {
            table.carrier_gone(HostNo(host));
            model.lose(|e| e.carrier == host);
        }
        Step::Seed(host, contents) => {
            let ids: Vec<_> = contents.iter().map(|n| id(*n)).collect();
            let mut entries = Vec::new();
            table.seed(HostNo(host), &ids, &mut entries);
            let seed = |n: &u8| model.seed(host, *n);
            prop_assert_eq!(entries, contents.iter().map(seed).collect::<Vec<_>>());
        }
    }
    prop_assert_eq!(table.summary(), model.summary());
    let ids: Vec<_> = (0..16).map(id).collect();
    let mut shared = Vec::new();
    table.shared(HostNo(1), &ids, &mut shared);
    let of_model = (0..16).map(|n| model.shared(1, n));
    prop_assert_eq!(shared, of_model.collect::<Vec<_>>());
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn the_table_answers_as_the_model_does(steps in proptest::collection::vec(step(), 1..60)) {
        let mut table = Table::with_limit(1, 0, LIMIT);
        let mut model = Model::default();
        for step in steps {
            apply(step, &mut table, &mut model)?;
        }
    }
}
