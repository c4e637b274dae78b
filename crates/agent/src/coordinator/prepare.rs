//! Prepares the source hosts of a group: all hash and register, then all learn what the others
//! need.
//!
//! Whatever fails on a host costs savings only: the group goes on without it. The coordinator
//! holds what it needs for the migration to take the preparation over: the group's id and the
//! secrets of its trust domains.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use super::forecast;
use super::group::Group;
use super::preflight::Admissions;
use super::saved::SavedGroup;
use super::seeds::{SeededHost, seeded_hosts};
use super::{Peers, lock};
use crate::api::mover::{Refusal, RefusalCode};
use crate::client::{CallError, Client};
use crate::types::{
    GroupSurvey, HostSurvey, Plan, PreparationRequest, PreparationStatus, PrepareBounds,
    PrepareSpec, PrepareState, PrepareStatus, PrepareVm, ResolveSpec, Scope, Sharing,
};

/// How often an agent is asked how far it is.
const POLL: Duration = Duration::from_millis(100);
/// How often the readers of a group hear how far its preparation is.
const NEWS: Duration = Duration::from_secs(5);
/// An agent that does not answer for so many polls in a row has failed.
const SILENT_POLLS_MAX: u32 = 3;

/// The preparation of a group.
pub(crate) struct Preparation {
    id: String,
    plan: Plan,
    keys: BTreeMap<String, String>,
    survey: bool,
    hosts: Vec<SourceHost>,
    /// Where VMs stay whose contents are used; empty if none are.
    pub(super) seeded: Vec<SeededHost>,
    cancelled: AtomicBool,
    begin: Instant,
    state: Mutex<State>,
}

/// A source host and what it is asked to prepare.
struct SourceHost {
    name: String,
    client: Client,
    spec: PrepareSpec,
}

#[derive(Default)]
struct State {
    finished: Option<Instant>,
    /// Pages looked at and to look at, by host.
    pages: BTreeMap<String, (u64, u64)>,
    result: Option<GroupSurvey>,
}

impl Preparation {
    /// As a client asked for it.
    pub(super) fn new(
        id: &str,
        keys: BTreeMap<String, String>,
        request: PreparationRequest,
        peers: &Peers,
    ) -> Result<Self, Refusal> {
        let known: BTreeSet<&String> = request.plan.moves.iter().map(|one| &one.from).collect();
        if let Some(other) = request.hosts.iter().find(|host| !known.contains(host)) {
            let message = format!("the plan moves no VM from host `{other}`");
            return Err(Refusal::new(RefusalCode::BadRequest, message));
        }
        let mut plan = request.plan;
        let moves = plan.moves.clone();
        if !request.hosts.is_empty() {
            plan.moves.retain(|one| request.hosts.contains(&one.from));
        }
        let mut hosts = source_hosts(id, &plan, &keys, peers);
        for host in &mut hosts {
            host.spec.bounds = request.bounds;
            if request.survey {
                host.spec.index.clear();
            }
        }
        if !request.survey {
            // Part of a plan prepared is no preparation of the plan.
            plan.moves = moves;
        }
        let bounds = request.bounds;
        let mut one = Self::with_hosts(id, plan, keys, hosts, request.survey);
        if !one.survey {
            one.seeded = seeded_hosts(id, &one.plan, &one.keys, (peers, bounds));
        }
        Ok(one)
    }

    /// Of a group that is about to move.
    pub(super) fn of_group(
        saved: &SavedGroup,
        keys: BTreeMap<String, String>,
        peers: &Peers,
    ) -> Self {
        let mut hosts = source_hosts(&saved.id, &saved.plan, &keys, peers);
        let is_rack = saved.plan.settings().scope == Scope::Rack;
        if !is_rack {
            // The migration does not ask an index.
            hosts.iter_mut().for_each(|host| host.spec.index.clear());
        }
        let mut one = Self::with_hosts(&saved.id, saved.plan.clone(), keys, hosts, false);
        if is_rack {
            let bounds = PrepareBounds::default();
            one.seeded = seeded_hosts(&saved.id, &one.plan, &one.keys, (peers, bounds));
        }
        one
    }

    fn with_hosts(
        id: &str,
        plan: Plan,
        keys: BTreeMap<String, String>,
        hosts: Vec<SourceHost>,
        survey: bool,
    ) -> Self {
        Self {
            id: id.to_owned(),
            plan,
            keys,
            survey,
            hosts,
            seeded: Vec::new(),
            cancelled: AtomicBool::new(false),
            begin: Instant::now(),
            state: Mutex::default(),
        }
    }

    pub(super) fn id(&self) -> &str {
        &self.id
    }

    pub(super) fn keys(&self) -> &BTreeMap<String, String> {
        &self.keys
    }

    /// Whether this is, finished, the preparation of the moves of `plan`.
    pub(super) fn fits(&self, plan: &Plan) -> bool {
        let moves = |plan: &Plan| -> BTreeSet<[String; 4]> {
            let one = |one: &crate::types::PlanMove| {
                let domain = one.domain().to_owned();
                [one.vm.clone(), one.from.clone(), one.to.clone(), domain]
            };
            plan.moves.iter().map(one).collect()
        };
        let seeds = |plan: &Plan| (plan.seed_from_target, plan.residents.clone());
        !self.survey && !self.is_expired() && self.status().finished && {
            moves(plan) == moves(&self.plan)
                && plan.index == self.plan.index
                && seeds(plan) == seeds(&self.plan)
        }
    }

    /// Whether the agents have forgotten its results.
    pub(super) fn is_expired(&self) -> bool {
        let finished = lock(&self.state).finished;
        finished.is_some_and(|at| at.elapsed() > crate::prepare::LEASE)
    }

    /// When it was done, of a survey: nothing is kept of it for a migration.
    pub(super) fn survey_done(&self) -> Option<Instant> {
        self.survey.then(|| lock(&self.state).finished).flatten()
    }

    /// How far it is.
    pub(crate) fn status(&self) -> PreparationStatus {
        let state = lock(&self.state);
        let sum = |of: fn(&(u64, u64)) -> u64| state.pages.values().map(of).sum();
        PreparationStatus {
            group: self.id.clone(),
            finished: state.finished.is_some(),
            message: match (&state.finished, &state.result) {
                (None, _) => "memory is being hashed".to_owned(),
                (Some(_), None) => "it was cancelled".to_owned(),
                (Some(_), Some(result)) => result.failed.join("; "),
            },
            pages_done: sum(|pages| pages.0),
            pages_total: sum(|pages| pages.1),
            survey: state.result.clone(),
        }
    }

    /// Makes it end soon.
    pub(super) fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Tells all agents to forget it.
    pub(super) async fn end(&self) {
        let mut calls = JoinSet::new();
        for host in &self.hosts {
            let (client, path) = (host.client.clone(), self.path("/end"));
            // An agent that does not answer forgets it by itself.
            calls.spawn(async move { client.post::<_, ()>(&path, &()).await.is_ok() });
        }
        for host in &self.seeded {
            let (client, path) = (host.client.clone(), host.path("/end"));
            calls.spawn(async move { client.post::<_, ()>(&path, &()).await.is_ok() });
        }
        calls.join_all().await;
    }

    fn path(&self, action: &str) -> String {
        format!("/v1/prepare/{}{action}", self.id)
    }

    /// Prepares all hosts. Afterwards its status has the result, unless it was cancelled.
    pub(crate) async fn run(self: Arc<Self>) {
        let scanned = self.step(|one, at| async move {
            let host = &one.hosts[at];
            host.client.post::<_, ()>("/v1/prepare", &host.spec).await
        });
        let ((found, mut failed), unseeded) = tokio::join!(scanned, self.seed());
        failed.extend(unseeded);
        let reports: Vec<_> = found.iter().map(|(_, report)| report).collect();
        let elsewhere = if self.survey {
            forecast::carried_elsewhere(&reports)
        } else {
            vec![Vec::new(); found.len()]
        };
        let mut wishes: BTreeMap<usize, ResolveSpec> = BTreeMap::new();
        for ((at, _), carried_elsewhere) in found.iter().zip(elsewhere) {
            let compress = self.survey;
            let wish = ResolveSpec {
                compress,
                carried_elsewhere,
            };
            wishes.insert(*at, wish);
        }
        let wishes = Arc::new(wishes);
        let resolved = self.step_on(found.iter().map(|(at, _)| *at).collect(), move |one, at| {
            let wishes = wishes.clone();
            async move {
                let path = one.path("/resolve");
                one.hosts[at]
                    .client
                    .post::<_, ()>(&path, &wishes[&at])
                    .await
            }
        });
        let (found, more) = resolved.await;
        failed.extend(more);
        if self.survey || self.cancelled.load(Ordering::Relaxed) {
            self.end().await;
        }
        self.finish(found, failed);
    }

    fn finish(&self, found: Vec<(usize, HostSurvey)>, failed: Vec<String>) {
        let reports = found.into_iter().map(|(at, mut report)| {
            // As the plan calls it.
            report.host.clone_from(&self.hosts[at].name);
            report
        });
        let budget = self.plan.max_bandwidth_bytes_per_s;
        let mut survey = forecast::of_group(&self.id, reports.collect(), budget);
        survey.seconds = self.begin.elapsed().as_secs_f64();
        survey.failed = failed;
        let mut state = lock(&self.state);
        state.finished = Some(Instant::now());
        if !self.cancelled.load(Ordering::Relaxed) {
            state.result = Some(survey);
        }
    }

    async fn step<F: Future<Output = Result<(), CallError>> + Send>(
        self: &Arc<Self>,
        ask: impl Fn(Arc<Self>, usize) -> F + Clone + Send + Sync + 'static,
    ) -> (Vec<(usize, HostSurvey)>, Vec<String>) {
        self.step_on((0..self.hosts.len()).collect(), ask).await
    }

    /// Asks these hosts to do a step and waits for it; returns the reports of those that did it,
    /// and what became of the others.
    async fn step_on<F: Future<Output = Result<(), CallError>> + Send>(
        self: &Arc<Self>,
        hosts: Vec<usize>,
        ask: impl Fn(Arc<Self>, usize) -> F + Clone + Send + Sync + 'static,
    ) -> (Vec<(usize, HostSurvey)>, Vec<String>) {
        let mut steps = JoinSet::new();
        for at in hosts {
            let (one, ask) = (self.clone(), ask.clone());
            steps.spawn(async move {
                let asked = ask(one.clone(), at).await;
                match asked {
                    Ok(()) => {
                        let host = &one.hosts[at];
                        let path = one.path("");
                        (at, one.wait(&host.name, &host.client, &path).await)
                    }
                    Err(error) => (at, Err(error.in_full())),
                }
            });
        }
        let (mut reports, mut failed) = (BTreeMap::new(), Vec::new());
        for (at, result) in steps.join_all().await {
            let name = &self.hosts[at].name;
            match result {
                Ok((report, message)) => {
                    reports.insert(at, report);
                    if !message.is_empty() {
                        failed.push(format!("host `{name}`: {message}"));
                    }
                }
                Err(problem) => failed.push(format!("host `{name}`: {problem}")),
            }
        }
        failed.sort();
        (reports.into_iter().collect(), failed)
    }

    /// Waits until a host's step has ended.
    pub(super) async fn wait(
        &self,
        host: &str,
        client: &Client,
        path: &str,
    ) -> Result<(HostSurvey, String), String> {
        let mut silent = 0;
        loop {
            if self.cancelled.load(Ordering::Relaxed) {
                return Err("cancelled".to_owned());
            }
            match client.get::<PrepareStatus>(path).await {
                Ok(status) => {
                    silent = 0;
                    let pages = (status.pages_done, status.pages_total);
                    lock(&self.state).pages.insert(host.to_owned(), pages);
                    match (status.state, status.report) {
                        (PrepareState::Failed, _) => return Err(status.message),
                        (PrepareState::Registered | PrepareState::Ready, Some(report)) => {
                            return Ok((report, status.message));
                        }
                        _ => {}
                    }
                }
                Err(error) if error.refused_as().is_some() => return Err(error.in_full()),
                Err(error) => {
                    silent += 1;
                    if silent >= SILENT_POLLS_MAX {
                        return Err(error.in_full());
                    }
                }
            }
            tokio::time::sleep(POLL).await;
        }
    }
}

impl Group {
    /// Prepares the group, then starts its moves, whatever came of it; unless a target has given
    /// away meanwhile what it had for them.
    pub(super) fn start_prepared(
        self: &Arc<Self>,
        preparation: Arc<Preparation>,
        admissions: Admissions,
    ) {
        let group = self.clone();
        self.wait_for("memory is being hashed");
        tokio::spawn(async move {
            group.prepare(&preparation).await;
            match preparation.status().survey {
                Some(survey) => {
                    for problem in &survey.failed {
                        group.tell(format!("moves without its preparation: {problem}"));
                    }
                    group.prepared(survey);
                }
                None if group.all_cancelled() => {}
                None => group.tell("moves without preparation, which failed inside".to_owned()),
            }
            group.wait_for("its turn comes");
            match admissions.renew().await {
                Err(refusal) if !group.all_cancelled() => group.refuse(&refusal),
                _ => group.start(),
            }
            group.end_with(preparation);
        });
    }

    /// Has the memory hashed, and says how far that is.
    async fn prepare(&self, preparation: &Arc<Preparation>) {
        let run = tokio::spawn(preparation.clone().run());
        let mut news = Instant::now();
        let mut done = 0;
        while !run.is_finished() {
            tokio::time::sleep(POLL).await;
            if self.all_cancelled() {
                preparation.cancel();
            }
            let status = preparation.status();
            // Hosts that are heard of later add to the whole.
            done = done.max(status.pages_done * 100 / status.pages_total.max(1));
            let what = format!("memory is being hashed, {done} %");
            self.wait_for(&what);
            if news.elapsed() >= NEWS {
                news = Instant::now();
                self.tell(what);
            }
        }
    }

    /// Has the agents forget the preparation once the group has ended.
    pub(super) fn end_with(self: &Arc<Self>, preparation: Arc<Preparation>) {
        let group = self.clone();
        tokio::spawn(async move {
            while !group.ended() {
                tokio::time::sleep(10 * POLL).await;
            }
            preparation.end().await;
        });
    }
}

/// Each source host of a plan with its VMs, in the plan's order.
fn source_hosts(
    id: &str,
    plan: &Plan,
    keys: &BTreeMap<String, String>,
    peers: &Peers,
) -> Vec<SourceHost> {
    let identical = plan.settings().sharing == Sharing::Identical;
    // The numbers of target hosts and the index are those of a migration with this scope.
    let plan = Plan {
        scope: Some(Scope::Rack),
        ..plan.clone()
    };
    let mut hosts: Vec<SourceHost> = Vec::new();
    for (spec, one) in plan.specs(id, keys).into_iter().zip(&plan.moves) {
        let Some(rack) = spec.rack else {
            continue;
        };
        let vm = PrepareVm {
            vm: spec.vm,
            qmp: spec.qmp,
            domain_key: spec.domain_key,
            target: rack.target,
        };
        if let Some(host) = hosts.iter_mut().find(|host| host.name == one.from) {
            host.spec.vms.push(vm);
            continue;
        }
        hosts.push(SourceHost {
            name: one.from.clone(),
            client: peers.client(&plan.hosts[&one.from]),
            spec: PrepareSpec {
                group: id.to_owned(),
                vms: vec![vm],
                index: rack.index,
                // A plan has at most 4096 moves.
                targets: u16::try_from(rack.peers.len()).unwrap_or(u16::MAX),
                bounds: PrepareBounds::default(),
                resident: false,
                seeded: plan.takes_seeds(),
                identical,
            },
        });
    }
    hosts
}
