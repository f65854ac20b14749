//! Answers registry requests: finds out what is asked for, and on whose behalf.

mod admission;
mod blob;
mod manifest;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use bytes::Bytes;
use futures::stream;
use http::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE, ETAG, LINK};
use http::{HeaderMap, HeaderName, HeaderValue, Method};
use nydus_rafs::Digest;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::allow::Rights;
use super::answer::Failure;
use super::config::Timeouts;
use super::fetch::Fetcher;
use super::ledger::Ledger;
use super::manifests::Manifests;
use super::metrics::{Answered, Metrics};
use super::quota::Store;
use super::request::{Ask, Reception, Target};
use super::upstream::{Call, Via};
use admission::{WeakQuestion, Wish};

/// Requests answered at a time.
const CROWD: usize = 1024;
const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// Everything that answers need.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) reception: Reception,
    pub(super) store: Arc<Store>,
    pub(super) fetcher: Arc<Fetcher>,
    pub(super) metrics: Arc<Metrics>,
    rights: Mutex<Rights>,
    manifests: Mutex<Manifests>,
    questions: Mutex<HashMap<[u8; 32], WeakQuestion>>,
    /// Blobs that are being fetched whole in the background.
    filling: Mutex<HashSet<Digest>>,
    crowd: Arc<Semaphore>,
    fills: Arc<Semaphore>,
    headers_within: Duration,
    stall: Duration,
    prefetch: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Server {
    pub(super) fn new(
        reception: Reception,
        store: Arc<Store>,
        fetcher: Arc<Fetcher>,
        rights: Rights,
        timeouts: &Timeouts,
        prefetch: bool,
    ) -> Arc<Self> {
        Arc::new(Self {
            reception,
            store,
            metrics: fetcher.metrics.clone(),
            fetcher,
            rights: Mutex::new(rights),
            manifests: Mutex::default(),
            questions: Mutex::default(),
            filling: Mutex::default(),
            crowd: Arc::new(Semaphore::new(CROWD)),
            fills: Arc::new(Semaphore::new(2)),
            headers_within: timeouts.headers,
            stall: timeouts.stall,
            prefetch,
        })
    }

    /// Writes down who may have what, if that has changed.
    pub(super) async fn keep_rights(&self, ledger: &Ledger) {
        let Some((secret, entries)) = lock(&self.rights).entries(Instant::now()) else { return };
        let ledger = ledger.clone();
        let written = tokio::task::spawn_blocking(move || ledger.write(&secret, &entries, SystemTime::now())).await;
        if let Ok(Err(error)) = written {
            // It costs questions after a restart, and the disk has a line of its own elsewhere.
            tracing::debug!(%error, "could not write down who may have what");
        }
    }

    /// Answers one request.
    pub(super) async fn answer(self: Arc<Self>, request: Request) -> Response {
        let head = request.method() == Method::HEAD;
        let read = self.reception.read(request.method(), request.uri(), request.headers());
        let kind = match &read {
            Ok(ask) => match ask.target {
                Target::Ping => "ping",
                Target::Blob { .. } => "blob",
                Target::Manifest { .. } | Target::Tag { .. } => "manifest",
                Target::Other { .. } => "other",
            },
            Err(_) => "refused",
        };
        let outcome = match read {
            Err(refused) => Err(refused.into()),
            Ok(ask) => match self.crowd.clone().try_acquire_owned() {
                Ok(permit) => self.carry_out(&ask, request.headers(), permit).await,
                Err(_) => Err(Failure::Crowded),
            },
        };
        let answer = outcome.unwrap_or_else(|failure| {
            tracing::debug!(method = %request.method(), path = request.uri().path(), status = %failure.status(), %failure, "refused");
            failure.answer(head)
        });
        self.metrics.requests.get_or_create(&Answered { kind, code: answer.status().as_u16() }).inc();
        answer
    }

    async fn carry_out(
        self: &Arc<Self>,
        ask: &Ask,
        headers: &HeaderMap,
        permit: OwnedSemaphorePermit,
    ) -> Result<Response, Failure> {
        let caller = lock(&self.rights).caller(ask.authorization.as_ref());
        let Some(registry) = ask.registry.as_deref() else {
            return Ok(ping());
        };
        let wish = |repo, digest, kind| {
            let path = format!("/v2/{repo}/{kind}/sha256:{digest}");
            Wish { ask, registry, repo, digest, path, caller }
        };
        match &ask.target {
            Target::Ping => self.pass_on(ask, registry, "", "/v2/", headers, permit).await,
            Target::Other { repo, path } => self.pass_on(ask, registry, repo, path, headers, permit).await,
            Target::Blob { repo, digest } => self.blob(&wish(repo, digest, "blobs"), headers, permit).await,
            Target::Manifest { repo, digest } => self.manifest(&wish(repo, digest, "manifests"), headers).await,
            Target::Tag { repo, tag } => self.tag(ask, registry, repo, tag, caller, headers).await,
        }
    }

    /// Asks the registry and passes its answer on, keeping nothing.
    async fn pass_on(
        self: &Arc<Self>,
        ask: &Ask,
        registry: &str,
        repo: &str,
        path: &str,
        headers: &HeaderMap,
        permit: OwnedSemaphorePermit,
    ) -> Result<Response, Failure> {
        let call = Call {
            method: if ask.head { Method::HEAD } else { Method::GET },
            registry,
            repo,
            path,
            range: None,
            accept: headers.get(ACCEPT),
            authorization: ask.authorization.as_ref(),
            hops: &ask.hops,
        };
        let upstream = self.fetcher.upstream.send(Via::Registry, &call).await?;
        let mut answer = Response::new(Body::empty());
        *answer.status_mut() = upstream.status;
        let version = HeaderName::from_static("docker-distribution-api-version");
        for name in [CONTENT_TYPE, CONTENT_LENGTH, CONTENT_DIGEST, ETAG, LINK, version] {
            for value in upstream.headers.get_all(&name) {
                answer.headers_mut().append(&name, value.clone());
            }
        }
        if !ask.head {
            let rest = stream::try_unfold((self.fetcher.clone(), upstream, permit), async |mut state| {
                let next = state.0.upstream.next(&mut state.1).await;
                let next: Option<Bytes> = next.map_err(|error| std::io::Error::other(error.to_string()))?;
                Ok::<_, std::io::Error>(next.map(|bytes| {
                    state.0.metrics.served.inc_by(bytes.len() as u64);
                    (bytes, state)
                }))
            });
            *answer.body_mut() = Body::from_stream(rest);
        }
        Ok(answer)
    }
}

fn text(text: &str) -> HeaderValue {
    HeaderValue::try_from(text).expect("digests and numbers are visible ASCII")
}

fn ping() -> Response {
    let mut answer = Response::new(Body::from("{}"));
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    answer
}
