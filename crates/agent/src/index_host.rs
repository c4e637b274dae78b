//! The rack index in this process: every agent can have that of a group for the group's life, and
//! `gangway index` does nothing else.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use index::{Groups, Server};
use tokio::signal::unix::{SignalKind, signal};
use wire::{Channel, ControlReply, Hello};

use crate::config::IndexConfig;
use crate::link::{Link, LinkError, Security, Serve, Terms, listen};
use crate::tls::Tls;

/// Bytes read at once: a few batches of claims.
const READ: usize = 64 << 10;

/// How long a connection may be idle: a source whose VMs have sent all that is new.
const IDLE: Duration = Duration::from_secs(24 * 3600);

/// How long a client may take to say what it wants: as long as an agent that is silent.
const HELLO_TIMEOUT: Duration = Duration::from_secs(15);

/// How often leases are looked at.
const TICK: Duration = Duration::from_secs(5);

/// The tables of this process.
pub(crate) struct IndexHost {
    groups: Mutex<Groups>,
    clock: Instant,
}

/// Why a client's connection has ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IndexHostError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error("a client of the index does not keep to the protocol")]
    Server(#[from] index::ServerError),
    #[error("no random number for a table's epoch: {0}")]
    Random(getrandom::Error),
}

impl IndexHost {
    /// Tables of this shard with at most so many entries together; a thread ends those whose
    /// leases are over.
    pub(crate) fn start(shard: u8, max_entries: u32) -> std::io::Result<Arc<Self>> {
        let host = Arc::new(Self {
            groups: Mutex::new(Groups::with_limit(shard, max_entries)),
            clock: Instant::now(),
        });
        let weak = Arc::downgrade(&host);
        std::thread::Builder::new()
            .name("gw-index-lease".into())
            .spawn(move || {
                while let Some(host) = weak.upgrade() {
                    let now = host.clock.elapsed();
                    host.groups().tick(now);
                    drop(host);
                    std::thread::sleep(TICK);
                }
            })?;
        Ok(host)
    }

    /// Owns a client's connection until it ends.
    pub(crate) fn serve(&self, mut link: Link) -> Result<(), IndexHostError> {
        let epoch = getrandom::u64().map_err(IndexHostError::Random)?;
        link.set_timeout(IDLE);
        let mut server = Server::new(epoch);
        let result = self.answer(&mut link, &mut server);
        let now = self.clock.elapsed();
        server.closed(&mut self.groups(), now);
        match result {
            Err(IndexHostError::Link(LinkError::Closed)) => Ok(()),
            other => other,
        }
    }

    fn answer(&self, link: &mut Link, server: &mut Server) -> Result<(), IndexHostError> {
        let (mut input, mut output) = (vec![0; READ], Vec::new());
        loop {
            let count = link.read_some(&mut input)?;
            output.clear();
            server.handle(&mut self.groups(), &input[..count], &mut output)?;
            if !output.is_empty() {
                link.write_all(&output)?;
            }
        }
    }

    fn groups(&self) -> MutexGuard<'_, Groups> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs a stand-alone index until SIGTERM or SIGINT. Its tables go with it: agents that use them
/// go on without.
///
/// # Errors
/// Whatever keeps it from starting: certificates, or its address.
pub async fn run(config: &IndexConfig) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("catching signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("catching signals")?;
    let tls = match &config.tls_dir {
        Some(dir) => Some(Tls::load(dir).context("loading the certificates")?),
        None => None,
    };
    let terms = Terms {
        security: Security::of(tls.as_ref()),
        peer_timeout: HELLO_TIMEOUT,
    };
    let index = IndexHost::start(config.shard, config.max_entries)?;
    let address = listen(config.bulk, terms, IndexAlone(index))?;
    let shard = config.shard;
    tracing::info!(name = config.name, shard, %address, "the index is ready");
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!(name = config.name, "the index ends");
    Ok(())
}

/// The index as all that a process does.
pub(crate) struct IndexAlone(pub(crate) Arc<IndexHost>);

impl Serve for IndexAlone {
    fn serve(&self, mut link: Link, hello: &Hello) -> anyhow::Result<()> {
        if hello.channel != Channel::Index {
            let reason = "this is an index and no agent: name it in a plan's `index`, and no host's \
                          `bulk`";
            tracing::warn!(from = hello.source, "a connection is refused: {reason}");
            let reason = reason.to_owned();
            return Ok(link.send(&ControlReply::Refused { reason })?);
        }
        link.send(&ControlReply::Welcome)?;
        tracing::info!(from = hello.source, "an agent comes");
        let result = self.0.serve(link);
        tracing::info!(from = hello.source, "an agent goes");
        Ok(result?)
    }
}
