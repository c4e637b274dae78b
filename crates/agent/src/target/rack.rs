//! The contents that a target host shares with the other target hosts of a group.
//!
//! One store for each group and trust domain, used by all sessions of that group and by the
//! connections from other target hosts. What to use, to wait for and to pass on is decided by
//! [`Store`]; here are its lock, the guests' memory, the VMs' threads and the connections.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use content::Place;
use migrate::exchange::{Action, Came, Lookup, Store, Waiter};
use migrate::unpack::{Found, LiteralRun};
use page::{BlockIndex, ContentId, ContentKey, EntryId, HostNo, PAGE_SIZE, PageNo};
use wire::{RackHello, Remote};

use crate::link::Buffer;

use super::peer::{FRAME_PAGES, Outgoing, PeerContext};
use super::session::{GuestMemory, lock, read_checked};
use super::sink::{SinkFrame, SinkHandle};

/// How often late contents are looked for: a third of what a stopped guest waits for its last.
const TICK: Duration = Duration::from_millis(15);

/// How long a store without VMs of its own serves others after the last of them was heard.
const LINGER: Duration = Duration::from_secs(30);

/// VMs of a store; numbers are not used again.
const MAX_MEMBERS: u32 = 0xffff;

/// The store of one group and trust domain at this host.
pub(crate) struct RackStore {
    /// Its name, for messages.
    pub(crate) name: String,
    key: ContentKey,
    inner: Mutex<Inner>,
    outgoing: HashMap<HostNo, Outgoing>,
    clock: Instant,
}

struct Inner {
    store: Store<Arc<Buffer>>,
    sinks: HashMap<Waiter, SinkHandle>,
    memories: HashMap<u16, Arc<GuestMemory>>,
    next_member: u32,
    sessions: usize,
    heard: Duration,
}

/// All stores of this host.
#[derive(Default)]
pub(crate) struct RackStores {
    stores: Mutex<HashMap<String, Arc<RackStore>>>,
    /// What VMs that stay here have, by the store's name; with the preparation that found it.
    seeds: Mutex<HashMap<String, (String, Vec<Seed>)>>,
}

/// Contents of a VM that runs here and stays.
pub(crate) struct Seed {
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) places: Vec<(EntryId, ContentId, BlockIndex, PageNo)>,
}

/// The name of a group's and trust domain's store in the life of its index.
pub(crate) fn store_name(secret: &ContentKey, group: &str, epoch: u64) -> String {
    hex::encode(secret.name("store", &[group.as_bytes(), &epoch.to_le_bytes()]))
}

impl RackStores {
    /// The store that a session names; made if there is none.
    pub(crate) fn join(
        self: &Arc<Self>,
        hello: &RackHello,
        key: &ContentKey,
        context: &PeerContext,
        store_bytes: usize,
    ) -> std::io::Result<Arc<RackStore>> {
        let mut stores = lock(&self.stores);
        if let Some(store) = stores.get(&hello.store) {
            lock(&store.inner).sessions += 1;
            return Ok(Arc::clone(store));
        }
        let store = RackStore::new(hello, key, context, store_bytes);
        if let Some((_, seeds)) = lock(&self.seeds).get(&hello.store) {
            seeds.iter().for_each(|seed| store.add_seed(seed));
        }
        let (all, watched) = (Arc::downgrade(self), Arc::downgrade(&store));
        std::thread::Builder::new()
            .name("gw-exchange".into())
            .spawn(move || watch(&all, &watched))?;
        // Not before: a store that nobody watches would stay for ever.
        stores.insert(hello.store.clone(), Arc::clone(&store));
        Ok(store)
    }

    /// Keeps what VMs that stay here have for the store of this name, for as long as the preparation is
    /// not forgotten. What was kept for it before is replaced.
    pub(crate) fn keep_seeds(&self, store: String, preparation: &str, seeds: Vec<Seed>) {
        lock(&self.seeds).insert(store, (preparation.to_owned(), seeds));
    }

    /// Forgets what a preparation has found; stores that have it keep it.
    pub(crate) fn forget_seeds(&self, preparation: &str) {
        lock(&self.seeds).retain(|_, (of, _)| of != preparation);
    }

    /// What is kept for the store of this name.
    #[cfg(test)]
    pub(crate) fn seeds_of(&self, store: &str) -> Vec<(EntryId, ContentId)> {
        let seeds = lock(&self.seeds);
        let kept = seeds.get(store).into_iter().flat_map(|(_, seeds)| seeds);
        kept.flat_map(|seed| seed.places.iter().map(|(entry, id, ..)| (*entry, *id)))
            .collect()
    }

    /// The store of this name, for another target host.
    pub(crate) fn find(&self, name: &str) -> Option<Arc<RackStore>> {
        lock(&self.stores).get(name).cloned()
    }
}

/// Sees to late contents, and ends the store when nobody needs it.
fn watch(stores: &Weak<RackStores>, store: &Weak<RackStore>) {
    loop {
        std::thread::sleep(TICK);
        let (Some(stores), Some(store)) = (stores.upgrade(), store.upgrade()) else {
            return;
        };
        store.tick();
        let mut stores = lock(&stores.stores);
        let is_done = {
            let inner = lock(&store.inner);
            inner.sessions == 0 && store.clock.elapsed() > inner.heard + LINGER
        };
        if is_done {
            stores.remove(&store.name);
            store.outgoing.values().for_each(Outgoing::close);
            return;
        }
    }
}

impl RackStore {
    fn new(
        hello: &RackHello,
        key: &ContentKey,
        context: &PeerContext,
        store_bytes: usize,
    ) -> Arc<Self> {
        let me = HostNo(hello.host);
        Arc::new_cyclic(|store: &Weak<Self>| {
            let others = hello.peers.iter().filter(|(host, _)| *host != me.0);
            let outgoing = others.map(|(host, address)| {
                let outgoing = Outgoing::new(context, store, (HostNo(*host), address), me);
                (HostNo(*host), outgoing)
            });
            Self {
                name: hello.store.clone(),
                key: key.clone(),
                inner: Mutex::new(Inner {
                    store: Store::new(me, key.clone(), store_bytes),
                    sinks: HashMap::new(),
                    memories: HashMap::new(),
                    next_member: 0,
                    sessions: 1,
                    heard: Duration::ZERO,
                }),
                outgoing: outgoing.collect(),
                clock: Instant::now(),
            }
        })
    }

    /// Takes in what a VM has that stays here.
    fn add_seed(&self, seed: &Seed) {
        let number = {
            let mut inner = lock(&self.inner);
            let Some(number) = u16::try_from(inner.next_member)
                .ok()
                .filter(|number| u32::from(*number) < MAX_MEMBERS)
            else {
                return;
            };
            inner.next_member += 1;
            inner.memories.insert(number, Arc::clone(&seed.memory));
            number
        };
        let places = seed.places.iter();
        self.place(
            number,
            places.map(|&(entry, id, block, page)| (entry, Some(id), block, page)),
        );
    }

    /// A session does not use the store any more.
    pub(crate) fn leave(&self) {
        let mut inner = lock(&self.inner);
        inner.sessions = inner.sessions.saturating_sub(1);
        inner.heard = self.clock.elapsed();
    }

    /// Whether VMs come to this host; others that hear so keep what they have for it.
    pub(crate) fn is_active(&self) -> bool {
        lock(&self.inner).sessions > 0
    }

    /// Another target host that still receives VMs was heard.
    pub(crate) fn heard(&self) {
        lock(&self.inner).heard = self.clock.elapsed();
    }

    /// Takes a VM in, under the number that places and waits have.
    pub(crate) fn add(&self, sink: SinkHandle) -> Option<u16> {
        let mut inner = lock(&self.inner);
        let number = inner.next_member;
        if number >= MAX_MEMBERS {
            return None;
        }
        inner.next_member += 1;
        inner.sinks.insert(Waiter(number), sink);
        u16::try_from(number).ok()
    }

    /// The VM waits for nothing any more. Its memory is still served from.
    pub(crate) fn remove(&self, number: u16) {
        let mut inner = lock(&self.inner);
        inner.sinks.remove(&Waiter(number.into()));
        inner.store.waiter_gone(Waiter(number.into()));
    }

    /// Where the VM's memory is.
    pub(crate) fn add_memory(&self, number: u16, memory: Arc<GuestMemory>) {
        lock(&self.inner).memories.insert(number, memory);
    }

    /// Remembers where contents of the rack are now.
    pub(crate) fn place(
        &self,
        number: u16,
        placed: impl Iterator<Item = (EntryId, Option<ContentId>, BlockIndex, PageNo)>,
    ) {
        let mut inner = lock(&self.inner);
        for (entry, id, block, page) in placed {
            let vm = number;
            inner.store.place(entry, id, Place { vm, block, page });
        }
    }

    /// Finds contents for a VM's thread; what is not here is waited for.
    pub(crate) fn find(
        &self,
        number: u16,
        entries: (EntryId, u32),
        remote: Option<&Remote<'_>>,
        scratch: &mut Vec<u8>,
        found: &mut Vec<Found<Arc<Buffer>>>,
    ) {
        let (waiter, now) = (Waiter(number.into()), self.clock.elapsed());
        let (mut lookups, mut actions) = (Vec::new(), Vec::new());
        let out = (&mut lookups, &mut actions);
        lock(&self.inner)
            .store
            .find(waiter, entries, remote, now, out);
        let base = found.len();
        let mut elsewhere = Vec::new();
        for (lookup, index) in lookups.into_iter().zip(0_u32..) {
            if let Lookup::Placed(id, place) = lookup {
                elsewhere.push((index, (id, place)));
            }
            found.push(found_of(lookup));
        }
        if !elsewhere.is_empty() {
            let start = scratch.len();
            scratch.resize(start + elsewhere.len() * PAGE_SIZE, 0);
            let wanted: Vec<_> = elsewhere.iter().map(|(_, place)| *place).collect();
            let good = self.read_checked(&wanted, &mut scratch[start..]);
            for (((index, _), good), at) in elsewhere.into_iter().zip(good).zip(0..) {
                found[base + index as usize] = if good {
                    Found::Scratch(start + at * PAGE_SIZE)
                } else {
                    let store = &mut lock(&self.inner).store;
                    let entry = (entries.0, index);
                    found_of(store.not_there(waiter, entry, remote, now, &mut actions))
                };
            }
        }
        self.act(actions);
    }

    fn read_checked(&self, wanted: &[(ContentId, Place)], out: &mut [u8]) -> Vec<bool> {
        let memory = |vm| lock(&self.inner).memories.get(&vm).cloned();
        read_checked(&self.key, memory, wanted, out)
    }

    /// A session brought literals; some are to be passed on.
    pub(crate) fn brought(&self, runs: &[LiteralRun], body: &Arc<Buffer>) {
        if runs.iter().all(|run| run.first.is_local()) {
            return;
        }
        let now = self.clock.elapsed();
        let came = lock(&self.inner).store.brought(runs, body, now);
        self.hand_out(came, body);
    }

    /// A session names contents that others bring.
    pub(crate) fn named(&self, remotes: &[Remote<'_>]) {
        let now = self.clock.elapsed();
        for remote in remotes {
            let actions = lock(&self.inner).store.named(remote, now);
            self.act(actions);
        }
    }

    /// Another target host brought contents.
    pub(crate) fn pushed(&self, from: HostNo, contents: (&[EntryId], usize), body: &Arc<Buffer>) {
        let now = self.clock.elapsed();
        let came = lock(&self.inner).store.pushed(from, contents, body, now);
        self.hand_out(came, body);
    }

    /// Gives contents to those who wait for them, here and elsewhere.
    fn hand_out(&self, came: Came<Arc<Buffer>>, body: &Arc<Buffer>) {
        if !came.arrived.is_empty() {
            let inner = lock(&self.inner);
            for (waiter, contents) in came.arrived {
                if let Some(sink) = inner.sinks.get(&waiter) {
                    sink.push(SinkFrame::Arrived(contents));
                }
            }
        }
        let mut send = came.send;
        send.sort_by_key(|(host, ..)| *host);
        for of_host in send.chunk_by(|a, b| a.0 == b.0) {
            if let Some(outgoing) = self.outgoing.get(&of_host[0].0) {
                let contents = of_host.iter();
                outgoing.contents(contents.map(|(_, entry, at)| (*entry, Arc::clone(body), *at)));
            }
        }
        self.act(came.actions);
    }

    /// Another target host asks for entries.
    pub(crate) fn pulled(&self, from: HostNo, entries: &[EntryId]) {
        let Some(outgoing) = self.outgoing.get(&from) else {
            return;
        };
        let now = self.clock.elapsed();
        let pulled = lock(&self.inner).store.pulled(from, entries, now);
        outgoing.contents(pulled.here.into_iter());
        for chunk in pulled.placed.chunks(FRAME_PAGES) {
            let mut body = outgoing.buffer(chunk.len() * PAGE_SIZE);
            let wanted: Vec<_> = chunk.iter().map(|(_, id, place)| (*id, *place)).collect();
            let good = self.read_checked(&wanted, &mut body);
            let body = Arc::new(body);
            let read = chunk.iter().map(|(entry, ..)| *entry).zip(good);
            let (there, gone): (Vec<_>, Vec<_>) = read
                .zip(0..)
                .partition(|((_, is_good), _): &((EntryId, bool), usize)| *is_good);
            let contents = there.into_iter();
            outgoing.contents(
                contents.map(|((entry, _), index)| (entry, Arc::clone(&body), index * PAGE_SIZE)),
            );
            let gone: Vec<_> = gone.into_iter().map(|((entry, _), _)| entry).collect();
            outgoing.missing(&gone);
        }
        self.act(pulled.actions);
    }

    /// Another target host does not have what it was asked for.
    pub(crate) fn missing(&self, at: HostNo, entries: &[EntryId]) {
        let actions = lock(&self.inner).store.missing(at, entries);
        self.act(actions);
    }

    /// A connection with another target host is gone.
    pub(crate) fn host_gone(&self, host: HostNo) {
        let actions = lock(&self.inner)
            .store
            .host_gone(host, self.clock.elapsed());
        self.act(actions);
    }

    /// A stopped guest waits for these and nothing else.
    pub(crate) fn hurry(&self, entries: impl Iterator<Item = EntryId>) {
        lock(&self.inner).store.hurry(entries, self.clock.elapsed());
    }

    fn tick(&self) {
        let actions = lock(&self.inner).store.tick(self.clock.elapsed());
        self.act(actions);
    }

    fn act(&self, actions: Vec<Action>) {
        let mut given_up: HashMap<(Waiter, HostNo), Vec<EntryId>> = HashMap::new();
        let mut pulls: HashMap<HostNo, Vec<EntryId>> = HashMap::new();
        let mut missing: HashMap<HostNo, Vec<EntryId>> = HashMap::new();
        for action in actions {
            match action {
                Action::Pull { to, entry } => pulls.entry(to).or_default().push(entry),
                Action::Missing { to, entry } => missing.entry(to).or_default().push(entry),
                Action::GiveUp {
                    entry,
                    carrier,
                    waiters,
                } => {
                    for waiter in waiters {
                        given_up.entry((waiter, carrier)).or_default().push(entry);
                    }
                }
            }
        }
        for (to, entries) in pulls {
            match self.outgoing.get(&to) {
                Some(outgoing) => outgoing.pull(&entries),
                None => tracing::warn!(
                    ?to,
                    "the index names a target host that is not in the group"
                ),
            }
        }
        for (to, entries) in missing {
            if let Some(outgoing) = self.outgoing.get(&to) {
                outgoing.missing(&entries);
            }
        }
        if given_up.is_empty() {
            return;
        }
        let inner = lock(&self.inner);
        for ((waiter, carrier), entries) in given_up {
            tracing::debug!(count = entries.len(), ?carrier, "contents do not come");
            if let Some(sink) = inner.sinks.get(&waiter) {
                sink.push(SinkFrame::NotComing { carrier, entries });
            }
        }
    }
}

fn found_of(lookup: Lookup<Arc<Buffer>>) -> Found<Arc<Buffer>> {
    match lookup {
        Lookup::Here(body, at) => Found::Held(body, at),
        Lookup::Coming => Found::Coming,
        // A place that has yet to be read counts as missing until then.
        Lookup::Missing | Lookup::Placed(..) => Found::Missing,
    }
}

#[cfg(test)]
mod tests;
