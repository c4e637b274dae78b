//! The second channel of post-copy: any bytes a source QEMU, or whoever speaks in its place, may send.

#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use page::{ByteLen, PAGE_SIZE};
use qstream::{Block, BlockList, PreemptDecoder, PreemptItem, PreemptStep};

fn blocks() -> Option<Arc<BlockList>> {
    let block = |name: &str, pages: u64| Block {
        name: name.into(),
        used_len: ByteLen(pages * PAGE_SIZE as u64),
        host_page: ByteLen(PAGE_SIZE as u64),
    };
    BlockList::new(vec![block("pc.ram", 1 << 16), block("pc.bios", 64)])
        .ok()
        .map(Arc::new)
}

fuzz_target!(|input: &[u8]| {
    let Some(blocks) = blocks() else { return };
    let mut decoder = PreemptDecoder::new(Arc::clone(&blocks));
    let (mut at, mut is_over) = (0, false);
    while let Ok(step) = decoder.decode(&input[at..]) {
        match step {
            PreemptStep::NeedMore { at_least } => {
                assert!(at_least > input.len() - at && at_least < 4400);
                break;
            }
            PreemptStep::Item { item, consumed } => {
                assert!(!is_over, "something behind the end");
                match item {
                    PreemptItem::Page { block, page, .. } | PreemptItem::Zero { block, page } => {
                        assert!(blocks.holds(block, page));
                        assert!(consumed > 8);
                    }
                    PreemptItem::End => is_over = true,
                }
                at += consumed;
            }
        }
    }
});
