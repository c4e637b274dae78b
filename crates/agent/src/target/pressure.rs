//! What this host does when its memory gets scarce while VMs arrive: they come more slowly, so that the
//! kernel has time to merge, to swap and to give caches back, and a person to act, before anything fails.
//! Nothing is slowed any more once a guest is stopped.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use guest::HostMemory;
use page::ByteLen;

/// With less than this left, VMs that arrive are slowed: a second of a link of 1 Gbit/s.
const SCARCE: ByteLen = ByteLen(128 << 20);

/// How often it is looked. Reading takes some tens of microseconds.
const LOOK: Duration = Duration::from_millis(250);

/// How long each frame waits while memory is scarce: a frame has at most 256 KiB of pages, so that a
/// VM comes with 2.5 MiB/s at most. Short against the 5 s after which a stopped guest goes back.
const PAUSE: Duration = Duration::from_millis(100);

/// Whether memory is scarce here.
#[derive(Debug, Default)]
pub(crate) struct Pressure {
    is_scarce: AtomicBool,
    /// VMs that arrive. Nobody looks while there are none.
    arriving: AtomicUsize,
}

/// A VM that arrives.
#[derive(Debug)]
pub(crate) struct UnderPressure {
    pressure: Arc<Pressure>,
    said: bool,
}

impl Pressure {
    /// With the thread that looks.
    pub(crate) fn start() -> std::io::Result<Arc<Self>> {
        let pressure = Arc::new(Self::default());
        let weak = Arc::downgrade(&pressure);
        std::thread::Builder::new()
            .name("gw-memory".into())
            .spawn(move || look(&weak))?;
        Ok(pressure)
    }

    /// A VM arrives, until what this returns is dropped.
    pub(crate) fn arriving(self: &Arc<Self>) -> UnderPressure {
        self.arriving.fetch_add(1, Ordering::Relaxed);
        let pressure = Arc::clone(self);
        let said = false;
        UnderPressure { pressure, said }
    }

    /// VMs that arrive now.
    pub(super) fn count(&self) -> usize {
        self.arriving.load(Ordering::Relaxed)
    }

    fn measured(&self, left: ByteLen) {
        let is_scarce = left < SCARCE;
        if self.is_scarce.swap(is_scarce, Ordering::Relaxed) != is_scarce {
            tracing::warn!(%left, is_scarce, "memory for VMs that arrive");
        }
    }
}

impl UnderPressure {
    /// How long the next frame waits, and what a person should know the first time.
    pub(crate) fn pause(&mut self) -> Option<(Duration, Option<String>)> {
        if !self.pressure.is_scarce.load(Ordering::Relaxed) {
            return None;
        }
        let first = !std::mem::replace(&mut self.said, true);
        let note = || {
            format!(
                "memory is scarce there (less than {SCARCE} left): it comes more slowly; free memory \
                 there, or cancel"
            )
        };
        Some((PAUSE, first.then(note)))
    }
}

impl Drop for UnderPressure {
    fn drop(&mut self) {
        self.pressure.arriving.fetch_sub(1, Ordering::Relaxed);
    }
}

fn look(pressure: &Weak<Pressure>) {
    while let Some(pressure) = pressure.upgrade() {
        if pressure.arriving.load(Ordering::Relaxed) > 0 {
            pressure.measured(HostMemory::now().for_guests());
        }
        drop(pressure);
        std::thread::sleep(LOOK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vms_wait_while_memory_is_scarce_and_that_is_said_once_for_each() {
        let pressure = Arc::new(Pressure::default());
        let mut vms = [pressure.arriving(), pressure.arriving()];
        assert!(vms[0].pause().is_none());
        pressure.measured(ByteLen(SCARCE.0 - 1));
        for vm in &mut vms {
            assert!(
                vm.pause()
                    .is_some_and(|(wait, note)| wait == PAUSE && note.is_some())
            );
            assert!(vm.pause().is_some_and(|(_, note)| note.is_none()));
        }
        pressure.measured(SCARCE);
        assert!(vms[1].pause().is_none());
        drop(vms);
        assert_eq!(pressure.arriving.load(Ordering::Relaxed), 0);
    }
}
