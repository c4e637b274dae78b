//! What a scenario does with a group that has arrived: it moves on, and back, or every guest writes
//! all that it shares.

use std::thread;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::bench::Bench;
use crate::gangway::{self, Agents};
use crate::guest::{Host, Vm};
use crate::outcome::{EventLog, Figures};
use crate::pool_use;
use crate::scenario::Preset;
use crate::shell::say;
use crate::technique::Extras;

/// Time for a guest to settle where it has arrived, before it moves on.
const REST: Duration = Duration::from_secs(3);

/// What comes after the move.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct After {
    /// The group moves on to these hosts, one after the other.
    pub hops: Vec<String>,
    /// Every guest writes all pages that it shares.
    pub write_shared: bool,
}

/// What carries it out.
pub struct Afterwards<'a> {
    /// The agents of all hosts.
    pub agents: &'a Agents,
    /// The racks.
    pub bench: &'a Bench<'a>,
    /// The technique.
    pub preset: (Preset, Extras),
    /// Where events go.
    pub log: &'a EventLog,
}

impl Afterwards<'_> {
    /// Does what `after` says; returns figures about it, and what went wrong.
    pub fn run(&self, after: &After) -> anyhow::Result<(Figures, Option<String>)> {
        let mut figures = Figures::new();
        let mut wrong = Vec::new();
        let mut at = self.bench.vms.first().context("no VMs")?.target.clone();
        let mut hops = Vec::new();
        for name in &after.hops {
            let next = self.bench.hosts.iter().find(|host| host.name() == name);
            let next = next.with_context(|| format!("no host {name}"))?.clone();
            hops.push(self.hop((&at, &next), &mut wrong)?);
            at = next;
        }
        if !hops.is_empty() {
            figures.push(("hops".to_owned(), Value::Array(hops)));
        }
        if after.write_shared {
            let agent = self.agents.pid(at.name())?;
            let isolation = pool_use::write_all(self.bench, &at, agent)?;
            if isolation["pages_changed_by_others"] != 0 {
                wrong.push(format!("guests see what others wrote: {isolation}"));
            }
            figures.push(("isolation".to_owned(), isolation));
        }
        Ok((figures, (!wrong.is_empty()).then(|| wrong.join("; "))))
    }

    /// The whole group moves from one host to the next.
    fn hop(&self, (from, to): (&Host, &Host), wrong: &mut Vec<String>) -> anyhow::Result<Value> {
        thread::sleep(REST);
        say(&format!("moving on from {} to {}", from.name(), to.name()));
        let before = from.address.cgroup.footprint_bytes();
        let vms: Vec<Vm> = self
            .bench
            .vms
            .iter()
            .map(|vm| vm.on_the_way(from, to))
            .collect();
        for vm in &vms {
            self.bench.net.ensure_tap(&to.address, &vm.tap())?;
        }
        let of = (self.agents, self.bench);
        let (moved, ended) = gangway::move_again(of, self.preset, &vms, self.log)?;
        wrong.extend(ended);
        for one in &moved {
            wrong.extend(
                one.remark
                    .iter()
                    .map(|remark| format!("{}: {remark}", one.vm)),
            );
        }
        thread::sleep(REST);
        let pages = |of: fn(&crate::results::Pages) -> Option<u64>| -> u64 {
            moved.iter().filter_map(|one| of(one.pages.as_ref()?)).sum()
        };
        let compared: Vec<_> = moved.iter().filter_map(|one| one.compared).collect();
        let mismatched: u64 = compared.iter().map(|one| one.mismatched).sum();
        if mismatched > 0 {
            wrong.push(format!("{mismatched} pages differ on {}", to.name()));
        }
        ensure!(moved.len() == vms.len(), "a VM has no result");
        Ok(json!({
            "from": from.name(),
            "to": to.name(),
            "compared_pages": compared.iter().map(|one| one.pages).sum::<u64>(),
            "mismatched_pages": mismatched,
            "literal_pages": pages(|pages| pages.literal),
            "mapped_pages": pages(|pages| pages.mapped),
            "pool_mappings_max": pool_mappings(&vms),
            "footprint_bytes_before": before,
            "footprint_bytes_after": to.address.cgroup.footprint_bytes(),
        }))
    }
}

/// The most mappings of the pool that a QEMU has of those that have arrived.
#[must_use]
pub fn pool_mappings(vms: &[Vm]) -> Option<u64> {
    let of = |vm: &Vm| {
        Some(pool_use::mappings(
            vm.qmp_at_once(&vm.target).ok()?.peer_pid().ok()?,
        ))
    };
    vms.iter().filter_map(of).max()
}
