//! The 80-byte chunk record that bootstraps of both versions carry.

use std::sync::Arc;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::blob::format::features;
use crate::bootstrap::{BlobInfo, FormatError};
use crate::chunk::{Chunk, ChunkIndex, Codec, Container};
use crate::digest::Digest;
use crate::view::invalid;

/// The stored bytes are compressed.
pub(crate) const COMPRESSED: u32 = 1;
/// The chunk is a hole: zeros that no blob stores.
pub(crate) const HOLE: u32 = 2;
/// The stored bytes are encrypted.
pub(crate) const ENCRYPTED: u32 = 4;
/// The chunk is a part of a batch.
pub(crate) const BATCH: u32 = 8;
/// `crc32` is meant.
pub(crate) const HAS_CRC32: u32 = 0x10;

fn info_container(blob: &BlobInfo, flags: u32) -> Option<Arc<Container>> {
    let cipher = blob.cipher.as_ref().filter(|_| flags & ENCRYPTED != 0)?;
    Some(Arc::new(Container::Encrypted(cipher.clone())))
}

/// Chunks are at most this long; so are inputs of decoders.
pub(crate) const MAX_CHUNK_SIZE: u32 = 16 << 20;

/// One chunk as a bootstrap describes it.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct ChunkRecord {
    pub(crate) digest: [u8; 32],
    pub(crate) blob_index: U32,
    pub(crate) flags: U32,
    pub(crate) stored_size: U32,
    pub(crate) plain_size: U32,
    pub(crate) stored_offset: U64,
    pub(crate) plain_offset: U64,
    pub(crate) file_offset: U64,
    pub(crate) index: U32,
    pub(crate) crc32: U32,
}

impl ChunkRecord {
    /// Turns the record, found at byte `at` of a bootstrap, into a chunk of `blob`.
    ///
    /// For members of batches and of gzip streams the codec is incomplete: only the blob's own table knows
    /// where they lie.
    pub(crate) fn chunk(&self, blob: &BlobInfo, at: u64) -> Result<Chunk, FormatError> {
        let bad = |why: String| invalid("chunk record", at, why);
        let (plain_size, stored_size) = (self.plain_size.get(), self.stored_size.get());
        if plain_size == 0 || plain_size > MAX_CHUNK_SIZE {
            return Err(bad(format!("a chunk has 1 to {MAX_CHUNK_SIZE} bytes, not {plain_size}")));
        }
        if stored_size > 2 * MAX_CHUNK_SIZE {
            return Err(bad(format!("{stored_size} stored bytes are too many for a chunk")));
        }
        if self.index.get() >= 1 << 24 {
            return Err(bad(format!("chunk index {} has more than 24 bits", self.index)));
        }
        let range = |start: u64, len: u32| {
            let end = start.checked_add(u64::from(len)).filter(|&end| end <= 1 << 48);
            end.map(|end| start..end).ok_or_else(|| bad(format!("offset {start} is too large")))
        };
        let flags = self.flags.get();
        if flags & HOLE != 0 {
            return Err(FormatError::Unsupported(format!("a chunk that is a hole (record at byte {at})")));
        }
        let codec = if flags & BATCH != 0 {
            Codec::Batch { batch: 0, offset: 0 }
        } else if blob.has(features::ZRAN) {
            Codec::Zran { context: 0, offset: 0 }
        } else if flags & COMPRESSED == 0 {
            Codec::Plain
        } else {
            blob.compressor.codec()
        };
        Ok(Chunk {
            index: ChunkIndex(self.index.get()),
            plain: range(self.plain_offset.get(), plain_size)?,
            stored: range(self.stored_offset.get(), stored_size)?,
            codec,
            container: info_container(blob, flags),
            encrypted: flags & ENCRYPTED != 0,
            algorithm: blob.algorithm,
            digest: (self.digest != [0; 32]).then_some(Digest(self.digest)),
            crc32: (flags & HAS_CRC32 != 0).then(|| self.crc32.get()),
        })
    }

    /// Describes a chunk of blob `blob_index` that was met `file_offset` bytes into a file.
    pub(crate) fn new(chunk: &Chunk, blob_index: u32, file_offset: u64) -> Self {
        let batch = matches!(chunk.codec, Codec::Batch { .. });
        let stored = if batch { 0..0 } else { chunk.stored.clone() };
        let mut flags = match chunk.codec {
            Codec::Plain => 0,
            Codec::Batch { .. } => BATCH,
            Codec::Lz4Block | Codec::Zstd | Codec::Gzip | Codec::Zran { .. } => COMPRESSED,
        };
        if chunk.encrypted {
            flags |= ENCRYPTED;
        }
        if chunk.crc32.is_some() {
            flags |= HAS_CRC32;
        }
        Self {
            digest: chunk.digest.map_or([0; 32], |digest| digest.0),
            blob_index: blob_index.into(),
            flags: flags.into(),
            // Ranges were checked or cut to 32 bits when the chunk was made.
            stored_size: ((stored.end - stored.start) as u32).into(),
            plain_size: ((chunk.plain.end - chunk.plain.start) as u32).into(),
            stored_offset: stored.start.into(),
            plain_offset: chunk.plain.start.into(),
            file_offset: file_offset.into(),
            index: chunk.index.0.into(),
            crc32: chunk.crc32.unwrap_or(0).into(),
        }
    }
}
