//! Where the target finds contents: newest frames first, then the guests' own memory; those of
//! the rack in the store that the group's target hosts share.

use std::sync::Arc;

use content::Place;
use migrate::unpack::{Contents, Found};
use page::{ContentId, EntryId, PAGE_SIZE};
use wire::Remote;

use crate::link::Buffer;

use super::pool::HostPool;
use super::session::{TargetSession, lock};

/// The contents of a session, for one of its VMs.
pub(crate) struct SessionContents<'a> {
    pub(crate) session: &'a TargetSession,
    pub(crate) vm: u16,
    /// What the VMs of this host share, if this VM shares.
    pub(crate) pool: Option<&'a HostPool>,
}

impl Contents<Arc<Buffer>> for SessionContents<'_> {
    fn find(
        &mut self,
        (first, count): (EntryId, u32),
        remote: Option<&Remote<'_>>,
        scratch: &mut Vec<u8>,
        found: &mut Vec<Found<Arc<Buffer>>>,
    ) {
        if first.is_local() {
            return self.find_local((first, count), scratch, found);
        }
        if let Some((rack, number)) = self.session.member(self.vm) {
            rack.find(number, (first, count), remote, scratch, found);
        }
    }
}

impl SessionContents<'_> {
    fn find_local(
        &self,
        (first, count): (EntryId, u32),
        scratch: &mut Vec<u8>,
        found: &mut Vec<Found<Arc<Buffer>>>,
    ) {
        let start = found.len();
        let mut elsewhere = Vec::new();
        {
            let recent = lock(&self.session.recent);
            for index in 0..count {
                let entry = first.plus(index);
                match recent.find(entry) {
                    Some(page) => found.push(Found::Held(Arc::clone(page.body), page.offset)),
                    None => {
                        elsewhere.push((found.len(), entry));
                        found.push(Found::Missing);
                    }
                }
            }
        }
        if elsewhere.is_empty() {
            return;
        }
        debug_assert!(found.len() == start + count as usize);
        let mut wanted = Vec::with_capacity(elsewhere.len());
        {
            let places = lock(&self.session.places);
            elsewhere.retain(|(_, entry)| {
                let place = places.find(*entry);
                wanted.extend(place);
                place.is_some()
            });
        }
        if let Some(pool) = self.pool {
            read_pool(pool, &mut elsewhere, &mut wanted, (scratch, found));
        }
        let at = scratch.len();
        scratch.resize(at + wanted.len() * PAGE_SIZE, 0);
        let good = self.session.read_checked(&wanted, &mut scratch[at..]);
        for (((slot, _), good), index) in elsewhere.iter().zip(good).zip(0..) {
            if good {
                found[*slot] = Found::Scratch(at + index * PAGE_SIZE);
            }
        }
    }
}

/// Reads what is in the pool, and takes it off the lists. It was hashed before it got there.
fn read_pool(
    pool: &HostPool,
    elsewhere: &mut Vec<(usize, EntryId)>,
    wanted: &mut Vec<(ContentId, Place)>,
    (scratch, found): (&mut Vec<u8>, &mut [Found<Arc<Buffer>>]),
) {
    let mut left = Vec::new();
    for ((slot, entry), (id, place)) in elsewhere.drain(..).zip(wanted.drain(..)) {
        let at = scratch.len();
        scratch.resize(at + PAGE_SIZE, 0);
        if pool.read(id, &mut scratch[at..]) {
            found[slot] = Found::Scratch(at);
        } else {
            scratch.truncate(at);
            left.push(((slot, entry), (id, place)));
        }
    }
    (*elsewhere, *wanted) = left.into_iter().unzip();
}
