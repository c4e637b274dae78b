//! The source's side of the hand-over.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use wire::MoveState;

/// How long an unanswered release is repeated before a person is asked. Long enough for a
/// target agent to be restarted and for a link to be mended by routing; recovery goes on to be
/// possible after it.
const RELEASE_PATIENCE: Duration = Duration::from_secs(60);

/// Where the move stands at the source.
///
/// ```text
///  Preparing ─ready─► Copying ─loaded─► Completing ─completed─► Committed ─confirmed─► Releasing ─running─► Moved
///      │                 │                  │                       │                    │  │
///      └───── failed, cancelled ────────────┴───────────────────────┘       never ran ◄──┘  └─ no answer, lost
///                        ▼                                                     │                  ▼
///                     Undoing ◄────────────────────────────────────────────────┘             NeedsPerson
///                        │ source runs                                                            ▲
///                        ▼                                                                        │
///                      Stayed                              source QEMU gone while undoing ────────┘
/// ```
///
/// In post-copy the source QEMU does not resume by itself once its guest was stopped by hand, and
/// the VM runs at the target before its memory is there:
///
/// ```text
///  Copying ─held, switched─► Committed ─confirmed─► Releasing ─following─► Following ─loaded, completed─► Moved
///                                                       ▲                      │
///                                                       └────── failed ────────┘
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceState {
    /// The target QEMU is being started. The VM is untouched.
    Preparing,
    /// The source QEMU migrates; if anything fails it runs on, or resumes by itself.
    Copying,
    /// The target has loaded. The source QEMU was told so and is about to complete.
    Completing,
    /// The source QEMU has completed, or is in post-copy with a guest that was stopped by hand:
    /// resumed by `cont` alone. Nothing was released.
    Committed,
    /// `Release` may have reached the target.
    Releasing {
        /// When it was first sent.
        since: Duration,
        /// Why the memory that is still missing at the target does not come.
        lost: Option<String>,
    },
    /// It runs at the target, whose QEMU still gets memory from the source QEMU.
    Following,
    /// The move is off; the VM is brought back to run here.
    Undoing {
        /// Why.
        reason: String,
    },
    /// It runs at the target.
    Moved,
    /// It runs here.
    Stayed {
        /// Why.
        reason: String,
    },
    /// It is stopped here, and cannot be known to be gone at the target.
    NeedsPerson {
        /// What is known.
        reason: String,
    },
}

/// What the machine reacts to. Times are those of any clock that never runs backwards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceEvent {
    /// The target QEMU waits for its stream.
    TargetReady,
    /// The target QEMU has loaded everything.
    TargetLoaded,
    /// The source guest was stopped by hand before its QEMU was told to go over to post-copy.
    SourceHeld,
    /// The target QEMU has the device state and could run; it needs the rest of its memory.
    TargetSwitched,
    /// The source QEMU reports its migration as completed.
    SourceCompleted,
    /// Whoever wanted to confirm the hand-over did, or nobody wanted to.
    Confirmed,
    /// The target's answer to a release.
    Answer(MoveState),
    /// A release got no answer.
    NoAnswer {
        /// Why.
        reason: String,
        /// Now.
        now: Duration,
    },
    /// Something failed: the stream, the link, either QEMU, the target's load.
    Failed(String),
    /// Somebody wants the VM to stay.
    Cancel,
    /// The source QEMU runs the VM.
    SourceRuns,
    /// The source QEMU is gone or does not obey.
    SourceLost(String),
    /// The journal could not be written, so the action after it was not done.
    JournalFailed(String),
    /// The agent was restarted with this journal.
    Restarted(SourceJournal),
}

/// What the machine wants done, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceAction {
    /// Have the source QEMU migrate into our socket.
    StartStream,
    /// Pass the target QEMU's `SHUT 0` on to the source QEMU. Answer: `SourceCompleted`.
    CompleteSource,
    /// Write the journal, before the next action. If it cannot be written the next action must
    /// not be done. Answer, only then: `JournalFailed`.
    Journal(SourceJournal),
    /// Ask for confirmation if the plan wants it. Answer: `Confirmed`.
    AwaitConfirmation,
    /// Let the target go. Answer: `Answer` or `NoAnswer`.
    Release,
    /// The same, after a pause.
    ReleaseAgain,
    /// Tell the target, if it can be reached, that it will not be released.
    AbortTarget(String),
    /// End the migration, by cancelling it or in post-copy by having it complete into the void, close
    /// its socket, see that the VM runs here (`cont` if it does not by itself). Answer: `SourceRuns` or `SourceLost`.
    BringBack,
    /// The source QEMU is no longer needed.
    QuitSource,
    /// The journal is no longer needed.
    ForgetJournal,
}

/// What survives the agent's death. Absent: the move never got beyond copying.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SourceJournal {
    /// The move was begun; the target was not released.
    Begun,
    /// The target may have been released.
    Releasing,
}

/// The machine. Succeeds: the VM runs at the target, and the source QEMU is gone. Fails: the
/// VM runs at the source, and the target QEMU is gone or will be; or, only between a release
/// and its answer, the VM is stopped at the source and a person is asked.
#[derive(Debug)]
pub struct SourceMove {
    state: SourceState,
    memory: Memory,
}

/// How the VM's memory goes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Memory {
    /// Before the VM, or it is not known any more.
    First,
    /// After it: the source guest was stopped by hand, so nothing but `cont` resumes it.
    After,
    /// After it, and the source QEMU has completed.
    Done,
}

impl Default for SourceMove {
    fn default() -> Self {
        Self {
            state: SourceState::Preparing,
            memory: Memory::First,
        }
    }
}

impl SourceMove {
    /// Where the move stands.
    #[must_use]
    pub fn state(&self) -> &SourceState {
        &self.state
    }

    /// Takes one event, says what to do. Events that come too late for the state are ignored:
    /// they are echoes of what the machine has already answered.
    pub fn handle(&mut self, event: SourceEvent) -> Vec<SourceAction> {
        use SourceAction as A;
        use SourceEvent as E;
        use SourceState as S;
        let (next, actions) = match (std::mem::replace(&mut self.state, S::Preparing), event) {
            (S::Preparing, E::TargetReady) => (S::Copying, vec![A::StartStream]),
            (S::Preparing, E::Restarted(SourceJournal::Releasing)) => (
                S::Releasing {
                    since: Duration::ZERO,
                    lost: Some("the agent was restarted".into()),
                },
                vec![A::Release],
            ),
            (S::Preparing, E::Restarted(SourceJournal::Begun)) => {
                undo("the agent was restarted during the move".into(), true)
            }
            (S::Copying, E::SourceHeld) => {
                self.memory = Memory::After;
                (S::Copying, vec![])
            }
            (S::Copying, E::TargetSwitched) if self.memory == Memory::After => {
                (S::Committed, vec![A::AwaitConfirmation])
            }
            // It could resume at any time: by whomever the switch was made, not by us.
            (S::Copying, E::TargetSwitched) => {
                undo("its QEMU went over to post-copy unasked".into(), true)
            }
            (state @ (S::Committed | S::Releasing { .. } | S::Following), E::TargetLoaded)
                if self.memory == Memory::After =>
            {
                (state, vec![A::CompleteSource])
            }
            (state @ (S::Committed | S::Releasing { .. }), E::SourceCompleted)
                if self.memory == Memory::After =>
            {
                self.memory = Memory::Done;
                (state, vec![])
            }
            (S::Following, E::SourceCompleted) => moved(),
            // The target may have all of it already. The stream is of no use any more.
            (S::Following, E::Failed(reason)) => {
                self.memory = Memory::First;
                let (since, lost) = (Duration::ZERO, Some(reason));
                (S::Releasing { since, lost }, vec![A::Release])
            }
            // Without having been told of the switch: it converged first, and is done as always.
            (S::Copying, E::TargetLoaded) => (S::Completing, vec![A::CompleteSource]),
            (S::Completing, E::SourceCompleted) => (S::Committed, vec![A::AwaitConfirmation]),
            (S::Committed, E::Confirmed) => {
                let actions = vec![A::Journal(SourceJournal::Releasing), A::Release];
                (
                    S::Releasing {
                        since: Duration::ZERO,
                        lost: None,
                    },
                    actions,
                )
            }
            (S::Preparing | S::Copying | S::Completing | S::Committed, E::Failed(reason)) => {
                undo(reason, true)
            }
            (S::Preparing | S::Copying | S::Completing | S::Committed, E::Cancel) => {
                undo("cancelled".into(), true)
            }
            (S::Releasing { .. }, E::JournalFailed(reason)) => undo(reason, true),
            // With it goes the stream.
            (S::Releasing { since, lost: None }, E::Failed(reason))
                if self.memory == Memory::After =>
            {
                let lost = Some(reason);
                (S::Releasing { since, lost }, vec![])
            }
            (S::Releasing { since, lost }, E::Answer(answer)) => {
                answered((since, lost), answer, self.memory)
            }
            (S::Releasing { since, lost }, E::NoAnswer { reason, now }) => {
                unanswered((since, lost), reason, now)
            }
            (S::Undoing { reason }, E::SourceRuns) => {
                (S::Stayed { reason }, vec![A::ForgetJournal])
            }
            (S::Undoing { reason }, E::SourceLost(why)) => {
                let reason = format!("{reason}; then the source QEMU could not be resumed: {why}");
                (S::NeedsPerson { reason }, vec![])
            }
            (state, _) => (state, vec![]),
        };
        self.state = next;
        actions
    }
}

fn undo(reason: String, abort: bool) -> (SourceState, Vec<SourceAction>) {
    let mut actions = vec![SourceAction::BringBack];
    if abort {
        actions.push(SourceAction::AbortTarget(reason.clone()));
    }
    (SourceState::Undoing { reason }, actions)
}

fn moved() -> (SourceState, Vec<SourceAction>) {
    let actions = vec![SourceAction::QuitSource, SourceAction::ForgetJournal];
    (SourceState::Moved, actions)
}

fn answered(
    (since, lost): (Duration, Option<String>),
    answer: MoveState,
    memory: Memory,
) -> (SourceState, Vec<SourceAction>) {
    use SourceAction as A;
    match answer {
        MoveState::Running => moved(),
        MoveState::NeverRan { reason } => undo(reason, false),
        MoveState::Loaded | MoveState::Loading => (
            SourceState::Releasing { since, lost },
            vec![A::ReleaseAgain],
        ),
        MoveState::Following => match lost {
            None if memory == Memory::Done => moved(),
            None => (SourceState::Following, vec![]),
            Some(why) => {
                let reason = format!(
                    "it went on there in post-copy and lacks memory that only its QEMU at the \
                     source has, which must not be ended or resumed: {why}"
                );
                (SourceState::NeedsPerson { reason }, vec![])
            }
        },
        MoveState::Unknown => {
            let reason =
                "the target agent no longer knows this move; look there whether the VM runs".into();
            (SourceState::NeedsPerson { reason }, vec![])
        }
        MoveState::Lost { reason } => (SourceState::NeedsPerson { reason }, vec![]),
    }
}

fn unanswered(
    (since, lost): (Duration, Option<String>),
    reason: String,
    now: Duration,
) -> (SourceState, Vec<SourceAction>) {
    let since = if since.is_zero() { now } else { since };
    if now.saturating_sub(since) < RELEASE_PATIENCE {
        return (
            SourceState::Releasing { since, lost },
            vec![SourceAction::ReleaseAgain],
        );
    }
    let reason = format!(
        "the target was let go, but has not answered for {} s: {reason}",
        RELEASE_PATIENCE.as_secs()
    );
    (SourceState::NeedsPerson { reason }, vec![])
}
