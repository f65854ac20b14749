//! All blobs of the cache, within their quota.
//!
//! One process per directory, by a lock on a file in it. Blobs leave whole, the one unused for longest first, and never
//! while somebody reads or fills it: whoever does holds a [`Pin`]. If nothing can leave, bytes are passed on without
//! being kept, which is also what happens on a full or broken disk.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use nix::fcntl::{Flock, FlockArg};
use nydus_rafs::Digest;
use tokio::sync::mpsc;

use super::metrics::Metrics;
use super::pieces::Blob;

/// Why there is no cache; completes "could not open the cache".
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The directory cannot be made, read or written.
    #[error("{}: {source}; check data_dir, its owner and its disk", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another process has it.
    #[error("{} is in use by another nydus-p2p; stop that one or give another data_dir", path.display())]
    Taken {
        /// The directory.
        path: PathBuf,
    },
}

/// The blobs of one data directory.
#[derive(Debug)]
pub(super) struct Store {
    dir: PathBuf,
    quota: u64,
    usage: Arc<AtomicU64>,
    blobs: Mutex<HashMap<Digest, Arc<Blob>>>,
    clock: AtomicU64,
    metrics: Arc<Metrics>,
    /// Who wants to hear of evicted blobs.
    evicted: OnceLock<mpsc::UnboundedSender<Digest>>,
    _lock: Flock<File>,
}

impl Store {
    /// Opens `data_dir`, making it if needed, and takes in what an earlier process left there. Blocks.
    pub(super) fn open(data_dir: &Path, quota: u64, metrics: Arc<Metrics>) -> Result<Arc<Self>, StoreError> {
        let dir = data_dir.join("blobs");
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| StoreError::Io { path, source }
        };
        std::fs::create_dir_all(&dir).map_err(failed(&dir))?;
        let path = data_dir.join("lock");
        let lock = OpenOptions::new().write(true).create(true).truncate(false).open(&path).map_err(failed(&path))?;
        let lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
            nix::errno::Errno::EWOULDBLOCK => StoreError::Taken { path: data_dir.to_owned() },
            _ => StoreError::Io { path, source: errno.into() },
        })?;
        let store = Self {
            dir,
            quota,
            usage: Arc::default(),
            blobs: Mutex::default(),
            clock: AtomicU64::new(1),
            metrics,
            evicted: OnceLock::new(),
            _lock: lock,
        };
        store.take_in().map_err(failed(&store.dir))?;
        store.report();
        Ok(Arc::new(store))
    }

    fn take_in(&self) -> io::Result<()> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&self.dir)? {
            let path = entry?.path();
            let digest = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse::<Digest>().ok());
            let is_map = path.extension().is_some_and(|extension| extension == "pieces");
            // The cache's own id is the node's.
            if path.ends_with("id") {
                continue;
            }
            match digest {
                Some(digest) if is_map => {
                    let age = path.metadata().and_then(|meta| meta.modified()).ok();
                    found.push((age, digest));
                }
                // Data whose map is there is taken in with it.
                Some(_) if path.with_extension("pieces").exists() => {}
                _ => remove(&path),
            }
        }
        found.sort_unstable();
        let mut blobs = self.blobs();
        for (_, digest) in found {
            match Blob::reopen(&self.dir, digest, self.usage.clone()) {
                Some(blob) => {
                    blob.used.store(self.clock.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
                    blobs.insert(digest, Arc::new(blob));
                }
                None => {
                    for extension in ["data", "pieces"] {
                        remove(&self.dir.join(digest.to_string()).with_extension(extension));
                    }
                }
            }
        }
        Ok(())
    }

    fn blobs(&self) -> MutexGuard<'_, HashMap<Digest, Arc<Blob>>> {
        self.blobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells of blobs that are evicted, from now on; once.
    pub(super) fn watch_evictions(&self) -> mpsc::UnboundedReceiver<Digest> {
        let (sender, receiver) = mpsc::unbounded_channel();
        drop(self.evicted.set(sender));
        receiver
    }

    /// Returns the blobs that will have to leave before long, if the cache is nearly full: the one unused for longest first.
    pub(super) fn next_to_leave(&self) -> Vec<Digest> {
        let most = self.quota - self.quota / 10;
        let mut left = self.usage().saturating_sub(most);
        let blobs = self.blobs();
        let mut idle: Vec<&Arc<Blob>> = blobs.values().filter(|blob| blob.pins.load(Ordering::Acquire) == 0).collect();
        idle.sort_by_key(|blob| blob.used.load(Ordering::Relaxed));
        let mut leave = Vec::new();
        for blob in idle {
            if left == 0 {
                break;
            }
            left = left.saturating_sub(blob.stored());
            leave.push(blob.digest());
        }
        leave
    }

    /// Returns where the blobs' files are.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns holds on all blobs.
    pub(super) fn all(self: &Arc<Self>) -> Vec<Pin> {
        let digests: Vec<Digest> = self.blobs().keys().copied().collect();
        digests.iter().filter_map(|digest| self.held(digest)).collect()
    }

    /// Returns a hold on a blob that is here.
    pub(super) fn held(self: &Arc<Self>, digest: &Digest) -> Option<Pin> {
        let blobs = self.blobs();
        let blob = blobs.get(digest)?.clone();
        blob.pins.fetch_add(1, Ordering::AcqRel);
        Some(Pin { store: self.clone(), blob })
    }

    /// Removes a blob that nobody reads or fills; blocks for a moment.
    pub(super) fn unlink(&self, digest: &Digest) {
        let mut blobs = self.blobs();
        if blobs.get(digest).is_some_and(|blob| blob.pins.load(Ordering::Acquire) == 0)
            && let Some(blob) = blobs.remove(digest)
        {
            blob.unlink();
        }
        drop(blobs);
        self.report();
    }

    /// Tells whether something of a blob is here, or on its way.
    pub(super) fn has(&self, digest: &Digest) -> bool {
        self.blobs().contains_key(digest)
    }

    /// Returns the bytes of all ready pieces.
    pub(super) fn usage(&self) -> u64 {
        self.usage.load(Ordering::Relaxed)
    }

    /// Returns a hold on blob `digest` of `size` bytes, made if it is not here; may block on the disk for a moment.
    ///
    /// If another size was believed before, the blob starts anew; none if it cannot because it is in use.
    pub(super) fn pin(self: &Arc<Self>, digest: Digest, size: u64) -> Option<Pin> {
        let mut blobs = self.blobs();
        if let Some(other) = blobs.get(&digest)
            && other.size() != size
            && other.pins.load(Ordering::Acquire) > 0
        {
            return None;
        }
        // Where the disk once gave no files, it may now.
        let anew =
            |other: &Arc<Blob>| other.size() != size || (other.fileless() && other.pins.load(Ordering::Acquire) == 0);
        if let Some(other) = blobs.get(&digest).filter(|other| anew(other)) {
            tracing::debug!(blob = %digest, was = other.size(), now = size, "starting a blob anew");
            other.unlink();
            blobs.remove(&digest);
        }
        let blob =
            blobs.entry(digest).or_insert_with(|| Arc::new(Blob::create(&self.dir, digest, size, self.usage.clone())));
        blob.pins.fetch_add(1, Ordering::AcqRel);
        blob.used.store(self.clock.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
        let pin = Pin { store: self.clone(), blob: blob.clone() };
        drop(blobs);
        self.report();
        Some(pin)
    }

    /// Evicts until `bytes` more fit, and sets them aside; blocks. None if they do not fit, and then they must not be kept.
    pub(super) fn make_room(&self, bytes: u64) -> Option<Room> {
        // Counted first: two who come at once must not both take the last room.
        let room = Room::new(self.usage.clone(), bytes);
        self.evict_to(self.quota).then_some(room)
    }

    /// Evicts at least `bytes` if possible, after the disk said that it is full; blocks.
    pub(super) fn give_up(&self, bytes: u64) {
        self.evict_to(self.usage().saturating_sub(bytes));
    }

    fn evict_to(&self, most: u64) -> bool {
        if self.usage() <= most {
            return true;
        }
        let mut blobs = self.blobs();
        while self.usage() > most {
            let oldest = blobs
                .iter()
                .filter(|(_, blob)| blob.pins.load(Ordering::Acquire) == 0)
                .min_by_key(|(_, blob)| blob.used.load(Ordering::Relaxed))
                .map(|(digest, _)| *digest);
            let Some(blob) = oldest.and_then(|digest| blobs.remove(&digest)) else { return false };
            tracing::debug!(blob = %blob.digest(), bytes = blob.stored(), "evicted");
            // Under the lock: the same blob may come back as new files of the same names.
            blob.unlink();
            self.metrics.evictions.inc();
            if let Some(evicted) = self.evicted.get() {
                // Nobody listens any more when the daemon ends.
                let _ = evicted.send(blob.digest());
            }
        }
        true
    }

    /// Brings the gauges up to date.
    pub(super) fn report(&self) {
        self.metrics.blobs.set(i64::try_from(self.blobs().len()).unwrap_or(i64::MAX));
        self.metrics.disk_usage.set(i64::try_from(self.usage()).unwrap_or(i64::MAX));
    }
}

fn remove(path: &Path) {
    tracing::debug!(path = %path.display(), "removing what is no part of the cache");
    if let Err(error) = std::fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "could not remove a stray file");
    }
}

/// Bytes that were set aside for a piece; dropped, they are free again.
#[derive(Debug)]
#[must_use = "dropping room gives it back"]
pub(super) struct Room {
    usage: Arc<AtomicU64>,
    bytes: u64,
}

impl Room {
    /// Counts `bytes` into `usage`.
    pub(super) fn new(usage: Arc<AtomicU64>, bytes: u64) -> Self {
        usage.fetch_add(bytes, Ordering::Relaxed);
        Self { usage, bytes }
    }

    /// Leaves the bytes counted: there is a piece in it now.
    pub(super) fn keep(mut self) {
        self.bytes = 0;
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.usage.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// A hold on a blob: it is not evicted while there is one.
#[derive(Debug)]
pub(super) struct Pin {
    store: Arc<Store>,
    blob: Arc<Blob>,
}

impl Pin {
    /// Returns the store that it is of.
    pub(super) fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Returns the blob.
    pub(super) fn blob(&self) -> &Arc<Blob> {
        &self.blob
    }
}

impl Deref for Pin {
    type Target = Blob;

    fn deref(&self) -> &Blob {
        &self.blob
    }
}

impl Clone for Pin {
    fn clone(&self) -> Self {
        self.blob.pins.fetch_add(1, Ordering::AcqRel);
        Self { store: self.store.clone(), blob: self.blob.clone() }
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.blob.pins.fetch_sub(1, Ordering::AcqRel);
    }
}
