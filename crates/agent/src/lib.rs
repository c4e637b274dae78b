//! The agent: one process for a host, both roles of a migration.
//!
//! Threads, sockets, TLS, the control API and its coordinator stand here, around the protocol
//! rules of `migrate`, which are not. The bulk path runs on plain threads with large buffers,
//! the control API on tokio; [`api::mover::Mover`] is the seam between them.

pub mod api;
pub mod client;
pub mod config;
pub mod coordinator;
mod host;
mod index_host;
mod journal;
mod link;
pub mod plan;
pub mod prepare;
mod source;
mod target;
pub mod tls;
pub mod types;

use std::sync::Arc;

use anyhow::Context;

pub use index_host::run as run_index;

/// Runs the agent of this host until it is told to stop.
///
/// # Errors
/// Whatever keeps it from starting: certificates, addresses, directories, another agent.
pub async fn run(config: &config::Config) -> anyhow::Result<()> {
    let tls = match &config.tls_dir {
        Some(dir) if !config.insecure_plaintext => {
            Some(tls::Tls::load(dir).context("loading the certificates")?)
        }
        _ => None,
    };
    let mover = Arc::new(host::HostMover::start(config, tls.as_ref())?);
    let served = api::server::run(config, tls, mover).await;
    // Threads of moves may keep what would do it.
    target::restore_leftover(&config.state_dir);
    Ok(served?)
}
