//! `prepare` and `survey`: has memory hashed, and shows what was found.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use agent::client::Client;
use agent::types::{GroupAccepted, GroupSurvey, PreparationRequest, PreparationStatus};
use anyhow::Context;

use crate::args::{Prepare, Survey};
use crate::exit::Exit;
use crate::screen::json_line;
use crate::{survey_page, survey_text};

const POLL: Duration = Duration::from_millis(200);
/// A log gets a line so often.
const LOG_EVERY: Duration = Duration::from_secs(5);

/// Prepares a plan's hosts and keeps the results for its migration.
pub(crate) async fn prepare(client: &Client, prepare: &Prepare) -> anyhow::Result<Exit> {
    let request = PreparationRequest {
        plan: prepare.plan()?,
        survey: false,
        hosts: Vec::new(),
        bounds: prepare.bounds.get(),
    };
    let Some(survey) = run(client, &request, prepare.json).await? else {
        return Ok(Exit::Left);
    };
    if prepare.json {
        json_line(&survey)?;
    } else {
        io::stdout().write_all(survey_text::found(&survey).as_bytes())?;
    }
    Ok(exit_of(&survey))
}

/// Finds out what a migration would cost, and keeps nothing.
pub(crate) async fn survey(client: &Client, wish: &Survey) -> anyhow::Result<Exit> {
    let request = PreparationRequest {
        plan: wish.plan()?,
        survey: true,
        hosts: wish.hosts.clone(),
        bounds: wish.bounds.get(),
    };
    let Some(survey) = run(client, &request, wish.json).await? else {
        return Ok(Exit::Left);
    };
    if let Some(path) = &wish.html {
        std::fs::write(path, survey_page::page(&survey))
            .with_context(|| format!("writing {}", path.display()))?;
    }
    if wish.json {
        json_line(&survey)?;
    } else {
        let mut out = io::stdout().lock();
        out.write_all(survey_text::found(&survey).as_bytes())?;
        out.write_all(survey_text::forecast(&survey).as_bytes())?;
    }
    Ok(exit_of(&survey))
}

/// A host that could not be looked at makes the numbers smaller than they are.
fn exit_of(survey: &GroupSurvey) -> Exit {
    for problem in &survey.failed {
        // If standard error is gone, too, the exit code says it.
        let _ = writeln!(io::stderr(), "gangway: {problem}");
    }
    if survey.failed.is_empty() {
        Exit::AllMoved
    } else {
        Exit::SomeStayed
    }
}

/// Waits for the result; none if the person left, which ends the preparation.
async fn run(
    client: &Client,
    request: &PreparationRequest,
    quiet: bool,
) -> anyhow::Result<Option<GroupSurvey>> {
    let accepted: GroupAccepted = client.post("/v1/preparations", request).await?;
    let path = format!("/v1/preparations/{}", accepted.group);
    let mut progress = Progress::new(quiet);
    loop {
        let status: PreparationStatus = client.get(&path).await?;
        if status.finished {
            progress.close()?;
            let survey = status.survey;
            return Ok(Some(survey.context("the preparation was cancelled")?));
        }
        progress.show(&status)?;
        tokio::select! {
            () = tokio::time::sleep(POLL) => {}
            interrupted = tokio::signal::ctrl_c() => {
                interrupted?;
                progress.close()?;
                client.post::<_, ()>(&format!("{path}/cancel"), &()).await?;
                writeln!(io::stderr(), "ended; nothing was moved and nothing is kept")?;
                return Ok(None);
            }
        }
    }
}

/// One line: redrawn on a terminal, repeated now and then in a log.
struct Progress {
    quiet: bool,
    terminal: bool,
    last: Instant,
    percent: u64,
}

impl Progress {
    fn new(quiet: bool) -> Self {
        Self {
            quiet,
            terminal: io::stderr().is_terminal(),
            last: Instant::now(),
            percent: 0,
        }
    }

    fn show(&mut self, status: &PreparationStatus) -> io::Result<()> {
        if self.quiet || !self.terminal && self.last.elapsed() < LOG_EVERY {
            return Ok(());
        }
        self.last = Instant::now();
        let line = format!("{}, {} %", status.message, self.percent(status));
        let mut err = io::stderr().lock();
        if self.terminal {
            write!(err, "\r\x1b[K{line}")?;
        } else {
            writeln!(err, "{line}")?;
        }
        err.flush()
    }

    /// Never less than before: hosts that are heard of later add to the whole.
    fn percent(&mut self, status: &PreparationStatus) -> u64 {
        let percent = status.pages_done * 100 / status.pages_total.max(1);
        self.percent = self.percent.max(percent.min(100));
        self.percent
    }

    fn close(&self) -> io::Result<()> {
        if self.terminal && !self.quiet {
            write!(io::stderr(), "\r\x1b[K")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_percentage_does_not_fall_when_another_host_is_heard_of() {
        let mut progress = Progress::new(true);
        let mut percent = |pages_done, pages_total| {
            progress.percent(&PreparationStatus {
                group: "g".to_owned(),
                finished: false,
                message: String::new(),
                pages_done,
                pages_total,
                survey: None,
            })
        };
        assert_eq!(percent(0, 0), 0);
        assert_eq!(percent(50, 100), 50);
        assert_eq!(percent(60, 400), 50);
        assert_eq!(percent(400, 400), 100);
    }
}
