//! A stopped VM's state in a file, written and read by stock QEMU.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::bail;
use serde_json::json;

use crate::qmp::Qmp;

/// As for any guest's boot.
const PATIENCE: Duration = Duration::from_secs(240);
const LOOK: Duration = Duration::from_millis(20);

/// Has a QEMU whose VM is stopped write what it is.
pub fn write(qmp: &mut Qmp, state: &Path) -> anyhow::Result<()> {
    qmp.execute("migrate", json!({"uri": uri(state)}))?;
    wait(qmp, "writing its state")
}

/// Has a QEMU that was started with `-incoming defer` take over what was written.
pub fn load(qmp: &mut Qmp, state: &Path) -> anyhow::Result<()> {
    qmp.execute("migrate-incoming", json!({"uri": uri(state)}))?;
    wait(qmp, "loading its state")
}

fn uri(state: &Path) -> String {
    format!("file:{}", state.display())
}

fn wait(qmp: &mut Qmp, what: &str) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let info = qmp.execute("query-migrate", json!({}))?;
        match info["status"].as_str() {
            Some("completed") => return Ok(()),
            Some("failed") => bail!("{what}: {}", info["error-desc"]),
            _ if Instant::now() >= deadline => bail!("{what} does not end"),
            _ => thread::sleep(LOOK),
        }
    }
}
