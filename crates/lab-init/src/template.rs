//! Waiting as a template until somebody says who this guest is.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context;
use lab_init::agreed::{TEMPLATE_MARKER, TEMPLATE_MARKER_TURN, TEMPLATE_WAITS};

const WORD: usize = size_of::<u64>();
/// How often the page is looked at: little work for many waiting guests.
const LOOK: Duration = Duration::from_millis(20);

/// A page that somebody outside the guest writes.
#[repr(align(4096))]
struct Board([AtomicU64; 4096 / WORD]);

/// Who the guest is from now on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    /// Name of the VM.
    pub(crate) id: String,
    /// Its address.
    pub(crate) ip: Ipv4Addr,
    /// The address of its network card, as text.
    pub(crate) mac: String,
}

/// Says that it waits, and returns when the marker has been replaced by an identity.
pub(crate) fn wait_for_identity() -> anyhow::Result<Identity> {
    let board: Box<Board> = Box::new(Board([const { AtomicU64::new(0) }; 4096 / WORD]));
    for (place, word) in board.0.iter().zip(TEMPLATE_MARKER.chunks_exact(WORD)) {
        let mut turned = [0; WORD];
        turned.copy_from_slice(word);
        let turned = turned.map(|byte| byte ^ TEMPLATE_MARKER_TURN);
        place.store(u64::from_ne_bytes(turned), Ordering::SeqCst);
    }
    let first = board.0[0].load(Ordering::SeqCst);
    println!("{TEMPLATE_WAITS}");
    while board.0[0].load(Ordering::SeqCst) == first {
        std::thread::sleep(LOOK);
    }
    // The lab writes while the guest stands still: what is there is whole.
    let words = board.0.iter().map(|place| place.load(Ordering::SeqCst));
    let bytes: Vec<u8> = words.flat_map(u64::to_ne_bytes).collect();
    parse(&bytes).context("reading who this guest is")
}

/// Reads `ID IP MAC` and a newline.
fn parse(bytes: &[u8]) -> anyhow::Result<Identity> {
    let line = bytes
        .split(|byte| *byte == b'\n')
        .next()
        .unwrap_or_default();
    let text = std::str::from_utf8(line).context("it is no text")?;
    let mut words = text.split_whitespace();
    let mut word = || words.next().context("it is not `ID IP MAC`");
    Ok(Identity {
        id: word()?.to_owned(),
        ip: word()?.parse().context("its address makes no sense")?,
        mac: word()?.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_read_up_to_the_end_of_its_line() {
        let identity = parse(b"vm3 10.78.1.3 52:54:00:67:00:03\n\0\0\0").unwrap();
        assert_eq!(identity.id, "vm3");
        assert_eq!(identity.ip, Ipv4Addr::new(10, 78, 1, 3));
        assert_eq!(identity.mac, "52:54:00:67:00:03");
        for wrong in [&b"vm3\n"[..], b"", b"vm3 x y\n", b"\xff \n"] {
            assert!(parse(wrong).is_err());
        }
    }
}
