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
    /// of the same session, or zeros.
    pub(crate) fn take(self: &Arc<Self>, len: usize) -> Buffer {
        let mut bytes = if len <= self.size {
            self.lock().pop()
        } else {
            None
        }
        .unwrap_or_else(|| vec![0; len.max(self.size)]);
        if bytes.len() < len {
            bytes.resize(len, 0);
        }
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
