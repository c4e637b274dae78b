//! Commands: what a source QEMU says to the target between sections.

use crate::StreamError;
use crate::error::Feature;
use crate::format::section;
use crate::reader::{Halt, Reader};

/// A command that a pre-copy stream can carry.
///
/// | number | command | payload |
/// |---|---|---|
/// | 1 | `OpenReturnPath` | none |
/// | 2 | `Ping` | the value to answer with |
/// | 3..=7, 9, 10 | post-copy, refused | |
/// | 8 | COLO, refused | |
/// | 11 | `SwitchoverStart` | none; QEMU 10.0 with machine types from 10.0 |
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Command {
    /// The target opens its half of the return path. A second one is harmless.
    OpenReturnPath,
    /// The target answers `Pong` with this value, once everything before it is loaded.
    Ping(u32),
    /// The source stopped the guest; its last RAM section follows.
    SwitchoverStart,
}

const OPEN_RETURN_PATH: u16 = 1;
const PING: u16 = 2;
const SWITCHOVER_START: u16 = 11;

/// Reads what follows the section type byte of a command.
pub(crate) fn decode(reader: &mut Reader<'_>) -> Result<Command, Halt<StreamError>> {
    let number = reader.be16()?;
    let len = reader.be16()?;
    match (number, len) {
        (OPEN_RETURN_PATH, 0) => Ok(Command::OpenReturnPath),
        (PING, 4) => Ok(Command::Ping(reader.be32()?)),
        (SWITCHOVER_START, 0) => Ok(Command::SwitchoverStart),
        (3, 0) => Err(StreamError::Unsupported(Feature::DirtyBitmaps).into()),
        (3..=7, _) => Err(StreamError::Unsupported(Feature::Postcopy).into()),
        (8, _) => Err(StreamError::Unsupported(Feature::Colo).into()),
        (9 | 10, _) => Err(StreamError::Unsupported(Feature::PostcopyRecovery).into()),
        _ => Err(StreamError::BadCommand { number, len }.into()),
    }
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
    }
}
