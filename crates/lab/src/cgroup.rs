//! Memory and processors of a host: a cgroup for each, of version 1 or 2.
//!
//! Hosts share the machine's processors in equal parts, however many threads each has, as far as
//! they want them: what a host does with 20 guests takes nothing from another's server. Without it
//! the kernel would give each session of processes (`setsid`) a part, and an agent starts each of its
//! QEMUs in a session of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;

const ROOT: &str = "/sys/fs/cgroup";

/// Joins the cgroups, goes into the network namespace and becomes the program.
const ENTER: &str = r#"for f in "$1" "$2" "$3"; do echo $$ > "$f"; done; ns=$4; shift 4
exec ip netns exec "$ns" "$@""#;

/// The cgroup of one host. With version 1 it exists once for each of the controllers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup {
    memory: PathBuf,
    time: PathBuf,
    share: PathBuf,
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
        let [memory, time, share] = controllers().map(|root| root.join(session).join(host));
        for dir in [&memory, &time, &share] {
            fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
        }
        Ok(Self {
            memory,
            time,
            share,
        })
    }

    /// A command that runs the program which is its next argument in this cgroup and in a network
    /// namespace. The process id of the child is the program's.
    #[must_use]
    pub fn enter(&self, namespace: &str) -> Command {
        let joins = [&self.memory, &self.time, &self.share].map(|dir| dir.join("cgroup.procs"));
        let mut command = Command::new("sh");
        command.args(["-c", ENTER, "sh"]).args(joins).arg(namespace);
        command
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
            let text = fs::read_to_string(self.time.join("cpu.stat")).ok()?;
            Some(field(&text, "usage_usec")? as f64 / 1e6)
        } else {
            let text = fs::read_to_string(self.time.join("cpuacct.usage")).ok()?;
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

/// Where those for memory, for accounts of processor time and for shares of it are mounted.
fn controllers() -> [PathBuf; 3] {
    let root = Path::new(ROOT);
    ["memory", "cpuacct", "cpu"].map(|name| {
        if is_v2() {
            root.to_owned()
        } else {
            root.join(name)
        }
    })
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
