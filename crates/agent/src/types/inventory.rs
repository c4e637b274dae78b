//! What runs on a host, and what a plan to empty hosts is made from.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A host as its agent sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Inventory {
    /// Name of the host.
    pub name: String,
    /// Where moves arrive, as configured: the address may be the unspecified one.
    pub bulk: String,
    /// Memory for guests to come.
    pub free_bytes: u64,
    /// The QEMUs that run here.
    pub vms: Vec<HostVm>,
}

/// A QEMU of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct HostVm {
    /// Its name; empty if it was started without.
    pub vm: String,
    /// Process id.
    pub pid: u32,
    /// Its first QMP socket; absent if its command line has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub qmp: Option<PathBuf>,
    /// Memory of the guest.
    pub memory_bytes: u64,
}

/// Asks for a plan that moves every VM of some hosts to others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EvacuationRequest {
    /// `host:port` of the control APIs of the hosts to be emptied.
    pub from: Vec<String>,
    /// `host:port` of the control APIs of the hosts that take the VMs.
    pub to: Vec<String>,
}
