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

use super::listening::Listening;
use super::run::Input;
use super::session::spawn;
use super::stream::{GuestMemory, Stream};

/// How long the source QEMU may take to connect to our socket, or to get back to running.
const QEMU_PATIENCE: Duration = Duration::from_secs(15);

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

/// The VM where it comes from.
pub(crate) struct Home {
    vm: String,
    guest: Option<Arc<SourceGuest>>,
    /// Whether the guest ran when the move began.
    pub(crate) was_running: bool,
    /// What the move changes in the source QEMU, as it was before.
    pub(crate) settings: Option<SavedSettings>,
    /// Something was done to the source QEMU, now or before a restart of the agent.
    touched: bool,
}

impl Home {
    pub(crate) fn new(vm: &str) -> Self {
        Self {
            vm: vm.to_owned(),
            guest: None,
            was_running: true,
            settings: None,
            touched: false,
        }
    }

    /// The home of a move that an earlier process began.
    pub(crate) fn interrupted(vm: &str, was_running: bool) -> Self {
        Self {
            was_running,
            touched: true,
            ..Self::new(vm)
        }
    }

    /// Attaches to the QEMU behind `qmp`; its events go to `sender`.
    pub(crate) fn attach(
        &mut self,
        qmp: &Path,
        sender: Sender<Input>,
    ) -> anyhow::Result<Arc<SourceGuest>> {
        let (guest, events) = SourceGuest::attach(qmp)?;
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
        self.touched = true;
        let listening = Listening::at(path)?;
        guest
            .start_migration(path, parameters)
            .context("starting the migration in the source QEMU")?;
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
                Some(guest) if !guest.process().is_alive() => return Ok(Paused::Gone),
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
    pub(crate) fn end_postcopy(&self, stream: &Stream) {
        let Some(guest) = &self.guest else { return };
        stream.drain();
        let deadline = Instant::now() + QEMU_PATIENCE;
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
    /// will not. Nothing happens to a migration that is not paused.
    pub(crate) fn end_paused_postcopy(&self, run_dir: &Path) -> anyhow::Result<()> {
        let Some(guest) = &self.guest else {
            return Ok(());
        };
        let is_paused =
            || -> anyhow::Result<bool> { Ok(guest.migration()?.status.to_string() == PAUSED) };
        if !is_paused()? {
            return Ok(());
        }
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
        if is_paused()? {
            return Err(swallowed
                .err()
                .unwrap_or_else(|| anyhow!("it paused again")));
        }
        Ok(())
    }

    /// Cancels what QEMU is doing; `close` closes our end of its stream. Waits until the guest is
    /// here as it was before the move.
    ///
    /// Once the guest is `stopped`, QEMU answers nobody while it writes to a stream that we do not
    /// read any more: then the stream goes first. Otherwise it goes last, so that QEMU reports a
    /// cancelled migration and not a failed one.
    pub(crate) fn bring_back(&self, stopped: bool, close: impl FnOnce()) -> anyhow::Result<()> {
        let Some(guest) = &self.guest else {
            return if self.touched {
                Err(anyhow!("the source QEMU cannot be reached"))
            } else {
                Ok(())
            };
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
        let deadline = Instant::now() + QEMU_PATIENCE;
        loop {
            let state = guest
                .run_state()
                .context("asking the source QEMU how it is")?;
            let over = guest.migration().is_ok_and(|info| info.status.is_over());
            match state {
                RunState::Running => break,
                RunState::PostMigrate | RunState::Paused if over && self.was_running => {
                    guest.cont().context("resuming the guest at the source")?;
                }
                RunState::PostMigrate | RunState::Paused if over => break,
                _ => {}
            }
            if Instant::now() > deadline {
                return Err(anyhow!("the source QEMU stays in state {state:?}"));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        if let Some(settings) = &self.settings {
            guest.adopt_settings(settings);
        }
        if let Err(error) = guest.restore_settings() {
            tracing::warn!(vm = self.vm, %error, "the source QEMU's migration settings were not restored");
        }
        Ok(())
    }

    /// The VM runs elsewhere: its QEMU here goes.
    pub(crate) fn quit(&self) {
        let Some(guest) = &self.guest else { return };
        if let Err(error) = guest.quit() {
            tracing::warn!(vm = self.vm, %error, "the source QEMU does not quit");
        }
        if guest.process().wait_gone(QEMU_PATIENCE).unwrap_or(false) {
            return;
        }
        tracing::warn!(
            vm = self.vm,
            "killing the source QEMU, which has migrated and does not quit"
        );
        if let Err(error) = guest.process().kill() {
            tracing::error!(vm = self.vm, %error, "the source QEMU cannot be killed; it is stopped and of no use");
        }
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
