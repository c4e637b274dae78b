//! A guest's RAM blocks and where they lie in QEMU's memory.
//!
//! QEMU prints them in a table for people. Newer versions have a column with the address (`HVA`);
//! for older ones the address of the guest's physical address 0 tells where the main block is.

use page::{ByteLen, HostAddr, PAGE_SIZE};

use crate::{GuestError, Qmp};

/// One contiguous piece of guest memory, as the migration stream names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamBlock {
    /// Its name in the stream: `pc.ram`, `0000:00:02.0/vga.vram`.
    pub name: String,
    /// The part that is migrated.
    pub used_len: ByteLen,
    /// Where it begins in QEMU's memory; `None` if this QEMU does not tell.
    pub hva: Option<HostAddr>,
    /// Page size of what backs it: 4096, or that of its huge pages.
    pub page_size: u64,
}

/// Asks QEMU for its RAM blocks.
pub(crate) fn ram_blocks(qmp: &Qmp) -> Result<Vec<RamBlock>, GuestError> {
    let mut blocks = parse_blocks(&qmp.hmp("info ramblock")?);
    if blocks.is_empty() {
        return Err(GuestError::NoRamBlocks);
    }
    if blocks.iter().all(|block| block.hva.is_none()) {
        // It works for memory behind physical address 0 only, which on x86 is main memory.
        place_main_block(&mut blocks, &qmp.hmp("gpa2hva 0")?);
    }
    Ok(blocks)
}

/// Reads `info ramblock`. Lines that do not fit the header are left out.
fn parse_blocks(table: &str) -> Vec<RamBlock> {
    let mut lines = table.lines();
    let header = lines.by_ref().find_map(|line| line.split_once("PSize"));
    let Some((_, columns)) = header else {
        return Vec::new();
    };
    let columns: Vec<_> = columns.split_ascii_whitespace().collect();
    lines
        .filter_map(|line| parse_block(line, &columns))
        .collect()
}

/// Reads one line from its end, because the name at its start may hold blanks. `columns` are the
/// headings behind the page size, which itself is a number and a unit.
fn parse_block(line: &str, columns: &[&str]) -> Option<RamBlock> {
    let mut rest = line.trim_end();
    let mut last_word = || {
        let (before, word) = rest.trim_end().rsplit_once(char::is_whitespace)?;
        rest = before;
        Some(word)
    };
    let (mut used, mut hva) = (None, None);
    for column in columns.iter().rev() {
        let word = last_word()?;
        match *column {
            "Used" => used = Some(parse_hex(word)?),
            "HVA" => hva = parse_hex(word).and_then(block_address),
            _ => {}
        }
    }
    let unit: u64 = match last_word()? {
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return None,
    };
    let page_size = last_word()?.parse::<u64>().ok()?.checked_mul(unit)?;
    let name = rest.trim().to_owned();
    let used_len = ByteLen(used?);
    (!name.is_empty()).then_some(RamBlock {
        name,
        used_len,
        hva,
        page_size,
    })
}

/// Gives the block that `gpa2hva 0` names its address:
/// `Host virtual address for 0x0 (pc.ram) is 0x7f9fa3e00000`.
///
/// What stands there is the name of the memory region; a block's may have a device before it.
fn place_main_block(blocks: &mut [RamBlock], answer: &str) {
    let Some((region, hva)) = parse_gpa2hva(answer) else {
        return;
    };
    let mut named: Vec<_> = blocks
        .iter_mut()
        .filter(|block| block.name == region || block.name.rsplit('/').next() == Some(region))
        .collect();
    if let [block] = named.as_mut_slice() {
        block.hva = Some(hva);
    }
}

fn parse_gpa2hva(answer: &str) -> Option<(&str, HostAddr)> {
    let (_, rest) = answer.split_once('(')?;
    let (region, address) = rest.rsplit_once(") is ")?;
    Some((region, block_address(parse_hex(address.trim())?)?))
}

/// A block lies at a page, and not at the null page.
fn block_address(address: u64) -> Option<HostAddr> {
    (address != 0 && address.is_multiple_of(PAGE_SIZE as u64)).then_some(HostAddr(address))
}

fn parse_hex(word: &str) -> Option<u64> {
    u64::from_str_radix(word.strip_prefix("0x")?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NEW: &str = "              Block Name    PSize              Offset               Used              Total                HVA  RO\r\n                  pc.ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000 0x00007fe8f3e00000  rw\r\n   0000:00:02.0/vga.vram    2 MiB  0x0000000004080000 0x0000000000020000 0x0000000000200000 0x00007fe945000000  ro\r\n";
    const OLD: &str = "              Block Name    PSize              Offset               Used              Total\r\n                  pc.ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000\r\n   0000:00:02.0/vga.vram    4 KiB  0x0000000004080000 0x0000000000020000 0x0000000000200000\r\n";

    #[test]
    fn the_newer_table_gives_addresses_and_page_sizes() {
        let blocks = parse_blocks(NEW);
        assert_eq!(blocks.len(), 2);
        assert_eq!(blocks[0].name, "pc.ram");
        assert_eq!(blocks[0].used_len, ByteLen(64 << 20));
        assert_eq!(blocks[0].hva, Some(HostAddr(0x7fe8_f3e0_0000)));
        assert_eq!(blocks[1].name, "0000:00:02.0/vga.vram");
        assert_eq!(
            (blocks[1].used_len, blocks[1].page_size),
            (ByteLen(0x20000), 2 << 20)
        );
    }

    #[test]
    fn the_older_table_gets_the_main_blocks_address_from_the_guests_first_page() {
        let mut blocks = parse_blocks(OLD);
        assert!(blocks.len() == 2 && blocks.iter().all(|block| block.hva.is_none()));
        place_main_block(
            &mut blocks,
            "Host virtual address for 0x0 (pc.ram) is 0x7f9fa3e00000\r\n",
        );
        assert_eq!(blocks[0].hva, Some(HostAddr(0x7f9f_a3e0_0000)));
        assert_eq!(blocks[1].hva, None);
        place_main_block(
            &mut blocks,
            "Host virtual address for 0x0 (vga.vram) is 0x7f0000000000",
        );
        assert_eq!(blocks[1].hva, Some(HostAddr(0x7f00_0000_0000)));
    }

    #[test]
    fn an_odd_answer_places_nothing() {
        let untouched = parse_blocks(OLD);
        for odd in [
            "",
            "No memory is mapped at address 0x0",
            "Host virtual address for 0x0 (pc.ram) is 0x123",
            "Host virtual address for 0x0 (pc.ram) is 0x0",
            "Host virtual address for 0x0 (other) is 0x7f0000000000",
        ] {
            let mut blocks = untouched.clone();
            place_main_block(&mut blocks, odd);
            assert_eq!(blocks, untouched, "{odd}");
        }
    }

    #[test]
    fn a_name_may_hold_blanks_and_lines_that_do_not_fit_are_left_out() {
        let table =
            format!("{OLD}  my block  1 GiB 0x0 0x1000 0x1000\nnonsense\n 4 KiB 0x0 0x1 0x1\n");
        let blocks = parse_blocks(&table);
        assert_eq!(blocks.len(), 3);
        assert_eq!(
            (blocks[2].name.as_str(), blocks[2].page_size),
            ("my block", 1 << 30)
        );
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_panic(text in "(Block Name|PSize|Used|HVA|0x[0-9a-f]{1,20}|4 KiB|\\(|\\) is |[ \r\n\u{a0}é])*") {
            let mut blocks = parse_blocks(&text);
            place_main_block(&mut blocks, &text);
            prop_assert!(blocks.iter().all(|block| !block.name.is_empty()));
        }
    }
}
