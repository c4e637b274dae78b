//! The paths of preparation: of one host, and of a group.

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};

use super::mover::Refusal;
use super::reply::{Payload, blocking};
use super::routes::Api;
use crate::types::{
    GroupAccepted, PreparationRequest, PreparationStatus, PrepareSpec, PrepareStatus, ResolveSpec,
};

pub(super) fn router() -> Router<Api> {
    Router::new()
        .route("/v1/prepare", post(prepare_host))
        .route("/v1/prepare/{group}", get(host_preparation))
        .route("/v1/prepare/{group}/resolve", post(resolve_host))
        .route("/v1/prepare/{group}/end", post(end_host))
        .route("/v1/preparations", post(start_preparation))
        .route("/v1/preparations/{group}", get(get_preparation))
        .route("/v1/preparations/{group}/cancel", post(cancel_preparation))
}

/// Source side: hash the memory of a group's VMs on this host and register what is found.
#[utoipa::path(post, path = "/v1/prepare", request_body = PrepareSpec, responses(
    (status = 202, description = "Under way"), (status = "default", body = Refusal)))]
pub(super) async fn prepare_host(
    State(api): State<Api>,
    Payload(spec): Payload<PrepareSpec>,
) -> Result<StatusCode, Refusal> {
    blocking(move || api.moves.mover().prepare(spec))
        .await
        .map(|()| StatusCode::ACCEPTED)
}

/// Where the preparation of a group stands on this host.
#[utoipa::path(get, path = "/v1/prepare/{group}", params(("group" = String, Path)), responses(
    (status = 200, body = PrepareStatus), (status = "default", body = Refusal)))]
pub(super) async fn host_preparation(
    State(api): State<Api>,
    Path(group): Path<String>,
) -> Result<Json<PrepareStatus>, Refusal> {
    blocking(move || api.moves.mover().preparation(&group))
        .await
        .map(Json)
}

/// Source side, once all hosts of the group have registered: learn what they need, too.
#[utoipa::path(post, path = "/v1/prepare/{group}/resolve", request_body = ResolveSpec,
    params(("group" = String, Path)), responses(
    (status = 202, description = "Under way"), (status = "default", body = Refusal)))]
pub(super) async fn resolve_host(
    State(api): State<Api>,
    Path(group): Path<String>,
    Payload(spec): Payload<ResolveSpec>,
) -> Result<StatusCode, Refusal> {
    blocking(move || api.moves.mover().resolve_preparation(&group, spec))
        .await
        .map(|()| StatusCode::ACCEPTED)
}

/// End the preparation of a group on this host and forget its results.
#[utoipa::path(post, path = "/v1/prepare/{group}/end",
    params(("group" = String, Path)), responses(
    (status = 204, description = "Forgotten"), (status = "default", body = Refusal)))]
pub(super) async fn end_host(
    State(api): State<Api>,
    Path(group): Path<String>,
) -> Result<StatusCode, Refusal> {
    blocking(move || api.moves.mover().end_preparation(&group))
        .await
        .map(|()| StatusCode::NO_CONTENT)
}

/// Prepare the hosts of a plan, or only survey them. Nothing moves; a later group with the same
/// moves takes the preparation over.
#[utoipa::path(post, path = "/v1/preparations", request_body = PreparationRequest, responses(
    (status = 202, description = "Under way", body = GroupAccepted),
    (status = "default", body = Refusal)))]
pub(super) async fn start_preparation(
    State(api): State<Api>,
    Payload(request): Payload<PreparationRequest>,
) -> Result<(StatusCode, Json<GroupAccepted>), Refusal> {
    let accepted = api.coordinator.prepare(request)?;
    Ok((StatusCode::ACCEPTED, Json(accepted)))
}

/// Where a preparation stands, and what it found.
#[utoipa::path(get, path = "/v1/preparations/{group}", params(("group" = String, Path)),
    responses((status = 200, body = PreparationStatus), (status = "default", body = Refusal)))]
pub(super) async fn get_preparation(
    State(api): State<Api>,
    Path(group): Path<String>,
) -> Result<Json<PreparationStatus>, Refusal> {
    Ok(Json(api.coordinator.preparation(&group)?.status()))
}

/// End a preparation, and forget its results on all hosts.
#[utoipa::path(post, path = "/v1/preparations/{group}/cancel", params(("group" = String, Path)),
    responses((status = 204, description = "Forgotten"), (status = "default", body = Refusal)))]
pub(super) async fn cancel_preparation(
    State(api): State<Api>,
    Path(group): Path<String>,
) -> Result<StatusCode, Refusal> {
    api.coordinator.cancel_preparation(&group).await?;
    Ok(StatusCode::NO_CONTENT)
}
