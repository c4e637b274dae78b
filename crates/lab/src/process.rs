//! What the kernel says of a process.

use std::fs;
use std::ops::Range;
use std::os::unix::net::UnixStream;

use anyhow::Context;

/// The process that listens at the other end of a socket.
pub fn peer_pid(stream: &UnixStream) -> anyhow::Result<u32> {
    let peer = rustix::net::sockopt::socket_peercred(stream).context("asking for the peer")?;
    Ok(peer.pid.as_raw_nonzero().get().unsigned_abs())
}

/// Shuts the sockets of packets in sequence down that the process has: nobody else's are of this kind
/// but the mapping library's.
pub fn shut_seqpackets(pid: u32) -> anyhow::Result<()> {
    use rustix::net::{Shutdown, SocketType, shutdown, sockopt::socket_type};
    use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
    let process = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let process = process.context("not a process id")?;
    let process = pidfd_open(process, PidfdFlags::empty()).context("opening the process")?;
    let mut shut = 0;
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).context("listing descriptors")? {
        let name = entry.context("listing descriptors")?.file_name();
        let Some(number) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let Ok(socket) = pidfd_getfd(&process, number, PidfdGetfdFlags::empty()) else {
            continue;
        };
        if socket_type(&socket).is_ok_and(|kind| kind == SocketType::SEQPACKET) {
            shutdown(&socket, Shutdown::Both).context("shutting the socket down")?;
            shut += 1;
        }
    }
    anyhow::ensure!(shut > 0, "process {pid} has no mapping library");
    Ok(())
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

/// As [`pss_bytes`], of those mappings alone that lie in a range of addresses.
#[must_use]
pub fn pss_bytes_within(pid: u32, range: Range<u64>) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?;
    Some(pss_within(&text, &range))
}

fn pss_within(smaps: &str, range: &Range<u64>) -> u64 {
    let mut inside = false;
    let mut bytes = 0;
    for line in smaps.lines() {
        if let Some(mapping) = addresses(line) {
            inside = mapping.start < range.end && range.start < mapping.end;
        } else if inside {
            bytes += kilobytes(line, "Pss:").unwrap_or(0);
        }
    }
    bytes
}

/// The addresses that a mapping's first line begins with.
fn addresses(line: &str) -> Option<Range<u64>> {
    let (start, end) = line.split_whitespace().next()?.split_once('-')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    Some(number(start)?..number(end)?)
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
    fn only_mappings_in_the_range_are_counted() {
        let smaps = "\
7f0000000000-7f0000200000 rw-p 00000000 00:00 0
Pss:                 100 kB
Pss_Dirty:            90 kB
7f0000200000-7f0000300000 rw-p 00000000 00:01 77      /memfd:pool (deleted)
Pss:                   7 kB
7f0000300000-7f0000400000 rw-p 00000000 00:00 0
Pss:                  50 kB
";
        let within = |range| pss_within(smaps, &range) / 1024;
        assert_eq!(within(0x7f00_0000_0000..0x7f00_0030_0000), 107);
        assert_eq!(within(0x7f00_0030_0000..0x7f00_0040_0000), 50);
        assert_eq!(within(0..0x7f00_0000_0000), 0);
    }

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
