//! A target QEMU between its start and the move that takes it.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, anyhow};
use guest::TargetGuest;
use migrate::handover::TargetJournal;
use page::ContentKey;
use sys::Process;
use wire::OpenMove;

use super::{Entry, Mapper, TargetContext, mapper};
use crate::journal::{Journal, QemuProcess, file_name};

/// A QEMU that is in the journal and that no move has yet: it is ended if none takes it.
pub(super) struct Fresh {
    pub(super) guest: Arc<TargetGuest>,
    id: String,
    journal: Journal,
    is_taken: bool,
}

/// What maps its pages, if they are to be shared, or why they cannot be.
pub(super) type Sharing = Option<Result<Mapper, String>>;

impl Fresh {
    /// Starts the QEMU of a move. It is in the journal as soon as it has a process: an agent that is killed
    /// while it starts, which may take a minute, leaves nothing that nobody knows of.
    pub(super) fn start(
        request: &OpenMove,
        domain: &ContentKey,
        context: &TargetContext,
    ) -> anyhow::Result<(Self, Entry, Sharing)> {
        let log = context
            .log_dir
            .join(format!("{}.log", file_name(&request.id)));
        let mut written = None;
        let launched = |process: &Process, qmp: &Path| {
            let entry = entry_of(request, process, qmp);
            written = Some(entry.and_then(|entry| {
                let done = context.journal.write(&entry.id, &entry);
                done.context("writing the journal")?;
                Ok(entry)
            }));
        };
        match mapper::start((request, domain), &log, context, launched) {
            Ok((guest, sharing)) => {
                let fresh = Self {
                    guest: Arc::new(guest),
                    id: request.id.clone(),
                    journal: context.journal.clone(),
                    is_taken: false,
                };
                let entry = written.unwrap_or_else(|| Err(anyhow!("it has no process")))?;
                Ok((fresh, entry, sharing))
            }
            Err(error) => {
                // No process is left.
                if written.is_some() {
                    context.journal.forget(&request.id);
                }
                Err(error)
            }
        }
    }

    /// It is a move's from now on.
    pub(super) fn take(mut self) -> Arc<TargetGuest> {
        self.is_taken = true;
        Arc::clone(&self.guest)
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        if self.is_taken {
            return;
        }
        match self.guest.kill() {
            Ok(()) => self.journal.forget(&self.id),
            // The next agent finds it by its entry.
            Err(error) => tracing::error!(
                id = self.id,
                "a target QEMU that is not needed cannot be ended: {error}"
            ),
        }
    }
}

fn entry_of(request: &OpenMove, process: &Process, qmp: &Path) -> anyhow::Result<Entry> {
    Ok(Entry {
        id: request.id.clone(),
        vm_name: request.vm_name.clone(),
        resume: request.resume,
        process: QemuProcess::of(process).context("looking at the target QEMU")?,
        qmp: qmp.to_owned(),
        memory_bytes: request.memory_bytes,
        state: TargetJournal::Loading,
        monitor: None,
        preempts: false,
    })
}
