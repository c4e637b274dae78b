//! The target's newest contents, held by the frames that brought them.

use std::collections::VecDeque;

use page::{EntryId, PAGE_SIZE};

/// Consecutive entries whose bytes stand one after another in a frame's body.
struct Run<B> {
    first: EntryId,
    count: u32,
    body: B,
    offset: usize,
}

/// A content that a frame holds.
pub struct RecentPage<'a, B> {
    /// The frame's body.
    pub body: &'a B,
    /// Where in it the page starts.
    pub offset: usize,
}

/// The newest contents by entry id. It shares the frames' bodies (`B` is a counted pointer)
/// and lets the oldest go beyond its limit, counted in page bytes.
pub struct Recent<B> {
    runs: VecDeque<Run<B>>,
    pages: usize,
    max_pages: usize,
}

impl<B> Recent<B> {
    /// Keeps at most `max_bytes` of page bytes.
    #[must_use]
    pub fn with_limit(max_bytes: usize) -> Self {
        Self {
            runs: VecDeque::new(),
            pages: 0,
            max_pages: max_bytes / PAGE_SIZE,
        }
    }

    /// Adds `count` contents from `first` on. Entries come in ascending order in an honest
    /// session; one that is out of order is not kept, and repaired if somebody asks for it.
    pub fn push(&mut self, first: EntryId, count: u32, body: B, offset: usize) {
        let in_order = self
            .runs
            .back()
            .is_none_or(|last| last.first.0.saturating_add(last.count) <= first.0);
        if !in_order || count == 0 {
            return;
        }
        self.runs.push_back(Run {
            first,
            count,
            body,
            offset,
        });
        self.pages += count as usize;
        while self.pages > self.max_pages
            && let Some(oldest) = self.runs.pop_front()
        {
            self.pages -= oldest.count as usize;
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
        recent.push(EntryId(0), 2, 'a', 100);
        recent.push(EntryId(5), 2, 'b', 0);
        let found = recent.find(EntryId(1)).map(|p| (*p.body, p.offset));
        assert_eq!(found, Some(('a', 100 + PAGE_SIZE)));
        assert!(recent.find(EntryId(2)).is_none());
        recent.push(EntryId(7), 1, 'c', 0);
        assert!(recent.find(EntryId(1)).is_none());
        assert_eq!(recent.find(EntryId(6)).map(|p| *p.body), Some('b'));
        assert_eq!(recent.find(EntryId(7)).map(|p| *p.body), Some('c'));
    }

    #[test]
    fn entries_out_of_order_are_not_kept() {
        let mut recent = Recent::with_limit(100 * PAGE_SIZE);
        recent.push(EntryId(9), 1, 'a', 0);
        recent.push(EntryId(3), 1, 'b', 0);
        assert!(recent.find(EntryId(3)).is_none());
    }
}
