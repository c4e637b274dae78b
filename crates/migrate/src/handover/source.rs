//! The source's side of the hand-over.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use wire::MoveState;

/// How long an unanswered release is repeated before a person is asked. Long enough for a
/// target agent to be restarted and for a link to be mended by routing; recovery goes on to be
/// possible after it.
const RELEASE_PATIENCE: Duration = Duration::from_secs(60);

/// How long an interrupted post-copy is resumed again and again before a person is asked, if nothing else
/// is said: time for a host to boot its network, or for somebody to come and put a cable back.
pub const RESUME_PATIENCE: Duration = Duration::from_secs(600);

/// Pause before the first try to resume; each further one is twice as long. Both ends' QEMUs take
/// milliseconds to notice that their stream is gone.
const FIRST_PAUSE: Duration = Duration::from_millis(250);

/// No pause is longer: a guest stands still meanwhile.
const LONGEST_PAUSE: Duration = Duration::from_secs(8);

/// Where the move stands at the source.
///
/// ```text
///  Preparing ─ready─► Copying ─loaded─► Completing ─completed─► Committed ─confirmed─► Releasing ─running─► Moved
///      │                 │                  │                       │                    │  │ ▲
///      └───── failed, cancelled ────────────┴───────────────────────┘       never ran ◄──┘  │ │
///                        ▼                                                     │            │ │
///                     Undoing ◄────────────────────────────────────────────────┘            │ │
///                        │ │ │ gone after it completed ────────────────────────────────────────┘
///            source runs │ │ └ gone earlier; or it does not obey ───────────┐               │ no answer, lost
///                        ▼                                                  ▼               ▼
///                      Stayed                                           NeedsPerson ◄───────┘
/// ```
///
/// `Moved` becomes `NeedsPerson` as well, if the source QEMU is to quit and runs, or cannot be asked.
///
/// In post-copy the source QEMU does not resume by itself once its guest was stopped by hand, and
/// the VM runs at the target before its memory is there:
///
/// ```text
///  Copying ─held, switched─► Committed ─confirmed─► Releasing ─following─► Following ─loaded, completed─► Moved
///                                                       │                   │    ▲                        ▲
///                                                       │            failed │    │ resumed                │
///                                                       └─ following, but   ▼    │       runs, completed  │
///                                                          lost ─────────► Recovering ────────────────────┘
///                                                                              │ no success in time,
///                                                                              ▼ a QEMU is gone
///                                                                          NeedsPerson
/// ```
///
/// In `Recovering` nothing is said to the source QEMU but to resume its migration: the VM is at the target,
/// and what is missing there is only here.
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
    /// It went on at the target, and the memory that it still needs does not come: that is being mended.
    Recovering {
        /// When the first try failed; zero before.
        since: Duration,
        /// What happened.
        reason: String,
    },
    /// The move is off; the VM is brought back to run here.
    Undoing {
        /// Why.
        reason: String,
        /// The target has not been told, or has not said, that it will not run the VM.
        abort: bool,
    },
    /// It runs at the target.
    Moved,
    /// It runs here.
    Stayed {
        /// Why.
        reason: String,
    },
    /// It cannot be brought to an end from here.
    NeedsPerson {
        /// What is known.
        reason: String,
        /// Why.
        plight: Plight,
    },
}

/// What is the matter with a VM that needs a person.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plight {
    /// It is stopped here, and cannot be known to be gone at the target.
    Unknown,
    /// It went on at the target, and needs memory that only its QEMU here has.
    Halved,
    /// It went on at the target, and one of its QEMUs is gone before all memory was there.
    Killed,
    /// It has been let go at the target, and its QEMU here was not ended: it runs, because somebody has resumed it, or
    /// cannot be asked.
    Left,
    /// Its QEMU here ended before the target had all of it.
    Ended,
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
    /// The source QEMU runs the VM. It was brought back, or it was to quit and runs: somebody has resumed it.
    SourceRuns,
    /// The source QEMU cannot be asked or does not obey.
    SourceLost(String),
    /// The process of the source QEMU has ended.
    SourceGone {
        /// What is known of it.
        reason: String,
        /// It may have been resumed before: what the target has is old then.
        went_on: bool,
    },
    /// Memory flows again from QEMU to QEMU.
    Resumed,
    /// It does not flow again yet.
    NotResumed {
        /// Why.
        reason: String,
        /// Now.
        now: Duration,
    },
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
    /// Close what is left of the stream, and after a pause have both QEMUs go on with their migration over a
    /// new one. Answer: `Resumed`, `NotResumed`, `Answer` if the target has something else to say,
    /// `SourceCompleted` or `SourceLost` if the source QEMU has.
    Resume {
        /// How long to wait first.
        pause: Duration,
    },
    /// Tell the target, if it can be reached, that it will not be released.
    AbortTarget(String),
    /// End the migration, by cancelling it or in post-copy by having it complete into the void, close
    /// its socket, see that the VM runs here (`cont` if it does not by itself). Answer: `SourceRuns`, `SourceLost` or
    /// `SourceGone`.
    BringBack,
    /// The source QEMU is no longer needed. Answer, only if it is left alone, because it runs or cannot be asked:
    /// `SourceRuns` or `SourceLost`.
    QuitSource,
    /// The journal is no longer needed.
    ForgetJournal,
}

/// What survives the agent's death. Absent: the move never got beyond copying.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SourceJournal {
    /// The move was begun; the target was not released. The source QEMU has not completed its migration.
    Begun,
    /// The same, and the target has loaded; the source QEMU may have completed.
    Completing,
    /// The target may have been released.
    Releasing,
    /// The target was released in post-copy and has said so; its memory follows.
    Following,
}

/// The machine. Succeeds: the VM runs at the target, and the source QEMU is gone. Fails: the
/// VM runs at the source, and the target QEMU is gone or will be; or, only between a release
/// and its answer, the VM is stopped at the source and a person is asked; or, only in post-copy, it
/// stands still at the target and a person is asked.
#[derive(Debug)]
pub struct SourceMove {
    state: SourceState,
    memory: Memory,
    /// The target has all of the VM, and the guest here has not gone on since: its QEMU has completed, or it was
    /// stopped by hand. Not known any more after a restart: a QEMU that has not completed resumes when its socket closes.
    is_whole_there: bool,
    /// How often memory was to flow again.
    tries: u32,
    /// How long that is tried.
    patience: Duration,
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
            is_whole_there: false,
            tries: 0,
            patience: RESUME_PATIENCE,
        }
    }
}

impl SourceMove {
    /// A machine that has an interrupted post-copy resumed for so long before a person is asked.
    #[must_use]
    pub fn with_patience(patience: Duration) -> Self {
        Self {
            patience,
            ..Self::default()
        }
    }

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
            (S::Preparing, E::Restarted(SourceJournal::Following)) => {
                self.recover(Duration::ZERO, "the agent was restarted".into())
            }
            (S::Preparing, E::Restarted(SourceJournal::Begun | SourceJournal::Completing)) => {
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
            (S::Committed, E::TargetLoaded) if self.memory == Memory::After => {
                self.is_whole_there = true;
                (S::Committed, complete())
            }
            (state @ (S::Releasing { .. } | S::Following), E::TargetLoaded)
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
            (S::Following, E::Failed(reason)) => self.recover(Duration::ZERO, reason),
            (S::Recovering { .. }, E::Resumed) => {
                self.memory = Memory::After;
                (S::Following, vec![])
            }
            // It was all there already.
            (S::Recovering { .. }, E::SourceCompleted) => moved(),
            (S::Recovering { .. }, E::SourceLost(why)) => person(
                Plight::Killed,
                format!("its QEMU at the source is gone with memory that was still to come: {why}"),
            ),
            (S::Recovering { since, .. }, E::NotResumed { reason, now }) => {
                self.not_resumed(since, reason, now)
            }
            (S::Recovering { .. }, E::Answer(MoveState::Lost { reason })) => {
                person(Plight::Killed, reason)
            }
            // It did run: it has said so. Bringing it back would be a second one, with old memory.
            (S::Recovering { .. }, E::Answer(MoveState::NeverRan { reason })) => person(
                Plight::Unknown,
                format!("the target says now that it never ran there: {reason}"),
            ),
            (S::Recovering { reason, .. }, E::Answer(answer)) => {
                let lost = Some(reason);
                self.answered((Duration::ZERO, lost), answer)
            }
            // Without having been told of the switch: it converged first, and is done as always.
            (S::Copying, E::TargetLoaded) => (S::Completing, complete()),
            (S::Completing | S::Committed, E::JournalFailed(reason)) => undo(reason, true),
            (S::Completing, E::SourceCompleted) => {
                self.is_whole_there = true;
                (S::Committed, vec![A::AwaitConfirmation])
            }
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
                self.answered((since, lost), answer)
            }
            (S::Releasing { since, lost }, E::NoAnswer { reason, now }) => {
                unanswered((since, lost), reason, now)
            }
            (S::Undoing { reason, abort }, E::SourceRuns) => {
                let mut actions = tell_target(&reason, abort);
                actions.push(A::ForgetJournal);
                (S::Stayed { reason }, actions)
            }
            // All of the VM is at the target and nowhere else. Nothing here can run it any more, so that no journal need
            // be ahead of the release.
            (S::Undoing { .. }, E::SourceGone { went_on: false, .. }) if self.is_whole_there => {
                self.memory = Memory::Done;
                let (since, lost) = (Duration::ZERO, None);
                (S::Releasing { since, lost }, vec![A::Release])
            }
            (S::Undoing { reason, abort }, E::SourceGone { reason: why, .. }) => {
                let mut actions = tell_target(&reason, abort);
                actions.push(A::ForgetJournal);
                let (state, _) = person(Plight::Ended, format!("{reason}: {why}"));
                (state, actions)
            }
            // What the target says may be old, and a QEMU that runs has a VM that somebody uses.
            (S::Moved, E::SourceRuns) => left("it runs: somebody has resumed it".into()),
            (S::Moved, E::SourceLost(why)) => left(why),
            (S::Undoing { reason, .. }, E::SourceLost(why)) => {
                let reason = format!("{reason}; then the source QEMU could not be resumed: {why}");
                person(Plight::Unknown, reason)
            }
            (state, _) => (state, vec![]),
        };
        self.state = next;
        actions
    }

    /// Has memory flow again, after a pause that grows with each time that it stopped.
    fn recover(&mut self, since: Duration, reason: String) -> (SourceState, Vec<SourceAction>) {
        let pause = FIRST_PAUSE.saturating_mul(1 << self.tries.min(u8::BITS));
        let pause = pause.min(LONGEST_PAUSE);
        self.tries = self.tries.saturating_add(1);
        (
            SourceState::Recovering { since, reason },
            vec![SourceAction::Resume { pause }],
        )
    }

    fn not_resumed(
        &mut self,
        since: Duration,
        reason: String,
        now: Duration,
    ) -> (SourceState, Vec<SourceAction>) {
        let since = if since.is_zero() { now } else { since };
        if now.saturating_sub(since) < self.patience {
            return self.recover(since, reason);
        }
        let seconds = self.patience.as_secs();
        let reason = format!("its memory could not be made to follow for {seconds} s: {reason}");
        person(Plight::Halved, reason)
    }

    fn answered(
        &mut self,
        (since, lost): (Duration, Option<String>),
        answer: MoveState,
    ) -> (SourceState, Vec<SourceAction>) {
        use SourceAction as A;
        match answer {
            MoveState::Running => moved(),
            MoveState::NeverRan { reason } => {
                self.is_whole_there = false;
                undo(reason, false)
            }
            MoveState::Loaded | MoveState::Loading => (
                SourceState::Releasing { since, lost },
                vec![A::ReleaseAgain],
            ),
            MoveState::Following => {
                if lost.is_none() && self.memory == Memory::Done {
                    return moved();
                }
                let (state, mut actions) = match lost {
                    None => (SourceState::Following, vec![]),
                    Some(why) => self.recover(Duration::ZERO, why),
                };
                // Last: without it the earlier entry leads here as well, one question later.
                actions.push(A::Journal(SourceJournal::Following));
                (state, actions)
            }
            MoveState::Unknown => {
                let reason =
                    "the target agent no longer knows this move; look there whether the VM runs";
                person(Plight::Unknown, reason.into())
            }
            MoveState::Lost { reason } => person(Plight::Unknown, reason),
        }
    }
}

fn person(plight: Plight, reason: String) -> (SourceState, Vec<SourceAction>) {
    (SourceState::NeedsPerson { reason, plight }, vec![])
}

/// The target is told only when it is known that the VM runs here, or that it cannot run there: what it has loaded may
/// be all that is left of the VM.
fn undo(reason: String, abort: bool) -> (SourceState, Vec<SourceAction>) {
    let state = SourceState::Undoing { reason, abort };
    (state, vec![SourceAction::BringBack])
}

fn tell_target(reason: &str, abort: bool) -> Vec<SourceAction> {
    let told = abort.then(|| SourceAction::AbortTarget(reason.to_owned()));
    told.into_iter().collect()
}

/// A restarted agent must know that a completed migration is its own.
fn complete() -> Vec<SourceAction> {
    vec![
        SourceAction::Journal(SourceJournal::Completing),
        SourceAction::CompleteSource,
    ]
}

/// What was let go at the target was not ended here; a later recovery tries again.
fn left(reason: String) -> (SourceState, Vec<SourceAction>) {
    let (state, _) = person(Plight::Left, reason);
    (state, vec![SourceAction::Journal(SourceJournal::Releasing)])
}

fn moved() -> (SourceState, Vec<SourceAction>) {
    let actions = vec![SourceAction::QuitSource, SourceAction::ForgetJournal];
    (SourceState::Moved, actions)
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
    person(Plight::Unknown, reason)
}
