//! The seam between the control API and preparation on this host.

use super::mover::Refusal;
use crate::types::{PrepareSpec, PrepareStatus, ResolveSpec};

/// Hashes the memory of VMs of this host before their group moves, in two steps that go on in the
/// background. Calls return at once.
pub trait Preparer: Send + Sync {
    /// First step: hash and register; again, and then cheaply, if the group is prepared already.
    ///
    /// # Errors
    /// If a step is under way, or the spec makes no sense.
    fn prepare(&self, spec: PrepareSpec) -> Result<(), Refusal>;

    /// Second step, after every host of the group has done the first.
    ///
    /// # Errors
    /// If the first step has not ended well.
    fn resolve_preparation(&self, group: &str, spec: ResolveSpec) -> Result<(), Refusal>;

    /// Where the group's preparation stands.
    ///
    /// # Errors
    /// If there is none.
    fn preparation(&self, group: &str) -> Result<PrepareStatus, Refusal>;

    /// Ends it, whatever it does, and forgets its results.
    ///
    /// # Errors
    /// If there is none.
    fn end_preparation(&self, group: &str) -> Result<(), Refusal>;
}
