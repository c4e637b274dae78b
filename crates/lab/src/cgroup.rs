//! Memory and processor time of a host: a cgroup for each, of version 1 or 2.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;

const ROOT: &str = "/sys/fs/cgroup";

/// The cgroup of one host. With version 1 it exists once for each of the two controllers.
#[derive(Clone, Debug)]
pub struct Cgroup {
    memory: PathBuf,
    processor: PathBuf,
}

impl Cgroup {
    /// Makes the cgroup of `host` in `session`.
    pub fn create(session: &str, host: &str) -> anyhow::Result<Self> {
        if is_v2() {
            enable_controllers(Path::new(ROOT));
            let parent = Path::new(ROOT).join(session);
            fs::create_dir_all(&parent).with_context(|| format!("making {}", parent.display()))?;
            enable_controllers(&parent);
        }
        let [memory, processor] = controllers().map(|root| root.join(session).join(host));
        for dir in [&memory, &processor] {
            fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
        }
        Ok(Self { memory, processor })
    }

    /// Files that a process writes its own id into to join.
    #[must_use]
    pub fn joins(&self) -> [PathBuf; 2] {
        [
            self.memory.join("cgroup.procs"),
            self.processor.join("cgroup.procs"),
        ]
    }

    /// Gives the host no more memory than this: what its processes take beyond it is swapped, or one
    /// of them is killed.
    pub fn limit_memory(&self, bytes: u64) -> anyhow::Result<()> {
        let name = if is_v2() {
            "memory.max"
        } else {
            "memory.limit_in_bytes"
        };
        let path = self.memory.join(name);
        fs::write(&path, bytes.to_string())
            .with_context(|| format!("writing {bytes} to {}", path.display()))
    }

    /// Memory that the host's processes hold: anonymous and shared, without files' page cache
    /// (which they share with the rest of the machine).
    #[must_use]
    pub fn footprint_bytes(&self) -> Option<u64> {
        let text = fs::read_to_string(self.memory.join("memory.stat")).ok()?;
        let names = if is_v2() {
            ["anon", "shmem"]
        } else {
            ["total_rss", "total_shmem"]
        };
        Some(field(&text, names[0])? + field(&text, names[1]).unwrap_or(0))
    }

    /// Processor time that the host's processes have used, ended ones included.
    #[must_use]
    pub fn processor_s(&self) -> Option<f64> {
        if is_v2() {
            let text = fs::read_to_string(self.processor.join("cpu.stat")).ok()?;
            Some(field(&text, "usage_usec")? as f64 / 1e6)
        } else {
            let text = fs::read_to_string(self.processor.join("cpuacct.usage")).ok()?;
            Some(text.trim().parse::<u64>().ok()? as f64 / 1e9)
        }
    }
}

/// Names of all cgroups at the place where sessions make theirs.
#[must_use]
pub fn names() -> Vec<String> {
    let Ok(found) = fs::read_dir(&controllers()[0]) else {
        return Vec::new();
    };
    found
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

/// Removes the cgroups of a session, whose processes have ended.
pub fn remove(session: &str) {
    for root in controllers() {
        let parent = root.join(session);
        let Ok(hosts) = fs::read_dir(&parent) else {
            continue;
        };
        let hosts: Vec<PathBuf> = hosts
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.is_dir())
            .collect();
        for dir in hosts.iter().chain([&parent]) {
            // An ended process can stay accounted for a moment longer.
            for _ in 0..50 {
                if fs::remove_dir(dir).is_ok() || !dir.exists() {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
        }
    }
}

fn is_v2() -> bool {
    Path::new(ROOT).join("cgroup.controllers").exists()
}

fn controllers() -> [PathBuf; 2] {
    let root = Path::new(ROOT);
    if is_v2() {
        [root.to_owned(), root.to_owned()]
    } else {
        [root.join("memory"), root.join("cpuacct")]
    }
}

/// Version 2 accounts for the children of a cgroup only if told to. Where that is not allowed the
/// measures are missing, and nothing else.
fn enable_controllers(dir: &Path) {
    let _ = fs::write(dir.join("cgroup.subtree_control"), "+memory +cpu");
}

fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        line.strip_prefix(name)?
            .strip_prefix(' ')?
            .trim()
            .parse()
            .ok()
    })
}
