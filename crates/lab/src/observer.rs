//! Receives the guests' heartbeats: who runs where, since when, and how long nobody heard of it.

use std::collections::HashMap;
use std::net::{SocketAddrV4, UdpSocket};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use socket2::{Domain, Protocol, Socket, Type};

use crate::clock::UnixMs;
use crate::net::{HostAddress, OBSERVER};
use crate::touch::Counts;

/// Port that heartbeats go to.
pub const PORT: u16 = 7000;
/// Longest wait in the receiving thread before it looks whether it should end.
const POLL: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

/// One heartbeat.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Beat {
    /// When the observer received it.
    pub at: UnixMs,
    /// Host whose link it came from.
    pub host: String,
    /// Random id that the guest's kernel chose when it booted.
    pub boot: String,
    /// Counts up with each heartbeat of an instance.
    pub sequence: u64,
    /// The guest has filled its memory, and its application runs.
    pub ready: bool,
    /// Its application waits for an answer.
    pub waits: bool,
    /// Stamped pages looked at so far.
    pub checked: u64,
    /// Of these, how many were damaged.
    pub errors: u64,
    /// Rounds of its work that it has done so far.
    pub rounds: u64,
    /// How long the latest of them took.
    pub round_ms: f64,
    /// How long its touches of pages took so far.
    pub touches: Counts,
}

/// All heartbeats of one VM, in the order of their arrival.
#[derive(Clone, Debug, Default)]
pub struct Track(pub Vec<Beat>);

/// What a track says of a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Life {
    /// One instance, the one that booted first, runs on this host.
    Runs {
        /// Name of the host.
        host: String,
    },
    /// Nothing was heard of it lately.
    Silent,
    /// It runs, or has run, twice.
    Twice(String),
    /// It is not the instance that was started.
    Rebooted,
}

impl Track {
    /// Whether exactly one instance has been running, and where, judged by what came after `since`.
    #[must_use]
    pub fn life(&self, since: UnixMs) -> Life {
        for pair in self.0.windows(2) {
            let [before, after] = pair else { continue };
            if before.boot != after.boot {
                return Life::Rebooted;
            }
            // One instance counts up. Two that began as one repeat each other's numbers.
            if after.sequence <= before.sequence {
                return Life::Twice(format!(
                    "heartbeat {} from {} after {} from {}",
                    after.sequence, after.host, before.sequence, before.host
                ));
            }
        }
        match self.0.last() {
            Some(beat) if beat.at >= since => Life::Runs {
                host: beat.host.clone(),
            },
            _ => Life::Silent,
        }
    }

    /// Time from the last heartbeat before `target` was heard to the first from there. It contains
    /// one interval between heartbeats even if the VM never stops.
    #[must_use]
    pub fn gap_ms(&self, target: &str) -> Option<f64> {
        let first = self.0.iter().position(|beat| beat.host == target)?;
        let last = self.0.get(first.checked_sub(1)?)?;
        Some(self.0[first].at.ms_since(last.at))
    }

    /// The longest silence after `since`.
    #[must_use]
    pub fn longest_gap_ms(&self, since: UnixMs) -> Option<f64> {
        self.0
            .windows(2)
            .filter(|pair| pair[0].at >= since)
            .map(|pair| pair[1].at.ms_since(pair[0].at))
            .max_by(f64::total_cmp)
    }

    /// Whether the newest heartbeat came from `host`.
    #[must_use]
    pub fn ends_at(&self, host: &str) -> bool {
        self.0.last().is_some_and(|beat| beat.host == host)
    }

    /// First heartbeat heard from `host`.
    #[must_use]
    pub fn first_from(&self, host: &str) -> Option<&Beat> {
        self.0.iter().find(|beat| beat.host == host)
    }
}

/// The observer's receiving thread and what it has heard.
#[derive(Debug)]
pub struct Observer {
    tracks: Arc<Mutex<HashMap<String, Track>>>,
    answers: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Observer {
    /// Listens in the observer's namespace, on the link of each of `hosts`.
    pub fn start(namespace: &Path, hosts: &[HostAddress]) -> anyhow::Result<Self> {
        let tracks = Arc::new(Mutex::new(HashMap::new()));
        let [answers, stop] = [false, false].map(|is| Arc::new(AtomicBool::new(is)));
        let names: Vec<String> = hosts.iter().map(|host| host.name.clone()).collect();
        let namespace = namespace.to_owned();
        let (report, listening) = std::sync::mpsc::sync_channel(1);
        let thread = std::thread::Builder::new()
            .name("observer".into())
            .spawn({
                let tracks = Arc::clone(&tracks);
                let [answers, stop] = [&answers, &stop].map(Arc::clone);
                move || match listen(&namespace, names) {
                    Ok(links) => {
                        let _ = report.send(Ok(()));
                        receive(&links, &tracks, &answers, &stop);
                    }
                    Err(error) => {
                        let _ = report.send(Err(error));
                    }
                }
            })
            .context("starting the observer")?;
        listening.recv().context("starting the observer")??;
        Ok(Self {
            tracks,
            answers,
            stop,
            thread: Some(thread),
        })
    }

    /// From here on guests whose applications wait are answered, and these start.
    pub fn answer(&self) {
        self.answers.store(true, Ordering::Relaxed);
    }

    /// Everything heard of `vm` so far.
    #[must_use]
    pub fn track(&self, vm: &str) -> Track {
        lock(&self.tracks).get(vm).cloned().unwrap_or_default()
    }

    /// How long the rounds of work took that `vm` began and ended after `since`, in their order.
    #[must_use]
    pub fn rounds_ms(&self, vm: &str, since: UnixMs) -> Vec<f64> {
        let tracks = lock(&self.tracks);
        let beats = tracks.get(vm).map_or(&[][..], |track| &track.0);
        rounds_ms(beats, since)
    }

    /// Waits for a heartbeat of `vm` that satisfies `wanted`; returns it.
    pub fn wait_for(
        &self,
        vm: &str,
        patience: Duration,
        wanted: impl Fn(&Beat) -> bool,
    ) -> anyhow::Result<Beat> {
        let deadline = Instant::now() + patience;
        let mut seen = 0;
        loop {
            {
                let tracks = lock(&self.tracks);
                let beats = tracks.get(vm).map_or(&[][..], |track| &track.0);
                if let Some(beat) = beats[seen..].iter().find(|beat| wanted(beat)) {
                    return Ok(beat.clone());
                }
                seen = beats.len();
            }
            if Instant::now() >= deadline {
                bail!("{vm} did not send the heartbeat waited for within {patience:?}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It panicked if this fails, which the test or run has shown already.
            let _ = thread.join();
        }
    }
}

fn rounds_ms(beats: &[Beat], since: UnixMs) -> Vec<f64> {
    let first = beats.partition_point(|beat| beat.at < since);
    let mut known = first.checked_sub(1).map_or(0, |last| beats[last].rounds);
    let mut rounds = Vec::new();
    for beat in &beats[first..] {
        // It ended before it was heard of, so that it began no later than this.
        let began_after = beat.at.0 - beat.round_ms >= since.0;
        if beat.rounds > known && began_after {
            rounds.push(beat.round_ms);
        }
        known = beat.rounds;
    }
    rounds
}

type Tracks = Mutex<HashMap<String, Track>>;

fn lock(tracks: &Tracks) -> MutexGuard<'_, HashMap<String, Track>> {
    tracks.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A socket on the link of a host.
struct Link {
    host: String,
    socket: UdpSocket,
}

/// Moves this thread into the namespace and opens the sockets there.
fn listen(namespace: &Path, hosts: Vec<String>) -> anyhow::Result<Vec<Link>> {
    let file = std::fs::File::open(namespace)
        .with_context(|| format!("opening {}", namespace.display()))?;
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
        .context("entering the observer's namespace")?;
    // The lab's own processor load must not look like a guest's downtime. Only this thread is
    // meant: on Linux a priority belongs to a thread.
    rustix::process::setpriority_process(None, -20).context("raising the observer's priority")?;
    let open = |host: String| {
        let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
        socket.set_reuse_address(true)?;
        socket.bind_device(Some(host.as_bytes()))?;
        socket.bind(&SocketAddrV4::new(OBSERVER, PORT).into())?;
        socket.set_nonblocking(true)?;
        Ok(Link {
            host,
            socket: socket.into(),
        })
    };
    hosts
        .into_iter()
        .map(open)
        .collect::<std::io::Result<_>>()
        .context("opening its sockets")
}

fn receive(links: &[Link], tracks: &Tracks, answers: &AtomicBool, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let mut waits: Vec<PollFd<'_>> = links
            .iter()
            .map(|link| PollFd::new(&link.socket, PollFlags::IN))
            .collect();
        // An interrupted or timed-out wait finds nothing to read below.
        let _ = poll(&mut waits, Some(&POLL));
        for link in links {
            let mut buffer = [0; 4096];
            while let Ok((length, from)) = link.socket.recv_from(&mut buffer) {
                if let Some((vm, beat)) = parse(&buffer[..length], &link.host) {
                    if beat.waits && answers.load(Ordering::Relaxed) {
                        // One that is lost is sent again with the next heartbeat.
                        let _ = link.socket.send_to(b"go", from);
                    }
                    lock(tracks).entry(vm).or_default().0.push(beat);
                }
            }
        }
    }
}

/// Reads `beat ID BOOT_ID SEQUENCE MONOTONIC_NS READY CHECKED ERRORS`, and `ROUNDS ROUND_NS` and
/// `TOUCHES`, which come after it.
fn parse(datagram: &[u8], host: &str) -> Option<(String, Beat)> {
    let text = std::str::from_utf8(datagram).ok()?;
    let mut words = text.split_whitespace();
    if words.next()? != "beat" {
        return None;
    }
    let vm = words.next()?.to_owned();
    let boot = words.next()?.to_owned();
    let mut number = || words.next()?.parse::<u64>().ok();
    let (sequence, _guest_clock, stage) = (number()?, number()?, number()?);
    let beat = Beat {
        at: UnixMs::now(),
        host: host.to_owned(),
        boot,
        sequence,
        ready: stage == 1,
        waits: stage == 2,
        checked: number()?,
        errors: number()?,
        rounds: number().unwrap_or(0),
        round_ms: number().unwrap_or(0) as f64 / 1e6,
        touches: words.next().and_then(Counts::parse).unwrap_or_default(),
    };
    Some((vm, beat))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn beat(at: f64, host: &str, sequence: u64) -> Beat {
        let (boot, host) = ("b".to_owned(), host.to_owned());
        Beat {
            at: UnixMs(at),
            host,
            boot,
            sequence,
            ready: true,
            waits: false,
            ..Beat::default()
        }
    }

    #[test]
    fn only_rounds_that_lie_after_the_moment_count() {
        let beats: Vec<Beat> = [
            (0.0, 4, 90.0),
            (100.0, 5, 80.0),
            (150.0, 5, 80.0),
            (200.0, 6, 99.0),
            (260.0, 7, 60.0),
            (270.0, 7, 60.0),
        ]
        .into_iter()
        .map(|(at, rounds, round_ms)| Beat {
            rounds,
            round_ms,
            ..beat(at, "s1", 0)
        })
        .collect();
        assert_eq!(rounds_ms(&beats, UnixMs(50.0)), [99.0, 60.0]);
        assert_eq!(rounds_ms(&beats, UnixMs(120.0)), [60.0]);
        assert_eq!(rounds_ms(&beats, UnixMs(0.0)), [80.0, 99.0, 60.0]);
        assert!(rounds_ms(&[], UnixMs(0.0)).is_empty());
    }

    #[test]
    fn a_clean_move_is_one_instance_and_its_gap_is_the_downtime() {
        let track = Track(vec![
            beat(0.0, "s1", 1),
            beat(10.0, "s1", 2),
            beat(130.0, "t1", 3),
            beat(140.0, "t1", 4),
        ]);
        assert_eq!(track.life(UnixMs(135.0)), Life::Runs { host: "t1".into() });
        assert_eq!(track.gap_ms("t1"), Some(120.0));
        assert_eq!(track.longest_gap_ms(UnixMs(0.0)), Some(120.0));
        assert_eq!(track.first_from("t1").unwrap().sequence, 3);
    }

    #[test]
    fn two_instances_are_found_by_their_sequence() {
        let both = Track(vec![
            beat(0.0, "s1", 1),
            beat(10.0, "t1", 2),
            beat(11.0, "s1", 2),
        ]);
        assert!(matches!(both.life(UnixMs(0.0)), Life::Twice(_)));
    }

    #[test]
    fn a_vm_that_fell_silent_or_booted_again_is_not_running() {
        let track = Track(vec![beat(0.0, "s1", 1)]);
        assert_eq!(track.life(UnixMs(1.0)), Life::Silent);
        assert_eq!(Track::default().life(UnixMs(0.0)), Life::Silent);
        let mut rebooted = Track(vec![beat(0.0, "s1", 7), beat(1.0, "t1", 8)]);
        rebooted.0[1].boot = "c".into();
        assert_eq!(rebooted.life(UnixMs(0.0)), Life::Rebooted);
    }

    #[test]
    fn what_is_no_heartbeat_is_ignored() {
        for junk in [
            "",
            "beat",
            "beat vm b 1",
            "beat vm b x 2 1 0 0",
            "tick vm b 1 2 1 0 0",
        ] {
            assert_eq!(parse(junk.as_bytes(), "s1"), None, "{junk}");
        }
        let (vm, beat) = parse(b"beat vm1 boot 5 99 1 7 0", "s1").unwrap();
        assert_eq!((vm.as_str(), beat.sequence, beat.checked), ("vm1", 5, 7));
        let (_, beat) = parse(b"beat vm1 boot 5 99 1 7 0 3 2500000", "s1").unwrap();
        assert_eq!((beat.rounds, beat.round_ms), (3, 2.5));
        let (_, beat) = parse(b"beat vm1 boot 5 99 1 7 0 3 2500000 0:4,8:1", "s1").unwrap();
        assert_eq!(beat.touches, Counts::parse("0:4,8:1").unwrap());
    }
}
