//! The only door to bytes that may be cached or shown to a reader.
//!
//! Stored bytes come from registries, mirrors, peers and disks: from strangers. [`Verified`] has no other
//! constructor than those here, and all but `trusting` compare with the digest that the
//! bootstrap names, so that a function that wants a `Verified` cannot be given anything else.

use std::sync::Arc;

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

/// Decodes chunks out of the same stored bytes one after the other, and opens a batch or a piece of a gzip stream once for
/// all chunks in it.
///
/// It goes by which batch or piece a chunk is in, and so belongs to the bytes of one answer or one file: for others there is
/// another.
#[derive(Debug, Default)]
pub struct Decoder {
    opened: Option<(Arc<Container>, Vec<u8>)>,
}

impl Decoder {
    /// As [`Verified::decode`].
    ///
    /// # Errors
    ///
    /// If the bytes are not the chunk's.
    pub fn decode<'c>(&mut self, chunk: &'c Chunk, stored: &[u8]) -> Result<Verified<'c>, ChunkError> {
        Verified::check(chunk, self.plain(chunk, stored)?)
    }

    /// As [`Verified::trusting`].
    ///
    /// # Errors
    ///
    /// If the bytes cannot be decoded, or do not match the CRC.
    pub fn trusting<'c>(&mut self, chunk: &'c Chunk, stored: &[u8]) -> Result<Verified<'c>, ChunkError> {
        let bytes = self.plain(chunk, stored)?;
        if chunk.crc32.is_some_and(|crc| crc != crc32c::crc32c(&bytes)) {
            return Err(ChunkError::Mismatch { chunk: chunk.index });
        }
        Ok(Verified { chunk, bytes })
    }

    fn plain(&mut self, chunk: &Chunk, stored: &[u8]) -> Result<Vec<u8>, ChunkError> {
        let (wanted, found) = (chunk.stored.end - chunk.stored.start, stored.len() as u64);
        if found != wanted {
            return Err(ChunkError::StoredLength { chunk: chunk.index, wanted, found });
        }
        self.unpack(chunk, stored).map_err(|source| ChunkError::Decode { chunk: chunk.index, source })
    }

    fn unpack(&mut self, chunk: &Chunk, stored: &[u8]) -> Result<Vec<u8>, DecodeError> {
        // Chunks have at most 16 MiB, batches and points a limit of their own.
        let len = chunk.plain_len() as usize;
        let (container, offset) = match (&chunk.container, chunk.codec) {
            (None, codec) => return codec::decode(codec, stored, len),
            (Some(container), codec) => match (&**container, codec) {
                (Container::Encrypted(cipher), codec) => return codec::decode(codec, &cipher.decrypt(stored)?, len),
                (Container::Batch { .. }, Codec::Batch { offset, .. }) => (container, offset),
                (Container::Point(_), Codec::Zran { offset, .. }) => (container, offset),
                (Container::Batch { .. } | Container::Point(_), _) => return Err(DecodeError::Member),
            },
        };
        let whole = match &mut self.opened {
            Some((opened, whole)) if Arc::ptr_eq(opened, container) => whole,
            slot => &mut slot.insert((Arc::clone(container), open(container, stored)?)).1,
        };
        let start = offset as usize;
        let part = whole.get(start..start.saturating_add(len));
        part.map(<[u8]>::to_vec).ok_or(DecodeError::Length { wanted: len, found: whole.len().saturating_sub(start) })
    }
}

/// Decodes all of a batch or of a piece of a gzip stream.
fn open(container: &Container, stored: &[u8]) -> Result<Vec<u8>, DecodeError> {
    match container {
        Container::Batch { batch, codec, cipher } => {
            let decrypted = cipher.as_ref().map(|cipher| cipher.decrypt(stored)).transpose()?;
            codec::decode(*codec, decrypted.as_deref().unwrap_or(stored), batch.plain_size as usize)
        }
        Container::Point(point) => zran::inflate(point, stored),
        Container::Encrypted(_) => Err(DecodeError::Member),
    }
}

impl<'c> Verified<'c> {
    /// Decodes the bytes of a chunk's stored range, and checks length and digest of the result.
    ///
    /// For a member of a batch or of a gzip stream that range holds the whole of it; a [`Decoder`] opens that once for
    /// several of them.
    pub fn decode(chunk: &'c Chunk, stored: &[u8]) -> Result<Self, ChunkError> {
        Decoder::default().decode(chunk, stored)
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
        Decoder::default().trusting(chunk, stored)
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
    fn members_of_one_batch_are_cut_out_of_what_was_opened_once() {
        let parts: [&[u8]; 3] = [b"first", b"second, longer", b"third"];
        let whole = parts.concat();
        let (codec, stored) = codec::encode(Compressor::Zstd, &whole);
        let batch = crate::blob::table::Batch { stored_size: stored.len() as u32, plain_size: whole.len() as u32 };
        let container = Arc::new(Container::Batch { batch, codec, cipher: None });
        let mut decoder = Decoder::default();
        let mut offset = 0;
        for (number, part) in (0u64..).zip(parts) {
            let chunk = Chunk {
                index: ChunkIndex(number as u32),
                plain: 4096 * number..4096 * number + part.len() as u64,
                stored: 0..stored.len() as u64,
                codec: Codec::Batch { batch: 0, offset },
                encrypted: false,
                algorithm: Algorithm::Blake3,
                digest: Some(Algorithm::Blake3.digest(part)),
                container: Some(Arc::clone(&container)),
                crc32: None,
            };
            offset += part.len() as u32;
            // What was opened for the first is not opened again: zeros would not decode.
            let bytes = if number == 0 { stored.to_vec() } else { vec![0; stored.len()] };
            assert_eq!(decoder.decode(&chunk, &bytes).expect("its bytes").bytes(), part);
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
