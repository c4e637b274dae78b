//! Pages that a processor of the guest waits for, after a switch to post-copy.
//!
//! The source guest is stopped by then, so its memory is what it will be. A page that the target QEMU
//! asks for is read from there as soon as the request passes, and goes ahead of everything that is
//! queued; QEMU's own copy is left out when it comes. The request goes on to QEMU all the same: it
//! continues its sweep from there, where the guest is.

use std::sync::Arc;

use migrate::pack::{Packed, urgent_front};
use page::{BlockIndex, FrameSharing, HostAddr, PAGE_SIZE, PageNo, PageRun};
use qstream::{ReturnDecoder, ReturnMessage, ReturnStep};
use wire::FrameKind;

use crate::link::Pool;

use super::outbox::{OutFrame, Outbox};
use super::stream::Stream;

/// Most pages of one request: a page of the host of 2 MiB.
const MAX_PAGES: u32 = 512;

/// Neighbours that go with a page: where a guest has read it soon reads on. 32 KiB, 0.3 ms at 1 Gbit/s,
/// of which some were sent before.
const NEIGHBOURS: u32 = 8;

/// Follows what a target QEMU asks for: a request may leave out the block if it is that of the last.
#[derive(Default)]
pub(crate) struct Requests {
    decoder: ReturnDecoder,
    block: Option<BlockIndex>,
}

impl Requests {
    /// The pages that a message of the return path asks for.
    pub(crate) fn asked(
        &mut self,
        message: &[u8],
        names: &[String],
    ) -> Option<(BlockIndex, PageRun)> {
        let Ok(ReturnStep::Message { message, .. }) = self.decoder.decode(message) else {
            return None;
        };
        let (start, len) = match message {
            ReturnMessage::ReqPagesId { start, len, block } => {
                let index = names.iter().position(|name| name == block)?;
                self.block = u16::try_from(index).ok().map(BlockIndex);
                (start, len)
            }
            ReturnMessage::ReqPages { start, len } => (start, len),
            _ => return None,
        };
        let count = len / u32::try_from(PAGE_SIZE).ok()?;
        let run = PageRun {
            start: PageNo::from_offset(start)?,
            count,
        };
        (1..=MAX_PAGES)
            .contains(&count)
            .then_some((self.block?, run))
    }
}

/// The pages around those of a request, of a block that has `len`.
fn neighbours(run: PageRun, len: u32) -> impl Iterator<Item = PageNo> {
    let first = run.start.0 / NEIGHBOURS * NEIGHBOURS;
    let asked = run.start.0..run.start.0.saturating_add(run.count);
    (first..first.saturating_add(NEIGHBOURS).min(len))
        .filter(move |page| !asked.contains(page))
        .map(PageNo)
}

/// Sends the pages that a message asks for ahead of everything else. Those that cannot be read here
/// come from QEMU, which is asked too.
pub(crate) fn serve(stream: &Arc<Stream>, message: &[u8], outbox: &Outbox, pool: &Arc<Pool>) {
    let Some((block, run)) = stream.asked(message) else {
        return;
    };
    let Some(base) = stream.memory.base(block) else {
        return;
    };
    let mut pages: Vec<PageNo> = run.pages().collect();
    let asked = pages.len();
    let group = run.start.0 / NEIGHBOURS;
    if stream.is_new_group(block, group) {
        pages.extend(neighbours(run, stream.memory.len(block)));
    }
    let addresses: Vec<HostAddr> = pages
        .iter()
        .filter_map(|page| base.of_page(*page))
        .collect();
    // As new as everything up to here, as the packer and the target count.
    let as_of = stream.flow().0;
    let mut buffer = pool.take(addresses.len() * PAGE_SIZE);
    let read = stream.memory.memory.read_pages(&addresses, &mut buffer);
    if !read.is_ok_and(|read| read == pages.len()) {
        return;
    }
    #[expect(
        clippy::cast_possible_truncation,
        reason = "a buffer is far below 4 GiB"
    )]
    let offsets = (0..pages.len()).map(|i| (i * PAGE_SIZE) as u32).collect();
    let packed = Packed {
        front: front(stream, as_of, (block, &pages)),
        pages: offsets,
        ..Packed::default()
    };
    outbox.push_urgent(OutFrame {
        kind: FrameKind::Urgent,
        stream: Arc::clone(stream),
        packed,
        buffer: Some(Arc::new(buffer)),
    });
    // Only now: what is left out of the stream must be on its way.
    stream.went_ahead(block, &pages, asked);
}

/// Says which pages follow, and how they share their frames.
fn front(stream: &Stream, as_of: u64, (block, pages): (BlockIndex, &[PageNo])) -> Vec<u8> {
    let shared = stream.shared_in(block);
    let of_block = shared.as_ref().map(|(shared, name)| shared.of_block(name));
    let sharing = |page| of_block.as_ref().map_or(FrameSharing::No, |of| of(page));
    let pages = pages.iter().map(|page| (*page, sharing(*page)));
    urgent_front(as_of, block, pages)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(message: &ReturnMessage<'_>) -> Vec<u8> {
        let mut bytes = Vec::new();
        qstream::encode_return(message, &mut bytes);
        bytes
    }

    #[test]
    fn neighbours_are_of_the_block_and_not_what_was_asked_for() {
        let around = |start, count, len| {
            let start = PageNo(start);
            let pages = neighbours(PageRun { start, count }, len);
            pages.map(|page| page.0).collect::<Vec<_>>()
        };
        assert_eq!(around(9, 1, 100), [8, 10, 11, 12, 13, 14, 15]);
        assert_eq!(around(8, 8, 100), [0; 0]);
        assert_eq!(around(8, 512, 1000), [0; 0]);
        assert_eq!(around(9, 1, 11), [8, 10]);
        assert_eq!(
            around(u32::MAX, 1, u32::MAX),
            [
                u32::MAX - 7,
                u32::MAX - 6,
                u32::MAX - 5,
                u32::MAX - 4,
                u32::MAX - 3,
                u32::MAX - 2,
                u32::MAX - 1
            ]
        );
    }

    #[test]
    fn a_request_without_a_block_is_about_the_last_one() {
        let names = ["pc.ram".to_owned(), "dimm0".to_owned()];
        let mut requests = Requests::default();
        let (start, len) = (0x3000, 4096);
        let named = encoded(&ReturnMessage::ReqPagesId {
            start,
            len,
            block: "dimm0",
        });
        let run = |page, count| {
            let start = PageNo(page);
            Some((BlockIndex(1), PageRun { start, count }))
        };
        assert_eq!(requests.asked(&named, &names), run(3, 1));
        let next = encoded(&ReturnMessage::ReqPages {
            start: 0,
            len: 8192,
        });
        assert_eq!(requests.asked(&next, &names), run(0, 2));
        for (start, len) in [(0, 0), (1, 4096), (0, u32::MAX)] {
            let odd = encoded(&ReturnMessage::ReqPages { start, len });
            assert_eq!(requests.asked(&odd, &names), None);
        }
        assert_eq!(
            requests.asked(&encoded(&ReturnMessage::Pong(3)), &names),
            None
        );
    }
}
