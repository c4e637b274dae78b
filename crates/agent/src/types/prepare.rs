//! What the control API says about preparation: hashing memory before a migration, and what a
//! migration would cost.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Plan;

/// What hashing may take on a host, besides running at idle priority.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PrepareBounds {
    /// Percent of one processor, 1 to 100; 50 if absent.
    #[serde(default = "default_cpu_percent")]
    pub cpu_percent: u8,
    /// Guest memory read in a second, in bytes; 1 GB if absent.
    #[serde(default = "default_read_bytes_per_s")]
    pub read_bytes_per_s: u64,
}

fn default_cpu_percent() -> u8 {
    guest::scan::Bounds::default().cpu_percent
}

fn default_read_bytes_per_s() -> u64 {
    guest::scan::Bounds::default().read_bytes_per_s
}

impl Default for PrepareBounds {
    fn default() -> Self {
        Self {
            cpu_percent: default_cpu_percent(),
            read_bytes_per_s: default_read_bytes_per_s(),
        }
    }
}

/// Asks a source agent to hash the memory of its VMs of a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PrepareSpec {
    /// Id of the group.
    pub group: String,
    /// Its VMs on this host, in the plan's order.
    pub vms: Vec<PrepareVm>,
    /// `host:port` of the index's bulk listeners, in the order of their shards; if empty, nothing
    /// is registered.
    #[serde(default)]
    pub index: Vec<String>,
    /// How many target hosts the whole group has.
    pub targets: u16,
    /// What hashing may take.
    #[serde(default)]
    pub bounds: PrepareBounds,
    /// Asks a target agent: these VMs run there and stay, and what they have need not be sent.
    #[serde(default)]
    pub resident: bool,
    /// Whether VMs that stay at target hosts are hashed, too.
    #[serde(default)]
    pub seeded: bool,
    /// Whether it is found out, too, what the VMs that go to a target host have in common: with
    /// sharing `identical`.
    #[serde(default)]
    pub identical: bool,
}

impl PrepareSpec {
    /// Under what name an agent knows the preparation: a host may be source and target.
    #[must_use]
    pub fn key(&self) -> String {
        if self.resident {
            format!("{}.resident", self.group)
        } else {
            self.group.clone()
        }
    }
}

/// A VM to hash.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PrepareVm {
    /// Name of the VM.
    pub vm: String,
    /// QMP socket on this host.
    #[schema(value_type = String)]
    pub qmp: PathBuf,
    /// Secret of the VM's trust domain, 64 hex digits.
    pub domain_key: String,
    /// Number of its target host in the group.
    pub target: u16,
}

/// Asks a source agent to finish a preparation, after all hosts have registered.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResolveSpec {
    /// Also compress what would be sent, for a forecast.
    #[serde(default)]
    pub compress: bool,
    /// With `compress`: what other host pairs carry, that this host does not send with scope
    /// `rack`.
    #[serde(default)]
    pub carried_elsewhere: Vec<CarriedElsewhere>,
}

/// Contents that need not be sent to a target host because another host pair carries them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CarriedElsewhere {
    /// Number of the target host.
    pub target: u16,
    /// Leading 64 bits of the contents' ids, 16 hex digits each.
    pub contents: String,
}

/// Where a preparation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PrepareState {
    /// Memory is being hashed and registered.
    Scanning,
    /// Everything is registered; the other hosts are waited for.
    Registered,
    /// What is shared with other hosts is being asked, and compression tried.
    Resolving,
    /// Done; the results are held for the migration.
    Ready,
    /// It failed: the migration does without.
    Failed,
}

impl PrepareState {
    /// Whether this step has ended.
    #[must_use]
    pub fn is_settled(self) -> bool {
        !matches!(self, Self::Scanning | Self::Resolving)
    }
}

/// A preparation on one host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PrepareStatus {
    /// Id of the group.
    pub group: String,
    /// Where it stands.
    pub state: PrepareState,
    /// For a person: what is being done, or why it failed.
    pub message: String,
    /// Pages to look at.
    pub pages_total: u64,
    /// Pages looked at.
    pub pages_done: u64,
    /// What was found, once `registered`; more once `ready`.
    pub report: Option<HostSurvey>,
}

/// Pages by what they hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PageKinds {
    /// All.
    pub total: u64,
    /// Never touched: no memory is behind them.
    pub untouched: u64,
    /// Touched, and zero.
    pub zero: u64,
    /// Another byte all over.
    pub fill: u64,
    /// With a content.
    pub content: u64,
    /// Different contents among those.
    pub distinct: u64,
    /// Could not be read.
    pub unknown: u64,
}

/// One VM as hashing found it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmSurvey {
    /// Name of the VM.
    pub vm: String,
    /// Number of its target host.
    pub target: u16,
    /// Its pages; `distinct` within the VM.
    pub pages: PageKinds,
}

/// What goes from one host to one target host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PairSurvey {
    /// Number of the target host.
    pub target: u16,
    /// Pages of all VMs that go there; `distinct` within the pair.
    pub pages: PageKinds,
    /// Its distinct contents after zstd, as the agents compress them.
    pub zstd_bytes: Option<u64>,
    /// The same of those that this pair carries with scope `rack`.
    pub rack_zstd_bytes: Option<u64>,
    /// Some of its contents, for counting across hosts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sample: Option<ContentSample>,
}

/// Those contents of a host pair whose ids begin with enough zero bits: a sample of contents that
/// is the same on every host, so that hosts can be compared through it. All of them, if few.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ContentSample {
    /// So many leading bits of the ids are zero: one content in two to that power.
    pub zero_bits: u8,
    /// Leading 64 bits of the ids, 16 hex digits each, in the order of the scan.
    pub contents: String,
}

/// What hashing found on one host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct HostSurvey {
    /// Name of the host, as its agent calls it.
    pub host: String,
    /// Its VMs.
    pub vms: Vec<VmSurvey>,
    /// All its VMs together; `distinct` within the host and its trust domains.
    pub pages: PageKinds,
    /// By target host.
    pub pairs: Vec<PairSurvey>,
    /// Time that it took.
    pub seconds: f64,
    /// Processor time that it took.
    pub cpu_seconds: f64,
    /// Pages whose bytes were read.
    pub pages_read: u64,
}

/// Asks an agent to coordinate a preparation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PreparationRequest {
    /// Whose VMs.
    pub plan: Plan,
    /// Only find out what a migration would cost: compression is tried, nothing is registered,
    /// and the results are forgotten.
    #[serde(default)]
    pub survey: bool,
    /// Look at the VMs of these source hosts only; at all if empty.
    #[serde(default)]
    pub hosts: Vec<String>,
    /// What hashing may take on each host.
    #[serde(default)]
    pub bounds: PrepareBounds,
}

/// A preparation as its coordinator knows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PreparationStatus {
    /// Id of the group.
    pub group: String,
    /// Whether it has ended.
    pub finished: bool,
    /// For a person.
    pub message: String,
    /// Pages to look at, on all hosts.
    pub pages_total: u64,
    /// Pages looked at.
    pub pages_done: u64,
    /// The result.
    pub survey: Option<GroupSurvey>,
}

/// What hashing found on all source hosts of a group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct GroupSurvey {
    /// Id of the group.
    pub group: String,
    /// Each source host.
    pub hosts: Vec<HostSurvey>,
    /// All hosts together; `distinct` within the rack.
    pub rack: PageKinds,
    /// Whether `distinct` of the rack, and what follows from it, was counted; else it was
    /// estimated from a sample, to about 1 %.
    pub exact: bool,
    /// Contents that VMs of more than one target host need.
    pub shared_by_targets: u64,
    /// What a migration would cost, technique by technique.
    pub forecast: Vec<Forecast>,
    /// Time that the whole preparation took.
    pub seconds: f64,
    /// Processor time on all hosts together.
    pub cpu_seconds: f64,
    /// What failed on which host: the migration does without it.
    pub failed: Vec<String>,
}

/// What a migration would cost with one technique.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Forecast {
    /// `stock`, `oc`, `gang`, `irlm`, `gang+zstd`, `full`.
    pub technique: String,
    /// Bytes on the core link, headers of all layers included.
    pub core_bytes: u64,
    /// Seconds at the plan's bandwidth; absent if it has none.
    pub seconds: Option<f64>,
}

/// The preparation of a group has ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct GroupPrepared {
    /// Position in the group's stream of events.
    pub seq: u64,
    /// Wall clock, milliseconds since 1970 with a fraction.
    pub at_unix_ms: f64,
    /// Always `prepared`.
    pub event: GroupPreparedTag,
    /// Id of the group.
    pub group: String,
    /// Time that it took.
    pub seconds: f64,
    /// Processor time on all source hosts together.
    pub cpu_seconds: f64,
    /// Pages of all VMs; `distinct` within the rack.
    pub pages: PageKinds,
    /// What failed on which host: the migration does without it.
    pub failed: Vec<String>,
}

/// The `event` of [`GroupPrepared`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum GroupPreparedTag {
    /// The only value.
    Prepared,
}

impl PageKinds {
    /// With the pages of `other`, whose contents are all different from ours.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            total: self.total + other.total,
            untouched: self.untouched + other.untouched,
            zero: self.zero + other.zero,
            fill: self.fill + other.fill,
            content: self.content + other.content,
            distinct: self.distinct + other.distinct,
            unknown: self.unknown + other.unknown,
        }
    }
}
