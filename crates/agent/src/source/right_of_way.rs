//! Who goes first on the wire that a session's VMs share.
//!
//! What one VM has queued is in front of what another sends after it. A guest that is stopped waits
//! for its last pages, so nobody else should have much in front of them: once one VM is near its
//! end all of the session keep their windows narrow, and while one is stopped the others read no
//! more from their QEMUs.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long the others stand back for a guest that was stopped: several times what QEMU plans a
/// switch-over to take. A target that hangs then costs the others no more.
const PRIORITY: Duration = Duration::from_secs(1);

/// The state of one session.
#[derive(Default)]
pub(crate) struct RightOfWay {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    near_end: usize,
    stopped: usize,
    /// When the last guest was stopped.
    since: Option<Instant>,
}

/// One VM's part in it. Gives way for good when it is dropped.
pub(crate) struct Place {
    way: Arc<RightOfWay>,
    is_near_end: AtomicBool,
    is_stopped: AtomicBool,
}

impl Place {
    pub(crate) fn new(way: Arc<RightOfWay>) -> Self {
        Self {
            way,
            is_near_end: AtomicBool::new(false),
            is_stopped: AtomicBool::new(false),
        }
    }

    /// Says whether this VM may soon be stopped.
    pub(crate) fn set_near_end(&self, near_end: bool) {
        let mut inner = self.way.lock();
        let before = self.is_near_end.swap(near_end, Ordering::Relaxed);
        count(&mut inner.near_end, before, near_end);
    }

    /// Says whether this VM is stopped and waits for its last pages.
    pub(crate) fn set_stopped(&self, stopped: bool) {
        let mut inner = self.way.lock();
        let before = self.is_stopped.swap(stopped, Ordering::Relaxed);
        count(&mut inner.stopped, before, stopped);
        if stopped && !before {
            inner.since = Some(Instant::now());
        }
    }

    /// Whether one VM of the session is near its end.
    pub(crate) fn is_any_near_end(&self) -> bool {
        self.way.lock().near_end > 0
    }

    /// Whether another VM is stopped and should have the wire for itself.
    pub(crate) fn must_yield(&self, now: Instant) -> bool {
        let inner = self.way.lock();
        inner.stopped > 0
            && !self.is_stopped.load(Ordering::Relaxed)
            && inner
                .since
                .is_some_and(|since| now.saturating_duration_since(since) < PRIORITY)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.set_near_end(false);
        self.set_stopped(false);
    }
}

impl RightOfWay {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn count(counter: &mut usize, before: bool, after: bool) {
    match (before, after) {
        (false, true) => *counter += 1,
        (true, false) => *counter -= 1,
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two() -> (Place, Place) {
        let way = Arc::new(RightOfWay::default());
        (Place::new(Arc::clone(&way)), Place::new(way))
    }

    #[test]
    fn others_yield_to_a_stopped_guest_and_not_for_ever() {
        let (one, other) = two();
        one.set_stopped(true);
        one.set_stopped(true);
        let now = Instant::now();
        assert!(other.must_yield(now));
        assert!(!one.must_yield(now));
        assert!(!other.must_yield(now + PRIORITY));
        one.set_stopped(false);
        assert!(!other.must_yield(now));
    }

    #[test]
    fn two_stopped_guests_do_not_wait_for_each_other() {
        let (one, other) = two();
        one.set_stopped(true);
        other.set_stopped(true);
        let now = Instant::now();
        assert!(!one.must_yield(now) && !other.must_yield(now));
    }

    #[test]
    fn a_vm_that_is_gone_holds_up_nobody() {
        let (one, other) = two();
        one.set_stopped(true);
        one.set_near_end(true);
        assert!(other.is_any_near_end());
        drop(one);
        assert!(!other.is_any_near_end());
        assert!(!other.must_yield(Instant::now()));
    }
}
