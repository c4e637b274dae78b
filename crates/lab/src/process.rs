//! What the kernel says of a process.

use std::fs;
use std::os::unix::net::UnixStream;

use anyhow::Context;

/// The process that listens at the other end of a socket.
pub fn peer_pid(stream: &UnixStream) -> anyhow::Result<u32> {
    let peer = rustix::net::sockopt::socket_peercred(stream).context("asking for the peer")?;
    Ok(peer.pid.as_raw_nonzero().get().unsigned_abs())
}

/// Whether the process exists and is not a zombie.
#[must_use]
pub fn is_alive(pid: u32) -> bool {
    // After the name in parentheses, which may hold anything, comes the state.
    fields(pid).is_some_and(|fields| !matches!(fields.first().map(String::as_str), Some("Z" | "X")))
}

/// Processor time that the process has used, in user and kernel mode.
#[must_use]
pub fn processor_s(pid: u32) -> Option<f64> {
    let fields = fields(pid)?;
    // proc(5) counts from 1 and from the process id: utime is field 14, stime 15, state 3.
    let ticks = |at: usize| fields.get(at - 3)?.parse::<u64>().ok();
    let per_second = rustix::param::clock_ticks_per_second();
    Some((ticks(14)? + ticks(15)?) as f64 / per_second as f64)
}

/// The most memory that the process ever had resident.
#[must_use]
pub fn peak_memory_bytes(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    kilobytes(&status, "VmHWM:")
}

/// Memory of the process, with pages that it shares counted by its share of them.
#[must_use]
pub fn pss_bytes(pid: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    kilobytes(&text, "Pss:")
}

fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    let number = rest.trim().strip_suffix(" kB")?.trim();
    Some(number.parse::<u64>().ok()? * 1024)
}

/// The fields of `/proc/PID/stat` from the state on.
fn fields(pid: u32) -> Option<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, after_name) = text.rsplit_once(')')?;
    Some(after_name.split_whitespace().map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_alive_and_its_figures_are_plausible() {
        let pid = std::process::id();
        assert!(is_alive(pid));
        assert!(processor_s(pid).unwrap() < 3600.0);
        let (pss, peak) = (pss_bytes(pid).unwrap(), peak_memory_bytes(pid).unwrap());
        assert!(pss > 0 && pss <= peak, "{pss} {peak}");
        assert_eq!(processor_s(u32::MAX), None);
        assert!(!is_alive(u32::MAX));
    }
}
