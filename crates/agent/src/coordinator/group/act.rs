//! What is asked of a group's moves under way.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::task::JoinSet;

use super::Group;
use crate::api::mover::{Refusal, RefusalCode};
use crate::client::CallError;
use crate::types::{ActionReport, GroupEvent, Phase};

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

impl Group {
    /// Asks the source agents of the group's moves, or of one, to act: the agents side by side.
    pub(crate) async fn act(
        self: &Arc<Self>,
        action: Action,
        vm: Option<&str>,
    ) -> Result<ActionReport, Refusal> {
        let mut sources: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        for at in self.choose(action, vm)? {
            let source = self.members[at].source.as_str();
            sources.entry(source).or_default().push(at);
        }
        let mut asking = JoinSet::new();
        for moves in sources.into_values() {
            let group = self.clone();
            asking.spawn(async move { group.act_at_source(moves, action).await });
        }
        let answers: BTreeMap<_, _> = asking.join_all().await.into_iter().flatten().collect();
        let mut report = ActionReport::default();
        // In the plan's order.
        for (at, answer) in answers {
            let vm = self.members[at].spec.vm.clone();
            match answer {
                Ok(()) => report.done.push(vm),
                Err(mut refusal) => {
                    refusal.vm.get_or_insert(vm);
                    report.refused.push(refusal);
                }
            }
        }
        Ok(report)
    }

    /// Asks one source agent to act on these moves. One that does not answer is not asked for the
    /// others, which would take as long again for each.
    async fn act_at_source(
        self: &Arc<Self>,
        moves: Vec<usize>,
        action: Action,
    ) -> Vec<(usize, Result<(), Refusal>)> {
        let mut silent: Option<String> = None;
        let mut answers = Vec::with_capacity(moves.len());
        for at in moves {
            let vm = &self.members[at].spec.vm;
            let answer = if action == Action::Cancel && self.cancel_unstarted(at) {
                Ok(())
            } else if let Some(silent) = &silent {
                let message =
                    format!("VM `{vm}`: not asked for, its source's agent is silent: {silent}");
                Err(Refusal::of_vm(RefusalCode::Unreachable, vm, message))
            } else {
                self.act_on(at, action).await.map_err(|error| {
                    if error.refused_as().is_none() {
                        silent = Some(error.in_full());
                    }
                    error.into_refusal()
                })
            };
            answers.push((at, answer));
        }
        answers
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

    async fn act_on(self: &Arc<Self>, at: usize, action: Action) -> Result<(), CallError> {
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
        answer
    }

    /// Remembers the wish for a move that no agent knows yet.
    fn cancel_unstarted(&self, at: usize) -> bool {
        let mut state = self.lock();
        let unstarted = !state[at].started && !state[at].has_ended();
        state[at].cancelled |= unstarted;
        unstarted
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
        let was_end = |event: &GroupEvent| matches!(event, GroupEvent::Finished(_));
        self.log.reopen(was_end);
        true
    }
}
