//! Digests of chunks and names of blobs.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use sha2::Digest as _;

/// The hash functions a RAFS image may name its chunks with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Algorithm {
    /// BLAKE3, the default of the builder.
    Blake3,
    /// SHA-256, forced for images that refer to original OCI layers.
    Sha256,
}

impl Algorithm {
    /// Returns the algorithm with this number in blob tables.
    pub fn from_code(code: u32) -> Option<Self> {
        match code {
            0 => Some(Self::Blake3),
            1 => Some(Self::Sha256),
            _ => None,
        }
    }

    /// Returns the number of the algorithm in blob tables.
    pub fn code(self) -> u32 {
        match self {
            Self::Blake3 => 0,
            Self::Sha256 => 1,
        }
    }

    /// Returns the digest of `plain`.
    pub fn digest(self, plain: &[u8]) -> Digest {
        match self {
            Self::Blake3 => Digest(*blake3::hash(plain).as_bytes()),
            Self::Sha256 => Digest(sha2::Sha256::digest(plain).into()),
        }
    }
}

/// A 32-byte digest.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(pub [u8; 32]);

/// Text that is not a digest of 64 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a digest of 64 hexadecimal digits")]
pub struct InvalidDigest(String);

impl FromStr for Digest {
    type Err = InvalidDigest;

    /// Parses 64 hexadecimal digits, without or with the prefix `sha256:`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(text.strip_prefix("sha256:").unwrap_or(text), &mut bytes)
            .map_err(|_| InvalidDigest(text.to_owned()))?;
        Ok(Self(bytes))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The name of a blob: the hexadecimal SHA-256 of its bytes, or whatever its builder was told to call it.
///
/// It is safe to use as a file name: 1 to 255 bytes, no `/`, no NUL, neither `.` nor `..`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlobId(Arc<str>);

/// Text that cannot name a blob.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` cannot name a blob: 1 to 255 bytes without `/` and NUL are wanted")]
pub struct InvalidBlobId(String);

impl BlobId {
    /// Returns the name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the digest that the name spells, if it spells one.
    pub fn digest(&self) -> Option<Digest> {
        self.0.parse().ok()
    }
}

impl FromStr for BlobId {
    type Err = InvalidBlobId;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fits = !text.is_empty() && text.len() <= 255 && !text.contains(['/', '\0']);
        if fits && text != "." && text != ".." { Ok(Self(text.into())) } else { Err(InvalidBlobId(text.to_owned())) }
    }
}

impl From<Digest> for BlobId {
    fn from(digest: Digest) -> Self {
        Self(digest.to_string().into())
    }
}

impl fmt::Display for BlobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for BlobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
