//! The tables of an index process.

use std::collections::HashMap;
use std::time::Duration;

use wire::index::TableKey;

use crate::table::{ClientNo, MAX_ENTRIES, Table};

/// How long a table outlives its last client: an agent that restarts, or a preparation whose
/// migration follows, finds it again; a group that was forgotten does not hold memory for good.
pub const LEASE: Duration = Duration::from_secs(10 * 60);

/// Most tables at once. A rack is emptied in a handful of groups, each with a few domains; an
/// empty table takes 25 KB.
pub const MAX_TABLES: usize = 1024;

/// Why a client cannot join.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum GroupsError {
    /// There are [`MAX_TABLES`].
    #[error("the index serves {MAX_TABLES} groups and domains already")]
    TooManyTables,
    /// All client numbers of the table are in use.
    #[error("the group has {} clients already", u16::MAX)]
    TooManyClients,
}

struct Leased {
    table: Table,
    clients: Vec<ClientNo>,
    /// When the last client left; of no meaning while there are clients.
    left_at: Duration,
}

/// The tables by group and trust domain.
///
/// A table begins with its first client, and goes when its group is ended or [`LEASE`] after
/// its last client has left.
pub struct Groups {
    tables: HashMap<TableKey, Leased>,
    shard: u8,
    /// Of all tables together.
    max_entries: u32,
}

impl Groups {
    /// No tables yet; those to come are of this shard, and have at most [`MAX_ENTRIES`] together.
    #[must_use]
    pub fn new(shard: u8) -> Self {
        Self::with_limit(shard, MAX_ENTRIES)
    }

    /// As [`new`](Self::new), with a lower limit on the entries of all tables together.
    #[must_use]
    pub fn with_limit(shard: u8, max_entries: u32) -> Self {
        Self {
            tables: HashMap::new(),
            shard,
            max_entries,
        }
    }

    /// A client joins the table, which is made with `epoch` if there is none. Gives the
    /// client's number and the table's epoch.
    ///
    /// # Errors
    /// Too many tables, or clients of this one.
    pub fn join(&mut self, key: &TableKey, epoch: u64) -> Result<(ClientNo, u64), GroupsError> {
        if !self.tables.contains_key(key) {
            if self.tables.len() >= MAX_TABLES {
                return Err(GroupsError::TooManyTables);
            }
            let leased = Leased {
                table: Table::new(epoch, self.shard),
                clients: Vec::new(),
                left_at: Duration::ZERO,
            };
            self.tables.insert(key.clone(), leased);
        }
        let leased = self.tables.get_mut(key).ok_or(GroupsError::TooManyTables)?;
        let client = (0..u16::MAX)
            .map(ClientNo)
            .find(|n| !leased.clients.contains(n))
            .ok_or(GroupsError::TooManyClients)?;
        leased.clients.push(client);
        Ok((client, leased.table.epoch()))
    }

    /// The table, if it is still of this epoch. It may grow until all tables together are at
    /// the limit.
    pub fn table(&mut self, key: &TableKey, epoch: u64) -> Option<&mut Table> {
        let (mut all, max_entries) = (0_u32, self.max_entries);
        for leased in self.tables.values() {
            all = all.saturating_add(leased.table.len());
        }
        let table = &mut self.leased(key, epoch)?.table;
        let others = all.saturating_sub(table.len());
        table.set_limit(max_entries.saturating_sub(others));
        Some(table)
    }

    /// The client is gone: its claims in flight are lost.
    pub fn leave(&mut self, key: &TableKey, epoch: u64, client: ClientNo, now: Duration) {
        if let Some(leased) = self.leased(key, epoch) {
            leased.table.client_gone(client);
            leased.clients.retain(|n| *n != client);
            leased.left_at = now;
        }
    }

    /// The group is done: its tables go, those of all domains.
    pub fn end(&mut self, group: &str) {
        self.tables.retain(|key, _| key.group != group);
    }

    /// Lets tables go whose lease is over. To be called every few seconds or minutes.
    pub fn tick(&mut self, now: Duration) {
        self.tables.retain(|_, leased| {
            !leased.clients.is_empty() || now.saturating_sub(leased.left_at) < LEASE
        });
    }

    /// Number of this index's shard.
    #[must_use]
    pub fn shard(&self) -> u8 {
        self.shard
    }

    /// Number of tables.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tables.len()
    }

    /// Whether there is no table.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tables.is_empty()
    }

    /// The tables, for reports.
    pub fn iter(&self) -> impl Iterator<Item = (&TableKey, &Table)> {
        self.tables.iter().map(|(key, leased)| (key, &leased.table))
    }

    fn leased(&mut self, key: &TableKey, epoch: u64) -> Option<&mut Leased> {
        let leased = self.tables.get_mut(key)?;
        (leased.table.epoch() == epoch).then_some(leased)
    }
}
