//! The main channel of a source QEMU.

use std::sync::Arc;

use page::{BlockIndex, PageBytes, PageNo};

use crate::blocks::{self, BlockList};
use crate::command::{self, Command, Discard, Found};
use crate::error::{Feature, StreamError};
use crate::format::{RAM, RAM_VERSION, record, section};
use crate::header;
use crate::reader::{Halt, Reader, Short};
use crate::virtio_mem;

/// No item but [`Item::Tail`] and [`Item::Package`] is longer: an input buffer of this size never gets stuck.
///
/// The longest items are the RAM START section with [`crate::MAX_BLOCKS`] names of 255 bytes
/// (272 KiB), and the bitmap of a virtio-mem device, of which half of this is accepted (4 TiB in
/// blocks of 1 MiB). Ordinary guests stay below 5 KiB.
pub const MAX_ITEM: usize = 1 << 20;

/// Decodes what a source QEMU writes, item by item.
///
/// The caller keeps the bytes: it offers everything received and not yet consumed, and gets the
/// first item or the length at which it pays to try again. After an error nothing more can be
/// decoded.
///
/// ```text
/// Header ──► Setup ──RamStart──► Between ──PartBegin──► Part ──┐ Page, Zero
///             │ Command            │ ▲ └─ Command, Opaque       │
///             └──┘                 │ └───────PartClosed─────────┘
///                                  └──EndBegin──► End ──EndClosed──► Tail
/// ```
///
/// A switch to post-copy goes `Between ─PackageBegin─► Package ─last byte─► Between`, once.
#[derive(Debug, Default)]
pub struct Decoder {
    state: State,
    position: u64,
}

/// What [`Decoder::decode`] found.
#[derive(Debug, PartialEq, Eq)]
pub enum Step<'a> {
    /// The item at the start of the input.
    Item {
        /// The item, borrowing from the input.
        item: Item<'a>,
        /// How many bytes it takes; never 0.
        consumed: usize,
    },
    /// The input ends inside an item.
    NeedMore {
        /// Total length that the input must have before another attempt can get further; more
        /// than it has now, at most [`MAX_ITEM`].
        at_least: usize,
    },
}

/// One piece of the stream, in the order of the stream.
#[derive(Debug, PartialEq, Eq)]
pub enum Item<'a> {
    /// Magic, version and configuration section. Once, first.
    Header {
        /// Machine type with its version, such as `pc-q35-10.0`.
        machine: &'a str,
        /// The whole header, to be forwarded verbatim.
        raw: &'a [u8],
    },
    /// A command, between sections.
    Command {
        /// What it says.
        command: Command,
        /// The whole command, to be forwarded verbatim.
        raw: &'a [u8],
    },
    /// Pages that the target forgets: a switch to post-copy begins.
    Discard {
        /// Which.
        discard: Discard<'a>,
        /// The whole command, to be forwarded verbatim.
        raw: &'a [u8],
    },
    /// The package with the device state begins: what follows it is post-copy.
    PackageBegin {
        /// Bytes of the package, at most [`crate::MAX_PACKAGE`].
        len: u32,
        /// The command, to be forwarded verbatim.
        raw: &'a [u8],
    },
    /// Bytes of the package, in pieces as they come, to be forwarded verbatim without anything in
    /// between.
    Package(&'a [u8]),
    /// The START section of RAM, once: from now on [`Decoder::blocks`] answers.
    RamStart {
        /// The whole section with its footer, to be forwarded verbatim.
        raw: &'a [u8],
    },
    /// A PART section of RAM begins.
    PartBegin,
    /// The END section of RAM begins; the guest is stopped.
    EndBegin,
    /// A page with its bytes.
    Page {
        /// Block of the page; always in the list.
        block: BlockIndex,
        /// Page inside the block.
        page: PageNo,
        /// The content.
        bytes: &'a PageBytes,
    },
    /// A page of zeros.
    Zero {
        /// Block of the page; always in the list.
        block: BlockIndex,
        /// Page inside the block.
        page: PageNo,
    },
    /// The PART section ends.
    PartClosed,
    /// The END section ends: every page has been seen in its final version.
    EndClosed,
    /// Device state and whatever follows, in pieces as they come, to be forwarded verbatim until
    /// the source closes its side.
    Tail(&'a [u8]),
    /// A section that is not RAM, to be forwarded verbatim in this place.
    Opaque(&'a [u8]),
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Header,
    Setup(Setup),
    Ram(Ram),
}

/// What the block list depends on.
#[derive(Debug, Clone, Copy)]
struct Setup {
    ignore_shared: bool,
    /// Post-copy may follow, with blocks of these page sizes.
    page_sizes: Option<u64>,
}

#[derive(Debug)]
struct Ram {
    blocks: Arc<BlockList>,
    section_id: u32,
    footers: bool,
    /// Block of the last record; QEMU remembers it across sections.
    current: Option<BlockIndex>,
    place: Place,
    postcopy: Postcopy,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Postcopy {
    Unannounced,
    Announced,
    Begun,
}

#[derive(Debug, Clone, Copy)]
enum Place {
    Between,
    /// So many bytes of the package are left.
    Package(u32),
    Part,
    End,
    Tail,
}

type Decoded<T> = Result<T, Halt<StreamError>>;

impl Decoder {
    /// A decoder that expects the first byte of a connection.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Decodes the item at the start of `input`, which begins where the last item ended.
    ///
    /// # Errors
    /// The stream is malformed, or uses something that cannot be carried.
    #[inline]
    pub fn decode<'a>(&mut self, input: &'a [u8]) -> Result<Step<'a>, StreamError> {
        let mut reader = Reader::new(input);
        let item = match &mut self.state {
            State::Ram(ram) => ram.item(&mut reader),
            _ => self.item_before_ram(&mut reader),
        };
        match item {
            Ok(item) => {
                let consumed = reader.position();
                self.position += consumed as u64;
                Ok(Step::Item { item, consumed })
            }
            Err(Halt::NeedMore(at_least)) => Ok(Step::NeedMore { at_least }),
            Err(Halt::Error(error)) => Err(error),
        }
    }

    /// The RAM blocks, once the START section was decoded.
    #[must_use]
    pub fn blocks(&self) -> Option<&Arc<BlockList>> {
        self.ram().map(|ram| &ram.blocks)
    }

    /// Id of the RAM section, once the START section was decoded. It differs between versions.
    #[must_use]
    pub fn ram_section_id(&self) -> Option<u32> {
        self.ram().map(|ram| ram.section_id)
    }

    /// Whether sections end with footers, once the START section was decoded. They do unless a
    /// machine type of version 2.3 or `-global migration.send-section-footer=off` is used.
    #[must_use]
    pub fn footers(&self) -> Option<bool> {
        self.ram().map(|ram| ram.footers)
    }

    /// Whether the item at the start of `input` is where a switch to post-copy begins: a discard, or
    /// the package. Everything before it must be loaded when the target reads it.
    #[must_use]
    pub fn switches(&self, input: &[u8]) -> bool {
        let between = matches!(self.ram(), Some(ram) if matches!(ram.place, Place::Between));
        let number = match input {
            [section::COMMAND, high, low, ..] if between => u16::from_be_bytes([*high, *low]),
            _ => return false,
        };
        matches!(number, command::DISCARD | command::PACKAGED)
    }

    /// Whether the stream is past its switch to post-copy: the package is through.
    #[must_use]
    pub fn has_switched(&self) -> bool {
        self.ram().is_some_and(|ram| {
            ram.postcopy == Postcopy::Begun && !matches!(ram.place, Place::Package(_))
        })
    }

    /// Bytes decoded so far: where in the stream an error is.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.position
    }

    fn ram(&self) -> Option<&Ram> {
        match &self.state {
            State::Ram(ram) => Some(ram),
            _ => None,
        }
    }

    fn item_before_ram<'a>(&mut self, reader: &mut Reader<'a>) -> Decoded<Item<'a>> {
        let setup = match &mut self.state {
            State::Setup(setup) => setup,
            _ => {
                let header = header::decode(reader)?;
                self.state = State::Setup(Setup {
                    ignore_shared: header.ignore_shared,
                    page_sizes: None,
                });
                return Ok(Item::Header {
                    machine: header.machine,
                    raw: reader.consumed(),
                });
            }
        };
        match reader.u8()? {
            section::COMMAND => {
                // Without a block list no other kind is found.
                let Found::Command(command) = command::decode(reader, None)? else {
                    return Err(StreamError::PostcopyOutOfPlace.into());
                };
                if let Command::PostcopyAdvise { page_sizes } = command {
                    setup.page_sizes = Some(page_sizes);
                }
                let raw = reader.consumed();
                Ok(Item::Command { command, raw })
            }
            section::START => {
                self.state = State::Ram(ram_start(reader, *setup)?);
                Ok(Item::RamStart {
                    raw: reader.consumed(),
                })
            }
            section::PART | section::END => Err(StreamError::WrongSection {
                found: reader.be32()?,
                expected: None,
            }
            .into()),
            section::FULL => Err(SectionHead::decode(reader)?.unsupported().into()),
            other => Err(StreamError::UnexpectedSection(other).into()),
        }
    }
}

impl Ram {
    #[inline]
    fn item<'a>(&mut self, reader: &mut Reader<'a>) -> Decoded<Item<'a>> {
        match self.place {
            Place::Part | Place::End => self.record(reader),
            Place::Between => self.section(reader),
            Place::Package(left) => {
                reader.peek()?;
                let rest = reader.up_to(left as usize);
                let taken = u32::try_from(rest.len()).unwrap_or(left);
                self.place = match left - taken {
                    0 => Place::Between,
                    left => Place::Package(left),
                };
                Ok(Item::Package(rest))
            }
            Place::Tail => {
                reader.peek()?;
                Ok(Item::Tail(reader.rest()))
            }
        }
    }

    fn section<'a>(&mut self, reader: &mut Reader<'a>) -> Decoded<Item<'a>> {
        match reader.u8()? {
            section::PART => {
                self.section_id(reader)?;
                self.place = Place::Part;
                Ok(Item::PartBegin)
            }
            section::END => {
                self.section_id(reader)?;
                self.place = Place::End;
                Ok(Item::EndBegin)
            }
            section::COMMAND => self.command(reader),
            section::FULL => {
                let head = SectionHead::decode(reader)?;
                if !virtio_mem::is_early_state(head.name) {
                    return Err(head.unsupported().into());
                }
                virtio_mem::skip(reader)?;
                self.footer(reader, head.id)?;
                Ok(Item::Opaque(reader.consumed()))
            }
            section::START => {
                let head = SectionHead::decode(reader)?;
                Err(if head.name == RAM {
                    StreamError::SecondRamStart
                } else {
                    head.unsupported()
                }
                .into())
            }
            other => Err(StreamError::UnexpectedSection(other).into()),
        }
    }

    fn command<'a>(&mut self, reader: &mut Reader<'a>) -> Decoded<Item<'a>> {
        let found = command::decode(reader, Some(&self.blocks))?;
        let raw = reader.consumed();
        if !matches!(found, Found::Command(_)) && self.postcopy != Postcopy::Announced {
            return Err(StreamError::PostcopyOutOfPlace.into());
        }
        Ok(match found {
            Found::Command(command) => Item::Command { command, raw },
            Found::Discard(discard) => Item::Discard { discard, raw },
            Found::Package(len) => {
                self.postcopy = Postcopy::Begun;
                self.place = Place::Package(len);
                Item::PackageBegin { len, raw }
            }
        })
    }

    #[inline]
    fn record<'a>(&mut self, reader: &mut Reader<'a>) -> Decoded<Item<'a>> {
        let word = reader.be64()?;
        match word & record::FLAGS {
            record::PAGE | record::PAGE_CONTINUE => {
                let (block, page) = self.address(reader, word)?;
                let bytes = reader.array()?;
                self.current = Some(block);
                Ok(Item::Page { block, page, bytes })
            }
            record::ZERO | record::ZERO_CONTINUE => {
                let (block, page) = self.address(reader, word)?;
                zero_fill(reader)?;
                self.current = Some(block);
                Ok(Item::Zero { block, page })
            }
            _ => self.close(reader, word),
        }
    }

    /// The block and page of a record.
    #[inline]
    fn address(&self, reader: &mut Reader<'_>, word: u64) -> Decoded<(BlockIndex, PageNo)> {
        address(&self.blocks, self.current, reader, word)
    }

    fn close<'a>(&mut self, reader: &mut Reader<'a>, word: u64) -> Decoded<Item<'a>> {
        end_of_section(word)?;
        self.footer(reader, self.section_id)?;
        let (item, next) = match self.place {
            Place::End => (Item::EndClosed, Place::Tail),
            _ => (Item::PartClosed, Place::Between),
        };
        self.place = next;
        Ok(item)
    }

    fn section_id(&self, reader: &mut Reader<'_>) -> Decoded<()> {
        check_id(reader.be32()?, self.section_id)
    }

    fn footer(&self, reader: &mut Reader<'_>, section_id: u32) -> Decoded<()> {
        if !self.footers {
            return Ok(());
        }
        match reader.u8()? {
            section::FOOTER => check_id(reader.be32()?, section_id),
            other => Err(StreamError::NoFooter(other).into()),
        }
    }
}

/// The block and page of a record that begins with `word`; `current` is the block of the one before.
#[inline]
pub(crate) fn address(
    blocks: &BlockList,
    current: Option<BlockIndex>,
    reader: &mut Reader<'_>,
    word: u64,
) -> Decoded<(BlockIndex, PageNo)> {
    let index = if word & record::CONTINUE != 0 {
        current.ok_or(StreamError::NoCurrentBlock)?
    } else {
        std::str::from_utf8(reader.counted()?)
            .ok()
            .and_then(|name| blocks.index_of(name))
            .ok_or(StreamError::UnknownBlock)?
    };
    let block = &blocks[index];
    let offset = word & !record::FLAGS;
    let outside = || StreamError::PageOutside {
        offset,
        block: block.name.clone(),
    };
    Ok((index, block.page_at(offset).ok_or_else(outside)?))
}

/// Reads the byte that a page of zeros is filled with.
#[inline]
pub(crate) fn zero_fill(reader: &mut Reader<'_>) -> Decoded<()> {
    match reader.u8()? {
        0 => Ok(()),
        fill => Err(StreamError::BadFill(fill).into()),
    }
}

/// The head that START and FULL sections have.
struct SectionHead<'a> {
    id: u32,
    name: &'a [u8],
    instance: u32,
    version: u32,
}

impl<'a> SectionHead<'a> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, Short> {
        Ok(Self {
            id: reader.be32()?,
            name: reader.counted()?,
            instance: reader.be32()?,
            version: reader.be32()?,
        })
    }

    fn unsupported(&self) -> StreamError {
        StreamError::Unsupported(Feature::Section(String::from_utf8_lossy(self.name).into()))
    }
}

/// Reads the START section of RAM after its type byte.
fn ram_start(reader: &mut Reader<'_>, setup: Setup) -> Decoded<Ram> {
    let head = SectionHead::decode(reader)?;
    if head.name != RAM {
        return Err(head.unsupported().into());
    }
    let SectionHead {
        instance, version, ..
    } = head;
    if (instance, version) != (0, RAM_VERSION) {
        return Err(StreamError::BadRamVersion { instance, version }.into());
    }
    let blocks = Arc::new(blocks::decode(
        reader,
        setup.ignore_shared,
        setup.page_sizes,
    )?);
    end_of_section(reader.be64()?)?;
    // Nothing else says whether this stream has footers.
    let footers = reader.peek()? == section::FOOTER;
    let ram = Ram {
        blocks,
        section_id: head.id,
        footers,
        current: None,
        place: Place::Between,
        postcopy: match setup.page_sizes {
            Some(_) => Postcopy::Announced,
            None => Postcopy::Unannounced,
        },
    };
    ram.footer(reader, head.id)?;
    Ok(ram)
}

fn check_id(found: u32, expected: u32) -> Decoded<()> {
    if found == expected {
        return Ok(());
    }
    Err(StreamError::WrongSection {
        found,
        expected: Some(expected),
    }
    .into())
}

/// Checks that a record is the one that ends a section; the others are refused by name.
pub(crate) fn end_of_section(word: u64) -> Result<(), StreamError> {
    match word & record::FLAGS & !record::CONTINUE {
        _ if word == record::EOS => Ok(()),
        record::XBZRLE => Err(StreamError::Unsupported(Feature::Xbzrle)),
        record::HOOK => Err(StreamError::Unsupported(Feature::Rdma)),
        record::COMPRESS_PAGE => Err(StreamError::Unsupported(Feature::Compress)),
        record::MULTIFD_FLUSH => Err(StreamError::Unsupported(Feature::Multifd)),
        _ => Err(StreamError::BadRecord(word)),
    }
}
