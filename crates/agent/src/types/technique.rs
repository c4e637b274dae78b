//! How a group moves: what is looked for, packed and shared, and when the VM changes hosts.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Where duplicates are looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Scope {
    /// Nowhere: only fill pages are coded (the papers' *online compression*).
    None,
    /// Among the VMs that move between the same two hosts (*gang migration*).
    Host,
    /// Among all VMs of the group: each content crosses to one target host, which passes it on
    /// to the others (*inter-rack live migration*).
    Rack,
}

/// What becomes of page sharing between VMs at the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Sharing {
    /// Every page is private at the target.
    Off,
    /// Pages that share a frame at the source share one at the target (*sharing-aware live
    /// migration*), among the VMs of a group and trust domain that move between the same two hosts.
    Preserve,
    /// Pages with the same content share one at the target, too, whatever they shared at the source:
    /// those of the VMs of a group and trust domain that move between the same two hosts. Like KSM's,
    /// such sharing lets a guest find out by timing its writes what the others hold.
    Identical,
}

/// How page bytes are packed on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Compression {
    /// As they are.
    None,
    /// zstd with a window across all VMs of a host pair.
    Zstd,
}

/// When the VM changes hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// After its memory.
    PreCopy,
    /// Before its memory, which follows. Until it has, the VM needs both hosts and the link between
    /// them: if the link is lost, the VM stands still until it is mended.
    PostCopy,
    /// After its memory; before it, as in post-copy, if the guest writes faster than its memory
    /// can be sent, after the plan's time, or when a person says so.
    Hybrid,
}

impl Mode {
    /// Whether the VM may run at its target before its memory is there.
    #[must_use]
    pub fn may_go_first(self) -> bool {
        self != Self::PreCopy
    }
}

/// The four settings of a migration technique.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Where duplicates are looked for.
    pub scope: Scope,
    /// What becomes of page sharing.
    pub sharing: Sharing,
    /// How page bytes are packed.
    pub compression: Compression,
    /// When the VM changes hosts.
    pub mode: Mode,
}

/// A preset of [`Settings`], named after the technique of the papers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Preset {
    /// Online compression: fill pages as runs, everything else as it is.
    Oc,
    /// Gang migration: each content once for each host pair.
    Gang,
    /// Inter-rack live migration: each content once for the whole group, no compression.
    Irlm,
    /// Sharing-aware live migration: what shares memory at the source is sent once and shares it at
    /// the target; other contents are not compared.
    Slm,
    /// Each content once for the whole group, and compressed; what shares memory at the source
    /// shares it at the target.
    Full,
}

impl Preset {
    /// The settings that the preset stands for.
    #[must_use]
    pub fn settings(self) -> Settings {
        let (scope, compression) = match self {
            Self::Oc => (Scope::None, Compression::None),
            Self::Gang => (Scope::Host, Compression::None),
            Self::Irlm => (Scope::Rack, Compression::None),
            Self::Slm => (Scope::None, Compression::None),
            Self::Full => (Scope::Rack, Compression::Zstd),
        };
        let sharing = match self {
            Self::Slm | Self::Full => Sharing::Preserve,
            Self::Oc | Self::Gang | Self::Irlm => Sharing::Off,
        };
        Settings {
            scope,
            sharing,
            compression,
            mode: Mode::PreCopy,
        }
    }
}
