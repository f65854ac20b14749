//! A registry to test against: real HTTP, real ranges, and every fault on demand.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use bytes::Bytes;
use futures::stream;
use http::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, LOCATION, RANGE, RETRY_AFTER};
use http::{HeaderValue, Method};
use sha2::Digest as _;
use tokio::net::TcpListener;
use tokio::sync::watch;

pub(super) const CHALLENGE: &str = "Bearer realm=\"https://auth.example/token\",service=\"reg\",scope=\"x\"";

/// How it behaves.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Mode {
    Plain,
    /// Bodies stop after their first 64 KiB until the gate opens.
    Gated,
    /// 200 and everything, whatever the range.
    NoRanges,
    /// A Content-Range one byte off.
    WrongRange,
    /// Bodies end after so many bytes, with a broken connection.
    CutAfter(usize),
    /// This status for everything.
    Status(u16),
    /// This status for GET of blobs.
    GetStatus(u16),
    /// HEAD is answered with 405.
    NoHead,
    /// Blobs are at another host.
    Elsewhere(String),
    /// Requests are accepted and never answered.
    Silent,
    /// A web page with 200.
    Html,
    /// Blobs with a Content-Encoding.
    Encoded,
    /// Every byte of every blob is flipped.
    Lies,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) method: Method,
    pub(super) path: String,
    pub(super) range: Option<(u64, u64)>,
    pub(super) authorization: Option<String>,
}

#[derive(Debug)]
pub(super) struct Origin {
    pub(super) address: SocketAddr,
    things: Mutex<HashMap<String, (String, Bytes)>>,
    /// Who may read which repository; a repository that is not here is for all.
    tokens: Mutex<HashMap<String, String>>,
    seen: Mutex<Vec<Seen>>,
    mode: Mutex<Mode>,
    challenge: Mutex<HeaderValue>,
    gate: watch::Sender<bool>,
    pub(super) sent: AtomicU64,
    pub(super) bodies: AtomicUsize,
}

/// A body that is being sent.
struct Sending(Arc<Origin>);

impl Drop for Sending {
    fn drop(&mut self) {
        self.0.bodies.fetch_sub(1, Ordering::SeqCst);
    }
}

pub(super) fn sha256(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(sha2::Sha256::digest(bytes)))
}

impl Origin {
    pub(super) async fn start() -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let origin = Arc::new(Self {
            address: listener.local_addr().unwrap(),
            things: Mutex::default(),
            tokens: Mutex::default(),
            seen: Mutex::default(),
            mode: Mutex::new(Mode::Plain),
            challenge: Mutex::new(HeaderValue::from_static(CHALLENGE)),
            gate: watch::Sender::new(false),
            sent: AtomicU64::new(0),
            bodies: AtomicUsize::new(0),
        });
        let answering = origin.clone();
        let router = Router::new().fallback(move |request: Request| {
            let origin = answering.clone();
            async move { origin.answer(request).await }
        });
        tokio::spawn(async move { axum::serve(listener, router).await });
        origin
    }

    pub(super) fn name(&self) -> String {
        self.address.to_string()
    }

    /// Puts a blob into a repository; returns its path.
    pub(super) fn blob(&self, repo: &str, bytes: &[u8]) -> String {
        let path = format!("/v2/{repo}/blobs/{}", sha256(bytes));
        let thing = ("application/octet-stream".into(), Bytes::copy_from_slice(bytes));
        self.things.lock().unwrap().insert(path.clone(), thing);
        path
    }

    /// Puts a manifest under a tag and its digest; returns the path by digest.
    pub(super) fn manifest(&self, repo: &str, tag: &str, body: &str) -> String {
        let thing = ("application/vnd.oci.image.manifest.v1+json".to_owned(), Bytes::copy_from_slice(body.as_bytes()));
        let path = format!("/v2/{repo}/manifests/{}", sha256(body.as_bytes()));
        let mut things = self.things.lock().unwrap();
        things.insert(format!("/v2/{repo}/manifests/{tag}"), thing.clone());
        things.insert(path.clone(), thing);
        path
    }

    pub(super) fn only(&self, repo: &str, authorization: &str) {
        self.tokens.lock().unwrap().insert(repo.into(), authorization.into());
    }

    pub(super) fn set(&self, mode: Mode) {
        *self.mode.lock().unwrap() = mode;
    }

    /// Says to whom it does not know what it wants to see.
    pub(super) fn challenge(&self, text: &str) {
        *self.challenge.lock().unwrap() = text.parse().unwrap();
    }

    pub(super) fn open_gate(&self) {
        self.gate.send_replace(true);
    }

    pub(super) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    /// Returns the ranges that were asked for by GET.
    pub(super) fn gets(&self) -> Vec<(u64, u64)> {
        let gets = self.seen().into_iter().filter(|seen| seen.method == Method::GET);
        gets.filter_map(|seen| seen.range).collect()
    }

    pub(super) fn count(&self, method: &Method) -> usize {
        self.seen().iter().filter(|seen| seen.method == *method).count()
    }

    async fn answer(self: Arc<Self>, request: Request) -> Response {
        let path = request.uri().path().to_owned();
        let (range, authorization) = {
            let header = |name| request.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
            let range = header(RANGE).and_then(|range| {
                let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
                Some((first.parse::<u64>().ok()?, last.parse::<u64>().ok()?))
            });
            (range, header(AUTHORIZATION))
        };
        let seen =
            Seen { method: request.method().clone(), path: path.clone(), range, authorization: authorization.clone() };
        self.seen.lock().unwrap().push(seen);
        let mode = self.mode.lock().unwrap().clone();
        let mut answer = Response::new(Body::empty());
        let get = request.method() == Method::GET;
        drop(request);
        let blob = path.contains("/blobs/");
        match &mode {
            Mode::Status(status) => {
                *answer.status_mut() = (*status).try_into().unwrap();
                answer.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("7"));
                return answer;
            }
            Mode::GetStatus(status) if get && blob => {
                *answer.status_mut() = (*status).try_into().unwrap();
                return answer;
            }
            Mode::Silent => std::future::pending().await,
            Mode::NoHead if !get => {
                *answer.status_mut() = http::StatusCode::METHOD_NOT_ALLOWED;
                return answer;
            }
            Mode::Html => {
                answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/html"));
                *answer.body_mut() = Body::from("<html>log in first</html>");
                return answer;
            }
            _ => {}
        }
        let repo = path
            .strip_prefix("/v2/")
            .and_then(|rest| Some(rest.split_once("/blobs/").or(rest.split_once("/manifests/"))?.0));
        let token = repo.and_then(|repo| self.tokens.lock().unwrap().get(repo).cloned());
        if token.is_some() && token != authorization {
            *answer.status_mut() = http::StatusCode::UNAUTHORIZED;
            answer.headers_mut().insert("www-authenticate", self.challenge.lock().unwrap().clone());
            return answer;
        }
        if let (Mode::Elsewhere(place), true) = (&mode, blob) {
            *answer.status_mut() = http::StatusCode::TEMPORARY_REDIRECT;
            answer.headers_mut().insert(LOCATION, format!("{place}{path}").parse().unwrap());
            return answer;
        }
        let Some((kind, mut bytes)) = self.things.lock().unwrap().get(&path).cloned() else {
            *answer.status_mut() = http::StatusCode::NOT_FOUND;
            return answer;
        };
        if mode == Mode::Lies {
            bytes = bytes.iter().map(|byte| !byte).collect();
        }
        answer.headers_mut().insert(CONTENT_TYPE, kind.parse().unwrap());
        if mode == Mode::Encoded && blob {
            answer.headers_mut().insert("content-encoding", HeaderValue::from_static("gzip"));
        }
        if !get {
            answer.headers_mut().insert(CONTENT_LENGTH, bytes.len().into());
            return answer;
        }
        if let Some((first, last)) = range.filter(|_| mode != Mode::NoRanges) {
            let total = bytes.len() as u64;
            if first >= total {
                *answer.status_mut() = http::StatusCode::RANGE_NOT_SATISFIABLE;
                return answer;
            }
            let last = last.min(total - 1);
            bytes = bytes.slice(first as usize..=last as usize);
            let off = u64::from(mode == Mode::WrongRange);
            *answer.status_mut() = http::StatusCode::PARTIAL_CONTENT;
            let value = format!("bytes {}-{}/{total}", first + off, last + off);
            answer.headers_mut().insert(CONTENT_RANGE, value.parse().unwrap());
        }
        answer.headers_mut().insert(CONTENT_LENGTH, bytes.len().into());
        self.bodies.fetch_add(1, Ordering::SeqCst);
        let cut = if let Mode::CutAfter(bytes) = mode { bytes } else { usize::MAX };
        let gated = mode == Mode::Gated && blob;
        let state = (Sending(self.clone()), bytes, 0_usize, self.gate.subscribe());
        let body = stream::try_unfold(state, move |(sending, mut bytes, sent, mut gate)| async move {
            if bytes.is_empty() {
                return Ok(None);
            }
            if gated && sent > 0 {
                gate.wait_for(|open| *open).await.map_err(std::io::Error::other)?;
            }
            if sent >= cut {
                return Err(std::io::Error::other("cut"));
            }
            let part = bytes.split_to(bytes.len().min(64 << 10).min(cut - sent));
            sending.0.sent.fetch_add(part.len() as u64, Ordering::SeqCst);
            let sent = sent + part.len();
            Ok(Some((part, (sending, bytes, sent, gate))))
        });
        *answer.body_mut() = Body::from_stream(body);
        answer
    }
}
