//! The target end of the world: its agent, which may not be able to write, and its QEMU, which may not answer.

use super::*;

impl World {
    pub(super) fn target_acts(&mut self) {
        let Some(action) = self.target_todo.pop_front() else {
            return;
        };
        self.log.push(format!("target does {action:?}"));
        match action {
            TargetAction::Journal(_) if self.is_disk_full => {
                self.unwritten[usize::from(self.has_run())] += 1;
                // What comes after it relies on it.
                if self.target_todo.front() == Some(&TargetAction::Continue) {
                    self.target_todo.pop_front();
                }
                self.tell_target(TargetEvent::JournalFailed("disk full".into()));
            }
            TargetAction::Journal(journal) => self.target_journal = Some(journal),
            TargetAction::Kill => {
                let runs = self.has_run();
                assert!(!runs, "it runs and is ended\n{}", self.log.join("\n"));
                self.target_qemu = TargetQemu::Gone;
            }
            TargetAction::Continue => self.target_continues(),
        }
    }

    fn target_continues(&mut self) {
        let is_paused = self.target_qemu == TargetQemu::Paused;
        assert!(
            !is_paused,
            "a person has stopped it\n{}",
            self.log.join("\n")
        );
        if self.target_qemu == TargetQemu::Gone {
            self.tell_target(TargetEvent::QemuGone("killed".into()));
        } else if self.faults && self.dice.roll(3) == 0 {
            // It does not answer, and obeys or not.
            self.unreached += 1;
            if self.dice.roll(2) == 0 {
                self.target_qemu = TargetQemu::Running;
            }
            self.tell_target(TargetEvent::Unreached("busy".into()));
        } else if self.target_qemu != TargetQemu::Running && self.faults && self.dice.roll(10) == 0
        {
            self.tell_target(TargetEvent::ContinueRefused("image locked".into()));
        } else {
            self.target_qemu = TargetQemu::Running;
            // Its disk may be full of what made it write.
            self.is_disk_full |= self.faults && self.dice.roll(3) == 0;
            self.tell_target(TargetEvent::Continued);
        }
    }

    /// The target serves a request once it has done what it had to do.
    pub(super) fn target_serves(&mut self) {
        if self.target.is_none() || !self.target_todo.is_empty() {
            return;
        }
        let Some(request) = self.requests.pop_front() else {
            return;
        };
        match request {
            Request::Release => self.tell_target(TargetEvent::Release),
            Request::Abort => self.tell_target(TargetEvent::Abort("aborted".into())),
        }
        while !self.target_todo.is_empty() {
            self.target_acts();
        }
        if request == Request::Release
            && let Some(target) = &self.target
        {
            // Until it knows more it says that the VM has loaded.
            let answer = target.answer().unwrap_or(MoveState::Loaded);
            let lost = !self.link_up || (self.faults && self.dice.roll(6) == 0);
            self.source_heard.push_back(if lost {
                SourceEvent::NoAnswer {
                    reason: "lost".into(),
                    now: self.now,
                }
            } else {
                SourceEvent::Answer(answer)
            });
        }
    }

    pub(super) fn restart_target_agent(&mut self) {
        if self.target.is_none() {
            self.log.push("target agent restarts".into());
            self.target = Some(TargetMove::default());
            // What follows has kept its monitor's connection, and hears nothing on it only if it runs.
            let can_be_busy = self.target_journal != Some(TargetJournal::Following)
                || self.target_qemu == TargetQemu::Running;
            let is_busy = self.faults && can_be_busy && self.dice.roll(4) == 0;
            let found = match self.target_qemu {
                TargetQemu::Gone => FoundQemu::Gone,
                _ if is_busy => FoundQemu::Unreachable,
                TargetQemu::Stopped | TargetQemu::Paused => FoundQemu::Stopped,
                TargetQemu::Running if self.is_postcopy && !self.is_whole => FoundQemu::Running,
                TargetQemu::Running => FoundQemu::Complete,
            };
            if let Some(journal) = self.target_journal.clone() {
                self.tell_target(TargetEvent::Restarted(journal, found));
            }
        }
    }

    /// Rarely: a VM that runs and is killed is a crash, which is not what is tested here.
    pub(super) fn kill_target_qemu(&mut self) {
        if self.target_qemu == TargetQemu::Stopped && self.dice.roll(3) == 0 {
            self.log.push("target QEMU dies".into());
            self.target_qemu = TargetQemu::Gone;
            self.vm_killed = true;
            self.tell_target(TargetEvent::QemuGone("killed".into()));
            self.source_heard
                .push_back(SourceEvent::Failed("target QEMU gone".into()));
        }
    }

    /// A person stops the VM at its target, once its agent knows that it runs, or has known.
    pub(super) fn person_stops_it(&mut self) {
        let known = matches!(
            self.target_journal,
            Some(TargetJournal::Runs | TargetJournal::RunsAhead)
        );
        if known && self.target_qemu == TargetQemu::Running && self.dice.roll(8) == 0 {
            self.log.push("a person stops the VM".into());
            self.target_qemu = TargetQemu::Paused;
        }
    }
}
