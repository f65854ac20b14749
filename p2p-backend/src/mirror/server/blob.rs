//! Answers with blobs: from the cache, from what is on its way, and from upstream.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use axum::body::Body;
use axum::response::Response;
use futures::stream;
use http::header::{ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, IF_RANGE, RANGE};
use http::{HeaderMap, HeaderValue, StatusCode};
use nydus_rafs::Digest;
use tokio::sync::OwnedSemaphorePermit;

use super::admission::{Held, Wish};
use super::{CONTENT_DIGEST, Server, lock, text};
use crate::mirror::answer::Failure;
use crate::mirror::fetch::{Errand, WINDOW};
use crate::mirror::pieces::PIECE;
use crate::mirror::quota::Pin;
use crate::mirror::range::{Wanted, begins};
use crate::mirror::reader::Reader;
use crate::mirror::upstream::{Answer, UpstreamError, Via};

impl Server {
    pub(super) async fn blob(
        self: &Arc<Self>,
        wish: &Wish<'_>,
        headers: &HeaderMap,
        permit: OwnedSemaphorePermit,
    ) -> Result<Response, Failure> {
        let begun = Instant::now();
        let asked = headers.get(RANGE).and_then(|range| range.to_str().ok());
        let first = if wish.ask.head || headers.contains_key(IF_RANGE) { None } else { begins(asked) };
        let (size, held) = self.admit(wish, first).await?;
        let etag = format!("\"sha256:{}\"", wish.digest);
        let mut answer = Response::new(Body::empty());
        let told = answer.headers_mut();
        told.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        told.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
        told.insert(CONTENT_DIGEST, text(&format!("sha256:{}", wish.digest)));
        told.insert(ETAG, text(&etag));
        if wish.ask.head {
            // A Range means nothing to HEAD.
            told.insert(CONTENT_LENGTH, size.into());
            return Ok(answer);
        }
        let same = headers.get(IF_RANGE).is_none_or(|tag| tag.as_bytes() == etag.as_bytes());
        let range = match Wanted::of(asked.filter(|_| same), size) {
            Wanted::Whole => 0..size,
            Wanted::Part(range) => {
                let value = format!("bytes {}-{}/{size}", range.start, range.end - 1);
                told.insert(CONTENT_RANGE, text(&value));
                *answer.status_mut() = StatusCode::PARTIAL_CONTENT;
                range
            }
            Wanted::Unsatisfiable => return Err(Failure::Range { size }),
        };
        answer.headers_mut().insert(CONTENT_LENGTH, (range.end - range.start).into());
        *answer.body_mut() = self.body(wish, size, range, held, begun, permit).await?;
        Ok(answer)
    }

    async fn body(
        self: &Arc<Self>,
        wish: &Wish<'_>,
        size: u64,
        range: Range<u64>,
        held: Held,
        begun: Instant,
        permit: OwnedSemaphorePermit,
    ) -> Result<Body, Failure> {
        let Some(pin) = self.pin(*wish.digest, size).await else { return Err(Failure::Size) };
        let errand = wish.errand(lock(&self.rights).key(&wish.caller, wish.what()));
        if self.prefetch && range.end - range.start < size && wish.ask.hops.is_empty() {
            self.fill(&pin, &errand);
        }
        let mut reader = Reader::new(self.fetcher.clone(), pin, errand, range, held);
        // An error before the first byte can still be told as a status; nobody waits for that longer than for headers.
        let patience = self.headers_within.saturating_sub(begun.elapsed());
        let first = match tokio::time::timeout(patience, reader.next()).await {
            Ok(Ok(first)) => first,
            Ok(Err(error)) => {
                if let UpstreamError::Odd { .. } = *error {
                    // Perhaps it is the size that we remember that is odd.
                    let mut rights = lock(&self.rights);
                    let nobody = rights.caller(None);
                    rights.revoke(&wish.caller, wish.what());
                    rights.revoke(&nobody, wish.what());
                }
                return Err(Failure::Upstream(error));
            }
            Err(_) => None,
        };
        let stall = self.stall;
        let served = self.metrics.served.clone();
        let path = wish.path.clone();
        let rest = stream::try_unfold((first, reader, permit), move |(first, mut reader, permit)| {
            let (served, path) = (served.clone(), path.clone());
            async move {
                let next = match first {
                    Some(bytes) => Some(bytes),
                    None => {
                        // A caller that gets nothing for so long is better off asking somebody else.
                        let next = tokio::time::timeout(stall, reader.next()).await;
                        let silent = || Err(Arc::new(UpstreamError::Silent { by: "everybody".into(), limit: stall }));
                        next.unwrap_or_else(|_| silent()).map_err(|error| {
                            tracing::warn!(%error, path, missing = reader.left(), "cutting an answer short: nobody gives the rest");
                            std::io::Error::other(error.to_string())
                        })?
                    }
                };
                Ok::<_, std::io::Error>(next.map(|bytes| {
                    served.inc_by(bytes.len() as u64);
                    (bytes, (None, reader, permit))
                }))
            }
        });
        Ok(Body::from_stream(rest))
    }

    /// Returns a hold on a blob; none where others know it with another size.
    pub(super) async fn pin(&self, digest: Digest, size: u64) -> Option<Pin> {
        let store = self.store.clone();
        tokio::task::spawn_blocking(move || store.pin(digest, size)).await.ok().flatten()
    }

    /// Fetches the rest of a blob in the background, once at a time.
    fn fill(self: &Arc<Self>, pin: &Pin, errand: &Arc<Errand>) {
        if !lock(&self.filling).insert(pin.digest()) {
            return;
        }
        let duty = Filled { server: self.clone(), digest: pin.digest() };
        let (pin, errand) = (pin.clone(), errand.clone());
        self.fetcher.spawn(async move {
            let server = duty.server.clone();
            if let Ok(_permit) = server.fills.acquire().await {
                server.fetcher.fill(&pin, &errand).await;
            }
            drop(duty);
        });
    }

    /// Makes a first answer of upstream the beginning of a fetch.
    pub(super) async fn begin(
        self: &Arc<Self>,
        errand: &Arc<Errand>,
        digest: Digest,
        size: u64,
        start: u64,
        opened: (Via, Answer),
    ) -> Held {
        let Some(pin) = self.pin(digest, size).await else { return Held::new() };
        let first = start / PIECE;
        if start >= size {
            return Held::new();
        }
        let within = first..(first + WINDOW).min(pin.pieces());
        self.fetcher.launch_with(&pin, errand, within, Some(opened))
    }
}

/// Takes a blob off the list of those that are being fetched whole.
struct Filled {
    server: Arc<Server>,
    digest: Digest,
}

impl Drop for Filled {
    fn drop(&mut self) {
        lock(&self.server.filling).remove(&self.digest);
    }
}
