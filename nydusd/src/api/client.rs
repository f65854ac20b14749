//! Calls a daemon over its unix socket.
//!
//! One connection per call: calls are rare, and a daemon that was restarted in between must not be met on a
//! connection to its predecessor.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::net::UnixStream;

use super::types::{
    AccessPattern, BackendMetrics, CacheMetrics, DaemonChange, DaemonInfo, ErrorBody, Events, FileMetrics, FsMetrics,
    Inflight, MountRequest,
};

/// How long a call may take unless told otherwise.
pub const TIMEOUT: Duration = Duration::from_secs(30);

/// Longest answer that is read, in bytes (per-file metrics of a large image are long).
const MAX_ANSWER: usize = 64 << 20;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens on the socket.
    #[error("cannot connect to {socket}: {source}")]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// No answer in time.
    #[error("no answer from {socket} to {method} {path} within {} s", after.as_secs())]
    Timeout {
        /// The socket.
        socket: PathBuf,
        /// The verb.
        method: Method,
        /// Path and query.
        path: String,
        /// The limit.
        after: Duration,
    },
    /// The daemon refused.
    #[error("{method} {path} answered {status}: {}", body.message)]
    Refused {
        /// The verb.
        method: Method,
        /// Path and query.
        path: String,
        /// The status.
        status: StatusCode,
        /// What it said.
        body: ErrorBody,
    },
    /// The connection broke.
    #[error("the connection to {socket} broke: {source}")]
    Broken {
        /// The socket.
        socket: PathBuf,
        /// How.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The answer is not what this call returns.
    #[error("{method} {path} gave an answer that cannot be understood: {source}")]
    Answer {
        /// The verb.
        method: Method,
        /// Path and query.
        path: String,
        /// Why.
        source: serde_json::Error,
    },
}

impl ClientError {
    /// Returns whether the daemon said that the mountpoint is in use: mounting again is harmless.
    pub fn already_mounted(&self) -> bool {
        matches!(self, Self::Refused { body, .. } if body.message.contains("already exists"))
    }

    /// Returns whether the daemon said that nothing is mounted there: unmounting again is harmless.
    pub fn not_mounted(&self) -> bool {
        matches!(self, Self::Refused { body, .. } if body.message.contains("doesn't exist"))
    }

    /// Returns whether nobody lives behind the socket.
    pub fn nobody_there(&self) -> bool {
        matches!(self, Self::Connect { .. })
    }
}

/// A daemon's API. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
    timeout: Duration,
}

impl Client {
    /// Names the socket; connects with each call.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into(), timeout: TIMEOUT }
    }

    /// Sets how long a call may take.
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Returns the socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Asks who answers, in which state, with which mounts.
    pub async fn info(&self) -> Result<DaemonInfo, ClientError> {
        self.get("/api/v1/daemon").await
    }

    /// Changes the log level: `off`, `error`, `warn`, `info`, `debug`, `trace`.
    pub async fn set_log_level(&self, level: &str) -> Result<(), ClientError> {
        let body = DaemonChange { log_level: level.to_owned() };
        self.order(Method::PUT, "/api/v1/daemon", json(&body)).await
    }

    /// Tells a daemon that is READY to serve.
    pub async fn start(&self) -> Result<(), ClientError> {
        self.order(Method::PUT, "/api/v1/daemon/start", Bytes::new()).await
    }

    /// Tells the daemon to end without unmounting.
    pub async fn exit(&self) -> Result<(), ClientError> {
        self.order(Method::PUT, "/api/v1/daemon/exit", Bytes::new()).await
    }

    /// Tells the daemon to hand its state and its descriptor to the supervisor.
    pub async fn send_fd(&self) -> Result<(), ClientError> {
        self.order(Method::PUT, "/api/v1/daemon/fuse/sendfd", Bytes::new()).await
    }

    /// Tells the daemon to take state and descriptor over from the supervisor.
    pub async fn take_over(&self) -> Result<(), ClientError> {
        self.order(Method::PUT, "/api/v1/daemon/fuse/takeover", Bytes::new()).await
    }

    /// Mounts an image at a path inside the daemon's tree.
    pub async fn mount(&self, mountpoint: &str, request: &MountRequest) -> Result<(), ClientError> {
        let path = with_query("/api/v1/mount", &[("mountpoint", mountpoint)]);
        self.order(Method::POST, &path, json(request)).await
    }

    /// Replaces what is mounted there.
    pub async fn remount(&self, mountpoint: &str, request: &MountRequest) -> Result<(), ClientError> {
        let path = with_query("/api/v1/mount", &[("mountpoint", mountpoint)]);
        self.order(Method::PUT, &path, json(request)).await
    }

    /// Unmounts what is mounted there.
    pub async fn umount(&self, mountpoint: &str) -> Result<(), ClientError> {
        let path = with_query("/api/v1/mount", &[("mountpoint", mountpoint)]);
        self.order(Method::DELETE, &path, Bytes::new()).await
    }

    /// Returns the counters of a filesystem; without `id` that of the only one.
    pub async fn fs_metrics(&self, id: Option<&str>) -> Result<FsMetrics, ClientError> {
        self.get(&with_id("/api/v1/metrics", id)).await
    }

    /// Returns the counters per inode.
    pub async fn files_metrics(&self, id: Option<&str>) -> Result<BTreeMap<String, FileMetrics>, ClientError> {
        self.get(&with_id("/api/v1/metrics/files", id)).await
    }

    /// Returns the first accesses.
    pub async fn pattern(&self, id: Option<&str>) -> Result<Vec<AccessPattern>, ClientError> {
        self.get(&with_id("/api/v1/metrics/pattern", id)).await
    }

    /// Returns the counters of a backend (`id` is the mountpoint).
    pub async fn backend_metrics(&self, id: Option<&str>) -> Result<BackendMetrics, ClientError> {
        self.get(&with_id("/api/v1/metrics/backend", id)).await
    }

    /// Returns the counters of a cache (`id` is the id of the configuration).
    pub async fn cache_metrics(&self, id: Option<&str>) -> Result<CacheMetrics, ClientError> {
        self.get(&with_id("/api/v1/metrics/blobcache", id)).await
    }

    /// Returns the kernel's requests that are being served.
    pub async fn inflight(&self) -> Result<Vec<Inflight>, ClientError> {
        let path = "/api/v1/metrics/inflight";
        let (_, body) = self.call(Method::GET, path, Bytes::new()).await?;
        if body.is_empty() { Ok(Vec::new()) } else { self.understand(Method::GET, path, &body) }
    }

    /// Returns the last errors.
    pub async fn events(&self) -> Result<Events, ClientError> {
        self.get("/api/v1/daemon/events").await
    }

    /// Returns the values that can change while mounted, secrets included.
    pub async fn config(&self, id: Option<&str>) -> Result<BTreeMap<String, String>, ClientError> {
        self.get(&with_id("/api/v1/config", id)).await
    }

    /// Changes values such as `registry_auth` (base64 of `user:password`) of a mounted image.
    pub async fn set_config(&self, id: Option<&str>, values: &BTreeMap<String, String>) -> Result<(), ClientError> {
        self.order(Method::PUT, &with_id("/api/v1/config", id), json(values)).await
    }

    /// Returns any answer as JSON; `Null` if there is none.
    pub async fn raw(&self, method: Method, path: &str, body: Bytes) -> Result<Value, ClientError> {
        let (_, answer) = self.call(method.clone(), path, body).await?;
        if answer.is_empty() { Ok(Value::Null) } else { self.understand(method, path, &answer) }
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        let (_, body) = self.call(Method::GET, path, Bytes::new()).await?;
        self.understand(Method::GET, path, &body)
    }

    async fn order(&self, method: Method, path: &str, body: Bytes) -> Result<(), ClientError> {
        self.call(method, path, body).await.map(drop)
    }

    fn understand<T: DeserializeOwned>(&self, method: Method, path: &str, body: &[u8]) -> Result<T, ClientError> {
        serde_json::from_slice(body).map_err(|source| ClientError::Answer { method, path: path.to_owned(), source })
    }

    /// Makes one call; returns status and body if the status says that it worked.
    async fn call(&self, method: Method, path: &str, body: Bytes) -> Result<(StatusCode, Bytes), ClientError> {
        let after = self.timeout;
        match tokio::time::timeout(after, self.exchange(method.clone(), path, body)).await {
            Ok(result) => result,
            Err(_) => Err(ClientError::Timeout { socket: self.socket.clone(), method, path: path.to_owned(), after }),
        }
    }

    async fn exchange(&self, method: Method, path: &str, body: Bytes) -> Result<(StatusCode, Bytes), ClientError> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|source| ClientError::Connect { socket: self.socket.clone(), source })?;
        let broken = |source: Box<dyn std::error::Error + Send + Sync>| ClientError::Broken {
            socket: self.socket.clone(),
            source,
        };
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| broken(error.into()))?;
        let request = Request::builder()
            .method(method.clone())
            .uri(path)
            .header("host", "localhost")
            .header("accept", "*/*")
            .header("content-type", "application/json")
            .body(Full::new(body))
            .map_err(|error| broken(error.into()))?;
        // The connection is driven beside the call, and dropped with it.
        let answer = async {
            let response = sender.send_request(request).await.map_err(|error| broken(error.into()))?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await.map_err(broken)?.to_bytes();
            Ok::<_, ClientError>((status, body))
        };
        tokio::pin!(connection, answer);
        let (status, body) = tokio::select! {
            answer = &mut answer => answer?,
            // The daemon may close the connection with its answer: what was read of it still counts.
            _ = &mut connection => answer.await?,
        };
        if status.is_success() {
            return Ok((status, body));
        }
        let body = serde_json::from_slice(&body).unwrap_or_else(|_| ErrorBody {
            code: String::new(),
            message: String::from_utf8_lossy(&body[..body.len().min(512)]).into_owned(),
        });
        Err(ClientError::Refused { method, path: path.to_owned(), status, body })
    }
}

fn json<T: serde::Serialize>(value: &T) -> Bytes {
    serde_json::to_vec(value).expect("these types have only string keys").into()
}

fn with_id(path: &str, id: Option<&str>) -> String {
    match id {
        Some(id) => with_query(path, &[("id", id)]),
        None => path.to_owned(),
    }
}

/// Appends a query, percent-encoding what is not plainly safe.
pub(crate) fn with_query(path: &str, pairs: &[(&str, &str)]) -> String {
    let mut out = path.to_owned();
    for (index, (key, value)) in pairs.iter().enumerate() {
        out.push(if index == 0 { '?' } else { '&' });
        out.push_str(key);
        out.push('=');
        for byte in value.bytes() {
            if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
                out.push(char::from(byte));
            } else {
                out.push_str(&format!("%{byte:02X}"));
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_percent_encoded_but_slashes_stay() {
        assert_eq!(with_query("/a", &[("mountpoint", "/x y&z")]), "/a?mountpoint=/x%20y%26z");
    }

    #[tokio::test]
    async fn a_socket_without_a_listener_is_named() {
        let error = Client::new("/nonexistent/api.sock").info().await.unwrap_err();
        assert!(error.nobody_there());
        assert!(error.to_string().contains("/nonexistent/api.sock"), "{error}");
    }
}
