//! What QEMU says about a migration under way.

use std::fmt;
use std::time::Duration;

use page::ByteLen;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::{Qmp, QmpError};

/// Where QEMU's own migration stands.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub enum MigrationStatus {
    /// There was none.
    #[default]
    None,
    /// Connecting.
    Setup,
    /// Copying memory in rounds.
    Active,
    /// The guest is stopped and QEMU waits for `migrate-continue`.
    PreSwitchover,
    /// Device state is on its way.
    Device,
    /// Done; at the source: the target has said so.
    Completed,
    /// A cancellation is on its way.
    Cancelling,
    /// Cancelled.
    Cancelled,
    /// Failed; the guest runs on at the source.
    Failed,
    /// Another phase of QEMU's, post-copy among them, in its word: not ended.
    Other(String),
}

/// QEMU's word for each status.
const WORDS: [(&str, MigrationStatus); 9] = [
    ("none", MigrationStatus::None),
    ("setup", MigrationStatus::Setup),
    ("active", MigrationStatus::Active),
    ("pre-switchover", MigrationStatus::PreSwitchover),
    ("device", MigrationStatus::Device),
    ("completed", MigrationStatus::Completed),
    ("cancelling", MigrationStatus::Cancelling),
    ("cancelled", MigrationStatus::Cancelled),
    ("failed", MigrationStatus::Failed),
];

impl MigrationStatus {
    /// Whether no migration goes on.
    #[must_use]
    pub fn is_over(&self) -> bool {
        matches!(
            self,
            Self::None | Self::Completed | Self::Cancelled | Self::Failed
        )
    }
}

impl From<&str> for MigrationStatus {
    fn from(word: &str) -> Self {
        let known = WORDS.iter().find(|(known, _)| *known == word);
        known.map_or_else(
            || Self::Other(word.to_owned()),
            |(_, status)| status.clone(),
        )
    }
}

impl fmt::Display for MigrationStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = WORDS
            .iter()
            .find(|(_, status)| status == self)
            .map(|(word, _)| *word);
        match (self, word) {
            (Self::Other(word), _) => f.write_str(word),
            (_, word) => f.write_str(word.unwrap_or("unknown")),
        }
    }
}

impl<'de> Deserialize<'de> for MigrationStatus {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(|word| Self::from(word.as_str()))
    }
}

/// A snapshot of a migration. The counts are QEMU's: logical bytes, before any deduplication, and
/// zero until QEMU has begun to copy.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct MigrationInfo {
    /// Where it stands.
    pub status: MigrationStatus,
    /// Bytes written into the stream.
    pub transferred: ByteLen,
    /// Memory still to send.
    pub remaining: ByteLen,
    /// Memory in all.
    pub total: ByteLen,
    /// Speed at which the guest dirties its memory, bytes per second.
    pub dirty_bytes_per_s: u64,
    /// How often QEMU has collected the dirty pages: the round, from 1.
    pub dirty_sync_count: u64,
    /// How long the guest stood still, milliseconds; known at the end.
    pub downtime_ms: Option<u64>,
    /// QEMU's words about a failure.
    pub error_desc: Option<String>,
    /// Why QEMU cannot migrate this VM at all; empty if it can.
    pub blocked_reasons: Vec<String>,
}

/// `query-migrate`'s answer, every part of it optional.
#[derive(Deserialize, Default)]
#[serde(rename_all = "kebab-case", default)]
struct RawInfo {
    status: MigrationStatus,
    ram: RawRam,
    downtime: Option<u64>,
    error_desc: Option<String>,
    blocked_reasons: Vec<String>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "kebab-case", default)]
struct RawRam {
    transferred: u64,
    remaining: u64,
    total: u64,
    dirty_pages_rate: u64,
    dirty_sync_count: u64,
    page_size: u64,
}

impl From<RawInfo> for MigrationInfo {
    fn from(
        RawInfo {
            status,
            ram,
            downtime,
            error_desc,
            blocked_reasons,
        }: RawInfo,
    ) -> Self {
        Self {
            status,
            transferred: ByteLen(ram.transferred),
            remaining: ByteLen(ram.remaining),
            total: ByteLen(ram.total),
            dirty_bytes_per_s: ram.dirty_pages_rate.saturating_mul(ram.page_size),
            dirty_sync_count: ram.dirty_sync_count,
            downtime_ms: downtime,
            error_desc,
            blocked_reasons,
        }
    }
}

/// Longest wait for an answer in passing: a QEMU that holds its lock answers when it lets go, and who
/// watches it has other things to watch.
pub(crate) const GLANCE: Duration = Duration::from_secs(1);

/// Asks QEMU in passing.
pub(crate) fn glance(qmp: &Qmp) -> Result<MigrationInfo, QmpError> {
    let answer = qmp.execute_within("query-migrate", &Value::Null, GLANCE)?;
    let info: RawInfo = serde_json::from_value(answer).map_err(|source| QmpError::Answer {
        command: "query-migrate".to_owned(),
        source,
    })?;
    Ok(info.into())
}

/// Sets parameters in passing.
pub(crate) fn set_in_passing(qmp: &Qmp, parameters: &Value) -> Result<(), QmpError> {
    qmp.execute_within("migrate-set-parameters", parameters, GLANCE)
        .map(drop)
}

/// Asks QEMU.
pub(crate) fn migration_info(qmp: &Qmp) -> Result<MigrationInfo, QmpError> {
    Ok(qmp.query::<RawInfo>("query-migrate")?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(json: &str) -> MigrationInfo {
        serde_json::from_str::<RawInfo>(json).unwrap().into()
    }

    #[test]
    fn an_empty_answer_is_no_migration() {
        assert_eq!(parsed("{}"), MigrationInfo::default());
        assert!(parsed("{}").status.is_over());
    }

    #[test]
    fn counts_come_in_bytes_and_rounds() {
        let info = parsed(
            r#"{"status":"active","new-key":[1],"ram":{"transferred":9,"remaining":8192,"total":16384,
               "dirty-pages-rate":10,"page-size":4096,"dirty-sync-count":3,"mbps":1.5}}"#,
        );
        assert_eq!(info.status, MigrationStatus::Active);
        assert_eq!(
            (info.transferred.0, info.remaining.0, info.total.0),
            (9, 8192, 16384)
        );
        assert_eq!((info.dirty_bytes_per_s, info.dirty_sync_count), (40960, 3));
        assert_eq!(info.downtime_ms, None);
    }

    #[test]
    fn only_the_four_final_words_are_an_end() {
        for (word, status) in WORDS {
            assert_eq!(MigrationStatus::from(word), status);
            assert_eq!(status.to_string(), word);
            let end = ["none", "completed", "cancelled", "failed"].contains(&word);
            assert_eq!(status.is_over(), end, "{word}");
        }
        assert!(!MigrationStatus::from("postcopy-paused").is_over());
    }
}
