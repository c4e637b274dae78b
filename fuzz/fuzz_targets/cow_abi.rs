//! What the agent and the library in a target QEMU say to each other, both ends on the same bytes.

#![no_main]

use cow_abi::{
    BLOCK_PAGES_MAX, BLOCKS_MAX, FromAgent, FromLibrary, NAME_BYTES_MAX, PACKET_BYTES_MAX,
    POOL_PAGES_MAX, RUNS_MAX,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|packet: &[u8]| {
    // What was let in is inside the limits, and is written again as the same bytes.
    let mut again = vec![0; PACKET_BYTES_MAX];
    if let Ok((sequence, message)) = FromAgent::decode(packet) {
        check(&message);
        let len = message
            .encode(sequence, &mut again)
            .expect("it had room before");
        // Welcome has bytes that another version may use.
        assert!(again[..len] == *packet || matches!(message, FromAgent::Welcome { .. }));
        assert_eq!(FromAgent::decode(&again[..len]), Ok((sequence, message)));
    }
    if let Ok((sequence, message)) = FromLibrary::decode(packet) {
        assert!(FromAgent::decode(packet).is_err(), "one number, one sender");
        if let FromLibrary::MapAnswer(outcomes) = message {
            assert!(outcomes.len() <= RUNS_MAX);
        }
        let len = message
            .encode(sequence, &mut again)
            .expect("it had room before");
        assert_eq!(again[..len], *packet);
    }
});

fn check(message: &FromAgent<'_>) {
    match message {
        FromAgent::Map(batch) | FromAgent::Expect(batch) => {
            assert!(batch.len() <= RUNS_MAX);
            for run in batch.runs() {
                assert!(usize::from(run.block) < BLOCKS_MAX && run.pages > 0);
                let pages = u64::from(run.pages);
                assert!(u64::from(run.page) + pages <= BLOCK_PAGES_MAX);
                assert!(run.pool_page + pages <= POOL_PAGES_MAX);
            }
        }
        FromAgent::Block(offer) => {
            assert!(usize::from(offer.index) < BLOCKS_MAX);
            assert!((1..=NAME_BYTES_MAX).contains(&offer.name.len()));
            assert!(offer.addr.checked_add(offer.len).is_some());
        }
        _ => {}
    }
}
