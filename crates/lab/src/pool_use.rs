//! The pool of shared pages, seen from outside: what QEMUs have mapped of it, and what it holds.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use crate::bench::Bench;
use crate::guest::{Host, Vm};
use crate::qmp::Qmp;
use crate::shell::say;

const PAGE: u64 = 4096;
/// The pool's name where the kernel shows it.
const NAME: &str = "/memfd:gangway-pool";
/// How long the pool may take until it has given back what nobody uses: its agent looks every ten
/// seconds.
const PATIENCE: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(500);
/// Bits of a page table's entry: present, in swap, of a file.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE: u64 = 1 << 61;

/// A mapping of the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Area {
    start: u64,
    end: u64,
    pool_page: u64,
}

/// How many mappings of the pool a process has.
#[must_use]
pub fn mappings(pid: u32) -> u64 {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    areas_of(&maps).count() as u64
}

fn areas_of(maps: &str) -> impl Iterator<Item = Area> {
    maps.lines()
        .filter(|line| line.contains(NAME))
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let (start, end) = words.next()?.split_once('-')?;
            let offset = words.nth(1)?;
            let number = |text| u64::from_str_radix(text, 16).ok();
            Some(Area {
                start: number(start)?,
                end: number(end)?,
                pool_page: number(offset)? / PAGE,
            })
        })
}

/// Memory that the pools of the agent in process `pid` hold.
#[must_use]
pub fn pool_bytes(pid: u32) -> u64 {
    let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        return 0;
    };
    let pools = descriptors
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            fs::read_link(path).is_ok_and(|link| link.to_string_lossy().starts_with(NAME))
        });
    let mut sizes: Vec<(u64, u64)> = pools
        .filter_map(|path| fs::metadata(path).ok())
        .map(|pool| (pool.ino(), pool.blocks() * 512))
        .collect();
    sizes.sort_unstable();
    sizes.dedup();
    sizes.into_iter().map(|(_, bytes)| bytes).sum()
}

/// A guest that stands still, and what it shares.
struct Sharer {
    number: u32,
    qmp: Qmp,
    memory: File,
    pages: Vec<Shared>,
}

/// A page that was mapped from the pool and not written since.
struct Shared {
    at: u64,
    pool_page: u64,
    bytes: Vec<u8>,
    written: bool,
}

/// Has every guest that came to `host` write every page that it shares, first one half of the pool
/// and then the other. No guest may see what another has written, and the pool must shrink to what
/// is shared still. The guests get their bytes back at the end, and run on.
///
/// They stand still meanwhile, and their pages are written from outside: for the kernel that is a
/// write of the guest's QEMU.
pub fn write_all(bench: &Bench<'_>, host: &Host, agent: u32) -> anyhow::Result<Value> {
    say("writing every shared page of every guest");
    let sharers = bench.vms.iter().map(|vm| Sharer::stop(vm, host));
    let mut sharers = sharers.collect::<anyhow::Result<Vec<_>>>()?;
    let before = pool_bytes(agent);
    let (mut written, mut foreign) = (0_u64, 0_u64);
    let mut sizes = Vec::new();
    for half in [0, 1] {
        for sharer in &mut sharers {
            written += sharer.write(half)?;
        }
        for sharer in &sharers {
            foreign += sharer.changed_by_others()?;
        }
        sizes.push(shrink(&sharers, agent));
    }
    for sharer in &mut sharers {
        sharer.give_back()?;
    }
    let still: Vec<u64> = sizes.iter().map(|(_, used)| *used).collect();
    let sizes: Vec<u64> = sizes.iter().map(|(bytes, _)| *bytes).collect();
    Ok(json!({
        "pages_written": written,
        "pages_changed_by_others": foreign,
        "pool_bytes_before": before,
        "pool_bytes_after_each_half": sizes,
        "still_shared_bytes_after_each_half": still,
    }))
}

/// Waits until the pool holds no more than pages that are not written use; returns both sizes.
fn shrink(sharers: &[Sharer], agent: u32) -> (u64, u64) {
    let unwritten = sharers.iter().flat_map(|sharer| &sharer.pages);
    let mut used: Vec<u64> = unwritten
        .filter(|page| !page.written)
        .map(|page| page.pool_page)
        .collect();
    used.sort_unstable();
    used.dedup();
    let used = used.len() as u64 * PAGE;
    let deadline = Instant::now() + PATIENCE;
    while pool_bytes(agent) > used && Instant::now() < deadline {
        thread::sleep(LOOK);
    }
    (pool_bytes(agent), used)
}

impl Sharer {
    fn stop(vm: &Vm, host: &Host) -> anyhow::Result<Self> {
        let mut qmp = vm.qmp(host)?;
        qmp.execute("stop", json!({}))?;
        let pid = qmp.peer_pid()?;
        let path = format!("/proc/{pid}/mem");
        let mut options = File::options();
        let memory = options.read(true).write(true).open(&path);
        let memory = memory.with_context(|| format!("opening {path}"))?;
        let table = File::open(format!("/proc/{pid}/pagemap")).context("opening its page table")?;
        let maps =
            fs::read_to_string(format!("/proc/{pid}/maps")).context("reading its mappings")?;
        let mut pages = Vec::new();
        for area in areas_of(&maps) {
            for at in (area.start..area.end).step_by(4096) {
                let mut entry = [0; 8];
                table
                    .read_exact_at(&mut entry, at / PAGE * 8)
                    .context("reading its page table")?;
                let entry = u64::from_le_bytes(entry);
                if entry & SWAPPED != 0 || (entry & PRESENT != 0 && entry & OF_FILE == 0) {
                    continue;
                }
                let mut bytes = vec![0; 4096];
                memory
                    .read_exact_at(&mut bytes, at)
                    .context("reading a page")?;
                let pool_page = area.pool_page + (at - area.start) / PAGE;
                pages.push(Shared {
                    at,
                    pool_page,
                    bytes,
                    written: false,
                });
            }
        }
        ensure!(!pages.is_empty(), "{} shares nothing", vm.name);
        Ok(Self {
            number: vm.number,
            qmp,
            memory,
            pages,
        })
    }

    /// What this guest writes into a page: nobody else writes that.
    fn mark(&self, page: &Shared) -> Vec<u8> {
        let mut bytes = page.bytes.clone();
        bytes[..8].copy_from_slice(&page.at.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.number.to_le_bytes());
        bytes[12..16].copy_from_slice(b"own!");
        bytes
    }

    fn write(&mut self, half: u64) -> anyhow::Result<u64> {
        let mut written = 0;
        for nth in 0..self.pages.len() {
            if self.pages[nth].pool_page % 2 == half {
                let bytes = self.mark(&self.pages[nth]);
                let wrote = self.memory.write_all_at(&bytes, self.pages[nth].at);
                wrote.context("writing a page")?;
                self.pages[nth].written = true;
                written += 1;
            }
        }
        Ok(written)
    }

    /// Pages that are not what this guest has left in them.
    fn changed_by_others(&self) -> anyhow::Result<u64> {
        let mut changed = 0;
        let mut found = vec![0; 4096];
        for page in &self.pages {
            self.memory
                .read_exact_at(&mut found, page.at)
                .context("reading a page")?;
            let expected = if page.written {
                self.mark(page)
            } else {
                page.bytes.clone()
            };
            changed += u64::from(found != expected);
        }
        Ok(changed)
    }

    fn give_back(&mut self) -> anyhow::Result<()> {
        for page in &self.pages {
            self.memory
                .write_all_at(&page.bytes, page.at)
                .context("writing a page")?;
        }
        self.qmp.execute("cont", json!({}))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_of_the_pool_are_told_from_others() {
        let maps = "7f00000-7f02000 rw-p 00003000 00:01 77 /memfd:gangway-pool (deleted)\n\
                    7f02000-7f03000 rw-p 00000000 00:00 0 \n\
                    7f03000-7f04000 rw-s 00000000 00:01 78 /memfd:other (deleted)\n";
        let area = Area {
            start: 0x7f0_0000,
            end: 0x7f0_2000,
            pool_page: 3,
        };
        assert_eq!(areas_of(maps).collect::<Vec<_>>(), [area]);
    }
}
