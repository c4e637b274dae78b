//! `gangway prepare`: the preparation phase by itself.

use std::path::PathBuf;

use anyhow::Context;
use serde_json::Value;

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
        self.say(agents, "prepare").map(drop)
    }

    /// Bytes that `gangway survey` expects `technique` to send over the core link; nothing for a
    /// technique that it does not know.
    pub fn forecast(&self, agents: &Agents, technique: &str) -> anyhow::Result<Option<u64>> {
        let said = self.say(agents, "survey")?;
        // The survey is the last line, events come before it.
        let line = said.lines().last().unwrap_or_default();
        let survey: Value = serde_json::from_str(line).context("reading the survey")?;
        let all = survey["forecast"].as_array().context("no forecast in it")?;
        let one = all.iter().find(|one| one["technique"] == technique);
        Ok(one.and_then(|one| one["core_bytes"].as_u64()))
    }

    fn say(&self, agents: &Agents, command: &str) -> anyhow::Result<String> {
        let host = agents.coordinator()?;
        let mut program = host.command(agents.program());
        program
            .arg(command)
            .arg(&self.file)
            .args(["--json", "--socket"])
            .arg(control_socket(host));
        output(&mut program)
    }
}
