//! One group: what its moves are, where each stands, what is asked of it.

mod act;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::Peers;
use super::budget;
use super::saved::{Outcome, SavedGroup, SavedGroups};
use crate::api::log::{EventLog, Life};
use crate::api::mover::{Bandwidth, Refusal};
use crate::api::moves::unix_ms;
use crate::client::Client;
use crate::types::{
    GroupEvent, GroupFinished, GroupFinishedTag, GroupMove, GroupPrepared, GroupPreparedTag,
    GroupStatus, GroupSurvey, Happening, MoveEvent, MoveSpec, MoveStatus, Phase, Progress,
};

pub(crate) use act::Action;

/// Each move logs about nine phases, more if it is recovered.
const LASTING_EVENTS_OF_MOVE: usize = 16;
/// A reader that comes late gets the newest progress of each move, and a little history.
const PASSING_EVENTS: usize = 256;
const PASSING_EVENTS_OF_MOVE: usize = 2;

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
            .map(|member| {
                let before = saved.outcomes.get(&member.spec.vm);
                MemberState::new(&member.spec, before)
            })
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

    /// Whether a move has ended that needs a person.
    pub(super) fn needs_person(&self) -> bool {
        self.lock().iter().any(MemberState::needs_person)
    }

    /// Whether a move has ended.
    pub(super) fn has_ended(&self, at: usize) -> bool {
        self.lock()[at].has_ended()
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

    /// Marks a move as known to its agent; false if it was cancelled before.
    pub(super) fn claim_start(&self, at: usize) -> bool {
        let mut state = self.lock();
        state[at].started |= !state[at].cancelled;
        state[at].started
    }

    /// An earlier process started the move: where it stands is not known before its source agent says it.
    pub(super) fn asks_where(&self, at: usize) {
        let mut state = self.lock();
        let status = &mut state[at].status;
        status.phase = Phase::Recovering;
        status.message = format!(
            "the coordinator was started again and asks the agent of host `{}` where VM `{}` is",
            self.members[at].source, status.vm
        );
    }

    /// The agent was not reached: the move can be cancelled here again.
    pub(super) fn unclaim_start(&self, at: usize) {
        self.lock()[at].started = false;
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
        self.push(life, &state.status, what);
        let ended = state.status.phase.is_final();
        if ended {
            state.ended = Some(Instant::now());
            if states.iter().all(MemberState::has_ended) {
                self.finish(&states);
            }
        }
        ended
    }

    fn push(&self, life: Life, of: &MoveStatus, what: Happening) {
        self.log.push(life, |seq| {
            GroupEvent::Move(MoveEvent {
                seq,
                at_unix_ms: unix_ms(),
                id: of.id.clone(),
                vm: of.vm.clone(),
                what,
            })
        });
    }

    /// Tells the group's readers what concerns all of it, with its first move: events have one.
    /// In no move's status, where it would stay.
    pub(super) fn tell(&self, message: String) {
        let state = self.lock();
        if let Some(first) = state.first().filter(|first| !first.has_ended()) {
            self.push(Life::Passing, &first.status, Happening::Note { message });
        }
    }

    /// Ends the moves of a group that is not started after all.
    pub(super) fn refuse(&self, refusal: &Refusal) {
        for (at, member) in self.members.iter().enumerate() {
            let vm = &member.spec.vm;
            let message = format!("VM `{vm}` was not moved, it runs at the source: {refusal}");
            let phase = Phase::Stayed;
            self.happened(at, Happening::Phase { phase, message });
        }
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
        if !states.iter().any(MemberState::needs_person) {
            return self.saved.remove(&self.id);
        }
        // It will be recovered, and perhaps not by this process.
        let closed = states.iter().filter(|state| !state.needs_person());
        let outcome = |state: &MemberState| {
            let (phase, message) = (state.status.phase, state.status.message.clone());
            (state.status.vm.clone(), Outcome { phase, message })
        };
        self.saved
            .add_outcomes(&self.id, closed.map(outcome).collect());
    }

    /// Says whether the source agent of a move answers; tells the group's readers on a change, and
    /// the caller.
    pub(super) fn set_reachable(&self, at: usize, reachable: bool, message: &str) -> bool {
        let changed = {
            let mut state = self.lock();
            std::mem::replace(&mut state[at].reachable, reachable) != reachable
        };
        if changed {
            let message = message.to_owned();
            self.happened(at, Happening::Note { message });
        }
        changed
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

    /// Gives the budget of the sources that are done to those that are not. What fails is tried
    /// again at the next end of a move, and when an agent answers again.
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
                    // Raising the others now would exceed the budget.
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
    /// As it ended before, or to be started or found.
    fn new(spec: &MoveSpec, before: Option<&Outcome>) -> Self {
        let mut status = MoveStatus {
            id: spec.id.clone(),
            group: spec.group.clone(),
            vm: spec.vm.clone(),
            target: spec.target_name.clone(),
            phase: Phase::Queued,
            message: format!("VM `{}` waits for its turn; it runs at the source", spec.vm),
            progress: Progress::default(),
            note: None,
        };
        if let Some(before) = before {
            status.phase = before.phase;
            status.message.clone_from(&before.message);
        }
        let begin = Instant::now();
        Self {
            status,
            reachable: true,
            started: before.is_some(),
            cancelled: false,
            begin,
            ended: before.map(|_| begin),
            cursor: Cursor::default(),
        }
    }

    fn has_ended(&self) -> bool {
        self.ended.is_some()
    }

    fn needs_person(&self) -> bool {
        self.has_ended() && self.status.phase == Phase::NeedsPerson
    }
}
