//! The header that every packet starts with.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a header.
pub const HEADER_BYTES: usize = 16;

/// The first bytes of a packet.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct HeaderBytes {
    kind: U16,
    reserved: U16,
    /// The whole packet's.
    len: U32,
    sequence: U64,
}

const _: () = assert!(size_of::<HeaderBytes>() == HEADER_BYTES);

/// Numbers of the messages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
pub enum Kind {
    /// Library: who it is.
    Hello = 1,
    /// Agent: go on.
    Welcome = 2,
    /// Agent: a block of guest memory.
    Block = 3,
    /// Library: whether it can be mapped.
    BlockAnswer = 4,
    /// Agent: the pool, with its descriptor.
    Pool = 5,
    /// Library: whether it can be used.
    PoolAnswer = 6,
    /// Agent: runs to be mapped or copied.
    Map = 7,
    /// Library: an outcome for each run.
    MapAnswer = 8,
    /// Agent: give what was mapped the advice that its block had.
    Settle = 9,
    /// Library: done.
    Settled = 10,
    /// Agent: what was done so far?
    Statistics = 11,
    /// Library: that.
    StatisticsAnswer = 12,
    /// Agent: no more is coming.
    Close = 13,
    /// Library: the last word.
    Closed = 14,
    /// Library: a packet was not understood, or makes no sense now. It closes.
    Refused = 15,
    /// Agent: runs that QEMU will place in post-copy.
    Expect = 16,
}

impl Kind {
    /// The kind with this number.
    #[inline]
    #[must_use]
    pub fn from_number(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Hello,
            2 => Self::Welcome,
            3 => Self::Block,
            4 => Self::BlockAnswer,
            5 => Self::Pool,
            6 => Self::PoolAnswer,
            7 => Self::Map,
            8 => Self::MapAnswer,
            9 => Self::Settle,
            10 => Self::Settled,
            11 => Self::Statistics,
            12 => Self::StatisticsAnswer,
            13 => Self::Close,
            14 => Self::Closed,
            15 => Self::Refused,
            16 => Self::Expect,
            _ => return None,
        })
    }
}

/// Why a packet is not understood.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
pub enum AbiError {
    /// Its length is not what its header or its content says.
    Length = 1,
    /// Its number is unknown, or is one that only this end sends.
    Kind = 2,
    /// It does not begin with [`crate::MAGIC`].
    Magic = 3,
    /// More items than are allowed.
    TooMany = 4,
    /// A field has a value that it never has.
    Value = 5,
}

impl AbiError {
    /// The error with this number.
    #[inline]
    #[must_use]
    pub fn from_number(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Length,
            2 => Self::Kind,
            3 => Self::Magic,
            4 => Self::TooMany,
            5 => Self::Value,
            _ => return None,
        })
    }
}

impl core::fmt::Display for AbiError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::Length => "a packet of the mapping library's protocol has a wrong length",
            Self::Kind => "a packet of the mapping library's protocol has an unexpected number",
            Self::Magic => "the peer does not speak the mapping library's protocol",
            Self::TooMany => "a packet of the mapping library's protocol has too many items",
            Self::Value => "a packet of the mapping library's protocol has a wrong value",
        })
    }
}

impl core::error::Error for AbiError {}

/// A checked header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// What the packet is.
    pub kind: Kind,
    /// Chosen by the agent, repeated in the answer. 0 in what is no answer.
    pub sequence: u64,
}

impl Header {
    /// Takes a packet apart into header and body.
    ///
    /// # Errors
    /// [`AbiError::Length`], [`AbiError::Kind`], [`AbiError::Value`] for a reserved field in use.
    #[inline]
    pub fn split(packet: &[u8]) -> Result<(Self, &[u8]), AbiError> {
        let (header, body) = HeaderBytes::read_from_prefix(packet).map_err(|_| AbiError::Length)?;
        if header.len.get() as usize != packet.len() || packet.len() > crate::PACKET_BYTES_MAX {
            return Err(AbiError::Length);
        }
        if header.reserved.get() != 0 {
            return Err(AbiError::Value);
        }
        let kind = Kind::from_number(header.kind.get()).ok_or(AbiError::Kind)?;
        let sequence = header.sequence.get();
        Ok((Self { kind, sequence }, body))
    }

    /// Writes a packet made of this header, `fixed` and `rest`; its length, or `None` if `out` is
    /// too short.
    #[inline]
    pub(crate) fn join(
        self,
        fixed: &(impl IntoBytes + Immutable + ?Sized),
        rest: &[u8],
        out: &mut [u8],
    ) -> Option<usize> {
        let body = size_of_val(fixed).checked_add(rest.len())?;
        let len = HEADER_BYTES.checked_add(body)?;
        if len > crate::PACKET_BYTES_MAX {
            return None;
        }
        let header = HeaderBytes {
            kind: U16::new(self.kind as u16),
            reserved: U16::new(0),
            len: U32::new(u32::try_from(len).ok()?),
            sequence: U64::new(self.sequence),
        };
        header.write_to_prefix(out).ok()?;
        let out = out.get_mut(HEADER_BYTES..)?;
        fixed.write_to_prefix(out).ok()?;
        rest.write_to_prefix(out.get_mut(size_of_val(fixed)..)?)
            .ok()?;
        Some(len)
    }
}

/// The whole of `body` as a `T`.
#[inline]
pub(crate) fn exactly<T: FromBytes + Copy>(body: &[u8]) -> Result<T, AbiError> {
    T::read_from_bytes(body).map_err(|_| AbiError::Length)
}

/// Refuses a body where there must be none.
#[inline]
pub(crate) fn nothing(body: &[u8]) -> Result<(), AbiError> {
    if body.is_empty() {
        Ok(())
    } else {
        Err(AbiError::Length)
    }
}
