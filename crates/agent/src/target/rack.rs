//! The contents that a target host shares with the other target hosts of a group.
//!
//! One store for each group and trust domain, used by all sessions of that group and by the
//! connections from other target hosts. It finds contents for the VMs' threads, keeps what came,
//! passes on what others need, and answers their pulls. Whom to wait for and what is owed is the
//! business of [`Exchange`]; that a content is what its entry says is checked here, each time it
//! is used or served, by the id that this host's own source gave.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use content::{Place, Places, Shelf};
use migrate::exchange::{Action, Exchange, Waiter};
use migrate::unpack::{Arrived, Found, LiteralRun};
use page::{BlockIndex, ContentId, ContentKey, EntryId, HostNo, PAGE_SIZE, PageBytes, PageNo};
use wire::{RackHello, Remote};

use crate::link::Buffer;

use super::peer::{Outgoing, PeerContext};
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
    exchange: Exchange,
    /// What sessions to this host brought.
    own: Shelf<Arc<Buffer>>,
    /// What other target hosts brought: checked when it is used.
    pushed: Shelf<Arc<Buffer>>,
    places: Places,
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
        stores.insert(hello.store.clone(), Arc::clone(&store));
        let (stores, watched) = (Arc::downgrade(self), Arc::downgrade(&store));
        std::thread::Builder::new()
            .name("gw-exchange".into())
            .spawn(move || watch(&stores, &watched))?;
        Ok(store)
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
                    exchange: Exchange::new(me),
                    own: Shelf::with_limit(store_bytes),
                    pushed: Shelf::with_limit(store_bytes),
                    places: Places::default(),
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
        inner.exchange.waiter_gone(Waiter(number.into()));
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
            let Some(id) = id.or_else(|| inner.places.id(entry)) else {
                continue;
            };
            let vm = number;
            inner.places.put(entry, id, Place { vm, block, page });
        }
    }

    /// Finds contents for a VM's thread; what is not here is waited for.
    pub(crate) fn find(
        &self,
        number: u16,
        (first, count): (EntryId, u32),
        remote: Option<&Remote<'_>>,
        scratch: &mut Vec<u8>,
        found: &mut Vec<Found<Arc<Buffer>>>,
    ) {
        let base = found.len();
        let mut unchecked = Vec::new();
        let mut elsewhere = Vec::new();
        {
            let mut inner = lock(&self.inner);
            for index in 0..count {
                let entry = first.plus(index);
                let stated = remote.and_then(|r| r.ids.get(index as usize));
                if let Some(id) = stated {
                    inner.places.learn(entry, ContentId(*id));
                }
                let (at, one) = (found.len(), inner.look(entry, stated.is_some()));
                match one {
                    Seen::Own(body, offset) => found.push(Found::Held(body, offset)),
                    Seen::Unchecked(id, body, offset) => {
                        found.push(Found::Missing);
                        unchecked.push((at, id, body, offset));
                    }
                    Seen::Placed(id, place) => {
                        found.push(Found::Missing);
                        elsewhere.push((at, id, place));
                    }
                    Seen::Nothing => found.push(Found::Missing),
                }
            }
        }
        for (at, id, body, offset) in unchecked {
            if page_of(&body, offset).is_some_and(|page| self.key.id_of(page) == id) {
                found[at] = Found::Held(body, offset);
            }
        }
        self.find_placed(&elsewhere, scratch, found);
        if found[base..].iter().any(|f| matches!(f, Found::Missing)) {
            self.wait_for(number, first, remote, &mut found[base..]);
        }
    }

    /// Reads contents from guests' memory.
    fn find_placed(
        &self,
        elsewhere: &[(usize, ContentId, Place)],
        scratch: &mut Vec<u8>,
        found: &mut [Found<Arc<Buffer>>],
    ) {
        if elsewhere.is_empty() {
            return;
        }
        let start = scratch.len();
        scratch.resize(start + elsewhere.len() * PAGE_SIZE, 0);
        let wanted: Vec<_> = elsewhere
            .iter()
            .map(|(_, id, place)| (*id, *place))
            .collect();
        let good = self.read_checked(&wanted, &mut scratch[start..]);
        for (((at, ..), good), index) in elsewhere.iter().zip(good).zip(0..) {
            if good {
                found[*at] = Found::Scratch(start + index * PAGE_SIZE);
            }
        }
    }

    fn read_checked(&self, wanted: &[(ContentId, Place)], out: &mut [u8]) -> Vec<bool> {
        let memory = |vm| lock(&self.inner).memories.get(&vm).cloned();
        read_checked(&self.key, memory, wanted, out)
    }

    /// What was not found comes, or does not.
    fn wait_for(
        &self,
        number: u16,
        first: EntryId,
        remote: Option<&Remote<'_>>,
        found: &mut [Found<Arc<Buffer>>],
    ) {
        let waiter = Waiter(number.into());
        let mut actions = Vec::new();
        let mut inner = lock(&self.inner);
        for (one, index) in found.iter_mut().zip(0..) {
            if !matches!(one, Found::Missing) {
                continue;
            }
            let entry = first.plus(index);
            // It may have come while nothing was locked; then nobody tells us again.
            if let Some(held) = inner.checked(&self.key, entry) {
                *one = held;
                continue;
            }
            let stated = remote.and_then(|r| Some((r, ContentId(*r.ids.get(index as usize)?))));
            let comes = match stated {
                Some((remote, id)) => {
                    let from = (remote.carrier, remote.pushed);
                    let now = self.clock.elapsed();
                    inner
                        .exchange
                        .want((entry, id), from, waiter, now, &mut actions)
                }
                None => inner.exchange.joins(entry, None, waiter),
            };
            if comes {
                *one = Found::Coming;
            }
        }
        drop(inner);
        self.act(actions);
    }

    /// A session brought literals; some are to be passed on.
    pub(crate) fn brought(&self, runs: &[LiteralRun], body: &Arc<Buffer>) {
        let of_rack = || runs.iter().filter(|run| !run.first.is_local());
        if of_rack().next().is_none() {
            return;
        }
        let shelved = of_rack().map(|run| (run.first, run.count, run.at));
        let mut inner = lock(&self.inner);
        inner.own.push(shelved, body, body.len());
        drop(inner);
        for run in of_rack() {
            let contents =
                (0..run.count).map(|i| (run.first.plus(i), run.at + i as usize * PAGE_SIZE));
            self.came(contents.clone(), body);
            for host in run.forward.iter() {
                if let Some(outgoing) = self.outgoing.get(&host) {
                    outgoing.contents(contents.clone(), body);
                }
            }
        }
    }

    /// Another target host brought contents.
    pub(crate) fn pushed(&self, entries: &[EntryId], at: usize, body: &Arc<Buffer>) {
        let offsets = (0..).map(|index| at + index * PAGE_SIZE);
        let contents = entries.iter().copied().zip(offsets);
        let runs = contents.clone().map(|(entry, at)| (entry, 1, at));
        lock(&self.inner).pushed.push(runs, body, body.len());
        self.came(contents, body);
    }

    /// Gives contents to those who wait for them, here and elsewhere.
    fn came(&self, contents: impl Iterator<Item = (EntryId, usize)>, body: &Arc<Buffer>) {
        let mut actions = Vec::new();
        let mut arrived: HashMap<Waiter, Vec<Arrived<Arc<Buffer>>>> = HashMap::new();
        let mut owed = Vec::new();
        let mut inner = lock(&self.inner);
        if inner.exchange.is_idle() {
            return;
        }
        for (entry, at) in contents {
            if let Some(id) = inner.exchange.wanted(entry) {
                if page_of(body, at).is_some_and(|page| self.key.id_of(page) == id) {
                    for waiter in inner.exchange.came(entry) {
                        let body = Arc::clone(body);
                        arrived
                            .entry(waiter)
                            .or_default()
                            .push(Arrived { entry, body, at });
                    }
                } else {
                    tracing::warn!(
                        ?entry,
                        "a target host has sent other bytes than the entry's"
                    );
                    inner.exchange.came_wrong(entry, &mut actions);
                }
            }
            owed.extend(
                inner
                    .exchange
                    .owed(entry)
                    .into_iter()
                    .map(|to| (to, entry, at)),
            );
        }
        for (waiter, contents) in arrived {
            if let Some(sink) = inner.sinks.get(&waiter) {
                sink.push(SinkFrame::Arrived(contents));
            }
        }
        drop(inner);
        for (to, entry, at) in owed {
            if let Some(outgoing) = self.outgoing.get(&to) {
                outgoing.contents(std::iter::once((entry, at)), body);
            }
        }
        self.act(actions);
    }

    /// Another target host asks for entries.
    pub(crate) fn pulled(&self, from: HostNo, entries: &[EntryId]) {
        let Some(outgoing) = self.outgoing.get(&from) else {
            return;
        };
        let mut elsewhere = Vec::new();
        let mut absent = Vec::new();
        {
            let inner = lock(&self.inner);
            for entry in entries.iter().copied() {
                match inner.look(entry, false) {
                    Seen::Own(body, at) => outgoing.contents(std::iter::once((entry, at)), &body),
                    Seen::Placed(id, place) => elsewhere.push((entry, id, place)),
                    // What others pushed here is theirs to serve; what is unknown may come.
                    Seen::Unchecked(..) | Seen::Nothing => absent.push(entry),
                }
            }
        }
        for chunk in elsewhere.chunks(wire::MAX_ENTRIES / 4) {
            let mut body = outgoing.buffer(chunk.len() * PAGE_SIZE);
            let wanted: Vec<_> = chunk.iter().map(|(_, id, place)| (*id, *place)).collect();
            let good = self.read_checked(&wanted, &mut body);
            let body = Arc::new(body);
            for (((entry, ..), good), index) in chunk.iter().zip(good).zip(0..) {
                if good {
                    outgoing.contents(std::iter::once((*entry, index * PAGE_SIZE)), &body);
                } else {
                    outgoing.missing(*entry);
                }
            }
        }
        let mut actions = Vec::new();
        let mut inner = lock(&self.inner);
        for entry in absent {
            // It may have come while nothing was locked.
            match inner
                .own
                .find(entry)
                .map(|p| (Arc::clone(p.body), p.offset))
            {
                Some((body, at)) => outgoing.contents(std::iter::once((entry, at)), &body),
                None => {
                    let now = self.clock.elapsed();
                    inner.exchange.park(from, entry, now, &mut actions);
                }
            }
        }
        drop(inner);
        self.act(actions);
    }

    /// Another target host does not have what it was asked for.
    pub(crate) fn missing(&self, at: HostNo, entries: &[EntryId]) {
        let mut actions = Vec::new();
        let mut inner = lock(&self.inner);
        for entry in entries {
            inner.exchange.missing(at, *entry, &mut actions);
        }
        drop(inner);
        self.act(actions);
    }

    /// A connection with another target host is gone.
    pub(crate) fn host_gone(&self, host: HostNo) {
        let mut actions = Vec::new();
        let now = self.clock.elapsed();
        lock(&self.inner)
            .exchange
            .host_gone(host, now, &mut actions);
        self.act(actions);
    }

    /// A stopped guest waits for these and nothing else.
    pub(crate) fn hurry(&self, entries: impl Iterator<Item = EntryId>) {
        let now = self.clock.elapsed();
        lock(&self.inner).exchange.hurry(entries, now);
    }

    fn tick(&self) {
        let mut actions = Vec::new();
        let now = self.clock.elapsed();
        let mut inner = lock(&self.inner);
        if !inner.exchange.is_idle() {
            inner.exchange.tick(now, &mut actions);
        }
        drop(inner);
        self.act(actions);
    }

    fn act(&self, actions: Vec<Action>) {
        let mut given_up: HashMap<(Waiter, HostNo), Vec<EntryId>> = HashMap::new();
        for action in actions {
            match action {
                Action::Pull { to, entry } => match self.outgoing.get(&to) {
                    Some(outgoing) => outgoing.pull(entry),
                    None => tracing::warn!(
                        ?to,
                        "the index names a target host that is not in the group"
                    ),
                },
                Action::Missing { to, entry } => {
                    if let Some(outgoing) = self.outgoing.get(&to) {
                        outgoing.missing(entry);
                    }
                }
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

/// Where an entry is, as far as can be said without hashing.
enum Seen {
    Own(Arc<Buffer>, usize),
    /// Brought by another target host; what it must hash to.
    Unchecked(ContentId, Arc<Buffer>, usize),
    /// In a guest's memory, where it may have changed.
    Placed(ContentId, Place),
    Nothing,
}

impl Inner {
    /// `only_by_id`: what this host's sessions brought is checked too, because another source
    /// has named it.
    fn look(&self, entry: EntryId, only_by_id: bool) -> Seen {
        let id = self.places.id(entry);
        if let Some(page) = self.own.find(entry) {
            let body = Arc::clone(page.body);
            return match id.filter(|_| only_by_id) {
                Some(id) => Seen::Unchecked(id, body, page.offset),
                None => Seen::Own(body, page.offset),
            };
        }
        if let (Some(page), Some(id)) = (self.pushed.find(entry), id) {
            return Seen::Unchecked(id, Arc::clone(page.body), page.offset);
        }
        self.places
            .find(entry)
            .map_or(Seen::Nothing, |(id, place)| Seen::Placed(id, place))
    }

    /// The entry, if it is on a shelf and is what its id says.
    fn checked(&self, key: &ContentKey, entry: EntryId) -> Option<Found<Arc<Buffer>>> {
        let (body, at) = match self.look(entry, true) {
            Seen::Own(body, at) => return Some(Found::Held(body, at)),
            Seen::Unchecked(id, body, at) if key.id_of(page_of(&body, at)?) == id => (body, at),
            _ => return None,
        };
        Some(Found::Held(body, at))
    }
}

fn page_of(body: &[u8], at: usize) -> Option<&PageBytes> {
    body.get(at..at + PAGE_SIZE)?.try_into().ok()
}
