//! Frames of the index channel, and cutting a stream of bytes into them.

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::MAX_IDS;
use crate::WireError;

/// Bytes of an [`IndexHeader`].
pub const INDEX_HEADER_LEN: usize = 8;

/// Longest body: a registration of [`MAX_IDS`] contents at 16 bytes an id and up to 5 a page
/// count, and its host and count. Verdicts are at most as many, each a run of its own of 1 + 5
/// + 10 bytes; nothing else is longer.
pub const MAX_INDEX_BODY: usize = MAX_IDS * 21 + 16;

/// Head of a frame.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct IndexHeader {
    kind: u8,
    reserved: [u8; 3],
    body_len: U32,
}

const _: () = assert!(size_of::<IndexHeader>() == INDEX_HEADER_LEN);

impl IndexHeader {
    /// Checks a header from the peer. Whether the kind is one is for the message's decoder.
    ///
    /// # Errors
    /// A body above [`MAX_INDEX_BODY`].
    pub fn parse(bytes: [u8; INDEX_HEADER_LEN]) -> Result<Self, WireError> {
        let header: Self = zerocopy::transmute!(bytes);
        if header.body_len() > MAX_INDEX_BODY {
            return Err(WireError::TooLong {
                what: "a frame of the index",
                length: header.body_len.get().into(),
                limit: MAX_INDEX_BODY as u64,
            });
        }
        Ok(header)
    }

    /// Number of the message.
    #[must_use]
    pub fn kind(&self) -> u8 {
        self.kind
    }

    /// Bytes that follow.
    #[must_use]
    pub fn body_len(&self) -> usize {
        self.body_len.get() as usize
    }
}

/// Appends a frame whose body `write` appends.
pub(super) fn put_frame(out: &mut Vec<u8>, kind: u8, write: impl FnOnce(&mut Vec<u8>)) {
    let header_at = out.len();
    out.resize(header_at + INDEX_HEADER_LEN, 0);
    write(out);
    let body_len = out.len() - header_at - INDEX_HEADER_LEN;
    let header = IndexHeader {
        kind,
        reserved: [0; 3],
        body_len: u32::try_from(body_len).unwrap_or(u32::MAX).into(),
    };
    let bytes: [u8; INDEX_HEADER_LEN] = zerocopy::transmute!(header);
    out[header_at..header_at + INDEX_HEADER_LEN].copy_from_slice(&bytes);
}

/// Collects received bytes and gives them back frame by frame.
///
/// Holds what it was handed and less than one frame from before.
#[derive(Debug, Default)]
pub struct FrameBuffer {
    bytes: Vec<u8>,
    /// Up to here the bytes were given back.
    taken: usize,
}

impl FrameBuffer {
    /// Adds what was received.
    pub fn push(&mut self, input: &[u8]) {
        self.bytes.drain(..self.taken);
        self.taken = 0;
        self.bytes.extend_from_slice(input);
    }

    /// The next whole frame, as its kind and body; `None` until more is received.
    ///
    /// # Errors
    /// A length above the limit: nothing after it can be read, the connection must be closed.
    pub fn next_frame(&mut self) -> Result<Option<(u8, &[u8])>, WireError> {
        let rest = &self.bytes[self.taken..];
        let Some((head, rest)) = rest.split_first_chunk::<INDEX_HEADER_LEN>() else {
            return Ok(None);
        };
        let header = IndexHeader::parse(*head)?;
        let Some(body) = rest.get(..header.body_len()) else {
            return Ok(None);
        };
        self.taken += INDEX_HEADER_LEN + body.len();
        Ok(Some((header.kind(), body)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_however_the_bytes_were_cut() {
        let mut stream = Vec::new();
        for n in 0..50_u8 {
            put_frame(&mut stream, n, |out| out.extend(vec![n; n.into()]));
        }
        for piece in [1, 3, 8, 9, 100, stream.len()] {
            let (mut buffer, mut next) = (FrameBuffer::default(), 0_u8);
            for input in stream.chunks(piece) {
                buffer.push(input);
                while let Some((kind, body)) = buffer.next_frame().unwrap() {
                    assert_eq!((kind, body), (next, vec![next; next.into()].as_slice()));
                    next += 1;
                }
            }
            assert_eq!(next, 50);
        }
    }

    #[test]
    fn a_body_above_the_limit_is_refused_before_it_arrives() {
        let mut buffer = FrameBuffer::default();
        buffer.push(&[1, 0, 0, 0, 0xff, 0xff, 0xff, 0]);
        assert!(matches!(
            buffer.next_frame(),
            Err(WireError::TooLong { .. })
        ));
    }
}
