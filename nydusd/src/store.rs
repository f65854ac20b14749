//! The blobs of this node: what of them is in the cache directory, and how the rest gets there.

mod counters;
mod error;

use std::fmt;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use nydus_backend::{Route, Urgency};
use nydus_rafs::{BlobId, BlobInfo, ChunkTable};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

pub use counters::{Counter, Counters, Stamp};
pub use error::{ReadError, StoreError};

/// How a store works; the default is what a configuration without a word about it means.
#[derive(Debug, Clone)]
pub struct Options {
    /// How long a reader waits at most.
    pub deadline: Duration,
    /// How many chunks are fetched ahead of a sequential reader; 0: none.
    pub readahead: u32,
    /// How many stored bytes one request for neighbouring chunks has at most, and how many are fetched after a
    /// chunk that was missed (`batch_size`, `amplify_io`); 0: only what is read.
    pub amplify: u64,
    /// Whether chunks are checked against their digests. Turning it off lets any source change an image.
    pub verify: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { deadline: Duration::from_secs(60), readahead: 8, amplify: 1 << 20, verify: true }
    }
}

/// A cache directory and the blobs open in it. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Store {
    _inner: Arc<()>,
}

/// The chunks of a blob, known or still to be fetched.
pub enum Table {
    /// The bootstrap has them all.
    Known(ChunkTable),
    /// They come from the blob, by the first read; a failure is not remembered, the next read tries again.
    Lazy(Box<dyn Fn() -> BoxFuture<'static, Result<ChunkTable, ReadError>> + Send + Sync>),
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

/// What the cache directory holds of one blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage {
    /// The name of the blob as its files spell it.
    pub blob: String,
    /// Bytes that its files take on the disk.
    pub bytes: u64,
    /// The files.
    pub files: Vec<PathBuf>,
}

impl Store {
    /// Uses `dir` (made if missing) as cache directory; requests run on `runtime`.
    pub fn open(_dir: impl Into<PathBuf>, _options: Options, _runtime: Handle) -> Result<Self, StoreError> {
        Ok(Self { _inner: Arc::new(()) })
    }

    /// Returns the same store with counters of its own, for one image.
    pub fn counting(&self, _counters: Arc<Counters>) -> Self {
        self.clone()
    }

    /// Returns the cache directory.
    pub fn dir(&self) -> &Path {
        Path::new(".")
    }

    /// Returns the counters.
    pub fn counters(&self) -> &Arc<Counters> {
        unreachable!("skeleton")
    }

    /// Opens a blob for an image. Opens no connection. Images share what is in the cache as far as they agree.
    pub fn blob(&self, info: &BlobInfo, _table: impl Into<Table>, _route: Route) -> Result<Arc<Blob>, StoreError> {
        Ok(Arc::new(Blob { id: info.id.clone() }))
    }

    /// Returns what is in the cache directory, blob by blob.
    pub fn usage(&self) -> Result<Vec<Usage>, StoreError> {
        Ok(Vec::new())
    }

    /// Deletes the files of a blob that is not open.
    pub fn remove(&self, _blob: &BlobId) -> Result<(), StoreError> {
        Ok(())
    }

    /// Brings the cache to the disk, so that the next process need not check it. Blocks.
    pub fn close(&self) {}
}

/// One blob, as one image sees it.
#[derive(Debug)]
pub struct Blob {
    id: BlobId,
}

impl Blob {
    /// Returns its name.
    pub fn id(&self) -> &BlobId {
        &self.id
    }

    /// Returns whether `plain` can be read without asking anybody. Never blocks.
    pub fn ready(&self, _plain: Range<u64>) -> bool {
        false
    }

    /// Makes `plain` readable from [`Blob::file`]; returns at once if it already is.
    ///
    /// For threads outside the runtime: they wait here until the bytes came, failed, or the deadline passed.
    pub fn ensure(&self, plain: Range<u64>) -> Result<(), ReadError> {
        Err(ReadError::Outside { blob: self.id.clone(), plain })
    }

    /// Fills `buf` with the plain bytes from `offset` on; the same waiting as [`Blob::ensure`], but served also
    /// when the cache file cannot be written. Returns `buf.len()`.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize, ReadError> {
        Err(ReadError::Outside { blob: self.id.clone(), plain: offset..offset + buf.len() as u64 })
    }

    /// Like [`Blob::read_at`], for async callers and for callers that can be interrupted: dropping the future
    /// gives up what it claimed.
    pub async fn read(&self, buf: &mut [u8], offset: u64) -> Result<usize, ReadError> {
        Err(ReadError::Outside { blob: self.id.clone(), plain: offset..offset + buf.len() as u64 })
    }

    /// Makes `plain` readable from the cache file.
    pub async fn fill(self: &Arc<Self>, plain: Range<u64>, _urgency: Urgency) -> Result<(), ReadError> {
        Err(ReadError::Outside { blob: self.id.clone(), plain })
    }

    /// Returns the cache file: the blob's plain address space, sparse. `None` while its chunk table is still to
    /// be fetched, and where the cache directory does not take it.
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Returns the names of its files in the cache directory.
    pub fn file_names(&self) -> Vec<String> {
        Vec::new()
    }
}

/// Bytes of a blob that will be wanted.
#[derive(Debug, Clone)]
pub struct Hint {
    /// The blob.
    pub blob: Arc<Blob>,
    /// Its plain bytes.
    pub plain: Range<u64>,
}

/// How fast hints are followed.
#[derive(Debug, Clone)]
pub struct PrefetchOptions {
    /// Requests under way at once (`threads_count`).
    pub threads: usize,
    /// Stored bytes of one request at most (`merging_size`).
    pub merging_size: u64,
    /// Bytes per second (`bandwidth_rate`); 0: as fast as they come.
    pub bandwidth_rate: u64,
}

/// Fetches `hints` in their order, behind every reader, until done or `stop`.
pub async fn prefetch(_hints: Vec<Hint>, _options: PrefetchOptions, _stop: CancellationToken) {}
