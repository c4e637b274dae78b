//! The index channel: what agents ask the rack index, and what it answers.
//!
//! Participants: the *client*, an agent that prepares or migrates VMs of a group, and the
//! *server*, the rack index of the source rack (IRLM sections 2.4 and 2.5). Goals: batches, so
//! that a round trip is paid once for thousands of pages; no page bytes, ever. Non-goals:
//! authentication (TLS), and keeping the index right: a wrong answer costs bytes, not content.
//!
//! After the connection's `Hello` both directions carry frames: an 8-byte header, then a body.
//! The client speaks first; the server answers in the order of the requests. One connection is
//! about one table: that of one group and trust domain.
//!
//! | number | request | answer |
//! |---|---|---|
//! | 1 | `Join`: the group and domain that everything after is about | 33 `Welcome` |
//! | 2 | `Register`: contents that VMs of a target host contain | 34 `Entries` |
//! | 3 | `Withdraw`: forget what was registered for a target host | none |
//! | 4 | `Claim`: may I carry these contents? | 35 `Verdicts` |
//! | 5 | `Carried`: these entries have reached their carrier | none |
//! | 6 | `Lost`: this carrier does not have these entries | none |
//! | 7 | `CarrierGone`: this target host has nothing any more | none |
//! | 8 | `Seed`: contents that a target host has without having been sent them | 34 `Entries` |
//! | 9 | `Summary` | 36 `Summary` |
//! | 10 | `EndGroup`: the group is done, forget it | none |
//! | 11 | `Shared`: which of these contents do other target hosts need? | 34 `Entries` |
//!
//! 0 is invalid; 12..=32 are free for requests, 37.. for answers.
//!
//! Ledger: version 1 has all of the above.
//!
//! Integers in bodies are LEB128, content ids 16 bytes. Entries are coded as runs: the run's
//! length, then the distance of its start from the end of the run before (zigzag).

mod frames;
mod reply;
mod request;
mod runs;

pub use frames::{FrameBuffer, INDEX_HEADER_LEN, IndexHeader, MAX_INDEX_BODY};
pub use reply::{Answer, Summary, Verdict};
pub use request::{Item, MAX_GROUP_NAME, MAX_IDS, Request, TableKey};
pub use runs::{EntryRun, MAX_RUN_ENTRIES, MAX_RUNS, join_runs};

#[cfg(test)]
mod tests;
