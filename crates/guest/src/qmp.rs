//! The client of QEMU's monitor.
//!
//! ```text
//!   caller ── execute ──► writer (locked) ──► QEMU
//!   caller ◄─ reply ──┐
//!                     ├── reader thread ◄──── QEMU
//!   events ◄──────────┘
//! ```
//! QEMU serves one client of a QMP socket at a time: whoever holds the [`Qmp`] has it alone.

use std::collections::HashMap;
use std::io::{self, BufReader, IoSlice, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::QemuVersion;
use crate::qmp_wire::{Band, Greeting, Line, LineError, command_line, read_line};

/// How long a command may take. While QEMU writes the end of a migration it answers no command,
/// and the other end of that stream may be stopped for ten seconds and live on.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);

/// What QEMU calls the agreement that some commands are executed beside its main loop.
const OUT_OF_BAND: &str = "oob";

/// QEMU's name for the descriptor that it keeps for us.
const KEPT: &str = "gangway-monitor";

/// Events kept for a receiver that does not read. A migration causes some tens.
const EVENTS_MAX: usize = 4096;

/// What QEMU tells without being asked.
#[derive(Clone, Debug, PartialEq)]
pub struct QmpEvent {
    /// Its name, in capitals: `MIGRATION`, `STOP`, `RESUME`.
    pub name: String,
    /// What belongs to it; `Null` if nothing does.
    pub data: Value,
    /// QEMU's wall clock, microseconds since 1970; 0 if QEMU could not tell.
    pub at_unix_us: u64,
}

/// Why a monitor could not be used.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// Nothing listens there, or it may not be reached.
    #[error("cannot connect to the QMP socket {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The socket is there, and QEMU does not greet.
    #[error(
        "the QMP socket {} gave no greeting within {waited:?}: it serves one client at a time \
         and another holds it, or QEMU hangs; give Gangway a QMP socket of its own",
        path.display()
    )]
    Busy {
        /// The socket.
        path: PathBuf,
        /// How long was waited.
        waited: Duration,
    },
    /// What listens there is no QMP server.
    #[error(
        "{} does not speak QMP ({reason}); it must be a QMP socket (mode=control), not a \
         human monitor", path.display()
    )]
    NotQmp {
        /// The socket.
        path: PathBuf,
        /// What it did.
        reason: String,
    },
    /// The connection ended, now or earlier.
    #[error("the QMP connection was gone at {command}: {reason}")]
    Closed {
        /// The command.
        command: String,
        /// How it ended.
        reason: String,
    },
    /// No answer. The command may still take effect.
    #[error("QEMU did not answer {command} within {waited:?}")]
    Timeout {
        /// The command.
        command: String,
        /// How long was waited.
        waited: Duration,
    },
    /// QEMU refused the command.
    #[error("QEMU refuses {command}: {desc} ({class})")]
    Command {
        /// The command.
        command: String,
        /// QMP's class of the error: `GenericError`, `CommandNotFound`.
        class: String,
        /// QEMU's words.
        desc: String,
    },
    /// The answer has not the form that QMP promises.
    #[error("QEMU's answer to {command} is not understood")]
    Answer {
        /// The command.
        command: String,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
}

/// A connection to one QEMU's monitor. Clones share it; it closes with the last of them.
#[derive(Clone, Debug)]
pub struct Qmp {
    connection: Arc<Connection>,
}

#[derive(Debug)]
struct Connection {
    peer_pid: u32,
    version: QemuVersion,
    /// Whether commands may be executed beside QEMU's main loop.
    is_out_of_band: bool,
    writer: Mutex<UnixStream>,
    /// Also the writer's stream, reachable while a command is stuck in it.
    stream: UnixStream,
    waiting: Arc<Mutex<Waiting>>,
    next_id: AtomicU64,
}

/// Who waits for an answer. Shared with the reader thread.
#[derive(Debug, Default)]
struct Waiting {
    replies: HashMap<u64, SyncSender<Reply>>,
    /// Set once, when the reader ends: how.
    closed: Option<String>,
}

type Reply = Result<Value, crate::qmp_wire::CommandFailure>;

impl Qmp {
    /// Connects to the QMP socket at `path` and negotiates; waits at most `timeout` for the
    /// greeting. The receiver gets QEMU's events, each once, in order.
    ///
    /// # Errors
    /// [`QmpError::Busy`] if another client holds the socket; [`QmpError::Connect`] and
    /// [`QmpError::NotQmp`] as they say.
    pub fn connect(path: &Path, timeout: Duration) -> Result<(Self, Receiver<QmpEvent>), QmpError> {
        Self::connect_in(Band::Main, path, timeout)
    }

    /// As [`Qmp::connect`]; with [`Band::Out`] it is agreed that some commands may be executed beside the
    /// main loop, if this QEMU offers it.
    pub(crate) fn connect_in(
        band: Band,
        path: &Path,
        timeout: Duration,
    ) -> Result<(Self, Receiver<QmpEvent>), QmpError> {
        let connect = |source| QmpError::Connect {
            path: path.to_owned(),
            source,
        };
        let stream = open_socket(path, timeout).map_err(|source| match source.kind() {
            io::ErrorKind::WouldBlock => QmpError::Busy {
                path: path.to_owned(),
                waited: timeout,
            },
            _ => connect(source),
        })?;
        let mut reader = BufReader::new(stream.try_clone().map_err(connect)?);
        let greeting = read_greeting(&mut reader, path, timeout)?;
        stream.set_read_timeout(None).map_err(connect)?;
        let offers = |capability: &str| greeting.capabilities.iter().any(|c| c == capability);
        let is_out_of_band = band == Band::Out && offers(OUT_OF_BAND);
        let agreed = match is_out_of_band {
            true => json!({ "enable": [OUT_OF_BAND] }),
            false => Value::Null,
        };
        let version = QemuVersion::from(greeting.version.qemu);
        let (qmp, events) =
            Self::over((stream, reader), version, is_out_of_band, 1).map_err(connect)?;
        // It has greeted, so it serves us and is not busy with another client: under load it was
        // seen to take more than five seconds to go on.
        qmp.execute_within("qmp_capabilities", &agreed, timeout.saturating_mul(3))?;
        Ok((qmp, events))
    }

    /// Takes over a connection on which an earlier process has agreed with QEMU on everything.
    pub(crate) fn take_over(
        stream: UnixStream,
        version: QemuVersion,
        is_out_of_band: bool,
    ) -> io::Result<(Self, Receiver<QmpEvent>)> {
        let reader = BufReader::new(stream.try_clone()?);
        // Answers to the earlier process may still come: its numbers are not used again.
        let first_id = u64::from(std::process::id()) << u32::BITS;
        Self::over((stream, reader), version, is_out_of_band, first_id)
    }

    fn over(
        (stream, reader): (UnixStream, BufReader<UnixStream>),
        version: QemuVersion,
        is_out_of_band: bool,
        first_id: u64,
    ) -> io::Result<(Self, Receiver<QmpEvent>)> {
        let (events_in, events) = sync_channel(EVENTS_MAX);
        let waiting = Arc::new(Mutex::new(Waiting::default()));
        let connection = Connection {
            peer_pid: sys::peer_pid(&stream)?,
            version,
            is_out_of_band,
            writer: Mutex::new(stream.try_clone()?),
            stream,
            waiting: Arc::clone(&waiting),
            next_id: AtomicU64::new(first_id),
        };
        thread::Builder::new()
            .name("qmp".to_owned())
            .spawn(move || read_lines(reader, &waiting, &events_in))?;
        let connection = Arc::new(connection);
        Ok((Self { connection }, events))
    }

    /// Whether commands may be executed beside QEMU's main loop.
    pub(crate) fn is_out_of_band(&self) -> bool {
        self.connection.is_out_of_band
    }

    /// Puts our end of the connection into QEMU, too: so it stays open, with all that was agreed on it,
    /// when this process dies. Returns the socket's number, by which it is found there. QEMU serves
    /// nobody else on this monitor as long as it has it, until [`Qmp::unkeep`], or until we close it.
    pub(crate) fn keep(&self) -> Result<u64, QmpError> {
        let stream = &self.connection.stream;
        let number = rustix::fs::fstat(stream).map(|stat| stat.st_ino);
        let arguments = json!({ "fdname": KEPT });
        self.call(
            Band::Main,
            "getfd",
            &arguments,
            COMMAND_TIMEOUT,
            Some(stream),
        )?;
        number.map_err(|error| QmpError::Closed {
            command: "getfd".to_owned(),
            reason: error.to_string(),
        })
    }

    /// Has QEMU let go of our end of the connection.
    pub(crate) fn unkeep(&self) -> Result<(), QmpError> {
        self.execute("closefd", json!({ "fdname": KEPT })).map(drop)
    }

    /// Executes one command and returns what QEMU answers; `Null` as `arguments` means none.
    /// Waits at most 30 seconds. Callers on several threads are answered each with their own.
    ///
    /// # Errors
    /// [`QmpError::Command`] if QEMU refuses; [`QmpError::Timeout`] and [`QmpError::Closed`]
    /// leave open whether the command took effect.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "callers build the arguments in place"
    )]
    pub fn execute(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.execute_within(command, &arguments, COMMAND_TIMEOUT)
    }

    /// Executes a command of the human monitor and returns its text. It never fails by itself:
    /// the monitor's complaints are part of the text.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn hmp(&self, line: &str) -> Result<String, QmpError> {
        self.query_with("human-monitor-command", json!({ "command-line": line }))
    }

    /// The process that listens on the socket: QEMU, or whoever opened the socket for it. 0 if it
    /// is in a pid namespace that cannot be seen from here.
    #[must_use]
    pub fn peer_pid(&self) -> u32 {
        self.connection.peer_pid
    }

    /// Version of QEMU, from its greeting.
    #[must_use]
    pub fn version(&self) -> QemuVersion {
        self.connection.version
    }

    /// Executes a command without arguments whose answer has the form `T`.
    pub(crate) fn query<T: DeserializeOwned>(&self, command: &str) -> Result<T, QmpError> {
        self.query_with(command, Value::Null)
    }

    pub(crate) fn query_with<T: DeserializeOwned>(
        &self,
        command: &str,
        arguments: Value,
    ) -> Result<T, QmpError> {
        serde_json::from_value(self.execute(command, arguments)?).map_err(|source| {
            QmpError::Answer {
                command: command.to_owned(),
                source,
            }
        })
    }

    pub(crate) fn execute_within(
        &self,
        command: &str,
        arguments: &Value,
        timeout: Duration,
    ) -> Result<Value, QmpError> {
        self.call(Band::Main, command, arguments, timeout, None)
    }

    /// Executes a command beside QEMU's main loop, which may be waiting for memory; in it, if that was
    /// not agreed on.
    pub(crate) fn execute_beside(
        &self,
        command: &str,
        arguments: &Value,
        timeout: Duration,
    ) -> Result<Value, QmpError> {
        let band = match self.connection.is_out_of_band {
            true => Band::Out,
            false => Band::Main,
        };
        self.call(band, command, arguments, timeout, None)
    }

    fn call(
        &self,
        band: Band,
        command: &str,
        arguments: &Value,
        timeout: Duration,
        descriptor: Option<&UnixStream>,
    ) -> Result<Value, QmpError> {
        let connection = &self.connection;
        let closed = |reason: String| QmpError::Closed {
            command: command.to_owned(),
            reason,
        };
        let id = connection.next_id.fetch_add(1, Ordering::Relaxed);
        let (reply_in, reply) = sync_channel(1);
        {
            let mut waiting = locked(&connection.waiting);
            if let Some(reason) = &waiting.closed {
                return Err(closed(reason.clone()));
            }
            waiting.replies.insert(id, reply_in);
        }
        let line = command_line(band, command, arguments, id);
        let written = match descriptor {
            None => locked(&connection.writer).write_all(&line),
            Some(descriptor) => write_with(&locked(&connection.writer), &line, descriptor),
        };
        if let Err(error) = written {
            // Half a line may have gone out, after which no command would be understood.
            connection.close();
            locked(&connection.waiting).replies.remove(&id);
            return Err(closed(format!("writing to it failed: {error}")));
        }
        match reply.recv_timeout(timeout) {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(failure)) => Err(QmpError::Command {
                command: command.to_owned(),
                class: failure.class,
                desc: failure.desc,
            }),
            Err(RecvTimeoutError::Timeout) => {
                locked(&connection.waiting).replies.remove(&id);
                Err(QmpError::Timeout {
                    command: command.to_owned(),
                    waited: timeout,
                })
            }
            Err(RecvTimeoutError::Disconnected) => {
                let reason = locked(&connection.waiting).closed.clone();
                Err(closed(reason.unwrap_or_default()))
            }
        }
    }
}

impl Connection {
    /// Ends both directions, and with them the reader thread.
    fn close(&self) {
        // It may be closed already; then there is nothing left to do.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.close();
    }
}

/// Writes a line that a descriptor goes with.
fn write_with(mut writer: &UnixStream, line: &[u8], descriptor: &UnixStream) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors = [descriptor.as_fd()];
    // There is room for one.
    ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    let line_slice = [IoSlice::new(line)];
    let sent = sendmsg(writer, &line_slice, &mut ancillary, SendFlags::NOSIGNAL)?;
    writer.write_all(line.get(sent..).unwrap_or_default())
}

/// Connects; `WouldBlock` if the queue of the listener stays full for `timeout`. Reads and writes
/// on the stream are limited to `timeout`, too.
pub(crate) fn open_socket(path: &Path, timeout: Duration) -> io::Result<UnixStream> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // The kernel applies the send limit to the wait for a place in the listener's queue, too.
    socket.set_write_timeout(Some(timeout))?;
    socket.set_read_timeout(Some(timeout))?;
    socket.connect(&SockAddr::unix(path)?)?;
    Ok(UnixStream::from(OwnedFd::from(socket)))
}

fn read_greeting(
    reader: &mut BufReader<UnixStream>,
    path: &Path,
    timeout: Duration,
) -> Result<Greeting, QmpError> {
    let path = path.to_owned();
    match read_line(reader, &mut Vec::new()) {
        Ok(Line::Greeting(greeting)) => Ok(greeting),
        Ok(_) => Err(QmpError::NotQmp {
            path,
            reason: "it sent no greeting first".to_owned(),
        }),
        Err(LineError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
            Err(QmpError::Busy {
                path,
                waited: timeout,
            })
        }
        Err(LineError::Io(source)) => Err(QmpError::Connect { path, source }),
        Err(error) => Err(QmpError::NotQmp {
            path,
            reason: error.to_string(),
        }),
    }
}

/// The reader thread: hands on replies and events until the connection ends.
fn read_lines(
    mut reader: BufReader<UnixStream>,
    waiting: &Mutex<Waiting>,
    events: &SyncSender<QmpEvent>,
) {
    let mut buffer = Vec::new();
    let error = loop {
        match read_line(&mut reader, &mut buffer) {
            Ok(Line::Reply {
                id: Some(id),
                outcome,
            }) => {
                // Nobody waits any more for the answer of a command that timed out.
                if let Some(reply) = locked(waiting).replies.remove(&id) {
                    let _ = reply.try_send(outcome);
                }
            }
            Ok(Line::Event(event)) => hand_on(event, events),
            Ok(Line::Reply { id: None, .. } | Line::Greeting(_) | Line::Unknown) => {
                tracing::debug!("a line from QEMU that answers no command");
            }
            Err(error) => break error,
        }
    };
    // What QEMU might still say is not wanted, and writing to it makes no sense.
    let _ = reader.get_ref().shutdown(Shutdown::Both);
    let mut waiting = locked(waiting);
    waiting.closed = Some(error.to_string());
    waiting.replies.clear();
}

/// An event is dropped rather than let it stop the replies: whoever waits for events asks for the
/// state as well.
fn hand_on(event: QmpEvent, events: &SyncSender<QmpEvent>) {
    if let Err(TrySendError::Full(event)) = events.try_send(event) {
        tracing::warn!(
            event = event.name,
            "{EVENTS_MAX} events are not read, one is dropped"
        );
    }
}

/// Locks; the data under these locks is whole at every instant, also after a panic elsewhere.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
