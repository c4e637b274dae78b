//! The connection to the agent: packets and descriptors, without allocation.

use std::mem::{MaybeUninit, zeroed};

use crate::errno;

/// Longest path of a unix socket, without its NUL.
pub(crate) const PATH_BYTES_MAX: usize = 107;

/// A descriptor of ours, closed when dropped.
pub(crate) struct Descriptor(libc::c_int);

impl Descriptor {
    /// Its number.
    pub(crate) fn number(&self) -> libc::c_int {
        self.0
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: the number is ours, and nobody uses it after this.
        unsafe { libc::close(self.0) };
    }
}

/// A connection of type `SOCK_SEQPACKET`.
pub(crate) struct Socket {
    descriptor: Descriptor,
}

/// Room for the control messages of a packet with one descriptor; more are cut off by the kernel,
/// which closes them. Aligned as their headers need.
#[repr(C, align(8))]
struct Control([u8; 64]);

impl Socket {
    /// Connects to the socket at `path`, at most `limit_ms` long; later calls have that limit, too.
    pub(crate) fn connect(path: &[u8], limit_ms: u32) -> Option<Self> {
        let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
        // SAFETY: plain numbers.
        let number = unsafe { libc::socket(libc::AF_UNIX, kind, 0) };
        if number < 0 {
            return None;
        }
        let descriptor = Descriptor(number);
        let socket = Self { descriptor };
        socket.limit(limit_ms);
        // SAFETY: all zeros is a valid value of the address.
        let mut address: libc::sockaddr_un = unsafe { zeroed() };
        address.sun_family = libc::sa_family_t::try_from(libc::AF_UNIX).ok()?;
        if path.len() > PATH_BYTES_MAX {
            return None;
        }
        for (to, from) in address.sun_path.iter_mut().zip(path) {
            *to = libc::c_char::from_ne_bytes([*from]);
        }
        let len = libc::socklen_t::try_from(size_of::<libc::sockaddr_un>()).ok()?;
        let address = &raw const address;
        // SAFETY: pointer and length are those of `address`, which ends with a zero.
        let result = unsafe { libc::connect(number, address.cast(), len) };
        (result == 0).then_some(socket)
    }

    /// Limits the time of each call; 0 is no limit.
    pub(crate) fn limit(&self, limit_ms: u32) {
        let limit = libc::timeval {
            tv_sec: libc::time_t::from(limit_ms.checked_div(1000).unwrap_or(0)),
            tv_usec: libc::suseconds_t::from(limit_ms.checked_rem(1000).unwrap_or(0))
                .wrapping_mul(1000),
        };
        let len = libc::socklen_t::try_from(size_of::<libc::timeval>()).unwrap_or(0);
        for option in [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO] {
            let (level, value) = (libc::SOL_SOCKET, &raw const limit);
            // SAFETY: pointer and length are those of `limit`. An error leaves no limit.
            unsafe { libc::setsockopt(self.descriptor.number(), level, option, value.cast(), len) };
        }
    }

    /// Sends one packet; whether it went.
    pub(crate) fn send(&self, packet: &[u8]) -> bool {
        loop {
            let number = self.descriptor.number();
            // SAFETY: pointer and length are those of `packet`. No signal if the peer is gone.
            let sent = unsafe {
                libc::send(
                    number,
                    packet.as_ptr().cast(),
                    packet.len(),
                    libc::MSG_NOSIGNAL,
                )
            };
            if sent >= 0 {
                return usize::try_from(sent).is_ok_and(|sent| sent == packet.len());
            }
            if errno() != crate::code(libc::EINTR) {
                return false;
            }
        }
    }

    /// Receives one packet into `buffer`: its length and the descriptor that came with it. `None`
    /// at the end, on an error, and for a packet that does not fit.
    pub(crate) fn receive(&self, buffer: &mut [u8]) -> Option<(usize, Option<Descriptor>)> {
        loop {
            let mut control = Control([0; 64]);
            let mut piece = libc::iovec {
                iov_base: buffer.as_mut_ptr().cast(),
                iov_len: buffer.len(),
            };
            // SAFETY: all zeros is a valid value.
            let mut message: libc::msghdr = unsafe { zeroed() };
            message.msg_iov = &raw mut piece;
            message.msg_iovlen = 1;
            message.msg_control = (&raw mut control).cast();
            message.msg_controllen = size_of::<Control>();
            let flags = libc::MSG_CMSG_CLOEXEC;
            // SAFETY: `message` describes `buffer` and `control`, which outlive the call.
            let got = unsafe { libc::recvmsg(self.descriptor.number(), &raw mut message, flags) };
            match usize::try_from(got) {
                Ok(len) => {
                    let descriptor = first_descriptor(&message);
                    let cut = message.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0;
                    return (len > 0 && !cut).then_some((len, descriptor));
                }
                Err(_) if errno() == crate::code(libc::EINTR) => {}
                Err(_) => return None,
            }
        }
    }
}

/// Takes the descriptors out of a received message; all but the first are closed.
fn first_descriptor(message: &libc::msghdr) -> Option<Descriptor> {
    let mut first = None;
    // SAFETY: `message` was filled by the kernel and its control buffer is alive.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(message) };
    while !header.is_null() {
        // SAFETY: the header lies in the control buffer, as libc has checked; it is aligned.
        let (level, kind, len) = unsafe {
            let header = &*header;
            (header.cmsg_level, header.cmsg_type, header.cmsg_len)
        };
        if level == libc::SOL_SOCKET && kind == libc::SCM_RIGHTS {
            // SAFETY: a length without data is plain arithmetic.
            let header_len = unsafe { libc::CMSG_LEN(0) } as usize;
            let count = len.saturating_sub(header_len) >> size_of::<libc::c_int>().trailing_zeros();
            // SAFETY: where the data of this header begins.
            let data = unsafe { libc::CMSG_DATA(header) }.cast::<libc::c_int>();
            for i in 0..count {
                let mut number = MaybeUninit::<libc::c_int>::uninit();
                // SAFETY: the kernel wrote `count` numbers there; they may be unaligned.
                let number = unsafe {
                    number.write(data.wrapping_add(i).read_unaligned());
                    number.assume_init()
                };
                let descriptor = Descriptor(number);
                if first.is_none() {
                    first = Some(descriptor);
                }
            }
        }
        // SAFETY: as for the first header.
        header = unsafe { libc::CMSG_NXTHDR(message, header) };
    }
    first
}
