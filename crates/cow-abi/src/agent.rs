//! What the agent says.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::packet::{exactly, nothing};
use crate::{
    AbiError, BLOCK_PAGES_MAX, BLOCKS_MAX, Header, Kind, MAGIC, NAME_BYTES_MAX, PAGE_BYTES,
    POOL_PAGES_MAX, RUNS_MAX,
};

/// A message of the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FromAgent<'a> {
    /// The library is the one expected; this is the agent's version.
    Welcome {
        /// Of the protocol.
        version: u16,
    },
    /// A block of guest memory in which pages will be mapped.
    Block(BlockOffer<'a>),
    /// The pool; its descriptor comes with the packet. It is open for reading only, and sealed
    /// against shrinking.
    Pool {
        /// Its inode, so that a mix-up is seen.
        inode: u64,
    },
    /// Map runs, or copy them out of the pool.
    Map(MapBatch<'a>),
    /// QEMU will place these pages in post-copy (`UFFDIO_COPY`): instead of that they may be mapped.
    /// Answered as a `Map` is. A batch that says `copy` makes no sense here.
    Expect(MapBatch<'a>),
    /// A series of `Map` is over: advice is given again.
    Settle,
    /// Ask for what was done.
    Statistics,
    /// Nothing more will be asked.
    Close,
}

/// A block as QEMU's monitor describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockOffer<'a> {
    /// Number by which runs name it, below [`BLOCKS_MAX`].
    pub index: u16,
    /// Its name in QEMU, without a NUL.
    pub name: &'a [u8],
    /// Where it begins in QEMU's memory; 0 if the monitor does not tell, then the library asks
    /// QEMU's own functions.
    pub addr: u64,
    /// Its length in bytes, whole pages.
    pub len: u64,
}

/// One run: consecutive pages of a block, consecutive pages of the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapRun {
    /// Number of the block.
    pub block: u16,
    /// First page in the block.
    pub page: u32,
    /// How many pages, at least one.
    pub pages: u32,
    /// First page in the pool.
    pub pool_page: u64,
}

/// A run in a packet.
#[derive(
    FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy, Debug, PartialEq, Eq,
)]
#[repr(C)]
pub struct MapRunBytes {
    block: U16,
    reserved: [u8; 6],
    page: U32,
    pages: U32,
    pool_page: U64,
}

const _: () = assert!(size_of::<MapRunBytes>() == 24);

impl From<MapRun> for MapRunBytes {
    #[inline]
    fn from(run: MapRun) -> Self {
        Self {
            block: U16::new(run.block),
            reserved: [0; 6],
            page: U32::new(run.page),
            pages: U32::new(run.pages),
            pool_page: U64::new(run.pool_page),
        }
    }
}

impl MapRunBytes {
    #[inline]
    fn run(&self) -> MapRun {
        MapRun {
            block: self.block.get(),
            page: self.page.get(),
            pages: self.pages.get(),
            pool_page: self.pool_page.get(),
        }
    }

    #[inline]
    fn is_sound(&self) -> bool {
        let run = self.run();
        let fits = |start: u64, max: u64| start <= max.saturating_sub(u64::from(run.pages));
        usize::from(run.block) < BLOCKS_MAX
            && self.reserved == [0; 6]
            && run.pages > 0
            && fits(u64::from(run.page), BLOCK_PAGES_MAX)
            && fits(run.pool_page, POOL_PAGES_MAX)
    }
}

/// Runs to be mapped, or copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapBatch<'a> {
    copy: bool,
    runs: &'a [MapRunBytes],
}

impl<'a> MapBatch<'a> {
    /// Makes a batch. With `copy` the bytes are copied out of the pool into the VM's own memory
    /// instead of being mapped. `None` if there are too many runs.
    #[inline]
    #[must_use]
    pub fn new(copy: bool, runs: &'a [MapRunBytes]) -> Option<Self> {
        (runs.len() <= RUNS_MAX).then_some(Self { copy, runs })
    }

    /// Whether bytes are copied.
    #[inline]
    #[must_use]
    pub fn copy(&self) -> bool {
        self.copy
    }

    /// How many runs there are.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        self.runs.len()
    }

    /// Whether there are none.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// The runs, in order.
    #[inline]
    pub fn runs(&self) -> impl Iterator<Item = MapRun> + 'a {
        self.runs.iter().map(MapRunBytes::run)
    }

    #[inline]
    fn join(&self, header: Header, out: &mut [u8]) -> Option<usize> {
        let body = MapBytes {
            count: U32::new(u32::try_from(self.runs.len()).ok()?),
            copy: u8::from(self.copy),
            reserved: [0; 3],
        };
        header.join(&body, self.runs.as_bytes(), out)
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct WelcomeBytes {
    magic: [u8; 8],
    version: U16,
    reserved: [u8; 6],
}

const _: () = assert!(size_of::<WelcomeBytes>() == 16);

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct BlockBytes {
    index: U16,
    name_len: U16,
    reserved: [u8; 4],
    addr: U64,
    len: U64,
}

const _: () = assert!(size_of::<BlockBytes>() == 24);

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct MapBytes {
    count: U32,
    copy: u8,
    reserved: [u8; 3],
}

const _: () = assert!(size_of::<MapBytes>() == 8);

impl<'a> FromAgent<'a> {
    /// Reads a packet that the agent sent, and its sequence number.
    ///
    /// # Errors
    /// What is wrong with it; the library answers `Refused` and closes.
    #[inline]
    pub fn decode(packet: &'a [u8]) -> Result<(u64, Self), AbiError> {
        let (header, body) = Header::split(packet)?;
        let message = match header.kind {
            Kind::Welcome => decode_welcome(body)?,
            Kind::Block => Self::Block(decode_block(body)?),
            Kind::Pool => Self::Pool {
                inode: exactly::<U64>(body)?.get(),
            },
            Kind::Map => Self::Map(decode_map(body)?),
            Kind::Expect => match decode_map(body)? {
                batch if batch.copy => return Err(AbiError::Value),
                batch => Self::Expect(batch),
            },
            Kind::Settle => nothing(body).map(|()| Self::Settle)?,
            Kind::Statistics => nothing(body).map(|()| Self::Statistics)?,
            Kind::Close => nothing(body).map(|()| Self::Close)?,
            _ => return Err(AbiError::Kind),
        };
        Ok((header.sequence, message))
    }

    /// Writes the packet; its length, or `None` if `out` is shorter or the message breaks a limit.
    #[inline]
    #[must_use]
    pub fn encode(&self, sequence: u64, out: &mut [u8]) -> Option<usize> {
        let header = |kind| Header { kind, sequence };
        match self {
            Self::Welcome { version } => {
                let body = WelcomeBytes {
                    magic: MAGIC,
                    version: U16::new(*version),
                    reserved: [0; 6],
                };
                header(Kind::Welcome).join(&body, &[], out)
            }
            Self::Block(offer) => {
                let body = BlockBytes {
                    index: U16::new(offer.index),
                    name_len: U16::new(u16::try_from(offer.name.len()).ok()?),
                    reserved: [0; 4],
                    addr: U64::new(offer.addr),
                    len: U64::new(offer.len),
                };
                header(Kind::Block).join(&body, offer.name, out)
            }
            Self::Pool { inode } => header(Kind::Pool).join(&U64::new(*inode), &[], out),
            Self::Map(batch) => batch.join(header(Kind::Map), out),
            Self::Expect(batch) if batch.copy => None,
            Self::Expect(batch) => batch.join(header(Kind::Expect), out),
            Self::Settle => header(Kind::Settle).join(&(), &[], out),
            Self::Statistics => header(Kind::Statistics).join(&(), &[], out),
            Self::Close => header(Kind::Close).join(&(), &[], out),
        }
    }
}

#[inline]
fn decode_welcome(body: &[u8]) -> Result<FromAgent<'_>, AbiError> {
    let welcome: WelcomeBytes = exactly(body)?;
    if welcome.magic != MAGIC {
        return Err(AbiError::Magic);
    }
    // What another version puts behind its number is not for this one to judge.
    let version = welcome.version.get();
    Ok(FromAgent::Welcome { version })
}

#[inline]
fn decode_block(body: &[u8]) -> Result<BlockOffer<'_>, AbiError> {
    let (block, name) = BlockBytes::read_from_prefix(body).map_err(|_| AbiError::Length)?;
    if usize::from(block.name_len.get()) != name.len() {
        return Err(AbiError::Length);
    }
    let (addr, len) = (block.addr.get(), block.len.get());
    let sound = usize::from(block.index.get()) < BLOCKS_MAX
        && (1..=NAME_BYTES_MAX).contains(&name.len())
        && name.iter().all(|byte| *byte != 0)
        && block.reserved == [0; 4]
        && addr & (PAGE_BYTES - 1) == 0
        && len & (PAGE_BYTES - 1) == 0
        && len != 0
        && len / PAGE_BYTES <= BLOCK_PAGES_MAX
        && addr.checked_add(len).is_some();
    if !sound {
        return Err(AbiError::Value);
    }
    let index = block.index.get();
    Ok(BlockOffer {
        index,
        name,
        addr,
        len,
    })
}

#[inline]
fn decode_map(body: &[u8]) -> Result<MapBatch<'_>, AbiError> {
    let (map, runs) = MapBytes::read_from_prefix(body).map_err(|_| AbiError::Length)?;
    let count = map.count.get() as usize;
    if count > RUNS_MAX {
        return Err(AbiError::TooMany);
    }
    let runs = <[MapRunBytes]>::ref_from_bytes(runs).map_err(|_| AbiError::Length)?;
    if runs.len() != count {
        return Err(AbiError::Length);
    }
    let sound = map.copy <= 1 && map.reserved == [0; 3] && runs.iter().all(MapRunBytes::is_sound);
    if !sound {
        return Err(AbiError::Value);
    }
    let copy = map.copy == 1;
    Ok(MapBatch { copy, runs })
}
