//! When the calling thread runs, and how long it has.

use std::io;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Gives the calling thread processors only while nothing else wants them (`SCHED_IDLE`), for
/// the rest of its life: leaving that class again needs a right that it may not have.
///
/// # Errors
/// What the kernel reports.
pub fn set_idle_priority() -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the kernel reads one `sched_param`, which lives through the call; 0 names the
    // calling thread. rustix has no wrapper.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const parameters) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Processor time that the calling thread has used since it began.
#[must_use]
pub fn thread_cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    // The clock starts at zero and only grows.
    Duration::try_from(time).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_thread_is_in_the_idle_class_and_its_work_is_counted() {
        std::thread::spawn(|| {
            set_idle_priority().unwrap();
            // SAFETY: asks about the calling thread, takes no pointer.
            let class = unsafe { libc::sched_getscheduler(0) };
            assert_eq!(class, libc::SCHED_IDLE);
            let before = thread_cpu_time();
            let mut sum = 0_u64;
            while thread_cpu_time() - before < Duration::from_millis(5) {
                sum = std::hint::black_box(sum + 1);
            }
            assert!(sum > 0);
        })
        .join()
        .unwrap();
    }
}
