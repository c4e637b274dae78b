//! An incoming move: what the target's hand-over machine wants is done here.

mod arrivals;
mod fresh;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use guest::{GuestError, QmpError, RunState, TargetGuest};
use migrate::handover::{FoundQemu, TargetAction, TargetEvent, TargetJournal, TargetMove};
use sys::{Process, ProcessMemory};
use wire::{BackMessage, MoveState, OpenMove};

pub(crate) use arrivals::Arrivals;
use fresh::Fresh;

use crate::journal::{Journal, file_name};
use crate::link::Hold;

use super::entry::Entry;
use super::mapper::{self, Mapper};
use super::pool::Pools;
use super::pressure::Pressure;
use super::promises::Promises;
use super::resume::{Feed, condition};
use super::returns::{ReturnEnd, read_return_path};
use super::session::{GuestMemory, TargetSession, lock};
use super::sink::Sink;

/// How long a QEMU that has said `SHUT 0` may take to leave its loading state.
const LOAD_SETTLE: Duration = Duration::from_secs(10);

/// How long a QEMU whose monitor is gone may take to be gone itself.
const DEATH_PATIENCE: Duration = Duration::from_secs(2);

/// How long the answer about an ended move is kept: a source that lost its link for a weekend
/// still gets it.
const TOMBSTONE_AGE: Duration = Duration::from_secs(7 * 24 * 3600);

/// What an incoming move needs of its agent.
#[derive(Clone)]
pub(crate) struct TargetContext {
    /// Name of this host, for messages.
    pub(crate) host: String,
    pub(crate) run_dir: PathBuf,
    pub(crate) log_dir: PathBuf,
    pub(crate) journal: Journal,
    pub(crate) hold: Hold,
    pub(crate) store_bytes: usize,
    /// What VMs of this host share.
    pub(crate) pools: Arc<Pools>,
    /// Whether memory is scarce here.
    pub(crate) pressure: Arc<Pressure>,
    /// The library that maps it, if not where it is expected.
    pub(crate) cow_library: Option<PathBuf>,
}

/// What the source is told of a target QEMU that waits for it.
pub(crate) struct Opened {
    /// Its process.
    pub(crate) pid: u32,
    /// What a person should know.
    pub(crate) note: Option<String>,
    /// It has a second channel in post-copy.
    pub(crate) preempts: bool,
}

/// One incoming move.
pub(crate) struct Incoming {
    pub(super) entry: Mutex<Entry>,
    /// Let go with the VM, once it has all memory: its monitor belongs to whoever manages it then.
    pub(super) guest: Mutex<Option<Arc<TargetGuest>>>,
    /// Held while an action is under way: events wait for each other.
    machine: Mutex<TargetMove>,
    pub(super) context: TargetContext,
    /// Let go when the session is over, with what it remembers.
    pub(super) session: Mutex<Option<(Arc<TargetSession>, u16)>>,
    pub(super) feed: Mutex<Feed>,
    /// Held while the QEMU is made ready to go on.
    pub(super) resuming: Mutex<()>,
    clock: Instant,
}

impl Incoming {
    fn start(
        session: &Arc<TargetSession>,
        request: &OpenMove,
        context: &TargetContext,
        clock: Instant,
    ) -> anyhow::Result<(Arc<Self>, Opened)> {
        let (fresh, mut entry, mapper) = Fresh::start(request, &session.key, context)?;
        let (mapper, note) = match mapper.transpose() {
            Ok(mapper) => (mapper, None),
            Err(why) => (None, Some(format!("its pages are not shared there: {why}"))),
        };
        if let Some(note) = &note {
            tracing::warn!(vm = request.vm_name, note);
        }
        // Pages that are mapped are announced on one channel, one after the other.
        let wants_preempt = request.preempt && request.postcopy && !request.share;
        entry.preempts = wants_preempt && fresh.guest.can_preempt()?;
        let opened = Opened {
            pid: entry.process.pid,
            note,
            preempts: entry.preempts,
        };
        let incoming = Arc::new(Self {
            entry: Mutex::new(entry),
            guest: Mutex::new(Some(fresh.take())),
            machine: Mutex::default(),
            context: context.clone(),
            session: Mutex::new(Some((Arc::clone(session), request.vm))),
            feed: Mutex::default(),
            resuming: Mutex::default(),
            clock,
        });
        let fed = incoming
            .write_journal(TargetJournal::Loading)
            .and_then(|()| incoming.feed(session, (request.vm, request.postcopy), mapper));
        if let Err(error) = fed {
            incoming.handle(TargetEvent::Failed(format!("{error:#}")));
            return Err(error);
        }
        Ok((incoming, opened))
    }

    /// Takes up what the journal says, and what is there of it.
    fn found(entry: Entry, context: &TargetContext, clock: Instant) -> Arc<Self> {
        let state = entry.state.clone();
        // One that has arrived is somebody else's, its monitor too, if that was given up.
        let is_ours = state != TargetJournal::Runs || entry.monitor.is_some();
        let guest = (is_ours && entry.process.is_alive()).then(|| entry.reach());
        let (guest, found) = match guest {
            None => (None, FoundQemu::Gone),
            Some(Ok(guest)) => {
                let found = condition(&guest, &state);
                (Some(guest), found)
            }
            Some(Err(error)) => {
                // The journal decides, and a person is told.
                tracing::error!(
                    vm = entry.vm_name,
                    pid = entry.process.pid,
                    "cannot reach a QEMU that this agent started: {error:#}"
                );
                (None, FoundQemu::Unreachable)
            }
        };
        let machine = Mutex::default();
        let incoming = Arc::new(Self {
            entry: Mutex::new(entry),
            guest: Mutex::new(guest.map(Arc::new)),
            machine,
            context: context.clone(),
            session: Mutex::new(None),
            feed: Mutex::default(),
            resuming: Mutex::default(),
            clock,
        });
        incoming.handle(TargetEvent::Restarted(state, found));
        incoming
    }

    /// Has QEMU listen, connects to it, and starts the threads that feed and hear it.
    fn feed(
        self: &Arc<Self>,
        session: &Arc<TargetSession>,
        (vm, postcopy): (u16, bool),
        mapper: Option<Mapper>,
    ) -> anyhow::Result<()> {
        let guest = self.guest()?;
        let name = file_name(&lock(&self.entry).id);
        // Paths of unix sockets are short; the process id makes it unique on this host.
        let path = self.context.run_dir.join(format!("i-{}.sock", guest.pid()));
        let preempts = lock(&self.entry).preempts;
        guest
            .listen(&path, postcopy, preempts)
            .context("having the target QEMU listen")?;
        if postcopy {
            let kept = guest.keep_monitor().context("keeping its monitor")?;
            lock(&self.entry).monitor = Some(kept);
            self.write_journal(TargetJournal::Loading)?;
        }
        let connect = || {
            let socket = UnixStream::connect(&path);
            socket.with_context(|| format!("connecting to the target QEMU of {name}"))
        };
        let socket = connect()?;
        // QEMU tells its channels apart by their order, and 7.2 reads nothing before it has both.
        let second = preempts.then(connect).transpose()?;
        let _ = std::fs::remove_file(&path);
        let blocks = guest.ram_blocks()?;
        let lengths = blocks.iter();
        let lengths = lengths.map(|block| (block.name.clone(), block.used_len.pages()));
        let lengths = lengths.collect();
        let addresses: HashMap<String, _> = blocks
            .into_iter()
            .filter_map(|block| Some((block.name, block.hva?)))
            .collect();
        let pid = guest.pid();
        let find = Box::new(move |names: &[String]| {
            let memory = ProcessMemory::open(pid).ok()?;
            let bases = names
                .iter()
                .map(|name| addresses.get(name).copied())
                .collect();
            Some(GuestMemory::new(memory, bases))
        });
        let (mut sink, handle) = Sink::new(
            session,
            vm,
            socket.try_clone()?,
            (find, mapper),
            &self.context.pressure,
        );
        sink.only_for(lengths);
        session.add_sink(vm, handle);
        let returns = sink.returns();
        let mut sockets = vec![socket.try_clone()?];
        if let Some(second) = second {
            sockets.push(second.try_clone()?);
            sink.preempt_on(second);
        }
        let number = self.begin_feed(sockets);
        let switched = Arc::clone(self);
        sink.when_switched(Box::new(move || switched.watch_switch(number)));
        let incoming = Arc::clone(self);
        std::thread::Builder::new()
            .name("gw-sink".into())
            .spawn(move || {
                if let Err(error) = sink.run() {
                    incoming.fail(number, &error.to_string());
                }
            })?;
        let (incoming, session) = (Arc::clone(self), Arc::clone(session));
        std::thread::Builder::new()
            .name("gw-return".into())
            .spawn(move || {
                let end = read_return_path(socket, &session, vm, &returns);
                if let Some(times) = returns.fault_times() {
                    session.say(vm, BackMessage::Faults(times));
                }
                incoming.returned(number, &end);
            })?;
        Ok(())
    }

    /// Waits, in a thread of its own, for the target QEMU to have loaded the device state of a switch to
    /// post-copy; it stands stopped then, and could run.
    fn watch_switch(self: Arc<Self>, number: u64) {
        let watch = move || match self.settled() {
            Ok(()) => {
                self.context.hold.at("target-switched", &self.vm_name());
                self.handle(TargetEvent::SwitchReported);
                if self.answer() == MoveState::Loaded
                    && let Some((session, vm)) = self.session()
                {
                    session.say(vm, BackMessage::Switched);
                }
            }
            Err(error) => self.fail(number, &format!("{error:#}")),
        };
        let spawned = std::thread::Builder::new()
            .name("gw-switch".into())
            .spawn(watch);
        if let Err(error) = spawned {
            tracing::error!(%error, "no thread to watch over a switch; the move will time out");
        }
    }

    /// The return path of a target QEMU has ended that this feed had.
    pub(super) fn returned(&self, number: u64, end: &ReturnEnd) {
        let failure = match end {
            ReturnEnd::Shut(0) => match self.settled() {
                Ok(()) => {
                    self.context.hold.at("target-loaded", &self.vm_name());
                    self.handle(TargetEvent::LoadReported);
                    self.say_loaded();
                    return;
                }
                Err(error) => format!("{error:#}"),
            },
            ReturnEnd::Shut(status) => {
                format!("the target QEMU could not load it (status {status}; see its log)")
            }
            ReturnEnd::Closed => "the target QEMU closed its stream (see its log)".into(),
            ReturnEnd::Broken(what) => format!("the target QEMU's return path is broken: {what}"),
        };
        self.fail(number, &failure);
    }

    /// Says what a load that succeeded has come to: it may not count, if it could not be written down.
    fn say_loaded(&self) {
        let Some((session, vm)) = self.session() else {
            return;
        };
        match self.answer() {
            MoveState::Loaded | MoveState::Running => session.say(vm, BackMessage::Loaded),
            MoveState::NeverRan { reason } => session.say(vm, BackMessage::LoadFailed(reason)),
            _ => {}
        }
    }

    /// The move fails, and the source hears why; unless it has another feed by now.
    pub(super) fn fail(&self, number: u64, reason: &str) {
        if !self.is_fed_by(number) {
            return;
        }
        self.handle(TargetEvent::Failed(reason.to_owned()));
        match self.answer() {
            MoveState::NeverRan { reason } => {
                if let Some((session, vm)) = self.session() {
                    session.say(vm, BackMessage::LoadFailed(reason));
                }
            }
            MoveState::Following => self.does_not_follow(reason),
            _ => {}
        }
    }

    /// Waits until QEMU stands loaded and stopped.
    fn settled(&self) -> anyhow::Result<()> {
        // One that was let go in post-copy has been here before, and need not be ours any more.
        let Ok(guest) = self.guest() else {
            return Ok(());
        };
        let deadline = Instant::now() + LOAD_SETTLE;
        loop {
            match guest.run_state()? {
                RunState::InMigrate if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(1))
                }
                RunState::InMigrate => {
                    return Err(anyhow!(
                        "the target QEMU says it has loaded, and goes on loading"
                    ));
                }
                _ => return Ok(()),
            }
        }
    }

    pub(super) fn handle(&self, event: TargetEvent) {
        let mut machine = lock(&self.machine);
        let mut events = vec![event];
        while let Some(event) = events.pop() {
            tracing::trace!(vm = self.vm_name(), ?event, state = ?machine.state(), "target");
            for action in machine.handle(event) {
                tracing::info!(vm = self.vm_name(), ?action, "target");
                let answer = self.act(action);
                let is_unwritten = matches!(answer, Some(TargetEvent::JournalFailed(_)));
                events.extend(answer);
                // What comes after it relies on it.
                if is_unwritten {
                    break;
                }
            }
        }
        if machine.answer().is_some_and(|answer| is_over(&answer)) {
            self.give_up_monitor();
            self.forget_feed();
        }
    }

    /// The monitor is somebody else's from now on.
    fn give_up_monitor(&self) {
        let guest = lock(&self.guest).take();
        let was_kept = lock(&self.entry).monitor.take().is_some();
        let Some(guest) = guest.filter(|_| was_kept) else {
            return;
        };
        // One that was killed needs no order.
        let left = guest.end_postcopy().and_then(|()| guest.release_monitor());
        if let Err(error) = left
            && guest.process().is_alive()
        {
            tracing::warn!(
                vm = self.vm_name(),
                "its QEMU keeps settings of its move: {error}"
            );
        }
        // Its number must not be looked for among the QEMU's later sockets.
        let entry = lock(&self.entry);
        if let Err(error) = self.context.journal.write(&entry.id, &*entry) {
            tracing::warn!(vm = entry.vm_name, %error, "the journal names a monitor that is given up");
        }
    }

    fn act(&self, action: TargetAction) -> Option<TargetEvent> {
        match action {
            TargetAction::Journal(state) => {
                let error = self.write_journal(state).err()?;
                tracing::error!(vm = self.vm_name(), "{error:#}");
                Some(TargetEvent::JournalFailed(format!("{error:#}")))
            }
            TargetAction::Continue => Some(self.let_go()),
            TargetAction::Kill => {
                if let Err(error) = self.kill() {
                    tracing::error!(
                        vm = self.vm_name(),
                        "the target QEMU cannot be killed; it is stopped: {error:#}"
                    );
                }
                if let Some((session, vm)) = self.session() {
                    session.remove_sink(vm);
                }
                None
            }
        }
    }

    fn kill(&self) -> anyhow::Result<()> {
        if let Ok(guest) = self.guest() {
            return Ok(guest.kill()?);
        }
        let entry = lock(&self.entry).clone();
        if entry.process.is_alive() {
            let process = Process::open(entry.process.pid)?;
            process.kill()?;
            process.wait_gone(LOAD_SETTLE)?;
        }
        Ok(())
    }

    fn let_go(&self) -> TargetEvent {
        let Entry {
            process, resume, ..
        } = lock(&self.entry).clone();
        let ended = || TargetEvent::GoneBefore("its QEMU ended before it was let go".into());
        let guest = match self.guest_again() {
            Ok(guest) => guest,
            Err(error) if process.is_alive() => return self.unreached(&format!("{error:#}")),
            Err(_) => return ended(),
        };
        if !resume {
            return TargetEvent::Continued;
        }
        match guest.run_state() {
            // It was told before.
            Ok(RunState::Running) => return TargetEvent::Continued,
            Ok(_) => {}
            // A QEMU that is gone before it is told has never run, and the source may know so.
            Err(_) if guest.process().wait_gone(DEATH_PATIENCE).unwrap_or(false) => {
                return ended();
            }
            Err(error) => return self.unanswered(&error),
        }
        match guest.cont() {
            Ok(()) => TargetEvent::Continued,
            Err(error) if guest.process().is_alive() => match guest.run_state() {
                Ok(RunState::Running) => TargetEvent::Continued,
                Ok(_) => TargetEvent::ContinueRefused(error.to_string()),
                // It lives and does not answer: it may run. Nobody else may.
                Err(error) => self.unanswered(&error),
            },
            Err(error) => TargetEvent::QemuGone(error.to_string()),
        }
    }

    /// What was asked of its monitor, which was reached, got no answer.
    fn unanswered(&self, error: &GuestError) -> TargetEvent {
        if let GuestError::Qmp(QmpError::Closed { .. }) = error {
            // The next try connects anew.
            *lock(&self.guest) = None;
        }
        self.unreached(&error.to_string())
    }

    fn unreached(&self, reason: &str) -> TargetEvent {
        tracing::error!(
            vm = self.vm_name(),
            "whether it runs here is not known, and is asked again: {reason}"
        );
        TargetEvent::Unreached(reason.to_owned())
    }

    pub(super) fn session(&self) -> Option<(Arc<TargetSession>, u16)> {
        lock(&self.session).clone()
    }

    fn guest(&self) -> anyhow::Result<Arc<TargetGuest>> {
        lock(&self.guest).clone().ok_or_else(|| anyhow!("no QEMU"))
    }

    fn write_journal(&self, state: TargetJournal) -> anyhow::Result<()> {
        let mut entry = lock(&self.entry);
        entry.state = state;
        self.context
            .journal
            .write(&entry.id, &*entry)
            .context("writing the journal")
    }

    pub(super) fn vm_name(&self) -> String {
        lock(&self.entry).vm_name.clone()
    }

    /// The state for the source; waits for an action under way.
    pub(super) fn answer(&self) -> MoveState {
        lock(&self.machine).answer().unwrap_or(MoveState::Loaded)
    }

    fn is_ended(&self) -> bool {
        is_over(&self.answer())
    }
}

/// Whether nothing more comes for the move.
fn is_over(answer: &MoveState) -> bool {
    !matches!(
        answer,
        MoveState::Loading | MoveState::Loaded | MoveState::Following
    )
}

impl std::fmt::Debug for Incoming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Incoming({}, up {:?})",
            self.vm_name(),
            self.clock.elapsed()
        )
    }
}
