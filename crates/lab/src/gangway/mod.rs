//! The technique under test: real agents, a real plan, the real command line.

mod agents;
mod index;
mod migration;
mod plan;
pub mod prepare;
mod record;
mod still;
mod struck;

pub use agents::{Agents, control_socket};
pub use migration::{PLAN_SETTINGS, migrate, move_again};
