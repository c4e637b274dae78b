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
        /// Whether literals are compressed where the preset does not do so.
        zstd: bool,
    },
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
}

impl Stock {
    const ALL: [Self; 5] = [
        Self::Plain,
        Self::Xbzrle,
        Self::Multifd,
        Self::MultifdZstd,
        Self::AutoConverge,
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
        }
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

    /// Gangway's compression.
    #[must_use]
    pub fn compression(self) -> &'static str {
        match self {
            Self::Gangway { preset, zstd } if zstd || preset.compresses() => "zstd",
            _ => "none",
        }
    }
}

impl fmt::Display for Technique {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.base())?;
        match self {
            Self::Gangway { zstd: true, .. } => f.write_str("+zstd"),
            _ => Ok(()),
        }
    }
}

impl FromStr for Technique {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let (base, zstd) = match text.strip_suffix("+zstd") {
            Some(base) => (base, true),
            None => (text, false),
        };
        if let Some(stock) = Stock::ALL.into_iter().find(|stock| stock.name() == text) {
            return Ok(Self::Stock(stock));
        }
        Preset::ALL
            .into_iter()
            .find(|preset| preset.name() == base && !(zstd && preset.compresses()))
            .map(|preset| Self::Gangway { preset, zstd })
            .with_context(|| {
                let stock = Stock::ALL.map(Stock::name).join(", ");
                format!(
                    "`{text}` is no technique; there are {stock}, oc, gang, irlm, slm (each with \
                     +zstd too) and full"
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
        ] {
            assert_eq!(name.parse::<Technique>().unwrap().to_string(), name);
        }
        for wrong in ["full+zstd", "stock+zstd", "irlm+lz4", ""] {
            assert!(wrong.parse::<Technique>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn full_compresses_by_itself_and_the_others_when_told() {
        let compression = |name: &str| name.parse::<Technique>().unwrap().compression();
        assert_eq!(compression("full"), "zstd");
        assert_eq!(compression("irlm"), "none");
        assert_eq!(compression("irlm+zstd"), "zstd");
    }
}
