//! Exit codes, which scripts rely on.

use std::process::ExitCode;

use agent::api::mover::RefusalCode;
use agent::client::CallError;
use agent::config::ConfigError;
use agent::plan::PlanError;

/// How the command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// All moved; or, of a command that moves nothing, done.
    AllMoved,
    /// Some VMs stayed, each running at its source; or a command failed that moves nothing.
    SomeStayed,
    /// Command line, plan or configuration are wrong.
    Usage,
    /// Refused, nothing was started.
    Refused,
    /// A VM needs a person, or may need one: the agent cannot be asked.
    NeedsPerson,
    /// The person left; the migration goes on. As shells report a command ended by Ctrl-C.
    Left,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(match exit {
            Exit::AllMoved => 0,
            Exit::SomeStayed => 1,
            Exit::Usage => 2,
            Exit::Refused => 3,
            Exit::NeedsPerson => 4,
            Exit::Left => 130,
        })
    }
}

impl Exit {
    /// The exit that an error means, of a command that has started nothing.
    pub(crate) fn of_error(error: &anyhow::Error) -> Self {
        if error.is::<PlanError>() || error.is::<ConfigError>() {
            return Self::Usage;
        }
        match error.downcast_ref::<CallError>() {
            Some(CallError::Refused(refusal)) if refusal.code == RefusalCode::BadRequest => {
                Self::Usage
            }
            Some(_) => Self::Refused,
            None => Self::SomeStayed,
        }
    }
}
