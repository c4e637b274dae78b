//! The seam between preparation and the index.

use page::{ContentId, ContentKey, EntryId, HostNo};

/// Contents in one call: a quarter of a megabyte of ids, so that others get their turn.
pub(super) const BATCH: usize = 16 * 1024;

/// Why the index did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[error("the index did not answer: {0}")]
pub struct RegisterError(pub String);

/// The index's table of one group and trust domain, as preparation uses it. Calls block.
pub trait Registrar: Send {
    /// Names the table: with another number, what was registered before is not there.
    fn epoch(&self) -> u64;

    /// VMs that go to `target` have these contents, each on so many pages. Returns their
    /// entries; none where the table is full.
    ///
    /// # Errors
    /// If the index does not answer.
    fn register(
        &mut self,
        target: HostNo,
        batch: &[(ContentId, u32)],
    ) -> Result<Vec<Option<EntryId>>, RegisterError>;

    /// VMs that run on `target` and stay there have these contents. Returns their entries; none where
    /// the table is full.
    ///
    /// # Errors
    /// If the index does not answer.
    fn seed(
        &mut self,
        target: HostNo,
        batch: &[ContentId],
    ) -> Result<Vec<Option<EntryId>>, RegisterError>;

    /// The entry of each of these contents that are at a target host already, or that other target hosts than `target` are registered
    /// to need.
    ///
    /// # Errors
    /// If the index does not answer.
    fn shared(
        &mut self,
        target: HostNo,
        batch: &[ContentId],
    ) -> Result<Vec<Option<EntryId>>, RegisterError>;
}

/// Connects to the index.
pub trait Connect: Send + Sync {
    /// The table of this group and trust domain, at the processes of `index` (`host:port` each,
    /// in the order of their shards).
    ///
    /// # Errors
    /// If the index does not answer.
    fn connect(
        &self,
        group: &str,
        key: &ContentKey,
        index: &[String],
    ) -> Result<Box<dyn Registrar>, RegisterError>;
}
