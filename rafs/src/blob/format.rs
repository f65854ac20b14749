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
