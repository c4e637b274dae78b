//! Pages that a processor of the guest waits for, after a switch to post-copy.
//!
//! The source guest is stopped by then, so its memory is what it will be. A page that the target QEMU
//! asks for is read from there as soon as the request passes, and goes ahead of everything that is
//! queued; QEMU's own copy is left out when it comes. The request goes on to QEMU all the same: it
//! continues its sweep from there, where the guest is.

use std::sync::Arc;

use migrate::pack::{Packed, repair_front};
use page::{BlockIndex, HostAddr, PAGE_SIZE, PageNo, PageRun};
use qstream::{ReturnDecoder, ReturnMessage, ReturnStep};
use wire::FrameKind;

use crate::link::Pool;

use super::outbox::{OutFrame, Outbox};
use super::stream::Stream;

/// Most pages of one request: a page of the host of 2 MiB.
const MAX_PAGES: u32 = 512;

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

/// Sends the pages that a message asks for ahead of everything else. Those that cannot be read here
/// come from QEMU, which is asked too.
pub(crate) fn serve(stream: &Arc<Stream>, message: &[u8], outbox: &Outbox, pool: &Arc<Pool>) {
    let Some((block, run)) = stream.asked(message) else {
        return;
    };
    let Some(base) = stream.memory.base(block) else {
        return;
    };
    let pages: Vec<PageNo> = run.pages().collect();
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
        front: repair_front(as_of, block, &pages),
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
    stream.went_ahead(pages.into_iter().map(|page| (block, page)));
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
