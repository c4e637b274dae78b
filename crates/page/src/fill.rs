//! Fill pages: all bytes equal (IRLM's *online compression* sends one byte for them).

use crate::PageBytes;

/// The byte that fills the whole page, or `None`.
///
/// Zero pages are the common case in QEMU's stream only as records of their own; what comes
/// here is page data, which nearly always differs within the first words: the test leaves
/// early, and a page that is filled costs one pass at memory speed.
#[must_use]
pub fn fill_byte(bytes: &PageBytes) -> Option<u8> {
    let first = bytes[0];
    let word = u64::from_ne_bytes([first; 8]);
    let equal = |chunk: &[u8]| {
        // Whole lines are combined without a branch, so that the compiler vectorises.
        let mut difference = 0;
        for eight in chunk.as_chunks::<8>().0 {
            difference |= u64::from_ne_bytes(*eight) ^ word;
        }
        difference == 0
    };
    let (head, rest) = bytes.split_at(16);
    (equal(head) && rest.chunks(240).all(equal)).then_some(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_odd_byte_anywhere_is_seen() {
        for fill in [0, 0x5a, 0xff] {
            let mut page = [fill; 4096];
            assert_eq!(fill_byte(&page), Some(fill));
            for at in 0..page.len() {
                page[at] ^= 1;
                assert_eq!(fill_byte(&page), None, "odd byte at {at}");
                page[at] ^= 1;
            }
        }
    }
}
