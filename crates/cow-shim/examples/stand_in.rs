//! Stands in for the library where tests are about its failures: it maps nothing, and fails as the
//! name of its file says.
//!
//! - `version`: speaks another version of the protocol.
//! - `memory`: has no memory for any mapping.
//! - `thread`: its thread ends with the first request, and leaves the connection open.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::{forget, zeroed};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use cow_abi::{
    BlockAnswer, Features, FromAgent, FromLibrary, Hello, Outcome, OutcomeBytes, Outcomes,
    PACKET_BYTES_MAX, PAGE_BYTES, RUNS_MAX, SOCKET_ENV, Statistics, VERSION,
};

/// The loader calls it before QEMU's `main`.
#[used]
#[unsafe(link_section = ".init_array")]
static BEGIN: extern "C" fn() = begin;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Failure {
    Version,
    Memory,
    Thread,
}

extern "C" fn begin() {
    let path = std::env::var_os(OsStr::from_bytes(SOCKET_ENV.to_bytes()));
    let library = std::env::var("LD_PRELOAD").unwrap_or_default();
    let failures = [
        ("version", Failure::Version),
        ("memory", Failure::Memory),
        ("thread", Failure::Thread),
    ];
    let failure = failures
        .into_iter()
        .find(|(name, _)| library.contains(&format!("/{name}.so")));
    if let (Some(path), Some((_, failure))) = (path, failure) {
        let serve = move || connect(path.as_bytes()).and_then(|socket| serve(socket, failure));
        // As the real one calls its thread, which the agent looks for.
        let thread = std::thread::Builder::new().name("gangway-cow".to_owned());
        let _ = thread.spawn(serve);
    }
}

fn connect(path: &[u8]) -> io::Result<File> {
    // SAFETY: plain numbers.
    let number = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0) };
    if number < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: made above, and owned by nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(number) };
    // SAFETY: all zeros is a valid value.
    let mut address: libc::sockaddr_un = unsafe { zeroed() };
    address.sun_family = 1; // AF_UNIX
    for (to, from) in address.sun_path.iter_mut().zip(path) {
        *to = from.cast_signed();
    }
    let len = libc::socklen_t::try_from(size_of::<libc::sockaddr_un>()).unwrap_or(0);
    // SAFETY: pointer and length are those of `address`.
    if unsafe { libc::connect(number, (&raw const address).cast(), len) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(socket.into())
}

fn serve(mut socket: File, failure: Failure) -> io::Result<()> {
    let hello = Hello {
        version: VERSION + u16::from(failure == Failure::Version),
        pid: std::process::id(),
        page_bytes: u32::try_from(PAGE_BYTES).unwrap_or(0),
        features: Features::default(),
    };
    send(&mut socket, 0, &FromLibrary::Hello(hello))?;
    let mut packet = vec![0; PACKET_BYTES_MAX];
    loop {
        let len = socket.read(&mut packet)?;
        let Ok((sequence, message)) = FromAgent::decode(&packet[..len]) else {
            return Ok(());
        };
        let no_memory = Outcome::Refused(u16::try_from(libc::ENOMEM).unwrap_or(0));
        let outcomes = [OutcomeBytes::from(no_memory); RUNS_MAX];
        let answer = match message {
            FromAgent::Welcome { .. } => continue,
            FromAgent::Block(offer) => FromLibrary::BlockAnswer(BlockAnswer {
                index: offer.index,
                errno: 0,
                addr: offer.addr,
            }),
            FromAgent::Pool { .. } => FromLibrary::PoolAnswer { errno: 0 },
            FromAgent::Map(_) | FromAgent::Expect(_) if failure == Failure::Thread => {
                forget(socket);
                return Ok(());
            }
            FromAgent::Map(batch) | FromAgent::Expect(batch) => {
                match Outcomes::new(&outcomes[..batch.len()]) {
                    Some(outcomes) => FromLibrary::MapAnswer(outcomes),
                    None => return Ok(()),
                }
            }
            FromAgent::Settle => FromLibrary::Settled { errno: 0 },
            FromAgent::Statistics => FromLibrary::StatisticsAnswer(Statistics::default()),
            FromAgent::Close => FromLibrary::Closed(Statistics::default()),
        };
        send(&mut socket, sequence, &answer)?;
    }
}

fn send(socket: &mut File, sequence: u64, message: &FromLibrary<'_>) -> io::Result<()> {
    let mut packet = vec![0; PACKET_BYTES_MAX];
    let len = message.encode(sequence, &mut packet).unwrap_or(0);
    socket.write_all(&packet[..len])
}
