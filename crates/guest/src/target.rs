//! A guest that this host starts, empty and paused, to receive one.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::Receiver;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sys::Process;

use crate::argv::{qmp_socket, without_start_options};
use crate::migration::{glance, migration_info};
use crate::obstacle::mapping_obstacle_now;
use crate::qmp::open_socket;
use crate::qmp_wire::Band;
use crate::ram::ram_blocks;
use crate::settings::{PREEMPT, capability, forget_postcopy, postcopy_target, set_capabilities};
use crate::source::unix_uri;
use crate::state::{glance_at_state, run_state};
use crate::{
    GuestError, MappingObstacle, MigrationInfo, MigrationStatus, QemuVersion, Qmp, QmpError,
    QmpEvent, RamBlock, RunState,
};

/// How long QEMU may take until its monitor answers. With preallocated memory that is the time to
/// touch all of it.
const START_TIMEOUT: Duration = Duration::from_secs(60);

// The mapping library in QEMU is welcomed after that.
const _: () = assert!(
    START_TIMEOUT.as_millis() + cow_abi::HANDSHAKE_MS_MAX as u128
        <= cow_abi::WELCOME_MS_MAX as u128
);

/// How often a start is looked at.
const START_POLL: Duration = Duration::from_millis(10);

/// How long the monitor of a running QEMU may take to greet.
const ADOPT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a killed QEMU may take to be gone; freeing hundreds of gigabytes takes seconds.
const KILL_TIMEOUT: Duration = Duration::from_secs(30);

/// How long QEMU may take to answer beside its main loop.
const RECOVER_TIMEOUT: Duration = Duration::from_secs(5);

/// How long QEMU may take to notice that its stream is gone.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long QEMU may take from its word that it has all memory to the end of its migration.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// How much of a log is quoted in an error.
const LOG_TAIL_BYTES_MAX: u64 = 4096;
const LOG_TAIL_LINES_MAX: usize = 10;

/// A monitor's connection that its QEMU keeps: what is needed to take it up again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptMonitor {
    /// Number of our end's socket.
    socket: u64,
    version: (u32, u32, u32),
    is_out_of_band: bool,
}

/// What became of a QEMU that lost its stream in post-copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recovery {
    /// It waits for its source QEMU.
    Waits,
    /// It had all memory already, and has completed.
    Complete,
}

/// A QEMU on the receiving side, started paused: only [`TargetGuest::cont`] lets the guest run.
///
/// It is a session of its own and outlives this process. Dropping the handle leaves it alone;
/// [`TargetGuest::kill`] ends it.
#[derive(Debug)]
pub struct TargetGuest {
    qmp: Qmp,
    qmp_path: PathBuf,
    process: Process,
    events: Mutex<Option<Receiver<QmpEvent>>>,
}

impl TargetGuest {
    /// Starts `argv` (from [`crate::target_argv`], or a definition) paused and waiting for a
    /// migration, and waits until its monitor answers. Its output goes to the end of the file
    /// `log`. `-S -incoming defer` is added; what would make it start otherwise, or put itself
    /// into the background, is left out.
    ///
    /// # Errors
    /// If it has no QMP socket or one that is in use, ends early (with the last lines of its log),
    /// or does not answer within a minute. No process is left then.
    pub fn start(argv: &[String], log: &Path) -> Result<Self, GuestError> {
        Self::start_with(argv, log, &[], |_, _| {})
    }

    /// As [`TargetGuest::start`], with `environment` added to this process's own: what
    /// [`crate::CowListener::environment`] asks for. `launched` hears of the process and the path of its
    /// monitor before that answers, which can take long: a caller that is killed meanwhile leaves the process.
    ///
    /// # Errors
    /// As [`TargetGuest::start`].
    pub fn start_with(
        argv: &[String],
        log: &Path,
        environment: &[(OsString, OsString)],
        launched: impl FnOnce(&Process, &Path),
    ) -> Result<Self, GuestError> {
        let mut argv = without_start_options(argv)?;
        argv.extend(["-S", "-incoming", "defer"].map(str::to_owned));
        let qmp_path = qmp_socket(&argv).ok_or(GuestError::NoQmpSocket)?;
        // QEMU would silently take the path over from a VM that runs.
        if is_served(&qmp_path) {
            return Err(GuestError::SocketInUse { path: qmp_path });
        }
        let mut log = Log::open(log)?;
        let mut child = log.launch(&argv, environment)?;
        let connected = open_process(child.id()).and_then(|process| {
            launched(&process, &qmp_path);
            let (qmp, events) = connect_to_child(&mut child, &process, &qmp_path, &mut log)?;
            Ok((qmp, process, events))
        });
        match connected {
            Ok((qmp, process, events)) => {
                reap(child);
                Ok(Self {
                    qmp,
                    qmp_path,
                    process,
                    events: Mutex::new(Some(events)),
                })
            }
            Err(error) => {
                // It may have ended by itself, which is what is wanted.
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    /// Takes over a target that was started earlier: process `pid`, with its monitor at
    /// `qmp_path`.
    ///
    /// # Errors
    /// If there is no such process or another one serves the socket.
    pub fn adopt(pid: u32, qmp_path: &Path) -> Result<Self, GuestError> {
        let process = open_process(pid)?;
        let (qmp, events) = Qmp::connect_in(Band::Out, qmp_path, ADOPT_TIMEOUT)?;
        check_peer(&qmp, qmp_path, pid)?;
        let events = Mutex::new(Some(events));
        Ok(Self {
            qmp,
            qmp_path: qmp_path.to_owned(),
            process,
            events,
        })
    }

    /// Takes over a target whose monitor's connection was kept by its QEMU ([`TargetGuest::keep_monitor`]).
    /// Unlike [`TargetGuest::adopt`] it does not need QEMU's main loop, which may be waiting for memory.
    ///
    /// # Errors
    /// If there is no such process, or it does not have that connection.
    pub fn take_back(pid: u32, qmp_path: &Path, kept: &KeptMonitor) -> Result<Self, GuestError> {
        let process = open_process(pid)?;
        let take = || {
            let socket = UnixStream::from(process.take_socket(kept.socket)?);
            let (major, minor, micro) = kept.version;
            let version = QemuVersion {
                major,
                minor,
                micro,
            };
            Qmp::take_over(socket, version, kept.is_out_of_band)
        };
        let (qmp, events) = take().map_err(|source| GuestError::Process { pid, source })?;
        check_peer(&qmp, qmp_path, pid)?;
        Ok(Self {
            qmp,
            qmp_path: qmp_path.to_owned(),
            process,
            events: Mutex::new(Some(events)),
        })
    }

    /// Has QEMU itself keep our connection to its monitor, so that it outlives this process: a QEMU whose
    /// main loop waits for memory, in post-copy, serves no new one. Until [`TargetGuest::release_monitor`]
    /// nobody else gets to this monitor, even if this process dies.
    ///
    /// # Errors
    /// If QEMU refuses.
    pub fn keep_monitor(&self) -> Result<KeptMonitor, GuestError> {
        let QemuVersion {
            major,
            minor,
            micro,
        } = self.qmp.version();
        Ok(KeptMonitor {
            socket: self.qmp.keep()?,
            version: (major, minor, micro),
            is_out_of_band: self.qmp.is_out_of_band(),
        })
    }

    /// Takes [`TargetGuest::keep_monitor`] back.
    ///
    /// # Errors
    /// If QEMU refuses: it has nothing of ours.
    pub fn release_monitor(&self) -> Result<(), GuestError> {
        Ok(self.qmp.unkeep()?)
    }

    /// Leaves a guest that has arrived, and all its memory with it, as one that never was in post-copy: it can be
    /// migrated again. Waits for QEMU to be done.
    ///
    /// # Errors
    /// If the monitor fails or QEMU is not done within some seconds.
    pub fn end_postcopy(&self) -> Result<(), GuestError> {
        let start = Instant::now();
        loop {
            let status = self.migration()?.status;
            if status.is_over() {
                break;
            }
            if start.elapsed() > END_TIMEOUT {
                return Err(GuestError::NotEnded {
                    status,
                    waited: END_TIMEOUT,
                });
            }
            thread::sleep(START_POLL);
        }
        Ok(forget_postcopy(&self.qmp)?)
    }

    /// Has a QEMU whose stream was lost in post-copy wait at `socket` for its source QEMU to go on. Waits for
    /// it to notice the loss. An earlier call that nobody connected to is forgotten. Does not need its main loop.
    ///
    /// # Errors
    /// If it does not notice, or refuses.
    pub fn recover(&self, socket: &Path) -> Result<Recovery, GuestError> {
        let arguments = json!({ "uri": unix_uri(socket)? });
        let start = Instant::now();
        loop {
            let asked = self
                .qmp
                .execute_beside("migrate-recover", &arguments, RECOVER_TIMEOUT);
            match asked {
                Ok(_) => return Ok(Recovery::Waits),
                Err(QmpError::Command { .. }) => {}
                Err(error) => return Err(error.into()),
            }
            // Not paused: not yet, or not any more.
            if self.newest_status() == Some(MigrationStatus::Completed) {
                return Ok(Recovery::Complete);
            }
            if start.elapsed() > PAUSE_TIMEOUT {
                break;
            }
            thread::sleep(START_POLL);
        }
        // The event may have been an earlier process's. In passing: it hangs if memory is missing.
        match glance(&self.qmp)?.status {
            MigrationStatus::Completed => Ok(Recovery::Complete),
            status => Err(GuestError::NotPaused {
                status,
                waited: start.elapsed(),
            }),
        }
    }

    /// What the newest unread event says of the migration.
    fn newest_status(&self) -> Option<MigrationStatus> {
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        let events = events.as_ref()?;
        let of_migration = events.try_iter().filter(|event| event.name == "MIGRATION");
        let last = of_migration.last()?;
        Some(MigrationStatus::from(last.data.get("status")?.as_str()?))
    }

    /// How it stands, said at once or not at all: a QEMU whose main loop waits for memory says nothing.
    ///
    /// # Errors
    /// If the monitor fails or QEMU does not answer within a second.
    pub fn glance(&self) -> Result<(RunState, MigrationStatus), GuestError> {
        let state = glance_at_state(&self.qmp)?;
        Ok((state, glance(&self.qmp)?.status))
    }

    /// Path of its QMP socket.
    #[must_use]
    pub fn qmp_path(&self) -> &Path {
        &self.qmp_path
    }

    /// Its monitor.
    #[must_use]
    pub fn qmp(&self) -> &Qmp {
        &self.qmp
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

    /// The receiver of its events; given away once.
    #[must_use]
    pub fn take_events(&self) -> Option<Receiver<QmpEvent>> {
        self.events
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }

    /// Makes QEMU listen at `socket` for its migration; the socket exists afterwards. The first
    /// connection *is* the migration: never connect to try. If it breaks, QEMU ends. With `postcopy`
    /// the migration may go over to post-copy; with `preempt` too, of a QEMU that
    /// [can](TargetGuest::can_preempt), the second connection is for pages that a processor waits for, and QEMU
    /// may read nothing before it has come.
    ///
    /// # Errors
    /// If QEMU refuses or the path is too long.
    pub fn listen(&self, socket: &Path, postcopy: bool, preempt: bool) -> Result<(), GuestError> {
        let uri = unix_uri(socket)?;
        // Disks are taken over when the guest is let go, not when it was loaded: until then the
        // source may still need them.
        let mut wanted = vec![("events", true), ("late-block-activate", true)];
        if postcopy {
            wanted.extend(postcopy_target(&self.qmp, preempt)?);
        }
        set_capabilities(&self.qmp, wanted)?;
        Ok(self
            .qmp
            .execute("migrate-incoming", json!({ "uri": uri }))
            .map(drop)?)
    }

    /// Whether this QEMU has a channel for pages that a processor waits for in post-copy.
    ///
    /// # Errors
    /// If the monitor fails.
    pub fn can_preempt(&self) -> Result<bool, GuestError> {
        Ok(capability(&self.qmp, PREEMPT)?.is_some())
    }

    /// Whether the guest runs: `InMigrate` until it is loaded, then `Paused`.
    ///
    /// # Errors
    /// If the monitor fails.
    pub fn run_state(&self) -> Result<RunState, GuestError> {
        Ok(run_state(&self.qmp)?)
    }

    /// How far the migration is; on this side QEMU tells little more than its status.
    ///
    /// # Errors
    /// If the monitor fails.
    pub fn migration(&self) -> Result<MigrationInfo, GuestError> {
        Ok(migration_info(&self.qmp)?)
    }

    /// The guest's memory blocks.
    ///
    /// # Errors
    /// If the monitor fails or lists none.
    pub fn ram_blocks(&self) -> Result<Vec<RamBlock>, GuestError> {
        ram_blocks(&self.qmp)
    }

    /// What this QEMU has that keeps its memory from being mapped from a pool; see
    /// [`crate::mapping_obstacle`] for what its command line says.
    ///
    /// # Errors
    /// If the monitor fails.
    pub fn mapping_obstacle(&self) -> Result<Option<MappingObstacle>, GuestError> {
        mapping_obstacle_now(&self.qmp)
    }

    /// Lets the guest run.
    ///
    /// # Errors
    /// If QEMU refuses.
    pub fn cont(&self) -> Result<(), GuestError> {
        Ok(self.qmp.execute("cont", Value::Null).map(drop)?)
    }

    /// Ends QEMU at once and waits until it is gone. One that has ended already is success.
    ///
    /// # Errors
    /// If it may not be killed or does not end within half a minute.
    pub fn kill(&self) -> Result<(), GuestError> {
        let pid = self.pid();
        let examine = |source| GuestError::Process { pid, source };
        self.process.kill().map_err(examine)?;
        if self.process.wait_gone(KILL_TIMEOUT).map_err(examine)? {
            Ok(())
        } else {
            Err(GuestError::Unkillable {
                pid,
                waited: KILL_TIMEOUT,
            })
        }
    }
}

/// Waits until `child` serves its monitor at `qmp_path`.
fn connect_to_child(
    child: &mut Child,
    process: &Process,
    qmp_path: &Path,
    log: &mut Log,
) -> Result<(Qmp, Receiver<QmpEvent>), GuestError> {
    let start = Instant::now();
    loop {
        let left = START_TIMEOUT.saturating_sub(start.elapsed());
        // At the end of the time a greeting still gets a moment.
        let tried = Qmp::connect_in(Band::Out, qmp_path, left.max(START_POLL));
        if let Some(status) = ended(child)? {
            return Err(GuestError::EndedEarly {
                status,
                log_tail: log.tail(),
            });
        }
        match tried {
            Ok((qmp, events)) => {
                check_peer(&qmp, qmp_path, child.id())?;
                return Ok((qmp, events));
            }
            Err(error) if left.is_zero() => {
                let log_tail = log.tail();
                let source = Some(error);
                return Err(GuestError::StartTimeout {
                    waited: START_TIMEOUT,
                    log_tail,
                    source,
                });
            }
            Err(QmpError::Connect { .. } | QmpError::Busy { .. } | QmpError::Closed { .. }) => {
                thread::sleep(START_POLL);
            }
            // QEMU that ends between accepting and greeting is seen as ended in a moment.
            Err(QmpError::NotQmp { .. }) if process.wait_gone(START_POLL).unwrap_or(false) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn ended(child: &mut Child) -> Result<Option<ExitStatus>, GuestError> {
    let pid = child.id();
    child
        .try_wait()
        .map_err(|source| GuestError::Process { pid, source })
}

fn open_process(pid: u32) -> Result<Process, GuestError> {
    Process::open(pid).map_err(|source| GuestError::Process { pid, source })
}

/// An invisible peer (0, in another pid namespace) cannot be compared.
fn check_peer(qmp: &Qmp, qmp_path: &Path, expected: u32) -> Result<(), GuestError> {
    match qmp.peer_pid() {
        0 => Ok(()),
        found if found == expected => Ok(()),
        found => Err(GuestError::OtherProcess {
            qmp: qmp_path.to_owned(),
            expected,
            found,
        }),
    }
}

/// Whether a process listens at `path`; one that lets callers wait does. A monitor does not mind a
/// client that leaves at once.
fn is_served(path: &Path) -> bool {
    match open_socket(path, START_POLL) {
        Ok(_) => true,
        Err(error) => error.kind() == io::ErrorKind::WouldBlock,
    }
}

/// Waits for the end of `child` in the background, so that it never stays as a zombie.
fn reap(mut child: Child) {
    let reaper = thread::Builder::new().name("qemu-reaper".to_owned());
    let pid = child.id();
    let spawned = reaper.spawn(move || match child.wait() {
        Ok(status) => tracing::info!(pid, %status, "target QEMU ended"),
        Err(error) => tracing::warn!(pid, %error, "cannot wait for the target QEMU"),
    });
    if let Err(error) = spawned {
        tracing::warn!(pid, %error, "the target QEMU will not be reaped");
    }
}

/// Where a QEMU's output goes.
struct Log {
    file: File,
    /// Where this QEMU's output begins.
    start: u64,
}

impl Log {
    fn open(path: &Path) -> Result<Self, GuestError> {
        let open = || {
            let mut file = OpenOptions::new()
                .read(true)
                .append(true)
                .create(true)
                .open(path)?;
            let start = file.seek(SeekFrom::End(0))?;
            Ok(Self { file, start })
        };
        open().map_err(|source| GuestError::Log {
            path: path.to_owned(),
            source,
        })
    }

    /// Starts the program with its output here, in a session of its own.
    fn launch(
        &self,
        argv: &[String],
        environment: &[(OsString, OsString)],
    ) -> Result<Child, GuestError> {
        let (program, arguments) = argv.split_first().ok_or(crate::ArgvError::Empty)?;
        let launch = |source| GuestError::Launch {
            program: program.clone(),
            source,
        };
        let mut command = Command::new(program);
        command
            .args(arguments)
            .envs(environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(self.file.try_clone().map_err(launch)?)
            .stderr(self.file.try_clone().map_err(launch)?);
        sys::own_session(&mut command).spawn().map_err(launch)
    }

    /// The last lines of this QEMU's output.
    fn tail(&mut self) -> String {
        match self.read_tail() {
            Ok(tail) if tail.is_empty() => "it wrote nothing".to_owned(),
            Ok(tail) => tail,
            Err(error) => format!("its log cannot be read: {error}"),
        }
    }

    fn read_tail(&mut self) -> io::Result<String> {
        let end = self.file.seek(SeekFrom::End(0))?;
        let from = end.saturating_sub(LOG_TAIL_BYTES_MAX).max(self.start);
        self.file.seek(SeekFrom::Start(from))?;
        let mut bytes = Vec::new();
        self.file
            .by_ref()
            .take(LOG_TAIL_BYTES_MAX)
            .read_to_end(&mut bytes)?;
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<_> = text
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
            .collect();
        Ok(lines[lines.len().saturating_sub(LOG_TAIL_LINES_MAX)..].join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_qemu_is_heard_of_before_its_monitor_answers() {
        let dir = tempfile::tempdir().unwrap();
        let monitor = dir.path().join("qmp");
        let qmp = format!("unix:{},server=on,wait=off", monitor.display());
        // It never serves a monitor.
        let argv = ["sh", "-c", "exit 3", "-qmp", &qmp].map(str::to_owned);
        let mut heard = None;
        let started =
            TargetGuest::start_with(&argv, &dir.path().join("log"), &[], |process, path| {
                heard = Some((process.pid(), path.to_owned()));
            });
        assert!(matches!(started, Err(GuestError::EndedEarly { .. })));
        let (pid, path) = heard.unwrap();
        assert!(pid != std::process::id() && path == monitor);
    }
}
