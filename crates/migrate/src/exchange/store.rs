//! What a target host has of the rack's contents, around the waits for what it has not.

use std::collections::{BTreeMap, HashSet};
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use content::{Place, Places, Shelf};
use page::{ContentId, ContentKey, EntryId, HostNo, PAGE_SIZE, PageBytes};
use wire::Remote;

use super::waits::{Action, Waiter, Waits};
use crate::unpack::{Arrived, LiteralRun};

/// A counted pointer to the bytes of a frame.
pub trait Body: Clone {
    /// The bytes.
    fn bytes(&self) -> &[u8];
}

impl<T: Deref<Target = [u8]>> Body for Arc<T> {
    fn bytes(&self) -> &[u8] {
        self
    }
}

/// What is known of an entry that somebody asks for.
#[derive(Debug)]
pub enum Lookup<B> {
    /// Its bytes are in this body, at this offset.
    Here(B, usize),
    /// It was put there, and may have changed since: to be read, and checked by the id.
    Placed(ContentId, Place),
    /// It will be said to have come, or not to come.
    Coming,
    /// It is to be asked for at the source.
    Missing,
}

/// What follows from contents that came.
#[derive(Debug)]
pub struct Came<B> {
    /// For those who wait here.
    pub arrived: BTreeMap<Waiter, Vec<Arrived<B>>>,
    /// For other target hosts: the entry, and where its bytes are in the body.
    pub send: Vec<(HostNo, EntryId, usize)>,
    /// What else is to be done.
    pub actions: Vec<Action>,
}

/// What can be done about a pull.
#[derive(Debug)]
pub struct Pulled<B> {
    /// To be sent.
    pub here: Vec<(EntryId, B, usize)>,
    /// To be read, checked by the id and sent; or, if it has changed, said to be missing.
    pub placed: Vec<(EntryId, ContentId, Place)>,
    /// What else is to be done. What is in none of the three is parked.
    pub actions: Vec<Action>,
}

/// The store of one group and trust domain at one target host.
///
/// Bytes that other target hosts sent are used only if they hash to the id that this host's own
/// source gave for the entry; so are bytes that another source brought, when they are named with
/// an id. Nothing of what others say is believed.
pub struct Store<B> {
    key: ContentKey,
    waits: Waits,
    /// What sources of this host brought.
    own: Shelf<B>,
    /// What other target hosts brought.
    pushed: Shelf<B>,
    places: Places,
    /// Entries that came unasked, at some time: a push is not waited for twice.
    came_unasked: HashSet<EntryId>,
}

/// Most entries that are remembered to have come: 8 MiB of memory. Beyond it a content that was
/// pushed and has gone again is waited for in vain, and asked for later.
const MAX_CAME: usize = 1 << 20;

impl<B: Body> Store<B> {
    /// An empty store of the target host `me`, whose shelves keep `max_bytes` each.
    #[must_use]
    pub fn new(me: HostNo, key: ContentKey, max_bytes: usize) -> Self {
        Self {
            key,
            waits: Waits::new(me),
            own: Shelf::with_limit(max_bytes),
            pushed: Shelf::with_limit(max_bytes),
            places: Places::default(),
            came_unasked: HashSet::new(),
        }
    }

    /// Looks `count` entries from `first` on up for a VM; appends a [`Lookup`] for each.
    pub fn find(
        &mut self,
        waiter: Waiter,
        (first, count): (EntryId, u32),
        remote: Option<&Remote<'_>>,
        now: Duration,
        (lookups, actions): (&mut Vec<Lookup<B>>, &mut Vec<Action>),
    ) {
        for index in 0..count {
            let entry = first.plus(index);
            let stated = stated(remote, index);
            if let Some((id, _)) = stated {
                self.places.learn(entry, id);
            }
            let lookup = match self.shelved(entry, stated.is_some()) {
                Some((body, at)) => Lookup::Here(body, at),
                None => match self.places.find(entry) {
                    Some((id, place)) => Lookup::Placed(id, place),
                    None => self.wait(entry, stated, waiter, now, actions),
                },
            };
            lookups.push(lookup);
        }
    }

    /// An entry that was said to be [`Placed`](Lookup::Placed) is not there any more.
    pub fn not_there(
        &mut self,
        waiter: Waiter,
        (first, index): (EntryId, u32),
        remote: Option<&Remote<'_>>,
        now: Duration,
        actions: &mut Vec<Action>,
    ) -> Lookup<B> {
        let (entry, stated) = (first.plus(index), stated(remote, index));
        // It may have come in the meantime; then nobody says so again.
        match self.shelved(entry, true) {
            Some((body, at)) => Lookup::Here(body, at),
            // It was here and is not any more: nobody will bring it.
            None if remote.is_some_and(|remote| self.waits.is_own(remote.carrier)) => {
                Lookup::Missing
            }
            None => self.wait(entry, stated, waiter, now, actions),
        }
    }

    fn wait(
        &mut self,
        entry: EntryId,
        stated: Option<(ContentId, &Remote<'_>)>,
        waiter: Waiter,
        now: Duration,
        actions: &mut Vec<Action>,
    ) -> Lookup<B> {
        let comes = match stated {
            Some((id, remote)) => {
                let from = self.from(entry, remote);
                self.waits
                    .want((entry, id), from, Some(waiter), now, actions)
            }
            None => self.waits.joins(entry, None, Some(waiter)),
        };
        if comes {
            Lookup::Coming
        } else {
            Lookup::Missing
        }
    }

    /// Who brings an entry, and whether unasked. What came unasked and did not stay is asked for.
    fn from(&self, entry: EntryId, remote: &Remote<'_>) -> (HostNo, bool) {
        let is_pushed = remote.pushed && !self.came_unasked.contains(&entry);
        (remote.carrier, is_pushed)
    }

    /// The entry's bytes on a shelf, if they can be believed. With `by_id` what a source of this
    /// host brought is checked too, because another one has named it.
    fn shelved(&self, entry: EntryId, by_id: bool) -> Option<(B, usize)> {
        let id = self.places.id(entry);
        let is_good = |body: &B, at| id.is_some_and(|id| self.hashes_to(body, at, id));
        if let Some(page) = self.own.find(entry)
            && (!by_id || id.is_none() || is_good(page.body, page.offset))
        {
            return Some((page.body.clone(), page.offset));
        }
        let page = self.pushed.find(entry)?;
        is_good(page.body, page.offset).then(|| (page.body.clone(), page.offset))
    }

    fn hashes_to(&self, body: &B, at: usize, id: ContentId) -> bool {
        page_of(body.bytes(), at).is_some_and(|page| self.key.id_of(page) == id)
    }

    /// A source of this host names contents that others bring. What is not here is asked for
    /// before a VM's thread gets to it.
    pub fn named(&mut self, remote: &Remote<'_>, now: Duration) -> Vec<Action> {
        let mut actions = Vec::new();
        for (entry, id) in remote.contents() {
            self.places.learn(entry, id);
            if self.shelved(entry, true).is_none() && self.places.find(entry).is_none() {
                let from = self.from(entry, remote);
                self.waits.want((entry, id), from, None, now, &mut actions);
            }
        }
        actions
    }

    /// A source of this host brought literals.
    pub fn brought(&mut self, runs: &[LiteralRun], body: &B, now: Duration) -> Came<B> {
        self.waits.heard_sources(now);
        let of_rack = || runs.iter().filter(|run| !run.first.is_local());
        let shelved = of_rack().map(|run| (run.first, run.count, run.at));
        self.own.push(shelved, body, body.bytes().len());
        let each = of_rack().flat_map(|run| run.contents());
        let mut came = self.came(each, body);
        // Who has asked for it already gets it once.
        let asked: HashSet<_> = came
            .send
            .iter()
            .map(|(to, entry, _)| (*to, *entry))
            .collect();
        for run in of_rack() {
            for host in run.forward.iter() {
                let contents = run.contents().map(|(entry, at)| (host, entry, at));
                let unasked = contents.filter(|(to, entry, _)| !asked.contains(&(*to, *entry)));
                came.send.extend(unasked);
            }
        }
        came
    }

    /// Another target host brought entries, whose pages follow each other from `at` on.
    pub fn pushed(
        &mut self,
        from: HostNo,
        (entries, at): (&[EntryId], usize),
        body: &B,
        now: Duration,
    ) -> Came<B> {
        self.waits.heard(from, now);
        let offsets = (0..).map(|index| at + index * PAGE_SIZE);
        let contents = entries.iter().copied().zip(offsets);
        let runs = contents.clone().map(|(entry, at)| (entry, 1, at));
        self.pushed.push(runs, body, body.bytes().len());
        if self.came_unasked.len() + entries.len() <= MAX_CAME {
            self.came_unasked.extend(entries);
        }
        self.came(contents, body)
    }

    fn came(&mut self, contents: impl Iterator<Item = (EntryId, usize)>, body: &B) -> Came<B> {
        let mut came = Came {
            arrived: BTreeMap::new(),
            send: Vec::new(),
            actions: Vec::new(),
        };
        if self.waits.is_idle() {
            return came;
        }
        for (entry, at) in contents {
            if let Some(id) = self.waits.wanted(entry) {
                if self.hashes_to(body, at, id) {
                    for waiter in self.waits.came(entry) {
                        let body = body.clone();
                        let arrived = came.arrived.entry(waiter).or_default();
                        arrived.push(Arrived { entry, body, at });
                    }
                } else {
                    self.waits.came_wrong(entry, &mut came.actions);
                }
            }
            let owed = self.waits.owed(entry);
            came.send.extend(owed.into_iter().map(|to| (to, entry, at)));
        }
        came
    }

    /// Another target host asks for entries.
    pub fn pulled(&mut self, from: HostNo, entries: &[EntryId], now: Duration) -> Pulled<B> {
        let mut pulled = Pulled {
            here: Vec::new(),
            placed: Vec::new(),
            actions: Vec::new(),
        };
        for entry in entries.iter().copied() {
            // What others pushed here is theirs to serve.
            if let Some(page) = self.own.find(entry) {
                pulled.here.push((entry, page.body.clone(), page.offset));
            } else if let Some((id, place)) = self.places.find(entry) {
                pulled.placed.push((entry, id, place));
            } else {
                self.waits.park(from, entry, now, &mut pulled.actions);
            }
        }
        pulled
    }

    /// Another target host does not have what it was asked for.
    pub fn missing(&mut self, at: HostNo, entries: &[EntryId]) -> Vec<Action> {
        let mut actions = Vec::new();
        for entry in entries {
            self.waits.missing(at, *entry, &mut actions);
        }
        actions
    }

    /// Remembers where a content is now; without an id if it is one that is known already.
    pub fn place(&mut self, entry: EntryId, id: Option<ContentId>, place: Place) {
        if let Some(id) = id.or_else(|| self.places.id(entry)) {
            self.places.put(entry, id, place);
            self.pushed.mark_used(entry);
        }
    }

    /// A connection with another target host is gone.
    pub fn host_gone(&mut self, host: HostNo, now: Duration) -> Vec<Action> {
        let mut actions = Vec::new();
        self.waits.host_gone(host, now, &mut actions);
        actions
    }

    /// A VM does not wait any more.
    pub fn waiter_gone(&mut self, waiter: Waiter) {
        self.waits.waiter_gone(waiter);
    }

    /// A stopped guest waits for these and for nothing else.
    pub fn hurry(&mut self, entries: impl Iterator<Item = EntryId>, now: Duration) {
        self.waits.hurry(entries, now);
    }

    /// Time passes.
    pub fn tick(&mut self, now: Duration) -> Vec<Action> {
        let mut actions = Vec::new();
        if !self.waits.is_idle() {
            self.waits.tick(now, &mut actions);
        }
        actions
    }

    /// Whether nobody waits, here or elsewhere.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.waits.is_idle()
    }
}

/// The id that the source gave for the entry at this place of a run.
fn stated<'a, 'b>(
    remote: Option<&'a Remote<'b>>,
    index: u32,
) -> Option<(ContentId, &'a Remote<'b>)> {
    let remote = remote?;
    let id = remote.ids.get(index as usize)?;
    Some((ContentId(*id), remote))
}

fn page_of(body: &[u8], at: usize) -> Option<&PageBytes> {
    body.get(at..at + PAGE_SIZE)?.try_into().ok()
}
