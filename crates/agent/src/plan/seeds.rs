//! What a plan says of VMs that run at the target hosts already.

use std::collections::BTreeMap;

use super::{DEFAULT_DOMAIN, PlanError, named};
use crate::types::{Plan, Resident, Scope};

impl Plan {
    pub(super) fn check_seeds(&self) -> Result<(), PlanError> {
        let refuse = |whose: &str, problem| {
            Err(PlanError::Seeds {
                whose: whose.to_owned(),
                problem,
            })
        };
        if !self.takes_seeds() {
            return Ok(());
        }
        if self.seed_from_target && self.settings().scope != Scope::Rack {
            return refuse("the plan", "`seed_from_target` goes with scope `rack`");
        }
        let is_domain = |domain: &str| self.domains().any(|known| known == domain);
        if self.seed_from_target && !is_domain(DEFAULT_DOMAIN) {
            return refuse(
                "the plan",
                "with `seed_from_target` VMs at target hosts count as of the trust domain `default`, in which \
                 nothing moves: name them as `resident` with their domain",
            );
        }
        for resident in &self.residents {
            named("resident VM", &resident.vm)?;
            let whose = format!("resident VM `{}`", resident.vm);
            if !self.moves.iter().any(|one| one.to == resident.host) {
                return refuse(&whose, "its `host` is no target of a move");
            }
            if !is_domain(resident.domain()) {
                return refuse(&whose, "nothing moves in its trust domain");
            }
            if !resident.qmp.is_absolute() {
                return refuse(&whose, "`qmp` must be an absolute path on its host");
            }
        }
        Ok(())
    }

    /// Whether VMs at target hosts are hashed, too.
    #[must_use]
    pub fn takes_seeds(&self) -> bool {
        self.seed_from_target || !self.residents.is_empty()
    }

    /// The numbers of the target hosts, by name.
    #[must_use]
    pub fn target_numbers(&self) -> BTreeMap<String, u16> {
        let peers = self.rack_peers().into_iter();
        peers.map(|peer| (peer.name, peer.host)).collect()
    }
}

impl Resident {
    /// The trust domain of the VM.
    #[must_use]
    pub fn domain(&self) -> &str {
        self.domain.as_deref().unwrap_or(DEFAULT_DOMAIN)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const PLAN: &str = r#"
preset = "irlm"
[hosts.a]
control = "10.0.0.1:7000"
bulk = "10.0.0.1:7001"
[hosts.b]
control = "10.0.0.2:7000"
bulk = "10.0.0.2:7001"
[[move]]
vm = "web"
from = "a"
to = "b"
qmp = "/run/web.qmp"
domain = "red"
[[resident]]
vm = "old"
host = "b"
qmp = "/run/old.qmp"
domain = "red"
"#;

    #[test]
    fn what_cannot_be_taken_from_is_refused_and_named() {
        Plan::parse(Path::new("plan.toml"), PLAN).unwrap();
        for (find, put, expected) in [
            (
                "host = \"b\"",
                "host = \"a\"",
                "resident VM `old`: its `host` is no target of a move",
            ),
            (
                "\"red\"\n[[res",
                "\"blue\"\n[[res",
                "resident VM `old`: nothing moves in its trust domain",
            ),
            (
                "/run/old.qmp",
                "old.qmp",
                "resident VM `old`: `qmp` must be an absolute path on its host",
            ),
            (
                "preset = \"irlm\"",
                "preset = \"gang\"\nseed_from_target = true",
                "the plan: `seed_from_target` goes with scope `rack`",
            ),
            (
                "preset = \"irlm\"",
                "preset = \"irlm\"\nseed_from_target = true",
                "the plan: with `seed_from_target` VMs at target hosts count as of the trust domain \
                 `default`, in which nothing moves: name them as `resident` with their domain",
            ),
        ] {
            assert!(PLAN.contains(find), "{find}");
            let text = PLAN.replacen(find, put, 1);
            let error = Plan::parse(Path::new("plan.toml"), &text).unwrap_err();
            assert_eq!(error.to_string(), expected);
        }
    }
}
