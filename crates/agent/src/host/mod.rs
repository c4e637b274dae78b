//! The data path of one host behind the control API.

mod asked;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context;
use guest::{HostMemory, QmpError, SourceGuest};
use page::ByteLen;

use crate::api::mover::{Admission, Bandwidth, EventSink, MoveCheck, Mover, Refusal, RefusalCode};
use crate::api::preparer::Preparer;
use crate::config::{Config, Ksm};
use crate::index_host::IndexHost;
use crate::journal::Journal;
use crate::link::{Bucket, Hold, Security, Terms};
use crate::prepare::{OverLinks, Preparations};
use crate::source::{
    Entry, IndexLinks, Input, MoveContext, MoveRun, SessionContext, Sessions, guest_memory,
    shares_memory,
};
use crate::target::{self, Arrivals, KsmBoost, Pools, Pressure, RackStores, TargetContext};
use crate::tls::Tls;
use crate::types::{
    Happening, HostVm, Inventory, Mode, MoveSpec, Phase, PrepareSpec, PrepareStatus, ResolveSpec,
    Sharing,
};

/// What a target QEMU takes besides its guest's memory: the process itself, and what a guest
/// of 2 vCPUs with usual devices was seen to take.
const QEMU_OVERHEAD_BYTES: u64 = 64 << 20;

/// What a VM that shares takes here beyond what it takes at its source: page tables, which the kernel
/// does not count there, and pages whose sharing a write breaks during the move.
const SHARING_MARGIN_BYTES: u64 = 16 << 20;

/// Moves whose source or target is this host.
pub(crate) struct HostMover {
    /// Locked for as long as the agent lives: two agents must not take up one journal.
    _lock: std::fs::File,
    /// Puts KSM's settings back when it goes.
    _ksm: Option<Arc<KsmBoost>>,
    context: MoveContext,
    /// Where moves arrive.
    bulk: std::net::SocketAddr,
    arrivals: Arc<Arrivals>,
    preparations: Arc<Preparations>,
    moves: Arc<Mutex<HashMap<String, Known>>>,
    /// One limit for each group's moves from here.
    budgets: Mutex<HashMap<String, Arc<Bucket>>>,
}

/// An outgoing move.
struct Known {
    spec: MoveSpec,
    run: MoveRun,
    phase: Phase,
}

impl HostMover {
    /// Opens the journals, takes up what was left, and listens for moves.
    pub(crate) fn start(config: &Config, tls: Option<&Tls>) -> anyhow::Result<Self> {
        let security = Security::of(tls);
        let peer_timeout = config.peer_timeout();
        let hold = Hold(config.hold_dir.clone());
        let log_dir = config.state_dir.join("log");
        std::fs::create_dir_all(&log_dir)
            .with_context(|| format!("creating {}", log_dir.display()))?;
        std::fs::create_dir_all(&config.run_dir)
            .with_context(|| format!("creating {}", config.run_dir.display()))?;
        let lock = claim(&config.state_dir)?;
        crate::source::remove_leftovers(&config.run_dir)
            .with_context(|| format!("clearing {}", config.run_dir.display()))?;
        let journal =
            |role| Journal::open(config.state_dir.join(role)).context("opening the journal");
        target::restore_leftover(&config.state_dir);
        let pressure = Pressure::start().context("watching this host's memory")?;
        let boost = (config.ksm == Ksm::Boost)
            .then(|| KsmBoost::start(&config.state_dir, &pressure))
            .transpose()
            .context("driving KSM")?;
        let arrivals = Arrivals::start(TargetContext {
            host: config.name.clone(),
            run_dir: config.run_dir.clone(),
            log_dir,
            journal: journal("incoming")?,
            hold: hold.clone(),
            store_bytes: usize::try_from(config.store_bytes)?,
            pools: Pools::start(ByteLen(config.pool_bytes_max))
                .context("starting the pools of shared pages")?,
            pressure,
            cow_library: config.cow_library.clone(),
        })?;
        let racks = Arc::<RackStores>::default();
        target::listen(
            config.bulk,
            Arc::clone(&arrivals),
            Arc::clone(&racks),
            IndexHost::start(0, index::MAX_ENTRIES)?,
            Terms {
                security: security.clone(),
                peer_timeout,
            },
        )?;
        let session = SessionContext {
            host: config.name.clone(),
            security,
            peer_timeout,
            hold,
            connections_max: usize::try_from(config.session_connections_max)?,
            budget: Arc::default(),
        };
        let window_log = u8::try_from(config.compression_window_bytes.ilog2())?;
        let indexes = Arc::<IndexLinks>::default();
        let index = Arc::new(OverLinks {
            links: Arc::clone(&indexes),
            session: session.clone(),
        });
        let preparations = Preparations::new(&config.name, window_log, Some(index));
        let preparations = Arc::new(preparations.with_stores(racks));
        let context = MoveContext {
            sessions: Arc::new(Sessions::default()),
            indexes: Arc::clone(&indexes),
            preparations: Arc::clone(&preparations),
            session,
            journal: journal("outgoing")?,
            run_dir: config.run_dir.clone(),
            window_log,
            window_bytes: config.window_bytes_max,
            stall_limit: Duration::from_secs(config.switchover_stall_limit_s),
            recovery_limit: Duration::from_secs(config.recovery_limit_s),
        };
        Ok(Self {
            _lock: lock,
            _ksm: boost,
            context,
            bulk: config.bulk,
            arrivals,
            preparations,
            moves: Arc::default(),
            budgets: Mutex::default(),
        })
    }

    /// The context of a move, with its group's budget.
    fn context_of(&self, spec: &MoveSpec) -> MoveContext {
        let mut budgets = lock(&self.budgets);
        budgets.retain(|_, budget| Arc::strong_count(budget) > 1);
        let budget = Arc::clone(budgets.entry(spec.group.clone()).or_default());
        budget.set_rate(spec.group_bandwidth_bytes_per_s);
        let mut context = self.context.clone();
        context.session.budget = budget;
        context
    }

    /// Keeps the phase of a move beside passing its events on.
    fn sink(&self, id: &str, events: EventSink) -> EventSink {
        let (moves, id) = (Arc::clone(&self.moves), id.to_owned());
        Box::new(move |happening| {
            if let Happening::Phase { phase, .. } = &happening
                && let Some(known) = lock(&moves).get_mut(&id)
            {
                known.phase = *phase;
            }
            events(happening);
        })
    }

    fn known<T>(
        &self,
        id: &str,
        use_it: impl FnOnce(&Known) -> Result<T, Refusal>,
    ) -> Result<T, Refusal> {
        let moves = lock(&self.moves);
        let known = moves.get(id).ok_or_else(|| {
            Refusal::new(
                RefusalCode::UnknownMove,
                format!("no move {id} goes out from this host"),
            )
        })?;
        use_it(known)
    }

    /// Starts a mover's thread for `spec`, unless its VM is moving already. The table is locked
    /// meanwhile, so that the thread's first events find their move.
    fn begin(
        &self,
        spec: MoveSpec,
        events: EventSink,
        run: impl FnOnce(MoveContext, EventSink) -> std::io::Result<MoveRun>,
    ) -> Result<(), Refusal> {
        let id = spec.id.clone();
        let context = self.context_of(&spec);
        let events = self.sink(&id, events);
        let mut moves = lock(&self.moves);
        if let Some(busy) = busy(&moves, &spec) {
            return Err(busy);
        }
        // The API keeps the history; here only moves under way are of use.
        moves.retain(|_, known| !known.phase.is_final());
        let run = run(context, events).map_err(|e| internal(&e))?;
        let phase = Phase::Queued;
        moves.insert(id, Known { spec, run, phase });
        Ok(())
    }
}

/// Memory that a VM needs here. One that shares is expected to take what it takes at its source: a
/// host that is overcommitted there may be so here.
fn needed_for(vm: &MoveCheck, can_share: bool) -> u64 {
    let private = vm.memory_bytes.saturating_add(QEMU_OVERHEAD_BYTES);
    match vm.shared_bytes {
        Some(shared) if can_share => private.min(shared.saturating_add(SHARING_MARGIN_BYTES)),
        _ => private,
    }
}

fn busy(moves: &HashMap<String, Known>, spec: &MoveSpec) -> Option<Refusal> {
    let same = moves
        .values()
        .find(|m| m.spec.vm == spec.vm && !m.phase.is_final())?;
    Some(Refusal::of_vm(
        RefusalCode::Busy,
        &spec.vm,
        format!(
            "{} is moving already, as {}; wait for that move or cancel it",
            spec.vm, same.spec.id
        ),
    ))
}

impl Preparer for HostMover {
    fn prepare(&self, spec: PrepareSpec) -> Result<(), Refusal> {
        self.preparations.start(spec)
    }

    fn resolve_preparation(&self, group: &str, spec: ResolveSpec) -> Result<(), Refusal> {
        self.preparations.resolve(group, spec)
    }

    fn preparation(&self, group: &str) -> Result<PrepareStatus, Refusal> {
        self.preparations.status(group)
    }

    fn end_preparation(&self, group: &str) -> Result<(), Refusal> {
        self.preparations.end(group)
    }
}

impl Mover for HostMover {
    fn check(&self, spec: &MoveSpec) -> Result<MoveCheck, Refusal> {
        if let Some(busy) = busy(&lock(&self.moves), spec) {
            return Err(busy);
        }
        let refuse = |error: &guest::GuestError| {
            Refusal::of_vm(
                code_of(error),
                &spec.vm,
                format!("{} was not touched: {}", spec.vm, chain(error)),
            )
        };
        let (guest, _events) = SourceGuest::attach(&spec.qmp).map_err(|e| refuse(&e))?;
        asked::refuse_other_vm(spec, &guest)?;
        guest.check().map_err(|e| refuse(&e))?;
        let argv = spec.definition.as_deref().unwrap_or(guest.argv());
        let (major, minor, micro) = guest.version();
        let shares = || guest_memory(&guest).is_ok_and(|memory| shares_memory(&memory));
        let held = match spec.settings.sharing {
            // What more is found to be the same comes on top; it is not known yet.
            Sharing::Preserve | Sharing::Identical if shares() => guest.held_memory(),
            Sharing::Preserve | Sharing::Identical | Sharing::Off => None,
        };
        Ok(MoveCheck {
            vm: spec.vm.clone(),
            memory_bytes: guest.memory_bytes().0,
            shared_bytes: held.map(|held| held.shared.0),
            expanded_bytes: held.map(|held| held.whole.0),
            program: PathBuf::from(argv.first().cloned().unwrap_or_default()),
            machine: machine_of(argv).unwrap_or_default(),
            qemu_version: format!("{major}.{minor}.{micro}"),
        })
    }

    fn start(&self, spec: MoveSpec, events: EventSink) -> Result<(), Refusal> {
        let its = spec.clone();
        self.begin(spec, events, |context, events| {
            MoveRun::start(context, its, events)
        })
    }

    fn cancel(&self, id: &str) -> Result<(), Refusal> {
        self.known(id, |known| {
            if known.phase >= Phase::Released {
                let message = format!(
                    "{} has been let go at the target; it cannot be cancelled any more",
                    known.spec.vm
                );
                return Err(Refusal::of_vm(
                    RefusalCode::TooLate,
                    &known.spec.vm,
                    message,
                ));
            }
            known.run.tell(Input::Cancel);
            Ok(())
        })
    }

    fn resume_held(&self, id: &str) -> Result<(), Refusal> {
        self.known(id, |known| {
            if known.phase != Phase::Held {
                let message = format!("{} does not wait to be continued", known.spec.vm);
                return Err(Refusal::of_vm(
                    RefusalCode::NotHeld,
                    &known.spec.vm,
                    message,
                ));
            }
            known.run.tell(Input::Confirmed);
            Ok(())
        })
    }

    fn go_over(&self, id: &str) -> Result<(), Refusal> {
        self.known(id, |known| {
            let vm = &known.spec.vm;
            let (code, why) = match known.spec.settings.mode {
                Mode::Hybrid if known.phase < Phase::SwitchOver => {
                    known.run.tell(Input::GoOver);
                    return Ok(());
                }
                Mode::Hybrid => (
                    RefusalCode::TooLate,
                    "has been stopped for its switch-over already",
                ),
                Mode::PostCopy => (
                    RefusalCode::NotHybrid,
                    "moves in mode `post-copy`: it goes over by itself",
                ),
                Mode::PreCopy => (
                    RefusalCode::NotHybrid,
                    "moves in mode `pre-copy`, whose QEMUs are not ready for post-copy: cancel it and migrate \
                     it with `--mode hybrid`",
                ),
            };
            Err(Refusal::of_vm(code, vm, format!("{vm} {why}")))
        })
    }

    fn set_bandwidth(&self, id: &str, limits: Bandwidth) -> Result<(), Refusal> {
        self.known(id, |known| {
            if let Some(budget) = lock(&self.budgets).get(&known.spec.group) {
                budget.set_rate(limits.group_bytes_per_s);
            }
            known.run.tell(Input::Limit(limits.move_bytes_per_s));
            Ok(())
        })
    }

    fn admit(&self, request: &Admission) -> Result<(), Refusal> {
        for vm in &request.vms {
            if !is_program(&vm.program) {
                let message = format!(
                    "{} needs {} here, which is not installed; it runs at its source as before",
                    vm.vm,
                    vm.program.display()
                );
                return Err(Refusal::of_vm(RefusalCode::NoQemu, &vm.vm, message));
            }
        }
        asked::refuse_unknown_machines(&request.vms, &self.context.session.host)?;
        // Last: only a group that is admitted is promised anything.
        let can_share = self.arrivals.can_share();
        let needed = |vm: &MoveCheck| needed_for(vm, can_share);
        let vms = request.vms.iter().map(|vm| (vm.vm.clone(), needed(vm)));
        let available = HostMemory::now().for_guests().0;
        let promised = self.arrivals.promise(&request.group, vms, available);
        promised.map_err(|left| {
            let names: Vec<&str> = request.vms.iter().map(|vm| vm.vm.as_str()).collect();
            let needed = request.vms.iter().map(needed).fold(0, u64::saturating_add);
            let without = request.vms.iter().filter_map(|vm| vm.expanded_bytes);
            let without = match without.fold(0, u64::saturating_add) {
                0 => String::new(),
                _ if !can_share => ", because nothing can be shared here".to_owned(),
                whole => format!(" ({} if what they share were not shared here)", ByteLen(whole)),
            };
            let message = format!(
                "{} need {} here{without}, of which {} are free beside what is promised or arriving; they run at their sources as before. Free memory here or move fewer",
                names.join(", "),
                ByteLen(needed),
                ByteLen(left),
            );
            Refusal::new(RefusalCode::NoMemory, message)
        })
    }

    fn inventory(&self) -> Result<Inventory, Refusal> {
        let vm = |vm: guest::FoundVm| HostVm {
            vm: vm.name,
            pid: vm.pid,
            qmp: vm.qmp,
            memory_bytes: vm.memory.0,
        };
        Ok(Inventory {
            name: self.context.session.host.clone(),
            bulk: self.bulk.to_string(),
            free_bytes: HostMemory::now().for_guests().0,
            vms: guest::running_vms().into_iter().map(vm).collect(),
        })
    }

    fn recover(&self, id: &str, events: EventSink) -> Result<(), Refusal> {
        let Some(entry) = self.context.journal.read::<Entry>(id) else {
            return Err(Refusal::new(
                RefusalCode::UnknownMove,
                format!("no interrupted move {id} in the journal here"),
            ));
        };
        self.begin(entry.spec.clone(), events, |context, events| {
            MoveRun::recover(context, entry, events)
        })
    }

    fn recoverable(&self) -> Vec<MoveSpec> {
        self.context
            .journal
            .all::<Entry>()
            .into_iter()
            .map(|entry| entry.spec)
            .collect()
    }

    fn incoming(&self) -> Vec<String> {
        self.arrivals.under_way()
    }
}

/// Sees that no other agent has this state directory.
fn claim(state_dir: &std::path::Path) -> anyhow::Result<std::fs::File> {
    let path = state_dir.join("lock");
    let file =
        std::fs::File::create(&path).with_context(|| format!("creating {}", path.display()))?;
    rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).with_context(
        || {
            format!(
                "another agent runs with the state directory {}",
                state_dir.display()
            )
        },
    )?;
    Ok(file)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn internal(error: &std::io::Error) -> Refusal {
    Refusal::new(
        RefusalCode::Internal,
        format!("no thread for the move: {error}"),
    )
}

fn code_of(error: &guest::GuestError) -> RefusalCode {
    match error {
        guest::GuestError::Qmp(QmpError::Busy { .. })
        | guest::GuestError::MigrationActive { .. } => RefusalCode::Busy,
        guest::GuestError::Qmp(QmpError::Connect { source, .. })
            if source.kind() == std::io::ErrorKind::PermissionDenied =>
        {
            RefusalCode::Forbidden
        }
        guest::GuestError::Qmp(QmpError::Connect { .. }) => RefusalCode::UnknownVm,
        _ => RefusalCode::CannotMigrate,
    }
}

pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// The machine type that a command line names.
fn machine_of(argv: &[String]) -> Option<String> {
    let at = argv
        .iter()
        .position(|a| a == "-machine" || a == "-M" || a == "--machine")?;
    let value = argv.get(at + 1)?;
    let first = value.split(',').next()?;
    Some(first.strip_prefix("type=").unwrap_or(first).to_owned())
}

/// Whether a program can be started here by this name.
fn is_program(program: &std::path::Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    let runs = |path: &std::path::Path| {
        std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
    };
    if program.components().count() > 1 {
        return runs(program);
    }
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| runs(&dir.join(program))))
}

#[cfg(test)]
mod tests;
