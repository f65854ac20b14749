//! The chunk table of a blob: where each chunk lies and how it is coded.
//!
//! It comes with the blob, not with the bootstrap, and holds no digests: what it says is a hint until the
//! decoded chunk matches the digest that the bootstrap names. [`BlobTable::with_digests`] joins the two.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use zerocopy::IntoBytes;

use super::format::{
    BatchContext, ChunkInfoV1, ChunkInfoV2, TABLE_HEADER_SIZE, TABLE_MAGIC, TableHeader, ZranContext, features,
};
use crate::bootstrap::{BlobInfo, FormatError, TableLocation};
use crate::chunk::{Chunk, ChunkIndex, ChunkTable, Codec, Compressor, Container};
use crate::cipher::Cipher;
use crate::codec;
use crate::view::{View, invalid};

/// Windows of deflate reach back at most this far.
const MAX_DICTIONARY: u32 = 32768;
/// Contexts decode to at most this many bytes; builders stay below 4 MiB.
const MAX_CONTEXT: u32 = 64 << 20;

/// Chunks that were compressed together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Size as stored; the first byte is where its members' stored ranges begin.
    pub stored_size: u32,
    /// Size of all members, one after the other.
    pub plain_size: u32,
}

/// A point at which a gzip stream can be entered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Point {
    /// Bytes of the gzip stream to feed.
    pub stored: Range<u64>,
    /// Where what they inflate to begins in the whole stream's.
    pub plain_at: u64,
    /// Number of bytes that they inflate to.
    pub plain_size: u32,
    /// The plain bytes before the point, as far as deflate may look back.
    pub dictionary: Vec<u8>,
    /// The byte before the point.
    pub byte: u8,
    /// How many of its upper bits belong to the point (0 to 7).
    pub bits: u8,
}

/// A blob's own table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BlobTable {
    chunks: Vec<Chunk>,
    /// Batches or points, in the order of their index.
    containers: Vec<Arc<Container>>,
}

impl TableLocation {
    /// Returns the bytes of the object that hold the table and its header.
    pub fn with_header(&self) -> Range<u64> {
        self.stored.start..self.stored.end.saturating_add(TABLE_HEADER_SIZE)
    }
}

impl BlobTable {
    /// Reads the table of blob `info` from the bytes that [`TableLocation::with_header`] names.
    pub fn read(info: &BlobInfo, stored: &[u8]) -> Result<Self, FormatError> {
        let Some(location) = &info.table else { return Ok(Self::default()) };
        let view = View(stored);
        let table_size = location.stored.end - location.stored.start;
        let table = view.bytes("chunk table", 0, table_size)?;
        let header = view.bytes("chunk table header", table_size, TABLE_HEADER_SIZE)?;
        let (table, header) = (decrypt(info.cipher.as_ref(), table)?, decrypt(info.cipher.as_ref(), header)?);
        let header: &TableHeader = View(&header).read("chunk table header", 0)?;
        header.check(info, location, table_size)?;
        // Entries differ at least in their offsets; more than this does not come out of honest bytes, and a
        // false promise must not reserve memory.
        if location.plain_size > table_size.saturating_mul(1024) {
            return Err(invalid("chunk table", 0, "it shrank beyond belief"));
        }
        let plain = codec::decode(
            coding(location.compressor, table_size, location.plain_size),
            &table,
            location.plain_size as usize,
        )
        .map_err(|error| invalid("chunk table", 0, error.to_string()))?;
        Self::parse(info, header, &plain)
    }

    fn parse(info: &BlobInfo, header: &TableHeader, plain: &[u8]) -> Result<Self, FormatError> {
        let view = View(plain);
        let count = u64::from(info.chunk_count);
        let mut table = Self::default();
        if info.has(features::CHUNK_INFO_V2) {
            table.read_contexts(info, header, view)?;
            for (index, entry) in view.array::<ChunkInfoV2>("chunk table", 0, count)?.iter().enumerate() {
                table.chunks.push(entry.chunk(info, index as u32, &table)?);
            }
        } else {
            for (index, entry) in view.array::<ChunkInfoV1>("chunk table", 0, count)?.iter().enumerate() {
                table.chunks.push(entry.chunk(info, index as u32)?);
            }
        }
        Ok(table)
    }

    fn read_contexts(&mut self, info: &BlobInfo, header: &TableHeader, view: View<'_>) -> Result<(), FormatError> {
        let (at, count) = (header.contexts_at.get(), u64::from(header.context_count.get()));
        if info.has(features::BATCH) {
            for (index, context) in view.array::<BatchContext>("batches", at, count)?.iter().enumerate() {
                let (stored_size, plain_size) = (context.stored_size.get(), context.plain_size.get());
                if stored_size > MAX_CONTEXT || plain_size > MAX_CONTEXT {
                    return Err(invalid("batch", at + 40 * index as u64, "is too large"));
                }
                let batch = Batch { stored_size, plain_size };
                let codec = coding(info.compressor, u64::from(stored_size), u64::from(plain_size));
                self.containers.push(Arc::new(Container::Batch { batch, codec, cipher: info.cipher.clone() }));
            }
        } else if info.has(features::ZRAN) {
            let dictionaries = at.saturating_add(40 * count);
            let mut budget = view.len();
            for (index, context) in view.array::<ZranContext>("random-access points", at, count)?.iter().enumerate() {
                let bad = |why: &str| invalid("random-access point", at + 40 * index as u64, why);
                let dictionary_size = context.dictionary_size.get();
                if dictionary_size > MAX_DICTIONARY || context.bits > 7 {
                    return Err(bad("its dictionary is too large or its bits are too many"));
                }
                if context.plain_size.get() > MAX_CONTEXT || context.stored_size.get() > MAX_CONTEXT {
                    return Err(bad("is too large"));
                }
                let start = context.stored_at.get();
                let end =
                    start.checked_add(u64::from(context.stored_size.get())).ok_or_else(|| bad("lies too far away"))?;
                // Dictionaries that overlap would multiply: all of them together fit into the table.
                budget =
                    budget.checked_sub(u64::from(dictionary_size)).ok_or_else(|| bad("its dictionary is shared"))?;
                let dictionary_at = dictionaries.saturating_add(context.dictionary_at.get());
                let dictionary = view.bytes("dictionary", dictionary_at, u64::from(dictionary_size))?.to_vec();
                self.containers.push(Arc::new(Container::Point(Point {
                    stored: start..end,
                    plain_at: context.plain_at.get(),
                    plain_size: context.plain_size.get(),
                    dictionary,
                    byte: context.byte,
                    bits: context.bits,
                })));
            }
        }
        Ok(())
    }

    /// Returns the chunks in the order of their index; none has a digest.
    pub fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// Returns the batches or points, in the order of their index.
    pub fn containers(&self) -> &[Arc<Container>] {
        &self.containers
    }

    /// Joins the table with the digests of a bootstrap.
    ///
    /// Chunks that the bootstrap does not name keep none: the image does not refer to them. A chunk of
    /// another length than the bootstrap's is an error.
    pub fn with_digests(self, bootstrap: &ChunkTable) -> Result<ChunkTable, FormatError> {
        let mut chunks = self.chunks;
        for chunk in &mut chunks {
            if let Some(named) = bootstrap.at(chunk.index, chunk.plain.start) {
                if named.plain != chunk.plain {
                    let why =
                        format!("chunk {} ends at {}, not at {}", chunk.index.0, chunk.plain.end, named.plain.end);
                    return Err(invalid("chunk table", 16 * u64::from(chunk.index.0), why));
                }
                (chunk.digest, chunk.algorithm) = (named.digest, named.algorithm);
            }
        }
        Ok(ChunkTable::new(chunks))
    }

    /// Writes the chunks of a native blob as a table of version 1, uncompressed.
    pub(crate) fn to_v1(chunks: &[Chunk]) -> Vec<u8> {
        chunks.iter().flat_map(|chunk| ChunkInfoV1::new(chunk).as_bytes().to_vec()).collect()
    }

    /// Writes chunks, and the batches or points that they are parts of, as a table of version 2, uncompressed.
    pub(crate) fn to_v2(chunks: &[Chunk], containers: &[Arc<Container>]) -> Contexts {
        let mut plain: Vec<u8> = chunks.iter().flat_map(|chunk| ChunkInfoV2::new(chunk).as_bytes().to_vec()).collect();
        let at = plain.len() as u64;
        let mut dictionaries = Vec::new();
        for container in containers {
            match &**container {
                Container::Batch { batch, .. } => {
                    let context = BatchContext {
                        stored_size: batch.stored_size.into(),
                        plain_size: batch.plain_size.into(),
                        reserved: [0; 32],
                    };
                    plain.extend_from_slice(context.as_bytes());
                }
                Container::Point(point) => {
                    plain.extend_from_slice(ZranContext::new(point, dictionaries.len() as u64).as_bytes());
                    dictionaries.extend_from_slice(&point.dictionary);
                }
                Container::Encrypted(_) => {}
            }
        }
        plain.extend_from_slice(&dictionaries);
        let size = plain.len() as u64 - at;
        Contexts { plain, at, size, count: containers.len() as u32 }
    }
}

/// A table of version 2 in bytes, and where its batches or points are in it.
pub(crate) struct Contexts {
    pub(crate) plain: Vec<u8>,
    at: u64,
    size: u64,
    count: u32,
}

impl ZranContext {
    fn new(point: &Point, dictionary_at: u64) -> Self {
        Self {
            stored_at: point.stored.start.into(),
            plain_at: point.plain_at.into(),
            dictionary_at: dictionary_at.into(),
            // Points are begun long before these get too large for 32 bits.
            stored_size: ((point.stored.end - point.stored.start) as u32).into(),
            plain_size: point.plain_size.into(),
            dictionary_size: (point.dictionary.len() as u32).into(),
            byte: point.byte,
            bits: point.bits,
            reserved: [0; 2],
        }
    }
}

fn decrypt<'a>(cipher: Option<&Cipher>, stored: &'a [u8]) -> Result<Cow<'a, [u8]>, FormatError> {
    Ok(match cipher {
        Some(cipher) => {
            Cow::Owned(cipher.decrypt(stored).map_err(|error| invalid("chunk table", 0, error.to_string()))?)
        }
        None => Cow::Borrowed(stored),
    })
}

/// Equal sizes mean that compression did not win.
fn coding(compressor: Compressor, stored_size: u64, plain_size: u64) -> Codec {
    if stored_size == plain_size { Codec::Plain } else { compressor.codec() }
}

impl TableHeader {
    /// Notes the batches or points of a table of version 2.
    pub(crate) fn with(mut self, contexts: &Contexts) -> Self {
        if contexts.count > 0 {
            self.contexts_at = contexts.at.into();
            self.contexts_size = contexts.size.into();
            self.context_count = contexts.count.into();
        }
        self
    }

    /// Makes the header of a table of version 1.
    pub(crate) fn new(features: u32, chunk_count: u32, location: &TableLocation) -> Self {
        Self {
            magic: TABLE_MAGIC.into(),
            features: features.into(),
            compressor: location.compressor.code().into(),
            chunk_count: chunk_count.into(),
            at: location.stored.start.into(),
            stored_size: (location.stored.end - location.stored.start).into(),
            plain_size: location.plain_size.into(),
            contexts_at: 0.into(),
            contexts_size: 0.into(),
            context_count: 0.into(),
            reserved: [0; 4032],
            magic_again: TABLE_MAGIC.into(),
        }
    }

    fn check(&self, info: &BlobInfo, location: &TableLocation, at: u64) -> Result<(), FormatError> {
        let bad = |why: &str| Err(invalid("chunk table header", at, why));
        if self.magic.get() != TABLE_MAGIC || self.magic_again.get() != TABLE_MAGIC {
            return bad("its magic is wrong");
        }
        let same = self.chunk_count.get() == info.chunk_count
            && self.compressor.get() == location.compressor.code()
            && self.at.get() == location.stored.start
            && self.stored_size.get() == at
            && self.plain_size.get() == location.plain_size;
        if same { Ok(()) } else { bad("it differs from what the bootstrap says") }
    }
}

/// The bits of a plain offset of version 1 that stay where they are.
const PLAIN_OFFSET: u64 = 0xfff_ffff_f000;
const STORED_OFFSET: u64 = 0xff_ffff_ffff;

impl ChunkInfoV1 {
    fn new(chunk: &Chunk) -> Self {
        let plain = chunk.plain_len() - 1;
        let stored = chunk.stored.end - chunk.stored.start - 1;
        let plain = (plain & 0xf_ffff) << 44 | (plain >> 20 & 0xf) << 8 | chunk.plain.start & PLAIN_OFFSET;
        let stored = (stored & 0xf_ffff) << 44 | (stored >> 20 & 0xf) << 40 | chunk.stored.start & STORED_OFFSET;
        Self { plain: plain.into(), stored: stored.into() }
    }

    fn chunk(&self, info: &BlobInfo, index: u32) -> Result<Chunk, FormatError> {
        let (plain, stored) = (self.plain.get(), self.stored.get());
        let plain_size = (plain >> 44 | (plain >> 8 & 0xf) << 20) + 1;
        let stored_size = (stored >> 44 | (stored >> 40 & 0xf) << 20) + 1;
        let (plain_at, stored_at) = (plain & PLAIN_OFFSET, stored & STORED_OFFSET);
        Ok(Chunk {
            index: ChunkIndex(index),
            plain: plain_at..plain_at + plain_size,
            stored: stored_at..stored_at + stored_size,
            codec: coding(info.compressor, stored_size, plain_size),
            encrypted: false,
            algorithm: info.algorithm,
            digest: None,
            container: None,
            crc32: None,
        })
    }
}

const V2_COMPRESSED: u64 = 1;
const V2_ZRAN: u64 = 2;
const V2_BATCH: u64 = 4;
const V2_ENCRYPTED: u64 = 8;
const V2_CRC32: u64 = 0x10;

impl ChunkInfoV2 {
    fn new(chunk: &Chunk) -> Self {
        let stored_size = chunk.stored.end - chunk.stored.start;
        let place = |context: u32, offset: u32| u64::from(context) << 32 | u64::from(offset);
        // A CRC of zero would be taken for none.
        let crc32 = chunk.crc32.filter(|&crc32| crc32 != 0).map(u64::from);
        let with_crc32 = crc32.map_or(0, |_| V2_CRC32);
        let (mut flags, stored_size, data) = match chunk.codec {
            Codec::Plain => (with_crc32, stored_size, crc32.unwrap_or(0)),
            Codec::Lz4Block | Codec::Zstd | Codec::Gzip => {
                (V2_COMPRESSED | with_crc32, stored_size, crc32.unwrap_or(0))
            }
            Codec::Zran { context, offset } => (V2_COMPRESSED | V2_ZRAN, stored_size, place(context, offset)),
            // Established builders call a batch compressed even where it is not.
            Codec::Batch { batch, offset } => (V2_COMPRESSED | V2_BATCH, 0, place(batch, offset)),
        };
        if chunk.encrypted {
            flags |= V2_ENCRYPTED;
        }
        let plain = flags << 56 | (chunk.plain_len() - 1) << 32 | chunk.plain.start >> 12;
        let stored = stored_size << 40 | chunk.stored.start & STORED_OFFSET;
        Self { plain: plain.into(), stored: stored.into(), data: data.into() }
    }

    fn chunk(&self, info: &BlobInfo, index: u32, table: &BlobTable) -> Result<Chunk, FormatError> {
        let bad = |why: &str| invalid("chunk table", 24 * u64::from(index), why);
        let (plain, stored, data) = (self.plain.get(), self.stored.get(), self.data.get());
        let flags = plain >> 56;
        let plain_size = (plain >> 32 & 0xff_ffff) + 1;
        let plain_at = (plain & 0xffff_ffff) << 12;
        let mut stored_range = stored & STORED_OFFSET..(stored & STORED_OFFSET) + (stored >> 40);
        let (context, offset) = ((data >> 32) as u32, data as u32);
        let inside = |size: u32| u64::from(offset) + plain_size <= u64::from(size);
        let encrypted = flags & V2_ENCRYPTED != 0;
        let mut crc32 = None;
        let container;
        let codec = if flags & (V2_ZRAN | V2_BATCH) != 0 {
            let found = table.containers.get(context as usize).ok_or_else(|| bad("its batch or point is not there"))?;
            container = Some(Arc::clone(found));
            match &**found {
                Container::Point(point) if flags & V2_ZRAN != 0 && inside(point.plain_size) => {
                    stored_range = point.stored.clone();
                    Codec::Zran { context, offset }
                }
                Container::Batch { batch, .. } if flags & V2_BATCH != 0 && inside(batch.plain_size) => {
                    stored_range.end = stored_range.start + u64::from(batch.stored_size);
                    Codec::Batch { batch: context, offset }
                }
                _ => return Err(bad("its batch or point does not hold it")),
            }
        } else {
            let cipher = info.cipher.as_ref().filter(|_| encrypted);
            container = cipher.map(|cipher| Arc::new(Container::Encrypted(cipher.clone())));
            if flags & V2_CRC32 != 0 {
                crc32 = Some(data as u32);
            }
            if flags & V2_COMPRESSED != 0 { info.compressor.codec() } else { Codec::Plain }
        };
        Ok(Chunk {
            index: ChunkIndex(index),
            plain: plain_at..plain_at + plain_size,
            stored: stored_range,
            codec,
            encrypted,
            algorithm: info.algorithm,
            digest: None,
            container,
            crc32,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::digest::Algorithm;

    fn info(bits: u32, chunk_count: u32, plain_size: u64, stored_size: u64) -> BlobInfo {
        let mut info = BlobInfo::new("b".parse().expect("a name"), Compressor::Zstd, Algorithm::Blake3);
        info.features |= bits;
        info.chunk_count = chunk_count;
        info.table = Some(TableLocation { stored: 0..stored_size, plain_size, compressor: Compressor::Zstd });
        info
    }

    proptest! {
        #[test]
        fn chunks_survive_a_table_of_version_1(
            chunks in prop::collection::vec((0u64..1 << 31, 1u64..=1 << 24, 0u64..1 << 40, 1u64..=1 << 24), 1..20)
        ) {
            let chunks: Vec<Chunk> = chunks.into_iter().enumerate().map(|(index, (page, plain, at, stored))| Chunk {
                index: ChunkIndex(index as u32),
                plain: page << 12..(page << 12) + plain,
                stored: at..at + stored,
                codec: if plain == stored { Codec::Plain } else { Codec::Zstd },
                encrypted: false,
                algorithm: Algorithm::Blake3,
                digest: None,
                container: None,
                crc32: None,
            }).collect();
            let plain = BlobTable::to_v1(&chunks);
            let info = info(0, chunks.len() as u32, plain.len() as u64, plain.len() as u64);
            let header = TableHeader::new(info.features, info.chunk_count, info.table.as_ref().expect("set"));
            let mut stored = plain;
            stored.extend_from_slice(header.as_bytes());
            let table = BlobTable::read(&info, &stored).expect("own bytes");
            prop_assert_eq!(table.chunks(), &chunks[..]);
            for cut in [0, 15, stored.len() / 2, stored.len() - 1] {
                prop_assert!(BlobTable::read(&info, &stored[..cut]).is_err());
            }
        }

        #[test]
        fn any_table_of_version_2_is_read_or_refused(
            plain in prop::collection::vec(any::<u8>(), 0..400),
            bits in prop_oneof![Just(features::BATCH), Just(features::ZRAN), Just(0)],
            (count, contexts_at, context_count) in (0u32..8, 0u64..300, 0u32..8),
        ) {
            let info = info(bits | features::CHUNK_INFO_V2, count, plain.len() as u64, plain.len() as u64);
            let mut header = TableHeader::new(info.features, count, info.table.as_ref().expect("set"));
            header.contexts_at = contexts_at.into();
            header.context_count = context_count.into();
            if let Ok(table) = BlobTable::parse(&info, &header, &plain) {
                prop_assert_eq!(table.chunks().len(), count as usize);
            }
        }
    }
}
