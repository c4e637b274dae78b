//! What a frame says of how its pages share.

use std::collections::HashSet;
use std::sync::Arc;

use content::HostTable;
use migrate::pack::{Packer, SharedPages};
use page::{BlockIndex, FrameSharing, PAGE_SIZE, PageNo};
use wire::{Op, OpReader, split_pages_body};

use crate::opening;

/// After a switch to post-copy plain pages are shared by what is said of them.
#[test]
fn a_page_that_shares_nothing_is_not_said_to_share_as_the_one_before_it_does() {
    let blocks = opening::block_list(&[("pc.ram", 8)]);
    let mut stream = opening::header();
    stream.extend(opening::ram_start(&blocks, true));
    let mut encoder = opening::encoder(&blocks, true);
    encoder.begin_part(&mut stream);
    for page in 0..4_u8 {
        encoder.page(BlockIndex(0), PageNo(page.into()), &mut stream);
        let content = (0..=u8::MAX).cycle().map(|byte| byte ^ page);
        stream.extend(content.take(PAGE_SIZE));
    }
    encoder.close(&mut stream);

    let mut shared = SharedPages::of_blocks([("pc.ram", 8)].into_iter());
    for page in [0, 2] {
        shared.mark(0, PageNo(page), FrameSharing::Merged);
    }
    let names = HashSet::from(["pc.ram".to_owned()]);
    let mut packer = Packer::new(crate::key(), names).shared_only();
    packer.set_shared(Arc::new(shared));
    assert_eq!(packer.scan(&stream, 0).unwrap(), stream.len());
    let packed = packer
        .take()
        .resolve(&stream, &mut HostTable::default(), &[]);

    let mut body = packed.front;
    body.resize(body.len() + packed.pages.len() * PAGE_SIZE, 0);
    let (mut sharing, mut said) = (FrameSharing::No, Vec::new());
    for op in OpReader::new(split_pages_body(&body).unwrap().ops) {
        match op.unwrap() {
            Op::Shared(now) => sharing = now,
            Op::Plain(run) | Op::Literal(run, _) => {
                said.extend(run.pages().map(|page| (page.0, sharing.is_shared())));
            }
            _ => {}
        }
    }
    assert_eq!(said, [(0, true), (1, false), (2, true), (3, false)]);
}
