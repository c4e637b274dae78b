//! Memory that several processes can map, and mappings of it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use page::{ByteLen, HostAddr};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
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
    fn an_empty_file_is_not_mapped() {
        let file = Memfd::create("empty", ByteLen(0)).unwrap();
        assert!(file.is_empty().unwrap());
        assert!(file.map().is_err());
    }
}
