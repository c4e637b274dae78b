//! The target's side of the hand-over.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use wire::MoveState;

/// How long a loaded VM waits for its release once the source cannot be heard. Twice the
/// source's own patience, so that a source that is still trying finds it.
pub(crate) const LEASE: Duration = Duration::from_secs(120);

/// How long a QEMU that cannot be asked is left alone before it is tried again: each try takes seconds.
const UNHEARD_PAUSE: Duration = Duration::from_secs(5);

/// Where the move stands at the target.
///
/// ```text
///  Loading ─load reported─► Loaded ─release─► Releasing ─cont done─► Running
///     │                       │                  │  │
///     │ failed, aborted,      │ aborted, QEMU    │  └ QEMU gone ────► Lost ◄─ QEMU gone ─ Running, in post-copy
///     │ session lost          │ gone, lease over │ cont refused
///     ▼                       ▼                  ▼
///  NeverRan ◄─────────────────┴──────────────────┘   (QEMU killed first)
/// ```
///
/// A QEMU that lives and cannot be asked whether it was let go makes `Releasing` `Unheard`, from which it is
/// tried again, until it answers or is gone. Nobody is told anything before that.
///
/// What cannot be written to the journal does not happen: without an entry that the VM has loaded, or was let
/// go, it goes to `NeverRan`, because an agent that is restarted would end a QEMU that runs. Once `cont` may
/// have been obeyed nothing is ended any more for want of an entry.
///
/// In post-copy `Switched` stands beside `Loaded`: from it a lost session leads to `NeverRan` at once,
/// and the load is reported when the VM runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetState {
    /// The target QEMU loads, stopped.
    Loading,
    /// It has loaded, and stands stopped.
    Loaded {
        /// When the source was lost, if it is.
        alone_since: Option<Duration>,
    },
    /// It is in post-copy: it has the device state, stands stopped, and is nothing without the
    /// source.
    Switched,
    /// It was let go: `cont` is on its way, and nobody takes that back.
    Releasing {
        /// It still needs memory from the source.
        follows: bool,
        /// It was told before, and nobody knows whether it obeyed.
        may_run: bool,
    },
    /// It was let go, and its QEMU lives and cannot be asked whether it runs.
    Unheard {
        /// It still needs memory from the source.
        follows: bool,
        /// When it was first looked at the clock since.
        since: Option<Duration>,
    },
    /// The VM runs, or ran.
    Running {
        /// It still needs memory from the source.
        follows: bool,
    },
    /// The QEMU is gone, and never ran the VM.
    NeverRan(String),
    /// The QEMU went while it was let go, or before it had all memory.
    Lost(String),
}

/// What the machine reacts to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetEvent {
    /// The target QEMU reported a successful load.
    LoadReported,
    /// The target QEMU went over to post-copy, and could run.
    SwitchReported,
    /// The stream or the load failed.
    Failed(String),
    /// The process is gone.
    QemuGone(String),
    /// The source lets it go.
    Release,
    /// The source takes the move back.
    Abort(String),
    /// The source cannot be heard any more.
    SessionLost {
        /// Now.
        now: Duration,
    },
    /// Time has passed.
    Tick {
        /// Now.
        now: Duration,
    },
    /// `cont` was obeyed.
    Continued,
    /// `cont` was refused; the QEMU is there, and stopped.
    ContinueRefused(String),
    /// The QEMU was gone when `cont` was to be said.
    GoneBefore(String),
    /// The QEMU lives and does not answer. Whether it has obeyed is not known.
    Unreached(String),
    /// The journal could not be written, so the actions after it were not done.
    JournalFailed(String),
    /// The agent was restarted with this journal, and found its QEMU in this condition.
    Restarted(TargetJournal, FoundQemu),
}

/// What a restarted agent finds of its QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FoundQemu {
    /// No process.
    Gone,
    /// Stopped.
    Stopped,
    /// Running the VM; as far as it knows, with memory still to come.
    Running,
    /// Running the VM, with its migration completed.
    Complete,
    /// There, and whether it runs the VM cannot be asked.
    Unreachable,
}

/// What the machine wants done, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetAction {
    /// Write the journal, before the next action. If it cannot be written the next action must
    /// not be done. Answer, only then: `JournalFailed`.
    Journal(TargetJournal),
    /// Say `cont`, if it does not run. Answer: `Continued`, `ContinueRefused`, `GoneBefore`,
    /// `Unreached` or `QemuGone`.
    Continue,
    /// Kill the QEMU and wait until it is gone, before anybody is told that it never ran.
    Kill,
}

/// What survives the agent's death.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TargetJournal {
    /// A QEMU was started; it was not let go.
    Loading,
    /// It has loaded; it was not let go.
    Loaded,
    /// It was let go.
    Released,
    /// It was let go in post-copy, and has not reported that it has all memory.
    Following,
    /// It was let go, and runs or has run: whoever stopped it since meant it.
    Runs,
    /// The same in post-copy, as long as it has not reported that it has all memory.
    RunsAhead,
    /// It is gone and never ran.
    NeverRan {
        /// Why.
        reason: String,
    },
}

/// The machine. Succeeds: the VM runs here. Fails: no QEMU is left here, and the VM never ran;
/// or, only if QEMU dies in the moment of its release, nobody knows whether it ran.
#[derive(Debug)]
pub struct TargetMove {
    state: TargetState,
}

impl Default for TargetMove {
    fn default() -> Self {
        Self {
            state: TargetState::Loading,
        }
    }
}

impl TargetMove {
    /// Where the move stands.
    #[must_use]
    pub fn state(&self) -> &TargetState {
        &self.state
    }

    /// The state as the source is told it. While `cont` is under way, or nobody knows whether it was
    /// obeyed, there is no answer yet: ask again.
    #[must_use]
    pub fn answer(&self) -> Option<MoveState> {
        Some(match &self.state {
            TargetState::Loading => MoveState::Loading,
            TargetState::Loaded { .. } | TargetState::Switched => MoveState::Loaded,
            TargetState::Releasing { .. } | TargetState::Unheard { .. } => return None,
            TargetState::Running { follows: false } => MoveState::Running,
            TargetState::Running { follows: true } => MoveState::Following,
            TargetState::NeverRan(reason) => MoveState::NeverRan {
                reason: reason.clone(),
            },
            TargetState::Lost(reason) => MoveState::Lost {
                reason: reason.clone(),
            },
        })
    }

    /// Takes one event, says what to do. Events that come too late are ignored.
    pub fn handle(&mut self, event: TargetEvent) -> Vec<TargetAction> {
        use TargetAction as A;
        use TargetEvent as E;
        use TargetState as S;
        let (next, actions) = match (std::mem::replace(&mut self.state, S::Loading), event) {
            (S::Loading | S::Switched, E::LoadReported) => (
                S::Loaded { alone_since: None },
                vec![A::Journal(TargetJournal::Loaded)],
            ),
            // The journal goes on saying `Loading`: an agent that is restarted has lost the stream.
            (S::Loading, E::SwitchReported) => (S::Switched, vec![]),
            (S::Running { .. }, E::LoadReported) => (
                S::Running { follows: false },
                vec![A::Journal(TargetJournal::Runs)],
            ),
            (S::Loading | S::Switched, E::SessionLost { .. }) => {
                never_ran("the source went away before everything was loaded")
            }
            (
                S::Loading | S::Switched | S::Loaded { .. },
                E::Failed(reason) | E::Abort(reason) | E::QemuGone(reason),
            ) => never_ran(&reason),
            (S::Loaded { .. }, E::Release) => (
                releasing(false),
                vec![A::Journal(TargetJournal::Released), A::Continue],
            ),
            (S::Switched, E::Release) => (
                releasing(true),
                vec![A::Journal(TargetJournal::Following), A::Continue],
            ),
            (S::Loaded { alone_since: None }, E::SessionLost { now }) => (
                S::Loaded {
                    alone_since: Some(now),
                },
                vec![],
            ),
            (
                S::Loaded {
                    alone_since: Some(since),
                },
                E::Tick { now },
            ) if now.saturating_sub(since) > LEASE => never_ran(&format!(
                "the source did not let it go within {} s",
                LEASE.as_secs()
            )),
            (state @ (S::Releasing { .. } | S::Unheard { .. }), event) => released(state, event),
            // A restarted agent would end it, perhaps when its source QEMU is gone: so it goes now.
            (S::Loaded { .. }, E::JournalFailed(reason)) => never_ran(&unwritten(&reason)),
            (S::Running { follows: true }, E::QemuGone(reason)) => (S::Lost(reason), vec![]),
            (S::Loading, E::Restarted(journal, found)) => restarted(journal, found),
            (state, _) => (state, vec![]),
        };
        self.state = next;
        actions
    }
}

fn releasing(follows: bool) -> TargetState {
    TargetState::Releasing {
        follows,
        may_run: false,
    }
}

fn unheard(follows: bool, since: Option<Duration>) -> TargetState {
    TargetState::Unheard { follows, since }
}

fn unwritten(reason: &str) -> String {
    format!("the target agent cannot go on with it: {reason}")
}

/// What becomes of a VM that was let go, before it is known to run.
fn released(state: TargetState, event: TargetEvent) -> (TargetState, Vec<TargetAction>) {
    use TargetAction as A;
    use TargetEvent as E;
    use TargetState as S;
    match (state, event) {
        (S::Releasing { may_run, .. }, E::LoadReported) => (
            S::Releasing {
                follows: false,
                may_run,
            },
            vec![A::Journal(TargetJournal::Released)],
        ),
        (S::Unheard { since, .. }, E::LoadReported) => (
            unheard(false, since),
            vec![A::Journal(TargetJournal::Released)],
        ),
        (S::Releasing { follows, .. } | S::Unheard { follows, .. }, E::Continued) => (
            S::Running { follows },
            vec![A::Journal(match follows {
                true => TargetJournal::RunsAhead,
                false => TargetJournal::Runs,
            })],
        ),
        (
            S::Releasing { may_run: false, .. },
            E::ContinueRefused(reason) | E::GoneBefore(reason),
        ) => never_ran(&format!("it could not be started: {reason}")),
        (S::Releasing { .. } | S::Unheard { .. }, E::QemuGone(reason) | E::GoneBefore(reason)) => {
            (S::Lost(reason), vec![])
        }
        // It was to be written before `cont`, which has not been said then.
        (S::Releasing { may_run: false, .. }, E::JournalFailed(reason)) => {
            never_ran(&unwritten(&reason))
        }
        // One that is refused now may have run since it was told the first time.
        (
            S::Releasing { follows, .. },
            E::Unreached(_) | E::ContinueRefused(_) | E::JournalFailed(_),
        ) => (unheard(follows, None), vec![]),
        (
            S::Unheard {
                follows,
                since: None,
            },
            E::Tick { now },
        ) => (unheard(follows, Some(now)), vec![]),
        (
            S::Unheard {
                follows,
                since: Some(since),
            },
            E::Tick { now },
        ) if now.saturating_sub(since) >= UNHEARD_PAUSE => (
            S::Releasing {
                follows,
                may_run: true,
            },
            vec![A::Continue],
        ),
        (state, _) => (state, vec![]),
    }
}

fn never_ran(reason: &str) -> (TargetState, Vec<TargetAction>) {
    let journal = TargetJournal::NeverRan {
        reason: reason.to_owned(),
    };
    // The process goes first: a journal that says "never ran" allows the source to run.
    (
        TargetState::NeverRan(reason.to_owned()),
        vec![TargetAction::Kill, TargetAction::Journal(journal)],
    )
}

fn restarted(journal: TargetJournal, found: FoundQemu) -> (TargetState, Vec<TargetAction>) {
    let runs = (
        TargetState::Running { follows: false },
        vec![TargetAction::Journal(TargetJournal::Runs)],
    );
    match (journal, found) {
        (TargetJournal::NeverRan { reason }, _) => (TargetState::NeverRan(reason), vec![]),
        // Whatever became of it since: it has arrived.
        (TargetJournal::Runs, _) => (TargetState::Running { follows: false }, vec![]),
        // Written down: if somebody stops it, a later agent must not tell it to go on. One that runs although
        // nobody here let it go was told by a person, or there was no room to write it down. It is not ended.
        (
            TargetJournal::Released | TargetJournal::Loaded,
            FoundQemu::Running | FoundQemu::Complete,
        )
        | (
            TargetJournal::Following | TargetJournal::RunsAhead | TargetJournal::Loading,
            FoundQemu::Complete,
        ) => runs,
        (TargetJournal::Loading, FoundQemu::Running) => (
            TargetState::Running { follows: true },
            vec![TargetAction::Journal(TargetJournal::RunsAhead)],
        ),
        (TargetJournal::Released, FoundQemu::Stopped) => {
            (releasing(false), vec![TargetAction::Continue])
        }
        // Neither that it runs nor that it never ran may be said of it.
        (TargetJournal::Released, FoundQemu::Unreachable) => (unheard(false, None), vec![]),
        // Its processors may wait for memory; whether they ever ran is not known.
        (TargetJournal::Following, FoundQemu::Running | FoundQemu::Unreachable)
        // Not told to go on if it stands still: it ran, and somebody stopped it.
        | (
            TargetJournal::RunsAhead,
            FoundQemu::Running | FoundQemu::Stopped | FoundQemu::Unreachable,
        ) => (TargetState::Running { follows: true }, vec![]),
        (TargetJournal::Following, FoundQemu::Stopped) => {
            (releasing(true), vec![TargetAction::Continue])
        }
        (
            TargetJournal::Released | TargetJournal::Following | TargetJournal::RunsAhead,
            FoundQemu::Gone,
        ) => (
            TargetState::Lost("its QEMU ended while the agent was away".into()),
            vec![],
        ),
        (TargetJournal::Loaded, FoundQemu::Stopped | FoundQemu::Unreachable) => {
            // The lease starts anew: the source cannot have been heard in the meantime.
            (
                TargetState::Loaded {
                    alone_since: Some(Duration::ZERO),
                },
                vec![],
            )
        }
        (
            TargetJournal::Loading,
            FoundQemu::Gone | FoundQemu::Stopped | FoundQemu::Unreachable,
        )
        | (TargetJournal::Loaded, FoundQemu::Gone) => {
            never_ran("the target agent was restarted before everything was loaded")
        }
    }
}
