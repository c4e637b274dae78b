//! The source role: sessions to target agents, and the moves that go out over them.
//!
//! ```text
//!  QEMU ─unix─► reader (one a VM: decode, hash) ─► outbox ─► sender (one a session: compress,
//!    ▲                                                        encrypt, write) ═► target agent
//!    └── return path ◄── receiver (one a session) ◄═════════════════════════════ target agent
//!  with scope `rack`: reader ─► index link (one a group) ◄═► index, and a resolver (one a VM)
//!  between reader and outbox, which waits for its answers
//!  in post-copy: QEMU ─unix─► preempt (one a VM: pages that were asked for) ─► outbox, ahead of all
//!  QMP ◄─► mover (one a VM: the hand-over machine) ◄─► control connection ═════► target agent
//! ```

mod approach;
mod control;
mod convergence;
mod guest_memory;
mod home;
mod index_link;
mod kept;
mod lanes;
mod listening;
mod outbox;
mod preempt;
mod progress;
mod reader;
mod relay;
mod right_of_way;
mod run;
mod session;
mod shared;
mod stream;
mod urgent;
mod void;

pub(crate) use home::{guest_memory, shares_memory};
pub(crate) use index_link::{IndexKey, IndexLink, IndexLinks};
pub(crate) use listening::remove_leftovers;
pub(crate) use run::{Entry, Input, MoveContext, MoveRun};
pub(crate) use session::{SessionContext, Sessions};
pub(crate) use shared::RUNS_MAX;
