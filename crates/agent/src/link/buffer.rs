//! Buffers that go round: filled by one thread, shared with others, and back.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

/// Buffers that are kept when they come back; more are given back to the system. Eight buffers
/// of 256 KiB keep one VM's reader and the sender busy.
const KEPT: usize = 8;

/// Buffers of one size.
pub(crate) struct Pool {
    free: Mutex<Vec<Vec<u8>>>,
    size: usize,
}

impl Pool {
    pub(crate) fn new(size: usize) -> Arc<Self> {
        Arc::new(Self {
            free: Mutex::new(Vec::new()),
            size,
        })
    }

    /// A buffer of at least `len` bytes, of which `len` show. Its contents are leftovers: bytes
    /// of the same session, or zeros. What takes less than half of a buffer gets memory of its
    /// own: a frame of references is a hundredth of one, and many of them wait at a time.
    pub(crate) fn take(self: &Arc<Self>, len: usize) -> Buffer {
        let bytes = if len > self.size || len < self.size / 2 {
            vec![0; len]
        } else {
            let kept = self.lock().pop();
            kept.unwrap_or_else(|| vec![0; self.size])
        };
        Buffer {
            bytes,
            len,
            pool: Arc::clone(self),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Vec<u8>>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A buffer of a [`Pool`], which it goes back to.
pub(crate) struct Buffer {
    bytes: Vec<u8>,
    len: usize,
    pool: Arc<Pool>,
}

impl Buffer {
    /// Bytes that it keeps in use, of which some may not show.
    pub(crate) fn held(&self) -> usize {
        self.bytes.len()
    }
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.bytes.len() != self.pool.size {
            return;
        }
        let mut free = self.pool.lock();
        if free.len() < KEPT {
            free.push(std::mem::take(&mut self.bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back_and_small_pieces_hold_no_whole_one() {
        let pool = Pool::new(1000);
        let large = pool.take(900);
        assert_eq!((large.len(), large.held()), (900, 1000));
        let place = large.as_ptr();
        drop(large);
        assert_eq!(pool.take(1000).as_ptr(), place);
        let small = pool.take(10);
        assert_eq!((small.len(), small.held()), (10, 10));
        drop(small);
        let longer = pool.take(2000);
        assert_eq!((longer.len(), longer.held()), (2000, 2000));
        drop(longer);
        assert_eq!(pool.lock().len(), 1);
    }
}
