//! What the hosts of a rack hold in memory while nothing moves: just before a migration, and after.

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::bench::Bench;
use crate::guest::{Host, Vm};
use crate::memory::GuestMemory;
use crate::net::Rack;
use crate::process;

/// All hosts of a rack together. PSS counts a page that several processes map by the share of
/// each, so that sums count it once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Footprint {
    /// QEMUs and agents, from the memory cgroups.
    pub cgroup_bytes: Option<u64>,
    /// PSS of the guests' memory alone.
    pub guest_pss_bytes: Option<u64>,
    /// PSS of the QEMUs, guest memory included.
    pub qemu_pss_bytes: Option<u64>,
    /// PSS of the agents; 0 without agents.
    pub agents_pss_bytes: Option<u64>,
}

impl Footprint {
    /// Reads the rack's hosts, of which `agents` are the agents' processes. All VMs must run in
    /// this rack: where one does not, what concerns QEMUs is not known.
    #[must_use]
    pub fn read(bench: &Bench<'_>, rack: Rack, agents: &[u32]) -> Self {
        let of = |vm: &Vm| memory_of(vm, host_in(vm, rack)).ok();
        let guests: Option<Vec<(u64, u64)>> = bench.vms.iter().map(of).collect();
        let sum = |part: fn(&(u64, u64)) -> u64| Some(guests.as_ref()?.iter().map(part).sum());
        Self {
            cgroup_bytes: bench.footprint_bytes(rack),
            guest_pss_bytes: sum(|(guest, _)| *guest),
            qemu_pss_bytes: sum(|(_, qemu)| *qemu),
            agents_pss_bytes: agents.iter().map(|pid| process::pss_bytes(*pid)).sum(),
        }
    }
}

fn host_in(vm: &Vm, rack: Rack) -> &Host {
    match rack {
        Rack::Source => &vm.source,
        Rack::Target => &vm.target,
    }
}

/// PSS of the guest's memory and of all of its QEMU.
fn memory_of(vm: &Vm, host: &Host) -> anyhow::Result<(u64, u64)> {
    let mut qmp = vm.qmp_at_once(host)?;
    let guest = GuestMemory::of(&mut qmp)?
        .pss_bytes()
        .context("reading the mappings of QEMU")?;
    let qemu = process::pss_bytes(qmp.peer_pid()?).context("reading the memory of QEMU")?;
    Ok((guest, qemu))
}
