//! The control API of one agent: HTTP and JSON on its unix socket and, for other agents, on a TCP
//! port under mutual TLS.
//!
//! | here | what |
//! |---|---|
//! | [`mover`] | the seam to the data path |
//! | `moves` | table of the moves whose source is this host |
//! | `log` | bounded event logs that readers follow |
//! | [`preparer`] | the seam to preparation on this host |
//! | `routes`, `group_routes`, `prepare_routes` | the paths, and their OpenAPI description |
//! | `reply` | bodies in and out, refusals as HTTP answers, event streams |
//! | [`doctor`] | whether this host is ready |
//! | `metrics` | the Prometheus page |
//! | [`server`] | listeners, start and orderly stop |
//!
//! Groups live in [`coordinator`](crate::coordinator), which talks to every agent, its own
//! included, through this API.

pub mod doctor;
#[cfg(any(test, feature = "testing"))]
pub mod fake;
mod group_routes;
pub(crate) mod log;
mod metrics;
pub mod mover;
pub(crate) mod moves;
mod prepare_routes;
pub mod preparer;
mod reply;
mod routes;
pub mod server;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;

pub use routes::openapi;
