//! What will be wanted, fetched before it is: hints from the image, in their order, behind every reader.
//!
//! Requests are bounded (`merging_size`), so that a reader who wants what is just being fetched waits for one of them at
//! most, and claims are taken only when a request goes out. Before each request prefetch steps aside for readers that
//! wait. A source that fails is given time; after some failures in a row prefetch gives up, readers do not.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{self, StreamExt};
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::blob::Blob;
use super::runs;

/// Requests below this cost more than they bring; smaller settings are raised, as upstream does.
const MIN_MERGING: u64 = 128 << 10;
/// Largest request ahead of readers, whatever the settings say: a reader may have to wait for it.
const MAX_MERGING: u64 = 4 << 20;
/// Upstream never limits below this, and its template asks for 1 MiB/s; a drop-in is as fast.
const MIN_RATE: u64 = 16 << 20;
/// Failures in a row after which prefetch gives up.
const TRIES: u32 = 5;

/// Bytes of a blob that will be wanted.
#[derive(Debug, Clone)]
pub struct Hint {
    /// The blob.
    pub blob: Arc<Blob>,
    /// Its plain bytes; those that no chunk holds are passed over.
    pub plain: Range<u64>,
}

/// How fast hints are followed.
#[derive(Debug, Clone)]
pub struct PrefetchOptions {
    /// Requests under way at once (`threads_count`); 0 counts as 1.
    pub threads: usize,
    /// Stored bytes of one request at most (`merging_size`), between 128 KiB and 4 MiB.
    pub merging_size: u64,
    /// Stored bytes per second (`bandwidth_rate`), at least 16 MiB; 0: as fast as they come.
    pub bandwidth_rate: u64,
}

/// One request to be.
#[derive(Debug)]
struct Piece {
    blob: Arc<Blob>,
    chunks: Range<usize>,
    stored: u64,
}

/// Fetches `hints` in their order, behind every reader, until done or until `stop` is cancelled.
pub async fn prefetch(hints: Vec<Hint>, options: PrefetchOptions, stop: CancellationToken) {
    let merging = options.merging_size.clamp(MIN_MERGING, MAX_MERGING);
    let pace = tokio::sync::Mutex::new(Pace::new(options.bandwidth_rate));
    let failures = tokio::sync::Mutex::new(0);
    if let Some(hint) = hints.first() {
        hint.blob.counters().prefetch_began.mark_once();
    }
    let last = hints.last().map(|hint| hint.blob.clone());
    let work = stream::iter(hints).then(|hint| pieces(hint, merging)).flat_map(stream::iter).for_each_concurrent(
        options.threads.max(1),
        |piece| {
            let (pace, failures) = (&pace, &failures);
            async move {
                if *failures.lock().await >= TRIES {
                    return;
                }
                let ready = |at| piece.blob.bound_now().is_none_or(|bound| bound.readable_or_claimed(at));
                if piece.chunks.clone().all(ready) {
                    return;
                }
                let due = pace.lock().await.book(Instant::now(), piece.stored);
                tokio::time::sleep_until(due).await;
                piece.blob.store().demand().step_aside().await;
                bring(&piece, merging, failures).await;
            }
        },
    );
    tokio::select! {
        () = work => {}
        () = stop.cancelled() => {}
    }
    if let Some(blob) = last {
        blob.counters().prefetch_ended.mark();
    }
}

async fn bring(piece: &Piece, merging: u64, failures: &tokio::sync::Mutex<u32>) {
    let Some(bound) = piece.blob.bound_now() else { return };
    // Pieces are single requests, and the caller bounds their number.
    match piece.blob.ahead(bound, piece.chunks.clone(), merging, &Semaphore::new(1)).await {
        Ok(()) => *failures.lock().await = 0,
        Err(error) => {
            let mut failures = failures.lock().await;
            *failures += 1;
            if *failures == TRIES {
                tracing::warn!(blob = %piece.blob.id(), %error, "prefetch gives up; readers fetch what they need");
            }
            // Others wait for the lock, and that is meant: a source in trouble is not asked by all at once.
            tokio::time::sleep(Duration::from_millis(200) * *failures).await;
        }
    }
}

/// Cuts a hint into requests.
async fn pieces(hint: Hint, merging: u64) -> Vec<Piece> {
    // Bytes outside of all chunks do not matter here: nothing is fetched for them.
    let bound = match hint.blob.bound(&(0..0)).await {
        Ok(bound) => bound,
        Err(error) => {
            tracing::debug!(blob = %hint.blob.id(), %error, "nothing to prefetch");
            return Vec::new();
        }
    };
    let stored = |&at: &usize| bound.layout.chunk(at).stored.clone();
    let groups = runs::group(bound.layout.covering(&hint.plain).collect(), stored, merging);
    let piece = |group: Vec<usize>| {
        let span = runs::span(group.iter().map(stored));
        let (first, last) = (group.iter().min()?, group.iter().max()?);
        Some(Piece { blob: hint.blob.clone(), chunks: *first..last + 1, stored: span.end - span.start })
    };
    groups.into_iter().filter_map(piece).collect()
}

/// When the next request may go out.
#[derive(Debug)]
struct Pace {
    rate: u64,
    free: Option<Instant>,
}

impl Pace {
    fn new(rate: u64) -> Self {
        Self { rate: if rate == 0 { 0 } else { rate.max(MIN_RATE) }, free: None }
    }

    /// Books `bytes`; returns when they may be asked for.
    fn book(&mut self, now: Instant, bytes: u64) -> Instant {
        if self.rate == 0 {
            return now;
        }
        let due = self.free.map_or(now, |free| free.max(now));
        self.free = Some(due + Duration::from_secs_f64(bytes as f64 / self.rate as f64));
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_spread_over_time_and_unused_time_is_not_saved_up() {
        let now = Instant::now();
        let mut pace = Pace::new(1);
        assert_eq!(pace.book(now, MIN_RATE), now);
        assert_eq!(pace.book(now, MIN_RATE), now + Duration::from_secs(1));
        let late = now + Duration::from_secs(60);
        assert_eq!(pace.book(late, MIN_RATE), late);
        assert_eq!(pace.book(late, MIN_RATE), late + Duration::from_secs(1));
        assert_eq!(Pace::new(0).book(now, u64::MAX), now);
    }
}
