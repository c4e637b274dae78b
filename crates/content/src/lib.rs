//! What each end of a session remembers of page contents.
//!
//! - [`HostTable`], source: content id to entry id. It says whether a content has gone to the
//!   target host already (IRLM section 2.3 keeps it in memory shared by a host's VMs).
//! - [`Places`], target: entry id to the place in a VM's memory where that content was put
//!   last. The target keeps no second copy of guest memory: a content is read again from the
//!   VM that has it, and hashed again, because the guest's newer pages may have replaced it.
//! - [`Shelf`], target: the newest contents of the rack, from wherever they came.
//! - [`Recent`], target: the newest contents by entry id, while they may still be on their way
//!   into a QEMU. Bounded in bytes.
//! - [`Identical`], source: contents that are to share a page at the target.
//! - [`pool`], target: which shared contents lie where in the memory that VMs map copy-on-write
//!   (SLM section III-B).
//!
//! No network, no page I/O: callers read memory and hash.

mod host_table;
mod identical;
mod places;
pub mod pool;
mod recent;
mod shelf;

pub use host_table::{Claim, HostTable};
pub use identical::Identical;
pub use places::{Place, Places};
pub use recent::{Recent, RecentPage};
pub use shelf::Shelf;
