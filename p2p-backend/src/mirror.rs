//! The mirror of a node: registry requests answered from a cache of pieces, each fetched once.
//!
//! Callers are nydusd (`X-Dragonfly-Registry`), containerd (`?ns=`) and other mirrors. A request is read
//! (`request`), its caller's right is checked (`allow`), and a `reader` takes it through the blob's pieces: those on the
//! disk (`pieces`, `map`, within the `quota`), those on their way (`filling`), and those that a `fetch` gets from the
//! mirrors and registries behind us (`upstream`). Nothing is believed because it is in the cache: what is whole is
//! compared with its digest, and what was there before this process began is compared with its own sums first.

mod allow;
mod answer;
pub mod config;
mod control;
mod driver;
mod fetch;
mod filling;
mod health;
mod ledger;
mod listener;
mod manifests;
mod map;
mod metrics;
mod pace;
mod pieces;
mod quota;
mod range;
mod reader;
mod request;
mod server;
mod upstream;

use std::io::Read as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use axum::extract::Request;
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use axum::{Json, Router};
use http::StatusCode;
use http::header::CONTENT_TYPE;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::node::{Bound, NodeError};

pub use config::{Config, ConfigError};
pub use quota::StoreError;
pub use upstream::PrepareError;

use allow::Rights;
use control::Control;
use driver::Driver;
use fetch::Fetcher;
use health::Health;
use ledger::Ledger;
use listener::Impatient;
use metrics::Metrics;
use pace::Limits;
use quota::Store;
use request::Reception;
use server::Server;
use upstream::Upstream;

/// How often what was learned about rights is written down.
const KEEP: Duration = Duration::from_secs(1);

/// Why the mirror cannot run; completes "could not start the mirror".
#[derive(Debug, thiserror::Error)]
pub enum MirrorError {
    /// An address cannot be listened on.
    #[error("cannot listen on {address} ({key}): {source}; is another nydus-p2p running?")]
    Listen {
        /// The key of the configuration.
        key: &'static str,
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// The cache cannot be opened.
    #[error("cannot open the cache: {0}")]
    Store(#[from] StoreError),
    /// A mirror or registry of the configuration cannot be used.
    #[error("cannot prepare the upstreams: {0}")]
    Upstream(#[from] PrepareError),
    /// It cannot be a node among others.
    #[error("cannot start the swarm: {0}")]
    Node(#[from] NodeError),
    /// The operator cannot speak to it.
    #[error(
        "cannot listen on the operator's socket control.sock in data_dir: {0}; check the directory's owner, its disk, and that its path is shorter than 90 bytes"
    )]
    Control(std::io::Error),
    /// There is no randomness.
    #[error("cannot read /dev/urandom: {0}")]
    Random(std::io::Error),
}

/// A mirror that listens; [`Mirror::run`] makes it answer.
#[derive(Debug)]
pub struct Mirror {
    server: Arc<Server>,
    health: Health,
    listeners: [TcpListener; 3],
    stop: CancellationToken,
    drain: Duration,
    stall: Duration,
    ledger: Ledger,
    swarm: Option<(Arc<Driver>, Bound, Control)>,
}

impl Mirror {
    /// Opens the cache and the listeners. `config` must have been [checked](Config::checked).
    pub async fn open(config: Config) -> Result<Self, MirrorError> {
        let metrics = Arc::new(Metrics::new());
        let (dir, quota, for_store) = (config.data_dir.clone(), config.quota, metrics.clone());
        let store = tokio::task::spawn_blocking(move || Store::open(&dir, quota, for_store)).await;
        let store =
            store.map_err(|join| StoreError::Io { path: config.data_dir.clone(), source: std::io::Error::other(join) });
        let store = store??;
        let (mut secret, mut id) = ([0; 32], [0; 8]);
        let mut random = std::fs::File::open("/dev/urandom").map_err(MirrorError::Random)?;
        random.read_exact(&mut secret).and_then(|()| random.read_exact(&mut id)).map_err(MirrorError::Random)?;
        let id = hex::encode(id);
        let upstream = Upstream::new(&config, id.clone(), metrics.clone())?;
        let stop = CancellationToken::new();
        let fetcher = Fetcher::new(upstream, metrics, stop.clone());
        let swarm = match &config.swarm {
            Some(section) => {
                let bound = Bound::bind(section.clone(), &config.data_dir).await?;
                let registries = config.registries.iter().map(|registry| registry.name.clone()).collect();
                let decisions = section.decisions(registries);
                let limits = Limits::new(section);
                let driver =
                    Driver::new(bound.identity(), decisions, store.clone(), fetcher.clone(), limits, stop.clone());
                // From here on pieces are got by its decisions.
                drop(fetcher.driver.set(Arc::downgrade(&driver)));
                let control = Control::bind(&config.data_dir).map_err(MirrorError::Control)?;
                Some((driver, bound, control))
            }
            None => None,
        };
        let reception = Reception {
            registries: config.registries.iter().map(|registry| registry.name.clone()).collect(),
            default_registry: Some(config.default_registry.clone()).filter(|name| !name.is_empty()),
            id,
        };
        let ledger = Ledger::new(&config.data_dir);
        let kept = ledger.clone();
        let kept = tokio::task::spawn_blocking(move || kept.read(SystemTime::now())).await.unwrap_or_default();
        let rights = match kept {
            Some((secret, entries)) => Rights::restore(secret, entries, Instant::now()),
            None => Rights::new(secret),
        };
        let server = Server::new(reception, store, fetcher, rights, &config.timeouts, config.prefetch);
        let listeners = [
            listen("listen", config.listen).await?,
            listen("health_listen", config.health_listen).await?,
            listen("metrics_listen", config.metrics_listen).await?,
        ];
        let health =
            Health { listen: listeners[0].local_addr().unwrap_or(config.listen), data_dir: config.data_dir.clone() };
        Ok(Self {
            server,
            health,
            listeners,
            stop,
            drain: config.timeouts.drain,
            stall: config.timeouts.stall,
            ledger,
            swarm,
        })
    }

    /// Returns where requests are answered, `/healthy` and `/metrics`; tells ports that were left to the system.
    pub fn addresses(&self) -> [Option<SocketAddr>; 3] {
        self.listeners.each_ref().map(|listener| listener.local_addr().ok())
    }

    /// Returns where members of the swarm reach this node, if it is one.
    pub fn swarm_address(&self) -> Option<SocketAddr> {
        self.swarm.as_ref().map(|(_, bound, _)| bound.address())
    }

    /// Answers requests until `quit`; then finishes those under way, for a limited time.
    pub async fn run(mut self, quit: CancellationToken) {
        let mut control = None;
        let driver = match self.swarm.take() {
            Some((driver, bound, socket)) => {
                match bound.start(driver.clone()) {
                    Ok(node) => driver.attach(node).await,
                    Err(error) => {
                        tracing::error!(%error, "could not start the swarm; this node reads the registries by itself");
                    }
                }
                control = Some(tokio::spawn(socket.run(driver.clone())));
                Some(driver)
            }
            None => None,
        };
        let [mirror, healthy, numbers] = self.listeners;
        let server = self.server.clone();
        let answering = self.server.clone();
        let answers = Router::new().fallback(move |request: Request| answering.clone().answer(request));
        let health = self.health.clone();
        let health = Router::new().route(
            "/healthy",
            get(move || {
                let health = health.clone();
                async move { health.check().await }
            }),
        );
        let metrics = Router::new().route(
            "/metrics",
            get(move || async move {
                server.store.report();
                server.fetcher.upstream.report();
                let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
                ([(CONTENT_TYPE, kind)], server.metrics.text())
            }),
        );
        let metrics = match &driver {
            Some(driver) => metrics.merge(overview(driver)),
            None => metrics,
        };
        let mut serving = JoinSet::new();
        for (listener, router) in [(mirror, answers), (healthy, health), (numbers, metrics)] {
            let quit = quit.clone();
            let listener = Impatient { listener, stall: self.stall };
            serving.spawn(async move {
                if let Err(error) = axum::serve(listener, router).with_graceful_shutdown(quit.cancelled_owned()).await {
                    tracing::error!(%error, "a listener ended");
                }
            });
        }
        let keeping = async {
            loop {
                tokio::time::sleep(KEEP).await;
                self.server.keep_rights(&self.ledger).await;
            }
        };
        tokio::select! {
            () = quit.cancelled() => {}
            () = keeping => {}
        }
        if let Some(control) = control {
            control.abort();
        }
        if let Some(driver) = &driver {
            driver.leave(self.drain).await;
        }
        let drained = async { while serving.join_next().await.is_some() {} };
        if tokio::time::timeout(self.drain, drained).await.is_err() {
            tracing::warn!(after = ?self.drain, "requests are still being answered; cutting them off");
            serving.shutdown().await;
        }
        self.stop.cancel();
        if let Some(driver) = driver {
            driver.finish().await;
        }
        self.server.fetcher.finish().await;
        self.server.keep_rights(&self.ledger).await;
    }
}

/// Reads any bytes as the head of a caller's request: for fuzzing, and for nothing else.
#[doc(hidden)]
pub fn read_head(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let mut lines = text.split("\r\n");
    let Some((method, uri)) = lines.next().and_then(|line| line.split_once(' ')) else { return };
    let (Ok(method), Ok(uri)) = (method.parse(), uri.parse()) else { return };
    let header = |line: &str| -> Option<(http::HeaderName, http::HeaderValue)> {
        let (name, value) = line.split_once(':')?;
        Some((name.parse().ok()?, value.trim().parse().ok()?))
    };
    let headers = lines.filter_map(header).collect();
    let reception =
        Reception { registries: vec!["docker.io".into()], default_registry: Some("docker.io".into()), id: "me".into() };
    if let Ok(ask) = reception.read(&method, &uri, &headers) {
        assert!(ask.registry.is_none_or(|registry| registry == "docker.io"), "a registry that is not configured");
    }
    let range = headers.get(http::header::RANGE).and_then(|range| range.to_str().ok());
    for size in [0, 1, 1 << 20, u64::MAX] {
        if let range::Wanted::Part(part) = range::Wanted::of(range, size) {
            assert!(part.start < part.end && part.end <= size, "bytes that are not there");
        }
    }
}

/// Tells the operator about the swarm.
fn overview(driver: &Arc<Driver>) -> Router {
    let tell = |told: fn(&Driver) -> Response| {
        let driver = driver.clone();
        get(move || async move {
            // It looks at every blob of the cache.
            tokio::task::spawn_blocking(move || told(&driver)).await.map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)
        })
    };
    Router::new()
        .route("/swarm/status", tell(|driver| Json(driver.status()).into_response()))
        .route("/swarm/peers", tell(|driver| Json(driver.peers()).into_response()))
        .route("/swarm/blobs", tell(|driver| Json(driver.blobs()).into_response()))
}

async fn listen(key: &'static str, address: SocketAddr) -> Result<TcpListener, MirrorError> {
    TcpListener::bind(address).await.map_err(|source| MirrorError::Listen { key, address, source })
}

#[cfg(test)]
mod tests;
