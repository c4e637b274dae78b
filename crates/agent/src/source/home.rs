//! The source QEMU in the hands of a move: taken, migrated, brought back or quit.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use guest::{
    GuestError, MemoryBlock, MigrationInfo, MigrationParameters, MigrationStatus, QmpError,
    RunState, SavedSettings, SharedFrames, SourceGuest, VmMemory,
};
use sys::ProcessMemory;

use crate::journal::QemuProcess;

use super::listening::Listening;
use super::run::Input;
use super::session::spawn;
use super::stream::{GuestMemory, Stream};

/// How long the source QEMU may take to connect to our socket, or to get back to running.
const QEMU_PATIENCE: Duration = Duration::from_secs(15);

/// How long a QEMU whose monitor is gone may take to be gone itself.
const DEATH_PATIENCE: Duration = Duration::from_secs(2);

/// How long a source QEMU in post-copy is read to its end when a move is undone. What it has not written by then it is
/// told, over a stream of our own, to leave out: its guest is stopped meanwhile.
const DRAIN_PATIENCE: Duration = Duration::from_secs(3);

/// QEMU's word for a post-copy that lost its stream.
const PAUSED: &str = "postcopy-paused";

/// What became of a source QEMU in post-copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Paused {
    /// It waits to be resumed.
    Yes,
    /// It was told that all memory has arrived, and has completed.
    Complete,
    /// Its process has ended.
    Gone,
}

/// Why a VM was not brought back.
#[derive(Debug)]
pub(crate) enum NotBack {
    /// The process of its QEMU has ended.
    Gone {
        /// It may have been resumed before.
        went_on: bool,
    },
    /// Its QEMU cannot be asked or does not obey.
    Lost(anyhow::Error),
}

/// What became of a source QEMU that was to quit.
#[derive(Debug)]
pub(crate) enum Quit {
    /// It is gone.
    Gone,
    /// It runs, and was left alone: somebody has resumed it, who has more to say than an answer from the target that
    /// may be old.
    Runs,
    /// It is there and cannot be asked whether it runs.
    Lost(String),
}

/// The VM where it comes from.
pub(crate) struct Home {
    vm: String,
    guest: Option<Arc<SourceGuest>>,
    /// The QEMU that moves, once it was reached: another one behind the same path is another VM's, or this VM's
    /// come back.
    process: Option<QemuProcess>,
    /// Whether the guest ran when the move began.
    pub(crate) was_running: bool,
    /// What the move changes in the source QEMU, as it was before.
    pub(crate) settings: Option<SavedSettings>,
    /// QEMU was told to migrate by us, now or perhaps before a restart of the agent. Until then what it does is
    /// others' business.
    migrates: bool,
    /// We let QEMU complete its migration, or perhaps did before a restart.
    completes: bool,
    /// We have told the guest to go on here.
    was_resumed: bool,
}

impl Home {
    pub(crate) fn new(vm: &str) -> Self {
        Self {
            vm: vm.to_owned(),
            guest: None,
            process: None,
            was_running: true,
            settings: None,
            migrates: false,
            completes: false,
            was_resumed: false,
        }
    }

    /// The home of a move of `process` that an earlier process of ours began.
    pub(crate) fn interrupted(vm: &str, was_running: bool, process: Option<QemuProcess>) -> Self {
        Self {
            process,
            was_running,
            migrates: true,
            ..Self::new(vm)
        }
    }

    /// From here on a completed migration of the source QEMU may be ours.
    pub(crate) fn let_complete(&mut self) {
        self.completes = true;
    }

    /// Attaches to the QEMU behind `qmp`; its events go to `sender`.
    pub(crate) fn attach(
        &mut self,
        qmp: &Path,
        sender: Sender<Input>,
    ) -> anyhow::Result<Arc<SourceGuest>> {
        let (guest, events) = SourceGuest::attach(qmp)?;
        let found = QemuProcess::of(guest.process()).context("looking at the source QEMU")?;
        if *self.process.get_or_insert(found) != found {
            return Err(anyhow!(
                "{} is the monitor of another QEMU (process {}) than the one that moved",
                qmp.display(),
                found.pid
            ));
        }
        let guest = Arc::new(guest);
        self.guest = Some(Arc::clone(&guest));
        spawn("gw-qmp", move || {
            for event in events {
                if sender.send(Input::Qmp(event)).is_err() {
                    return;
                }
            }
            let _ = sender.send(Input::QmpClosed);
        })?;
        Ok(guest)
    }

    pub(crate) fn guest(&self) -> Option<&Arc<SourceGuest>> {
        self.guest.as_ref()
    }

    /// The QEMU that moves, once it was reached.
    pub(crate) fn process(&self) -> Option<QemuProcess> {
        self.process
    }

    /// Whether the QEMU that moves is known to have ended.
    fn is_gone(&self) -> bool {
        self.process.is_some_and(|process| !process.is_alive())
    }

    /// As [`Self::migration`], if QEMU has the time to answer.
    pub(crate) fn glance(&self) -> Option<MigrationInfo> {
        self.guest.as_ref()?.glance().ok()
    }

    /// What QEMU says of its migration, if it can be asked.
    pub(crate) fn migration(&self) -> Option<MigrationInfo> {
        self.guest.as_ref()?.migration().ok()
    }

    /// Has QEMU migrate into a socket at `path`; returns our end, and where its second connection comes, if it makes
    /// one.
    pub(crate) fn migrate(
        &mut self,
        path: &Path,
        parameters: &MigrationParameters,
    ) -> anyhow::Result<(UnixStream, Listening)> {
        let guest = self.guest.as_ref().ok_or_else(|| anyhow!("no QEMU"))?;
        let listening = Listening::at(path)?;
        let started = guest.start_migration(path, parameters);
        // One that was refused is not under way; of one without an answer nobody knows.
        self.migrates = match &started {
            Ok(()) => true,
            Err(GuestError::Qmp(error)) => !matches!(error, QmpError::Command { .. }),
            Err(_) => false,
        };
        started.context("starting the migration in the source QEMU")?;
        let socket = listening.accept(QEMU_PATIENCE);
        let socket = socket.context("waiting for the source QEMU to connect")?;
        Ok((socket, listening))
    }

    /// Whether QEMU sends pages that it is asked for on a second connection.
    pub(crate) fn preempts(&self) -> anyhow::Result<bool> {
        let guest = self.guest.as_ref().ok_or_else(|| anyhow!("no QEMU"))?;
        Ok(guest.preempt()? == Some(true))
    }

    /// Stops the guest, unless it was stopped already, and has QEMU go over to post-copy; in between
    /// `held` is called, with a guest that nothing but `cont` resumes.
    pub(crate) fn switch(&self, held: impl FnOnce()) -> anyhow::Result<()> {
        let guest = self.guest.as_ref().ok_or_else(|| anyhow!("no QEMU"))?;
        if self.was_running {
            guest.stop().context("stopping the guest")?;
        }
        held();
        guest
            .start_postcopy()
            .context("having the source QEMU go over to post-copy")
    }

    /// Whether QEMU has paused a post-copy whose stream is closed; waits for that. A monitor that was lost is
    /// connected anew, with its events going to `sender`.
    pub(crate) fn paused(&mut self, qmp: &Path, sender: &Sender<Input>) -> anyhow::Result<Paused> {
        let deadline = Instant::now() + QEMU_PATIENCE;
        loop {
            let info = match &self.guest {
                _ if self.is_gone() => return Ok(Paused::Gone),
                Some(guest) => guest.migration(),
                None => self.attach(qmp, sender.clone())?.migration(),
            };
            match info {
                Ok(info) if info.status == MigrationStatus::Completed => {
                    return Ok(Paused::Complete);
                }
                Ok(info) if info.status.to_string() == PAUSED => return Ok(Paused::Yes),
                Ok(info) if Instant::now() > deadline => {
                    let status = info.status;
                    return Err(anyhow!(
                        "the source QEMU does not pause its migration ({status})"
                    ));
                }
                Ok(_) => std::thread::sleep(Duration::from_millis(20)),
                Err(error) if Instant::now() > deadline => return Err(error.into()),
                Err(GuestError::Qmp(QmpError::Closed { .. })) => {
                    // It may be about to be gone, and then it is.
                    std::thread::sleep(Duration::from_millis(100));
                    if self.guest.as_ref().is_some_and(|g| g.process().is_alive()) {
                        self.guest = None;
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Has QEMU go on with a paused post-copy into a socket at `path`; returns our end, and where its second
    /// connection comes, if it makes one.
    pub(crate) fn resume(&self, path: &Path) -> anyhow::Result<(UnixStream, Listening)> {
        let guest = self.guest.as_ref().ok_or_else(|| anyhow!("no QEMU"))?;
        let listening = Listening::at(path)?;
        guest
            .resume_migration(path)
            .context("resuming the migration in the source QEMU")?;
        let socket = listening.accept(QEMU_PATIENCE);
        let socket = socket.context("waiting for the source QEMU to connect")?;
        Ok((socket, listening))
    }

    /// Has a QEMU in post-copy end its migration: from 10.0 on it does not cancel it any more, and
    /// one whose socket closes waits for ever to go on. So what it still writes is thrown away by the
    /// reader, and it is told that everything has arrived. Only if the target QEMU never ran, and
    /// will not: then nobody needs it. Nothing happens to a migration that is not in post-copy.
    pub(crate) fn end_postcopy(&mut self, stream: &Stream) {
        let Some(guest) = &self.guest else { return };
        self.completes = true;
        stream.drain();
        let deadline = Instant::now() + DRAIN_PATIENCE;
        let mut is_told = false;
        while Instant::now() < deadline {
            let status = guest.migration().map(|info| info.status);
            if !matches!(&status, Ok(MigrationStatus::Other(word)) if word == "postcopy-active") {
                tracing::debug!(vm = self.vm, ?status, "not in post-copy");
                return;
            }
            if !is_told {
                let mut message = Vec::new();
                qstream::encode_return(&qstream::ReturnMessage::Shut(0), &mut message);
                stream.write_return_path(&message);
                is_told = true;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Has a QEMU that lost its stream in post-copy complete into nothing. Only if the target QEMU never ran, and
    /// will not.
    fn end_paused_postcopy(&self, guest: &SourceGuest, run_dir: &Path) -> anyhow::Result<()> {
        tracing::info!(
            vm = self.vm,
            "its QEMU is told to complete its post-copy into nothing"
        );
        let path = run_dir.join(format!("v-{}.sock", guest.pid()));
        let _ = std::fs::remove_file(&path);
        let blocks = guest.ram_blocks()?;
        // A second connection is only looked for: nothing is asked for, so nothing comes on it.
        let (socket, _listening) = self.resume(&path)?;
        let swallowed = super::void::swallow(socket, &blocks);
        if guest.migration()?.status.to_string() == PAUSED {
            return Err(swallowed
                .err()
                .unwrap_or_else(|| anyhow!("it paused again")));
        }
        Ok(())
    }

    /// Ends the migration of the source QEMU, if it is ours; `close` closes our end of its stream. Waits until the guest is
    /// here as it was before the move. Nothing is done to a QEMU that was not told to migrate. A post-copy that has begun is completed into nothing: only if the target QEMU
    /// never ran, and will not.
    ///
    /// Once the guest is `stopped`, QEMU answers nobody while it writes to a stream that we do not
    /// read any more: then the stream goes first. Otherwise it goes last, so that QEMU reports a
    /// cancelled migration and not a failed one.
    pub(crate) fn bring_back(
        &mut self,
        run_dir: &Path,
        stopped: bool,
        close: impl FnOnce(),
    ) -> Result<(), NotBack> {
        if self.is_gone() {
            return Err(NotBack::Gone { went_on: false });
        }
        if !self.migrates {
            return Ok(());
        }
        let Some(guest) = self.guest.clone() else {
            return Err(NotBack::Lost(anyhow!("the source QEMU cannot be reached")));
        };
        let cancel = || {
            if let Err(error) = guest.cancel() {
                tracing::debug!(vm = self.vm, %error, "nothing to cancel");
            }
        };
        if stopped {
            close();
            cancel();
        } else {
            cancel();
            close();
        }
        if let Err(error) = self.wait_until_back(&guest, run_dir) {
            // The monitor of a QEMU that dies goes first.
            let is_gone = guest.process().wait_gone(DEATH_PATIENCE).unwrap_or(false);
            return Err(if is_gone {
                let went_on = self.was_resumed;
                NotBack::Gone { went_on }
            } else {
                NotBack::Lost(error)
            });
        }
        if let Some(settings) = &self.settings {
            guest.adopt_settings(settings);
        }
        if let Err(error) = guest.restore_settings() {
            tracing::warn!(vm = self.vm, %error, "the source QEMU's migration settings were not restored");
        }
        Ok(())
    }

    /// Waits for the end of the migration, and has the guest run if it ran before.
    fn wait_until_back(&mut self, guest: &SourceGuest, run_dir: &Path) -> anyhow::Result<()> {
        let deadline = Instant::now() + QEMU_PATIENCE;
        loop {
            let status = guest.migration().map(|info| info.status);
            if status
                .as_ref()
                .is_ok_and(|status| status.to_string() == PAUSED)
            {
                self.completes = true;
                self.end_paused_postcopy(guest, run_dir)?;
            }
            let state = guest
                .run_state()
                .context("asking the source QEMU how it is")?;
            let over = status.as_ref().is_ok_and(MigrationStatus::is_over);
            match state {
                RunState::Running => return Ok(()),
                RunState::PostMigrate if over && !self.completes => {
                    return Err(anyhow!(
                        "it has been migrated away, and not by this agent; look where it runs, and if it runs \
                         nowhere resume it here with `cont`"
                    ));
                }
                RunState::PostMigrate | RunState::Paused if over && self.was_running => {
                    self.was_resumed = true;
                    guest.cont().context("resuming the guest at the source")?;
                }
                // It waits for the end of something.
                RunState::FinishMigrate | RunState::InMigrate => {}
                // Stopped before the move; or by an error, or by itself, while it was under way: as it is.
                _ if over => return Ok(()),
                _ => {}
            }
            if Instant::now() > deadline {
                return Err(anyhow!("the source QEMU stays in state {state:?}"));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The VM runs elsewhere: its QEMU here goes, unless it runs.
    pub(crate) fn quit(&mut self, qmp: &Path, sender: &Sender<Input>) -> Quit {
        if self.guest.is_none() && self.process.is_some() && !self.is_gone() {
            // After a restart of the agent it may have been too busy to answer.
            if let Err(error) = self.attach(qmp, sender.clone())
                && !self.is_gone()
            {
                return Quit::Lost(format!("it cannot be asked whether it runs: {error:#}"));
            }
        }
        let Some(guest) = &self.guest else {
            return Quit::Gone;
        };
        if guest
            .run_state()
            .is_ok_and(|state| state == RunState::Running)
        {
            return Quit::Runs;
        }
        if let Err(error) = guest.quit() {
            tracing::warn!(vm = self.vm, %error, "the source QEMU does not quit");
        }
        if guest.process().wait_gone(QEMU_PATIENCE).unwrap_or(false) {
            return Quit::Gone;
        }
        tracing::warn!(
            vm = self.vm,
            "killing the source QEMU, which has migrated and does not quit"
        );
        if let Err(error) = guest.process().kill() {
            tracing::error!(vm = self.vm, %error, "the source QEMU cannot be killed; it is stopped and of no use");
        }
        Quit::Gone
    }
}

/// What repairs are read from.
pub(crate) fn guest_memory(guest: &SourceGuest) -> anyhow::Result<GuestMemory> {
    let memory = ProcessMemory::open(guest.pid())?;
    let blocks = guest.ram_blocks()?;
    let mut names = Vec::new();
    let mut layout = VmMemory {
        pid: guest.pid(),
        blocks: Vec::new(),
    };
    for block in &blocks {
        let pages = u32::try_from(block.used_len.pages());
        if let (Some(addr), Ok(pages)) = (block.hva, pages) {
            names.push(block.name.clone());
            layout.blocks.push(MemoryBlock { addr, pages });
        }
    }
    let addresses = blocks
        .into_iter()
        .filter_map(|block| Some((block.name, block.hva?)))
        .collect();
    Ok(GuestMemory {
        memory,
        addresses,
        bases: std::sync::Mutex::default(),
        lengths: std::sync::Mutex::default(),
        layout: (layout, names),
    })
}

/// Fewer pages that a VM shares are not worth what sharing costs its target QEMU: huge pages.
pub(crate) const SHARED_MIN_PAGES: u64 = 1024;

/// Whether a VM shares memory here, with whomever. Not asked of the VMs of its session: those that join
/// later would be missed.
pub(crate) fn shares_memory(memory: &GuestMemory) -> bool {
    match SharedFrames::mapped_elsewhere(memory.layout.0.clone()) {
        Ok(pages) => pages >= SHARED_MIN_PAGES,
        Err(error) => {
            tracing::warn!("whether a VM shares memory cannot be seen: {error}");
            false
        }
    }
}
