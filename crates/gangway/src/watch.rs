//! Watches a group to its end.

use std::io::{self, Write};

use agent::client::Client;
use agent::types::{GroupEvent, GroupFinished, GroupMove, GroupStatus, Phase};
use tokio::time::MissedTickBehavior;

use crate::board::Board;
use crate::exit::Exit;
use crate::feed::{News, follow};
use crate::render;
use crate::screen::Screen;

/// Shows a group until it has ended, the person leaves, or the agent is gone for good.
pub(crate) async fn watch(client: &Client, group: &str, json: bool) -> anyhow::Result<Exit> {
    let status: GroupStatus = client.get(&format!("/v1/groups/{group}")).await?;
    let mut watcher = Watcher {
        board: Board::new(&status),
        screen: Screen::new(json),
        lost: false,
    };
    let mut feed = follow(client.clone(), group.to_owned());
    let mut ticks = tokio::time::interval(watcher.screen.interval());
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // The first is due at once, with nothing to show yet.
    ticks.tick().await;
    let finished = loop {
        tokio::select! {
            news = feed.recv() => match news {
                Some(News::Event(event)) => {
                    if let Some(finished) = watcher.happened(event)? {
                        break finished;
                    }
                }
                Some(news) => {
                    if let Some(exit) = watcher.trouble(news, group)? {
                        return Ok(exit);
                    }
                }
                None => anyhow::bail!("the events of group `{group}` ended without a reason"),
            },
            _ = ticks.tick() => watcher.screen.tick(&watcher.board)?,
            interrupted = tokio::signal::ctrl_c() => {
                interrupted?;
                let text = left(group);
                watcher.screen.say(&text, &watcher.board)?;
                return Ok(Exit::Left);
            }
        }
    };
    watcher.screen.close(&watcher.board)?;
    if !json {
        io::stdout().write_all(render::summary(&finished.outcomes).as_bytes())?;
    }
    Ok(exit_of(&finished.outcomes))
}

/// What a person reads who leaves.
pub(crate) fn left(group: &str) -> String {
    format!(
        "left; the migration of group {group} goes on: `gangway status --watch {group}` shows it, \
         `gangway cancel {group}` ends it"
    )
}

/// The exit code that a group's outcomes give.
pub(crate) fn exit_of(outcomes: &[GroupMove]) -> Exit {
    let any = |phase| outcomes.iter().any(|one| one.status.phase == phase);
    if any(Phase::NeedsPerson) {
        Exit::NeedsPerson
    } else if any(Phase::Stayed) {
        Exit::SomeStayed
    } else {
        Exit::AllMoved
    }
}

struct Watcher {
    board: Board,
    screen: Screen,
    lost: bool,
}

impl Watcher {
    fn happened(&mut self, event: GroupEvent) -> io::Result<Option<GroupFinished>> {
        self.board.apply(&event);
        self.screen.event(&event, &self.board)?;
        Ok(match event {
            GroupEvent::Finished(finished) => Some(finished),
            GroupEvent::Move(_) | GroupEvent::Prepared(_) => None,
        })
    }

    /// Tells of trouble once; an exit code if there is no hope.
    fn trouble(&mut self, news: News, group: &str) -> io::Result<Option<Exit>> {
        match news {
            News::Event(_) => {}
            News::Back => {
                self.lost = false;
                self.screen.say("the agent answers again", &self.board)?;
            }
            News::Lost(error) => {
                if !std::mem::replace(&mut self.lost, true) {
                    let text = format!("{}; the migration goes on, trying again", error.in_full());
                    self.screen.say(&text, &self.board)?;
                }
            }
            News::GaveUp(error) => {
                let text = format!(
                    "{}; what became of group {group} is not known here: start the agent and \
                     see `gangway status`, also on the source hosts",
                    error.in_full()
                );
                self.screen.say(&text, &self.board)?;
                return Ok(Some(Exit::NeedsPerson));
            }
        }
        Ok(None)
    }
}
