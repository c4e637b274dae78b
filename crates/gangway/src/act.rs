//! `cancel`, `continue`, `postcopy`, `recover`: actions on moves under way.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::time::Duration;

use agent::api::mover::{Refusal, RefusalCode};
use agent::client::{CallError, Client};
use agent::types::{ActionReport, AgentStatus, GroupStatus, MoveStatus, Phase, Selection};

use crate::args::Target;
use crate::exit::Exit;
use crate::render;
use crate::screen::json_line;

/// How often a recovery is looked at.
const POLL: Duration = Duration::from_millis(300);

/// The actions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Cancel,
    Continue,
    Postcopy,
    Recover,
}

impl Action {
    fn path(self) -> &'static str {
        match self {
            Self::Cancel => "cancel",
            Self::Continue => "continue",
            Self::Postcopy => "postcopy",
            Self::Recover => "recover",
        }
    }

    fn done(self) -> &'static str {
        match self {
            Self::Cancel => "is being cancelled",
            Self::Continue => "goes on",
            Self::Postcopy => "goes over to post-copy",
            Self::Recover => "is being recovered",
        }
    }

    /// Whether a move in this phase comes into question.
    fn concerns(self, phase: Phase) -> bool {
        match self {
            Self::Cancel => !phase.is_final(),
            Self::Continue => phase == Phase::Held,
            Self::Postcopy => matches!(phase, Phase::Preparing | Phase::Bulk),
            Self::Recover => phase == Phase::NeedsPerson,
        }
    }
}

/// Acts on the group that is meant, through its coordinator if that is this host's agent, else on
/// the moves whose source is this host.
pub(crate) async fn run(client: &Client, action: Action, target: &Target) -> anyhow::Result<Exit> {
    let status: AgentStatus = client.get("/v1/status").await?;
    let group = match &target.group {
        Some(group) => group.clone(),
        None => only_group(&status, action, target.vm.as_deref())?,
    };
    let report = match act_on_group(client, action, &group, target.vm.as_deref()).await {
        Err(error) if error.refused_as() == Some(RefusalCode::UnknownGroup) => {
            let moves = moves_here(&status, action, &group, target.vm.as_deref());
            if moves.is_empty() {
                return Err(error.into());
            }
            act_on_moves(client, action, moves).await
        }
        report => report?,
    };
    tell(&report, action, target.json)?;
    if !report.refused.is_empty() {
        return Ok(Exit::Refused);
    }
    if action == Action::Recover {
        return wait_for_recovery(client, &group, &report.done, target.json).await;
    }
    Ok(Exit::AllMoved)
}

/// The only group with a move that comes into question.
fn only_group(status: &AgentStatus, action: Action, vm: Option<&str>) -> Result<String, CallError> {
    let coordinated = status
        .groups
        .iter()
        .flat_map(|group| &group.moves)
        .map(|one| &one.status);
    let groups: BTreeSet<_> = coordinated
        .chain(&status.moves)
        .filter(|one| action.concerns(one.phase) && vm.is_none_or(|vm| one.vm == vm))
        .map(|one| one.group.clone())
        .collect();
    let mut groups = groups.into_iter();
    let refusal = match (groups.next(), groups.next()) {
        (Some(only), None) => return Ok(only),
        (None, _) => {
            let message = format!("this host's agent knows no move to {}", action.path());
            Refusal::new(RefusalCode::UnknownGroup, message)
        }
        (Some(one), Some(other)) => {
            let all: Vec<_> = [one, other].into_iter().chain(groups).collect();
            let message = format!("say which group: {}", all.join(", "));
            Refusal::new(RefusalCode::BadRequest, message)
        }
    };
    Err(refusal.into())
}

async fn act_on_group(
    client: &Client,
    action: Action,
    group: &str,
    vm: Option<&str>,
) -> Result<ActionReport, CallError> {
    let path = format!("/v1/groups/{group}/{}", action.path());
    client
        .post(
            &path,
            &Selection {
                vm: vm.map(str::to_owned),
            },
        )
        .await
}

fn moves_here<'a>(
    status: &'a AgentStatus,
    action: Action,
    group: &str,
    vm: Option<&str>,
) -> Vec<&'a MoveStatus> {
    let meant = |one: &&MoveStatus| {
        one.group == group && vm.map_or(action.concerns(one.phase), |vm| one.vm == vm)
    };
    status.moves.iter().filter(meant).collect()
}

async fn act_on_moves(client: &Client, action: Action, moves: Vec<&MoveStatus>) -> ActionReport {
    let mut report = ActionReport::default();
    for one in moves {
        let path = format!("/v1/moves/{}/{}", one.id, action.path());
        match client.post::<_, ()>(&path, &Selection::default()).await {
            Ok(()) => report.done.push(one.vm.clone()),
            Err(error) => report.refused.push(error.into_refusal()),
        }
    }
    report
}

fn tell(report: &ActionReport, action: Action, json: bool) -> io::Result<()> {
    if json {
        return json_line(report);
    }
    let mut out = io::stdout().lock();
    for vm in &report.done {
        writeln!(out, "{vm} {}", action.done())?;
    }
    for refusal in &report.refused {
        writeln!(io::stderr(), "gangway: {refusal}")?;
    }
    Ok(())
}

/// Shows how the recovered moves ended.
async fn wait_for_recovery(
    client: &Client,
    group: &str,
    vms: &[String],
    json: bool,
) -> anyhow::Result<Exit> {
    let moves = loop {
        let moves = moves_of_group(client, group).await?;
        let moves: Vec<_> = moves
            .into_iter()
            .filter(|one| vms.contains(&one.vm))
            .collect();
        if moves.iter().all(|one| one.phase.is_final()) {
            break moves;
        }
        tokio::time::sleep(POLL).await;
    };
    for one in &moves {
        if json {
            json_line(one)?;
        } else {
            writeln!(
                io::stdout(),
                "{}: {}: {}",
                one.vm,
                render::phase(one.phase),
                one.message
            )?;
        }
    }
    let any = |phase| moves.iter().any(|one| one.phase == phase);
    Ok(if any(Phase::NeedsPerson) {
        Exit::NeedsPerson
    } else if any(Phase::Stayed) {
        Exit::SomeStayed
    } else {
        Exit::AllMoved
    })
}

async fn moves_of_group(client: &Client, group: &str) -> Result<Vec<MoveStatus>, CallError> {
    match client
        .get::<GroupStatus>(&format!("/v1/groups/{group}"))
        .await
    {
        Ok(status) => Ok(status.moves.into_iter().map(|one| one.status).collect()),
        Err(error) if error.refused_as() == Some(RefusalCode::UnknownGroup) => {
            let moves: Vec<MoveStatus> = client.get("/v1/moves").await?;
            Ok(moves.into_iter().filter(|one| one.group == group).collect())
        }
        Err(error) => Err(error),
    }
}
