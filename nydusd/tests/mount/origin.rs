//! A registry of one repository that can hold its answers back, or give wrong ones.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{Method, StatusCode, header};
use axum::response::Response;
use serde_json::{Value, json};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;

/// What the registry does with requests for blobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mood {
    /// Answers.
    Serve,
    /// Answers later, if at all.
    Hold,
    /// Answers with one bit flipped in each byte.
    Flip,
}

#[derive(Clone)]
struct Inner {
    dir: PathBuf,
    mood: watch::Receiver<Mood>,
    requests: Arc<AtomicUsize>,
    held: Arc<AtomicUsize>,
}

/// A registry on a port of its own; it goes with its runtime.
pub(crate) struct Origin {
    runtime: Option<Runtime>,
    mood: watch::Sender<Mood>,
    inner: Inner,
    address: String,
}

impl Origin {
    pub(crate) fn serve(dir: PathBuf, mood: Mood) -> Self {
        let (sender, receiver) = watch::channel(mood);
        let inner = Inner { dir, mood: receiver, requests: Arc::default(), held: Arc::default() };
        let mut origin = Self { runtime: None, mood: sender, inner, address: "127.0.0.1:0".to_owned() };
        origin.rise();
        origin
    }

    /// Goes down: connections break, new ones are refused.
    pub(crate) fn fall(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_secs(5));
        }
        self.inner.held.store(0, Ordering::SeqCst);
    }

    /// Comes up (again), at the same address.
    pub(crate) fn rise(&mut self) {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind(&self.address)).unwrap();
        self.address = listener.local_addr().unwrap().to_string();
        let router = Router::new().fallback(answer).with_state(self.inner.clone());
        runtime.spawn(async move { axum::serve(listener, router).await });
        self.runtime = Some(runtime);
    }

    pub(crate) fn set(&self, mood: Mood) {
        self.mood.send_replace(mood);
    }

    pub(crate) fn requests(&self) -> usize {
        self.inner.requests.load(Ordering::SeqCst)
    }

    /// How many answers are being held back.
    pub(crate) fn held(&self) -> usize {
        self.inner.held.load(Ordering::SeqCst)
    }

    pub(crate) fn backend(&self) -> Value {
        json!({"type": "registry", "config": {"scheme": "http", "host": self.address, "repo": "library/test"}})
    }
}

async fn answer(State(inner): State<Inner>, request: Request) -> Response {
    let status = |status: StatusCode| Response::builder().status(status).body(Body::empty()).unwrap();
    inner.requests.fetch_add(1, Ordering::SeqCst);
    let Some(id) = request.uri().path().strip_prefix("/v2/library/test/blobs/sha256:") else {
        return status(if request.uri().path() == "/v2/" { StatusCode::OK } else { StatusCode::NOT_FOUND });
    };
    let mut mood = inner.mood.clone();
    if *mood.borrow_and_update() == Mood::Hold {
        inner.held.fetch_add(1, Ordering::SeqCst);
        let _ = mood.wait_for(|mood| *mood != Mood::Hold).await;
        inner.held.fetch_sub(1, Ordering::SeqCst);
    }
    let Ok(mut blob) = tokio::fs::read(inner.dir.join(id)).await else {
        return status(StatusCode::NOT_FOUND);
    };
    if *mood.borrow() == Mood::Flip {
        blob.iter_mut().for_each(|byte| *byte ^= 1);
    }
    let total = blob.len();
    let range = request
        .headers()
        .get(header::RANGE)
        .and_then(|value| value.to_str().ok()?.strip_prefix("bytes=")?.split_once('-'));
    let (first, last) = match range {
        Some((first, last)) => (first.parse().unwrap_or(0), last.parse().unwrap_or(total - 1).min(total - 1)),
        None => (0, total - 1),
    };
    let head = request.method() == Method::HEAD;
    let part = if head { Vec::new() } else { blob[first..=last].to_vec() };
    let response = Response::builder().header("content-type", "application/octet-stream");
    match range {
        Some(_) => response
            .status(StatusCode::PARTIAL_CONTENT)
            .header(header::CONTENT_RANGE, format!("bytes {first}-{last}/{total}"))
            .body(Body::from(part)),
        None => response.header(header::CONTENT_LENGTH, total).body(Body::from(part)),
    }
    .unwrap()
}
