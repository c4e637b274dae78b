//! The agent's requests, one after the other.
//!
//! When this ends, for whatever reason, the mappings stay: they are the guest's memory now.

use std::mem::zeroed;

use cow_abi::{
    AbiError, BlockAnswer, BlockOffer, Features, FromAgent, FromLibrary, Hello, MapBatch,
    NAME_BYTES_MAX, Outcome, OutcomeBytes, Outcomes, PACKET_BYTES_MAX, RUNS_MAX, Refusal, VERSION,
    WELCOME_MS_MAX,
};

use crate::areas::examine;
use crate::registry;
use crate::socket::{Descriptor, Socket};
use crate::{PAGE, code, errno};

/// Longest answer: outcomes of a full batch, and a header.
const ANSWER_BYTES_MAX: usize = 16 + RUNS_MAX * size_of::<OutcomeBytes>();

/// What the thread works with: on its stack, which is sized for it.
struct Server {
    socket: Socket,
    pool: Option<Descriptor>,
    answer: [u8; ANSWER_BYTES_MAX],
}

/// When runs are mapped.
#[derive(Clone, Copy)]
enum Way {
    Now,
    /// When QEMU places the page.
    WhenPlaced,
}

/// What follows an answer.
enum Next {
    Go,
    End,
}

/// Connects to the agent and serves it to the end. Whether the handshake was made.
pub(crate) fn serve(path: &[u8], features: Features) -> bool {
    let Some(socket) = Socket::connect(path, WELCOME_MS_MAX) else {
        return false;
    };
    let mut server = Server {
        socket,
        pool: None,
        answer: [0; ANSWER_BYTES_MAX],
    };
    let mut packet = [0_u8; PACKET_BYTES_MAX];
    if !server.handshake(&mut packet, features) {
        return false;
    }
    // From here on the agent may be silent as long as it likes.
    server.socket.limit(0);
    while let Some((len, descriptor)) = server.socket.receive(&mut packet) {
        let packet = packet.get(..len).unwrap_or_default();
        if let Next::End = server.request(packet, descriptor) {
            break;
        }
    }
    // If the agent left in the middle of a series.
    let _ = registry::with(registry::Table::settle);
    true
}

impl Server {
    fn handshake(&mut self, packet: &mut [u8], features: Features) -> bool {
        // SAFETY: no arguments, cannot fail.
        let pid = unsafe { libc::getpid() };
        let hello = FromLibrary::Hello(Hello {
            version: VERSION,
            pid: u32::try_from(pid).unwrap_or(0),
            page_bytes: page_bytes(),
            features,
        });
        self.answer(0, &hello);
        let Some((len, _)) = self.socket.receive(packet) else {
            return false;
        };
        match FromAgent::decode(packet.get(..len).unwrap_or_default()) {
            Ok((_, FromAgent::Welcome { version: VERSION })) => true,
            Ok((sequence, FromAgent::Welcome { .. })) => self.refuse(sequence, Refusal::Version),
            Ok((sequence, _)) => self.refuse(sequence, Refusal::State),
            Err(error) => self.refuse(0, Refusal::Packet(error)),
        }
    }

    fn refuse(&mut self, sequence: u64, refusal: Refusal) -> bool {
        self.answer(sequence, &FromLibrary::Refused(refusal));
        false
    }

    fn answer(&mut self, sequence: u64, message: &FromLibrary<'_>) -> Next {
        let len = message.encode(sequence, &mut self.answer);
        match len.and_then(|len| self.answer.get(..len)) {
            Some(packet) if self.socket.send(packet) => Next::Go,
            _ => Next::End,
        }
    }

    fn request(&mut self, packet: &[u8], descriptor: Option<Descriptor>) -> Next {
        let (sequence, message) = match FromAgent::decode(packet) {
            Ok(decoded) => decoded,
            Err(error) => {
                self.refuse(0, Refusal::Packet(error));
                return Next::End;
            }
        };
        match message {
            FromAgent::Block(offer) => {
                self.answer(sequence, &FromLibrary::BlockAnswer(add_block(&offer)))
            }
            FromAgent::Pool { inode } => {
                let errno = self.take_pool(inode, descriptor).err().unwrap_or(0);
                self.answer(sequence, &FromLibrary::PoolAnswer { errno })
            }
            FromAgent::Map(batch) => self.map(sequence, &batch, Way::Now),
            FromAgent::Expect(batch) => self.map(sequence, &batch, Way::WhenPlaced),
            FromAgent::Settle => {
                let errno = registry::with(registry::Table::settle).err().unwrap_or(0);
                self.answer(sequence, &FromLibrary::Settled { errno })
            }
            FromAgent::Statistics => {
                let statistics = registry::with(|table| table.statistics());
                self.answer(sequence, &FromLibrary::StatisticsAnswer(statistics))
            }
            FromAgent::Close => {
                let statistics = registry::with(|table| {
                    let _ = table.settle();
                    table.statistics()
                });
                self.answer(sequence, &FromLibrary::Closed(statistics));
                Next::End
            }
            FromAgent::Welcome { .. } => {
                self.refuse(sequence, Refusal::State);
                Next::End
            }
        }
    }

    fn take_pool(&mut self, inode: u64, descriptor: Option<Descriptor>) -> Result<(), u16> {
        let descriptor = descriptor.ok_or(code(libc::EBADF))?;
        if self.pool.is_some() {
            return Err(code(libc::EEXIST));
        }
        let (found, _) = inode_and_pages(&descriptor)?;
        // SAFETY: plain numbers.
        let seals = unsafe { libc::fcntl(descriptor.number(), libc::F_GET_SEALS) };
        // A file that can shrink could end QEMU: reading a mapping beyond its end is a SIGBUS.
        if found != inode || seals < 0 || seals & libc::F_SEAL_SHRINK == 0 {
            return Err(code(libc::EINVAL));
        }
        self.pool = Some(descriptor);
        Ok(())
    }

    fn map(&mut self, sequence: u64, batch: &MapBatch<'_>, way: Way) -> Next {
        let Some(pool) = &self.pool else {
            self.refuse(sequence, Refusal::State);
            return Next::End;
        };
        let mut outcomes = [OutcomeBytes::default(); RUNS_MAX];
        let measured = inode_and_pages(pool);
        let number = pool.number();
        for (place, run) in outcomes.iter_mut().zip(batch.runs()) {
            // The lock is taken for each run, so that a discard of QEMU's waits for one at most.
            let outcome = match measured {
                Ok((_, pages)) => registry::with(|table| match way {
                    Way::Now => table.place(&run, batch.copy(), number, pages),
                    Way::WhenPlaced => table.expect(&run, number, pages),
                }),
                Err(error) => Outcome::Refused(error),
            };
            *place = outcome.into();
        }
        let outcomes = outcomes.get(..batch.len()).and_then(Outcomes::new);
        match outcomes {
            Some(outcomes) => self.answer(sequence, &FromLibrary::MapAnswer(outcomes)),
            None => {
                self.refuse(sequence, Refusal::Packet(AbiError::TooMany));
                Next::End
            }
        }
    }
}

fn page_bytes() -> u32 {
    // SAFETY: plain numbers.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u32::try_from(bytes).unwrap_or(0)
}

/// Inode and size of an open file.
fn inode_and_pages(file: &Descriptor) -> Result<(u64, u64), u16> {
    // SAFETY: all zeros is a valid value.
    let mut status: libc::stat = unsafe { zeroed() };
    // SAFETY: the pointer is that of `status`.
    if unsafe { libc::fstat(file.number(), &raw mut status) } != 0 {
        return Err(errno());
    }
    let bytes = u64::try_from(status.st_size).unwrap_or(0);
    Ok((status.st_ino, bytes >> PAGE.trailing_zeros()))
}

fn add_block(offer: &BlockOffer<'_>) -> BlockAnswer {
    let (addr, errno) = match try_add_block(offer) {
        Ok(addr) => (addr as u64, 0),
        Err(error) => (offer.addr, error),
    };
    let index = offer.index;
    BlockAnswer { index, errno, addr }
}

fn try_add_block(offer: &BlockOffer<'_>) -> Result<usize, u16> {
    if page_bytes() as usize != PAGE {
        return Err(code(libc::EOPNOTSUPP));
    }
    let told = usize::try_from(offer.addr).map_err(|_| code(libc::EFAULT))?;
    let len = usize::try_from(offer.len).map_err(|_| code(libc::EFAULT))?;
    let addr = match (told, lookup(offer.name)) {
        (0, None) => return Err(code(libc::ENOENT)),
        (0, Some(found)) => found,
        (told, Some(found)) if told != found => return Err(code(libc::EFAULT)),
        (told, _) => told,
    };
    if addr & PAGE.wrapping_sub(1) != 0 {
        return Err(code(libc::EFAULT));
    }
    let advice = examine(addr, len)?;
    registry::with(|table| table.add(offer.index, addr, len, advice))?;
    Ok(addr)
}

type BlockByName = unsafe extern "C" fn(*const libc::c_char) -> *mut libc::c_void;
type HostAddr = unsafe extern "C" fn(*mut libc::c_void) -> *mut libc::c_void;

/// QEMU's own functions about its memory, if its program exports them.
fn lookup_functions() -> Option<(BlockByName, HostAddr)> {
    // SAFETY: C strings; the handle stands for all that is loaded.
    let found = unsafe {
        (
            libc::dlsym(libc::RTLD_DEFAULT, c"qemu_ram_block_by_name".as_ptr()),
            libc::dlsym(libc::RTLD_DEFAULT, c"qemu_ram_get_host_addr".as_ptr()),
        )
    };
    if found.0.is_null() || found.1.is_null() {
        return None;
    }
    // SAFETY: QEMU has had these two with these types since 2.6: `RAMBlock *(const char *)` and
    // `void *(RAMBlock *)`.
    Some(unsafe {
        (
            std::mem::transmute::<*mut libc::c_void, BlockByName>(found.0),
            std::mem::transmute::<*mut libc::c_void, HostAddr>(found.1),
        )
    })
}

/// Whether QEMU's functions are there.
pub(crate) fn can_look_up() -> bool {
    lookup_functions().is_some()
}

/// Where QEMU says that the block `name` lies. It walks QEMU's list of blocks, whose elements come
/// and go with memory that is plugged: not while a migration comes in.
fn lookup(name: &[u8]) -> Option<usize> {
    let (block_by_name, host_addr) = lookup_functions()?;
    let mut text = [0_u8; NAME_BYTES_MAX + 1];
    text.get_mut(..name.len())?
        .iter_mut()
        .zip(name)
        .for_each(|(to, from)| *to = *from);
    // SAFETY: `text` ends with a zero: the name is at most one byte shorter. The list is read as
    // QEMU's own migration thread reads it.
    let block = unsafe { block_by_name(text.as_ptr().cast()) };
    if block.is_null() {
        return None;
    }
    // SAFETY: a block that QEMU returned.
    let addr = unsafe { host_addr(block) }.addr();
    Some(addr)
}
