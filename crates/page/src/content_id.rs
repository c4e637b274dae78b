//! Content ids: the name of the bytes of a page inside one trust domain.

use std::fmt;

use crate::PageBytes;

/// 128-bit id of a page content: BLAKE3 keyed with the secret of the trust domain.
///
/// Keyed, so that no guest can aim for a collision (IRLM used plain SHA-1, which a guest can
/// collide); 128 bits, so that among 2^40 pages an accidental collision has a chance of 2^-49.
/// Equal ids mean equal bytes only inside one domain: other domains have other keys.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContentId(pub [u8; 16]);

impl ContentId {
    /// The leading 64 bits, for hash tables: the id is uniform already.
    #[must_use]
    pub fn hash64(self) -> u64 {
        let [a, b, c, d, e, f, g, h, ..] = self.0;
        u64::from_le_bytes([a, b, c, d, e, f, g, h])
    }
}

impl fmt::Debug for ContentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

/// The secret of a trust domain, 32 bytes. Its `Debug` never shows them.
#[derive(Clone, PartialEq, Eq)]
pub struct ContentKey([u8; 32]);

impl ContentKey {
    /// Wraps the secret; it should come from a cryptographic random source.
    #[must_use]
    pub fn new(secret: [u8; 32]) -> Self {
        Self(secret)
    }

    /// The secret itself, to hand it to the other end of an authenticated session.
    #[must_use]
    pub fn secret(&self) -> &[u8; 32] {
        &self.0
    }

    /// A public name for something of the domain: who knows the secret can make it, and it does
    /// not tell the secret.
    #[must_use]
    pub fn name(&self, purpose: &str, parts: &[&[u8]]) -> [u8; 16] {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        for part in [purpose.as_bytes()].iter().chain(parts) {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        let mut name = [0; 16];
        name.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        name
    }

    /// Id of a page's bytes. About 1.4 us a page on one core.
    #[must_use]
    pub fn id_of(&self, bytes: &PageBytes) -> ContentId {
        let hash = blake3::keyed_hash(&self.0, bytes);
        let mut id = [0; 16];
        id.copy_from_slice(&hash.as_bytes()[..16]);
        ContentId(id)
    }
}

impl fmt::Debug for ContentKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ContentKey(secret)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_differ_between_domains_and_between_contents() {
        let (a, b) = (ContentKey::new([1; 32]), ContentKey::new([2; 32]));
        let (x, mut y) = ([7; 4096], [7; 4096]);
        y[4095] = 8;
        assert_eq!(a.id_of(&x), a.id_of(&x));
        assert_ne!(a.id_of(&x), a.id_of(&y));
        assert_ne!(a.id_of(&x), b.id_of(&x));
    }

    #[test]
    fn names_differ_by_purpose_by_parts_and_by_domain() {
        let (a, b) = (ContentKey::new([1; 32]), ContentKey::new([2; 32]));
        let name = a.name("index", &[b"x", b"yz"]);
        assert_eq!(name, a.name("index", &[b"x", b"yz"]));
        assert_ne!(name, a.name("store", &[b"x", b"yz"]));
        assert_ne!(name, a.name("index", &[b"xy", b"z"]));
        assert_ne!(name, b.name("index", &[b"x", b"yz"]));
    }

    #[test]
    fn the_secret_is_not_printed() {
        assert_eq!(
            format!("{:?}", ContentKey::new([9; 32])),
            "ContentKey(secret)"
        );
    }
}
