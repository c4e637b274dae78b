//! Guests that stand still while a fault strikes their move, so that every page can be compared after it.
//!
//! Their source QEMUs are needed for that, so each source agent is held before it ends one.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use serde_json::json;

use crate::bench::Bench;
use crate::fault::hold_dir;
use crate::guest::{Host, Vm};
use crate::memory::{Compared, GuestMemory, compare};
use crate::postcopy;
use crate::shell::say;

/// Interval between looks whether an agent has got there.
const LOOK: Duration = Duration::from_millis(5);

/// Stops all guests, and has the source agents wait before they end their QEMUs.
pub(super) fn stop(bench: &Bench<'_>) -> anyhow::Result<()> {
    for vm in &bench.vms {
        vm.qmp(&vm.source)?.execute("stop", json!({}))?;
        let hold = hold(vm);
        fs::write(&hold, "").with_context(|| format!("creating {}", hold.display()))?;
    }
    Ok(())
}

/// Compares each VM that arrives, and lets its source agent go on; until `over`. What was compared, by
/// the order of the VMs.
pub(super) fn compare_all(
    bench: &Bench<'_>,
    over: &AtomicBool,
) -> Vec<anyhow::Result<Option<Compared>>> {
    thread::scope(|scope| {
        let one = |vm| scope.spawn(move || compare_one(vm, over));
        let comparing: Vec<_> = bench.vms.iter().map(one).collect();
        let results = comparing.into_iter().map(|one| one.join());
        results
            .map(|result| result.unwrap_or_else(|_| anyhow::bail!("a comparing thread panicked")))
            .collect()
    })
}

/// Has the guests go on where they are, `arrived` or not.
pub(super) fn go_on(vm: &Vm, arrived: bool) -> anyhow::Result<()> {
    let end: &Host = if arrived { &vm.target } else { &vm.source };
    vm.qmp(end)?.execute("cont", json!({}))?;
    Ok(())
}

fn hold(vm: &Vm) -> PathBuf {
    hold_dir(&vm.source).join(format!("complete.{}", vm.name))
}

fn compare_one(vm: &Vm, over: &AtomicBool) -> anyhow::Result<Option<Compared>> {
    let hold = hold(vm);
    let reached = hold.with_added_extension("reached");
    while !reached.exists() {
        if over.load(Ordering::Relaxed) {
            let _ = fs::remove_file(&hold);
            return Ok(None);
        }
        thread::sleep(LOOK);
    }
    let compared = compare_ends(vm);
    fs::remove_file(&hold).with_context(|| format!("removing {}", hold.display()))?;
    if let Ok(compared) = &compared {
        say(&format!(
            "{}: {} pages differ",
            vm.name, compared.mismatched
        ));
    }
    compared.map(Some)
}

/// Compares all memory of a VM that stands still at both ends.
pub(super) fn compare_ends(vm: &Vm) -> anyhow::Result<Compared> {
    let mut source = vm.qmp(&vm.source)?;
    let mut target = vm.qmp(&vm.target)?;
    for (qmp, end) in [(&mut source, "source"), (&mut target, "target")] {
        let status = qmp.execute("query-status", json!({}))?;
        anyhow::ensure!(
            status["running"] == false,
            "the VM runs at the {end}, and was to stand still"
        );
    }
    // In post-copy memory is complete when the source QEMU has been told so.
    postcopy::wait_until_complete(&mut source)?;
    compare(
        &GuestMemory::of(&mut source)?,
        &GuestMemory::of(&mut target)?,
    )
}
