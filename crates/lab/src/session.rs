//! One invocation of the lab on this machine: its names, and the certainty that nothing stays.
//!
//! Whatever the lab makes outside its own process carries the session's prefix `gw<pid>`: network
//! namespaces `gw<pid>-HOST`, cgroups `gw<pid>`, the directory `gw<pid>` for sockets and logs, and `gw<pid>-kept`.
//! Every process of a run lives in one of the cgroups, and most in one of the namespaces. So the name
//! alone is enough to remove all of it: at the end, on a signal, or when a later session finds the
//! leftovers of a dead one.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use anyhow::Context;
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::cgroup;
use crate::ksm;
use crate::shell::{output, say};

/// Where `ip netns` keeps the names of namespaces.
const NAMESPACES: &str = "/run/netns";
/// Where sessions have their directories. Not `TMPDIR`: the path of a unix socket must fit into 108
/// bytes.
const DIR: &str = "/tmp";
const PREFIX: &str = "gw";

/// Closed for good by who removes everything on a signal: the run goes on meanwhile, finds its guests
/// gone, and would make the next ones.
static MAKING: RwLock<()> = RwLock::new(());

/// To be held while a namespace, or a process in one, is made. Does not return once the lab is ending.
pub fn making() -> RwLockReadGuard<'static, ()> {
    MAKING.read().unwrap_or_else(PoisonError::into_inner)
}

/// Starts a process of a run, unless the lab is ending.
pub fn spawn(command: &mut Command) -> io::Result<Child> {
    let _making = making();
    command.spawn()
}

/// The names of one session. Dropping it removes all that carries them.
#[derive(Debug)]
pub struct Session {
    prefix: String,
}

impl Session {
    /// Starts a session: leftovers of dead ones are removed, and signals will end this one cleanly.
    pub fn start() -> anyhow::Result<Self> {
        anyhow::ensure!(
            rustix::process::geteuid().is_root(),
            "the lab needs root: it makes network namespaces and reads the memory of QEMU"
        );
        remove_leftovers();
        let prefix = own_prefix();
        fs::create_dir_all(dir_of(&prefix)).context("making the session's directory")?;
        remove_on_signal(prefix.clone())?;
        Ok(Self { prefix })
    }

    /// Name of the namespace of `host`.
    #[must_use]
    pub fn namespace(&self, host: &str) -> String {
        format!("{}-{host}", self.prefix)
    }

    /// The session's prefix, which names its cgroups.
    #[must_use]
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Directory for sockets and logs.
    #[must_use]
    pub fn dir(&self) -> PathBuf {
        dir_of(&self.prefix)
    }

    /// Directory for what the runs of this session have in common. [`Session::clear`] leaves it.
    #[must_use]
    pub fn kept_dir(&self) -> PathBuf {
        kept_dir_of(&self.prefix)
    }

    /// Ends all processes of the session's namespaces and removes these, for a fresh run.
    pub fn clear(&self) -> anyhow::Result<()> {
        remove(&self.prefix);
        fs::create_dir_all(self.dir()).context("making the session's directory")
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        remove_all(&self.prefix);
    }
}

/// Prefix of the session of this process, of which there is one at a time.
#[must_use]
pub fn own_prefix() -> String {
    format!("{PREFIX}{}", std::process::id())
}

/// The directories of all sessions of this machine.
#[must_use]
pub fn directories() -> Vec<PathBuf> {
    let names = entries(Path::new(DIR)).into_iter();
    names
        .filter(|name| session_of(name).is_some_and(|(prefix, _)| prefix == *name))
        .map(|name| dir_of(&name))
        .collect()
}

fn dir_of(prefix: &str) -> PathBuf {
    Path::new(DIR).join(prefix)
}

fn kept_dir_of(prefix: &str) -> PathBuf {
    Path::new(DIR).join(format!("{prefix}-kept"))
}

fn remove_on_signal(prefix: String) -> anyhow::Result<()> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mut ends = vec![SIGINT, SIGTERM];
    // With `nohup` the lab goes on when its terminal closes.
    if !is_ignored(SIGHUP, &status) {
        ends.push(SIGHUP);
    }
    let mut signals = Signals::new(ends).context("watching for signals")?;
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            if let Some(signal) = signals.forever().next() {
                say("interrupted: removing guests and networks");
                let _closed = MAKING.write().unwrap_or_else(PoisonError::into_inner);
                remove_all(&prefix);
                std::process::exit(128 + signal);
            }
        })
        .context("watching for signals")?;
    Ok(())
}

/// Whether a process ignores a signal whose `/proc/PID/status` this is.
fn is_ignored(signal: i32, status: &str) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

fn remove_leftovers() {
    let mut found: Vec<String> = [NAMESPACES, DIR]
        .into_iter()
        .flat_map(|dir| entries(Path::new(dir)))
        .chain(cgroup::names())
        .filter_map(|name| session_of(&name))
        .filter(|(_, pid)| !Path::new(&format!("/proc/{pid}")).exists())
        .map(|(prefix, _)| prefix)
        .collect();
    found.sort();
    found.dedup();
    for prefix in found {
        say(&format!("removing what the dead session {prefix} left"));
        remove_all(&prefix);
    }
}

/// The prefix and the process id in a name of ours.
fn session_of(name: &str) -> Option<(String, u32)> {
    let prefix = name.split('-').next()?;
    let pid = prefix.strip_prefix(PREFIX)?.parse().ok()?;
    Some((prefix.to_owned(), pid))
}

fn entries(dir: &Path) -> Vec<String> {
    let Ok(found) = fs::read_dir(dir) else {
        return Vec::new();
    };
    found
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

/// Removes everything with the prefix.
fn remove_all(prefix: &str) {
    remove(prefix);
    remove_dir(&kept_dir_of(prefix));
}

/// Removes all of a run. What cannot be removed is said, and left.
fn remove(prefix: &str) {
    let namespaces: Vec<String> = entries(Path::new(NAMESPACES))
        .into_iter()
        .filter(|name| session_of(name).is_some_and(|(of, _)| of == prefix))
        .collect();
    for namespace in &namespaces {
        end_processes(namespace, || pids_in_namespace(namespace));
    }
    // Those on their way into a namespace, and what has left it.
    end_processes("the session's cgroups", || cgroup::pids(prefix));
    for namespace in &namespaces {
        if let Err(error) = output(Command::new("ip").args(["netns", "del", namespace])) {
            say(&format!("{error:#}"));
        }
    }
    for left in cgroup::remove(prefix) {
        say(&format!("the cgroup {} cannot be removed", left.display()));
    }
    let dir = dir_of(prefix);
    ksm::restore(&dir);
    remove_dir(&dir);
}

fn remove_dir(dir: &Path) {
    unmount_below(dir);
    if let Err(error) = fs::remove_dir_all(dir)
        && dir.exists()
    {
        say(&format!("removing {}: {error}", dir.display()));
    }
}

/// The small disks that faults are played on, and what holds guests' memory.
fn unmount_below(dir: &Path) {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let paths = mounts.lines().filter_map(|line| line.split(' ').nth(1));
    for path in paths.filter(|path| Path::new(path).starts_with(dir)) {
        if let Err(error) = unmount(path, UnmountFlags::DETACH) {
            say(&format!("unmounting {path}: {error}"));
        }
    }
}

/// Kills every process that is `listed`, in `place`, and waits until they are gone.
fn end_processes(place: &str, listed: impl Fn() -> Vec<i32>) {
    let others = || -> Vec<Pid> {
        let pids = listed().into_iter().filter_map(Pid::from_raw);
        pids.filter(|pid| *pid != rustix::process::getpid())
            .collect()
    };
    // Twice the time that a QEMU with much memory was seen to need; then the place goes anyway.
    for _ in 0..100 {
        let pids = others();
        if pids.is_empty() {
            return;
        }
        for pid in pids {
            // It may have ended by itself meanwhile.
            let _ = kill_process(pid, Signal::KILL);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let left: Vec<String> = others().iter().map(ToString::to_string).collect();
    if !left.is_empty() {
        let left = left.join(", ");
        say(&format!("processes in {place} do not end: {left}"));
    }
}

fn pids_in_namespace(namespace: &str) -> Vec<i32> {
    let listed = output(Command::new("ip").args(["netns", "pids", namespace]));
    let listed = listed.unwrap_or_default();
    let pids = listed.lines().map(|line| line.trim().parse::<i32>());
    pids.filter_map(Result::ok).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_terminal_ends_the_lab_unless_it_was_started_to_outlive_it() {
        let status = |mask: &str| format!("SigBlk:\t00ff\nSigIgn:\t{mask}\nSigCgt:\tffff\n");
        assert!(is_ignored(SIGHUP, &status("0000000000001001")));
        assert!(!is_ignored(SIGHUP, &status("0000000000001000")));
        assert!(!is_ignored(SIGHUP, ""));
    }

    #[test]
    fn only_names_of_a_session_are_taken_for_leftovers() {
        assert_eq!(session_of("gw123-s1"), Some(("gw123".into(), 123)));
        assert_eq!(session_of("gw123"), Some(("gw123".into(), 123)));
        for other in ["gateway-1", "gw-1", "gwx", "", "s1-gw12"] {
            assert_eq!(session_of(other), None, "{other}");
        }
    }
}
