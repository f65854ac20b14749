//! The sources of one repository: its mirrors or its proxy, and the registry itself.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::HeaderValue;
use reqwest::Url;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::health::Health;
use super::renewal::Renewal;
use super::source::{Common, Kind, Source};
use super::{Avoid, RouteOptions, SourceError};
use crate::config::{Mirror, Proxy as ProxyConfig, Registry};
use crate::credentials::Credential;
use crate::http::{Proxy, Timeouts, Tls};
use crate::registry::{Client, ClientOptions, RegistryError, Scheme, headers, lock};

/// The registry is probed as often as mirrors are by default.
const ORIGIN_INTERVAL: Duration = Duration::from_secs(5);
/// Failures in a row after which the registry is called down.
const ORIGIN_LIMIT: u32 = 3;
/// Without reads for so long, the registry is not probed.
const ORIGIN_PAUSE: Duration = Duration::from_secs(300);

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
