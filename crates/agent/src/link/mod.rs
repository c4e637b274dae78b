//! Connections between agents, and what all their threads share: buffers, rate limits, holds.

mod bucket;
mod buffer;
mod connection;
mod hold;
mod listen;
mod squeeze;

pub(crate) use bucket::Bucket;
pub(crate) use buffer::{Buffer, Pool};
pub(crate) use connection::{Link, LinkError, Security, keep_short, pack, unpack};
pub(crate) use hold::Hold;
pub(crate) use listen::{Serve, Terms, listen};
pub(crate) use squeeze::{Compressor, Decompressor, SqueezeError};
