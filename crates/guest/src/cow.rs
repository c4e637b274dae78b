//! The agent's end of the library that maps pages of the pool into a target QEMU (`cow_abi`).
//!
//! [`CowListener`] is made before QEMU is started, with the environment that makes it load the
//! library; [`CowLibrary`] is the connection once the library has called. Everything here may
//! fail: the pages then go into QEMU's stream. What order must be kept between mappings and
//! stream stands in the documentation of `cow_abi`, and is the caller's.

use std::ffi::OsString;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cow_abi::{
    AbiError, BlockOffer, Features, FromAgent, FromLibrary, HANDSHAKE_MS_MAX, LIBRARY_FILE,
    MapBatch, MapRun, MapRunBytes, Outcome, PACKET_BYTES_MAX, PAGE_BYTES, RUNS_MAX, Refusal,
    SOCKET_ENV, Statistics, VERSION,
};
use page::HostAddr;
use sys::{Memfd, SeqPacket, SeqPacketListener};

use crate::RamBlock;

/// How long an answer may take. A full batch takes milliseconds; a host that swaps, seconds.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// How often it is looked meanwhile whether there is still somebody to answer.
const LOOK: Duration = Duration::from_secs(1);

/// Name of the library's thread.
const THREAD: &str = "gangway-cow";

/// The loader's variable.
const PRELOAD_ENV: &str = "LD_PRELOAD";

/// Where an installed library lies, seen from the directory above that of the program.
const INSTALLED: &str = "lib/gangway";

/// Where a package puts it.
const PACKAGED: &str = "/usr/lib/gangway";

/// Why pages cannot be mapped, or no more.
#[derive(Debug, thiserror::Error)]
pub enum CowError {
    /// No connection from the QEMU's process: it has no library, or is not started this way.
    #[error("the mapping library in QEMU did not answer in time")]
    NoHandshake,
    /// The library is of another version of Gangway.
    #[error(
        "the mapping library speaks version {found} of its protocol, this agent {VERSION}; \
         install both from one release"
    )]
    Version {
        /// The library's.
        found: u16,
    },
    /// The process has pages of another size.
    #[error("QEMU has pages of {bytes} bytes, which are not mapped")]
    PageSize {
        /// Their size.
        bytes: u32,
    },
    /// The library closed, or its thread is gone: it maps nothing any more. Whatever it has mapped, a
    /// copy that is forwarded after this lies over it.
    #[error("the mapping library has closed its connection, or its thread has ended")]
    Closed,
    /// No answer. Whether the pages of the request were or will be mapped is not known, so that
    /// nothing about them may be forwarded: this migration cannot go on.
    #[error("the mapping library did not answer within {ANSWER_TIMEOUT:?}")]
    Timeout,
    /// The connection failed; as for [`CowError::Timeout`] if it was in a request.
    #[error("talking to the mapping library")]
    Socket(#[source] io::Error),
    /// The library said something that is not understood.
    #[error("the mapping library's answer is not understood")]
    Answer(#[source] AbiError),
    /// The library said something that does not belong here.
    #[error("the mapping library's answer does not fit the question")]
    Unexpected,
    /// The library did not understand.
    #[error("the mapping library refuses: {0:?}")]
    Refused(Refusal),
    /// A block cannot be mapped; the others may.
    #[error("memory block {name} cannot be mapped")]
    Block {
        /// Its name.
        name: String,
        /// Why; see `cow_abi::BlockAnswer`.
        #[source]
        source: io::Error,
    },
    /// The pool cannot be used.
    #[error("the pool cannot be mapped")]
    Pool(#[source] io::Error),
    /// A request that the protocol has no room for.
    #[error("a request is beyond the limits of the mapping library's protocol")]
    Limit,
}

/// The library, if it is in one of its [places](cow_library_places).
#[must_use]
pub fn find_cow_library(configured: Option<&Path>) -> Option<PathBuf> {
    let mut places = cow_library_places(configured).into_iter();
    places.find(|file| file.is_file())
}

/// Where the library is looked for, in this order: the file `configured` alone if there is one, else
/// beside this program, where it is installed seen from there, and where packages put it.
#[must_use]
pub fn cow_library_places(configured: Option<&Path>) -> Vec<PathBuf> {
    if let Some(file) = configured {
        return vec![file.to_owned()];
    }
    let program = std::env::current_exe().ok();
    let directory = program.as_deref().and_then(Path::parent);
    let mut places = Vec::new();
    if let Some(directory) = directory {
        places.push(directory.join(LIBRARY_FILE));
        let prefix = directory.parent().unwrap_or(directory);
        places.push(prefix.join(INSTALLED).join(LIBRARY_FILE));
    }
    places.push(Path::new(PACKAGED).join(LIBRARY_FILE));
    places.dedup();
    places
}

/// Waits for the library of one target QEMU.
#[derive(Debug)]
pub struct CowListener {
    listener: SeqPacketListener,
    environment: [(OsString, OsString); 2],
}

impl CowListener {
    /// Listens at `socket`, for the library in the file `library`. The socket must be there
    /// before QEMU is started, and within the reach of the user that QEMU runs as.
    ///
    /// # Errors
    /// If the socket cannot be made.
    pub fn bind(socket: &Path, library: &Path) -> io::Result<Self> {
        let listener = SeqPacketListener::bind(socket)?;
        let mut preload = OsString::from(library);
        if let Some(others) = std::env::var_os(PRELOAD_ENV).filter(|others| !others.is_empty()) {
            preload.push(":");
            preload.push(others);
        }
        let name = OsString::from(SOCKET_ENV.to_string_lossy().into_owned());
        Ok(Self {
            listener,
            environment: [
                (PRELOAD_ENV.into(), preload),
                (name, socket.as_os_str().to_owned()),
            ],
        })
    }

    /// What QEMU's environment needs, beyond what it has.
    #[must_use]
    pub fn environment(&self) -> &[(OsString, OsString)] {
        &self.environment
    }

    /// Waits until the library in process `pid` has called and is welcome. Calls of other
    /// processes (those that a QEMU leaves behind on its way into the background) are turned away.
    ///
    /// # Errors
    /// [`CowError::NoHandshake`] when the time is over; [`CowError::Version`] or
    /// [`CowError::PageSize`] if it cannot be used.
    pub fn accept(&self, pid: u32) -> Result<CowLibrary, CowError> {
        let limit = Duration::from_millis(u64::from(HANDSHAKE_MS_MAX));
        let start = Instant::now();
        loop {
            let left = limit.saturating_sub(start.elapsed());
            let socket = self.listener.accept(left).map_err(CowError::Socket)?;
            let socket = socket.ok_or(CowError::NoHandshake)?;
            // 0 is a process that is not visible in our pid namespace.
            match socket.peer_pid().map_err(CowError::Socket)? {
                0 => {}
                peer if peer == pid => {}
                _ => continue,
            }
            socket.set_timeout(LOOK).map_err(CowError::Socket)?;
            match CowLibrary::welcome(socket, pid) {
                // One that went away or is no library; the right one may still come.
                Err(CowError::Closed | CowError::Answer(_) | CowError::Unexpected) => {}
                other => return other,
            }
        }
    }
}

/// The library in one target QEMU.
#[derive(Debug)]
pub struct CowLibrary {
    socket: SeqPacket,
    pid: u32,
    sequence: u64,
    buffer: Box<[u8; PACKET_BYTES_MAX]>,
    features: Features,
}

impl CowLibrary {
    fn welcome(socket: SeqPacket, pid: u32) -> Result<Self, CowError> {
        let mut library = Self {
            socket,
            pid,
            sequence: 0,
            buffer: Box::new([0; PACKET_BYTES_MAX]),
            features: Features::default(),
        };
        let hello = match library.receive()? {
            (0, FromLibrary::Hello(hello)) => hello,
            _ => return Err(CowError::Unexpected),
        };
        if hello.version != VERSION {
            return Err(CowError::Version {
                found: hello.version,
            });
        }
        if u64::from(hello.page_bytes) != PAGE_BYTES {
            return Err(CowError::PageSize {
                bytes: hello.page_bytes,
            });
        }
        library.features = hello.features;
        library.send(&FromAgent::Welcome { version: VERSION }, None)?;
        Ok(library)
    }

    /// What it found in its process.
    #[must_use]
    pub fn features(&self) -> Features {
        self.features
    }

    /// Offers a block under the number `index`; returns where it lies. One whose address QEMU's
    /// monitor does not tell is looked up inside QEMU.
    ///
    /// # Errors
    /// [`CowError::Block`] if this block cannot be mapped.
    pub fn add_block(&mut self, index: u16, block: &RamBlock) -> Result<HostAddr, CowError> {
        let offer = FromAgent::Block(BlockOffer {
            index,
            name: block.name.as_bytes(),
            addr: block.hva.map_or(0, |hva| hva.0),
            len: block.used_len.0,
        });
        match self.ask(&offer, None)? {
            FromLibrary::BlockAnswer(answer) if answer.index == index => match answer.errno {
                0 => Ok(HostAddr(answer.addr)),
                errno => Err(CowError::Block {
                    name: block.name.clone(),
                    source: os_error(errno),
                }),
            },
            _ => Err(CowError::Unexpected),
        }
    }

    /// Hands the pool over, once.
    ///
    /// # Errors
    /// [`CowError::Pool`] if it cannot be used; it must be made by [`Memfd::create_growing`].
    pub fn set_pool(&mut self, pool: &Memfd) -> Result<(), CowError> {
        let inode = pool.inode().map_err(CowError::Pool)?;
        let descriptor = pool.read_only().map_err(CowError::Pool)?;
        let message = FromAgent::Pool { inode };
        match self.ask(&message, Some(descriptor.as_fd()))? {
            FromLibrary::PoolAnswer { errno: 0 } => Ok(()),
            FromLibrary::PoolAnswer { errno } => Err(CowError::Pool(os_error(errno))),
            _ => Err(CowError::Unexpected),
        }
    }

    /// Maps `runs`, or copies their bytes out of the pool with `copy`; the outcome of each.
    ///
    /// # Errors
    /// Whatever it is, nothing is known about the pages of these runs: see [`CowError::Timeout`].
    pub fn map(&mut self, runs: &[MapRun], copy: bool) -> Result<Vec<Outcome>, CowError> {
        self.each_part(runs, copy, false)
    }

    /// Announces pages that QEMU will place in post-copy, to be mapped then; the outcome of each run.
    ///
    /// # Errors
    /// Whatever it is, pages of these runs may be mapped or not: their contents must stay in the pool.
    pub fn expect(&mut self, runs: &[MapRun]) -> Result<Vec<Outcome>, CowError> {
        self.each_part(runs, false, true)
    }

    fn each_part(
        &mut self,
        runs: &[MapRun],
        copy: bool,
        when_placed: bool,
    ) -> Result<Vec<Outcome>, CowError> {
        let mut outcomes = Vec::with_capacity(runs.len());
        for part in runs.chunks(RUNS_MAX) {
            let bytes: Vec<MapRunBytes> = part.iter().map(|run| (*run).into()).collect();
            let batch = MapBatch::new(copy, &bytes).ok_or(CowError::Limit)?;
            let message = if when_placed {
                FromAgent::Expect(batch)
            } else {
                FromAgent::Map(batch)
            };
            match self.ask(&message, None)? {
                FromLibrary::MapAnswer(answer) if answer.len() == part.len() => {
                    outcomes.extend(answer.iter());
                }
                _ => return Err(CowError::Unexpected),
            }
        }
        Ok(outcomes)
    }

    /// After a series of [`CowLibrary::map`]: gives memory the advice again that QEMU had given.
    /// `false` if some of it could not be given.
    ///
    /// # Errors
    /// If the library is gone.
    pub fn settle(&mut self) -> Result<bool, CowError> {
        match self.ask(&FromAgent::Settle, None)? {
            FromLibrary::Settled { errno } => Ok(errno == 0),
            _ => Err(CowError::Unexpected),
        }
    }

    /// What it has done so far.
    ///
    /// # Errors
    /// If the library is gone.
    pub fn statistics(&mut self) -> Result<Statistics, CowError> {
        match self.ask(&FromAgent::Statistics, None)? {
            FromLibrary::StatisticsAnswer(statistics) => Ok(statistics),
            _ => Err(CowError::Unexpected),
        }
    }

    /// Ends it: settles, and returns what was done. What is mapped stays mapped.
    ///
    /// # Errors
    /// If the library is gone.
    pub fn close(mut self) -> Result<Statistics, CowError> {
        match self.ask(&FromAgent::Close, None)? {
            FromLibrary::Closed(statistics) => Ok(statistics),
            _ => Err(CowError::Unexpected),
        }
    }

    fn ask(
        &mut self,
        message: &FromAgent<'_>,
        descriptor: Option<std::os::fd::BorrowedFd<'_>>,
    ) -> Result<FromLibrary<'_>, CowError> {
        self.send(message, descriptor)?;
        let sequence = self.sequence;
        match self.receive()? {
            (_, FromLibrary::Refused(refusal)) => Err(CowError::Refused(refusal)),
            (answered, message) if answered == sequence => Ok(message),
            _ => Err(CowError::Unexpected),
        }
    }

    fn send(
        &mut self,
        message: &FromAgent<'_>,
        descriptor: Option<std::os::fd::BorrowedFd<'_>>,
    ) -> Result<(), CowError> {
        self.sequence += 1;
        let len = message.encode(self.sequence, self.buffer.as_mut_slice());
        let packet = len.and_then(|len| self.buffer.get(..len));
        let packet = packet.ok_or(CowError::Limit)?;
        self.socket.send(packet, descriptor).map_err(socket_error)
    }

    fn receive(&mut self) -> Result<(u64, FromLibrary<'_>), CowError> {
        let since = Instant::now();
        let len = loop {
            let len = self.socket.receive(self.buffer.as_mut_slice());
            match len.map_err(socket_error) {
                Err(CowError::Timeout) if !has_thread(self.pid) => return Err(CowError::Closed),
                Err(CowError::Timeout) if since.elapsed() < ANSWER_TIMEOUT => {}
                other => break other?,
            }
        };
        match len {
            0 => Err(CowError::Closed),
            len => {
                let packet = self.buffer.get(..len).unwrap_or_default();
                FromLibrary::decode(packet).map_err(CowError::Answer)
            }
        }
    }
}

/// Whether the library's thread lives in the process.
fn has_thread(pid: u32) -> bool {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"));
    tasks.into_iter().flatten().flatten().any(|task| {
        let name = std::fs::read_to_string(task.path().join("comm"));
        name.is_ok_and(|name| name.trim_end() == THREAD)
    })
}

fn socket_error(error: io::Error) -> CowError {
    match error.kind() {
        io::ErrorKind::WouldBlock => CowError::Timeout,
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => CowError::Closed,
        _ => CowError::Socket(error),
    }
}

fn os_error(errno: u16) -> io::Error {
    io::Error::from_raw_os_error(i32::from(errno))
}
