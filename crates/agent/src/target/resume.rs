//! A VM that was let go in post-copy, and whose memory was interrupted on its way.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use anyhow::{Context, anyhow};
use guest::{GuestError, MigrationStatus, QmpError, Recovery, RunState, TargetGuest};
use migrate::handover::{FoundQemu, TargetEvent, TargetJournal};
use wire::{BackMessage, MoveState};

use super::incoming::Incoming;
use super::relay::{self, Relay};
use super::returns::{Returns, read_return_path};
use super::session::{TargetSession, lock};
use super::sink::{SinkError, SinkHandle};

/// Answer to a source that wants to go on.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Resumption {
    /// QEMU waits for the rest of its stream, over the session that was asked for.
    Ready {
        /// Its process.
        pid: u32,
    },
    /// There is nothing to go on with.
    Not(MoveState),
}

/// What feeds a move's QEMU.
#[derive(Default)]
pub(super) struct Feed {
    /// Which of them: what an earlier one comes to does not count any more.
    number: u64,
    /// Its ways into QEMU: the first channel, and the second, if there is one.
    sockets: Vec<UnixStream>,
}

impl Incoming {
    /// QEMU is fed over these sockets from now on; returns the number of the feed.
    pub(super) fn begin_feed(&self, sockets: Vec<UnixStream>) -> u64 {
        let mut feed = lock(&self.feed);
        feed.number += 1;
        feed.sockets = sockets;
        feed.number
    }

    /// Nothing more goes into its QEMU: whoever still writes there has a descriptor of their own.
    pub(super) fn forget_feed(&self) {
        lock(&self.feed).sockets.clear();
    }

    /// Whether this feed is the newest.
    pub(super) fn is_fed_by(&self, number: u64) -> bool {
        lock(&self.feed).number == number
    }

    /// Closes the way into a QEMU whose memory does not follow any more, so that it pauses its migration.
    /// The VM runs on until it needs a page that is missing.
    pub(super) fn interrupt(&self) {
        let mut feed = lock(&self.feed);
        feed.number += 1;
        for socket in feed.sockets.drain(..) {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Has QEMU wait for the rest of its stream, which comes as VM `vm` of `session`. What was on its way over
    /// an earlier session does not reach it any more.
    pub(super) fn resume(
        self: &Arc<Self>,
        session: &Arc<TargetSession>,
        vm: u16,
    ) -> anyhow::Result<Resumption> {
        let _one_at_a_time = lock(&self.resuming);
        if session.is_over() {
            // Asked for long ago: another try may be under way, or have succeeded.
            return Err(anyhow!("the session has ended"));
        }
        if self.answer() != MoveState::Following {
            return Ok(Resumption::Not(self.answer()));
        }
        if !lock(&self.entry).process.is_alive() {
            let reason = "its QEMU there ended before all of its memory had followed it";
            self.handle(TargetEvent::QemuGone(reason.into()));
            return Ok(Resumption::Not(self.answer()));
        }
        self.interrupt();
        if let Some((earlier, vm)) = lock(&self.session).take() {
            earlier.remove_sink(vm);
        }
        let guest = self.guest_again()?;
        let path = self
            .context
            .run_dir
            .join(format!("r-{}-{}.sock", guest.pid(), session.number));
        let recovered = guest.recover(&path);
        if let Err(GuestError::Qmp(QmpError::Closed { .. })) = &recovered {
            // The next try connects anew.
            *lock(&self.guest) = None;
        }
        match recovered.context("having the target QEMU wait")? {
            Recovery::Waits => {}
            Recovery::Complete => {
                self.handle(TargetEvent::LoadReported);
                return Ok(Resumption::Not(self.answer()));
            }
        }
        let (handle, frames, urgent, queued) = SinkHandle::new();
        let preempts = lock(&self.entry).preempts;
        *lock(&self.session) = Some((Arc::clone(session), vm));
        session.add_sink(vm, handle);
        let number = self.begin_feed(Vec::new());
        let relay = Relay {
            frames,
            queued: Arc::clone(&queued),
            session: Arc::clone(session),
            vm,
        };
        let (incoming, session_too) = (Arc::clone(self), Arc::clone(session));
        std::thread::Builder::new()
            .name("gw-relay".into())
            .spawn(move || {
                let connect = || {
                    // The QEMU takes the first who connects for its stream: it waits for a newer feed then.
                    if !incoming.is_fed_by(number) {
                        return Err(SinkError::Unexpected);
                    }
                    let socket = UnixStream::connect(&path);
                    // Behind the first: QEMU tells them apart by their order.
                    let second = preempts.then(|| UnixStream::connect(&path)).transpose();
                    let _ = std::fs::remove_file(&path);
                    let (socket, second) = (socket?, second?);
                    if let Some(second) = &second {
                        relay::pass_on(urgent, queued, second.try_clone()?)?;
                    }
                    incoming.hear((socket, second), &session_too, (vm, number))
                };
                if let Err(error) = relay.run(connect) {
                    incoming.fail(number, &error.to_string());
                }
                let _ = std::fs::remove_file(&path);
            })?;
        tracing::info!(
            vm = self.vm_name(),
            "its QEMU waits for the rest of its memory"
        );
        let pid = guest.pid();
        Ok(Resumption::Ready { pid })
    }

    /// Takes up the return path of a QEMU that is about to go on; returns what it is fed over.
    fn hear(
        self: &Arc<Self>,
        (socket, second): (UnixStream, Option<UnixStream>),
        session: &Arc<TargetSession>,
        (vm, number): (u16, u64),
    ) -> Result<UnixStream, SinkError> {
        let (returns, known) = (socket.try_clone()?, socket.try_clone()?);
        {
            let mut feed = lock(&self.feed);
            if feed.number != number {
                return Err(SinkError::Unexpected);
            }
            feed.sockets.push(known);
            feed.sockets.extend(second);
        }
        let (incoming, session) = (Arc::clone(self), Arc::clone(session));
        std::thread::Builder::new()
            .name("gw-return".into())
            .spawn(move || {
                let end = read_return_path(returns, &session, vm, &Returns::default());
                incoming.returned(number, &end);
            })?;
        Ok(socket)
    }

    /// The QEMU's monitor: ours still, or the connection that an earlier process left in its QEMU, or a new one.
    pub(super) fn guest_again(&self) -> anyhow::Result<Arc<TargetGuest>> {
        let mut guest = lock(&self.guest);
        if let Some(guest) = &*guest {
            return Ok(Arc::clone(guest));
        }
        let entry = lock(&self.entry).clone();
        let found = Arc::new(entry.reach()?);
        *guest = Some(Arc::clone(&found));
        Ok(found)
    }

    /// Says that memory does not follow any more.
    pub(super) fn does_not_follow(&self, reason: &str) {
        tracing::warn!(vm = self.vm_name(), reason, "its memory does not follow");
        self.interrupt();
        if let Some((session, vm)) = self.session() {
            session.say(vm, BackMessage::LoadFailed(reason.to_owned()));
        }
    }
}

impl super::entry::Entry {
    /// Reaches the monitor of a QEMU that an earlier process started.
    pub(super) fn reach(&self) -> anyhow::Result<TargetGuest> {
        let kept = self.monitor.as_ref();
        match kept.map(|kept| TargetGuest::take_back(self.process.pid, &self.qmp, kept)) {
            Some(Ok(guest)) => return Ok(guest),
            Some(Err(error)) => tracing::warn!(
                vm = self.vm_name,
                "the connection to its QEMU's monitor was not kept: {error}"
            ),
            None => {}
        }
        TargetGuest::adopt(self.process.pid, &self.qmp).map_err(|error| anyhow!(error))
    }
}

/// How an agent that was restarted finds the QEMU of a move in this state.
pub(super) fn condition(guest: &TargetGuest, state: &TargetJournal) -> FoundQemu {
    if !matches!(state, TargetJournal::Following | TargetJournal::RunsAhead) {
        let is_running = guest.run_state().is_ok_and(|s| s == RunState::Running);
        let info = guest.migration();
        return match info.is_ok_and(|info| info.status == MigrationStatus::Completed) {
            true if is_running => FoundQemu::Complete,
            false if is_running => FoundQemu::Running,
            _ => FoundQemu::Stopped,
        };
    }
    match guest.glance() {
        Ok((RunState::Running, MigrationStatus::Completed)) => FoundQemu::Complete,
        Ok((RunState::Running, _)) => FoundQemu::Running,
        Ok(_) => FoundQemu::Stopped,
        // Its main loop waits for memory, as it does only for a guest that runs.
        Err(_) => FoundQemu::Running,
    }
}
