//! Memory that was promised to VMs whose QEMUs have not been started yet.
//!
//! Goal: two groups that are admitted at the same moment are not promised the same memory.
//! Non-goal: memory of QEMUs that have been started; whoever counts what is free counts them.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

/// How long a promise holds: from a group's admission here, over that at all its other targets
/// (each may take a peer's timeout), to the start of its moves. A group that prepares in between asks
/// again.
const HOLDS_FOR: Duration = Duration::from_secs(60);

/// The promises of a host, by group.
#[derive(Debug, Default)]
pub(crate) struct Promises {
    groups: HashMap<String, Promise>,
}

#[derive(Debug)]
struct Promise {
    /// Bytes by name of the VM.
    vms: BTreeMap<String, u64>,
    until: Duration,
}

impl Promises {
    /// Bytes promised to other groups than `group`. Forgets what has run out.
    pub(crate) fn others_have(&mut self, group: &str, now: Duration) -> u64 {
        self.groups.retain(|_, promise| promise.until > now);
        let others = self.groups.iter().filter(|(name, _)| *name != group);
        others
            .flat_map(|(_, promise)| promise.vms.values())
            .fold(0, |sum, bytes| sum.saturating_add(*bytes))
    }

    /// Promises memory to a group's VMs, instead of what it was promised before.
    pub(crate) fn promise(
        &mut self,
        group: &str,
        vms: impl Iterator<Item = (String, u64)>,
        now: Duration,
    ) {
        let promise = Promise {
            vms: vms.collect(),
            until: now.saturating_add(HOLDS_FOR),
        };
        self.groups.insert(group.to_owned(), promise);
    }

    /// The QEMU of this move (`GROUP/VM`) has been started, or will not be.
    pub(crate) fn redeem(&mut self, id: &str) {
        let Some((group, vm)) = id.split_once('/') else {
            return;
        };
        if let Some(promise) = self.groups.get_mut(group) {
            promise.vms.remove(vm);
            if promise.vms.is_empty() {
                self.groups.remove(group);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(1000);

    fn of_two() -> Promises {
        let mut promises = Promises::default();
        let vms = [("a".to_owned(), 10), ("b".to_owned(), 20)];
        promises.promise("g", vms.into_iter(), NOW);
        promises
    }

    #[test]
    fn what_was_promised_to_a_group_is_not_there_for_another() {
        let mut promises = of_two();
        assert_eq!(promises.others_have("h", NOW), 30);
        assert_eq!(promises.others_have("g", NOW), 0, "asked again");
    }

    #[test]
    fn a_promise_ends_vm_by_vm_as_their_qemus_start() {
        let mut promises = of_two();
        promises.redeem("g/a");
        promises.redeem("g/a");
        promises.redeem("h/b");
        assert_eq!(promises.others_have("h", NOW), 20);
        promises.redeem("g/b");
        assert_eq!(promises.others_have("h", NOW), 0);
    }

    #[test]
    fn a_group_that_never_starts_holds_nothing_for_long() {
        let mut promises = of_two();
        let almost = NOW + HOLDS_FOR - Duration::from_millis(1);
        assert_eq!(promises.others_have("h", almost), 30);
        assert_eq!(promises.others_have("h", NOW + HOLDS_FOR), 0);
        assert!(promises.groups.is_empty());
    }
}
