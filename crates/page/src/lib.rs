//! The vocabulary of Gangway: page numbers, runs of pages, content ids and fill detection.
//!
//! Pure data and arithmetic: no I/O, no unsafe, no async.

mod content_id;
mod fill;
mod host_no;
mod number;
mod sharing;

pub use content_id::{ContentId, ContentKey};
pub use fill::fill_byte;
pub use host_no::{HostNo, HostSet};
pub use number::{BlockIndex, ByteLen, EntryId, HostAddr, PAGE_SIZE, PageNo, PageRun};
pub use sharing::{FileRange, FrameSharing};

/// The bytes of one guest page.
pub type PageBytes = [u8; PAGE_SIZE];
