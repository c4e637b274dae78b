//! The hand-over: at every instant at most one QEMU may run the VM, and whoever fails, the
//! agents that are left know which one.
//!
//! ```text
//!  source QEMU      source agent                     target agent       target QEMU
//!      │ stream ───────►│ ── pages ───────────────────────►│ ── stream ─────►│ (stopped)
//!      │ last byte      │                                  │◄── SHUT 0 ──────│ loaded
//!      │                │◄──────────── Loaded ─────────────│
//!      │◄── SHUT 0 ─────│  from here the source QEMU does not resume by itself
//!      │ completed ────►│  journal: releasing
//!      │                │ ── Release ─────────────────────►│ journal: released
//!      │                │                                  │ ── cont ───────►│ runs
//!      │                │◄──────────── Running ────────────│
//!      │◄── quit ───────│
//! ```
//!
//! Three facts carry the safety:
//! 1. The target QEMU is started stopped, and runs only after `Release`.
//! 2. `Release` is sent only when the source QEMU has *completed* its migration, which it
//!    leaves on `cont` alone, never by itself, whatever becomes of our processes.
//! 3. Once `Release` was sent (the journal says so before it is), the source says `cont` only
//!    if the target has answered that the VM never ran there and its QEMU is gone.
//!
//! In post-copy the same three facts hold, the second in another way: before its QEMU is told to go
//! over, the source guest is stopped by hand, and what was stopped by hand no failure of the
//! migration resumes. The VM is released when the target QEMU has the device state; its memory
//! follows, and `Loaded` completes the source QEMU when all of it is there. If it stops following, both
//! QEMUs pause, and go on over a new stream as soon as there can be one.
//!
//! `docs/failures.md` says what is true of the VM at each instant; the tests of this module
//! stop, restart and cut both ends at each step.

mod source;
mod target;

#[cfg(test)]
mod tests;

pub use source::{
    Plight, RESUME_PATIENCE, SourceAction, SourceEvent, SourceJournal, SourceMove, SourceState,
};
pub use target::{FoundQemu, TargetAction, TargetEvent, TargetJournal, TargetMove, TargetState};
