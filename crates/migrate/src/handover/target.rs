//! The target's side of the hand-over.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use wire::MoveState;

/// How long a loaded VM waits for its release once the source cannot be heard. Twice the
/// source's own patience, so that a source that is still trying finds it.
pub(crate) const LEASE: Duration = Duration::from_secs(120);

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
}

/// What the machine wants done, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetAction {
    /// Write the journal, before the next action.
    Journal(TargetJournal),
    /// Say `cont`. Answer: `Continued`, `ContinueRefused` or `QemuGone`.
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

    /// The state as the source is told it. While `cont` is under way there is no answer yet:
    /// ask again when it is done.
    #[must_use]
    pub fn answer(&self) -> Option<MoveState> {
        Some(match &self.state {
            TargetState::Loading => MoveState::Loading,
            TargetState::Loaded { .. } | TargetState::Switched => MoveState::Loaded,
            TargetState::Releasing { .. } => return None,
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
            (S::Releasing { .. }, E::LoadReported) => (
                S::Releasing { follows: false },
                vec![A::Journal(TargetJournal::Released)],
            ),
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
                S::Releasing { follows: false },
                vec![A::Journal(TargetJournal::Released), A::Continue],
            ),
            (S::Switched, E::Release) => (
                S::Releasing { follows: true },
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
            (S::Releasing { follows }, E::Continued) => (
                S::Running { follows },
                vec![A::Journal(match follows {
                    true => TargetJournal::RunsAhead,
                    false => TargetJournal::Runs,
                })],
            ),
            (S::Releasing { .. }, E::ContinueRefused(reason)) => {
                never_ran(&format!("it could not be started: {reason}"))
            }
            (S::Releasing { .. }, E::QemuGone(reason)) => (S::Lost(reason), vec![]),
            (S::Running { follows: true }, E::QemuGone(reason)) => (S::Lost(reason), vec![]),
            (S::Loading, E::Restarted(journal, found)) => restarted(journal, found),
            (state, _) => (state, vec![]),
        };
        self.state = next;
        actions
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
    match (journal, found) {
        (TargetJournal::NeverRan { reason }, _) => (TargetState::NeverRan(reason), vec![]),
        (TargetJournal::Released, FoundQemu::Running | FoundQemu::Complete)
        | (TargetJournal::Following | TargetJournal::RunsAhead, FoundQemu::Complete)
        // Whatever became of it since: it has arrived.
        | (TargetJournal::Runs, _) => (TargetState::Running { follows: false }, vec![]),
        (TargetJournal::Released, FoundQemu::Stopped) => (
            TargetState::Releasing { follows: false },
            vec![TargetAction::Continue],
        ),
        // Its processors may wait for memory; whether they ever ran is not known.
        (TargetJournal::Following, FoundQemu::Running)
        // Not told to go on if it stands still: it ran, and somebody stopped it.
        | (TargetJournal::RunsAhead, FoundQemu::Running | FoundQemu::Stopped) => {
            (TargetState::Running { follows: true }, vec![])
        }
        (TargetJournal::Following, FoundQemu::Stopped) => (
            TargetState::Releasing { follows: true },
            vec![TargetAction::Continue],
        ),
        (
            TargetJournal::Released | TargetJournal::Following | TargetJournal::RunsAhead,
            FoundQemu::Gone,
        ) => (
            TargetState::Lost("its QEMU ended while the agent was away".into()),
            vec![],
        ),
        // A loaded VM that runs although nobody here let it go: a person said `cont`.
        (TargetJournal::Loaded, FoundQemu::Running | FoundQemu::Complete) => {
            (TargetState::Running { follows: false }, vec![])
        }
        (TargetJournal::Loaded, FoundQemu::Stopped) => {
            // The lease starts anew: the source cannot have been heard in the meantime.
            (
                TargetState::Loaded {
                    alone_since: Some(Duration::ZERO),
                },
                vec![],
            )
        }
        (TargetJournal::Loading | TargetJournal::Loaded, _) => {
            never_ran("the target agent was restarted before everything was loaded")
        }
    }
}
