//! Numbers and structures of data blobs as they lie on disk.

/// Bits of [`BlobInfo::features`](crate::BlobInfo::features).
pub mod features {
    /// Each chunk begins at a multiple of 4,096 in the plain address space.
    pub const ALIGNED: u32 = 0x1;
    /// The bootstrap lies inside the blob.
    pub const INLINED_FS_META: u32 = 0x2;
    /// Chunk infos have 24 bytes.
    pub const CHUNK_INFO_V2: u32 = 0x4;
    /// The chunk table holds gzip random-access points.
    pub const ZRAN: u32 = 0x8;
    /// Data and chunk table are different objects.
    pub const SEPARATE: u32 = 0x10;
    /// The blob carries the digests of its chunks.
    pub const INLINED_CHUNK_DIGEST: u32 = 0x20;
    /// The blob is a raw tar.
    pub const TARFS: u32 = 0x40;
    /// The chunk table holds batches of small chunks.
    pub const BATCH: u32 = 0x80;
    /// Chunks, chunk table and its header are encrypted.
    pub const ENCRYPTED: u32 = 0x100;
    /// Made by a chunk-dictionary generator.
    pub const CHUNKDICT_GENERATED: u32 = 0x200;
    /// Holds copies of the chunks that a start of the image needs.
    pub const PREFETCH_BLOB: u32 = 0x400;
    /// Data lies in an external backend.
    pub const EXTERNAL: u32 = 0x800;
    /// Each section is followed by a tar header.
    pub const HAS_TAR_HEADER: u32 = 0x1000_0000;
    /// The blob ends with a table of contents.
    pub const HAS_TOC: u32 = 0x2000_0000;
    /// Made by a builder that knows tar headers and tables of contents.
    pub const CAP_TAR_TOC: u32 = 0x4000_0000;
    /// Never on disk in v6.
    pub const V5_WITHOUT_EXTENDED_TABLE: u32 = 0x8000_0000;
    /// Bits whose meaning must be known to read a blob.
    pub const MUST_KNOW: u32 = 0xf000;
}

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Begins and ends the header of a chunk table.
pub(crate) const TABLE_MAGIC: u32 = 0xb10b_b10b;
/// Size of the header that follows a chunk table.
pub const TABLE_HEADER_SIZE: u64 = 4096;

/// The header after a chunk table.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct TableHeader {
    pub(crate) magic: U32,
    pub(crate) features: U32,
    pub(crate) compressor: U32,
    pub(crate) chunk_count: U32,
    pub(crate) at: U64,
    pub(crate) stored_size: U64,
    pub(crate) plain_size: U64,
    /// Where batches or random-access points begin in the plain table.
    pub(crate) contexts_at: U64,
    pub(crate) contexts_size: U64,
    pub(crate) context_count: U32,
    pub(crate) reserved: [u8; 4032],
    pub(crate) magic_again: U32,
}

/// A chunk in a table of version 1.
///
/// Sizes are stored less one, their upper 4 bits apart from the lower 20; offsets keep their place, which
/// for plain ones is possible because they are multiples of 4,096.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct ChunkInfoV1 {
    pub(crate) plain: U64,
    pub(crate) stored: U64,
}

/// A chunk in a table of version 2.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct ChunkInfoV2 {
    pub(crate) plain: U64,
    pub(crate) stored: U64,
    /// Context and offset in it, or the CRC of the plain bytes.
    pub(crate) data: U64,
}

/// A batch of small chunks that were compressed together.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct BatchContext {
    pub(crate) stored_size: U32,
    pub(crate) plain_size: U32,
    pub(crate) reserved: [u8; 32],
}

/// A point at which a gzip stream can be entered.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct ZranContext {
    pub(crate) stored_at: U64,
    pub(crate) plain_at: U64,
    pub(crate) dictionary_at: U64,
    pub(crate) stored_size: U32,
    pub(crate) plain_size: U32,
    pub(crate) dictionary_size: U32,
    pub(crate) byte: u8,
    pub(crate) bits: u8,
    pub(crate) reserved: [u8; 2],
}

/// An entry of the table of contents.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct TocEntry {
    pub(crate) flags: U32,
    pub(crate) reserved: U32,
    pub(crate) name: [u8; 16],
    pub(crate) digest: [u8; 32],
    pub(crate) stored_at: U64,
    pub(crate) stored_size: U64,
    pub(crate) plain_size: U64,
    pub(crate) reserved2: [u8; 48],
}

const _: () = {
    assert!(size_of::<TableHeader>() as u64 == TABLE_HEADER_SIZE);
    assert!(size_of::<ChunkInfoV1>() == 16);
    assert!(size_of::<ChunkInfoV2>() == 24);
    assert!(size_of::<BatchContext>() == 40);
    assert!(size_of::<ZranContext>() == 40);
    assert!(size_of::<TocEntry>() == 128);
};
