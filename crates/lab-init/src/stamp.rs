//! Pages that say what they are.
//!
//! A stamped page holds the VM, its own index and the generation of its content, and half a page
//! of noise made from them: a page that is stale, misplaced, torn or of another VM is found out,
//! and it compresses about as well as ordinary memory does.

/// Bytes of a stamped unit, the guest's page.
pub const PAGE: usize = 4096;
/// The area that guests of the mode `stress` write, and who has stamped its pages that begin alike in all
/// of them.
pub const STRESS: &str = "stress";
/// See [`STRESS`].
pub const EVERYBODY: &str = "everybody";
/// Bytes of each page that are noise.
const NOISE: usize = PAGE / 2;

/// One page, aligned as direct disk I/O needs it.
#[repr(C, align(4096))]
#[derive(Clone)]
pub struct Page(pub [u8; PAGE]);

impl Page {
    /// A page of zeros.
    pub const ZERO: Self = Self([0; PAGE]);
}

/// The identity that a page is stamped with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Hash of the VM's id and of the area.
    pub owner: u64,
    /// Number of the page in its area.
    pub index: u64,
    /// How often the page was written before.
    pub generation: u64,
}

impl Stamp {
    /// Writes the whole page.
    pub fn write(self, page: &mut Page) {
        self.words()
            .zip(page.0.chunks_exact_mut(8))
            .for_each(|(word, place)| {
                place.copy_from_slice(&word.to_le_bytes());
            });
    }

    /// Whether the whole page is as [`Self::write`] left it.
    #[must_use]
    pub fn matches(self, page: &Page) -> bool {
        self.fits(&page.0)
    }

    /// What a page is stamped with, if all of it is as [`Self::write`] left it.
    #[must_use]
    pub fn of(page: &[u8; PAGE]) -> Option<Self> {
        let (words, _) = page.as_chunks::<8>();
        let [owner, index, generation] = [0, 1, 2].map(|at| u64::from_le_bytes(words[at]));
        let stamp = Self {
            owner,
            index,
            generation,
        };
        stamp.fits(page).then_some(stamp)
    }

    fn fits(self, page: &[u8; PAGE]) -> bool {
        self.words()
            .zip(page.chunks_exact(8))
            .all(|(word, place)| place == word.to_le_bytes())
    }

    fn words(self) -> impl Iterator<Item = u64> {
        let mut noise = Noise::new(self.owner ^ self.index.rotate_left(32) ^ self.generation);
        let header = [self.owner, self.index, self.generation];
        let blank = (PAGE - NOISE) / 8 - 2 * header.len();
        header
            .into_iter()
            .chain((0..NOISE / 8).map(move |_| noise.next_word()))
            .chain(std::iter::repeat_n(0, blank))
            .chain(header)
    }
}

/// Words without pattern (xorshift64*); cheap enough for an emulated processor.
pub struct Noise(u64);

impl Noise {
    /// Different seeds give different words.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        // The generator's one fixed point is zero.
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// The next word.
    pub fn next_word(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// A number below `count`, which is not 0.
    pub fn below(&mut self, count: usize) -> usize {
        // Less than a `usize`; the low bits of a product are the less random ones.
        usize::try_from((self.next_word() >> 16) % count as u64).unwrap_or(0)
    }

    /// Puts `items` into an order without pattern.
    pub fn shuffle(&mut self, items: &mut [usize]) {
        for at in (1..items.len()).rev() {
            items.swap(at, self.below(at + 1));
        }
    }
}

/// FNV-1a: makes the `owner` of a stamp from names.
#[must_use]
pub fn owner(id: &str, area: &str) -> u64 {
    id.bytes()
        .chain([0])
        .chain(area.bytes())
        .fold(0xCBF2_9CE4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAMP: Stamp = Stamp {
        owner: 1,
        index: 2,
        generation: 3,
    };

    #[test]
    fn a_changed_byte_anywhere_is_found() {
        let mut written = Page::ZERO;
        STAMP.write(&mut written);
        assert!(STAMP.matches(&written));
        assert_eq!(Stamp::of(&written.0), Some(STAMP));
        for at in 0..PAGE {
            let mut changed = written.clone();
            changed.0[at] ^= 0x10;
            assert!(!STAMP.matches(&changed), "byte {at}");
            assert_eq!(Stamp::of(&changed.0), None, "byte {at}");
        }
    }

    #[test]
    fn a_page_of_another_place_time_or_vm_is_found() {
        let mut page = Page::ZERO;
        STAMP.write(&mut page);
        for other in [
            Stamp {
                owner: owner("vm2", "stamp"),
                ..STAMP
            },
            Stamp { index: 9, ..STAMP },
            Stamp {
                generation: 2,
                ..STAMP
            },
        ] {
            assert!(!other.matches(&page));
        }
    }
}
