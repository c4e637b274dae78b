//! The records of a table and the way from a content to its record, in little memory.
//!
//! A record has 28 bytes. Records stand in chunks that are never moved. The way to them is 256
//! hash tables of 4-byte numbers, 5 bytes a slot; each doubles when it is 7/8 full. Contents
//! are dealt to them unevenly, the last gets nearly twice as many as the first, so that they
//! double one after the other: at any time a table holds 8 to 9 bytes of slots for each entry,
//! and a growth moves one part in 180 at most, which is all that a claim waits for.

use hashbrown::HashTable;
use page::ContentId;

use crate::sets::SetNo;
use crate::table::ClientNo;

/// Records of a chunk: 1.8 MB, small beside a table that needs many.
const CHUNK: usize = 1 << 16;

const SUB_TABLES: usize = 256;

/// Parts in which contents are dealt to the hash tables.
const DEAL: usize = 1 << 14;

/// How the claim of an entry stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum State {
    Unclaimed = 0,
    InFlight = 1,
    Present = 2,
    Lost = 3,
}

/// One content. The carrier, the client and the set `given` are of the last claim.
#[derive(Clone, Copy)]
pub(crate) struct Record {
    id: [u8; 16],
    /// Target hosts that are registered to need it.
    pub(crate) needed: SetNo,
    /// `needed` when it was claimed, times four, and the state.
    given_and_state: u32,
    pub(crate) carrier: u16,
    pub(crate) client: ClientNo,
}

const _: () = assert!(size_of::<Record>() == 28);

impl Record {
    fn new(id: ContentId) -> Self {
        Self {
            id: id.0,
            needed: SetNo::EMPTY,
            given_and_state: 0,
            carrier: 0,
            client: ClientNo(0),
        }
    }

    pub(crate) fn state(&self) -> State {
        match self.given_and_state % 4 {
            0 => State::Unclaimed,
            1 => State::InFlight,
            2 => State::Present,
            _ => State::Lost,
        }
    }

    pub(crate) fn set_state(&mut self, state: State) {
        self.given_and_state = self.given_and_state / 4 * 4 + state as u32;
    }

    pub(crate) fn given(&self) -> SetNo {
        SetNo(self.given_and_state / 4)
    }

    /// `given` is below [`MAX_SETS`](crate::sets::MAX_SETS), which leaves room for the state.
    pub(crate) fn set_given(&mut self, given: SetNo) {
        self.given_and_state = given.0 * 4 + self.given_and_state % 4;
    }
}

/// The records, numbered from 0 in the order in which they were pushed.
pub(crate) struct Entries {
    chunks: Vec<Vec<Record>>,
    sub_tables: Vec<HashTable<u32>>,
    /// Which sub-table each part of the hashes belongs to.
    deal: Vec<u8>,
    len: u32,
}

impl Entries {
    pub(crate) fn new() -> Self {
        Self {
            chunks: Vec::new(),
            sub_tables: (0..SUB_TABLES).map(|_| HashTable::new()).collect(),
            deal: deal(),
            len: 0,
        }
    }

    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    pub(crate) fn find(&self, id: ContentId) -> Option<u32> {
        let hash = id.hash64();
        let same = |number: &u32| self.get(*number).is_some_and(|record| record.id == id.0);
        self.sub_tables[self.sub_table(hash)]
            .find(hash, same)
            .copied()
    }

    /// Adds a record for a content that has none.
    pub(crate) fn push(&mut self, id: ContentId) -> u32 {
        let number = self.len;
        match self.chunks.last_mut() {
            Some(chunk) if chunk.len() < CHUNK => chunk.push(Record::new(id)),
            _ => {
                let mut chunk = Vec::with_capacity(CHUNK);
                chunk.push(Record::new(id));
                self.chunks.push(chunk);
            }
        }
        self.len += 1;
        let sub_table = self.sub_table(id.hash64());
        let chunks = &self.chunks;
        let rehash = |number: &u32| {
            record_of(chunks, *number).map_or(0, |record| ContentId(record.id).hash64())
        };
        self.sub_tables[sub_table].insert_unique(id.hash64(), number, rehash);
        number
    }

    pub(crate) fn get(&self, number: u32) -> Option<&Record> {
        record_of(&self.chunks, number)
    }

    pub(crate) fn get_mut(&mut self, number: u32) -> Option<&mut Record> {
        let number = number as usize;
        self.chunks.get_mut(number / CHUNK)?.get_mut(number % CHUNK)
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Record> {
        self.chunks.iter_mut().flatten()
    }

    /// Uses bits that neither the slots (low ones) nor their tags (the highest seven) use.
    fn sub_table(&self, hash: u64) -> usize {
        self.deal[(hash >> 40) as usize % DEAL].into()
    }
}

fn record_of(chunks: &[Vec<Record>], number: u32) -> Option<&Record> {
    let number = number as usize;
    chunks.get(number / CHUNK)?.get(number % CHUNK)
}

/// Shares that grow like `2^(n / 256)`, so that doublings are evenly spread over one doubling
/// of the whole.
fn deal() -> Vec<u8> {
    #[expect(clippy::cast_precision_loss, reason = "parts are few")]
    let parts = (0..DEAL).map(|part| {
        // Share up to n is 2^(n / 256) - 1.
        let share = part as f64 / DEAL as f64;
        (share + 1.0).log2() * SUB_TABLES as f64
    });
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "0 to 255.99"
    )]
    parts.map(|n| n as u8).collect()
}
