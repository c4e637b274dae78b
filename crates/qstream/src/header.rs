//! The first bytes of a stream: magic, version and configuration section.

use crate::StreamError;
use crate::error::Feature;
use crate::format::{MAGIC, VERSION, section};
use crate::reader::{Halt, Reader};

/// Longest machine type name; QEMU's have about 20 bytes.
const MAX_MACHINE_NAME: u32 = 255;

/// Most capabilities that the configuration may list. QEMU 10.0 has 22, two of them are listed.
const MAX_CAPABILITIES: u32 = 32;

/// What a multifd channel starts with, in the place of the magic.
const MULTIFD_MAGIC: u32 = 0x1122_3344;

/// What the header says.
pub(crate) struct Header<'a> {
    pub(crate) machine: &'a str,
    /// Capability `x-ignore-shared`: block list entries have an address.
    pub(crate) ignore_shared: bool,
}

pub(crate) fn decode<'a>(reader: &mut Reader<'a>) -> Result<Header<'a>, Halt<StreamError>> {
    let bad = |what| Halt::Error(StreamError::BadConfiguration(what));
    let magic = reader.be32()?;
    if magic != MAGIC {
        return Err(foreign(magic).into());
    }
    let version = reader.be32()?;
    if version != VERSION {
        return Err(StreamError::BadVersion(version).into());
    }
    if reader.u8()? != section::CONFIGURATION {
        return Err(StreamError::Unsupported(Feature::NoConfiguration).into());
    }
    let len = reader.be32()?;
    if len == 0 || len > MAX_MACHINE_NAME {
        return Err(bad("length of the machine type name"));
    }
    let machine = std::str::from_utf8(reader.bytes(len as usize)?)
        .map_err(|_| bad("machine type name not UTF-8"))?;
    let mut ignore_shared = false;
    let mut seen: [&[u8]; 2] = [&[]; 2];
    for slot in &mut seen {
        if reader.peek()? != section::SUBSECTION {
            break;
        }
        reader.u8()?;
        *slot = reader.counted()?;
        if reader.be32()? != 1 {
            return Err(bad("version of a subsection"));
        }
        match *slot {
            b"configuration/capabilities" => ignore_shared = capabilities(reader)?,
            b"configuration/uuid" => {
                reader.array::<16>()?;
            }
            b"configuration/target-page-bits" => {
                return Err(StreamError::Unsupported(Feature::TargetPageBits).into());
            }
            _ => return Err(bad("unknown subsection")),
        }
    }
    if !seen[0].is_empty() && seen[0] == seen[1] {
        return Err(bad("repeated subsection"));
    }
    Ok(Header {
        machine,
        ignore_shared,
    })
}

/// Reads the list of capabilities that source and target must agree on; returns whether
/// `x-ignore-shared` is among them.
fn capabilities(reader: &mut Reader<'_>) -> Result<bool, Halt<StreamError>> {
    let count = reader.be32()?;
    if count > MAX_CAPABILITIES {
        return Err(StreamError::BadConfiguration("number of capabilities").into());
    }
    let mut ignore_shared = false;
    for _ in 0..count {
        match reader.counted()? {
            b"x-ignore-shared" => ignore_shared = true,
            name => {
                let name = String::from_utf8_lossy(name).into();
                return Err(StreamError::Unsupported(Feature::Capability(name)).into());
            }
        }
    }
    Ok(ignore_shared)
}

/// What a connection is that does not start with the magic.
fn foreign(magic: u32) -> StreamError {
    match magic.to_be_bytes() {
        _ if magic == MULTIFD_MAGIC => StreamError::Unsupported(Feature::Multifd),
        // A TLS handshake record, version 3.x.
        [0x16, 0x03, _, _] => StreamError::Unsupported(Feature::Tls),
        // RECV_BITMAP or POSTCOPY_RESUME.
        [section::COMMAND, 0, 9 | 10, _] => StreamError::Unsupported(Feature::PostcopyRecovery),
        _ => StreamError::BadMagic(magic),
    }
}
