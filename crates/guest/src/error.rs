//! What can go wrong with a guest.

use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use crate::{ArgvError, MigrationStatus, QmpError, RunState, UNIX_PATH_BYTES_MAX};

/// Why something could not be done with a guest, or why it cannot be migrated.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The monitor failed or QEMU refused.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The command line cannot be used.
    #[error(transparent)]
    Argv(#[from] ArgvError),
    /// The process behind the socket is in another pid namespace.
    #[error(
        "the QEMU behind {} is not visible from here: run the agent in the host's pid namespace",
        qmp.display()
    )]
    NotVisible {
        /// The QMP socket.
        qmp: PathBuf,
    },
    /// The process cannot be looked at.
    #[error("cannot examine QEMU's process {pid}")]
    Process {
        /// Its id.
        pid: u32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The socket belongs to another process than expected.
    #[error("{} is served by process {found}, not by {expected}", qmp.display())]
    OtherProcess {
        /// The QMP socket.
        qmp: PathBuf,
        /// The process that should serve it.
        expected: u32,
        /// The one that does.
        found: u32,
    },
    /// Another migration goes on.
    #[error(
        "a migration of this VM is under way (status {status}); wait for its end, or cancel it \
         with migrate_cancel"
    )]
    MigrationActive {
        /// Its status.
        status: MigrationStatus,
    },
    /// A capability is on whose stream cannot be carried.
    #[error(
        "the migration capability {capability} is on, and {why}; turn it off with \
         `migrate_set_capability {capability} off` in QEMU's monitor, or with QMP's \
         migrate-set-capabilities"
    )]
    Capability {
        /// Its name in QEMU.
        capability: &'static str,
        /// What is the matter with it.
        why: &'static str,
    },
    /// TLS on the local hop hides the stream.
    #[error(
        "the migration parameter tls-creds is set, which would encrypt the stream to the agent on \
         the same host; agents encrypt between hosts; clear it with \
         `migrate_set_parameter tls-creds \"\"` in QEMU's monitor"
    )]
    TlsCreds,
    /// QEMU itself says that this VM cannot migrate.
    #[error("QEMU cannot migrate this VM: {}", reasons.join("; "))]
    Blocked {
        /// In QEMU's words.
        reasons: Vec<String>,
    },
    /// Neither running nor paused.
    #[error("the VM is in state {state}; only a running or a paused VM can be migrated")]
    NotMigratable {
        /// Its state.
        state: RunState,
    },
    /// A path that no unix socket can have.
    #[error("{} is no path for a unix socket: UTF-8, at most {UNIX_PATH_BYTES_MAX} bytes", path.display())]
    SocketPath {
        /// The path.
        path: PathBuf,
    },
    /// QEMU lists no RAM.
    #[error("QEMU lists no RAM block")]
    NoRamBlocks,
    /// Settings can only be changed while no migration goes on.
    #[error("the migration had not ended after {waited:?} (status {status}), its settings stay")]
    NotEnded {
        /// The status then.
        status: MigrationStatus,
        /// How long was waited.
        waited: Duration,
    },
    /// Only a QEMU that has noticed the loss of its stream goes on with its migration.
    #[error("its migration is not paused after {waited:?} (status {status})")]
    NotPaused {
        /// The status then.
        status: MigrationStatus,
        /// How long was waited.
        waited: Duration,
    },
    /// A target without a monitor.
    #[error(
        "the command line has no QMP socket: it needs `-qmp unix:PATH,server=on,wait=off` or a \
         `-mon` with mode=control"
    )]
    NoQmpSocket,
    /// The target's monitor would take over another process's socket.
    #[error(
        "{} is in use by another process: the target needs a path of its own (add a replacement \
         for it to the move)", path.display()
    )]
    SocketInUse {
        /// The path.
        path: PathBuf,
    },
    /// The log cannot be written.
    #[error("cannot open the log {}", path.display())]
    Log {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The program cannot be started.
    #[error("cannot start {program}")]
    Launch {
        /// The program.
        program: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// QEMU ended before it could be used.
    #[error("QEMU ended at its start ({status}): {log_tail}")]
    EndedEarly {
        /// How.
        status: ExitStatus,
        /// The last lines of its log.
        log_tail: String,
    },
    /// QEMU did not become usable in time, and was killed.
    #[error("QEMU served no QMP within {waited:?} of its start and was killed: {log_tail}")]
    StartTimeout {
        /// How long was waited.
        waited: Duration,
        /// The last lines of its log.
        log_tail: String,
        /// The last try.
        #[source]
        source: Option<QmpError>,
    },
    /// It was killed and is still there (a process can wait for a disk unkillably).
    #[error("QEMU's process {pid} is still there {waited:?} after it was killed")]
    Unkillable {
        /// Its id.
        pid: u32,
        /// How long was waited.
        waited: Duration,
    },
}
