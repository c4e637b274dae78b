//! What memory lies at an address: `/proc/self/smaps`, read without allocation.

use crate::{code, errno};

/// What QEMU advised about a piece of memory, and what a mapping over it would lose. Bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Advice(pub(crate) u8);

/// The kernel's names for what `madvise` set, and the advice that sets it.
const ADVICE: [(&[u8], libc::c_int); 5] = [
    (b"dc", libc::MADV_DONTFORK),
    (b"dd", libc::MADV_DONTDUMP),
    (b"mg", libc::MADV_MERGEABLE),
    (b"hg", libc::MADV_HUGEPAGE),
    (b"nh", libc::MADV_NOHUGEPAGE),
];

/// Memory that is not mapped over: locked, of huge pages, shared, of a device.
const UNFIT: [&[u8]; 5] = [b"lo", b"ht", b"sh", b"io", b"pf"];

/// Memory whose faults somebody else handles.
const WATCHED: [&[u8]; 3] = [b"um", b"uw", b"ui"];

impl Advice {
    /// The advices that are set.
    pub(crate) fn each(self) -> impl Iterator<Item = libc::c_int> {
        let mut bits = self.0;
        ADVICE.iter().filter_map(move |(_, advice)| {
            let set = bits & 1 == 1;
            bits >>= 1;
            set.then_some(*advice)
        })
    }

    fn add(&mut self, flag: &[u8]) {
        let mut bit = 1_u8;
        for (name, _) in ADVICE {
            if name == flag {
                self.0 |= bit;
            }
            bit = bit.wrapping_shl(1);
        }
    }
}

/// Goes through the lines of a list of memory areas and judges the range from `start` to `end`.
struct Judge {
    start: usize,
    end: usize,
    /// Everything below is judged.
    covered: usize,
    /// Whether the lines now are about an area in the range.
    inside: bool,
    advice: Option<Advice>,
}

enum Verdict {
    /// More lines are needed.
    Open,
    /// The range is all there and can be mapped over.
    Fit(Advice),
    /// Error number.
    Unfit(u16),
}

impl Judge {
    fn new(start: usize, end: usize) -> Self {
        Self {
            start,
            end,
            covered: start,
            inside: false,
            advice: None,
        }
    }

    fn line(&mut self, line: &[u8]) -> Verdict {
        if let Some(flags) = line.strip_prefix(b"VmFlags:") {
            return self.flags(flags);
        }
        match area_of(line) {
            Some(area) => self.area(&area),
            None => Verdict::Open,
        }
    }

    fn area(&mut self, area: &Area<'_>) -> Verdict {
        self.inside = area.end > self.start && area.start < self.end;
        if !self.inside {
            let missing = area.start >= self.end;
            return if missing {
                Verdict::Unfit(code(libc::EFAULT))
            } else {
                Verdict::Open
            };
        }
        if area.start > self.covered {
            return Verdict::Unfit(code(libc::EFAULT));
        }
        self.covered = area.end;
        if area.access != b"rw-p" || area.inode != b"0" || area.path.first() == Some(&b'[') {
            let anonymous = area.path.starts_with(b"[anon:");
            if !anonymous || area.access != b"rw-p" {
                return Verdict::Unfit(code(libc::EOPNOTSUPP));
            }
        }
        Verdict::Open
    }

    fn flags(&mut self, flags: &[u8]) -> Verdict {
        if !self.inside {
            return Verdict::Open;
        }
        let words = || flags.split(|byte| *byte == b' ');
        if words().any(|word| UNFIT.contains(&word)) {
            return Verdict::Unfit(code(libc::EOPNOTSUPP));
        }
        if words().any(|word| WATCHED.contains(&word)) {
            return Verdict::Unfit(code(libc::EBUSY));
        }
        if self.advice.is_none() {
            let mut advice = Advice::default();
            words().for_each(|word| advice.add(word));
            self.advice = Some(advice);
        }
        match self.advice {
            Some(advice) if self.covered >= self.end => Verdict::Fit(advice),
            _ => Verdict::Open,
        }
    }
}

/// The first line about an area: `7f00-7f10 rw-p 00000000 00:00 0    [heap]`.
struct Area<'a> {
    start: usize,
    end: usize,
    access: &'a [u8],
    inode: &'a [u8],
    path: &'a [u8],
}

fn area_of(line: &[u8]) -> Option<Area<'_>> {
    let mut words = line
        .split(|byte| *byte == b' ')
        .filter(|word| !word.is_empty());
    let range = words.next()?;
    let dash = range.iter().position(|byte| *byte == b'-')?;
    let (start, end) = range.split_at_checked(dash)?;
    let access = words.next()?;
    let inode = words.nth(2)?;
    Some(Area {
        start: hex(start)?,
        end: hex(end.strip_prefix(b"-")?)?,
        access,
        inode,
        path: words.next().unwrap_or(b""),
    })
}

fn hex(digits: &[u8]) -> Option<usize> {
    let mut value = 0_usize;
    if digits.is_empty() {
        return None;
    }
    for digit in digits {
        let digit = char::from(*digit).to_digit(16)?;
        value = value.checked_mul(16)?.checked_add(digit as usize)?;
    }
    Some(value)
}

/// Whether `len` bytes at `addr` are plain private anonymous memory, and what is advised there.
///
/// # Errors
/// An error number, as `cow_abi::BlockAnswer` lists them.
pub(crate) fn examine(addr: usize, len: usize) -> Result<Advice, u16> {
    let end = addr.checked_add(len).ok_or(code(libc::EFAULT))?;
    // SAFETY: the path is a C string; the call has no other memory effect.
    let file = unsafe {
        libc::open(
            c"/proc/self/smaps".as_ptr(),
            libc::O_RDONLY | libc::O_CLOEXEC,
        )
    };
    if file < 0 {
        return Err(errno());
    }
    let result = judge_file(file, Judge::new(addr, end));
    // SAFETY: opened above and known to nobody else.
    unsafe { libc::close(file) };
    result
}

fn judge_file(file: libc::c_int, mut judge: Judge) -> Result<Advice, u16> {
    // Longer than any line that matters; of a longer one (a long path) the rest is skipped.
    let mut line = [0_u8; 512];
    let mut used = 0_usize;
    let mut buffer = [0_u8; 4096];
    loop {
        // SAFETY: the pointer and the length are those of `buffer`.
        let read = unsafe { libc::read(file, buffer.as_mut_ptr().cast(), buffer.len()) };
        let read = match usize::try_from(read) {
            Ok(0) => return Err(code(libc::EFAULT)),
            Ok(read) => read,
            Err(_) if errno() == code(libc::EINTR) => continue,
            Err(_) => return Err(errno()),
        };
        for byte in buffer.get(..read).unwrap_or_default() {
            if *byte != b'\n' {
                if let Some(place) = line.get_mut(used) {
                    *place = *byte;
                    used = used.saturating_add(1);
                }
                continue;
            }
            match judge.line(line.get(..used).unwrap_or_default()) {
                Verdict::Open => used = 0,
                Verdict::Fit(advice) => return Ok(advice),
                Verdict::Unfit(errno) => return Err(errno),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(text: &str, start: usize, end: usize) -> Result<Advice, u16> {
        let mut judge = Judge::new(start, end);
        for line in text.lines() {
            match judge.line(line.as_bytes()) {
                Verdict::Open => {}
                Verdict::Fit(advice) => return Ok(advice),
                Verdict::Unfit(errno) => return Err(errno),
            }
        }
        Err(code(libc::EFAULT))
    }

    const LIST: &str = "1000-3000 rw-p 00000000 00:00 0 \nSize: 8 kB\nVmFlags: rd wr mr dc dd mg \n\
        3000-4000 rw-p 00000000 00:00 0 [anon:ram]\nVmFlags: rd wr dc \n\
        5000-6000 rw-p 00001000 00:01 77 /memfd:x (deleted)\nVmFlags: rd wr \n\
        6000-7000 rw-p 00000000 00:00 0 [heap]\nVmFlags: rd wr \n\
        7000-8000 rw-s 00000000 00:00 0 \nVmFlags: rd wr sh \n\
        8000-9000 rw-p 00000000 00:00 0 \nVmFlags: rd wr lo \n\
        9000-a000 rw-p 00000000 00:00 0 \nVmFlags: rd wr um \n\
        a000-b000 r--p 00000000 00:00 0 \nVmFlags: rd wr \n";

    #[test]
    fn only_plain_anonymous_memory_is_fit_and_its_advice_is_remembered() {
        let advice = judged(LIST, 0x1000, 0x4000).unwrap();
        let set: Vec<_> = advice.each().collect();
        assert_eq!(
            set,
            [
                libc::MADV_DONTFORK,
                libc::MADV_DONTDUMP,
                libc::MADV_MERGEABLE
            ]
        );
        let refused = |start, end| judged(LIST, start, end).unwrap_err();
        assert_eq!(refused(0x3000, 0x5000), code(libc::EFAULT));
        assert_eq!(refused(0x800, 0x2000), code(libc::EFAULT));
        for unfit in [0x5000, 0x6000, 0x7000, 0x8000, 0xa000] {
            assert_eq!(refused(unfit, unfit + 0x1000), code(libc::EOPNOTSUPP));
        }
        assert_eq!(refused(0x9000, 0xa000), code(libc::EBUSY));
        assert_eq!(refused(0x10_0000, 0x20_0000), code(libc::EFAULT));
    }

    #[test]
    fn this_process_is_read_as_it_is() {
        let len = 64 * crate::PAGE;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping at an address of the kernel's choice, unmapped below.
        let addr = unsafe { libc::mmap(std::ptr::null_mut(), len, access, flags, -1, 0) };
        // SAFETY: advice about the mapping just made.
        unsafe { libc::madvise(addr, len, libc::MADV_DONTDUMP) };
        let advice = examine(addr.addr(), len).unwrap();
        assert!(advice.each().any(|advice| advice == libc::MADV_DONTDUMP));
        // SAFETY: the mapping made above, not used any more.
        unsafe { libc::munmap(addr, len) };
        assert_eq!(examine(addr.addr(), len), Err(code(libc::EFAULT)));
        let code_addr = examine as *const () as usize & !(crate::PAGE - 1);
        assert_eq!(examine(code_addr, crate::PAGE), Err(code(libc::EOPNOTSUPP)));
    }
}
