//! Ways to move VMs, by the names that scenarios and results use.

use std::fmt;
use std::str::FromStr;

use anyhow::Context;
use serde::Deserialize;

/// A way to move VMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum Technique {
    /// QEMU to QEMU, without Gangway.
    Stock(Stock),
    /// Through Gangway's agents.
    Gangway {
        /// Preset of the plan.
        preset: Preset,
        /// What is set beside it.
        extras: Extras,
        /// When the VMs change hosts.
        mode: Mode,
    },
}

/// Settings that differ from the preset's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extras {
    /// Literals are compressed where the preset does not do so.
    pub zstd: bool,
    /// Pages with the same content share one at the target, whatever the source shares.
    pub identical: bool,
    /// Pages that guests wait for in post-copy have a channel of their own.
    pub preempt: bool,
}

/// When VMs change hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// After their memory.
    PreCopy,
    /// Before it; they run while it follows.
    PostCopy,
    /// After it, or before it if they do not converge.
    Hybrid,
    /// Before it; they are held until it has followed, and all of it is compared.
    PostCopyHeld,
}

impl Mode {
    const SUFFIXES: [(&str, Self); 3] = [
        ("+hybrid", Self::Hybrid),
        ("+postcopy", Self::PostCopy),
        ("+postcopy-held", Self::PostCopyHeld),
    ];

    fn suffix(self) -> &'static str {
        let known = Self::SUFFIXES.iter().find(|(_, mode)| *mode == self);
        known.map_or("", |(suffix, _)| suffix)
    }

    /// As plans write it.
    #[must_use]
    pub fn in_plan(self) -> &'static str {
        match self {
            Self::PreCopy => "pre-copy",
            Self::Hybrid => "hybrid",
            Self::PostCopy | Self::PostCopyHeld => "post-copy",
        }
    }
}

/// What QEMU is told to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stock {
    /// Its defaults.
    Plain,
    /// Differences to pages sent before.
    Xbzrle,
    /// Several channels.
    Multifd,
    /// Several channels, compressed.
    MultifdZstd,
    /// The guest is slowed down until it dirties less than can be sent.
    AutoConverge,
    /// The VM before its memory.
    Postcopy,
    /// The same, with a channel of its own for the pages that a processor waits for.
    PostcopyPreempt,
}

impl Stock {
    const ALL: [Self; 7] = [
        Self::Plain,
        Self::Xbzrle,
        Self::Multifd,
        Self::MultifdZstd,
        Self::AutoConverge,
        Self::Postcopy,
        Self::PostcopyPreempt,
    ];

    /// As scenarios and results write it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "stock",
            Self::Xbzrle => "stock-xbzrle",
            Self::Multifd => "stock-multifd",
            Self::MultifdZstd => "stock-multifd-zstd",
            Self::AutoConverge => "stock-auto-converge",
            Self::Postcopy => "stock-postcopy",
            Self::PostcopyPreempt => "stock-postcopy-preempt",
        }
    }

    /// Whether VMs change hosts before their memory.
    #[must_use]
    pub fn is_postcopy(self) -> bool {
        matches!(self, Self::Postcopy | Self::PostcopyPreempt)
    }
}

/// Presets that the lab runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preset {
    /// Online compression.
    Oc,
    /// Gang migration.
    Gang,
    /// Inter-rack live migration: each content once for the whole rack.
    Irlm,
    /// Everything at once, compression included.
    Full,
    /// Sharing-aware live migration: what the source shares is sent once and shared again.
    Slm,
}

impl Preset {
    const ALL: [Self; 5] = [Self::Oc, Self::Gang, Self::Irlm, Self::Full, Self::Slm];

    /// As plans write it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Oc => "oc",
            Self::Gang => "gang",
            Self::Irlm => "irlm",
            Self::Full => "full",
            Self::Slm => "slm",
        }
    }

    /// Whether it has an index of the rack's contents, which a preparation phase fills.
    #[must_use]
    pub fn has_index(self) -> bool {
        matches!(self, Self::Irlm | Self::Full)
    }

    /// Whether it compresses without being told to.
    #[must_use]
    pub fn compresses(self) -> bool {
        self == Self::Full
    }
}

impl Technique {
    /// Name without settings, as in `results.json`.
    #[must_use]
    pub fn base(self) -> &'static str {
        match self {
            Self::Stock(stock) => stock.name(),
            Self::Gangway { preset, .. } => preset.name(),
        }
    }

    /// Whether it has an index of the rack's contents.
    #[must_use]
    pub fn has_index(self) -> bool {
        matches!(self, Self::Gangway { preset, .. } if preset.has_index())
    }

    /// When VMs change hosts, as in `results.json`.
    #[must_use]
    pub fn mode(self) -> &'static str {
        match self {
            Self::Stock(stock) if stock.is_postcopy() => "post-copy",
            Self::Gangway {
                mode: Mode::PostCopyHeld,
                ..
            } => "post-copy-held",
            Self::Gangway { mode, .. } => mode.in_plan(),
            Self::Stock(_) => "pre-copy",
        }
    }

    /// Whether VMs may run at their targets before their memory.
    #[must_use]
    pub fn memory_may_follow(self) -> bool {
        match self {
            Self::Stock(stock) => stock.is_postcopy(),
            Self::Gangway { mode, .. } => mode != Mode::PreCopy,
        }
    }

    /// Whether VMs stand still at both ends with all of their memory, so that it can be compared.
    #[must_use]
    pub fn can_be_compared(self) -> bool {
        let is_held = matches!(
            self,
            Self::Gangway {
                mode: Mode::PostCopyHeld,
                ..
            }
        );
        is_held || !self.memory_may_follow()
    }

    /// Gangway's compression.
    #[must_use]
    pub fn compression(self) -> &'static str {
        match self {
            Self::Gangway { preset, extras, .. } if extras.zstd || preset.compresses() => "zstd",
            _ => "none",
        }
    }

    /// Whether gangway gives requested pages a channel of their own in post-copy.
    #[must_use]
    pub fn preempts(self) -> bool {
        matches!(self, Self::Gangway { extras, .. } if extras.preempt)
    }

    /// Gangway's sharing, where the preset does not say it.
    #[must_use]
    pub fn sharing(self) -> Option<&'static str> {
        matches!(self, Self::Gangway { extras, .. } if extras.identical).then_some("identical")
    }
}

impl fmt::Display for Technique {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.base())?;
        match self {
            Self::Gangway { extras, mode, .. } => {
                f.write_str(if extras.zstd { "+zstd" } else { "" })?;
                f.write_str(if extras.identical { "+identical" } else { "" })?;
                f.write_str(if extras.preempt { "+preempt" } else { "" })?;
                f.write_str(mode.suffix())
            }
            Self::Stock(_) => Ok(()),
        }
    }
}

impl FromStr for Technique {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let switched = Mode::SUFFIXES
            .into_iter()
            .find_map(|(suffix, mode)| Some((text.strip_suffix(suffix)?, mode)));
        let (rest, mode) = switched.unwrap_or((text, Mode::PreCopy));
        let without = |text, suffix| match str::strip_suffix(text, suffix) {
            Some(base) => (base, true),
            None => (text, false),
        };
        let (rest, preempt) = without(rest, "+preempt");
        let (rest, identical) = without(rest, "+identical");
        let (base, zstd) = without(rest, "+zstd");
        let extras = Extras {
            zstd,
            identical,
            preempt,
        };
        if let Some(stock) = Stock::ALL.into_iter().find(|stock| stock.name() == text) {
            return Ok(Self::Stock(stock));
        }
        Preset::ALL
            .into_iter()
            .find(|preset| preset.name() == base && !(zstd && preset.compresses()))
            .map(|preset| Self::Gangway {
                preset,
                extras,
                mode,
            })
            .with_context(|| {
                let stock = Stock::ALL.map(Stock::name).join(", ");
                format!(
                    "`{text}` is no technique; there are {stock}, oc, gang, irlm, slm (each with \
                     +zstd too) and full, all of Gangway's with +identical too, and with +postcopy, \
                     +postcopy-held or +hybrid, before which +preempt may stand"
                )
            })
    }
}

impl TryFrom<String> for Technique {
    type Error = anyhow::Error;

    fn try_from(text: String) -> anyhow::Result<Self> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_read_as_it_is_written() {
        for name in [
            "stock",
            "stock-xbzrle",
            "stock-multifd",
            "stock-multifd-zstd",
            "stock-auto-converge",
            "oc",
            "gang+zstd",
            "irlm",
            "irlm+zstd",
            "full",
            "slm",
            "stock-postcopy",
            "stock-postcopy-preempt",
            "gang+postcopy",
            "gang+zstd+postcopy-held",
            "gang+preempt+postcopy",
            "oc+hybrid",
            "full+identical",
            "gang+zstd+identical",
        ] {
            assert_eq!(name.parse::<Technique>().unwrap().to_string(), name);
        }
        let sharing = |name: &str| name.parse::<Technique>().unwrap().sharing();
        assert_eq!(sharing("gang+identical"), Some("identical"));
        assert_eq!(sharing("slm"), None);
        for wrong in [
            "full+zstd",
            "stock+zstd",
            "stock+postcopy",
            "stock+identical",
            "irlm+lz4",
            "",
        ] {
            assert!(wrong.parse::<Technique>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn only_vms_that_are_held_or_come_after_their_memory_can_be_compared() {
        let of = |name: &str| {
            let technique = name.parse::<Technique>().unwrap();
            (technique.memory_may_follow(), technique.can_be_compared())
        };
        for name in ["stock", "full"] {
            assert_eq!(of(name), (false, true), "{name}");
        }
        for name in ["stock-postcopy-preempt", "slm+postcopy", "oc+hybrid"] {
            assert_eq!(of(name), (true, false), "{name}");
        }
        assert_eq!(of("slm+postcopy-held"), (true, true));
    }

    #[test]
    fn full_compresses_by_itself_and_the_others_when_told() {
        let compression = |name: &str| name.parse::<Technique>().unwrap().compression();
        assert_eq!(compression("full"), "zstd");
        assert_eq!(compression("irlm"), "none");
        assert_eq!(compression("irlm+zstd"), "zstd");
    }
}
