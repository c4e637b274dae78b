//! The journal's entry of an incoming move, and the process that it names.

use std::path::PathBuf;

use guest::KeptMonitor;
use migrate::handover::TargetJournal;
use page::PAGE_SIZE;
use serde::{Deserialize, Serialize};

use crate::journal::QemuProcess;

/// What survives the agent's death.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Entry {
    pub(super) id: String,
    pub(super) vm_name: String,
    pub(super) resume: bool,
    #[serde(flatten)]
    pub(super) process: QemuProcess,
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
    /// Memory that the guest may still come to take.
    pub(super) fn arriving_bytes(&self) -> u64 {
        self.memory_bytes
            .saturating_sub(resident_bytes(self.process.pid))
    }
}

/// Memory of a process that is in use; 0 if it is gone.
fn resident_bytes(pid: u32) -> u64 {
    let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    let pages = statm.split_whitespace().nth(1).and_then(|n| n.parse().ok());
    pages.unwrap_or(0_u64).saturating_mul(PAGE_SIZE as u64)
}
