//! `migrate`: hands a plan to the agent and watches.

use std::io::{self, Write};
use std::time::Duration;

use agent::client::Client;
use agent::types::{GroupAccepted, GroupRequest, Mode, Plan};

use crate::args::{Cli, Migrate};
use crate::exit::Exit;
use crate::screen::json_line;
use crate::watch::{left, watch};

/// The agent asks every other agent about every move first.
const AGREEMENT_TIME_MAX: Duration = Duration::from_secs(120);

/// What a person consents to.
const POSTCOPY: &str = "post-copy: each VM runs at its target before its memory is there. If a host, \
                        an agent or the link is lost in that time, the VM stops and needs a person; \
                        its QEMU at the source must not be ended or resumed then";

/// Starts the plan's group; then watches it, unless told to detach.
pub(crate) async fn run(cli: &Cli, client: &Client, migrate: &Migrate) -> anyhow::Result<Exit> {
    let plan = read_plan(migrate)?;
    if plan.settings().mode == Mode::PostCopy {
        writeln!(io::stderr(), "{POSTCOPY}")?;
    }
    let patient = Client::unix(&cli.socket, AGREEMENT_TIME_MAX);
    let request = GroupRequest { plan, id: None };
    let accepted: GroupAccepted = tokio::select! {
        accepted = patient.post("/v1/groups", &request) => accepted?,
        interrupted = tokio::signal::ctrl_c() => {
            interrupted?;
            let text = "left while the agents were being asked; `gangway status` shows whether \
                        the migration starts, `gangway cancel` ends it";
            writeln!(io::stderr(), "{text}")?;
            return Ok(Exit::Left);
        }
    };
    let group = accepted.group;
    if migrate.detach {
        if migrate.json {
            json_line(&GroupAccepted { group })?;
        } else {
            writeln!(io::stdout(), "{group}")?;
        }
        return Ok(Exit::AllMoved);
    }
    if !migrate.json {
        writeln!(
            io::stderr(),
            "group {group} is under way; Ctrl-C leaves it running"
        )?;
    }
    match watch(client, &group, migrate.json).await {
        // It runs, whatever became of the watcher.
        Err(error) => {
            writeln!(io::stderr(), "gangway: {error:#}; {}", left(&group))?;
            Ok(Exit::NeedsPerson)
        }
        exit => exit,
    }
}

fn read_plan(migrate: &Migrate) -> anyhow::Result<Plan> {
    let path = &migrate.plan;
    let mut plan = Plan::load(path)?;
    migrate.overrides.apply(&mut plan);
    if migrate.no_prepare {
        plan.prepare = Some(false);
    }
    plan.check()?;
    Ok(plan)
}
