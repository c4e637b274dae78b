//! Reading a plan: from TOML with places in its errors, then checked as a whole, then resolved
//! into one [`MoveSpec`] for each move.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::types::{Mode, MoveSpec, Plan, PlanMove, Preset, RackPeer, RackSpec, Scope, Settings};

mod seeds;

/// Trust domain of a move that names none.
pub const DEFAULT_DOMAIN: &str = "default";

/// Names become parts of file names, ids and unix socket paths.
const NAME_BYTES_MAX: usize = 48;
/// A rack of forty hosts with a hundred VMs each; the coordinator follows each move.
const MOVES_MAX: usize = 4096;
/// Below this not even the protocol's headers get through in a peer's timeout.
const BANDWIDTH_BYTES_PER_S_MIN: u64 = 64 * 1024;
/// What an entry id has room for.
const INDEX_SHARDS_MAX: usize = 16;
/// QEMU's own limit of `downtime-limit`.
const DOWNTIME_LIMIT_MS_MAX: u64 = 2_000_000;

/// A day: who waits longer has chosen the wrong mode.
const POSTCOPY_AFTER_S_MAX: u64 = 24 * 3600;

/// Why a plan cannot be used; found before anything is asked of any agent.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The file cannot be read.
    #[error("cannot read the plan {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// Not TOML, or a key is unknown, missing or of the wrong type.
    #[error("{at}: {message}")]
    Syntax {
        /// `file:line:column`.
        at: String,
        /// What is wrong there.
        message: String,
    },
    /// There is nothing to do, or too much.
    #[error("the plan has {0} moves: it must have 1 to {MOVES_MAX}")]
    MoveCount(usize),
    /// A name with characters that names may not have.
    #[error("{what} `{name}`: {must}")]
    Name {
        /// VM, host, group or trust domain.
        what: &'static str,
        /// The name.
        name: String,
        /// What it must be.
        must: &'static str,
    },
    /// Two moves of one VM.
    #[error("VM `{0}` has two moves: a VM moves once in a plan")]
    TwoMoves(String),
    /// A move from or to a host that `hosts` does not have.
    #[error("VM `{vm}` moves {direction} host `{host}`, which the plan's [hosts] does not have")]
    UnknownHost {
        /// The VM.
        vm: String,
        /// `from` or `to`.
        direction: &'static str,
        /// The host.
        host: String,
    },
    /// Source and target are the same.
    #[error("VM `{vm}` moves from host `{host}` to itself")]
    SameHost {
        /// The VM.
        vm: String,
        /// The host, or the address that both hosts share.
        host: String,
    },
    /// A limit that cannot be.
    #[error("{whose}: `{key}` is {value}: it must be {min} to {max}")]
    Limit {
        /// The plan or a VM.
        whose: String,
        /// The key.
        key: &'static str,
        /// What it holds.
        value: u64,
        /// Least.
        min: u64,
        /// Most.
        max: u64,
    },
    /// An address without a port.
    #[error("host `{host}`: `{key}` is `{value}`: it must be HOST:PORT")]
    Address {
        /// The host.
        host: String,
        /// `control` or `bulk`.
        key: &'static str,
        /// What it holds.
        value: String,
    },
    /// Contents cannot be taken from VMs at the target hosts.
    #[error("{whose}: {problem}")]
    Seeds {
        /// A resident VM, or the plan.
        whose: String,
        /// Why.
        problem: &'static str,
    },
    /// A time limit for a mode that has none.
    #[error(
        "`postcopy_after_s` says when a VM goes over to post-copy, which goes with mode `hybrid` only"
    )]
    PostcopyTime,
    /// A command line or a replacement that cannot work.
    #[error("VM `{vm}`: `{key}` {problem}")]
    CommandLine {
        /// The VM.
        vm: String,
        /// `definition`, `replace` or `qmp`.
        key: &'static str,
        /// What is wrong with it.
        problem: &'static str,
    },
}

impl Plan {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Self, PlanError> {
        let text = std::fs::read_to_string(path).map_err(|source| PlanError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(path, &text)
    }

    /// Parses the TOML text of the file `path` and checks it.
    pub fn parse(path: &Path, text: &str) -> Result<Self, PlanError> {
        let plan: Self = toml::from_str(text).map_err(|error| PlanError::Syntax {
            at: position(path, text, error.span()),
            message: error.message().to_owned(),
        })?;
        plan.check()?;
        Ok(plan)
    }

    /// Checks what concerns the plan as a whole.
    pub fn check(&self) -> Result<(), PlanError> {
        if self.moves.is_empty() || self.moves.len() > MOVES_MAX {
            return Err(PlanError::MoveCount(self.moves.len()));
        }
        check_limit("the plan", self.max_bandwidth_bytes_per_s)?;
        if let Some(value) = self
            .downtime_limit_ms
            .filter(|ms| !(1..=DOWNTIME_LIMIT_MS_MAX).contains(ms))
        {
            return Err(PlanError::Limit {
                whose: "the plan".to_owned(),
                key: "downtime_limit_ms",
                value,
                min: 1,
                max: DOWNTIME_LIMIT_MS_MAX,
            });
        }
        let settings = self.settings();
        if let Some(value) = self.postcopy_after_s {
            if settings.mode != Mode::Hybrid {
                return Err(PlanError::PostcopyTime);
            }
            if !(1..=POSTCOPY_AFTER_S_MAX).contains(&value) {
                return Err(PlanError::Limit {
                    whose: "the plan".to_owned(),
                    key: "postcopy_after_s",
                    value,
                    min: 1,
                    max: POSTCOPY_AFTER_S_MAX,
                });
            }
        }
        self.check_hosts()?;
        let (mut seen, mut monitors) = (HashSet::new(), HashSet::new());
        for plan_move in &self.moves {
            self.check_move(plan_move)?;
            if !seen.insert(&plan_move.vm) {
                return Err(PlanError::TwoMoves(plan_move.vm.clone()));
            }
            if !monitors.insert((&plan_move.from, &plan_move.qmp)) {
                return Err(PlanError::CommandLine {
                    vm: plan_move.vm.clone(),
                    key: "qmp",
                    problem: "is that of another move from the same host: each VM has its own",
                });
            }
        }
        self.check_seeds()
    }

    fn check_hosts(&self) -> Result<(), PlanError> {
        if self.index.len() > INDEX_SHARDS_MAX {
            return Err(PlanError::Limit {
                whose: "the plan".to_owned(),
                key: "index",
                value: self.index.len() as u64,
                min: 0,
                max: INDEX_SHARDS_MAX as u64,
            });
        }
        for value in &self.index {
            if host_and_port(value).is_none() {
                let (host, value) = ("of the index".to_owned(), value.clone());
                return Err(PlanError::Address {
                    host,
                    key: "index",
                    value,
                });
            }
        }
        for (name, host) in &self.hosts {
            named("host", name)?;
            for (key, value) in [("control", &host.control), ("bulk", &host.bulk)] {
                if host_and_port(value).is_none() {
                    let (host, value) = (name.clone(), value.clone());
                    return Err(PlanError::Address { host, key, value });
                }
            }
        }
        Ok(())
    }

    fn check_move(&self, plan_move: &PlanMove) -> Result<(), PlanError> {
        let vm = &plan_move.vm;
        named("VM", vm)?;
        named("trust domain", plan_move.domain())?;
        check_limit(&format!("VM `{vm}`"), plan_move.max_bandwidth_bytes_per_s)?;
        for (direction, host) in [("from", &plan_move.from), ("to", &plan_move.to)] {
            if !self.hosts.contains_key(host) {
                let (vm, host) = (vm.clone(), host.clone());
                return Err(PlanError::UnknownHost {
                    vm,
                    direction,
                    host,
                });
            }
        }
        if plan_move.from == plan_move.to {
            return Err(PlanError::SameHost {
                vm: vm.clone(),
                host: plan_move.from.clone(),
            });
        }
        let (from, to) = (&self.hosts[&plan_move.from], &self.hosts[&plan_move.to]);
        if from.control == to.control || from.bulk == to.bulk {
            let host = format!("{} (two names of one agent)", plan_move.from);
            return Err(PlanError::SameHost {
                vm: vm.clone(),
                host,
            });
        }
        plan_move
            .command_line_problem()
            .map_or(Ok(()), |(key, problem)| {
                Err(PlanError::CommandLine {
                    vm: vm.clone(),
                    key,
                    problem,
                })
            })
    }

    /// The preset with the plan's overrides.
    #[must_use]
    pub fn settings(&self) -> Settings {
        let preset = self.preset.unwrap_or(Preset::Full).settings();
        Settings {
            scope: self.scope.unwrap_or(preset.scope),
            sharing: self.sharing.unwrap_or(preset.sharing),
            compression: self.compression.unwrap_or(preset.compression),
            mode: self.mode.unwrap_or(preset.mode),
        }
    }

    /// The specs of a checked plan's moves, in its order. `keys` has a secret for each of
    /// [`Self::domains`]; the group's budget is not divided yet.
    #[must_use]
    pub fn specs(&self, group: &str, keys: &BTreeMap<String, String>) -> Vec<MoveSpec> {
        let settings = self.settings();
        let peers = self.rack_peers();
        let spec = |plan_move: &PlanMove| MoveSpec {
            id: format!("{group}/{}", plan_move.vm),
            group: group.to_owned(),
            vm: plan_move.vm.clone(),
            qmp: plan_move.qmp.clone(),
            target_name: plan_move.to.clone(),
            target_bulk: self.hosts[&plan_move.to].bulk.clone(),
            settings,
            domain_key: keys.get(plan_move.domain()).cloned().unwrap_or_default(),
            replace: plan_move.replace.clone(),
            definition: plan_move.definition.clone(),
            max_bandwidth_bytes_per_s: plan_move.max_bandwidth_bytes_per_s,
            group_bandwidth_bytes_per_s: None,
            downtime_limit_ms: self.downtime_limit_ms,
            postcopy_after_s: self.postcopy_after_s,
            postcopy_preempt: self.postcopy_preempt,
            confirm_handover: self.confirm_handover,
            rack: (settings.scope == Scope::Rack).then(|| self.rack_spec(plan_move, &peers)),
        };
        self.moves.iter().map(spec).collect()
    }

    /// The target hosts, numbered.
    fn rack_peers(&self) -> Vec<RackPeer> {
        let targets: BTreeSet<&String> = self.moves.iter().map(|m| &m.to).collect();
        let peer = |(host, name): (u16, &String)| RackPeer {
            host,
            name: name.clone(),
            bulk: self.hosts[name].bulk.clone(),
        };
        (0..).zip(targets).map(peer).collect()
    }

    fn rack_spec(&self, plan_move: &PlanMove, peers: &[RackPeer]) -> RackSpec {
        let target = peers.iter().find(|peer| peer.name == plan_move.to);
        let embedded = || self.moves.first().map(|m| self.hosts[&m.from].bulk.clone());
        RackSpec {
            index: if self.index.is_empty() {
                embedded().into_iter().collect()
            } else {
                self.index.clone()
            },
            target: target.map_or(0, |peer| peer.host),
            shared_target: self
                .moves
                .iter()
                .any(|m| m.to == plan_move.to && m.from != plan_move.from),
            peers: peers.to_vec(),
        }
    }

    /// The trust domains that the plan names.
    pub fn domains(&self) -> impl Iterator<Item = &str> {
        self.moves.iter().map(PlanMove::domain)
    }
}

impl PlanMove {
    /// The trust domain of the VM.
    #[must_use]
    pub fn domain(&self) -> &str {
        self.domain.as_deref().unwrap_or(DEFAULT_DOMAIN)
    }

    fn command_line_problem(&self) -> Option<(&'static str, &'static str)> {
        if !self.qmp.is_absolute() {
            return Some(("qmp", "must be an absolute path on the source host"));
        }
        if self.definition.as_ref().is_some_and(Vec::is_empty) {
            return Some(("definition", "is empty: it starts with the program"));
        }
        self.replace
            .iter()
            .any(|replace| replace.from.is_empty())
            .then_some(("replace", "has an empty `from`"))
    }
}

/// Checks a group's id.
pub fn check_group_id(id: &str) -> Result<(), PlanError> {
    named("group", id)
}

fn named(what: &'static str, name: &str) -> Result<(), PlanError> {
    check_name(name).map_err(|must| PlanError::Name {
        what,
        name: name.to_owned(),
        must,
    })
}

/// Names of VMs, hosts, groups and domains; the error says what a name must be.
pub(crate) fn check_name(name: &str) -> Result<(), &'static str> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let starts_well = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if starts_well && name.len() <= NAME_BYTES_MAX && name.chars().all(plain) {
        Ok(())
    } else {
        Err("a name is 1 to 48 letters, digits, `.`, `_` or `-`, and starts with a letter or digit")
    }
}

fn check_limit(whose: &str, limit: Option<u64>) -> Result<(), PlanError> {
    let (min, max) = (BANDWIDTH_BYTES_PER_S_MIN, u64::from(u32::MAX) * 1024);
    match limit {
        Some(value) if !(min..=max).contains(&value) => {
            let (whose, key) = (whose.to_owned(), "max_bandwidth_bytes_per_s");
            Err(PlanError::Limit {
                whose,
                key,
                value,
                min,
                max,
            })
        }
        _ => Ok(()),
    }
}

/// Splits `host:port`, with an IPv6 host in brackets.
pub(crate) fn host_and_port(address: &str) -> Option<(&str, u16)> {
    let (host, port) = address.rsplit_once(':')?;
    let host = match host.strip_prefix('[') {
        Some(inner) => inner.strip_suffix(']')?,
        None if host.contains(':') => return None,
        None => host,
    };
    let port = port.parse().ok().filter(|&port| port != 0)?;
    (!host.is_empty()).then_some((host, port))
}

/// `file:line:column` of the start of a span of the text.
pub(crate) fn position(path: &Path, text: &str, span: Option<Range<usize>>) -> String {
    let before = span.and_then(|span| text.get(..span.start)).unwrap_or("");
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or("").chars().count() + 1;
    format!("{}:{line}:{column}", path.display())
}

#[cfg(test)]
mod tests;
