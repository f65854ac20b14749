//! Writes bootstraps of either version from the same values.
//!
//! The same tree always gives the same bytes: extended attributes, which the established builder writes in the order
//! of a hash map, are sorted.

use std::ffi::{OsStr, OsString};
use std::io::{self, Cursor, Read, Seek, Write};
use std::os::unix::ffi::OsStrExt;

use crate::bootstrap::BlobInfo;
use crate::chunk::{Chunk, Compressor};
use crate::digest::{Algorithm, BlobId};
use crate::sheet::Sheet;
use crate::tree::{ChunkRef, NodeId, Tree};
use crate::{v5, v6};

/// The two forms of a bootstrap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Version {
    /// The older form, which only a daemon can serve.
    V5,
    /// An EROFS image.
    #[default]
    V6,
}

impl Version {
    /// Returns the version with this number.
    pub fn from_number(number: u8) -> Option<Self> {
        match number {
            5 => Some(Self::V5),
            6 => Some(Self::V6),
            _ => None,
        }
    }

    /// Returns its number.
    pub fn number(self) -> u8 {
        match self {
            Self::V5 => 5,
            Self::V6 => 6,
        }
    }
}

/// Why a tree cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The root is not a directory.
    #[error("the root is not a directory")]
    Root,
    /// A directory has two names.
    #[error("a directory has two names (node {})", .0.0)]
    DirectoryTwice(NodeId),
    /// A name that cannot be one.
    #[error("{0:?} cannot be a file's name")]
    Name(OsString),
    /// The target of a symbolic link has no bytes or more than 4,096.
    #[error("a symbolic link cannot have {0} bytes")]
    Symlink(usize),
    /// An extended attribute that the format cannot hold.
    #[error(
        "the extended attribute {0:?} has a prefix that is none of user, system.posix_acl_*, trusted and security, or is too long"
    )]
    Xattr(OsString),
    /// A file's chunks are not those that its size wants.
    #[error("a file of {size} bytes has {chunks} chunks")]
    Chunks {
        /// The file's size.
        size: u64,
        /// How many chunks it has.
        chunks: usize,
    },
    /// A file refers to a chunk that no table has.
    #[error("blob {} has no chunk {}", .0.blob, .0.chunk.0)]
    UnknownChunk(ChunkRef),
    /// A chunk's plain address is not a multiple of the block size, or too large.
    #[error("chunk {} of blob {} does not begin at a block", .0.chunk.0, .0.blob)]
    Address(ChunkRef),
    /// A blob's name does not fit.
    #[error("the blob name {0} has more than 64 bytes or is there twice")]
    BlobName(BlobId),
    /// The chunk size is not a power of two from 4,096 to 16 MiB.
    #[error("a chunk size of {0} bytes is not a power of two from 4096 to 16777216")]
    ChunkSize(u32),
    /// A node to prefetch has no name in the tree.
    #[error("the node {} to prefetch has no name", .0.0)]
    Prefetch(NodeId),
    /// More than the format can count.
    #[error("the image has too many {0}")]
    TooMany(&'static str),
    /// A blob of another compressor or digest: version 5 names one for all of them.
    #[error(
        "blob {0} has another compressor or digest than the image, and RAFS v5 knows one for all blobs: build them alike, or use version 6"
    )]
    Mixed(BlobId),
    /// The bytes could not be written.
    #[error("could not write the bootstrap")]
    Out(#[from] io::Error),
    /// A blob that only version 6 can describe.
    #[error("blob {0} is batched, encrypted, a raw tar or a gzip stream: only RAFS v6 can describe it")]
    NeedsV6(BlobId),
}

/// How a bootstrap is written.
#[derive(Debug, Clone)]
pub struct Options {
    /// Its form.
    pub version: Version,
    /// Size into which files were cut, in bytes: a power of two from 4,096 to 16 MiB.
    pub chunk_size: u32,
    /// The builder's compressor; in version 6 each blob names its own.
    pub compressor: Compressor,
    /// The builder's digest algorithm; in version 6 each blob names its own.
    pub algorithm: Algorithm,
    /// Whether owners are real; else readers report their own.
    pub explicit_ids: bool,
    /// Whether to say that there are extended attributes even where there are none, as merged images do.
    pub claim_xattrs: bool,
    /// Blobs are raw tars, blocks have 512 bytes. Version 6 only.
    pub tarfs: bool,
    /// What to fetch first; [`Tree::prefetch`] finds it. The root alone means everything.
    pub prefetch: Vec<NodeId>,
}

impl Default for Options {
    /// Version 6, 1 MiB, zstd and BLAKE3, as the established builder has it.
    fn default() -> Self {
        Self {
            version: Version::V6,
            chunk_size: 1 << 20,
            compressor: Compressor::Zstd,
            algorithm: Algorithm::Blake3,
            explicit_ids: true,
            claim_xattrs: false,
            tarfs: false,
            prefetch: Vec::new(),
        }
    }
}

/// Writes a tree into memory, as [`write_into`] does.
///
/// # Errors
///
/// As [`write_into`].
pub fn write<C: AsRef<[Chunk]>>(
    tree: &Tree,
    blobs: &[BlobInfo],
    chunks: &[C],
    options: &Options,
) -> Result<Vec<u8>, WriteError> {
    let mut out = Cursor::new(Vec::new());
    write_into(tree, blobs, chunks, options, &mut out)?;
    Ok(out.into_inner())
}

/// Writes a tree into an empty file, of which little is in memory at once; `chunks` holds for each of `blobs` the chunks that
/// the tree refers to, or more. Returns the number of bytes.
///
/// # Errors
///
/// If the format cannot hold the tree, the tree refers to what is not there, or the file cannot be written.
pub fn write_into<C: AsRef<[Chunk]>>(
    tree: &Tree,
    blobs: &[BlobInfo],
    chunks: &[C],
    options: &Options,
    out: &mut (impl Read + Write + Seek),
) -> Result<u64, WriteError> {
    let chunk_size = options.chunk_size;
    if !chunk_size.is_power_of_two() || !(4096..=16 << 20).contains(&chunk_size) {
        return Err(WriteError::ChunkSize(chunk_size));
    }
    let chunks = Chunks::new(chunks);
    let sheet = Sheet::new(out);
    match options.version {
        Version::V5 => v5::write::write(tree, blobs, &chunks, options, sheet),
        Version::V6 => v6::write::write(tree, blobs, &chunks, options, sheet),
    }
}

/// The chunks of all blobs by their index.
pub(crate) struct Chunks<'a>(Vec<Vec<&'a Chunk>>);

impl<'a> Chunks<'a> {
    fn new<C: AsRef<[Chunk]>>(tables: &'a [C]) -> Self {
        let mut all: Vec<Vec<&Chunk>> = tables.iter().map(|table| table.as_ref().iter().collect()).collect();
        for chunks in &mut all {
            chunks.sort_by_key(|chunk| chunk.index);
        }
        Self(all)
    }

    pub(crate) fn get(&self, wanted: ChunkRef) -> Result<&'a Chunk, WriteError> {
        let chunks = self.0.get(usize::from(wanted.blob)).ok_or(WriteError::UnknownChunk(wanted))?;
        // Where no chunk is left out, each is at its number.
        if let Some(chunk) = chunks.get(wanted.chunk.0 as usize).filter(|chunk| chunk.index == wanted.chunk) {
            return Ok(chunk);
        }
        let found = chunks.binary_search_by_key(&wanted.chunk, |chunk| chunk.index);
        found.map(|position| chunks[position]).map_err(|_| WriteError::UnknownChunk(wanted))
    }
}

/// Refuses what cannot be a file's name.
pub(crate) fn check_name(name: &OsStr) -> Result<(), WriteError> {
    let bytes = name.as_bytes();
    let fits = !bytes.is_empty() && bytes.len() <= 255 && !bytes.contains(&b'/') && !bytes.contains(&0);
    if fits && bytes != b"." && bytes != b".." { Ok(()) } else { Err(WriteError::Name(name.to_owned())) }
}

/// Refuses what cannot be the target of a symbolic link.
pub(crate) fn check_target(target: &OsStr) -> Result<(), WriteError> {
    if (1..=4096).contains(&target.len()) { Ok(()) } else { Err(WriteError::Symlink(target.len())) }
}

/// The prefixes of attribute names with their numbers in version 6; the first that matches is the one that is stored.
pub(crate) const XATTR_PREFIXES: [(u8, &[u8]); 5] = [
    (1, b"user."),
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (4, b"trusted."),
    (6, b"security."),
];

/// Splits the name of an extended attribute into the number of its prefix and the rest; refuses what kernels would.
pub(crate) fn xattr_name<'n>(name: &'n OsStr, value: &[u8]) -> Result<(u8, &'n [u8]), WriteError> {
    let found = XATTR_PREFIXES.iter().find_map(|(code, prefix)| Some((*code, name.as_bytes().strip_prefix(*prefix)?)));
    found
        .filter(|(_, suffix)| suffix.len() <= 255 && name.len() <= 255 && value.len() <= usize::from(u16::MAX))
        .ok_or_else(|| WriteError::Xattr(name.to_owned()))
}
