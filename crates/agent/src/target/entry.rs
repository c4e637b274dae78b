//! The journal's entry of an incoming move, and the process that it names.

use std::path::PathBuf;

use guest::KeptMonitor;
use migrate::handover::TargetJournal;
use page::PAGE_SIZE;
use serde::{Deserialize, Serialize};
use sys::Process;

/// What survives the agent's death.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Entry {
    pub(super) id: String,
    pub(super) vm_name: String,
    pub(super) resume: bool,
    pub(super) pid: u32,
    /// Start time of the process, against another one of the same number.
    pub(super) started: u64,
    pub(super) qmp: PathBuf,
    /// Of the guest.
    #[serde(default)]
    pub(super) memory_bytes: u64,
    pub(super) state: TargetJournal,
    /// What its QEMU keeps of our connection to its monitor, in post-copy.
    #[serde(default)]
    pub(super) monitor: Option<KeptMonitor>,
    /// Its QEMU has a second channel in post-copy.
    #[serde(default)]
    pub(super) preempts: bool,
}

impl Entry {
    /// Whether the QEMU that was started is there.
    pub(super) fn is_alive(&self) -> bool {
        Process::open(self.pid).is_ok_and(|process| {
            process.is_alive()
                && process
                    .start_time()
                    .is_ok_and(|started| started == self.started)
        })
    }

    /// Memory that the guest may still come to take.
    pub(super) fn arriving_bytes(&self) -> u64 {
        self.memory_bytes.saturating_sub(resident_bytes(self.pid))
    }
}

/// Memory of a process that is in use; 0 if it is gone.
fn resident_bytes(pid: u32) -> u64 {
    let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    let pages = statm.split_whitespace().nth(1).and_then(|n| n.parse().ok());
    pages.unwrap_or(0_u64).saturating_mul(PAGE_SIZE as u64)
}
