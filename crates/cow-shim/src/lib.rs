//! The library that is preloaded into a target QEMU and maps pages of the pool into its guest.
//!
//! Guest memory of a stock QEMU is plain anonymous memory of its process, and only that process
//! can put something else there. So this library listens to the agent (`cow_abi`) in a thread
//! of its own and maps pages of the host's pool copy-on-write over guest memory. It also stands
//! before two functions of libc whose meaning changes for such pages: `madvise` and `ioctl`.
//!
//! Goals: QEMU never ends, blocks or misbehaves because of this library. Whatever fails here, the
//! agent is told, or sees the socket close, and sends the pages plainly. Therefore:
//!
//! - Nothing can panic: no indexing, no unchecked arithmetic, no allocation. A test looks for the
//!   symbols that a panic would need. The lints below keep most of it out to begin with.
//! - Without the environment variable, or in a program that is no QEMU, nothing is done at all.
//! - No signal is handled in its thread, no lock is taken in a call of QEMU's unless something is
//!   mapped.
//!
//! Non-goals: deciding what is mapped, and keeping order with the stream: the agent's.
//!
//! | module | what it is |
//! |---|---|
//! | `start` | the beginning of the process, its forks, the thread |
//! | `server` | the agent's requests, in order |
//! | `registry` | what is mapped where; the kernel calls about it |
//! | `areas` | what memory lies at an address (`/proc/self/smaps`) |
//! | `interpose` | `madvise` and `ioctl` as QEMU calls them |
//! | `socket` | packets and descriptors |

#![deny(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::panic,
    clippy::unreachable,
    clippy::integer_division
)]
#![cfg_attr(
    test,
    allow(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::integer_division
    )
)]

mod areas;
#[expect(
    unreachable_pub,
    reason = "the loader finds these by name, Rust code does not"
)]
mod interpose;
mod registry;
mod server;
mod socket;
mod start;

/// Size of a page, as an address difference.
const PAGE: usize = 4096;

/// This thread's error number; 0 never.
fn errno() -> u16 {
    // SAFETY: libc returns the address of this thread's own variable.
    let number = unsafe { *libc::__errno_location() };
    u16::try_from(number).unwrap_or(0).max(1)
}

/// Error numbers are small and positive.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
const fn code(errno: libc::c_int) -> u16 {
    errno as u16
}
