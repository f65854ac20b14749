//! The flag word of a superblock; v5 and v6 share it.

use crate::bootstrap::FormatError;
use crate::chunk::Compressor;
use crate::digest::Algorithm;
use crate::view::invalid;

const COMPRESSION_NONE: u64 = 0x1;
const COMPRESSION_LZ4: u64 = 0x2;
const HASH_BLAKE3: u64 = 0x4;
const HASH_SHA256: u64 = 0x8;
const COMPRESSION_GZIP: u64 = 0x40;
const COMPRESSION_ZSTD: u64 = 0x80;
const COMPRESSION: u64 = COMPRESSION_NONE | COMPRESSION_LZ4 | COMPRESSION_GZIP | COMPRESSION_ZSTD;
const HASH: u64 = HASH_BLAKE3 | HASH_SHA256;
/// All bits that mean something, and those that old readers must let pass.
const KNOWN: u64 = 0xff00_03ff;

/// The flags of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flags(pub u64);

impl Flags {
    /// Owners in the inodes are real.
    pub const EXPLICIT_IDS: u64 = 0x10;
    /// Some inode has extended attributes.
    pub const HAS_XATTR: u64 = 0x20;
    /// Every blob carries the digests of its chunks.
    pub const INLINED_CHUNK_DIGEST: u64 = 0x100;
    /// Blobs are raw tars and blocks have 512 bytes.
    pub const TARFS: u64 = 0x200;
    /// Nothing is encrypted.
    pub const ENCRYPTION_NONE: u64 = 0x0100_0000;
    /// Some blob is encrypted.
    pub const ENCRYPTION_AES_XTS: u64 = 0x0200_0000;

    /// Checks the flag word found at byte `at` of a bootstrap of version 5: old ones name no digest, or no compressor.
    pub(crate) fn check_v5(self, at: u64) -> Result<Self, FormatError> {
        let unknown = self.0 & !KNOWN;
        if unknown != 0 {
            return Err(invalid("superblock flags", at, format!("bits {unknown:#x} are unknown")));
        }
        Ok(self)
    }

    /// Checks the flag word found at byte `at` of a bootstrap of version 6.
    pub(crate) fn check(self, at: u64) -> Result<Self, FormatError> {
        self.check_v5(at)?;
        if (self.0 & COMPRESSION).count_ones() != 1 || (self.0 & HASH).count_ones() != 1 {
            let why = format!("{:#x} does not name exactly one compressor and one digest", self.0);
            return Err(invalid("superblock flags", at, why));
        }
        Ok(self)
    }

    /// Returns the bits that name a compressor and a digest.
    pub fn of(compressor: Compressor, algorithm: Algorithm) -> Self {
        let compression = match compressor {
            Compressor::None => COMPRESSION_NONE,
            Compressor::Lz4Block => COMPRESSION_LZ4,
            Compressor::Gzip => COMPRESSION_GZIP,
            Compressor::Zstd => COMPRESSION_ZSTD,
        };
        let hash = match algorithm {
            Algorithm::Blake3 => HASH_BLAKE3,
            Algorithm::Sha256 => HASH_SHA256,
        };
        Self(compression | hash)
    }

    /// Returns whether all bits of `bits` are set.
    pub fn has(self, bits: u64) -> bool {
        self.0 & bits == bits
    }

    /// Returns the builder's compressor; where several bits are set the first in the order of the format wins, where none
    /// is nothing is compressed.
    pub fn compressor(self) -> Compressor {
        if self.has(COMPRESSION_NONE) {
            Compressor::None
        } else if self.has(COMPRESSION_LZ4) {
            Compressor::Lz4Block
        } else if self.has(COMPRESSION_GZIP) {
            Compressor::Gzip
        } else if self.has(COMPRESSION_ZSTD) {
            Compressor::Zstd
        } else {
            Compressor::None
        }
    }

    /// Returns the builder's digest algorithm: BLAKE3 unless it says otherwise.
    pub fn algorithm(self) -> Algorithm {
        if self.has(HASH_SHA256) && !self.has(HASH_BLAKE3) { Algorithm::Sha256 } else { Algorithm::Blake3 }
    }
}
