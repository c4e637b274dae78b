//! A cursor over the bytes received so far.

use crate::StreamError;

/// Why an item could not be read: the input ends too early, or it is wrong.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Halt<E> {
    /// The total length that the input must have before another attempt can get further.
    NeedMore(usize),
    Error(E),
}

impl From<StreamError> for Halt<StreamError> {
    fn from(error: StreamError) -> Self {
        Self::Error(error)
    }
}

/// The input ends before the field that starts where the reader stands.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Short(pub(crate) usize);

impl<E> From<Short> for Halt<E> {
    fn from(Short(at_least): Short) -> Self {
        Self::NeedMore(at_least)
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Reader<'a> {
    input: &'a [u8],
    position: usize,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(input: &'a [u8]) -> Self {
        Self { input, position: 0 }
    }

    pub(crate) fn position(&self) -> usize {
        self.position
    }

    /// Everything read so far.
    pub(crate) fn consumed(&self) -> &'a [u8] {
        &self.input[..self.position]
    }

    #[inline]
    pub(crate) fn bytes(&mut self, len: usize) -> Result<&'a [u8], Short> {
        let end = self.position.saturating_add(len);
        let taken = self.input.get(self.position..end).ok_or(Short(end))?;
        self.position = end;
        Ok(taken)
    }

    #[inline]
    pub(crate) fn array<const N: usize>(&mut self) -> Result<&'a [u8; N], Short> {
        let rest = &self.input[self.position..];
        let taken = rest
            .first_chunk()
            .ok_or(Short(self.position.saturating_add(N)))?;
        self.position += N;
        Ok(taken)
    }

    #[inline]
    pub(crate) fn u8(&mut self) -> Result<u8, Short> {
        self.array().map(|[byte]| *byte)
    }

    #[inline]
    pub(crate) fn be16(&mut self) -> Result<u16, Short> {
        self.array().map(|bytes| u16::from_be_bytes(*bytes))
    }

    #[inline]
    pub(crate) fn be32(&mut self) -> Result<u32, Short> {
        self.array().map(|bytes| u32::from_be_bytes(*bytes))
    }

    #[inline]
    pub(crate) fn be64(&mut self) -> Result<u64, Short> {
        self.array().map(|bytes| u64::from_be_bytes(*bytes))
    }

    /// A length byte and that many bytes: QEMU's counted string.
    pub(crate) fn counted(&mut self) -> Result<&'a [u8], Short> {
        let len = self.u8()?;
        self.bytes(usize::from(len))
    }

    /// Everything that is left.
    pub(crate) fn rest(&mut self) -> &'a [u8] {
        let rest = &self.input[self.position..];
        self.position = self.input.len();
        rest
    }

    /// What is left, at most `len` bytes of it.
    pub(crate) fn up_to(&mut self, len: usize) -> &'a [u8] {
        let rest = &self.input[self.position..];
        let taken = &rest[..len.min(rest.len())];
        self.position += taken.len();
        taken
    }

    /// The next byte, left where it is.
    pub(crate) fn peek(&self) -> Result<u8, Short> {
        Reader { ..*self }.u8()
    }
}
