//! A target host's newest contents of the rack, held by the frames that brought them.

use std::collections::{BTreeMap, HashMap, VecDeque};

use page::{EntryId, PAGE_SIZE};

use crate::RecentPage;

/// So many numbers of bodies that are gone may be left, beside as many as there are bodies.
const GONE: usize = 64;

/// Consecutive entries whose bytes stand one after another in a frame's body.
struct Run<B> {
    count: u32,
    body: B,
    offset: usize,
    /// Of the body; tells the run apart from a later one with the same first entry.
    number: u64,
    is_used: bool,
}

/// What one body brought.
struct Brought {
    held: usize,
    firsts: Vec<EntryId>,
    /// Runs that nobody has used.
    unused: usize,
}

/// As [`Recent`](crate::Recent), for entries that come in any order: from several source hosts
/// and from other target hosts. Bodies whose contents have all been put into a guest's memory go
/// first when there is no room: they can be found there.
pub struct Shelf<B> {
    /// By first entry.
    runs: BTreeMap<EntryId, Run<B>>,
    bodies: HashMap<u64, Brought>,
    /// Bodies in the order of arrival, also those that are gone.
    arrived: VecDeque<u64>,
    /// Bodies that were used up, in that order, also those that are gone.
    used: VecDeque<u64>,
    next_number: u64,
    held: usize,
    max_held: usize,
}

impl<B: Clone> Shelf<B> {
    /// Keeps at most `max_bytes`, counted in what the bodies take.
    #[must_use]
    pub fn with_limit(max_bytes: usize) -> Self {
        Self {
            runs: BTreeMap::new(),
            bodies: HashMap::new(),
            arrived: VecDeque::new(),
            used: VecDeque::new(),
            next_number: 0,
            held: 0,
            max_held: max_bytes,
        }
    }

    /// Adds the contents of a body of `body_len` bytes: runs of entries, each with its first
    /// entry, its length and the offset of its first page. What is beyond the limit goes.
    pub fn push(
        &mut self,
        runs: impl IntoIterator<Item = (EntryId, u32, usize)>,
        body: &B,
        body_len: usize,
    ) {
        let number = self.next_number;
        let mut firsts = Vec::new();
        for (first, count, offset) in runs.into_iter().filter(|(_, count, _)| *count > 0) {
            let body = body.clone();
            let run = Run {
                count,
                body,
                offset,
                number,
                is_used: false,
            };
            self.runs.insert(first, run);
            firsts.push(first);
        }
        if firsts.is_empty() {
            return;
        }
        self.next_number += 1;
        self.held += body_len;
        let brought = Brought {
            held: body_len,
            unused: firsts.len(),
            firsts,
        };
        self.bodies.insert(number, brought);
        self.arrived.push_back(number);
        while self.held > self.max_held
            && let Some(number) = self.used.pop_front().or_else(|| self.arrived.pop_front())
        {
            self.drop_body(number);
        }
        // What was used up goes out of turn, and leaves its number behind.
        if self.arrived.len() > 2 * self.bodies.len() + GONE {
            let bodies = &self.bodies;
            self.arrived.retain(|number| bodies.contains_key(number));
        }
    }

    fn drop_body(&mut self, number: u64) {
        let Some(brought) = self.bodies.remove(&number) else {
            return;
        };
        self.held -= brought.held;
        for first in brought.firsts {
            if self
                .runs
                .get(&first)
                .is_some_and(|run| run.number == number)
            {
                self.runs.remove(&first);
            }
        }
    }

    /// The run that begins with `entry` was put into a guest's memory.
    pub fn mark_used(&mut self, entry: EntryId) {
        let run = self.runs.get_mut(&entry).filter(|run| !run.is_used);
        let Some(run) = run else { return };
        run.is_used = true;
        if let Some(body) = self.bodies.get_mut(&run.number) {
            body.unused -= 1;
            if body.unused == 0 {
                self.used.push_back(run.number);
            }
        }
    }

    /// The bytes of `entry`, if they are here.
    #[must_use]
    pub fn find(&self, entry: EntryId) -> Option<RecentPage<'_, B>> {
        let (first, run) = self.runs.range(..=entry).next_back()?;
        let index = entry.0 - first.0;
        (index < run.count).then(|| RecentPage {
            body: &run.body,
            offset: run.offset + index as usize * PAGE_SIZE,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(shelf: &Shelf<char>, entry: u32) -> Option<(char, usize)> {
        shelf.find(EntryId(entry)).map(|p| (*p.body, p.offset))
    }

    #[test]
    fn entries_come_in_any_order_and_the_oldest_body_goes_first() {
        let mut shelf = Shelf::with_limit(2 * PAGE_SIZE);
        shelf.push([(EntryId(9), 2, 100)], &'a', PAGE_SIZE);
        shelf.push([(EntryId(3), 1, 7)], &'b', PAGE_SIZE);
        assert_eq!(found(&shelf, 10), Some(('a', 100 + PAGE_SIZE)));
        assert_eq!(found(&shelf, 3), Some(('b', 7)));
        assert_eq!((found(&shelf, 4), found(&shelf, 11)), (None, None));
        shelf.push([(EntryId(1), 1, 0)], &'c', PAGE_SIZE);
        assert_eq!((found(&shelf, 9), found(&shelf, 10)), (None, None));
        assert_eq!(found(&shelf, 3), Some(('b', 7)));
    }

    #[test]
    fn what_was_used_up_goes_before_what_nobody_has_needed_yet() {
        let mut shelf = Shelf::with_limit(2 * PAGE_SIZE);
        shelf.push([(EntryId(1), 1, 0)], &'a', PAGE_SIZE);
        shelf.push([(EntryId(2), 1, 0)], &'b', PAGE_SIZE);
        shelf.mark_used(EntryId(2));
        shelf.mark_used(EntryId(2));
        shelf.push([(EntryId(3), 1, 0)], &'c', PAGE_SIZE);
        assert_eq!(found(&shelf, 2), None);
        assert_eq!(found(&shelf, 1), Some(('a', 0)));
        shelf.push([(EntryId(4), 1, 0)], &'d', PAGE_SIZE);
        assert_eq!(found(&shelf, 1), None);
        assert_eq!(found(&shelf, 3), Some(('c', 0)));
        assert_eq!(shelf.bodies.len(), 2);
    }

    #[test]
    fn bodies_that_went_out_of_turn_are_forgotten_though_an_older_one_stays() {
        let mut shelf = Shelf::with_limit(2 * PAGE_SIZE);
        shelf.push([(EntryId(0), 1, 0)], &'a', PAGE_SIZE);
        for entry in 1..1000 {
            shelf.push([(EntryId(entry), 1, 0)], &'b', PAGE_SIZE);
            shelf.mark_used(EntryId(entry));
        }
        assert_eq!(found(&shelf, 0), Some(('a', 0)));
        assert!(
            shelf.arrived.len() <= 2 * 3 + GONE,
            "{}",
            shelf.arrived.len()
        );
    }

    #[test]
    fn an_entry_that_came_again_stays_as_long_as_its_newest_body() {
        let mut shelf = Shelf::with_limit(2 * PAGE_SIZE);
        shelf.push([(EntryId(9), 1, 1)], &'a', PAGE_SIZE);
        shelf.push([(EntryId(9), 1, 2)], &'b', PAGE_SIZE);
        shelf.push([(EntryId(5), 1, 3)], &'c', PAGE_SIZE);
        assert_eq!(found(&shelf, 9), Some(('b', 2)));
    }
}
