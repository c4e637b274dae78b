//! Coordinates groups: the agent that accepts a plan asks every agent first, starts the moves,
//! follows their events, and divides the group's bandwidth.
//!
//! Participants: the coordinator (any agent), the source agents (they carry out moves), the target
//! agents (they admit VMs). The coordinator reaches all of them, itself included, through their
//! control API.
//!
//! Goal: nothing starts unless all of it can. Goal: the coordinator's death stops no move; started
//! again, it finds the plan in its state directory and follows the moves where they are.
//! Non-goal: deciding where a VM runs; source and target agent of a move do that alone.
//!
//! ```text
//!  client            coordinator              source agents        target agents
//!    │  POST groups       │  POST check (each move)  │                   │
//!    ├───────────────────►├─────────────────────────►│                   │
//!    │                    │  POST admit (each target: all its VMs)       │
//!    │                    ├─────────────────────────────────────────────►│
//!    │ 202, or a refusal: │  POST moves (each move, in the plan's order) │
//!    │ nothing started    ├─────────────────────────►│                   │
//!    │◄───────────────────┤  GET moves/../events     │                   │
//!    │  GET events        │◄═════════════════════════╡                   │
//!    │◄══════════════════ ┤  PATCH bandwidth (as moves end)              │
//!    │                    ├─────────────────────────►│                   │
//! ```

mod budget;
mod evacuation;
mod follow;
mod forecast;
mod group;
mod preflight;
mod prepare;
mod saved;
mod seeds;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::api::mover::{Refusal, RefusalCode};
use crate::client::Client;
use crate::config::Config;
use crate::plan;
use crate::types::{
    ActionReport, EvacuationRequest, GroupAccepted, GroupRequest, GroupStatus, Host, Plan,
    PreparationRequest, Scope, Sharing,
};

pub(crate) use group::{Action, Group};
use preflight::Admissions;
use prepare::Preparation;
use saved::{SavedGroup, SavedGroups};

/// Ended groups that are remembered for those who ask late.
const ENDED_MAX: usize = 64;
/// Groups under way at once: a person watches each.
const GROUPS_MAX: usize = 64;

/// All groups that this agent coordinates.
pub(crate) struct Coordinator {
    peers: Peers,
    saved: Arc<SavedGroups>,
    groups: Mutex<BTreeMap<String, Arc<Group>>>,
    preparations: Mutex<BTreeMap<String, Arc<Preparation>>>,
}

/// Makes clients of other agents.
#[derive(Clone)]
pub(crate) struct Peers {
    tls: Option<Arc<rustls::ClientConfig>>,
    timeout: Duration,
}

impl Peers {
    pub(crate) fn client(&self, host: &Host) -> Client {
        Client::tcp(&host.control, self.tls.clone(), self.timeout)
    }
}

impl Coordinator {
    pub(crate) fn new(config: &Config, tls: Option<Arc<rustls::ClientConfig>>) -> Self {
        Self {
            peers: Peers {
                tls,
                timeout: config.peer_timeout(),
            },
            saved: Arc::new(SavedGroups::new(&config.state_dir)),
            groups: Mutex::default(),
            preparations: Mutex::default(),
        }
    }

    /// Follows the groups of an earlier process of this agent again.
    pub(crate) fn adopt_saved(&self) {
        for saved in self.saved.load() {
            tracing::info!(
                group = saved.id,
                "following the group again after a restart"
            );
            match domain_keys(&saved.plan).map(|keys| self.new_group(&saved, &keys)) {
                Ok(group) => {
                    self.lock().insert(saved.id, group.clone());
                    group.follow_all();
                }
                Err(refusal) => tracing::error!(group = saved.id, "cannot follow it: {refusal}"),
            }
        }
    }

    /// Checks a plan with every agent that it involves and starts it. Meanwhile the group can be seen
    /// and cancelled; if it is refused, nobody knows of it any more.
    pub(crate) async fn accept(&self, request: GroupRequest) -> Result<GroupAccepted, Refusal> {
        let bad = |error: plan::PlanError| Refusal::new(RefusalCode::BadRequest, error.to_string());
        let plan = request.plan;
        plan.check().map_err(bad)?;
        let before = request.id.is_none().then(|| self.prepared_for(&plan));
        let before = before.flatten();
        let id = match (request.id, &before) {
            (Some(id), _) => id,
            (None, Some(before)) => before.id().to_owned(),
            (None, None) => new_id()?,
        };
        plan::check_group_id(&id).map_err(bad)?;

        let saved = SavedGroup {
            id: id.clone(),
            accepted_unix_ms: crate::api::moves::unix_ms(),
            plan,
            outcomes: BTreeMap::new(),
        };
        let keys = match &before {
            Some(before) => before.keys().clone(),
            None => domain_keys(&saved.plan)?,
        };
        let group = self.new_group(&saved, &keys);
        self.enter(&group)?;
        let admissions = match self.agree(&saved, &group).await {
            Ok(admissions) => admissions,
            Err(refusal) => {
                // For those who watch it already.
                group.refuse(&refusal);
                self.lock().remove(&id);
                return Err(refusal);
            }
        };
        lock(&self.preparations).remove(&id);
        let settings = saved.plan.settings();
        let needs_it = settings.scope == Scope::Rack || settings.sharing == Sharing::Identical;
        let preparation = || Preparation::of_group(&saved, keys, &self.peers);
        match (needs_it && saved.plan.prepare != Some(false)).then(preparation) {
            Some(preparation) => group.start_prepared(Arc::new(preparation), admissions),
            None => {
                group.wait_for("its turn comes");
                group.start();
                if let Some(before) = before {
                    group.end_with(before);
                }
            }
        }
        Ok(GroupAccepted { group: id })
    }

    /// Asks all agents of a group, and remembers it.
    async fn agree(&self, saved: &SavedGroup, group: &Group) -> Result<Admissions, Refusal> {
        group.wait_for("the agents are being asked");
        let admissions = preflight::run(&saved.plan, &self.peers, group.specs()).await?;
        self.saved.write(saved).map_err(|error| {
            let message = format!("cannot remember the plan ({error}); nothing was started");
            Refusal::new(RefusalCode::Internal, message)
        })?;
        Ok(admissions)
    }

    pub(crate) fn get(&self, id: &str) -> Result<Arc<Group>, Refusal> {
        self.lock().get(id).cloned().ok_or_else(|| {
            let message = format!(
                "this agent does not coordinate a group `{id}`; ask the agent that accepted it, \
                 or see `gangway status` on the source hosts"
            );
            Refusal::new(RefusalCode::UnknownGroup, message)
        })
    }

    pub(crate) fn list(&self) -> Vec<GroupStatus> {
        self.lock().values().map(|group| group.status()).collect()
    }

    pub(crate) async fn act(
        &self,
        id: &str,
        action: Action,
        vm: Option<&str>,
    ) -> Result<ActionReport, Refusal> {
        self.get(id)?.act(action, vm).await
    }

    fn new_group(&self, saved: &SavedGroup, keys: &BTreeMap<String, String>) -> Arc<Group> {
        Arc::new(Group::new(saved, keys, &self.peers, self.saved.clone()))
    }

    /// Makes the plan that empties hosts.
    pub(crate) async fn plan_evacuation(
        &self,
        request: EvacuationRequest,
    ) -> Result<Plan, Refusal> {
        evacuation::plan(request, &self.peers).await
    }

    /// Starts to prepare the hosts of a plan, or to survey them.
    pub(crate) fn prepare(&self, request: PreparationRequest) -> Result<GroupAccepted, Refusal> {
        let bad = |error: plan::PlanError| Refusal::new(RefusalCode::BadRequest, error.to_string());
        request.plan.check().map_err(bad)?;
        let before = (!request.survey)
            .then(|| self.prepared_for(&request.plan))
            .flatten();
        let (id, keys) = match before {
            Some(before) => (before.id().to_owned(), before.keys().clone()),
            None => (new_id()?, domain_keys(&request.plan)?),
        };
        let preparation = Arc::new(Preparation::new(&id, keys, request, &self.peers)?);
        {
            let mut preparations = lock(&self.preparations);
            preparations.retain(|_, one| !one.is_expired());
            forget_survey(&mut preparations);
            if preparations.len() >= GROUPS_MAX && !preparations.contains_key(&id) {
                let message = format!("this agent holds {GROUPS_MAX} preparations, its most");
                return Err(Refusal::new(RefusalCode::Busy, message));
            }
            preparations.insert(id.clone(), preparation.clone());
        }
        tokio::spawn(async move { preparation.run().await });
        Ok(GroupAccepted { group: id })
    }

    pub(crate) fn preparation(&self, id: &str) -> Result<Arc<Preparation>, Refusal> {
        lock(&self.preparations).get(id).cloned().ok_or_else(|| {
            let message = format!("this agent prepares no group `{id}`");
            Refusal::new(RefusalCode::UnknownGroup, message)
        })
    }

    pub(crate) async fn cancel_preparation(&self, id: &str) -> Result<(), Refusal> {
        let preparation = self.preparation(id)?;
        lock(&self.preparations).remove(id);
        preparation.cancel();
        preparation.end().await;
        Ok(())
    }

    /// The preparation of the same moves that is done, if there is one.
    fn prepared_for(&self, plan: &Plan) -> Option<Arc<Preparation>> {
        let preparations = lock(&self.preparations);
        let mut fitting = preparations.values().filter(|one| one.fits(plan));
        fitting.next().cloned()
    }

    /// Puts a group into the table.
    fn enter(&self, group: &Arc<Group>) -> Result<(), Refusal> {
        let mut groups = self.lock();
        let id = group.id();
        if groups.contains_key(id) {
            let message = format!("there is a group `{id}` already; an id is used once");
            return Err(Refusal::new(RefusalCode::Busy, message));
        }
        if groups.values().filter(|group| !group.ended()).count() >= GROUPS_MAX {
            let message = format!("this agent coordinates {GROUPS_MAX} groups already, its most");
            return Err(Refusal::new(RefusalCode::Busy, message));
        }
        if let Some(oldest) = oldest_beyond_room(&groups) {
            groups.remove(&oldest);
            // It is there still if a move of it needs a person.
            self.saved.remove(&oldest);
        }
        groups.insert(id.to_owned(), group.clone());
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Group>>> {
        lock(&self.groups)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn new_id() -> Result<String, Refusal> {
    Ok(format!("g-{}", hex::encode(random::<4>()?)))
}

/// The group to forget if too many have ended: the oldest, and one that needs a person last.
fn oldest_beyond_room(groups: &BTreeMap<String, Arc<Group>>) -> Option<String> {
    let ended = groups.values().filter(|group| group.ended());
    if ended.clone().count() < ENDED_MAX {
        return None;
    }
    let oldest = ended.min_by(|a, b| {
        let needs_person = a.needs_person().cmp(&b.needs_person());
        needs_person.then(a.accepted_unix_ms().total_cmp(&b.accepted_unix_ms()))
    });
    oldest.map(|group| group.id().to_owned())
}

/// Makes room, if there is none, in the place of the oldest survey that is done: who made it has
/// read it, and nothing else uses it.
fn forget_survey(preparations: &mut BTreeMap<String, Arc<Preparation>>) {
    if preparations.len() < GROUPS_MAX {
        return;
    }
    let done = preparations
        .iter()
        .filter_map(|(id, one)| Some((one.survey_done()?, id)));
    if let Some(id) = done.min().map(|(_, id)| id.clone()) {
        preparations.remove(&id);
    }
}

/// A secret for each trust domain of a plan: ids of contents mean nothing outside the group.
fn domain_keys(plan: &Plan) -> Result<BTreeMap<String, String>, Refusal> {
    let key = |domain: &str| Ok((domain.to_owned(), hex::encode(random::<32>()?)));
    let domains: std::collections::BTreeSet<_> = plan.domains().collect();
    domains.into_iter().map(key).collect()
}

fn random<const N: usize>() -> Result<[u8; N], Refusal> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| {
        Refusal::new(
            RefusalCode::Internal,
            format!("the kernel gives no random bytes: {error}"),
        )
    })?;
    Ok(bytes)
}
