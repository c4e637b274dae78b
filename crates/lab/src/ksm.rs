//! KSM, the kernel's merging of identical pages, while the lab needs it.
//!
//! It is one for the whole machine: other processes' pages are merged too, and its settings are the
//! machine's. So what was found is written down in the session's directory before anything is
//! changed, and put back when the session clears or removes that directory: at the end of a run, on
//! a signal, or by a later session that finds the leftovers of a killed one.
//!
//! It runs before a migration only. Merged pages stay merged when it is stopped (`run` = 0), and
//! what arrives at the target is not merged by it: there, sharing is the technique's doing.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use crate::session::{self, Session};
use crate::shell::say;

const DIR: &str = "/sys/kernel/mm/ksm";
/// File in a session's directory with the settings that were found.
const FOUND: &str = "ksm-found";
/// What is changed, in the order of changing; put back in the opposite order. The advisor comes
/// first because it owns `pages_to_scan` while it is on. Older kernels lack some.
const SETTINGS: &[(&str, &str)] = &[
    ("advisor_mode", "none"),
    ("smart_scan", "0"),
    // With the pause below as much as one core can do.
    ("pages_to_scan", "20000"),
    ("sleep_millisecs", "10"),
    ("run", "1"),
];
/// Pages in each of those intervals while guests rest: 8 guests of 256 MB are looked at every five
/// seconds, at a tenth of a core.
const PAGES_AT_REST: &str = "1000";
/// A page is merged in the second scan that finds it unchanged at the earliest.
const SCANS_MIN: u64 = 4;
/// Merging has come to its end when a scan adds less than this part.
const GROWTH_MAX: f64 = 0.005;
const LOOK: Duration = Duration::from_millis(200);
/// 8 guests of 256 MB were seen to need 20 s; a machine that also compiles needs longer.
const PATIENCE: Duration = Duration::from_secs(600);

/// What merging came to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Merged {
    /// How long it took.
    pub seconds: f64,
    /// Pages of the given processes that are merged with others; of all processes where the kernel
    /// does not tell them apart.
    pub pages: u64,
    /// Distinct merged pages of the machine.
    pub shared: u64,
}

/// Merges the memory of the processes `pids` until nothing more comes of it; then stops, unless it
/// `goes_on` until the session's end.
pub fn merge(session: &Session, pids: &[u32], goes_on: bool) -> anyhow::Result<Merged> {
    ensure!(Path::new(DIR).is_dir(), "this kernel has no KSM");
    save(session)?;
    say("merging the guests' memory with KSM");
    let started = Instant::now();
    SETTINGS
        .iter()
        .filter(|(name, _)| setting(name).exists())
        .try_for_each(|(name, value)| write(name, value))?;
    let first_scan = number("full_scans")?;
    let mut last = (first_scan, 0);
    loop {
        thread::sleep(LOOK);
        let scan = number("full_scans")?;
        if scan > last.0 {
            let pages = merged_pages(pids)?;
            if scan >= first_scan + SCANS_MIN && is_stable(last.1, pages) {
                break;
            }
            last = (scan, pages);
        }
        if started.elapsed() > PATIENCE {
            bail!("KSM still merges after {PATIENCE:?}");
        }
    }
    if !goes_on {
        write("run", "0")?;
    }
    let merged = Merged {
        seconds: started.elapsed().as_secs_f64(),
        pages: merged_pages(pids)?,
        shared: number("pages_shared")?,
    };
    say(&format!(
        "KSM has merged {} pages in {:.0} s",
        merged.pages, merged.seconds
    ));
    Ok(merged)
}

/// Lets merging that goes on take less of the machine.
pub fn slow_down() -> anyhow::Result<()> {
    write("pages_to_scan", PAGES_AT_REST)
}

/// Puts back the settings that a session wrote down in its directory `dir`, if it did.
pub fn restore(dir: &Path) {
    let path = dir.join(FOUND);
    let Ok(found) = fs::read_to_string(&path) else {
        return;
    };
    for (name, value) in parse(&found).into_iter().rev() {
        if let Err(error) = write(name, value) {
            say(&format!("putting back KSM's settings: {error:#}"));
        }
    }
    // Then the directory goes too; only a file that stays would be read again.
    let _ = fs::remove_file(path);
}

fn is_stable(before: u64, after: u64) -> bool {
    after.saturating_sub(before) as f64 <= before as f64 * GROWTH_MAX
}

/// Writes down what is set now, for [`restore`], unless this session has done so already.
pub fn save(session: &Session) -> anyhow::Result<()> {
    let path = session.dir().join(FOUND);
    if path.exists() {
        return Ok(());
    }
    let other = session::directories()
        .into_iter()
        .map(|dir| dir.join(FOUND))
        .find(|path| path.exists());
    if let Some(other) = other {
        bail!(
            "another lab uses KSM now and would take our settings for the machine's ({})",
            other.display()
        );
    }
    let mut found = String::new();
    for (name, _) in SETTINGS.iter().filter(|(name, _)| setting(name).exists()) {
        let value = fs::read_to_string(setting(name)).with_context(|| format!("reading {name}"))?;
        found += &format!("{name} {}\n", chosen(&value));
    }
    fs::write(&path, found).with_context(|| format!("writing {}", path.display()))
}

/// The settings of a file of [`save`], in the order of [`SETTINGS`]; what is none of ours is left.
fn parse(found: &str) -> Vec<(&'static str, &str)> {
    SETTINGS
        .iter()
        .filter_map(|(name, _)| Some((*name, value_of(found, name)?)))
        .collect()
}

fn value_of<'a>(found: &'a str, name: &str) -> Option<&'a str> {
    let value = |line: &'a str| line.strip_prefix(name)?.strip_prefix(' ');
    found.lines().find_map(value)
}

/// A choice among several is shown as `[none] scan-time`, and set by its name.
fn chosen(value: &str) -> &str {
    let bracketed = value
        .split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'));
    bracketed.map_or(value.trim(), |(name, _)| name)
}

fn merged_pages(pids: &[u32]) -> anyhow::Result<u64> {
    let each: Option<Vec<u64>> = pids.iter().map(|pid| merged_pages_of(*pid)).collect();
    match each {
        Some(each) => Ok(each.into_iter().sum()),
        None => number("pages_sharing"),
    }
}

fn merged_pages_of(pid: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/ksm_merging_pages")).ok()?;
    text.trim().parse().ok()
}

fn setting(name: &str) -> PathBuf {
    Path::new(DIR).join(name)
}

fn number(name: &str) -> anyhow::Result<u64> {
    let text =
        fs::read_to_string(setting(name)).with_context(|| format!("reading KSM's {name}"))?;
    text.trim()
        .parse()
        .with_context(|| format!("KSM's {name} is `{}`", text.trim()))
}

fn write(name: &str, value: &str) -> anyhow::Result<()> {
    fs::write(setting(name), value).with_context(|| format!("setting KSM's {name} to {value}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_put_back_by_name_and_nothing_else_is_written() {
        let found = "advisor_mode scan-time\npages_to_scan 100\nrun 2\nother 7\n";
        assert_eq!(
            parse(found),
            [
                ("advisor_mode", "scan-time"),
                ("pages_to_scan", "100"),
                ("run", "2")
            ]
        );
        assert_eq!(chosen("none [scan-time]\n"), "scan-time");
        assert_eq!(chosen("20\n"), "20");
    }

    #[test]
    fn merging_is_over_when_a_scan_adds_almost_nothing() {
        assert!(!is_stable(0, 1));
        assert!(!is_stable(1000, 1100));
        assert!(is_stable(10_000, 10_049));
        // Guests write: merged pages can become fewer.
        assert!(is_stable(10_000, 9_000));
        assert!(is_stable(0, 0));
    }
}
