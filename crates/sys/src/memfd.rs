//! Memory that several processes can map, and mappings of it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use page::{ByteLen, HostAddr};
use rustix::fs::{
    FallocateFlags, MemfdFlags, Mode, OFlags, SealFlags, fallocate, fchmod, fcntl_add_seals,
    ftruncate, memfd_create, open,
};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// An anonymous file in memory. Clones name the same file.
#[derive(Clone, Debug)]
pub struct Memfd {
    fd: Arc<OwnedFd>,
}

impl Memfd {
    /// Creates one of `len` zero bytes; `name` shows in `/proc/PID/maps`.
    ///
    /// # Errors
    /// What the kernel reports; `EINVAL` for a name above 249 bytes.
    pub fn create(name: &str, len: ByteLen) -> io::Result<Self> {
        let fd = memfd_create(name, MemfdFlags::CLOEXEC)?;
        ftruncate(&fd, len.0)?;
        Ok(Self { fd: Arc::new(fd) })
    }

    /// Creates an empty one that grows with [`Memfd::set_len`] and never shrinks: what others map
    /// of it stays readable.
    ///
    /// # Errors
    /// As [`Memfd::create`].
    pub fn create_growing(name: &str) -> io::Result<Self> {
        let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::SEAL)?;
        // Who holds a descriptor for reading cannot turn it into one for writing, unless it is root
        // or the same user.
        fchmod(&fd, Mode::RUSR)?;
        Ok(Self { fd: Arc::new(fd) })
    }

    /// A descriptor of it that cannot write, for a process that shall only read or map privately.
    ///
    /// # Errors
    /// What the kernel reports.
    pub fn read_only(&self) -> io::Result<OwnedFd> {
        let number = std::os::fd::AsRawFd::as_raw_fd(&*self.fd);
        let path = format!("/proc/self/fd/{number}");
        Ok(open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
    }

    /// Its inode, as `/proc/PID/maps` shows it.
    ///
    /// # Errors
    /// What the kernel reports.
    pub fn inode(&self) -> io::Result<u64> {
        Ok(rustix::fs::fstat(&self.fd)?.st_ino)
    }

    /// Memory that it takes now; holes take none.
    ///
    /// # Errors
    /// What the kernel reports.
    pub fn allocated(&self) -> io::Result<ByteLen> {
        let blocks = rustix::fs::fstat(&self.fd)?.st_blocks;
        // Always counted in units of 512 bytes.
        let bytes = u64::try_from(blocks).ok().and_then(|b| b.checked_mul(512));
        bytes
            .map(ByteLen)
            .ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// Writes `bytes` at `offset`, without mapping it.
    ///
    /// # Errors
    /// `InvalidInput` if they do not all lie before its end: it never grows by writing.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let end = offset.checked_add(bytes.len() as u64);
        if end.is_none_or(|end| self.len().is_ok_and(|len| end > len.0)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut rest = bytes;
        let mut at = offset;
        while !rest.is_empty() {
            let written = rustix::io::retry_on_intr(|| rustix::io::pwrite(&self.fd, rest, at))?;
            rest = rest
                .get(written..)
                .filter(|_| written > 0)
                .ok_or(io::ErrorKind::WriteZero)?;
            at += written as u64;
        }
        Ok(())
    }

    /// Reads `out.len()` bytes at `offset`, without mapping it.
    ///
    /// # Errors
    /// `UnexpectedEof` if they do not all lie before its end.
    pub fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while let Some(rest) = out.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let at = offset.saturating_add(done as u64);
            let read = rustix::io::retry_on_intr(|| rustix::io::pread(&self.fd, &mut *rest, at))?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            done += read;
        }
        Ok(())
    }

    /// Gives the memory of `len` bytes at `offset` back; whole pages of it read as zeros then,
    /// also where they are mapped.
    ///
    /// # Errors
    /// What the kernel reports.
    pub fn punch_hole(&self, offset: u64, len: ByteLen) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(fallocate(&self.fd, flags, offset, len.0)?)
    }

    /// Changes its length. A mapping keeps its own: reading it beyond the end of the file
    /// raises `SIGBUS`, so shrink only what is no longer read.
    ///
    /// # Errors
    /// What the kernel reports.
    pub fn set_len(&self, len: ByteLen) -> io::Result<()> {
        Ok(ftruncate(&self.fd, len.0)?)
    }

    /// Its length now.
    ///
    /// # Errors
    /// What the kernel reports.
    pub fn len(&self) -> io::Result<ByteLen> {
        let size = rustix::fs::fstat(&self.fd)?.st_size;
        u64::try_from(size)
            .map(ByteLen)
            .map_err(|_| io::ErrorKind::InvalidData.into())
    }

    /// Whether it has no bytes.
    ///
    /// # Errors
    /// What the kernel reports.
    pub fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()?.0 == 0)
    }

    /// Maps the whole file; writes reach it.
    ///
    /// # Errors
    /// `EINVAL` for an empty file, else what the kernel reports.
    pub fn map(&self) -> io::Result<Mapping> {
        self.map_with(MapFlags::SHARED)
    }

    /// Maps the whole file copy-on-write: a page that is written becomes the mapping's own.
    ///
    /// # Errors
    /// As [`Memfd::map`].
    pub fn map_private(&self) -> io::Result<Mapping> {
        self.map_with(MapFlags::PRIVATE)
    }

    fn map_with(&self, flags: MapFlags) -> io::Result<Mapping> {
        let len = usize::try_from(self.len()?.0).map_err(|_| io::ErrorKind::InvalidInput)?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: without an address wish the kernel picks unused addresses, so no memory that
        // anything else refers to is replaced.
        let base = unsafe { mmap(std::ptr::null_mut(), len, access, flags, &self.fd, 0)? };
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Mapping {
            base,
            len,
            file: self.clone(),
        })
    }
}

impl AsFd for Memfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Mapped memory that others may change at any time: bytes are copied in and out, never
/// referred to. Unmapped when dropped.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    len: usize,
    file: Memfd,
}

// SAFETY: the mapping belongs to no thread, and the struct hands out copies of bytes only.
unsafe impl Send for Mapping {}
// SAFETY: as above; concurrent copies race on bytes as they do with the other processes that
// map the file, which is what callers of shared memory must expect.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Where it is mapped in this process.
    #[must_use]
    pub fn addr(&self) -> HostAddr {
        HostAddr(self.base.as_ptr().addr() as u64)
    }

    /// How long it is.
    #[must_use]
    pub fn len(&self) -> ByteLen {
        ByteLen(self.len as u64)
    }

    /// Never true: the kernel maps at least one page.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The mapped file.
    #[must_use]
    pub fn file(&self) -> &Memfd {
        &self.file
    }

    /// Copies `out.len()` bytes from `offset`.
    ///
    /// # Errors
    /// `InvalidInput` if they are not all inside.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let from = self.inside(offset, out.len())?;
        // SAFETY: `inside` has shown that the source lies in the mapping, which lives as long as
        // `self`; `out` is ours and does not overlap memory that only this struct points to.
        unsafe { std::ptr::copy_nonoverlapping(from, out.as_mut_ptr(), out.len()) };
        Ok(())
    }

    /// Copies `bytes` to `offset`.
    ///
    /// # Errors
    /// `InvalidInput` if they do not all fit.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let to = self.inside(offset, bytes.len())?;
        // SAFETY: as in `read`, with the direction turned round.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        Ok(())
    }

    /// The address of `len` bytes at `offset`, all of them inside.
    fn inside(&self, offset: u64, len: usize) -> io::Result<*mut u8> {
        let offset = usize::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(self.base.as_ptr().wrapping_add(offset)),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: base and length are those of our own mapping, nothing was lent from it, and
        // it is not used after this. An error would leave it mapped, which harms nobody.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_mapping_writes_the_other_reads() {
        let file = Memfd::create("pool", ByteLen(8192)).unwrap();
        let (one, other) = (file.map().unwrap(), file.map().unwrap());
        one.write(4094, b"word").unwrap();
        let mut bytes = [0; 4];
        other.read(4094, &mut bytes).unwrap();
        assert_eq!(&bytes, b"word");
        assert_ne!(one.addr(), other.addr());
    }

    #[test]
    fn no_byte_outside_the_mapping_is_touched() {
        let mapping = Memfd::create("bounds", ByteLen(4096))
            .unwrap()
            .map()
            .unwrap();
        for offset in [4093, 4097, u64::MAX] {
            assert!(mapping.write(offset, b"word").is_err());
            assert!(mapping.read(offset, &mut [0; 4]).is_err());
        }
        mapping.write(4092, b"word").unwrap();
        mapping.write(4096, b"").unwrap();
    }

    #[test]
    fn a_growing_file_never_shrinks_and_its_readers_cannot_write() {
        let file = Memfd::create_growing("pool").unwrap();
        file.set_len(ByteLen(8192)).unwrap();
        assert!(file.set_len(ByteLen(4096)).is_err());
        file.write_at(4096, &[7; 4096]).unwrap();
        assert!(file.write_at(4097, &[7; 4096]).is_err());
        let reader = file.read_only().unwrap();
        assert!(rustix::io::pwrite(&reader, b"x", 0).is_err());
        let mut byte = [0];
        rustix::io::pread(&reader, &mut byte, 8191).unwrap();
        assert_eq!(byte, [7]);
        let mut bytes = [0; 2];
        file.read_at(4095, &mut bytes).unwrap();
        assert_eq!(bytes, [0, 7]);
        assert!(file.read_at(8191, &mut bytes).is_err());
        file.set_len(ByteLen(1 << 30)).unwrap();
    }

    #[test]
    fn a_hole_gives_its_memory_back_and_reads_as_zeros() {
        let file = Memfd::create_growing("holes").unwrap();
        file.set_len(ByteLen(4 * 4096)).unwrap();
        assert_eq!(file.allocated().unwrap(), ByteLen(0));
        file.write_at(0, &[7; 3 * 4096]).unwrap();
        assert_eq!(file.allocated().unwrap(), ByteLen(3 * 4096));
        file.punch_hole(4096, ByteLen(8192)).unwrap();
        assert_eq!(file.allocated().unwrap(), ByteLen(4096));
        let mapping = file.map().unwrap();
        let mut bytes = [1; 2];
        mapping.read(4095, &mut bytes).unwrap();
        assert_eq!(bytes, [7, 0]);
    }

    #[test]
    fn an_empty_file_is_not_mapped() {
        let file = Memfd::create("empty", ByteLen(0)).unwrap();
        assert!(file.is_empty().unwrap());
        assert!(file.map().is_err());
    }
}
