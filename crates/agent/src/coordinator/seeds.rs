//! Contents that VMs at the target hosts have already: they need not be sent.
//!
//! Their agents hash the memory of VMs that stay there, tell the index, and keep where it is. What is
//! written since is noticed when it is read, and sent after all.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tokio::task::JoinSet;

use super::Peers;
use super::prepare::Preparation;
use crate::client::Client;
use crate::plan::DEFAULT_DOMAIN;
use crate::types::{Inventory, Plan, PrepareBounds, PrepareSpec, PrepareVm};

/// A target host with VMs that stay.
#[derive(Clone)]
pub(super) struct SeededHost {
    name: String,
    pub(super) client: Client,
    /// Without the VMs that its agent will find.
    spec: PrepareSpec,
    /// Whether it is asked for VMs that the plan does not name.
    finds: Option<Finds>,
}

/// How VMs are taken that an agent finds.
#[derive(Clone)]
struct Finds {
    domain_key: String,
    target: u16,
    /// VMs that leave the host.
    leaving: BTreeSet<String>,
}

impl SeededHost {
    pub(super) fn path(&self, action: &str) -> String {
        format!("/v1/prepare/{}{action}", self.spec.key())
    }

    /// What its agent is to hash.
    async fn whole_spec(&self) -> Result<PrepareSpec, String> {
        let mut spec = self.spec.clone();
        let Some(finds) = &self.finds else {
            return Ok(spec);
        };
        let inventory = self.client.get::<Inventory>("/v1/inventory").await;
        let inventory = inventory.map_err(|error| error.in_full())?;
        let named: BTreeSet<_> = spec.vms.iter().map(|vm| vm.qmp.clone()).collect();
        for vm in inventory.vms {
            let is_leaving = finds.leaving.contains(&vm.vm);
            if let Some(qmp) = vm.qmp.filter(|qmp| !is_leaving && !named.contains(qmp)) {
                spec.vms.push(PrepareVm {
                    // Names may be missing, and are used by people only.
                    vm: format!("pid-{}", vm.pid),
                    qmp,
                    domain_key: finds.domain_key.clone(),
                    target: finds.target,
                });
            }
        }
        Ok(spec)
    }
}

impl Preparation {
    /// Has VMs that stay at the target hosts hashed. Returns what went wrong, which costs bytes.
    pub(super) async fn seed(self: &Arc<Self>) -> Vec<String> {
        let mut steps = JoinSet::new();
        for host in self.seeded.iter().cloned() {
            let one = Arc::clone(self);
            steps.spawn(async move {
                let name = &host.name;
                match one.seed_from(&host).await {
                    Ok(message) if message.is_empty() => None,
                    Ok(message) => Some(format!("target host `{name}`: {message}")),
                    Err(error) => Some(format!(
                        "contents of VMs at target host `{name}` are not used: {error}"
                    )),
                }
            });
        }
        steps.join_all().await.into_iter().flatten().collect()
    }

    async fn seed_from(&self, host: &SeededHost) -> Result<String, String> {
        let spec = host.whole_spec().await?;
        if spec.vms.is_empty() {
            return Ok(String::new());
        }
        let asked = host.client.post::<_, ()>("/v1/prepare", &spec).await;
        asked.map_err(|error| error.in_full())?;
        let name = format!("{} (VMs that stay)", host.name);
        let (_report, message) = self.wait(&name, &host.client, &host.path("")).await?;
        Ok(message)
    }
}

/// Each target host of a plan that VMs are looked for at.
pub(super) fn seeded_hosts(
    id: &str,
    plan: &Plan,
    keys: &BTreeMap<String, String>,
    (peers, bounds): (&Peers, PrepareBounds),
) -> Vec<SeededHost> {
    if !plan.takes_seeds() {
        return Vec::new();
    }
    let numbers = plan.target_numbers();
    let index = plan
        .specs(id, keys)
        .into_iter()
        .find_map(|spec| Some(spec.rack?.index))
        .unwrap_or_default();
    let host = |(name, target): (&String, &u16)| {
        let here = plan.residents.iter().filter(|one| one.host == *name);
        let vm = |one: &crate::types::Resident| PrepareVm {
            vm: one.vm.clone(),
            qmp: one.qmp.clone(),
            domain_key: keys.get(one.domain()).cloned().unwrap_or_default(),
            target: *target,
        };
        let leaving = plan.moves.iter().filter(|one| one.from == *name);
        let finds = plan.seed_from_target.then(|| Finds {
            domain_key: keys.get(DEFAULT_DOMAIN).cloned().unwrap_or_default(),
            target: *target,
            leaving: leaving.map(|one| one.vm.clone()).collect(),
        });
        SeededHost {
            name: name.clone(),
            client: peers.client(&plan.hosts[name]),
            spec: PrepareSpec {
                group: id.to_owned(),
                vms: here.map(vm).collect(),
                index: index.clone(),
                targets: u16::try_from(numbers.len()).unwrap_or(u16::MAX),
                bounds,
                resident: true,
                seeded: true,
                identical: false,
            },
            finds,
        }
    };
    let hosts = numbers.iter().map(host);
    hosts
        .filter(|host| host.finds.is_some() || !host.spec.vms.is_empty())
        .collect()
}
