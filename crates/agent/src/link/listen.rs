//! Where connections arrive: at agents, and at a stand-alone index.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use wire::{ControlReply, Hello};

use super::{Link, Security};

/// Connections under way at once: some for each of many groups; beyond that somebody floods us.
const MAX_CONNECTIONS: usize = 1024;

/// How long to leave an error of `accept` alone: the descriptors that it lacks are not there at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What becomes of connections whose first message was understood.
pub(crate) trait Serve: Send + Sync + 'static {
    /// Owns a connection until it ends. It has not been answered yet.
    fn serve(&self, link: Link, hello: &Hello) -> anyhow::Result<()>;
}

/// What a connection must agree to.
#[derive(Clone)]
pub(crate) struct Terms {
    pub(crate) security: Security,
    pub(crate) peer_timeout: Duration,
}

/// Listens on `address` in threads of its own, one for each connection.
///
/// # Errors
/// An address that cannot be listened on.
pub(crate) fn listen(
    address: SocketAddr,
    terms: Terms,
    server: impl Serve,
) -> anyhow::Result<SocketAddr> {
    let socket = TcpListener::bind(address).with_context(|| format!("listening on {address}"))?;
    let address = socket.local_addr().context("asking for the address")?;
    let shared = Arc::new((terms, server));
    std::thread::Builder::new()
        .name("gw-listen".into())
        .spawn(move || accept_all(&socket, &shared))
        .context("starting the thread that listens")?;
    Ok(address)
}

fn accept_all<S: Serve>(socket: &TcpListener, shared: &Arc<(Terms, S)>) {
    loop {
        let (tcp, peer) = match socket.accept() {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "accepting failed");
                std::thread::sleep(ACCEPT_PAUSE);
                continue;
            }
        };
        // The listener's own share is one.
        if Arc::strong_count(shared) > MAX_CONNECTIONS {
            tracing::warn!(%peer, "too many connections");
            continue;
        }
        let shared = Arc::clone(shared);
        let started = std::thread::Builder::new()
            .name("gw-peer".into())
            .spawn(move || {
                let (terms, server) = &*shared;
                if let Err(error) = greet(tcp, terms, server) {
                    tracing::info!(%peer, "a connection has ended: {error:#}");
                }
            });
        if let Err(error) = started {
            tracing::error!(%error, "no thread for a connection");
        }
    }
}

fn greet(tcp: TcpStream, terms: &Terms, server: &impl Serve) -> anyhow::Result<()> {
    let mut link = Link::accepted(tcp, &terms.security, terms.peer_timeout)?;
    let hello = link.receive_hello()?;
    if !hello.is_compatible() {
        let reason = format!(
            "version {} is spoken there, {} here",
            hello.version,
            wire::PROTOCOL_VERSION
        );
        return Ok(link.send(&ControlReply::Refused { reason })?);
    }
    server.serve(link, &hello)
}
