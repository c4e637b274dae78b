//! `gangway prepare`: the preparation phase by itself.

use std::path::PathBuf;

use anyhow::Context;
use serde_json::Value;

use super::agents::{Agents, control_socket};
use super::migration::post;
use super::plan::{self, Settings};
use crate::bench::Bench;
use crate::guest::Vm;
use crate::scenario::Preset;
use crate::shell::output_on_host;
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

    /// Runs `gangway prepare` to its end; returns the group that it was for.
    pub fn run(&self, agents: &Agents) -> anyhow::Result<String> {
        group_of(&self.say(agents, "prepare")?)
    }

    /// Has the agents forget what they have prepared for `group`, so that the next preparation hashes all
    /// memory again, as the first one does.
    pub fn forget(agents: &Agents, group: &str) -> anyhow::Result<()> {
        let socket = control_socket(agents.coordinator()?);
        post(&socket, &format!("/v1/preparations/{group}/cancel"))
            .with_context(|| format!("ending the preparation of {group}"))
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
        output_on_host(&mut program)
    }
}

/// The group in the last line of what `gangway prepare --json` says.
fn group_of(said: &str) -> anyhow::Result<String> {
    let line = said.lines().last().unwrap_or_default();
    let found: Value = serde_json::from_str(line).context("reading what was prepared")?;
    let group = found["group"].as_str().context("it names no group")?;
    Ok(group.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_group_that_is_to_be_forgotten_is_in_the_last_line() {
        let said = "{\"event\":\"x\"}\n{\"group\":\"g-17\",\"hosts\":[]}\n";
        assert_eq!(group_of(said).unwrap(), "g-17");
        assert!(group_of("").is_err() && group_of("{}").is_err());
    }
}
