//! Everything that Gangway's processes say to each other on the bulk and index channels.
//! The index channel has a page of its own: [`index`].
//!
//! Participants: the source agent and the target agent of a session. A *session* carries all
//! moves of one group and trust domain between one source host and one target host, so that a
//! page content crosses once for all of them. It is three kinds of connection, all opened by
//! the source agent to the target's bulk listener, each opened by one [`Hello`]:
//!
//! ```text
//!  source agent                                                target agent
//!      │ ── forward: Pages, Repair, Heartbeat ─────────────────────► │   one for the session
//!      │ ── lane: more of forward ─────────────────────────────────► │   if the session has several VMs
//!      │ ◄─ back: Ack, ReturnPath, RepairRequest, Load*, Heartbeat ─ │   one for the session
//!      │ ◄─ control: one request, one reply, JSON ─────────────────► │   one for each move
//! ```
//!
//! With scope `rack` the target agents of a group talk to each other too, and the source agents to
//! the index (IRLM section 2):
//!
//! ```text
//!  target agent ── peer: Contents, Pull, Missing, Heartbeat ──────► target agent   one each way
//!  source agent ◄─ index: claims and answers ─────────────────────► index          one a shard
//! ```
//!
//! Each direction of the bulk path has a connection of its own, so that one thread at each end
//! owns it (and its TLS state) without a lock. Control is apart, so that a release or an abort
//! never queues behind page bytes. Lanes take frames when the forward connection is full; the target takes all
//! frames in the order of their numbers.
//!
//! Goals: run-length coded page operations, page bytes never copied by a codec, every length
//! checked against a named limit before it is believed. Non-goals: sockets, clocks,
//! compression (the agent's), policy (the machines' in `migrate`).
//!
//! Fixed headers are little-endian [`FrameHeader`]s; small integers inside bodies are LEB128.

mod control;
mod entries;
mod frame;
pub mod index;
mod ops;
mod varint;

pub use control::{
    Channel, ControlReply, ControlRequest, Hello, MoveState, OpenMove, RackHello, WireCompression,
    decode_control, encode_control,
};
pub use entries::{MAX_ENTRIES, decode_contents, decode_entries, encode_entries};
pub use frame::{
    BackMessage, FaultTimes, FrameHeader, FrameKind, HEADER_LEN, MAX_BODY, MAX_CONTROL,
    MAX_RETURN_MESSAGE, Reached, WireError,
};
pub use ops::{
    MAX_OPS, Op, OpReader, OpWriter, PagesBody, Remote, RemoteContent, split_pages_body,
};

/// Version of this protocol. A peer of another version is refused at `Hello`.
///
/// | version | change |
/// |---|---|
/// | 1 | first: pre-copy, scopes none and host, compression none and zstd |
/// | 2 | scope rack: remote references, forwards and pulls between target hosts, the index |
/// | 3 | sharing: pages that share their frames, how many were mapped, a note about what cannot be, files that pages map |
/// | 4 | post-copy: packages, urgent pages, the switch, how long faults took |
/// | 5 | post-copy with scope rack: waits are hurried before a switch; an interrupted post-copy goes on: what its QEMUs say to each other, as it is |
pub const PROTOCOL_VERSION: u16 = 5;

/// First bytes of every connection, before the JSON of [`Hello`]: tells a stray client apart.
pub const MAGIC: [u8; 4] = *b"GWAY";
