//! All incoming moves of a host: who may arrive, and who is there.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::anyhow;
use migrate::handover::TargetEvent;
use wire::{MoveState, OpenMove};

use super::{Entry, Incoming, Opened, Promises, TOMBSTONE_AGE, TargetContext, TargetSession, lock};
use crate::target::resume::Resumption;

/// All incoming moves of this host.
pub(crate) struct Arrivals {
    pub(crate) context: TargetContext,
    moves: Mutex<HashMap<String, Arc<Incoming>>>,
    /// Moves whose QEMU is being started, by the VM's name. Locked before `moves`, if both are.
    starting: Mutex<HashMap<String, Starting>>,
    promises: Mutex<Promises>,
    clock: Instant,
}

/// A move whose QEMU is being started.
struct Starting {
    id: String,
    /// The source has taken it back since, and why.
    aborted: Option<String>,
}

/// The name of a VM whose QEMU is being started.
pub(super) struct Reserved<'a> {
    starting: &'a Mutex<HashMap<String, Starting>>,
    vm_name: String,
}

impl Reserved<'_> {
    /// Why the source has taken the move back, if it has.
    pub(super) fn aborted(&self) -> Option<String> {
        let mut starting = lock(self.starting);
        starting.get_mut(&self.vm_name)?.aborted.take()
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        lock(self.starting).remove(&self.vm_name);
    }
}

impl Arrivals {
    /// Takes up what an earlier process left, and watches over leases.
    pub(crate) fn start(context: TargetContext) -> std::io::Result<Arc<Self>> {
        let arrivals = Arc::new(Self {
            context,
            moves: Mutex::default(),
            starting: Mutex::default(),
            promises: Mutex::default(),
            clock: Instant::now(),
        });
        for entry in arrivals.context.journal.all::<Entry>() {
            let id = entry.id.clone();
            let incoming = Incoming::found(entry, &arrivals.context, arrivals.clock);
            lock(&arrivals.moves).insert(id, incoming);
        }
        let weak = Arc::downgrade(&arrivals);
        std::thread::Builder::new()
            .name("gw-leases".into())
            .spawn(move || {
                while let Some(arrivals) = weak.upgrade() {
                    arrivals.tick();
                    drop(arrivals);
                    std::thread::sleep(Duration::from_secs(1));
                }
            })?;
        Ok(arrivals)
    }

    fn tick(&self) {
        let moves: Vec<_> = lock(&self.moves).values().cloned().collect();
        for incoming in moves {
            incoming.handle(TargetEvent::Tick {
                now: self.clock.elapsed(),
            });
        }
        let mut expired = Vec::new();
        self.context.journal.expire(TOMBSTONE_AGE, |path| {
            // Only tombstones: everything else may still have a QEMU.
            let entry = std::fs::read(path)
                .ok()
                .and_then(|bytes| serde_json::from_slice::<Entry>(&bytes).ok())
                .filter(|entry| !entry.process.is_alive());
            expired.extend(entry.as_ref().map(|entry| entry.id.clone()));
            entry.is_some()
        });
        for id in expired {
            let incoming = lock(&self.moves).get(&id).cloned();
            if incoming.is_some_and(|incoming| incoming.is_ended()) {
                lock(&self.moves).remove(&id);
            }
        }
    }

    /// Starts the target QEMU of a move.
    pub(crate) fn open(
        &self,
        session: &Arc<TargetSession>,
        request: OpenMove,
    ) -> anyhow::Result<Opened> {
        let reserved = self.reserve(&request)?;
        let started = Incoming::start(session, &request, &self.context, self.clock);
        let (incoming, opened) = match started {
            Ok(started) => started,
            Err(error) => {
                lock(&self.promises).redeem(&request.id);
                return Err(error);
            }
        };
        lock(&self.moves).insert(request.id.clone(), Arc::clone(&incoming));
        lock(&self.promises).redeem(&request.id);
        // From here on an abort finds the move; one that came before has left a word.
        if let Some(reason) = reserved.aborted() {
            incoming.handle(TargetEvent::Abort(reason.clone()));
            return Err(anyhow!("the source has taken the move back: {reason}"));
        }
        if session.is_over() {
            // It ended while QEMU was started, when the move was not yet known here.
            self.session_lost(session);
        }
        Ok(opened)
    }

    /// Whether VMs that come here can share memory, as far as can be known before they come.
    pub(crate) fn can_share(&self) -> bool {
        guest::find_cow_library(self.context.cow_library.as_deref()).is_some()
    }

    /// Promises memory to the VMs of a group if it fits into `available`, beside what others were
    /// promised and what is still arriving; otherwise returns what is left.
    pub(crate) fn promise(
        &self,
        group: &str,
        vms: impl Iterator<Item = (String, u64)>,
        available: u64,
    ) -> Result<(), u64> {
        let vms: Vec<_> = vms.collect();
        let needed = vms
            .iter()
            .fold(0_u64, |sum, (_, bytes)| sum.saturating_add(*bytes));
        let arriving = self.arriving_bytes();
        let now = self.clock.elapsed();
        let mut promises = lock(&self.promises);
        let taken = promises.others_have(group, now).saturating_add(arriving);
        let left = available.saturating_sub(taken);
        if needed > left {
            return Err(left);
        }
        promises.promise(group, vms.into_iter(), now);
        Ok(())
    }

    /// Memory that the QEMUs of moves under way will take and have not taken yet.
    fn arriving_bytes(&self) -> u64 {
        let moves: Vec<_> = lock(&self.moves).values().cloned().collect();
        moves
            .iter()
            .filter(|incoming| !incoming.is_ended())
            .map(|incoming| lock(&incoming.entry).arriving_bytes())
            .fold(0, u64::saturating_add)
    }

    /// Keeps a second move of the same VM out while its QEMU starts, which may take seconds.
    pub(super) fn reserve(&self, request: &OpenMove) -> anyhow::Result<Reserved<'_>> {
        let mut starting = lock(&self.starting);
        let moves: Vec<_> = lock(&self.moves)
            .iter()
            .map(|(id, m)| (id.clone(), Arc::clone(m)))
            .collect();
        if moves.iter().any(|(id, _)| *id == request.id) {
            return Err(anyhow!("move {} was here before", request.id));
        }
        let busy = moves
            .iter()
            .find(|(_, m)| m.vm_name() == request.vm_name && !m.is_ended());
        if let Some((id, _)) = busy {
            return Err(anyhow!(
                "{} is arriving here already, as move {id}",
                request.vm_name
            ));
        }
        if starting.contains_key(&request.vm_name) {
            return Err(anyhow!("{} is arriving here already", request.vm_name));
        }
        let mark = Starting {
            id: request.id.clone(),
            aborted: None,
        };
        starting.insert(request.vm_name.clone(), mark);
        Ok(Reserved {
            starting: &self.starting,
            vm_name: request.vm_name.clone(),
        })
    }

    /// Lets a VM go, or says why not.
    pub(crate) fn release(&self, id: &str) -> MoveState {
        self.with(id, |incoming| {
            incoming
                .context
                .hold
                .at("target-release", &incoming.vm_name());
            incoming.handle(TargetEvent::Release);
            incoming
                .context
                .hold
                .at("target-running", &incoming.vm_name());
        })
    }

    /// Does away with a VM that was not let go, also if its QEMU is still being started.
    pub(crate) fn abort(&self, id: &str, reason: &str) -> MoveState {
        {
            let mut starting = lock(&self.starting);
            let mark = starting.values_mut().find(|mark| mark.id == id);
            if let Some(mark) = mark
                && !lock(&self.moves).contains_key(id)
            {
                mark.aborted = Some(reason.to_owned());
                return MoveState::Loading;
            }
        }
        self.with(id, |incoming| {
            incoming.handle(TargetEvent::Abort(reason.to_owned()))
        })
    }

    /// Has a VM that was let go in post-copy go on getting its memory, as VM `vm` of a new session.
    pub(crate) fn resume(
        &self,
        session: &Arc<TargetSession>,
        id: &str,
        vm: u16,
    ) -> anyhow::Result<Resumption> {
        let Some(incoming) = lock(&self.moves).get(id).cloned() else {
            return Ok(Resumption::Not(MoveState::Unknown));
        };
        let resumption = incoming.resume(session, vm);
        if session.is_over() {
            // It ended before the move was known to be of it.
            self.session_lost(session);
        }
        resumption
    }

    pub(crate) fn query(&self, id: &str) -> MoveState {
        self.with(id, |_| {})
    }

    fn with(&self, id: &str, act: impl FnOnce(&Incoming)) -> MoveState {
        let Some(incoming) = lock(&self.moves).get(id).cloned() else {
            return MoveState::Unknown;
        };
        act(&incoming);
        incoming.answer()
    }

    /// The session's connections are gone.
    pub(crate) fn session_lost(&self, session: &Arc<TargetSession>) {
        let moves: Vec<_> = lock(&self.moves).values().cloned().collect();
        for incoming in moves {
            if incoming
                .session()
                .is_some_and(|(s, _)| Arc::ptr_eq(&s, session))
            {
                incoming.handle(TargetEvent::SessionLost {
                    now: self.clock.elapsed(),
                });
                if incoming.answer() == MoveState::Following {
                    incoming.interrupt();
                }
                // What was added after its end would stay; only a resumed move can be.
                if let Some((session, vm)) = lock(&incoming.session).take()
                    && session.rack.is_none()
                {
                    session.remove_sink(vm);
                }
            }
        }
    }

    #[cfg(test)]
    pub(super) fn found_move(&self, id: &str) -> Option<Arc<Incoming>> {
        lock(&self.moves).get(id).cloned()
    }

    /// Process of a move's QEMU.
    #[cfg(test)]
    pub(crate) fn pid_of(&self, id: &str) -> Option<u32> {
        lock(&self.moves)
            .get(id)
            .map(|incoming| lock(&incoming.entry).process.pid)
    }

    /// Moves that have not ended.
    pub(crate) fn under_way(&self) -> Vec<String> {
        // Not locked meanwhile: a move whose QEMU is slow answers late, and others must not wait for it.
        let moves: Vec<_> = lock(&self.moves)
            .iter()
            .map(|(id, m)| (id.clone(), Arc::clone(m)))
            .collect();
        let under_way = moves.into_iter().filter(|(_, m)| !m.is_ended());
        under_way.map(|(id, _)| id).collect()
    }
}
