//! The functions of libc that QEMU calls and this library stands before.
//!
//! They are public for the loader alone.
//! While nothing is mapped from the pool each of them costs one relaxed load more than libc's own.

use std::ffi::c_void;

use crate::registry::{FaultCopy, Placed};
use crate::{PAGE, registry};

/// Number of the `ioctl` that fills a page on which a fault waits: `_IOWR(0xAA, 3, struct
/// uffdio_copy)` with its five 64-bit fields.
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;

/// Number of the `ioctl` that wakes who waits for pages: `_IOR(0xAA, 2, struct uffdio_range)` with its
/// two 64-bit fields.
const UFFDIO_WAKE: libc::c_ulong = 0x8010_aa02;

/// The direction, the size, the type, the number.
const fn number(direction: u8, kind: u8, number: u8, size: usize) -> libc::c_ulong {
    (direction as libc::c_ulong) << 30
        | (size as libc::c_ulong) << 16
        | (kind as libc::c_ulong) << 8
        | number as libc::c_ulong
}

const _: () = assert!(UFFDIO_COPY == number(3, 0xaa, 3, 40));
const _: () = assert!(UFFDIO_WAKE == number(2, 0xaa, 2, 16));

/// `madvise` of the kernel. Sets `errno`.
pub(crate) fn raw_madvise(addr: *mut c_void, len: usize, advice: libc::c_int) -> libc::c_int {
    // SAFETY: the caller's arguments, as libc would pass them on; whether the advice is sound is
    // between the caller and the kernel.
    let result = unsafe { libc::syscall(libc::SYS_madvise, addr, len, advice) };
    libc::c_int::try_from(result).unwrap_or(-1)
}

/// As in libc. Discarding a page of the pool would bring the pool's bytes back, where the caller
/// wants empty memory (a balloon, the start of post-copy): empty memory is put there.
///
/// # Safety
/// As libc's.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C" fn madvise(
    addr: *mut c_void,
    len: libc::size_t,
    advice: libc::c_int,
) -> libc::c_int {
    if registry::anything_mapped()
        && advice == libc::MADV_DONTNEED
        && addr.addr() & (PAGE.wrapping_sub(1)) == 0
    {
        // A discard that failed must not look like one that worked: a page of the pool would stay.
        if let Err(error) = registry::with(|table| table.discard(addr.addr(), len)) {
            // SAFETY: this thread's own variable.
            unsafe { *libc::__errno_location() = libc::c_int::from(error) };
            return -1;
        }
    }
    raw_madvise(addr, len, advice)
}

/// Wakes who waits for the page at `addr`, which is there. After the page was put there: who found it
/// missing before is among the waiting, and tries again.
fn wake(fd: libc::c_int, addr: u64) -> libc::c_int {
    let range = [addr, PAGE as u64];
    // SAFETY: what this call takes is a `struct uffdio_range`: two 64-bit numbers.
    let result = unsafe { libc::syscall(libc::SYS_ioctl, fd, UFFDIO_WAKE, range.as_ptr()) };
    libc::c_int::try_from(result).unwrap_or(-1)
}

/// As in libc, whose version takes at most one argument behind the request, in the register where
/// this one expects it. Post-copy fills pages by it.
///
/// # Safety
/// As libc's.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C" fn ioctl(
    fd: libc::c_int,
    request: libc::c_ulong,
    argument: *mut c_void,
) -> libc::c_int {
    if request == UFFDIO_COPY && registry::minds_copies() && !argument.is_null() {
        let place = argument.cast::<FaultCopy>();
        // SAFETY: what this call takes is a `struct uffdio_copy` of the caller's.
        let copy = unsafe { place.read_unaligned() };
        if registry::with(|table| table.fault_copy(&copy)) == Placed::There {
            // SAFETY: as above; the kernel would write there.
            unsafe { place.write_unaligned(copy.done()) };
            return wake(fd, copy.to());
        }
    }
    // SAFETY: the caller's arguments, as libc would pass them on.
    let result = unsafe { libc::syscall(libc::SYS_ioctl, fd, request, argument) };
    libc::c_int::try_from(result).unwrap_or(-1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::areas::Advice;
    use cow_abi::{MapRun, Outcome};
    use std::ptr::null_mut;

    #[test]
    fn calls_that_the_kernel_refuses_fail_with_its_error() {
        // SAFETY: no such descriptor, and no memory there.
        let results = unsafe {
            let ioctl = ioctl(-1, UFFDIO_COPY, null_mut());
            let first = crate::errno();
            let madvise = madvise(null_mut(), PAGE, libc::MADV_DONTNEED);
            (ioctl, first, madvise, crate::errno())
        };
        let (bad, missing) = (crate::code(libc::EBADF), crate::code(libc::ENOMEM));
        assert_eq!(results, (-1, bad, -1, missing));
    }

    #[test]
    fn discarding_half_a_page_at_the_end_discards_it_as_the_kernel_does() {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe { libc::mmap(null_mut(), 4 * PAGE, access, flags, -1, 0) };
        // SAFETY: a C string; the bytes are those of the array.
        let pool = unsafe {
            let pool = libc::memfd_create(c"pool".as_ptr(), libc::MFD_CLOEXEC);
            let bytes = [9_u8; 2 * PAGE];
            assert!(libc::write(pool, bytes.as_ptr().cast(), bytes.len()) > 0);
            pool
        };
        let run = MapRun {
            block: 0,
            page: 1,
            pages: 2,
            pool_page: 0,
        };
        let outcome = registry::with(|table| {
            table.add(0, base.addr(), 4 * PAGE, Advice(0)).unwrap();
            table.place(&run, false, pool, 2)
        });
        assert_eq!(outcome, Outcome::Mapped);
        // SAFETY: pages of the mapping made above, to which nothing refers.
        let bytes = unsafe {
            assert_eq!(madvise(base, 2 * PAGE - 1, libc::MADV_DONTNEED), 0);
            let page = |i: usize| base.cast::<u8>().add(i * PAGE).read_volatile();
            [page(0), page(1), page(2), page(3)]
        };
        assert_eq!(bytes, [0, 0, 9, 0]);
        assert_eq!(
            registry::with(|table| table.statistics().pages_discarded),
            1
        );
    }
}
