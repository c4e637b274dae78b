//! A guest that runs here and shall move away.

use std::fs;
use std::path::Path;
use std::sync::mpsc::Receiver;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use page::ByteLen;
use serde::Deserialize;
use serde_json::{Value, json};
use sys::Process;

use crate::argv::pin_machine;
use crate::migration::{glance, migration_info};
use crate::obstacle::mapping_obstacle_now;
use crate::ram::ram_blocks;
use crate::settings::{self, SavedSettings};
use crate::state::run_state;
use crate::{
    GuestError, MappingObstacle, MigrationInfo, MigrationParameters, Qmp, QmpError, QmpEvent,
    RamBlock, RunState, UNIX_PATH_BYTES_MAX,
};

/// How long QEMU may take to greet.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a migration may take to end once it was cancelled or has failed, before its settings
/// are given back.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// How often the end of a migration is looked for.
const END_POLL: Duration = Duration::from_millis(20);

/// First version whose emulation sees every write to a page while it is migrated.
const MARKS_KEPT: (u32, u32, u32) = (9, 0, 0);

/// `query-kvm`.
#[derive(Deserialize)]
struct Kvm {
    enabled: bool,
}

/// A running QEMU that somebody else started.
///
/// Nothing is changed by attaching; [`SourceGuest::start_migration`] changes settings and
/// [`SourceGuest::restore_settings`] gives them back. Dropping it changes nothing in QEMU.
#[derive(Debug)]
pub struct SourceGuest {
    qmp: Qmp,
    process: Process,
    name: String,
    argv: Vec<String>,
    memory: ByteLen,
    saved: Mutex<Option<SavedSettings>>,
}

impl SourceGuest {
    /// Attaches to the QEMU behind `qmp_path` and learns who it is.
    ///
    /// # Errors
    /// If the socket is busy or no QMP socket, or the process cannot be examined.
    pub fn attach(qmp_path: &Path) -> Result<(Self, Receiver<QmpEvent>), GuestError> {
        let (qmp, events) = Qmp::connect(qmp_path, ATTACH_TIMEOUT)?;
        let pid = qmp.peer_pid();
        if pid == 0 {
            return Err(GuestError::NotVisible {
                qmp: qmp_path.to_owned(),
            });
        }
        let examine = |source| GuestError::Process { pid, source };
        let process = Process::open(pid).map_err(examine)?;
        let argv = command_line_of(pid).map_err(examine)?;
        let argv = pin_machine(&argv, &machine_type(&qmp)?);
        let name = guest_name(&qmp)?.unwrap_or_else(|| format!("qemu-{pid}"));
        let memory = memory_bytes(&qmp)?;
        let guest = Self {
            qmp,
            process,
            name,
            argv,
            memory,
            saved: Mutex::new(None),
        };
        Ok((guest, events))
    }

    /// Whether this VM can be migrated now, with the settings it has. Changes nothing.
    ///
    /// # Errors
    /// Each says what stands in the way and how to remove it: a migration under way, a
    /// capability or TLS that cannot be carried, a device that blocks, the VM's state.
    pub fn check(&self) -> Result<(), GuestError> {
        let migration = self.migration()?;
        if !migration.status.is_over() {
            return Err(GuestError::MigrationActive {
                status: migration.status,
            });
        }
        settings::check(&self.qmp)?;
        if !migration.blocked_reasons.is_empty() {
            return Err(GuestError::Blocked {
                reasons: migration.blocked_reasons,
            });
        }
        match self.run_state()? {
            RunState::Running | RunState::Paused => Ok(()),
            state => Err(GuestError::NotMigratable { state }),
        }
    }

    /// The guest's name, or `qemu-PID` if it has none.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What its process holds now; none if the kernel does not tell.
    #[must_use]
    pub fn held_memory(&self) -> Option<HeldMemory> {
        let path = format!("/proc/{}/smaps_rollup", self.pid());
        HeldMemory::parse(&fs::read_to_string(path).ok()?)
    }

    /// QEMU's process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// QEMU's process.
    #[must_use]
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Its monitor.
    #[must_use]
    pub fn qmp(&self) -> &Qmp {
        &self.qmp
    }

    /// QEMU's version: major, minor, micro.
    #[must_use]
    pub fn version(&self) -> (u32, u32, u32) {
        let version = self.qmp.version();
        (version.major, version.minor, version.micro)
    }

    /// Whether this QEMU can miss that its guest has written a page, so that any live migration of
    /// the running guest may lose it: before 9.0 an emulating QEMU (TCG) clears marks of written
    /// pages without having the emulation set them again. Under KVM the kernel keeps the marks.
    ///
    /// # Errors
    /// If the monitor fails.
    pub fn loses_written_pages(&self) -> Result<bool, GuestError> {
        if self.version() >= MARKS_KEPT {
            return Ok(false);
        }
        Ok(!self.qmp.query::<Kvm>("query-kvm")?.enabled)
    }

    /// QEMU's command line, for [`crate::target_argv`]: the machine type replaced by the versioned
    /// one that runs, and a program given by a relative path by the file that runs.
    #[must_use]
    pub fn argv(&self) -> &[String] {
        &self.argv
    }

    /// Memory of the guest, plugged memory included.
    #[must_use]
    pub fn memory_bytes(&self) -> ByteLen {
        self.memory
    }

    /// Whether the guest runs.
    ///
    /// # Errors
    /// If the monitor fails.
    pub fn run_state(&self) -> Result<RunState, GuestError> {
        Ok(run_state(&self.qmp)?)
    }

    /// The guest's memory blocks. Addresses hold for the life of the process; the list can grow by
    /// hot-plug.
    ///
    /// # Errors
    /// If the monitor fails or lists none.
    pub fn ram_blocks(&self) -> Result<Vec<RamBlock>, GuestError> {
        ram_blocks(&self.qmp)
    }

    /// The settings that [`SourceGuest::start_migration`] with parameters `p` will change, to be
    /// kept where they survive this process.
    ///
    /// # Errors
    /// If the monitor fails.
    pub fn save_settings(&self, p: &MigrationParameters) -> Result<SavedSettings, GuestError> {
        let mut saved = self.saved();
        let settings = match &mut *saved {
            // What a start has changed is not the guest's own any more.
            Some(settings) => settings,
            none => none.insert(SavedSettings::read(&self.qmp, p)?),
        };
        Ok(settings.clone())
    }

    /// Takes up settings that an earlier process kept, so that
    /// [`SourceGuest::restore_settings`] gives them back.
    pub fn adopt_settings(&self, settings: &SavedSettings) {
        self.saved().get_or_insert_with(|| settings.clone());
    }

    /// What this QEMU has that keeps its memory from being mapped from a pool; see
    /// [`crate::mapping_obstacle`] for what its command line says.
    ///
    /// # Errors
    /// If the monitor fails.
    pub fn mapping_obstacle(&self) -> Result<Option<MappingObstacle>, GuestError> {
        mapping_obstacle_now(&self.qmp)
    }

    /// Makes QEMU connect to `socket` and migrate into it, with return path and events on and its
    /// own bandwidth limit off. Returns when QEMU has accepted; its success or failure shows in
    /// [`SourceGuest::migration`] and in `MIGRATION` events.
    ///
    /// # Errors
    /// If QEMU refuses. The settings are given back then.
    pub fn start_migration(
        &self,
        socket: &Path,
        p: &MigrationParameters,
    ) -> Result<(), GuestError> {
        let uri = unix_uri(socket)?;
        let mut saved = self.saved();
        let settings = match &mut *saved {
            // Those of the first start are the guest's own; a second must not overwrite them.
            Some(settings) => settings,
            none => none.insert(SavedSettings::read(&self.qmp, p)?),
        };
        let started = settings
            .apply(&self.qmp, p)
            .and_then(|()| self.qmp.execute("migrate", json!({ "uri": uri })));
        drop(saved);
        if let Err(error) = started {
            if let Err(second) = self.restore_settings() {
                tracing::warn!(vm = self.name, "migration settings stay changed: {second}");
            }
            return Err(error.into());
        }
        Ok(())
    }

    /// Tells QEMU the speed that counts when it decides to stop the guest: that of unique pages,
    /// of all `logical_bytes_per_s` that its socket takes. Call it when the speeds change; without
    /// a started migration it does nothing.
    ///
    /// # Errors
    /// If the monitor fails.
    pub fn set_wire_rate(
        &self,
        unique_bytes_per_s: u64,
        logical_bytes_per_s: u64,
    ) -> Result<(), GuestError> {
        match self.saved().as_ref() {
            Some(saved) => {
                Ok(saved.set_wire_rate(&self.qmp, unique_bytes_per_s, logical_bytes_per_s)?)
            }
            None => Ok(()),
        }
    }

    /// How far the migration is.
    ///
    /// # Errors
    /// If the monitor fails.
    pub fn migration(&self) -> Result<MigrationInfo, GuestError> {
        Ok(migration_info(&self.qmp)?)
    }

    /// How far the migration is, or an error within a second if QEMU is busy with it.
    ///
    /// # Errors
    /// If the monitor fails or QEMU does not answer.
    pub fn glance(&self) -> Result<MigrationInfo, GuestError> {
        Ok(glance(&self.qmp)?)
    }

    /// Lets QEMU go on from `pre-switchover` to the end.
    ///
    /// # Errors
    /// If QEMU does not wait there.
    pub fn continue_switchover(&self) -> Result<(), GuestError> {
        self.execute("migrate-continue", json!({ "state": "pre-switchover" }))
    }

    /// Stops the guest. A guest that is stopped in this way is resumed by [`SourceGuest::cont`] alone, whatever becomes of the migration: QEMU resumes by
    /// itself only what it has stopped by itself.
    ///
    /// # Errors
    /// If QEMU refuses.
    pub fn stop(&self) -> Result<(), GuestError> {
        self.execute("stop", Value::Null)
    }

    /// Tells QEMU to go over to post-copy, which it does at once. QEMU from 10.0 on does not cancel a
    /// migration after that.
    ///
    /// # Errors
    /// If QEMU refuses.
    pub fn start_postcopy(&self) -> Result<(), GuestError> {
        self.execute("migrate-start-postcopy", Value::Null)
    }

    /// Whether this QEMU has a channel for pages that a processor waits for in post-copy, and whether it is on.
    ///
    /// # Errors
    /// If the monitor fails.
    pub fn preempt(&self) -> Result<Option<bool>, GuestError> {
        Ok(settings::capability(&self.qmp, settings::PREEMPT)?)
    }

    /// Has QEMU connect to `socket` and go on with a migration that lost its stream in post-copy; its
    /// success shows in [`SourceGuest::migration`] and in `MIGRATION` events.
    ///
    /// # Errors
    /// If QEMU refuses: the migration is not paused.
    pub fn resume_migration(&self, socket: &Path) -> Result<(), GuestError> {
        let uri = unix_uri(socket)?;
        self.execute("migrate", json!({ "uri": uri, "resume": true }))
    }

    /// Cancels a migration; the guest runs on. It has ended when its status says so.
    ///
    /// # Errors
    /// If the monitor fails.
    pub fn cancel(&self) -> Result<(), GuestError> {
        self.execute("migrate_cancel", Value::Null)
    }

    /// Lets the guest run.
    ///
    /// # Errors
    /// If QEMU refuses.
    pub fn cont(&self) -> Result<(), GuestError> {
        self.execute("cont", Value::Null)
    }

    /// Ends QEMU. Its process is gone some time later: see [`SourceGuest::process`].
    ///
    /// # Errors
    /// If the monitor fails otherwise than by QEMU's end.
    pub fn quit(&self) -> Result<(), GuestError> {
        match self.qmp.execute("quit", Value::Null) {
            Ok(_) | Err(QmpError::Closed { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Gives the settings back that [`SourceGuest::start_migration`] changed. Waits up to ten
    /// seconds for the end of a migration that was cancelled or has failed.
    ///
    /// # Errors
    /// If the migration does not end or the monitor fails; it can be tried again.
    pub fn restore_settings(&self) -> Result<(), GuestError> {
        let mut saved = self.saved();
        if let Some(settings) = saved.as_ref() {
            self.wait_for_end()?;
            settings.restore(&self.qmp)?;
            *saved = None;
        }
        Ok(())
    }

    fn wait_for_end(&self) -> Result<(), GuestError> {
        let start = Instant::now();
        loop {
            let status = self.migration()?.status;
            if status.is_over() {
                return Ok(());
            }
            if start.elapsed() > END_TIMEOUT {
                return Err(GuestError::NotEnded {
                    status,
                    waited: END_TIMEOUT,
                });
            }
            thread::sleep(END_POLL);
        }
    }

    fn execute(&self, command: &str, arguments: Value) -> Result<(), GuestError> {
        Ok(self.qmp.execute(command, arguments).map(drop)?)
    }

    /// The lock is held during monitor commands, so that starting and restoring exclude each other.
    fn saved(&self) -> MutexGuard<'_, Option<SavedSettings>> {
        self.saved.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `unix:PATH`, as `migrate` and `migrate-incoming` take it.
pub(crate) fn unix_uri(socket: &Path) -> Result<String, GuestError> {
    match socket.to_str() {
        Some(path) if !path.is_empty() && path.len() <= UNIX_PATH_BYTES_MAX => {
            Ok(format!("unix:{path}"))
        }
        _ => Err(GuestError::SocketPath {
            path: socket.to_owned(),
        }),
    }
}

/// Memory that a QEMU holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HeldMemory {
    /// Pages that other processes hold too are counted by its share of them.
    pub shared: ByteLen,
    /// Every page is counted whole.
    pub whole: ByteLen,
}

impl HeldMemory {
    /// From the text of `smaps_rollup`.
    fn parse(text: &str) -> Option<Self> {
        let of = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            let kib: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
            Some(ByteLen(kib.checked_mul(1024)?))
        };
        Some(Self {
            shared: of("Pss:")?,
            whole: of("Rss:")?,
        })
    }
}

/// The arguments of process `pid`.
fn command_line_of(pid: u32) -> std::io::Result<Vec<String>> {
    let bytes = fs::read(format!("/proc/{pid}/cmdline"))?;
    let text = String::from_utf8(bytes).map_err(|_| std::io::ErrorKind::InvalidData)?;
    let mut argv: Vec<_> = text.split_terminator('\0').map(str::to_owned).collect();
    if let Some(program) = argv.first_mut() {
        // Its directory then is known to that process only.
        if program.contains('/') && Path::new(program).is_relative() {
            *program = fs::read_link(format!("/proc/{pid}/exe"))?
                .display()
                .to_string();
        }
    }
    Ok(argv)
}

/// The machine type that runs, with its version: `pc-i440fx-10.0`.
fn machine_type(qmp: &Qmp) -> Result<String, QmpError> {
    let arguments = json!({ "path": "/machine", "property": "type" });
    let class: String = qmp.query_with("qom-get", arguments)?;
    Ok(class.strip_suffix("-machine").unwrap_or(&class).to_owned())
}

fn guest_name(qmp: &Qmp) -> Result<Option<String>, QmpError> {
    #[derive(Deserialize)]
    struct Name {
        name: Option<String>,
    }
    Ok(qmp.query::<Name>("query-name")?.name)
}

fn memory_bytes(qmp: &Qmp) -> Result<ByteLen, QmpError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Summary {
        base_memory: u64,
        plugged_memory: Option<u64>,
    }
    let summary: Summary = qmp.query("query-memory-size-summary")?;
    Ok(ByteLen(
        summary
            .base_memory
            .saturating_add(summary.plugged_memory.unwrap_or(0)),
    ))
}
