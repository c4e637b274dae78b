//! One connection between two agents, with or without TLS, blocking.

use std::io::{self, IoSlice, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection, StreamOwned};
use serde::Serialize;
use serde::de::DeserializeOwned;
use wire::{FrameHeader, FrameKind, HEADER_LEN, Hello, MAGIC, MAX_BODY, MAX_CONTROL, WireError};

use crate::tls::{self, Tls};

use super::{Buffer, Compressor, Decompressor, Pool};

/// How long a connection may take to be made, hello included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How often a blocked read or write looks at the time.
const TICK: Duration = Duration::from_millis(250);

/// Plain text that rustls holds before it must be written: some records of 16 KiB.
const TLS_BUFFER: usize = 256 << 10;

/// Bytes read from a socket at once under TLS: what arrives in 1 ms at 1 Gbit/s.
const READ_AHEAD: usize = 128 << 10;

/// Most bytes that a connection with urgent frames has in the kernel and not on the wire: 0.5 ms at
/// 1 Gbit/s. Nothing overtakes what is there, and by itself the kernel takes megabytes.
const UNSENT: u32 = 64 << 10;

/// When the kernel asks whether the peer of an idle connection is there, and how often again: longer than
/// any silence that a session survives.
const KEEPALIVE: Duration = Duration::from_secs(60);
const KEEPALIVE_AGAIN: Duration = Duration::from_secs(15);

/// Keys and certificates, or none.
#[derive(Clone)]
pub(crate) enum Security {
    /// Mutual TLS.
    Tls {
        server: Arc<ServerConfig>,
        client: Arc<ClientConfig>,
    },
    /// For labs on networks of their own.
    Plaintext,
}

impl Security {
    /// With these certificates, if there are any.
    pub(crate) fn of(tls: Option<&Tls>) -> Self {
        match tls {
            Some(tls) => Self::Tls {
                server: Arc::clone(&tls.server),
                client: Arc::clone(&tls.client),
            },
            None => Self::Plaintext,
        }
    }
}

/// What goes wrong with a peer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    #[error("the connection failed")]
    Io(#[from] io::Error),
    #[error("the peer closed the connection")]
    Closed,
    #[error("the connection ended within a frame")]
    Cut,
    #[error("the peer was silent for {0:?}")]
    Silent(Duration),
    #[error("the peer speaks something else")]
    Protocol(#[from] WireError),
    #[error("the peer's TLS is not acceptable")]
    Tls(#[from] rustls::Error),
    #[error("{0} is no address")]
    Address(String),
    #[error("it refused: {0}")]
    Refused(String),
    #[error("its compressed stream is broken")]
    Squeeze(#[from] super::SqueezeError),
}

enum Stream {
    Plain(TcpStream),
    Client(Box<StreamOwned<ClientConnection, Buffered>>),
    Server(Box<StreamOwned<ServerConnection, Buffered>>),
}

/// A socket that is read in large pieces: rustls by itself reads a page or less at a time.
struct Buffered {
    tcp: TcpStream,
    /// Nothing is read any more then: TLS reads on by itself as long as anything comes.
    deadline: Option<Instant>,
    bytes: Box<[u8]>,
    at: usize,
    filled: usize,
}

impl Buffered {
    fn new(tcp: TcpStream) -> Self {
        let bytes = vec![0; READ_AHEAD].into_boxed_slice();
        Self {
            tcp,
            deadline: None,
            bytes,
            at: 0,
            filled: 0,
        }
    }
}

impl Read for Buffered {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if is_over(self.deadline) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        if self.at == self.filled {
            self.filled = self.tcp.read(&mut self.bytes)?;
            self.at = 0;
        }
        let n = out.len().min(self.filled - self.at);
        out[..n].copy_from_slice(&self.bytes[self.at..self.at + n]);
        self.at += n;
        Ok(n)
    }
}

impl Write for Buffered {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.tcp.write(bytes)
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.tcp.write_vectored(slices)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A connection. Reads and writes fail once the peer made no progress for `timeout`.
pub(crate) struct Link {
    stream: Stream,
    timeout: Duration,
    /// When reading ends whatever comes.
    deadline: Option<Instant>,
}

impl Link {
    /// Connects to `address` (`host:port`).
    pub(crate) fn connect(
        address: &str,
        security: &Security,
        timeout: Duration,
    ) -> Result<Self, LinkError> {
        let mut last = None;
        for resolved in address.to_socket_addrs()? {
            match TcpStream::connect_timeout(&resolved, CONNECT_TIMEOUT) {
                Ok(tcp) => return Self::client(tcp, address, security, timeout),
                Err(error) => last = Some(error),
            }
        }
        Err(last.map_or_else(|| LinkError::Address(address.to_owned()), LinkError::Io))
    }

    fn client(
        tcp: TcpStream,
        address: &str,
        security: &Security,
        timeout: Duration,
    ) -> Result<Self, LinkError> {
        prepare(&tcp, timeout)?;
        let stream = match security {
            Security::Plaintext => Stream::Plain(tcp),
            Security::Tls { client, .. } => {
                let name = tls::server_name(address)
                    .ok_or_else(|| LinkError::Address(address.to_owned()))?;
                let mut connection = ClientConnection::new(Arc::clone(client), name)?;
                connection.set_buffer_limit(Some(TLS_BUFFER));
                Stream::Client(Box::new(StreamOwned::new(connection, Buffered::new(tcp))))
            }
        };
        Ok(Self {
            stream,
            timeout,
            deadline: None,
        })
    }

    /// Takes over an accepted connection.
    pub(crate) fn accepted(
        tcp: TcpStream,
        security: &Security,
        timeout: Duration,
    ) -> Result<Self, LinkError> {
        prepare(&tcp, timeout)?;
        let stream = match security {
            Security::Plaintext => Stream::Plain(tcp),
            Security::Tls { server, .. } => {
                let mut connection = ServerConnection::new(Arc::clone(server))?;
                connection.set_buffer_limit(Some(TLS_BUFFER));
                Stream::Server(Box::new(StreamOwned::new(connection, Buffered::new(tcp))))
            }
        };
        Ok(Self {
            stream,
            timeout,
            deadline: None,
        })
    }

    /// A handle that can shut the connection down from another thread.
    pub(crate) fn socket(&self) -> io::Result<TcpStream> {
        self.tcp().try_clone()
    }

    fn tcp(&self) -> &TcpStream {
        match &self.stream {
            Stream::Plain(tcp) => tcp,
            Stream::Client(tls) => &tls.sock.tcp,
            Stream::Server(tls) => &tls.sock.tcp,
        }
    }

    /// Has the kernel end a connection that may be idle for long when its peer is gone.
    pub(crate) fn keep_alive(&self) -> io::Result<()> {
        let keepalive = socket2::TcpKeepalive::new()
            .with_time(KEEPALIVE)
            .with_interval(KEEPALIVE_AGAIN);
        socket2::SockRef::from(self.tcp()).set_tcp_keepalive(&keepalive)
    }

    /// Whether the kernel takes more bytes at once.
    pub(crate) fn has_room(&self) -> bool {
        let tcp = self.tcp();
        let now = Timespec::default();
        let mut fds = [PollFd::new(tcp, PollFlags::OUT)];
        // What cannot be asked is found when it is written to.
        poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
    }

    /// Says what the connection is for.
    pub(crate) fn send_hello(&mut self, hello: &Hello) -> Result<(), LinkError> {
        self.write_all(&MAGIC)?;
        self.send(hello)
    }

    /// Reads what the connection is for. All of it, with what TLS needs before, has the time of one silence:
    /// who has not said yet who they are cannot hold a connection a byte at a time.
    pub(crate) fn receive_hello(&mut self) -> Result<Hello, LinkError> {
        self.set_deadline(Some(Instant::now() + self.timeout));
        let hello = self.read_hello();
        self.set_deadline(None);
        hello
    }

    fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.deadline = deadline;
        match &mut self.stream {
            Stream::Plain(_) => {}
            Stream::Client(tls) => tls.sock.deadline = deadline,
            Stream::Server(tls) => tls.sock.deadline = deadline,
        }
    }

    fn read_hello(&mut self) -> Result<Hello, LinkError> {
        let mut magic = [0; MAGIC.len()];
        self.read_exact(&mut magic)?;
        if magic != MAGIC {
            return Err(WireError::Control("not a Gangway agent".into()).into());
        }
        self.receive()
    }

    /// Sends one control message.
    pub(crate) fn send<T: Serialize>(&mut self, message: &T) -> Result<(), LinkError> {
        let bytes = wire::encode_control(message)?;
        self.write_all(&bytes)
    }

    /// Receives one control message.
    pub(crate) fn receive<T: DeserializeOwned>(&mut self) -> Result<T, LinkError> {
        let mut length = [0; 4];
        self.read_exact(&mut length)?;
        let length = u32::from_le_bytes(length) as usize;
        if length > MAX_CONTROL {
            return Err(WireError::TooLong {
                what: "a control message",
                length: length as u64,
                limit: MAX_CONTROL as u64,
            }
            .into());
        }
        let mut json = vec![0; length];
        self.read_exact(&mut json)?;
        Ok(wire::decode_control(&json)?)
    }

    /// Receives one frame: its header, and its body into a buffer of the pool. `packed` is
    /// memory that is used again.
    pub(crate) fn receive_frame(
        &mut self,
        pool: &Arc<Pool>,
        unpacker: Option<&mut Decompressor>,
        packed: &mut Vec<u8>,
    ) -> Result<(FrameHeader, Buffer), LinkError> {
        let (header, plain) = self.receive_packed(pool, packed)?;
        let body = unpack(&header, plain, pool, unpacker, packed)?;
        Ok((header, body))
    }

    /// Receives one frame as it is: its body into a buffer of the pool, or into `packed` if it is
    /// compressed.
    pub(crate) fn receive_packed(
        &mut self,
        pool: &Arc<Pool>,
        packed: &mut Vec<u8>,
    ) -> Result<(FrameHeader, Option<Buffer>), LinkError> {
        let cut = |error| match error {
            LinkError::Closed => LinkError::Cut,
            other => other,
        };
        let mut header = [0; HEADER_LEN];
        match self.fill(&mut header) {
            (0, Err(error)) => return Err(error),
            (_, result) => result.map_err(cut)?,
        }
        let header = FrameHeader::parse(header)?;
        if header.is_compressed() {
            packed.resize(header.body_len(), 0);
            self.read_exact(packed).map_err(cut)?;
            return Ok((header, None));
        }
        let mut body = pool.take(header.raw_len());
        self.read_exact(&mut body).map_err(cut)?;
        Ok((header, Some(body)))
    }

    /// Sends one frame, its body given in pieces; packs it if there is a compressor. Returns the
    /// bytes on the wire, before encryption.
    pub(crate) fn send_frame<'a>(
        &mut self,
        (kind, vm): (FrameKind, u16),
        pieces: impl Iterator<Item = &'a [u8]> + Clone,
        compressor: Option<&mut Compressor>,
        packed: &mut Vec<u8>,
    ) -> Result<usize, LinkError> {
        let header = pack((kind, vm), pieces.clone(), compressor, packed)?;
        self.send_packed(header, pieces, packed)?;
        Ok(HEADER_LEN + header.body_len())
    }

    /// Sends one frame whose body is in `packed` if it is compressed, and in `pieces` if not.
    pub(crate) fn send_packed<'a>(
        &mut self,
        header: FrameHeader,
        pieces: impl Iterator<Item = &'a [u8]>,
        packed: &[u8],
    ) -> Result<(), LinkError> {
        let head = header.to_bytes();
        if header.is_compressed() {
            return self.write_all_vectored(&mut [IoSlice::new(&head), IoSlice::new(packed)]);
        }
        let mut slices: Vec<IoSlice<'_>> = Vec::with_capacity(66);
        slices.push(IoSlice::new(&head));
        for piece in pieces {
            slices.push(IoSlice::new(piece));
        }
        self.write_all_vectored(&mut slices)
    }

    /// Changes how long the peer may make no progress.
    pub(crate) fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    pub(crate) fn read_exact(&mut self, out: &mut [u8]) -> Result<(), LinkError> {
        self.fill(out).1
    }

    /// How much of `out` was filled, and why not all.
    fn fill(&mut self, out: &mut [u8]) -> (usize, Result<(), LinkError>) {
        let mut progress = Instant::now();
        let mut filled = 0;
        while filled < out.len() {
            if is_over(self.deadline) {
                return (filled, Err(LinkError::Silent(self.timeout)));
            }
            let rest = &mut out[filled..];
            let result = match &mut self.stream {
                Stream::Plain(tcp) => tcp.read(rest),
                Stream::Client(tls) => tls.read(rest),
                Stream::Server(tls) => tls.read(rest),
            };
            let paused = match result {
                Ok(0) => Err(LinkError::Closed),
                Ok(n) => {
                    filled += n;
                    progress = Instant::now();
                    Ok(())
                }
                Err(error) => self.pause(error, progress),
            };
            if paused.is_err() {
                return (filled, paused);
            }
        }
        (filled, Ok(()))
    }

    /// Waits for something, and reads what is there.
    pub(crate) fn read_some(&mut self, out: &mut [u8]) -> Result<usize, LinkError> {
        let since = Instant::now();
        loop {
            let result = match &mut self.stream {
                Stream::Plain(tcp) => tcp.read(out),
                Stream::Client(tls) => tls.read(out),
                Stream::Server(tls) => tls.read(out),
            };
            match result {
                Ok(0) => return Err(LinkError::Closed),
                Ok(n) => return Ok(n),
                Err(error) => self.pause(error, since)?,
            }
        }
    }

    pub(crate) fn write_all(&mut self, bytes: &[u8]) -> Result<(), LinkError> {
        self.write_all_vectored(&mut [IoSlice::new(bytes)])
    }

    /// Writes all of the slices.
    pub(crate) fn write_all_vectored(
        &mut self,
        mut slices: &mut [IoSlice<'_>],
    ) -> Result<(), LinkError> {
        let mut progress = Instant::now();
        IoSlice::advance_slices(&mut slices, 0);
        while !slices.is_empty() {
            let batch = slices.len().min(1024);
            let result = match &mut self.stream {
                Stream::Plain(tcp) => tcp.write_vectored(&slices[..batch]),
                // Not through `StreamOwned`, which takes one slice at a time: a record, a system
                // call and a wake-up of the peer for each page.
                Stream::Client(tls) => rustls::Stream::new(&mut tls.conn, &mut tls.sock)
                    .write_vectored(&slices[..batch]),
                Stream::Server(tls) => rustls::Stream::new(&mut tls.conn, &mut tls.sock)
                    .write_vectored(&slices[..batch]),
            };
            match result {
                Ok(0) => return Err(LinkError::Closed),
                Ok(n) => {
                    IoSlice::advance_slices(&mut slices, n);
                    progress = Instant::now();
                }
                Err(error) => self.pause(error, progress)?,
            }
        }
        self.flush(progress)
    }

    /// TLS may hold records that the socket had no room for.
    fn flush(&mut self, mut progress: Instant) -> Result<(), LinkError> {
        loop {
            let (result, left) = match &mut self.stream {
                Stream::Plain(_) => return Ok(()),
                Stream::Client(tls) => (tls.conn.write_tls(&mut tls.sock), tls.conn.wants_write()),
                Stream::Server(tls) => (tls.conn.write_tls(&mut tls.sock), tls.conn.wants_write()),
            };
            match result {
                Ok(n) => {
                    if !left {
                        return Ok(());
                    }
                    if n > 0 {
                        progress = Instant::now();
                    }
                }
                Err(error) => self.pause(error, progress)?,
            }
        }
    }

    /// A tick without progress is no error yet.
    fn pause(&self, error: io::Error, progress: Instant) -> Result<(), LinkError> {
        match error.kind() {
            io::ErrorKind::Interrupted => Ok(()),
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                if progress.elapsed() < self.timeout =>
            {
                Ok(())
            }
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                Err(LinkError::Silent(self.timeout))
            }
            io::ErrorKind::UnexpectedEof => Err(LinkError::Closed),
            _ => Err(error.into()),
        }
    }
}

/// Head of a frame whose body is given in pieces; packs it if there is a compressor.
pub(crate) fn pack<'a>(
    (kind, vm): (FrameKind, u16),
    pieces: impl Iterator<Item = &'a [u8]> + Clone,
    compressor: Option<&mut Compressor>,
    packed: &mut Vec<u8>,
) -> Result<FrameHeader, LinkError> {
    let raw: usize = pieces.clone().map(<[u8]>::len).sum();
    let raw_len = u32::try_from(raw).unwrap_or(u32::MAX);
    if raw > MAX_BODY {
        return Err(WireError::TooLong {
            what: "a frame",
            length: raw_len.into(),
            limit: MAX_BODY as u64,
        }
        .into());
    }
    let Some(compressor) = compressor.filter(|_| raw > 0) else {
        return Ok(FrameHeader::new(kind, vm, raw_len, raw_len));
    };
    compressor.frame(pieces, raw, packed)?;
    let body_len = u32::try_from(packed.len()).unwrap_or(u32::MAX);
    Ok(FrameHeader::new(kind, vm, body_len, raw_len).with_compression(true))
}

/// The body of a frame that was received, `plain` or `packed`.
pub(crate) fn unpack(
    header: &FrameHeader,
    plain: Option<Buffer>,
    pool: &Arc<Pool>,
    unpacker: Option<&mut Decompressor>,
    packed: &[u8],
) -> Result<Buffer, LinkError> {
    if let Some(body) = plain {
        return Ok(body);
    }
    let unpacker = unpacker.ok_or_else(|| {
        WireError::Control("a compressed frame, and no compression was agreed".into())
    })?;
    let mut body = pool.take(header.raw_len());
    unpacker.frame(packed, &mut body)?;
    Ok(body)
}

fn is_over(deadline: Option<Instant>) -> bool {
    deadline.is_some_and(|deadline| Instant::now() >= deadline)
}

/// Keeps what the kernel has taken and not sent short: what is urgent waits for all of it.
pub(crate) fn keep_short(tcp: &TcpStream) -> io::Result<()> {
    socket2::SockRef::from(tcp).set_tcp_notsent_lowat(UNSENT)
}

fn prepare(tcp: &TcpStream, timeout: Duration) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    tcp.set_read_timeout(Some(TICK))?;
    tcp.set_write_timeout(Some(TICK))?;
    // Beyond our own limit the kernel need not try either.
    socket2::SockRef::from(tcp).set_tcp_user_timeout(Some(timeout * 2))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn who_says_who_they_are_a_byte_at_a_time_is_not_listened_to_for_longer_than_a_silence() {
        let door = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = door.local_addr().unwrap();
        let slow = std::thread::spawn(move || {
            let mut tcp = TcpStream::connect(address).unwrap();
            // Never silent, and honest so far.
            let hello = MAGIC.iter().chain(&[0, 1, 0, 0]).chain(&[b' '; 256]);
            for byte in hello {
                if tcp.write_all(&[*byte]).is_err() {
                    return;
                }
                std::thread::sleep(Duration::from_millis(100));
            }
        });
        let (tcp, _) = door.accept().unwrap();
        let timeout = Duration::from_millis(500);
        let mut link = Link::accepted(tcp, &Security::Plaintext, timeout).unwrap();
        let heard = link.receive_hello();
        assert!(matches!(heard, Err(LinkError::Silent(_))));
        assert!(link.deadline.is_none(), "what follows has its own limits");
        drop(link);
        slow.join().unwrap();
    }
}
