//! The configuration of a stand-alone index.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use page::EntryId;
use serde::Deserialize;

use super::{ConfigError, Problem, parse, problem_of_name, problem_of_tls, read};

/// A thousand are 4 MB of guest memory: fewer serve nobody. At most what a process can number.
const MAX_ENTRIES: RangeInclusive<u32> = 1_000..=index::MAX_ENTRIES;

/// Configuration of `gangway index`, checked.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IndexConfig {
    /// Name of this index, for messages.
    pub name: String,
    /// Address that plans name in their `index`.
    pub bulk: SocketAddr,
    /// Directory of the same five files as an agent's.
    #[serde(default)]
    pub tls_dir: Option<PathBuf>,
    /// Listens without TLS: whoever reaches the port can make moves of others send more bytes. For
    /// labs on networks of their own.
    #[serde(default)]
    pub insecure_plaintext: bool,
    /// Place of this index in the plans' list, from 0.
    #[serde(default)]
    pub shard: u8,
    /// Most contents of all groups together, at 40 bytes each; contents beyond are not shared
    /// between hosts.
    #[serde(default = "default_max_entries")]
    pub max_entries: u32,
}

fn default_max_entries() -> u32 {
    *MAX_ENTRIES.end()
}

impl IndexConfig {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        Self::parse(path, &read(path)?)
    }

    /// Parses and checks the text of the file `path`.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        parse(path, text, Self::problem)
    }

    fn problem(&self) -> Option<Problem> {
        if self.shard >= EntryId::MAX_SHARDS {
            let must = format!("0 to {}", EntryId::MAX_SHARDS - 1);
            return Some(("shard", self.shard.to_string(), must));
        }
        if !MAX_ENTRIES.contains(&self.max_entries) {
            let must = format!("{} to {}", MAX_ENTRIES.start(), MAX_ENTRIES.end());
            return Some(("max_entries", self.max_entries.to_string(), must));
        }
        if let Some(dir) = self.tls_dir.as_ref().filter(|dir| !dir.is_absolute()) {
            let must = "an absolute path".to_owned();
            return Some(("tls_dir", dir.display().to_string(), must));
        }
        problem_of_name(&self.name)
            .or_else(|| problem_of_tls(self.tls_dir.as_deref(), self.insecure_plaintext))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALLEST: &str = "name = \"i\"\nbulk = \"127.0.0.1:7001\"\ntls_dir = \"/etc/pki\"\n";

    fn parse(extra: &str) -> Result<IndexConfig, String> {
        IndexConfig::parse(Path::new("index.toml"), &format!("{SMALLEST}{extra}"))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn the_smallest_file_is_the_only_shard_and_takes_what_a_process_can_number() {
        let config = parse("").unwrap();
        assert_eq!((config.shard, config.max_entries), (0, 100_000_000));
        assert!(!config.insecure_plaintext);
    }

    #[test]
    fn what_cannot_be_used_is_named_with_what_it_must_be() {
        for (line, expected) in [
            ("shard = 16", "`shard` is 16: it must be 0 to 15"),
            (
                "max_entries = 0",
                "`max_entries` is 0: it must be 1000 to 100000000",
            ),
            ("insecure_plaintext = true", "use TLS or not, not both"),
            ("control = \"127.0.0.1:1\"", "unknown field `control`"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(expected), "{line}: {error}");
        }
        let relative = SMALLEST.replace("/etc", "etc");
        let error = IndexConfig::parse(Path::new("i.toml"), &relative).unwrap_err();
        assert!(error.to_string().contains("an absolute path"), "{error}");
    }
}
