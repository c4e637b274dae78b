//! What is measured of post-copy besides.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::ensure;
use serde_json::{Value, json};

use crate::bench::Bench;
use crate::outcome::EventLog;
use crate::qmp::Qmp;

/// How long the memory of a VM that is held may take to follow it.
const PATIENCE: Duration = Duration::from_secs(120);
/// Interval between looks.
const LOOK: Duration = Duration::from_millis(20);

/// Waits until the source QEMU has completed its migration, which one in pre-copy has before its
/// VM is held.
pub fn wait_until_complete(source: &mut Qmp) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let info = source.execute("query-migrate", json!({}))?;
        if info["status"] == "completed" {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "memory did not follow the VM; the source says {}",
            info["status"]
        );
        thread::sleep(LOOK);
    }
}

/// How long processors waited for pages, as the target QEMUs and, of each VM, the agents (`faults`)
/// say.
pub fn figures(bench: &Bench<'_>, faults: &[Value], log: &EventLog) -> Vec<(String, Value)> {
    let mut blocked_ms = Vec::new();
    for vm in &bench.vms {
        // A VM that stayed has no target.
        let info = vm
            .qmp(&vm.target)
            .and_then(|mut target| target.execute("query-migrate", json!({})));
        let Ok(info) = info else { continue };
        let fields = json!({
            "blocktime_ms": info["postcopy-blocktime"],
            "vcpu_blocktime_ms": info["postcopy-vcpu-blocktime"],
        });
        log.note(&vm.name, "postcopy-blocktime", fields);
        blocked_ms.extend(info["postcopy-blocktime"].as_u64());
    }
    let worst = |key: &str| faults.iter().filter_map(|of_vm| of_vm[key].as_u64()).max();
    let sum: u64 = faults
        .iter()
        .filter_map(|of_vm| of_vm["count"].as_u64())
        .sum();
    let mut figures = Vec::new();
    if let Some(longest) = blocked_ms.iter().max() {
        figures.push(("postcopy_blocktime_ms_max".to_owned(), json!(longest)));
    }
    if !faults.is_empty() {
        figures.push(("faults".to_owned(), json!(sum)));
        for key in ["median_us", "p99_us", "max_us"] {
            figures.push((format!("fault_{key}"), json!(worst(key))));
        }
    }
    figures
}
