//! Throughput over time, as a program outside the guests says it or as their heartbeats do.

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process_group};

use crate::clock::UnixMs;
use crate::net::HostAddress;
use crate::observer::Beat;
use crate::session::spawn;

/// Between the end of a program and its next start.
const PAUSE_S: f64 = 0.3;

/// Work that was done in a span of time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Segment {
    /// Its begin.
    pub from: UnixMs,
    /// Its end.
    pub to: UnixMs,
    /// How much was done, in the meter's unit.
    pub amount: f64,
}

/// What a line of a program's output says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reading {
    /// Length of the time that it is about, which has just ended; since the last reading if absent.
    pub seconds: Option<f64>,
    /// The mean rate in that time.
    pub per_s: f64,
}

/// Throughput over time.
#[derive(Clone, Debug, Default)]
pub struct Rates(Vec<Segment>);

impl Rates {
    /// From the rounds of work that a guest's heartbeats count.
    #[must_use]
    pub fn of_beats(beats: &[Beat]) -> Self {
        let segments = beats.windows(2).filter_map(|pair| {
            let [before, after] = pair else { return None };
            let done = after.rounds.checked_sub(before.rounds)?;
            Some(Segment {
                from: before.at,
                to: after.at,
                amount: done as f64,
            })
        });
        Self(segments.collect())
    }

    /// Everything of both.
    pub fn add(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// With every amount in another unit.
    #[must_use]
    pub fn times(mut self, factor: f64) -> Self {
        self.0
            .iter_mut()
            .for_each(|segment| segment.amount *= factor);
        self
    }

    /// Mean rate between two moments. What was not heard of was not done.
    #[must_use]
    pub fn per_s(&self, from: UnixMs, to: UnixMs) -> f64 {
        let length_s = to.s_since(from);
        if length_s <= 0.0 {
            return 0.0;
        }
        let within = self.0.iter().map(|segment| {
            let overlap = segment.to.0.min(to.0) - segment.from.0.max(from.0);
            let length = segment.to.ms_since(segment.from);
            if overlap <= 0.0 || length <= 0.0 {
                0.0
            } else {
                segment.amount * overlap / length
            }
        });
        // The sum of nothing is a negative zero.
        (within.sum::<f64>() / length_s).abs()
    }

    /// The rate of each second around `zero`: seconds from there, and the mean rate.
    #[must_use]
    pub fn series(&self, zero: UnixMs, (first, last): (i32, i32)) -> Vec<[f64; 2]> {
        let at = |second: i32| UnixMs(zero.0 + f64::from(second) * 1e3);
        (first..last)
            .map(|second| [f64::from(second), self.per_s(at(second), at(second + 1))])
            .collect()
    }
}

/// A program, run again whenever it ends, whose output says how much is done.
#[derive(Debug)]
pub struct Meter {
    child: Child,
    segments: Arc<Mutex<Vec<Segment>>>,
}

impl Meter {
    /// Starts `command` on a host, or outside of all. Its lines that `read` understands become readings.
    pub fn start(
        host: Option<&HostAddress>,
        command: &Command,
        read: fn(&str) -> Option<Reading>,
    ) -> anyhow::Result<Self> {
        let script = format!(r#"while :; do "$@"; sleep {PAUSE_S}; done"#);
        let mut child = match host {
            // The loop, too: whoever ends what lives in the namespace must end it all.
            Some(host) => {
                let mut enter = host.cgroup.enter(&host.namespace);
                enter.arg("sh");
                enter
            }
            None => Command::new("sh"),
        };
        child
            .args(["-c", &script, "sh"])
            .arg(command.get_program())
            .args(command.get_args())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        // One group, so that the shell and what it runs end together.
        std::os::unix::process::CommandExt::process_group(&mut child, 0);
        let mut child = spawn(&mut child).context("starting a program that measures")?;
        let output = child.stdout.take().context("it has no output")?;
        let segments = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&segments);
        std::thread::Builder::new()
            .name("meter".into())
            .spawn(move || follow(output, read, &kept))
            .context("starting a meter")?;
        Ok(Self { child, segments })
    }

    /// What it has said so far.
    #[must_use]
    pub fn rates(&self) -> Rates {
        Rates(
            self.segments
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
        )
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        if let Some(group) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            // It may have ended by itself.
            let _ = kill_process_group(group, Signal::KILL);
        }
        let _ = self.child.wait();
    }
}

/// Reads lines, which end with a newline or, where a program draws over them, with a return.
fn follow(
    mut output: impl Read,
    read: fn(&str) -> Option<Reading>,
    segments: &Mutex<Vec<Segment>>,
) {
    let mut last = UnixMs::now();
    let mut line = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(length) = output.read(&mut buffer) {
        if length == 0 {
            return;
        }
        for &byte in &buffer[..length] {
            if !matches!(byte, b'\n' | b'\r') {
                line.push(byte);
                continue;
            }
            if let Some(reading) = read(&String::from_utf8_lossy(&line)) {
                let now = UnixMs::now();
                let from = reading
                    .seconds
                    .map_or(last, |seconds| UnixMs(now.0 - seconds * 1e3));
                segments
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(Segment {
                        from,
                        to: now,
                        amount: reading.per_s * now.s_since(from),
                    });
                last = now;
            }
            line.clear();
        }
    }
}

/// Reads `[  5]   0.50-1.00   sec  5.9 MBytes  99000 Kbits/sec ...`, in bits.
#[must_use]
pub fn iperf3(line: &str) -> Option<Reading> {
    // The sums at a stream's end repeat what was said.
    if line.contains("sender") || line.contains("receiver") {
        return None;
    }
    let words: Vec<&str> = line.split_whitespace().collect();
    let unit = words.iter().position(|word| *word == "Kbits/sec")?;
    let (from, to) = words.iter().find_map(|word| word.split_once('-'))?;
    let seconds = to.parse::<f64>().ok()? - from.parse::<f64>().ok()?;
    let kilobits: f64 = words.get(unit.checked_sub(1)?)?.parse().ok()?;
    (seconds > 0.0).then_some(Reading {
        seconds: Some(seconds),
        per_s: kilobits * 1e3,
    })
}

/// Reads `GET: rps=12345.0 (overall: ...) ...`.
#[must_use]
pub fn redis_benchmark(line: &str) -> Option<Reading> {
    let word = line.split_whitespace().find(|w| w.starts_with("rps="))?;
    let per_s: f64 = word.strip_prefix("rps=")?.parse().ok()?;
    per_s.is_finite().then_some(Reading {
        seconds: None,
        per_s,
    })
}

/// What is said where no node of a cluster answers.
pub const CLUSTER_SILENT: &str = "cluster_state:silent";

/// Counts the seconds, each time since the last answer, in which a node says that its cluster has
/// failed, or no node says anything.
#[must_use]
pub fn cluster_failures(line: &str) -> Option<Reading> {
    let state = line.trim_end().strip_prefix("cluster_state:")?;
    Some(Reading {
        seconds: None,
        per_s: if state == "ok" { 0.0 } else { 1.0 },
    })
}

/// A program that says nothing that counts.
#[must_use]
pub fn nothing(_line: &str) -> Option<Reading> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(segments: &[(f64, f64, f64)]) -> Rates {
        let segment = |&(from, to, amount): &(f64, f64, f64)| Segment {
            from: UnixMs(from),
            to: UnixMs(to),
            amount,
        };
        Rates(segments.iter().map(segment).collect())
    }

    #[test]
    fn a_rate_counts_what_lies_in_the_window_and_nothing_for_silence() {
        let rates = rates(&[(0.0, 1000.0, 10.0), (1000.0, 2000.0, 30.0)]);
        let near = |value: f64, expected: f64| (value - expected).abs() < 1e-9;
        assert!(near(rates.per_s(UnixMs(0.0), UnixMs(2000.0)), 20.0));
        assert!(near(rates.per_s(UnixMs(500.0), UnixMs(1500.0)), 20.0));
        assert!(near(rates.per_s(UnixMs(1000.0), UnixMs(4000.0)), 10.0));
        assert!(near(rates.per_s(UnixMs(5.0), UnixMs(5.0)), 0.0));
        let series = rates.series(UnixMs(1000.0), (-1, 2));
        assert_eq!(series, [[-1.0, 10.0], [0.0, 30.0], [1.0, 0.0]]);
    }

    #[test]
    fn programs_are_read_as_they_write() {
        let tcp = "[  5]   0.50-1.00   sec  5.88 MBytes  98500 Kbits/sec                  ";
        let udp = "[  5]   1.00-2.00   sec  1.16 MBytes  9728 Kbits/sec  0.012 ms  3/872 (0.34%)  ";
        let read = |line: &str| iperf3(line).map(|reading| (reading.seconds, reading.per_s));
        assert_eq!(read(tcp), Some((Some(0.5), 98_500_000.0)));
        assert_eq!(read(udp), Some((Some(1.0), 9_728_000.0)));
        let sum = "[  5]   0.00-9.00   sec  1.16 MBytes  9728 Kbits/sec   receiver";
        assert_eq!(read(sum), None);
        assert_eq!(read("Server listening on 5201"), None);
        let redis = "GET: rps=51234.5 (overall: 50000.0) avg_msec=14.2 (overall: 15.0)";
        assert_eq!(redis_benchmark(redis).unwrap().per_s, 51_234.5);
        assert_eq!(redis_benchmark("GET: rps=nan"), None);
        let failed = |line: &str| cluster_failures(line).map(|reading| reading.per_s);
        assert_eq!(failed("cluster_state:fail\r"), Some(1.0));
        assert_eq!(failed("cluster_state:ok\r"), Some(0.0));
        assert_eq!(failed(CLUSTER_SILENT), Some(1.0));
        assert_eq!(failed("cluster_slots_ok:16384"), None);
    }

    #[test]
    fn a_failed_cluster_counts_for_as_long_as_it_is_failed() {
        let start = UnixMs::now();
        let segments = Mutex::new(Vec::new());
        let lines = Slowly(vec![
            "cluster_state:ok\n",
            "cluster_state:fail\n",
            "cluster_state:ok\n",
        ]);
        follow(lines, cluster_failures, &segments);
        let rates = Rates(segments.into_inner().unwrap());
        let end = UnixMs::now();
        let failed_s = rates.per_s(start, end) * end.s_since(start);
        // The one pause before it was said, which on a busy machine is longer.
        let pause_s = rates.0[1].to.s_since(rates.0[1].from);
        assert!(
            pause_s >= SLOWLY.as_secs_f64() && pause_s < 60.0,
            "{pause_s}"
        );
        assert!((failed_s - pause_s).abs() < 0.01, "{failed_s} of {pause_s}");
    }

    /// A pause before each line.
    const SLOWLY: std::time::Duration = std::time::Duration::from_millis(30);

    struct Slowly(Vec<&'static str>);

    impl Read for Slowly {
        fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
            if self.0.is_empty() {
                return Ok(0);
            }
            std::thread::sleep(SLOWLY);
            let line = self.0.remove(0).as_bytes();
            into[..line.len()].copy_from_slice(line);
            Ok(line.len())
        }
    }

    #[test]
    fn a_meter_restarts_what_ends_and_ends_with_its_drop() {
        let mut command = Command::new("echo");
        command.arg("GET: rps=5.0 x");
        let meter = Meter::start(None, &command, redis_benchmark).unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while meter.segments.lock().unwrap().len() < 2 {
            assert!(std::time::Instant::now() < deadline, "it ran only once");
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}
