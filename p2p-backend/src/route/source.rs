//! The sources of one repository: its mirrors or its proxy, and the registry itself.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use nydus_rafs::BlobId;
use reqwest::{Request, Url};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::health::{Health, Pause, Weight};
use super::renewal::Renewal;
use super::{Avoid, Failure, Judgement, RouteOptions, SourceError, Urgency};
use crate::config::{Mirror, Proxy as ProxyConfig, Registry};
use crate::credentials::Credential;
use crate::http::{HttpError, Proxy, Timeouts, Tls};
use crate::registry::{BlobRequest, BlobStream, Client, ClientOptions, RegistryError, Scheme, headers, lock};

/// The registry is probed as often as mirrors are by default.
const ORIGIN_INTERVAL: Duration = Duration::from_secs(5);
/// Failures in a row after which the registry is called down.
const ORIGIN_LIMIT: u32 = 3;
/// A registry that says 429 without saying how long to wait.
const DEFAULT_PAUSE: Duration = Duration::from_secs(1);
/// A wish to be left alone is not granted for longer than this without asking again: limits are lifted early,
/// and credentials change.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Without reads for so long, the registry is not probed.
const ORIGIN_PAUSE: Duration = Duration::from_secs(300);

/// What is wanted of a source.
pub(super) enum Ask {
    Bytes {
        range: Range<u64>,
        urgency: Urgency,
        avoid: Avoid,
    },
    Size,
    /// All of it, as it comes.
    Whole {
        urgency: Urgency,
    },
}

impl Ask {
    pub(super) fn avoid(&self) -> Avoid {
        match self {
            Self::Bytes { avoid, .. } => *avoid,
            Self::Size | Self::Whole { .. } => Avoid::Nothing,
        }
    }

    /// Returns the bytes asked for; a size is none, and a whole blob is counted as it comes.
    pub(super) fn length(&self) -> u64 {
        match self {
            Self::Bytes { range, .. } => range.end - range.start,
            Self::Size | Self::Whole { .. } => 0,
        }
    }
}

/// What a source gave.
pub(super) enum Answer {
    /// The bytes, and whether the whole blob was sent for them.
    Bytes(Bytes, bool),
    Size(u64),
    Whole(Box<BlobStream>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Mirror,
    Proxy,
    Origin,
}

/// One place to ask.
pub(super) struct Source {
    kind: Kind,
    name: Arc<str>,
    client: Client,
    ping: Option<Url>,
    /// Its word is final: there is nothing behind it.
    last: bool,
    pause: Duration,
    health: Mutex<Health>,
    probing: Mutex<bool>,
    /// Whether it was said that this mirror refuses the repository: once is enough.
    told_refusal: AtomicBool,
    common: Arc<Common>,
}

/// What the sources of a route share.
struct Common {
    used: Mutex<Instant>,
    revived: Notify,
}

/// All places to ask for the blobs of one repository.
pub(super) struct Sources {
    /// The registry and repository, for messages.
    pub(super) place: Arc<str>,
    pub(super) repository: String,
    /// In the order in which they are asked; the registry is last, if it is asked at all.
    all: Vec<Arc<Source>>,
    origin: Client,
    common: Arc<Common>,
    pub(super) renewal: Option<Renewal>,
    /// How often the credential was replaced.
    pub(super) replaced: AtomicU64,
}

impl Sources {
    pub(super) fn open(config: &Registry, route: &RouteOptions) -> Result<Self, SourceError> {
        let refuse = SourceError::Config;
        let wrong = |key: &str, error: &dyn std::fmt::Display| {
            SourceError::Config(format!("backend `registry`: `{key}`: {error}"))
        };
        for (key, value) in [("host", &config.host), ("repo", &config.repo)] {
            if value.is_empty() {
                return Err(refuse(format!("backend `registry` needs `{key}`: a snapshotter fills it in per image")));
            }
        }
        if !config.mirrors.is_empty() && !config.proxy.url.is_empty() {
            return Err(refuse("backend `registry` has both `mirrors` and `proxy`: remove one of them".to_owned()));
        }
        let seconds = |value: Option<u64>| value.map(Duration::from_secs);
        let lowered = |limits: Timeouts| limits.lowered(seconds(config.connect_timeout), seconds(config.timeout));
        let tls = Tls {
            skip_verify: config.skip_verify,
            ca_cert_files: config.ca_cert_files.iter().map(Into::into).collect(),
        };
        let credential = match route.credential.clone() {
            Some(credential) => credential,
            None => configured_credential(config).map_err(|error| wrong("auth", &error))?,
        };
        let scheme = match config.scheme.as_str() {
            "http" => Scheme::Http,
            // Who skips verification has always been allowed a registry without TLS; never with a credential.
            _ if config.skip_verify => Scheme::Auto,
            _ => Scheme::Https,
        };
        let options = ClientOptions {
            scheme,
            tls: tls.clone(),
            timeouts: lowered(route.registry_limits),
            credential,
            blob_url_scheme: Some(config.blob_url_scheme.clone()),
            blob_redirected_host: Some(config.blob_redirected_host.clone()),
            pools: route.pools.clone(),
            ..ClientOptions::default()
        };
        let origin = Client::new(&config.host, options.clone()).map_err(|error| wrong("host", &error))?;
        let common = Arc::new(Common { used: Mutex::new(Instant::now()), revived: Notify::new() });
        let mut all = Vec::new();
        for (index, mirror) in config.mirrors.iter().enumerate() {
            let key = format!("mirrors[{index}]");
            let options = ClientOptions {
                timeouts: lowered(route.mirror_limits),
                tls: tls.clone(),
                pools: route.pools.clone(),
                ..ClientOptions::default()
            };
            let source = open_mirror(mirror, config, &origin, options, &common).map_err(|error| wrong(&key, &error))?;
            all.push(Arc::new(source));
        }
        if !config.proxy.url.is_empty() {
            let source = open_proxy(
                config,
                &origin,
                ClientOptions { timeouts: lowered(route.mirror_limits), ..options },
                &common,
            )
            .map_err(|error| wrong("proxy", &error))?;
            all.push(Arc::new(source));
        }
        if config.proxy.url.is_empty() || config.proxy.fallback {
            all.push(Arc::new(Source {
                kind: Kind::Origin,
                name: origin.host().into(),
                client: origin.clone(),
                ping: None,
                last: true,
                pause: ORIGIN_PAUSE,
                health: Mutex::new(Health::new(ORIGIN_LIMIT, ORIGIN_INTERVAL)),
                probing: Mutex::new(false),
                told_refusal: AtomicBool::new(false),
                common: Arc::clone(&common),
            }));
        }
        let place: Arc<str> = format!("registry {}, repository {}", config.host, config.repo).into();
        let in_force: Vec<&str> = all.iter().filter(|source| source.is_mirror()).map(|source| &*source.name).collect();
        if in_force.is_empty() {
            tracing::debug!(registry = %config.host, repo = %config.repo, "blobs come from the registry itself");
        } else {
            let mirrors = in_force.join(", ");
            tracing::info!(registry = %config.host, repo = %config.repo, "mirrors in force, in this order: {mirrors}");
        }
        let renewal = route.renewal.clone().map(Renewal::new);
        Ok(Self { place, repository: config.repo.clone(), all, origin, common, renewal, replaced: AtomicU64::new(0) })
    }

    pub(super) fn set_credential(&self, credential: Credential) {
        self.origin.set_credential(credential);
        // The mirrors share the identity, but remember redirects and challenges of their own.
        for source in &self.all {
            source.client.forget();
            lock(&source.health).end_pause();
        }
        self.replaced.fetch_add(1, Ordering::Release);
    }

    /// Tells whether the sources show this credential already.
    pub(super) fn uses(&self, credential: &Credential) -> bool {
        self.origin.shows(credential)
    }

    pub(super) fn note_traffic(&self) {
        *lock(&self.common.used) = Instant::now();
        for source in &self.all {
            if source.down_since().is_some() {
                source.probe();
            }
        }
    }

    /// Waits until a probe finds a source well again.
    pub(super) async fn revived(&self) {
        self.common.revived.notified().await;
    }

    /// Returns since when no source has been well.
    pub(super) fn down_since(&self) -> Option<Instant> {
        let since: Option<Vec<_>> = self.all.iter().map(|source| source.down_since()).collect();
        since?.into_iter().max()
    }

    /// Returns the sources worth asking now, in order.
    pub(super) fn choose(&self, avoid: Avoid) -> Vec<Arc<Source>> {
        let now = Instant::now();
        let open: Vec<_> = self.all.iter().filter(|source| lock(&source.health).paused(now).is_none()).collect();
        let well = open.iter().filter(|source| source.down_since().is_none());
        let mut chosen: Vec<Arc<Source>> = well.map(|source| Arc::clone(source)).collect();
        if chosen.is_empty() {
            // Nobody is well. Those that fail quickly cost nothing to try; if there are none, all are tried.
            let quick = open.iter().filter(|source| !lock(&source.health).is_silent());
            chosen = quick.map(|source| Arc::clone(source)).collect();
        }
        if chosen.is_empty() {
            chosen = open.into_iter().cloned().collect();
        }
        if avoid == Avoid::Mirrors {
            // The registry first, whatever its health; what mirrors hold is the thing to avoid.
            chosen.retain(|source| source.is_mirror());
            let origin = self.all.iter().filter(|source| !source.is_mirror());
            chosen = origin.cloned().chain(chosen).collect();
        }
        chosen
    }

    /// Returns how long all sources want to be left alone, and what the most patient one said.
    pub(super) fn pause(&self, now: Instant) -> (Duration, Option<RegistryError>) {
        let mut shortest: Option<(Instant, RegistryError)> = None;
        for source in &self.all {
            let health = lock(&source.health);
            let Some(pause) = health.paused(now) else { return (Duration::ZERO, None) };
            if shortest.as_ref().is_none_or(|(until, _)| pause.until < *until) {
                shortest = Some((pause.until, pause.wish.clone()));
            }
        }
        match shortest {
            Some((until, wish)) => (until.duration_since(now), Some(wish)),
            None => (Duration::ZERO, None),
        }
    }
}

fn configured_credential(config: &Registry) -> Result<Credential, crate::credentials::CredentialError> {
    let token = config.registry_token.as_deref().unwrap_or("").trim();
    let basic = Credential::from_auth(config.auth.as_deref().unwrap_or(""))?;
    // Where both are given the password is kept: it can get new tokens, and the token would only save the first request.
    Ok(if token.is_empty() || basic != Credential::Anonymous { basic } else { Credential::Bearer(token.to_owned()) })
}

fn open_mirror(
    mirror: &Mirror,
    config: &Registry,
    origin: &Client,
    mut options: ClientOptions,
    common: &Arc<Common>,
) -> Result<Source, String> {
    let url = Url::parse(&mirror.host).ok().filter(|url| matches!(url.scheme(), "http" | "https"));
    let Some(url) = url.filter(Url::has_host) else {
        return Err(format!("`host` is `{}`, and must be like http://127.0.0.1:4001", mirror.host));
    };
    options.scheme = if url.scheme() == "https" { Scheme::Https } else { Scheme::Http };
    options.headers = headers(&mirror.headers).map_err(|name| format!("`headers`: `{name}` cannot be sent"))?;
    if !options.headers.contains_key("x-dragonfly-registry") {
        let scheme = if config.scheme == "http" { "http" } else { "https" };
        let registry =
            HeaderValue::try_from(format!("{scheme}://{}", origin.host())).map_err(|error| error.to_string())?;
        options.headers.insert("x-dragonfly-registry", registry);
    }
    let ping = match mirror.ping_url.as_str() {
        "" => url.join("/v2/").map_err(|error| error.to_string())?,
        text => Url::parse(text).map_err(|error| format!("`ping_url` is `{text}`: {error}"))?,
    };
    let authority = crate::http::authority(&url);
    let client = origin.mirror(&authority, options).map_err(|error| error.to_string())?;
    Ok(Source {
        kind: Kind::Mirror,
        name: format!("{}://{authority}", url.scheme()).into(),
        client,
        ping: Some(ping),
        last: false,
        pause: Duration::from_secs(mirror.health_check_pause_elapsed),
        health: Mutex::new(Health::new(mirror.failure_limit, Duration::from_secs(mirror.health_check_interval))),
        probing: Mutex::new(false),
        told_refusal: AtomicBool::new(false),
        common: Arc::clone(common),
    })
}

fn open_proxy(
    config: &Registry,
    origin: &Client,
    options: ClientOptions,
    common: &Arc<Common>,
) -> Result<Source, String> {
    let ProxyConfig { url, ping_url, fallback, check_interval, check_pause_elapsed, use_http, .. } = &config.proxy;
    let parsed = Url::parse(url).map_err(|error| format!("`url`: {error}"))?;
    let ping = match ping_url.as_str() {
        "" => None,
        text => Some(Url::parse(text).map_err(|error| format!("`ping_url` is `{text}`: {error}"))?),
    };
    let scheme = if *use_http { Scheme::Http } else { options.scheme };
    let options = ClientOptions { proxy: Proxy::Url(url.clone()), scheme, ..options };
    let client = origin.mirror(origin.host(), options).map_err(|error| error.to_string())?;
    Ok(Source {
        kind: Kind::Proxy,
        name: format!("proxy {}", crate::http::loggable(&parsed).trim_end_matches('/')).into(),
        client,
        ping,
        last: !fallback,
        pause: Duration::from_secs(*check_pause_elapsed),
        health: Mutex::new(Health::new(5, Duration::from_secs(*check_interval))),
        probing: Mutex::new(false),
        told_refusal: AtomicBool::new(false),
        common: Arc::clone(common),
    })
}

impl Source {
    pub(super) fn name(&self) -> &Arc<str> {
        &self.name
    }

    pub(super) fn is_mirror(&self) -> bool {
        self.kind != Kind::Origin
    }

    fn down_since(&self) -> Option<Instant> {
        lock(&self.health).down_since()
    }

    pub(super) async fn ask(&self, repository: &str, blob: &BlobId, ask: &Ask) -> Result<Answer, RegistryError> {
        let digest = format!("sha256:{blob}");
        match ask {
            Ask::Size => self.client.blob_size(repository, &digest).await.map(Answer::Size),
            Ask::Whole { urgency } => {
                let mut request = BlobRequest::default();
                if self.is_mirror() {
                    request.headers = hints(*urgency, Avoid::Nothing);
                }
                self.client.blob(repository, &digest, &request).await.map(Box::new).map(Answer::Whole)
            }
            Ask::Bytes { range, urgency, avoid } => {
                let mut request = BlobRequest::range(range.clone());
                if self.is_mirror() {
                    request.headers = hints(*urgency, *avoid);
                }
                let stream = self.client.blob(repository, &digest, &request).await?;
                let ignores_ranges = stream.ignores_ranges();
                Ok(Answer::Bytes(stream.read(range.end - range.start).await?, ignores_ranges))
            }
        }
    }

    pub(super) fn succeeded(&self) {
        if lock(&self.health).succeeded() {
            tracing::info!(source = %self.name, "a source of blobs answers again");
            self.common.revived.notify_waiters();
        }
    }

    pub(super) fn failed(self: &Arc<Self>, weight: Weight) {
        if lock(&self.health).failed(weight, Instant::now()) {
            let then = if self.last { "reads wait for it" } else { "reads go past it" };
            tracing::warn!(source = %self.name, "a source of blobs does not answer; {then} until it does");
            self.probe();
        }
    }

    /// Decides what an error of this source means for the read, and notes what it means for the source.
    pub(super) fn judge(self: &Arc<Self>, error: &RegistryError, urgency: Urgency) -> Judgement {
        let status = error.status();
        match error {
            RegistryError::Http(HttpError::Silent { .. } | HttpError::Stalled { .. }) => self.failed(Weight::Silent),
            RegistryError::Http(HttpError::Connect { slow: true, .. }) => self.failed(Weight::Silent),
            RegistryError::Http(_) => self.failed(Weight::Quick),
            // A mirror's 5xx is mostly about what is behind it; it cost no time, and others are asked anyway.
            _ if self.last && status.is_some_and(|status| status.is_server_error()) => self.failed(Weight::Quick),
            _ => {}
        }
        if status == Some(StatusCode::TOO_MANY_REQUESTS) {
            let wait = error.retry_after().unwrap_or(DEFAULT_PAUSE).min(LONGEST_PAUSE);
            lock(&self.health).pause(Pause { until: Instant::now() + wait, wish: error.clone() });
            if self.is_mirror() && urgency == Urgency::Prefetch {
                // The mirror asks for less; going past it would only move the load to the registry.
                return Judgement::Stop(Failure::Unavailable);
            }
            return Judgement::Ask;
        }
        if !self.last {
            self.tell_refusal(error);
            return Judgement::Ask;
        }
        match (error, status.map(|status| status.as_u16())) {
            (RegistryError::Token { .. }, Some(400..=499)) | (_, Some(401 | 403)) => Judgement::Stop(Failure::Denied),
            (_, Some(404 | 410)) => Judgement::Stop(Failure::Missing),
            (RegistryError::Http(HttpError::Untrusted { .. }), _) => Judgement::Stop(Failure::Unavailable),
            (_, Some(408)) => Judgement::Ask,
            (_, Some(300..=499)) | (RegistryError::Redirect { .. }, _) => Judgement::Odd,
            (RegistryError::Form { .. } | RegistryError::Short { .. }, _) => Judgement::Odd,
            (error, _) if error.is_transient() => Judgement::Ask,
            _ => Judgement::Stop(Failure::Unavailable),
        }
    }

    /// Says, once, that a mirror does not want to serve this repository: reads go past it, and nobody would notice.
    fn tell_refusal(&self, error: &RegistryError) {
        let refused = matches!(error.status().map(|status| status.as_u16()), Some(400..=403 | 405..=407));
        if refused && !self.told_refusal.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                source = %self.name, %error,
                "a mirror refuses this repository and reads go past it; let the mirror serve its registry"
            );
        }
    }

    /// Starts to ask the source from time to time whether it is well, unless somebody does.
    fn probe(self: &Arc<Self>) {
        let mut probing = lock(&self.probing);
        if !*probing {
            *probing = true;
            tokio::spawn(probe(Arc::downgrade(self)));
        }
    }

    async fn is_well(&self) -> bool {
        // A registry that wants a credential, or does not know this path, is there.
        let alive = |status: StatusCode| status.as_u16() < 500;
        match &self.ping {
            Some(url) => match self.client.http().send(Request::new(Method::GET, url.clone())).await {
                Ok(response) if self.kind == Kind::Proxy => (200..400).contains(&response.status().as_u16()),
                Ok(response) => alive(response.status()),
                Err(_) => false,
            },
            None => match self.client.ping().await {
                Ok(()) => true,
                Err(error) => error.status().is_some_and(alive),
            },
        }
    }
}

/// Asks a source until it is well, is no longer used, or is gone. Holds it only while it asks.
async fn probe(source: Weak<Source>) {
    loop {
        let Some(wait) = source.upgrade().map(|source| lock(&source.health).probe_after()) else { return };
        tokio::time::sleep(wait).await;
        let Some(source) = source.upgrade() else { return };
        let idle = lock(&source.common.used).elapsed() > source.pause;
        let up = source.down_since().is_none();
        if idle || up {
            *lock(&source.probing) = false;
            return;
        }
        if source.is_well().await {
            // In this order: who fails right after the revival must be able to start a new probe.
            *lock(&source.probing) = false;
            lock(&source.health).revived();
            tracing::info!(source = %source.name, "a source of blobs says that it is well again");
            source.common.revived.notify_waiters();
            return;
        }
    }
}

/// What a mirror is told about a request; others ignore it.
fn hints(urgency: Urgency, avoid: Avoid) -> HeaderMap {
    let mut map = HeaderMap::new();
    map.insert("x-dragonfly-prefetch", HeaderValue::from_static("true"));
    let priority = match urgency {
        Urgency::Prefetch => "3",
        Urgency::Demand => "6",
    };
    map.insert("x-dragonfly-priority", HeaderValue::from_static(priority));
    match avoid {
        Avoid::Nothing => {
            map.insert("x-dragonfly-use-p2p", HeaderValue::from_static("true"));
        }
        Avoid::Mirrors => {
            map.insert(http::header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
            // Our own mirror drops the pieces that were wrong and reads them from the registry.
            map.insert("x-shoal-no-peer", HeaderValue::from_static("1"));
        }
    }
    map
}
