//! What is remembered of a page, and what has to be done to know it again. Pure.

use page::{HostAddr, PAGE_SIZE};
use sys::PagemapEntry;

use super::ContentNo;

/// A cache line: reading less of a page is not cheaper.
pub(super) const SAMPLE_BYTES: usize = 64;

/// What a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageKind {
    /// It has no frame and is not in swap: zero.
    Untouched,
    /// Zero.
    Zero,
    /// This byte all over, other than zero.
    Fill(u8),
    /// A content.
    Content(ContentNo),
    /// It could not be read, or there was no room to remember its content.
    Unknown,
}

/// What is remembered of a page: 16 bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PageState {
    /// Its frame; 0 if it had none, or if the frame's number is hidden. With [`WAS_SHARED`] if
    /// the frame was copied before writing when the page was last known.
    frame: u64,
    /// Checksum of a line of it.
    sample: u32,
    kind: PackedKind,
}

/// A [`PageKind`] in 32 bits: 0 untouched, 1 unknown, 2 to 257 the byte all over, then contents.
#[derive(Clone, Copy, Debug, Default)]
struct PackedKind(u32);

/// Above the 55 bits of a frame's number.
const WAS_SHARED: u64 = 1 << 63;

const FIRST_FILL: u32 = 2;
const FIRST_CONTENT: u32 = FIRST_FILL + 256;

/// What must be done to know a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing: it is known.
    Done,
    /// Its frame is the same: compare its sample in some of the scans.
    Sample,
    /// Its frame is the same, but not who else maps it: compare its sample now.
    Verify,
    /// Read it.
    Read,
    /// Its frame is mapped more than once: read it unless another page of that frame was.
    ReadFrame(u64),
}

impl PageState {
    /// What the page holds, as last known.
    pub(super) fn kind(&self) -> PageKind {
        self.kind.unpack()
    }

    pub(super) fn sample(&self) -> u32 {
        self.sample
    }

    /// What must be done, now that its page table entry is `entry`.
    pub(super) fn next(&mut self, entry: PagemapEntry) -> Step {
        if !entry.present() && !entry.swapped() {
            *self = Self::default();
            return Step::Done;
        }
        let known = !matches!(self.kind(), PageKind::Untouched | PageKind::Unknown);
        let shared = copied_before_writing(entry);
        match entry.pfn() {
            Some(frame) if known && frame == self.frame & !WAS_SHARED => {
                let was_shared = self.frame & WAS_SHARED != 0;
                self.frame = marked(frame, shared);
                match (was_shared, shared) {
                    (true, true) => Step::Done,
                    // It may have been written before it became shared, or after it ceased to be.
                    (false, true) | (true, false) => Step::Verify,
                    (false, false) => Step::Sample,
                }
            }
            Some(frame) if shared => Step::ReadFrame(frame),
            Some(_) | None => Step::Read,
        }
    }

    /// It was read.
    pub(super) fn found(&mut self, entry: PagemapEntry, kind: PageKind, sample: u32) {
        *self = Self {
            frame: marked(entry.pfn().unwrap_or(0), copied_before_writing(entry)),
            sample,
            kind: PackedKind::pack(kind),
        };
    }

    /// Another page of its frame was read. Its own line is not known: if the frame becomes its
    /// own, the sample of nothing does not match, and it is read then.
    pub(super) fn joined(&mut self, frame: u64, kind: PageKind) {
        *self = Self {
            frame: marked(frame, true),
            sample: 0,
            kind: PackedKind::pack(kind),
        };
    }
}

/// Whether the kernel copies this page before it is written. Memory that is shared by all its
/// users is written in place, however many map it.
pub(super) fn copied_before_writing(entry: PagemapEntry) -> bool {
    entry.present() && !entry.exclusive() && !entry.file_or_shared()
}

fn marked(frame: u64, shared: bool) -> u64 {
    if shared { frame | WAS_SHARED } else { frame }
}

impl PackedKind {
    fn pack(kind: PageKind) -> Self {
        Self(match kind {
            PageKind::Untouched => 0,
            PageKind::Unknown => 1,
            PageKind::Zero => FIRST_FILL,
            PageKind::Fill(byte) => FIRST_FILL + u32::from(byte),
            // Numbers stay far below 2^32: see the limit on contents.
            PageKind::Content(no) => FIRST_CONTENT.saturating_add(no.0),
        })
    }

    fn unpack(self) -> PageKind {
        match self.0 {
            0 => PageKind::Untouched,
            1 => PageKind::Unknown,
            FIRST_FILL => PageKind::Zero,
            fill @ 3..FIRST_CONTENT => {
                PageKind::Fill(u8::try_from(fill - FIRST_FILL).unwrap_or(u8::MAX))
            }
            content => PageKind::Content(ContentNo(content - FIRST_CONTENT)),
        }
    }
}

/// Where in the page at `addr` its sampled line is. Neighbours have theirs at different places,
/// so that a field at a fixed place in a structure of page size is not missed everywhere.
pub(super) fn sample_offset(addr: HostAddr) -> usize {
    let page = addr.0 / PAGE_SIZE as u64;
    let mixed = page.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 58;
    // Six bits: one of the 64 lines.
    usize::try_from(mixed).unwrap_or(0) * SAMPLE_BYTES
}

/// Checksum of a line: not secure, a collision only keeps a stale id.
pub(super) fn sample_sum(line: &[u8; SAMPLE_BYTES]) -> u32 {
    let words = line.as_chunks::<8>().0;
    let sum = words.iter().fold(0x243f_6a88_85a3_08d3_u64, |sum, word| {
        (sum.rotate_left(5) ^ u64::from_le_bytes(*word)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    });
    // The upper half is the well mixed one.
    u32::try_from(sum >> 32).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_survives_packing() {
        let fills = (1..=255).map(PageKind::Fill);
        let contents = [0, 1, 1 << 26].map(|no| PageKind::Content(ContentNo(no)));
        let others = [PageKind::Untouched, PageKind::Unknown, PageKind::Zero];
        for kind in fills.chain(contents).chain(others) {
            assert_eq!(PackedKind::pack(kind).unpack(), kind);
        }
        assert_eq!(size_of::<PageState>(), 16);
    }

    #[test]
    fn every_byte_of_a_line_counts_and_lines_lie_inside_their_page() {
        let line = [7; SAMPLE_BYTES];
        for at in 0..SAMPLE_BYTES {
            let mut other = line;
            other[at] ^= 1;
            assert_ne!(sample_sum(&line), sample_sum(&other), "byte {at}");
        }
        let offsets: std::collections::BTreeSet<_> = (0..1000)
            .map(|page| sample_offset(HostAddr(page * PAGE_SIZE as u64)))
            .collect();
        assert!(
            offsets
                .iter()
                .all(|offset| offset + SAMPLE_BYTES <= PAGE_SIZE)
        );
        assert!(offsets.len() > 50, "{}", offsets.len());
    }
}
