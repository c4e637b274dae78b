//! Runs of entries of the rack index.

use page::EntryId;

use crate::frame::take_u32;
use crate::{WireError, varint};

/// Most runs in one message: as many as ids in a batch, for entries without neighbours.
pub const MAX_RUNS: usize = super::MAX_IDS;

/// Most entries in the runs of one message: the server looks at each, 65536 of them for about a
/// millisecond. More go in several messages.
pub const MAX_RUN_ENTRIES: u32 = 1 << 16;

/// Consecutive entries of one shard.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct EntryRun {
    /// First of the run.
    pub first: EntryId,
    /// Number of entries, at least one.
    pub count: u32,
}

impl EntryRun {
    /// One past the last entry's id.
    #[must_use]
    pub fn end(self) -> EntryId {
        self.first.plus(self.count)
    }

    /// The entries of the run, ascending.
    pub fn entries(self) -> impl Iterator<Item = EntryId> {
        (0..self.count).map(move |i| self.first.plus(i))
    }

    /// Whether the run is of one shard, and holds something.
    pub(super) fn is_valid(self) -> bool {
        let number_end = self.first.number().checked_add(self.count);
        !self.first.is_local()
            && self.count > 0
            && number_end.is_some_and(|end| end <= EntryId::MAX_IN_SHARD)
    }
}

/// Joins entries into runs, in their order. Runs end where a shard does.
pub fn join_runs(entries: impl IntoIterator<Item = EntryId>) -> Vec<EntryRun> {
    let mut runs: Vec<EntryRun> = Vec::new();
    for entry in entries {
        match runs.last_mut() {
            Some(run) if run.end() == entry && run.first.shard() == entry.shard() => run.count += 1,
            _ => runs.push(EntryRun {
                first: entry,
                count: 1,
            }),
        }
    }
    runs
}

/// Writes runs, each relative to the one before.
#[derive(Default)]
pub(super) struct RunCode {
    last_end: u32,
}

impl RunCode {
    /// Appends the start of a run of `count`, which is coded elsewhere.
    pub(super) fn put_start(&mut self, first: EntryId, count: u32, out: &mut Vec<u8>) {
        let distance = i64::from(first.0) - i64::from(self.last_end);
        varint::put(out, varint::zigzag(distance));
        self.last_end = first.plus(count).0;
    }

    /// Takes the start of a run of `count`, and checks the run.
    pub(super) fn take_start(
        &mut self,
        count: u32,
        rest: &mut &[u8],
    ) -> Result<EntryRun, WireError> {
        let distance = varint::unzigzag(varint::take(rest)?);
        let first = i64::from(self.last_end)
            .checked_add(distance)
            .and_then(|first| u32::try_from(first).ok())
            .ok_or(WireError::NumberTooLarge)?;
        let run = EntryRun {
            first: EntryId(first),
            count,
        };
        if !run.is_valid() {
            return Err(WireError::NumberTooLarge);
        }
        self.last_end = run.end().0;
        Ok(run)
    }
}

/// Appends runs to the end of a body.
pub(super) fn put_runs(runs: &[EntryRun], out: &mut Vec<u8>) {
    let mut code = RunCode::default();
    for run in runs {
        varint::put(out, run.count.into());
        code.put_start(run.first, run.count, out);
    }
}

/// Takes runs up to the end of a body.
pub(super) fn take_runs(mut rest: &[u8]) -> Result<Vec<EntryRun>, WireError> {
    let (mut code, mut runs, mut total) = (RunCode::default(), Vec::new(), 0_u64);
    while !rest.is_empty() {
        let count = take_u32(&mut rest)?;
        runs.push(code.take_start(count, &mut rest)?);
        total += u64::from(count);
        if runs.len() > MAX_RUNS || total > MAX_RUN_ENTRIES.into() {
            return Err(WireError::TooLong {
                what: "a list of entries",
                length: total,
                limit: MAX_RUN_ENTRIES.into(),
            });
        }
    }
    Ok(runs)
}
