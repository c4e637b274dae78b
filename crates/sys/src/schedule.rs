//! When the calling thread runs, and how long it has.

use std::io;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// How nice a thread of low priority is. The kernel gives it 23 parts where a thread of normal
/// priority that wants the same processor gets 1024: 2.2 % of the processor.
const LOW: i32 = 17;

/// Gives the calling thread processors only while nothing else wants them (`SCHED_IDLE`), until it
/// asks for [`set_low_priority`].
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

/// Gives the calling thread a fiftieth of a processor that others want, and all of one that
/// nobody wants.
///
/// # Errors
/// What the kernel reports: leaving the idle class needs the right to be less nice
/// (`CAP_SYS_NICE`, or a limit `RLIMIT_NICE` that allows it).
pub fn set_low_priority() -> io::Result<()> {
    // On Linux niceness is a thread's own. It is set first, so that the thread never has normal
    // priority in between.
    rustix::process::setpriority_process(None, LOW)?;
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: as in `set_idle_priority`.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_OTHER, &raw const parameters) };
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
    fn a_thread_leaves_the_idle_class_for_low_priority_or_stays_in_it() {
        std::thread::spawn(|| {
            set_idle_priority().unwrap();
            let left = set_low_priority();
            // SAFETY: asks about the calling thread, takes no pointer.
            let class = unsafe { libc::sched_getscheduler(0) };
            match left {
                Ok(()) => {
                    assert_eq!(class, libc::SCHED_OTHER);
                    assert_eq!(rustix::process::getpriority_process(None).unwrap(), LOW);
                }
                // Without the right to.
                Err(_) => assert_eq!(class, libc::SCHED_IDLE),
            }
        })
        .join()
        .unwrap();
    }

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
