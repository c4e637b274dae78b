//! `migrate` and `evacuate`: hand a plan to the agent and watch.

use std::io::{self, Write};

use agent::client::Client;
use agent::types::{EvacuationRequest, GroupAccepted, GroupRequest, Mode, Plan};

use crate::args::{Cli, Evacuate, Manner, Migrate};
use crate::exit::Exit;
use crate::screen::json_line;
use crate::watch::{left, watch};
use crate::{is_broken_pipe, patient};

/// What a person consents to.
const POSTCOPY: &str = "post-copy: each VM runs at its target before its memory is there. If an agent or \
                        the link is lost in that time, the VM may stand still until that is mended, and \
                        neither of its QEMUs must be ended or resumed by hand; if a host is lost, it is killed";

/// Migrates what a plan says.
pub(crate) async fn migrate(cli: &Cli, client: &Client, wish: &Migrate) -> anyhow::Result<Exit> {
    start(cli, client, wish.plan()?, &wish.manner).await
}

/// Migrates all that runs on some hosts, or prints the plan for it.
pub(crate) async fn evacuate(cli: &Cli, client: &Client, wish: &Evacuate) -> anyhow::Result<Exit> {
    let request = EvacuationRequest {
        from: wish.from.clone(),
        to: wish.to.clone(),
    };
    let plan: Plan = patient(cli).post("/v1/evacuations/plan", &request).await?;
    let plan = wish.overrides.with(plan, &wish.manner)?;
    if wish.only_plan {
        io::stdout().write_all(toml::to_string(&plan)?.as_bytes())?;
        return Ok(Exit::AllMoved);
    }
    if !wish.manner.json {
        for one in &plan.moves {
            writeln!(io::stderr(), "{}: from {} to {}", one.vm, one.from, one.to)?;
        }
    }
    start(cli, client, plan, &wish.manner).await
}

/// Starts the plan's group; then watches it, unless told to detach.
async fn start(cli: &Cli, client: &Client, plan: Plan, manner: &Manner) -> anyhow::Result<Exit> {
    match plan.settings().mode {
        Mode::PreCopy => {}
        Mode::PostCopy => writeln!(io::stderr(), "{POSTCOPY}")?,
        Mode::Hybrid => writeln!(
            io::stderr(),
            "VMs that do not converge, or are told to, go over to {POSTCOPY}"
        )?,
    }
    let patient = patient(cli);
    let request = GroupRequest { plan, id: None };
    let accepted = tokio::select! {
        accepted = patient.post::<_, GroupAccepted>("/v1/groups", &request) => accepted,
        interrupted = tokio::signal::ctrl_c() => {
            interrupted?;
            let text = "left while the agents were being asked; `gangway status` shows whether \
                        the migration starts, `gangway cancel` ends it";
            writeln!(io::stderr(), "{text}")?;
            return Ok(Exit::Left);
        }
    };
    let group = match accepted {
        Ok(accepted) => accepted.group,
        Err(error) if error.may_have_acted() => {
            let text = "the migration may have been started all the same: `gangway status` shows \
                        whether it was, `gangway cancel` ends it";
            writeln!(io::stderr(), "gangway: {}; {text}", error.in_full())?;
            return Ok(Exit::NeedsPerson);
        }
        Err(error) => return Err(error.into()),
    };
    if manner.detach {
        if manner.json {
            json_line(&GroupAccepted { group })?;
        } else {
            writeln!(io::stdout(), "{group}")?;
        }
        return Ok(Exit::AllMoved);
    }
    if !manner.json {
        writeln!(
            io::stderr(),
            "group {group} is under way; Ctrl-C leaves it running"
        )?;
    }
    match watch(client, &group, manner.json).await {
        // It runs, whatever became of the watcher.
        Err(error) if !is_broken_pipe(&error) => {
            writeln!(io::stderr(), "gangway: {error:#}; {}", left(&group))?;
            Ok(Exit::NeedsPerson)
        }
        exit => exit,
    }
}
