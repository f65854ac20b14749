//! Asking those who have what we lack: other mirrors, then the registry.
//!
//! A caller's Authorization goes to the registry that it is for, to mirrors that the operator trusts, and nowhere else:
//! redirects are followed by hand, and another host gets none of it. Where a registry sends everybody elsewhere for a
//! blob, the place is remembered for the next ranges of it, until that place says no.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{
    ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, LOCATION, RANGE, RETRY_AFTER,
    WWW_AUTHENTICATE,
};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use std::ops::Range;
use url::Url;

use super::allow::Caller;
use super::config::{Config, Timeouts};
use super::metrics::{Metrics, Of};
use super::request::{HOPS, REGISTRY};
use super::resolve;

/// How many redirects in a row are followed.
const MAX_REDIRECTS: usize = 5;
/// How long a blob's place is remembered. Signed URLs live for minutes; one that died is asked once and forgotten.
const TARGET_LIFE: Duration = Duration::from_secs(120);
/// How long a mirror that did not answer is left alone.
const ILL: Duration = Duration::from_secs(5);
/// How often the log tells of one upstream's trouble: every caller's request meets it.
const TOLD: Duration = Duration::from_secs(30);
/// Remembered places.
const MOST_TARGETS: usize = 4096;

/// Why an upstream could not be made from the configuration; completes "could not prepare the upstreams".
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// A file of certificates cannot be read or understood.
    #[error("ca_files of {of}: {}: {reason}", path.display())]
    Roots {
        /// The entry.
        of: String,
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The password file of an account cannot be used.
    #[error("password_file of {of}: {}: {source}", path.display())]
    Password {
        /// The entry.
        of: String,
        /// The file.
        path: std::path::PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The client cannot be made.
    #[error("{of}: {source}")]
    Client {
        /// The entry.
        of: String,
        /// What the library said.
        source: reqwest::Error,
    },
}

/// Why an upstream gave nothing; completes "could not read upstream".
#[derive(Debug, thiserror::Error)]
pub(super) enum UpstreamError {
    /// It says that this caller may not have it, or that there is no such thing.
    #[error("{by} answered {status}")]
    Refused { by: String, status: StatusCode, challenges: Vec<HeaderValue> },
    /// It has had too much of us.
    #[error("{by} answered 429")]
    Busy { by: String, retry_after: Option<HeaderValue> },
    /// It is broken.
    #[error("{by} answered {status}")]
    Broken { by: String, status: StatusCode },
    /// There is no connection to it, or it broke.
    #[error("{by}: {reason}")]
    Unreachable { by: String, reason: String },
    /// It is silent.
    #[error("{by} sent nothing for {limit:?}")]
    Silent { by: String, limit: Duration },
    /// It answers something that cannot be the answer.
    #[error("{by}: {reason}")]
    Odd { by: String, reason: String },
    /// Another mirror's question waits for this piece, and we wait for another mirror: waiting could be for ever.
    #[error("the piece is on its way from another mirror, for which this request must not wait")]
    Entangled,
}

impl UpstreamError {
    /// Whether it is about the caller and the thing, not about the upstream's health.
    pub(super) fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }

    /// Whether it is about the upstream's health, and an operator can do something.
    fn is_trouble(&self) -> bool {
        !matches!(self, Self::Refused { .. } | Self::Busy { .. } | Self::Entangled)
    }

    /// Returns what may help; begins with `; ` or is empty.
    fn advice(&self) -> &'static str {
        match self {
            Self::Unreachable { reason, .. } if reason.contains("certificate") => {
                "; add its authority to its `ca_files`"
            }
            _ => "",
        }
    }
}

/// Where to ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Via {
    /// The configured mirror of this number.
    Mirror(usize),
    /// The registry.
    Registry,
}

impl Via {
    fn label(self) -> Of {
        Of { source: if self == Self::Registry { "registry" } else { "mirror" } }
    }
}

/// What to ask, whomever.
#[derive(Debug, Clone)]
pub(super) struct Call<'a> {
    pub(super) method: Method,
    /// The configured registry.
    pub(super) registry: &'a str,
    /// Path and query, from `/v2/` on.
    pub(super) path: &'a str,
    pub(super) range: Option<Range<u64>>,
    pub(super) accept: Option<&'a HeaderValue>,
    pub(super) authorization: Option<&'a HeaderValue>,
    /// Stands for the authorization where something is remembered.
    pub(super) caller: Caller,
    /// The mirrors that the request came through.
    pub(super) hops: &'a [String],
}

#[derive(Debug)]
struct Link {
    /// As shown in logs.
    name: String,
    url: Url,
    client: reqwest::Client,
    trusted: bool,
    first_byte: Duration,
    stall: Duration,
    lend: Option<HeaderValue>,
    /// Until when a mirror that was dead or silent is not asked.
    ill: Mutex<Option<Instant>>,
    /// When the log told of its trouble.
    told: Mutex<Option<Instant>>,
}

#[derive(Debug)]
struct Place {
    url: Url,
    at: Instant,
}

/// All that can be asked.
#[derive(Debug)]
pub(super) struct Upstream {
    id: String,
    mirrors: Vec<Link>,
    registries: BTreeMap<String, Link>,
    places: Mutex<HashMap<(Caller, String), Place>>,
    /// How long a mirror may take to say who may read.
    mirror_probe: Duration,
    metrics: Arc<Metrics>,
}

impl Upstream {
    /// Makes clients for what `config` names; opens no connection. `id` is ours among mirrors.
    pub(super) fn new(config: &Config, id: String, metrics: Arc<Metrics>) -> Result<Self, PrepareError> {
        // A second install is refused, and then there is a provider already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let times = &config.timeouts;
        let mut mirrors = Vec::new();
        for mirror in &config.mirrors {
            let name = mirror.url.origin().ascii_serialization();
            let client = client(&name, times, mirror.skip_verify, &mirror.ca_files, false)?;
            let url = mirror.url.clone();
            mirrors.push(Link {
                name,
                url,
                client,
                trusted: mirror.trusted,
                first_byte: times.first_byte_mirror,
                // Shorter than our callers' patience, so that there is time for the registry.
                stall: times.stall.min(times.first_byte_mirror),
                lend: None,
                ill: Mutex::default(),
                told: Mutex::default(),
            });
        }
        let mut registries = BTreeMap::new();
        for registry in &config.registries {
            let Some(url) = registry.url.clone() else { continue };
            let loopback = match url.host() {
                Some(url::Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
                Some(url::Host::Ipv4(address)) => address.is_loopback(),
                Some(url::Host::Ipv6(address)) => address.is_loopback(),
                None => false,
            };
            let name = registry.name.clone();
            let client = client(&name, times, registry.skip_verify, &registry.ca_files, !loopback)?;
            let lend = match &registry.lend {
                Some(account) => Some(account.header().map_err(|source| PrepareError::Password {
                    of: name.clone(),
                    path: account.password_file.clone(),
                    source,
                })?),
                None => None,
            };
            let link = Link {
                name: name.clone(),
                url,
                client,
                trusted: true,
                first_byte: times.first_byte_registry,
                stall: times.stall,
                lend,
                ill: Mutex::default(),
                told: Mutex::default(),
            };
            registries.insert(name, link);
        }
        let mirror_probe = times.first_byte_mirror.min(times.headers / 2);
        Ok(Self { id, mirrors, registries, places: Mutex::default(), mirror_probe, metrics })
    }

    /// Returns the mirrors in order that are not known to be ill, all or only those whose word counts.
    pub(super) fn mirrors(&self, only_trusted: bool) -> impl Iterator<Item = Via> + '_ {
        let counts = move |link: &Link| (link.trusted || !only_trusted) && !link.is_ill();
        self.mirrors.iter().enumerate().filter(move |(_, link)| counts(link)).map(|(number, _)| Via::Mirror(number))
    }

    /// Returns how `via` is called in logs.
    pub(super) fn name<'a>(&'a self, via: Via, registry: &'a str) -> &'a str {
        match via {
            Via::Mirror(number) => self.mirrors.get(number).map_or("?", |link| &link.name),
            Via::Registry => registry,
        }
    }

    /// Sends `call` and returns a successful answer, wherever redirects led to.
    pub(super) async fn send(&self, via: Via, call: &Call<'_>) -> Result<reqwest::Response, UpstreamError> {
        let outcome = self.follow(via, call).await;
        if let Err(error) = &outcome {
            self.metrics.upstream_errors.get_or_create(&via.label()).inc();
            if let Ok(link) = self.link(via, call) {
                link.note(error);
            }
        }
        outcome
    }

    /// Sends `call` once; a redirect is an answer like any other.
    pub(super) async fn send_once(&self, via: Via, call: &Call<'_>) -> Result<reqwest::Response, UpstreamError> {
        let link = self.link(via, call)?;
        let url = join(link, call.path)?;
        let answer = self.exchange(via, link, &url, call, true).await?;
        self.judge(link, answer)
    }

    async fn follow(&self, via: Via, call: &Call<'_>) -> Result<reqwest::Response, UpstreamError> {
        let link = self.link(via, call)?;
        let origin = join(link, call.path)?;
        let kept = (via == Via::Registry && call.method == Method::GET)
            .then(|| (call.caller, format!("{}{}", call.registry, call.path)));
        if let Some(key) = &kept
            && let Some(place) = self.place(key)
        {
            match self.exchange(via, link, &place, call, false).await {
                Ok(answer) if answer.status().is_success() => return Ok(answer),
                Ok(answer) => tracing::debug!(by = %link.name, status = %answer.status(), "a remembered place says no"),
                Err(error) => tracing::debug!(by = %link.name, %error, "a remembered place does not answer"),
            }
            self.places.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
        }
        let mut url = origin.clone();
        for _ in 0..=MAX_REDIRECTS {
            let home = url.origin() == origin.origin();
            let answer = self.exchange(via, link, &url, call, home).await?;
            if !matches!(answer.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                let answer = self.judge(link, answer)?;
                if let Some(key) = kept
                    && !home
                {
                    self.remember(key, url);
                }
                return Ok(answer);
            }
            let next = answer.headers().get(LOCATION).and_then(|to| to.to_str().ok()).and_then(|to| url.join(to).ok());
            let Some(next) = next.filter(|next| matches!(next.scheme(), "http" | "https")) else {
                return Err(odd(link, "redirects to nowhere"));
            };
            if url.scheme() == "https" && next.scheme() == "http" && !loopback(&next) {
                return Err(odd(link, "redirects from https to http"));
            }
            url = next;
        }
        Err(odd(link, "redirects in a circle"))
    }

    async fn exchange(
        &self,
        via: Via,
        link: &Link,
        url: &Url,
        call: &Call<'_>,
        home: bool,
    ) -> Result<reqwest::Response, UpstreamError> {
        if resolve::forbidden_host(url) {
            return Err(odd(link, "leads to a link-local address, which is never asked"));
        }
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        if let Some(range) = &call.range {
            let value = format!("bytes={}-{}", range.start, range.end.saturating_sub(1));
            if let Ok(value) = value.parse() {
                headers.insert(RANGE, value);
            }
        }
        if let Some(accept) = call.accept {
            headers.insert(ACCEPT, accept.clone());
        }
        if home {
            let lent = if call.authorization.is_none() { link.lend.as_ref() } else { None };
            if let Some(value) = call.authorization.filter(|_| link.trusted).or(lent) {
                headers.insert(AUTHORIZATION, value.clone());
            }
            if let Via::Mirror(_) = via {
                let scheme = self.registries.get(call.registry).map_or("https", |registry| registry.url.scheme());
                let hops: Vec<&str> = call.hops.iter().map(String::as_str).chain([self.id.as_str()]).collect();
                for (name, value) in [(REGISTRY, format!("{scheme}://{}", call.registry)), (HOPS, hops.join(", "))] {
                    if let Ok(value) = value.parse() {
                        headers.insert(name, value);
                    }
                }
            }
        }
        self.metrics.upstream_requests.get_or_create(&via.label()).inc();
        let request = link.client.request(call.method.clone(), url.clone()).headers(headers);
        match tokio::time::timeout(link.first_byte, request.send()).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(UpstreamError::Unreachable { by: link.name.clone(), reason: innermost(&error) }),
            Err(_) => Err(UpstreamError::Silent { by: link.name.clone(), limit: link.first_byte }),
        }
    }

    fn judge(&self, link: &Link, answer: reqwest::Response) -> Result<reqwest::Response, UpstreamError> {
        let status = answer.status();
        let by = link.name.clone();
        match status.as_u16() {
            200..400 => Ok(answer),
            429 => Err(UpstreamError::Busy { by, retry_after: answer.headers().get(RETRY_AFTER).cloned() }),
            400..500 => {
                let challenges = answer.headers().get_all(WWW_AUTHENTICATE).iter().cloned().collect();
                Err(UpstreamError::Refused { by, status, challenges })
            }
            _ => Err(UpstreamError::Broken { by, status }),
        }
    }

    /// Asks whether the caller may have the blob or manifest, and how large it is, moving none of it if possible.
    pub(super) async fn probe(&self, call: &Call<'_>, no_mirror: bool) -> Result<u64, UpstreamError> {
        if !no_mirror {
            for via in self.mirrors(true) {
                // A mirror that is wedged must leave the registry time to answer before the caller goes.
                let asked = tokio::time::timeout(self.mirror_probe, self.probe_at(via, call)).await;
                let silent = || {
                    let link = self.link(via, call)?;
                    let error = UpstreamError::Silent { by: link.name.clone(), limit: self.mirror_probe };
                    link.note(&error);
                    Err(error)
                };
                match asked.unwrap_or_else(|_| silent()) {
                    Ok(size) => return Ok(size),
                    Err(error) => tracing::debug!(%error, path = call.path, "a mirror could not say; asking the next"),
                }
            }
        }
        self.probe_at(Via::Registry, call).await
    }

    async fn probe_at(&self, via: Via, call: &Call<'_>) -> Result<u64, UpstreamError> {
        let head = Call { method: Method::HEAD, range: None, ..call.clone() };
        let size = match self.send_once(via, &head).await {
            Ok(answer) if is_page(answer.headers()) => {
                return Err(odd(self.link(via, call)?, "answers with a web page"));
            }
            Ok(answer) if answer.status().is_success() => length(answer.headers()),
            Ok(_) => None,
            Err(UpstreamError::Refused {
                status: StatusCode::BAD_REQUEST | StatusCode::METHOD_NOT_ALLOWED, ..
            }) => None,
            Err(UpstreamError::Broken { status: StatusCode::NOT_IMPLEMENTED, .. }) => None,
            Err(error) => {
                self.metrics.upstream_errors.get_or_create(&via.label()).inc();
                if let Ok(link) = self.link(via, call) {
                    link.note(&error);
                }
                return Err(error);
            }
        };
        if let Some(size) = size {
            return Ok(size);
        }
        // HEAD is refused, redirected, or says no length: the smallest part says the length of the whole.
        let part = Call { method: Method::GET, range: Some(0..1), ..call.clone() };
        match self.send(via, &part).await {
            Ok(answer) if answer.status() == StatusCode::PARTIAL_CONTENT => {
                content_range(answer.headers()).map(|(_, total)| total)
            }
            Ok(answer) if answer.status() == StatusCode::OK => length(answer.headers()),
            Ok(_) => None,
            Err(UpstreamError::Refused { status: StatusCode::RANGE_NOT_SATISFIABLE, .. }) => Some(0),
            Err(error) => return Err(error),
        }
        .ok_or_else(|| UpstreamError::Odd {
            by: self.name(via, call.registry).to_owned(),
            reason: "says no size".into(),
        })
    }

    /// Returns the next bytes of a body, or none at its end.
    pub(super) async fn next(
        &self,
        via: Via,
        registry: &str,
        answer: &mut reqwest::Response,
    ) -> Result<Option<Bytes>, UpstreamError> {
        let by = || self.name(via, registry).to_owned();
        let link = match via {
            Via::Mirror(number) => self.mirrors.get(number),
            Via::Registry => self.registries.get(registry),
        };
        let stall = link.map_or(ILL, |link| link.stall);
        let outcome = match tokio::time::timeout(stall, answer.chunk()).await {
            Ok(Ok(Some(bytes))) => {
                self.metrics.bytes.get_or_create(&via.label()).inc_by(bytes.len() as u64);
                Ok(Some(bytes))
            }
            Ok(Ok(None)) => Ok(None),
            Ok(Err(error)) => Err(UpstreamError::Unreachable { by: by(), reason: innermost(&error) }),
            Err(_) => Err(UpstreamError::Silent { by: by(), limit: stall }),
        };
        if let (Err(error), Some(link)) = (&outcome, link) {
            link.note(error);
        }
        outcome
    }

    fn link(&self, via: Via, call: &Call<'_>) -> Result<&Link, UpstreamError> {
        let link = match via {
            Via::Mirror(number) => self.mirrors.get(number),
            Via::Registry => self.registries.get(call.registry),
        };
        link.ok_or_else(|| UpstreamError::Odd { by: call.registry.to_owned(), reason: "is not configured".into() })
    }

    fn place(&self, key: &(Caller, String)) -> Option<Url> {
        let places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        places.get(key).filter(|place| place.at.elapsed() < TARGET_LIFE).map(|place| place.url.clone())
    }

    fn remember(&self, key: (Caller, String), url: Url) {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        if places.len() >= MOST_TARGETS {
            places.retain(|_, place| place.at.elapsed() < TARGET_LIFE);
        }
        if places.len() < MOST_TARGETS {
            places.entry(key).or_insert(Place { url, at: Instant::now() });
        }
    }
}

impl Link {
    fn is_ill(&self) -> bool {
        self.ill.lock().unwrap_or_else(PoisonError::into_inner).is_some_and(|until| Instant::now() < until)
    }

    /// Leaves the link alone for a while if it is dead or silent, and tells the log of its trouble. That it is ill is
    /// looked at for mirrors only: nobody stands in for a registry.
    fn note(&self, error: &UpstreamError) {
        let now = Instant::now();
        if matches!(error, UpstreamError::Unreachable { .. } | UpstreamError::Silent { .. }) {
            *self.ill.lock().unwrap_or_else(PoisonError::into_inner) = Some(now + ILL);
        }
        if error.is_trouble() && is_news(&mut self.told.lock().unwrap_or_else(PoisonError::into_inner), now) {
            let advice = error.advice();
            tracing::warn!(upstream = %self.name, "could not read upstream: {error}{advice}");
        }
    }
}

/// Whether trouble of `now` is worth a line, given when there was one.
fn is_news(told: &mut Option<Instant>, now: Instant) -> bool {
    let news = told.is_none_or(|before| now.saturating_duration_since(before) >= TOLD);
    if news {
        *told = Some(now);
    }
    news
}

impl super::config::Account {
    fn header(&self) -> std::io::Result<HeaderValue> {
        use base64::Engine as _;
        let text = std::fs::read_to_string(&self.password_file)?;
        let password = text.lines().next().unwrap_or_default();
        let pair = base64::engine::general_purpose::STANDARD.encode(format!("{}:{password}", self.username));
        let mut value = HeaderValue::try_from(format!("Basic {pair}")).map_err(std::io::Error::other)?;
        value.set_sensitive(true);
        Ok(value)
    }
}

fn client(
    of: &str,
    times: &Timeouts,
    skip_verify: bool,
    ca_files: &[std::path::PathBuf],
    proxied: bool,
) -> Result<reqwest::Client, PrepareError> {
    let mut builder = reqwest::Client::builder()
        .redirect(reqwest::redirect::Policy::none())
        .referer(false)
        .connect_timeout(times.connect)
        .pool_idle_timeout(Duration::from_secs(60))
        .tcp_nodelay(true)
        .dns_resolver(Arc::new(resolve::Guarded))
        .user_agent(concat!("nydus-p2p/", env!("CARGO_PKG_VERSION")))
        .tls_danger_accept_invalid_certs(skip_verify);
    if !proxied {
        builder = builder.no_proxy();
    }
    for path in ca_files {
        let roots = |reason: String| PrepareError::Roots { of: of.to_owned(), path: path.clone(), reason };
        let pem = std::fs::read(path).map_err(|error| roots(error.to_string()))?;
        let found = reqwest::Certificate::from_pem_bundle(&pem).map_err(|error| roots(innermost(&error)))?;
        if found.is_empty() {
            return Err(roots("has no PEM certificate".into()));
        }
        builder = builder.tls_certs_merge(found);
    }
    builder.build().map_err(|source| PrepareError::Client { of: of.to_owned(), source })
}

/// Returns what Content-Range says: the bytes in the body and the size of the whole.
pub(super) fn content_range(headers: &HeaderMap) -> Option<(Range<u64>, u64)> {
    let text = headers.get(CONTENT_RANGE)?.to_str().ok()?.strip_prefix("bytes ")?;
    let (range, total) = text.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last) = (first.trim().parse::<u64>().ok()?, last.trim().parse::<u64>().ok()?);
    let total = total.trim().parse().ok()?;
    (first <= last && last < total).then(|| (first..last + 1, total))
}

/// Whether it is HTML, which no registry's answer is: a login page or a proxy's error.
pub(super) fn is_page(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_TYPE).is_some_and(|is| is.as_bytes().starts_with(b"text/html"))
}

/// Returns what Content-Length says.
pub(super) fn length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

fn join(link: &Link, path: &str) -> Result<Url, UpstreamError> {
    let url = link.url.join(path).map_err(|_| odd(link, "the path cannot be asked"))?;
    if url.origin() == link.url.origin() { Ok(url) } else { Err(odd(link, "the path leads elsewhere")) }
}

fn odd(link: &Link, reason: &str) -> UpstreamError {
    UpstreamError::Odd { by: link.name.clone(), reason: reason.into() }
}

fn loopback(url: &Url) -> bool {
    match url.host() {
        Some(url::Host::Domain(name)) => name == "localhost",
        Some(url::Host::Ipv4(address)) => address.is_loopback(),
        Some(url::Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}

/// Returns the last reason in a chain: the others only say that something failed, and may hold a signed URL.
fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    if let Some(error) = last.downcast_ref::<reqwest::Error>() {
        return if error.is_timeout() { "timed out".into() } else { "the exchange broke".into() };
    }
    last.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trouble_is_told_at_once_and_then_from_time_to_time() {
        let begin = Instant::now();
        let mut told = None;
        let news: Vec<bool> = [0, 1, 29, 30, 31, 60].map(|s| is_news(&mut told, begin + Duration::from_secs(s))).into();
        assert_eq!(news, [true, false, false, true, false, true]);
    }

    #[test]
    fn what_a_registry_says_about_a_caller_is_no_trouble_and_a_certificate_is() {
        let by = String::from("r.example");
        let refused = UpstreamError::Refused { by: by.clone(), status: StatusCode::UNAUTHORIZED, challenges: vec![] };
        assert!(!refused.is_trouble());
        let wrong = UpstreamError::Unreachable { by, reason: "invalid peer certificate: UnknownIssuer".into() };
        assert!(wrong.is_trouble() && wrong.advice().contains("ca_files"));
    }
}
