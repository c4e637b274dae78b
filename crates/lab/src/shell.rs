//! Running the tools that the lab stands on (`ip`, `tc`), with errors that say what was run.

use std::io::Write;
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::Instant;

use anyhow::{Context, bail};

use crate::session::spawn;

/// How much of what a program has said is quoted.
const SAID_CHARS_MAX: usize = 400;

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
        bail!("{what}: {}: {}", done.status, last_words(&done.stderr));
    }
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

/// The end of what a program has said: a report quotes it, and some say the same for minutes.
fn last_words(said: &[u8]) -> String {
    let said = String::from_utf8_lossy(said);
    let said = said.trim();
    match said.char_indices().rev().nth(SAID_CHARS_MAX) {
        Some((at, _)) => format!("... {}", &said[at..]),
        None => said.to_owned(),
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_what_a_program_said_the_end_is_quoted_and_no_more_than_a_page_bears() {
        let error = |line: &str| {
            let mut command = Command::new("sh");
            output(command.args(["-c", line])).unwrap_err().to_string()
        };
        assert!(error("echo no such disk >&2; exit 3").ends_with(": no such disk"));
        let long = error("yes ü | head -5000 >&2; echo the end >&2; exit 3");
        assert!(long.ends_with("the end"), "{long}");
        assert!(long.chars().count() < SAID_CHARS_MAX + 200, "{long}");
    }
}
