//! Commands: what a source QEMU says to the target between sections.

use page::{BlockIndex, PAGE_SIZE, PageNo, PageRun};

use crate::BlockList;
use crate::StreamError;
use crate::error::Feature;
use crate::format::section;
use crate::reader::{Halt, Reader};

/// Most bytes of device state that a post-copy stream may hand over in one package. Large guests
/// have a few MiB.
pub const MAX_PACKAGE: u32 = 64 << 20;

/// Most ranges of one discard: QEMU sends 12.
const MAX_RANGES: usize = 12;

/// Bytes of one range of a discard.
const RANGE_LEN: usize = 16;

/// A command that stands between sections.
///
/// | number | command | payload |
/// |---|---|---|
/// | 1 | `OpenReturnPath` | none |
/// | 2 | `Ping` | the value to answer with |
/// | 3 | `PostcopyAdvise` | be64 page sizes of the blocks, be64 page size of the guest |
/// | 4, 5 | listen and run: only inside a package | |
/// | 6 | [`Discard`] | see there |
/// | 7 | package | be32 length; the package follows |
/// | 8 | COLO, refused | |
/// | 9, 10 | only in a stream that goes on: [`crate::decode_recovery`] | |
/// | 11 | `SwitchoverStart` | none; QEMU 10.0 with machine types from 10.0 |
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Command {
    /// The target opens its half of the return path. A second one is harmless.
    OpenReturnPath,
    /// The target answers `Pong` with this value, once everything before it is loaded.
    Ping(u32),
    /// Post-copy may follow: the target empties its memory.
    PostcopyAdvise {
        /// The page sizes of all blocks, or-ed.
        page_sizes: u64,
    },
    /// The source stopped the guest; its last RAM section follows.
    SwitchoverStart,
}

/// Pages that the target forgets before a switch to post-copy: the source sends each of them
/// after it, once.
///
/// Payload: u8 0, counted block name, u8 0, then be64 start and be64 length of 1 to 12 ranges, in
/// bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Discard<'a> {
    /// Block; always in the list.
    pub block: BlockIndex,
    /// Checked to lie in the block.
    ranges: &'a [[u8; RANGE_LEN]],
}

impl Discard<'_> {
    /// The ranges, all of them inside the block.
    pub fn runs(&self) -> impl Iterator<Item = PageRun> {
        // Checked when it was decoded.
        self.ranges.iter().filter_map(run_of)
    }
}

fn run_of(range: &[u8; RANGE_LEN]) -> Option<PageRun> {
    let (words, _) = range.as_chunks::<8>();
    let (start, len) = (u64::from_be_bytes(words[0]), u64::from_be_bytes(words[1]));
    if len == 0 || !len.is_multiple_of(PAGE_SIZE as u64) {
        return None;
    }
    let count = u32::try_from(len / PAGE_SIZE as u64).ok()?;
    let start = PageNo::from_offset(start)?;
    Some(PageRun { start, count })
}

const OPEN_RETURN_PATH: u16 = 1;
const PING: u16 = 2;
const POSTCOPY_ADVISE: u16 = 3;
pub(crate) const DISCARD: u16 = 6;
pub(crate) const PACKAGED: u16 = 7;
pub(crate) const POSTCOPY_RESUME: u16 = 9;
pub(crate) const RECV_BITMAP: u16 = 10;
const SWITCHOVER_START: u16 = 11;

/// What stands between sections.
pub(crate) enum Found<'a> {
    Command(Command),
    Discard(Discard<'a>),
    /// A package of so many bytes follows.
    Package(u32),
}

/// Reads what follows the section type byte of a command. `blocks` are absent before RAM starts.
pub(crate) fn decode<'a>(
    reader: &mut Reader<'a>,
    blocks: Option<&BlockList>,
) -> Result<Found<'a>, Halt<StreamError>> {
    let number = reader.be16()?;
    let len = reader.be16()?;
    let command = match (number, len) {
        (OPEN_RETURN_PATH, 0) => Command::OpenReturnPath,
        (PING, 4) => Command::Ping(reader.be32()?),
        (POSTCOPY_ADVISE, 16) if blocks.is_none() => advise(reader)?,
        (POSTCOPY_ADVISE, 0) => {
            return Err(StreamError::Unsupported(Feature::DirtyBitmaps).into());
        }
        (DISCARD, _) if let Some(blocks) = blocks => {
            return Ok(Found::Discard(discard(reader, len, blocks)?));
        }
        (PACKAGED, 4) if blocks.is_some() => {
            let length = reader.be32()?;
            if length == 0 || length > MAX_PACKAGE {
                return Err(StreamError::BadPackage(length).into());
            }
            return Ok(Found::Package(length));
        }
        (SWITCHOVER_START, 0) => Command::SwitchoverStart,
        (8, _) => return Err(StreamError::Unsupported(Feature::Colo).into()),
        (POSTCOPY_RESUME | RECV_BITMAP, _) => {
            return Err(StreamError::Unsupported(Feature::PostcopyRecovery).into());
        }
        _ => return Err(StreamError::BadCommand { number, len }.into()),
    };
    Ok(Found::Command(command))
}

fn advise(reader: &mut Reader<'_>) -> Result<Command, Halt<StreamError>> {
    let (page_sizes, page_size) = (reader.be64()?, reader.be64()?);
    let small = PAGE_SIZE as u64;
    if page_size != small || page_sizes == 0 || !page_sizes.is_multiple_of(small) {
        return Err(StreamError::BadPageSizes(page_sizes).into());
    }
    Ok(Command::PostcopyAdvise { page_sizes })
}

fn discard<'a>(
    reader: &mut Reader<'a>,
    len: u16,
    blocks: &BlockList,
) -> Result<Discard<'a>, Halt<StreamError>> {
    let bad = |what| Halt::Error(StreamError::BadDiscard(what));
    if usize::from(len) > 3 + usize::from(u8::MAX) + MAX_RANGES * RANGE_LEN {
        return Err(bad("too long"));
    }
    let mut payload = Reader::new(reader.bytes(usize::from(len))?);
    let short = |_| bad("too short");
    if payload.u8().map_err(short)? != 0 {
        return Err(bad("version"));
    }
    let name = payload.counted().map_err(short)?;
    let block = std::str::from_utf8(name)
        .ok()
        .and_then(|name| blocks.index_of(name))
        .ok_or_else(|| bad("of an unknown block"))?;
    if payload.u8().map_err(short)? != 0 {
        return Err(bad("name without end"));
    }
    let (ranges, rest) = payload.rest().as_chunks::<RANGE_LEN>();
    if ranges.is_empty() || ranges.len() > MAX_RANGES || !rest.is_empty() {
        return Err(bad("number of ranges"));
    }
    let lies_inside = |range| {
        let run = run_of(range)?;
        let last = run.end()?.checked_sub(1)?;
        blocks.holds(block, PageNo(last)).then_some(())
    };
    if ranges.iter().any(|range| lies_inside(range).is_none()) {
        return Err(bad("outside of its block"));
    }
    Ok(Discard { block, ranges })
}

/// Appends a command. It belongs between sections: close the encoder's section first.
pub fn encode_command(command: Command, out: &mut Vec<u8>) {
    out.push(section::COMMAND);
    let mut head = |number: u16, len: u16| {
        out.extend_from_slice(&number.to_be_bytes());
        out.extend_from_slice(&len.to_be_bytes());
    };
    match command {
        Command::OpenReturnPath => head(OPEN_RETURN_PATH, 0),
        Command::SwitchoverStart => head(SWITCHOVER_START, 0),
        Command::Ping(value) => {
            head(PING, 4);
            out.extend_from_slice(&value.to_be_bytes());
        }
        Command::PostcopyAdvise { page_sizes } => {
            head(POSTCOPY_ADVISE, 16);
            out.extend_from_slice(&page_sizes.to_be_bytes());
            out.extend_from_slice(&(PAGE_SIZE as u64).to_be_bytes());
        }
    }
}
