//! The paths of groups.

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::{get, post};
use axum::{Json, Router};

use super::log::EventLog;
use super::mover::{Refusal, RefusalCode};
use super::reply::{Followed, Payload, event_stream};
use super::routes::{Api, From};
use crate::coordinator::{Action, Group};
use crate::types::{
    ActionReport, EvacuationRequest, GroupAccepted, GroupEvent, GroupRequest, GroupStatus, Plan,
    Selection,
};

pub(super) fn router() -> Router<Api> {
    Router::new()
        .route("/v1/groups", get(list_groups).post(start_group))
        .route("/v1/groups/{group}", get(get_group))
        .route("/v1/groups/{group}/events", get(group_events))
        .route("/v1/groups/{group}/cancel", post(cancel_group))
        .route("/v1/groups/{group}/continue", post(continue_group))
        .route("/v1/groups/{group}/postcopy", post(go_over_group))
        .route("/v1/groups/{group}/recover", post(recover_group))
        .route("/v1/evacuations/plan", post(plan_evacuation))
}

impl Followed for Group {
    type Event = GroupEvent;

    fn log(&self) -> &EventLog<GroupEvent> {
        self.log()
    }
}

/// Check a plan with all its agents, then start its moves.
#[utoipa::path(post, path = "/v1/groups", request_body = GroupRequest, responses(
    (status = 202, description = "All agents agreed; the moves are being started",
     body = GroupAccepted),
    (status = "default", description = "Refused; nothing was started", body = Refusal)))]
pub(super) async fn start_group(
    State(api): State<Api>,
    Payload(request): Payload<GroupRequest>,
) -> Result<(StatusCode, Json<GroupAccepted>), Refusal> {
    if api.moves.stopping() {
        let message = "the agent is being stopped; nothing was started";
        return Err(Refusal::new(RefusalCode::Stopping, message));
    }
    let accepted = to_its_end(async move { api.coordinator.accept(request).await }).await?;
    Ok((StatusCode::ACCEPTED, Json(accepted)))
}

/// In a task of its own: once other agents are being asked, it does not matter who still listens.
async fn to_its_end<T: Send + 'static>(
    call: impl Future<Output = Result<T, Refusal>> + Send + 'static,
) -> Result<T, Refusal> {
    tokio::spawn(call).await.unwrap_or_else(|error| {
        tracing::error!("a call into the coordinator failed: {error}");
        let message = "the agent failed inside; see its log for what happened";
        Err(Refusal::new(RefusalCode::Internal, message))
    })
}

/// Make a plan that moves every VM of some hosts to others, each to the host with the most memory
/// left. Nothing is started or reserved.
#[utoipa::path(post, path = "/v1/evacuations/plan", request_body = EvacuationRequest, responses(
    (status = 200, body = Plan), (status = "default", body = Refusal)))]
pub(super) async fn plan_evacuation(
    State(api): State<Api>,
    Payload(request): Payload<EvacuationRequest>,
) -> Result<Json<Plan>, Refusal> {
    api.coordinator.plan_evacuation(request).await.map(Json)
}

/// The groups that this agent coordinates.
#[utoipa::path(get, path = "/v1/groups", responses((status = 200, body = Vec<GroupStatus>)))]
pub(super) async fn list_groups(State(api): State<Api>) -> Json<Vec<GroupStatus>> {
    Json(api.coordinator.list())
}

/// One group.
#[utoipa::path(get, path = "/v1/groups/{group}", params(("group" = String, Path)), responses(
    (status = 200, body = GroupStatus), (status = "default", body = Refusal)))]
pub(super) async fn get_group(
    State(api): State<Api>,
    Path(group): Path<String>,
) -> Result<Json<GroupStatus>, Refusal> {
    Ok(Json(api.coordinator.get(&group)?.status()))
}

/// Events of all moves of a group, one JSON object a line, until all have ended; the last line is
/// `group-finished`. An empty line says that the agent is alive.
#[utoipa::path(get, path = "/v1/groups/{group}/events",
    params(("group" = String, Path), From), responses(
    (status = 200, body = GroupEvent, content_type = "application/x-ndjson"),
    (status = "default", body = Refusal)))]
pub(super) async fn group_events(
    State(api): State<Api>,
    Path(group): Path<String>,
    From { from }: From,
) -> Result<Response, Refusal> {
    Ok(event_stream(api.coordinator.get(&group)?, from, &api.boot))
}

/// Cancel a group's unfinished moves, or one of them.
#[utoipa::path(post, path = "/v1/groups/{group}/cancel", request_body = Selection,
    params(("group" = String, Path)), responses(
    (status = 200, body = ActionReport), (status = "default", body = Refusal)))]
pub(super) async fn cancel_group(
    state: State<Api>,
    group: Path<String>,
    selection: Payload<Selection>,
) -> Result<Json<ActionReport>, Refusal> {
    act(state, group, selection, Action::Cancel).await
}

/// Let a group's held VMs go, or one of them.
#[utoipa::path(post, path = "/v1/groups/{group}/continue", request_body = Selection,
    params(("group" = String, Path)), responses(
    (status = 200, body = ActionReport), (status = "default", body = Refusal)))]
pub(super) async fn continue_group(
    state: State<Api>,
    group: Path<String>,
    selection: Payload<Selection>,
) -> Result<Json<ActionReport>, Refusal> {
    act(state, group, selection, Action::Continue).await
}

/// Have a group's moves of mode `hybrid` go over to post-copy now, or one of them.
#[utoipa::path(post, path = "/v1/groups/{group}/postcopy", request_body = Selection,
    params(("group" = String, Path)), responses(
    (status = 200, body = ActionReport), (status = "default", body = Refusal)))]
pub(super) async fn go_over_group(
    state: State<Api>,
    group: Path<String>,
    selection: Payload<Selection>,
) -> Result<Json<ActionReport>, Refusal> {
    act(state, group, selection, Action::Postcopy).await
}

/// Finish or undo a group's moves that need a person, or one of them.
#[utoipa::path(post, path = "/v1/groups/{group}/recover", request_body = Selection,
    params(("group" = String, Path)), responses(
    (status = 200, body = ActionReport), (status = "default", body = Refusal)))]
pub(super) async fn recover_group(
    state: State<Api>,
    group: Path<String>,
    selection: Payload<Selection>,
) -> Result<Json<ActionReport>, Refusal> {
    act(state, group, selection, Action::Recover).await
}

async fn act(
    State(api): State<Api>,
    Path(group): Path<String>,
    Payload(selection): Payload<Selection>,
    action: Action,
) -> Result<Json<ActionReport>, Refusal> {
    let acting = async move {
        let vm = selection.vm.as_deref();
        api.coordinator.act(&group, action, vm).await
    };
    to_its_end(acting).await.map(Json)
}
