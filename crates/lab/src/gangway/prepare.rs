//! `gangway prepare`: the preparation phase by itself.

use std::path::PathBuf;

use anyhow::Context;

use super::agents::{Agents, control_socket};
use super::plan::{self, Settings};
use crate::bench::Bench;
use crate::guest::Vm;
use crate::scenario::Preset;
use crate::shell::output;
use crate::technique::{Extras, Mode};

/// A plan of all VMs of a bench, in a file of the coordinator's.
#[derive(Debug)]
pub struct Plan {
    file: PathBuf,
}

impl Plan {
    /// Writes it.
    pub fn write(agents: &Agents, bench: &Bench<'_>) -> anyhow::Result<Self> {
        let all: Vec<&Vm> = bench.vms.iter().collect();
        let settings = Settings {
            preset: Preset::Irlm,
            extras: Extras::default(),
            mode: Mode::PreCopy,
            confirm_handover: false,
            stale: false,
        };
        let file = agents.coordinator()?.dir.join("prepare.toml");
        std::fs::write(&file, plan::text(bench, &all, settings)?).context("writing the plan")?;
        Ok(Self { file })
    }

    /// Runs `gangway prepare` to its end.
    pub fn run(&self, agents: &Agents) -> anyhow::Result<()> {
        let host = agents.coordinator()?;
        let mut command = host.command(agents.program());
        command
            .arg("prepare")
            .arg(&self.file)
            .args(["--json", "--socket"])
            .arg(control_socket(host));
        output(&mut command)?;
        Ok(())
    }
}
