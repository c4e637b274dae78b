//! The waiting list of one VM: pages whose content is not here yet, and what is complete in spite
//! of them.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, VecDeque};

use page::{BlockIndex, EntryId, FrameSharing, PageNo};
use wire::Reached;

/// Most ends of frames that are remembered while pages wait: an honest source's window holds a
/// few hundred frames.
const MAX_ENDS: usize = 1 << 14;

type PageKey = (BlockIndex, PageNo);

/// Which version of a block's pages a frame has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Version {
    pub(super) block: BlockIndex,
    /// Where the frame ends in the source QEMU's stream.
    pub(super) position: u64,
    /// How the pages share their frames at the source.
    pub(super) sharing: FrameSharing,
}

/// What a page waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Cause {
    /// This content.
    Entry(EntryId),
    /// The source was asked for the page.
    Repair,
    /// It is being mapped.
    Mapping,
}

/// A page that waits.
struct Wait {
    version: Version,
    cause: Cause,
}

#[derive(Default)]
pub(super) struct Waiting {
    pages: HashMap<PageKey, Wait>,
    /// Pages that waited for an entry at some time; which still do, `pages` says.
    by_entry: HashMap<EntryId, Vec<PageKey>>,
    /// How many pages wait for a version of a frame that ends there.
    by_position: BTreeMap<u64, u32>,
    /// Ends of frames that are not complete.
    ends: VecDeque<u64>,
    /// End of the newest frame.
    received: u64,
    /// What was said last.
    said: Reached,
}

impl Waiting {
    pub(super) fn len(&self) -> usize {
        self.pages.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// The page waits for this version, and for no older one.
    pub(super) fn wait(&mut self, version: Version, page: PageNo, cause: Cause) {
        let key = (version.block, page);
        self.replaced(key);
        self.pages.insert(key, Wait { version, cause });
        *self.by_position.entry(version.position).or_default() += 1;
        if let Cause::Entry(entry) = cause {
            self.by_entry.entry(entry).or_default().push(key);
        }
    }

    /// A newer version of the page came: it does not wait any more.
    pub(super) fn replaced(&mut self, key: PageKey) {
        if self.pages.is_empty() {
            return;
        }
        if let Some(wait) = self.pages.remove(&key) {
            self.counted_down(wait.version.position);
        }
    }

    /// The page was read again from memory that had everything up to `as_of`. False: it does not
    /// wait, or for a newer version.
    pub(super) fn repaired(&mut self, key: PageKey, as_of: u64) -> bool {
        let position = match self.pages.entry(key) {
            Entry::Occupied(wait) if wait.get().version.position <= as_of => {
                wait.remove().version.position
            }
            _ => return false,
        };
        self.counted_down(position);
        true
    }

    /// Whether the mapping of the page still counts, which has been tried: no newer version came.
    /// It does not wait any more then.
    pub(super) fn mapping_done(&mut self, key: PageKey) -> bool {
        let position = match self.pages.entry(key) {
            Entry::Occupied(wait) if wait.get().cause == Cause::Mapping => {
                wait.remove().version.position
            }
            _ => return false,
        };
        self.counted_down(position);
        true
    }

    /// The entry came: the pages that wait for it, which do not any more, and the versions.
    pub(super) fn take_for(&mut self, entry: EntryId) -> Vec<(Version, PageNo)> {
        let keys = self.by_entry.remove(&entry).unwrap_or_default();
        let take = |key: PageKey| {
            let version = match self.pages.entry(key) {
                Entry::Occupied(wait) if wait.get().cause == Cause::Entry(entry) => {
                    wait.remove().version
                }
                _ => return None,
            };
            self.counted_down(version.position);
            Some((version, key.1))
        };
        keys.into_iter().filter_map(take).collect()
    }

    /// The entry does not come: the pages that wait for it, which wait for a repair from now on.
    pub(super) fn give_up(&mut self, entry: EntryId) -> Vec<PageKey> {
        let mut keys = self.by_entry.remove(&entry).unwrap_or_default();
        keys.retain(|key| match self.pages.get_mut(key) {
            Some(wait) if wait.cause == Cause::Entry(entry) => {
                wait.cause = Cause::Repair;
                true
            }
            _ => false,
        });
        keys.sort_unstable();
        keys
    }

    /// What pages wait for.
    pub(super) fn entries(&self) -> impl Iterator<Item = EntryId> {
        self.pages.values().filter_map(|wait| match wait.cause {
            Cause::Entry(entry) => Some(entry),
            Cause::Repair | Cause::Mapping => None,
        })
    }

    /// A frame of the stream was applied.
    pub(super) fn frame_ends(&mut self, position: u64) {
        if self.ends.len() == MAX_ENDS {
            // The frames in front are then acknowledged together, later.
            self.ends.pop_front();
        }
        self.ends.push_back(position);
        self.received = position;
    }

    /// How far the stream is, if that was not said yet.
    pub(super) fn progress(&mut self) -> Option<Reached> {
        let first = self.by_position.keys().next().copied();
        let mut reached = self.said;
        reached.received = self.received;
        while let Some(end) = self.ends.front().copied()
            && first.is_none_or(|first| end < first)
        {
            self.ends.pop_front();
            reached.complete = end;
        }
        let is_new = reached != self.said;
        self.said = reached;
        is_new.then_some(reached)
    }

    fn counted_down(&mut self, position: u64) {
        if let Some(count) = self.by_position.get_mut(&position) {
            *count -= 1;
            if *count == 0 {
                self.by_position.remove(&position);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: BlockIndex = BlockIndex(0);

    /// What is newly complete.
    fn complete(waiting: &mut Waiting) -> Option<u64> {
        let before = waiting.said.complete;
        let reached = waiting.progress()?;
        (reached.complete > before).then_some(reached.complete)
    }

    fn version(position: u64) -> Version {
        Version {
            block: BLOCK,
            position,
            sharing: FrameSharing::No,
        }
    }

    #[test]
    fn what_is_complete_ends_before_the_first_page_that_waits() {
        let mut waiting = Waiting::default();
        waiting.frame_ends(10);
        waiting.wait(version(20), PageNo(1), Cause::Entry(EntryId(7)));
        waiting.frame_ends(20);
        waiting.wait(version(30), PageNo(2), Cause::Repair);
        waiting.frame_ends(30);
        waiting.frame_ends(40);
        assert_eq!(complete(&mut waiting), Some(10));
        assert_eq!(complete(&mut waiting), None);
        assert!(!waiting.repaired((BLOCK, PageNo(2)), 29), "read too early");
        assert!(waiting.repaired((BLOCK, PageNo(2)), 30));
        assert_eq!(complete(&mut waiting), None);
        assert_eq!(waiting.take_for(EntryId(7)), [(version(20), PageNo(1))]);
        assert_eq!(complete(&mut waiting), Some(40));
        assert!(waiting.is_empty());
    }

    #[test]
    fn a_newer_version_cancels_the_wait_for_an_older_content() {
        let mut waiting = Waiting::default();
        let key = (BLOCK, PageNo(1));
        waiting.wait(version(10), PageNo(1), Cause::Entry(EntryId(7)));
        waiting.wait(version(20), PageNo(1), Cause::Entry(EntryId(8)));
        assert_eq!(waiting.take_for(EntryId(7)), []);
        assert_eq!(waiting.give_up(EntryId(8)), [key]);
        assert_eq!(waiting.take_for(EntryId(8)), []);
        waiting.replaced(key);
        waiting.frame_ends(20);
        assert_eq!(complete(&mut waiting), Some(20));
    }

    #[test]
    fn a_newer_version_cancels_a_mapping_and_nothing_else_does() {
        let mut waiting = Waiting::default();
        let key = (BLOCK, PageNo(1));
        waiting.wait(version(10), PageNo(1), Cause::Mapping);
        waiting.frame_ends(10);
        assert_eq!(waiting.take_for(EntryId(7)), []);
        assert_eq!(complete(&mut waiting), None);
        assert!(waiting.mapping_done(key));
        assert_eq!(complete(&mut waiting), Some(10));
        waiting.wait(version(20), PageNo(1), Cause::Mapping);
        waiting.wait(version(30), PageNo(1), Cause::Repair);
        assert!(!waiting.mapping_done(key));
        assert_eq!(waiting.len(), 1);
    }
}
