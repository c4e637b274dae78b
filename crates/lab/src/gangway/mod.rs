//! The technique under test: real agents, a real plan, the real command line.

mod agents;
mod migration;
mod plan;
mod record;
mod struck;

pub use agents::{Agents, control_socket};
pub use migration::migrate;
