//! A registry that keeps what came of an upload before its connection broke: a front to one that does not.
//!
//! Uploads are sessions of the front's own, which GET tells the length of and PATCH goes on with; a whole blob goes to
//! the registry behind. Everything else is passed on.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result};
use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::{CONTENT_RANGE, LOCATION, RANGE};
use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse as _, Response};
use futures::StreamExt as _;
use tokio::net::TcpListener;

use crate::moody::{Mood, pass_on};

/// The front; it ends with the runtime that it was started on.
#[derive(Debug)]
pub struct Keeper {
    /// `host:port`, plain HTTP.
    pub host: String,
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    upstream: String,
    http: reqwest::Client,
    open: Mutex<HashMap<String, Vec<u8>>>,
    opened: AtomicU64,
    came: AtomicU64,
}

impl Keeper {
    /// Puts a front before the registry at `upstream` (`host:port`, plain HTTP).
    ///
    /// # Errors
    ///
    /// From the system.
    pub async fn start(upstream: &str) -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let host = listener.local_addr()?.to_string();
        let inner = Arc::new(Inner {
            upstream: upstream.to_owned(),
            http: reqwest::Client::builder().no_proxy().redirect(reqwest::redirect::Policy::none()).build()?,
            open: Mutex::default(),
            opened: AtomicU64::new(0),
            came: AtomicU64::new(0),
        });
        let router = Router::new().fallback(answer).with_state(Arc::clone(&inner));
        tokio::spawn(async move { axum::serve(listener, router).await });
        Ok(Self { host, inner })
    }

    /// Returns how many bytes of blobs came so far.
    pub fn came(&self) -> u64 {
        self.inner.came.load(Ordering::Relaxed)
    }

    /// Returns how many uploads were begun.
    pub fn opened(&self) -> u64 {
        self.inner.opened.load(Ordering::Relaxed)
    }
}

async fn answer(State(inner): State<Arc<Inner>>, request: Request) -> Response {
    let answer = match request.uri().path().contains("/blobs/uploads/") {
        true => inner.upload(request).await,
        false => pass_on(&inner.http, &inner.upstream, request, &Mood::Fair).await,
    };
    answer.unwrap_or_else(|_| StatusCode::BAD_GATEWAY.into_response())
}

impl Inner {
    fn open(&self) -> MutexGuard<'_, HashMap<String, Vec<u8>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn upload(&self, request: Request) -> Result<Response> {
        let (head, body) = request.into_parts();
        let path = head.uri.path().to_owned();
        if head.method == Method::POST {
            let path = format!("{path}{}", self.opened.fetch_add(1, Ordering::Relaxed));
            self.open().insert(path.clone(), Vec::new());
            return Ok((StatusCode::ACCEPTED, [(LOCATION, path)]).into_response());
        }
        let Some(have) = self.open().get(&path).map(Vec::len) else {
            return Ok(StatusCode::NOT_FOUND.into_response());
        };
        let begin =
            head.headers.get(CONTENT_RANGE).and_then(|range| range.to_str().ok()?.split_once('-')?.0.parse().ok());
        if begin.unwrap_or(have) != have || head.method == Method::PATCH && begin.is_none() && have > 0 {
            return Ok(StatusCode::RANGE_NOT_SATISFIABLE.into_response());
        }
        let mut pieces = body.into_data_stream();
        while let Some(piece) = pieces.next().await {
            let piece = piece?;
            self.came.fetch_add(piece.len() as u64, Ordering::Relaxed);
            if let Some(bytes) = self.open().get_mut(&path) {
                bytes.extend_from_slice(&piece);
            }
        }
        match head.method {
            Method::PUT => self.close(&path, head.uri.query().unwrap_or_default()).await,
            Method::DELETE => {
                self.open().remove(&path);
                Ok(StatusCode::NO_CONTENT.into_response())
            }
            method => {
                let last = self.open().get(&path).map_or(0, |bytes| bytes.len().saturating_sub(1));
                let status = if method == Method::GET { StatusCode::NO_CONTENT } else { StatusCode::ACCEPTED };
                Ok((status, [(LOCATION, path), (RANGE, format!("0-{last}"))]).into_response())
            }
        }
    }

    /// Brings a whole blob to the registry behind.
    async fn close(&self, path: &str, query: &str) -> Result<Response> {
        let bytes = self.open().remove(path).unwrap_or_default();
        let uploads = &path[..path.rfind('/').context("a path")? + 1];
        let opened = self.http.post(format!("http://{}{uploads}", self.upstream)).send().await?.error_for_status()?;
        let place = opened.headers().get(LOCATION).context("an upload without a place")?.to_str()?;
        let sign = if place.contains('?') { '&' } else { '?' };
        let closed = self.http.put(format!("{place}{sign}{query}")).body(bytes).send().await?;
        Ok((closed.status(), Body::empty()).into_response())
    }
}
