//! What the control API says: the plan, the moves of a group and their events.
//!
//! One move is one VM with its source and target host. Every type here is JSON on the control
//! API (and, for the plan, TOML in a file). Unknown keys are errors. Units stand in the names.

mod inventory;
mod prepare;
mod technique;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub use inventory::*;
pub use prepare::*;
pub use technique::*;

/// A plan: which VMs move from where to where, and how. Written in TOML, sent as JSON.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Technique; `full` if absent.
    #[serde(default)]
    pub preset: Option<Preset>,
    /// Overrides the preset.
    #[serde(default)]
    pub scope: Option<Scope>,
    /// Overrides the preset.
    #[serde(default)]
    pub sharing: Option<Sharing>,
    /// Overrides the preset.
    #[serde(default)]
    pub compression: Option<Compression>,
    /// Overrides the preset.
    #[serde(default)]
    pub mode: Option<Mode>,
    /// Budget of the whole group on the wire, in bytes per second; no limit if absent.
    #[serde(default)]
    pub max_bandwidth_bytes_per_s: Option<u64>,
    /// Longest switch-over that QEMU may plan for; QEMU's 300 ms if absent.
    #[serde(default)]
    pub downtime_limit_ms: Option<u64>,
    /// With mode `hybrid`: a VM whose memory has been copied for so long goes over to post-copy, whether
    /// it converges or not; no limit if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub postcopy_after_s: Option<u64>,
    /// In post-copy, give the pages that a VM waits for a connection of their own to its QEMU
    /// (`postcopy-preempt`) where both QEMUs have that and the VM shares no memory at the target.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub postcopy_preempt: bool,
    /// Hold every VM, stopped, between its load at the target and its start there, until
    /// `continue` is said through the control API (for people and managers that check first).
    #[serde(default)]
    pub confirm_handover: bool,
    /// Whether memory is hashed before the migration, with scope `rack` or sharing `identical`; yes if
    /// absent.
    #[serde(default)]
    pub prepare: Option<bool>,
    /// `host:port` of the processes of a stand-alone index, in the order of their shards; if
    /// empty, the agent of the first move's source host has the index for as long as the group
    /// lives.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub index: Vec<String>,
    /// How to reach the agents, by host name.
    pub hosts: BTreeMap<String, Host>,
    /// The moves, in the order in which they start.
    #[serde(rename = "move")]
    pub moves: Vec<PlanMove>,
    /// Also take contents from the VMs that run at the target hosts already, with scope `rack`: all
    /// that the agents there find, which then count as of the trust domain `default`.
    #[serde(default, skip_serializing_if = "is_false")]
    pub seed_from_target: bool,
    /// VMs at target hosts to take contents from, with scope `rack`; with others they are not used.
    #[serde(rename = "resident", default, skip_serializing_if = "Vec::is_empty")]
    pub residents: Vec<Resident>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_false(flag: &bool) -> bool {
    !flag
}

/// A VM that runs at a target host and stays there. What it has need not be sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Resident {
    /// Its name.
    pub vm: String,
    /// Target host that it runs on.
    pub host: String,
    /// QMP socket of its QEMU there, for the agent's use alone.
    #[schema(value_type = String)]
    pub qmp: PathBuf,
    /// Trust domain: only moves of the same one use its contents. `default` if absent.
    #[serde(default)]
    pub domain: Option<String>,
}

/// Addresses of one agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Host {
    /// `host:port` of the agent's control API (TLS).
    pub control: String,
    /// `host:port` of the agent's bulk listener (TLS).
    pub bulk: String,
}

/// One VM and its way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PlanMove {
    /// Name of the VM; unique in the plan.
    pub vm: String,
    /// Host that it runs on.
    pub from: String,
    /// Host that it goes to.
    pub to: String,
    /// QMP socket of its QEMU on the source host, for the agent's use alone.
    #[schema(value_type = String)]
    pub qmp: PathBuf,
    /// Texts replaced in the source's command line to make the target's, in this order
    /// (paths of sockets and logs, names of taps). Ignored if `definition` is given.
    #[serde(default)]
    pub replace: Vec<Replace>,
    /// The target QEMU's command line, program first, without `-incoming` and `-S`; if absent
    /// the source's with `replace` applied. It must hold a `-qmp` or `-mon` unix socket server.
    #[serde(default)]
    pub definition: Option<Vec<String>>,
    /// Limit of this VM on the wire, in bytes per second.
    #[serde(default)]
    pub max_bandwidth_bytes_per_s: Option<u64>,
    /// Trust domain: contents are compared only inside one. `default` if absent.
    #[serde(default)]
    pub domain: Option<String>,
}

/// One replacement in a command line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Replace {
    /// Text to find in every argument.
    pub from: String,
    /// Text to put there.
    pub to: String,
}

/// What the coordinator asks a source agent to do: one move, everything resolved.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MoveSpec {
    /// Unique id of the move: `GROUP/VM`.
    pub id: String,
    /// Id of the group.
    pub group: String,
    /// Name of the VM.
    pub vm: String,
    /// QMP socket on the source host.
    #[schema(value_type = String)]
    pub qmp: PathBuf,
    /// Name of the target host, for messages.
    pub target_name: String,
    /// Bulk address of the target agent.
    pub target_bulk: String,
    /// Technique.
    pub settings: Settings,
    /// Secret of the VM's trust domain, 64 hex digits.
    pub domain_key: String,
    /// As in the plan.
    pub replace: Vec<Replace>,
    /// As in the plan.
    pub definition: Option<Vec<String>>,
    /// This VM's limit on the wire.
    pub max_bandwidth_bytes_per_s: Option<u64>,
    /// This agent's share of the group's budget on the wire; the newest move's value counts.
    pub group_bandwidth_bytes_per_s: Option<u64>,
    /// As in the plan.
    pub downtime_limit_ms: Option<u64>,
    /// As in the plan.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub postcopy_after_s: Option<u64>,
    /// As in the plan.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub postcopy_preempt: bool,
    /// As in the plan.
    pub confirm_handover: bool,
    /// What the two agents need to share contents with the rest of the group; with scope `rack`.
    #[serde(default)]
    pub rack: Option<RackSpec>,
}

/// A move's place in its group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RackSpec {
    /// `host:port` of the index's bulk listeners, in the order of their shards.
    pub index: Vec<String>,
    /// Number of this move's target host in its group.
    pub target: u16,
    /// Whether VMs come to this target from other source hosts of the group, too.
    pub shared_target: bool,
    /// The group's target hosts.
    pub peers: Vec<RackPeer>,
}

/// A target host of a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RackPeer {
    /// Its number in the group: target hosts count from 0, in the order of their names.
    pub host: u16,
    /// Its name, for messages.
    pub name: String,
    /// `host:port` of its bulk listener.
    pub bulk: String,
}

/// Where a move stands. The order is the order of a move that succeeds.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Accepted, nothing done yet. The VM runs at the source.
    Queued,
    /// The target QEMU is being started. The VM runs at the source.
    Preparing,
    /// Memory is copied in rounds. The VM runs at the source.
    Bulk,
    /// The VM is stopped; its last pages and its device state are on their way.
    SwitchOver,
    /// The target has loaded everything; the source QEMU is told, and can no longer resume by
    /// itself. Stopped at both ends.
    Loaded,
    /// As `Loaded`, waiting for `continue` (`confirm_handover`).
    Held,
    /// The target was let go: from here on the VM never runs at the source again.
    Released,
    /// The VM runs at the target in post-copy; its memory follows.
    PostCopy,
    /// The agent was restarted in the middle of the move, or a person asked for it: it finds out
    /// where the VM is, and finishes or undoes the move. Or the memory of a VM in post-copy does not
    /// follow it any more, and is made to follow again.
    Recovering,
    /// The VM runs at the target, the source QEMU is gone.
    Moved,
    /// The move failed or was cancelled; the VM runs at the source, the target QEMU is gone.
    Stayed,
    /// Nobody can say from here where the VM may run; it is stopped at the source. Or it ran in post-copy,
    /// and its memory could not be made to follow.
    NeedsPerson,
}

impl Phase {
    /// Whether the move has ended.
    #[must_use]
    pub fn is_final(self) -> bool {
        matches!(self, Self::Moved | Self::Stayed | Self::NeedsPerson)
    }
}

/// Pages of the stream by how they crossed the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PageCounts {
    /// Page records that QEMU wrote, re-sent dirty pages included.
    pub total: u64,
    /// Zero pages.
    pub zero: u64,
    /// Other pages with all bytes equal.
    pub fill: u64,
    /// Pages sent with their bytes.
    pub literal: u64,
    /// Pages sent as the name of a content that the target has.
    pub reference: u64,
    /// Pages sent as the name of a content that another target host has.
    #[serde(default)]
    pub remote_reference: u64,
    /// Pages whose reference could not be served and that were read again from the source.
    pub repaired: u64,
    /// Pages that are mapped from the target host's pool, with sharing `preserve` or `identical`.
    #[serde(default)]
    pub mapped: u64,
}

/// A snapshot of how far a move is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// QEMU's round over the memory, from 1; 0 before the first.
    pub round: u64,
    /// Memory of the VM in bytes.
    pub memory_bytes: u64,
    /// Bytes that QEMU wrote into the migration stream.
    pub stream_bytes: u64,
    /// Bytes written to the network for this move, before encryption.
    pub wire_bytes: u64,
    /// Bytes that QEMU still has to send.
    pub remaining_bytes: u64,
    /// Speed at which the guest dirties memory, bytes per second; from QEMU.
    pub dirty_bytes_per_s: u64,
    /// Speed on the wire over the last second, bytes per second.
    pub wire_bytes_per_s: u64,
    /// Speed of the logical stream over the last second, bytes per second.
    pub stream_bytes_per_s: u64,
    /// Seconds to go, if the estimate converges; it never grows by display (see the CLI).
    pub eta_s: Option<f64>,
    /// Written by QEMU and not yet loaded by the target QEMU, logical bytes.
    pub backlog_bytes: u64,
    /// Pages by kind.
    pub pages: PageCounts,
    /// How long page faults took at the target; when the memory of a VM in post-copy is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub faults: Option<Faults>,
}

/// How long page faults took in post-copy, from the request of the target QEMU until the page was
/// given to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Faults {
    /// How many there were.
    pub count: u64,
    /// Half of them took no longer.
    pub median_us: u64,
    /// 99 of 100 took no longer.
    pub p99_us: u64,
    /// None took longer.
    pub max_us: u64,
}

/// One thing that happened to a move. NDJSON on the event streams.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MoveEvent {
    /// Position in the stream of events of this move, from 0.
    pub seq: u64,
    /// Wall clock, milliseconds since 1970 with a fraction.
    pub at_unix_ms: f64,
    /// Id of the move.
    pub id: String,
    /// Name of the VM.
    pub vm: String,
    /// What happened.
    #[serde(flatten)]
    pub what: Happening,
}

/// The kinds of events.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Happening {
    /// The move entered a phase. A final phase comes once, last, with its message.
    Phase {
        /// The phase entered.
        phase: Phase,
        /// For a person: what happened, the state of the VM now, what to do.
        message: String,
    },
    /// How far the move is; about twice a second.
    Progress {
        /// The snapshot.
        progress: Progress,
    },
    /// Something worth knowing that changes no phase.
    Note {
        /// For a person.
        message: String,
    },
}

/// A move as `status` shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MoveStatus {
    /// Id of the move.
    pub id: String,
    /// Id of its group.
    pub group: String,
    /// Name of the VM.
    pub vm: String,
    /// Name of the target host.
    pub target: String,
    /// Where it stands.
    pub phase: Phase,
    /// Message of the newest phase event.
    pub message: String,
    /// What a person should know of the move beside its phase: the newest note.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// Newest progress.
    pub progress: Progress,
}

/// Asks an agent to coordinate a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GroupRequest {
    /// What to move.
    pub plan: Plan,
    /// Id of the group; made up if absent. An id is used once.
    #[serde(default)]
    pub id: Option<String>,
}

/// The group was accepted and its moves are being started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GroupAccepted {
    /// Id of the group.
    pub group: String,
}

/// A group as its coordinator knows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct GroupStatus {
    /// Id of the group.
    pub group: String,
    /// Wall clock of its acceptance, milliseconds since 1970 with a fraction.
    pub accepted_unix_ms: f64,
    /// Whether every move has ended.
    pub finished: bool,
    /// Its moves, in the plan's order.
    pub moves: Vec<GroupMove>,
}

/// A move of a group as its coordinator knows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct GroupMove {
    /// What the source agent said last.
    #[serde(flatten)]
    pub status: MoveStatus,
    /// Name of the source host.
    pub source: String,
    /// Whether the source agent answers. If not, the move may well go on: only news is missing.
    pub reachable: bool,
    /// From the acceptance of the group to the end of this move, or to now.
    pub elapsed_s: f64,
}

/// A line of a group's event stream: an event of one of its moves (with `seq` counted in the
/// group), the end of its preparation, or, last, the end of the group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum GroupEvent {
    /// The group has ended.
    Finished(GroupFinished),
    /// The memory of its VMs has been hashed; the moves start.
    Prepared(GroupPrepared),
    /// Something happened to one of its moves.
    Move(MoveEvent),
}

impl GroupEvent {
    /// Position in the group's stream of events.
    #[must_use]
    pub fn seq(&self) -> u64 {
        match self {
            Self::Finished(finished) => finished.seq,
            Self::Prepared(prepared) => prepared.seq,
            Self::Move(event) => event.seq,
        }
    }
}

/// The end of a group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct GroupFinished {
    /// Position in the group's stream of events.
    pub seq: u64,
    /// Wall clock, milliseconds since 1970 with a fraction.
    pub at_unix_ms: f64,
    /// Always `group-finished`.
    pub event: GroupFinishedTag,
    /// Id of the group.
    pub group: String,
    /// Every move with its final phase, in the plan's order.
    pub outcomes: Vec<GroupMove>,
}

/// The `event` of [`GroupFinished`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum GroupFinishedTag {
    /// The only value.
    GroupFinished,
}

/// Which moves of a group an action is for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Selection {
    /// This VM only; all to which the action applies if absent.
    #[serde(default)]
    pub vm: Option<String>,
}

/// What an agent says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AgentStatus {
    /// Name of the host.
    pub name: String,
    /// Version of gangway.
    pub version: String,
    /// Whether it is being stopped and takes no new moves.
    pub stopping: bool,
    /// Moves whose source is this host.
    pub moves: Vec<MoveStatus>,
    /// Ids of moves that arrive here.
    pub incoming: Vec<String>,
    /// Groups that this agent coordinates.
    pub groups: Vec<GroupStatus>,
}

/// What came of an action on a group.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ActionReport {
    /// VMs whose moves took the action.
    pub done: Vec<String>,
    /// Those that did not, and why.
    pub refused: Vec<crate::api::mover::Refusal>,
}
