//! The metadata of an image, read without regard to its RAFS version.

use std::ffi::{OsStr, OsString};
use std::ops::Range;

use crate::chunk::{ChunkIndex, ChunkTable, Compressor};
use crate::digest::{Algorithm, BlobId};

/// Why a bootstrap or a blob's own tables cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// A field holds what it must not.
    #[error("{what} at byte {at} is invalid: {why}")]
    Invalid {
        /// The structure or field.
        what: &'static str,
        /// Where it is in the bytes given.
        at: u64,
        /// What was found and what was wanted.
        why: String,
    },
    /// A structure reaches beyond the end.
    #[error("{what} at byte {at} reaches beyond the end ({len} bytes)")]
    Truncated {
        /// The structure.
        what: &'static str,
        /// Where it begins.
        at: u64,
        /// How many bytes there are.
        len: u64,
    },
    /// A valid image that this reader cannot read.
    #[error("{0} is not supported")]
    Unsupported(String),
}

/// The number of an inode: the nid in v6, the inode number in v5. At most 48 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ino(pub u64);

/// The type of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A regular file.
    Regular,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

/// What `stat(2)` wants to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attr {
    /// The inode.
    pub ino: Ino,
    /// Its type.
    pub kind: Kind,
    /// Permission bits, with set-uid, set-gid and sticky.
    pub permissions: u16,
    /// Number of names.
    pub nlink: u32,
    /// Owner; the reader's own where the image does not carry owners.
    pub uid: Option<u32>,
    /// Group, likewise.
    pub gid: Option<u32>,
    /// Device number in the encoding of `stat(2)`; 0 unless the file is a device.
    pub rdev: u32,
    /// Size in bytes.
    pub size: u64,
    /// Seconds of the modification time.
    pub mtime: i64,
    /// Nanoseconds of the modification time.
    pub mtime_nsec: u32,
}

/// A name in a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry<'a> {
    /// The inode named.
    pub ino: Ino,
    /// Its type.
    pub kind: Kind,
    /// The name; `.` and `..` are among the entries.
    pub name: &'a OsStr,
}

/// A part of a file that lies in one chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extent {
    /// Index of the blob in [`Bootstrap::blobs`].
    pub blob: u16,
    /// The chunk.
    pub chunk: ChunkIndex,
    /// Bytes of the file.
    pub file: Range<u64>,
    /// The same bytes in the blob's plain address space.
    pub plain: Range<u64>,
}

/// Where a blob keeps its chunk table (the "compression information").
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableLocation {
    /// Bytes in the object that holds it, as stored; the 4,096-byte header follows.
    pub stored: Range<u64>,
    /// Size of the table once decompressed.
    pub plain_size: u64,
    /// How it is compressed.
    pub compressor: Compressor,
}

/// One blob of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobInfo {
    /// Its name.
    pub id: BlobId,
    /// Size as stored, as far as the image says.
    pub stored_size: u64,
    /// Size of the plain address space.
    pub plain_size: u64,
    /// Number of chunks in its chunk table, those unused by this image included.
    pub chunk_count: u32,
    /// How it was compressed.
    pub compressor: Compressor,
    /// How its chunks are named.
    pub algorithm: Algorithm,
    /// Feature bits (blob-format, "Blob feature bits").
    pub features: u32,
    /// Where its chunk table is, if it has one.
    pub table: Option<TableLocation>,
}

/// The metadata of an image.
#[derive(Debug)]
pub struct Bootstrap<B> {
    bytes: B,
    blobs: Vec<BlobInfo>,
}

impl<B: AsRef<[u8]>> Bootstrap<B> {
    /// Checks the superblock and the tables and takes the bytes.
    pub fn open(bytes: B) -> Result<Self, FormatError> {
        let len = bytes.as_ref().len() as u64;
        Err(FormatError::Truncated { what: "superblock", at: 0, len })
    }

    /// Returns the root directory.
    pub fn root(&self) -> Ino {
        Ino(128)
    }

    /// Returns the number of inodes, as the image says.
    pub fn inode_count(&self) -> u64 {
        self.bytes.as_ref().len() as u64
    }

    /// Returns the size into which files are cut, in bytes.
    pub fn chunk_size(&self) -> u32 {
        1 << 20
    }

    /// Returns the RAFS version, 5 or 6.
    pub fn version(&self) -> u8 {
        6
    }

    /// Returns whether any inode has extended attributes.
    pub fn has_xattrs(&self) -> bool {
        false
    }

    /// Returns the attributes of an inode.
    pub fn attr(&self, ino: Ino) -> Result<Attr, FormatError> {
        Err(FormatError::Unsupported(format!("{ino:?}")))
    }

    /// Finds a name in a directory.
    pub fn lookup(&self, _dir: Ino, _name: &OsStr) -> Result<Option<Ino>, FormatError> {
        Ok(None)
    }

    /// Returns the entries of a directory from the `from`th on, `.` and `..` among them.
    pub fn entries(&self, _dir: Ino, _from: u64) -> Result<impl Iterator<Item = Result<Entry<'_>, FormatError>>, FormatError> {
        Ok(std::iter::empty())
    }

    /// Returns the target of a symbolic link.
    pub fn readlink(&self, ino: Ino) -> Result<OsString, FormatError> {
        Err(FormatError::Unsupported(format!("{ino:?}")))
    }

    /// Returns the extended attributes of an inode, full names.
    pub fn xattrs(&self, _ino: Ino) -> Result<Vec<(OsString, Vec<u8>)>, FormatError> {
        Ok(Vec::new())
    }

    /// Returns where the bytes `range` of a file lie, clipped to the file's size.
    pub fn extents(
        &self,
        _ino: Ino,
        _range: Range<u64>,
    ) -> Result<impl Iterator<Item = Result<Extent, FormatError>>, FormatError> {
        Ok(std::iter::empty())
    }

    /// Returns the blobs that hold the image's data.
    pub fn blobs(&self) -> &[BlobInfo] {
        &self.blobs
    }

    /// Returns what the bootstrap itself knows of the chunks of blob `blob`: for native blobs all that this
    /// image refers to, with the digests that a reader must believe.
    pub fn chunks(&self, _blob: u16) -> Result<ChunkTable, FormatError> {
        Ok(ChunkTable::default())
    }

    /// Returns the inodes that the builder asked to be fetched first.
    pub fn prefetch(&self) -> Result<Vec<Ino>, FormatError> {
        Ok(Vec::new())
    }
}
