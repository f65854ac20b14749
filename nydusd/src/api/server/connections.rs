//! Connections to the API socket: how many there are, and how long each may take.
//!
//! Whoever may open the socket may be slow, broken, or gone without a word; each such client holds a connection, and that is
//! all it may hold, for a while. When all are taken the next clients wait in the kernel's queue.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::answer;
use crate::daemon::Daemon;

/// Connections at once (the limit of the program we replace).
const MOST: usize = 256;

/// How long the head of a request may take, and how long a connection may wait for the next one.
const HEAD: Duration = Duration::from_secs(5);

/// How long a connection may live: who does not read its answers is cut off. No call takes nearly as long.
const LIFE: Duration = Duration::from_secs(60);

/// How long to wait when no more files can be opened.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves connections until `stop` fires, and then those that are under way to the end of their calls.
pub(super) async fn serve(listener: UnixListener, daemon: Daemon, stop: CancellationToken) {
    let turns = Arc::new(Semaphore::new(MOST));
    let tasks = TaskTracker::new();
    let next = async || {
        // The semaphore is never closed.
        let turn = turns.clone().acquire_owned().await.ok();
        (turn, listener.accept().await)
    };
    loop {
        let (turn, accepted) = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            next = next() => next,
        };
        match accepted {
            Ok((stream, _)) => {
                let (daemon, stop) = (daemon.clone(), stop.clone());
                tasks.spawn(async move {
                    converse(stream, daemon, stop).await;
                    drop(turn);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "could not accept a connection to the API socket");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
    drop(listener);
    tasks.close();
    tasks.wait().await;
}

/// Serves one connection.
async fn converse(stream: UnixStream, daemon: Daemon, stop: CancellationToken) {
    let service = service_fn(move |request: Request<hyper::body::Incoming>| {
        let daemon = daemon.clone();
        async move { Ok::<_, Infallible>(answer(State(daemon), request.map(Body::new)).await) }
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD);
    let mut connection = std::pin::pin!(http.serve_connection(TokioIo::new(stream), service));
    let ended = tokio::time::timeout(LIFE, async {
        tokio::select! {
            ended = connection.as_mut() => ended,
            () = stop.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        }
    });
    match ended.await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a connection to the API socket broke"),
        Err(_) => tracing::debug!("a connection to the API socket was cut off: it lived too long"),
    }
}
