//! Chunks: the unit in which blobs are fetched, decoded, verified and cached.

use std::ops::Range;
use std::sync::Arc;

use crate::blob::table::{Batch, Point};
use crate::cipher::Cipher;
use crate::digest::{Algorithm, Digest};

/// The position of a chunk in its blob's chunk table (0 to 2^24 - 1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChunkIndex(pub u32);

/// How a blob was asked to be compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compressor {
    /// Not at all.
    None,
    /// Raw LZ4 blocks, without a size prefix.
    Lz4Block,
    /// gzip, in images that refer to original OCI layers.
    Gzip,
    /// One zstd frame per chunk.
    Zstd,
}

impl Compressor {
    /// Returns the compressor with this number in blob tables.
    pub fn from_code(code: u32) -> Option<Self> {
        Some(match code {
            0 => Self::None,
            1 => Self::Lz4Block,
            2 => Self::Gzip,
            3 => Self::Zstd,
            _ => return None,
        })
    }

    /// Returns the number of the compressor in blob tables.
    pub fn code(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Lz4Block => 1,
            Self::Gzip => 2,
            Self::Zstd => 3,
        }
    }

    /// Returns the codec of a whole chunk that this compressor did make smaller.
    pub fn codec(self) -> Codec {
        match self {
            Self::None => Codec::Plain,
            Self::Lz4Block => Codec::Lz4Block,
            Self::Gzip => Codec::Gzip,
            Self::Zstd => Codec::Zstd,
        }
    }
}

/// How the stored bytes of one chunk become plain bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Codec {
    /// Stored as they are.
    Plain,
    /// One raw LZ4 block.
    Lz4Block,
    /// One zstd frame.
    Zstd,
    /// The beginning of one gzip member, or all of it.
    Gzip,
    /// A part of a gzip stream, entered at random-access point `context`, `offset` bytes into what it inflates to.
    Zran {
        /// Index of the random-access point.
        context: u32,
        /// Where the chunk begins in the inflated bytes of the point.
        offset: u32,
    },
    /// A part of a batch of small chunks compressed together.
    Batch {
        /// Index of the batch.
        batch: u32,
        /// Where the chunk begins in the decoded batch.
        offset: u32,
    },
}

/// What the stored bytes of a chunk are a part of, or need in order to be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Container {
    /// A chunk by itself, encrypted.
    Encrypted(Cipher),
    /// A batch; its codec tells whether compression won.
    Batch {
        /// Its sizes.
        batch: Batch,
        /// How it is coded.
        codec: Codec,
        /// The key, if it is encrypted.
        cipher: Option<Cipher>,
    },
    /// A part of a gzip stream.
    Point(Point),
}

/// One chunk of a blob: where its bytes lie, how they are coded, and what they must hash to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Position in the blob's chunk table.
    pub index: ChunkIndex,
    /// Bytes in the blob's plain address space (that of the cache file).
    pub plain: Range<u64>,
    /// Bytes in the blob as stored.
    pub stored: Range<u64>,
    /// How stored bytes become plain ones.
    pub codec: Codec,
    /// Whether the stored bytes are encrypted with the blob's key.
    pub encrypted: bool,
    /// The algorithm of `digest`.
    pub algorithm: Algorithm,
    /// Digest of the plain bytes, from the bootstrap; `None` where the image carries none (tarfs).
    pub digest: Option<Digest>,
    /// What must be known beyond that; chunks of one container share it and have the same stored range.
    pub container: Option<Arc<Container>>,
    /// CRC-32C of the plain bytes, where the image carries one; the digest is the stronger check.
    pub crc32: Option<u32>,
}

impl Chunk {
    /// Returns the number of plain bytes (1 to 16 MiB).
    pub fn plain_len(&self) -> u64 {
        self.plain.end.saturating_sub(self.plain.start)
    }
}

/// The chunks of one blob that an image refers to, in the order of their plain bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ChunkTable {
    chunks: Vec<Chunk>,
}

impl AsRef<[Chunk]> for ChunkTable {
    fn as_ref(&self) -> &[Chunk] {
        &self.chunks
    }
}

impl ChunkTable {
    /// Builds a table from chunks in any order.
    pub fn new(mut chunks: Vec<Chunk>) -> Self {
        chunks.sort_by_key(|chunk| (chunk.plain.start, chunk.index));
        Self { chunks }
    }

    /// Returns the chunks that hold at least one byte of `plain`.
    pub fn covering(&self, plain: Range<u64>) -> &[Chunk] {
        let from = self.chunks.partition_point(|chunk| chunk.plain.end <= plain.start);
        let to = self.chunks.partition_point(|chunk| chunk.plain.start < plain.end);
        &self.chunks[from..to.max(from)]
    }

    /// Returns the chunk with this index that begins at `plain` in the plain address space.
    pub fn at(&self, index: ChunkIndex, plain: u64) -> Option<&Chunk> {
        let from = self.chunks.partition_point(|chunk| chunk.plain.start < plain);
        self.chunks[from..].iter().take_while(|chunk| chunk.plain.start == plain).find(|chunk| chunk.index == index)
    }

    /// Returns all chunks, ordered by their plain bytes.
    pub fn all(&self) -> &[Chunk] {
        &self.chunks
    }
}
