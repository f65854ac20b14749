//! What one mounted filesystem counts: calls, errors, bytes and times, and per file if asked to.
//!
//! Counting is always on and costs a few uncontended atomics per request. What is kept per file costs memory per
//! file and is kept only where the configuration asks for it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nydus_rafs::Ino;

use crate::api::types::{AccessPattern, FileMetrics, FsMetrics};

/// The operations that are counted, in the order of the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "these are the names of FUSE's operations")]
pub enum Op {
    Getattr,
    Readlink,
    Open,
    Release,
    Read,
    Statfs,
    Getxattr,
    Listxattr,
    Opendir,
    Lookup,
    Readdir,
    Readdirplus,
    Access,
    Forget,
    BatchForget,
}

/// Upper bounds of the size classes of reads, in bytes; the last class has none.
const SIZES: [u64; 7] = [1 << 10, 4 << 10, 16 << 10, 64 << 10, 128 << 10, 512 << 10, 1 << 20];

/// Upper bounds of the latency classes of reads, in microseconds; the last class has none.
const LATENCIES: [u64; 7] = [200, 1_000, 20_000, 50_000, 500_000, 1_000_000, 2_000_000];

type Row = [AtomicU64; 15];

/// The counters of one filesystem.
#[derive(Debug, Default)]
pub struct FsCounters {
    hits: Row,
    errors: Row,
    micros: Row,
    data_read: AtomicU64,
    sizes: [AtomicU64; 8],
    latencies: [AtomicU64; 8],
    opens: AtomicU64,
    count_files: AtomicBool,
    record_pattern: AtomicBool,
    record_latest: AtomicBool,
    files: Mutex<BTreeMap<u64, FileMetrics>>,
    pattern: Mutex<BTreeMap<u64, AccessPattern>>,
    latest: Mutex<BTreeSet<u64>>,
}

impl FsCounters {
    /// Starts at zero; the switches are those of the configuration.
    pub fn new(count_files: bool, record_pattern: bool, record_latest: bool) -> Self {
        Self {
            count_files: AtomicBool::new(count_files),
            record_pattern: AtomicBool::new(record_pattern),
            record_latest: AtomicBool::new(record_latest),
            ..Self::default()
        }
    }

    /// Counts one call and what became of it.
    pub fn call(&self, op: Op, ino: Ino, ok: bool, took: Duration) {
        let index = op as usize;
        self.hits[index].fetch_add(1, Ordering::Relaxed);
        if !ok {
            self.errors[index].fetch_add(1, Ordering::Relaxed);
        }
        self.micros[index].fetch_add(micros(took), Ordering::Relaxed);
        if ok && op == Op::Open {
            self.opens.fetch_add(1, Ordering::Relaxed);
        }
        if ok && op == Op::Release {
            let _ = self.opens.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |opens| opens.checked_sub(1));
        }
        if self.count_files.load(Ordering::Relaxed) {
            self.file(ino, |file| {
                file.total_fops += 1;
                file.fop_hits[index] += 1;
                file.fop_errors[index] += u64::from(!ok);
            });
        }
    }

    /// Counts the bytes that a successful read returned.
    pub fn read(&self, ino: Ino, bytes: u64, took: Duration) {
        let size = SIZES.partition_point(|&bound| bound <= bytes);
        self.data_read.fetch_add(bytes, Ordering::Relaxed);
        self.sizes[size].fetch_add(1, Ordering::Relaxed);
        let latency = LATENCIES.partition_point(|&bound| bound < micros(took));
        self.latencies[latency].fetch_add(1, Ordering::Relaxed);
        if self.count_files.load(Ordering::Relaxed) {
            self.file(ino, |file| {
                file.data_read += bytes;
                file.block_count_read[size] += 1;
            });
        }
        if self.record_pattern.load(Ordering::Relaxed) {
            let mut pattern = self.pattern.lock().unwrap_or_else(PoisonError::into_inner);
            let entry = pattern.entry(ino.0).or_insert_with(|| {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                AccessPattern {
                    ino: ino.0,
                    nr_read: 0,
                    first_access_time_secs: now.as_secs(),
                    first_access_time_nanos: now.subsec_nanos(),
                }
            });
            entry.nr_read += 1;
        }
        if self.record_latest.load(Ordering::Relaxed) {
            self.latest.lock().unwrap_or_else(PoisonError::into_inner).insert(ino.0);
        }
    }

    fn file(&self, ino: Ino, change: impl FnOnce(&mut FileMetrics)) {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        change(files.entry(ino.0).or_default());
    }

    /// Returns the counters under the name `id`.
    pub fn snapshot(&self, id: &str) -> FsMetrics {
        FsMetrics {
            files_account_enabled: self.count_files.load(Ordering::Relaxed),
            access_pattern_enabled: self.record_pattern.load(Ordering::Relaxed),
            record_latest_read_files_enabled: self.record_latest.load(Ordering::Relaxed),
            measure_latency: true,
            id: id.to_owned(),
            nr_opens: self.opens.load(Ordering::Relaxed),
            data_read: self.data_read.load(Ordering::Relaxed),
            block_count_read: row(&self.sizes),
            fop_hits: row(&self.hits),
            fop_errors: row(&self.errors),
            fop_cumulative_latency_total: row(&self.micros),
            read_latency_dist: row(&self.latencies),
        }
    }

    /// Returns the counters per inode; `None` if they are not kept.
    pub fn files(&self) -> Option<BTreeMap<u64, FileMetrics>> {
        let kept = self.count_files.load(Ordering::Relaxed);
        kept.then(|| self.files.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }

    /// Returns the first accesses, earliest first.
    pub fn pattern(&self) -> Vec<AccessPattern> {
        let mut all: Vec<_> = self.pattern.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        all.sort_by_key(|entry| (entry.first_access_time_secs, entry.first_access_time_nanos));
        all
    }

    /// Returns the inodes read since the last call as ranges: `[first, last]`, or `[only]`.
    pub fn take_latest(&self) -> Vec<Vec<u64>> {
        let inodes = std::mem::take(&mut *self.latest.lock().unwrap_or_else(PoisonError::into_inner));
        let mut ranges: Vec<Vec<u64>> = Vec::new();
        for ino in inodes {
            match ranges.last_mut().map(Vec::as_mut_slice) {
                Some([only]) if *only + 1 == ino => {
                    let only = *only;
                    ranges.pop();
                    ranges.push(vec![only, ino]);
                }
                Some([_, last]) if *last + 1 == ino => *last = ino,
                _ => ranges.push(vec![ino]),
            }
        }
        ranges
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn row<const N: usize>(counters: &[AtomicU64; N]) -> [u64; N] {
    std::array::from_fn(|index| counters[index].load(Ordering::Relaxed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_fall_into_the_classes_of_the_api() {
        let counters = FsCounters::new(true, true, true);
        for bytes in [0, 1023, 1024, 16_931, 1 << 20] {
            counters.call(Op::Read, Ino(7), true, Duration::from_micros(5));
            counters.read(Ino(7), bytes, Duration::from_micros(5));
        }
        let all = counters.snapshot("/");
        assert_eq!(all.block_count_read, [2, 1, 0, 1, 0, 0, 0, 1]);
        assert_eq!((all.fop_hits[Op::Read as usize], all.read_latency_dist[0]), (5, 5));
        assert_eq!(counters.files().expect("kept")[&7].block_count_read, all.block_count_read);
        assert_eq!(counters.pattern()[0].nr_read, 5);
    }

    #[test]
    fn recently_read_inodes_are_told_once_and_in_ranges() {
        let counters = FsCounters::new(false, false, true);
        for ino in [5, 1, 2, 3, 8] {
            counters.read(Ino(ino), 1, Duration::ZERO);
        }
        assert_eq!(counters.take_latest(), [vec![1, 3], vec![5], vec![8]]);
        assert_eq!(counters.take_latest(), Vec::<Vec<u64>>::new());
        assert_eq!(counters.files(), None);
    }
}
