//! A source guest's memory, to be read beside its stream.

use std::collections::HashMap;
use std::sync::Mutex;

use guest::VmMemory;
use page::{BlockIndex, HostAddr};
use sys::ProcessMemory;

use super::stream::lock;

/// What repairs are read from: the source QEMU's memory, by the stream's block indices.
pub(crate) struct GuestMemory {
    pub(crate) memory: ProcessMemory,
    /// By block name.
    pub(crate) addresses: HashMap<String, HostAddr>,
    /// By block index, once the stream has opened.
    pub(crate) bases: Mutex<Vec<Option<HostAddr>>>,
    /// Pages of each block, likewise.
    pub(crate) lengths: Mutex<Vec<u32>>,
    /// The process and its blocks, and their names.
    pub(crate) layout: (VmMemory, Vec<String>),
}

impl GuestMemory {
    /// How many pages a block of the stream has; none if QEMU does not tell where it is.
    pub(crate) fn len(&self, block: BlockIndex) -> u32 {
        let lengths = lock(&self.lengths);
        lengths.get(usize::from(block.0)).copied().unwrap_or(0)
    }

    /// Where a block of the stream starts, if QEMU tells it.
    pub(crate) fn base(&self, block: BlockIndex) -> Option<HostAddr> {
        lock(&self.bases)
            .get(usize::from(block.0))
            .copied()
            .flatten()
    }
}
