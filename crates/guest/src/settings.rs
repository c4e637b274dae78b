//! QEMU's migration settings: what is refused, what is set for a move, and what is given back.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::migration::set_in_passing;
use crate::{GuestError, Qmp, QmpError};

/// QEMU's default `downtime-limit`.
const DOWNTIME_LIMIT_MS_DEFAULT: u64 = 300;

/// Largest `downtime-limit` that QEMU takes.
const DOWNTIME_LIMIT_MS_MAX: u64 = 2_000_000;

/// `max-bandwidth` that QEMU does not enforce, in every version. It counts logical bytes, of which
/// duplicates make many more than ever cross the wire; the agents limit the wire.
const BANDWIDTH_UNLIMITED: u64 = 0;

/// The speed that QEMU plans its switch-over with, since 8.2.
const SWITCHOVER_BANDWIDTH: &str = "avail-switchover-bandwidth";

/// Parameters that a move changes.
const CHANGED_PARAMETERS: [&str; 3] = ["max-bandwidth", "downtime-limit", SWITCHOVER_BANDWIDTH];

/// Pages that a processor waits for in post-copy have a channel of their own, since 7.1.
pub(crate) const PREEMPT: &str = "postcopy-preempt";

/// Capabilities that change the stream into one that cannot be carried, or make a loss of bytes
/// in flight a loss of the VM; and why.
const REFUSED_CAPABILITIES: [(&str, &str); 13] = [
    ("xbzrle", "its deltas depend on what was delivered before"),
    (
        "compress",
        "compressed pages cannot be recognised as duplicates",
    ),
    ("multifd", "its parallel channels are not carried"),
    ("mapped-ram", "it writes a file layout, not a stream"),
    (
        "postcopy-ram",
        "it is turned on by the move where a plan asks for post-copy",
    ),
    (
        PREEMPT,
        "it is turned on by the move where both QEMUs have it",
    ),
    ("rdma-pin-all", "RDMA bypasses the agents"),
    ("x-colo", "COLO keeps both VMs in step through the stream"),
    (
        "background-snapshot",
        "it makes a snapshot, not a migration",
    ),
    (
        "release-ram",
        "the source would drop pages that are still in flight",
    ),
    (
        "x-ignore-shared",
        "shared memory does not exist on another host",
    ),
    ("block", "disks in the stream are not carried"),
    (
        "dirty-bitmaps",
        "bitmaps of disks in the stream are not carried",
    ),
];

/// What a migration is started with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MigrationParameters {
    /// Longest stop of the guest that QEMU may plan for, milliseconds, 1 to 2 000 000.
    pub downtime_limit_ms: u64,
    /// Whether QEMU waits, with the guest stopped, for
    /// [`crate::SourceGuest::continue_switchover`] before it sends the end.
    pub pause_before_switchover: bool,
    /// Whether the migration may be told to go over to post-copy.
    pub postcopy: bool,
    /// Whether pages that a processor waits for then come on a connection of their own; with `postcopy` only.
    pub preempt: bool,
}

impl Default for MigrationParameters {
    fn default() -> Self {
        Self {
            downtime_limit_ms: DOWNTIME_LIMIT_MS_DEFAULT,
            pause_before_switchover: false,
            postcopy: false,
            preempt: false,
        }
    }
}

impl MigrationParameters {
    fn downtime_limit_ms(&self) -> u64 {
        self.downtime_limit_ms.clamp(1, DOWNTIME_LIMIT_MS_MAX)
    }

    /// Capabilities of the source and the values they need, as far as its QEMU has them.
    fn capabilities(&self) -> [(&'static str, bool); 6] {
        [
            // Without it QEMU takes bytes that a socket accepted for a success.
            ("return-path", true),
            ("events", true),
            ("postcopy-ram", self.postcopy),
            (PREEMPT, self.postcopy && self.preempt),
            ("pause-before-switchover", self.pause_before_switchover),
            // Would make the source wait for a message that only a target set alike sends.
            ("switchover-ack", false),
        ]
    }
}

/// The settings of a guest before its move, and what the move needs to know of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SavedSettings {
    capabilities: BTreeMap<String, bool>,
    parameters: Map<String, Value>,
    downtime_limit_ms: u64,
}

/// Refuses what cannot be carried.
pub(crate) fn check(qmp: &Qmp) -> Result<(), GuestError> {
    let on = capabilities(qmp)?;
    for (capability, why) in REFUSED_CAPABILITIES {
        if on.get(capability) == Some(&true) {
            return Err(GuestError::Capability { capability, why });
        }
    }
    let parameters: Map<String, Value> = qmp.query("query-migrate-parameters")?;
    match parameters.get("tls-creds").and_then(Value::as_str) {
        None | Some("") => Ok(()),
        Some(_) => Err(GuestError::TlsCreds),
    }
}

impl SavedSettings {
    /// Reads the settings that a move with parameters `p` changes.
    pub(crate) fn read(qmp: &Qmp, p: &MigrationParameters) -> Result<Self, QmpError> {
        let wanted = p.capabilities().map(|(name, _)| name);
        let mut capabilities = capabilities(qmp)?;
        capabilities.retain(|name, _| wanted.contains(&name.as_str()));
        let mut parameters: Map<String, Value> = qmp.query("query-migrate-parameters")?;
        parameters.retain(|name, _| CHANGED_PARAMETERS.contains(&name.as_str()));
        Ok(Self {
            capabilities,
            parameters,
            downtime_limit_ms: p.downtime_limit_ms(),
        })
    }

    /// Sets what the move needs.
    pub(crate) fn apply(&mut self, qmp: &Qmp, p: &MigrationParameters) -> Result<(), QmpError> {
        self.downtime_limit_ms = p.downtime_limit_ms();
        let known = p.capabilities().into_iter();
        let known = known.filter(|(name, _)| self.capabilities.contains_key(*name));
        set_capabilities(qmp, known)?;
        set_parameters(
            qmp,
            json!({
                "max-bandwidth": BANDWIDTH_UNLIMITED,
                "downtime-limit": self.downtime_limit_ms,
            }),
        )
    }

    /// Tells QEMU how fast unique pages really go, `unique` of all `logical` bytes per second.
    ///
    /// QEMU stops the guest when the remaining pages fit into the downtime limit at the speed that
    /// it measures. It measures how fast its socket takes bytes; duplicates flow faster than the
    /// wire, and the last pages are seldom duplicates.
    pub(crate) fn set_wire_rate(
        &self,
        qmp: &Qmp,
        unique: u64,
        logical: u64,
    ) -> Result<(), QmpError> {
        let parameters = if self.parameters.contains_key(SWITCHOVER_BANDWIDTH) {
            // 0 would turn it off.
            json!({ SWITCHOVER_BANDWIDTH: unique.max(1) })
        } else {
            json!({ "downtime-limit": scaled_limit(self.downtime_limit_ms, unique, logical) })
        };
        set_in_passing(qmp, &parameters)
    }

    /// Gives the settings back. QEMU takes capabilities only while no migration goes on.
    pub(crate) fn restore(&self, qmp: &Qmp) -> Result<(), QmpError> {
        set_capabilities(
            qmp,
            self.capabilities
                .iter()
                .map(|(name, on)| (name.as_str(), *on)),
        )?;
        set_parameters(qmp, Value::Object(self.parameters.clone()))
    }
}

/// The downtime limit at which QEMU, believing in `logical`, stops the guest as it should at
/// `unique`: at least 1 ms, and never more than `limit`.
fn scaled_limit(limit: u64, unique: u64, logical: u64) -> u64 {
    let scaled = u128::from(limit) * u128::from(unique) / u128::from(logical.max(1));
    u64::try_from(scaled)
        .unwrap_or(limit)
        .clamp(1, limit.max(1))
}

/// Every capability of this QEMU and whether it is on.
fn capabilities(qmp: &Qmp) -> Result<BTreeMap<String, bool>, QmpError> {
    #[derive(Deserialize)]
    struct Capability {
        capability: String,
        state: bool,
    }
    let list: Vec<Capability> = qmp.query("query-migrate-capabilities")?;
    Ok(list.into_iter().map(|c| (c.capability, c.state)).collect())
}

/// What a target that may go over to post-copy needs, the last two if its QEMU has them: how long its processors
/// wait for pages, and if `preempt`, a channel of their own for those.
pub(crate) fn postcopy_target(
    qmp: &Qmp,
    preempt: bool,
) -> Result<Vec<(&'static str, bool)>, QmpError> {
    let known = capabilities(qmp)?;
    let mut wanted = vec![
        ("postcopy-ram", true),
        ("postcopy-blocktime", true),
        (PREEMPT, preempt),
    ];
    wanted.retain(|(name, _)| *name == "postcopy-ram" || known.contains_key(*name));
    Ok(wanted)
}

/// Leaves a target as one that never was to go over to post-copy.
pub(crate) fn forget_postcopy(qmp: &Qmp) -> Result<(), QmpError> {
    let known = capabilities(qmp)?;
    // One stands on the other.
    let off = [(PREEMPT, false), ("postcopy-ram", false)];
    let off = off
        .into_iter()
        .filter(|(name, _)| known.contains_key(*name));
    set_capabilities(qmp, off)
}

/// Whether this QEMU has a capability, and whether it is on.
pub(crate) fn capability(qmp: &Qmp, name: &str) -> Result<Option<bool>, QmpError> {
    Ok(capabilities(qmp)?.get(name).copied())
}

/// Turns capabilities on or off.
pub(crate) fn set_capabilities<'a>(
    qmp: &Qmp,
    states: impl IntoIterator<Item = (&'a str, bool)>,
) -> Result<(), QmpError> {
    let list: Vec<_> = states
        .into_iter()
        .map(|(capability, state)| json!({ "capability": capability, "state": state }))
        .collect();
    qmp.execute("migrate-set-capabilities", json!({ "capabilities": list }))
        .map(drop)
}

fn set_parameters(qmp: &Qmp, parameters: Value) -> Result<(), QmpError> {
    qmp.execute("migrate-set-parameters", parameters).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scaled_limit_stays_between_a_millisecond_and_the_limit() {
        assert_eq!(scaled_limit(300, 10, 100), 30);
        assert_eq!(scaled_limit(300, 100, 10), 300);
        assert_eq!(scaled_limit(300, 0, 100), 1);
        assert_eq!(scaled_limit(300, 5, 0), 300);
        assert_eq!(scaled_limit(u64::MAX, u64::MAX, 1), u64::MAX);
    }

    #[test]
    fn the_limit_given_to_qemu_is_one_that_it_takes() {
        let limit = |ms| MigrationParameters {
            downtime_limit_ms: ms,
            ..Default::default()
        };
        assert_eq!(limit(0).downtime_limit_ms(), 1);
        assert_eq!(limit(u64::MAX).downtime_limit_ms(), DOWNTIME_LIMIT_MS_MAX);
    }
}
