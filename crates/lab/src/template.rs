//! Guests that are started from a template: one is booted, stopped and ended, and all others begin
//! as what it was, with its memory mapped copy-on-write.
//!
//! Stock QEMU does this with what it has for migrations on one machine. The template's memory is a
//! file that it maps shared; with the capability `x-ignore-shared` its state is written to a file
//! without that memory. A guest maps the memory file privately and loads the state.
//!
//! The template waits, before it has an address, until it is told who it is: it looks at a page
//! that starts with a marker. The lab finds that page in the memory file, once, and writes each
//! guest's identity into it before the guest runs.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use lab_init::agreed::{TEMPLATE_MARKER, TEMPLATE_MARKER_TURN, TEMPLATE_WAITS};
use rustix::mount::{MountFlags, mount};
use serde_json::json;

use crate::guest::{self, Host, Vm};
use crate::memory::GuestMemory;
use crate::qmp::Qmp;
use crate::scenario::Scenario;
use crate::shell::say;
use crate::state_file;

/// Name and number of the template itself; guests are numbered from 1.
const NAME: &str = "template";
const NUMBER: u32 = 0;
const PAGE: usize = 4096;
/// As for any guest's boot.
const PATIENCE: Duration = Duration::from_secs(240);
const LOOK: Duration = Duration::from_millis(50);

/// A stopped template.
#[derive(Debug)]
pub struct Template {
    state: PathBuf,
    /// Address of the page with the marker in the guests' memory.
    identity: u64,
}

/// QEMU's arguments for the memory of `vm` on `host`, of a scenario with a template.
#[must_use]
pub fn memory_arguments(vm: &Vm, host: &Host, scenario: &Scenario) -> [String; 2] {
    let size = scenario.vm.memory_mb;
    let object = if host.name() == vm.source.name() {
        let share = if vm.number == NUMBER { "on" } else { "off" };
        let path = dir(&vm.storage).join("ram");
        format!(
            "memory-backend-file,id=pc.ram,size={size}M,mem-path={},share={share}",
            path.display()
        )
    } else {
        format!("memory-backend-ram,id=pc.ram,size={size}M")
    };
    ["-object".into(), object]
}

/// In a file system of its own, in memory: what guests map must not wait for a disk.
fn dir(storage: &Path) -> PathBuf {
    storage.join("template")
}

impl Template {
    /// Boots a guest like `first` until it waits, and keeps what it is. `start` starts its QEMU.
    pub fn make(
        first: &Vm,
        start: impl Fn(&Vm, &[&str]) -> anyhow::Result<guest::Running>,
    ) -> anyhow::Result<Self> {
        let dir = dir(&first.storage);
        std::fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
        mount("tmpfs", &dir, "tmpfs", MountFlags::empty(), c"").context("mounting a tmpfs")?;
        let vm = Vm {
            name: NAME.into(),
            number: NUMBER,
            ..first.clone()
        };
        say("booting the template");
        start(&vm, &[])?;
        let mut qmp = vm.qmp(&vm.source)?;
        wait_until_it_waits(&vm)?;
        let state = dir.join("state");
        qmp.execute("stop", json!({}))?;
        ignore_shared(&mut qmp, true)?;
        state_file::write(&mut qmp, &state)?;
        qmp.execute("quit", json!({}))?;
        let memory = File::open(dir.join("ram")).context("opening the template's memory")?;
        Ok(Self {
            state,
            identity: find_marker(&memory).context("looking for the template's marker")?,
        })
    }

    /// Lets a guest whose QEMU was started with `-S -incoming defer` begin as the template was.
    pub fn wake(&self, vm: &Vm) -> anyhow::Result<()> {
        let mut qmp = vm.qmp(&vm.source)?;
        ignore_shared(&mut qmp, true)?;
        state_file::load(&mut qmp, &self.state)?;
        // Its next migration is an ordinary one.
        ignore_shared(&mut qmp, false)?;
        let mut page = vec![0; PAGE];
        let identity = format!("{} {} {}\n", vm.name, vm.ip(), vm.mac());
        page[..identity.len()].copy_from_slice(identity.as_bytes());
        GuestMemory::of(&mut qmp)?.write(self.identity, &page)?;
        qmp.execute("cont", json!({}))?;
        Ok(())
    }
}

fn ignore_shared(qmp: &mut Qmp, on: bool) -> anyhow::Result<()> {
    let capabilities = json!({"capabilities": [{"capability": "x-ignore-shared", "state": on}]});
    qmp.execute("migrate-set-capabilities", capabilities)?;
    Ok(())
}

fn wait_until_it_waits(vm: &Vm) -> anyhow::Result<()> {
    let console = vm.source.dir.join(&vm.name);
    let deadline = Instant::now() + PATIENCE;
    loop {
        let said = std::fs::read(&console).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        if said.contains(TEMPLATE_WAITS) {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "the template does not come up; it says: {}",
            said.lines().last().unwrap_or_default()
        );
        thread::sleep(LOOK);
    }
}

/// Address of the one page of `memory` that starts with the marker.
fn find_marker(memory: &File) -> anyhow::Result<u64> {
    let marker = TEMPLATE_MARKER.map(|byte| byte ^ TEMPLATE_MARKER_TURN);
    let length = memory.metadata().context("asking for its size")?.len();
    let mut found = Vec::new();
    for at in (0..length).step_by(PAGE) {
        let mut start = [0; TEMPLATE_MARKER.len()];
        memory.read_exact_at(&mut start, at).context("reading it")?;
        if start == marker {
            found.push(at);
        }
    }
    match found[..] {
        [at] => Ok(at),
        _ => bail!("{} pages have it, not one", found.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_marker_at_the_start_of_a_single_page_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ram");
        let marker = TEMPLATE_MARKER.map(|byte| byte ^ TEMPLATE_MARKER_TURN);
        let find = |places: &[usize]| {
            let mut memory = vec![0; 8 * PAGE];
            for place in places {
                memory[*place..place + marker.len()].copy_from_slice(&marker);
            }
            std::fs::write(&path, memory).unwrap();
            find_marker(&File::open(&path).unwrap())
        };
        assert_eq!(find(&[3 * PAGE, 5 * PAGE + 8]).unwrap(), 3 * PAGE as u64);
        assert!(find(&[PAGE, 3 * PAGE]).is_err());
        assert!(find(&[]).is_err());
    }
}
