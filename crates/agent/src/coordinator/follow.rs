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
        self.since.get_or_insert_with(Instant::now);
        tokio::time::sleep(self.pause).await;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        !self.is_too_long()
    }

    fn is_too_long(&self) -> bool {
        self.since.is_some_and(|since| since.elapsed() >= PATIENCE)
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
            tokio::spawn(async move { group.start_queue(moves, Silence::new()).await });
        }
    }

    /// Starts the moves of one source, whose agent is waited for once for all of them.
    async fn start_queue(self: &Arc<Self>, moves: Vec<usize>, mut silence: Silence) {
        for at in moves {
            if self.start_move(at, &mut silence).await {
                silence.is_over();
                self.follow(at);
            }
        }
    }

    /// Follows the moves that an earlier process of this coordinator started.
    pub(super) fn follow_all(self: &Arc<Self>) {
        for at in 0..self.members.len() {
            if !self.has_ended(at) && self.claim_start(at) {
                self.asks_where(at);
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
    async fn start_move(&self, at: usize, silence: &mut Silence) -> bool {
        let member = &self.members[at];
        let vm = &member.spec.vm;
        let mut maybe_started = false;
        if silence.is_too_long() {
            let message = format!(
                "VM `{vm}` was not started, and nothing about it was changed: the agent of host `{}` \
                 has not answered for {} s; see to it, and move the VM then",
                member.source,
                PATIENCE.as_secs(),
            );
            self.settle(at, Phase::Stayed, message).await;
            return false;
        }
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
                Err(error) => error,
            };
            if error.refused_as().is_some() {
                silence.is_over();
                // An earlier try may have got through all the same: then it is under way.
                if maybe_started && self.is_at_source(at).await {
                    return true;
                }
                let message = format!("VM `{vm}` was not moved, nothing was changed: {error}");
                self.settle(at, Phase::Stayed, message).await;
                return false;
            }
            maybe_started |= error.may_have_acted();
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

    /// Whether the source agent has a move, as far as can be known.
    async fn is_at_source(&self, at: usize) -> bool {
        let asked = self.status_at_source(at).await;
        !asked.is_err_and(|error| error.refused_as() == Some(RefusalCode::UnknownMove))
    }

    async fn status_at_source(&self, at: usize) -> Result<MoveStatus, CallError> {
        let member = &self.members[at];
        let path = format!("/v1/moves/{}", member.spec.id);
        member.client.get(&path).await
    }

    async fn follow_to_end(self: &Arc<Self>, at: usize) {
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
    async fn follow_once(
        self: &Arc<Self>,
        at: usize,
        silence: &mut Silence,
    ) -> Result<bool, CallError> {
        let member = &self.members[at];
        let events = format!("/v1/moves/{}/events", member.spec.id);
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
        if self.set_reachable(at, true, &back) {
            // Its share may have changed while it could not be told.
            let group = self.clone();
            tokio::spawn(async move { group.rebalance().await });
        }
        silence.is_over();
        while let Some(event) = stream.next::<MoveEvent>().await? {
            let what = match event.what {
                // A move that was recovered since has an older end in its log.
                Happening::Phase {
                    phase: Phase::NeedsPerson,
                    ..
                } => {
                    let status = self.status_at_source(at).await?;
                    (status.phase == Phase::NeedsPerson).then(|| end_of(status))
                }
                what => Some(what),
            };
            cursor.next = event.seq + 1;
            self.set_cursor(at, cursor.clone());
            if what.is_some_and(|what| self.happened(at, what)) {
                return Ok(true);
            }
        }
        // The end of the stream without a final phase: it was read before, or the agent stops.
        let status = self.status_at_source(at).await?;
        Ok(status.phase.is_final() && self.happened(at, end_of(status)))
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

fn end_of(status: MoveStatus) -> Happening {
    Happening::Phase {
        phase: status.phase,
        message: status.message,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::atomic::{AtomicBool, Ordering};

    use axum::Json;
    use axum::Router;
    use axum::response::IntoResponse;
    use axum::routing::{get, post};

    use super::super::Peers;
    use super::super::saved::{SavedGroup, SavedGroups};
    use super::*;
    use crate::api::mover::Refusal;
    use crate::types::{Plan, Progress};

    /// A group of these VMs whose source agent is at this address.
    fn group(state: &Path, source: &str, vms: &[&str]) -> Arc<Group> {
        let hosts = format!(
            "[hosts]\na = {{ control = \"{source}\", bulk = \"h1:2\" }}\n\
             b = {{ control = \"h2:1\", bulk = \"h2:2\" }}\n"
        );
        let moves = vms.iter().map(|vm| {
            format!("[[move]]\nvm = \"{vm}\"\nfrom = \"a\"\nto = \"b\"\nqmp = \"/{vm}\"\n")
        });
        let text = moves.fold(hosts, |text, one| text + &one);
        let saved = SavedGroup {
            id: "g".to_owned(),
            accepted_unix_ms: 0.0,
            plan: Plan::parse("plan".as_ref(), &text).unwrap(),
            outcomes: BTreeMap::new(),
        };
        let peers = Peers {
            tls: None,
            timeout: Duration::from_secs(5),
        };
        let on_disk = Arc::new(SavedGroups::new(state));
        Arc::new(Group::new(&saved, &BTreeMap::new(), &peers, on_disk))
    }

    #[tokio::test]
    async fn a_source_that_does_not_come_back_is_waited_for_once_for_all_its_moves() {
        let state = tempfile::tempdir().unwrap();
        let group = group(state.path(), "127.0.0.1:1", &["x", "y", "z"]);
        let almost_over = Silence {
            since: Instant::now().checked_sub(PATIENCE - FIRST_PAUSE / 2),
            pause: FIRST_PAUSE,
        };
        let queue = group.start_queue(vec![0, 1, 2], almost_over);
        tokio::time::timeout(Duration::from_secs(10), queue)
            .await
            .unwrap();
        for one in group.status().moves {
            let status = one.status;
            assert_eq!(status.phase, Phase::Stayed);
            assert!(status.message.contains(&status.vm), "{}", status.message);
        }
    }

    #[tokio::test]
    async fn a_move_that_may_be_under_way_is_followed_when_a_second_try_is_refused() {
        let moved = MoveStatus {
            id: "g/x".to_owned(),
            group: "g".to_owned(),
            vm: "x".to_owned(),
            target: "b".to_owned(),
            phase: Phase::Moved,
            message: "it runs at the target".to_owned(),
            progress: Progress::default(),
            note: None,
        };
        let first = Arc::new(AtomicBool::new(true));
        let start = move || {
            let first = first.clone();
            async move {
                if first.swap(false, Ordering::Relaxed) {
                    // Its answer is lost on the way.
                    return "no status".into_response();
                }
                let message = "the agent is being stopped";
                Refusal::new(RefusalCode::Stopping, message).into_response()
            }
        };
        let router = Router::new()
            .route("/v1/moves", post(start))
            .route("/v1/moves/g/x", get(move || async move { Json(moved) }))
            .route("/v1/moves/g/x/events", get(|| async {}));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        tokio::spawn(async move { axum::serve(listener, router).await });

        let state = tempfile::tempdir().unwrap();
        let group = group(state.path(), &address, &["x"]);
        group.start();
        let wait = async {
            while !group.ended() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), wait)
            .await
            .unwrap();
        assert_eq!(group.status().moves[0].status.phase, Phase::Moved);
    }
}
