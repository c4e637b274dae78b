//! Reading operations.

use page::{BlockIndex, EntryId, FileRange, FrameSharing, HostNo, HostSet, PageNo, PageRun};

use super::{MAX_OPS, Op, Remote, tag};
use crate::frame::take_u32;
use crate::{WireError, varint};

/// A body taken apart.
#[derive(Clone, Copy, Debug)]
pub struct PagesBody<'a> {
    /// Position in the source QEMU's stream after this body.
    pub position: u64,
    /// The operations.
    pub ops: &'a [u8],
    /// The page bytes.
    pub pages: &'a [u8],
}

/// Takes a body apart without looking into the operations.
///
/// # Errors
/// Lengths that do not fit the body.
pub fn split_pages_body(body: &[u8]) -> Result<PagesBody<'_>, WireError> {
    let mut rest = body;
    let position = varint::take(&mut rest)?;
    let length = varint::take(&mut rest)?;
    if length > rest.len() as u64 {
        return Err(WireError::Truncated);
    }
    #[expect(
        clippy::cast_possible_truncation,
        reason = "at most the length of a slice"
    )]
    let (ops, pages) = rest.split_at(length as usize);
    if ops.len() > MAX_OPS {
        return Err(WireError::TooLong {
            what: "a list of operations",
            length,
            limit: MAX_OPS as u64,
        });
    }
    Ok(PagesBody {
        position,
        ops,
        pages,
    })
}

/// Reads operations one by one.
pub struct OpReader<'a> {
    rest: &'a [u8],
    last_end: u32,
}

impl<'a> OpReader<'a> {
    /// Reads the operations of a body.
    #[must_use]
    pub fn new(ops: &'a [u8]) -> Self {
        Self {
            rest: ops,
            last_end: 0,
        }
    }

    fn run(&mut self) -> Result<PageRun, WireError> {
        let distance = varint::unzigzag(varint::take(&mut self.rest)?);
        let start = i64::from(self.last_end)
            .checked_add(distance)
            .ok_or(WireError::NumberTooLarge)?;
        let start = PageNo(u32::try_from(start).map_err(|_| WireError::NumberTooLarge)?);
        let run = PageRun {
            start,
            count: take_u32(&mut self.rest)?,
        };
        match run.end() {
            Some(end) if run.count > 0 => self.last_end = end,
            _ => return Err(WireError::NumberTooLarge),
        }
        Ok(run)
    }

    fn entries(&mut self, run: PageRun) -> Result<EntryId, WireError> {
        let first = take_u32(&mut self.rest)?.rotate_right(1);
        first
            .checked_add(run.count)
            .ok_or(WireError::NumberTooLarge)?;
        Ok(EntryId(first))
    }

    fn remote(&mut self, pushed: bool) -> Result<Remote<'a>, WireError> {
        let run = self.run()?;
        let first = self.entries(run)?;
        let carrier =
            u16::try_from(varint::take(&mut self.rest)?).map_err(|_| WireError::NumberTooLarge)?;
        let (ids, _) = self.rest.as_chunks::<16>();
        let ids = ids.get(..run.count as usize).ok_or(WireError::Truncated)?;
        self.rest = &self.rest[ids.len() * 16..];
        Ok(Remote {
            run,
            first,
            carrier: HostNo(carrier),
            pushed,
            ids,
        })
    }

    fn bytes(&mut self) -> Result<&'a [u8], WireError> {
        let length = varint::take(&mut self.rest)?;
        if length > self.rest.len() as u64 {
            return Err(WireError::Truncated);
        }
        #[expect(
            clippy::cast_possible_truncation,
            reason = "at most the length of a slice"
        )]
        let (bytes, rest) = self.rest.split_at(length as usize);
        self.rest = rest;
        Ok(bytes)
    }

    fn op(&mut self, tag: u8) -> Result<Op<'a>, WireError> {
        Ok(match tag {
            tag::RAW => Op::Raw(self.bytes()?),
            tag::RAM_START => Op::RamStart(self.bytes()?),
            tag::BLOCK => {
                let block = u16::try_from(varint::take(&mut self.rest)?)
                    .map_err(|_| WireError::NumberTooLarge)?;
                self.last_end = 0;
                Op::Block(BlockIndex(block))
            }
            tag::ZERO => Op::Zero(self.run()?),
            tag::FILL => {
                let run = self.run()?;
                let (&byte, rest) = self.rest.split_first().ok_or(WireError::Truncated)?;
                self.rest = rest;
                Op::Fill(run, byte)
            }
            tag::PLAIN => Op::Plain(self.run()?),
            tag::LITERAL => {
                let run = self.run()?;
                Op::Literal(run, self.entries(run)?)
            }
            tag::REFERENCE => {
                let run = self.run()?;
                Op::Reference(run, self.entries(run)?)
            }
            tag::FORWARD => Op::Forward(HostSet::from_bits(varint::take(&mut self.rest)?)),
            tag::SHARED => Op::Shared(FrameSharing::Merged),
            tag::NOT_SHARED => Op::Shared(FrameSharing::No),
            tag::SHARED_FILE => {
                let file = u16::try_from(varint::take(&mut self.rest)?)
                    .map_err(|_| WireError::NumberTooLarge)?;
                let ahead = varint::unzigzag(varint::take(&mut self.rest)?);
                Op::Shared(FrameSharing::File(FileRange { file, ahead }))
            }
            tag::REMOTE => Op::Remote(self.remote(false)?),
            tag::REMOTE_PUSHED => Op::Remote(self.remote(true)?),
            tag::END_BEGIN => Op::EndBegin,
            tag::END_CLOSED => Op::EndClosed,
            tag::TAIL => Op::Tail(self.bytes()?),
            tag::PACKAGE => Op::Package(self.bytes()?),
            other => return Err(WireError::UnknownOp(other)),
        })
    }
}

impl<'a> Iterator for OpReader<'a> {
    type Item = Result<Op<'a>, WireError>;

    fn next(&mut self) -> Option<Self::Item> {
        let (&tag, rest) = self.rest.split_first()?;
        self.rest = rest;
        let op = self.op(tag);
        if op.is_err() {
            self.rest = &[];
        }
        Some(op)
    }
}
