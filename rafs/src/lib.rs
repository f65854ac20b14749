//! What a RAFS image *is*: metadata, chunks and codecs. Bytes in, values out.
//!
//! An image is one *bootstrap* (the tree: names, attributes, and which chunk of which blob holds which
//! part of a file) and any number of *blobs* (the chunks, compressed). This crate reads and writes both
//! and touches neither disk nor network.
//!
//! The same two words are used everywhere: *stored* bytes are bytes as they lie in the blob, *plain* bytes
//! are bytes as a reader of the file sees them.
#![forbid(unsafe_code)]

pub mod blob;
pub mod bootstrap;
pub mod chunk;
pub mod cipher;
pub mod codec;
pub mod digest;
pub mod estargz;
pub mod flags;
mod record;
mod sheet;
pub mod tree;
mod v5;
mod v6;
pub mod verified;
mod view;
pub mod write;
mod zran;

pub use bootstrap::{Attr, BlobInfo, Bootstrap, Entry, Extent, FormatError, Ino, Kind};
pub use chunk::{Chunk, ChunkIndex, ChunkTable, Codec, Compressor, Container};
pub use cipher::Cipher;
pub use digest::{Algorithm, BlobId, Digest};
pub use flags::Flags;
pub use tree::{Node, NodeId, NodeKind, Stat, Tree};
pub use verified::{ChunkError, Verified};
pub use write::Version;
