//! The structures of a v6 bootstrap as they lie on disk; nothing here is checked.
//!
//! ```text
//! 0       1024    1152      1408           A            B          M                     C
//! | zeros | EROFS | RAFS    | device slots | blob table | prefetch | inodes, directory   | chunk table |
//! |       | super | super   | 128 B each   | 256 B each | nids     | blocks, chunk lists | 80 B each   |
//! ```
//!
//! The kernel finds the EROFS superblock at byte 1,024 and leaves 128-byte slots after it alone; the RAFS
//! superblock takes two of them, so that device slots begin with slot 11. All else is found by offsets.

use zerocopy::little_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub(crate) const SUPER_AT: u64 = 1024;
pub(crate) const RAFS_SUPER_AT: u64 = 1152;
pub(crate) const DEVICES_AT: u64 = 1408;
/// [`DEVICES_AT`] in slots.
pub(crate) const DEVICES_SLOT: u16 = 11;
pub(crate) const MAGIC: u32 = 0xE0F5_E1E2;
/// Marks a RAFS image among EROFS images.
pub(crate) const COMPAT_RAFS: u32 = 0x4000_0000;
/// Chunked files and a device table.
pub(crate) const INCOMPAT: u32 = 0x4 | 0x8;
/// The size of everything but tarfs blocks: tables are aligned to it, the file padded to it.
pub(crate) const PAGE: u64 = 4096;
/// Nids count units of this many bytes.
pub(crate) const SLOT: u64 = 32;
/// A block of 4,096 bytes as a power of two.
pub(crate) const PAGE_BITS: u8 = 12;
/// A block of a tarfs image as a power of two.
pub(crate) const TARFS_BITS: u8 = 9;

macro_rules! on_disk {
    ($(#[$meta:meta])* $name:ident { $($(#[$note:meta])* $field:ident: $type:ty),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
        #[repr(C)]
        pub(crate) struct $name { $($(#[$note])* pub(crate) $field: $type),* }
    };
}

on_disk!(
    /// The EROFS superblock.
    ErofsSuper {
        magic: U32,
        checksum: U32,
        feature_compat: U32,
        block_bits: u8,
        ext_slots: u8,
        root_nid: U16,
        inos: U64,
        build_time: U64,
        build_time_nsec: U32,
        blocks: U32,
        meta_block: U32,
        xattr_block: U32,
        uuid: [u8; 16],
        volume: [u8; 16],
        feature_incompat: U32,
        union: U16,
        extra_devices: U16,
        device_slot: U16,
        reserved: [u8; 38],
    }
);

on_disk!(
    /// The RAFS superblock.
    RafsSuper {
        flags: U64,
        blob_table_at: U64,
        blob_table_size: U32,
        chunk_size: U32,
        chunk_table_at: U64,
        chunk_table_size: U64,
        prefetch_at: U64,
        prefetch_size: U32,
        padding: U32,
        reserved: [u8; 200],
    }
);

on_disk!(
    /// What the kernel knows of a blob.
    DeviceSlot { id: [u8; 64], blocks: U32, mapped_block: U32, reserved: [u8; 56] }
);

on_disk!(
    /// What RAFS knows of a blob.
    BlobEntry {
        id: [u8; 64],
        index: U32,
        chunk_size: U32,
        chunk_count: U32,
        compressor: U32,
        algorithm: U32,
        features: U32,
        stored_size: U64,
        plain_size: U64,
        toc_size: U32,
        table_compressor: U32,
        table_at: U64,
        table_stored_size: U64,
        table_plain_size: U64,
        toc_digest: [u8; 32],
        /// Encrypted blobs keep their key here.
        meta_digest: [u8; 32],
        /// Encrypted blobs keep the first half of the IV here.
        meta_size: [u8; 8],
        iv_second_half: [u8; 8],
        cipher: U32,
        reserved: [u8; 36],
    }
);

/// Bit of `format`: the inode has 64 bytes, not 32.
pub(crate) const EXTENDED: u16 = 1;
/// Values of `format >> 1`.
pub(crate) const FLAT_PLAIN: u16 = 0;
pub(crate) const FLAT_INLINE: u16 = 2;
pub(crate) const CHUNK_BASED: u16 = 4;
/// In a regular file's `union`: chunk list entries have 8 bytes.
pub(crate) const CHUNK_INDEXES: u32 = 0x20;

on_disk!(
    /// The inode that current builders write.
    ExtendedInode {
        format: U16,
        xattr_count: U16,
        mode: U16,
        reserved: U16,
        size: U64,
        union: U32,
        number: U32,
        uid: U32,
        gid: U32,
        mtime: I64,
        mtime_nsec: U32,
        nlink: U32,
        reserved2: [u8; 16],
    }
);

on_disk!(
    /// The inode of old builders: no times, short owners.
    CompactInode {
        format: U16,
        xattr_count: U16,
        mode: U16,
        nlink: U16,
        size: U32,
        reserved: U32,
        union: U32,
        number: U32,
        uid: U16,
        gid: U16,
        reserved2: U32,
    }
);

on_disk!(
    /// Begins the extended attributes of an inode.
    XattrHeader { reserved: U32, shared_count: u8, reserved2: [u8; 7] }
);

on_disk!(
    /// Begins one extended attribute; name without prefix and value follow, padded to 4 bytes.
    XattrEntry { name_len: u8, prefix: u8, value_len: U16 }
);

on_disk!(
    /// One name of a directory block. The names follow the last of them.
    Dirent { nid: U64, name_at: U16, kind: u8, reserved: u8 }
);

on_disk!(
    /// One piece of a regular file.
    ///
    /// The kernel knows the second pair of bytes as the device and masks it with the number of devices,
    /// which hides the high bits of the chunk index from it.
    ChunkEntry { index_low: U16, device: u8, index_high: u8, block: U32 }
);

const _: () = {
    assert!(size_of::<ErofsSuper>() == 128);
    assert!(size_of::<RafsSuper>() == 256);
    assert!(size_of::<DeviceSlot>() == 128);
    assert!(size_of::<BlobEntry>() == 256);
    assert!(size_of::<ExtendedInode>() == 64);
    assert!(size_of::<CompactInode>() == 32);
    assert!(size_of::<XattrHeader>() == 12);
    assert!(size_of::<XattrEntry>() == 4);
    assert!(size_of::<Dirent>() == 12);
    assert!(size_of::<ChunkEntry>() == 8);
    assert!(SUPER_AT + 128 == RAFS_SUPER_AT && RAFS_SUPER_AT + 256 == DEVICES_AT);
    assert!(DEVICES_SLOT as u64 * 128 == DEVICES_AT);
};
