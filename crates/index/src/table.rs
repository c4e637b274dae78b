//! The table of one group and trust domain.

use std::collections::BTreeMap;

use page::{ContentId, EntryId, HostNo};
use wire::index::{EntryRun, Item, Summary, Verdict};

use crate::entries::{Entries, Record, State};
use crate::sets::{MAX_SETS, Sets};

/// Most entries of an index process: 400 GiB of distinct contents, for 4 GB of memory at 37
/// bytes an entry. Contents beyond go without an entry: more bytes, same result.
pub const MAX_ENTRIES: u32 = 100_000_000;

const _: () = assert!(MAX_ENTRIES <= EntryId::MAX_IN_SHARD);

/// Number of a client of a table, while it is connected.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ClientNo(pub u16);

/// Contents, their entries, who needs them and who carries them.
///
/// An entry once made stays, and keeps its id, as long as the table:
///
/// ```text
///             claim               carried
/// unclaimed ────────► in flight ──────────► present ◄── seed (from unclaimed or lost)
///                       ▲    │                 │
///                 claim │    │ client_gone     │ carrier_gone
///                       │    ▼ carrier_gone    │ lost
///                      lost ◄┴─────────────────┘
///                             lost
/// ```
///
/// **Preparing again.** [`withdraw`](Self::withdraw) forgets what was registered for a target
/// host; a new registration follows. It costs time in the number of distinct host sets, not of
/// entries: the host is taken out of each set, and thereby out of all entries that name the
/// set. Contents that nobody needs any more keep their entries, and count against the limit.
pub struct Table {
    epoch: u64,
    shard: u8,
    limit: u32,
    entries: Entries,
    sets: Sets,
    /// Pages registered for each target host.
    pages: BTreeMap<HostNo, u64>,
    /// Claims in flight of each client that has any.
    in_flight: BTreeMap<ClientNo, u32>,
    /// Entries in each [`State`].
    states: [u64; 4],
    /// Scratch of [`claim`](Self::claim).
    found: Vec<Option<u32>>,
}

impl Table {
    /// A table of at most [`MAX_ENTRIES`].
    ///
    /// `epoch` is random: ids of entries mean something only together with it. `shard` is below
    /// [`EntryId::MAX_SHARDS`].
    #[must_use]
    pub fn new(epoch: u64, shard: u8) -> Self {
        Self::with_limit(epoch, shard, MAX_ENTRIES)
    }

    /// A table of at most `limit` entries, and never more than [`MAX_ENTRIES`].
    #[must_use]
    pub fn with_limit(epoch: u64, shard: u8, limit: u32) -> Self {
        Self {
            epoch,
            shard,
            limit: limit.min(MAX_ENTRIES),
            entries: Entries::new(),
            sets: Sets::with_limit(MAX_SETS),
            pages: BTreeMap::new(),
            in_flight: BTreeMap::new(),
            states: [0; 4],
            found: Vec::new(),
        }
    }

    /// From now on the table takes up no more contents than this, and never more than
    /// [`MAX_ENTRIES`]; it keeps what it has.
    pub fn set_limit(&mut self, limit: u32) {
        self.limit = limit.min(MAX_ENTRIES);
    }

    /// Entries given out.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.entries.len()
    }

    /// Whether there is no entry.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// As it was made with.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// As it was made with.
    #[must_use]
    pub fn shard(&self) -> u8 {
        self.shard
    }

    /// These contents are in VMs that will run on `target`. Appends the entry of each, none if
    /// the table is full; new entries get ascending ids, in the order of the batch.
    pub fn register(&mut self, target: HostNo, batch: &[Item], out: &mut Vec<Option<EntryId>>) {
        let pages = self.pages.entry(target).or_default();
        for item in batch {
            *pages = pages.saturating_add(item.pages.into());
        }
        for item in batch {
            let number = self.find_or_push(item.id);
            let record = number.and_then(|number| self.entries.get_mut(number));
            if let Some(record) = record {
                record.needed = self.sets.add_host(record.needed, target);
            }
            out.push(number.and_then(|number| self.entry_id(number)));
        }
    }

    /// Appends the entry of each of these contents that any other host than `target` is
    /// registered to need. Hosts beyond [`page::HostSet::CAPACITY`] are not
    /// remembered.
    pub fn shared(&self, target: HostNo, ids: &[ContentId], out: &mut Vec<Option<EntryId>>) {
        out.extend(ids.iter().map(|id| {
            let number = self.entries.find(*id)?;
            let record = self.entries.get(number)?;
            let elsewhere = !self.sets.hosts(record.needed).without(target).is_empty();
            (elsewhere || record.state() == State::Present)
                .then(|| self.entry_id(number))
                .flatten()
        }));
    }

    /// Forgets what was registered for `target`; see the type's page. Claims stay.
    pub fn withdraw(&mut self, target: HostNo) {
        if self.pages.remove(&target).is_some() {
            self.sets.withdraw(target);
        }
    }

    /// Pages with these contents are about to go to `target`: appends what is to be done with
    /// each.
    pub fn claim(
        &mut self,
        target: HostNo,
        client: ClientNo,
        ids: &[ContentId],
        out: &mut Vec<Verdict>,
    ) {
        let mut granted = 0;
        out.reserve(ids.len());
        // Apart from what is done with them: so the waits for memory overlap.
        let mut found = std::mem::take(&mut self.found);
        found.clear();
        found.extend(ids.iter().map(|id| self.entries.find(*id)));
        for (id, found) in ids.iter().zip(&found) {
            let number = found.or_else(|| self.find_or_push(*id));
            let verdict = self.claim_one(target, client, number);
            granted += u32::from(matches!(verdict, Verdict::Carry { .. }));
            out.push(verdict);
        }
        self.found = found;
        if granted > 0 {
            *self.in_flight.entry(client).or_default() += granted;
        }
    }

    fn claim_one(&mut self, target: HostNo, client: ClientNo, number: Option<u32>) -> Verdict {
        let entry = number.and_then(|number| self.entry_id(number));
        let record = number.and_then(|number| self.entries.get_mut(number));
        let (Some(entry), Some(record)) = (entry, record) else {
            return Verdict::Full;
        };
        match record.state() {
            State::Unclaimed | State::Lost => {
                shift(&mut self.states, record, State::InFlight);
                self.sets.give(record.given(), record.needed);
                record.set_given(record.needed);
                (record.carrier, record.client) = (target.0, client);
                let hosts = self.sets.hosts(record.needed).without(target);
                Verdict::Carry { entry, hosts }
            }
            State::InFlight | State::Present => Verdict::At {
                entry,
                carrier: HostNo(record.carrier),
                pushed: record.carrier != target.0
                    && self.sets.hosts(record.given()).contains(target),
            },
        }
    }

    /// Entries that `client` claimed have reached their carrier. Entries that are not in flight
    /// by this client are left as they are.
    pub fn carried(&mut self, client: ClientNo, run: EntryRun) {
        let mut done = 0;
        for number in self.numbers(run) {
            if let Some(record) = self.entries.get_mut(number)
                && record.state() == State::InFlight
                && record.client == client
            {
                shift(&mut self.states, record, State::Present);
                done += 1;
            }
        }
        self.landed(client, done);
    }

    /// `carrier` does not have these entries. Those of which it is not the carrier any more are
    /// left as they are.
    pub fn lost(&mut self, carrier: HostNo, run: EntryRun) {
        for number in self.numbers(run) {
            if let Some(record) = self.entries.get_mut(number)
                && record.carrier == carrier.0
            {
                let client = record.client;
                let was_in_flight = lose(&mut self.states, record);
                self.landed(client, was_in_flight.into());
            }
        }
    }

    /// The client is gone: nobody will say that its claims in flight have arrived. Looks at
    /// every entry (some 30 ms for 10 million) if the client has claims in flight.
    pub fn client_gone(&mut self, client: ClientNo) {
        if self.in_flight.remove(&client).is_none() {
            return;
        }
        for record in self.entries.iter_mut() {
            if record.state() == State::InFlight && record.client == client {
                lose(&mut self.states, record);
            }
        }
    }

    /// Nothing is at the target host any more. Looks at every entry.
    pub fn carrier_gone(&mut self, host: HostNo) {
        let mut landed: BTreeMap<ClientNo, u32> = BTreeMap::new();
        for record in self.entries.iter_mut() {
            let client = record.client;
            if record.carrier == host.0 && lose(&mut self.states, record) {
                *landed.entry(client).or_default() += 1;
            }
        }
        for (client, count) in landed {
            self.landed(client, count);
        }
    }

    /// VMs that run on `target` already hold these contents: present there, unless they are in
    /// flight or present already. Appends the entry of each, none if the table is full.
    pub fn seed(&mut self, target: HostNo, ids: &[ContentId], out: &mut Vec<Option<EntryId>>) {
        for id in ids {
            let number = self.find_or_push(*id);
            if let Some(record) = number.and_then(|number| self.entries.get_mut(number))
                && matches!(record.state(), State::Unclaimed | State::Lost)
            {
                shift(&mut self.states, record, State::Present);
                self.sets.give(record.given(), crate::sets::SetNo::EMPTY);
                record.set_given(crate::sets::SetNo::EMPTY);
                record.carrier = target.0;
            }
            out.push(number.and_then(|number| self.entry_id(number)));
        }
    }

    /// What the table holds. Looks at every distinct host set, not at the entries.
    #[must_use]
    pub fn summary(&self) -> Summary {
        let [unclaimed, in_flight, present, lost] = self.states;
        Summary {
            by_hosts: self.sets.records_by_hosts(),
            pages: self.pages.values().fold(0, |a, b| a.saturating_add(*b)),
            unclaimed,
            in_flight,
            present,
            lost,
        }
    }

    fn find_or_push(&mut self, id: ContentId) -> Option<u32> {
        if let Some(number) = self.entries.find(id) {
            return Some(number);
        }
        if self.entries.len() >= self.limit {
            return None;
        }
        self.states[State::Unclaimed as usize] += 1;
        Some(self.entries.push(id))
    }

    fn entry_id(&self, number: u32) -> Option<EntryId> {
        EntryId::of_shard(self.shard, number)
    }

    /// Numbers of the entries of a run that exist in this table.
    fn numbers(&self, run: EntryRun) -> std::ops::Range<u32> {
        if run.first.is_local() || run.first.shard() != self.shard {
            return 0..0;
        }
        let start = run.first.number();
        start..start.saturating_add(run.count).min(self.entries.len())
    }

    /// Claims of `client` are in flight no more.
    fn landed(&mut self, client: ClientNo, count: u32) {
        if let Some(in_flight) = self.in_flight.get_mut(&client) {
            *in_flight = in_flight.saturating_sub(count);
            if *in_flight == 0 {
                self.in_flight.remove(&client);
            }
        }
    }
}

fn shift(states: &mut [u64; 4], record: &mut Record, to: State) {
    states[record.state() as usize] -= 1;
    states[to as usize] += 1;
    record.set_state(to);
}

/// From in flight or present to lost; whether it was in flight.
fn lose(states: &mut [u64; 4], record: &mut Record) -> bool {
    let state = record.state();
    if matches!(state, State::InFlight | State::Present) {
        shift(states, record, State::Lost);
    }
    state == State::InFlight
}

#[cfg(test)]
mod tests;
