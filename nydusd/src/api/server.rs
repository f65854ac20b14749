//! Serves a daemon's API on its unix socket.
//!
//! Paths, verbs, statuses and texts are those of the program we replace; `Call::read` has them all in one place.
//! Unlike there, a slow call does not hold up the others: what blocks runs on a thread of its own.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::{Method, StatusCode, header};
use axum::response::Response;
use bytes::Bytes;
use serde::Serialize;
use tokio::net::UnixListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::types::{DaemonChange, ErrorBody, MountRequest};
use crate::daemon::{Daemon, DaemonError, Ending};
use crate::fuse::namespace::TreeError;

mod connections;
mod metrics;

/// Longest body of a request, in bytes.
const MAX_BODY: usize = 51_200;

/// How long the body of a request may take.
const BODY: Duration = Duration::from_secs(5);

/// How long a mount or an unmount may take until the caller is told that it goes on.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long calls that are under way at the end may take.
const FAREWELL: Duration = Duration::from_millis(500);

/// A served socket. The file goes with [`Api::close`].
#[derive(Debug)]
pub struct Api {
    path: PathBuf,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

/// Listens on `path`, in the place of a socket that an earlier daemon left there.
pub fn serve(path: &Path, daemon: Daemon) -> anyhow::Result<Api> {
    let failed = || format!("could not serve the API on {}", path.display());
    match std::fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => {
            bail!("{}: there is something that is not a socket; give --apisock another path", failed());
        }
        Ok(_) => std::fs::remove_file(path).with_context(failed)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(failed),
    }
    let listener = UnixListener::bind(path).with_context(failed)?;
    let stop = CancellationToken::new();
    let task = tokio::spawn(connections::serve(listener, daemon, stop.clone()));
    Ok(Api { path: path.to_owned(), stop, task })
}

impl Api {
    /// Removes the socket and waits shortly for calls that are under way.
    pub async fn close(self) {
        let _ = std::fs::remove_file(&self.path);
        self.stop.cancel();
        let _ = tokio::time::timeout(FAREWELL, self.task).await;
    }
}

/// What is answered.
enum Answer {
    /// Done, nothing to say.
    Nothing,
    /// JSON.
    Json(Vec<u8>),
}

impl Answer {
    fn json<T: Serialize>(value: &T) -> Result<Self, Refusal> {
        serde_json::to_vec(value)
            .map(Self::Json)
            .map_err(|error| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, format!("Serialize({error})")))
    }
}

/// Why it is not.
#[derive(Debug, PartialEq, Eq)]
struct Refusal {
    status: StatusCode,
    message: String,
}

impl Refusal {
    fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }

    fn bad(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// What a failed mount, remount or unmount says.
    fn mount(error: &DaemonError) -> Self {
        let mut text = error.to_string();
        // Clients of the program we replace may look for the quotes and the stray back-tick; both are kept.
        if text.starts_with("RAFS failed to handle request") {
            text.push('`');
        }
        let status = match error {
            DaemonError::Tree(TreeError::Path(_)) => StatusCode::BAD_REQUEST,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::new(status, format!("Mount(MountFilesystem(Other({text:?})))"))
    }

    /// What a refused event says.
    fn event(context: &str, error: &DaemonError) -> Self {
        let (status, text) = match error {
            DaemonError::Unexpected(_) => (StatusCode::BAD_REQUEST, format!("{context}(DaemonAbnormal({error}))")),
            DaemonError::NotReady => (StatusCode::SERVICE_UNAVAILABLE, format!("{context}(DaemonAbnormal(NotReady))")),
            DaemonError::Unsupported => {
                (StatusCode::NOT_IMPLEMENTED, format!("{context}(DaemonAbnormal(Unsupported))"))
            }
            _ => (StatusCode::INTERNAL_SERVER_ERROR, format!("{context}({error})")),
        };
        Self::new(status, text)
    }
}

/// One call of the API, read from verb, path, query and body.
#[derive(Debug, PartialEq, Eq)]
enum Call {
    Info { mounts: bool },
    SetLogLevel(String),
    Start,
    Exit,
    SendFd,
    TakeOver,
    Events,
    Backend(String),
    Mount(String, Box<MountRequest>),
    Remount(String, Box<MountRequest>),
    Umount(String),
    FsMetrics(Option<String>),
    FilesMetrics { id: Option<String>, latest: bool },
    Pattern(Option<String>),
    BackendMetrics(Option<String>),
    CacheMetrics(Option<String>),
    Inflight,
    Config(Option<String>),
    SetConfig(Option<String>, BTreeMap<String, String>),
    PutBlob,
    DeleteBlob,
}

impl Call {
    fn read(method: &Method, path: &str, query: &BTreeMap<String, String>, body: &[u8]) -> Result<Self, Refusal> {
        let wrong = || Refusal::bad("BadRequest");
        let id = || query.get("id").cloned();
        let mountpoint = || {
            let missing = "QueryString(\"'mountpoint' should be specified in query string\")";
            query.get("mountpoint").cloned().ok_or_else(|| Refusal::bad(missing))
        };
        let bare = |call| if body.is_empty() { Ok(call) } else { Err(wrong()) };
        let (get, put) = (*method == Method::GET, *method == Method::PUT);
        match path {
            "/api/v1/daemon" | "/api/v2/daemon" if get => bare(Self::Info { mounts: path == "/api/v1/daemon" }),
            "/api/v1/daemon" | "/api/v2/daemon" if put => Ok(Self::SetLogLevel(parse::<DaemonChange>(body)?.log_level)),
            "/api/v1/daemon/start" if put => bare(Self::Start),
            "/api/v1/daemon/exit" if put => bare(Self::Exit),
            "/api/v1/daemon/fuse/sendfd" if put => bare(Self::SendFd),
            "/api/v1/daemon/fuse/takeover" if put => bare(Self::TakeOver),
            "/api/v1/daemon/events" if get => bare(Self::Events),
            "/api/v1/daemon/backend" if get => bare(Self::Backend(mountpoint()?)),
            "/api/v1/mount" if *method == Method::POST => Ok(Self::Mount(mountpoint()?, Box::new(parse(body)?))),
            "/api/v1/mount" if put => Ok(Self::Remount(mountpoint()?, Box::new(parse(body)?))),
            "/api/v1/mount" if *method == Method::DELETE => bare(Self::Umount(mountpoint()?)),
            "/api/v1/metrics" if get => bare(Self::FsMetrics(id())),
            "/api/v1/metrics/files" if get => {
                bare(Self::FilesMetrics { id: id(), latest: query.get("latest").is_some_and(|value| value == "true") })
            }
            "/api/v1/metrics/pattern" if get => bare(Self::Pattern(id())),
            "/api/v1/metrics/backend" if get => bare(Self::BackendMetrics(id())),
            "/api/v1/metrics/blobcache" if get => bare(Self::CacheMetrics(id())),
            "/api/v1/metrics/inflight" if get => bare(Self::Inflight),
            "/api/v1/config" if get => bare(Self::Config(id())),
            "/api/v1/config" if put => Ok(Self::SetConfig(id(), parse(body)?)),
            "/api/v2/blobs" if put && !body.is_empty() => Ok(Self::PutBlob),
            "/api/v2/blobs" if *method == Method::DELETE => bare(Self::DeleteBlob),
            "/api/v1/daemon"
            | "/api/v2/daemon"
            | "/api/v1/daemon/start"
            | "/api/v1/daemon/exit"
            | "/api/v1/daemon/fuse/sendfd"
            | "/api/v1/daemon/fuse/takeover"
            | "/api/v1/daemon/events"
            | "/api/v1/daemon/backend"
            | "/api/v1/mount"
            | "/api/v1/metrics"
            | "/api/v1/metrics/files"
            | "/api/v1/metrics/pattern"
            | "/api/v1/metrics/backend"
            | "/api/v1/metrics/blobcache"
            | "/api/v1/metrics/inflight"
            | "/api/v1/config"
            | "/api/v2/blobs" => Err(wrong()),
            _ => Err(Refusal::new(StatusCode::NOT_FOUND, "NoRoute")),
        }
    }
}

/// Takes a request apart as the server does and carries nothing out; returns whether it means something. `target` is the
/// path with its query.
pub fn understands(method: &Method, target: &str, body: &[u8]) -> bool {
    let (path, text) = target.split_once('?').unwrap_or((target, ""));
    Call::read(method, path, &query(text), body).is_ok()
}

fn parse<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    if body.is_empty() {
        return Err(Refusal::bad("BadRequest"));
    }
    serde_json::from_slice(body).map_err(|error| {
        let (line, column) = (error.line(), error.column());
        let text = error.to_string();
        let text = text.split(" at line ").next().unwrap_or_default();
        Refusal::bad(format!("ParseBody(Error({text:?}, line: {line}, column: {column}))"))
    })
}

/// Takes a query string apart.
fn query(text: &str) -> BTreeMap<String, String> {
    let decode = |text: &str| {
        let bytes = text.as_bytes();
        let mut out = Vec::with_capacity(bytes.len());
        let mut at = 0;
        while let Some(&byte) = bytes.get(at) {
            let digits = bytes.get(at + 1..at + 3).and_then(|digits| std::str::from_utf8(digits).ok());
            match (byte, digits.and_then(|digits| u8::from_str_radix(digits, 16).ok())) {
                (b'%', Some(value)) => {
                    out.push(value);
                    at += 3;
                }
                (b'+', _) => {
                    out.push(b' ');
                    at += 1;
                }
                _ => {
                    out.push(byte);
                    at += 1;
                }
            }
        }
        String::from_utf8_lossy(&out).into_owned()
    };
    text.split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decode(key), decode(value))
        })
        .collect()
}

/// Answers any request.
async fn answer(State(daemon): State<Daemon>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let result = match read_body(body).await {
        Ok(body) => {
            let query = query(parts.uri.query().unwrap_or_default());
            match Call::read(&parts.method, parts.uri.path(), &query, &body) {
                Ok(call) => carry_out(daemon, call).await,
                Err(refusal) => Err(refusal),
            }
        }
        Err(refusal) => Err(refusal),
    };
    if let Err(refusal) = &result {
        tracing::debug!(method = %parts.method, uri = %parts.uri, status = refusal.status.as_u16(),
            message = refusal.message, "API call refused");
    }
    let response = Response::builder().header(header::SERVER, "Nydus API");
    let response = match result {
        Ok(Answer::Nothing) => response.status(StatusCode::NO_CONTENT).body(Body::empty()),
        Ok(Answer::Json(json)) => response.header(header::CONTENT_TYPE, "application/json").body(Body::from(json)),
        Err(Refusal { status, message }) => {
            let body = ErrorBody { code: "UNDEFINED".to_owned(), message };
            let json = serde_json::to_vec(&body).unwrap_or_default();
            response.status(status).header(header::CONTENT_TYPE, "application/json").body(Body::from(json))
        }
    };
    response.expect("constant headers are valid")
}

async fn read_body(body: Body) -> Result<Bytes, Refusal> {
    let read = tokio::time::timeout(BODY, to_bytes(body, MAX_BODY)).await;
    let read = read.map_err(|_| Refusal::bad(format!("Body(\"not there within {} s\")", BODY.as_secs())))?;
    read.map_err(|_| Refusal::bad(format!("Body(\"cut short, or more than {MAX_BODY} bytes\")")))
}

/// Runs what blocks.
async fn blocking<T: Send + 'static>(
    daemon: &Daemon,
    work: impl FnOnce(&Daemon) -> Result<T, DaemonError> + Send + 'static,
) -> Result<Result<T, DaemonError>, Refusal> {
    let daemon = daemon.clone();
    let working = tokio::task::spawn_blocking(move || work(&daemon));
    let worked = tokio::time::timeout(PATIENCE, working).await.map_err(|_| {
        // The work goes on: a repeat waits for its end.
        let text = format!("Busy(\"still under way after {} s: ask again\")", PATIENCE.as_secs());
        Refusal::new(StatusCode::SERVICE_UNAVAILABLE, text)
    })?;
    worked.map_err(|error| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, format!("Internal(\"{error}\")")))
}

async fn carry_out(daemon: Daemon, call: Call) -> Result<Answer, Refusal> {
    let nothing = |()| Answer::Nothing;
    let mounted = |result: Result<(), DaemonError>| result.map(nothing).map_err(|error| Refusal::mount(&error));
    match call {
        Call::Info { mounts } => Answer::json(&daemon.info(mounts)),
        Call::SetLogLevel(level) => daemon
            .set_log_level(&level)
            .map(nothing)
            .map_err(|_| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "Configure(ResponsePayloadType)")),
        Call::Start => daemon.start().map(nothing).map_err(|error| Refusal::event("Configure", &error)),
        Call::Exit => {
            daemon.end(Ending::Leave);
            Ok(Answer::Nothing)
        }
        Call::SendFd => daemon.send_fd().map(nothing).map_err(|error| Refusal::event("Upgrade", &error)),
        Call::TakeOver => daemon.take_over().map(nothing).map_err(|error| Refusal::event("Upgrade", &error)),
        Call::Events => Answer::json(&daemon.events().snapshot()),
        Call::Backend(mountpoint) => metrics::superblock(&daemon, &mountpoint),
        Call::Mount(at, request) => mounted(blocking(&daemon, move |it| it.mount_request(&at, &request)).await?),
        Call::Remount(at, request) => mounted(blocking(&daemon, move |it| it.remount_request(&at, &request)).await?),
        Call::Umount(at) => mounted(blocking(&daemon, move |it| it.umount(&at)).await?),
        Call::FsMetrics(id) => metrics::filesystem(&daemon, id.as_deref()),
        Call::FilesMetrics { id, latest } => metrics::files(&daemon, id.as_deref(), latest),
        Call::Pattern(id) => metrics::pattern(&daemon, id.as_deref()),
        Call::BackendMetrics(id) => metrics::backend(&daemon, id.as_deref()),
        Call::CacheMetrics(id) => metrics::cache(&daemon, id.as_deref()),
        Call::Inflight => match daemon.inflight() {
            none if none.is_empty() => Ok(Answer::Nothing),
            some => Answer::json(&some),
        },
        Call::Config(id) => metrics::config(&daemon, id.as_deref()),
        Call::SetConfig(id, values) => metrics::set_config(&daemon, id.as_deref(), &values),
        Call::PutBlob | Call::DeleteBlob => {
            Err(Refusal::new(StatusCode::NOT_IMPLEMENTED, "BlobObjects(DaemonAbnormal(Unsupported))"))
        }
    }
}

#[cfg(test)]
mod tests;
