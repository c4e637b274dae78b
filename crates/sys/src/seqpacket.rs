//! Unix sockets that keep packets apart, and that carry descriptors.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, accept_with, bind, listen, recv, sendmsg, socket_with,
};

/// Connections that may wait to be accepted: each generation of a program that forks itself into
/// the background makes one.
const BACKLOG: i32 = 8;

/// Listens for connections of type `SOCK_SEQPACKET`. The path goes with it.
#[derive(Debug)]
pub struct SeqPacketListener {
    fd: OwnedFd,
    path: PathBuf,
}

impl SeqPacketListener {
    /// Binds to `path`, which must not exist, and listens.
    ///
    /// # Errors
    /// What the kernel reports; `InvalidInput` for a path that is too long.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        bind(&fd, &SocketAddrUnix::new(path)?)?;
        let path = path.to_owned();
        let listener = Self { fd, path };
        listen(&listener.fd, BACKLOG)?;
        Ok(listener)
    }

    /// Waits for the next connection; `None` if there is none within `timeout`.
    ///
    /// # Errors
    /// What the kernel reports.
    pub fn accept(&self, timeout: Duration) -> io::Result<Option<SeqPacket>> {
        let deadline = Instant::now().checked_add(timeout);
        loop {
            match accept_with(&self.fd, SocketFlags::CLOEXEC) {
                Ok(fd) => return Ok(Some(SeqPacket { fd })),
                Err(rustix::io::Errno::AGAIN) => {}
                Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => continue,
                Err(error) => return Err(error.into()),
            }
            let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Ok(None);
            }
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            match poll(&mut [PollFd::new(&self.fd, PollFlags::IN)], left.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Drop for SeqPacketListener {
    fn drop(&mut self) {
        // Somebody may have removed it already.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A connection.
#[derive(Debug)]
pub struct SeqPacket {
    fd: OwnedFd,
}

impl SeqPacket {
    /// Limits how long each call may take.
    ///
    /// # Errors
    /// `InvalidInput` for a time of zero.
    pub fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        for direction in [Timeout::Recv, Timeout::Send] {
            set_socket_timeout(&self.fd, direction, Some(timeout))?;
        }
        Ok(())
    }

    /// The process at the other end, as it was when it connected; 0 if it is not visible here.
    ///
    /// # Errors
    /// What the kernel reports.
    pub fn peer_pid(&self) -> io::Result<u32> {
        crate::peer_pid(&self.fd)
    }

    /// Sends one packet, and with it a descriptor.
    ///
    /// # Errors
    /// What the kernel reports; `WouldBlock` when the time is over; no signal.
    pub fn send(&self, packet: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors = descriptor.map(|descriptor| [descriptor]);
        if let Some(descriptors) = &descriptors
            && !control.push(SendAncillaryMessage::ScmRights(descriptors))
        {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let pieces = [IoSlice::new(packet)];
        let sent = rustix::io::retry_on_intr(|| {
            sendmsg(&self.fd, &pieces, &mut control, SendFlags::NOSIGNAL)
        })?;
        if sent == packet.len() {
            Ok(())
        } else {
            Err(io::ErrorKind::WriteZero.into())
        }
    }

    /// Receives one packet into `buffer`; its length, 0 at the end of the connection. A longer
    /// packet is cut, which its own header tells.
    ///
    /// # Errors
    /// What the kernel reports; `WouldBlock` when the time is over.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let received = rustix::io::retry_on_intr(|| {
            recv(&self.fd, &mut *buffer, RecvFlags::empty()).map(|(len, _)| len)
        })?;
        Ok(received)
    }
}

impl AsFd for SeqPacket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::connect;

    fn socket_path(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("gangway-{name}-{}", std::process::id()))
    }

    #[test]
    fn packets_stay_apart_and_the_peer_is_known() {
        let path = socket_path("packets");
        let listener = SeqPacketListener::bind(&path).unwrap();
        assert!(
            listener
                .accept(Duration::from_millis(10))
                .unwrap()
                .is_none()
        );
        let flags = SocketFlags::CLOEXEC;
        let client = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        connect(&client, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        let client = SeqPacket { fd: client };
        let server = listener.accept(Duration::from_secs(5)).unwrap().unwrap();
        assert_eq!(server.peer_pid().unwrap(), std::process::id());
        server.send(b"one", Some(client.as_fd())).unwrap();
        server.send(b"three", None).unwrap();
        let mut buffer = [0; 16];
        assert_eq!(client.receive(&mut buffer).unwrap(), 3);
        assert_eq!(client.receive(&mut buffer).unwrap(), 5);
        client.set_timeout(Duration::from_millis(10)).unwrap();
        let late = client.receive(&mut buffer).unwrap_err();
        assert_eq!(late.kind(), io::ErrorKind::WouldBlock);
        drop(server);
        assert_eq!(client.receive(&mut buffer).unwrap(), 0);
        drop(listener);
        assert!(!path.exists());
    }
}
