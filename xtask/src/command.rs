//! Running programs in the project's directory.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

/// The directory of the workspace.
pub(crate) fn root() -> &'static Path {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask)
}

/// A program, to be run in the project's directory.
pub(crate) fn program(program: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .current_dir(root())
        .stdin(Stdio::null());
    command
}

/// The cargo that runs this program.
pub(crate) fn cargo(arguments: &[&str]) -> Command {
    program(env!("CARGO"), arguments)
}

/// Runs one step with its output shown; an error if it does not succeed.
pub(crate) fn step(what: &str, command: &mut Command) -> Result<()> {
    eprintln!("==> {what}");
    let start = Instant::now();
    let status = command
        .status()
        .with_context(|| format!("{what}: {} cannot be started", name(command)))?;
    if !status.success() {
        bail!("{what}: {} ended with {status}", name(command));
    }
    eprintln!("==> {what}: done in {:.1} s", start.elapsed().as_secs_f64());
    Ok(())
}

/// Makes sure of a cargo subcommand; building one takes minutes, once.
pub(crate) fn tool(subcommand: &str, version: &str) -> Result<()> {
    let present = cargo(&[subcommand, "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if present {
        return Ok(());
    }
    let package = format!("cargo-{subcommand}");
    let arguments = [
        "install",
        "--quiet",
        "--locked",
        "--version",
        version,
        &package,
    ];
    step(
        &format!("build {package} (once, some minutes)"),
        &mut cargo(&arguments),
    )
}

fn name(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}
