//! Makes the plan that empties hosts: every VM of theirs, the largest first, goes to the host that
//! has the most memory left.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use tokio::task::JoinSet;

use super::Peers;
use crate::api::mover::{Refusal, RefusalCode};
use crate::plan;
use crate::types::{EvacuationRequest, Host, HostVm, Inventory, Plan, PlanMove};

/// A host that was asked.
struct Asked {
    host: Host,
    inventory: Inventory,
}

/// Asks all the hosts what they have, and makes the plan. Nothing is started or reserved.
pub(super) async fn plan(request: EvacuationRequest, peers: &Peers) -> Result<Plan, Refusal> {
    let from = ask(&request.from, peers).await?;
    let to = ask(&request.to, peers).await?;
    let plan = place(from, to)?;
    plan.check()
        .map_err(|error| Refusal::new(RefusalCode::BadRequest, error.to_string()))?;
    Ok(plan)
}

async fn ask(addresses: &[String], peers: &Peers) -> Result<Vec<Asked>, Refusal> {
    if addresses.is_empty() {
        let message = "hosts to empty and hosts that take the VMs must be named";
        return Err(Refusal::new(RefusalCode::BadRequest, message));
    }
    let mut asking = JoinSet::new();
    for (at, control) in addresses.iter().cloned().enumerate() {
        if plan::host_and_port(&control).is_none() {
            let message = format!("`{control}` is no HOST:PORT of an agent's control API");
            return Err(Refusal::new(RefusalCode::BadRequest, message));
        }
        let client = peers.client(&Host {
            control: control.clone(),
            bulk: String::new(),
        });
        asking.spawn(async move {
            let answer = client.get::<Inventory>("/v1/inventory").await;
            (at, control, answer)
        });
    }
    let mut asked = BTreeMap::new();
    while let Some(Ok((at, control, answer))) = asking.join_next().await {
        let inventory = answer.map_err(|error| {
            let mut refusal = error.into_refusal();
            refusal.message = format!("{control}: {}; nothing was started", refusal.message);
            refusal
        })?;
        let bulk = reachable(&inventory.bulk, &control);
        let host = Host { control, bulk };
        asked.insert(at, Asked { host, inventory });
    }
    Ok(asked.into_values().collect())
}

/// A host that listens on all its addresses is reached on that of its control API.
fn reachable(bulk: &str, control: &str) -> String {
    let control_host = control.rsplit_once(':').map_or(control, |(host, _)| host);
    match bulk.parse::<SocketAddr>() {
        Ok(address) if address.ip().is_unspecified() => {
            format!("{control_host}:{}", address.port())
        }
        _ => bulk.to_owned(),
    }
}

fn place(from: Vec<Asked>, to: Vec<Asked>) -> Result<Plan, Refusal> {
    let mut hosts = BTreeMap::new();
    let mut left: Vec<(String, u64)> = Vec::new();
    for Asked { host, inventory } in &to {
        left.push((inventory.name.clone(), inventory.free_bytes));
        know(&mut hosts, &inventory.name, host)?;
    }
    let mut vms: Vec<(String, HostVm)> = Vec::new();
    for Asked { host, inventory } in from {
        know(&mut hosts, &inventory.name, &host)?;
        vms.extend(
            inventory
                .vms
                .into_iter()
                .map(|vm| (inventory.name.clone(), vm)),
        );
    }
    refuse_namesakes(&vms)?;
    if vms.is_empty() {
        let message = "no QEMU runs on these hosts: they are empty";
        return Err(Refusal::new(RefusalCode::UnknownVm, message));
    }
    // They start in the order of the hosts, so that a host is empty as early as may be.
    let mut placing: Vec<usize> = (0..vms.len()).collect();
    placing.sort_by_key(|&at| std::cmp::Reverse(vms[at].1.memory_bytes));
    let mut moves = BTreeMap::new();
    for at in placing {
        let (host, vm) = vms[at].clone();
        let named = if vm.vm.is_empty() {
            format!("process {}", vm.pid)
        } else {
            vm.vm.clone()
        };
        let Some(qmp) = vm.qmp.filter(|_| !vm.vm.is_empty()) else {
            let message = format!(
                "host `{host}`: {named} cannot be moved: its command line must have a `-name` and \
                 a QMP unix socket for the agent (`-qmp unix:PATH,server=on,wait=off`). Write a \
                 plan without it, or start it with them; nothing was started"
            );
            return Err(Refusal::of_vm(RefusalCode::CannotMigrate, named, message));
        };
        // The first of those that have as much.
        let Some((to, free)) = left.iter_mut().rev().max_by_key(|(_, free)| *free) else {
            continue;
        };
        let Some(rest) = free.checked_sub(vm.memory_bytes) else {
            let message = format!(
                "{named} of host `{host}` has {} of memory, and no target has more than {} left \
                 beside the VMs before it; name more hosts after --to. Nothing was started",
                page::ByteLen(vm.memory_bytes),
                page::ByteLen(*free),
            );
            return Err(Refusal::of_vm(RefusalCode::NoMemory, named, message));
        };
        *free = rest;
        let one = PlanMove {
            vm: vm.vm,
            from: host,
            to: to.clone(),
            qmp,
            replace: Vec::new(),
            definition: None,
            max_bandwidth_bytes_per_s: None,
            domain: None,
        };
        moves.insert(at, one);
    }
    let used: BTreeSet<String> = moves
        .values()
        .flat_map(|one: &PlanMove| [one.from.clone(), one.to.clone()])
        .collect();
    hosts.retain(|name, _| used.contains(name));
    Ok(Plan {
        hosts,
        moves: moves.into_values().collect(),
        ..Plan::default()
    })
}

fn know(hosts: &mut BTreeMap<String, Host>, name: &str, host: &Host) -> Result<(), Refusal> {
    match hosts.insert(name.to_owned(), host.clone()) {
        Some(other) => {
            let message = format!(
                "{} and {} both say that they are host `{name}`: a host cannot be emptied to \
                 itself, and two hosts need two names in their configurations",
                other.control, host.control
            );
            Err(Refusal::new(RefusalCode::BadRequest, message))
        }
        None => Ok(()),
    }
}

/// A plan knows its VMs by their names.
fn refuse_namesakes(vms: &[(String, HostVm)]) -> Result<(), Refusal> {
    let mut homes: BTreeMap<&str, &str> = BTreeMap::new();
    for (host, vm) in vms.iter().filter(|(_, vm)| !vm.vm.is_empty()) {
        let Some(other) = homes.insert(&vm.vm, host) else {
            continue;
        };
        let message = if other == host {
            format!(
                "host `{host}` runs two VMs with the name `{0}`: a plan names a VM once. Give one of \
                 them another name (`-name`), or write a plan without it; nothing was started",
                vm.vm
            )
        } else {
            format!(
                "host `{other}` and host `{host}` each run a VM `{}`: a plan names a VM once. Empty \
                 one host after the other; nothing was started",
                vm.vm
            )
        };
        return Err(Refusal::of_vm(RefusalCode::BadRequest, &vm.vm, message));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn host(name: &str, free: u64, vms: &[(&str, u64)]) -> Asked {
        let vm = |(pid, (vm, memory)): (u32, &(&str, u64))| HostVm {
            vm: (*vm).to_owned(),
            pid,
            qmp: Some(format!("/run/{vm}").into()),
            memory_bytes: *memory,
        };
        Asked {
            host: Host {
                control: format!("{name}:1"),
                bulk: format!("{name}:2"),
            },
            inventory: Inventory {
                name: name.to_owned(),
                bulk: format!("{name}:2"),
                free_bytes: free,
                vms: (1..).zip(vms).map(vm).collect(),
            },
        }
    }

    #[test]
    fn the_largest_are_placed_first_and_started_in_their_hosts_order() {
        let from = vec![host("a", 0, &[("small", GIB), ("large", 6 * GIB)])];
        let to = vec![host("bb", 8 * GIB, &[]), host("ccc", 7 * GIB, &[])];
        let plan = place(from, to).unwrap();
        let went: Vec<_> = plan.moves.iter().map(|m| (&*m.vm, &*m.to)).collect();
        assert_eq!(went, [("small", "ccc"), ("large", "bb")]);
        plan.check().unwrap();
    }

    #[test]
    fn a_host_that_takes_nothing_is_not_in_the_plan() {
        let to = vec![host("bb", 8 * GIB, &[]), host("ccc", GIB, &[("its", GIB)])];
        let plan = place(vec![host("a", 0, &[("vm", GIB)])], to).unwrap();
        assert_eq!(plan.hosts.keys().collect::<Vec<_>>(), ["a", "bb"]);
        assert_eq!(plan.moves.len(), 1);
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_numbers() {
        let from = vec![host("a", 0, &[("one", 3 * GIB), ("two", 3 * GIB)])];
        let refusal = place(from, vec![host("bb", 5 * GIB, &[])]).unwrap_err();
        assert_eq!(refusal.code, RefusalCode::NoMemory);
        assert!(refusal.message.contains("two"), "{refusal}");
    }

    #[test]
    fn a_vm_without_a_socket_is_named_and_nothing_is_planned() {
        let mut from = host("a", 0, &[("one", GIB), ("two", GIB)]);
        from.inventory.vms[1].qmp = None;
        let refusal = place(vec![from], vec![host("bb", 5 * GIB, &[])]).unwrap_err();
        assert_eq!(refusal.code, RefusalCode::CannotMigrate);
        assert_eq!(refusal.vm.as_deref(), Some("two"));
    }

    #[test]
    fn two_hosts_with_vms_of_one_name_are_both_named_with_the_way_out() {
        let from = vec![host("a", 0, &[("web", GIB)]), host("c", 0, &[("web", GIB)])];
        let refusal = place(from, vec![host("bb", 5 * GIB, &[])]).unwrap_err();
        for said in [
            "host `a`",
            "host `c`",
            "VM `web`",
            "one host after the other",
        ] {
            assert!(refusal.message.contains(said), "{refusal}");
        }
        let twice = vec![host("a", 0, &[("web", GIB), ("web", GIB)])];
        let refusal = place(twice, vec![host("bb", 5 * GIB, &[])]).unwrap_err();
        assert!(refusal.message.contains("two VMs"), "{refusal}");
    }

    #[test]
    fn a_host_is_not_emptied_to_itself() {
        let from = vec![host("a", 0, &[("one", GIB)])];
        let refusal = place(from, vec![host("a", 5 * GIB, &[])]).unwrap_err();
        assert_eq!(refusal.code, RefusalCode::BadRequest);
    }

    #[test]
    fn an_address_for_all_is_reached_where_the_control_api_is() {
        assert_eq!(reachable("0.0.0.0:9", "10.0.0.1:8"), "10.0.0.1:9");
        assert_eq!(reachable("[::]:9", "[fe80::1]:8"), "[fe80::1]:9");
        assert_eq!(reachable("10.0.0.2:9", "10.0.0.1:8"), "10.0.0.2:9");
    }
}
