//! Gangway.
use crate::{
    bench::Bench,
    outcome::{EventLog, Outcome},
    scenario::Preset,
    session::Session,
};
/// Agents.
#[derive(Debug)]
pub struct Agents;
impl Agents {
    /// x
    pub fn start(_: &Bench<'_>, _: &Session) -> anyhow::Result<Self> {
        anyhow::bail!("not yet")
    }
    /// x
    pub fn migrate(
        &self,
        _: &Bench<'_>,
        _: (Preset, bool),
        _: &EventLog,
    ) -> anyhow::Result<Outcome> {
        anyhow::bail!("not yet")
    }
}
