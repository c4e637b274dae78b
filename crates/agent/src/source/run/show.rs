//! What people are told of a move.

use migrate::handover::{Plight, SourceState};

use super::Run;
use crate::types::{Happening, Phase};

impl Run {
    /// Final phases follow from the machine's state.
    pub(super) fn show(&mut self) {
        let (phase, message) = match self.machine.state() {
            SourceState::Moved => (Phase::Moved, format!("runs at {}", self.spec.target_name)),
            SourceState::Stayed { reason } => (
                Phase::Stayed,
                format!("runs at the source as before: {reason}"),
            ),
            SourceState::NeedsPerson { reason, plight } => {
                (Phase::NeedsPerson, self.plight(*plight, reason))
            }
            SourceState::Recovering { reason, .. } => (
                Phase::Recovering,
                format!(
                    "runs at {} until it needs memory that has not followed it: {reason}. It is being \
                     resumed; neither QEMU must be ended",
                    self.spec.target_name
                ),
            ),
            SourceState::Following => (
                Phase::PostCopy,
                format!(
                    "runs at {}; its memory follows, and it needs both hosts until then",
                    self.spec.target_name
                ),
            ),
            _ => return,
        };
        if let Some(stream) = self.stream.clone() {
            let progress = self.meter.sample(&stream, None);
            (self.events)(Happening::Progress { progress });
        }
        self.enter(phase, message);
    }

    /// What a person must know, and do.
    fn plight(&self, plight: Plight, reason: &str) -> String {
        let target = &self.spec.target_name;
        let recover = format!(
            "`gangway recover {} --vm {}`",
            self.spec.group, self.spec.vm
        );
        match plight {
            Plight::Unknown => format!(
                "stopped at the source, and may run at {target}: {reason}. When {target} can be reached again, \
                 say {recover}"
            ),
            Plight::Halved => format!(
                "stands still at {target} where it needs memory that only its QEMU at the source has, \
                 which must not be ended or resumed: {reason}. When the cause is mended, say \
                 {recover}"
            ),
            Plight::Left => format!(
                "was let go at {target}, whose agent says that it ran there, and its QEMU at the source was not ended: {reason}. \
                 Look at both, and end the one whose VM is not to go on; then say {recover}"
            ),
            Plight::Ended => format!(
                "runs nowhere: its QEMU at the source has ended before {target} had all of it: {reason}. \
                 Start it anew"
            ),
            Plight::Killed => format!(
                "was killed in post-copy: {reason}. Nothing brings back what it did at {target}. Its QEMU at \
                 the source, if it is there, stands at the switch-over, and its disks may have gone on since: \
                 end it and start the VM anew. {recover} looks again"
            ),
        }
    }
}
