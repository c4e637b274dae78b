//! The first commands of a stream that goes on: any bytes a source QEMU, or whoever speaks in its place, may
//! send.

#![no_main]

use libfuzzer_sys::fuzz_target;
use qstream::{Recovery, RecoveryStep, decode_recovery};

fuzz_target!(|input: &[u8]| {
    let mut at = 0;
    while let Ok(RecoveryStep::Command { command, consumed }) = decode_recovery(&input[at..]) {
        assert!(consumed >= 5);
        // A prefix asks for more, and never says something else.
        for end in at..at + consumed {
            match decode_recovery(&input[at..end]) {
                Ok(RecoveryStep::NeedMore { at_least }) => {
                    assert!(at_least > end - at && at_least <= consumed.max(6));
                }
                other => panic!("{other:?}"),
            }
        }
        if let Recovery::Bitmap { block } = command {
            assert!(!block.is_empty() && block.len() <= usize::from(u8::MAX));
        }
        at += consumed;
    }
});
