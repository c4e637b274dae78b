//! Frames: the unit on the forward and back connections.

use page::{BlockIndex, EntryId, HostNo, PageNo, PageRun};
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::varint;

/// Bytes of a [`FrameHeader`].
pub const HEADER_LEN: usize = 16;

/// Longest body, before compression: one read buffer of the source (256 KiB of QEMU's stream),
/// its operations, and room for a device-state tail in one piece. zstd's worst case adds less
/// than one part in 128, which the same limit covers.
pub const MAX_BODY: usize = 1 << 20;

/// Longest JSON of a control request or reply: a QEMU command line of a thousand disks is
/// under 200 KB.
pub const MAX_CONTROL: usize = 1 << 20;

/// Longest piece of a return path that is relayed. QEMU's own limit of a message is 512 bytes; but with
/// the bitmaps of a resumed post-copy it is 32 MiB for each TiB of memory, which goes in pieces.
pub const MAX_RETURN_MESSAGE: usize = 64 << 10;

/// Most runs in one repair request; a longer waiting list is asked for in several.
const MAX_REPAIR_RUNS: u64 = 4096;

/// Most pages of one repair request: eight times what may wait for contents. The source holds all of them until they
/// are sent.
const MAX_REPAIR_PAGES: u64 = 1 << 16;

/// What a frame is. Numbered by hand; 0 is invalid; 1..=31 forward, 32..=63 back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameKind {
    /// Operations on one VM's stream and their page bytes.
    Pages = 1,
    /// Pages read again from the source, in answer to a repair request; same body as `Pages`.
    Repair = 2,
    /// Nothing; says that the sender lives.
    Heartbeat = 3,
    /// The VM's move is over for the stream: drop what is held for it.
    Close = 4,
    /// Contents for another target host: a list of entries and page bytes.
    Contents = 5,
    /// Entries that the sender waits for and the receiver carries.
    Pull = 6,
    /// Entries that the receiver pulled and the sender does not have.
    Missing = 7,
    /// Pages that a processor of the guest waits for, after a switch to post-copy; same body as
    /// `Repair`. Overtakes every other frame.
    Urgent = 8,
    /// What pages of the VM wait for is wanted at once, or not at all: a switch to post-copy is near.
    /// No body.
    Hurry = 9,
    /// Bytes of a source QEMU for the target QEMU, as they are: the rest of a post-copy that was
    /// interrupted.
    Relay = 10,
    /// Likewise, of the channel on which it sends what a processor waits for. Overtakes every other frame.
    RelayPreempt = 11,
    /// A [`BackMessage`].
    Back = 32,
    /// Nothing; says that the sender lives.
    BackHeartbeat = 33,
}

impl FrameKind {
    fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Pages,
            2 => Self::Repair,
            3 => Self::Heartbeat,
            4 => Self::Close,
            5 => Self::Contents,
            6 => Self::Pull,
            7 => Self::Missing,
            8 => Self::Urgent,
            9 => Self::Hurry,
            10 => Self::Relay,
            11 => Self::RelayPreempt,
            32 => Self::Back,
            33 => Self::BackHeartbeat,
            _ => return None,
        })
    }
}

/// What can be wrong with bytes from a peer.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum WireError {
    /// The bytes end inside a value.
    #[error("the message ends inside a value")]
    Truncated,
    /// A number has more than 64 bits, or more than its field may have.
    #[error("a number is out of its range")]
    NumberTooLarge,
    /// A length is above its limit.
    #[error("{what} of {length} bytes is above the limit of {limit}")]
    TooLong {
        /// Which length.
        what: &'static str,
        /// As claimed.
        length: u64,
        /// As allowed.
        limit: u64,
    },
    /// A frame kind that this version does not know, or one that does not belong on this
    /// connection.
    #[error("frame kind {0} is not expected here")]
    UnexpectedKind(u8),
    /// An operation that this version does not know.
    #[error("operation {0} is unknown")]
    UnknownOp(u8),
    /// Page bytes and operations of a body do not add up.
    #[error("the body holds {held} bytes of pages where its operations need {needed}")]
    PageBytes {
        /// Bytes present.
        held: u64,
        /// Bytes needed.
        needed: u64,
    },
    /// Text that is not what it should be.
    #[error("a control message is malformed: {0}")]
    Control(String),
}

/// Head of a frame.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct FrameHeader {
    kind: u8,
    /// 1 if the body is a piece of the connection's compressed stream.
    compressed: u8,
    vm: U16,
    body_len: U32,
    raw_len: U32,
    /// See [`order`](FrameHeader::order).
    order: U32,
}

const _: () = assert!(size_of::<FrameHeader>() == HEADER_LEN);

impl FrameHeader {
    /// Head of a frame for the VM numbered `vm` in this session.
    ///
    /// `body_len` bytes follow; they unpack to `raw_len` bytes. Both are at most [`MAX_BODY`],
    /// the sender's business to keep.
    #[must_use]
    pub fn new(kind: FrameKind, vm: u16, body_len: u32, raw_len: u32) -> Self {
        let (kind, compressed) = (kind as u8, 0);
        Self {
            kind,
            compressed,
            vm: vm.into(),
            body_len: body_len.into(),
            raw_len: raw_len.into(),
            order: 0.into(),
        }
    }

    /// Marks the body as compressed.
    #[must_use]
    pub fn with_compression(mut self, compressed: bool) -> Self {
        self.compressed = u8::from(compressed);
        self
    }

    /// Numbers the frame among those of its session.
    #[must_use]
    pub fn with_order(mut self, order: u32) -> Self {
        self.order = order.into();
        self
    }

    /// The header's bytes.
    #[must_use]
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        zerocopy::transmute!(self)
    }

    /// Checks a header from the peer.
    ///
    /// # Errors
    /// An unknown kind, or a length above its limit.
    pub fn parse(bytes: [u8; HEADER_LEN]) -> Result<Self, WireError> {
        let header: Self = zerocopy::transmute!(bytes);
        if FrameKind::from_number(header.kind).is_none() {
            return Err(WireError::UnexpectedKind(header.kind));
        }
        for (what, length) in [
            ("a frame", header.body_len.get()),
            ("an unpacked frame", header.raw_len.get()),
        ] {
            if length as usize > MAX_BODY {
                return Err(WireError::TooLong {
                    what,
                    length: length.into(),
                    limit: MAX_BODY as u64,
                });
            }
        }
        if header.compressed > 1 || (header.compressed == 0 && header.body_len != header.raw_len) {
            return Err(WireError::Control(
                "compression flag and lengths disagree".into(),
            ));
        }
        Ok(header)
    }

    /// The kind; checked by [`parse`](Self::parse).
    #[must_use]
    pub fn kind(&self) -> FrameKind {
        FrameKind::from_number(self.kind).unwrap_or(FrameKind::Heartbeat)
    }

    /// Number of the VM in this session.
    #[must_use]
    pub fn vm(&self) -> u16 {
        self.vm.get()
    }

    /// Bytes that follow, at most [`MAX_BODY`].
    #[must_use]
    pub fn body_len(&self) -> usize {
        self.body_len.get() as usize
    }

    /// Bytes after unpacking, at most [`MAX_BODY`].
    #[must_use]
    pub fn raw_len(&self) -> usize {
        self.raw_len.get() as usize
    }

    /// Place of the frame among those of its session, whatever connection brings it: 1, 2 and so on, and after
    /// the last number 1 again. 0: nothing but the order on its own connection matters. An agent of
    /// before [`Channel::Lane`](crate::Channel::Lane) sends 0 only.
    #[must_use]
    pub fn order(&self) -> u32 {
        self.order.get()
    }

    /// Whether the body is compressed.
    #[must_use]
    pub fn is_compressed(&self) -> bool {
        self.compressed == 1
    }
}

/// How far the target is with a source QEMU's stream, in bytes from its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reached {
    /// Everything up to here is in the target QEMU, but for pages that wait for their content.
    pub received: u64,
    /// Everything up to here is in the target QEMU.
    pub complete: u64,
}

/// How long page faults took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultTimes {
    /// How many there were.
    pub count: u64,
    /// Half of them took no longer.
    pub median_us: u64,
    /// 99 of 100 took no longer.
    pub p99_us: u64,
    /// None took longer.
    pub max_us: u64,
}

/// What the target says on the back connection, about one VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackMessage {
    /// How far the target QEMU is.
    Ack(Reached),
    /// A return-path message of the target QEMU for the source QEMU, verbatim, or a piece of one.
    ReturnPath(Vec<u8>),
    /// These pages cannot be made from what the target has: read them again.
    RepairRequest(Vec<(BlockIndex, PageRun)>),
    /// The target QEMU has reported a successful load, and stands stopped.
    Loaded,
    /// The target QEMU failed or is gone; it never ran.
    LoadFailed(String),
    /// Entries that this carrier was to provide and did not: the source must not name them
    /// again, and tells the index.
    Lost {
        /// The target host that should have them.
        carrier: HostNo,
        /// Which.
        entries: Vec<EntryId>,
    },
    /// The target QEMU has the device state and stands stopped: it could run, and needs the rest
    /// of its memory from the source. `Loaded` follows when it has that, too.
    Switched,
    /// How long page faults of the guest took at the target, from the request of its QEMU until
    /// the page was given to it; after post-copy, before `Loaded`.
    Faults(FaultTimes),
    /// So many of the VM's pages are mapped from the target host's pool, from its beginning on.
    Mapped {
        /// Pages.
        pages: u64,
    },
    /// What a person should know of the VM at the target; its move goes on.
    Note(String),
    /// Both QEMUs have agreed on what is missing, and their interrupted post-copy goes on.
    Resumed,
}

impl BackMessage {
    /// Appends the body.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Ack(reached) => {
                out.push(1);
                varint::put(out, reached.received);
                varint::put(out, reached.complete);
            }
            Self::ReturnPath(message) => {
                out.push(2);
                out.extend_from_slice(message);
            }
            Self::RepairRequest(runs) => {
                out.push(3);
                varint::put(out, runs.len() as u64);
                for (block, run) in runs {
                    varint::put(out, block.0.into());
                    varint::put(out, run.start.0.into());
                    varint::put(out, run.count.into());
                }
            }
            Self::Loaded => out.push(4),
            Self::LoadFailed(reason) => {
                out.push(5);
                out.extend_from_slice(reason.as_bytes());
            }
            Self::Lost { carrier, entries } => {
                out.push(6);
                varint::put(out, carrier.0.into());
                crate::entries::put(out, entries);
            }
            Self::Mapped { pages } => {
                out.push(7);
                varint::put(out, *pages);
            }
            Self::Note(message) => {
                out.push(10);
                out.extend_from_slice(message.as_bytes());
            }
            Self::Switched => out.push(8),
            Self::Resumed => out.push(11),
            Self::Faults(times) => {
                out.push(9);
                let FaultTimes {
                    count,
                    median_us,
                    p99_us,
                    max_us,
                } = *times;
                for number in [count, median_us, p99_us, max_us] {
                    varint::put(out, number);
                }
            }
        }
    }

    /// Reads a whole body.
    ///
    /// # Errors
    /// Whatever a hostile peer can put there; nothing is allocated beyond the body's length.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let (&tag, mut rest) = body.split_first().ok_or(WireError::Truncated)?;
        let message = match tag {
            1 => Self::Ack(Reached {
                received: varint::take(&mut rest)?,
                complete: varint::take(&mut rest)?,
            }),
            2 => {
                check_length("a return-path message", rest.len(), MAX_RETURN_MESSAGE)?;
                return Ok(Self::ReturnPath(rest.to_vec()));
            }
            3 => Self::RepairRequest(decode_runs(&mut rest)?),
            4 => Self::Loaded,
            5 => return Ok(Self::LoadFailed(String::from_utf8_lossy(rest).into_owned())),
            6 => Self::Lost {
                carrier: HostNo(
                    u16::try_from(varint::take(&mut rest)?)
                        .map_err(|_| WireError::NumberTooLarge)?,
                ),
                entries: crate::entries::take(&mut rest)?,
            },
            7 => Self::Mapped {
                pages: varint::take(&mut rest)?,
            },
            10 => return Ok(Self::Note(String::from_utf8_lossy(rest).into_owned())),
            8 => Self::Switched,
            11 => Self::Resumed,
            9 => Self::Faults(FaultTimes {
                count: varint::take(&mut rest)?,
                median_us: varint::take(&mut rest)?,
                p99_us: varint::take(&mut rest)?,
                max_us: varint::take(&mut rest)?,
            }),
            other => return Err(WireError::UnknownOp(other)),
        };
        if rest.is_empty() {
            Ok(message)
        } else {
            Err(WireError::Control("bytes after the end".into()))
        }
    }
}

fn decode_runs(rest: &mut &[u8]) -> Result<Vec<(BlockIndex, PageRun)>, WireError> {
    let count = varint::take(rest)?;
    if count > MAX_REPAIR_RUNS {
        return Err(WireError::TooLong {
            what: "a repair request",
            length: count,
            limit: MAX_REPAIR_RUNS,
        });
    }
    let mut runs = Vec::new();
    let mut pages = 0;
    for _ in 0..count {
        let block = u16::try_from(varint::take(rest)?).map_err(|_| WireError::NumberTooLarge)?;
        let start = PageNo(take_u32(rest)?);
        let run = PageRun {
            start,
            count: take_u32(rest)?,
        };
        if run.count == 0 || run.end().is_none() {
            return Err(WireError::NumberTooLarge);
        }
        pages += u64::from(run.count);
        if pages > MAX_REPAIR_PAGES {
            return Err(WireError::TooLong {
                what: "a repair request",
                length: pages,
                limit: MAX_REPAIR_PAGES,
            });
        }
        runs.push((BlockIndex(block), run));
    }
    Ok(runs)
}

pub(crate) fn take_u32(input: &mut &[u8]) -> Result<u32, WireError> {
    u32::try_from(varint::take(input)?).map_err(|_| WireError::NumberTooLarge)
}

fn check_length(what: &'static str, length: usize, limit: usize) -> Result<(), WireError> {
    if length > limit {
        return Err(WireError::TooLong {
            what,
            length: length as u64,
            limit: limit as u64,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_header_above_the_limit_or_of_no_kind_is_refused() {
        let mut bytes = FrameHeader::new(FrameKind::Pages, 3, 10, 10).to_bytes();
        let header = FrameHeader::parse(bytes).unwrap();
        assert_eq!(
            (header.kind(), header.vm(), header.body_len()),
            (FrameKind::Pages, 3, 10)
        );
        bytes[7] = 0xff;
        assert!(matches!(
            FrameHeader::parse(bytes),
            Err(WireError::TooLong { .. })
        ));
        bytes[0] = 0;
        assert_eq!(
            FrameHeader::parse(bytes).unwrap_err(),
            WireError::UnexpectedKind(0)
        );
    }

    #[test]
    fn a_repair_request_cannot_claim_more_runs_than_it_holds() {
        let mut body = vec![3];
        varint::put(&mut body, MAX_REPAIR_RUNS);
        assert_eq!(BackMessage::decode(&body), Err(WireError::Truncated));
    }

    #[test]
    fn a_repair_request_of_a_few_bytes_cannot_ask_for_all_memory() {
        let run = |count| PageRun {
            start: PageNo(0),
            count,
        };
        let most = u32::try_from(MAX_REPAIR_PAGES).unwrap();
        for (counts, is_taken) in [
            (vec![most], true),
            (vec![most, 1], false),
            (vec![u32::MAX], false),
        ] {
            let runs = counts.iter().map(|count| (BlockIndex(0), run(*count)));
            let mut body = Vec::new();
            BackMessage::RepairRequest(runs.collect()).encode(&mut body);
            assert_eq!(BackMessage::decode(&body).is_ok(), is_taken, "{counts:?}");
        }
    }

    proptest! {
        #[test]
        fn back_messages_come_back(position: u64, text in ".{0,40}", block: u16, start in 0..u32::MAX / 2, count in 1_u32..1000) {
            let run = PageRun { start: PageNo(start), count };
            for message in [
                BackMessage::Ack(Reached { received: position, complete: position / 2 }),
                BackMessage::ReturnPath(text.clone().into_bytes()),
                BackMessage::RepairRequest(vec![(BlockIndex(block), run); 3]),
                BackMessage::Loaded,
                BackMessage::Switched,
                BackMessage::Faults(FaultTimes {
                    count: position,
                    median_us: 1,
                    p99_us: 2,
                    max_us: 3,
                }),
                BackMessage::Mapped { pages: position },
                BackMessage::Note("its pages are copied".into()),
                BackMessage::LoadFailed(text.clone()),
                BackMessage::Lost {
                    carrier: HostNo(block),
                    entries: vec![EntryId(start), EntryId(start + 1), EntryId(block.into())],
                },
            ] {
                let mut body = Vec::new();
                message.encode(&mut body);
                prop_assert_eq!(BackMessage::decode(&body)?, message);
            }
        }

        #[test]
        fn no_bytes_make_the_decoder_panic(body: Vec<u8>, head: [u8; HEADER_LEN]) {
            let _ = BackMessage::decode(&body);
            let _ = FrameHeader::parse(head);
        }
    }
}
