//! The early state of a virtio-mem device: the one device section that precedes the end of RAM.
//!
//! QEMU 8.0 and later write it during setup, because the target must know which parts of the
//! device's memory are plugged before it can receive them. Its length follows from its content.

use crate::StreamError;
use crate::decoder::MAX_ITEM;
use crate::reader::{Halt, Reader};

pub(crate) fn is_early_state(section_name: &[u8]) -> bool {
    section_name.ends_with(b"/virtio-mem-device-early")
}

/// Steps over the state, between the head of the section and its footer.
pub(crate) fn skip(reader: &mut Reader<'_>) -> Result<(), Halt<StreamError>> {
    let _address = reader.be64()?;
    let region_size = reader.be64()?;
    let block_size = reader.be64()?;
    let _node = reader.be32()?;
    let _plugged_size = reader.be64()?;
    if block_size == 0 {
        return Err(StreamError::BadVirtioMem("block size of 0").into());
    }
    // One bit for a block, in words of 64 bits.
    let bitmap = region_size
        .div_ceil(block_size)
        .div_ceil(64)
        .saturating_mul(8);
    // Half, so that head and footer fit as well.
    let bitmap = usize::try_from(bitmap)
        .ok()
        .filter(|len| *len <= MAX_ITEM / 2)
        .ok_or(StreamError::BadVirtioMem("too many blocks"))?;
    reader.bytes(bitmap)?;
    Ok(())
}
