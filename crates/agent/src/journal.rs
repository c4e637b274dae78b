//! What survives the agent's death: one small file for each move under way, at each end.
//!
//! Files are replaced whole, by rename. They are not synced to disk: they have to survive this
//! process, not the host, whose death takes the VMs along.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sys::Process;

/// A QEMU as an entry names it, for good: another process can get its number, and another VM its monitor's path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct QemuProcess {
    pub(crate) pid: u32,
    /// Start time of the process, against another one of the same number.
    started: u64,
}

impl QemuProcess {
    pub(crate) fn of(process: &Process) -> io::Result<Self> {
        Ok(Self {
            pid: process.pid(),
            started: process.start_time()?,
        })
    }

    /// Whether it is still there.
    pub(crate) fn is_alive(self) -> bool {
        Process::open(self.pid).is_ok_and(|process| {
            process.is_alive() && Self::of(&process).is_ok_and(|found| found == self)
        })
    }
}

/// Entries of one role.
#[derive(Clone)]
pub(crate) struct Journal {
    dir: PathBuf,
}

impl Journal {
    pub(crate) fn open(dir: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&dir)?;
        Ok(Self { dir })
    }

    /// Writes the entry of the move `id`.
    pub(crate) fn write<T: Serialize>(&self, id: &str, entry: &T) -> io::Result<()> {
        let path = self.path(id);
        let fresh = path.with_extension("new");
        // Only for the owner: an entry may hold the secret of a trust domain.
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&fresh)?;
        file.write_all(&serde_json::to_vec_pretty(entry)?)?;
        fs::rename(&fresh, &path)
    }

    pub(crate) fn read<T: DeserializeOwned>(&self, id: &str) -> Option<T> {
        read(&self.path(id))
    }

    pub(crate) fn forget(&self, id: &str) {
        if let Err(error) = fs::remove_file(self.path(id))
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::error!(id, %error, "the journal's entry cannot be removed");
        }
    }

    /// All entries that can be read; others are reported and left for a person.
    pub(crate) fn all<T: DeserializeOwned>(&self) -> Vec<T> {
        self.files().filter_map(|path| read(&path)).collect()
    }

    /// Removes entries that nobody has written for `age`.
    pub(crate) fn expire(&self, age: Duration, mut is_done: impl FnMut(&Path) -> bool) {
        for path in self.files() {
            let old = fs::metadata(&path)
                .and_then(|m| m.modified())
                .is_ok_and(|at| {
                    SystemTime::now()
                        .duration_since(at)
                        .is_ok_and(|since| since > age)
                });
            if old && is_done(&path) {
                let _ = fs::remove_file(&path);
            }
        }
    }

    fn files(&self) -> impl Iterator<Item = PathBuf> {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        entries
            .map(|e| e.path())
            .filter(|p| p.extension().is_some_and(|e| e == "json"))
    }

    fn path(&self, id: &str) -> PathBuf {
        self.dir.join(format!("{}.json", file_name(id)))
    }
}

/// A file name for a move's id, of which no two ids share one.
pub(crate) fn file_name(id: &str) -> String {
    let mut name = String::new();
    for byte in id.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => name.push(byte.into()),
            _ => {
                use std::fmt::Write as _;
                let _ = write!(name, "%{byte:02x}");
            }
        }
    }
    name
}

fn read<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let bytes = fs::read(path).ok()?;
    match serde_json::from_slice(&bytes) {
        Ok(entry) => Some(entry),
        Err(error) => {
            tracing::error!(path = %path.display(), %error, "a journal entry cannot be read; look at it before removing it");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_there_until_it_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path().join("x")).unwrap();
        journal.write("g/a", &1).unwrap();
        journal.write("g/a", &2).unwrap();
        assert_eq!(journal.read::<i32>("g/a"), Some(2));
        assert_eq!(journal.all::<i32>(), [2]);
        journal.forget("g/a");
        assert_eq!(journal.read::<i32>("g/a"), None);
    }

    #[test]
    fn ids_do_not_leave_the_directory_or_share_a_file() {
        assert_eq!(file_name("../a"), "%2e%2e%2fa");
        assert_ne!(file_name("a/b"), file_name("a_b"));
    }
}
