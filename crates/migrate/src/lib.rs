//! The two roles of a migration as pure machines: bytes, messages and the time go in, actions
//! come out. No sockets, threads, clocks or QEMU commands.
//!
//! - [`handover`]: who may run the VM, decided in two steps, at both ends.
//! - [`pack`]: the source QEMU's stream becomes page operations.
//! - [`unpack`]: page operations become a stream for the target QEMU.
//! - [`exchange`]: what a target host waits for from the others, and owes to them.
//! - [`window`]: how far the source QEMU may be ahead of the target QEMU.

pub mod exchange;
pub mod handover;
pub mod pack;
pub mod unpack;
pub mod window;
