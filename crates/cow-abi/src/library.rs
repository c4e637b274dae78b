//! What the library says.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::packet::exactly;
use crate::{AbiError, Header, Kind, MAGIC, RUNS_MAX};

/// A message of the library.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FromLibrary<'a> {
    /// The first packet.
    Hello(Hello),
    /// About a block.
    BlockAnswer(BlockAnswer),
    /// About the pool: 0, or why it is not usable (errno). Then pages are neither mapped nor
    /// copied.
    PoolAnswer {
        /// 0 or an error number.
        errno: u16,
    },
    /// What became of each run of a `Map`.
    MapAnswer(Outcomes<'a>),
    /// Advice is as it was: 0, or the first error number.
    Settled {
        /// 0 or an error number. What was mapped stays mapped.
        errno: u16,
    },
    /// What was done so far.
    StatisticsAnswer(Statistics),
    /// The last packet.
    Closed(Statistics),
    /// The agent sent something that makes no sense; the library closes.
    Refused(Refusal),
}

/// Who the library is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Of the protocol.
    pub version: u16,
    /// Its process, as that sees itself: in a pid namespace of its own it differs from what the
    /// socket's credentials say, which the agent believes.
    pub pid: u32,
    /// Size of a page there.
    pub page_bytes: u32,
    /// What it found.
    pub features: Features,
}

/// What the library found in its process. Bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Features(pub u32);

impl Features {
    /// Huge pages are off for the process, so that memory under small mappings is freed.
    pub const NO_HUGE_PAGES: Self = Self(1);
    /// QEMU exports the functions that say where a block lies.
    pub const BLOCK_LOOKUP: Self = Self(2);

    /// Whether all bits of `other` are set.
    #[inline]
    #[must_use]
    pub fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// With those of `other`.
    #[inline]
    #[must_use]
    pub fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Whether pages of a block can be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockAnswer {
    /// The block's number.
    pub index: u16,
    /// 0, or why not: `EFAULT` no such memory there, `EOPNOTSUPP` memory that cannot be mapped
    /// over (shared, of a file, locked, huge pages), `EBUSY` watched by userfaultfd, `ENOENT` no
    /// address given and none found, `EEXIST` the number or the place is taken.
    pub errno: u16,
    /// Where it lies.
    pub addr: u64,
}

/// What became of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is mapped copy-on-write.
    Mapped,
    /// Its bytes were copied into the VM's own memory: asked for, or no mapping was left.
    Copied,
    /// Nothing is sure about these pages; error number. Of an `Expect`: they will be copied.
    Refused(u16),
    /// It will be mapped, page by page, as QEMU places it: if QEMU's bytes are the pool's.
    Expected,
}

/// An outcome in a packet.
#[derive(
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    Default,
)]
#[repr(C)]
pub struct OutcomeBytes {
    code: U16,
    errno: U16,
}

const _: () = assert!(size_of::<OutcomeBytes>() == 4);

impl From<Outcome> for OutcomeBytes {
    #[inline]
    fn from(outcome: Outcome) -> Self {
        let (code, errno) = match outcome {
            Outcome::Mapped => (1, 0),
            Outcome::Copied => (2, 0),
            Outcome::Refused(errno) => (3, errno),
            Outcome::Expected => (4, 0),
        };
        Self {
            code: U16::new(code),
            errno: U16::new(errno),
        }
    }
}

impl OutcomeBytes {
    #[inline]
    fn outcome(&self) -> Option<Outcome> {
        match (self.code.get(), self.errno.get()) {
            (1, 0) => Some(Outcome::Mapped),
            (2, 0) => Some(Outcome::Copied),
            (3, errno) => Some(Outcome::Refused(errno)),
            (4, 0) => Some(Outcome::Expected),
            _ => None,
        }
    }
}

/// Outcomes, in the order of the runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcomes<'a> {
    outcomes: &'a [OutcomeBytes],
}

impl<'a> Outcomes<'a> {
    /// Makes an answer; `None` if there are too many.
    #[inline]
    #[must_use]
    pub fn new(outcomes: &'a [OutcomeBytes]) -> Option<Self> {
        (outcomes.len() <= RUNS_MAX).then_some(Self { outcomes })
    }

    /// How many there are.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        self.outcomes.len()
    }

    /// Whether there are none.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.outcomes.is_empty()
    }

    /// Each of them. What was made from bytes was checked; anything else counts as refused.
    #[inline]
    pub fn iter(&self) -> impl Iterator<Item = Outcome> + 'a {
        let refused = Outcome::Refused(0);
        self.outcomes
            .iter()
            .map(move |bytes| bytes.outcome().unwrap_or(refused))
    }
}

/// What the library has done since it was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Statistics {
    /// Runs that were mapped, and their pages.
    pub runs_mapped: u64,
    /// See `runs_mapped`.
    pub pages_mapped: u64,
    /// Pages that were copied out of the pool.
    pub pages_copied: u64,
    /// Runs that were refused.
    pub runs_refused: u64,
    /// Pages of the pool that QEMU discarded (`MADV_DONTNEED`): they became empty memory.
    pub pages_discarded: u64,
    /// Discards that failed, and were reported to QEMU as failed.
    pub discards_failed: u64,
    /// `UFFDIO_COPY` calls seen while something was mapped or expected.
    pub fault_copies: u64,
    /// Those of them that became mappings.
    pub fault_maps: u64,
    /// Pages that were expected, and came with other bytes or could not be mapped: copied.
    pub fault_maps_failed: u64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct StatisticsBytes {
    counters: [U64; 9],
}

const _: () = assert!(size_of::<StatisticsBytes>() == 72);

impl From<Statistics> for StatisticsBytes {
    #[inline]
    fn from(s: Statistics) -> Self {
        let counters = [
            s.runs_mapped,
            s.pages_mapped,
            s.pages_copied,
            s.runs_refused,
            s.pages_discarded,
            s.discards_failed,
            s.fault_copies,
            s.fault_maps,
            s.fault_maps_failed,
        ];
        Self {
            counters: counters.map(U64::new),
        }
    }
}

impl From<StatisticsBytes> for Statistics {
    #[inline]
    fn from(bytes: StatisticsBytes) -> Self {
        let [
            runs_mapped,
            pages_mapped,
            pages_copied,
            runs_refused,
            pages_discarded,
            discards_failed,
            fault_copies,
            fault_maps,
            fault_maps_failed,
        ] = bytes.counters.map(U64::get);
        Self {
            runs_mapped,
            pages_mapped,
            pages_copied,
            runs_refused,
            pages_discarded,
            discards_failed,
            fault_copies,
            fault_maps,
            fault_maps_failed,
        }
    }
}

/// Why the library closes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The packet was not understood.
    Packet(AbiError),
    /// The agent speaks another version.
    Version,
    /// The message does not belong here: a `Map` before the pool, a second `Welcome`.
    State,
}

impl Refusal {
    #[inline]
    fn code(self) -> u16 {
        match self {
            Self::Packet(error) => error as u16,
            Self::Version => 100,
            Self::State => 101,
        }
    }

    #[inline]
    fn from_code(code: u16) -> Option<Self> {
        match code {
            100 => Some(Self::Version),
            101 => Some(Self::State),
            _ => AbiError::from_number(code).map(Self::Packet),
        }
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct HelloBytes {
    magic: [u8; 8],
    version: U16,
    reserved: [u8; 2],
    pid: U32,
    page_bytes: U32,
    features: U32,
}

const _: () = assert!(size_of::<HelloBytes>() == 24);

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct BlockAnswerBytes {
    index: U16,
    errno: U16,
    reserved: [u8; 4],
    addr: U64,
}

const _: () = assert!(size_of::<BlockAnswerBytes>() == 16);

impl<'a> FromLibrary<'a> {
    /// Reads a packet that the library sent, and its sequence number.
    ///
    /// # Errors
    /// What is wrong with it; the agent gives the library up.
    #[inline]
    pub fn decode(packet: &'a [u8]) -> Result<(u64, Self), AbiError> {
        let (header, body) = Header::split(packet)?;
        let message = match header.kind {
            Kind::Hello => Self::Hello(decode_hello(body)?),
            Kind::BlockAnswer => Self::BlockAnswer(decode_block_answer(body)?),
            Kind::PoolAnswer => Self::PoolAnswer {
                errno: exactly::<U16>(body)?.get(),
            },
            Kind::MapAnswer => Self::MapAnswer(decode_outcomes(body)?),
            Kind::Settled => Self::Settled {
                errno: exactly::<U16>(body)?.get(),
            },
            Kind::StatisticsAnswer => {
                Self::StatisticsAnswer(exactly::<StatisticsBytes>(body)?.into())
            }
            Kind::Closed => Self::Closed(exactly::<StatisticsBytes>(body)?.into()),
            Kind::Refused => {
                let code = exactly::<U16>(body)?.get();
                Self::Refused(Refusal::from_code(code).ok_or(AbiError::Value)?)
            }
            _ => return Err(AbiError::Kind),
        };
        Ok((header.sequence, message))
    }

    /// Writes the packet; its length, or `None` if `out` is shorter.
    #[inline]
    #[must_use]
    pub fn encode(&self, sequence: u64, out: &mut [u8]) -> Option<usize> {
        let header = |kind| Header { kind, sequence };
        match self {
            Self::Hello(hello) => {
                let body = HelloBytes {
                    magic: MAGIC,
                    version: U16::new(hello.version),
                    reserved: [0; 2],
                    pid: U32::new(hello.pid),
                    page_bytes: U32::new(hello.page_bytes),
                    features: U32::new(hello.features.0),
                };
                header(Kind::Hello).join(&body, &[], out)
            }
            Self::BlockAnswer(answer) => {
                let body = BlockAnswerBytes {
                    index: U16::new(answer.index),
                    errno: U16::new(answer.errno),
                    reserved: [0; 4],
                    addr: U64::new(answer.addr),
                };
                header(Kind::BlockAnswer).join(&body, &[], out)
            }
            Self::PoolAnswer { errno } => {
                header(Kind::PoolAnswer).join(&U16::new(*errno), &[], out)
            }
            Self::MapAnswer(outcomes) => header(Kind::MapAnswer).join(outcomes.outcomes, &[], out),
            Self::Settled { errno } => header(Kind::Settled).join(&U16::new(*errno), &[], out),
            Self::StatisticsAnswer(statistics) => {
                let body = StatisticsBytes::from(*statistics);
                header(Kind::StatisticsAnswer).join(&body, &[], out)
            }
            Self::Closed(statistics) => {
                header(Kind::Closed).join(&StatisticsBytes::from(*statistics), &[], out)
            }
            Self::Refused(refusal) => {
                header(Kind::Refused).join(&U16::new(refusal.code()), &[], out)
            }
        }
    }
}

#[inline]
fn decode_hello(body: &[u8]) -> Result<Hello, AbiError> {
    let hello: HelloBytes = exactly(body)?;
    if hello.magic != MAGIC {
        return Err(AbiError::Magic);
    }
    if hello.reserved != [0; 2] {
        return Err(AbiError::Value);
    }
    Ok(Hello {
        version: hello.version.get(),
        pid: hello.pid.get(),
        page_bytes: hello.page_bytes.get(),
        features: Features(hello.features.get()),
    })
}

#[inline]
fn decode_block_answer(body: &[u8]) -> Result<BlockAnswer, AbiError> {
    let answer: BlockAnswerBytes = exactly(body)?;
    if answer.reserved != [0; 4] {
        return Err(AbiError::Value);
    }
    Ok(BlockAnswer {
        index: answer.index.get(),
        errno: answer.errno.get(),
        addr: answer.addr.get(),
    })
}

#[inline]
fn decode_outcomes(body: &[u8]) -> Result<Outcomes<'_>, AbiError> {
    let outcomes = <[OutcomeBytes]>::ref_from_bytes(body).map_err(|_| AbiError::Length)?;
    if outcomes.len() > RUNS_MAX {
        return Err(AbiError::TooMany);
    }
    if outcomes.iter().any(|bytes| bytes.outcome().is_none()) {
        return Err(AbiError::Value);
    }
    Ok(Outcomes { outcomes })
}
