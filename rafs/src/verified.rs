//! The only door to bytes that may be cached or shown to a reader.
//!
//! Stored bytes come from registries, mirrors, peers and disks: from strangers. [`Verified`] has no other
//! constructor than those here, and all but [`Verified::trusting`] compare with the digest that the
//! bootstrap names, so that a function that wants a `Verified` cannot be given anything else.

use crate::chunk::{Chunk, ChunkIndex, Codec, Container};
use crate::codec::{self, DecodeError};
use crate::zran;

/// Why stored bytes are not the chunk they should be.
#[derive(Debug, thiserror::Error)]
pub enum ChunkError {
    /// They have another length than the image says.
    #[error("chunk {} has {found} stored bytes, {wanted} are wanted", chunk.0)]
    StoredLength {
        /// The chunk.
        chunk: ChunkIndex,
        /// What the image says.
        wanted: u64,
        /// What was given.
        found: u64,
    },
    /// They cannot be decoded.
    #[error("chunk {} cannot be decoded", chunk.0)]
    Decode {
        /// The chunk.
        chunk: ChunkIndex,
        /// Why.
        #[source]
        source: DecodeError,
    },
    /// They decode to something else.
    #[error("chunk {} does not match its digest", chunk.0)]
    Mismatch {
        /// The chunk.
        chunk: ChunkIndex,
    },
    /// The image names no digest for the chunk.
    #[error("the image has no digest for chunk {}", chunk.0)]
    NoDigest {
        /// The chunk.
        chunk: ChunkIndex,
    },
}

/// The plain bytes of a chunk, known to match its digest.
#[derive(Debug)]
#[must_use]
pub struct Verified<'c> {
    chunk: &'c Chunk,
    bytes: Vec<u8>,
}

impl<'c> Verified<'c> {
    /// Decodes the bytes of a chunk's stored range, and checks length and digest of the result.
    ///
    /// For a member of a batch or of a gzip stream that range holds the whole of it.
    pub fn decode(chunk: &'c Chunk, stored: &[u8]) -> Result<Self, ChunkError> {
        Self::check(chunk, plain(chunk, stored)?)
    }

    /// Checks plain bytes that were decoded as a part of something larger: a batch, a gzip stream, a tar.
    pub fn check(chunk: &'c Chunk, bytes: Vec<u8>) -> Result<Self, ChunkError> {
        let Some(digest) = chunk.digest else { return Err(ChunkError::NoDigest { chunk: chunk.index }) };
        if bytes.len() as u64 != chunk.plain_len() || chunk.algorithm.digest(&bytes) != digest {
            return Err(ChunkError::Mismatch { chunk: chunk.index });
        }
        Ok(Self { chunk, bytes })
    }

    /// Decodes stored bytes without comparing digests.
    ///
    /// For operators who turned verification off, and for images that carry no digests; whoever calls this
    /// says so in the log. Length, and the CRC where the image has one, are still checked.
    pub fn trusting(chunk: &'c Chunk, stored: &[u8]) -> Result<Self, ChunkError> {
        let bytes = plain(chunk, stored)?;
        if chunk.crc32.is_some_and(|crc| crc != crc32c::crc32c(&bytes)) {
            return Err(ChunkError::Mismatch { chunk: chunk.index });
        }
        Ok(Self { chunk, bytes })
    }

    /// Returns the plain bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Returns the plain bytes and forgets which chunk they are.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// Returns the chunk.
    pub fn chunk(&self) -> &'c Chunk {
        self.chunk
    }
}

fn plain(chunk: &Chunk, stored: &[u8]) -> Result<Vec<u8>, ChunkError> {
    let (wanted, found) = (chunk.stored.end - chunk.stored.start, stored.len() as u64);
    if found != wanted {
        return Err(ChunkError::StoredLength { chunk: chunk.index, wanted, found });
    }
    unpack(chunk, stored).map_err(|source| ChunkError::Decode { chunk: chunk.index, source })
}

fn unpack(chunk: &Chunk, stored: &[u8]) -> Result<Vec<u8>, DecodeError> {
    // Chunks have at most 16 MiB, batches and points a limit of their own.
    let len = chunk.plain_len() as usize;
    let (whole, offset) = match (chunk.container.as_deref(), chunk.codec) {
        (None, codec) => return codec::decode(codec, stored, len),
        (Some(Container::Encrypted(cipher)), codec) => return codec::decode(codec, &cipher.decrypt(stored)?, len),
        (Some(Container::Batch { batch, codec, cipher }), Codec::Batch { offset, .. }) => {
            let decrypted = cipher.as_ref().map(|cipher| cipher.decrypt(stored)).transpose()?;
            (codec::decode(*codec, decrypted.as_deref().unwrap_or(stored), batch.plain_size as usize)?, offset)
        }
        (Some(Container::Point(point)), Codec::Zran { offset, .. }) => (zran::inflate(point, stored)?, offset),
        (Some(_), _) => return Err(DecodeError::Member),
    };
    let start = offset as usize;
    let part = whole.get(start..start.saturating_add(len));
    part.map(<[u8]>::to_vec).ok_or(DecodeError::Length { wanted: len, found: whole.len().saturating_sub(start) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::Compressor;
    use crate::digest::{Algorithm, Digest};

    fn chunk(plain: &[u8], algorithm: Algorithm) -> (Chunk, Vec<u8>) {
        let (codec, stored) = codec::encode(Compressor::Zstd, plain);
        let chunk = Chunk {
            index: ChunkIndex(3),
            plain: 4096..4096 + plain.len() as u64,
            stored: 100..100 + stored.len() as u64,
            codec,
            encrypted: false,
            algorithm,
            digest: Some(algorithm.digest(plain)),
            container: None,
            crc32: None,
        };
        (chunk, stored.into_owned())
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_found() {
        for algorithm in [Algorithm::Blake3, Algorithm::Sha256] {
            let (chunk, stored) = chunk(&b"shoal ".repeat(40), algorithm);
            assert_eq!(Verified::decode(&chunk, &stored).expect("intact").bytes(), b"shoal ".repeat(40));
            for at in 0..stored.len() {
                for bit in 0..8 {
                    let mut bad = stored.clone();
                    bad[at] ^= 1 << bit;
                    // A flipped bit may be one that the decoder ignores; then the plain bytes are still right.
                    if let Ok(verified) = Verified::decode(&chunk, &bad) {
                        assert_eq!(verified.bytes(), b"shoal ".repeat(40));
                    }
                }
                assert!(Verified::decode(&chunk, &stored[..at]).is_err());
            }
        }
    }

    #[test]
    fn another_digest_or_none_is_an_error() {
        let (mut chunk, stored) = chunk(b"some bytes that do not compress", Algorithm::Blake3);
        assert_eq!(chunk.codec, Codec::Plain);
        chunk.digest = Some(Digest([9; 32]));
        assert!(matches!(Verified::decode(&chunk, &stored), Err(ChunkError::Mismatch { .. })));
        chunk.digest = None;
        assert!(matches!(Verified::decode(&chunk, &stored), Err(ChunkError::NoDigest { .. })));
        assert!(Verified::trusting(&chunk, &stored).is_ok());
        chunk.crc32 = Some(1);
        assert!(Verified::trusting(&chunk, &stored).is_err());
    }
}
