//! What the store counts, for `/api/v1/metrics/blobcache` and the logs.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// Returns the sum.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The counters of one store, or of one image in it (see [`Store::counting`](crate::store::Store::counting)).
#[derive(Debug, Default)]
pub struct Counters {
    /// Reads, of any result.
    pub reads: Counter,
    /// Reads that found all they wanted in the cache.
    pub whole_hits: Counter,
    /// Reads that found a part of what they wanted in the cache.
    pub partial_hits: Counter,
    /// Reads that failed.
    pub failed_reads: Counter,
    /// Reads that waited for a fetch that was already under way.
    pub joined: Counter,
    /// Chunks made ready.
    pub chunks: Counter,
    /// Requests to sources because a reader waited.
    pub demand_requests: Counter,
    /// Stored bytes that these requests brought.
    pub demand_bytes: Counter,
    /// Requests to sources ahead of readers (prefetch and read-ahead).
    pub prefetch_requests: Counter,
    /// Stored bytes that these requests brought.
    pub prefetch_bytes: Counter,
    /// Milliseconds that requests ahead of readers took, summed.
    pub prefetch_millis: Counter,
    /// Chunks that these requests made ready.
    pub prefetch_chunks: Counter,
    /// Requests that failed.
    pub failed_requests: Counter,
    /// Chunks that came from a source and did not match their digest.
    pub corrupt_chunks: Counter,
    /// Chunks of a cache file left by an earlier process that were checked against their digest.
    pub checked_chunks: Counter,
    /// Those among them that did not match, and were fetched again.
    pub stale_chunks: Counter,
    /// Verified chunks that the cache file did not take.
    pub unwritten_chunks: Counter,
    /// Unix time in milliseconds when prefetch began; 0 before.
    pub prefetch_began: Stamp,
    /// Unix time in milliseconds when prefetch ended; 0 before.
    pub prefetch_ended: Stamp,
}

/// A moment, in milliseconds of Unix time.
#[derive(Debug, Default)]
pub struct Stamp(AtomicU64);

impl Stamp {
    /// Takes the present moment.
    pub fn mark(&self) {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        self.0.store(u64::try_from(now.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Takes the present moment if none was taken yet.
    pub fn mark_once(&self) {
        if self.get() == 0 {
            self.mark();
        }
    }

    /// Returns the moment last taken; 0 if none.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
