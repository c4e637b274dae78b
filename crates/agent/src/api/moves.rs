//! The moves whose source is this host: what was asked, where each stands, its events.
//!
//! The table owns no move: the [`Mover`] carries them out and reports here. A move stays in the
//! table after its end, for those who ask late, until newer ones need its place.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use super::log::{EventLog, Life};
use super::mover::{Admission, Bandwidth, EventSink, MoveCheck, Mover, Refusal, RefusalCode};
use crate::types::{Happening, MoveEvent, MoveSpec, MoveStatus, PageCounts, Phase, Progress};

/// Moves under way at once: two full racks of a plan at its largest, on one host.
const MOVES_MAX: usize = 1024;
/// Ended moves that are remembered. With the events of each at most 64 + 256, of 200 bytes, this
/// stays under 20 MB.
const ENDED_MAX: usize = 256;
/// A move has nine phases; recovery repeats some.
const LASTING_EVENTS: usize = 64;
/// Two minutes of progress at two events a second.
const PASSING_EVENTS: usize = 256;

/// The table; see the module's page. Its calls may block for as long as the mover's do.
pub(crate) struct Moves {
    mover: Arc<dyn Mover>,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    records: BTreeMap<String, Arc<MoveRecord>>,
    /// Acceptance order, for forgetting the oldest.
    accepted: u64,
    /// Counters of the moves that were forgotten, so that the metrics never run backwards.
    forgotten: Totals,
    stopping: bool,
}

/// One move.
pub(crate) struct MoveRecord {
    number: u64,
    status: Mutex<MoveStatus>,
    /// How often it ended as [`Totals::ended`] counts: one that is recovered ends again.
    ended: [AtomicU64; 3],
    /// Its events.
    pub(crate) log: EventLog<MoveEvent>,
}

/// Counters of all moves since the agent started, for the metrics.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Totals {
    pub(crate) wire_bytes: u64,
    pub(crate) stream_bytes: u64,
    pub(crate) pages: PageCounts,
    /// How often moves ended as moved, stayed, needing a person.
    pub(crate) ended: [u64; 3],
}

impl Moves {
    /// An empty table around a mover.
    pub(crate) fn new(mover: Arc<dyn Mover>) -> Self {
        Self {
            mover,
            table: Mutex::default(),
        }
    }

    /// The data path, for what concerns no move.
    pub(crate) fn mover(&self) -> &dyn Mover {
        &*self.mover
    }

    /// Recovers what an earlier process left behind.
    pub(crate) fn recover_interrupted(&self) {
        for spec in self.mover.recoverable() {
            let message = format!(
                "the move of VM `{}` was interrupted by a restart of the agent; it is being \
                 finished or undone",
                spec.vm
            );
            tracing::warn!(id = spec.id, "{message}");
            match self.insert(&spec, Phase::Recovering, message) {
                Ok(record) => {
                    if let Err(refusal) = self.mover.recover(&spec.id, sink(&record)) {
                        let message = format!(
                            "VM `{}`: its move was interrupted and cannot be recovered: {refusal}; \
                             look for it here and on host `{}`",
                            spec.vm, spec.target_name
                        );
                        record.needs_person(message);
                    }
                }
                Err(refusal) => tracing::error!(id = spec.id, "cannot recover: {refusal}"),
            }
        }
    }

    pub(crate) fn check(&self, spec: &MoveSpec) -> Result<MoveCheck, Refusal> {
        check_spec(spec)?;
        self.refuse_if_stopping()?;
        self.mover.check(spec)
    }

    pub(crate) fn admit(&self, request: &Admission) -> Result<(), Refusal> {
        self.refuse_if_stopping()?;
        self.mover.admit(request)
    }

    pub(crate) fn start(&self, spec: MoveSpec) -> Result<MoveStatus, Refusal> {
        check_spec(&spec)?;
        self.refuse_if_stopping()?;
        let id = spec.id.clone();
        let message = format!("VM `{}` waits for its turn; it runs at the source", spec.vm);
        let record = self.insert(&spec, Phase::Queued, message)?;
        match self.mover.start(spec, sink(&record)) {
            Ok(()) => Ok(record.status()),
            Err(refusal) => {
                self.lock().records.remove(&id);
                Err(refusal)
            }
        }
    }

    pub(crate) fn cancel(&self, id: &str) -> Result<(), Refusal> {
        self.under_way(id)?;
        self.mover.cancel(id)
    }

    pub(crate) fn resume_held(&self, id: &str) -> Result<(), Refusal> {
        self.under_way(id)?;
        self.mover.resume_held(id)
    }

    pub(crate) fn go_over(&self, id: &str) -> Result<(), Refusal> {
        self.under_way(id)?;
        self.mover.go_over(id)
    }

    pub(crate) fn set_bandwidth(&self, id: &str, limits: Bandwidth) -> Result<(), Refusal> {
        self.under_way(id)?;
        self.mover.set_bandwidth(id, limits)
    }

    /// Tries again to finish or undo a move that needs a person.
    pub(crate) fn recover(&self, id: &str) -> Result<(), Refusal> {
        let record = self.get(id)?;
        let before = record.reopen()?;
        self.mover.recover(id, sink(&record)).map_err(|refusal| {
            let vm = record.status().vm;
            let message = format!("VM `{vm}` cannot be recovered here: {refusal}; {before}");
            // What is known of the VM is what was known before.
            record.needs_person(before);
            Refusal::of_vm(refusal.code, vm, message)
        })
    }

    pub(crate) fn get(&self, id: &str) -> Result<Arc<MoveRecord>, Refusal> {
        self.lock().records.get(id).cloned().ok_or_else(|| {
            let message =
                format!("this host has no move `{id}` as its source; see `gangway status`");
            Refusal::new(RefusalCode::UnknownMove, message)
        })
    }

    /// All moves, in the order of their ids.
    pub(crate) fn list(&self) -> Vec<MoveStatus> {
        self.lock()
            .records
            .values()
            .map(|record| record.status())
            .collect()
    }

    pub(crate) fn incoming(&self) -> Vec<String> {
        self.mover.incoming()
    }

    pub(crate) fn stopping(&self) -> bool {
        self.lock().stopping
    }

    /// From now on nothing new is taken, and moves whose VM still runs at the source are
    /// cancelled.
    pub(crate) fn stop(&self) {
        self.lock().stopping = true;
        for status in self.list() {
            let undone_by_cancel = status.phase < Phase::SwitchOver || status.phase == Phase::Held;
            if undone_by_cancel && let Err(refusal) = self.mover.cancel(&status.id) {
                tracing::warn!(
                    id = status.id,
                    "the agent stops and cannot cancel: {refusal}"
                );
            }
        }
    }

    /// Counters since the agent started.
    pub(crate) fn totals(&self) -> Totals {
        let table = self.lock();
        table
            .records
            .values()
            .fold(table.forgotten, |mut totals, record| {
                totals.add(record);
                totals
            })
    }

    fn under_way(&self, id: &str) -> Result<(), Refusal> {
        let status = self.get(id)?.status();
        if status.phase.is_final() {
            let message = format!(
                "the move of VM `{}` has ended: {}",
                status.vm, status.message
            );
            return Err(Refusal::of_vm(RefusalCode::TooLate, status.vm, message));
        }
        Ok(())
    }

    fn refuse_if_stopping(&self) -> Result<(), Refusal> {
        if self.stopping() {
            let message = "the agent is being stopped; start it again and repeat the command";
            return Err(Refusal::new(RefusalCode::Stopping, message));
        }
        Ok(())
    }

    fn insert(
        &self,
        spec: &MoveSpec,
        phase: Phase,
        message: String,
    ) -> Result<Arc<MoveRecord>, Refusal> {
        let mut table = self.lock();
        let busy = |message| Refusal::of_vm(RefusalCode::Busy, spec.vm.clone(), message);
        if let Some(earlier) = table.records.get(&spec.id) {
            let phase = earlier.status().phase;
            return Err(busy(format!(
                "move `{}` exists already ({phase:?}); a group's id is used once",
                spec.id
            )));
        }
        table.forget_oldest();
        if table.records.len() >= MOVES_MAX + ENDED_MAX {
            let message = format!("this host has {MOVES_MAX} moves under way, its most");
            return Err(busy(message));
        }
        table.accepted += 1;
        let record = Arc::new(MoveRecord::new(table.accepted, spec));
        table.records.insert(spec.id.clone(), record.clone());
        drop(table);
        record.happened(Happening::Phase { phase, message });
        Ok(record)
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// Makes room among the ended: what needs a person goes last.
    fn forget_oldest(&mut self) {
        let ended = |record: &&Arc<MoveRecord>| record.status().phase.is_final();
        if self.records.values().filter(ended).count() < ENDED_MAX {
            return;
        }
        let needs_person = |record: &MoveRecord| record.status().phase == Phase::NeedsPerson;
        let oldest = self
            .records
            .values()
            .filter(ended)
            .min_by_key(|record| (needs_person(record), record.number));
        if let Some(record) = oldest.cloned() {
            self.forgotten.add(&record);
            self.records.remove(&record.status().id);
        }
    }
}

impl MoveRecord {
    fn new(number: u64, spec: &MoveSpec) -> Self {
        let status = MoveStatus {
            id: spec.id.clone(),
            group: spec.group.clone(),
            vm: spec.vm.clone(),
            target: spec.target_name.clone(),
            phase: Phase::Queued,
            message: String::new(),
            progress: Progress::default(),
            note: None,
        };
        Self {
            number,
            status: Mutex::new(status),
            ended: Default::default(),
            log: EventLog::new(LASTING_EVENTS, PASSING_EVENTS),
        }
    }

    pub(crate) fn status(&self) -> MoveStatus {
        self.lock().clone()
    }

    /// Takes a move that needs a person back to work; returns what was known of its VM.
    fn reopen(&self) -> Result<String, Refusal> {
        let mut status = self.lock();
        if status.phase != Phase::NeedsPerson {
            let message = format!(
                "the move of VM `{}` needs no recovery: {}",
                status.vm, status.message
            );
            return Err(Refusal::of_vm(
                RefusalCode::TooLate,
                status.vm.clone(),
                message,
            ));
        }
        // Its phases stay: whoever reads on from one that says it needs a person asks for its status.
        self.log.reopen(|_| false);
        status.phase = Phase::Recovering;
        let before = status.message.clone();
        drop(status);
        let message = "looking for the VM at both hosts".to_owned();
        self.happened(Happening::Phase {
            phase: Phase::Recovering,
            message,
        });
        Ok(before)
    }

    fn needs_person(&self, message: String) {
        self.happened(Happening::Phase {
            phase: Phase::NeedsPerson,
            message,
        });
    }

    fn happened(&self, what: Happening) {
        let mut status = self.lock();
        if status.phase.is_final() {
            tracing::error!(
                id = status.id,
                ?what,
                "reported after the move's end; ignored"
            );
            return;
        }
        let (life, ended) = match &what {
            Happening::Phase { phase, message } => {
                status.phase = *phase;
                status.message.clone_from(message);
                (Life::Lasting, how_ended(*phase))
            }
            Happening::Progress { progress } => {
                status.progress = *progress;
                (Life::Passing, None)
            }
            Happening::Note { message } => {
                status.note = Some(message.clone());
                (Life::Passing, None)
            }
        };
        // Under the lock, so that the log's order is the status's.
        self.log.push(life, |seq| MoveEvent {
            seq,
            at_unix_ms: unix_ms(),
            id: status.id.clone(),
            vm: status.vm.clone(),
            what,
        });
        if let Some(how) = ended {
            self.ended[how].fetch_add(1, Ordering::Relaxed);
            self.log.end();
        }
    }

    fn lock(&self) -> MutexGuard<'_, MoveStatus> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Totals {
    fn add(&mut self, record: &MoveRecord) {
        let progress = record.status().progress;
        self.wire_bytes += progress.wire_bytes;
        self.stream_bytes += progress.stream_bytes;
        let (sum, pages) = (&mut self.pages, &progress.pages);
        sum.total += pages.total;
        sum.zero += pages.zero;
        sum.fill += pages.fill;
        sum.literal += pages.literal;
        sum.reference += pages.reference;
        sum.remote_reference += pages.remote_reference;
        sum.repaired += pages.repaired;
        sum.mapped += pages.mapped;
        for (sum, count) in self.ended.iter_mut().zip(&record.ended) {
            *sum += count.load(Ordering::Relaxed);
        }
    }
}

/// A final phase's place in [`Totals::ended`].
fn how_ended(phase: Phase) -> Option<usize> {
    match phase {
        Phase::Moved => Some(0),
        Phase::Stayed => Some(1),
        Phase::NeedsPerson => Some(2),
        _ => None,
    }
}

fn sink(record: &Arc<MoveRecord>) -> EventSink {
    let record = record.clone();
    Box::new(move |what| record.happened(what))
}

fn check_spec(spec: &MoveSpec) -> Result<(), Refusal> {
    let named_by_group_and_vm = spec.id == format!("{}/{}", spec.group, spec.vm)
        && crate::plan::check_name(&spec.group).is_ok()
        && crate::plan::check_name(&spec.vm).is_ok();
    let key_is_whole = hex::decode(&spec.domain_key).is_ok_and(|key| key.len() == 32);
    let problem = if !named_by_group_and_vm {
        "its `id` must be GROUP/VM, of plain names"
    } else if !key_is_whole {
        "its `domain_key` must be 64 hex digits"
    } else if !spec.qmp.is_absolute() {
        "its `qmp` must be an absolute path"
    } else if crate::plan::host_and_port(&spec.target_bulk).is_none() {
        "its `target_bulk` must be HOST:PORT"
    } else {
        return Ok(());
    };
    let message = format!("move of VM `{}`: {problem}", spec.vm);
    Err(Refusal::of_vm(
        RefusalCode::BadRequest,
        spec.vm.clone(),
        message,
    ))
}

/// Wall clock as the events have it.
pub(crate) fn unix_ms() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0.0, |since| since.as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::fake::FakeHost;

    #[test]
    fn what_needs_a_person_outlives_whatever_else_has_ended() {
        let moves = Moves::new(Arc::new(FakeHost::new([], 0)));
        let end = |number: usize, phase| {
            let spec = crate::api::tests::spec(&format!("vm-{number}"));
            let record = moves.insert(&spec, Phase::Queued, String::new()).unwrap();
            let message = String::new();
            record.happened(Happening::Phase { phase, message });
        };
        end(0, Phase::NeedsPerson);
        for number in 1..=ENDED_MAX {
            end(number, Phase::Moved);
        }
        assert!(moves.get("g/vm-0").is_ok());
        assert!(moves.get("g/vm-1").is_err(), "the oldest of the others");
        assert_eq!(moves.list().len(), ENDED_MAX);
        assert_eq!(moves.totals().ended, [ENDED_MAX as u64, 0, 1]);
    }
}
