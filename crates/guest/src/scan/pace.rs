//! How fast a scan may go, how far it is, and its end before time.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use page::PAGE_SIZE;

use super::{Effort, ScanError};

/// A pause is cut into pieces of this length, after which a wish to end it is heard.
const PAUSE_PIECE: Duration = Duration::from_millis(50);

/// A scan that was kept from running (it has idle priority) does not catch up on more than this,
/// or it would break its bounds as soon as processors are free.
const CATCH_UP_MAX: Duration = Duration::from_millis(100);

/// How often a thread of idle priority looks whether it runs at all.
const LOOK: Duration = Duration::from_millis(500);

/// It is starved if it got less than this part of the time in which it wanted a processor.
const STARVED_PART: u32 = 20;

/// What a scan may take, besides running at idle priority.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Percent of one processor, 1 to 100.
    pub cpu_percent: u8,
    /// Bytes of guest memory that are read in a second.
    pub read_bytes_per_s: u64,
}

impl Default for Bounds {
    /// Half a processor: idle priority gives way to whoever wants the processor, but not to whom
    /// shares its core or its power budget. A gigabyte a second: a twentieth of the bandwidth of
    /// one memory channel, which no priority shares out.
    fn default() -> Self {
        Self {
            cpu_percent: 50,
            read_bytes_per_s: 1_000_000_000,
        }
    }
}

/// How far a scan is; read from other threads.
#[derive(Debug, Default)]
pub struct ScanProgress {
    pages: AtomicU64,
    read: AtomicU64,
}

impl ScanProgress {
    /// Pages looked at.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages.load(Ordering::Relaxed)
    }

    /// Pages whose bytes were read.
    #[must_use]
    pub fn read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }
}

/// Holds a thread within its [`Bounds`].
#[derive(Debug)]
pub struct Pace<'a> {
    bounds: Bounds,
    cancelled: &'a AtomicBool,
    progress: &'a ScanProgress,
    since: Instant,
    cpu_before: Duration,
    read_bytes: u64,
    idle: Option<Idle>,
}

/// What a thread of idle priority got since it last looked.
#[derive(Debug)]
struct Idle {
    since: Instant,
    cpu_before: Duration,
    slept: Duration,
}

impl Idle {
    fn now(cpu: Duration) -> Self {
        Self {
            since: Instant::now(),
            cpu_before: cpu,
            slept: Duration::ZERO,
        }
    }
}

impl<'a> Pace<'a> {
    /// For the calling thread, from now on.
    #[must_use]
    pub fn new(bounds: Bounds, cancelled: &'a AtomicBool, progress: &'a ScanProgress) -> Self {
        Self {
            bounds,
            cancelled,
            progress,
            since: Instant::now(),
            cpu_before: sys::thread_cpu_time(),
            read_bytes: 0,
            idle: None,
        }
    }

    /// The calling thread has idle priority: should it hardly ever run, because others want all
    /// processors all the time, it gets low priority. Otherwise a migration would never begin on
    /// a host that is full of computing guests.
    #[must_use]
    pub fn of_idle_priority(mut self) -> Self {
        self.idle = Some(Idle::now(self.cpu_before));
        self
    }

    /// Tells what was done; waits until it is due.
    ///
    /// # Errors
    /// If told to end.
    pub fn after(&mut self, pages: u64, effort: Effort) -> Result<(), ScanError> {
        self.progress.pages.fetch_add(pages, Ordering::Relaxed);
        self.progress.read.fetch_add(effort.read, Ordering::Relaxed);
        self.spent(effort.read * PAGE_SIZE as u64)
    }

    /// Tells that so many bytes were read; waits until that is due.
    ///
    /// # Errors
    /// If told to end.
    pub fn spent(&mut self, read_bytes: u64) -> Result<(), ScanError> {
        self.read_bytes = self.read_bytes.saturating_add(read_bytes);
        let now = sys::thread_cpu_time();
        self.rise_if_starved(now);
        let cpu = now.saturating_sub(self.cpu_before);
        let due = due(self.bounds, cpu, self.read_bytes);
        loop {
            if self.cancelled.load(Ordering::Relaxed) {
                return Err(ScanError::Cancelled);
            }
            let left = due.saturating_sub(self.since.elapsed());
            if left.is_zero() {
                break;
            }
            let piece = left.min(PAUSE_PIECE);
            thread::sleep(piece);
            if let Some(idle) = &mut self.idle {
                idle.slept += piece;
            }
        }
        let behind = self.since.elapsed().saturating_sub(due);
        if let Some(late) = behind.checked_sub(CATCH_UP_MAX) {
            self.since += late;
        }
        Ok(())
    }

    fn rise_if_starved(&mut self, cpu: Duration) {
        let Some(idle) = &self.idle else { return };
        let elapsed = idle.since.elapsed();
        if elapsed < LOOK {
            return;
        }
        let (got, slept) = (cpu.saturating_sub(idle.cpu_before), idle.slept);
        self.idle = Some(Idle::now(cpu));
        if is_starved(got, elapsed.saturating_sub(slept)) {
            self.idle = None;
            match sys::set_low_priority() {
                Ok(()) => tracing::info!("all processors are busy: hashing at low priority"),
                Err(error) => tracing::warn!(
                    "all processors are busy, and hashing stays at idle priority: {error}"
                ),
            }
        }
    }
}

/// Whether a thread is starved that got a processor for so long of the time it wanted one.
fn is_starved(got: Duration, wanted: Duration) -> bool {
    got * STARVED_PART < wanted
}

/// How long work may take at least, that took so much processor time and read so many bytes.
fn due(bounds: Bounds, cpu: Duration, read_bytes: u64) -> Duration {
    let by_cpu = cpu * 100 / u32::from(bounds.cpu_percent.clamp(1, 100));
    let nanos = u128::from(read_bytes) * 1_000_000_000 / u128::from(bounds.read_bytes_per_s.max(1));
    by_cpu.max(Duration::from_nanos(
        u64::try_from(nanos).unwrap_or(u64::MAX),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stricter_bound_counts() {
        let bounds = Bounds {
            cpu_percent: 25,
            read_bytes_per_s: 1 << 20,
        };
        let second = Duration::from_secs(1);
        assert_eq!(due(bounds, second, 1 << 20), 4 * second);
        assert_eq!(due(bounds, second, 8 << 20), 8 * second);
    }

    #[test]
    fn a_thread_is_held_to_its_read_rate_and_to_its_share_of_a_processor() {
        let (cancelled, progress) = (AtomicBool::new(false), ScanProgress::default());
        let bounds = |cpu_percent, read_bytes_per_s| Bounds {
            cpu_percent,
            read_bytes_per_s,
        };
        let begin = Instant::now();
        let mut pace = Pace::new(bounds(100, 1 << 20), &cancelled, &progress);
        pace.spent(1 << 17).unwrap();
        assert!(begin.elapsed() >= Duration::from_millis(124));

        let (begin, cpu) = (Instant::now(), sys::thread_cpu_time());
        let mut pace = Pace::new(bounds(20, u64::MAX), &cancelled, &progress);
        while sys::thread_cpu_time() - cpu < Duration::from_millis(20) {}
        pace.spent(0).unwrap();
        assert!(begin.elapsed() >= Duration::from_millis(100));
    }

    #[test]
    fn a_thread_that_sleeps_is_not_starved_and_one_that_waits_is() {
        let ms = Duration::from_millis;
        assert!(is_starved(ms(5), ms(500)));
        assert!(!is_starved(ms(5), ms(50)));
        assert!(!is_starved(ms(30), ms(500)));
        assert!(!is_starved(Duration::ZERO, Duration::ZERO));
    }

    #[test]
    fn a_thread_that_hardly_ran_is_raised_once() {
        let (cancelled, progress) = (AtomicBool::new(false), ScanProgress::default());
        let mut pace = Pace::new(Bounds::default(), &cancelled, &progress).of_idle_priority();
        pace.spent(0).unwrap();
        assert!(pace.idle.is_some());
        // What a thread sees that got no processor: time has passed, and it has not run.
        pace.idle = Some(Idle {
            since: Instant::now().checked_sub(2 * LOOK).unwrap(),
            cpu_before: sys::thread_cpu_time(),
            slept: Duration::ZERO,
        });
        pace.spent(0).unwrap();
        assert!(pace.idle.is_none());
    }

    #[test]
    fn a_pause_ends_when_the_scan_is_cancelled() {
        let (cancelled, progress) = (AtomicBool::new(false), ScanProgress::default());
        let bounds = Bounds {
            cpu_percent: 100,
            read_bytes_per_s: 1,
        };
        let begin = Instant::now();
        thread::scope(|scope| {
            let scan = scope.spawn(|| Pace::new(bounds, &cancelled, &progress).spent(3600));
            thread::sleep(Duration::from_millis(20));
            cancelled.store(true, Ordering::Relaxed);
            assert!(matches!(scan.join().unwrap(), Err(ScanError::Cancelled)));
        });
        assert!(begin.elapsed() < Duration::from_secs(5));
    }
}
