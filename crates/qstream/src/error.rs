//! What can be wrong with a stream, and what is right but not carried.

use std::fmt;

use thiserror::Error;

use crate::MAX_PACKAGE;

/// Why a source's stream cannot be decoded. The stream is lost from here on: decoding does not
/// resynchronise, the source VM must stay where it is.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum StreamError {
    /// A correct stream that uses something Gangway does not carry.
    #[error("{0} cannot be carried; {remedy}", remedy = .0.remedy())]
    Unsupported(Feature),
    /// The connection does not start as a migration stream does.
    #[error("not a migration stream: it starts with {0:#010x}")]
    BadMagic(u32),
    /// A stream version other than 3.
    #[error("migration stream version {0} is not 3")]
    BadVersion(u32),
    /// The configuration section is malformed.
    #[error("malformed configuration section: {0}")]
    BadConfiguration(&'static str),
    /// A byte that starts no section that may stand here.
    #[error("section type {0:#04x} is not expected here")]
    UnexpectedSection(u8),
    /// A PART or END of a section that was not started, or a footer of another section.
    #[error("section id {found} where only the RAM section {expected:?} is open")]
    WrongSection {
        /// The id that the stream has.
        found: u32,
        /// The id of the RAM section, once it has started.
        expected: Option<u32>,
    },
    /// Not the RAM handler that QEMU 7.2 to 10.0 have.
    #[error("RAM section of instance {instance}, version {version}; expected 0 and 4")]
    BadRamVersion {
        /// Instance id in the stream.
        instance: u32,
        /// Version in the stream.
        version: u32,
    },
    /// A second RAM START.
    #[error("the RAM section starts twice")]
    SecondRamStart,
    /// The block list is malformed.
    #[error("malformed RAM block list: {0}")]
    BadBlockList(&'static str),
    /// A section does not end with a footer although the stream has footers.
    #[error("section footer expected, found byte {0:#04x}")]
    NoFooter(u8),
    /// An unknown command, or a known one with a payload of a wrong length.
    #[error("command {number} with {len} bytes of payload is unknown")]
    BadCommand {
        /// Command number.
        number: u16,
        /// Payload length.
        len: u16,
    },
    /// Post-copy is announced for page sizes that cannot be.
    #[error("post-copy with page sizes {0:#x}")]
    BadPageSizes(u64),
    /// A malformed discard.
    #[error("malformed discard before post-copy: {0}")]
    BadDiscard(&'static str),
    /// A package of a length that cannot be.
    #[error("package of {0} bytes; at most {MAX_PACKAGE} are carried")]
    BadPackage(u32),
    /// Post-copy begins without having been announced, or twice.
    #[error("post-copy begins out of place")]
    PostcopyOutOfPlace,
    /// A combination of record flags that has no meaning.
    #[error("RAM record {0:#018x} has unknown flags")]
    BadRecord(u64),
    /// A record names a block that is not in the list.
    #[error("RAM record for an unknown block")]
    UnknownBlock,
    /// A record continues the previous block, but there was none.
    #[error("the first RAM record names no block")]
    NoCurrentBlock,
    /// A page that does not lie inside its block.
    #[error("page at offset {offset:#x} lies outside of block {block}")]
    PageOutside {
        /// Byte offset in the block.
        offset: u64,
        /// Name of the block.
        block: Box<str>,
    },
    /// A zero record with another fill byte.
    #[error("zero record with fill byte {0:#04x}")]
    BadFill(u8),
    /// A virtio-mem section that is malformed or describes more than [`crate::MAX_ITEM`] bytes.
    #[error("malformed or oversized virtio-mem section: {0}")]
    BadVirtioMem(&'static str),
}

/// Something QEMU can put into a stream that Gangway does not carry yet.
///
/// `Display` is the name that QEMU's user knows it by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Feature {
    /// Capability `xbzrle`.
    Xbzrle,
    /// Capability `compress` (QEMU up to 9.0).
    Compress,
    /// Capability `multifd`.
    Multifd,
    /// Migration over RDMA.
    Rdma,
    /// TLS between QEMU and the agent.
    Tls,
    /// Resumption of a paused post-copy migration.
    PostcopyRecovery,
    /// Capability `dirty-bitmaps`.
    DirtyBitmaps,
    /// Capability `x-colo`.
    Colo,
    /// A capability that the stream announces and that would change its format.
    Capability(Box<str>),
    /// Page sizes other than 4 KiB (never on x86).
    TargetPageBits,
    /// A stream without configuration section.
    NoConfiguration,
    /// A section of a device or subsystem that precedes the end of RAM.
    Section(Box<str>),
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Xbzrle => f.write_str("capability xbzrle"),
            Self::Compress => f.write_str("capability compress"),
            Self::Multifd => f.write_str("capability multifd"),
            Self::Rdma => f.write_str("RDMA migration"),
            Self::Tls => f.write_str("TLS between QEMU and the agent"),
            Self::PostcopyRecovery => f.write_str("recovery of a post-copy migration"),
            Self::DirtyBitmaps => f.write_str("capability dirty-bitmaps"),
            Self::Colo => f.write_str("capability x-colo"),
            Self::Capability(name) => write!(f, "capability {name}"),
            Self::TargetPageBits => f.write_str("a target page size that varies"),
            Self::NoConfiguration => f.write_str("a stream without configuration section"),
            Self::Section(name) => write!(f, "section {name:?}"),
        }
    }
}

impl Feature {
    /// What the user can do to migrate nevertheless, as an imperative phrase.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Section(name) => section_remedy(name),
            Self::Rdma => "migrate to a unix socket",
            Self::Tls => {
                "set the migration parameter tls-creds to \"\"; the agents encrypt between hosts"
            }
            Self::PostcopyRecovery => {
                "a paused migration is resumed with `gangway recover`, or without Gangway as it was begun"
            }
            Self::TargetPageBits => "only x86 guests are supported",
            Self::NoConfiguration => "use a machine type of version 2.4 or later",
            Self::Xbzrle
            | Self::Compress
            | Self::Multifd
            | Self::DirtyBitmaps
            | Self::Colo
            | Self::Capability(_) => {
                "turn it off with migrate-set-capabilities on source and target"
            }
        }
    }
}

fn section_remedy(name: &str) -> &'static str {
    if name == "dirty-bitmap" {
        "turn off capability dirty-bitmaps with migrate-set-capabilities"
    } else if name == "block" {
        "migrate without the blk and inc options; use shared storage or an NBD mirror"
    } else if name == "pbs-state" {
        "migrate without the state of Proxmox backups"
    } else if name.ends_with("/vfio") {
        "unplug the passed-through device before migrating"
    } else {
        "remove the device or feature that adds it before migrating"
    }
}
