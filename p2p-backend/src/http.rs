//! HTTP as blob sources need it: pooled connections, and a time limit for every way to be silent.
//!
//! A source may refuse the connection, accept and never answer, or stop in the middle of a body. Each has
//! its own limit in [`Timeouts`]; none of them caps a body that moves, however large it is.
//!
//! Redirects are never followed here: who may see the credentials at the next hop is the caller's decision.
//! Bodies are never decompressed: the digests of blobs are those of the bytes on the wire.
//!
//! Clients with equal options share their connections, if they take them from the same [`Pools`]: a daemon with
//! a thousand images of one registry needs one pool and one copy of the system's certificates.
//!
//! A pooled connection may have died while it was idle, which shows only when the next request is written
//! to it: by a reset, by its end, or by nothing at all until the system gives up on the bytes it sent. Such a request
//! is repeated at once, on a connection that is certainly new, and nobody counts it. Where one died without a word its
//! neighbours are left as well, and so is one that lives and does not answer (`lanes`).

mod body;
mod error;
mod lanes;
mod names;
mod pools;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::client::proxy::matcher::Matcher;
use reqwest::{Certificate, Method, Request, Response, Url};

pub use body::Body;
pub use error::HttpError;
pub use names::Reach;
pub use pools::Pools;

use error::{distrust, innermost, is_unacknowledged};
use lanes::{Kind, Lane, Lanes};
use names::Names;

/// How long a source may be silent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Timeouts {
    /// From the first packet to an established connection, TLS included.
    pub connect: Duration,
    /// From the request to the head of its answer, connecting included.
    pub first_byte: Duration,
    /// Between two pieces of a body.
    pub stall: Duration,
}

impl Timeouts {
    /// The limits for a registry: it may have to look in cold storage, so the first byte gets 10 s.
    pub const REGISTRY: Self =
        Self { connect: Duration::from_secs(3), first_byte: Duration::from_secs(10), stall: Duration::from_secs(10) };
    /// The limits for a mirror: it is near, and there is a registry behind it to turn to, so 5 s.
    pub const MIRROR: Self = Self { first_byte: Duration::from_secs(5), ..Self::REGISTRY };

    /// Returns these limits with `connect` and `first_byte` lowered to what a configuration asks for.
    ///
    /// `None` and zero leave a limit as it is; so does a larger value, because a long timeout in a
    /// configuration was meant for whole transfers and must not make a dead source cost more.
    #[must_use]
    pub fn lowered(self, connect: Option<Duration>, first_byte: Option<Duration>) -> Self {
        let lower = |own: Duration, asked: Option<Duration>| match asked {
            Some(asked) if !asked.is_zero() => own.min(asked),
            _ => own,
        };
        Self { connect: lower(self.connect, connect), first_byte: lower(self.first_byte, first_byte), ..self }
    }
}

impl Default for Timeouts {
    fn default() -> Self {
        Self::REGISTRY
    }
}

/// Whose certificates are believed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Tls {
    /// Believes everybody. For tests and laboratories.
    pub skip_verify: bool,
    /// PEM files with authorities to believe besides those of the system.
    pub ca_cert_files: Vec<PathBuf>,
}

/// Which proxy requests go through.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub enum Proxy {
    /// What `HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY` and `NO_PROXY` say; loopback addresses are reached directly
    /// whatever they say.
    #[default]
    Environment,
    /// None.
    Direct,
    /// This one, for everything. The URL may hold a user and password.
    Url(String),
}

/// What the connections of a pool have in common.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct HttpOptions {
    /// Whose certificates are believed.
    pub tls: Tls,
    /// How long a host may be silent.
    pub timeouts: Timeouts,
    /// Which proxy requests go through.
    pub proxy: Proxy,
    /// Which addresses may be asked.
    pub reach: Reach,
}

/// Returns what the logs of registries call us: the program, so that the mirror can be told from its callers, and its version.
fn agent() -> String {
    let program = std::env::current_exe().ok().and_then(|path| Some(path.file_name()?.to_str()?.to_owned()));
    let program = program.filter(|name| name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-'));
    format!("{}/{}", program.as_deref().unwrap_or("shoal"), env!("CARGO_PKG_VERSION"))
}

/// A pool of connections with one set of options. Cheap to clone.
#[derive(Clone)]
pub struct Http(Arc<Inner>);

struct Inner {
    options: HttpOptions,
    certificates: Vec<Certificate>,
    lanes: Arc<Lanes>,
    /// The environment's proxies, to name the one that stands in the way.
    proxies: Matcher,
}

impl fmt::Debug for Http {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Http").field("options", &self.0.options).finish_non_exhaustive()
    }
}

impl Http {
    fn new(options: HttpOptions, contents: &[Vec<u8>]) -> Result<Self, HttpError> {
        // A process has one provider; whoever came first has chosen it, and any will do.
        drop(rustls::crypto::ring::default_provider().install_default());
        let mut certificates = Vec::new();
        for (path, pem) in options.tls.ca_cert_files.iter().zip(contents) {
            let refuse = |reason: String| HttpError::Certificates { path: path.clone(), reason };
            let found = Certificate::from_pem_bundle(pem).map_err(|error| refuse(innermost(&error)))?;
            if found.is_empty() {
                return Err(refuse("there is no PEM certificate in it".to_owned()));
            }
            certificates.extend(found);
        }
        let proxied = options.proxy != Proxy::Direct;
        let proxies = Matcher::from_env();
        let http = Self(Arc::new(Inner { options, certificates, lanes: Arc::default(), proxies }));
        // Now, because what is wrong with the options must be found when they are given.
        http.lane(Kind::of(proxied))?;
        Ok(http)
    }

    /// Returns the limits in force.
    pub fn timeouts(&self) -> Timeouts {
        self.0.options.timeouts
    }

    /// Tells whether certificates are not verified.
    pub fn skips_verification(&self) -> bool {
        self.0.options.tls.skip_verify
    }

    /// Sends `request` and returns the head of the answer; the body follows through [`Body`].
    ///
    /// # Errors
    ///
    /// [`HttpError::Forbidden`], [`HttpError::Connect`], [`HttpError::Untrusted`], [`HttpError::Silent`] or
    /// [`HttpError::Broken`]. Statuses are not errors here.
    pub async fn send(&self, request: Request) -> Result<Response, HttpError> {
        self.send_within(request, self.timeouts().first_byte).await
    }

    /// As [`Http::send`], with `limit` instead of the time to the first byte.
    ///
    /// # Errors
    ///
    /// As [`Http::send`].
    pub async fn send_within(&self, request: Request, limit: Duration) -> Result<Response, HttpError> {
        let url = request.url().clone();
        if !self.0.options.reach.covers_url(&url) {
            return Err(HttpError::Forbidden { host: authority(&url) });
        }
        let kind = Kind::of(match self.0.options.proxy {
            Proxy::Direct => false,
            Proxy::Environment => !is_loopback(&url),
            Proxy::Url(_) => true,
        });
        let again = match *request.method() {
            Method::GET | Method::HEAD => request.try_clone(),
            _ => None,
        };
        let lane = self.lane(kind)?;
        let wait = lane.wait(limit);
        let sending = async {
            let error = match lane.client.execute(request).await {
                Ok(response) => return Ok((response, lane.clone())),
                Err(error) => {
                    if !error.is_connect() && is_unacknowledged(&error) {
                        // Those that were idle beside it were forgotten with it, whatever host they lead to, and each
                        // would cost the same wait.
                        lane.leave();
                    }
                    self.failure(&url, kind, &error)
                }
            };
            match (again, &error) {
                (Some(again), HttpError::Broken { .. }) => {
                    tracing::debug!(host = authority(&url), %error, "repeating the request on a new connection");
                    let fresh = self.lane(kind.fresh())?;
                    let response = fresh.client.execute(again).await;
                    response.map(|response| (response, fresh)).map_err(|error| self.failure(&url, kind, &error))
                }
                _ => Err(error),
            }
        };
        let Ok(outcome) = tokio::time::timeout(limit, sending).await else {
            return Err(HttpError::Silent { host: authority(&url), limit });
        };
        wait.over();
        let (mut response, lane) = outcome?;
        response.extensions_mut().insert(lane);
        Ok(response)
    }

    /// Makes a [`Body`] of an answer, limited by the stall time.
    pub fn body(&self, response: Response) -> Body {
        let lane = response.extensions().get::<Lane>().cloned();
        Body { host: authority(response.url()), stall: self.timeouts().stall, response, lane }
    }

    fn failure(&self, url: &Url, kind: Kind, error: &reqwest::Error) -> HttpError {
        let host = authority(url);
        if let Some(reason) = distrust(error) {
            HttpError::Untrusted { host, reason }
        } else if error.is_connect() {
            let slow = error.is_timeout();
            let reason = if slow {
                format!("no connection within {} s", self.timeouts().connect.as_secs_f32())
            } else {
                innermost(error)
            };
            HttpError::Connect { host, proxy: self.proxy_for(url, kind), reason, slow }
        } else {
            HttpError::Broken { host, reason: innermost(error) }
        }
    }

    /// Returns which proxy a request for `url` goes through, without what is secret in it.
    fn proxy_for(&self, url: &Url, kind: Kind) -> Option<String> {
        match &self.0.options.proxy {
            Proxy::Url(proxy) => Url::parse(proxy).ok().map(|proxy| authority(&proxy)),
            Proxy::Environment if kind.is_proxied() => {
                let proxy = self.0.proxies.intercept(&url.as_str().parse().ok()?)?;
                let port = proxy.uri().port().map(|port| format!(":{port}")).unwrap_or_default();
                Some(format!("{}{port}", proxy.uri().host()?))
            }
            Proxy::Environment | Proxy::Direct => None,
        }
    }

    fn lane(&self, kind: Kind) -> Result<Lane, HttpError> {
        self.0.lanes.get(kind, || {
            self.build(kind, false).or_else(|error| {
                // A minimal system has no authorities at all, which must not keep plain HTTP from working.
                tracing::debug!(%error, "no certificate authorities of the system; only configured ones count");
                self.build(kind, true)
            })
        })
    }

    fn build(&self, kind: Kind, only_own_roots: bool) -> Result<reqwest::Client, HttpError> {
        let refuse = |error: reqwest::Error| HttpError::Client(innermost(&error));
        let Inner { options: HttpOptions { tls, proxy, timeouts, reach }, certificates, .. } = &*self.0;
        let mut builder = reqwest::Client::builder()
            .user_agent(agent())
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .connect_timeout(timeouts.connect)
            .dns_resolver(Arc::new(Names::new(*reach)))
            .tcp_nodelay(true)
            .tcp_keepalive(Duration::from_secs(15))
            // A connection that vanished on the way must be known for dead while there is time to ask on another.
            .tcp_user_timeout(timeouts.stall / 3)
            // Below the 60 s after which load balancers forget idle connections without a word.
            .pool_idle_timeout(Duration::from_secs(45))
            .http2_initial_stream_window_size(4 << 20)
            .http2_initial_connection_window_size(16 << 20)
            .http2_keep_alive_interval(Duration::from_secs(5))
            .http2_keep_alive_timeout(timeouts.stall)
            .tls_danger_accept_invalid_certs(tls.skip_verify);
        builder = if only_own_roots {
            builder.tls_certs_only(certificates.iter().cloned())
        } else if certificates.is_empty() {
            builder
        } else {
            builder.tls_certs_merge(certificates.iter().cloned())
        };
        builder = match proxy {
            _ if !kind.is_proxied() => builder.no_proxy(),
            Proxy::Direct => builder.no_proxy(),
            Proxy::Environment => builder,
            Proxy::Url(url) => builder.proxy(reqwest::Proxy::all(url).map_err(refuse)?),
        };
        if kind == kind.fresh() {
            builder = builder.pool_max_idle_per_host(0);
        }
        builder.build().map_err(refuse)
    }
}

/// Returns `host:port` of `url`, without what is secret in it.
pub(crate) fn authority(url: &Url) -> String {
    match (url.host_str(), url.port()) {
        (Some(host), Some(port)) => format!("{host}:{port}"),
        (Some(host), None) => host.to_owned(),
        (None, _) => url.scheme().to_owned(),
    }
}

/// Returns `url` as it may be logged: queries hold signatures, user parts hold passwords.
pub(crate) fn loggable(url: &Url) -> String {
    format!("{}://{}{}", url.scheme(), authority(url), url.path())
}

/// Tells whether `url` names this machine.
pub(crate) fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(url::Host::Ipv4(address)) => address.is_loopback(),
        Some(url::Host::Ipv6(address)) => address.is_loopback(),
        Some(url::Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_lowers_limits_and_never_raises_them() {
        let seconds = |seconds| Some(Duration::from_secs(seconds));
        let lowered = Timeouts::REGISTRY.lowered(seconds(1), seconds(60));
        assert_eq!(lowered, Timeouts { connect: Duration::from_secs(1), ..Timeouts::REGISTRY });
        assert_eq!(Timeouts::MIRROR.lowered(seconds(0), None), Timeouts::MIRROR);
    }

    #[test]
    fn what_is_logged_of_a_url_holds_no_secret() {
        let url = Url::parse("https://user:hidden@host.example:8443/path?signature=hidden#hidden").unwrap();
        assert_eq!(loggable(&url), "https://host.example:8443/path");
    }
}
