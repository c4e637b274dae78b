//! Starts the moves of a group and follows each at its source agent until it ends.
//!
//! ```text
//!            202, or the move is there already          final phase
//!  starting ─────────────────────────────────► following ─────────► ended
//!     │ refused, cancelled                      │  ▲  │ agent was restarted and does not know it
//!     ▼                                   broken▼  │  ▼
//!   ended (stayed)                          unreachable / asks where the VM is ──► ended
//! ```
//!
//! An agent that does not answer fails no move: the move goes on without the coordinator. Only
//! after [`PATIENCE`] does the coordinator say that it cannot know; `recover`
//! takes the move up again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::group::{Cursor, Group};
use crate::api::mover::{MoveCheck, RefusalCode};
use crate::client::CallError;
use crate::types::{Happening, MoveEvent, MoveStatus, Phase};

/// A move whose agent was silent for so many seconds needs a person: time for an agent to be
/// restarted by its service manager, or for a host to boot.
const PATIENCE: Duration = Duration::from_secs(180);
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Since when an agent has not answered, and how long to wait before the next try.
struct Silence {
    since: Option<Instant>,
    pause: Duration,
}

impl Silence {
    fn new() -> Self {
        Self {
            since: None,
            pause: FIRST_PAUSE,
        }
    }

    fn is_over(&mut self) {
        *self = Self::new();
    }

    /// Waits before the next try; false once patience is at its end.
    async fn wait(&mut self) -> bool {
        let since = *self.since.get_or_insert_with(Instant::now);
        tokio::time::sleep(self.pause).await;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        since.elapsed() < PATIENCE
    }
}

impl Group {
    /// Starts every move: each source's in the plan's order, the sources side by side.
    pub(super) fn start(self: &Arc<Self>) {
        let mut sources: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        for (at, member) in self.members.iter().enumerate() {
            sources.entry(&member.source).or_default().push(at);
        }
        for moves in sources.into_values() {
            let group = self.clone();
            tokio::spawn(async move {
                for at in moves {
                    if group.start_move(at).await {
                        group.follow(at);
                    }
                }
            });
        }
    }

    /// Follows the moves that an earlier process of this coordinator started.
    pub(super) fn follow_all(self: &Arc<Self>) {
        for at in 0..self.members.len() {
            if self.claim_start(at) {
                self.follow(at);
            }
        }
    }

    /// Follows a move to its end, in the background.
    pub(super) fn follow(self: &Arc<Self>, at: usize) {
        let group = self.clone();
        tokio::spawn(async move {
            group.follow_to_end(at).await;
            group.rebalance().await;
        });
    }

    /// True once the source agent has the move; false if the move has ended instead.
    async fn start_move(&self, at: usize) -> bool {
        let member = &self.members[at];
        let vm = &member.spec.vm;
        let mut silence = Silence::new();
        let mut maybe_started = false;
        loop {
            if !maybe_started && !self.claim_start(at) {
                let message =
                    format!("VM `{vm}` was cancelled before its start; it runs at the source");
                self.settle(at, Phase::Stayed, message).await;
                return false;
            }
            let spec = self.spec_with_share(at).await;
            let error = match member
                .client
                .post::<_, MoveStatus>("/v1/moves", &spec)
                .await
            {
                Ok(_status) => return true,
                // An earlier try got through after all.
                Err(error) if maybe_started && error.refused_as() == Some(RefusalCode::Busy) => {
                    return true;
                }
                Err(error) => error,
            };
            if error.refused_as().is_some() {
                let message = format!("VM `{vm}` was not moved, nothing was changed: {error}");
                self.settle(at, Phase::Stayed, message).await;
                return false;
            }
            maybe_started |= !matches!(error, CallError::Connect { .. });
            if !maybe_started {
                self.unclaim_start(at);
            }
            self.unreachable(at, &error);
            if !silence.wait().await {
                let (phase, state) = if maybe_started {
                    (
                        Phase::NeedsPerson,
                        "it may be under way; see `gangway status` there",
                    )
                } else {
                    (Phase::Stayed, "it was not started and runs at the source")
                };
                let message = format!("VM `{vm}`: {}; {state}", error.in_full());
                self.settle(at, phase, message).await;
                return false;
            }
        }
    }

    async fn follow_to_end(&self, at: usize) {
        let mut silence = Silence::new();
        loop {
            let error = match self.follow_once(at, &mut silence).await {
                Ok(true) => return,
                Ok(false) => None,
                Err(error) if error.refused_as() == Some(RefusalCode::UnknownMove) => {
                    match self.find_vm(at).await {
                        Ok((phase, message)) => return self.settle(at, phase, message).await,
                        Err(error) => Some(error),
                    }
                }
                Err(error) => Some(error),
            };
            if let Some(error) = &error {
                self.unreachable(at, error);
            }
            if !silence.wait().await {
                let member = &self.members[at];
                let message = format!(
                    "VM `{}`: no news from the agent of host `{}` for {} s; look there with \
                     `gangway status`, then say `gangway recover {}`",
                    member.spec.vm,
                    member.source,
                    PATIENCE.as_secs(),
                    self.id(),
                );
                return self.settle(at, Phase::NeedsPerson, message).await;
            }
        }
    }

    /// Follows one stream of events; true if the move has ended.
    async fn follow_once(&self, at: usize, silence: &mut Silence) -> Result<bool, CallError> {
        let member = &self.members[at];
        let path = format!("/v1/moves/{}", member.spec.id);
        let events = format!("{path}/events");
        let mut cursor = self.cursor(at);
        let mut stream = member.client.events(&events, cursor.next).await?;
        if stream.boot != cursor.boot {
            if cursor.next != 0 {
                stream = member.client.events(&events, 0).await?;
            }
            cursor = Cursor {
                boot: stream.boot.clone(),
                next: 0,
            };
        }
        let back = format!("the agent of host `{}` answers again", member.source);
        self.set_reachable(at, true, &back);
        silence.is_over();
        while let Some(event) = stream.next::<MoveEvent>().await? {
            cursor.next = event.seq + 1;
            self.set_cursor(at, cursor.clone());
            if self.happened(at, event.what) {
                return Ok(true);
            }
        }
        // The end of the stream without a final phase: it was read before, or the agent stops.
        let status: MoveStatus = member.client.get(&path).await?;
        if !status.phase.is_final() {
            return Ok(false);
        }
        let what = Happening::Phase {
            phase: status.phase,
            message: status.message,
        };
        Ok(self.happened(at, what))
    }

    /// The source agent does not know the move: was the VM left there?
    async fn find_vm(&self, at: usize) -> Result<(Phase, String), CallError> {
        let member = &self.members[at];
        let (vm, source) = (&member.spec.vm, &member.source);
        match member
            .client
            .post::<_, MoveCheck>("/v1/check", &member.spec)
            .await
        {
            Ok(_) => {
                let message = format!(
                    "VM `{vm}` runs at the source: the agent of host `{source}` was restarted \
                     before the move began; move it again"
                );
                Ok((Phase::Stayed, message))
            }
            Err(CallError::Refused(refusal)) => {
                let message = format!(
                    "VM `{vm}`: the agent of host `{source}` does not know the move any more, and \
                     says: {refusal}; look for the VM on host `{}`",
                    member.spec.target_name
                );
                Ok((Phase::NeedsPerson, message))
            }
            Err(error) => Err(error),
        }
    }

    fn unreachable(&self, at: usize, error: &CallError) {
        let source = &self.members[at].source;
        let message = format!(
            "the agent of host `{source}` is unreachable ({}); the move goes on without us if \
             it can, its state is not known here",
            error.in_full()
        );
        self.set_reachable(at, false, &message);
    }

    /// Ends a move by what the coordinator found out itself.
    async fn settle(&self, at: usize, phase: Phase, message: String) {
        self.happened(at, Happening::Phase { phase, message });
        self.rebalance().await;
    }
}
