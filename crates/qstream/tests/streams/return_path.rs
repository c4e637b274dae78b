//! Every limit of the return path, at its edge and one beyond.

use qstream::{
    MAX_BITMAP, MAX_RETURN_ITEM, ReturnDecoder, ReturnError, ReturnMessage, ReturnStep,
    encode_return,
};

fn decode(input: &[u8]) -> Result<ReturnStep<'_>, ReturnError> {
    ReturnDecoder::new().decode(input)
}

fn request(name_len: u8, payload_len: u16) -> Vec<u8> {
    let name = vec![b'n'; usize::from(name_len)];
    [
        &[0, 3][..],
        &payload_len.to_be_bytes(),
        &[0; 12],
        &[name_len],
        &name,
    ]
    .concat()
}

#[test]
fn unknown_messages_and_wrong_lengths_are_refused() {
    for (number, len) in [
        (0, 0),
        (1, 0),
        (1, 5),
        (2, 3),
        (3, 13),
        (3, 269),
        (4, 11),
        (5, 1),
        (6, 8),
    ]
    .into_iter()
    .chain([(5, 257), (7, 1), (8, 0), (1, u16::MAX)])
    {
        let head = [u16::to_be_bytes(number), u16::to_be_bytes(len)].concat();
        assert_eq!(decode(&head), Err(ReturnError::BadMessage { number, len }));
    }
}

#[test]
fn a_block_name_fills_its_message() {
    assert!(matches!(
        decode(&request(255, 268)),
        Ok(ReturnStep::Message { .. })
    ));
    assert_eq!(decode(&request(9, 21)), Err(ReturnError::BadName(3)));
    assert_eq!(decode(&request(9, 23)), Err(ReturnError::BadName(3)));
    assert_eq!(
        decode(b"\0\x05\0\x02\x01\xff"),
        Err(ReturnError::BadName(5))
    );
}

#[test]
fn a_request_without_name_follows_one_with_a_name() {
    let plain = b"\0\x04\0\x0c\0\0\0\0\0\0\x10\0\0\0\x10\0";
    assert_eq!(decode(plain), Err(ReturnError::NoCurrentBlock));
    let mut decoder = ReturnDecoder::new();
    decoder.decode(&request(1, 14)).unwrap();
    let message = ReturnMessage::ReqPages {
        start: 0x1000,
        len: 0x1000,
    };
    assert_eq!(
        decoder.decode(plain),
        Ok(ReturnStep::Message {
            message,
            raw: plain
        })
    );
}

#[test]
fn a_request_that_is_cut_off_does_not_name_a_block() {
    let mut decoder = ReturnDecoder::new();
    let cut = &request(4, 17)[..20];
    assert_eq!(
        decoder.decode(cut),
        Ok(ReturnStep::NeedMore { at_least: 21 })
    );
    assert_eq!(
        decoder.decode(b"\0\x04\0\x0c"),
        Err(ReturnError::NoCurrentBlock)
    );
}

#[test]
fn the_size_of_a_bitmap_is_bounded_before_it_is_waited_for() {
    let head = |size: u64| [&b"\0\x05\0\x02\x01a"[..], &size.to_be_bytes()].concat();
    for size in [0, 7, 12, MAX_BITMAP as u64 + 8, u64::MAX, 1 << 63] {
        assert_eq!(decode(&head(size)), Err(ReturnError::BadBitmapSize(size)));
    }
    let Ok(ReturnStep::NeedMore { at_least }) = decode(&head(MAX_BITMAP as u64)) else {
        panic!("the largest bitmap is not waited for");
    };
    assert!(at_least > MAX_BITMAP && at_least <= MAX_RETURN_ITEM);
}

#[test]
fn a_bitmap_ends_with_its_mark() {
    let mut bytes = vec![];
    encode_return(
        &ReturnMessage::RecvBitmap {
            block: "a",
            bitmap: &[0x5a; 16],
        },
        &mut bytes,
    );
    assert!(matches!(decode(&bytes), Ok(ReturnStep::Message { .. })));
    *bytes.last_mut().unwrap() ^= 1;
    assert_eq!(
        decode(&bytes),
        Err(ReturnError::BadBitmapMark(0x0123_4567_89ab_cdee))
    );
}
