//! Memory that is checked and written at random, and memory that is taken and given back.

use std::sync::Arc;
use std::time::Instant;

use lab_init::stamp::{self, Noise};

use crate::heartbeat::Health;
use crate::settings::Settings;
use crate::workload::{Area, PAGES_PER_MB, TURN, TURNS_PER_S, spawn};

/// How long what was taken is kept, in turns.
const KEPT_TURNS: usize = 30;

/// Starts a thread that visits its pages at random: half of them are the guest's own, the other half
/// have the same first content in every guest.
pub(crate) fn start(settings: &Settings, health: &Arc<Health>) -> anyhow::Result<()> {
    let pages = settings.dirty_mb * PAGES_PER_MB;
    let of = |who: &str, count| Area::new(stamp::owner(who, stamp::STRESS), count);
    let areas = [
        of(&settings.id, pages / 2),
        of(stamp::EVERYBODY, pages - pages / 2),
    ];
    let pace = (settings.dirty_rate_mb * PAGES_PER_MB / TURNS_PER_S).max(1);
    let noise = Noise::new(stamp::owner(&settings.id, "order"));
    spawn("stress", health, move |health| {
        tend(areas, pace, noise, health)
    })
}

/// Goes through all pages again and again, each time in another order. Every page is checked. Of one half
/// of them every other one is written, the other half stays what it is. Each time through counts as a
/// round.
fn tend(mut areas: [Area; 2], pace: usize, mut noise: Noise, health: &Health) {
    let split = areas[0].len();
    let mut order: Vec<usize> = (0..split + areas[1].len()).collect();
    let mut due = Instant::now();
    while !order.is_empty() {
        let began = Instant::now();
        noise.shuffle(&mut order);
        for turn in order.chunks(pace) {
            for &at in turn {
                let (area, at) = match at.checked_sub(split) {
                    None => (&mut areas[0], at),
                    Some(at) => (&mut areas[1], at),
                };
                let is_writable = at.is_multiple_of(2);
                area.visit(at, is_writable && noise.below(2) == 0, health);
            }
            due = rest(due);
        }
        health.done(began.elapsed());
    }
}

/// Waits for the next turn. A guest that was stopped does not make up for the time that it missed.
fn rest(due: Instant) -> Instant {
    let now = Instant::now();
    let due = (due + TURN).max(now);
    std::thread::sleep(due - now);
    due
}

/// Starts a thread whose memory comes from the kernel and goes back to it, so that a balloon or a report
/// of free pages finds pages that were in use, and they come back.
pub(crate) fn start_churn(settings: &Settings, health: &Arc<Health>) -> anyhow::Result<()> {
    let count = settings.dirty_mb * PAGES_PER_MB;
    let owner = stamp::owner(&settings.id, "churn");
    spawn("churn", health, move |health| churn(owner, count, health))
}

fn churn(owner: u64, count: usize, health: &Health) {
    let mut due = Instant::now();
    for round in 0u64.. {
        let began = Instant::now();
        // Another owner each time: what an earlier round has left behind is damage.
        let mut area = Area::new(owner ^ round.rotate_left(40), count);
        for _ in 0..KEPT_TURNS {
            due = rest(due);
        }
        (0..count).for_each(|at| area.visit(at, false, health));
        drop(area);
        for _ in 0..KEPT_TURNS {
            due = rest(due);
        }
        health.done(began.elapsed());
    }
}
