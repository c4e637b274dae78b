//! `gangway-lab`: racks of real VMs on one machine, and what a migration does to them.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use lab::results::Results;
use lab::scenario::Scenario;
use lab::{compare, report, run};

#[derive(Parser)]
#[command(
    name = "gangway-lab",
    version,
    about = "Measures migrations of real VMs on lab racks"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// List the scenarios.
    List,
    /// Run a scenario (needs root) and write results.json, report.html and events.jsonl.
    Run {
        /// Name of a scenario, or a .toml file.
        scenario: String,
        /// Directory for the results.
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        /// Change a key of the scenario, as in `--set vm.memory_mb=512`.
        #[arg(long = "set", value_name = "KEY=VALUE")]
        settings: Vec<String>,
    },
    /// Write the report of a run again, from its results.json.
    Report {
        /// Directory of the run.
        dir: PathBuf,
    },
    /// Compare the results of two or more runs.
    Compare {
        /// Directories with results.json; the first is the reference.
        #[arg(required = true, num_args = 2..)]
        dirs: Vec<PathBuf>,
    },
}

fn main() -> ExitCode {
    match execute(Arguments::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("gangway-lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn execute(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::List => {
            for (name, title) in Scenario::list()? {
                println!("{name:14} {title}");
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Run {
            scenario: name,
            out,
            settings,
        } => {
            let scenario = Scenario::load(&name, &settings)?;
            let out = out.unwrap_or_else(|| PathBuf::from("out").join(&name));
            let results = run::scenario(&name, &scenario, &out)?;
            let page = report::write(&results, &out).context("writing the report")?;
            print!("{}", report::table(&results));
            println!("report: {}", page.display());
            Ok(if run::all_intact(&results) {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            })
        }
        Command::Report { dir } => {
            let results = Results::load(&dir)?;
            let page = report::write(&results, &dir).context("writing the report")?;
            println!("report: {}", page.display());
            Ok(ExitCode::SUCCESS)
        }
        Command::Compare { dirs } => {
            print!("{}", compare::run(&dirs)?);
            Ok(ExitCode::SUCCESS)
        }
    }
}
