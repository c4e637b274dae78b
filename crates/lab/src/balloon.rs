//! Guests give memory back while they move, and get it again: a balloon in each is blown up and let go.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::ensure;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::bench::Bench;
use crate::clock::UnixMs;
use crate::guest::Vm;
use crate::memory::GuestMemory;

/// How long a VM may take to run at its target.
const PATIENCE: Duration = Duration::from_secs(120);
/// Interval between looks.
const LOOK: Duration = Duration::from_millis(100);
/// A balloon that is so near to what it should be has done its work.
const NEAR_MB: u64 = 4;

/// What is done.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    /// Memory that a blown-up balloon leaves the guest, in MiB.
    pub leave_mb: u64,
    /// How long a balloon stays blown up, and how long it stays empty.
    pub turn_ms: u64,
    /// How often it is blown up after all memory is there.
    pub after: u32,
}

/// Blows the balloon of `vm` up and lets it go, from its start at the target on until `is_over` and then
/// `balloon.after` times more. Says how often, and what it came to.
pub fn work(
    bench: &Bench<'_>,
    balloon: &Balloon,
    vm: &Vm,
    is_over: &AtomicBool,
) -> anyhow::Result<Value> {
    let target = vm.target.name();
    bench
        .observer
        .wait_for(&vm.name, PATIENCE, |beat| beat.host == target)?;
    let began = UnixMs::now();
    let (mut during, mut after) = (0_u32, 0_u32);
    let (mut least_mb, mut least_pss) = (u64::MAX, u64::MAX);
    let turn = Duration::from_millis(balloon.turn_ms);
    let deadline = Instant::now() + PATIENCE;
    while after < balloon.after {
        ensure!(
            Instant::now() < deadline,
            "the balloon of {} is too slow",
            vm.name
        );
        let is_after = is_over.load(Ordering::Acquire);
        blow(vm, balloon.leave_mb)?;
        thread::sleep(turn);
        let (mut actual_mb, mut pss) = state(vm)?;
        // An emulated guest takes its time. Before all is there nobody waits for it.
        while is_after && actual_mb > balloon.leave_mb + NEAR_MB && Instant::now() < deadline {
            thread::sleep(LOOK);
            (actual_mb, pss) = state(vm)?;
        }
        if is_after {
            after += 1;
            least_mb = least_mb.min(actual_mb);
            least_pss = least_pss.min(pss.unwrap_or(u64::MAX));
        } else {
            during += 1;
        }
        blow(vm, bench.scenario.vm.memory_mb)?;
        thread::sleep(turn);
    }
    // Or nothing was tried.
    ensure!(
        least_mb <= balloon.leave_mb + NEAR_MB,
        "the balloon of {} left {least_mb} MiB at least, and should have left {}",
        vm.name,
        balloon.leave_mb
    );
    Ok(json!({
        "vm": vm.name,
        "began_unix_ms": began.0,
        "blown_up_before_all_was_there": during,
        "blown_up_after": after,
        "least_guest_mb": least_mb,
        "least_guest_pss_bytes": least_pss,
    }))
}

/// Each time a connection of its own: others want to talk to this QEMU, too.
fn blow(vm: &Vm, mb: u64) -> anyhow::Result<()> {
    let mut qmp = vm.qmp(&vm.target)?;
    qmp.execute("balloon", json!({"value": mb << 20}))?;
    Ok(())
}

/// What the balloon leaves the guest, and what its memory takes on the host.
fn state(vm: &Vm) -> anyhow::Result<(u64, Option<u64>)> {
    let mut qmp = vm.qmp(&vm.target)?;
    let actual = qmp.execute("query-balloon", json!({}))?;
    let actual = actual["actual"].as_u64().unwrap_or(u64::MAX) >> 20;
    Ok((actual, GuestMemory::of(&mut qmp)?.pss_bytes()))
}
