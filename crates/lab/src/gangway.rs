//! The technique under test: real agents, a real plan, the real command line.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::mount::{MountFlags, mount};
use serde_json::{Value, json};
use toml::Table;

use crate::bench::Bench;
use crate::clock::UnixMs;
use crate::fault::{self, Action, Armed};
use crate::guest::{Host, Vm};
use crate::install;
use crate::memory::{Compared, GuestMemory, compare};
use crate::net::Rack;
use crate::outcome::{EventLog, Hold, Moved, Outcome};
use crate::pki::Authority;
use crate::process;
use crate::results::{Pages, Sample};
use crate::scenario::Preset;
use crate::shell::say;

const CONTROL_PORT: u16 = 7701;
const BULK_PORT: u16 = 7702;
/// From its start to its answering on its socket.
const AGENT_PATIENCE: Duration = Duration::from_secs(20);
/// Longest answer of the control API to `continue`; it answers when the request is accepted.
const CONTINUE_PATIENCE: Duration = Duration::from_secs(20);
/// Size of the file system that a full disk is played on.
const SMALL_DISK: &std::ffi::CStr = c"size=1m";

/// The agents of all hosts of a bench.
#[derive(Debug)]
pub struct Agents {
    program: PathBuf,
    dir: PathBuf,
    agents: Vec<Agent>,
}

#[derive(Debug)]
struct Agent {
    host: Host,
    /// Reaped when the run's namespaces are cleared.
    child: Child,
}

impl Agents {
    /// Starts one agent on each host and waits until all answer.
    pub fn start(bench: &Bench<'_>, dir: PathBuf) -> anyhow::Result<Self> {
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
            agents.push(start_agent(host, &program, small_disk)?);
        }
        let agents = Self {
            program,
            dir,
            agents,
        };
        agents.wait_until_ready()?;
        Ok(agents)
    }

    /// The program that all of them run.
    #[must_use]
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Process of the agent on the host of this name.
    pub fn pid(&self, host: &str) -> anyhow::Result<u32> {
        Ok(self.of(host)?.child.id())
    }

    /// Control socket of the agent that is given the plan.
    pub fn coordinator_socket(&self) -> anyhow::Result<PathBuf> {
        Ok(control_socket(
            &self.agents.first().context("there are no agents")?.host,
        ))
    }

    /// Moves all VMs of the bench by one plan.
    pub fn migrate(
        &self,
        bench: &Bench<'_>,
        (preset, zstd): (Preset, bool),
        log: &EventLog,
    ) -> anyhow::Result<Outcome> {
        let plan = self.dir.join("plan.toml");
        std::fs::write(&plan, plan_text(bench, preset, zstd)?).context("writing the plan")?;
        let armed = bench
            .scenario
            .fault
            .as_ref()
            .map(|f| Armed::arm(f, bench))
            .transpose()?;
        let cpu_before = self.processor_s();
        let started = UnixMs::now();
        let mut cli = self.start_cli(&plan)?;
        let lines = BufReader::new(cli.stdout.take().context("the CLI has no output")?);
        let record = Record::new(bench, started, log);
        let cli_pid = cli.id();
        let status = thread::scope(|scope| {
            if let Some(armed) = &armed {
                let record = &record;
                scope.spawn(move || {
                    let vm = bench.scenario.fault.as_ref().map_or("", |fault| &fault.vm);
                    if let Err(error) = armed.strike(self, cli_pid, log, &|| record.progress_of(vm))
                    {
                        say(&format!("the fault did not strike: {error:#}"));
                    }
                });
            }
            let ended = self.follow(bench, lines, &record, &mut cli);
            record.finish();
            ended
        });
        let exit_code = status?;
        let figures = vec![
            ("exit_code".to_owned(), json!(exit_code)),
            (
                "agent_memory_bytes_max".to_owned(),
                json!(self.largest_memory_bytes()),
            ),
        ];
        let cpu_seconds = self.processor_s_since(&cpu_before);
        Ok(Outcome {
            started,
            moved: record.into_moved(exit_code),
            figures,
            cpu_seconds,
        })
    }

    fn of(&self, host: &str) -> anyhow::Result<&Agent> {
        let found = self.agents.iter().find(|agent| agent.host.name() == host);
        found.with_context(|| format!("no agent on {host}"))
    }

    fn wait_until_ready(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + AGENT_PATIENCE;
        for agent in &self.agents {
            let socket = control_socket(&agent.host);
            while UnixStream::connect(&socket).is_err() {
                if Instant::now() >= deadline || !process::is_alive(agent.child.id()) {
                    let log = std::fs::read_to_string(log_path(&agent.host)).unwrap_or_default();
                    bail!(
                        "the agent on {} does not answer; it says: {log}",
                        agent.host.name()
                    );
                }
                thread::sleep(Duration::from_millis(20));
            }
        }
        Ok(())
    }

    fn start_cli(&self, plan: &Path) -> anyhow::Result<Child> {
        let coordinator = self.agents.first().context("there are no agents")?;
        let path = self.dir.join("migrate.log");
        let log = std::fs::File::create(&path).context("creating the CLI's log")?;
        coordinator
            .host
            .command(&self.program)
            .arg("migrate")
            .arg(plan)
            .args(["--json", "--socket"])
            .arg(control_socket(&coordinator.host))
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .context("starting `gangway migrate`")
    }

    /// Reads the CLI's events until it ends; compares each VM when it is held.
    fn follow(
        &self,
        bench: &Bench<'_>,
        lines: impl BufRead + Send,
        record: &Record<'_>,
        cli: &mut Child,
    ) -> anyhow::Result<Option<i32>> {
        let patience = Duration::from_secs(bench.scenario.patience_s);
        let deadline = Instant::now() + patience;
        thread::scope(|scope| {
            let (sender, events) = mpsc::channel();
            scope.spawn(move || {
                // Ends with the CLI's output.
                for line in lines.lines().map_while(Result::ok) {
                    if let Ok(event) = serde_json::from_str::<Value>(&line)
                        && sender.send(event).is_err()
                    {
                        return;
                    }
                }
            });
            loop {
                let left = deadline.saturating_duration_since(Instant::now());
                match events.recv_timeout(left) {
                    Ok(event) => {
                        if let Some(held) = record.take(event) {
                            scope.spawn(move || self.hand_over(bench, &held, record));
                        }
                    }
                    Err(mpsc::RecvTimeoutError::Disconnected) => break,
                    Err(mpsc::RecvTimeoutError::Timeout) => {
                        say(&format!("the migration has not ended after {patience:?}"));
                        cli.kill().context("ending `gangway migrate`")?;
                        break;
                    }
                }
            }
            Ok(cli.wait().context("waiting for `gangway migrate`")?.code())
        })
    }

    /// Compares the memory of a VM that stands still at both ends, then lets it run.
    fn hand_over(&self, bench: &Bench<'_>, held: &Held, record: &Record<'_>) {
        let Some(vm) = bench.vms.iter().find(|vm| vm.name == held.vm) else {
            return;
        };
        let compared = compare_at_both_ends(vm);
        let to = UnixMs::now();
        record.held(
            held,
            Hold {
                from: held.since,
                to,
            },
            &compared,
        );
        let socket = control_socket(&vm.source);
        if let Err(error) = post(&socket, &format!("/v1/moves/{}/continue", held.id)) {
            record.remark(&held.vm, format!("it could not be let go: {error:#}"));
        }
    }

    /// Processor time of each agent, in their order.
    fn processor_s(&self) -> Vec<f64> {
        let time = |agent: &Agent| process::processor_s(agent.child.id()).unwrap_or(0.0);
        self.agents.iter().map(time).collect()
    }

    fn processor_s_since(&self, before: &[f64]) -> Vec<(String, f64)> {
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

    fn largest_memory_bytes(&self) -> Option<u64> {
        self.agents
            .iter()
            .filter_map(|a| process::peak_memory_bytes(a.child.id()))
            .max()
    }
}

impl Drop for Agents {
    /// The agents end before the namespaces are cleared, so that none of them takes the end of
    /// the others for a failure that it must handle.
    fn drop(&mut self) {
        for agent in &mut self.agents {
            // It may have been the victim of a fault.
            let _ = agent.child.kill();
            let _ = agent.child.wait();
        }
    }
}

fn control_socket(host: &Host) -> PathBuf {
    host.dir.join("run/control.sock")
}

fn log_path(host: &Host) -> PathBuf {
    host.dir.join("agent.log")
}

fn start_agent(host: &Host, program: &Path, small_disk: bool) -> anyhow::Result<Agent> {
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
    let mut config = Table::new();
    let mut set = |key: &str, value: String| config.insert(key.into(), value.into());
    set("name", host.name().to_owned());
    set("state_dir", path(fault::state_dir(host)));
    set("run_dir", path(host.dir.join("run")));
    set("control", format!("{}:{CONTROL_PORT}", host.address.ip));
    set("bulk", format!("{}:{BULK_PORT}", host.address.ip));
    set("tls_dir", path(host.dir.join("tls")));
    set("hold_dir", path(fault::hold_dir(host)));
    let file = host.dir.join("agent.toml");
    std::fs::write(&file, config.to_string()).context("writing the agent's configuration")?;
    let log = std::fs::File::options()
        .create(true)
        .append(true)
        .open(log_path(host))
        .context("creating the agent's log")?;
    let child = host
        .command(program)
        .args(["agent", "--config"])
        .arg(file)
        .stdout(log.try_clone().context("sharing the log")?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("starting the agent on {}", host.name()))?;
    Ok(Agent {
        host: host.clone(),
        child,
    })
}

fn plan_text(bench: &Bench<'_>, preset: Preset, zstd: bool) -> anyhow::Result<String> {
    let hosts: HashMap<&str, Value> = bench
        .hosts
        .iter()
        .map(|host| {
            let ip = host.address.ip;
            let control = format!("{ip}:{CONTROL_PORT}");
            (
                host.name(),
                json!({"control": control, "bulk": format!("{ip}:{BULK_PORT}")}),
            )
        })
        .collect();
    let moves: Vec<Value> = bench.vms.iter().map(|vm| plan_move(bench, vm)).collect();
    let plan = json!({
        "preset": match preset { Preset::Oc => "oc", Preset::Gang => "gang" },
        "compression": if zstd { "zstd" } else { "none" },
        // A comparison needs the VM to stand still. Where a fault is played, who would let it go
        // may be the victim, and the guests' own checks must suffice.
        "confirm_handover": bench.scenario.fault.is_none(),
        "hosts": hosts,
        "move": moves,
    });
    toml::to_string(&plan).context("writing the plan")
}

fn plan_move(bench: &Bench<'_>, vm: &Vm) -> Value {
    let replace = |from: &Path, to: &Path| json!({"from": from, "to": to});
    let mut replaced = vec![replace(&vm.source.dir.join(""), &vm.target.dir.join(""))];
    let (source, target) = (
        &bench.programs.source.program,
        &bench.programs.target.program,
    );
    if source != target {
        replaced.push(replace(source, target));
    }
    json!({
        "vm": vm.name,
        "from": vm.source.name(),
        "to": vm.target.name(),
        "qmp": vm.agent_socket(&vm.source),
        "replace": replaced,
    })
}

fn compare_at_both_ends(vm: &Vm) -> anyhow::Result<Compared> {
    let mut source = vm.qmp(&vm.source)?;
    let mut target = vm.qmp(&vm.target)?;
    for (qmp, end) in [(&mut source, "source"), (&mut target, "target")] {
        let status = qmp.execute("query-status", json!({}))?;
        anyhow::ensure!(
            status["running"] == false,
            "the VM runs at the {end} while it is held"
        );
    }
    compare(
        &GuestMemory::of(&mut source)?,
        &GuestMemory::of(&mut target)?,
    )
}

/// Sends a POST without a body over a unix socket: all of HTTP that the lab needs.
fn post(socket: &Path, path: &str) -> anyhow::Result<()> {
    let mut stream = UnixStream::connect(socket).context("connecting to the agent")?;
    stream
        .set_read_timeout(Some(CONTINUE_PATIENCE))
        .context("setting a timeout")?;
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: agent\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    );
    stream
        .write_all(request.as_bytes())
        .context("sending the request")?;
    let mut answer = String::new();
    stream
        .read_to_string(&mut answer)
        .context("reading the answer")?;
    let status = answer.split_whitespace().nth(1).unwrap_or_default();
    anyhow::ensure!(status.starts_with('2'), "POST {path}: {answer}");
    Ok(())
}

/// A VM that its agent holds.
struct Held {
    id: String,
    vm: String,
    since: UnixMs,
}

/// What the events have said so far of all VMs.
struct Record<'a> {
    started: UnixMs,
    log: &'a EventLog,
    state: Mutex<State>,
}

struct State {
    moved: Vec<Moved>,
    phases: HashMap<String, String>,
    over: bool,
}

impl<'a> Record<'a> {
    fn new(bench: &Bench<'_>, started: UnixMs, log: &'a EventLog) -> Self {
        let moved = bench.vms.iter().map(|vm| Moved::begin(&vm.name)).collect();
        let state = State {
            moved,
            phases: HashMap::new(),
            over: false,
        };
        Self {
            started,
            log,
            state: Mutex::new(state),
        }
    }

    /// Notes an event; returns the VM if it is held from now on.
    fn take(&self, event: Value) -> Option<Held> {
        self.log.record(event.clone());
        let text = |key: &str| event[key].as_str().map(str::to_owned);
        let (vm, at) = (text("vm")?, UnixMs(event["at_unix_ms"].as_f64()?));
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match event["event"].as_str()? {
            "phase" => {
                let phase = text("phase")?;
                let moved = state.moved.iter_mut().find(|moved| moved.vm == vm)?;
                match phase.as_str() {
                    "preparing" => moved.started = at,
                    "stayed" | "needs-person" => moved.remark = text("message"),
                    _ => {}
                }
                state.phases.insert(vm.clone(), phase.clone());
                (phase == "held").then_some(Held {
                    id: text("id")?,
                    vm,
                    since: at,
                })
            }
            "progress" => {
                let phase = state.phases.get(&vm).cloned().unwrap_or_default();
                let moved = state.moved.iter_mut().find(|moved| moved.vm == vm)?;
                let progress = &event["progress"];
                moved.pages = pages(&progress["pages"]).or(moved.pages);
                moved.samples.push(Sample {
                    t_s: at.s_since(self.started),
                    wire_bytes: progress["wire_bytes"].as_u64()?,
                    remaining_bytes: progress["remaining_bytes"].as_u64(),
                    phase,
                });
                None
            }
            _ => None,
        }
    }

    fn held(&self, held: &Held, hold: Hold, compared: &anyhow::Result<Compared>) {
        let fields = match compared {
            Ok(compared) => json!({
                "compared_pages": compared.pages,
                "mismatched_pages": compared.mismatched,
                "hold_ms": hold.ms(),
            }),
            Err(error) => json!({"message": format!("{error:#}"), "hold_ms": hold.ms()}),
        };
        self.log.note(&held.vm, "compared", fields);
        self.with(&held.vm, |moved| {
            moved.hold = Some(hold);
            match compared {
                Ok(compared) => moved.compared = Some(*compared),
                Err(error) => {
                    moved.remark = Some(format!("its memory was not compared: {error:#}"))
                }
            }
        });
    }

    fn remark(&self, vm: &str, text: String) {
        self.with(vm, |moved| moved.remark = Some(text));
    }

    fn with(&self, vm: &str, change: impl FnOnce(&mut Moved)) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(moved) = state.moved.iter_mut().find(|moved| moved.vm == vm) {
            change(moved);
        }
    }

    fn finish(&self) {
        self.state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .over = true;
    }

    fn progress_of(&self, vm: &str) -> fault::Progress {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        fault::Progress {
            over: state.over,
            phase: state.phases.get(vm).cloned(),
        }
    }

    /// A VM of which no event said that it moved has stayed, whatever the reason.
    fn into_moved(self, exit_code: Option<i32>) -> Vec<Moved> {
        let State { moved, phases, .. } = self
            .state
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        moved
            .into_iter()
            .map(|mut moved| {
                let phase = phases.get(&moved.vm).map_or("never begun", String::as_str);
                if moved.remark.is_none() && phase != "moved" {
                    let code = exit_code.map_or("a signal".into(), |code| code.to_string());
                    moved.remark = Some(format!("phase `{phase}` when the CLI ended with {code}"));
                }
                moved
            })
            .collect()
    }
}

fn pages(counts: &Value) -> Option<Pages> {
    let count = |key: &str| counts[key].as_u64();
    Some(Pages {
        total: count("total")?,
        zero: count("zero"),
        fill: count("fill"),
        literal: count("literal"),
        reference: count("reference"),
        remote_reference: None,
        mapped: None,
    })
}
