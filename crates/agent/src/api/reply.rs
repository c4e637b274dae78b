//! Bodies in and out: JSON with refusals that say where they went wrong, and event streams.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http_body_util::channel::Channel;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::log::EventLog;
use super::mover::{Refusal, RefusalCode};
use crate::client::BOOT_HEADER;

/// An idle stream says so often that it is alive: three times in the shortest peer timeout.
const KEEP_ALIVE: Duration = Duration::from_secs(1);
/// Frames between a log and a slow reader: beyond that the log's own bound takes over.
const FRAMES: usize = 4;

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = match self.code {
            RefusalCode::BadRequest => StatusCode::BAD_REQUEST,
            RefusalCode::Forbidden => StatusCode::FORBIDDEN,
            RefusalCode::UnknownMove | RefusalCode::UnknownGroup => StatusCode::NOT_FOUND,
            RefusalCode::Busy
            | RefusalCode::NotHeld
            | RefusalCode::NotHybrid
            | RefusalCode::TooLate => StatusCode::CONFLICT,
            RefusalCode::UnknownVm
            | RefusalCode::CannotMigrate
            | RefusalCode::NoMemory
            | RefusalCode::NoQemu
            | RefusalCode::Unreachable => StatusCode::UNPROCESSABLE_ENTITY,
            RefusalCode::Stopping => StatusCode::SERVICE_UNAVAILABLE,
            RefusalCode::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, axum::Json(self)).into_response()
    }
}

/// A JSON body; an empty one reads as `{}`. What is wrong with it is told as a [`Refusal`].
pub(crate) struct Payload<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Payload<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &S) -> Result<Self, Refusal> {
        let bad = |problem: String| {
            Refusal::new(
                RefusalCode::BadRequest,
                format!("the request's body: {problem}"),
            )
        };
        let body = Bytes::from_request(request, state)
            .await
            .map_err(|e| bad(e.body_text()))?;
        let text: &[u8] = if body.is_empty() { b"{}" } else { &body };
        serde_json::from_slice(text)
            .map(Self)
            .map_err(|error| bad(error.to_string()))
    }
}

/// Runs a call into the mover where it may block.
pub(crate) async fn blocking<T: Send + 'static>(
    call: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
) -> Result<T, Refusal> {
    tokio::task::spawn_blocking(call)
        .await
        .unwrap_or_else(|error| {
            tracing::error!("a call into the data path failed: {error}");
            let message = "the agent failed inside; see its log for what happened";
            Err(Refusal::new(RefusalCode::Internal, message))
        })
}

/// What has a log that can be followed.
pub(crate) trait Followed: Send + Sync + 'static {
    /// Its events.
    type Event: Clone + Serialize + Send + Sync;
    /// Its log.
    fn log(&self) -> &EventLog<Self::Event>;
}

/// Streams the events from number `from` on, one JSON object a line, until the log ends.
pub(crate) fn event_stream<F: Followed>(
    source: std::sync::Arc<F>,
    from: u64,
    boot: &str,
) -> Response {
    let (mut sender, body) = Channel::<Bytes, Infallible>::new(FRAMES);
    tokio::spawn(async move {
        let mut news = source.log().subscribe();
        let mut from = from;
        loop {
            news.mark_unchanged();
            let batch = source.log().read(from);
            let idle = batch.events.is_empty();
            // An error means that the reader has gone.
            if !idle && sender.send_data(lines(&batch.events)).await.is_err() || batch.ended {
                return;
            }
            from = batch.next;
            let waited = idle.then(|| tokio::time::timeout(KEEP_ALIVE, news.changed()));
            if let Some(waited) = waited
                && waited.await.is_err()
                && sender.send_data(Bytes::from_static(b"\n")).await.is_err()
            {
                return;
            }
        }
    });
    let kind = [
        (header::CONTENT_TYPE.as_str(), "application/x-ndjson"),
        (BOOT_HEADER, boot),
    ];
    (kind, Body::new(body)).into_response()
}

fn lines<E: Serialize>(events: &[E]) -> Bytes {
    let mut text = Vec::new();
    for event in events {
        match serde_json::to_vec(event) {
            Ok(line) => {
                text.extend(line);
                text.push(b'\n');
            }
            Err(error) => tracing::error!("an event cannot be written as JSON: {error}"),
        }
    }
    text.into()
}
