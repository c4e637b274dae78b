//! Guests that have booted and settled, kept in files: every run of a scenario begins with the same.
//!
//! Two boots of a guest do not leave the same memory, and two dozen emulated guests take longer to
//! boot than to be moved. So the VMs of a scenario boot once, their states go to files, as stock
//! QEMU writes them, and each run starts its QEMUs from these. The racks on which they booted are
//! gone by then: nothing of the writing is in a run's memory cgroups.
//!
//! Applications start in each run only: connections would not outlive this. Guests that a file
//! cannot hold all of boot for each run: those with a disk, and those that are copies of a template.

use std::path::{Path, PathBuf};

use anyhow::Context;
use rustix::mount::{MountFlags, mount};
use serde_json::json;

use crate::bench::{self, Bench, Programs};
use crate::bounds::Bounds;
use crate::guest::{IDLE, Vm};
use crate::scenario::{self, Scenario};
use crate::session::Session;
use crate::shell::say;
use crate::state_file;

/// The first version of QEMU all of whose releases write a migration into a file.
const FIRST_WITH_FILES: u32 = 9;
/// QEMU writes no slower than it can.
const NO_LIMIT_BYTES_PER_S: u64 = 1 << 40;

/// The guests kept so far.
#[derive(Debug)]
pub struct Saved {
    dir: PathBuf,
    guests: Vec<Guest>,
    bounds: Vec<(Idle, Bounds)>,
}

/// Guests whose memory is in each run what it is in the others: how many, and what they are.
#[derive(Debug, PartialEq, Eq)]
struct Idle {
    what: What,
    source_hosts: u32,
    vms_per_host: u32,
}

impl Idle {
    /// `None` if they do something.
    fn of(scenario: &Scenario) -> Option<Self> {
        let is_idle = scenario.vm.mode == IDLE && !scenario.guests_share_links();
        is_idle.then(|| Self {
            what: What::of(scenario),
            source_hosts: scenario.hosts.source,
            vms_per_host: scenario.hosts.vms_per_host,
        })
    }
}

/// One of them: what it is decides whether a VM can begin as it.
#[derive(Debug)]
struct Guest {
    name: String,
    what: What,
    state: PathBuf,
}

impl Saved {
    /// A place for the guests of a scenario, in memory: what is measured must not wait for a disk.
    pub fn place(session: &Session) -> anyhow::Result<Self> {
        let dir = session.kept_dir();
        std::fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
        mount("tmpfs", &dir, "tmpfs", MountFlags::empty(), c"").context("mounting a tmpfs")?;
        Ok(Self {
            dir,
            guests: Vec::new(),
            bounds: Vec::new(),
        })
    }

    /// Whether a file can hold all that the guests of `scenario` are.
    #[must_use]
    pub fn can_hold(scenario: &Scenario, programs: &Programs) -> bool {
        let writes_files = major(&programs.source.version) >= Some(FIRST_WITH_FILES);
        let vm = &scenario.vm;
        writes_files && !vm.disk && !vm.template
    }

    /// Boots those VMs of `scenario` that are not kept yet, on racks of their own.
    pub fn complete(
        &mut self,
        session: &Session,
        scenario: &Scenario,
        programs: &Programs,
    ) -> anyhow::Result<()> {
        let is_missing = |name: &str| self.state_of(name, scenario).is_none();
        if !bench::names(scenario).any(|name| is_missing(&name)) {
            return Ok(());
        }
        let bench = Bench::racks(session, scenario, programs)?;
        let missing = bench.all_vms().filter(|vm| is_missing(&vm.name));
        let missing: Vec<Vm> = missing.cloned().collect();
        let running = bench.boot(&missing, None)?;
        bench.settle(scenario.settle_s);
        say("keeping them as they are now");
        let states = bench.each(&missing, |vm| {
            let state = self.dir.join(format!("{}-{}", self.guests.len(), vm.name));
            save(vm, &state).with_context(|| format!("keeping {}", vm.name))?;
            Ok(state)
        })?;
        drop(running);
        let kept = missing.iter().zip(states).map(|(vm, state)| Guest {
            name: vm.name.clone(),
            what: What::of(scenario),
            state,
        });
        self.guests.extend(kept);
        Ok(())
    }

    /// What the VM of this name in `scenario` was when it had booted.
    #[must_use]
    pub fn state_of(&self, name: &str, scenario: &Scenario) -> Option<&Path> {
        let what = What::of(scenario);
        let same = |guest: &&Guest| guest.name == name && guest.what == what;
        let guest = self.guests.iter().find(same)?;
        Some(&guest.state)
    }

    /// The bounds that an earlier run found for the guests of `scenario`.
    #[must_use]
    pub fn bounds(&self, scenario: &Scenario) -> Option<Bounds> {
        let idle = Idle::of(scenario)?;
        let same = self.bounds.iter().find(|(of, _)| *of == idle)?;
        Some(same.1)
    }

    /// Keeps what a run found, for the runs that follow.
    pub fn set_bounds(&mut self, scenario: &Scenario, bounds: Bounds) {
        self.bounds
            .extend(Idle::of(scenario).map(|idle| (idle, bounds)));
    }
}

/// What a scenario makes of a VM of some name.
#[derive(Debug, PartialEq, Eq)]
struct What {
    vm: scenario::Vm,
    /// Count of all VMs, if they have a second card: some ask others.
    peers: Option<u32>,
}

impl What {
    fn of(scenario: &Scenario) -> Self {
        Self {
            vm: scenario.vm.clone(),
            peers: scenario.guests_share_links().then(|| scenario.vms()),
        }
    }
}

/// Stops a guest and writes what it is.
fn save(vm: &Vm, state: &Path) -> anyhow::Result<()> {
    let mut qmp = vm.qmp(&vm.source)?;
    qmp.execute("stop", json!({}))?;
    let parameters = json!({"max-bandwidth": NO_LIMIT_BYTES_PER_S});
    qmp.execute("migrate-set-parameters", parameters)?;
    state_file::write(&mut qmp, state)?;
    qmp.execute("quit", json!({}))?;
    Ok(())
}

/// Arguments of a QEMU that [`wake`] is for.
pub const WAITS: [&str; 3] = ["-S", "-incoming", "defer"];

/// Lets a guest go on from where it was kept.
pub fn wake(vm: &Vm, state: &Path) -> anyhow::Result<()> {
    let mut qmp = vm.qmp(&vm.source)?;
    state_file::load(&mut qmp, state)?;
    qmp.execute("cont", json!({}))?;
    Ok(())
}

/// The first number of a version like `10.0.2 (Debian ...)`.
fn major(version: &str) -> Option<u32> {
    version.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_number_of_a_version_counts() {
        assert_eq!(major("10.0.2 (Debian 1:10.0.2+ds-2)"), Some(10));
        assert_eq!(major("7.2.19"), Some(7));
        assert_eq!(major("unknown"), None);
    }
}
