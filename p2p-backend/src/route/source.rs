//! One place to ask for blobs: how it is asked, what its answers mean, and whether it is well.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use nydus_rafs::BlobId;
use reqwest::{Request, Url};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::health::{Health, Pause, Weight};
use super::{Avoid, Failure, Judgement, Urgency};
use crate::http::HttpError;
use crate::registry::{BlobRequest, BlobStream, Client, RegistryError, lock};

/// A registry that says 429 without saying how long to wait.
const DEFAULT_PAUSE: Duration = Duration::from_secs(1);
/// A wish to be left alone is not granted for longer than this without asking again: limits are lifted early,
/// and credentials change.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

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
pub(super) enum Kind {
    Mirror,
    Proxy,
    Origin,
}

/// One place to ask.
pub(super) struct Source {
    pub(super) kind: Kind,
    pub(super) name: Arc<str>,
    pub(super) client: Client,
    pub(super) ping: Option<Url>,
    /// Its word is final: there is nothing behind it.
    pub(super) last: bool,
    pub(super) pause: Duration,
    pub(super) health: Mutex<Health>,
    pub(super) probing: Mutex<bool>,
    /// Whether it was said that this mirror refuses the repository: once is enough.
    pub(super) told_refusal: AtomicBool,
    pub(super) common: Arc<Common>,
}

/// What the sources of a route share.
pub(super) struct Common {
    pub(super) used: Mutex<Instant>,
    pub(super) revived: Notify,
}

impl Source {
    pub(super) fn name(&self) -> &Arc<str> {
        &self.name
    }

    pub(super) fn is_mirror(&self) -> bool {
        self.kind != Kind::Origin
    }

    pub(super) fn down_since(&self) -> Option<Instant> {
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
    pub(super) fn probe(self: &Arc<Self>) {
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
    // Every chunk is compared with its digest, so bytes that are only vouched for will do.
    map.insert("x-shoal-verifies", HeaderValue::from_static("1"));
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
