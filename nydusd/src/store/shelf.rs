//! Verified chunks that no cache file takes: full, broken or read-only disks.
//!
//! A read that a source can serve does not fail because the cache cannot be written. Readers come in pieces of 4 to
//! 128 KiB, so the last few chunks are kept at hand; else each piece would fetch its whole chunk again.

use std::collections::VecDeque;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use nydus_rafs::BlobId;

/// Bytes kept at most, for all blobs of a store.
const CAPACITY: usize = 32 << 20;
/// How often the log hears that a cache cannot be written.
const SILENCE: Duration = Duration::from_secs(30);

/// Which cache, and the chunk's first plain byte.
type Key = (usize, u64);

/// The chunks, the oldest first.
#[derive(Debug, Default)]
pub(super) struct Shelf(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    chunks: VecDeque<(Key, Bytes)>,
    bytes: usize,
    complained: Option<Instant>,
}

impl Shelf {
    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn put(&self, key: Key, bytes: Bytes) {
        let mut kept = self.lock();
        if kept.chunks.iter().any(|(other, _)| *other == key) {
            return;
        }
        kept.bytes += bytes.len();
        kept.chunks.push_back((key, bytes));
        while kept.bytes > CAPACITY
            && let Some((_, old)) = kept.chunks.pop_front()
        {
            kept.bytes -= old.len();
        }
    }

    pub(super) fn get(&self, key: Key) -> Option<Bytes> {
        // A few dozen entries, and only where the disk is in trouble.
        self.lock().chunks.iter().find(|(other, _)| *other == key).map(|(_, bytes)| bytes.clone())
    }

    pub(super) fn forget(&self, cache: usize) {
        let mut kept = self.lock();
        kept.chunks.retain(|((other, _), _)| *other != cache);
        kept.bytes = kept.chunks.iter().map(|(_, bytes)| bytes.len()).sum();
    }

    /// Says that a cache file cannot be written, now and then.
    pub(super) fn complain(&self, blob: &BlobId, error: &io::Error) {
        let now = Instant::now();
        let mut kept = self.lock();
        if kept.complained.is_none_or(|last| now - last >= SILENCE) {
            kept.complained = Some(now);
            drop(kept);
            tracing::warn!(%blob, %error, "cache file not written: readers are served from the source");
        }
    }
}
