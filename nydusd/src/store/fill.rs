//! The async half: from chunks that are missing to chunks that can be read.
//!
//! Claimed chunks are grouped into requests, decoded, checked against their digests, given to whoever waits, written, and
//! committed, in this order. A reader's own thread does the computing while it waits; what is fetched ahead of
//! readers is computed on the runtime's blocking threads. What a source gave and did not match is asked for once more
//! with the mirrors left out; then it is an error that names the blob and the chunk.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::stream::{self, StreamExt, TryStreamExt};
use nydus_backend::{Avoid, Served, Urgency};
use nydus_rafs::Chunk;
use nydus_rafs::verified::{ChunkError, Decoder, Verified};
use tokio::sync::Semaphore;

use super::blob::{Blob, Bound};
use super::cache::{Cache, Kept};
use super::claim::{Claim, Flight, Look, Raise};
use super::counters::Counters;
use super::error::ReadError;
use super::runs;

/// Requests under way for one reader or one window at once.
const AT_ONCE: usize = 8;
/// How long a reader leaves a fetch that was begun ahead of it to itself before it fetches as a reader.
const PATIENCE: Duration = Duration::from_secs(2);

/// Plain bytes of chunks, by position.
pub(super) type Got = HashMap<usize, Bytes>;

impl Blob {
    /// Brings the chunks at positions `wanted` for a reader. Returns those that came just now; the others are ready.
    pub(super) async fn obtain(&self, bound: &Bound, wanted: Range<usize>) -> Result<Got, ReadError> {
        let _waiting = self.store().demand().wait();
        let mut got = Got::new();
        loop {
            let raise = Raise::default();
            let (mut claims, mut flights) = (Vec::new(), Vec::new());
            for at in wanted.clone() {
                if got.contains_key(&at) {
                    continue;
                }
                match bound.cache.claims().claim(&bound.layout, at, &raise) {
                    Look::Ready => {}
                    Look::Mine(claim) => match bound.cache.shelved(claim.chunk()) {
                        // The disk may have recovered since: it is offered the chunk again.
                        Some(bytes) => {
                            let checked = self.store().verifies() && claim.chunk().digest.is_some();
                            bound.cache.keep(claim, &bytes, checked);
                            got.insert(at, bytes);
                        }
                        None => claims.push(claim),
                    },
                    Look::Busy(flight) => flights.push((at, flight)),
                }
            }
            if claims.is_empty() && flights.is_empty() {
                return Ok(got);
            }
            if !flights.is_empty() {
                self.counters().joined.add(1);
            }
            // Together: somebody may wait for our claims while we wait for theirs.
            let (fetched, landed) =
                futures::future::try_join(self.bring(bound, claims), async { Ok(landed(flights).await) }).await?;
            got.extend(fetched);
            got.extend(landed);
        }
    }

    /// Fetches claimed chunks because a reader waits.
    async fn bring(&self, bound: &Bound, claims: Vec<Claim>) -> Result<Got, ReadError> {
        let (mut got, missing) = recheck(&bound.cache, self.counters(), claims);
        let groups = runs::group(missing, |claim| claim.chunk().stored.clone(), self.options().amplify);
        let fetched: Vec<Got> = stream::iter(groups)
            .map(|group| self.fetch(bound, group, Urgency::Demand))
            .buffer_unordered(AT_ONCE)
            .try_collect()
            .await?;
        got.extend(fetched.into_iter().flatten());
        Ok(got)
    }

    /// Brings the chunks at positions `wanted` ahead of readers, in requests of at most `max` stored bytes. Chunks that
    /// somebody else fetches are left to them. Each request waits for its turn in `lane`.
    pub(super) async fn ahead(
        &self,
        bound: &Bound,
        wanted: Range<usize>,
        max: u64,
        lane: &Semaphore,
    ) -> Result<(), ReadError> {
        let missing: Vec<usize> = wanted.filter(|&at| !bound.readable_or_claimed(at)).collect();
        let groups = runs::group(missing, |&at| bound.layout.chunk(at).stored.clone(), max);
        stream::iter(groups)
            .map(|group| async move {
                // Claims are taken when the request can go out: a reader never waits for one that is queued.
                let _turn = lane.acquire().await;
                let raise = Raise::default();
                let claims: Vec<Claim> = group
                    .into_iter()
                    .filter_map(|at| match bound.cache.claims().claim(&bound.layout, at, &raise) {
                        Look::Mine(claim) => Some(claim),
                        Look::Ready | Look::Busy(_) => None,
                    })
                    .collect();
                self.request_ahead(bound, claims, raise).await
            })
            .buffer_unordered(AT_ONCE)
            .try_for_each(|()| async { Ok(()) })
            .await
    }

    async fn request_ahead(&self, bound: &Bound, claims: Vec<Claim>, raise: Raise) -> Result<(), ReadError> {
        let (cache, counters) = (bound.cache.clone(), self.counters().clone());
        let missing = if claims.iter().any(Claim::unsure) {
            compute(move || recheck(&cache, &counters, claims).1).await
        } else {
            Some(claims)
        };
        let Some(missing) = missing.filter(|missing| !missing.is_empty()) else { return Ok(()) };
        let span = runs::span(missing.iter().map(|claim| claim.chunk().stored.clone()));
        let deadline = self.options().deadline;
        tokio::select! {
            done = self.fetch(bound, missing, Urgency::Prefetch) => done.map(drop),
            // The claims go with the future, and the reader fetches as a reader.
            () = async { raise.raised().await; tokio::time::sleep(PATIENCE).await } => Ok(()),
            () = tokio::time::sleep(deadline) => {
                Err(ReadError::Deadline { blob: self.id().clone(), plain: span, after: deadline })
            }
        }
    }

    /// Fetches one group of claimed chunks with one request.
    async fn fetch(&self, bound: &Bound, claims: Vec<Claim>, urgency: Urgency) -> Result<Got, ReadError> {
        let span = runs::span(claims.iter().map(|claim| claim.chunk().stored.clone()));
        let served = self.ask(span.clone(), urgency, Avoid::Nothing).await?;
        if served.ignores_ranges {
            self.fetch_whole(bound);
        }
        let (mut got, bad) = self.settle(bound, claims, span.start, served.bytes, urgency).await;
        for (claim, error) in bad {
            self.counters().corrupt_chunks.add(1);
            let chunk = claim.chunk().clone();
            tracing::warn!(blob = %self.id(), chunk = chunk.index.0, stored = ?chunk.stored, source = %served.source, %error,
                "a source gave bytes that do not match the image; asking again, without mirrors");
            let again = self.ask(chunk.stored.clone(), urgency, Avoid::Mirrors).await?;
            let (right, bad) = self.settle(bound, vec![claim], chunk.stored.start, again.bytes, urgency).await;
            got.extend(right);
            if let Some((_, source)) = bad.into_iter().next() {
                self.counters().corrupt_chunks.add(1);
                tracing::error!(blob = %self.id(), chunk = chunk.index.0, stored = ?chunk.stored, plain = ?chunk.plain,
                    source = %again.source, error = %source, "the bytes do not match the image again: the blob there is damaged, push the image again");
                return Err(ReadError::Corrupt {
                    blob: self.id().clone(),
                    chunk: chunk.index,
                    plain: chunk.plain,
                    source,
                });
            }
        }
        Ok(got)
    }

    async fn ask(&self, stored: Range<u64>, urgency: Urgency, avoid: Avoid) -> Result<Served, ReadError> {
        let (counters, began) = (self.counters(), Instant::now());
        let answer = self.source().read(self.id(), stored.clone(), urgency, avoid).await;
        let (requests, bytes) = match urgency {
            Urgency::Demand => (&counters.demand_requests, &counters.demand_bytes),
            Urgency::Prefetch => (&counters.prefetch_requests, &counters.prefetch_bytes),
        };
        requests.add(1);
        match answer {
            Ok(served) => {
                bytes.add(served.bytes.len() as u64);
                if urgency == Urgency::Prefetch {
                    counters.prefetch_millis.add(u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX));
                }
                Ok(served)
            }
            Err(last) => {
                counters.failed_requests.add(1);
                Err(ReadError::Unavailable { blob: self.id().clone(), stored, last: Box::new(last) })
            }
        }
    }

    /// Turns the bytes of one request into chunks, on this thread for a reader, beside it for others.
    async fn settle(
        &self,
        bound: &Bound,
        claims: Vec<Claim>,
        start: u64,
        stored: Bytes,
        urgency: Urgency,
    ) -> (Got, Vec<(Claim, ChunkError)>) {
        let (cache, verify) = (bound.cache.clone(), self.store().verifies());
        let counters = self.counters().clone();
        let work = move || {
            let (mut got, mut bad) = (Got::new(), Vec::new());
            // Small files of an original layer share a piece of its gzip stream: it is inflated once for all of them.
            let mut decoder = Decoder::default();
            for claim in claims {
                match decode(&mut decoder, claim.chunk(), slice(&stored, start, &claim.chunk().stored), verify) {
                    Ok((bytes, verified)) => {
                        let at = claim.at();
                        match cache.keep(claim, &bytes, verified) {
                            Kept::InFile => counters.chunks.add(1),
                            Kept::OnShelf => counters.unwritten_chunks.add(1),
                        }
                        if urgency == Urgency::Prefetch {
                            counters.prefetch_chunks.add(1);
                        }
                        got.insert(at, bytes);
                    }
                    Err(error) => bad.push((claim, error)),
                }
            }
            (got, bad)
        };
        match urgency {
            Urgency::Demand => work(),
            Urgency::Prefetch => compute(work).await.unwrap_or_default(),
        }
    }
}

/// Waits for fetches of others; what they gave back is left out.
async fn landed(flights: Vec<(usize, Flight)>) -> Got {
    for (_, flight) in &flights {
        flight.raise();
    }
    let mut got = Got::new();
    for (at, flight) in flights {
        if let Some(bytes) = flight.landed().await {
            got.insert(at, bytes);
        }
    }
    got
}

/// Computes on a blocking thread; `None` when the runtime shuts down.
async fn compute<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => Some(done),
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => None,
    }
}

/// Checks chunks that an earlier process left in the cache file. Returns those that are right, and claims on the others.
fn recheck(cache: &Arc<Cache>, counters: &Counters, claims: Vec<Claim>) -> (Got, Vec<Claim>) {
    let (mut got, mut missing) = (Got::new(), Vec::new());
    for mut claim in claims {
        if claim.unsure() {
            counters.checked_chunks.add(1);
            let losses = cache.losses();
            if let Some(bytes) = left_behind(cache, claim.chunk()) {
                got.insert(claim.at(), bytes.clone());
                cache.confirm(claim, bytes, losses);
                continue;
            }
            counters.stale_chunks.add(1);
            claim.disprove();
        }
        missing.push(claim);
    }
    (got, missing)
}

/// Returns the bytes of a chunk in the cache file if they match its digest.
pub(super) fn left_behind(cache: &Cache, chunk: &Chunk) -> Option<Bytes> {
    let mut bytes = vec![0; usize::try_from(chunk.plain_len()).ok()?];
    cache.file()?.read(&mut bytes, chunk.plain.start).ok()?;
    Some(Verified::check(chunk, bytes).ok()?.into_bytes().into())
}

/// Returns the part `wanted` of bytes that begin at `start`; less if there is less.
fn slice<'b>(bytes: &'b [u8], start: u64, wanted: &Range<u64>) -> &'b [u8] {
    let place = |at: u64| usize::try_from(at.saturating_sub(start)).unwrap_or(usize::MAX).min(bytes.len());
    &bytes[place(wanted.start)..place(wanted.end)]
}

/// Decodes a chunk; says whether its digest was compared.
fn decode(decoder: &mut Decoder, chunk: &Chunk, stored: &[u8], verify: bool) -> Result<(Bytes, bool), ChunkError> {
    let check = verify && chunk.digest.is_some();
    let verified = if check { decoder.decode(chunk, stored) } else { decoder.trusting(chunk, stored) };
    verified.map(|verified| (verified.into_bytes().into(), check))
}
