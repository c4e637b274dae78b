//! What goes wrong in a run, where, and at which instant of a move.
//!
//! The agents have a test aid for this: at an instant NAME of the move of VM, an agent waits while
//! the file `NAME.VM` exists in its hold directory, having created `NAME.VM.reached`. So a fault
//! strikes at a known instant and not around it. Phases, which the event stream tells, are coarser
//! and need no aid.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;
use serde_json::json;

use crate::bench::Bench;
use crate::gangway::{Agents, control_socket};
use crate::guest::{Host, Vm};
use crate::matrix::Expect;
use crate::outcome::EventLog;
use crate::process;
use crate::session::spawn;
use crate::shell::say;

/// How often the lab looks whether an agent has reached the instant.
const LOOK: Duration = Duration::from_millis(5);

/// How long `gangway cancel` may take to tell the agent.
const CANCEL_DELIVERY: Duration = Duration::from_millis(500);

/// One fault.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// VM whose move it strikes; the first if absent.
    #[serde(default = "first_vm")]
    pub vm: String,
    /// When.
    pub at: Moment,
    /// Seconds between that moment and the fault; an agent held at an instant waits as long.
    #[serde(default)]
    pub after_s: f64,
    /// What happens.
    pub action: Action,
    /// To whom.
    pub on: Victim,
    /// How long a `stop`, `cut` or `fill-disk` lasts, or a killed agent is away before it is
    /// started again; until the migration has ended if absent.
    #[serde(default)]
    pub for_s: Option<f64>,
    /// What it must come to; whatever it comes to if absent.
    #[serde(default)]
    pub expect: Option<Expect>,
    /// The guests stand still from before their move until it has ended, so that all of their memory can be
    /// compared under the fault, in post-copy too.
    #[serde(default)]
    pub still: bool,
}

/// When a fault strikes.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Moment {
    /// The command is started.
    Start,
    /// The group's preparation is done, its moves begin.
    Prepared,
    /// The source agent is at this instant: `switch-over`, `sent`, `loaded`, `committed`,
    /// `released`.
    Source(String),
    /// The target agent is at this instant: `target-loaded`.
    Target(String),
    /// The event stream says that the VM has entered this phase.
    Phase(String),
    /// It says so of every VM of the group.
    All(String),
}

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// The process dies at once (SIGKILL).
    Kill,
    /// The process stands still (SIGSTOP).
    Stop,
    /// The host's link to its rack is taken down, or what the target's peers say to it is lost.
    Cut,
    /// The agent's state directory is full.
    FillDisk,
    /// A person cancels the move.
    Cancel,
    /// The connection between the mapping library in a QEMU and its agent is cut.
    CutLibrary,
}

/// Who is struck.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Victim {
    /// The VM's source host, or its agent.
    SourceAgent,
    /// The VM's target host, or its agent.
    TargetAgent,
    /// Its QEMU there.
    SourceQemu,
    /// Its QEMU there.
    TargetQemu,
    /// The `gangway migrate` that a person watches.
    Cli,
    /// All processes of the stand-alone index.
    Index,
    /// The first of them.
    IndexShard,
    /// The ways between the VM's target host and the other target hosts, both directions.
    TargetPeers,
    /// The link between the racks.
    Core,
}

pub(crate) fn first_vm() -> String {
    "vm1".into()
}

/// A fault of this run, armed.
#[derive(Debug)]
pub struct Armed<'a> {
    fault: &'a Fault,
    bench: &'a Bench<'a>,
    vm: &'a Vm,
    /// The file that holds the agent at the instant.
    hold: Option<PathBuf>,
}

impl<'a> Armed<'a> {
    /// Prepares the fault before the migration starts.
    pub fn arm(fault: &'a Fault, bench: &'a Bench<'a>) -> anyhow::Result<Self> {
        let vm = bench.vms.iter().find(|vm| vm.name == fault.vm);
        let vm = vm.with_context(|| format!("the fault names {}, which is no VM", fault.vm))?;
        let held = match &fault.at {
            Moment::Source(instant) => Some((&vm.source, instant)),
            Moment::Target(instant) => Some((&vm.target, instant)),
            Moment::Start | Moment::Prepared | Moment::Phase(_) | Moment::All(_) => None,
        };
        let hold = held.map(|(host, name)| hold_dir(host).join(format!("{name}.{}", vm.name)));
        if let Some(path) = &hold {
            fs::write(path, "").with_context(|| format!("creating {}", path.display()))?;
        }
        Ok(Self {
            fault,
            bench,
            vm,
            hold,
        })
    }

    /// Name of the VM whose move it strikes.
    #[must_use]
    pub fn vm(&self) -> &str {
        &self.vm.name
    }

    /// Waits for the moment, lets the fault strike, and undoes it when its time is over. Gives up
    /// when the migration ends before the moment comes.
    pub fn strike(
        &self,
        (agents, cli_pid): (&Agents, u32),
        log: &EventLog,
        progress: &dyn Fn() -> Progress,
    ) -> anyhow::Result<()> {
        if !self.wait(progress) {
            bail!("the migration ended before its moment, {:?}", self.fault.at);
        }
        thread::sleep(Duration::from_secs_f64(self.fault.after_s));
        let what = format!(
            "{:?} {:?} of {} at {:?}, in {}",
            self.fault.action,
            self.fault.on,
            self.fault.vm,
            self.fault.at,
            progress().phase.as_deref().unwrap_or("no phase"),
        );
        say(&format!("fault: {what}"));
        log.note(&self.vm.name, "fault", json!({"message": what}));
        let struck = self.set(agents, cli_pid, true);
        if let Some(path) = &self.hold {
            fs::remove_file(path).with_context(|| format!("removing {}", path.display()))?;
        }
        struck?;
        if let Some(seconds) = self.fault.for_s {
            thread::sleep(Duration::from_secs_f64(seconds));
            self.set(agents, cli_pid, false)?;
            log.note(&self.vm.name, "fault-over", json!({}));
        }
        Ok(())
    }

    /// Undoes a fault that was to last for good, before the VM is moved again.
    pub fn heal(&self, agents: &Agents) -> anyhow::Result<()> {
        if let Some(path) = self.hold.as_ref().filter(|path| path.exists()) {
            fs::remove_file(path).with_context(|| format!("removing {}", path.display()))?;
        }
        let lasts = matches!(
            self.fault.action,
            Action::Stop | Action::Cut | Action::FillDisk
        );
        if lasts && self.fault.for_s.is_none() && self.fault.on != Victim::Cli {
            self.set(agents, 0, false)?;
        }
        Ok(())
    }

    /// Whether the moment came before the migration was over.
    fn wait(&self, progress: &dyn Fn() -> Progress) -> bool {
        let deadline = Instant::now() + Duration::from_secs(self.bench.scenario.patience_s);
        let reached = self
            .hold
            .as_ref()
            .map(|path| path.with_added_extension("reached"));
        while Instant::now() < deadline {
            let now = progress();
            let come = match (&reached, &self.fault.at) {
                (Some(file), _) => file.exists(),
                (None, Moment::Phase(phase)) => now.phase.as_ref() == Some(phase),
                (None, Moment::All(phase)) => now.entered_by_all.contains(phase),
                (None, Moment::Prepared) => now.prepared,
                (None, Moment::Start) => true,
                (None, _) => false,
            };
            if come || now.over {
                return come;
            }
            thread::sleep(LOOK);
        }
        false
    }

    fn set(&self, agents: &Agents, cli_pid: u32, on: bool) -> anyhow::Result<()> {
        match (self.fault.action, on) {
            (Action::Kill, true) => self.signal((agents, cli_pid), Signal::KILL),
            (Action::Stop, true) => self.signal((agents, cli_pid), Signal::STOP),
            (Action::Stop, false) => self.signal((agents, cli_pid), Signal::CONT),
            (Action::Cut, _) if self.fault.on == Victim::TargetPeers => {
                self.bench.net.set_peers(&self.vm.target.address, !on)
            }
            (Action::Cut, _) if self.fault.on == Victim::Core => self.bench.net.set_core(!on),
            (Action::Cut, _) => self.bench.net.set_edge(&self.host()?.address, !on),
            (Action::FillDisk, true) => fill(&filler(self.host()?)),
            (Action::FillDisk, false) => {
                fs::remove_file(filler(self.host()?)).context("freeing the disk")
            }
            (Action::Cancel, true) => {
                let host = agents.coordinator()?;
                let mut cancel = host.command(agents.program());
                cancel.args(["cancel", "--vm", &self.vm.name, "--socket"]);
                cancel.arg(control_socket(host));
                let mut cancel = spawn(&mut cancel).context("starting `gangway cancel`")?;
                // It returns when the move has ended, for which the agent must be let go first.
                thread::spawn(move || cancel.wait());
                thread::sleep(CANCEL_DELIVERY);
                Ok(())
            }
            (Action::Kill, false) => agents.restart_dead(),
            (Action::CutLibrary, true) => {
                let qemu = self.vm.qmp(self.host()?)?.peer_pid()?;
                process::shut_seqpackets(qemu)
            }
            (Action::Cancel | Action::CutLibrary, false) => Ok(()),
        }
    }

    fn host(&self) -> anyhow::Result<&'a Host> {
        match self.fault.on {
            Victim::SourceAgent | Victim::SourceQemu => Ok(&self.vm.source),
            Victim::TargetAgent | Victim::TargetQemu => Ok(&self.vm.target),
            other => bail!("{:?} needs a host, {other:?} is none", self.fault.action),
        }
    }

    fn signal(&self, (agents, cli_pid): (&Agents, u32), signal: Signal) -> anyhow::Result<()> {
        for pid in self.pids(agents, cli_pid)? {
            send(pid, signal)?;
        }
        Ok(())
    }

    fn pids(&self, agents: &Agents, cli_pid: u32) -> anyhow::Result<Vec<u32>> {
        Ok(match self.fault.on {
            Victim::SourceAgent | Victim::TargetAgent => vec![agents.pid(self.host()?.name())?],
            Victim::SourceQemu | Victim::TargetQemu => {
                vec![self.vm.qmp(self.host()?)?.peer_pid()?]
            }
            Victim::Cli => vec![cli_pid],
            Victim::Index => agents.index().pids(),
            Victim::IndexShard => agents.index().pids().into_iter().take(1).collect(),
            Victim::TargetPeers | Victim::Core => {
                bail!("{:?} needs a process", self.fault.action)
            }
        })
    }
}

/// How far the migration is.
#[derive(Clone, Debug)]
pub struct Progress {
    /// It has ended.
    pub over: bool,
    /// The group's preparation is done.
    pub prepared: bool,
    /// Newest phase of the VM that the fault strikes.
    pub phase: Option<String>,
    /// Phases that every VM has entered.
    pub entered_by_all: Vec<String>,
}

/// Where the agent of `host` looks for files that hold it.
#[must_use]
pub fn hold_dir(host: &Host) -> PathBuf {
    host.dir.join("hold")
}

/// State directory of the agent of `host`.
#[must_use]
pub fn state_dir(host: &Host) -> PathBuf {
    host.dir.join("state")
}

fn filler(host: &Host) -> PathBuf {
    state_dir(host).join("filler")
}

fn send(pid: u32, signal: Signal) -> anyhow::Result<()> {
    let pid = i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .context("not a process id")?;
    kill_process(pid, signal).with_context(|| format!("signalling process {pid:?}"))
}

/// Writes until the file system is full. It is the small one that the run mounted for this.
fn fill(path: &Path) -> anyhow::Result<()> {
    let mut file =
        fs::File::create(path).with_context(|| format!("creating {}", path.display()))?;
    let chunk = [0x5A; 4096];
    loop {
        match file.write_all(&chunk) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::StorageFull => return Ok(()),
            Err(error) => return Err(error).context("filling the disk"),
        }
    }
}
