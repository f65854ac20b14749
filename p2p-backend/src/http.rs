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
//! A name may have several addresses, and the first may be dead. Addresses are tried in the order in which the
//! resolver gives them, which is another one for each connection (`Turning`), so a repeated request gets on.
//!
//! A pooled connection may have died while it was idle, which shows only when the next request is written
//! to it. Such a request is repeated at once, on a connection that is certainly new, and nobody counts it.

use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::{Certificate, Method, Request, Response, Url};

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

/// Why there was no answer, or not all of it.
#[derive(Clone, thiserror::Error)]
pub enum HttpError {
    /// A file with certificates cannot be used.
    #[error("could not use the certificates in {}: {reason}", path.display())]
    Certificates {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A client cannot be made from the options.
    #[error("could not prepare an HTTP client: {0}")]
    Client(String),
    /// No connection: refused, unreachable, no such name, or TLS failed.
    #[error("could not connect to {host}: {reason}")]
    Connect {
        /// Host and port.
        host: String,
        /// The innermost reason.
        reason: String,
        /// It took the whole time limit to find out.
        slow: bool,
    },
    /// The certificate of the host is not believed.
    #[error("the certificate of {host} is not trusted: {reason}")]
    Untrusted {
        /// Host and port.
        host: String,
        /// What is wrong with it.
        reason: String,
    },
    /// No head of an answer in time.
    #[error("{host} did not answer within {} s", limit.as_secs_f32())]
    Silent {
        /// Host and port.
        host: String,
        /// The limit that ran out.
        limit: Duration,
    },
    /// The body stopped moving.
    #[error("{host} sent nothing for {} s in the middle of a body", limit.as_secs_f32())]
    Stalled {
        /// Host and port.
        host: String,
        /// The limit that ran out.
        limit: Duration,
    },
    /// The connection broke.
    #[error("the connection to {host} broke: {reason}")]
    Broken {
        /// Host and port.
        host: String,
        /// The innermost reason.
        reason: String,
    },
}

impl fmt::Debug for HttpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The pools of connections of a program, one for each set of options in use. Cheap to clone.
#[derive(Clone, Default)]
pub struct Pools(Arc<Mutex<HashMap<PoolKey, Weak<Inner>>>>);

/// The contents of certificate files are part of it: a renewed file is a new pool.
type PoolKey = (Tls, Timeouts, Proxy, Vec<Vec<u8>>);

impl fmt::Debug for Pools {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pools").finish_non_exhaustive()
    }
}

impl Pools {
    /// Returns the pool with these options, which is made if nobody holds it. Opens no connection; certificate
    /// files are read now.
    ///
    /// # Errors
    ///
    /// [`HttpError::Certificates`] if a file of `tls` cannot be read or holds no certificate, and
    /// [`HttpError::Client`] if the proxy's URL is none.
    pub fn get(&self, tls: Tls, timeouts: Timeouts, proxy: Proxy) -> Result<Http, HttpError> {
        let mut contents = Vec::new();
        for path in &tls.ca_cert_files {
            let unread =
                |error: std::io::Error| HttpError::Certificates { path: path.clone(), reason: error.to_string() };
            contents.push(std::fs::read(path).map_err(unread)?);
        }
        let key = (tls, timeouts, proxy, contents);
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pool) = all.get(&key).and_then(Weak::upgrade) {
            return Ok(Http(pool));
        }
        let (tls, timeouts, proxy, contents) = key.clone();
        let http = Http::new(tls, timeouts, proxy, &contents)?;
        all.retain(|_, pool| pool.strong_count() > 0);
        all.insert(key, Arc::downgrade(&http.0));
        Ok(http)
    }
}

/// A pool of connections with one set of options. Cheap to clone.
#[derive(Clone)]
pub struct Http(Arc<Inner>);

struct Inner {
    tls: Tls,
    proxy: Proxy,
    timeouts: Timeouts,
    certificates: Vec<Certificate>,
    clients: [OnceLock<reqwest::Client>; 4],
}

/// How a client differs from its sisters; the value indexes [`Inner::clients`].
#[derive(Clone, Copy)]
enum Kind {
    Direct = 0,
    Proxied = 1,
    DirectFresh = 2,
    ProxiedFresh = 3,
}

impl fmt::Debug for Http {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Http").field("tls", &self.0.tls).field("timeouts", &self.0.timeouts).finish_non_exhaustive()
    }
}

impl Http {
    fn new(tls: Tls, timeouts: Timeouts, proxy: Proxy, contents: &[Vec<u8>]) -> Result<Self, HttpError> {
        // A process has one provider; whoever came first has chosen it, and any will do.
        drop(rustls::crypto::ring::default_provider().install_default());
        let mut certificates = Vec::new();
        for (path, pem) in tls.ca_cert_files.iter().zip(contents) {
            let refuse = |reason: String| HttpError::Certificates { path: path.clone(), reason };
            let found = Certificate::from_pem_bundle(pem).map_err(|error| refuse(innermost(&error)))?;
            if found.is_empty() {
                return Err(refuse("there is no PEM certificate in it".to_owned()));
            }
            certificates.extend(found);
        }
        let http = Self(Arc::new(Inner { tls, proxy, timeouts, certificates, clients: Default::default() }));
        let kind = if http.0.proxy == Proxy::Direct { Kind::Direct } else { Kind::Proxied };
        http.client(kind)?;
        Ok(http)
    }

    /// Returns the limits in force.
    pub fn timeouts(&self) -> Timeouts {
        self.0.timeouts
    }

    /// Tells whether certificates are not verified.
    pub fn skips_verification(&self) -> bool {
        self.0.tls.skip_verify
    }

    /// Sends `request` and returns the head of the answer; the body follows through [`Body`].
    ///
    /// # Errors
    ///
    /// [`HttpError::Connect`], [`HttpError::Silent`] or [`HttpError::Broken`]. Statuses are not errors here.
    pub async fn send(&self, request: Request) -> Result<Response, HttpError> {
        self.send_within(request, self.0.timeouts.first_byte).await
    }

    /// As [`Http::send`], with `limit` instead of the time to the first byte.
    ///
    /// # Errors
    ///
    /// As [`Http::send`].
    pub async fn send_within(&self, request: Request, limit: Duration) -> Result<Response, HttpError> {
        let host = authority(request.url());
        let direct = match self.0.proxy {
            Proxy::Direct => true,
            Proxy::Environment => is_loopback(request.url()),
            Proxy::Url(_) => false,
        };
        let (pooled, fresh) =
            if direct { (Kind::Direct, Kind::DirectFresh) } else { (Kind::Proxied, Kind::ProxiedFresh) };
        let again = match *request.method() {
            Method::GET | Method::HEAD => request.try_clone(),
            _ => None,
        };
        let sending = async {
            let error = match self.client(pooled)?.execute(request).await {
                Ok(response) => return Ok(response),
                Err(error) => self.failure(&host, &error),
            };
            match (again, &error) {
                (Some(again), HttpError::Broken { .. }) => {
                    tracing::debug!(%host, %error, "repeating the request on a new connection");
                    self.client(fresh)?.execute(again).await.map_err(|error| self.failure(&host, &error))
                }
                _ => Err(error),
            }
        };
        match tokio::time::timeout(limit, sending).await {
            Ok(outcome) => outcome,
            Err(_) => Err(HttpError::Silent { host, limit }),
        }
    }

    /// Makes a [`Body`] of an answer, limited by the stall time.
    pub fn body(&self, response: Response) -> Body {
        Body { host: authority(response.url()), stall: self.0.timeouts.stall, response }
    }

    fn failure(&self, host: &str, error: &reqwest::Error) -> HttpError {
        let host = host.to_owned();
        if let Some(reason) = distrust(error) {
            HttpError::Untrusted { host, reason }
        } else if error.is_connect() {
            let slow = error.is_timeout();
            let reason = if slow {
                format!("no connection within {} s", self.0.timeouts.connect.as_secs_f32())
            } else {
                innermost(error)
            };
            HttpError::Connect { host, reason, slow }
        } else {
            HttpError::Broken { host, reason: innermost(error) }
        }
    }

    fn client(&self, kind: Kind) -> Result<&reqwest::Client, HttpError> {
        let cell = &self.0.clients[kind as usize];
        if let Some(client) = cell.get() {
            return Ok(client);
        }
        // Two threads may both build one; the second is dropped, which costs a millisecond once.
        let client = self.build(kind, false).or_else(|error| {
            // A minimal system has no authorities at all, which must not keep plain HTTP from working.
            tracing::debug!(%error, "no certificate authorities of the system; only configured ones count");
            self.build(kind, true)
        })?;
        Ok(cell.get_or_init(|| client))
    }

    fn build(&self, kind: Kind, only_own_roots: bool) -> Result<reqwest::Client, HttpError> {
        let refuse = |error: reqwest::Error| HttpError::Client(innermost(&error));
        let Inner { tls, proxy, timeouts, certificates, .. } = &*self.0;
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("shoal/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .connect_timeout(timeouts.connect)
            .dns_resolver(Arc::new(Turning::default()))
            .tcp_nodelay(true)
            .tcp_keepalive(Duration::from_secs(15))
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
        builder = match (kind, proxy) {
            (Kind::Direct | Kind::DirectFresh, _) | (_, Proxy::Direct) => builder.no_proxy(),
            (_, Proxy::Environment) => builder,
            (_, Proxy::Url(url)) => builder.proxy(reqwest::Proxy::all(url).map_err(refuse)?),
        };
        if matches!(kind, Kind::DirectFresh | Kind::ProxiedFresh) {
            builder = builder.pool_max_idle_per_host(0);
        }
        builder.build().map_err(refuse)
    }
}

/// Resolves names as the system does, and gives the addresses of a family in turn.
#[derive(Debug, Default)]
struct Turning(Arc<AtomicUsize>);

impl Resolve for Turning {
    fn resolve(&self, name: Name) -> Resolving {
        let turn = self.0.fetch_add(1, Ordering::Relaxed);
        Box::pin(async move {
            let found: Vec<_> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            Ok(Box::new(turned(found, turn).into_iter()) as Addrs)
        })
    }
}

/// Turns the addresses of each family. The family that came first stays first: the other one is tried after
/// 300 ms anyway.
fn turned(addresses: Vec<SocketAddr>, turn: usize) -> Vec<SocketAddr> {
    let first_is_v4 = addresses.first().is_some_and(SocketAddr::is_ipv4);
    let (mut first, mut second): (Vec<_>, Vec<_>) =
        addresses.into_iter().partition(|address| address.is_ipv4() == first_is_v4);
    for family in [&mut first, &mut second] {
        if !family.is_empty() {
            let by = turn % family.len();
            family.rotate_left(by);
        }
    }
    first.append(&mut second);
    first
}

/// A body that may not stall.
pub struct Body {
    host: String,
    stall: Duration,
    response: Response,
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Body").field("host", &self.host).finish_non_exhaustive()
    }
}

impl Body {
    /// Returns the next piece, or `None` at the end. Safe to cancel.
    ///
    /// # Errors
    ///
    /// [`HttpError::Stalled`] or [`HttpError::Broken`]; the latter also if the body is shorter than its head said.
    pub async fn next(&mut self) -> Result<Option<Bytes>, HttpError> {
        match tokio::time::timeout(self.stall, self.response.chunk()).await {
            Ok(Ok(piece)) => Ok(piece),
            Ok(Err(error)) => Err(HttpError::Broken { host: self.host.clone(), reason: innermost(&error) }),
            Err(_) => Err(HttpError::Stalled { host: self.host.clone(), limit: self.stall }),
        }
    }

    /// Returns at most the first `limit` bytes, and whether that was all. Errors end it early.
    pub async fn beginning(mut self, limit: usize) -> (Bytes, bool) {
        let mut held = Vec::new();
        while held.len() <= limit {
            match self.next().await {
                Ok(Some(piece)) => held.extend_from_slice(&piece),
                Ok(None) => break,
                Err(_) => return (held.into(), false),
            }
        }
        let whole = held.len() <= limit;
        held.truncate(limit);
        (held.into(), whole)
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

/// Returns the text of the last error in the chain: the others only say that something failed.
fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}

/// Returns what is wrong with the certificate, if that is what an error is about.
fn distrust(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    let mut next = Some(error);
    while let Some(error) = next {
        // An I/O error hides what it wraps from `source`.
        let inner = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        let tls = error.downcast_ref::<rustls::Error>().or(inner.and_then(|inner| inner.downcast_ref()));
        if let Some(rustls::Error::InvalidCertificate(reason)) = tls {
            return Some(format!("{reason:?}"));
        }
        next = match inner {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_take_turns_and_families_do_not() {
        let addresses =
            |texts: &[&str]| -> Vec<SocketAddr> { texts.iter().map(|text| text.parse().unwrap()).collect() };
        let found = addresses(&["[::1]:0", "10.0.0.1:0", "[::2]:0", "10.0.0.2:0", "10.0.0.3:0"]);
        let expected = addresses(&["[::2]:0", "[::1]:0", "10.0.0.2:0", "10.0.0.3:0", "10.0.0.1:0"]);
        assert_eq!(turned(found, 1), expected);
        assert!(turned(Vec::new(), 7).is_empty());
    }

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

    #[test]
    fn equal_options_share_a_pool_while_somebody_holds_it() {
        let pools = Pools::default();
        let get = |proxy: Proxy| pools.get(Tls::default(), Timeouts::MIRROR, proxy).unwrap();
        let first = get(Proxy::Direct);
        assert!(Arc::ptr_eq(&first.0, &get(Proxy::Direct).0));
        assert!(!Arc::ptr_eq(&first.0, &get(Proxy::Environment).0));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ca.pem");
        let with_file =
            || pools.get(Tls { ca_cert_files: vec![path.clone()], ..Tls::default() }, Timeouts::MIRROR, Proxy::Direct);
        assert!(matches!(with_file(), Err(HttpError::Certificates { .. })));
        std::fs::write(&path, "no certificate").unwrap();
        assert!(matches!(with_file(), Err(HttpError::Certificates { .. })));
    }
}
