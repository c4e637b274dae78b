//! Has the kernel merge identical pages (KSM) faster while VMs arrive, if the configuration says so: what
//! could not be mapped as shared, or was written meanwhile, is merged in seconds instead of minutes.
//!
//! KSM is one for the whole host. Its settings are written down before they are changed, and put back when
//! the pages that came last have been seen often enough; if the agent is killed before, at its next
//! start. A setting that somebody else has changed meanwhile stays as it is.
//!
//! ```text
//!  Idle ─a VM arrives─► Boosted ─none arrives─► Ending ─enough scans, or time─► Idle
//!                          ▲                      │
//!                          └──────a VM arrives────┘
//! ```

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use anyhow::Context;

use super::pressure::Pressure;
use super::session::lock;

/// Where the kernel has it.
const DIR: &str = "/sys/kernel/mm/ksm";

/// File in the agent's directory of state with the settings that were found.
const FOUND: &str = "ksm-found";

/// What is set, in this order; put back in the opposite one. The advisor is first because it owns
/// `pages_to_scan` while it is on; kernels before 6.8 have none. 4096 pages every 20 ms are 800 MB a
/// second, which is what one core manages: it takes a core, and no more.
const SETTINGS: [(&str, &str); 4] = [
    ("advisor_mode", "none"),
    ("pages_to_scan", "4096"),
    ("sleep_millisecs", "20"),
    ("run", "1"),
];

/// A page is merged in the second scan that finds it unchanged; the scan under way when the last VM has
/// arrived may be past it.
const SCANS: u64 = 3;

/// Longest time for them: a host with a terabyte of guests takes 20 minutes for a scan, and a core
/// for an hour is not what anybody means.
const ENDING_MAX: Duration = Duration::from_secs(120);

/// How often it is looked.
const LOOK: Duration = Duration::from_millis(500);

/// Drives KSM while VMs arrive.
pub(crate) struct KsmBoost {
    /// The kernel's files.
    dir: PathBuf,
    /// What was found, while it is changed.
    found: PathBuf,
    state: Mutex<State>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Idle,
    Boosted,
    /// Since when, and how many scans were complete then.
    Ending(Instant, u64),
    /// It cannot be done here, which was said.
    Refused,
}

/// Puts back what an earlier process has changed and could not put back. Not only where KSM is to be
/// driven still: the configuration may have changed.
pub(crate) fn restore_leftover(state_dir: &Path) {
    restore(Path::new(DIR), &state_dir.join(FOUND));
}

impl KsmBoost {
    /// With the thread that looks for VMs that arrive.
    pub(crate) fn start(state_dir: &Path, pressure: &Arc<Pressure>) -> io::Result<Arc<Self>> {
        let boost = Arc::new(Self::at(Path::new(DIR), state_dir));
        let (weak, pressure) = (Arc::downgrade(&boost), Arc::clone(pressure));
        std::thread::Builder::new()
            .name("gw-ksm".into())
            .spawn(move || look(&weak, &pressure))?;
        Ok(boost)
    }

    fn at(dir: &Path, state_dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            found: state_dir.join(FOUND),
            state: Mutex::new(State::Idle),
        }
    }

    /// What to do now that so many VMs arrive.
    fn look(&self, arriving: usize, now: Instant) {
        let mut state = lock(&self.state);
        let scans = || number(&self.dir, "full_scans").unwrap_or(0);
        *state = match *state {
            State::Idle if arriving > 0 => match self.begin() {
                Ok(()) => State::Boosted,
                Err(error) => {
                    tracing::warn!("KSM is not driven harder here: {error:#}");
                    State::Refused
                }
            },
            State::Boosted if arriving == 0 => State::Ending(now, scans()),
            State::Ending(..) if arriving > 0 => State::Boosted,
            State::Ending(since, before)
                if scans() >= before.saturating_add(SCANS)
                    || now.duration_since(since) >= ENDING_MAX =>
            {
                restore(&self.dir, &self.found);
                State::Idle
            }
            as_it_was => as_it_was,
        };
    }

    fn begin(&self) -> anyhow::Result<()> {
        let mut found = String::new();
        let settings = || {
            SETTINGS
                .iter()
                .filter(|(name, _)| self.dir.join(name).exists())
        };
        for (name, _) in settings() {
            let value = read(&self.dir, name).with_context(|| format!("reading {name}"))?;
            // Somebody has the kernel take all merged pages apart.
            anyhow::ensure!((*name, &*value) != ("run", "2"), "its `run` is 2");
            found += &format!("{name} {value}\n");
        }
        anyhow::ensure!(found.contains("run "), "this kernel has none");
        fs::write(&self.found, found)
            .with_context(|| format!("writing {}", self.found.display()))?;
        let set = settings().try_for_each(|(name, value)| fs::write(self.dir.join(name), value));
        if let Err(error) = set {
            restore(&self.dir, &self.found);
            return Err(error).context("changing its settings");
        }
        tracing::info!("KSM is driven harder while VMs arrive");
        Ok(())
    }
}

impl Drop for KsmBoost {
    fn drop(&mut self) {
        restore(&self.dir, &self.found);
    }
}

/// Puts back what `found` says, if it is there.
fn restore(dir: &Path, found: &Path) {
    let Ok(text) = fs::read_to_string(found) else {
        return;
    };
    for (name, ours) in SETTINGS.iter().rev() {
        let before = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        let is_ours = read(dir, name).is_ok_and(|now| now == *ours);
        if let Some(before) = before.filter(|_| is_ours)
            && let Err(error) = fs::write(dir.join(name), before)
        {
            tracing::error!("KSM's {name} cannot be set back to {before}: {error}");
        }
    }
    if let Err(error) = fs::remove_file(found) {
        tracing::warn!("{} cannot be removed: {error}", found.display());
    }
    tracing::info!("KSM's settings are as they were");
}

/// A value; of a choice, shown as `[none] scan-time`, the one that is chosen.
fn read(dir: &Path, name: &str) -> io::Result<String> {
    let text = fs::read_to_string(dir.join(name))?;
    let chosen = text
        .split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'));
    Ok(chosen.map_or(text.trim(), |(chosen, _)| chosen).to_owned())
}

fn number(dir: &Path, name: &str) -> Option<u64> {
    read(dir, name).ok()?.parse().ok()
}

fn look(boost: &Weak<KsmBoost>, pressure: &Pressure) {
    while let Some(boost) = boost.upgrade() {
        boost.look(pressure.count(), Instant::now());
        drop(boost);
        std::thread::sleep(LOOK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Files as the kernel has them, and a directory of state.
    fn host(run: &str) -> (tempfile::TempDir, KsmBoost) {
        let dir = tempfile::tempdir().unwrap();
        for (name, value) in [
            ("advisor_mode", "none [scan-time]\n"),
            ("pages_to_scan", "100\n"),
            ("sleep_millisecs", "200\n"),
            ("run", run),
            ("full_scans", "7\n"),
        ] {
            fs::write(dir.path().join(name), value).unwrap();
        }
        let boost = KsmBoost::at(dir.path(), dir.path());
        (dir, boost)
    }

    fn settings(dir: &tempfile::TempDir) -> [String; 4] {
        SETTINGS.map(|(name, _)| read(dir.path(), name).unwrap())
    }

    const FOUND_HERE: [&str; 4] = ["scan-time", "100", "200", "0"];
    const BOOSTED: [&str; 4] = ["none", "4096", "20", "1"];

    #[test]
    fn settings_are_back_once_what_came_last_was_scanned_three_times() {
        let (dir, boost) = host("0\n");
        let now = Instant::now();
        boost.look(0, now);
        assert_eq!(settings(&dir), FOUND_HERE);
        boost.look(2, now);
        assert_eq!(settings(&dir), BOOSTED);
        for (arriving, scans, expected) in [
            (0, 9, BOOSTED),
            (1, 20, BOOSTED),
            (0, 20, BOOSTED),
            (0, 22, BOOSTED),
            (0, 23, FOUND_HERE),
        ] {
            fs::write(dir.path().join("full_scans"), scans.to_string()).unwrap();
            boost.look(arriving, now);
            assert_eq!(settings(&dir), expected, "{scans} scans");
        }
        assert!(!boost.found.exists());
    }

    #[test]
    fn settings_are_back_after_a_while_whatever_was_scanned() {
        let (dir, boost) = host("0\n");
        let now = Instant::now();
        boost.look(1, now);
        boost.look(0, now);
        boost.look(0, now + ENDING_MAX / 2);
        assert_eq!(settings(&dir), BOOSTED);
        boost.look(0, now + ENDING_MAX);
        assert_eq!(settings(&dir), FOUND_HERE);
    }

    #[test]
    fn settings_are_back_at_the_end_and_when_an_agent_starts_after_one_that_was_killed() {
        let (dir, boost) = host("0\n");
        boost.look(1, Instant::now());
        drop(boost);
        assert_eq!(settings(&dir), FOUND_HERE);
        let (dir, boost) = host("0\n");
        boost.look(1, Instant::now());
        let found = boost.found.clone();
        std::mem::forget(boost);
        assert_eq!(settings(&dir), BOOSTED);
        restore(dir.path(), &found);
        assert_eq!(settings(&dir), FOUND_HERE);
    }

    #[test]
    fn what_somebody_else_has_set_meanwhile_stays() {
        let (dir, boost) = host("1\n");
        boost.look(1, Instant::now());
        fs::write(dir.path().join("pages_to_scan"), "50\n").unwrap();
        drop(boost);
        assert_eq!(settings(&dir), ["scan-time", "50", "200", "1"]);
    }

    #[test]
    fn nothing_is_changed_while_merged_pages_are_taken_apart_or_where_there_is_no_ksm() {
        let (dir, boost) = host("2\n");
        boost.look(1, Instant::now());
        assert_eq!(settings(&dir), ["scan-time", "100", "200", "2"]);
        let nowhere = dir.path().join("nowhere");
        let boost = KsmBoost::at(&nowhere, dir.path());
        boost.look(1, Instant::now());
        assert_eq!(*lock(&boost.state), State::Refused);
        assert!(!nowhere.exists() && !boost.found.exists());
    }
}
