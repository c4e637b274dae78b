//! Follows a group's events through any trouble of the agent, and says what the trouble is.

use std::time::{Duration, Instant};

use agent::api::mover::RefusalCode;
use agent::client::{CallError, Client};
use agent::types::GroupEvent;
use tokio::sync::mpsc;

/// A busy agent answers by then.
const PATIENCE: Duration = Duration::from_secs(60);
/// If no process listens, a service manager has started another by then, or there is none.
const PATIENCE_WITH_NOBODY: Duration = Duration::from_secs(20);
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(3);
/// Events between this and a slow terminal; the agent's log takes over beyond that.
const EVENTS: usize = 64;

/// What a watcher hears.
#[derive(Debug)]
pub(crate) enum News {
    /// Something happened, or the group has ended.
    Event(GroupEvent),
    /// The agent does not answer; tried again.
    Lost(CallError),
    /// It answers again.
    Back,
    /// The agent cannot tell any more.
    GaveUp(CallError),
}

/// How long an agent is asked again that fails so.
pub(crate) fn patience(error: &CallError) -> Duration {
    if error.nobody_listens() {
        PATIENCE_WITH_NOBODY
    } else {
        PATIENCE
    }
}

/// Starts to follow a group.
pub(crate) fn follow(client: Client, group: String) -> mpsc::Receiver<News> {
    let (sender, receiver) = mpsc::channel(EVENTS);
    let path = format!("/v1/groups/{group}/events");
    let feed = Feed {
        client,
        path,
        sender,
        boot: String::new(),
        next: 0,
        lost: None,
    };
    tokio::spawn(feed.run());
    receiver
}

struct Feed {
    client: Client,
    path: String,
    sender: mpsc::Sender<News>,
    boot: String,
    next: u64,
    lost: Option<Instant>,
}

impl Feed {
    async fn run(mut self) {
        let mut pause = FIRST_PAUSE;
        // Ends when nobody listens any more.
        while !self.sender.is_closed() {
            let error = match self.follow_once().await {
                Ok(true) => return,
                // The agent stops, in order: it ended the stream before the group's end.
                Ok(false) => None,
                Err(error) => Some(error),
            };
            if self.lost.is_none() {
                pause = FIRST_PAUSE;
            }
            let since = *self.lost.get_or_insert_with(Instant::now);
            if let Some(error) = error {
                let hopeless = error.refused_as() == Some(RefusalCode::UnknownGroup);
                let over = hopeless || since.elapsed() > patience(&error);
                let news = if over {
                    News::GaveUp(error)
                } else {
                    News::Lost(error)
                };
                if self.sender.send(news).await.is_err() || over {
                    return;
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Follows one stream; true once the group has ended or nobody listens.
    async fn follow_once(&mut self) -> Result<bool, CallError> {
        let mut stream = self.client.events(&self.path, self.next).await?;
        if stream.boot != self.boot {
            if self.next != 0 {
                stream = self.client.events(&self.path, 0).await?;
            }
            self.boot.clone_from(&stream.boot);
            self.next = 0;
        }
        if self.lost.take().is_some() && self.sender.send(News::Back).await.is_err() {
            return Ok(true);
        }
        while let Some(event) = stream.next::<GroupEvent>().await? {
            self.next = event.seq() + 1;
            let ended = matches!(event, GroupEvent::Finished(_));
            if self.sender.send(News::Event(event)).await.is_err() || ended {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
