//! What the guest does while it is moved.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Context;
use lab_init::stamp::{self, Noise, PAGE, Page, Stamp};

use crate::application;
use crate::disk;
use crate::heartbeat::{Gate, Health};
use crate::settings::{Mode, Settings};
use crate::stress;
use crate::touch::Touched;

/// An emulated processor computes 2 to the power of this many steps in the time of one write to a
/// random place.
const WRITE_LOG2: u32 = 4;
/// Pages of a megabyte.
pub(crate) const PAGES_PER_MB: usize = (1 << 20) / PAGE;
/// Length of a turn: short enough that a turn's work is not a visible burst.
pub(crate) const TURN: Duration = Duration::from_millis(10);
/// Turns in a second.
pub(crate) const TURNS_PER_S: usize = 100;
/// How fast the stamped area is checked, and how fast it is written again. Low: it is there to
/// notice damage, not to be a workload.
const STAMP_CHECK_MB_PER_S: usize = 16;
const STAMP_WRITE_MB_PER_S: usize = 1;
/// Pages that a guest which is to stay as good as idle checks in a turn, and how long that is: 2 MiB are
/// gone round while the lab listens after a move, in less than a hundredth of an emulated processor's time.
const STILL_CHECK: usize = 32;
const STILL_TURN: Duration = Duration::from_millis(100);
/// A file system that is nothing but page cache.
const CACHE_DIR: &str = "/tmp";

/// Starts the threads of the workload. `health.ready` is set when its memory is filled.
pub(crate) fn start(settings: &Settings, health: &Arc<Health>, gate: &Gate) -> anyhow::Result<()> {
    if settings.stamp_mb > 0 {
        let pace = stamp_pace(settings.stamp_still);
        let owner = stamp::owner(&settings.id, "stamp");
        let area = Area::new(owner, settings.stamp_mb * PAGES_PER_MB);
        spawn("stamp", health, move |health| area.tend(pace, health))?;
    }
    if settings.touch_mb > 0 {
        let owner = stamp::owner(&settings.id, "touch");
        let touched = Touched::new(owner, settings.touch_mb * PAGES_PER_MB);
        spawn("touch", health, move |health| touched.tend(health))?;
    }
    match settings.mode {
        Mode::Idle => {}
        Mode::Stress => stress::start(settings, health)?,
        Mode::Churn => stress::start_churn(settings, health)?,
        Mode::Dirty | Mode::Alike => {
            let pages = settings.dirty_rate_mb * PAGES_PER_MB / TURNS_PER_S;
            let pace = Pace {
                check: pages,
                write: pages,
                turn: TURN,
            };
            // Guests that write alike give KSM the same pages again and again.
            let writer = match settings.mode {
                Mode::Alike => "everybody",
                _ => &settings.id,
            };
            let owner = stamp::owner(writer, "dirty");
            let area = Area::new(owner, settings.dirty_mb * PAGES_PER_MB);
            spawn("dirty", health, move |health| area.tend(pace, health))?;
        }
        Mode::Cpu => spawn("burn", health, |_| burn())?,
        Mode::Random => hold_noise(settings),
        Mode::Cache => fill_cache(settings).context("filling the page cache")?,
        Mode::SubsetSum => {
            let steps = 1 << settings.work_log2;
            spawn("work", health, move |health| {
                rounds(health, || subset_sum(steps));
            })?;
        }
        Mode::RandomWrites => {
            let steps = 1 << settings.work_log2.saturating_sub(WRITE_LOG2);
            let mut writer = RandomWriter::new(settings.dirty_mb);
            spawn("work", health, move |health| {
                rounds(health, || writer.write(steps));
            })?;
        }
        Mode::TcpRr | Mode::Nfs | Mode::Iperf3 | Mode::Redis | Mode::RedisCluster => {
            gate.pass(health)?;
            application::start(settings, health).context("starting the application")?;
        }
    }
    disk::start(&settings.id, health).context("starting the disk's workload")?;
    health.ready.store(true, Ordering::Relaxed);
    Ok(())
}

/// Starts a thread of the workload.
pub(crate) fn spawn(
    name: &str,
    health: &Arc<Health>,
    work: impl FnOnce(&Health) + Send + 'static,
) -> anyhow::Result<()> {
    let health = Arc::clone(health);
    std::thread::Builder::new()
        .name(name.into())
        .spawn(move || work(&health))
        .with_context(|| format!("starting the thread `{name}`"))?;
    Ok(())
}

/// Pages of a turn, and its length.
#[derive(Clone, Copy)]
struct Pace {
    check: usize,
    write: usize,
    turn: Duration,
}

/// How the stamped area is gone round.
fn stamp_pace(still: bool) -> Pace {
    if still {
        return Pace {
            check: STILL_CHECK,
            write: 0,
            turn: STILL_TURN,
        };
    }
    Pace {
        check: STAMP_CHECK_MB_PER_S * PAGES_PER_MB / TURNS_PER_S,
        write: STAMP_WRITE_MB_PER_S * PAGES_PER_MB / TURNS_PER_S,
        turn: TURN,
    }
}

/// Memory whose every page is stamped.
pub(crate) struct Area {
    owner: u64,
    pages: Vec<Page>,
    generations: Vec<u64>,
}

impl Area {
    /// Of `count` pages.
    pub(crate) fn new(owner: u64, count: usize) -> Self {
        let mut area = Self {
            owner,
            pages: vec![Page::ZERO; count],
            generations: vec![0; count],
        };
        (0..count).for_each(|at| area.stamp(at).write(&mut area.pages[at]));
        area
    }

    pub(crate) fn len(&self) -> usize {
        self.pages.len()
    }

    fn stamp(&self, at: usize) -> Stamp {
        Stamp {
            owner: self.owner,
            index: at as u64,
            generation: self.generations[at],
        }
    }

    /// Goes round the area for ever, checking `pace.check` pages a turn and writing the first
    /// `pace.write` of them again.
    fn tend(mut self, pace: Pace, health: &Health) {
        let mut at = 0;
        let mut due = Instant::now();
        while !self.pages.is_empty() {
            for nth in 0..pace.check {
                self.visit(at, nth < pace.write, health);
                at = (at + 1) % self.pages.len();
            }
            due += pace.turn;
            let now = Instant::now();
            // A guest that was stopped does not make up for the time that it missed.
            due = due.max(now);
            std::thread::sleep(due - now);
        }
    }

    /// Checks a page, and writes it again if `write`.
    pub(crate) fn visit(&mut self, at: usize, write: bool, health: &Health) {
        health.checked.fetch_add(1, Ordering::Relaxed);
        let stamp = self.stamp(at);
        let intact = stamp.matches(&self.pages[at]);
        if !intact {
            health.errors.fetch_add(1, Ordering::Relaxed);
            eprintln!("lab-init: page {at} does not hold {stamp:?}");
        }
        // A damaged page is written again in any case, so that it is counted once.
        if write || !intact {
            self.generations[at] += 1;
            self.stamp(at).write(&mut self.pages[at]);
        }
    }
}

fn burn() {
    let mut noise = Noise::new(1);
    loop {
        std::hint::black_box(noise.next_word());
    }
}

/// Fills memory with noise and keeps it for the life of the guest.
fn hold_noise(settings: &Settings) {
    let mut noise = Noise::new(stamp::owner(&settings.id, "random"));
    let mut pages = vec![Page::ZERO; settings.dirty_mb * PAGES_PER_MB];
    for place in pages.iter_mut().flat_map(|page| page.0.chunks_exact_mut(8)) {
        place.copy_from_slice(&noise.next_word().to_le_bytes());
    }
    std::mem::forget(pages);
}

/// Puts files into the page cache: the same in every guest, as those of a distribution are.
fn fill_cache(settings: &Settings) -> anyhow::Result<()> {
    let mut noise = Noise::new(stamp::owner("every guest", "cache"));
    for nth in 0..settings.dirty_mb {
        let words = (0..(1usize << 20) / 8).map(|_| noise.next_word().to_le_bytes());
        let file: Vec<u8> = words.flatten().collect();
        let path = format!("{CACHE_DIR}/cache-{nth}");
        std::fs::write(&path, file).with_context(|| format!("writing {path}"))?;
    }
    Ok(())
}

/// Does the same work again and again, and tells how long each round took.
fn rounds(health: &Health, mut work: impl FnMut()) {
    loop {
        let started = Instant::now();
        work();
        health.done(started.elapsed());
    }
}

/// Looks at `steps` subsets of a set of numbers for those with a given sum. Each step goes to a
/// neighbouring subset, in the order of the Gray code, so that it is an addition and a comparison.
fn subset_sum(steps: u64) {
    let mut noise = Noise::new(2);
    let weights: Vec<u64> = (0..u64::BITS).map(|_| noise.next_word() >> 8).collect();
    let wanted = weights
        .iter()
        .take(8)
        .fold(0, |sum: u64, weight| sum ^ weight);
    let (mut chosen, mut sum, mut hits) = (0u64, 0u64, 0u64);
    for step in 1..=steps {
        let nth = step.trailing_zeros();
        chosen ^= 1 << nth;
        let weight = weights[nth as usize];
        sum = if chosen >> nth & 1 == 1 {
            sum.wrapping_add(weight)
        } else {
            sum.wrapping_sub(weight)
        };
        hits += u64::from(sum == wanted);
    }
    std::hint::black_box(hits);
}

/// An area that is written at random.
struct RandomWriter {
    words: Vec<u64>,
    noise: Noise,
}

impl RandomWriter {
    fn new(size_mb: usize) -> Self {
        Self {
            // At least a word, so that there is a place to write to.
            words: vec![1; (size_mb << 20).max(8) / 8],
            noise: Noise::new(3),
        }
    }

    fn write(&mut self, steps: u64) {
        let places = self.words.len() as u64;
        for _ in 0..steps {
            let word = self.noise.next_word();
            // Less than the number of places, which is a `usize`.
            let at = usize::try_from(word % places).unwrap_or(0);
            self.words[at] = word;
        }
        std::hint::black_box(&mut self.words);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_is_older_than_it_should_be_is_an_error() {
        let health = Health::default();
        let errors = || health.errors.load(Ordering::Relaxed);
        let mut area = Area::new(stamp::owner("vm1", "stress"), 2);
        let old = area.pages[1].clone();
        area.visit(1, true, &health);
        area.visit(1, false, &health);
        assert_eq!(errors(), 0);
        area.pages[1] = old;
        area.visit(1, false, &health);
        area.visit(1, false, &health);
        assert_eq!(errors(), 1, "it is counted once");
        assert_eq!(area.generations, [0, 2]);
    }

    #[test]
    fn a_still_guest_checks_two_megabytes_in_two_seconds_and_writes_none() {
        let pace = stamp_pace(true);
        assert_eq!(pace.write, 0);
        let turns = (2 * PAGES_PER_MB).div_ceil(pace.check);
        let round = pace.turn * u32::try_from(turns).unwrap();
        assert!(round <= Duration::from_secs(2), "{round:?}");
        assert!(stamp_pace(false).write > 0);
    }
}
