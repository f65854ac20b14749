//! Answers registry requests: finds out whether the caller may, and what with.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use bytes::{Bytes, BytesMut};
use futures::future::{BoxFuture, FutureExt, Shared, WeakShared};
use futures::stream;
use http::header::{ACCEPT, ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, IF_RANGE, LINK, RANGE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use nydus_rafs::Digest;
use sha2::Digest as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::allow::{Caller, Claimed, Known, Rights};
use super::answer::Failure;
use super::config::Timeouts;
use super::fetch::{Errand, Fetcher};
use super::manifests::{LARGEST, Manifest, Manifests};
use super::metrics::{Answered, Checked, Metrics};
use super::quota::Store;
use super::range::Wanted;
use super::reader::Reader;
use super::request::{Ask, Reception, Target};
use super::upstream::{Call, UpstreamError, Via, is_page};

/// Requests answered at a time.
const CROWD: usize = 1024;
const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

type Probe = Shared<BoxFuture<'static, Result<u64, Arc<UpstreamError>>>>;
type WeakProbe = WeakShared<BoxFuture<'static, Result<u64, Arc<UpstreamError>>>>;

/// Everything that answers need.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) reception: Reception,
    pub(super) store: Arc<Store>,
    pub(super) fetcher: Arc<Fetcher>,
    pub(super) metrics: Arc<Metrics>,
    rights: Mutex<Rights>,
    manifests: Mutex<Manifests>,
    probes: Mutex<HashMap<[u8; 32], WeakProbe>>,
    /// Blobs that are being fetched whole in the background.
    filling: Mutex<HashSet<Digest>>,
    crowd: Arc<Semaphore>,
    fills: Arc<Semaphore>,
    headers_within: Duration,
    stall: Duration,
    prefetch: bool,
}

/// A blob or manifest that is asked for, on somebody's behalf.
struct Wish<'a> {
    ask: &'a Ask,
    registry: &'a str,
    repo: &'a str,
    digest: &'a Digest,
    path: String,
    caller: Caller,
}

impl<'a> Wish<'a> {
    fn what(&self) -> Claimed<'_> {
        Claimed { registry: self.registry, repo: self.repo, digest: self.digest }
    }

    fn call<'b>(&'b self, accept: Option<&'b HeaderValue>) -> Call<'b> {
        Call {
            method: Method::GET,
            registry: self.registry,
            path: &self.path,
            range: None,
            accept,
            authorization: self.ask.authorization.as_ref(),
            caller: self.caller,
            hops: &self.ask.hops,
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Server {
    pub(super) fn new(
        reception: Reception,
        store: Arc<Store>,
        fetcher: Arc<Fetcher>,
        secret: [u8; 32],
        timeouts: &Timeouts,
        prefetch: bool,
    ) -> Arc<Self> {
        Arc::new(Self {
            reception,
            store,
            metrics: fetcher.metrics.clone(),
            fetcher,
            rights: Mutex::new(Rights::new(secret)),
            manifests: Mutex::default(),
            probes: Mutex::default(),
            filling: Mutex::default(),
            crowd: Arc::new(Semaphore::new(CROWD)),
            fills: Arc::new(Semaphore::new(2)),
            headers_within: timeouts.headers,
            stall: timeouts.stall,
            prefetch,
        })
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
            Target::Ping => self.pass_on(ask, registry, caller, "/v2/", headers, permit).await,
            Target::Other { path } => self.pass_on(ask, registry, caller, path, headers, permit).await,
            Target::Blob { repo, digest } => self.blob(&wish(repo, digest, "blobs"), headers, permit).await,
            Target::Manifest { repo, digest } => self.manifest(&wish(repo, digest, "manifests"), headers).await,
            Target::Tag { repo, tag } => self.tag(ask, registry, repo, tag, caller, headers).await,
        }
    }

    /// Returns the size of a blob if the caller may have it; takes no longer than a caller waits for headers.
    async fn admit(&self, wish: &Wish<'_>) -> Result<u64, Failure> {
        let now = Instant::now();
        let known = lock(&self.rights).known(&wish.caller, wish.what(), now);
        let count = |result| self.metrics.checks.get_or_create(&Checked { result }).inc();
        if let Known::Fresh(size) = known {
            count("remembered");
            return Ok(size);
        }
        let limit = self.headers_within;
        let asked = tokio::time::timeout(limit, self.probe(wish)).await;
        let silent = || Err(Arc::new(UpstreamError::Silent { by: wish.registry.to_owned(), limit }));
        match asked.unwrap_or_else(|_| silent()) {
            Ok(size) => {
                count("granted");
                lock(&self.rights).grant(&wish.caller, wish.what(), size, now);
                Ok(size)
            }
            Err(error) if error.is_refusal() => {
                count("denied");
                lock(&self.rights).revoke(&wish.caller, wish.what());
                Err(Failure::Upstream(error))
            }
            Err(error) => match known {
                Known::Stale(size) => {
                    count("unknown_but_known_before");
                    tracing::debug!(%error, path = wish.path, "the registry cannot say who may read; an earlier grant stands");
                    Ok(size)
                }
                Known::Fresh(_) | Known::Nothing => {
                    count("unknown");
                    Err(match &*error {
                        UpstreamError::Busy { .. } => Failure::Upstream(error),
                        _ => Failure::Unchecked(error),
                    })
                }
            },
        }
    }

    /// Asks upstream about a wish; callers who ask the same share one question.
    async fn probe(&self, wish: &Wish<'_>) -> Result<u64, Arc<UpstreamError>> {
        // Two mirrors that ask each other must not wait for each other: what came another way is another question.
        let mut key = blake3::Hasher::new();
        key.update(&lock(&self.rights).key(&wish.caller, wish.what()));
        key.update(wish.ask.hops.join(",").as_bytes()).update(&[u8::from(wish.ask.no_peer)]);
        let key = *key.finalize().as_bytes();
        let probe = {
            let mut probes = lock(&self.probes);
            match probes.get(&key).and_then(WeakShared::upgrade) {
                Some(probe) => probe,
                None => {
                    let probe = self.new_probe(wish);
                    probes.retain(|_, other| other.upgrade().is_some());
                    if let Some(weak) = probe.downgrade() {
                        probes.insert(key, weak);
                    }
                    probe
                }
            }
        };
        let outcome = probe.await;
        lock(&self.probes).remove(&key);
        outcome
    }

    fn new_probe(&self, wish: &Wish<'_>) -> Probe {
        let fetcher = self.fetcher.clone();
        let (registry, path, caller) = (wish.registry.to_owned(), wish.path.clone(), wish.caller);
        let (authorization, hops) = (wish.ask.authorization.clone(), wish.ask.hops.clone());
        let no_mirror = wish.ask.no_peer;
        async move {
            let call = Call {
                method: Method::HEAD,
                registry: &registry,
                path: &path,
                range: None,
                accept: None,
                authorization: authorization.as_ref(),
                caller,
                hops: &hops,
            };
            fetcher.upstream.probe(&call, no_mirror).await.map_err(Arc::new)
        }
        .boxed()
        .shared()
    }

    async fn blob(
        self: &Arc<Self>,
        wish: &Wish<'_>,
        headers: &HeaderMap,
        permit: OwnedSemaphorePermit,
    ) -> Result<Response, Failure> {
        let begun = Instant::now();
        let size = self.admit(wish).await?;
        let etag = format!("\"sha256:{}\"", wish.digest);
        let mut answer = Response::new(Body::empty());
        let told = answer.headers_mut();
        told.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        told.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
        told.insert(CONTENT_DIGEST, text(&format!("sha256:{}", wish.digest)));
        told.insert(ETAG, text(&etag));
        if wish.ask.head {
            // A Range means nothing to HEAD.
            told.insert(CONTENT_LENGTH, size.into());
            return Ok(answer);
        }
        let same = headers.get(IF_RANGE).is_none_or(|tag| tag.as_bytes() == etag.as_bytes());
        let asked = headers.get(RANGE).filter(|_| same).and_then(|range| range.to_str().ok());
        let range = match Wanted::of(asked, size) {
            Wanted::Whole => 0..size,
            Wanted::Part(range) => {
                let value = format!("bytes {}-{}/{size}", range.start, range.end - 1);
                told.insert(CONTENT_RANGE, text(&value));
                *answer.status_mut() = StatusCode::PARTIAL_CONTENT;
                range
            }
            Wanted::Unsatisfiable => return Err(Failure::Range { size }),
        };
        answer.headers_mut().insert(CONTENT_LENGTH, (range.end - range.start).into());
        *answer.body_mut() = self.body(wish, size, range, begun, permit).await?;
        Ok(answer)
    }

    async fn body(
        self: &Arc<Self>,
        wish: &Wish<'_>,
        size: u64,
        range: Range<u64>,
        begun: Instant,
        permit: OwnedSemaphorePermit,
    ) -> Result<Body, Failure> {
        let (store, digest) = (self.store.clone(), *wish.digest);
        let pinned = tokio::task::spawn_blocking(move || store.pin(digest, size)).await;
        let Ok(Some(pin)) = pinned else { return Err(Failure::Size) };
        let errand = Arc::new(Errand {
            registry: wish.registry.to_owned(),
            path: wish.path.clone(),
            authorization: wish.ask.authorization.clone(),
            caller: wish.caller,
            key: lock(&self.rights).key(&wish.caller, wish.what()),
            hops: wish.ask.hops.clone(),
            no_peer: wish.ask.no_peer,
        });
        if self.prefetch && range.end - range.start < size && wish.ask.hops.is_empty() {
            self.fill(&pin, &errand);
        }
        let mut reader = Reader::new(self.fetcher.clone(), pin, errand, range);
        // An error before the first byte can still be told as a status; nobody waits for that longer than for headers.
        let patience = self.headers_within.saturating_sub(begun.elapsed());
        let first = match tokio::time::timeout(patience, reader.next()).await {
            Ok(Ok(first)) => first,
            Ok(Err(error)) => {
                if let UpstreamError::Odd { .. } = *error {
                    // Perhaps it is the size that we remember that is odd.
                    let mut rights = lock(&self.rights);
                    let nobody = rights.caller(None);
                    rights.revoke(&wish.caller, wish.what());
                    rights.revoke(&nobody, wish.what());
                }
                return Err(Failure::Upstream(error));
            }
            Err(_) => None,
        };
        let stall = self.stall;
        let served = self.metrics.served.clone();
        let path = wish.path.clone();
        let rest = stream::try_unfold((first, reader, permit), move |(first, mut reader, permit)| {
            let (served, path) = (served.clone(), path.clone());
            async move {
                let next = match first {
                    Some(bytes) => Some(bytes),
                    None => {
                        // A caller that gets nothing for so long is better off asking somebody else.
                        let next = tokio::time::timeout(stall, reader.next()).await;
                        let silent = || Err(Arc::new(UpstreamError::Silent { by: "everybody".into(), limit: stall }));
                        next.unwrap_or_else(|_| silent()).map_err(|error| {
                            tracing::warn!(%error, path, missing = reader.left(), "cutting an answer short: nobody gives the rest");
                            std::io::Error::other(error.to_string())
                        })?
                    }
                };
                Ok::<_, std::io::Error>(next.map(|bytes| {
                    served.inc_by(bytes.len() as u64);
                    (bytes, (None, reader, permit))
                }))
            }
        });
        Ok(Body::from_stream(rest))
    }

    /// Fetches the rest of a blob in the background, once at a time.
    fn fill(self: &Arc<Self>, pin: &super::quota::Pin, errand: &Arc<Errand>) {
        if !lock(&self.filling).insert(pin.digest()) {
            return;
        }
        let duty = Filled { server: self.clone(), digest: pin.digest() };
        let (pin, errand) = (pin.clone(), errand.clone());
        self.fetcher.spawn(async move {
            let server = duty.server.clone();
            if let Ok(_permit) = server.fills.acquire().await {
                server.fetcher.fill(&pin, &errand).await;
            }
            drop(duty);
        });
    }

    async fn manifest(&self, wish: &Wish<'_>, headers: &HeaderMap) -> Result<Response, Failure> {
        let kept = lock(&self.manifests).get(wish.digest);
        if let Some(manifest) = kept.filter(|_| !wish.ask.no_peer) {
            self.admit(wish).await?;
            return Ok(tell(&manifest, wish.ask.head));
        }
        let manifest = self.fetch_manifest(&wish.call(headers.get(ACCEPT)), Some(wish.digest)).await?;
        let size = manifest.body.len() as u64;
        lock(&self.rights).grant(&wish.caller, wish.what(), size, Instant::now());
        Ok(tell(&manifest, wish.ask.head))
    }

    async fn tag(
        &self,
        ask: &Ask,
        registry: &str,
        repo: &str,
        tag: &str,
        caller: Caller,
        headers: &HeaderMap,
    ) -> Result<Response, Failure> {
        let path = format!("/v2/{repo}/manifests/{tag}");
        let accept = headers.get(ACCEPT);
        let mut key = blake3::Hasher::new();
        for part in [&caller[..], registry.as_bytes(), path.as_bytes(), accept.map_or(&[], HeaderValue::as_bytes)] {
            key.update(&(part.len() as u64).to_le_bytes()).update(part);
        }
        let key = *key.finalize().as_bytes();
        let call = Call {
            method: Method::GET,
            registry,
            path: &path,
            range: None,
            accept,
            authorization: ask.authorization.as_ref(),
            caller,
            hops: &ask.hops,
        };
        match self.fetch_manifest(&call, None).await {
            Ok(manifest) => {
                let now = Instant::now();
                let what = Claimed { registry, repo, digest: &manifest.digest };
                lock(&self.rights).grant(&caller, what, manifest.body.len() as u64, now);
                lock(&self.manifests).name(key, manifest.digest, now);
                Ok(tell(&manifest, ask.head))
            }
            Err(error) if error.is_refusal() => {
                lock(&self.manifests).forget(&key);
                Err(error.into())
            }
            Err(error) => match lock(&self.manifests).last(&key, Instant::now()) {
                Some(manifest) => {
                    tracing::warn!(%error, path, digest = %manifest.digest, "the registry cannot say what the tag names; its last answer stands");
                    Ok(tell(&manifest, ask.head))
                }
                None => Err(error.into()),
            },
        }
    }

    /// Reads a manifest from the first who gives it, and keeps it.
    ///
    /// Even for HEAD it is read whole: it is small, and about to be asked for.
    async fn fetch_manifest(&self, call: &Call<'_>, digest: Option<&Digest>) -> Result<Manifest, UpstreamError> {
        for via in self.fetcher.upstream.mirrors(true) {
            match self.manifest_via(via, call, digest).await {
                Ok(manifest) => return Ok(manifest),
                Err(error) => tracing::debug!(%error, path = call.path, "a mirror gives no manifest; asking the next"),
            }
        }
        self.manifest_via(Via::Registry, call, digest).await
    }

    async fn manifest_via(
        &self,
        via: Via,
        call: &Call<'_>,
        digest: Option<&Digest>,
    ) -> Result<Manifest, UpstreamError> {
        let upstream = &self.fetcher.upstream;
        let mut answer = upstream.send(via, call).await?;
        let odd = |reason: &str| UpstreamError::Odd {
            by: upstream.name(via, call.registry).to_owned(),
            reason: format!("{}: {reason}", call.path),
        };
        let mut body = BytesMut::new();
        while let Some(bytes) = upstream.next(via, call.registry, &mut answer).await? {
            if body.len() + bytes.len() > LARGEST {
                return Err(odd("the manifest is larger than 8 MiB"));
            }
            body.extend_from_slice(&bytes);
        }
        let found = Digest(sha2::Sha256::digest(&body).into());
        if digest.is_some_and(|digest| *digest != found) {
            return Err(odd("the manifest does not match its digest"));
        }
        let said = answer.headers().get(CONTENT_DIGEST).and_then(|said| said.to_str().ok());
        if said.is_some_and(|said| said.starts_with("sha256:") && said != format!("sha256:{found}")) {
            return Err(odd("the manifest does not match the digest in its header"));
        }
        let media_type = match answer.headers().get(CONTENT_TYPE) {
            Some(_) if is_page(answer.headers()) => return Err(odd("answers with a web page")),
            Some(is) => is.clone(),
            None => HeaderValue::from_static("application/vnd.oci.image.manifest.v1+json"),
        };
        let manifest = Manifest { digest: found, media_type, body: body.freeze() };
        lock(&self.manifests).keep(manifest.clone());
        Ok(manifest)
    }

    /// Asks the registry and passes its answer on, keeping nothing.
    async fn pass_on(
        self: &Arc<Self>,
        ask: &Ask,
        registry: &str,
        caller: Caller,
        path: &str,
        headers: &HeaderMap,
        permit: OwnedSemaphorePermit,
    ) -> Result<Response, Failure> {
        let call = Call {
            method: if ask.head { Method::HEAD } else { Method::GET },
            registry,
            path,
            range: None,
            accept: headers.get(ACCEPT),
            authorization: ask.authorization.as_ref(),
            caller,
            hops: &ask.hops,
        };
        let upstream = self.fetcher.upstream.send(Via::Registry, &call).await?;
        let mut answer = Response::new(Body::empty());
        *answer.status_mut() = upstream.status();
        let version = HeaderName::from_static("docker-distribution-api-version");
        for name in [CONTENT_TYPE, CONTENT_LENGTH, CONTENT_DIGEST, ETAG, LINK, version] {
            for value in upstream.headers().get_all(&name) {
                answer.headers_mut().append(&name, value.clone());
            }
        }
        if !ask.head {
            let (fetcher, registry) = (self.fetcher.clone(), registry.to_owned());
            let rest = stream::try_unfold((fetcher, registry, upstream, permit), async |mut state| {
                let next = state.0.upstream.next(Via::Registry, &state.1, &mut state.2).await;
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

/// Takes a blob off the list of those that are being fetched whole.
struct Filled {
    server: Arc<Server>,
    digest: Digest,
}

impl Drop for Filled {
    fn drop(&mut self) {
        lock(&self.server.filling).remove(&self.digest);
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

fn tell(manifest: &Manifest, head: bool) -> Response {
    let body = if head { Body::empty() } else { Body::from(manifest.body.clone()) };
    let mut answer = Response::new(body);
    let headers = answer.headers_mut();
    headers.insert(CONTENT_TYPE, manifest.media_type.clone());
    headers.insert(CONTENT_LENGTH, manifest.body.len().into());
    headers.insert(CONTENT_DIGEST, text(&format!("sha256:{}", manifest.digest)));
    headers.insert(ETAG, text(&format!("\"sha256:{}\"", manifest.digest)));
    answer
}
