//! Target role, between the hosts of the target rack: which contents this host waits for, and
//! which it owes to others (IRLM section 2.5: the target controller and its remote threads).
//!
//! Participants: the VMs' threads of this host, which want contents; the other target hosts,
//! which bring them or ask for them. Goal: every wait ends, by the content or by giving up, after
//! which the page is read again from the source. Non-goal: where bytes are; the caller finds,
//! checks and sends them.
//!
//! ```text
//!              want ─► expected (the carrier pushes it) ──── late ───► pulled ──┐
//!                └───► pulled (the carrier is asked) ────────────────────┤      │
//!                                                                 came ◄─┴──────┴─► given up:
//!                                                 late, missing there, carrier gone, wrong bytes
//! ```
//!
//! A pull for what is not here yet is parked until it comes: the asker learned of the entry from
//! the index, which may be faster than the bytes.

mod store;
mod waits;

pub use store::{Body, Came, Lookup, Pulled, Store};
pub use waits::{Action, Waiter};
