//! What a target host does with what came: looks contents up, maps pages, remembers where they are.

use std::sync::Arc;
use std::time::Duration;

use content::{Place, Recent};
use migrate::exchange::{Action, Lookup, Store, Waiter};
use migrate::unpack::{Batch, Contents, Found, Segment};
use page::{ContentId, ContentKey, EntryId, PAGE_SIZE, PageBytes};
use wire::Remote;

use crate::faults::Faults;
use crate::guest::{content_of, is_fill};
use crate::host::{Body, Host};
use crate::rng::Rng;
use crate::target::TargetQemu;

/// Maps the pages that are to be mapped, but for some; returns how many are.
pub(crate) fn map(
    host: &mut Host,
    vm: usize,
    (batch, own): (&mut Batch<Body>, &[u8]),
    (key, rng, unmappable): (&ContentKey, &mut Rng, usize),
) -> u64 {
    if batch.shared.is_empty() {
        return 0;
    }
    let (m, target) = (&mut host.moves[vm], &mut host.targets[vm]);
    if m.unpacker.maps_after().is_some() {
        // It is waited for: QEMU empties its memory before.
        while target.pongs.is_empty() {
            assert!(target.unread() > 0, "the ping is not written");
            target.load(target.unread(), &m.source);
        }
    }
    let mut is_mapped = Vec::new();
    for shared in &batch.shared {
        let bytes = match &shared.bytes {
            Segment::Head(_) => panic!("no page"),
            Segment::Own(at) => &own[*at..][..PAGE_SIZE],
            Segment::Held(body, at) => &body[*at..][..PAGE_SIZE],
            Segment::Scratch(at) => &batch.scratch[*at..][..PAGE_SIZE],
        };
        let bytes: &PageBytes = bytes.try_into().unwrap();
        let row = host.moves[vm].source.layout.row(shared.block, shared.page);
        is_mapped.push(!rng.chance(unmappable));
        if is_mapped.last() == Some(&true) {
            host.targets[vm].map(row, content_of(bytes), &host.moves[vm].source);
        }
        let Some(entry) = shared.entry else { continue };
        let (block, page) = (shared.block, shared.page);
        place(
            host,
            entry,
            Some(key.id_of(bytes)),
            Place {
                vm: u16::try_from(vm).unwrap(),
                block,
                page,
            },
        );
    }
    host.moves[vm].unpacker.shared_done(&is_mapped, batch);
    is_mapped.iter().filter(|is_mapped| **is_mapped).count() as u64
}

/// Checks the pages that may be mapped when QEMU places them, and counts them.
pub(crate) fn expect(host: &Host, vm: usize, batch: &Batch<Body>, own: &[u8]) -> u64 {
    let m = &host.moves[vm];
    for expected in &batch.expected {
        assert!(m.unpacker.has_switched());
        let given = batch.given.contains(&(expected.block, expected.page));
        assert!(given, "QEMU does not get {expected:?}");
        let bytes = match &batch.segments[expected.segment] {
            Segment::Head(_) => panic!("no page"),
            Segment::Own(at) => &own[*at..][..PAGE_SIZE],
            Segment::Held(body, at) => &body[*at..][..PAGE_SIZE],
            Segment::Scratch(at) => &batch.scratch[*at..][..PAGE_SIZE],
        };
        let row = m.source.layout.row(expected.block, expected.page);
        assert_eq!(content_of(bytes.try_into().unwrap()), m.source.read(row));
        assert!(expected.entry.is_none() || !is_fill(m.source.read(row)));
    }
    batch.expected.len() as u64
}

pub(crate) fn remember(
    host: &mut Host,
    vm: usize,
    batch: &Batch<Body>,
    body: &[u8],
    key: &ContentKey,
) {
    for placed in &batch.placed {
        let id = placed
            .literal_at
            .map(|at| key.id_of(body[at..][..PAGE_SIZE].try_into().unwrap()));
        let at = Place {
            vm: u16::try_from(vm).unwrap(),
            block: placed.block,
            page: placed.page,
        };
        place(host, placed.entry, id, at);
    }
}

pub(crate) fn place(host: &mut Host, entry: EntryId, id: Option<ContentId>, at: Place) {
    if !entry.is_local() {
        host.store.place(entry, id, at);
    } else if let Some(id) = id.or_else(|| host.places.id(entry)) {
        host.places.put(entry, id, at);
    }
}

pub(crate) fn read_checked(
    target: &TargetQemu,
    key: &ContentKey,
    (id, place): (ContentId, Place),
    faults: Faults,
    rng: &mut Rng,
) -> Option<PageBytes> {
    let mut bytes = target.read(place.block, place.page);
    if rng.chance(faults.changed) {
        bytes[rng.below(PAGE_SIZE)] ^= 1;
    }
    (key.id_of(&bytes) == id).then_some(bytes)
}

/// What a target host has, for one VM's thread.
pub(crate) struct TargetContents<'a> {
    pub(crate) recent: &'a Recent<Body>,
    pub(crate) places: &'a content::Places,
    pub(crate) store: &'a mut Store<Body>,
    pub(crate) targets: &'a [TargetQemu],
    pub(crate) waiter: Waiter,
    pub(crate) key: &'a ContentKey,
    pub(crate) now: Duration,
    pub(crate) faults: Faults,
    pub(crate) rng: &'a mut Rng,
    pub(crate) actions: &'a mut Vec<Action>,
}

impl TargetContents<'_> {
    fn placed(
        &mut self,
        id: ContentId,
        place: Place,
        scratch: &mut Vec<u8>,
    ) -> Option<Found<Body>> {
        let target = &self.targets[usize::from(place.vm)];
        let bytes = read_checked(target, self.key, (id, place), self.faults, self.rng)?;
        scratch.extend_from_slice(&bytes);
        Some(Found::Scratch(scratch.len() - PAGE_SIZE))
    }

    fn of_session(&mut self, entry: EntryId, scratch: &mut Vec<u8>) -> Found<Body> {
        if let Some(page) = self.recent.find(entry) {
            return Found::Held(Arc::clone(page.body), page.offset);
        }
        let placed = self.places.find(entry);
        placed
            .and_then(|(id, place)| self.placed(id, place, scratch))
            .unwrap_or(Found::Missing)
    }
}

impl Contents<Body> for TargetContents<'_> {
    fn find(
        &mut self,
        (first, count): (EntryId, u32),
        remote: Option<&Remote<'_>>,
        scratch: &mut Vec<u8>,
        found: &mut Vec<Found<Body>>,
    ) {
        if first.is_local() {
            let entries = (0..count).map(|index| first.plus(index));
            found.extend(entries.map(|entry| self.of_session(entry, scratch)));
            return;
        }
        let mut lookups = Vec::new();
        let (waiter, now) = (self.waiter, self.now);
        let out = (&mut lookups, &mut *self.actions);
        self.store.find(waiter, (first, count), remote, now, out);
        for (lookup, index) in lookups.into_iter().zip(0..) {
            let lookup = match lookup {
                Lookup::Placed(id, place) => match self.placed(id, place, scratch) {
                    Some(one) => {
                        found.push(one);
                        continue;
                    }
                    None => {
                        let entry = (first, index);
                        let actions = &mut *self.actions;
                        self.store.not_there(waiter, entry, remote, now, actions)
                    }
                },
                other => other,
            };
            found.push(match lookup {
                Lookup::Here(body, at) => Found::Held(body, at),
                Lookup::Coming => Found::Coming,
                Lookup::Missing => Found::Missing,
                Lookup::Placed(..) => unreachable!("it is not there"),
            });
        }
    }
}
