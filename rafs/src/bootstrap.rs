//! The metadata of an image, read without regard to its RAFS version.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::ops::Range;

use crate::blob::format::features;
use crate::chunk::{Chunk, ChunkIndex, ChunkTable, Codec, Compressor};
use crate::cipher::Cipher;
use crate::digest::{Algorithm, BlobId, Digest};
use crate::flags::Flags;
use crate::view::{View, invalid};
use crate::{v5, v6};

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

impl Kind {
    /// Returns the type that the upper bits of `st_mode` name.
    pub fn from_mode(mode: u32) -> Option<Self> {
        Some(match mode & 0o170_000 {
            0o100_000 => Self::Regular,
            0o040_000 => Self::Directory,
            0o120_000 => Self::Symlink,
            0o020_000 => Self::CharDevice,
            0o060_000 => Self::BlockDevice,
            0o010_000 => Self::Fifo,
            0o140_000 => Self::Socket,
            _ => return None,
        })
    }

    /// Returns the upper bits of `st_mode`.
    pub fn mode(self) -> u32 {
        match self {
            Self::Regular => 0o100_000,
            Self::Directory => 0o040_000,
            Self::Symlink => 0o120_000,
            Self::CharDevice => 0o020_000,
            Self::BlockDevice => 0o060_000,
            Self::Fifo => 0o010_000,
            Self::Socket => 0o140_000,
        }
    }
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
    /// Feature bits, see [`features`].
    pub features: u32,
    /// Where its chunk table is, if it has one.
    pub table: Option<TableLocation>,
    /// Size of its table of contents with the tar header after it; 0 where it is not known.
    pub toc_size: u32,
    /// Digest of its table of contents; zeros where it is not known.
    pub toc_digest: Digest,
    /// Name of the object that holds the chunk table, if the features have `SEPARATE`; else zeros.
    pub meta_digest: Digest,
    /// Size of that object, or 0.
    pub meta_size: u64,
    /// The key, if it is encrypted.
    pub cipher: Option<Cipher>,
    /// How many stored bytes, from the first on, the builder asked to be read ahead (v5 only; 0 for none).
    pub prefetch_size: u32,
}

impl BlobInfo {
    /// The name in bootstraps that lie inside the blob they name and so cannot know its digest.
    pub const PLACEHOLDER: &str = "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx";

    /// Makes the description of a blob of which nothing more is known.
    pub fn new(id: BlobId, compressor: Compressor, algorithm: Algorithm) -> Self {
        Self {
            id,
            stored_size: 0,
            plain_size: 0,
            chunk_count: 0,
            compressor,
            algorithm,
            features: features::ALIGNED | features::CAP_TAR_TOC,
            table: None,
            toc_size: 0,
            toc_digest: Digest([0; 32]),
            meta_digest: Digest([0; 32]),
            meta_size: 0,
            cipher: None,
            prefetch_size: 0,
        }
    }

    /// Returns whether all feature bits of `bits` are set.
    pub fn has(&self, bits: u32) -> bool {
        self.features & bits == bits
    }

    /// Returns the name of the object that holds the chunk table: the blob itself or its meta blob.
    pub fn table_object(&self) -> BlobId {
        if self.has(features::SEPARATE) { BlobId::from(self.meta_digest) } else { self.id.clone() }
    }
}

#[derive(Debug)]
enum Layout {
    V5(v5::read::Layout),
    V6(v6::read::Layout),
}

/// One of two iterators over the same values.
enum OfVersion<A, B> {
    V5(A),
    V6(B),
}

impl<T, A: Iterator<Item = T>, B: Iterator<Item = T>> Iterator for OfVersion<A, B> {
    type Item = T;

    fn next(&mut self) -> Option<T> {
        match self {
            Self::V5(items) => items.next(),
            Self::V6(items) => items.next(),
        }
    }
}

/// The metadata of an image.
#[derive(Debug)]
pub struct Bootstrap<B> {
    bytes: B,
    layout: Layout,
    blobs: Vec<BlobInfo>,
}

impl<B: AsRef<[u8]>> Bootstrap<B> {
    /// Checks the superblock and the tables and takes the bytes.
    pub fn open(bytes: B) -> Result<Self, FormatError> {
        let view = View(bytes.as_ref());
        let (layout, blobs) = match view.bytes("superblock", 0, 4)? {
            b"SFAR" => {
                let (layout, blobs) = v5::read::Layout::open(view)?;
                (Layout::V5(layout), blobs)
            }
            _ if view.len() < 4096 => {
                return Err(FormatError::Truncated { what: "superblock", at: 0, len: view.len() });
            }
            _ if view.bytes("superblock", 1024, 4)? == 0xE0F5_E1E2_u32.to_le_bytes() => {
                let (layout, blobs) = v6::read::Layout::open(view)?;
                (Layout::V6(layout), blobs)
            }
            _ => return Err(invalid("superblock", 0, "neither RAFS v5 nor RAFS v6")),
        };
        Ok(Self { bytes, layout, blobs })
    }

    /// Names the blob that the bootstrap was found in, for bootstraps that could not know it.
    pub fn name_inlined_blob(&mut self, id: &BlobId) {
        for blob in &mut self.blobs {
            if blob.id.as_str() == BlobInfo::PLACEHOLDER {
                blob.id = id.clone();
            }
        }
    }

    fn v5<'a>(&'a self, layout: &'a v5::read::Layout) -> v5::read::Image<'a> {
        v5::read::Image { bytes: View(self.bytes.as_ref()), layout }
    }

    fn v6<'a>(&'a self, layout: &'a v6::read::Layout) -> v6::read::Image<'a> {
        v6::read::Image { bytes: View(self.bytes.as_ref()), layout }
    }

    /// Returns the bytes of the bootstrap.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.as_ref()
    }

    /// Returns the root directory.
    pub fn root(&self) -> Ino {
        match &self.layout {
            Layout::V5(_) => v5::read::Layout::ROOT,
            Layout::V6(layout) => layout.root,
        }
    }

    /// Returns the number of inodes, as the image says; in v6 every name of a hard link counts.
    pub fn inode_count(&self) -> u64 {
        match &self.layout {
            Layout::V5(layout) => layout.inode_count,
            Layout::V6(layout) => layout.inos,
        }
    }

    /// Returns the size into which files are cut, in bytes: a power of two from 4,096 to 16 MiB.
    pub fn chunk_size(&self) -> u32 {
        match &self.layout {
            Layout::V5(layout) => layout.chunk_size,
            Layout::V6(layout) => layout.chunk_size,
        }
    }

    /// Returns the RAFS version, 5 or 6.
    pub fn version(&self) -> u8 {
        match &self.layout {
            Layout::V5(_) => 5,
            Layout::V6(_) => 6,
        }
    }

    /// Returns the flags of the image.
    pub fn flags(&self) -> Flags {
        match &self.layout {
            Layout::V5(layout) => layout.flags,
            Layout::V6(layout) => layout.flags,
        }
    }

    /// Returns whether any inode has extended attributes; a merged image may say so without need.
    pub fn has_xattrs(&self) -> bool {
        self.flags().has(Flags::HAS_XATTR)
    }

    /// Returns the attributes of an inode.
    pub fn attr(&self, ino: Ino) -> Result<Attr, FormatError> {
        match &self.layout {
            Layout::V5(layout) => self.v5(layout).attr(ino),
            Layout::V6(layout) => self.v6(layout).attr(ino),
        }
    }

    /// Finds a name in a directory.
    pub fn lookup(&self, dir: Ino, name: &OsStr) -> Result<Option<Ino>, FormatError> {
        match &self.layout {
            Layout::V5(layout) => self.v5(layout).lookup(dir, name),
            Layout::V6(layout) => self.v6(layout).lookup(dir, name),
        }
    }

    /// Returns the entries of a directory from the `from`th on, `.` and `..` among them.
    ///
    /// They come in the order of their names' bytes; in v6 that holds for `.` too, so that it is not always the
    /// first. An error ends them.
    pub fn entries(
        &self,
        dir: Ino,
        from: u64,
    ) -> Result<impl Iterator<Item = Result<Entry<'_>, FormatError>>, FormatError> {
        match &self.layout {
            Layout::V5(layout) => Ok(OfVersion::V5(self.v5(layout).entries(dir, from)?)),
            Layout::V6(layout) => Ok(OfVersion::V6(self.v6(layout).entries(dir, from)?)),
        }
    }

    /// Returns the target of a symbolic link.
    pub fn readlink(&self, ino: Ino) -> Result<OsString, FormatError> {
        match &self.layout {
            Layout::V5(layout) => self.v5(layout).readlink(ino),
            Layout::V6(layout) => self.v6(layout).readlink(ino),
        }
    }

    /// Returns the extended attributes of an inode, full names.
    pub fn xattrs(&self, ino: Ino) -> Result<Vec<(OsString, Vec<u8>)>, FormatError> {
        match &self.layout {
            Layout::V5(layout) => self.v5(layout).xattrs(ino),
            Layout::V6(layout) => self.v6(layout).xattrs(ino),
        }
    }

    /// Returns an upper bound of the bytes that the attributes and extents of an inode take in the bootstrap.
    pub(crate) fn weight(&self, ino: Ino) -> Result<u64, FormatError> {
        match &self.layout {
            Layout::V5(layout) => self.v5(layout).weight(ino),
            Layout::V6(layout) => self.v6(layout).weight(ino),
        }
    }

    /// Returns where the bytes `range` of a file lie, clipped to the file's size, in the order of the file.
    pub fn extents(
        &self,
        ino: Ino,
        range: Range<u64>,
    ) -> Result<impl Iterator<Item = Result<Extent, FormatError>>, FormatError> {
        match &self.layout {
            Layout::V5(layout) => Ok(OfVersion::V5(self.v5(layout).extents(ino, range, &self.blobs)?)),
            Layout::V6(layout) => Ok(OfVersion::V6(self.v6(layout).extents(ino, range, &self.blobs)?)),
        }
    }

    /// Returns the blobs that hold the image's data, in the order in which EROFS wants them as devices.
    pub fn blobs(&self) -> &[BlobInfo] {
        &self.blobs
    }

    /// Returns what the bootstrap itself knows of the chunks of blob `blob`: for native blobs all that this
    /// image refers to, with the digests that a reader must believe.
    pub fn chunks(&self, blob: u16) -> Result<ChunkTable, FormatError> {
        let Some(info) = self.blobs.get(usize::from(blob)) else {
            return Err(FormatError::Unsupported(format!("blob {blob} of an image with {}", self.blobs.len())));
        };
        match &self.layout {
            Layout::V6(layout) if layout.flags.has(Flags::TARFS) => self.tar_chunks(blob, info),
            Layout::V5(layout) => self.v5(layout).chunks(blob, info),
            Layout::V6(layout) => self.v6(layout).chunks(blob, info),
        }
    }

    /// Collects the chunks of a raw tar from the files that lie in it: the image has no table of them.
    fn tar_chunks(&self, blob: u16, info: &BlobInfo) -> Result<ChunkTable, FormatError> {
        let mut chunks = BTreeMap::new();
        for ino in crate::tree::Reading::of(self)?.nodes.into_keys() {
            if self.attr(ino)?.kind != Kind::Regular {
                continue;
            }
            for extent in self.extents(ino, 0..u64::MAX)? {
                let Extent { blob: of, chunk: index, plain, .. } = extent?;
                if of == blob {
                    let chunk = Chunk {
                        index,
                        plain: plain.clone(),
                        stored: plain,
                        codec: Codec::Plain,
                        encrypted: false,
                        algorithm: info.algorithm,
                        digest: None,
                        container: None,
                        crc32: None,
                    };
                    chunks.insert((chunk.plain.start, index), chunk);
                }
            }
        }
        Ok(ChunkTable::new(chunks.into_values().collect()))
    }

    /// Returns the inodes that the builder asked to be fetched first; the root alone means everything.
    pub fn prefetch(&self) -> Result<Vec<Ino>, FormatError> {
        match &self.layout {
            Layout::V5(layout) => self.v5(layout).prefetch(),
            Layout::V6(layout) => self.v6(layout).prefetch(),
        }
    }
}
