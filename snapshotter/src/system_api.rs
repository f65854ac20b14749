//! What may be asked: by operators, metrics over TCP and the daemons over a unix socket; by our own daemons, the current
//! backend of an image, credentials included, over a socket that only root reaches.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Path, Query, State};
use axum::http::{StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde_json::{Value, json};

use crate::cache::Cache;
use crate::daemons::Daemons;
use crate::layout::Layout;
use crate::meta::Meta;
use crate::metrics::{Metrics, Usage};

/// What the answers are made of.
#[derive(Debug, Clone)]
pub struct Sources {
    /// The daemons.
    pub daemons: Daemons,
    /// The records.
    pub meta: Arc<Meta>,
    /// The places.
    pub layout: Layout,
    /// The counters.
    pub metrics: Arc<Metrics>,
    /// The cached blobs, counted only.
    pub cache: Arc<Cache>,
}

/// Answers `GET /v1/metrics`.
pub fn metrics(sources: Sources) -> Router {
    Router::new().route("/v1/metrics", get(show_metrics)).with_state(sources)
}

/// Answers `GET /api/v1/daemons`, and says of the rest of that API that it is not there.
pub fn system(sources: Sources) -> Router {
    Router::new()
        .route("/api/v1/daemons", get(show_daemons))
        .route("/v1/metrics", get(show_metrics))
        .fallback(async |uri: Uri| refuse(&uri))
        .with_state(sources)
}

/// Answers `GET /api/v1/daemons/ID/backend`. The answer holds credentials, so this is not for the system API's socket,
/// which may belong to others.
pub fn private(daemons: Daemons) -> Router {
    Router::new().route("/api/v1/daemons/{id}/backend", get(show_backend)).with_state(daemons)
}

async fn show_backend(
    State(daemons): State<Daemons>,
    Path(id): Path<String>,
    Query(query): Query<BTreeMap<String, String>>,
) -> Response {
    let mountpoint = query.get("mountpoint").cloned().unwrap_or_default();
    match daemons.backend(id, mountpoint).await {
        Ok(Some(section)) => axum::Json(section).into_response(),
        Ok(None) => problem(StatusCode::NOT_FOUND, "this daemon serves no such image"),
        Err(error) => problem(StatusCode::INTERNAL_SERVER_ERROR, &error.full_text()),
    }
}

async fn show_metrics(State(sources): State<Sources>) -> Response {
    let text = tokio::task::spawn_blocking(move || {
        sources.metrics.text(&sources.daemons.report(), &sources.cache, Usage::of("self"))
    })
    .await;
    match text {
        Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn show_daemons(State(sources): State<Sources>) -> Response {
    let list = tokio::task::spawn_blocking(move || daemons(&sources)).await;
    match list {
        Ok(list) => axum::Json(list).into_response(),
        Err(error) => problem(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

fn daemons(sources: &Sources) -> Value {
    let describe = |daemon: crate::daemons::Report| {
        let instances: serde_json::Map<String, Value> = daemon
            .images
            .iter()
            .map(|image| {
                let reference = sources.meta.instance(*image).ok().flatten().and_then(|instance| instance.image);
                let about = json!({
                    "snapshot_id": image.to_string(),
                    "snapshot_dir": sources.layout.snapshot(*image),
                    "mountpoint": sources.layout.rafs(*image),
                    "image_id": reference.unwrap_or_default(),
                });
                (image.to_string(), about)
            })
            .collect();
        let memory = daemon.pid.map_or(0, |pid| Usage::of(&pid.to_string()).memory_kb);
        json!({
            "id": daemon.name,
            "pid": daemon.pid.unwrap_or(0),
            "api_socket": daemon.socket,
            "supervisor_path": "",
            "reference": daemon.images.len(),
            "mountpoint": daemon.mountpoint,
            "startup_cpu_utilization": 0.0,
            "memory_rss_kb": memory,
            "read_data_kb": 0,
            "instances": instances,
        })
    };
    sources.daemons.report().into_iter().map(describe).collect()
}

fn refuse(uri: &Uri) -> Response {
    let known = uri.path().starts_with("/api/v1/daemons") || uri.path() == "/api/v1/prefetch";
    if known {
        return problem(StatusCode::NOT_IMPLEMENTED, "this call is not supported yet");
    }
    problem(StatusCode::NOT_FOUND, "there is no such call; GET /api/v1/daemons lists the daemons")
}

fn problem(status: StatusCode, message: &str) -> Response {
    (status, axum::Json(json!({ "code": "Unknown", "message": message }))).into_response()
}
