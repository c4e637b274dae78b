//! The target role: sessions from source agents, and the VMs that come in over them.
//!
//! ```text
//!  source agent ═► receiver (one a session: decrypt, unpack, keep what is new)
//!                     └─► sink (one a VM: resolve references, write) ─unix─► QEMU (stopped)
//!  source agent ◄═ answerer (one a session) ◄── return path (one a VM) ◄────────┘
//!  target agents ◄═► peers (one each way): contents of the rack, pulls, from and to the store
//!  source agent ◄═► control connection (one a VM: the hand-over machine) ◄─QMP─┘
//! ```

mod contents;
mod entry;
mod incoming;
mod ksm;
mod listener;
mod mapper;
mod peer;
mod pool;
mod pressure;
mod promises;
mod rack;
mod receiver;
mod relay;
mod resume;
mod returns;
mod session;
mod sink;
mod turns;

pub(crate) use incoming::{Arrivals, TargetContext};
pub(crate) use ksm::{KsmBoost, restore_leftover};
pub(crate) use listener::listen;
pub(crate) use mapper::FILL_ROW;
pub(crate) use pool::Pools;
pub(crate) use pressure::Pressure;
pub(crate) use rack::{RackStores, Seed, store_name};
pub(crate) use session::GuestMemory;
