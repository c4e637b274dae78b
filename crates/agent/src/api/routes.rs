//! The paths of the API and their OpenAPI description; those of one move and of the agent itself.

use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, FromRequestParts, Path, Query, State};
use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, patch, post};
use axum::{Json, Router};
use serde::Deserialize;
use utoipa::{IntoParams, OpenApi};

use super::group_routes;
use super::log::EventLog;
use super::mover::{Admission, Bandwidth, MoveCheck, Refusal, RefusalCode};
use super::moves::{MoveRecord, Moves};
use super::reply::{Followed, Payload, blocking, event_stream};
use super::{doctor, metrics, prepare_routes};
use crate::coordinator::Coordinator;
use crate::types::{AgentStatus, GroupEvent, Inventory, MoveEvent, MoveSpec, MoveStatus};

/// A plan of 4096 moves, each with a command line of two kilobytes.
const BODY_BYTES_MAX: usize = 16 << 20;

/// What the handlers share.
#[derive(Clone)]
pub(crate) struct Api {
    pub(crate) name: Arc<str>,
    /// Random, of this process: numbers of events count within it.
    pub(crate) boot: Arc<str>,
    pub(crate) moves: Arc<Moves>,
    pub(crate) coordinator: Arc<Coordinator>,
    /// Where the mapping library is to be found, if that is configured.
    pub(crate) cow_library: Option<Arc<std::path::Path>>,
}

/// All routes.
pub(crate) fn router(api: Api) -> Router {
    let one_move = Router::new()
        .route("/", get(get_move))
        .route("/events", get(move_events))
        .route("/cancel", post(cancel_move))
        .route("/continue", post(continue_move))
        .route("/postcopy", post(go_over_move))
        .route("/recover", post(recover_move))
        .route("/bandwidth", patch(set_bandwidth));
    Router::new()
        .merge(group_routes::router())
        .merge(prepare_routes::router())
        .route("/v1/moves", get(list_moves).post(start_move))
        .nest("/v1/moves/{group}/{vm}", one_move)
        .route("/v1/check", post(check))
        .route("/v1/admit", post(admit))
        .route("/v1/inventory", get(inventory))
        .route("/v1/status", get(status))
        .route("/v1/doctor", get(doctor_report))
        .route("/v1/openapi.json", get(|| async { Json(openapi()) }))
        .route("/metrics", get(metrics_page))
        .fallback(|| async {
            Refusal::new(
                RefusalCode::BadRequest,
                "no such path; see /v1/openapi.json",
            )
        })
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(api)
}

/// The description of the API that `docs/api/openapi.json` holds.
#[must_use]
pub fn openapi() -> utoipa::openapi::OpenApi {
    Description::openapi()
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Gangway agent",
        description = "Control API of a gangway agent: HTTP and JSON, on the host's unix socket \
                       and, for other agents, over mutual TLS. Whatever is refused changed nothing."
    ),
    paths(
        group_routes::start_group,
        group_routes::list_groups,
        group_routes::get_group,
        group_routes::group_events,
        group_routes::cancel_group,
        group_routes::continue_group,
        group_routes::go_over_group,
        group_routes::recover_group,
        group_routes::plan_evacuation,
        prepare_routes::prepare_host,
        prepare_routes::host_preparation,
        prepare_routes::resolve_host,
        prepare_routes::end_host,
        prepare_routes::start_preparation,
        prepare_routes::get_preparation,
        prepare_routes::cancel_preparation,
        start_move,
        list_moves,
        get_move,
        move_events,
        cancel_move,
        continue_move,
        go_over_move,
        recover_move,
        set_bandwidth,
        check,
        admit,
        inventory,
        status,
        doctor_report,
        metrics_page
    ),
    components(schemas(GroupEvent, MoveEvent, Refusal))
)]
struct Description;

/// From where to read a stream of events.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(crate) struct From {
    /// Number of the first event wanted; 0 if absent.
    #[serde(default)]
    pub(crate) from: u64,
}

impl<S: Send + Sync> FromRequestParts<S> for From {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let query = Query::from_request_parts(parts, state).await;
        query
            .map(|Query(from)| from)
            .map_err(|error| Refusal::new(RefusalCode::BadRequest, error.body_text()))
    }
}

/// A move's id is `group/vm`.
type MovePath = Path<(String, String)>;

impl Followed for MoveRecord {
    type Event = MoveEvent;

    fn log(&self) -> &EventLog<MoveEvent> {
        &self.log
    }
}

/// Start a move whose source is this host.
#[utoipa::path(post, path = "/v1/moves", request_body = MoveSpec, responses(
    (status = 202, description = "Under way", body = MoveStatus),
    (status = "default", description = "Refused; nothing was started", body = Refusal)))]
async fn start_move(
    State(api): State<Api>,
    Payload(spec): Payload<MoveSpec>,
) -> Result<(StatusCode, Json<MoveStatus>), Refusal> {
    let status = blocking(move || api.moves.start(spec)).await?;
    Ok((StatusCode::ACCEPTED, Json(status)))
}

/// The moves whose source is this host.
#[utoipa::path(get, path = "/v1/moves", responses((status = 200, body = Vec<MoveStatus>)))]
async fn list_moves(State(api): State<Api>) -> Json<Vec<MoveStatus>> {
    Json(api.moves.list())
}

/// One move.
#[utoipa::path(get, path = "/v1/moves/{group}/{vm}",
    params(("group" = String, Path), ("vm" = String, Path)), responses(
    (status = 200, body = MoveStatus), (status = "default", body = Refusal)))]
async fn get_move(
    State(api): State<Api>,
    Path((group, vm)): MovePath,
) -> Result<Json<MoveStatus>, Refusal> {
    Ok(Json(api.moves.get(&id(&group, &vm))?.status()))
}

/// Events of a move, one JSON object a line, until it ends. An empty line says that the agent is
/// alive. The header `gangway-boot` changes when the agent restarts and counts from 0 again.
#[utoipa::path(get, path = "/v1/moves/{group}/{vm}/events",
    params(("group" = String, Path), ("vm" = String, Path), From), responses(
    (status = 200, body = MoveEvent, content_type = "application/x-ndjson"),
    (status = "default", body = Refusal)))]
async fn move_events(
    State(api): State<Api>,
    Path((group, vm)): MovePath,
    From { from }: From,
) -> Result<Response, Refusal> {
    let record = api.moves.get(&id(&group, &vm))?;
    Ok(event_stream(record, from, &api.boot))
}

/// End a move with the VM running at the source.
#[utoipa::path(post, path = "/v1/moves/{group}/{vm}/cancel",
    params(("group" = String, Path), ("vm" = String, Path)), responses(
    (status = 202, description = "Being cancelled; its final event says how it ended"),
    (status = "default", body = Refusal)))]
async fn cancel_move(
    State(api): State<Api>,
    Path((group, vm)): MovePath,
) -> Result<StatusCode, Refusal> {
    blocking(move || api.moves.cancel(&id(&group, &vm)))
        .await
        .map(|()| StatusCode::ACCEPTED)
}

/// Let a VM go that is held between its load at the target and its start there.
#[utoipa::path(post, path = "/v1/moves/{group}/{vm}/continue",
    params(("group" = String, Path), ("vm" = String, Path)), responses(
    (status = 202, description = "The move goes on"), (status = "default", body = Refusal)))]
async fn continue_move(
    State(api): State<Api>,
    Path((group, vm)): MovePath,
) -> Result<StatusCode, Refusal> {
    blocking(move || api.moves.resume_held(&id(&group, &vm)))
        .await
        .map(|()| StatusCode::ACCEPTED)
}

/// Have a move of mode `hybrid` go over to post-copy now, whether it converges or not.
#[utoipa::path(post, path = "/v1/moves/{group}/{vm}/postcopy",
    params(("group" = String, Path), ("vm" = String, Path)), responses(
    (status = 202, description = "It goes over, unless it converges in the same moment"),
    (status = "default", body = Refusal)))]
async fn go_over_move(
    State(api): State<Api>,
    Path((group, vm)): MovePath,
) -> Result<StatusCode, Refusal> {
    blocking(move || api.moves.go_over(&id(&group, &vm)))
        .await
        .map(|()| StatusCode::ACCEPTED)
}

/// Finish or undo a move that needs a person.
#[utoipa::path(post, path = "/v1/moves/{group}/{vm}/recover",
    params(("group" = String, Path), ("vm" = String, Path)), responses(
    (status = 202, description = "Being recovered; its final event says how it ended"),
    (status = "default", body = Refusal)))]
async fn recover_move(
    State(api): State<Api>,
    Path((group, vm)): MovePath,
) -> Result<StatusCode, Refusal> {
    blocking(move || api.moves.recover(&id(&group, &vm)))
        .await
        .map(|()| StatusCode::ACCEPTED)
}

/// Replace the limits of a move under way; absent means no limit.
#[utoipa::path(patch, path = "/v1/moves/{group}/{vm}/bandwidth", request_body = Bandwidth,
    params(("group" = String, Path), ("vm" = String, Path)), responses(
    (status = 204, description = "Set"), (status = "default", body = Refusal)))]
async fn set_bandwidth(
    State(api): State<Api>,
    Path((group, vm)): MovePath,
    Payload(limits): Payload<Bandwidth>,
) -> Result<StatusCode, Refusal> {
    let set = move || api.moves.set_bandwidth(&id(&group, &vm), limits);
    blocking(set).await.map(|()| StatusCode::NO_CONTENT)
}

/// Source side: can this VM be moved so? Nothing is started.
#[utoipa::path(post, path = "/v1/check", request_body = MoveSpec, responses(
    (status = 200, body = MoveCheck), (status = "default", body = Refusal)))]
async fn check(
    State(api): State<Api>,
    Payload(spec): Payload<MoveSpec>,
) -> Result<Json<MoveCheck>, Refusal> {
    blocking(move || api.moves.check(&spec)).await.map(Json)
}

/// Target side: can this host take all of these VMs together? Their memory is kept for the group
/// until its moves start, a minute at most.
#[utoipa::path(post, path = "/v1/admit", request_body = Admission, responses(
    (status = 204, description = "Yes"), (status = "default", body = Refusal)))]
async fn admit(
    State(api): State<Api>,
    Payload(request): Payload<Admission>,
) -> Result<StatusCode, Refusal> {
    blocking(move || api.moves.admit(&request))
        .await
        .map(|()| StatusCode::NO_CONTENT)
}

/// What runs on this host and how much room it has.
#[utoipa::path(get, path = "/v1/inventory", responses(
    (status = 200, body = Inventory), (status = "default", body = Refusal)))]
async fn inventory(State(api): State<Api>) -> Result<Json<Inventory>, Refusal> {
    blocking(move || api.moves.mover().inventory())
        .await
        .map(Json)
}

/// What this agent is doing.
#[utoipa::path(get, path = "/v1/status", responses((status = 200, body = AgentStatus)))]
async fn status(State(api): State<Api>) -> Json<AgentStatus> {
    Json(AgentStatus {
        name: api.name.to_string(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        stopping: api.moves.stopping(),
        moves: api.moves.list(),
        incoming: api.moves.incoming(),
        groups: api.coordinator.list(),
    })
}

/// Whether this host is ready for migrations.
#[utoipa::path(get, path = "/v1/doctor", responses((status = 200, body = doctor::DoctorReport)))]
async fn doctor_report(State(api): State<Api>) -> Result<Json<doctor::DoctorReport>, Refusal> {
    let library = api.cow_library;
    blocking(move || Ok(doctor::examine(library.as_deref())))
        .await
        .map(Json)
}

/// Counters and gauges in Prometheus' text format.
#[utoipa::path(get, path = "/metrics", responses(
    (status = 200, body = String, content_type = "text/plain")))]
async fn metrics_page(State(api): State<Api>) -> Response {
    let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4")];
    (kind, metrics::page(&api.moves)).into_response()
}

fn id(group: &str, vm: &str) -> String {
    format!("{group}/{vm}")
}
