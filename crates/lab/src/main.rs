//! `gangway-lab`: racks of real VMs on one machine, and what a migration does to them.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use lab::report::papers;
use lab::results::{FILE_NAME, Results};
use lab::scenario::Scenario;
use lab::{catalog, compare, report, run};

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
        /// Name of a scenario or of a paper's figure, a .toml file, or `papers` for all of the papers.
        scenario: String,
        /// Directory for the results.
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        /// Change a key of the scenario, as in `--set vm.memory_mb=512`.
        #[arg(long = "set", value_name = "KEY=VALUE")]
        settings: Vec<String>,
        /// Run the scenario's quick variant, once.
        #[arg(long)]
        quick: bool,
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
            for (figure, name) in catalog::same_runs() {
                println!("{figure:14} the runs of {name}");
            }
            println!("{PAPERS:14} all of the papers' evaluation, with a report over them");
            Ok(ExitCode::SUCCESS)
        }
        Command::Run {
            scenario: name,
            out,
            settings,
            quick,
        } => {
            let name = catalog::resolve(&name);
            let out = out.unwrap_or_else(|| PathBuf::from("out").join(name));
            let intact = if name == PAPERS {
                run_papers(&out, &settings, quick)?
            } else {
                run_one(name, &out, &settings, quick)?
            };
            Ok(if intact {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            })
        }
        Command::Report { dir } => {
            let page = if dir.join(FILE_NAME).exists() || dir.is_file() {
                report::write(&Results::load(&dir)?, &dir)
            } else {
                papers::write(&papers::load(&dir)?, &dir)
            };
            println!("report: {}", page.context("writing the report")?.display());
            Ok(ExitCode::SUCCESS)
        }
        Command::Compare { dirs } => {
            print!("{}", compare::run(&dirs)?);
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Name that stands for all of the papers' scenarios.
const PAPERS: &str = "papers";

/// Runs one scenario; says whether every VM is intact.
fn run_one(name: &str, out: &Path, settings: &[String], quick: bool) -> anyhow::Result<bool> {
    let scenario = Scenario::load(name, settings, quick)?;
    let results = run::scenario(name, &scenario, out)?;
    let page = report::write(&results, out).context("writing the report")?;
    print!("{}", report::table(&results));
    println!("report: {}", page.display());
    Ok(run::all_intact(&results))
}

/// Runs the papers' scenarios one after the other, and writes the report over all of them after
/// each. One that cannot be run is said, and the others are run.
fn run_papers(out: &Path, settings: &[String], quick: bool) -> anyhow::Result<bool> {
    look_for_what_papers_need(settings, quick)?;
    let mut intact = true;
    for (nth, name) in catalog::PAPERS.iter().enumerate() {
        match run_one(name, &out.join(name), settings, quick) {
            Ok(well) => intact &= well,
            Err(error) => {
                eprintln!("gangway-lab: {name}: {error:#}");
                intact = false;
            }
        }
        // Not what an earlier invocation left of those that are still to come.
        let all = papers::load_of(out, &catalog::PAPERS[..=nth])?;
        let page = papers::write(&all, out).context("writing the report")?;
        println!("report: {}", page.display());
    }
    Ok(intact)
}

/// An hour and a half should not be over when something turns out to be missing.
fn look_for_what_papers_need(settings: &[String], quick: bool) -> anyhow::Result<()> {
    let mut missing = Vec::new();
    for name in catalog::PAPERS {
        let scenario = Scenario::load(name, settings, quick)?;
        if let Err(error) = run::look_for_programs(&scenario) {
            let said = format!("{error:#}");
            if !missing.contains(&said) {
                missing.push(said);
            }
        }
    }
    anyhow::ensure!(
        missing.is_empty(),
        "nothing was started: {}",
        missing.join("; ")
    );
    Ok(())
}
