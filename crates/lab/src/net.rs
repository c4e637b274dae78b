//! The racks: namespaces, bridges and shaped links.
//!
//! ```text
//!   s1 ─edge─┐                                ┌─edge─ t1
//!   s2 ─edge─┤ bridge of sr ─core─ bridge of tr ├─edge─ t2      10.77.0.0/16, shaped
//!
//!   s1 ─obs──┬──┬── observer ns ──┬──┬──obs─ t1                 10.78.0.0/16, not shaped
//!   s2 ─obs──┘  └─────────────────┘  └──obs─ t2
//! ```
//! Each host is a namespace. Its `edge` interface is the host's uplink to its rack's switch: a
//! bridge in a namespace of its own; the core link joins the two bridges. `tbf` shapes both
//! directions of edge and core links.
//!
//! Hosts that take no part in the migration can be added: pairs of senders and receivers in the two
//! racks, and a server in the source rack, all on edge links of their own. Where guests have a second
//! card for the rack's network, a host's edge link ends in a bridge that also holds their taps.
//!
//! Guests' first taps hang on a separate network that is not shaped, and whose far ends the observer
//! holds: one interface for each host, all with the same two addresses (IP and MAC). A guest finds
//! the observer at the same place wherever it runs, and the observer knows from which host each
//! heartbeat came.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Context;
use serde::Deserialize;

use crate::cgroup::Cgroup;
use crate::session::{Session, making};
use crate::shell::{output, output_with_input};

/// Where the observer listens, on every host's observation link.
pub const OBSERVER: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 1);
/// Where servers for the guests are.
pub const SERVER: Ipv4Addr = Ipv4Addr::new(10, 77, 5, 1);
/// Name of the observer's namespace.
pub const OBSERVER_HOST: &str = "obs";
const OBSERVER_MAC: &str = "02:67:77:00:00:01";

/// Bridge between a host's edge link and its guests' second cards.
const RACK_BRIDGE: &str = "ebr";
/// Of no card in the lab.
const NOBODY_MAC: &str = "02:67:77:ff:ff:ff";

/// How long a packet may wait in a shaped link's queue before it is dropped: about what the buffer
/// of a switch port holds, and enough for TCP to fill the link at the lab's round-trip times.
const QUEUE_MS: u64 = 30;
/// A link's burst: what it passes in this time at its rate, and at least [`BURST_MIN_BYTES`].
const BURST_MS: u64 = 1;
/// `tbf` drops packets above its burst; larger segments are split for it by the kernel.
const BURST_MIN_BYTES: u64 = 16 * 1024;

/// Bytes a second of a rate in Mbit/s.
#[must_use]
pub fn bytes_per_s(mbit: u64) -> u64 {
    mbit * 1_000_000 / 8
}

/// What stands beside the hosts of the migration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Beside {
    /// Pairs of a sender in the source rack and a receiver in the target rack.
    pub pairs: u32,
    /// A server in the source rack, with the guests on the rack's network.
    pub server: bool,
}

/// Which rack a host stands in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rack {
    /// The one that VMs leave.
    Source,
    /// The one that they go to.
    Target,
}

impl Rack {
    fn letter(self) -> char {
        match self {
            Self::Source => 's',
            Self::Target => 't',
        }
    }

    fn switch(self) -> &'static str {
        match self {
            Self::Source => "sr",
            Self::Target => "tr",
        }
    }

    fn subnet(self) -> u8 {
        match self {
            Self::Source => 1,
            Self::Target => 2,
        }
    }
}

/// A host's names and address, and what its processes belong to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostAddress {
    /// `s1`, `t2`
    pub name: String,
    /// Name of its network namespace.
    pub namespace: String,
    /// Its address on the edge link.
    pub ip: Ipv4Addr,
    /// Its rack.
    pub rack: Rack,
    /// Everything on it belongs to this.
    pub cgroup: Cgroup,
}

/// Rates of the links in Mbit/s; 0 leaves a link unshaped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Links {
    /// Between the racks.
    pub core_mbit: u64,
    /// From each host to its rack's switch.
    pub edge_mbit: u64,
}

/// Bytes that have crossed links so far, headers included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Core link, source rack to target rack.
    pub core_to_target: u64,
    /// Core link, target rack to source rack.
    pub core_to_source: u64,
    /// Sent by all target hosts on their edge links.
    pub target_edges_sent: u64,
    /// Received by all source hosts on their edge links.
    pub source_edges_received: u64,
}

impl Counters {
    /// What has crossed since `earlier`.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        Self {
            core_to_target: self.core_to_target.saturating_sub(earlier.core_to_target),
            core_to_source: self.core_to_source.saturating_sub(earlier.core_to_source),
            target_edges_sent: self
                .target_edges_sent
                .saturating_sub(earlier.target_edges_sent),
            source_edges_received: self
                .source_edges_received
                .saturating_sub(earlier.source_edges_received),
        }
    }

    /// Both ways on the core link.
    #[must_use]
    pub fn core(self) -> u64 {
        self.core_to_target + self.core_to_source
    }

    /// What targets sent that did not leave their rack.
    ///
    /// The bulk goes the other way: what is taken off are acknowledgements, which no link drops and
    /// which are not split on their way, so that both counters count the same.
    #[must_use]
    pub fn target_to_target(self) -> u64 {
        self.target_edges_sent.saturating_sub(self.core_to_source)
    }

    /// What sources received that did not come from the other rack. Received, not sent: the bulk
    /// leaves a source rack, and what its core link drops would be taken for traffic inside.
    #[must_use]
    pub fn source_to_source(self) -> u64 {
        self.source_edges_received
            .saturating_sub(self.core_to_source)
    }
}

/// The networks of one run. They disappear with their [`Session`].
#[derive(Debug)]
pub struct Net {
    hosts: Vec<HostAddress>,
    pairs: Vec<[HostAddress; 2]>,
    server: Option<HostAddress>,
    observer_namespace: String,
    core_namespaces: [String; 2],
}

impl Net {
    /// Builds both racks with so many hosts each, and what stands beside them.
    pub fn build(
        session: &Session,
        [sources, targets]: [u32; 2],
        links: Links,
        beside: Beside,
    ) -> anyhow::Result<Self> {
        let hosts: Vec<HostAddress> = [(Rack::Source, sources), (Rack::Target, targets)]
            .into_iter()
            .flat_map(|(rack, count)| (1..=count).map(move |nth| (rack, nth)))
            .map(|(rack, nth)| address(session, rack, nth))
            .collect::<anyhow::Result<_>>()?;
        let core_namespaces = [Rack::Source, Rack::Target].map(|r| session.namespace(r.switch()));
        let observer_namespace = session.namespace(OBSERVER_HOST);
        let pairs = (1..=beside.pairs)
            .map(|nth| {
                Ok([
                    further(session, Rack::Source, ("bs", 3), nth)?,
                    further(session, Rack::Target, ("bt", 4), nth)?,
                ])
            })
            .collect::<anyhow::Result<_>>()?;
        let server = beside
            .server
            .then(|| further(session, Rack::Source, ("srv", 5), 1))
            .transpose()?;
        let net = Self {
            hosts,
            pairs,
            server,
            observer_namespace,
            core_namespaces,
        };
        net.make_namespaces()?;
        net.make_core(links)?;
        for host in &net.hosts {
            net.make_host(host, links)
                .with_context(|| format!("connecting host {}", host.name))?;
        }
        for host in net.further() {
            net.make_edge(host, links)
                .with_context(|| format!("connecting host {}", host.name))?;
        }
        Ok(net)
    }

    /// Pairs of hosts that have traffic of their own.
    #[must_use]
    pub fn pairs(&self) -> &[[HostAddress; 2]] {
        &self.pairs
    }

    /// The host with servers for the guests.
    #[must_use]
    pub fn server(&self) -> Option<&HostAddress> {
        self.server.as_ref()
    }

    fn further(&self) -> impl Iterator<Item = &HostAddress> {
        self.pairs.iter().flatten().chain(&self.server)
    }

    /// Adds a tap for a guest to `host` and connects it to the rack's network.
    pub fn add_rack_tap(&self, host: &HostAddress, tap: &str) -> anyhow::Result<()> {
        ip(
            &host.namespace,
            &format!("tuntap add dev {tap} mode tap\nlink set {tap} master {RACK_BRIDGE} up\n"),
        )
    }

    /// The interface that has a host's address in the rack's network.
    fn card(&self) -> &'static str {
        if self.server.is_some() {
            RACK_BRIDGE
        } else {
            "edge"
        }
    }

    /// All hosts, sources first.
    #[must_use]
    pub fn hosts(&self) -> &[HostAddress] {
        &self.hosts
    }

    /// The observer's namespace, as a file to enter it by.
    #[must_use]
    pub fn observer_namespace_file(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.observer_namespace)
    }

    /// Adds a tap for a guest to `host` and connects it to the observation network.
    pub fn add_tap(&self, host: &HostAddress, tap: &str) -> anyhow::Result<()> {
        ip(
            &host.namespace,
            &format!("tuntap add dev {tap} mode tap\nlink set {tap} master obr up\n"),
        )
    }

    /// As [`Net::add_tap`], unless the host has it already.
    pub fn ensure_tap(&self, host: &HostAddress, tap: &str) -> anyhow::Result<()> {
        let show = ["-n", &host.namespace, "link", "show", "dev", tap];
        let known = Command::new("ip").args(show).output();
        if known.context("looking for a tap")?.status.success() {
            return Ok(());
        }
        self.add_tap(host, tap)
    }

    /// Reads the interfaces' counters.
    pub fn counters(&self) -> anyhow::Result<Counters> {
        let of_rack = |rack, way| -> anyhow::Result<u64> {
            let hosts = self.hosts.iter().filter(|host| host.rack == rack);
            hosts.map(|host| bytes(&host.namespace, "edge", way)).sum()
        };
        // What the pairs have received took the core link, and is none of the migration's.
        let of_pairs = |end: usize| -> anyhow::Result<u64> {
            let ends = self.pairs.iter().map(|pair| &pair[end].namespace);
            ends.map(|name| bytes(name, "edge", Way::Received)).sum()
        };
        // Reading takes time in which they receive more: they are read before and after the core.
        let early = [of_pairs(0)?, of_pairs(1)?];
        let core = |nth: usize| bytes(&self.core_namespaces[nth], "core", Way::Sent);
        let [forth, back] = [core(0)?, core(1)?];
        let late = [of_pairs(0)?, of_pairs(1)?];
        let [pairs_back, pairs_forth] =
            [0, 1].map(|end: usize| u64::midpoint(early[end], late[end]));
        Ok(Counters {
            core_to_target: forth.saturating_sub(pairs_forth),
            core_to_source: back.saturating_sub(pairs_back),
            target_edges_sent: of_rack(Rack::Target, Way::Sent)?,
            source_edges_received: of_rack(Rack::Source, Way::Received)?,
        })
    }

    /// Takes the edge link of `host` down (at the switch, as when a cable is pulled) or up again.
    pub fn set_edge(&self, host: &HostAddress, up: bool) -> anyhow::Result<()> {
        let state = if up { "up" } else { "down" };
        let switch = self.switch_of(host);
        ip(switch, &format!("link set {} {state}\n", host.name))
    }

    /// Takes the core link down, as when its cable is pulled; or up again.
    pub fn set_core(&self, up: bool) -> anyhow::Result<()> {
        let state = if up { "up" } else { "down" };
        ip(
            &self.core_namespaces[0],
            &format!("link set core {state}\n"),
        )
    }

    /// Loses all frames between `host` and the other hosts of its rack, or lets them pass again:
    /// they are sent to a card that nobody has, as when a switch has gone wrong between two ports.
    pub fn set_peers(&self, host: &HostAddress, up: bool) -> anyhow::Result<()> {
        let is_peer = |other: &&HostAddress| other.rack == host.rack && *other != host;
        let card = self.card();
        let set = |at: &HostAddress, to: &HostAddress| {
            let line = if up {
                format!("neigh del {} dev {card}\n", to.ip)
            } else {
                format!(
                    "neigh replace {} lladdr {NOBODY_MAC} dev {card} nud permanent\n",
                    to.ip
                )
            };
            ip(&at.namespace, &line)
        };
        for other in self.hosts.iter().filter(is_peer) {
            set(host, other)?;
            set(other, host)?;
        }
        Ok(())
    }

    fn switch_of(&self, host: &HostAddress) -> &str {
        match host.rack {
            Rack::Source => &self.core_namespaces[0],
            Rack::Target => &self.core_namespaces[1],
        }
    }

    fn make_namespaces(&self) -> anyhow::Result<()> {
        let hosts = self.hosts.iter().chain(self.further());
        let all = hosts
            .map(|host| &host.namespace)
            .chain(&self.core_namespaces)
            .chain([&self.observer_namespace]);
        let lines: String = all.map(|name| format!("netns add {name}\n")).collect();
        let _making = making();
        output_with_input(Command::new("ip").args(["-batch", "-"]), &lines)?;
        Ok(())
    }

    fn make_core(&self, links: Links) -> anyhow::Result<()> {
        let [source, target] = &self.core_namespaces;
        for switch in [source, target] {
            ip(switch, "link add br0 type bridge\nlink set br0 up\n")?;
        }
        ip(
            source,
            &format!("link add core type veth peer name core netns {target}\n"),
        )?;
        for switch in [source, target] {
            ip(switch, "link set core master br0 up\n")?;
            shape(switch, "core", links.core_mbit)?;
        }
        Ok(())
    }

    /// A host's link to its rack's switch, and its address there.
    fn make_edge(&self, host: &HostAddress, links: Links) -> anyhow::Result<()> {
        let switch = self.switch_of(host);
        let (name, card) = (&host.name, self.card());
        let bridge = if card == "edge" {
            String::new()
        } else {
            format!(
                "link add {card} type bridge\nlink set edge master {card}\nlink set {card} up\n"
            )
        };
        ip(
            &host.namespace,
            &format!(
                "link set lo up\n\
                 link add edge type veth peer name {name} netns {switch}\n\
                 {bridge}\
                 addr add {}/16 dev {card}\n\
                 link set edge up\n",
                host.ip
            ),
        )?;
        ip(switch, &format!("link set {name} master br0 up\n"))?;
        shape(&host.namespace, "edge", links.edge_mbit)?;
        shape(switch, name, links.edge_mbit)
    }

    fn make_host(&self, host: &HostAddress, links: Links) -> anyhow::Result<()> {
        self.make_edge(host, links)?;
        let (name, observer) = (&host.name, &self.observer_namespace);
        ip(
            &host.namespace,
            &format!(
                "link add obs type veth peer name {name} netns {observer}\n\
                 link add obr type bridge\n\
                 link set obs master obr up\n\
                 link set obr up\n"
            ),
        )?;
        ip(
            observer,
            &format!(
                "link set {name} address {OBSERVER_MAC}\n\
                 addr add {OBSERVER}/16 dev {name}\n\
                 link set {name} up\n"
            ),
        )
    }
}

/// A host beside those of the migration.
fn further(
    session: &Session,
    rack: Rack,
    (kind, subnet): (&str, u8),
    nth: u32,
) -> anyhow::Result<HostAddress> {
    let last = u8::try_from(nth).context("too many hosts beside the racks")?;
    let name = format!("{kind}{nth}");
    Ok(HostAddress {
        namespace: session.namespace(&name),
        cgroup: Cgroup::create(session.prefix(), &name)?,
        ip: Ipv4Addr::new(10, 77, subnet, last),
        name,
        rack,
    })
}

fn address(session: &Session, rack: Rack, nth: u32) -> anyhow::Result<HostAddress> {
    let last = u8::try_from(nth)
        .ok()
        .filter(|n| *n < 255)
        .context("too many hosts in a rack")?;
    let name = format!("{}{nth}", rack.letter());
    Ok(HostAddress {
        namespace: session.namespace(&name),
        cgroup: Cgroup::create(session.prefix(), &name)?,
        ip: Ipv4Addr::new(10, 77, rack.subnet(), last),
        name,
        rack,
    })
}

/// Runs lines of `ip` in a namespace.
fn ip(namespace: &str, lines: &str) -> anyhow::Result<()> {
    output_with_input(
        Command::new("ip").args(["-n", namespace, "-batch", "-"]),
        lines,
    )?;
    Ok(())
}

fn shape(namespace: &str, device: &str, mbit: u64) -> anyhow::Result<()> {
    if mbit == 0 {
        return Ok(());
    }
    let burst = (mbit * 1_000_000 / 8 * BURST_MS / 1000).max(BURST_MIN_BYTES);
    output(
        Command::new("tc")
            .args(["-n", namespace, "qdisc", "add", "dev", device, "root"])
            .args([
                "tbf".into(),
                "rate".into(),
                format!("{mbit}mbit"),
                "burst".into(),
                format!("{burst}"),
                "latency".into(),
                format!("{QUEUE_MS}ms"),
            ]),
    )?;
    Ok(())
}

/// Which of an interface's counters.
#[derive(Clone, Copy)]
enum Way {
    Sent,
    Received,
}

fn bytes(namespace: &str, device: &str, way: Way) -> anyhow::Result<u64> {
    let text = output(
        Command::new("ip").args(["-n", namespace, "-s", "-j", "link", "show", "dev", device]),
    )?;
    let value: serde_json::Value =
        serde_json::from_str(&text).with_context(|| format!("statistics of {device}"))?;
    let counter = match way {
        Way::Sent => "/0/stats64/tx/bytes",
        Way::Received => "/0/stats64/rx/bytes",
    };
    value
        .pointer(counter)
        .and_then(serde_json::Value::as_u64)
        .with_context(|| format!("`ip` shows no statistics of {device}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stays_in_a_rack_is_its_edges_without_the_core() {
        let before = Counters {
            core_to_target: 1_000,
            core_to_source: 100,
            target_edges_sent: 150,
            source_edges_received: 130,
        };
        let after = Counters {
            core_to_target: 91_000,
            core_to_source: 2_100,
            target_edges_sent: 42_150,
            source_edges_received: 5_130,
        };
        let crossed = after.since(before);
        assert_eq!(crossed.core(), 92_000);
        assert_eq!(crossed.target_to_target(), 40_000);
        assert_eq!(crossed.source_to_source(), 3_000);
        // A few frames in flight between two readings are no traffic.
        let skewed = Counters {
            source_edges_received: 1_900,
            ..crossed
        };
        assert_eq!(skewed.source_to_source(), 0);
    }
}
