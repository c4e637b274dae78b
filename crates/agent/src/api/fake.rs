//! A host in memory: the [`Mover`] that tests drive the API, the coordinator and the CLI with.
//!
//! It has VMs by name, each with a [`Script`] that says what becomes of its move.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::mover::{Admission, Bandwidth, EventSink, MoveCheck, Mover, Refusal, RefusalCode};
use super::preparer::Preparer;
use crate::types::{
    ContentSample, Happening, HostSurvey, HostVm, Inventory, Mode, MoveSpec, PageKinds, PairSurvey,
    Phase, PrepareSpec, PrepareState, PrepareStatus, Progress, ResolveSpec, VmSurvey,
};

/// Memory of each VM.
pub const VM_BYTES: u64 = 256 << 20;

/// What becomes of a VM's move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Script {
    /// It moves.
    Moves,
    /// It copies memory until it is cancelled or [`FakeHost::converge`] is called.
    NeverConverges,
    /// It fails in switch-over and runs on at the source.
    Stays,
    /// It is lost between the hosts; recovery brings it to the target.
    NeedsPerson,
    /// Its QEMU cannot be migrated.
    CannotMigrate,
}

/// What becomes of preparation on the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preparing {
    /// It is done at once.
    #[default]
    Works,
    /// It goes on until it is ended.
    NeverEnds,
    /// It fails.
    Fails,
}

struct FakePreparation {
    spec: PrepareSpec,
    resolved: Option<ResolveSpec>,
}

/// The host.
pub struct FakeHost {
    state: Arc<State>,
    name: String,
    interrupted: Vec<MoveSpec>,
    recovering: Recovering,
}

/// What becomes of recoveries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Recovering {
    /// Each finds its VM at the target, at once.
    Works,
    /// Each takes until [`FakeHost::end_recovery`].
    Waits,
    /// None can begin.
    NoJournal,
}

struct State {
    world: Mutex<World>,
    changed: Condvar,
}

#[derive(Default)]
struct World {
    vms: BTreeMap<String, Script>,
    free_bytes: u64,
    recovery_ends: VecDeque<Phase>,
    moves: BTreeMap<String, Under>,
    limits: Vec<(String, Bandwidth)>,
    admitted: Vec<Admission>,
    preparations: BTreeMap<String, FakePreparation>,
    preparing: Preparing,
    prepared: Vec<PrepareSpec>,
}

/// A move under way.
struct Under {
    vm: String,
    held: bool,
    cancelled: bool,
    past_return: bool,
    is_hybrid: bool,
    goes_over: bool,
}

impl Under {
    fn new(vm: &str) -> Self {
        Self {
            vm: vm.to_owned(),
            held: false,
            cancelled: false,
            past_return: false,
            is_hybrid: false,
            goes_over: false,
        }
    }
}

impl FakeHost {
    /// A host with these VMs and so much memory free for others.
    #[must_use]
    pub fn new<'a>(vms: impl IntoIterator<Item = (&'a str, Script)>, free_bytes: u64) -> Self {
        let vms = vms
            .into_iter()
            .map(|(vm, script)| (vm.to_owned(), script))
            .collect();
        let world = World {
            vms,
            free_bytes,
            ..World::default()
        };
        let state = State {
            world: Mutex::new(world),
            changed: Condvar::new(),
        };
        Self {
            state: Arc::new(state),
            name: "test".to_owned(),
            interrupted: Vec::new(),
            recovering: Recovering::Works,
        }
    }

    /// The same host under another name than `test`.
    #[must_use]
    pub fn with_name(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self
    }

    /// The same host after a restart in the middle of these moves.
    #[must_use]
    pub fn with_interrupted(mut self, specs: Vec<MoveSpec>) -> Self {
        self.interrupted = specs;
        self
    }

    /// The same host, on which a recovery takes until [`Self::end_recovery`].
    #[must_use]
    pub fn with_slow_recovery(mut self) -> Self {
        self.recovering = Recovering::Waits;
        self
    }

    /// The same host, on which no recovery can begin.
    #[must_use]
    pub fn without_journal(mut self) -> Self {
        self.recovering = Recovering::NoJournal;
        self
    }

    /// Ends the recovery that is under way, or else the next one, in this phase.
    pub fn end_recovery(&self, phase: Phase) {
        self.state.lock().recovery_ends.push_back(phase);
        self.state.changed.notify_all();
    }

    /// Sets the memory that is free for other VMs.
    pub fn set_free(&self, bytes: u64) {
        self.state.lock().free_bytes = bytes;
    }

    /// Lets every move that copies memory without end come to one.
    pub fn converge(&self) {
        for script in self.state.lock().vms.values_mut() {
            if *script == Script::NeverConverges {
                *script = Script::Moves;
            }
        }
        self.state.changed.notify_all();
    }

    /// Sets what becomes of preparation.
    pub fn set_preparing(&self, preparing: Preparing) {
        self.state.lock().preparing = preparing;
    }

    /// What was asked to be prepared, in order.
    #[must_use]
    pub fn prepared(&self) -> Vec<PrepareSpec> {
        self.state.lock().prepared.clone()
    }

    /// Groups whose preparation is held.
    #[must_use]
    pub fn preparations(&self) -> Vec<String> {
        self.state.lock().preparations.keys().cloned().collect()
    }

    /// The limits that were set on moves under way, in order.
    #[must_use]
    pub fn limits(&self) -> Vec<(String, Bandwidth)> {
        self.state.lock().limits.clone()
    }

    /// The admissions granted.
    #[must_use]
    pub fn admitted(&self) -> Vec<Admission> {
        self.state.lock().admitted.clone()
    }

    /// Names of the VMs that are (still) here.
    #[must_use]
    pub fn vms(&self) -> Vec<String> {
        self.state.lock().vms.keys().cloned().collect()
    }
}

impl Preparer for FakeHost {
    fn prepare(&self, spec: PrepareSpec) -> Result<(), Refusal> {
        let mut world = self.state.lock();
        world.prepared.push(spec.clone());
        let preparation = FakePreparation {
            spec: spec.clone(),
            resolved: None,
        };
        world.preparations.insert(spec.group, preparation);
        Ok(())
    }

    fn resolve_preparation(&self, group: &str, spec: ResolveSpec) -> Result<(), Refusal> {
        let mut world = self.state.lock();
        let one = world.preparations.get_mut(group);
        one.ok_or_else(|| no_preparation(group))?.resolved = Some(spec);
        Ok(())
    }

    fn preparation(&self, group: &str) -> Result<PrepareStatus, Refusal> {
        let world = self.state.lock();
        let one = world.preparations.get(group);
        let one = one.ok_or_else(|| no_preparation(group))?;
        let state = match (world.preparing, &one.resolved) {
            (Preparing::NeverEnds, _) => PrepareState::Scanning,
            (Preparing::Fails, _) => PrepareState::Failed,
            (Preparing::Works, None) => PrepareState::Registered,
            (Preparing::Works, Some(_)) => PrepareState::Ready,
        };
        let pages_total = VM_BYTES / 4096 * one.spec.vms.len() as u64;
        Ok(PrepareStatus {
            group: group.to_owned(),
            state,
            message: match state {
                PrepareState::Failed => "its memory cannot be read".to_owned(),
                _ => String::new(),
            },
            pages_total,
            pages_done: pages_total / 4,
            report: state.is_settled().then(|| fake_survey(one)),
        })
    }

    fn end_preparation(&self, group: &str) -> Result<(), Refusal> {
        let ended = self.state.lock().preparations.remove(group);
        ended.map(drop).ok_or_else(|| no_preparation(group))
    }
}

fn no_preparation(group: &str) -> Refusal {
    let message = format!("nothing is prepared here for group `{group}`");
    Refusal::new(RefusalCode::UnknownGroup, message)
}

/// VMs of which each has the same 100 contents on 150 pages, and zero pages.
fn fake_survey(one: &FakePreparation) -> HostSurvey {
    let pages = |vms: u64| PageKinds {
        total: vms * VM_BYTES / 4096,
        untouched: vms * (VM_BYTES / 4096 - 150),
        content: vms * 150,
        distinct: 100,
        ..PageKinds::default()
    };
    let vms = one.spec.vms.iter().map(|vm| VmSurvey {
        vm: vm.vm.clone(),
        target: vm.target,
        pages: pages(1),
    });
    let targets: std::collections::BTreeSet<u16> =
        one.spec.vms.iter().map(|vm| vm.target).collect();
    let compressed = one.resolved.as_ref().is_some_and(|spec| spec.compress);
    let pair = |&target: &u16| {
        let vms = one.spec.vms.iter().filter(|vm| vm.target == target);
        PairSurvey {
            target,
            pages: pages(vms.count() as u64),
            zstd_bytes: compressed.then_some(100_000),
            rack_zstd_bytes: compressed.then_some(90_000),
            sample: Some(ContentSample {
                zero_bits: 0,
                contents: (0..100_u64).map(|id| format!("{id:016x}")).collect(),
            }),
        }
    };
    HostSurvey {
        host: "fake".to_owned(),
        vms: vms.collect(),
        pages: pages(one.spec.vms.len() as u64),
        pairs: targets.iter().map(pair).collect(),
        seconds: 0.5,
        cpu_seconds: 0.25,
        pages_read: 150,
    }
}

impl Mover for FakeHost {
    fn check(&self, spec: &MoveSpec) -> Result<MoveCheck, Refusal> {
        let world = self.state.lock();
        let vm = &spec.vm;
        if world.moves.values().any(|under| under.vm == *vm) {
            let message = format!("VM `{vm}` is being moved already; it runs at the source");
            return Err(Refusal::of_vm(RefusalCode::Busy, vm, message));
        }
        match world.vms.get(vm) {
            None => {
                let message = format!("no QEMU answers for VM `{vm}` on this host");
                Err(Refusal::of_vm(RefusalCode::UnknownVm, vm, message))
            }
            Some(Script::CannotMigrate) => {
                let message = format!("VM `{vm}` cannot be migrated; it runs on here");
                Err(Refusal::of_vm(RefusalCode::CannotMigrate, vm, message))
            }
            Some(_) => Ok(MoveCheck {
                vm: vm.clone(),
                memory_bytes: VM_BYTES,
                shared_bytes: None,
                expanded_bytes: None,
                program: PathBuf::from("/usr/bin/qemu-system-x86_64"),
                machine: "pc-q35-7.2".to_owned(),
                qemu_version: "10.0.2".to_owned(),
            }),
        }
    }

    fn start(&self, spec: MoveSpec, events: EventSink) -> Result<(), Refusal> {
        self.check(&spec)?;
        let under = Under {
            is_hybrid: spec.settings.mode == Mode::Hybrid,
            ..Under::new(&spec.vm)
        };
        self.state.lock().moves.insert(spec.id.clone(), under);
        let state = self.state.clone();
        std::thread::spawn(move || {
            let (phase, message) = state.carry_out(&spec, &events);
            let mut world = state.lock();
            world.moves.remove(&spec.id);
            if phase == Phase::Moved {
                world.vms.remove(&spec.vm);
            }
            drop(world);
            let message = format!("VM `{}` {message}", spec.vm);
            events(Happening::Phase { phase, message });
        });
        Ok(())
    }

    fn cancel(&self, id: &str) -> Result<(), Refusal> {
        self.state.with_move(id, |under| {
            if under.past_return {
                let message = format!("VM `{}` runs at the target already", under.vm);
                return Err(Refusal::of_vm(RefusalCode::TooLate, &under.vm, message));
            }
            under.cancelled = true;
            Ok(())
        })
    }

    fn resume_held(&self, id: &str) -> Result<(), Refusal> {
        self.state.with_move(id, |under| {
            if !under.held {
                let message = format!("VM `{}` is not held; its move goes on by itself", under.vm);
                return Err(Refusal::of_vm(RefusalCode::NotHeld, &under.vm, message));
            }
            under.held = false;
            Ok(())
        })
    }

    fn go_over(&self, id: &str) -> Result<(), Refusal> {
        self.state.with_move(id, |under| {
            if !under.is_hybrid {
                let message = format!("VM `{}` moves in mode `pre-copy`", under.vm);
                return Err(Refusal::of_vm(RefusalCode::NotHybrid, &under.vm, message));
            }
            under.goes_over = true;
            Ok(())
        })
    }

    fn set_bandwidth(&self, id: &str, limits: Bandwidth) -> Result<(), Refusal> {
        self.state.with_move(id, |_| Ok(()))?;
        self.state.lock().limits.push((id.to_owned(), limits));
        Ok(())
    }

    fn admit(&self, request: &Admission) -> Result<(), Refusal> {
        let needed = request.memory_bytes();
        let mut world = self.state.lock();
        if needed > world.free_bytes {
            let message = format!(
                "the {} VMs need {needed} bytes of memory together, {} are free",
                request.vms.len(),
                world.free_bytes
            );
            return Err(Refusal::new(RefusalCode::NoMemory, message));
        }
        world.admitted.push(request.clone());
        Ok(())
    }

    fn inventory(&self) -> Result<Inventory, Refusal> {
        let vm = |(pid, vm): (u32, String)| HostVm {
            qmp: Some(format!("/run/{vm}.qmp").into()),
            vm,
            pid,
            memory_bytes: VM_BYTES,
        };
        let free_bytes = self.state.lock().free_bytes;
        Ok(Inventory {
            name: self.name.clone(),
            bulk: format!("{}.test:1", self.name),
            free_bytes,
            vms: (1..).zip(self.vms()).map(vm).collect(),
        })
    }

    fn recover(&self, id: &str, events: EventSink) -> Result<(), Refusal> {
        if self.recovering == Recovering::NoJournal {
            let message = format!("no interrupted move {id} in the journal here");
            return Err(Refusal::new(RefusalCode::UnknownMove, message));
        }
        let waits = self.recovering == Recovering::Waits;
        if waits {
            let vm = id.rsplit('/').next().unwrap_or(id);
            let under = Under::new(vm);
            self.state.lock().moves.insert(id.to_owned(), under);
        }
        let (state, id) = (self.state.clone(), id.to_owned());
        std::thread::spawn(move || {
            let phase = if waits {
                state.recovery_end(&id)
            } else {
                Phase::Moved
            };
            let message = match phase {
                Phase::Moved => "it was found at the target and runs there",
                _ => "it was not found",
            };
            let message = message.to_owned();
            events(Happening::Phase { phase, message });
        });
        Ok(())
    }

    fn recoverable(&self) -> Vec<MoveSpec> {
        self.interrupted.clone()
    }

    fn incoming(&self) -> Vec<String> {
        Vec::new()
    }
}

impl State {
    fn lock(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with_move<T>(
        &self,
        id: &str,
        act: impl FnOnce(&mut Under) -> Result<T, Refusal>,
    ) -> Result<T, Refusal> {
        let mut world = self.lock();
        let under = world.moves.get_mut(id).ok_or_else(|| {
            Refusal::new(
                RefusalCode::UnknownMove,
                format!("no move `{id}` is under way"),
            )
        })?;
        let result = act(under);
        self.changed.notify_all();
        result
    }

    /// Runs the script and returns the final phase.
    fn carry_out(&self, spec: &MoveSpec, events: &EventSink) -> (Phase, &'static str) {
        let enter = |phase: Phase| {
            let message = format!("VM `{}`: {phase:?}", spec.vm);
            events(Happening::Phase { phase, message });
        };
        enter(Phase::Preparing);
        enter(Phase::Bulk);
        let Some(script) = self.copy_memory(spec, events) else {
            return (Phase::Stayed, "was cancelled and runs at the source");
        };
        enter(Phase::SwitchOver);
        match script {
            Script::Stays => return (Phase::Stayed, "could not be loaded and runs at the source"),
            Script::NeedsPerson => return (Phase::NeedsPerson, "is stopped at the source"),
            _ => enter(Phase::Loaded),
        }
        if spec.confirm_handover {
            self.lock()
                .moves
                .entry(spec.id.clone())
                .and_modify(|under| under.held = true);
            enter(Phase::Held);
            let waits =
                |world: &World| world.moves[&spec.id].held && !world.moves[&spec.id].cancelled;
            let world = self.wait_while(waits);
            if world.moves[&spec.id].cancelled {
                return (Phase::Stayed, "was cancelled and runs at the source");
            }
        }
        self.lock()
            .moves
            .entry(spec.id.clone())
            .and_modify(|under| under.past_return = true);
        enter(Phase::Released);
        (Phase::Moved, "runs at the target")
    }

    /// Reports progress until the memory is copied; `None` if cancelled.
    fn copy_memory(&self, spec: &MoveSpec, events: &EventSink) -> Option<Script> {
        for step in 1_u64.. {
            let sent = (step * VM_BYTES / 8).min(VM_BYTES);
            let progress = Progress {
                round: 1 + step / 9,
                memory_bytes: VM_BYTES,
                stream_bytes: step * VM_BYTES / 8,
                wire_bytes: step * VM_BYTES / 32,
                remaining_bytes: VM_BYTES - sent,
                wire_bytes_per_s: VM_BYTES / 2,
                stream_bytes_per_s: 2 * VM_BYTES,
                ..Progress::default()
            };
            events(Happening::Progress { progress });
            let world = self.lock();
            let (mut world, _) = self
                .changed
                .wait_timeout(world, Duration::from_millis(10))
                .unwrap_or_else(PoisonError::into_inner);
            let under = world.moves.get_mut(&spec.id)?;
            if under.cancelled {
                return None;
            }
            if under.goes_over {
                return Some(Script::Moves);
            }
            let script = *world.vms.get(&spec.vm)?;
            if step >= 8 && script != Script::NeverConverges {
                return Some(script);
            }
        }
        None
    }

    /// Waits for the end that a test gives a recovery.
    fn recovery_end(&self, id: &str) -> Phase {
        let mut world = self.wait_while(|world| world.recovery_ends.is_empty());
        world.moves.remove(id);
        let end = world.recovery_ends.pop_front();
        end.unwrap_or(Phase::NeedsPerson)
    }

    fn wait_while(&self, waits: impl Fn(&World) -> bool) -> MutexGuard<'_, World> {
        self.changed
            .wait_while(self.lock(), |world| waits(world))
            .unwrap_or_else(PoisonError::into_inner)
    }
}
