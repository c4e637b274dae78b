//! Where the target finds contents: newest frames first, then the guests' own memory.

use std::sync::Arc;

use migrate::unpack::{Contents, Found};
use page::{EntryId, PAGE_SIZE};

use crate::link::Buffer;

use super::session::{TargetSession, lock};

/// The contents of a session.
pub(crate) struct SessionContents<'a>(pub(crate) &'a TargetSession);

impl Contents<Arc<Buffer>> for SessionContents<'_> {
    fn find(
        &mut self,
        first: EntryId,
        count: u32,
        scratch: &mut Vec<u8>,
        found: &mut Vec<Found<Arc<Buffer>>>,
    ) {
        let start = found.len();
        let mut elsewhere = Vec::new();
        {
            let recent = lock(&self.0.recent);
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
            let places = lock(&self.0.places);
            elsewhere.retain(|(_, entry)| {
                let place = places.find(*entry);
                wanted.extend(place);
                place.is_some()
            });
        }
        let at = scratch.len();
        scratch.resize(at + wanted.len() * PAGE_SIZE, 0);
        let good = self.0.read_checked(&wanted, &mut scratch[at..]);
        for (((slot, _), good), index) in elsewhere.iter().zip(good).zip(0..) {
            if good {
                found[*slot] = Found::Scratch(at + index * PAGE_SIZE);
            }
        }
    }
}
