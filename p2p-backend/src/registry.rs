//! The verbs of the OCI distribution protocol that Shoal uses.
//!
//! A [`Client`] speaks to one host. Repositories are arguments, because one host serves many and they share
//! connections, the token service and what we learned about it. A mirror is a client as well: it has its own
//! address and headers, and the identity of the registry that it stands for.
//!
//! Every request goes the same way (`Client::call`): with the header that worked last time for this
//! repository; on a 401 the challenge is answered and the request repeated, at most twice. Redirects are
//! followed only where a verb allows it, and `Authorization` goes to the same scheme, host and port only.

mod auth;
mod blob;
mod manifest;
mod push;
mod reference;
mod token;

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::{AUTHORIZATION, LOCATION, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use reqwest::{Request, Response, Url};
use tokio::sync::OnceCell;

pub use auth::{Challenge, challenges};
pub use blob::{BlobRequest, BlobStream};
pub use manifest::{MAX_MANIFEST, Manifest};
pub use push::{Mounted, Upload};
pub use reference::{InvalidReference, Reference, host_of};

use crate::credentials::Credential;
use crate::http::{Http, HttpError, Pools, Proxy, Timeouts, Tls, is_loopback, loggable};
use token::{Identity, TokenKey};

/// Redirects followed for one request; S3 in front of a CDN needs two, so ten is a loop.
const MAX_HOPS: usize = 10;
/// Bytes of an error's body that are kept to explain it.
const MAX_EXPLANATION: usize = 2048;
/// Repositories and redirect targets remembered per client before the memory starts anew.
const MAX_REMEMBERED: usize = 4096;

/// How a registry is spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Scheme {
    /// TLS, always.
    #[default]
    Https,
    /// Plain text.
    Http,
    /// Plain text for loopback hosts that do not speak TLS, and TLS for everybody else.
    ///
    /// With [`Tls::skip_verify`] and no credential, a host that turns out not to speak TLS is also spoken to
    /// in plain text. With a credential it is not: that would show the credential to the whole path.
    Auto,
}

/// How to make a [`Client`].
#[derive(Debug, Clone, Default)]
pub struct ClientOptions {
    /// TLS or plain text.
    pub scheme: Scheme,
    /// Whose certificates are believed.
    pub tls: Tls,
    /// How long the host may be silent.
    pub timeouts: Timeouts,
    /// Which proxy requests go through. Requests to the token service never use [`Proxy::Url`].
    pub proxy: Proxy,
    /// Who we are.
    pub credential: Credential,
    /// Sent with every request to this host.
    pub headers: HeaderMap,
    /// Replaces the scheme of redirects of blobs (`http` or `https`).
    pub blob_url_scheme: Option<String>,
    /// Replaces host and port of redirects of blobs.
    pub blob_redirected_host: Option<String>,
    /// Counts what this client does; may be shared by several.
    pub traffic: Arc<Traffic>,
    /// Where connections are taken from; clients that are given the same pools share them.
    pub pools: Pools,
}

/// What went over the wire.
#[derive(Debug, Default)]
pub struct Traffic {
    requests: AtomicU64,
    bytes: AtomicU64,
}

impl Traffic {
    /// Requests sent, including those for tokens and those answered with an error.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Bytes of blob bodies received, including those thrown away.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn count_request(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn count_bytes(&self, bytes: usize) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// An answer that is not what was asked for.
#[derive(Debug, Clone)]
pub struct Refusal {
    /// What was asked.
    pub method: Method,
    /// Of whom, without query and user.
    pub url: String,
    /// What came back.
    pub status: StatusCode,
    /// How long to wait before asking again, if the answer says so.
    pub retry_after: Option<Duration>,
    /// The challenges, as they came.
    pub challenges: Vec<HeaderValue>,
    /// `X-Dragonfly-Error-Type: proxy`: the mirror failed, not the registry behind it.
    pub by_mirror: bool,
    /// The beginning of the body.
    pub body: Bytes,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} was answered with {}", self.method, self.url, self.status)?;
        if let Some(wait) = self.retry_after {
            write!(f, ", ask again in {} s", wait.as_secs())?;
        }
        #[derive(serde::Deserialize)]
        struct Errors {
            errors: Vec<Explanation>,
        }
        #[derive(serde::Deserialize)]
        struct Explanation {
            #[serde(default)]
            code: String,
            #[serde(default)]
            message: String,
        }
        match serde_json::from_slice::<Errors>(&self.body) {
            Ok(Errors { errors }) => {
                errors.iter().try_for_each(|Explanation { code, message }| write!(f, " ({code}: {message})"))
            }
            Err(_) => {
                // One line of text explains; markup does not.
                let text = String::from_utf8_lossy(&self.body);
                match text.lines().next().map(str::trim) {
                    Some(line) if !line.is_empty() && !line.starts_with('<') => {
                        write!(f, " ({})", line.chars().take(200).collect::<String>().escape_debug())
                    }
                    _ => Ok(()),
                }
            }
        }
    }
}

/// Why a registry did not do what it was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RegistryError {
    /// There was no complete answer.
    #[error(transparent)]
    Http(#[from] HttpError),
    /// The answer was no.
    #[error("{0}")]
    Refused(Box<Refusal>),
    /// The token service did not give a token.
    #[error("no token from {realm}: {source}")]
    Token {
        /// The URL of the token service.
        realm: String,
        /// Why.
        source: Box<RegistryError>,
    },
    /// A name cannot be put into a URL.
    #[error("`{0}` is not the name of a host, repository, tag or digest")]
    Name(String),
    /// The credential would travel in plain text.
    #[error(
        "{to} is asked for in plain HTTP, and the credential is not sent there: use https, or plain HTTP explicitly"
    )]
    WouldLeak {
        /// Where it would have gone.
        to: String,
    },
    /// A redirect leads nowhere.
    #[error("{url} redirects {reason}")]
    Redirect {
        /// Who redirects.
        url: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The answer has another form than the request.
    #[error("{url} answered {reason}")]
    Form {
        /// Who answered.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The answer ends before what was asked for.
    #[error("{url} has {have} bytes where {want} are wanted")]
    Short {
        /// Who answered.
        url: String,
        /// Bytes wanted.
        want: u64,
        /// Bytes there.
        have: u64,
    },
    /// The bytes are not those that the digest names.
    #[error("{url} has the digest {have}, not {want}")]
    Digest {
        /// Who answered.
        url: String,
        /// The digest asked for.
        want: String,
        /// The digest of the answer.
        have: String,
    },
    /// The body to be sent could not be read.
    #[error("could not read what is to be sent: {0}")]
    Source(String),
}

impl RegistryError {
    /// Returns the status of the answer, if there was one. A token service's counts as well.
    pub fn status(&self) -> Option<StatusCode> {
        match self {
            Self::Refused(refusal) => Some(refusal.status),
            Self::Token { source, .. } => source.status(),
            _ => None,
        }
    }

    /// Returns how long to wait before the next attempt, if the answer says so.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Refused(refusal) => refusal.retry_after,
            Self::Token { source, .. } => source.retry_after(),
            _ => None,
        }
    }

    /// Tells whether the same request may succeed a little later.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Http(HttpError::Certificates { .. } | HttpError::Untrusted { .. } | HttpError::Client(_)) => false,
            Self::Http(_) | Self::Short { .. } | Self::Form { .. } | Self::Digest { .. } => true,
            Self::Refused(refusal) => {
                refusal.status.is_server_error()
                    || matches!(refusal.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT)
            }
            Self::Token { source, .. } => source.is_transient(),
            Self::Name(_) | Self::WouldLeak { .. } | Self::Redirect { .. } | Self::Source(_) => false,
        }
    }
}

/// What a request wants to do with a repository; decides the scope of the token.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Access {
    Pull,
    Push,
    /// Push, with blobs taken from this other repository.
    Mount(String),
}

impl Access {
    fn scopes(&self, repository: &str) -> Vec<String> {
        match self {
            Self::Pull => vec![format!("repository:{repository}:pull")],
            Self::Push => vec![format!("repository:{repository}:pull,push")],
            Self::Mount(from) => {
                vec![format!("repository:{repository}:pull,push"), format!("repository:{from}:pull")]
            }
        }
    }
}

/// One request before it is authorised.
pub(crate) struct Call<'c> {
    pub(crate) method: Method,
    pub(crate) url: Url,
    pub(crate) repository: &'c str,
    pub(crate) access: Access,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Option<Bytes>,
    /// The caller's own proof; if it is there ours is neither used nor shown.
    pub(crate) authorization: Option<HeaderValue>,
}

impl<'c> Call<'c> {
    pub(crate) fn new(method: Method, url: Url, repository: &'c str, access: Access) -> Self {
        Self { method, url, repository, access, headers: HeaderMap::new(), body: None, authorization: None }
    }
}

/// What a registry wanted last time.
#[derive(Debug, Clone)]
enum Wanted {
    Basic,
    Token(TokenKey),
}

/// A handle on one registry or mirror. Cheap to clone; opens no connection until it is used.
#[derive(Clone)]
pub struct Client(Arc<Inner>);

struct Inner {
    host: String,
    scheme: Scheme,
    base: OnceCell<Url>,
    http: Http,
    headers: HeaderMap,
    identity: Arc<Identity>,
    wanted: Mutex<HashMap<(String, Access), Wanted>>,
    targets: blob::Targets,
    blob_url_scheme: Option<String>,
    blob_redirected_host: Option<String>,
    traffic: Arc<Traffic>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("host", &self.0.host).field("scheme", &self.0.scheme).finish_non_exhaustive()
    }
}

/// Where a proof came from, so that a refusal can be attributed.
enum Proof {
    None,
    Given(HeaderValue),
    Basic(HeaderValue),
    Token(HeaderValue, TokenKey, String),
    Static(HeaderValue),
}

impl Proof {
    fn header(&self) -> Option<&HeaderValue> {
        match self {
            Self::None => None,
            Self::Given(value) | Self::Basic(value) | Self::Token(value, ..) | Self::Static(value) => Some(value),
        }
    }
}

impl Client {
    /// Makes a client for `host`, which is `name[:port]`. Opens no connection.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Name`] if `host` cannot be one, and [`RegistryError::Http`] if certificates or proxy
    /// cannot be used.
    pub fn new(host: &str, options: ClientOptions) -> Result<Self, RegistryError> {
        let host = host_of(host);
        let token_proxy = match &options.proxy {
            Proxy::Url(_) => Proxy::Direct,
            other => other.clone(),
        };
        let http = options.pools.get(options.tls.clone(), options.timeouts, options.proxy.clone())?;
        let token_http = if token_proxy == options.proxy {
            http.clone()
        } else {
            options.pools.get(options.tls.clone(), options.timeouts, token_proxy)?
        };
        let identity = Identity::new(
            token_http,
            options.credential.clone(),
            Arc::clone(&options.traffic),
            options.scheme != Scheme::Http,
        );
        Self::assemble(host, http, Arc::new(identity), options)
    }

    /// Makes a client for the registry of an image.
    ///
    /// # Errors
    ///
    /// As [`Client::new`].
    pub fn for_reference(reference: &Reference, options: ClientOptions) -> Result<Self, RegistryError> {
        Self::new(reference.host(), options)
    }

    /// Makes a client for a mirror of this registry: `options.credential` is ignored, for the mirror is shown
    /// what the registry would be shown, and challenges that it relays are answered by the same token service.
    ///
    /// # Errors
    ///
    /// As [`Client::new`].
    pub fn mirror(&self, host: &str, options: ClientOptions) -> Result<Self, RegistryError> {
        let http = options.pools.get(options.tls.clone(), options.timeouts, options.proxy.clone())?;
        Self::assemble(host, http, Arc::clone(&self.0.identity), options)
    }

    fn assemble(
        host: &str,
        http: Http,
        identity: Arc<Identity>,
        options: ClientOptions,
    ) -> Result<Self, RegistryError> {
        // Checked now, so that a bad name is found when the configuration is read.
        base_url("https", host)?;
        Ok(Self(Arc::new(Inner {
            host: host.to_owned(),
            scheme: options.scheme,
            base: OnceCell::new(),
            http,
            headers: options.headers,
            identity,
            wanted: Mutex::default(),
            targets: blob::Targets::default(),
            blob_url_scheme: options.blob_url_scheme.filter(|text| !text.is_empty()),
            blob_redirected_host: options.blob_redirected_host.filter(|text| !text.is_empty()),
            traffic: options.traffic,
        })))
    }

    /// Returns the host (and port) that this client speaks to.
    pub fn host(&self) -> &str {
        &self.0.host
    }

    /// Returns the counters of this client.
    pub fn traffic(&self) -> &Arc<Traffic> {
        &self.0.traffic
    }

    /// Returns the pool of connections, for requests that are not of the protocol.
    pub fn http(&self) -> &Http {
        &self.0.http
    }

    /// Replaces the credential, here and in all clones and mirrors; tokens got with the old one are forgotten.
    pub fn set_credential(&self, credential: Credential) {
        self.0.identity.replace(credential);
        self.forget();
    }

    /// Tells whether this is the credential in use.
    pub(crate) fn shows(&self, credential: &Credential) -> bool {
        self.0.identity.is(credential)
    }

    /// Forgets what this client learned with an earlier credential.
    pub(crate) fn forget(&self) {
        lock(&self.0.wanted).clear();
        self.0.targets.clear();
    }

    /// Asks `GET /v2/`: proves that the registry is there and that our credential is not refused.
    ///
    /// # Errors
    ///
    /// [`RegistryError`] if it is not there or refuses.
    pub async fn ping(&self) -> Result<(), RegistryError> {
        let url = self.url("v2/").await?;
        let mut call = Call::new(Method::GET, url, "", Access::Pull);
        call.headers = HeaderMap::new();
        let response = self.call(&call).await?;
        self.expect(&Method::GET, response, &[StatusCode::OK]).await.map(drop)
    }

    /// Returns the address of `path`, finding out about TLS first where that is left to us.
    pub(crate) async fn url(&self, path: &str) -> Result<Url, RegistryError> {
        let base = self.0.base.get_or_try_init(|| self.find_base()).await?;
        base.join(path).map_err(|_| RegistryError::Name(path.to_owned()))
    }

    async fn find_base(&self) -> Result<Url, RegistryError> {
        let (https, plain) = (base_url("https", &self.0.host)?, base_url("http", &self.0.host)?);
        match self.0.scheme {
            Scheme::Https => Ok(https),
            Scheme::Http => Ok(plain),
            Scheme::Auto if is_loopback(&plain) => {
                if self.speaks_plain(&plain).await? {
                    Ok(plain)
                } else {
                    Ok(https)
                }
            }
            Scheme::Auto if !self.0.http.skips_verification() => Ok(https),
            Scheme::Auto => {
                let probe = Request::new(Method::GET, join(&https, "v2/")?);
                self.0.traffic.count_request();
                match self.0.http.send(probe).await {
                    Ok(_) => Ok(https),
                    Err(_) if !self.speaks_plain(&plain).await.unwrap_or(false) => Ok(https),
                    Err(_) if self.0.identity.is(&Credential::Anonymous) => Ok(plain),
                    Err(_) => Err(RegistryError::WouldLeak { to: self.0.host.clone() }),
                }
            }
        }
    }

    /// Tells whether the host answers in plain HTTP. Carries no credential, so asking harms nobody.
    async fn speaks_plain(&self, plain: &Url) -> Result<bool, RegistryError> {
        self.0.traffic.count_request();
        let mut probe = Request::new(Method::GET, join(plain, "v2/")?);
        *probe.headers_mut() = self.0.headers.clone();
        match self.0.http.send(probe).await {
            // Go and nginx tell a plain request on a TLS port with 400 and a sentence.
            Ok(response) if response.status() == StatusCode::BAD_REQUEST => {
                let (body, _) = self.0.http.body(response).beginning(MAX_EXPLANATION).await;
                Ok(!String::from_utf8_lossy(&body).contains("HTTPS"))
            }
            Ok(_) => Ok(true),
            Err(error @ (HttpError::Connect { .. } | HttpError::Silent { .. })) => Err(error.into()),
            // Others hang up on what is no TLS.
            Err(_) => Ok(false),
        }
    }

    /// Sends a request with what proves that we may, and answers challenges. Returns any answer but a 401.
    pub(crate) async fn call(&self, call: &Call<'_>) -> Result<Response, RegistryError> {
        let mut bare = false;
        for last in [false, false, true] {
            let proof = if bare { Proof::None } else { self.proof(call).await? };
            let response = self.send_once(call, proof.header()).await?;
            if response.status() != StatusCode::UNAUTHORIZED {
                return Ok(response);
            }
            let offered = challenges(response.headers());
            let key = (call.repository.to_owned(), call.access.clone());
            // Forget what was refused, whether or not there is another attempt.
            match &proof {
                Proof::None | Proof::Given(_) | Proof::Basic(_) => {}
                Proof::Static(value) => self.0.identity.refuse_static(value),
                Proof::Token(_, key, text) => self.0.identity.refuse(key, text),
            }
            // The same password a second time would only bring us closer to a locked account.
            let hopeless = last || matches!(proof, Proof::Given(_) | Proof::Basic(_));
            if hopeless {
                if !matches!(proof, Proof::Given(_)) {
                    lock(&self.0.wanted).remove(&key);
                }
                return Err(self.refusal(&call.method, response).await);
            }
            match self.choose(&offered, call) {
                Some(wanted) => {
                    let mut all = lock(&self.0.wanted);
                    if all.len() >= MAX_REMEMBERED {
                        all.clear();
                    }
                    all.insert(key, wanted);
                    bare = false;
                }
                // Some registries refuse a stale token without saying what they want: ask with empty hands.
                None if proof.header().is_some() => {
                    lock(&self.0.wanted).remove(&key);
                    bare = true;
                }
                None => return Err(self.refusal(&call.method, response).await),
            }
        }
        unreachable!("the third attempt returns in every branch")
    }

    async fn send_once(&self, call: &Call<'_>, proof: Option<&HeaderValue>) -> Result<Response, RegistryError> {
        let mut request = Request::new(call.method.clone(), call.url.clone());
        let headers = request.headers_mut();
        headers.extend(self.0.headers.clone());
        headers.extend(call.headers.clone());
        if let Some(proof) = proof {
            headers.insert(AUTHORIZATION, proof.clone());
        }
        *request.body_mut() = call.body.clone().map(Into::into);
        self.0.traffic.count_request();
        Ok(self.0.http.send(request).await?)
    }

    async fn proof(&self, call: &Call<'_>) -> Result<Proof, RegistryError> {
        if let Some(given) = &call.authorization {
            return Ok(Proof::Given(given.clone()));
        }
        if let Some(value) = self.0.identity.static_bearer() {
            return Ok(Proof::Static(value));
        }
        let wanted = lock(&self.0.wanted).get(&(call.repository.to_owned(), call.access.clone())).cloned();
        match wanted {
            None => Ok(Proof::None),
            Some(Wanted::Basic) => Ok(self.0.identity.basic().map_or(Proof::None, Proof::Basic)),
            Some(Wanted::Token(key)) => {
                let text = self.0.identity.token(&key).await?;
                let value = secret(&format!("Bearer {text}"))?;
                Ok(Proof::Token(value, key, text))
            }
        }
    }

    /// Picks a challenge that we can answer; tokens first, for they show the password to fewer hosts.
    fn choose(&self, offered: &[Challenge], call: &Call<'_>) -> Option<Wanted> {
        let bearer = offered.iter().find_map(|challenge| match challenge {
            Challenge::Bearer { realm, service, scope } => {
                let realm = call.url.join(realm).ok()?;
                let own = if call.repository.is_empty() { Vec::new() } else { call.access.scopes(call.repository) };
                let mut scopes: Vec<String> =
                    scope.iter().flat_map(|text| text.split_ascii_whitespace()).map(str::to_owned).collect();
                // A pull is described well by the registry; what a push will need next, it cannot know.
                if scopes.is_empty() || call.access != Access::Pull {
                    scopes.extend(own);
                }
                scopes.sort_unstable();
                scopes.dedup();
                Some(Wanted::Token(TokenKey {
                    realm,
                    service: service.clone(),
                    scopes,
                    from_tls: call.url.scheme() == "https",
                }))
            }
            Challenge::Basic => None,
        });
        bearer.or_else(|| {
            let basic = offered.contains(&Challenge::Basic) && self.0.identity.basic().is_some();
            basic.then_some(Wanted::Basic)
        })
    }

    /// Turns an answer that is not wanted into an error.
    pub(crate) async fn refusal(&self, method: &Method, response: Response) -> RegistryError {
        let url = loggable(response.url());
        let status = response.status();
        let headers = response.headers();
        let challenges = headers.get_all(WWW_AUTHENTICATE).iter().cloned().collect();
        let retry_after = retry_after(headers, SystemTime::now());
        let by_mirror = headers.get("x-dragonfly-error-type").is_some_and(|value| value == "proxy");
        let (body, _) = match *method {
            Method::HEAD => (Bytes::new(), true),
            _ => self.0.http.body(response).beginning(MAX_EXPLANATION).await,
        };
        RegistryError::Refused(Box::new(Refusal {
            method: method.clone(),
            url,
            status,
            retry_after,
            challenges,
            by_mirror,
            body,
        }))
    }

    /// Passes the answer on if its status is one of `wanted`.
    pub(crate) async fn expect(
        &self,
        method: &Method,
        response: Response,
        wanted: &[StatusCode],
    ) -> Result<Response, RegistryError> {
        if wanted.contains(&response.status()) { Ok(response) } else { Err(self.refusal(method, response).await) }
    }

    /// Follows redirects of `response` until something else comes, and returns that.
    ///
    /// `Authorization` (of `call`) goes along only as long as scheme, host and port stay the same.
    pub(crate) async fn follow(&self, call: &Call<'_>, mut response: Response) -> Result<Response, RegistryError> {
        for _ in 0..MAX_HOPS {
            if !is_redirect(response.status()) {
                return Ok(response);
            }
            let next = self.next_hop(&response)?;
            response = if next.origin() == call.url.origin() {
                let again = Call {
                    method: call.method.clone(),
                    url: next,
                    repository: call.repository,
                    access: call.access.clone(),
                    headers: call.headers.clone(),
                    body: None,
                    authorization: call.authorization.clone(),
                };
                self.call(&again).await?
            } else {
                self.send_elsewhere(call, next).await?
            };
        }
        Err(RegistryError::Redirect { url: loggable(&call.url), reason: "in a circle, or too often" })
    }

    /// Sends `call` to a host that is not ours: without proof and without the headers meant for ours.
    pub(crate) async fn send_elsewhere(&self, call: &Call<'_>, url: Url) -> Result<Response, RegistryError> {
        let mut request = Request::new(call.method.clone(), url);
        *request.headers_mut() = call.headers.clone();
        request.headers_mut().remove(AUTHORIZATION);
        self.0.traffic.count_request();
        Ok(self.0.http.send(request).await?)
    }

    fn next_hop(&self, response: &Response) -> Result<Url, RegistryError> {
        let wrong = |reason| RegistryError::Redirect { url: loggable(response.url()), reason };
        let location = response.headers().get(LOCATION).ok_or_else(|| wrong("without saying where"))?;
        let location = std::str::from_utf8(location.as_bytes()).map_err(|_| wrong("to what is no text"))?;
        let mut next = response.url().join(location).map_err(|_| wrong("to what is no URL"))?;
        if !matches!(next.scheme(), "http" | "https") || next.host().is_none() {
            return Err(wrong("to what is not HTTP"));
        }
        if let Some(scheme) = &self.0.blob_url_scheme {
            next.set_scheme(scheme).map_err(|()| wrong("to where `blob_url_scheme` cannot be used"))?;
        }
        if let Some(host) = &self.0.blob_redirected_host {
            let other = base_url(next.scheme(), host)?;
            next.set_host(other.host_str()).map_err(|_| wrong("to where `blob_redirected_host` cannot be used"))?;
            next.set_port(other.port()).map_err(|()| wrong("to where `blob_redirected_host` cannot be used"))?;
        }
        Ok(next)
    }
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

fn base_url(scheme: &str, host: &str) -> Result<Url, RegistryError> {
    let odd = |character: char| character.is_whitespace() || matches!(character, '/' | '?' | '#' | '@' | '\\');
    if host.is_empty() || host.contains(odd) {
        return Err(RegistryError::Name(host.to_owned()));
    }
    Url::parse(&format!("{scheme}://{host}/")).map_err(|_| RegistryError::Name(host.to_owned()))
}

fn join(base: &Url, path: &str) -> Result<Url, RegistryError> {
    base.join(path).map_err(|_| RegistryError::Name(path.to_owned()))
}

/// Checks a repository, tag or digest, so that it stays the part of a URL that it is meant to be.
pub(crate) fn name(text: &str) -> Result<&str, RegistryError> {
    let fits = |part: &str| {
        !part.is_empty()
            && part != "."
            && part != ".."
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-:+".contains(&byte))
    };
    if text.split('/').all(fits) { Ok(text) } else { Err(RegistryError::Name(text.to_owned())) }
}

/// Makes a header value that is never logged.
fn secret(text: &str) -> Result<HeaderValue, RegistryError> {
    let mut value = HeaderValue::from_str(text).map_err(|_| RegistryError::Name("a credential".to_owned()))?;
    value.set_sensitive(true);
    Ok(value)
}

/// Reads `Retry-After`, which is a number of seconds or a date.
pub(crate) fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    match text.parse::<u64>() {
        // A day is as good as for ever.
        Ok(seconds) => Some(Duration::from_secs(seconds.min(86_400))),
        Err(_) => {
            let date = httpdate::parse_http_date(text).ok()?;
            Some(date.duration_since(now).unwrap_or_default().min(Duration::from_secs(86_400)))
        }
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // What these mutexes guard is whole between any two statements, so a panic elsewhere spoils nothing.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Turns `name: value` pairs of a configuration into headers.
///
/// # Errors
///
/// Returns the name of the first pair that cannot be a header.
pub fn headers<'h>(pairs: impl IntoIterator<Item = (&'h String, &'h String)>) -> Result<HeaderMap, String> {
    let mut map = HeaderMap::new();
    for (name, value) in pairs {
        let (Ok(key), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) else {
            return Err(name.clone());
        };
        map.insert(key, value);
    }
    Ok(map)
}
