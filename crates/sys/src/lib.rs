//! What Gangway asks of the kernel: other processes, their memory, their page tables, shared memory,
//! sockets that carry descriptors.
//!
//! Thin and safe wrappers, one module for each subject. This crate and the shim are the only
//! places with `unsafe`; every block says why it is sound. No protocol, no QEMU, no policy.

mod memfd;
mod memory;
mod pagemap;
mod process;
mod schedule;
mod seqpacket;
mod userfault;

pub use memfd::{Mapping, Memfd};
pub use memory::ProcessMemory;
pub use pagemap::{Pagemap, PagemapEntry, zero_frame};
pub use process::{Process, own_session, peer_pid};
pub use schedule::{set_idle_priority, set_low_priority, thread_cpu_time};
pub use seqpacket::{SeqPacket, SeqPacketListener};
pub use userfault::userfaultfd_usable;
