//! What a backend counts: the numbers behind nydusd's backend metrics, and where the bytes came from.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Upper bounds in milliseconds of the latency buckets; the last bucket has none.
pub const LATENCY_BOUNDS: [u64; 7] = [1, 20, 50, 100, 500, 1000, 2000];
/// Bounds in bytes below which a read falls into a size bucket; the last bucket has none.
pub const SIZE_BOUNDS: [u64; 7] = [1 << 10, 4 << 10, 16 << 10, 64 << 10, 128 << 10, 512 << 10, 1 << 20];

/// Counters of one route, given in and read by whoever shows them.
#[derive(Debug, Default)]
pub struct Counters {
    reads: AtomicU64,
    errors: AtomicU64,
    asked: AtomicU64,
    latency_total: AtomicU64,
    latency: [AtomicU64; 8],
    sizes: [AtomicU64; 8],
    latency_sizes: [[AtomicU64; 8]; 8],
    from_mirrors: AtomicU64,
    from_origin: AtomicU64,
}

/// The counters at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Attempts to read from a source.
    pub reads: u64,
    /// Attempts that failed.
    pub errors: u64,
    /// Bytes asked for, also by attempts that failed.
    pub asked: u64,
    /// Time that all attempts took together, in milliseconds.
    pub latency_total: u64,
    /// Attempts by latency ([`LATENCY_BOUNDS`]).
    pub latency: [u64; 8],
    /// Attempts by size ([`SIZE_BOUNDS`]).
    pub sizes: [u64; 8],
    /// Attempts by latency, then size.
    pub latency_sizes: [[u64; 8]; 8],
    /// Bytes that mirrors and proxies gave.
    pub from_mirrors: u64,
    /// Bytes that the registry, directory or store itself gave.
    pub from_origin: u64,
}

impl Counters {
    /// Counts one attempt to read `bytes`.
    pub fn attempt(&self, bytes: u64, took: Duration, ok: bool) {
        let millis = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        let latency = LATENCY_BOUNDS.partition_point(|bound| millis > *bound);
        let size = SIZE_BOUNDS.partition_point(|bound| bytes >= *bound);
        self.reads.fetch_add(1, Relaxed);
        self.errors.fetch_add(u64::from(!ok), Relaxed);
        self.asked.fetch_add(bytes, Relaxed);
        self.latency_total.fetch_add(millis, Relaxed);
        self.latency[latency].fetch_add(1, Relaxed);
        self.sizes[size].fetch_add(1, Relaxed);
        self.latency_sizes[latency][size].fetch_add(1, Relaxed);
    }

    /// Counts bytes that arrived.
    pub fn arrived(&self, bytes: u64, from_mirror: bool) {
        if from_mirror { &self.from_mirrors } else { &self.from_origin }.fetch_add(bytes, Relaxed);
    }

    /// Returns all counters.
    pub fn snapshot(&self) -> Snapshot {
        let row = |row: &[AtomicU64; 8]| std::array::from_fn(|index| row[index].load(Relaxed));
        Snapshot {
            reads: self.reads.load(Relaxed),
            errors: self.errors.load(Relaxed),
            asked: self.asked.load(Relaxed),
            latency_total: self.latency_total.load(Relaxed),
            latency: row(&self.latency),
            sizes: row(&self.sizes),
            latency_sizes: std::array::from_fn(|index| row(&self.latency_sizes[index])),
            from_mirrors: self.from_mirrors.load(Relaxed),
            from_origin: self.from_origin.load(Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_fall_into_the_buckets_that_dashboards_expect() {
        let counters = Counters::default();
        for (bytes, millis, latency, size) in [
            (0, 0, 0, 0),
            (1023, 1, 0, 0),
            (1024, 2, 1, 1),
            (4096, 20, 1, 2),
            (1 << 20, 2000, 6, 7),
            (9 << 20, 2001, 7, 7),
        ] {
            let before = counters.snapshot().latency_sizes[latency][size];
            counters.attempt(bytes, Duration::from_millis(millis), millis != 2);
            assert_eq!(counters.snapshot().latency_sizes[latency][size], before + 1, "{bytes} {millis}");
        }
        let all = counters.snapshot();
        assert_eq!((all.reads, all.errors), (6, 1));
        assert_eq!(all.latency.iter().sum::<u64>(), 6);
        assert_eq!(all.sizes.iter().sum::<u64>(), 6);
    }
}
