//! The structures of a v5 bootstrap as they lie on disk; nothing here is checked.
//!
//! ```text
//! | superblock | inode table | prefetch table | blob table | extended blob table | inodes |
//! ```
//!
//! An inode is followed by its name, its target, its extended attributes and its chunks, each padded to 8
//! bytes. The inode table tells where each inode begins, in units of 8 bytes.

use zerocopy::little_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// "RAFS" read as a little-endian word.
pub(crate) const MAGIC: u32 = 0x5241_4653;
pub(crate) const VERSION: u32 = 0x500;
pub(crate) const SUPER_SIZE: u32 = 8192;
/// Of everything but extended attributes.
pub(crate) const ALIGNMENT: u64 = 8;

/// The superblock; zeros follow up to [`SUPER_SIZE`].
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Super {
    pub(crate) magic: U32,
    pub(crate) version: U32,
    pub(crate) size: U32,
    pub(crate) chunk_size: U32,
    pub(crate) flags: U64,
    pub(crate) inode_count: U64,
    pub(crate) inode_table_at: U64,
    pub(crate) prefetch_at: U64,
    pub(crate) blob_table_at: U64,
    pub(crate) inode_table_len: U32,
    pub(crate) prefetch_len: U32,
    pub(crate) blob_table_size: U32,
    pub(crate) extended_len: U32,
    pub(crate) extended_at: U64,
}

/// What is known of a blob besides its name.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct ExtendedBlob {
    pub(crate) chunk_count: U32,
    pub(crate) features: U32,
    pub(crate) plain_size: U64,
    pub(crate) stored_size: U64,
    pub(crate) reserved: [u8; 40],
}

/// Bit of [`Inode::flags`]: a symbolic link.
pub(crate) const IS_SYMLINK: u64 = 1;
/// Bit of [`Inode::flags`]: extended attributes follow.
pub(crate) const HAS_XATTR: u64 = 4;
/// Bit of [`Inode::flags`]: some chunks are left out.
pub(crate) const HAS_HOLE: u64 = 8;

/// An inode.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Inode {
    pub(crate) digest: [u8; 32],
    pub(crate) parent: U64,
    pub(crate) ino: U64,
    pub(crate) uid: U32,
    pub(crate) gid: U32,
    pub(crate) projid: U32,
    pub(crate) mode: U32,
    pub(crate) size: U64,
    pub(crate) blocks: U64,
    pub(crate) flags: U64,
    pub(crate) nlink: U32,
    pub(crate) child_index: U32,
    /// Children of a directory, chunks of a regular file.
    pub(crate) child_count: U32,
    pub(crate) name_size: U16,
    pub(crate) symlink_size: U16,
    pub(crate) rdev: U32,
    pub(crate) mtime_nsec: U32,
    pub(crate) mtime: I64,
    pub(crate) reserved: [u8; 8],
}

const _: () = {
    assert!(size_of::<Super>() == 80);
    assert!(size_of::<ExtendedBlob>() == 64);
    assert!(size_of::<Inode>() == 128);
};
