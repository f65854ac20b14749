//! The blobs of this node: what of them is in the cache directory, and how the rest gets there.
//!
//! A [`Store`] is one directory and what all its blobs share. A [`Blob`] is one blob as one image sees it; below, images
//! share what they agree on:
//!
//! ```text
//!   Store -- Blob (image A) --+-- Layout --- slots --+
//!        \-- Blob (image B) --+-- Layout --- slots --+-- Cache -- CacheFile  <id>.blob.data
//!                                                          |          \----- ReadyMap  <id>.chunk_map
//!                                                          \-- Claims, and those who wait
//! ```
//!
//! The promise: bytes are read, from file or memory, only after they matched the digest that *this* image names; no
//! failure is remembered; a read that a source can serve does not fail because of the cache.

mod ahead;
mod blob;
mod cache;
mod cache_file;
mod claim;
mod counters;
mod demand;
mod error;
mod fill;
mod layout;
mod prefetch;
mod ready;
mod runs;
mod shelf;
mod source;
#[cfg(test)]
mod tests;
mod usage;

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use futures::future::BoxFuture;
use nydus_backend::Route;
use nydus_rafs::{BlobId, BlobInfo, ChunkTable};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

pub use blob::Blob;
pub use counters::{Counter, Counters, Stamp};
pub use error::{ReadError, StoreError};
pub use prefetch::{Hint, PrefetchOptions, prefetch};
pub use usage::Usage;

use blob::Bound;
use cache::Cache;
use cache_file::CacheFile;
use demand::Demand;
use shelf::Shelf;
use source::Source;

/// Requests for what comes next to readers that are under way at once, for all blobs of a store. Prefetch has a
/// number of its own: readers who go on do not queue behind it.
const WINDOWS: usize = 16;
/// How long a process that had a blob open may take to die.
const PATIENCE: Duration = Duration::from_millis(500);

/// How an image's blobs are read; the default is what a configuration without a word about it means.
#[derive(Debug, Clone)]
pub struct Options {
    /// How long a reader waits at most, but for a moment (2 %, at most 0.5 s) in which a route with the same deadline
    /// can say what went wrong.
    pub deadline: Duration,
    /// How many chunks are fetched ahead of a sequential reader; 0: none.
    pub readahead: u32,
    /// How many stored bytes one request for neighbouring chunks has at most, and how many are fetched after a
    /// chunk that was missed (`batch_size`, `amplify_io`); 0: only what is read.
    pub amplify: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self { deadline: Duration::from_secs(60), readahead: 8, amplify: 1 << 20 }
    }
}

/// A cache directory and the blobs open in it, as one image uses it. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<Inner>,
    options: Options,
    counters: Arc<Counters>,
}

/// What the blobs of a store share.
#[derive(Debug)]
struct Inner {
    /// Empty where nothing is kept.
    dir: PathBuf,
    /// Whether chunks are kept in files; else a few of them stay at hand in memory.
    keeps: bool,
    /// Whether chunks are checked against their digests.
    verify: bool,
    runtime: Handle,
    caches: Mutex<HashMap<BlobId, Vec<Weak<Cache>>>>,
    shelf: Arc<Shelf>,
    demand: Demand,
    windows: Semaphore,
    /// Another process was seen to use the directory.
    shared: AtomicBool,
}

/// How a chunk table is fetched.
pub type FetchTable = dyn Fn() -> BoxFuture<'static, Result<ChunkTable, ReadError>> + Send + Sync;

/// The chunks of a blob, known or still to be fetched.
pub enum Table {
    /// The bootstrap has them all.
    Known(ChunkTable),
    /// They come from the blob, by the first read; a failure is not remembered, the next read tries again.
    Lazy(Box<FetchTable>),
}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Known(table) => write!(f, "Known({} chunks)", table.all().len()),
            Self::Lazy(_) => f.write_str("Lazy"),
        }
    }
}

impl From<ChunkTable> for Table {
    fn from(table: ChunkTable) -> Self {
        Self::Known(table)
    }
}

impl Store {
    /// Uses `dir` (made if missing) as cache directory; requests run on `runtime`.
    ///
    /// A directory that cannot be used because its disk is in trouble is no error: blobs are then read through memory.
    pub fn open(dir: impl Into<PathBuf>, runtime: Handle) -> Result<Self, StoreError> {
        Self::with(dir.into(), true, runtime)
    }

    /// Like [`Store::open`], but chunks are not checked against their digests: any source can change an image.
    pub fn unverified(dir: impl Into<PathBuf>, runtime: Handle) -> Result<Self, StoreError> {
        let dir = dir.into();
        tracing::warn!(dir = %dir.display(), "chunks are NOT verified: whoever serves blobs can change what is read");
        Self::with(dir, false, runtime)
    }

    /// A store without files: every chunk is fetched again once it is no more among the last few.
    pub fn without_files(verify: bool, runtime: Handle) -> Self {
        tracing::info!("no cache is configured: chunks are fetched for each read anew");
        if !verify {
            tracing::warn!("chunks are NOT verified: whoever serves blobs can change what is read");
        }
        Self::of(PathBuf::new(), false, verify, runtime)
    }

    fn with(dir: PathBuf, verify: bool, runtime: Handle) -> Result<Self, StoreError> {
        let usable = std::fs::create_dir_all(&dir).and_then(|()| std::fs::read_dir(&dir).map(drop));
        match usable {
            Err(error) if is_disk_trouble(&error) => {
                tracing::warn!(dir = %dir.display(), %error, "the cache directory is in trouble: nothing is cached");
            }
            other => other.map_err(|source| StoreError::Directory { dir: dir.clone(), source })?,
        }
        Ok(Self::of(dir, true, verify, runtime))
    }

    fn of(dir: PathBuf, keeps: bool, verify: bool, runtime: Handle) -> Self {
        let inner = Inner {
            dir,
            keeps,
            verify,
            runtime,
            caches: Mutex::default(),
            shelf: Arc::default(),
            demand: Demand::default(),
            windows: Semaphore::new(WINDOWS),
            shared: AtomicBool::new(false),
        };
        Self { inner: Arc::new(inner), options: Options::default(), counters: Arc::default() }
    }

    /// Returns the same store as another image uses it, with counters of its own.
    pub fn image(&self, options: Options, counters: Arc<Counters>) -> Self {
        Self { inner: self.inner.clone(), options, counters }
    }

    /// Returns whether chunks are checked against their digests.
    pub fn verifies(&self) -> bool {
        self.inner.verify
    }

    /// Returns whether what is fetched is kept: else fetching ahead is in vain.
    pub fn keeps(&self) -> bool {
        self.inner.keeps
    }

    /// Returns the cache directory.
    pub fn dir(&self) -> &Path {
        &self.inner.dir
    }

    /// Returns the counters.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Opens a blob for an image. Opens no connection. Images share what is in the cache as far as they agree.
    ///
    /// A cache file that cannot be made or locked is no error: the blob is then read through memory.
    pub fn blob(&self, info: &BlobInfo, table: impl Into<Table>, route: Route) -> Result<Arc<Blob>, StoreError> {
        self.blob_from(info, table.into(), route.into())
    }

    fn blob_from(&self, info: &BlobInfo, table: Table, source: Source) -> Result<Arc<Blob>, StoreError> {
        let (table, bound) = match table {
            // The layout has the chunks now; a second copy would only take memory.
            Table::Known(known) => (Table::Known(ChunkTable::default()), Some(self.inner.bind(info, &known)?)),
            lazy @ Table::Lazy(_) => (lazy, None),
        };
        let (store, options) = (self.inner.clone(), self.options.clone());
        Ok(Blob::new(info, table, bound, source, store, options, self.counters.clone()))
    }

    /// Brings the cache to the disk, so that the next process need not check it. Blocks for as long as that takes.
    pub fn close(&self) {
        let living: Vec<Arc<Cache>> = self.inner.caches().values().flatten().filter_map(Weak::upgrade).collect();
        for cache in living {
            cache.leave();
        }
    }
}

/// Returns whether an error tells of a disk in trouble rather than of a wrong path.
fn is_disk_trouble(error: &io::Error) -> bool {
    use io::ErrorKind::{QuotaExceeded, ReadOnlyFilesystem, StorageFull};
    matches!(error.kind(), QuotaExceeded | ReadOnlyFilesystem | StorageFull) || error.raw_os_error() == Some(libc::EIO)
}

impl Inner {
    fn dir(&self) -> &Path {
        &self.dir
    }

    fn verifies(&self) -> bool {
        self.verify
    }

    fn runtime(&self) -> &Handle {
        &self.runtime
    }

    fn demand(&self) -> &Demand {
        &self.demand
    }

    /// Returns where requests for what comes next to readers take their turn.
    fn windows(&self) -> &Semaphore {
        &self.windows
    }

    fn caches(&self) -> std::sync::MutexGuard<'_, HashMap<BlobId, Vec<Weak<Cache>>>> {
        self.caches.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds or makes the cache that an image with this chunk table shares.
    fn bind(&self, info: &BlobInfo, table: &ChunkTable) -> Result<Bound, StoreError> {
        let chunks = layout::checked(table).map_err(|why| StoreError::Table { blob: info.id.clone(), why })?;
        let mut caches = self.caches();
        caches.retain(|_, same| {
            same.retain(|cache| cache.strong_count() > 0);
            !same.is_empty()
        });
        let same = caches.entry(info.id.clone()).or_default();
        for cache in same.iter().filter_map(Weak::upgrade) {
            if let Ok(layout) = cache.adopt(&chunks) {
                return Ok(Bound { cache, layout });
            }
        }
        if !same.is_empty() {
            tracing::warn!(blob = %info.id,
                "an image contradicts another about this blob, or its cache is in trouble: it gets a cache file of its own");
        }
        let size = chunks.last().map_or(0, |chunk| chunk.plain.end).max(info.plain_size);
        // In vain only once: where daemons share a directory, mounts are not to wait for each other.
        let patience = if same.is_empty() && !self.shared.load(Ordering::Relaxed) { PATIENCE } else { Duration::ZERO };
        let opened = if self.keeps { CacheFile::open(&self.dir, &info.id, size, patience) } else { Ok(None) };
        let file = match opened {
            Ok(Some(file)) => {
                if same.is_empty() && !file.is_first() {
                    self.shared.store(true, Ordering::Relaxed);
                    tracing::info!(blob = %info.id, path = %file.path().display(),
                        "another process has this blob open: a cache file of our own");
                }
                Some(file)
            }
            Ok(None) if !self.keeps => None,
            Ok(None) => {
                tracing::warn!(blob = %info.id, dir = %self.dir.display(), "too many copies are in use: nothing is cached");
                None
            }
            Err(error) => {
                tracing::warn!(blob = %info.id, dir = %self.dir.display(), %error, "no cache file: nothing is cached");
                None
            }
        };
        let kept = file.is_some();
        let fresh = |file| Arc::new(Cache::new(info.id.clone(), file, self.shelf.clone(), self.verify));
        let cache = fresh(file);
        if let Ok(layout) = cache.adopt(&chunks) {
            if kept {
                same.push(Arc::downgrade(&cache));
            }
            return Ok(Bound { cache, layout });
        }
        // Its map can be neither read nor changed; without a file nothing stands in the way.
        let cache = fresh(None);
        match cache.adopt(&chunks) {
            Ok(layout) => Ok(Bound { cache, layout }),
            Err(_) => Err(StoreError::Table { blob: info.id.clone(), why: "it contradicts itself".into() }),
        }
    }
}
