//! `gangway migrate`, watched; each VM is compared when it is held.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use serde_json::{Value, json};

use super::agents::{Agents, control_socket};
use super::plan::{self, Settings};
use super::prepare::Plan;
use super::record::{Held, Record};
use super::{still, struck};
use crate::bench::Bench;
use crate::clock::UnixMs;
use crate::fault::Armed;
use crate::guest::Vm;
use crate::outcome::{EventLog, Hold, Moved, Outcome, PREPARE_TIME};
use crate::postcopy;
use crate::scenario::Preset;
use crate::session::making;
use crate::shell::say;
use crate::technique::{Extras, Mode, Technique};

/// Longest answer of the control API to `continue`; it answers when the request is accepted.
const CONTINUE_PATIENCE: Duration = Duration::from_secs(20);
/// Key of the figures under which a survey's forecast stands.
const FORECAST: &str = "forecast_core_bytes";
/// Name of the figure that says what the plan sets.
pub const PLAN_SETTINGS: &str = "plan_settings";
/// What `gangway migrate` says, in the coordinator's directory.
const CLI_LOG: &str = "migrate.log";

/// Moves all VMs of the bench; if the scenario has a fault, again after it.
pub fn migrate(
    agents: &Agents,
    bench: &Bench<'_>,
    (preset, extras, mode): (Preset, Extras, Mode),
    log: &EventLog,
) -> anyhow::Result<Outcome> {
    let cpu_before = agents.processor_s();
    let settings = Settings {
        preset,
        extras,
        mode,
        confirm_handover: bench.scenario.compare && !matches!(mode, Mode::PostCopy | Mode::Hybrid),
        stale: bench.scenario.stale_s.is_some(),
    };
    if let Some(seconds) = bench.scenario.stale_s {
        say(&format!("preparing, and moving {seconds} s later"));
        Plan::write(agents, bench)?.run(agents)?;
        thread::sleep(Duration::from_secs_f64(seconds));
    }
    let forecast = if bench.scenario.survey {
        let technique = Technique::Gangway {
            preset,
            extras,
            mode: Mode::PreCopy,
        };
        Plan::write(agents, bench)?.forecast(agents, &technique.to_string())?
    } else {
        None
    };
    let started = UnixMs::now();
    let attempt = Attempt {
        agents,
        bench,
        log,
        started,
    };
    let (moved, mut figures, unexpected) = match &bench.scenario.fault {
        None => {
            let all: Vec<&Vm> = bench.vms.iter().collect();
            let attempted = attempt.run(&all, settings, None)?;
            let mut figures = vec![("exit_code".to_owned(), json!(attempted.exit_code))];
            let prepared = attempted.prepare_s;
            figures.extend(prepared.map(|s| (PREPARE_TIME.to_owned(), json!(s))));
            if !attempted.notes.is_empty() {
                figures.push(("notes".to_owned(), json!(attempted.notes)));
            }
            if mode != Mode::PreCopy {
                figures.extend(postcopy::figures(bench, &attempted.faults, log));
            }
            let unexpected = attempted.ended_otherwise();
            (attempted.moved, figures, unexpected)
        }
        Some(fault) => {
            let struck = struck::run(&attempt, fault, settings)?;
            (struck.moved, struck.figures, struck.unexpected)
        }
    };
    figures.push((
        PLAN_SETTINGS.to_owned(),
        json!(plan::said(bench.scenario, settings)),
    ));
    figures.extend(forecast.map(|bytes| (FORECAST.to_owned(), json!(bytes))));
    let cpu_seconds = agents.processor_s_since(&cpu_before);
    Ok(Outcome {
        started,
        moved,
        figures,
        cpu_seconds,
        agent_peak: agents.peak_memory(),
        unexpected,
    })
}

/// Moves the VMs once more, on the ways that they have now. Returns what is wrong with how it ended, too.
pub fn move_again(
    (agents, bench): (&Agents, &Bench<'_>),
    (preset, extras): (Preset, Extras),
    vms: &[Vm],
    log: &EventLog,
) -> anyhow::Result<(Vec<Moved>, Option<String>)> {
    let settings = Settings {
        preset,
        extras,
        mode: Mode::PreCopy,
        confirm_handover: true,
        stale: false,
    };
    let started = UnixMs::now();
    let attempt = Attempt {
        agents,
        bench,
        log,
        started,
    };
    let all: Vec<&Vm> = vms.iter().collect();
    let attempted = attempt.run(&all, settings, None)?;
    let wrong = attempted.ended_otherwise();
    Ok((attempted.moved, wrong))
}

/// One `gangway migrate`.
pub(super) struct Attempt<'a> {
    pub(super) agents: &'a Agents,
    pub(super) bench: &'a Bench<'a>,
    log: &'a EventLog,
    started: UnixMs,
}

/// What came of it.
pub(super) struct Attempted {
    pub(super) moved: Vec<Moved>,
    pub(super) exit_code: Option<i32>,
    /// The last that the command said beside its events.
    said: String,
    prepare_s: Option<f64>,
    /// What was said of VMs beside their phases.
    pub(super) notes: Vec<String>,
    /// What the agents say of page faults, for each VM that had some.
    faults: Vec<Value>,
}

impl Attempted {
    /// What is wrong with how the command ended, if all was to move: that all has is not enough.
    pub(super) fn ended_otherwise(&self) -> Option<String> {
        ended_otherwise(self.exit_code, &self.said)
    }
}

fn ended_otherwise(exit_code: Option<i32>, said: &str) -> Option<String> {
    let how = match exit_code {
        Some(0) => return None,
        Some(code) => code.to_string(),
        None => "a signal".to_owned(),
    };
    Some(format!("`gangway migrate` ended with {how}: {said}"))
}

impl Attempt<'_> {
    pub(super) fn run(
        &self,
        vms: &[&Vm],
        settings: Settings,
        armed: Option<&Armed<'_>>,
    ) -> anyhow::Result<Attempted> {
        let mut cli = self.start_cli(&plan::text(self.bench, vms, settings)?)?;
        let lines = BufReader::new(cli.stdout.take().context("the CLI has no output")?);
        let record = Record::new(vms, self.started, self.log);
        let pid = cli.id();
        let exit_code = thread::scope(|scope| {
            let progress = || record.progress_of(armed.map_or("", Armed::vm));
            let struck = armed.map(|armed| {
                scope.spawn(move || armed.strike((self.agents, pid), self.log, &progress))
            });
            let code = self.follow(vms, lines, &record, &mut cli);
            record.finish();
            match struck.map(thread::ScopedJoinHandle::join) {
                Some(Err(_)) => anyhow::bail!("the fault's thread panicked"),
                Some(Ok(Err(error))) => Err(error.context("the fault did not strike")),
                Some(Ok(Ok(()))) | None => code,
            }
        })?;
        let said = self.said_by_cli()?;
        let (prepare_s, notes) = (record.prepare_s(), record.notes());
        Ok(Attempted {
            prepare_s,
            notes,
            faults: record.faults(),
            moved: record.into_moved(exit_code, &said),
            exit_code,
            said,
        })
    }

    /// The last line of the CLI's talk, which says why it ended as it did.
    fn said_by_cli(&self) -> anyhow::Result<String> {
        let path = self.agents.coordinator()?.dir.join(CLI_LOG);
        let text = std::fs::read_to_string(path).context("reading the CLI's log")?;
        Ok(text.lines().last().unwrap_or_default().to_owned())
    }

    fn start_cli(&self, plan: &str) -> anyhow::Result<Child> {
        let host = self.agents.coordinator()?;
        let file = host.dir.join("plan.toml");
        std::fs::write(&file, plan).context("writing the plan")?;
        let log = std::fs::File::create(host.dir.join(CLI_LOG)).context("making a log")?;
        let _making = making();
        host.command(self.agents.program())
            .arg("migrate")
            .arg(file)
            .args(["--json", "--socket"])
            .arg(control_socket(host))
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .context("starting `gangway migrate`")
    }

    /// Reads the CLI's events until it ends; compares each VM when it is held.
    fn follow(
        &self,
        vms: &[&Vm],
        lines: impl BufRead + Send,
        record: &Record<'_>,
        cli: &mut Child,
    ) -> anyhow::Result<Option<i32>> {
        let patience = Duration::from_secs(self.bench.scenario.patience_s);
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
                match events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                    Ok(event) => {
                        if let Some(held) = record.take(event)
                            && let Some(vm) = vms.iter().find(|vm| vm.name == held.vm)
                        {
                            scope.spawn(move || hand_over(vm, &held, record));
                        }
                    }
                    Err(RecvTimeoutError::Disconnected) => break,
                    Err(RecvTimeoutError::Timeout) => {
                        say(&format!("the migration has not ended after {patience:?}"));
                        cli.kill().context("ending `gangway migrate`")?;
                        break;
                    }
                }
            }
            Ok(cli.wait().context("waiting for `gangway migrate`")?.code())
        })
    }
}

/// Compares the memory of a VM that stands still at both ends, then lets it run.
fn hand_over(vm: &Vm, held: &Held, record: &Record<'_>) {
    let compared = still::compare_ends(vm);
    let hold = Hold {
        from: held.since,
        to: UnixMs::now(),
    };
    let path = format!("/v1/moves/{}/continue", held.id);
    let let_go = post(&control_socket(&vm.source), &path);
    record.compared(&held.vm, hold, compared);
    if let Err(error) = let_go {
        record.remark(&held.vm, format!("it could not be let go: {error:#}"));
    }
}

/// Sends a POST without a body over a unix socket: all of HTTP that the lab needs. Not the CLI,
/// whose start would count as downtime.
pub(super) fn post(socket: &Path, path: &str) -> anyhow::Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_that_does_not_end_with_0_fails_the_run_although_all_vms_moved() {
        assert_eq!(ended_otherwise(Some(0), ""), None);
        let said = ended_otherwise(Some(4), "vm1 needs a person").unwrap();
        assert_eq!(said, "`gangway migrate` ended with 4: vm1 needs a person");
        assert!(ended_otherwise(None, "").unwrap().contains("a signal"));
    }
}
