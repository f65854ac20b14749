//! The verbs of the OCI distribution protocol that Shoal uses.
//!
//! A [`Client`] speaks to one host. Repositories are arguments, because one host serves many and they share
//! connections, the token service and what we learned about it. A mirror is a client as well: it has its own
//! address and headers, and the identity of the registry that it stands for.
//!
//! Every request goes the same way: with what proves that it may be made (`call`, `auth`, `token`), along the
//! redirects that its verb allows (`redirect`), and its answer is judged by its head (`head`).

mod auth;
mod blob;
mod call;
mod error;
pub(crate) mod head;
mod manifest;
mod push;
mod redirect;
mod reference;
mod token;

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use reqwest::{Request, Url};
use tokio::sync::OnceCell;

pub use auth::{Challenge, challenges};
pub use blob::{BlobRequest, BlobStream};
pub use error::{Refusal, RegistryError};
pub use manifest::{MAX_MANIFEST, Manifest};
pub use push::{Mounted, Upload};
pub use reference::{InvalidReference, Reference, host_of};

use crate::credentials::Credential;
use crate::http::{Http, HttpError, HttpOptions, Pools, Proxy, Reach, Timeouts, Tls, is_loopback};
pub(crate) use call::{Access, Call, Who};
use call::{MAX_EXPLANATION, Wanted};
#[cfg(feature = "mirror")]
pub(crate) use redirect::is_redirect;
use token::Identity;

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
    /// Which addresses may be asked, also where the host redirects to.
    pub reach: Reach,
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

impl ClientOptions {
    fn http(&self) -> HttpOptions {
        HttpOptions { tls: self.tls.clone(), timeouts: self.timeouts, proxy: self.proxy.clone(), reach: self.reach }
    }
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
        let http = options.pools.get(options.http())?;
        let token_http = if token_proxy == options.proxy {
            http.clone()
        } else {
            options.pools.get(HttpOptions { proxy: token_proxy, ..options.http() })?
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
        let http = options.pools.get(options.http())?;
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

    /// Tells whether the host is spoken to in plain text, finding out where that is left to us.
    ///
    /// # Errors
    ///
    /// [`RegistryError`] if it is not there.
    pub async fn is_plain(&self) -> Result<bool, RegistryError> {
        Ok(self.url("v2/").await?.scheme() == "http")
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
