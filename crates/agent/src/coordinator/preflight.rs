//! Asks every agent of a plan before anything starts.

use std::collections::BTreeMap;

use tokio::task::JoinSet;

use super::Peers;
use crate::api::mover::{Admission, MoveCheck, Refusal, RefusalCode};
use crate::client::{CallError, Client};
use crate::types::{MoveSpec, Plan};

/// What each target agent is asked to admit.
pub(super) struct Admissions {
    targets: Vec<Target>,
}

struct Target {
    name: String,
    client: Client,
    /// The first move to it in the plan.
    first: usize,
    request: Admission,
}

/// Every source agent checks its moves, then every target agent admits all that comes to it
/// together. The refusal of the move that comes first in the plan is returned.
pub(super) async fn run(
    plan: &Plan,
    peers: &Peers,
    specs: Vec<MoveSpec>,
) -> Result<Admissions, Refusal> {
    let group = specs
        .first()
        .map(|spec| spec.group.clone())
        .unwrap_or_default();
    let mut checks = JoinSet::new();
    for (source, moves) in by_host(plan, specs, |at| &plan.moves[at].from) {
        let client = peers.client(&plan.hosts[&source]);
        checks.spawn(check_all(client, source, moves));
    }
    let checked: BTreeMap<usize, MoveCheck> = all(checks).await?.into_iter().flatten().collect();

    let checked = checked.into_values().collect();
    let targets = by_host(plan, checked, |at| &plan.moves[at].to).into_iter();
    let targets = targets.map(|(name, vms)| Target {
        client: peers.client(&plan.hosts[&name]),
        name,
        first: vms.first().map_or(0, |(at, _)| *at),
        request: Admission {
            group: group.clone(),
            vms: vms.into_iter().map(|(_, vm)| vm).collect(),
        },
    });
    let admissions = Admissions {
        targets: targets.collect(),
    };
    admissions.ask().await?;
    Ok(admissions)
}

impl Admissions {
    /// Asks all target agents. What they promise holds for a minute.
    async fn ask(&self) -> Result<(), Refusal> {
        let mut asking = JoinSet::new();
        for target in &self.targets {
            let (name, client) = (target.name.clone(), target.client.clone());
            let (first, request) = (target.first, target.request.clone());
            asking.spawn(async move {
                let admitted = client.post::<_, ()>("/v1/admit", &request).await;
                admitted.map_err(|error| (first, refusal(&name, None, error)))
            });
        }
        all(asking).await.map(|_admitted: Vec<()>| ())
    }

    /// Asks again, once what they promised may have run out. An agent that does not answer now may
    /// do so when its VMs' turn comes, and refuses nothing.
    pub(super) async fn renew(&self) -> Result<(), Refusal> {
        match self.ask().await {
            Err(refusal) if refusal.code == RefusalCode::Unreachable => {
                tracing::warn!("memory is not promised anew: {refusal}");
                Ok(())
            }
            renewed => renewed,
        }
    }
}

/// A move's place in the plan, and something of it.
type Placed<T> = Vec<(usize, T)>;

fn by_host<'a, T>(
    plan: &'a Plan,
    of_moves: Vec<T>,
    host: impl Fn(usize) -> &'a String,
) -> BTreeMap<String, Placed<T>> {
    debug_assert_eq!(plan.moves.len(), of_moves.len());
    let mut hosts: BTreeMap<String, Placed<T>> = BTreeMap::new();
    for (at, of_move) in of_moves.into_iter().enumerate() {
        hosts
            .entry(host(at).clone())
            .or_default()
            .push((at, of_move));
    }
    hosts
}

async fn check_all(
    client: Client,
    source: String,
    moves: Placed<MoveSpec>,
) -> Result<Placed<MoveCheck>, (usize, Refusal)> {
    let mut checks = Vec::with_capacity(moves.len());
    for (at, spec) in moves {
        let check = client.post("/v1/check", &spec).await;
        let check = check.map_err(|error| (at, refusal(&source, Some(&spec.vm), error)))?;
        checks.push((at, check));
    }
    Ok(checks)
}

fn refusal(host: &str, vm: Option<&str>, error: CallError) -> Refusal {
    let mut refusal = error.into_refusal();
    refusal.message = format!("host `{host}`: {}; nothing was started", refusal.message);
    refusal.vm = refusal.vm.or_else(|| vm.map(str::to_owned));
    refusal
}

/// All results, or the refusal that comes first in the plan.
async fn all<T: 'static>(
    mut tasks: JoinSet<Result<T, (usize, Refusal)>>,
) -> Result<Vec<T>, Refusal> {
    let (mut results, mut refusals) = (Vec::new(), Vec::new());
    while let Some(joined) = tasks.join_next().await {
        match joined {
            Ok(Ok(result)) => results.push(result),
            Ok(Err(refusal)) => refusals.push(refusal),
            Err(error) => {
                tracing::error!("asking the agents failed: {error}");
                let message = "the agent failed inside, see its log; nothing was started";
                refusals.push((usize::MAX, Refusal::new(RefusalCode::Internal, message)));
            }
        }
    }
    match refusals.into_iter().min_by_key(|(at, _)| *at) {
        None => Ok(results),
        Some((_, refusal)) => Err(refusal),
    }
}
