//! Plans of groups that are under way or need a person on disk, so that a restarted coordinator
//! follows them again.
//!
//! No secrets: the source agents hold the keys for as long as their moves need them.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::types::{Phase, Plan};

/// The directory of plans.
pub(crate) struct SavedGroups {
    dir: PathBuf,
}

/// What is remembered of a group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SavedGroup {
    pub(crate) id: String,
    pub(crate) accepted_unix_ms: f64,
    pub(crate) plan: Plan,
    /// How moves ended that nobody has to look at, by VM, while others need a person.
    #[serde(default)]
    pub(crate) outcomes: BTreeMap<String, Outcome>,
}

/// How a move ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Outcome {
    pub(crate) phase: Phase,
    pub(crate) message: String,
}

impl SavedGroups {
    pub(crate) fn new(state_dir: &Path) -> Self {
        Self {
            dir: state_dir.join("groups"),
        }
    }

    /// Writes a group's plan; it is there whole or not at all, also after a power cut.
    pub(crate) fn write(&self, group: &SavedGroup) -> io::Result<()> {
        fs::create_dir_all(&self.dir)?;
        let unfinished = self.dir.join(format!(".{}", group.id));
        // Command lines in a plan may hold secrets of the VM.
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&unfinished)?;
        file.write_all(&serde_json::to_vec(group)?)?;
        file.sync_all()?;
        fs::rename(&unfinished, self.path(&group.id))?;
        File::open(&self.dir)?.sync_all()
    }

    /// Adds to a group's plan how some of its moves ended. Their source agents forget that.
    pub(crate) fn add_outcomes(&self, id: &str, outcomes: BTreeMap<String, Outcome>) {
        let Some(mut group) = read(&self.path(id)) else {
            return;
        };
        group.outcomes = outcomes;
        if let Err(error) = self.write(&group) {
            tracing::warn!(group = id, "cannot remember how its moves ended: {error}");
        }
    }

    /// Forgets a group, if it is known.
    pub(crate) fn remove(&self, id: &str) {
        match fs::remove_file(self.path(id)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(group = id, "cannot forget its plan: {error}");
            }
            _ => {}
        }
    }

    /// All remembered groups. One that cannot be read is logged, and stays.
    pub(crate) fn load(&self) -> Vec<SavedGroup> {
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
            Err(error) => {
                tracing::error!("cannot read {}: {error}", self.dir.display());
                return Vec::new();
            }
        };
        let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
        let finished = paths.filter(|path| path.extension().is_some_and(|kind| kind == "json"));
        finished.filter_map(|path| read(&path)).collect()
    }

    fn path(&self, id: &str) -> PathBuf {
        self.dir.join(format!("{id}.json"))
    }
}

fn read(path: &Path) -> Option<SavedGroup> {
    let problem = match fs::read(path).map(|text| serde_json::from_slice::<SavedGroup>(&text)) {
        Ok(Ok(group)) => match group.plan.check() {
            Ok(()) => return Some(group),
            Err(error) => error.to_string(),
        },
        Ok(Err(error)) => error.to_string(),
        Err(error) => error.to_string(),
    };
    tracing::error!(
        "cannot follow the group of {} again: {problem}",
        path.display()
    );
    None
}
