//! Asking those who have what we lack: other mirrors, then the registry.
//!
//! Each is asked by a [`Client`], as everybody asks registries; what is ours is in whose name. A caller's Authorization
//! goes to the registry that it is for, to mirrors that the operator trusts, and nowhere else, and what the registry says
//! to it is relayed. A caller without one is anonymous, unless the operator lends an account. Link-local addresses are
//! never asked, and other mirrors are told through whom a request came.

mod error;
mod link;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, ACCEPT_ENCODING, RANGE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};

use super::config::{Account, Config};
use super::metrics::{Metrics, Of};
use super::request::{HOPS, REGISTRY};
use crate::credentials::Credential;
use crate::http::{Body, Pools, Proxy, Reach, Timeouts, Tls, authority};
use crate::registry::head::{content_range, is_page, length};
use crate::registry::{Access, Client, ClientOptions, RegistryError, Scheme, Traffic, Who, is_redirect};
use link::Link;

pub use error::PrepareError;
pub(super) use error::UpstreamError;

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
    /// The repository; empty where it is about none.
    pub(super) repo: &'a str,
    /// Path and query, from `/v2/` on.
    pub(super) path: &'a str,
    pub(super) range: Option<Range<u64>>,
    pub(super) accept: Option<&'a HeaderValue>,
    pub(super) authorization: Option<&'a HeaderValue>,
    /// The mirrors that the request came through.
    pub(super) hops: &'a [String],
}

impl Call<'_> {
    fn is_blob(&self) -> bool {
        self.path.contains("/blobs/")
    }
}

/// A successful answer; [`Upstream::next`] gives its body.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    via: Via,
    registry: String,
    path: String,
    body: Body,
}

/// That a caller may have something, and how large it is.
#[derive(Debug)]
pub(super) struct Probed {
    pub(super) size: u64,
    /// The bytes themselves, if they were asked for at once.
    pub(super) opened: Option<(Via, Answer)>,
}

/// All that can be asked.
#[derive(Debug)]
pub(super) struct Upstream {
    id: String,
    mirrors: Vec<Link>,
    registries: BTreeMap<String, Link>,
    /// Names of registries with the schemes that they are asked by.
    schemes: BTreeMap<String, &'static str>,
    /// How long a mirror may take to say who may read.
    mirror_probe: Duration,
    metrics: Arc<Metrics>,
    /// What went to mirrors, and to registries.
    traffic: [Arc<Traffic>; 2],
}

impl Upstream {
    /// Makes clients for what `config` names; opens no connection. `id` is ours among mirrors.
    pub(super) fn new(config: &Config, id: String, metrics: Arc<Metrics>) -> Result<Self, PrepareError> {
        let times = &config.timeouts;
        let traffic: [Arc<Traffic>; 2] = Default::default();
        let limits = |first_byte| Timeouts { connect: times.connect, first_byte, stall: times.stall };
        let pools = Pools::default();
        let client = |name: &str, url: &url::Url, options: ClientOptions| {
            let scheme = if url.scheme() == "https" { Scheme::Https } else { Scheme::Http };
            let options = ClientOptions { scheme, reach: Reach::NotLinkLocal, pools: pools.clone(), ..options };
            let client = Client::new(&authority(url), options);
            client.map_err(|source| PrepareError::Client { of: name.to_owned(), source })
        };
        let mut mirrors = Vec::new();
        for mirror in &config.mirrors {
            let name = mirror.url.origin().ascii_serialization();
            let first_byte = times.first_byte_mirror;
            let options = ClientOptions {
                tls: Tls { skip_verify: mirror.skip_verify, ca_cert_files: mirror.ca_files.clone() },
                // Shorter than our callers' patience, so that there is time for the registry.
                timeouts: Timeouts { stall: times.stall.min(first_byte), ..limits(first_byte) },
                proxy: Proxy::Direct,
                traffic: traffic[0].clone(),
                ..ClientOptions::default()
            };
            let client = client(&name, &mirror.url, options)?;
            mirrors.push(Link::new(name, client, mirror.trusted, false));
        }
        let (mut registries, mut schemes) = (BTreeMap::new(), BTreeMap::new());
        for registry in &config.registries {
            let Some(url) = &registry.url else { continue };
            let name = registry.name.clone();
            let credential = match &registry.lend {
                Some(account) => account.credential().map_err(|source| PrepareError::Password {
                    of: name.clone(),
                    path: account.password_file.clone(),
                    source,
                })?,
                None => Credential::Anonymous,
            };
            let options = ClientOptions {
                tls: Tls { skip_verify: registry.skip_verify, ca_cert_files: registry.ca_files.clone() },
                timeouts: limits(times.first_byte_registry),
                proxy: Proxy::Environment,
                credential,
                traffic: traffic[1].clone(),
                ..ClientOptions::default()
            };
            let link = Link::new(name.clone(), client(&name, url, options)?, true, registry.lend.is_some());
            schemes.insert(name.clone(), if url.scheme() == "https" { "https" } else { "http" });
            registries.insert(name, link);
        }
        let mirror_probe = times.first_byte_mirror.min(times.headers / 2);
        Ok(Self { id, mirrors, registries, schemes, mirror_probe, metrics, traffic })
    }

    /// Returns the mirrors in order that are not known to be ill, all or only those whose word counts.
    pub(super) fn mirrors(&self, only_trusted: bool) -> impl Iterator<Item = Via> + '_ {
        let counts = move |link: &Link| (link.trusted || !only_trusted) && !link.is_ill();
        self.mirrors.iter().enumerate().filter(move |(_, link)| counts(link)).map(|(number, _)| Via::Mirror(number))
    }

    /// Whether those who may say who may read are also those who are asked for bytes first.
    pub(super) fn all_trusted(&self) -> bool {
        self.mirrors.iter().all(|link| link.trusted)
    }

    /// Returns how `via` is called in logs.
    pub(super) fn name<'a>(&'a self, via: Via, registry: &'a str) -> &'a str {
        match via {
            Via::Mirror(number) => self.mirrors.get(number).map_or("?", |link| &link.name),
            Via::Registry => registry,
        }
    }

    /// Brings the numbers of requests up to date.
    pub(super) fn report(&self) {
        for (via, traffic) in [Via::Mirror(0), Via::Registry].into_iter().zip(&self.traffic) {
            let counter = self.metrics.upstream_requests.get_or_create(&via.label());
            counter.inc_by(traffic.requests().saturating_sub(counter.get()));
        }
    }

    /// Sends `call` and returns a successful answer, wherever redirects led to.
    pub(super) async fn send(&self, via: Via, call: &Call<'_>) -> Result<Answer, UpstreamError> {
        let link = self.link(via, call.registry)?;
        let request = self.request(via, link, call).await;
        let answer = match request {
            Ok(request) if call.is_blob() && call.method == Method::GET => link.client.fetch(&request).await,
            Ok(request) => self.follow(link, &request).await,
            Err(error) => Err(error),
        };
        match answer {
            Ok(answer) => Ok(Answer {
                status: answer.status(),
                headers: answer.headers().clone(),
                via,
                registry: call.registry.to_owned(),
                path: call.path.to_owned(),
                body: link.client.http().body(answer),
            }),
            Err(error) => Err(self.failed(via, link, call.path, UpstreamError::of(&link.name, error))),
        }
    }

    async fn follow(
        &self,
        link: &Link,
        request: &crate::registry::Call<'_>,
    ) -> Result<reqwest::Response, RegistryError> {
        let answer = link.client.call(request).await?;
        let answer = link.client.follow(request, answer).await?;
        if answer.status().is_success() { Ok(answer) } else { Err(link.client.refusal(&request.method, answer).await) }
    }

    /// Puts `call` into the form in which `link` is asked.
    async fn request<'c>(
        &self,
        via: Via,
        link: &Link,
        call: &Call<'c>,
    ) -> Result<crate::registry::Call<'c>, RegistryError> {
        let url = link.client.url(call.path.trim_start_matches('/')).await?;
        let mut request = crate::registry::Call::new(call.method.clone(), url, call.repo, Access::Pull);
        let mut put = |name: HeaderName, value: String| {
            if let Ok(value) = value.parse() {
                request.headers.insert(name, value);
            }
        };
        put(ACCEPT_ENCODING, "identity".to_owned());
        if let Some(range) = &call.range {
            put(RANGE, format!("bytes={}-{}", range.start, range.end.saturating_sub(1)));
        }
        if let Some(accept) = call.accept {
            request.headers.insert(ACCEPT, accept.clone());
        }
        request.who = match call.authorization {
            None if link.lends => Who::Ours,
            theirs => Who::Caller(theirs.filter(|_| link.trusted).cloned()),
        };
        if let Via::Mirror(_) = via {
            let scheme = self.schemes.get(call.registry).copied().unwrap_or("https");
            let hops: Vec<&str> = call.hops.iter().map(String::as_str).chain([self.id.as_str()]).collect();
            for (name, value) in [(REGISTRY, format!("{scheme}://{}", call.registry)), (HOPS, hops.join(", "))] {
                if let Ok(value) = value.parse() {
                    request.own_headers.insert(name, value);
                }
            }
        }
        Ok(request)
    }

    /// Asks whether the caller may have the blob or manifest, and how large it is.
    ///
    /// With `part`, which must begin in it, that part of it is asked for: its answer tells as much as one to HEAD, and
    /// brings bytes. Without, none of it is moved if possible.
    pub(super) async fn probe(
        &self,
        call: &Call<'_>,
        part: Option<Range<u64>>,
        no_mirror: bool,
    ) -> Result<Probed, UpstreamError> {
        if !no_mirror {
            for via in self.mirrors(true) {
                // A mirror that is wedged must leave the registry time to answer before the caller goes.
                let asked = tokio::time::timeout(self.mirror_probe, self.probe_at(via, call, part.clone())).await;
                let silent = || {
                    let link = self.link(via, call.registry)?;
                    let error = UpstreamError::Silent { by: link.name.clone(), limit: self.mirror_probe };
                    link.note(&error, call.path);
                    Err(error)
                };
                match asked.unwrap_or_else(|_| silent()) {
                    Ok(probed) => return Ok(probed),
                    Err(error) => tracing::debug!(%error, path = call.path, "a mirror could not say; asking the next"),
                }
            }
        }
        self.probe_at(Via::Registry, call, part).await
    }

    async fn probe_at(&self, via: Via, call: &Call<'_>, part: Option<Range<u64>>) -> Result<Probed, UpstreamError> {
        if let Some(range) = part {
            match self.part(via, call, range).await {
                Ok(Some(probed)) => return Ok(probed),
                // The part lies behind its end, or the answer does not tell the size; HEAD may.
                Ok(None) | Err(UpstreamError::Refused { status: StatusCode::RANGE_NOT_SATISFIABLE, .. }) => {}
                Err(error) => return Err(error),
            }
        }
        if let Some(size) = self.head(via, call).await? {
            return Ok(Probed { size, opened: None });
        }
        // HEAD is refused, redirected, or says no length: the smallest part says the length of the whole.
        match self.part(via, call, 0..1).await {
            Ok(Some(Probed { size, .. })) => Ok(Probed { size, opened: None }),
            Err(UpstreamError::Refused { status: StatusCode::RANGE_NOT_SATISFIABLE, .. }) => {
                Ok(Probed { size: 0, opened: None })
            }
            Ok(None) => Err(self.link(via, call.registry)?.odd("says no size")),
            Err(error) => Err(error),
        }
    }

    /// Asks with HEAD, which is not taken along a redirect: the address there was made for GET.
    async fn head(&self, via: Via, call: &Call<'_>) -> Result<Option<u64>, UpstreamError> {
        let link = self.link(via, call.registry)?;
        let head = Call { method: Method::HEAD, range: None, ..call.clone() };
        let answer = match self.request(via, link, &head).await {
            Ok(request) => link.client.call(&request).await,
            Err(error) => Err(error),
        };
        let error = match answer {
            Ok(answer) if answer.status().is_success() && is_page(answer.headers()) => {
                return Err(link.odd("answers with a web page"));
            }
            Ok(answer) if answer.status().is_success() => return Ok(length(answer.headers())),
            Ok(answer) if is_redirect(answer.status()) => return Ok(None),
            Ok(answer) => link.client.refusal(&Method::HEAD, answer).await,
            Err(error) => error,
        };
        match error.status().map(|status| status.as_u16()) {
            // Stores refuse HEAD with a signature made for GET; whether it is the caller who is refused, GET tells.
            Some(400 | 403 | 405 | 406 | 501) => Ok(None),
            _ => Err(self.failed(via, link, call.path, UpstreamError::of(&link.name, error))),
        }
    }

    /// Asks for a part; none if the answer does not tell how large the whole is.
    async fn part(&self, via: Via, call: &Call<'_>, range: Range<u64>) -> Result<Option<Probed>, UpstreamError> {
        let part = Call { method: Method::GET, range: Some(range), ..call.clone() };
        let answer = self.send(via, &part).await?;
        let size = match answer.status {
            _ if is_page(&answer.headers) => {
                return Err(self.link(via, call.registry)?.odd("answers with a web page"));
            }
            StatusCode::PARTIAL_CONTENT => content_range(&answer.headers).and_then(|(_, total)| total),
            StatusCode::OK => length(&answer.headers),
            _ => None,
        };
        Ok(size.map(|size| Probed { size, opened: Some((via, answer)) }))
    }

    /// Returns the next bytes of a body, or none at its end.
    pub(super) async fn next(&self, answer: &mut Answer) -> Result<Option<Bytes>, UpstreamError> {
        let link = self.link(answer.via, &answer.registry)?;
        match answer.body.next().await {
            Ok(Some(bytes)) => {
                self.metrics.bytes.get_or_create(&answer.via.label()).inc_by(bytes.len() as u64);
                Ok(Some(bytes))
            }
            Ok(None) => Ok(None),
            Err(error) => {
                let error = UpstreamError::of(&link.name, error.into());
                link.note(&error, &answer.path);
                Err(error)
            }
        }
    }

    fn failed(&self, via: Via, link: &Link, path: &str, error: UpstreamError) -> UpstreamError {
        self.metrics.upstream_errors.get_or_create(&via.label()).inc();
        link.note(&error, path);
        error
    }

    fn link(&self, via: Via, registry: &str) -> Result<&Link, UpstreamError> {
        let link = match via {
            Via::Mirror(number) => self.mirrors.get(number),
            Via::Registry => self.registries.get(registry),
        };
        link.ok_or_else(|| UpstreamError::Odd { by: registry.to_owned(), reason: "is not configured".into() })
    }
}

impl Account {
    fn credential(&self) -> std::io::Result<Credential> {
        let text = std::fs::read_to_string(&self.password_file)?;
        let password = text.lines().next().unwrap_or_default().to_owned();
        Ok(Credential::Basic { user: self.username.clone(), password })
    }
}
