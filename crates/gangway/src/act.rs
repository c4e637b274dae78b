//! `cancel`, `continue`, `postcopy`, `recover`: actions on moves under way.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::time::{Duration, Instant};

use agent::api::mover::{Refusal, RefusalCode};
use agent::client::{CallError, Client};
use agent::types::{ActionReport, AgentStatus, GroupStatus, MoveStatus, Phase, Selection};

use crate::args::{Cli, Target};
use crate::exit::Exit;
use crate::feed::patience;
use crate::screen::json_line;
use crate::{patient, render};

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

/// Acts on the group that is meant, and waits for what is being recovered.
pub(crate) async fn run(
    cli: &Cli,
    client: &Client,
    action: Action,
    target: &Target,
) -> anyhow::Result<Exit> {
    let vm = target.vm.as_deref();
    let group = match &target.group {
        Some(group) => group.clone(),
        None => only_group(&client.get("/v1/status").await?, action, vm)?,
    };
    let report = match act(&patient(cli), action, &group, vm).await {
        Err(error) if error.may_have_acted() => {
            let path = action.path();
            let text = format!(
                "gangway: {}; {path} may have been done all the same, for some VMs or all: see \
                 `gangway status {group}`",
                error.in_full()
            );
            writeln!(io::stderr(), "{text}")?;
            return Ok(Exit::NeedsPerson);
        }
        report => report?,
    };
    tell(&report, action, target.json)?;
    if report.done.is_empty() {
        return Ok(Exit::Refused);
    }
    let exit = if action == Action::Recover {
        wait_for_recovery(client, &group, &report.done, target.json).await?
    } else {
        Exit::AllMoved
    };
    Ok(match action {
        _ if report.refused.is_empty() => exit,
        // They need a person as before.
        Action::Recover => Exit::NeedsPerson,
        _ => Exit::SomeStayed,
    })
}

/// Acts on a group through its coordinator if that is this host's agent, else on those of its moves
/// whose source is this host.
async fn act(
    client: &Client,
    action: Action,
    group: &str,
    vm: Option<&str>,
) -> Result<ActionReport, CallError> {
    match act_on_group(client, action, group, vm).await {
        Err(error) if error.refused_as() == Some(RefusalCode::UnknownGroup) => {
            let moves: Vec<MoveStatus> = client.get("/v1/moves").await?;
            let meant = |one: &&MoveStatus| {
                one.group == group && vm.map_or(action.concerns(one.phase), |vm| one.vm == vm)
            };
            let meant: Vec<_> = moves.iter().filter(meant).collect();
            if meant.is_empty() {
                return Err(error);
            }
            Ok(act_on_moves(client, action, meant).await)
        }
        report => report,
    }
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
            let message = nothing_to_act_on(status, action, vm);
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

/// Why there is no move to act on, with what is known of the VM.
fn nothing_to_act_on(status: &AgentStatus, action: Action, vm: Option<&str>) -> String {
    let path = action.path();
    let Some(vm) = vm else {
        return format!("this host's agent knows no move to {path}");
    };
    let newest = status
        .groups
        .iter()
        .filter_map(|group| {
            let mut moves = group.moves.iter().map(|one| &one.status);
            Some((group.accepted_unix_ms, moves.find(|one| one.vm == vm)?))
        })
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, one)| one);
    match newest.or_else(|| status.moves.iter().rfind(|one| one.vm == vm)) {
        Some(one) => format!(
            "VM `{vm}` has no move to {path}; that of group {} is in phase {}: {}",
            one.group,
            render::phase(one.phase),
            one.message
        ),
        None => format!(
            "this host's agent knows no move of VM `{vm}`; say it on the VM's source host, or where \
             its migration was started"
        ),
    }
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

async fn act_on_moves(client: &Client, action: Action, moves: Vec<&MoveStatus>) -> ActionReport {
    let mut report = ActionReport::default();
    for one in moves {
        let path = format!("/v1/moves/{}/{}", one.id, action.path());
        match client.post::<_, ()>(&path, &Selection::default()).await {
            Ok(()) => report.done.push(one.vm.clone()),
            Err(error) => {
                let mut refusal = error.into_refusal();
                refusal.vm.get_or_insert_with(|| one.vm.clone());
                report.refused.push(refusal);
            }
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
        let vm = refusal.vm.as_deref().unwrap_or_default();
        let whose = if refusal.message.contains(vm) {
            String::new()
        } else {
            format!("VM `{vm}`: ")
        };
        writeln!(io::stderr(), "gangway: {whose}{refusal}")?;
    }
    Ok(())
}

/// Shows how the recovered moves ended. It goes on, whatever becomes of this command or the agent.
async fn wait_for_recovery(
    client: &Client,
    group: &str,
    vms: &[String],
    json: bool,
) -> anyhow::Result<Exit> {
    let mut silent_since = None;
    let moves = loop {
        match moves_of_group(client, group).await {
            Ok(moves) => {
                silent_since = None;
                let is_meant = |one: &MoveStatus| vms.contains(&one.vm);
                let moves: Vec<_> = moves.into_iter().filter(is_meant).collect();
                if moves.iter().all(|one| one.phase.is_final()) {
                    break moves;
                }
            }
            Err(error) => {
                let since = *silent_since.get_or_insert_with(Instant::now);
                if since.elapsed() > patience(&error) {
                    not_known(&error.in_full(), group, vms)?;
                    return Ok(Exit::NeedsPerson);
                }
            }
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
    let is_missing = |vm: &&String| !moves.iter().any(|one| one.vm == **vm);
    let missing: Vec<String> = vms.iter().filter(is_missing).cloned().collect();
    if !missing.is_empty() {
        not_known(
            "this host's agent does not know it any more",
            group,
            &missing,
        )?;
    }
    let any = |phase| moves.iter().any(|one| one.phase == phase);
    Ok(if any(Phase::NeedsPerson) || !missing.is_empty() {
        Exit::NeedsPerson
    } else if any(Phase::Stayed) {
        Exit::SomeStayed
    } else {
        Exit::AllMoved
    })
}

fn not_known(why: &str, group: &str, vms: &[String]) -> io::Result<()> {
    writeln!(
        io::stderr(),
        "gangway: what became of the recovery in group {group} of {} is not known: {why}; see `gangway \
         status` here and on the source hosts",
        vms.join(", ")
    )
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
