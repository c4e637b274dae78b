//! The lines of QMP: what can be read from QEMU, and what is written to it.

use std::io::{self, BufRead, Read};

use serde::Deserialize;
use serde_json::{Value, json};

use crate::QmpEvent;

/// Longest line that is read. The longest that QEMU writes in answer to this crate's commands is
/// the flat view of a guest with hundreds of devices, below 1 MiB.
pub(crate) const LINE_BYTES_MAX: u64 = 16 << 20;

/// Why no line could be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LineError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("it closed the connection")]
    Eof,
    #[error("it sent a line above {LINE_BYTES_MAX} bytes")]
    TooLong,
    #[error("it sent what is not QMP: {0:?}")]
    NotQmp(String),
}

/// One line from QEMU.
#[derive(Debug)]
pub(crate) enum Line {
    Greeting(Greeting),
    Event(QmpEvent),
    /// An answer; the id is missing if QEMU could not read the command.
    Reply {
        id: Option<u64>,
        outcome: Result<Value, CommandFailure>,
    },
    /// Valid JSON of a kind that newer versions may add.
    Unknown,
}

#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Greeting {
    pub(crate) version: GreetingVersion,
    /// What can be agreed on.
    #[serde(default)]
    pub(crate) capabilities: Vec<String>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
pub(crate) struct GreetingVersion {
    pub(crate) qemu: VersionTriple,
}

#[derive(Clone, Copy, Debug, Deserialize)]
pub(crate) struct VersionTriple {
    pub(crate) major: u32,
    pub(crate) minor: u32,
    pub(crate) micro: u32,
}

#[derive(Debug, Deserialize)]
pub(crate) struct CommandFailure {
    pub(crate) class: String,
    pub(crate) desc: String,
}

#[derive(Deserialize)]
struct RawLine {
    #[serde(rename = "QMP")]
    greeting: Option<Greeting>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
    timestamp: Option<Timestamp>,
    id: Option<Value>,
    #[serde(rename = "return")]
    result: Option<Value>,
    error: Option<CommandFailure>,
}

/// -1 where the host's clock could not be read.
#[derive(Deserialize)]
struct Timestamp {
    seconds: i64,
    microseconds: i64,
}

impl Timestamp {
    fn unix_us(&self) -> u64 {
        let us = self
            .seconds
            .checked_mul(1_000_000)
            .and_then(|us| us.checked_add(self.microseconds));
        us.and_then(|us| u64::try_from(us).ok()).unwrap_or(0)
    }
}

/// Reads the next line, at most [`LINE_BYTES_MAX`] long; `buffer` is only scratch space.
pub(crate) fn read_line(
    reader: &mut impl BufRead,
    buffer: &mut Vec<u8>,
) -> Result<Line, LineError> {
    buffer.clear();
    reader
        .by_ref()
        .take(LINE_BYTES_MAX)
        .read_until(b'\n', buffer)?;
    if buffer.last() != Some(&b'\n') {
        let full = buffer.len() as u64 == LINE_BYTES_MAX;
        return Err(if full {
            LineError::TooLong
        } else {
            LineError::Eof
        });
    }
    parse_line(buffer)
}

fn parse_line(bytes: &[u8]) -> Result<Line, LineError> {
    const SHOWN_BYTES_MAX: usize = 80;
    let raw: RawLine = serde_json::from_slice(bytes).map_err(|_| {
        let shown = &bytes[..bytes.len().min(SHOWN_BYTES_MAX)];
        LineError::NotQmp(String::from_utf8_lossy(shown).trim_end().to_owned())
    })?;
    let id = raw.id.as_ref().and_then(Value::as_u64);
    Ok(match raw {
        RawLine {
            greeting: Some(greeting),
            ..
        } => Line::Greeting(greeting),
        RawLine {
            event: Some(name),
            data,
            timestamp,
            ..
        } => Line::Event(QmpEvent {
            name,
            data,
            at_unix_us: timestamp.map_or(0, |t| t.unix_us()),
        }),
        RawLine {
            error: Some(failure),
            ..
        } => Line::Reply {
            id,
            outcome: Err(failure),
        },
        RawLine {
            result: Some(value),
            ..
        } => Line::Reply {
            id,
            outcome: Ok(value),
        },
        _ => Line::Unknown,
    })
}

/// Where QEMU executes a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Band {
    /// In its main loop, after those before it.
    Main,
    /// Beside it, at once. Few commands can be, and both ends must have agreed on it.
    Out,
}

/// A command as a line. `Null` stands for no arguments.
pub(crate) fn command_line(band: Band, command: &str, arguments: &Value, id: u64) -> Vec<u8> {
    let verb = match band {
        Band::Main => "execute",
        Band::Out => "exec-oob",
    };
    let mut message = json!({ verb: command, "id": id });
    if !arguments.is_null() {
        message["arguments"] = arguments.clone();
    }
    let mut line = message.to_string().into_bytes();
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_event_keeps_its_name_data_and_time() {
        let line = br#"{"timestamp": {"seconds": 3, "microseconds": 7}, "event": "STOP", "data": {"a": 1}}"#;
        let Line::Event(event) = parse_line(line).unwrap() else {
            panic!("not an event")
        };
        assert_eq!((event.name.as_str(), event.at_unix_us), ("STOP", 3_000_007));
        assert_eq!(event.data["a"], 1);
    }

    #[test]
    fn a_time_that_qemu_does_not_know_is_zero() {
        for time in ["-1", "9223372036854775807"] {
            let line =
                format!(r#"{{"timestamp":{{"seconds":{time},"microseconds":-1}},"event":"X"}}"#);
            let Line::Event(event) = parse_line(line.as_bytes()).unwrap() else {
                panic!()
            };
            assert_eq!(event.at_unix_us, 0);
        }
    }

    #[test]
    fn an_unterminated_line_is_the_end_and_a_long_one_is_refused() {
        let mut buffer = Vec::new();
        let end = read_line(&mut &b"{\"event\""[..], &mut buffer).unwrap_err();
        assert!(matches!(end, LineError::Eof));
        let mut endless = io::BufReader::new(io::repeat(b' '));
        let long = read_line(&mut endless, &mut buffer).unwrap_err();
        assert!(matches!(long, LineError::TooLong));
        assert!(buffer.len() as u64 <= LINE_BYTES_MAX);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_line_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse_line(&bytes);
        }
    }
}
