//! The sign of life, and what it says.

use std::io::ErrorKind;
use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::settings::Settings;
use crate::touch::Touches;

/// What the workloads have found so far.
#[derive(Debug, Default)]
pub(crate) struct Health {
    /// The workload's memory is filled, and its application runs.
    pub(crate) ready: AtomicBool,
    /// All but the application is there, which waits at the [`Gate`].
    pub(crate) waits: AtomicBool,
    /// Stamped pages (and disk blocks) looked at.
    pub(crate) checked: AtomicU64,
    /// Of these, how many did not hold what was written.
    pub(crate) errors: AtomicU64,
    /// Rounds of work done so far, and how long the latest took, as one value.
    pub(crate) round: Mutex<Round>,
    /// How long touches of pages took.
    pub(crate) touches: Touches,
}

impl Health {
    /// Notes that a round of work is done, and how long it took.
    pub(crate) fn done(&self, took: Duration) {
        let mut round = self.round.lock().unwrap_or_else(PoisonError::into_inner);
        *round = Round {
            count: round.count + 1,
            took,
        };
    }
}

/// READY of a heartbeat.
fn stage(health: &Health) -> u8 {
    if health.ready.load(Ordering::Relaxed) {
        1
    } else if health.waits.load(Ordering::Relaxed) {
        2
    } else {
        0
    }
}

/// Where an application waits until the observer answers a heartbeat: a guest may be kept before it
/// has connections, which would not outlive that.
pub(crate) struct Gate(UdpSocket);

impl Gate {
    /// Returns when the observer has answered.
    pub(crate) fn pass(&self, health: &Health) -> anyhow::Result<()> {
        health.waits.store(true, Ordering::Relaxed);
        loop {
            let mut answer = [0; 8];
            match self.0.recv(&mut answer) {
                Ok(_) => return Ok(()),
                // Nobody listened yet.
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
                Err(error) => return Err(error).context("waiting for the observer"),
            }
        }
    }
}

/// How the work goes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Round {
    /// Rounds done.
    pub(crate) count: u64,
    /// Length of the latest.
    pub(crate) took: Duration,
}

/// Sends a datagram every `settings.heartbeat`, for ever.
///
/// READY is 0 while memory is filled, 2 at the [`Gate`], and 1 after it.
/// The text is `beat ID BOOT_ID SEQUENCE MONOTONIC_NS READY CHECKED ERRORS ROUNDS ROUND_NS
/// TOUCHES`, the last of which is `BUCKET:COUNT,...` or `-` (see [`Touches`]). The sequence and the
/// boot id let the observer tell one running instance from two, and a resumed guest from a
/// rebooted one.
pub(crate) fn start(settings: &Settings, health: Arc<Health>) -> anyhow::Result<Gate> {
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .context("reading the boot id")?;
    let socket = UdpSocket::bind("0.0.0.0:0").context("binding")?;
    socket
        .connect(settings.observer)
        .context("routing to the observer")?;
    let gate = Gate(socket.try_clone().context("sharing the socket")?);
    let identity = format!("beat {} {}", settings.id, boot_id.trim());
    let interval = settings.heartbeat;
    std::thread::Builder::new()
        .name("heartbeat".into())
        .spawn(move || beat_for_ever(&socket, &identity, interval, &health))
        .context("starting the thread")?;
    Ok(gate)
}

fn beat_for_ever(socket: &UdpSocket, identity: &str, interval: Duration, health: &Health) {
    // On Linux this is the thread's own priority: a busy workload must not look like downtime.
    // Without it (never seen) heartbeats are less regular, not wrong.
    let _ = rustix::process::setpriority_process(None, -20);
    let started = Instant::now();
    let mut due = started;
    for sequence in 0u64.. {
        let round = *health.round.lock().unwrap_or_else(PoisonError::into_inner);
        let text = format!(
            "{identity} {sequence} {} {} {} {} {} {} {}",
            started.elapsed().as_nanos(),
            stage(health),
            health.checked.load(Ordering::Relaxed),
            health.errors.load(Ordering::Relaxed),
            round.count,
            round.took.as_nanos(),
            health.touches,
        );
        // A lost datagram is a gap that the observer sees; nobody here could do better.
        let _ = socket.send(text.as_bytes());
        due += interval;
        let now = Instant::now();
        if due < now {
            // Late (just booted, just moved): go on from here instead of sending a burst.
            due = now;
        }
        std::thread::sleep(due - now);
    }
}
