//! The rack index in this process: every agent can have that of a group for the group's life, and
//! `gangway index` does nothing else.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use index::{Groups, Server};

use crate::link::{Link, LinkError};

/// Bytes read at once: a few batches of claims.
const READ: usize = 64 << 10;

/// How long a connection may be idle: a source whose VMs have sent all that is new.
const IDLE: Duration = Duration::from_secs(24 * 3600);

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
    /// Tables of this shard; a thread ends those whose leases are over.
    pub(crate) fn start(shard: u8) -> std::io::Result<Arc<Self>> {
        let host = Arc::new(Self {
            groups: Mutex::new(Groups::new(shard)),
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
