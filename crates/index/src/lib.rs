//! The rack index: which page contents a group has, which target hosts need them, and which
//! host carries each across the core link (IRLM sections 2.4 and 2.5).
//!
//! Participants: source agents, each a [`Client`] (or [`Shards`] of them), and one [`Server`]
//! for each of their connections, over the [`Groups`] of an index process. Goals: a content
//! crosses the core link once for the group; the table is bounded, small and quick. Non-goals:
//! page bytes, sockets, clocks, surviving its own end: without the index, or with wrong answers
//! from it, the same pages arrive for more bytes.
//!
//! ```text
//! source agent A                     index                     source agent B
//!      │ ── Register(target 0, x) ────► │ ◄── Register(target 1, x) ── │   preparation
//!      │ ── Claim(target 0, x) ───────► │                              │   migration
//!      │ ◄── Carry(entry, hosts {1}) ── │                              │
//!      │                                │ ◄── Claim(target 1, x) ───── │
//!      │                                │ ─── At(entry, 0, pushed) ──► │
//!      │ ── Carried(entry) ───────────► │                              │
//! ```
//! Target host 0 gets the bytes and forwards them to target host 1.

mod client;
mod entries;
mod groups;
mod server;
mod sets;
mod shards;
mod table;

pub use client::{Client, ClientError, Ticket};
pub use groups::{Groups, GroupsError, LEASE, MAX_TABLES};
pub use server::{Server, ServerError};
pub use shards::{Shards, shard_of};
pub use table::{ClientNo, MAX_ENTRIES, Table};
pub use wire::index::{Answer, EntryRun, Item, Summary, TableKey, Verdict};
