//! One group: what its moves are, where each stands, what is asked of it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::Peers;
use super::budget;
use super::saved::{SavedGroup, SavedGroups};
use crate::api::log::{EventLog, Life};
use crate::api::mover::{Bandwidth, Refusal, RefusalCode};
use crate::api::moves::unix_ms;
use crate::client::{CallError, Client};
use crate::types::{
    ActionReport, GroupEvent, GroupFinished, GroupFinishedTag, GroupMove, GroupPrepared,
    GroupPreparedTag, GroupStatus, GroupSurvey, Happening, MoveEvent, MoveSpec, MoveStatus, Phase,
    Progress,
};

/// Each move logs about nine phases, more if it is recovered.
const LASTING_EVENTS_OF_MOVE: usize = 16;
/// A reader that comes late gets the newest progress of each move, and a little history.
const PASSING_EVENTS: usize = 256;
const PASSING_EVENTS_OF_MOVE: usize = 2;

/// What can be asked of moves under way.
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

    /// Whether a group's action without a VM is meant for a move in this phase.
    fn concerns(self, phase: Phase) -> bool {
        match self {
            Self::Cancel => !phase.is_final(),
            Self::Continue => phase == Phase::Held,
            Self::Postcopy => matches!(phase, Phase::Preparing | Phase::Bulk),
            Self::Recover => phase == Phase::NeedsPerson,
        }
    }
}

/// One group.
pub(crate) struct Group {
    id: String,
    accepted_unix_ms: f64,
    budget_bytes_per_s: Option<u64>,
    pub(super) members: Vec<Member>,
    state: Mutex<Vec<MemberState>>,
    log: EventLog<GroupEvent>,
    /// Each source's share of the budget, as its agent knows it. Held while shares change.
    shares: tokio::sync::Mutex<BTreeMap<String, u64>>,
    saved: Arc<SavedGroups>,
}

/// What is fixed about a move.
pub(super) struct Member {
    pub(super) spec: MoveSpec,
    pub(super) source: String,
    pub(super) client: Client,
}

/// Where a move stands.
struct MemberState {
    status: MoveStatus,
    reachable: bool,
    /// The source agent has been asked to start it; before that, only the coordinator knows it.
    started: bool,
    cancelled: bool,
    begin: Instant,
    ended: Option<Instant>,
    cursor: Cursor,
}

/// How far a move's events have been read: numbers count within one boot of the source agent.
#[derive(Clone, Debug, Default)]
pub(super) struct Cursor {
    pub(super) boot: String,
    pub(super) next: u64,
}

impl Group {
    pub(super) fn new(
        saved: &SavedGroup,
        keys: &BTreeMap<String, String>,
        peers: &Peers,
        on_disk: Arc<SavedGroups>,
    ) -> Self {
        let plan = &saved.plan;
        let members: Vec<_> = plan
            .specs(&saved.id, keys)
            .into_iter()
            .zip(&plan.moves)
            .map(|(spec, plan_move)| Member {
                spec,
                source: plan_move.from.clone(),
                client: peers.client(&plan.hosts[&plan_move.from]),
            })
            .collect();
        let state = members
            .iter()
            .map(|member| MemberState::new(&member.spec))
            .collect();
        let count = members.len();
        Self {
            id: saved.id.clone(),
            accepted_unix_ms: saved.accepted_unix_ms,
            budget_bytes_per_s: plan.max_bandwidth_bytes_per_s,
            members,
            state: Mutex::new(state),
            log: EventLog::new(
                // And the end of the preparation and of the group.
                LASTING_EVENTS_OF_MOVE * count + 2,
                PASSING_EVENTS + PASSING_EVENTS_OF_MOVE * count,
            ),
            shares: tokio::sync::Mutex::default(),
            saved: on_disk,
        }
    }

    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    pub(crate) fn accepted_unix_ms(&self) -> f64 {
        self.accepted_unix_ms
    }

    pub(crate) fn log(&self) -> &EventLog<GroupEvent> {
        &self.log
    }

    pub(super) fn specs(&self) -> Vec<MoveSpec> {
        self.members
            .iter()
            .map(|member| member.spec.clone())
            .collect()
    }

    /// Whether every move has ended.
    pub(crate) fn ended(&self) -> bool {
        self.lock().iter().all(MemberState::has_ended)
    }

    pub(crate) fn status(&self) -> GroupStatus {
        let state = self.lock();
        GroupStatus {
            group: self.id.clone(),
            accepted_unix_ms: self.accepted_unix_ms,
            finished: state.iter().all(MemberState::has_ended),
            moves: self.moves(&state),
        }
    }

    fn moves(&self, state: &[MemberState]) -> Vec<GroupMove> {
        let shown = |(member, state): (&Member, &MemberState)| GroupMove {
            status: state.status.clone(),
            source: member.source.clone(),
            reachable: state.reachable,
            elapsed_s: (state.ended.unwrap_or_else(Instant::now) - state.begin).as_secs_f64(),
        };
        self.members.iter().zip(state).map(shown).collect()
    }

    /// Asks the source agents of the group's moves, or of one, to act.
    pub(crate) async fn act(
        self: &Arc<Self>,
        action: Action,
        vm: Option<&str>,
    ) -> Result<ActionReport, Refusal> {
        let chosen = self.choose(action, vm)?;
        let mut report = ActionReport::default();
        for at in chosen {
            let member = &self.members[at];
            match self.act_on(at, action).await {
                Ok(()) => report.done.push(member.spec.vm.clone()),
                Err(mut refusal) => {
                    refusal.vm.get_or_insert_with(|| member.spec.vm.clone());
                    report.refused.push(refusal);
                }
            }
        }
        Ok(report)
    }

    /// The moves that an action is for; none is a refusal.
    fn choose(&self, action: Action, vm: Option<&str>) -> Result<Vec<usize>, Refusal> {
        if let Some(vm) = vm {
            let at = self.members.iter().position(|member| member.spec.vm == vm);
            return at.map(|at| vec![at]).ok_or_else(|| {
                let message = format!("group `{}` moves no VM `{vm}`", self.id);
                Refusal::of_vm(RefusalCode::UnknownVm, vm, message)
            });
        }
        let state = self.lock();
        let concerned = |at: &usize| action.concerns(state[*at].status.phase);
        let chosen: Vec<_> = (0..self.members.len()).filter(concerned).collect();
        if !chosen.is_empty() {
            return Ok(chosen);
        }
        let (code, what) = match action {
            Action::Cancel => (RefusalCode::TooLate, "has ended; nothing is left to cancel"),
            Action::Continue => (RefusalCode::NotHeld, "has no VM that waits for `continue`"),
            Action::Postcopy => {
                let what = "has no VM whose memory is being copied with its guest running";
                (RefusalCode::TooLate, what)
            }
            Action::Recover => (RefusalCode::TooLate, "has no VM that needs a person"),
        };
        Err(Refusal::new(code, format!("group `{}` {what}", self.id)))
    }

    async fn act_on(self: &Arc<Self>, at: usize, action: Action) -> Result<(), Refusal> {
        if action == Action::Cancel && self.cancel_unstarted(at) {
            return Ok(());
        }
        let member = &self.members[at];
        let path = format!("/v1/moves/{}/{}", member.spec.id, action.path());
        let answer = member
            .client
            .post::<_, ()>(&path, &serde_json::json!({}))
            .await;
        if action == Action::Recover {
            // Also when the agent has nothing to recover: then its news say how the move ended.
            let too_late = |error: &CallError| error.refused_as() == Some(RefusalCode::TooLate);
            if answer.as_ref().map_or_else(too_late, |()| true) && self.reopen(at) {
                self.follow(at);
                return Ok(());
            }
        }
        answer.map_err(CallError::into_refusal)
    }

    /// Remembers the wish for a move that no agent knows yet.
    fn cancel_unstarted(&self, at: usize) -> bool {
        let mut state = self.lock();
        let unstarted = !state[at].started && !state[at].has_ended();
        state[at].cancelled |= unstarted;
        unstarted
    }

    /// Marks a move as known to its agent; false if it was cancelled before.
    pub(super) fn claim_start(&self, at: usize) -> bool {
        let mut state = self.lock();
        state[at].started |= !state[at].cancelled;
        state[at].started
    }

    /// The agent was not reached: the move can be cancelled here again.
    pub(super) fn unclaim_start(&self, at: usize) {
        self.lock()[at].started = false;
    }

    /// Takes a move that needs a person back to work; false if it does not.
    fn reopen(&self, at: usize) -> bool {
        let mut state = self.lock();
        let state = &mut state[at];
        if state.status.phase != Phase::NeedsPerson {
            return false;
        }
        state.status.phase = Phase::Recovering;
        state.ended = None;
        self.log.reopen();
        true
    }

    /// Takes over an event of a move; true if it was the move's last.
    pub(super) fn happened(&self, at: usize, what: Happening) -> bool {
        let mut states = self.lock();
        let state = &mut states[at];
        if state.has_ended() {
            return true;
        }
        let life = match &what {
            Happening::Phase { phase, message } => {
                state.status.phase = *phase;
                state.status.message.clone_from(message);
                Life::Lasting
            }
            Happening::Progress { progress } => {
                state.status.progress = *progress;
                Life::Passing
            }
            Happening::Note { message } => {
                state.status.note = Some(message.clone());
                Life::Passing
            }
        };
        let (id, vm) = (state.status.id.clone(), state.status.vm.clone());
        self.log.push(life, |seq| {
            GroupEvent::Move(MoveEvent {
                seq,
                at_unix_ms: unix_ms(),
                id,
                vm,
                what,
            })
        });
        let ended = state.status.phase.is_final();
        if ended {
            state.ended = Some(Instant::now());
            if states.iter().all(MemberState::has_ended) {
                self.finish(&states);
            }
        }
        ended
    }

    /// Says of the moves that have not been started yet what they wait for.
    pub(super) fn wait_for(&self, what: &str) {
        for state in self.lock().iter_mut().filter(|state| !state.started) {
            let vm = &state.status.vm;
            state.status.message = format!("VM `{vm}` waits: {what}; it runs at the source");
        }
    }

    /// Whether every move was cancelled before its start.
    pub(super) fn all_cancelled(&self) -> bool {
        self.lock().iter().all(|state| state.cancelled)
    }

    /// Tells the group's readers that its preparation has ended.
    pub(super) fn prepared(&self, survey: GroupSurvey) {
        self.log.push(Life::Lasting, |seq| {
            GroupEvent::Prepared(GroupPrepared {
                seq,
                at_unix_ms: unix_ms(),
                event: GroupPreparedTag::Prepared,
                group: self.id.clone(),
                seconds: survey.seconds,
                cpu_seconds: survey.cpu_seconds,
                pages: survey.rack,
                failed: survey.failed,
            })
        });
    }

    fn finish(&self, states: &[MemberState]) {
        let outcomes = self.moves(states);
        self.log.push(Life::Lasting, |seq| {
            GroupEvent::Finished(GroupFinished {
                seq,
                at_unix_ms: unix_ms(),
                event: GroupFinishedTag::GroupFinished,
                group: self.id.clone(),
                outcomes,
            })
        });
        self.log.end();
        self.saved.remove(&self.id);
    }

    /// Says whether the source agent of a move answers; tells the group's readers on a change.
    pub(super) fn set_reachable(&self, at: usize, reachable: bool, message: &str) {
        let changed = {
            let mut state = self.lock();
            std::mem::replace(&mut state[at].reachable, reachable) != reachable
        };
        if changed {
            let message = message.to_owned();
            self.happened(at, Happening::Note { message });
        }
    }

    pub(super) fn cursor(&self, at: usize) -> Cursor {
        self.lock()[at].cursor.clone()
    }

    pub(super) fn set_cursor(&self, at: usize, cursor: Cursor) {
        self.lock()[at].cursor = cursor;
    }

    /// The spec of a move with its source's share of the budget as it is now.
    pub(super) async fn spec_with_share(&self, at: usize) -> MoveSpec {
        let member = &self.members[at];
        let mut shares = self.shares.lock().await;
        let share = self.wanted_shares().get(member.source.as_str()).copied();
        if let Some(share) = share {
            // The first move of a source brings the share along; later ones repeat it.
            shares.entry(member.source.clone()).or_insert(share);
        }
        let mut spec = member.spec.clone();
        spec.group_bandwidth_bytes_per_s = shares.get(&member.source).copied();
        spec
    }

    fn wanted_shares(&self) -> BTreeMap<&str, u64> {
        let Some(budget) = self.budget_bytes_per_s else {
            return BTreeMap::new();
        };
        let mut unfinished: BTreeMap<&str, u64> = BTreeMap::new();
        for (member, state) in self.members.iter().zip(self.lock().iter()) {
            *unfinished.entry(&member.source).or_default() += u64::from(!state.has_ended());
        }
        budget::shares(budget, &unfinished)
    }

    /// Gives the budget of the sources that are done to those that are not.
    pub(super) async fn rebalance(&self) {
        let mut shares = self.shares.lock().await;
        let wanted = self.wanted_shares();
        shares.retain(|source, _| wanted.contains_key(source.as_str()));
        for change in budget::changes(&shares, &wanted) {
            // A source whose moves are all to be started yet gets its share with the first.
            let Some(at) = self.working_member(change.source) else {
                continue;
            };
            let member = &self.members[at];
            let limits = Bandwidth {
                move_bytes_per_s: member.spec.max_bandwidth_bytes_per_s,
                group_bytes_per_s: Some(change.share),
            };
            let path = format!("/v1/moves/{}/bandwidth", member.spec.id);
            match member.client.patch(&path, &limits).await {
                Ok(()) => {
                    shares.insert(change.source.to_owned(), change.share);
                }
                Err(error) if change.is_increase() => {
                    tracing::warn!(
                        source = change.source,
                        "share of bandwidth not raised: {}",
                        error.in_full()
                    );
                }
                Err(error) => {
                    // Raising the others now would exceed the budget; the next end of a move, or
                    // this agent's return, tries again.
                    tracing::warn!(
                        source = change.source,
                        "share of bandwidth not cut: {}",
                        error.in_full()
                    );
                    return;
                }
            }
        }
    }

    fn working_member(&self, source: &str) -> Option<usize> {
        let state = self.lock();
        let works = |at: &usize| {
            self.members[*at].source == source && state[*at].started && !state[*at].has_ended()
        };
        (0..self.members.len()).find(works)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<MemberState>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MemberState {
    fn new(spec: &MoveSpec) -> Self {
        let status = MoveStatus {
            id: spec.id.clone(),
            group: spec.group.clone(),
            vm: spec.vm.clone(),
            target: spec.target_name.clone(),
            phase: Phase::Queued,
            message: format!("VM `{}` waits for its turn; it runs at the source", spec.vm),
            progress: Progress::default(),
            note: None,
        };
        Self {
            status,
            reachable: true,
            started: false,
            cancelled: false,
            begin: Instant::now(),
            ended: None,
            cursor: Cursor::default(),
        }
    }

    fn has_ended(&self) -> bool {
        self.ended.is_some()
    }
}
