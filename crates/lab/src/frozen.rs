//! A guest's memory as it stood still at the source, against what it is at the target after the guest
//! has run there.
//!
//! A guest that runs writes, so its memory is not what it was. But what it writes into its stamped
//! pages says that it did: each stamp has a number that goes up. So a stamped page is as it was, byte by
//! byte, or it is the same page with a later stamp, whole. Anything else has come wrong: an older
//! stamp, another page's, a part of one, zeros.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use lab_init::stamp::{self, PAGE, Stamp};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::bench::Bench;
use crate::guest::Vm;
use crate::memory::GuestMemory;
use crate::scenario::Scenario;

/// How long guests may take to go once through all of their pages.
const ROUND_PATIENCE: Duration = Duration::from_secs(120);
/// A guest that is stopped may be in the middle of writing a page. So what is wrong is looked at again
/// after it has run on for a moment.
const ATTEMPTS: u32 = 5;
const MOMENT: Duration = Duration::from_millis(30);

/// All memory of a guest that has stopped for good.
pub struct Frozen(Vec<u8>);

/// What a comparison came to; pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checked {
    /// Stamped at the source.
    pub stamped: u64,
    /// Of these, unchanged.
    pub same: u64,
    /// Of these, written since, as their stamps say.
    pub written_since: u64,
    /// Of these, neither.
    pub wrong: u64,
    /// Not stamped at the source, and unchanged.
    pub others_same: u64,
    /// Not stamped, and changed, which nobody can say anything about.
    pub others_changed: u64,
}

impl Checked {
    /// Both together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            stamped: self.stamped + other.stamped,
            same: self.same + other.same,
            written_since: self.written_since + other.written_since,
            wrong: self.wrong + other.wrong,
            others_same: self.others_same + other.others_same,
            others_changed: self.others_changed + other.others_changed,
        }
    }
}

impl Frozen {
    /// Waits until the guest has stopped at its source, and reads all of its memory.
    pub fn when_stopped(vm: &Vm, patience: Duration) -> anyhow::Result<Self> {
        let mut qmp = vm.qmp(&vm.source)?;
        let memory = GuestMemory::of(&mut qmp)?;
        let deadline = Instant::now() + patience;
        loop {
            let event = qmp.next_event(deadline)?;
            let event = event.with_context(|| format!("{} did not stop at its source", vm.name))?;
            if event.name == "STOP" {
                break;
            }
        }
        let mut bytes = Vec::new();
        memory
            .for_each_page(|page| {
                bytes.extend_from_slice(page);
                Ok(())
            })
            .with_context(|| format!("reading all that {} had at its source", vm.name))?;
        Ok(Self(bytes))
    }

    fn pages(&self) -> impl Iterator<Item = &[u8; PAGE]> {
        self.0.as_chunks::<PAGE>().0.iter()
    }

    /// Compares with what is there now; `owners` have stamped pages. Returns the pages that are wrong, too.
    fn against(&self, now: &[u8], owners: &[u64]) -> (Checked, Vec<usize>) {
        let (mut checked, mut wrong) = (Checked::default(), Vec::new());
        let (now, _) = now.as_chunks::<PAGE>();
        for (at, (was, is)) in self.pages().zip(now).enumerate() {
            let stamp = stamp_of(was, owners);
            match (stamp, was == is) {
                (None, true) => checked.others_same += 1,
                (None, false) => checked.others_changed += 1,
                (Some(_), true) => checked.same += 1,
                (Some(stamp), false) if is_later(stamp, is) => checked.written_since += 1,
                (Some(_), false) => {
                    checked.wrong += 1;
                    wrong.push(at);
                }
            }
            checked.stamped += u64::from(stamp.is_some());
        }
        (checked, wrong)
    }

    /// Stops the guest at its target, compares, and lets it run on.
    fn check(&self, vm: &Vm, owners: &[u64]) -> anyhow::Result<Checked> {
        let mut qmp = vm.qmp(&vm.target)?;
        let memory = GuestMemory::of(&mut qmp)?;
        let mut read = || -> anyhow::Result<Vec<u8>> {
            qmp.execute("stop", json!({}))?;
            let mut bytes = Vec::with_capacity(self.0.len());
            memory.for_each_page(|page| {
                bytes.extend_from_slice(page);
                Ok(())
            })?;
            qmp.execute("cont", json!({}))?;
            Ok(bytes)
        };
        let now = read()?;
        ensure!(
            now.len() == self.0.len(),
            "{} has another size at its target",
            vm.name
        );
        let (mut checked, mut wrong) = self.against(&now, owners);
        for _ in 0..ATTEMPTS {
            if wrong.is_empty() {
                break;
            }
            thread::sleep(MOMENT);
            let now = read()?;
            let (now, _) = now.as_chunks::<PAGE>();
            let (was, _) = self.0.as_chunks::<PAGE>();
            wrong.retain(|&at| {
                was[at] != now[at]
                    && !stamp_of(&was[at], owners).is_some_and(|stamp| is_later(stamp, &now[at]))
            });
        }
        // What was half written is written.
        checked.written_since += checked.wrong - wrong.len() as u64;
        checked.wrong = wrong.len() as u64;
        Ok(checked)
    }
}

fn stamp_of(page: &[u8; PAGE], owners: &[u64]) -> Option<Stamp> {
    Stamp::of(page).filter(|stamp| owners.contains(&stamp.owner))
}

fn is_later(stamp: Stamp, page: &[u8; PAGE]) -> bool {
    Stamp::of(page).is_some_and(|now| {
        (now.owner, now.index) == (stamp.owner, stamp.index) && now.generation > stamp.generation
    })
}

/// Waits until every guest that goes through its pages in rounds has looked at each of them since now.
pub fn wait_for_rounds(bench: &Bench<'_>) -> anyhow::Result<()> {
    if !goes_in_rounds(bench.scenario) {
        return Ok(());
    }
    for vm in &bench.vms {
        let rounds = |beats: &[crate::observer::Beat]| beats.last().map_or(0, |beat| beat.rounds);
        let now = rounds(&bench.observer.track(&vm.name).0);
        // The round under way, and all of the next.
        bench
            .observer
            .wait_for(&vm.name, ROUND_PATIENCE, |beat| beat.rounds >= now + 2)
            .context("waiting until it has looked at all of its pages again")?;
    }
    Ok(())
}

fn goes_in_rounds(scenario: &Scenario) -> bool {
    matches!(scenario.vm.mode.as_str(), "stress" | "churn")
}

/// Pages that a guest of the scenario has stamped and keeps.
fn stamped_pages(scenario: &Scenario) -> u64 {
    let vm = &scenario.vm;
    let kept = if vm.mode == "stress" { vm.dirty_mb } else { 0 };
    u64::from(vm.stamp_mb + vm.touch_mb + kept) * (1 << 20) / PAGE as u64
}

/// Compares what each guest had at its source with what it has now.
pub fn check_all(bench: &Bench<'_>, frozen: &[(&Vm, Frozen)]) -> anyhow::Result<Checked> {
    let mut all = Checked::default();
    for (vm, frozen) in frozen {
        let owners = [
            stamp::owner(&vm.name, "stamp"),
            stamp::owner(&vm.name, "touch"),
            stamp::owner(&vm.name, stamp::STRESS),
            stamp::owner(stamp::EVERYBODY, stamp::STRESS),
        ];
        let checked = frozen.check(vm, &owners)?;
        let expected = stamped_pages(bench.scenario);
        // A page of each area may have been half written when the guest stopped.
        ensure!(
            expected > 0 && checked.stamped + 4 >= expected,
            "{} had {} stamped pages at its source, and should have {expected}",
            vm.name,
            checked.stamped
        );
        all = all.and(checked);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lab_init::stamp::Page;

    fn page(index: u64, generation: u64) -> Vec<u8> {
        let mut page = Page::ZERO;
        let stamp = Stamp {
            owner: 5,
            index,
            generation,
        };
        stamp.write(&mut page);
        page.0.to_vec()
    }

    fn against(now: &[Vec<u8>]) -> (Checked, Vec<usize>) {
        let was = [page(0, 3), page(1, 3), vec![0; PAGE], vec![9; PAGE]];
        Frozen(was.concat()).against(&now.concat(), &[5])
    }

    #[test]
    fn pages_are_as_they_were_or_say_that_they_were_written() {
        let now = [page(0, 3), page(1, 4), vec![0; PAGE], vec![8; PAGE]];
        let expected = Checked {
            stamped: 2,
            same: 1,
            written_since: 1,
            wrong: 0,
            others_same: 1,
            others_changed: 1,
        };
        assert_eq!(against(&now), (expected, Vec::new()));
    }

    #[test]
    fn stale_misplaced_torn_empty_and_foreign_pages_are_wrong() {
        let mut torn = page(1, 4);
        torn[..1000].copy_from_slice(&page(1, 5)[..1000]);
        let mut quiet = page(1, 3);
        quiet[2000] ^= 1;
        for bad in [page(1, 2), page(0, 9), torn, quiet, vec![0; PAGE]] {
            let now = [page(0, 3), bad, vec![0; PAGE], vec![9; PAGE]];
            let (checked, wrong) = against(&now);
            assert_eq!((checked.wrong, wrong), (1, vec![1]));
        }
    }
}
