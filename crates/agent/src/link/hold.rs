//! Test aid: a move waits at a named instant, so that a test can break something just then.

use std::path::PathBuf;
use std::time::Duration;

/// Instants of a move wait here while a file `INSTANT.VM` exists in the directory; they make
/// `INSTANT.VM.reached` to say that they do. Without a directory nothing ever waits.
#[derive(Clone, Default)]
pub(crate) struct Hold(pub(crate) Option<PathBuf>);

impl Hold {
    /// Waits at `instant` of the move of `vm`, if a test asked for it.
    pub(crate) fn at(&self, instant: &str, vm: &str) {
        let Some(dir) = &self.0 else { return };
        let file = dir.join(format!("{instant}.{vm}"));
        if !file.exists() {
            return;
        }
        tracing::warn!(instant, vm, "held by {}", file.display());
        if let Err(error) = std::fs::write(dir.join(format!("{instant}.{vm}.reached")), "") {
            tracing::error!(%error, "cannot say that the hold is reached");
        }
        while file.exists() {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
