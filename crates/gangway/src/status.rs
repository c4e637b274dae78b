//! `status` and `doctor`: what there is to see.

use std::io::{self, Write};

use agent::api::doctor::{DoctorReport, Finding, Verdict, examine};
use agent::client::{CallError, Client};
use agent::types::{AgentStatus, GroupStatus, MoveStatus};

use crate::exit::Exit;
use crate::render;
use crate::screen::json_line;
use crate::watch::watch;

/// Shows the agent, or a group; or follows a group.
pub(crate) async fn status(
    client: &Client,
    group: Option<&str>,
    follow: bool,
    json: bool,
) -> anyhow::Result<Exit> {
    if follow {
        let status: AgentStatus = client.get("/v1/status").await?;
        let unfinished = status.groups.iter().filter(|group| !group.finished);
        // The newest, if there are several.
        let newest = unfinished.max_by(|a, b| a.accepted_unix_ms.total_cmp(&b.accepted_unix_ms));
        return match group.or(newest.map(|group| group.group.as_str())) {
            Some(group) => watch(client, group, json).await,
            None => {
                show_agent(&status, json)?;
                Ok(Exit::AllMoved)
            }
        };
    }
    match group {
        Some(group) => {
            let status: GroupStatus = client.get(&format!("/v1/groups/{group}")).await?;
            if json {
                json_line(&status)?
            } else {
                show_group(&status, &mut io::stdout())?
            }
        }
        None => show_agent(&client.get("/v1/status").await?, json)?,
    }
    Ok(Exit::AllMoved)
}

fn show_agent(status: &AgentStatus, json: bool) -> io::Result<()> {
    if json {
        return json_line(status);
    }
    let mut out = io::stdout().lock();
    let stopping = if status.stopping {
        ", being stopped"
    } else {
        ""
    };
    writeln!(
        out,
        "agent of host {} ({}){stopping}",
        status.name, status.version
    )?;
    for group in &status.groups {
        writeln!(out)?;
        show_group(group, &mut out)?;
    }
    let coordinated =
        |one: &&MoveStatus| status.groups.iter().any(|group| group.group == one.group);
    let (_, others): (Vec<_>, Vec<_>) = status.moves.iter().partition(coordinated);
    if !others.is_empty() {
        writeln!(out, "\nmoves from this host, coordinated elsewhere")?;
        let lines = others
            .into_iter()
            .map(|one| move_line(one, &one.group))
            .collect();
        write!(out, "{}", render::table(lines))?;
    }
    if !status.incoming.is_empty() {
        writeln!(out, "\nmoves to this host: {}", status.incoming.join(", "))?;
    }
    if status.groups.is_empty() && status.moves.is_empty() && status.incoming.is_empty() {
        writeln!(out, "no moves")?;
    }
    Ok(())
}

fn show_group(group: &GroupStatus, out: &mut impl Write) -> io::Result<()> {
    let state = if group.finished {
        "has ended"
    } else {
        "is under way"
    };
    writeln!(out, "group {} {state}", group.group)?;
    let lines = group.moves.iter().map(|one| {
        let from = format!("{} -> {}", one.source, one.status.target);
        let mut line = move_line(&one.status, &from);
        if !one.reachable {
            line[5] = format!("(agent of {} is unreachable) {}", one.source, line[5]);
        }
        line
    });
    write!(out, "{}", render::table(lines.collect()))
}

fn move_line(one: &MoveStatus, from: &str) -> [String; 6] {
    [
        one.vm.clone(),
        from.to_owned(),
        render::phase(one.phase).to_owned(),
        format!("sent {}", render::bytes(one.progress.wire_bytes)),
        format!("saved {}", render::saved(&one.progress)),
        match &one.note {
            Some(note) => format!("{}; {note}", one.message),
            None => one.message.clone(),
        },
    ]
}

/// Says whether this host is ready. Without an agent, this process looks for itself.
pub(crate) async fn doctor(client: &Client, json: bool) -> anyhow::Result<Exit> {
    let mut report = match client.get::<DoctorReport>("/v1/doctor").await {
        Ok(report) => report,
        Err(error) => without_agent(&error),
    };
    report
        .findings
        .sort_by_key(|finding| std::cmp::Reverse(finding.verdict));
    if json {
        json_line(&report)?;
    } else {
        show_findings(&report)?;
    }
    let broken = report
        .findings
        .iter()
        .any(|finding| finding.verdict == Verdict::Broken);
    Ok(if broken {
        Exit::SomeStayed
    } else {
        Exit::AllMoved
    })
}

fn without_agent(error: &CallError) -> DoctorReport {
    let mut report = examine(None);
    report.findings.push(Finding {
        about: "agent".to_owned(),
        verdict: Verdict::Broken,
        found: error.in_full(),
        advice: Some(
            "start `gangway agent`, or say where its socket is with --socket; what is said here of \
             rights is true of the user of this command"
                .to_owned(),
        ),
    });
    report
}

fn show_findings(report: &DoctorReport) -> io::Result<()> {
    let mut out = io::stdout().lock();
    for finding in &report.findings {
        let verdict = match finding.verdict {
            Verdict::Fine => "fine",
            Verdict::Limited => "limited",
            Verdict::Broken => "BROKEN",
        };
        writeln!(out, "{verdict:8} {}: {}", finding.about, finding.found)?;
        if let Some(advice) = &finding.advice {
            writeln!(out, "{:8} -> {advice}", "")?;
        }
    }
    Ok(())
}
