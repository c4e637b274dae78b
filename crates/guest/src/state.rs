//! Whether a guest runs.

use std::fmt;

use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::migration::GLANCE;
use crate::{Qmp, QmpError};

/// QEMU's run state.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum RunState {
    /// The guest executes.
    Running,
    /// Stopped by a person or a manager.
    Paused,
    /// Waiting for, or reading, an incoming migration.
    InMigrate,
    /// Stopped after it was migrated away.
    PostMigrate,
    /// Stopped for the last part of a migration.
    FinishMigrate,
    /// Started with `-S`, never let go.
    Prelaunch,
    /// The guest sleeps.
    Suspended,
    /// The guest has shut down and QEMU stays.
    Shutdown,
    /// Stopped by an error of a disk.
    IoError,
    /// Stopped by an error of QEMU or KVM.
    InternalError,
    /// The guest's kernel has panicked.
    GuestPanicked,
    /// One that this crate does not tell apart, in QEMU's word.
    Other(String),
}

/// QEMU's word for each state.
const WORDS: [(&str, RunState); 11] = [
    ("running", RunState::Running),
    ("paused", RunState::Paused),
    ("inmigrate", RunState::InMigrate),
    ("postmigrate", RunState::PostMigrate),
    ("finish-migrate", RunState::FinishMigrate),
    ("prelaunch", RunState::Prelaunch),
    ("suspended", RunState::Suspended),
    ("shutdown", RunState::Shutdown),
    ("io-error", RunState::IoError),
    ("internal-error", RunState::InternalError),
    ("guest-panicked", RunState::GuestPanicked),
];

impl From<&str> for RunState {
    fn from(word: &str) -> Self {
        let known = WORDS.iter().find(|(known, _)| *known == word);
        known.map_or_else(|| Self::Other(word.to_owned()), |(_, state)| state.clone())
    }
}

impl fmt::Display for RunState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = WORDS
            .iter()
            .find(|(_, state)| state == self)
            .map(|(word, _)| *word);
        match (self, word) {
            (Self::Other(word), _) => f.write_str(word),
            (_, word) => f.write_str(word.unwrap_or("unknown")),
        }
    }
}

impl<'de> Deserialize<'de> for RunState {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(|word| Self::from(word.as_str()))
    }
}

/// `query-status`.
#[derive(Deserialize)]
struct Status {
    status: RunState,
}

/// Asks QEMU.
pub(crate) fn run_state(qmp: &Qmp) -> Result<RunState, QmpError> {
    Ok(qmp.query::<Status>("query-status")?.status)
}

/// Asks QEMU in passing.
pub(crate) fn glance_at_state(qmp: &Qmp) -> Result<RunState, QmpError> {
    let answer = qmp.execute_within("query-status", &Value::Null, GLANCE)?;
    let status: Status = serde_json::from_value(answer).map_err(|source| QmpError::Answer {
        command: "query-status".to_owned(),
        source,
    })?;
    Ok(status.status)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_reads_back_from_its_word() {
        for (word, state) in WORDS {
            assert_eq!(RunState::from(word), state);
            assert_eq!(state.to_string(), word);
        }
        assert_eq!(RunState::from("colo"), RunState::Other("colo".to_owned()));
        assert_eq!(RunState::from("colo").to_string(), "colo");
    }
}
