//! Control messages: the opening of every connection, and one request with one reply on a
//! move's control connection. JSON, because they are few, and read by people in traces.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::{MAX_CONTROL, PROTOCOL_VERSION, WireError};

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Channel {
    /// Page operations, source to target.
    Forward,
    /// More of the session's forward connection: frames that are numbered in one row with those on it.
    /// A target that does not know it closes the connection, and the session goes on without.
    Lane,
    /// Acknowledgements, target to source.
    Back,
    /// Requests about one move.
    Control,
    /// Contents and requests for them, from one target host to another.
    Peer,
    /// Claims and registrations, from a source agent to the index.
    Index,
}

/// Compression of the forward connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum WireCompression {
    /// None.
    None,
    /// One zstd stream, flushed at each frame, over all VMs of the session.
    Zstd {
        /// Logarithm of the window in bytes, 20 to 27.
        window_log: u8,
    },
}

/// First message of every connection.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hello {
    /// [`PROTOCOL_VERSION`] of the sender.
    pub version: u16,
    /// The session: random, made by the source agent.
    pub session: String,
    /// What this connection is for.
    pub channel: Channel,
    /// Name of the source host, for messages.
    pub source: String,
    /// Compression of the forward connection.
    pub compression: WireCompression,
    /// Secret of the trust domain, 64 hex digits; only on the forward connection.
    pub domain_key: Option<String>,
    /// The rest of the group; on forward and peer connections with scope `rack`.
    #[serde(default)]
    pub rack: Option<RackHello>,
}

/// What a target host must know of its group to share contents with the other target hosts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RackHello {
    /// Names the store of contents: derived from the group, the trust domain's secret and the
    /// epoch of the index, so that who can name it may use it; 32 hex digits.
    pub store: String,
    /// On a forward connection the number of the target host, on a peer connection that of the
    /// sender.
    pub host: u16,
    /// On a forward connection, how to reach the target hosts: number and `host:port`.
    #[serde(default)]
    pub peers: Vec<(u16, String)>,
}

impl Hello {
    /// Whether the peer speaks this version.
    #[must_use]
    pub fn is_compatible(&self) -> bool {
        self.version == PROTOCOL_VERSION
    }
}

impl std::fmt::Debug for Hello {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            version,
            session,
            channel,
            source,
            compression,
            domain_key: _,
            rack: _,
        } = self;
        write!(
            f,
            "Hello {{ v{version} {session} {channel:?} from {source}, {compression:?} }}"
        )
    }
}

/// What the target needs to receive a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OpenMove {
    /// Id of the move.
    pub id: String,
    /// Name of the VM.
    pub vm_name: String,
    /// Number of the VM on the session's frames.
    pub vm: u16,
    /// Command line of the target QEMU, program first.
    pub argv: Vec<String>,
    /// Whether the guest runs once it is released; a guest that was paused arrives paused.
    pub resume: bool,
    /// Memory of the guest, bytes.
    pub memory_bytes: u64,
    /// Whether pages that share their frames at the source shall share them at the target.
    pub share: bool,
    /// Whether the migration may switch to post-copy.
    #[serde(default)]
    pub postcopy: bool,
    /// Whether the source QEMU can send pages that a processor waits for on a channel of their own. Left out if
    /// not: a target that does not know it refuses the message, and is asked again without.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub preempt: bool,
}

/// What the source asks of the target, about the move `id`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum ControlRequest {
    /// Start the target QEMU, paused, ready to load. Reply: `Ready` or `Refused`.
    Open(OpenMove),
    /// Let the VM run. May be said again: the reply is `State`.
    Release {
        /// Id of the move.
        id: String,
    },
    /// Do away with the target QEMU, unless it was released. Reply: `State`.
    Abort {
        /// Id of the move.
        id: String,
        /// For the target's log.
        reason: String,
    },
    /// Have the target QEMU of a post-copy that was interrupted wait for the rest of its stream, which
    /// comes over this session. Reply: `Ready`; `State` if that is not what the move needs; or
    /// `Refused` if it does not work now.
    Resume {
        /// Id of the move.
        id: String,
        /// Number of the VM on the session's frames.
        vm: u16,
    },
    /// How does it stand? Reply: `State`.
    Query {
        /// Id of the move.
        id: String,
    },
}

/// State of a move at the target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum MoveState {
    /// No such move is known here.
    Unknown,
    /// The target QEMU is loading; it is stopped.
    Loading,
    /// The target QEMU has loaded everything, or after a switch to post-copy enough to run; it is
    /// stopped and waits for release.
    Loaded,
    /// The VM was let go and runs here (or ran, and has since ended by itself).
    Running,
    /// The VM was let go and runs here; its QEMU still needs memory from the source.
    Following,
    /// The target QEMU is gone, and the VM never ran here.
    NeverRan {
        /// Why.
        reason: String,
    },
    /// The VM was let go, but its QEMU is gone and nobody knows whether it ran.
    Lost {
        /// What is known.
        reason: String,
    },
}

/// Answer to a [`ControlRequest`] or a [`Hello`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum ControlReply {
    /// The hello is accepted.
    Welcome,
    /// The target QEMU waits for its stream.
    Ready {
        /// Its process id on the target host.
        pid: u32,
        /// What a person should know: why pages cannot be shared here.
        note: Option<String>,
        /// Whether both QEMUs are to have that channel; only if it was asked for.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        preempt: bool,
    },
    /// Not done; nothing was left behind.
    Refused {
        /// Why, for a person.
        reason: String,
    },
    /// How the move stands.
    State(MoveState),
}

/// The bytes of a control message: length (u32, little-endian), then JSON.
///
/// # Errors
/// A message longer than [`MAX_CONTROL`].
pub fn encode_control<T: Serialize>(message: &T) -> Result<Vec<u8>, WireError> {
    let json = serde_json::to_vec(message).map_err(|e| WireError::Control(e.to_string()))?;
    let length = u32::try_from(json.len()).unwrap_or(u32::MAX);
    if json.len() > MAX_CONTROL {
        return Err(WireError::TooLong {
            what: "a control message",
            length: length.into(),
            limit: MAX_CONTROL as u64,
        });
    }
    let mut out = length.to_le_bytes().to_vec();
    out.extend_from_slice(&json);
    Ok(out)
}

/// Reads the JSON part of a control message.
///
/// # Errors
/// JSON that is malformed, of another shape, or has unknown keys.
pub fn decode_control<T: DeserializeOwned>(json: &[u8]) -> Result<T, WireError> {
    serde_json::from_slice(json).map_err(|e| WireError::Control(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_comes_back_and_unknown_keys_do_not_pass() {
        let request = ControlRequest::Abort {
            id: "g/a".into(),
            reason: "cancelled".into(),
        };
        let bytes = encode_control(&request).unwrap();
        assert_eq!(
            bytes.len(),
            4 + u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize
        );
        assert_eq!(
            decode_control::<ControlRequest>(&bytes[4..]).unwrap(),
            request
        );
        let odd = br#"{"abort":{"id":"x","reason":"y","force":true}}"#;
        assert!(decode_control::<ControlRequest>(odd).is_err());
    }

    #[test]
    fn a_channel_that_is_not_asked_for_is_not_spoken_of() {
        let ready = |preempt| ControlReply::Ready {
            pid: 7,
            note: None,
            preempt,
        };
        let json = |reply| String::from_utf8(encode_control(&reply).unwrap().split_off(4)).unwrap();
        assert_eq!(json(ready(false)), r#"{"ready":{"pid":7,"note":null}}"#);
        let asked = json(ready(true));
        assert!(asked.contains("preempt"));
        assert_eq!(
            decode_control::<ControlReply>(asked.as_bytes()),
            Ok(ready(true))
        );
    }

    #[test]
    fn the_domain_key_is_not_printed() {
        let hello = Hello {
            version: 1,
            session: "s".into(),
            channel: Channel::Forward,
            source: "h".into(),
            compression: WireCompression::None,
            domain_key: Some("00ff".into()),
            rack: None,
        };
        assert!(!format!("{hello:?}").contains("00ff"));
    }
}
