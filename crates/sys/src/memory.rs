//! Reading pages out of another process.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use page::{HostAddr, PAGE_SIZE};

use crate::Process;

/// Pieces that one system call takes at most (`UIO_MAXIOV`).
const IOVECS_MAX: usize = 1024;

/// Pages that one system call is asked for at most: 256 MiB, below the kernel's limit of 2 GiB
/// for a call, which would end the transfer inside a page.
const BATCH_PAGES_MAX: usize = 65_536;

/// Reads another process's memory, without stopping it.
///
/// Needs the right to trace that process: the same user (with Yama's `ptrace_scope` 0), or
/// `CAP_SYS_PTRACE`. A page is read while the process may write it: it can be torn.
#[derive(Debug)]
pub struct ProcessMemory {
    process: Process,
    pid: libc::pid_t,
    /// `/proc/PID/mem`; none without the right to open it, and then nothing can be read.
    file: Option<File>,
}

impl ProcessMemory {
    /// Takes hold of the process that has `pid` now.
    ///
    /// # Errors
    /// As [`Process::open`]; missing rights show at the first reading, as `EPERM`.
    pub fn open(pid: u32) -> io::Result<Self> {
        let process = Process::open(pid)?;
        let pid = libc::pid_t::try_from(pid).map_err(|_| io::ErrorKind::InvalidInput)?;
        let file = File::open(format!("/proc/{pid}/mem")).ok();
        Ok(Self { process, pid, file })
    }

    /// Reads the whole pages at `addrs` into `out`, in that order, in as few system calls as
    /// possible: adjacent addresses become one piece, 1024 pieces go into one call.
    ///
    /// Returns how many leading pages were read: all, or those before the first one that is not
    /// mapped. What `out` holds behind them is undefined.
    ///
    /// # Errors
    /// `InvalidInput` unless `out` has exactly one page for each address; `EPERM` without the
    /// right to read; `ESRCH` if the process is gone, also when it ended during the reading.
    pub fn read_pages(&self, addrs: &[HostAddr], out: &mut [u8]) -> io::Result<usize> {
        if addrs.len().checked_mul(PAGE_SIZE) != Some(out.len()) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut done = 0;
        let mut batch_pages = BATCH_PAGES_MAX;
        while done < addrs.len() {
            let pieces = pieces_of(&addrs[done..], batch_pages);
            match self.read_pieces(&pieces, &mut out[done * PAGE_SIZE..]) {
                Ok(read) if read >= PAGE_SIZE => done += read / PAGE_SIZE,
                Ok(_) => break,
                // A piece of several pages may fail as a whole: the fault is found page by page.
                Err(error) if error.raw_os_error() == Some(libc::EFAULT) => {
                    if batch_pages == 1 {
                        break;
                    }
                    batch_pages = 1;
                }
                Err(error) => return Err(error),
            }
        }
        // The call names a pid, which could have been reused; not while the process lived.
        if self.process.is_alive() {
            Ok(done)
        } else {
            Err(io::Error::from_raw_os_error(libc::ESRCH))
        }
    }

    /// As [`Self::read_pages`], without breaking the sharing of pages: since Linux 6.0 the
    /// kernel gives a process its own copy of a page that it shares with others (KSM, fork)
    /// before it lends it to [`Self::read_pages`]. One system call for each run of pages.
    ///
    /// # Errors
    /// As [`Self::read_pages`].
    pub fn read_shared_pages(&self, addrs: &[HostAddr], out: &mut [u8]) -> io::Result<usize> {
        if addrs.len().checked_mul(PAGE_SIZE) != Some(out.len()) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let file = self.file.as_ref();
        let file = file.ok_or_else(|| io::Error::from_raw_os_error(libc::EPERM))?;
        let follows =
            |one: &HostAddr, next: &HostAddr| one.0.checked_add(PAGE_SIZE as u64) == Some(next.0);
        let mut done = 0;
        for run in addrs.chunk_by(follows) {
            let from = done * PAGE_SIZE;
            let room = &mut out[from..from + run.len() * PAGE_SIZE];
            let read = read_run(file, run[0], room)?;
            done += read / PAGE_SIZE;
            if read < room.len() {
                break;
            }
        }
        if self.process.is_alive() {
            Ok(done)
        } else {
            Err(io::Error::from_raw_os_error(libc::ESRCH))
        }
    }

    /// Reads `piece` bytes at each address into `out`, in that order, 1024 in a system call.
    /// None may cross a page boundary. Costs about a tenth of reading whole pages: what is
    /// paid for is finding each page, not its bytes.
    ///
    /// Returns how many leading pieces were read, as [`Self::read_pages`] does.
    ///
    /// # Errors
    /// As [`Self::read_pages`]; `InvalidInput` also for a piece of no bytes or beyond a page.
    pub fn read_samples(
        &self,
        addrs: &[HostAddr],
        piece: usize,
        out: &mut [u8],
    ) -> io::Result<usize> {
        if piece == 0 || piece > PAGE_SIZE || addrs.len().checked_mul(piece) != Some(out.len()) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut done = 0;
        while done < addrs.len() {
            let leading = addrs[done..].iter().take(IOVECS_MAX);
            let pieces: Vec<_> = leading
                .map(|addr| libc::iovec {
                    iov_base: std::ptr::without_provenance_mut(usize_of(*addr)),
                    iov_len: piece,
                })
                .collect();
            match self.read_pieces(&pieces, &mut out[done * piece..]) {
                Ok(read) if read >= piece => done += read / piece,
                Ok(_) => break,
                Err(error) if error.raw_os_error() == Some(libc::EFAULT) => break,
                Err(error) => return Err(error),
            }
        }
        if self.process.is_alive() {
            Ok(done)
        } else {
            Err(io::Error::from_raw_os_error(libc::ESRCH))
        }
    }

    /// One system call; returns the bytes read.
    fn read_pieces(&self, remote: &[libc::iovec], out: &mut [u8]) -> io::Result<usize> {
        let wanted = remote.iter().map(|piece| piece.iov_len).sum::<usize>();
        let len = wanted.min(out.len());
        let local = libc::iovec {
            iov_base: out.as_mut_ptr().cast(),
            iov_len: len,
        };
        // SAFETY: `local` describes the first `len` bytes of `out`, borrowed mutably for the
        // call. The remote addresses are resolved by the kernel in the other process, where a
        // wrong one is an error return; none is dereferenced here.
        let read = unsafe {
            libc::process_vm_readv(
                self.pid,
                &raw const local,
                1,
                remote.as_ptr(),
                remote.len() as libc::c_ulong,
                0,
            )
        };
        usize::try_from(read).map_err(|_| io::Error::last_os_error())
    }
}

/// Reads adjacent pages up to the first that is not mapped; returns the bytes read.
fn read_run(file: &File, start: HostAddr, out: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < out.len() {
        match file.read_at(&mut out[done..], start.0.saturating_add(done as u64)) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // Not mapped; an address beyond what a file offset can be is not, either.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EIO | libc::EINVAL)) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// The leading addresses as pieces of memory: at most [`IOVECS_MAX`], at most `pages_max` pages.
fn pieces_of(addrs: &[HostAddr], pages_max: usize) -> Vec<libc::iovec> {
    let mut pieces: Vec<libc::iovec> = Vec::with_capacity(addrs.len().min(IOVECS_MAX));
    let mut end = None;
    for addr in addrs.iter().take(pages_max) {
        let full = pieces.len() == IOVECS_MAX;
        match pieces.last_mut() {
            Some(last) if end == Some(addr.0) => last.iov_len += PAGE_SIZE,
            _ if full => break,
            _ => pieces.push(libc::iovec {
                iov_base: std::ptr::without_provenance_mut(usize_of(*addr)),
                iov_len: PAGE_SIZE,
            }),
        }
        end = addr.0.checked_add(PAGE_SIZE as u64);
    }
    pieces
}

/// An address as this 64-bit process writes it; beyond that, one that is never mapped.
fn usize_of(addr: HostAddr) -> usize {
    usize::try_from(addr.0).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Memfd;
    use page::ByteLen;

    const PAGE: u64 = PAGE_SIZE as u64;

    fn own_memory() -> ProcessMemory {
        ProcessMemory::open(std::process::id()).unwrap()
    }

    /// A mapping whose page `i` is filled with byte `i + 1`.
    fn numbered_pages(count: u8) -> crate::Mapping {
        let len = ByteLen(u64::from(count) * PAGE);
        let mapping = Memfd::create("numbered", len).unwrap().map().unwrap();
        for i in 0..count {
            mapping
                .write(u64::from(i) * PAGE, &[i + 1; PAGE_SIZE])
                .unwrap();
        }
        mapping
    }

    #[test]
    fn pages_arrive_in_the_order_asked_for() {
        let mapping = numbered_pages(8);
        let order = [3, 4, 5, 0, 7, 6];
        let addrs = order.map(|i| HostAddr(mapping.addr().0 + i * PAGE));
        let mut out = vec![0; addrs.len() * PAGE_SIZE];
        assert_eq!(
            own_memory().read_pages(&addrs, &mut out).unwrap(),
            addrs.len()
        );
        for (chunk, i) in out.chunks(PAGE_SIZE).zip(order) {
            assert!(chunk.iter().all(|&byte| u64::from(byte) == i + 1));
        }
    }

    #[test]
    fn more_scattered_pages_than_one_call_takes_are_read() {
        let mapping = numbered_pages(3);
        let addrs: Vec<_> = (0..3000)
            .map(|i| HostAddr(mapping.addr().0 + (i * 2 % 3) * PAGE))
            .collect();
        let mut out = vec![0; addrs.len() * PAGE_SIZE];
        assert_eq!(own_memory().read_pages(&addrs, &mut out).unwrap(), 3000);
        assert!((0..3000).all(|i| out[i * PAGE_SIZE] == u8::try_from(i * 2 % 3 + 1).unwrap()));
    }

    #[test]
    fn reading_stops_at_the_first_page_that_is_not_mapped() {
        let mapping = numbered_pages(4);
        let hole = HostAddr(PAGE);
        let at = |i: u64| HostAddr(mapping.addr().0 + i * PAGE);
        let mut out = vec![0; 5 * PAGE_SIZE];
        let addrs = [at(2), at(3), hole, at(0), at(1)];
        assert_eq!(own_memory().read_pages(&addrs, &mut out).unwrap(), 2);
        assert_eq!((out[0], out[PAGE_SIZE]), (3, 4));
        let first = [hole, at(0), at(1), at(2), at(3)];
        assert_eq!(own_memory().read_pages(&first, &mut out).unwrap(), 0);
        let top = [HostAddr(u64::MAX - 4095)];
        assert_eq!(
            own_memory()
                .read_pages(&top, &mut out[..PAGE_SIZE])
                .unwrap(),
            0
        );
    }

    #[test]
    fn shared_pages_are_read_in_order_up_to_the_first_hole_and_stay_shared() {
        let file = Memfd::create("shared", ByteLen(8 * PAGE)).unwrap();
        let mapping = file.map().unwrap();
        for page in 0..8 {
            mapping
                .write(page * PAGE, &[u8::try_from(page).unwrap() + 1; PAGE_SIZE])
                .unwrap();
        }
        let at = |i: u64| HostAddr(mapping.addr().0 + i * PAGE);
        let addrs = [at(5), at(6), at(1), HostAddr(PAGE), at(0)];
        let mut out = vec![0; 5 * PAGE_SIZE];
        let memory = own_memory();
        assert_eq!(memory.read_shared_pages(&addrs, &mut out).unwrap(), 3);
        assert_eq!((out[0], out[PAGE_SIZE], out[3 * PAGE_SIZE - 1]), (6, 7, 2));
        let top = [HostAddr(u64::MAX - 4095)];
        let read = memory.read_shared_pages(&top, &mut out[..PAGE_SIZE]);
        assert_eq!(read.unwrap(), 0);
        assert!(memory.read_shared_pages(&top, &mut out).is_err());
    }

    #[test]
    fn samples_are_the_bytes_at_their_addresses_up_to_the_first_hole() {
        let mapping = numbered_pages(8);
        mapping.write(3 * PAGE + 64, b"sixteen bytes ok").unwrap();
        let at = |i: u64| HostAddr(mapping.addr().0 + i * PAGE + 64);
        let addrs: Vec<_> = (0..2500).map(|i| at(i * 3 % 8)).collect();
        let mut out = vec![0; 2500 * 16];
        let memory = own_memory();
        assert_eq!(memory.read_samples(&addrs, 16, &mut out).unwrap(), 2500);
        assert_eq!(&out[16..32], b"sixteen bytes ok");
        assert_eq!(out[16 * 2499], u8::try_from(2499 * 3 % 8 + 1).unwrap());
        let holed = [at(0), HostAddr(PAGE), at(1)];
        let read = memory.read_samples(&holed, 16, &mut out[..48]).unwrap();
        assert_eq!(read, 1);
        assert!(memory.read_samples(&holed, 0, &mut []).is_err());
    }

    #[test]
    fn a_hole_inside_adjacent_pages_is_found_exactly() {
        let mapping = numbered_pages(6);
        // Pages beyond the end of the file are mapped and cannot be read.
        mapping.file().set_len(ByteLen(4 * PAGE)).unwrap();
        let addrs: Vec<_> = (0..6)
            .map(|i| HostAddr(mapping.addr().0 + i * PAGE))
            .collect();
        let mut out = vec![0; 6 * PAGE_SIZE];
        assert_eq!(own_memory().read_pages(&addrs, &mut out).unwrap(), 4);
    }

    #[test]
    fn a_buffer_of_another_size_is_refused() {
        let mut out = vec![0; PAGE_SIZE + 1];
        let error = own_memory()
            .read_pages(&[HostAddr(0)], &mut out)
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn a_process_that_ended_is_not_read() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let memory = ProcessMemory::open(child.id()).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let error = memory
            .read_pages(&[HostAddr(PAGE)], &mut [0; PAGE_SIZE])
            .unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ESRCH));
    }
}
