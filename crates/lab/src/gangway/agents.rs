//! One `gangway agent` on each host.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::mount::{MountFlags, mount};
use toml::Table;

use super::index::Index;
use crate::bench::Bench;
use crate::fault::{self, Action};
use crate::guest::Host;
use crate::install;
use crate::net::Rack;
use crate::pki::Authority;
use crate::process;
use crate::results::AgentPeak;
use crate::session::making;
use crate::shell::say;

/// Port of the control API for other agents.
pub(super) const CONTROL_PORT: u16 = 7701;
/// Port on which moves arrive.
pub(super) const BULK_PORT: u16 = 7702;
/// From its start to its answering on its socket.
const PATIENCE: Duration = Duration::from_secs(20);
/// Size of the file system that a full disk is played on.
const SMALL_DISK: &std::ffi::CStr = c"size=1m";

/// The agents of all hosts of a bench. They end when it is dropped, before the namespaces are
/// cleared, so that none of them takes the end of the others for a failure that it must handle.
#[derive(Debug)]
pub struct Agents {
    program: PathBuf,
    agents: Vec<Agent>,
    index: Index,
}

#[derive(Debug)]
struct Agent {
    host: Host,
    /// Replaced when it is started again.
    child: Mutex<Child>,
}

impl Agents {
    /// Starts one agent on each host and waits until all answer.
    pub fn start(bench: &Bench<'_>) -> anyhow::Result<Self> {
        let program = install::gangway(bench.scenario.gangway.as_deref())?;
        say(&format!("starting {} agents", bench.hosts.len()));
        let authority = Authority::new().context("making certificates")?;
        let small_disk = bench
            .scenario
            .fault
            .as_ref()
            .is_some_and(|fault| fault.action == Action::FillDisk);
        let mut agents = Vec::new();
        for host in &bench.hosts {
            authority.equip(&host.dir.join("tls"), host.name(), host.address.ip)?;
            configure(host, small_disk, &bench.scenario.agent)
                .with_context(|| format!("configuring the agent on {}", host.name()))?;
            agents.push(Agent {
                host: host.clone(),
                child: Mutex::new(spawn(host, &program)?),
            });
        }
        let index = Index::start(bench, &program)?;
        let agents = Self {
            program,
            agents,
            index,
        };
        agents.agents.iter().try_for_each(Agent::wait_until_ready)?;
        Ok(agents)
    }

    /// The stand-alone index, which may have no processes.
    #[must_use]
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// Starts the agents and indexes that have died again, as a service manager would.
    pub fn restart_dead(&self) -> anyhow::Result<()> {
        for agent in &self.agents {
            let ended = agent.child().try_wait();
            if ended.context("looking after an agent")?.is_some() {
                say(&format!(
                    "starting the agent on {} again",
                    agent.host.name()
                ));
                *agent.child() = spawn(&agent.host, &self.program)?;
                agent.wait_until_ready()?;
            }
        }
        self.index.restart_dead(&self.program)
    }

    /// The program that all of them run.
    #[must_use]
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Process of the agent on the host of this name.
    pub fn pid(&self, host: &str) -> anyhow::Result<u32> {
        let found = self.agents.iter().find(|agent| agent.host.name() == host);
        Ok(found.with_context(|| format!("no agent on {host}"))?.pid())
    }

    /// Processes of the agents of a rack.
    #[must_use]
    pub fn pids(&self, rack: Rack) -> Vec<u32> {
        let of_rack = |agent: &&Agent| agent.host.address.rack == rack;
        let agents = self.agents.iter().filter(of_rack);
        agents.map(Agent::pid).collect()
    }

    /// Host whose agent is given the plan.
    pub fn coordinator(&self) -> anyhow::Result<&Host> {
        Ok(&self.agents.first().context("there are no agents")?.host)
    }

    /// Processor time of each agent so far, in their order; 0 for one that has died.
    #[must_use]
    pub fn processor_s(&self) -> Vec<f64> {
        let time = |agent: &Agent| process::processor_s(agent.pid()).unwrap_or(0.0);
        self.agents.iter().map(time).collect()
    }

    /// Processor time of the agents of each rack since `before`.
    #[must_use]
    pub fn processor_s_since(&self, before: &[f64]) -> Vec<(String, f64)> {
        let now = self.processor_s();
        [
            (Rack::Source, "agents_source"),
            (Rack::Target, "agents_target"),
        ]
        .into_iter()
        .map(|(rack, name)| {
            let used = self.agents.iter().zip(before.iter().zip(&now));
            let of_rack = used.filter(|(agent, _)| agent.host.address.rack == rack);
            (
                name.to_owned(),
                of_rack
                    .map(|(_, (before, now))| (now - before).max(0.0))
                    .sum(),
            )
        })
        .collect()
    }

    /// The most memory that any agent of each rack ever had resident.
    #[must_use]
    pub fn peak_memory(&self) -> Option<AgentPeak> {
        let of = |rack| {
            let agents = self.agents.iter();
            agents
                .filter(|agent| agent.host.address.rack == rack)
                .filter_map(|agent| process::peak_memory_bytes(agent.pid()))
                .max()
        };
        Some(AgentPeak {
            source: of(Rack::Source)?,
            target: of(Rack::Target)?,
        })
    }
}

impl Drop for Agents {
    fn drop(&mut self) {
        for agent in &self.agents {
            // It may have been the victim of a fault.
            let _ = agent.child().kill();
            let _ = agent.child().wait();
        }
    }
}

impl Agent {
    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pid(&self) -> u32 {
        self.child().id()
    }

    fn wait_until_ready(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let socket = control_socket(&self.host);
        while UnixStream::connect(&socket).is_err() {
            if Instant::now() >= deadline || !process::is_alive(self.pid()) {
                let log = std::fs::read_to_string(log_path(&self.host)).unwrap_or_default();
                bail!(
                    "the agent on {} does not answer; it says: {log}",
                    self.host.name()
                );
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

/// Unix socket of the control API of the agent on `host`.
#[must_use]
pub fn control_socket(host: &Host) -> PathBuf {
    host.dir.join("run/control.sock")
}

fn log_path(host: &Host) -> PathBuf {
    host.dir.join("agent.log")
}

fn config_path(host: &Host) -> PathBuf {
    host.dir.join("agent.toml")
}

fn configure(host: &Host, small_disk: bool, keys: &Table) -> anyhow::Result<()> {
    for dir in [
        host.dir.join("run"),
        fault::state_dir(host),
        fault::hold_dir(host),
    ] {
        std::fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
    }
    if small_disk {
        mount(
            "tmpfs",
            fault::state_dir(host),
            "tmpfs",
            MountFlags::empty(),
            SMALL_DISK,
        )
        .context("mounting a small disk")?;
    }
    let path = |path: PathBuf| path.display().to_string();
    let mut config = keys.clone();
    let mut set = |key: &str, value: String| config.insert(key.into(), value.into());
    set("name", host.name().to_owned());
    set("state_dir", path(fault::state_dir(host)));
    set("run_dir", path(host.dir.join("run")));
    set("control", format!("{}:{CONTROL_PORT}", host.address.ip));
    set("bulk", format!("{}:{BULK_PORT}", host.address.ip));
    set("tls_dir", path(host.dir.join("tls")));
    set("hold_dir", path(fault::hold_dir(host)));
    std::fs::write(config_path(host), config.to_string()).context("writing agent.toml")
}

fn spawn(host: &Host, program: &Path) -> anyhow::Result<Child> {
    let log = std::fs::File::options()
        .create(true)
        .append(true)
        .open(log_path(host))
        .context("creating the agent's log")?;
    let _making = making();
    host.command(program)
        .args(["agent", "--config"])
        .arg(config_path(host))
        .stdout(log.try_clone().context("sharing the log")?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("starting the agent on {}", host.name()))
}
