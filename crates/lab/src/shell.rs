//! Running the tools that the lab stands on (`ip`, `tc`), with errors that say what was run.

use std::io::Write;
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::Instant;

use anyhow::{Context, bail};

use crate::session::spawn;

/// Runs `command` to its end and returns its standard output.
pub fn output(command: &mut Command) -> anyhow::Result<String> {
    let done = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| describe(command))?;
    finish(&describe(command), done)
}

/// As [`output`], of a program that runs on a host: none is started once the lab is ending.
pub fn output_on_host(command: &mut Command) -> anyhow::Result<String> {
    let what = describe(command);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let child = spawn(command).with_context(|| what.clone())?;
    let done = child.wait_with_output().with_context(|| what.clone())?;
    finish(&what, done)
}

/// As [`output`], with `input` on its standard input.
pub fn output_with_input(command: &mut Command, input: &str) -> anyhow::Result<String> {
    let what = describe(command);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| what.clone())?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin
            .write_all(input.as_bytes())
            .with_context(|| format!("writing to {what}"))?;
    }
    finish(
        &what,
        child.wait_with_output().with_context(|| what.clone())?,
    )
}

fn finish(what: &str, done: Output) -> anyhow::Result<String> {
    if !done.status.success() {
        bail!(
            "{what}: {}: {}",
            done.status,
            String::from_utf8_lossy(&done.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

fn describe(command: &Command) -> String {
    let mut text = format!("running {}", command.get_program().to_string_lossy());
    for argument in command.get_args() {
        text.push(' ');
        text.push_str(&argument.to_string_lossy());
    }
    text
}

/// Tells the person at the terminal what the lab does now.
pub fn say(text: &str) {
    static STARTED: OnceLock<Instant> = OnceLock::new();
    let elapsed = STARTED.get_or_init(Instant::now).elapsed().as_secs_f64();
    // Not `eprintln`, which panics where the terminal is gone: what follows must be done then, too.
    let _ = writeln!(std::io::stderr(), "[{elapsed:7.1}s] {text}");
}
