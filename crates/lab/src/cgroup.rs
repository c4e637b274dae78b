//! Memory and processors of a host: a cgroup for each, of version 1 or 2.
//!
//! Hosts share the machine's processors in equal parts, however many threads each has, as far as
//! they want them: what a host does with 20 guests takes nothing from another's server. Without it
//! the kernel would give each session of processes (`setsid`) a part, and an agent starts each of its
//! QEMUs in a session of its own.

use std::fs;
use std::io::Write;
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

/// The cgroups of a session below `root`, hosts before what holds them.
fn all_below(root: &Path, session: &str) -> Vec<PathBuf> {
    let parent = root.join(session);
    let Ok(hosts) = fs::read_dir(&parent) else {
        return Vec::new();
    };
    hosts
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
        .chain([parent.clone()])
        .collect()
}

/// Process ids of all that is in a session's cgroups. This process is, while a thread of it is.
#[must_use]
pub fn pids(session: &str) -> Vec<i32> {
    pids_below(&controllers(), session)
}

fn pids_below(roots: &[PathBuf], session: &str) -> Vec<i32> {
    let dirs = roots.iter().flat_map(|root| all_below(root, session));
    let texts = dirs.filter_map(|dir| fs::read_to_string(dir.join("cgroup.procs")).ok());
    let mut pids: Vec<i32> = texts
        .flat_map(|text| text.lines().map(str::parse::<i32>).collect::<Vec<_>>())
        .filter_map(Result::ok)
        .collect();
    pids.sort_unstable();
    pids.dedup();
    pids
}

/// Removes the cgroups of a session, whose processes have ended; returns those that could not be.
#[must_use]
pub fn remove(session: &str) -> Vec<PathBuf> {
    let roots = controllers();
    for root in &roots {
        for dir in all_below(root, session) {
            let_own_threads_go(root, &dir);
            // An ended process can stay accounted for a moment longer.
            for _ in 0..50 {
                if fs::remove_dir(&dir).is_ok() || !dir.exists() {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
        }
    }
    // Below one root with version 2.
    let mut left: Vec<PathBuf> = roots
        .iter()
        .flat_map(|root| all_below(root, session))
        .collect();
    left.sort_unstable();
    left.dedup();
    left
}

/// Moves threads of this process that [`yield_to_hosts`] has put into `dir` to where all processes begin.
fn let_own_threads_go(root: &Path, dir: &Path) {
    let threads = fs::read_to_string(dir.join("tasks")).unwrap_or_default();
    let own = |thread: &&str| Path::new("/proc/self/task").join(thread).exists();
    for thread in threads.lines().filter(own) {
        // It may have ended meanwhile.
        let _ = fs::write(root.join("tasks"), thread);
    }
}

/// What a thread that yields may have of the processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// What no host wants.
    Rest,
    /// As much as one host.
    OfAHost,
}

impl Part {
    const ALL: [Self; 2] = [Self::Rest, Self::OfAHost];

    /// Of its cgroup, beside those of the hosts: no host is called so.
    fn name(self) -> &'static str {
        match self {
            Self::Rest => "lab-rest",
            Self::OfAHost => "lab-host",
        }
    }
}

/// The least that the kernel knows; a host has 1024.
const LEAST_SHARES: &str = "2";

/// Makes the cgroups that the lab's own threads of a session yield in. They hold single threads, which
/// version 2 does not have: there they are missing.
pub fn make_parts(session: &str) {
    if is_v2() {
        return;
    }
    let [_, _, root] = controllers();
    for part in Part::ALL {
        let dir = root.join(session).join(part.name());
        let _ = fs::create_dir_all(&dir);
        if part == Part::Rest {
            let _ = fs::write(dir.join("cpu.shares"), LEAST_SHARES);
        }
    }
}

/// Gives the calling thread, until it ends, no more of the processors than a part beside the hosts of
/// `session`. A priority would not do: the kernel gives each session of processes its part first, and the
/// lab's would be as large as that of all hosts together.
pub fn yield_to_hosts(session: &str, part: Part) -> anyhow::Result<()> {
    let [_, _, root] = controllers();
    let tasks = root.join(session).join(part.name()).join("tasks");
    let thread = rustix::thread::gettid().to_string();
    // Not made if it is not there.
    let file = fs::File::options().write(true).open(&tasks);
    file.and_then(|mut file| file.write_all(thread.as_bytes()))
        .with_context(|| format!("writing to {}", tasks.display()))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_of_all_hosts_and_controllers_are_found_once() {
        let dir = tempfile::tempdir().unwrap();
        let roots = ["memory", "cpu"].map(|name| dir.path().join(name));
        for (root, host, pids) in [
            (&roots[0], "gw1/s1", "7\n8\n"),
            (&roots[1], "gw1/s1", "8\n"),
            (&roots[1], "gw1", "9\n"),
            (&roots[1], "gw2/s1", "10\n"),
        ] {
            let host = root.join(host);
            fs::create_dir_all(&host).unwrap();
            fs::write(host.join("cgroup.procs"), pids).unwrap();
        }
        assert_eq!(pids_below(&roots, "gw1"), [7, 8, 9]);
        assert!(pids_below(&roots, "gw3").is_empty());
    }

    /// Needs root, and version 1.
    #[test]
    fn real_a_thread_has_the_least_of_the_processors_and_then_as_much_as_a_host() {
        if is_v2() {
            return;
        }
        let session = format!("gw{}", std::process::id());
        Cgroup::create(&session, "s1").unwrap();
        make_parts(&session);
        let shares = |part: Part| {
            yield_to_hosts(&session, part).unwrap();
            let all = fs::read_to_string("/proc/thread-self/cgroup").unwrap();
            let own = all.lines().find_map(|line| {
                let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
                controllers
                    .split(',')
                    .any(|name| name == "cpu")
                    .then_some(path)
            });
            let shares = Path::new(ROOT)
                .join("cpu")
                .join(own.unwrap().trim_start_matches('/'))
                .join("cpu.shares");
            fs::read_to_string(shares).unwrap().trim().to_owned()
        };
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| Part::ALL.map(shares));
            assert_eq!(thread.join().unwrap(), ["2", "1024"]);
            // One that still yields does not keep its cgroup.
            let (left, leave) = std::sync::mpsc::channel::<()>();
            let (ready, is_ready) = std::sync::mpsc::channel();
            let session = &session;
            scope.spawn(move || {
                yield_to_hosts(session, Part::Rest).unwrap();
                ready.send(()).unwrap();
                let _ = leave.recv();
            });
            is_ready.recv().unwrap();
            assert_eq!(remove(session), Vec::<PathBuf>::new());
            drop(left);
        });
    }
}
