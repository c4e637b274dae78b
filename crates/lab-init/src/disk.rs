//! A workload for the guest's disk, if it has one: blocks are stamped and read back.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Context;
use lab_init::stamp::{self, PAGE, Page, Stamp};

use crate::heartbeat::Health;
use crate::workload::spawn;

const DEVICE: &str = "/dev/vda";
/// Blocks in use: 4 MiB, so that every block is visited within a minute or two.
const BLOCKS: u64 = 1024;
/// Pause between two blocks.
const PAUSE: Duration = Duration::from_millis(20);

/// Starts the disk's thread if there is a disk.
pub(crate) fn start(id: &str, health: &Arc<Health>) -> anyhow::Result<()> {
    if !Path::new(DEVICE).exists() {
        return Ok(());
    }
    let direct = rustix::fs::OFlags::DIRECT.bits().cast_signed();
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(direct)
        .open(DEVICE)
        .with_context(|| format!("opening {DEVICE}"))?;
    let owner = stamp::owner(id, "disk");
    spawn("disk", health, move |health| {
        if let Err(error) = tend(&device, owner, health) {
            health.errors.fetch_add(1, Ordering::Relaxed);
            eprintln!("lab-init: {DEVICE}: {error:#}");
        }
    })
}

/// Writes block after block, round after round, and reads each back before it is written again.
fn tend(device: &File, owner: u64, health: &Health) -> anyhow::Result<()> {
    let mut page = Page::ZERO;
    for generation in 0u64.. {
        for index in 0..BLOCKS {
            let at = index * PAGE as u64;
            if generation > 0 {
                device.read_exact_at(&mut page.0, at).context("reading")?;
                let written = Stamp {
                    owner,
                    index,
                    generation: generation - 1,
                };
                health.checked.fetch_add(1, Ordering::Relaxed);
                if !written.matches(&page) {
                    health.errors.fetch_add(1, Ordering::Relaxed);
                }
            }
            Stamp {
                owner,
                index,
                generation,
            }
            .write(&mut page);
            device.write_all_at(&page.0, at).context("writing")?;
            std::thread::sleep(PAUSE);
        }
    }
    Ok(())
}
