//! Numbers of the wire format. Everything is big-endian and unpadded.

pub(crate) const MAGIC: u32 = 0x5145_564d;
pub(crate) const VERSION: u32 = 3;

/// Section types: the first byte of everything between sections.
/// What follows the END of RAM (0x00 end of stream, 0x06 description) is never looked at.
pub(crate) mod section {
    pub(crate) const START: u8 = 0x01;
    pub(crate) const PART: u8 = 0x02;
    pub(crate) const END: u8 = 0x03;
    pub(crate) const FULL: u8 = 0x04;
    pub(crate) const SUBSECTION: u8 = 0x05;
    pub(crate) const CONFIGURATION: u8 = 0x07;
    pub(crate) const COMMAND: u8 = 0x08;
    pub(crate) const FOOTER: u8 = 0x7e;
}

/// Flags of a RAM record: the low 12 bits of its first word.
pub(crate) mod record {
    pub(crate) const FLAGS: u64 = 0xfff;
    pub(crate) const ZERO: u64 = 0x002;
    pub(crate) const MEM_SIZE: u64 = 0x004;
    pub(crate) const PAGE: u64 = 0x008;
    pub(crate) const EOS: u64 = 0x010;
    pub(crate) const CONTINUE: u64 = 0x020;
    pub(crate) const XBZRLE: u64 = 0x040;
    pub(crate) const HOOK: u64 = 0x080;
    pub(crate) const COMPRESS_PAGE: u64 = 0x100;
    pub(crate) const MULTIFD_FLUSH: u64 = 0x200;

    pub(crate) const ZERO_CONTINUE: u64 = ZERO | CONTINUE;
    pub(crate) const PAGE_CONTINUE: u64 = PAGE | CONTINUE;
}

/// Name and version of the RAM handler; all supported QEMUs use version 4.
pub(crate) const RAM: &[u8] = b"ram";
pub(crate) const RAM_VERSION: u32 = 4;
