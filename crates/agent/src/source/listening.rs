//! Where a source QEMU connects.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// How often somebody who waits for a second connection looks whether it is still wanted: while memory is copied,
/// before a switch to post-copy, it does not come.
const LOOK: Duration = Duration::from_millis(500);

/// What the names of these sockets begin with.
pub(crate) const NAMED: &str = "m-";

/// Removes the sockets that an agent has left which was killed. They are nobody's.
pub(crate) fn remove_leftovers(run_dir: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(run_dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(NAMED) && name.ends_with(".sock") {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// A socket at a path, which is there as long as this is.
pub(crate) struct Listening {
    listener: UnixListener,
    path: PathBuf,
}

impl Listening {
    pub(crate) fn at(path: &Path) -> anyhow::Result<Self> {
        let bind = || {
            let listener = UnixListener::bind(path)?;
            listener.set_nonblocking(true)?;
            Ok::<_, io::Error>(listener)
        };
        let listener = bind().with_context(|| format!("listening on {}", path.display()))?;
        Ok(Self {
            listener,
            path: path.to_owned(),
        })
    }

    /// Accepts the next connection.
    pub(crate) fn accept(&self, patience: Duration) -> io::Result<UnixStream> {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.accept_within(left)? {
                Some(socket) => return Ok(socket),
                None if Instant::now() < deadline => {}
                None => return Err(io::ErrorKind::TimedOut.into()),
            }
        }
    }

    /// Accepts the next connection, which may be long in coming; none once nobody wants it.
    pub(crate) fn accept_while(
        self,
        is_wanted: impl Fn() -> bool,
    ) -> io::Result<Option<UnixStream>> {
        while is_wanted() {
            if let Some(socket) = self.accept_within(LOOK)? {
                return Ok(Some(socket));
            }
        }
        Ok(None)
    }

    fn accept_within(&self, time: Duration) -> io::Result<Option<UnixStream>> {
        let time = Timespec::try_from(time).map_err(|_| io::ErrorKind::InvalidInput)?;
        match poll(
            &mut [PollFd::new(&self.listener, PollFlags::IN)],
            Some(&time),
        ) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        match self.listener.accept() {
            Ok((socket, _)) => {
                socket.set_nonblocking(false)?;
                Ok(Some(socket))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_come_in_their_order_and_the_path_goes_with_the_listener() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let listening = Listening::at(&path).unwrap();
        let nobody = listening.accept(Duration::from_millis(1)).unwrap_err();
        assert_eq!(nobody.kind(), io::ErrorKind::TimedOut);
        let (first, second) = (UnixStream::connect(&path), UnixStream::connect(&path));
        drop(first.unwrap());
        let accepted = listening.accept(Duration::from_secs(5)).unwrap();
        // The end of the first, and not of the second.
        assert_eq!(io::copy(&mut &accepted, &mut io::sink()).unwrap(), 0);
        let other = listening.accept_while(|| true).unwrap().unwrap();
        other.set_nonblocking(true).unwrap();
        let waits = io::Read::read(&mut &other, &mut [0]).unwrap_err();
        assert_eq!(waits.kind(), io::ErrorKind::WouldBlock);
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn only_these_sockets_are_removed_when_they_are_left() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["m-3-0123.sock", "control.sock", "m-notes"] {
            std::fs::write(directory.path().join(name), "").unwrap();
        }
        remove_leftovers(directory.path()).unwrap();
        let left = std::fs::read_dir(directory.path()).unwrap();
        let mut left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["control.sock", "m-notes"]);
    }

    #[test]
    fn a_connection_that_nobody_wants_any_more_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let listening = Listening::at(&path).unwrap();
        assert!(listening.accept_while(|| false).unwrap().is_none());
        assert!(!path.exists());
    }
}
