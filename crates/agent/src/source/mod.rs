//! The source role: sessions to target agents, and the moves that go out over them.
//!
//! ```text
//!  QEMU ─unix─► reader (one a VM: decode, hash) ─► outbox ─► sender (one a session: compress,
//!    ▲                                                        encrypt, write) ═► target agent
//!    └── return path ◄── receiver (one a session) ◄═════════════════════════════ target agent
//!  QMP ◄─► mover (one a VM: the hand-over machine) ◄─► control connection ═════► target agent
//! ```

mod control;
mod home;
mod outbox;
mod progress;
mod reader;
mod run;
mod session;
mod stream;

pub(crate) use run::{Entry, Input, MoveContext, MoveRun};
pub(crate) use session::{SessionContext, Sessions, compress, compressor};
