//! LEB128: seven bits a byte, low group first, at most ten bytes.

use crate::WireError;

/// Appends `value`.
pub(crate) fn put(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push((value & 0x7f) as u8);
}

/// Takes one number off the front of `input`.
pub(crate) fn take(input: &mut &[u8]) -> Result<u64, WireError> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let Some((&byte, rest)) = input.split_first() else {
            return Err(WireError::Truncated);
        };
        *input = rest;
        let bits = u64::from(byte & 0x7f);
        if bits << shift >> shift != bits {
            return Err(WireError::NumberTooLarge);
        }
        value |= bits << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(WireError::NumberTooLarge)
}

/// Maps small differences of either sign to small numbers.
pub(crate) fn zigzag(difference: i64) -> u64 {
    ((difference << 1) ^ (difference >> 63)).cast_unsigned()
}

/// Undoes [`zigzag`].
pub(crate) fn unzigzag(value: u64) -> i64 {
    (value >> 1).cast_signed() ^ -((value & 1).cast_signed())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_number_comes_back(value: u64, difference: i64) {
            let mut out = Vec::new();
            put(&mut out, value);
            let mut rest = out.as_slice();
            prop_assert_eq!(take(&mut rest)?, value);
            prop_assert!(rest.is_empty());
            prop_assert_eq!(unzigzag(zigzag(difference)), difference);
        }
    }

    #[test]
    fn an_endless_number_is_an_error() {
        assert!(matches!(
            take(&mut [0xff; 20].as_slice()),
            Err(WireError::NumberTooLarge)
        ));
        assert!(matches!(
            take(&mut [0x80; 3].as_slice()),
            Err(WireError::Truncated)
        ));
    }
}
