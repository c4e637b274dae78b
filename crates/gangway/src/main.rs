//! `gangway`: runs the agent or an index, and talks to the agent.

mod act;
mod args;
mod board;
mod exit;
mod feed;
mod migrate;
mod pages;
mod prepare;
mod render;
mod screen;
mod status;
mod survey_page;
mod survey_text;
mod watch;

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use agent::client::Client;
use agent::config::{Config, IndexConfig};
use anyhow::Context;
use clap::Parser;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing_subscriber::EnvFilter;

use crate::act::Action;
use crate::args::{Cli, Command};
use crate::exit::Exit;

/// This host's agent answers at once, and says on streams every second that it is alive.
const AGENT_TIMEOUT: Duration = Duration::from_secs(15);
/// For what it asks other agents first, each of them within a timeout of its own.
const AGENTS_TIMEOUT: Duration = Duration::from_secs(120);

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Some(error) = cli.conflict() {
        error.exit();
    }
    let exit = match run(&cli) {
        Ok(exit) => exit,
        // Whoever read our output has enough of it.
        Err(error) if is_broken_pipe(&error) => Exit::Left,
        Err(error) => {
            // If standard error is gone, too, the exit code says it.
            let _ = writeln!(io::stderr(), "gangway: {error:#}");
            Exit::of_error(&error)
        }
    };
    exit.into()
}

fn run(cli: &Cli) -> anyhow::Result<Exit> {
    match &cli.command {
        Command::Agent { config } => {
            let config = &Config::load(config)?;
            serve(|| agent::run(config))
        }
        Command::Index { config } => {
            let config = &IndexConfig::load(config)?;
            serve(|| agent::run_index(config))
        }
        Command::Completions { shell } => Ok(pages::completions(*shell).map(|()| Exit::AllMoved)?),
        Command::Man { dir } => pages::man(dir.as_deref()).map(|()| Exit::AllMoved),
        _ => {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            runtime.context("starting the runtime")?.block_on(talk(cli))
        }
    }
}

/// The commands that talk to the agent.
async fn talk(cli: &Cli) -> anyhow::Result<Exit> {
    let client = Client::unix(cli.socket(), AGENT_TIMEOUT);
    match &cli.command {
        Command::Migrate(wish) => migrate::migrate(cli, &client, wish).await,
        Command::Evacuate(wish) => migrate::evacuate(cli, &client, wish).await,
        Command::Prepare(wish) => prepare::prepare(&client, wish).await,
        Command::Survey(wish) => prepare::survey(&client, wish).await,
        Command::Status { group, watch, json } => {
            status::status(&client, group.as_deref(), *watch, *json).await
        }
        Command::Cancel(target) => act::run(cli, &client, Action::Cancel, target).await,
        Command::Continue(target) => act::run(cli, &client, Action::Continue, target).await,
        Command::Postcopy(target) => act::run(cli, &client, Action::Postcopy, target).await,
        Command::Recover(target) => act::run(cli, &client, Action::Recover, target).await,
        Command::Doctor { json } => status::doctor(&client, *json).await,
        Command::Agent { .. }
        | Command::Index { .. }
        | Command::Completions { .. }
        | Command::Man { .. } => {
            anyhow::bail!("this command does not talk to an agent")
        }
    }
}

/// A client for what this host's agent asks other agents about.
fn patient(cli: &Cli) -> Client {
    Client::unix(cli.socket(), AGENTS_TIMEOUT)
}

/// Runs an agent or an index until it is told to stop.
fn serve<F: Future<Output = anyhow::Result<()>>>(run: impl FnOnce() -> F) -> anyhow::Result<Exit> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let colours = io::stderr().is_terminal();
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_ansi(colours).with_writer(io::stderr).init();
    raise_file_limit();
    let runtime = tokio::runtime::Runtime::new().context("starting the runtime")?;
    runtime.block_on(run())?;
    Ok(Exit::AllMoved)
}

/// Has as many files open as the system lets: VMs and connections have some each. The usual limit, 1024,
/// is there for programs that cannot have more (`select`).
fn raise_file_limit() {
    let maximum = getrlimit(Resource::Nofile).maximum;
    let raised = Rlimit {
        current: maximum,
        maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        // It works with fewer.
        let _ = writeln!(
            io::stderr(),
            "gangway: the limit of open files stays: {error}"
        );
    }
}

/// Whether whoever read our output has gone.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<io::Error>();
    io.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
