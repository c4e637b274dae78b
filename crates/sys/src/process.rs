//! Processes that need not be children, held by pidfd so that a reused pid is never mistaken.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, PidfdGetfdFlags, Signal, pidfd_getfd, pidfd_open, pidfd_send_signal, setsid,
};

/// A handle to one process, child or not; it keeps naming that process after its death.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    pidfd: OwnedFd,
}

impl Process {
    /// Takes hold of the process that has `pid` now.
    ///
    /// # Errors
    /// `ESRCH` if there is none, `EINVAL` if `pid` is no process id.
    pub fn open(pid: u32) -> io::Result<Self> {
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let raw = raw.ok_or(io::Error::from(rustix::io::Errno::INVAL))?;
        let pidfd = pidfd_open(raw, PidfdFlags::empty())?;
        Ok(Self { pid, pidfd })
    }

    /// The process id; names another process once this one is dead and reaped.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it still executes. A zombie does not; what cannot be asked counts as alive.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        !self.wait_gone(Duration::ZERO).unwrap_or(false)
    }

    /// Sends `SIGKILL`. A process that is gone already is success.
    ///
    /// # Errors
    /// `EPERM` if it belongs to somebody else.
    pub fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until it is gone (exited, reaped or not); `false` if it lives on after `timeout`.
    ///
    /// # Errors
    /// What `poll` reports.
    pub fn wait_gone(&self, timeout: Duration) -> io::Result<bool> {
        // A timeout that no clock reaches is the same as none.
        let deadline = Instant::now().checked_add(timeout);
        loop {
            let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
            match poll(&mut fds, left.as_ref()) {
                Ok(ready) => return Ok(ready > 0),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Takes a copy of the socket of this number (the inode that `fstat` gives) that the process has open.
    ///
    /// # Errors
    /// `NotFound` if it has none, `EPERM` if it may not be traced, or it is gone.
    pub fn take_socket(&self, number: u64) -> io::Result<OwnedFd> {
        let wanted = format!("socket:[{number}]");
        for entry in fs::read_dir(format!("/proc/{}/fd", self.pid))? {
            let entry = entry?;
            // Closed since the list was read.
            let Ok(link) = fs::read_link(entry.path()) else {
                continue;
            };
            let name = entry.file_name();
            let descriptor = name.to_str().and_then(|name| name.parse().ok());
            if link.as_os_str() == wanted.as_str()
                && let Some(descriptor) = descriptor
            {
                let flags = PidfdGetfdFlags::empty();
                return Ok(pidfd_getfd(&self.pidfd, descriptor, flags)?);
            }
        }
        Err(io::ErrorKind::NotFound.into())
    }

    /// When it was started, in clock ticks since boot: with the pid, a name that is never reused.
    ///
    /// # Errors
    /// `NotFound` if it is gone, `InvalidData` if `/proc/PID/stat` is not understood.
    pub fn start_time(&self) -> io::Result<u64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid))?;
        let ticks = start_time_of(&stat).ok_or(io::ErrorKind::InvalidData)?;
        // Still alive after the reading: so it was this process that was read.
        if self.is_alive() {
            Ok(ticks)
        } else {
            Err(io::ErrorKind::NotFound.into())
        }
    }
}

/// Field 22 of `/proc/PID/stat`. The second field, the name, may hold blanks and parentheses.
fn start_time_of(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// The process at the other end of the unix socket `stream`: the one that called `connect`, or `listen` if this
/// end connected. 0 if that process is not visible in our pid namespace.
///
/// # Errors
/// What `getsockopt` reports.
pub fn peer_pid(stream: &impl AsRawFd) -> io::Result<u32> {
    let mut credentials = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut len = libc::socklen_t::try_from(size_of::<libc::ucred>())
        .map_err(|_| io::ErrorKind::InvalidInput)?;
    // rustix offers the call, but its pid type cannot hold the 0 of an invisible process.
    // SAFETY: the pointer and the length describe `credentials`, which outlives the call, and
    // any bytes are a valid `ucred`.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut len,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    u32::try_from(credentials.pid).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Makes `command` start its program as the leader of a session of its own, so that no signal
/// to the caller's terminal or process group reaches it.
pub fn own_session(command: &mut Command) -> &mut Command {
    // SAFETY: the closure runs between fork and exec and does nothing but one system call, which
    // is async-signal-safe; it neither allocates nor takes a lock.
    unsafe { command.pre_exec(|| setsid().map(drop).map_err(io::Error::from)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;
    use std::process::{Child, Stdio};

    fn sleeper() -> Child {
        Command::new("sleep")
            .arg("60")
            .stdin(Stdio::null())
            .spawn()
            .unwrap()
    }

    #[test]
    fn a_killed_process_is_gone_even_before_it_is_reaped() {
        let mut child = sleeper();
        let process = Process::open(child.id()).unwrap();
        assert!(process.is_alive());
        assert!(!process.wait_gone(Duration::from_millis(10)).unwrap());
        process.kill().unwrap();
        assert!(process.wait_gone(Duration::from_secs(5)).unwrap());
        assert!(!process.is_alive());
        assert!(process.start_time().is_err());
        child.wait().unwrap();
        process.kill().unwrap();
    }

    #[test]
    fn a_pid_that_no_process_has_is_an_error() {
        assert_eq!(
            Process::open(0).unwrap_err().raw_os_error(),
            Some(libc::EINVAL)
        );
        assert_eq!(
            Process::open(u32::MAX).unwrap_err().raw_os_error(),
            Some(libc::EINVAL)
        );
        let mut child = Command::new("true").spawn().unwrap();
        let pid = child.id();
        child.wait().unwrap();
        assert_eq!(
            Process::open(pid).unwrap_err().raw_os_error(),
            Some(libc::ESRCH)
        );
    }

    #[test]
    fn the_start_time_is_found_behind_any_process_name() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 9 9";
        assert_eq!(start_time_of(stat), Some(4711));
        assert_eq!(start_time_of("7 (cut"), None);
        assert_eq!(start_time_of("7 (cut) S 1 2"), None);
        let own = Process::open(std::process::id()).unwrap();
        assert!(own.start_time().unwrap() > 0);
    }

    #[test]
    fn the_peer_of_a_socket_pair_is_this_process() {
        let (left, _right) = UnixStream::pair().unwrap();
        assert_eq!(peer_pid(&left).unwrap(), std::process::id());
    }

    #[test]
    fn a_socket_of_a_process_is_found_by_its_number_and_is_the_same_socket() {
        use std::io::{Read, Write};
        let (left, mut right) = UnixStream::pair().unwrap();
        let own = Process::open(std::process::id()).unwrap();
        let number = rustix::fs::fstat(&left).unwrap().st_ino;
        let copy = own.take_socket(number).unwrap();
        drop(left);
        UnixStream::from(copy).write_all(b"x").unwrap();
        let mut said = Vec::new();
        // It ends with the last copy.
        right.read_to_end(&mut said).unwrap();
        assert_eq!(said, b"x");
        let error = own.take_socket(number).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_program_in_its_own_session_leads_it() {
        let mut command = Command::new("sleep");
        let mut child = own_session(command.arg("60")).spawn().unwrap();
        let pid = Pid::from_child(&child);
        let session = rustix::process::getsid(Some(pid)).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(session, pid);
    }
}
