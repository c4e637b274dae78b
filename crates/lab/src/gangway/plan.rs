//! The plan of a scenario.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context;
use serde_json::{Value, json};

use super::agents::{BULK_PORT, CONTROL_PORT};
use super::index;
use crate::bench::Bench;
use crate::guest::{Host, Vm};
use crate::net::{Rack, bytes_per_s};
use crate::scenario::{Preset, Scenario};
use crate::technique::{Extras, Mode};
use crate::template;

/// What the plan says beside the moves.
#[derive(Clone, Copy, Debug)]
pub(super) struct Settings {
    pub(super) preset: Preset,
    pub(super) extras: Extras,
    pub(super) mode: Mode,
    /// VMs wait, stopped at both ends, until the lab has compared their memory.
    pub(super) confirm_handover: bool,
    /// What an earlier preparation found is used as it is.
    pub(super) stale: bool,
}

/// The plan that moves `vms`, as TOML.
pub(super) fn text(bench: &Bench<'_>, vms: &[&Vm], settings: Settings) -> anyhow::Result<String> {
    let hosts: BTreeMap<&str, Value> = bench
        .hosts
        .iter()
        .map(|host| {
            let ip = host.address.ip;
            let control = format!("{ip}:{CONTROL_PORT}");
            (
                host.name(),
                json!({"control": control, "bulk": format!("{ip}:{BULK_PORT}")}),
            )
        })
        .collect();
    let moves: Vec<Value> = vms.iter().map(|vm| one(bench, vm)).collect();
    let mut plan = json!({
        "preset": settings.preset.name(),
        "confirm_handover": settings.confirm_handover,
        "hosts": hosts,
        "move": moves,
    });
    if settings.preset.has_index() && bench.scenario.seeds && !bench.residents.is_empty() {
        let resident = |vm: &Vm| {
            let qmp = vm.agent_socket(&vm.source);
            json!({"vm": vm.name, "host": vm.source.name(), "qmp": qmp})
        };
        let residents = bench.residents.iter().map(resident);
        plan["resident"] = residents.collect();
    }
    if settings.preset.has_index() && bench.scenario.index > 0 {
        plan["index"] = json!(index::addresses(bench));
    }
    if let Some(limit) = bench.scenario.downtime_limit_ms {
        plan["downtime_limit_ms"] = limit.into();
    }
    if let Some(mbit) = bench.scenario.push_mbit {
        plan["max_bandwidth_bytes_per_s"] = bytes_per_s(mbit).into();
    }
    if settings.mode != Mode::PreCopy {
        plan["mode"] = settings.mode.in_plan().into();
    }
    if settings.stale {
        plan["prepare"] = false.into();
    }
    // What the preset says already is not said again: users do not either.
    if settings.extras.zstd {
        plan["compression"] = "zstd".into();
    }
    if settings.extras.preempt {
        plan["postcopy_preempt"] = true.into();
    }
    if settings.extras.identical {
        plan["sharing"] = "identical".into();
    }
    toml::to_string(&plan).context("writing the plan")
}

/// What the plan sets beside the moves, in a line, as the report shows it.
pub(super) fn said(scenario: &Scenario, settings: Settings) -> String {
    let mut words = vec![format!("preset={}", settings.preset.name())];
    if settings.mode != Mode::PreCopy {
        words.push(format!("mode={}", settings.mode.in_plan()));
    }
    if let Some(limit) = scenario.downtime_limit_ms {
        words.push(format!("downtime_limit_ms={limit}"));
    }
    if let Some(mbit) = scenario.push_mbit {
        let limit = bytes_per_s(mbit);
        words.push(format!("max_bandwidth_bytes_per_s={limit}"));
    }
    words.join(" ")
}

fn one(bench: &Bench<'_>, vm: &Vm) -> Value {
    let replace = |from: &Path, to: &Path| json!({"from": from, "to": to});
    // With a slash at the end: `/s1/` must not be found in `/s10/`.
    let mut replaced = vec![replace(&vm.source.dir.join(""), &vm.target.dir.join(""))];
    let program = |host: &Host| &bench.qemu(host.address.rack).program;
    let (source, target) = (program(&vm.source), program(&vm.target));
    if source != target {
        replaced.push(replace(source, target));
    }
    if bench.scenario.vm.template && vm.source.address.rack == Rack::Source {
        // The target has ordinary memory, and not the template's file.
        let [_, from] = template::memory_arguments(vm, &vm.source, bench.scenario);
        let [_, to] = template::memory_arguments(vm, &vm.target, bench.scenario);
        replaced.push(json!({"from": from, "to": to}));
    }
    json!({
        "vm": vm.name,
        "domain": format!("domain-{}", vm.number % bench.scenario.vm.domains.max(1)),
        "from": vm.source.name(),
        "to": vm.target.name(),
        "qmp": vm.agent_socket(&vm.source),
        "replace": replaced,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_plan_limits_is_said_as_what_a_baseline_is_told() {
        let scenario = Scenario::load("slm-fig7", &[], false).unwrap();
        let settings = Settings {
            preset: Preset::Slm,
            extras: Extras::default(),
            mode: Mode::PreCopy,
            confirm_handover: false,
            stale: false,
        };
        assert_eq!(
            said(&scenario, settings),
            "preset=slm downtime_limit_ms=1500"
        );
    }
}
