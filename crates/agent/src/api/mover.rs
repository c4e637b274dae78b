//! The seam between the control API and the data path.
//!
//! The control side (HTTP, coordinator, CLI) knows a host's moves only through [`Mover`]. The data
//! path implements it with threads; the tests implement it in memory.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::preparer::Preparer;
use crate::types::{Happening, Inventory, MoveSpec};

/// Where a [`Mover`] reports what happens to one move.
///
/// It never blocks and may be called from any thread. Phases come in the order of
/// [`Phase`](crate::types::Phase); the last call carries a final phase, and it comes exactly once.
pub type EventSink = Box<dyn Fn(Happening) + Send + Sync>;

/// Carries out the moves whose source is this host and receives the moves of others.
///
/// Calls return quickly (they may ask QEMU over QMP, they never wait for a migration) and come
/// from threads that may block. A refusal means that nothing was changed.
pub trait Mover: Preparer {
    /// Source side, before anything starts: the VM exists, no move of it is under way, and its
    /// QEMU can migrate as the spec asks.
    fn check(&self, spec: &MoveSpec) -> Result<MoveCheck, Refusal>;

    /// Source side: starts the move. From then on all that happens to it goes to `events`.
    fn start(&self, spec: MoveSpec, events: EventSink) -> Result<(), Refusal>;

    /// Ends the move with the VM running at the source; refused once that is no longer possible.
    fn cancel(&self, id: &str) -> Result<(), Refusal>;

    /// Lets a VM go that is held between its load and its start (`confirm_handover`).
    fn resume_held(&self, id: &str) -> Result<(), Refusal>;

    /// Has a move that may do so go over to post-copy now.
    ///
    /// # Errors
    /// A move of another mode, or one whose guest has been stopped already.
    fn go_over(&self, id: &str) -> Result<(), Refusal>;

    /// Replaces both limits of a move under way.
    fn set_bandwidth(&self, id: &str, limits: Bandwidth) -> Result<(), Refusal>;

    /// Target side, before anything starts: this host can take all of these VMs at once (memory,
    /// QEMU binaries, machine types).
    fn admit(&self, request: &Admission) -> Result<(), Refusal>;

    /// Finishes or undoes a move that was interrupted or that needs a person. The outcome is the
    /// final phase given to `events`; it may again be `NeedsPerson`.
    fn recover(&self, id: &str, events: EventSink) -> Result<(), Refusal>;

    /// Interrupted moves found in the journal when this process started. The API recovers each
    /// of them at once.
    fn recoverable(&self) -> Vec<MoveSpec>;

    /// What runs here and how much room there is.
    fn inventory(&self) -> Result<Inventory, Refusal>;

    /// Ids of the moves that arrive here and have not ended, for `status` and for an orderly stop,
    /// which waits for them.
    fn incoming(&self) -> Vec<String>;
}

/// What the source knows about a VM that can be moved; the target is asked to admit exactly this.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MoveCheck {
    /// Name of the VM.
    pub vm: String,
    /// Guest memory that the target needs for it.
    pub memory_bytes: u64,
    /// With sharing: what its QEMU holds now, pages that others hold too counted by its share of them.
    /// The target needs that if they share there again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared_bytes: Option<u64>,
    /// With sharing: what its QEMU holds now with every page counted whole. The target needs that if
    /// sharing is lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expanded_bytes: Option<u64>,
    /// Program of the target's command line.
    #[schema(value_type = String)]
    pub program: PathBuf,
    /// Machine type, with its version (`pc-q35-7.2`).
    pub machine: String,
    /// Version of the source QEMU, as `query-version` gives it (`10.0.2`).
    pub qemu_version: String,
}

/// Asks a target host to admit the VMs of a group that go there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Admission {
    /// Id of the group.
    pub group: String,
    /// All its VMs that come to this host.
    pub vms: Vec<MoveCheck>,
}

impl Admission {
    /// Memory of all the VMs together.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.vms
            .iter()
            .fold(0, |sum, vm| sum.saturating_add(vm.memory_bytes))
    }
}

/// Limits of a move on the wire; absent means no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Bandwidth {
    /// Limit of this move, bytes per second.
    #[serde(default)]
    pub move_bytes_per_s: Option<u64>,
    /// Limit of all moves of its group on this host together, bytes per second.
    #[serde(default)]
    pub group_bytes_per_s: Option<u64>,
}

/// Why something asked for was not done. Nothing was changed by asking.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize, ToSchema)]
#[error("{message}")]
pub struct Refusal {
    /// The kind, for programs.
    pub code: RefusalCode,
    /// For a person: what is refused, to which VM, its state now, and the way out.
    pub message: String,
    /// The VM that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
}

impl Refusal {
    /// A refusal that concerns no VM in particular.
    #[must_use]
    pub fn new(code: RefusalCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            vm: None,
        }
    }

    /// A refusal that concerns one VM.
    #[must_use]
    pub fn of_vm(code: RefusalCode, vm: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            vm: Some(vm.into()),
        }
    }
}

/// The kinds of refusals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RefusalCode {
    /// The request does not make sense whatever the state.
    BadRequest,
    /// No QEMU answers for this VM.
    UnknownVm,
    /// No move of this id.
    UnknownMove,
    /// No group of this id.
    UnknownGroup,
    /// The VM, the id or a socket is taken by a move under way or an earlier one.
    Busy,
    /// This VM's QEMU cannot be migrated as asked.
    CannotMigrate,
    /// The target has too little memory.
    NoMemory,
    /// The target cannot start this VM's QEMU (program, machine type).
    NoQemu,
    /// An agent or QEMU did not answer.
    Unreachable,
    /// Not allowed: permissions of a socket, certificate.
    Forbidden,
    /// The move does not wait for `continue`.
    NotHeld,
    /// The move's mode is not `hybrid`: it does not go over to post-copy on command.
    NotHybrid,
    /// The move is past the point where this was possible.
    TooLate,
    /// The agent is being stopped.
    Stopping,
    /// The agent failed in a way that names no other kind.
    Internal,
}
