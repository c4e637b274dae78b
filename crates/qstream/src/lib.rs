//! QEMU's migration stream and its return path, for QEMU 7.2 to 10.0 on pc and q35.
//!
//! An incremental [`Decoder`] turns the bytes that a source QEMU writes into items: header,
//! commands, RAM records, opaque tail. An [`Encoder`] writes RAM sections for a target QEMU.
//! [`ReturnDecoder`] and [`encode_return`] do the same for the messages that flow back.
//!
//! Pure: bytes go in, borrowed items come out. No sockets, no clocks, no policy, no copies of
//! page bytes. Non-goals: anything that the decoder would have to understand beyond RAM (device
//! state passes as bytes) and the features listed in [`Feature`], which it refuses by name.
//!
//! # Stream
//!
//! ```text
//! Header   Command*   RamStart   Section*   EndBegin (Page | Zero)* EndClosed   Tail*
//!
//! Section = PartBegin (Page | Zero)* PartClosed | Command | Opaque
//! ```
//!
//! A stream of post-copy changes over between two sections; its device state is the package, and
//! what is left of RAM follows:
//!
//! ```text
//! ... Section*   Discard*   Command*   PackageBegin Package*   Section*   EndBegin (Page | Zero)* EndClosed   Tail
//! ```
//!
//! `docs/qemu-stream.md` describes the format and what a proxy may do to it.

mod blocks;
mod command;
mod decoder;
mod encoder;
mod error;
mod format;
mod header;
mod preempt;
mod reader;
mod recovery;
mod return_path;
mod virtio_mem;

pub use blocks::{Block, BlockList, MAX_BLOCKS};
pub use command::{Command, Discard, MAX_PACKAGE, encode_command};
pub use decoder::{Decoder, Item, MAX_ITEM, Step};
pub use encoder::Encoder;
pub use error::{Feature, StreamError};
pub use preempt::{PreemptDecoder, PreemptEncoder, PreemptItem, PreemptStep};
pub use recovery::{Recovery, RecoveryStep, decode_recovery, full_bitmap};
pub use return_path::{
    MAX_BITMAP, MAX_RETURN_ITEM, ReturnDecoder, ReturnError, ReturnMessage, ReturnStep,
    encode_return,
};
