//! The target's newest contents, held by the frames that brought them.

use std::collections::VecDeque;

use page::{EntryId, PAGE_SIZE};

/// Consecutive entries whose bytes stand one after another in a frame's body.
struct Run<B> {
    first: EntryId,
    count: u32,
    body: B,
    offset: usize,
    /// Bytes that the run keeps alive.
    held: usize,
}

/// A content that a frame holds.
pub struct RecentPage<'a, B> {
    /// The frame's body.
    pub body: &'a B,
    /// Where in it the page starts.
    pub offset: usize,
}

/// The newest contents by entry id. It shares the frames' bodies (`B` is a counted pointer)
/// and lets the oldest go beyond its limit, counted in what the bodies take, not in what is
/// wanted of them.
pub struct Recent<B> {
    runs: VecDeque<Run<B>>,
    held: usize,
    max_held: usize,
}

impl<B> Recent<B> {
    /// Keeps at most `max_bytes`.
    #[must_use]
    pub fn with_limit(max_bytes: usize) -> Self {
        Self {
            runs: VecDeque::new(),
            held: 0,
            max_held: max_bytes,
        }
    }

    /// Adds the contents of a frame whose body takes `body_len` bytes: runs of entries, each
    /// with its first entry, its length and the offset of its first page in the body. Entries
    /// come in ascending order in an honest session; a run that is out of order is not kept, and
    /// repaired if somebody asks for it.
    pub fn push(
        &mut self,
        runs: impl IntoIterator<Item = (EntryId, u32, usize)>,
        body: &B,
        body_len: usize,
    ) where
        B: Clone,
    {
        // The first run pays for the body.
        let mut held = body_len;
        for (first, count, offset) in runs {
            let in_order = self
                .runs
                .back()
                .is_none_or(|last| last.first.0.saturating_add(last.count) <= first.0);
            if !in_order || count == 0 {
                continue;
            }
            self.held += held;
            self.runs.push_back(Run {
                first,
                count,
                body: body.clone(),
                offset,
                held: std::mem::take(&mut held),
            });
        }
        while self.held > self.max_held
            && let Some(oldest) = self.runs.pop_front()
        {
            self.held -= oldest.held;
        }
    }

    /// The bytes of `entry`, if they are still here.
    #[must_use]
    pub fn find(&self, entry: EntryId) -> Option<RecentPage<'_, B>> {
        let after = self.runs.partition_point(|run| run.first <= entry);
        let run = self.runs.get(after.checked_sub(1)?)?;
        let index = entry.0 - run.first.0;
        (index < run.count).then(|| RecentPage {
            body: &run.body,
            offset: run.offset + index as usize * PAGE_SIZE,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_go_first_and_gaps_are_not_found() {
        let mut recent = Recent::with_limit(4 * PAGE_SIZE);
        recent.push([(EntryId(0), 2, 100)], &'a', 2 * PAGE_SIZE);
        recent.push(
            [(EntryId(5), 1, 0), (EntryId(6), 1, 9)],
            &'b',
            2 * PAGE_SIZE,
        );
        let found = recent.find(EntryId(1)).map(|p| (*p.body, p.offset));
        assert_eq!(found, Some(('a', 100 + PAGE_SIZE)));
        assert!(recent.find(EntryId(2)).is_none());
        recent.push([(EntryId(7), 1, 0)], &'c', PAGE_SIZE);
        assert!(recent.find(EntryId(1)).is_none());
        assert_eq!(recent.find(EntryId(6)).map(|p| *p.body), Some('b'));
        assert_eq!(recent.find(EntryId(7)).map(|p| *p.body), Some('c'));
    }

    #[test]
    fn a_large_body_with_one_content_counts_in_full() {
        let mut recent = Recent::with_limit(1 << 20);
        for n in 0..100 {
            recent.push([(EntryId(n), 1, 0)], &'x', 1 << 20);
        }
        assert_eq!(recent.runs.len(), 1);
    }

    #[test]
    fn entries_out_of_order_are_not_kept() {
        let mut recent = Recent::with_limit(100 * PAGE_SIZE);
        recent.push([(EntryId(9), 1, 0)], &'a', PAGE_SIZE);
        recent.push([(EntryId(3), 1, 0)], &'b', PAGE_SIZE);
        assert!(recent.find(EntryId(3)).is_none());
    }
}
