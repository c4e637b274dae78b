//! What an agent and the library preloaded into a target QEMU say to each other.
//!
//! Participants: the agent, which owns the pool of shared page contents, and `libgangway_cow.so`
//! in the target QEMU's process, which alone can change that process's memory map. The agent
//! listens on a unix socket of type `SOCK_SEQPACKET`, one for each VM; the library finds its path
//! in the environment variable [`SOCKET_ENV`] and connects. One packet is one message.
//!
//! ```text
//!  library (in QEMU)                                        agent
//!      │ ── Hello {version, pid, page size} ─────────────────► │
//!      │ ◄────────────────────────────────── Welcome {version} │   within WELCOME_MS_MAX
//!      │ ◄─────────── Block {index, name, address, length} ─── │   once for each block
//!      │ ── BlockAnswer ─────────────────────────────────────► │
//!      │ ◄─────────── Pool {inode} + descriptor (SCM_RIGHTS) ─ │   once
//!      │ ── PoolAnswer ──────────────────────────────────────► │
//!      │ ◄──────────────────────────────────── Map {runs} ──── │   any number, answered in order
//!      │ ── MapAnswer {an outcome for each run} ─────────────► │
//!      │ ◄───────────────────────────────── Expect {runs} ──── │   in post-copy, any number
//!      │ ── MapAnswer ───────────────────────────────────────► │
//!      │ ◄─────────────────────────────────────────── Settle ─ │   after a series of them
//!      │ ── Settled ─────────────────────────────────────────► │
//!      │ ◄──────────────────────────────────────────── Close ─ │
//!      │ ── Closed {statistics} ─────────────────────────────► │   then both close
//! ```
//!
//! Goals: the library allocates nothing and has no path that ends QEMU; every message is bounded.
//! Non-goals: page bytes (they lie in the pool), deciding what is mapped (the agent's).
//!
//! # What the agent must guarantee
//!
//! The library maps while QEMU's main thread may be loading the stream. It cannot know which page
//! that thread writes, so the order is the agent's:
//!
//! 1. The bytes are in the pool, and final, before the run is sent. They stay as they are as
//!    long as the run is mapped anywhere.
//! 2. Before a run is sent, QEMU has consumed every earlier record about these pages: a copy that
//!    is still on its way into QEMU could land before the mapping and be lost under it. A page
//!    for which nothing was forwarded yet needs no barrier; otherwise a `PING` in QEMU's stream
//!    is answered when all before it is loaded.
//! 3. A newer copy of a page is forwarded only after the answer about the run that contains it.
//!    QEMU's write then gives that page memory of its own.
//! 4. Every run is answered before device state is forwarded: devices read memory when they load.
//! 5. [`Outcome::Refused`] leaves the run's pages undefined: their bytes go into the stream.
//! 6. The socket of a process that forks itself into the background sees a connection from each
//!    of its generations. The one whose `Hello` has the pid of QEMU's monitor counts.
//!
//! # In post-copy
//!
//! QEMU must know of every page that it has, and places each with `UFFDIO_COPY` through libc. The library
//! stands before that call. For a page that the agent has announced (`Expect`) it compares QEMU's bytes
//! with the pool's, maps the page and wakes who waits for it (`UFFDIO_WAKE`), all before QEMU goes on; with
//! other bytes, or if the kernel has no mapping left, QEMU's copy happens. A page that was mapped
//! before, by a `Map` or by an earlier copy, is there already, and never copied over. The agent guarantees:
//!
//! 7. Rule 1 for runs of `Expect` from when it is sent: until the page is seen not to use the pool (it
//!    is present, and no file's), also if no answer came. What is announced stays so when the
//!    connection ends.
//! 8. A page is announced, and that is answered, before its record is written to QEMU.
//!
//! # Ledger
//!
//! | version | change |
//! |---|---|
//! | 1 | first: blocks, one pool, map, copy, settle, statistics |
//! | 2 | post-copy: expect, what became of copies |
//!
//! Kinds are numbered by hand ([`Kind`]); 0 is invalid, no gaps so far.

#![no_std]

mod agent;
mod library;
mod packet;

pub use agent::{BlockOffer, FromAgent, MapBatch, MapRun, MapRunBytes};
pub use library::{
    BlockAnswer, Features, FromLibrary, Hello, Outcome, OutcomeBytes, Outcomes, Refusal, Statistics,
};
pub use packet::{AbiError, HEADER_BYTES, Header, Kind};

/// Version of this protocol. Ends of different versions part at the handshake.
pub const VERSION: u16 = 2;

/// First bytes of `Hello` and `Welcome`: tells a stray client apart.
pub const MAGIC: [u8; 8] = *b"GWAYCOW\n";

/// Environment variable with the path of the agent's socket. Without it the library does nothing.
pub const SOCKET_ENV: &core::ffi::CStr = c"GANGWAY_COW_SOCKET";

/// File name of the library.
pub const LIBRARY_FILE: &str = "libgangway_cow.so";

/// Longest time that the agent waits for the library's part of the handshake once QEMU's monitor
/// answers, milliseconds. A QEMU that forks into the background takes tens of milliseconds; a host
/// that swaps, seconds.
pub const HANDSHAKE_MS_MAX: u32 = 10_000;

/// Longest time that the library waits for the agent's, milliseconds. It calls when its process begins,
/// and the agent looks when QEMU's monitor answers: with preallocated memory that may take a minute.
pub const WELCOME_MS_MAX: u32 = 60_000 + HANDSHAKE_MS_MAX;

/// Most runs in one `Map`. At the 2 us that the kernel takes for a run, a batch takes 2 ms: short
/// enough to be answered between two looks at the clock, long enough to hide the socket's cost.
pub const RUNS_MAX: usize = 1024;

/// Most blocks. x86 guests have one for main memory, one for each DIMM (at most 256, in practice
/// a few), and small ones for video memory and firmware, which are not worth mapping.
pub const BLOCKS_MAX: usize = 64;

/// Longest name of a block: QEMU's `idstr` has 256 bytes with its NUL.
pub const NAME_BYTES_MAX: usize = 255;

/// Longest packet: a `Map` with [`RUNS_MAX`] runs of 24 bytes, its header, and its count.
pub const PACKET_BYTES_MAX: usize = HEADER_BYTES + 8 + RUNS_MAX * 24;

/// Size of a page, for both ends. A library in a process with another one is refused.
pub const PAGE_BYTES: u64 = 4096;

/// Most pages of a block or of the pool: 16 TiB and 8 EiB of file offset are beyond any host, and
/// below them no multiplication with the page size overflows.
pub const BLOCK_PAGES_MAX: u64 = 1 << 32;
/// See [`BLOCK_PAGES_MAX`].
pub const POOL_PAGES_MAX: u64 = 1 << 50;
