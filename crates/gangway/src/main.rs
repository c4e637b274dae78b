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
use tracing_subscriber::EnvFilter;

use crate::act::Action;
use crate::args::{Cli, Command};
use crate::exit::Exit;

/// This host's agent answers at once, and says on streams every second that it is alive.
const AGENT_TIMEOUT: Duration = Duration::from_secs(15);

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
        Command::Cancel(target) => act::run(&client, Action::Cancel, target).await,
        Command::Continue(target) => act::run(&client, Action::Continue, target).await,
        Command::Postcopy(target) => act::run(&client, Action::Postcopy, target).await,
        Command::Recover(target) => act::run(&client, Action::Recover, target).await,
        Command::Doctor { json } => status::doctor(&client, *json).await,
        Command::Agent { .. }
        | Command::Index { .. }
        | Command::Completions { .. }
        | Command::Man { .. } => {
            anyhow::bail!("this command does not talk to an agent")
        }
    }
}

/// Runs an agent or an index until it is told to stop.
fn serve<F: Future<Output = anyhow::Result<()>>>(run: impl FnOnce() -> F) -> anyhow::Result<Exit> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let colours = io::stderr().is_terminal();
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_ansi(colours).with_writer(io::stderr).init();
    let runtime = tokio::runtime::Runtime::new().context("starting the runtime")?;
    runtime.block_on(run())?;
    Ok(Exit::AllMoved)
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<io::Error>();
    io.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
