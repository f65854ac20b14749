//! In which ways the store fails.
//!
//! A [`StoreError`] stops a mount; a [`ReadError`] stops one read, and is forgotten: the next read of the same
//! bytes asks the sources again.

use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use nydus_backend::SourceError;
use nydus_rafs::verified::ChunkError;
use nydus_rafs::{BlobId, ChunkIndex, FormatError};

/// Why a store or one of its blobs could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The cache directory cannot be used.
    #[error("could not use {} as cache directory (work_dir): {source}", dir.display())]
    Directory {
        /// The directory.
        dir: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The chunks that an image names in a blob contradict each other.
    #[error("could not believe the chunk table of blob {blob}: {why}")]
    Table {
        /// The blob.
        blob: BlobId,
        /// What is wrong with it.
        why: String,
    },
    /// The blob is open, here or in another process.
    #[error("could not remove blob {0} from the cache: it is in use")]
    InUse(BlobId),
}

/// Why bytes of a blob could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// What the sources gave is not what the image was made of.
    #[error("could not read blob {blob}: chunk {} (plain bytes {plain:?}) is corrupt: {source}", chunk.0)]
    Corrupt {
        /// The blob.
        blob: BlobId,
        /// The chunk.
        chunk: ChunkIndex,
        /// Its plain bytes.
        plain: Range<u64>,
        /// What is wrong with it.
        source: ChunkError,
    },
    /// No source gave the bytes.
    #[error("could not read bytes {stored:?} of blob {blob}: {last}")]
    Unavailable {
        /// The blob.
        blob: BlobId,
        /// The stored bytes asked for.
        stored: Range<u64>,
        /// What the last source said.
        #[source]
        last: Box<SourceError>,
    },
    /// The bytes did not come in time.
    #[error("could not read plain bytes {plain:?} of blob {blob} within {} s", after.as_secs_f32())]
    Deadline {
        /// The blob.
        blob: BlobId,
        /// The plain bytes wanted.
        plain: Range<u64>,
        /// How long the reader waited.
        after: Duration,
    },
    /// The image has no chunk that holds these bytes.
    #[error("could not read plain bytes {plain:?} of blob {blob}: no chunk of the image holds them")]
    Outside {
        /// The blob.
        blob: BlobId,
        /// The plain bytes that are in no chunk.
        plain: Range<u64>,
    },
    /// The chunk table of the blob could not be fetched.
    #[error("could not fetch the chunk table of blob {blob}: {source}")]
    TableSource {
        /// The blob.
        blob: BlobId,
        /// What the last source said.
        source: Box<SourceError>,
    },
    /// The chunk table of the blob was fetched and cannot be read.
    #[error("could not read the chunk table of blob {blob}: {source}")]
    TableFormat {
        /// The blob.
        blob: BlobId,
        /// What is wrong with it.
        source: FormatError,
    },
    /// The chunk table of the blob was fetched and contradicts itself.
    #[error(transparent)]
    Table(StoreError),
    /// The bytes are verified and at hand, but the cache file does not take them: [`Blob::read_at`] serves them.
    ///
    /// [`Blob::read_at`]: crate::store::Blob::read_at
    #[error("could not write plain bytes {plain:?} of blob {blob} to its cache file")]
    Uncached {
        /// The blob.
        blob: BlobId,
        /// The plain bytes wanted.
        plain: Range<u64>,
    },
}
