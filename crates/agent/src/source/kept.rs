//! Connections that those who use them share, each made once.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// What is made for a key, and lives as long as somebody uses it. To make one takes seconds if the other side is silent: those
/// who want another one do not wait for that.
pub(crate) struct Kept<K, V> {
    slots: Mutex<HashMap<K, Arc<Mutex<Weak<V>>>>>,
}

impl<K, V> Default for Kept<K, V> {
    fn default() -> Self {
        Self {
            slots: Mutex::default(),
        }
    }
}

impl<K: Clone + Eq + Hash, V> Kept<K, V> {
    /// The one for `key` if it is of use, or a new one.
    pub(crate) fn get<E>(
        &self,
        key: &K,
        is_of_use: impl FnOnce(&V) -> bool,
        make: impl FnOnce() -> Result<Arc<V>, E>,
    ) -> Result<Arc<V>, E> {
        let slot = self.slot(key);
        let mut slot = lock(&slot);
        if let Some(value) = slot.upgrade().filter(|value| is_of_use(value)) {
            return Ok(value);
        }
        let value = make()?;
        *slot = Arc::downgrade(&value);
        Ok(value)
    }

    fn slot(&self, key: &K) -> Arc<Mutex<Weak<V>>> {
        let mut slots = lock(&self.slots);
        // One that somebody else holds is being filled.
        slots.retain(|_, slot| Arc::strong_count(slot) > 1 || lock(slot).strong_count() > 0);
        Arc::clone(slots.entry(key.clone()).or_default())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn one_is_made_for_a_key_and_again_when_it_is_of_no_use_or_gone() {
        let kept = Kept::<&str, u32>::default();
        let get = |of_use, value| {
            kept.get(&"a", |_| of_use, || Ok::<_, ()>(Arc::new(value)))
                .unwrap()
        };
        let first = get(true, 1);
        assert_eq!((*get(true, 2), *get(false, 3)), (1, 3));
        drop(first);
        assert_eq!(*get(true, 4), 4);
        assert!(kept.get(&"b", |_| true, || Err(())).is_err());
        assert_eq!(*get(true, 5), 5);
        assert!(lock(&kept.slots).len() <= 2);
    }

    #[test]
    fn who_wants_one_does_not_wait_for_another_that_is_being_made() {
        let kept = Arc::new(Kept::<u32, u32>::default());
        let (begun, has_begun) = channel();
        let (go_on, goes_on) = channel::<()>();
        let slow = std::thread::spawn({
            let kept = Arc::clone(&kept);
            move || {
                let make = || {
                    begun.send(()).unwrap();
                    goes_on.recv().unwrap();
                    Ok::<_, ()>(Arc::new(1))
                };
                kept.get(&1, |_| true, make).map(|value| *value)
            }
        });
        has_begun.recv().unwrap();
        // Would wait for ever.
        let other = kept.get(&2, |_| true, || Ok::<_, ()>(Arc::new(2)));
        assert_eq!(other.map(|value| *value), Ok(2));
        go_on.send(()).unwrap();
        assert_eq!(slow.join().unwrap(), Ok(1));
    }
}
