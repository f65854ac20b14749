//! Writes a blob strictly forward, as a pipe wants it.
//!
//! [`BlobWriter`] takes chunks; [`BlobWriter::seal`] ends them, writes the chunk table and tells what a
//! bootstrap must know of the blob; [`Sealed::finish`] takes that bootstrap, where it goes into the blob, and
//! tells digest and size of the whole. Both are computed on the way: nothing is read back.
//!
//! [`Sealed::reference`] makes the same of chunks that lie in an object that is there already: then only the
//! table and what follows it are written.

use std::io::{self, Read, Write};
use std::sync::Arc;

use sha2::{Digest as _, Sha256};
use zerocopy::IntoBytes;

use super::batch::Batches;
use super::format::{TableHeader, features};
use super::section::{Section, tar_header};
use super::table::BlobTable;
use super::toc::{Toc, TocEntry};
use crate::bootstrap::{BlobInfo, TableLocation};
use crate::chunk::{Chunk, ChunkIndex, Codec, Compressor, Container};
use crate::cipher::Cipher;
use crate::codec;
use crate::digest::{Algorithm, BlobId, Digest};
use crate::write::Version;

/// Plain addresses of aligned chunks are multiples of this.
const PAGE: u64 = 4096;
/// Chunk indexes have 24 bits, the last of which upstream does not use.
const MAX_CHUNKS: usize = 0xff_ffff;
/// Offsets of stored chunks have 40 bits.
const MAX_STORED: u64 = 1 << 40;
/// Bootstraps up to this many bytes are compressed at once, and larger ones as they are read.
const AT_ONCE: u64 = 4 << 20;
/// Tables of version 2 have 24 bits for the size of a stored chunk, so that 16 MiB are one too many.
pub const MAX_CHUNK_V2: u32 = 8 << 20;

/// Which sections a blob has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Form {
    /// Chunks and chunk table, without tar headers.
    Plain,
    /// Chunks, chunk table and digests with tar headers, and a table of contents; the bootstrap is a file of its own.
    Toc,
    /// Chunks, chunk table and bootstrap with tar headers.
    Inline,
    /// All sections: what image converters make.
    InlineToc,
}

impl Form {
    fn tar_headers(self) -> bool {
        self != Self::Plain
    }

    fn toc(self) -> bool {
        matches!(self, Self::Toc | Self::InlineToc)
    }

    /// Returns whether the bootstrap lies in the blob.
    pub fn inline(self) -> bool {
        matches!(self, Self::Inline | Self::InlineToc)
    }

    fn features(self) -> u32 {
        let headers = if self.tar_headers() { features::HAS_TAR_HEADER } else { 0 };
        let toc = if self.toc() { features::HAS_TOC | features::INLINED_CHUNK_DIGEST } else { 0 };
        let inline = if self.inline() { features::INLINED_FS_META } else { 0 };
        features::CAP_TAR_TOC | headers | toc | inline
    }
}

/// How a blob is written.
#[derive(Debug, Clone)]
pub struct Options {
    /// The form of the bootstrap that goes with it: blobs of version 5 have no chunk table.
    pub version: Version,
    /// Its sections.
    pub form: Form,
    /// The compressor of the chunk table and what chunks are expected to be coded with.
    pub compressor: Compressor,
    /// How chunks are named.
    pub algorithm: Algorithm,
    /// Whether plain addresses are multiples of 4,096; those of version 6 always are.
    pub aligned: bool,
    /// The key, if the blob is to be encrypted. Version 6 only.
    pub cipher: Option<Cipher>,
    /// Below which number of bytes small chunks are packed together, if at all. Version 6 only.
    pub batch_size: Option<u32>,
}

impl Options {
    /// Returns the options of a blob of version 6 that is neither batched nor encrypted.
    pub fn new(form: Form, compressor: Compressor, algorithm: Algorithm) -> Self {
        Self { version: Version::V6, form, compressor, algorithm, aligned: true, cipher: None, batch_size: None }
    }

    fn features(&self) -> u32 {
        let v6 = self.version == Version::V6;
        let mut bits = self.form.features();
        // Established builders do not say so of blobs of version 5.
        if v6 {
            bits |= features::ALIGNED;
        }
        if v6 && self.cipher.is_some() {
            bits |= features::CHUNK_INFO_V2 | features::ENCRYPTED;
        }
        if v6 && self.batch_size.is_some() {
            bits |= features::CHUNK_INFO_V2 | features::BATCH;
        }
        bits
    }
}

/// A chunk's bytes in the form in which they are stored, before they are encrypted.
#[derive(Debug, Clone, Copy)]
pub struct StoredChunk<'a> {
    /// Digest of the plain bytes.
    pub digest: Digest,
    /// CRC-32C of the plain bytes, where the bootstrap shall carry one.
    pub crc32: Option<u32>,
    /// Number of plain bytes (1 to 16 MiB).
    pub plain_len: u32,
    /// How `bytes` were coded; [`Codec::Plain`] where compression did not win.
    pub codec: Codec,
    /// What to store.
    pub bytes: &'a [u8],
}

/// Takes the chunks of a blob.
#[derive(Debug)]
pub struct BlobWriter<W> {
    out: Hashing<W>,
    options: Options,
    chunks: Vec<Chunk>,
    plain_size: u64,
    batches: Option<Batches>,
    encrypted: Option<Arc<Container>>,
    read_ahead: u32,
}

/// Counts and hashes what passes.
#[derive(Debug)]
struct Hashing<W> {
    out: W,
    sha256: Sha256,
    /// The hash of an established builder, which leaves the digest section out; begun with that section.
    builder: Option<Sha256>,
    at: u64,
}

impl<W: Write> Hashing<W> {
    fn new(out: W) -> Self {
        Self { out, sha256: Sha256::new(), builder: None, at: 0 }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_unnoticed(bytes)?;
        if let Some(builder) = &mut self.builder {
            builder.update(bytes);
        }
        Ok(())
    }

    /// Writes bytes that the builder's hash does not see.
    fn write_unnoticed(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        self.sha256.update(bytes);
        self.at += bytes.len() as u64;
        Ok(())
    }

    fn digest(&self) -> Digest {
        Digest(self.sha256.clone().finalize().into())
    }

    fn builder_digest(&self) -> Digest {
        self.builder.as_ref().map_or_else(|| self.digest(), |builder| Digest(builder.clone().finalize().into()))
    }
}

fn invalid(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

impl<W: Write> BlobWriter<W> {
    /// Begins a blob.
    pub fn new(out: W, options: Options) -> Self {
        let batches = options.batch_size.map(Batches::new);
        let encrypted = options.cipher.clone().map(|cipher| Arc::new(Container::Encrypted(cipher)));
        Self { out: Hashing::new(out), options, chunks: Vec::new(), plain_size: 0, batches, encrypted, read_ahead: 0 }
    }

    /// Appends a chunk and returns its place; small chunks that wait to be packed together are written before it.
    ///
    /// A chunk that says that it is compressed and has as many stored as plain bytes is refused: readers tell
    /// raw chunks from compressed ones by their sizes alone.
    pub fn append(&mut self, chunk: StoredChunk<'_>) -> io::Result<ChunkIndex> {
        let raw = chunk.bytes.len() == chunk.plain_len as usize;
        if raw != (chunk.codec == Codec::Plain) || chunk.plain_len == 0 || chunk.plain_len > 16 << 20 {
            return Err(invalid("a chunk's codec and sizes disagree"));
        }
        self.write_batch()?;
        let encrypted = self.options.cipher.as_ref().map(|cipher| cipher.encrypt(chunk.bytes));
        let bytes = encrypted.as_deref().unwrap_or(chunk.bytes);
        let at = self.out.at;
        self.out.write(bytes)?;
        let index = self.push(chunk.digest, chunk.crc32, chunk.plain_len, chunk.codec)?;
        let written = &mut self.chunks[index.0 as usize];
        (written.stored, written.container) = (at..self.out.at, self.encrypted.clone());
        Ok(index)
    }

    /// Appends a small chunk as it is, to be compressed together with others, and returns its place.
    ///
    /// # Panics
    ///
    /// If the options have no batch size.
    pub fn append_small(&mut self, digest: Digest, crc32: Option<u32>, plain: &[u8]) -> io::Result<ChunkIndex> {
        let batches = self.batches.as_ref().expect("a blob of small chunks has a batch size");
        if !batches.has_room_for(plain) {
            self.write_batch()?;
        }
        let len = u32::try_from(plain.len()).ok().filter(|&len| len != 0);
        let len = len.ok_or_else(|| invalid("a chunk's codec and sizes disagree"))?;
        let index = ChunkIndex(self.chunks.len() as u32);
        let codec = self.batches.as_mut().expect("looked at above").add(index, plain);
        self.push(digest, crc32, len, codec)
    }

    fn push(&mut self, digest: Digest, crc32: Option<u32>, len: u32, codec: Codec) -> io::Result<ChunkIndex> {
        if self.chunks.len() >= MAX_CHUNKS || self.out.at > MAX_STORED {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "a blob holds 2^24 - 1 chunks and 1 TiB at most"));
        }
        if self.options.features() & features::CHUNK_INFO_V2 != 0 && len > MAX_CHUNK_V2 {
            return Err(invalid("chunks of batched and encrypted blobs have 8 MiB at most"));
        }
        let index = ChunkIndex(self.chunks.len() as u32);
        self.chunks.push(Chunk {
            index,
            plain: self.plain_size..self.plain_size + u64::from(len),
            stored: 0..0,
            codec,
            encrypted: self.options.cipher.is_some(),
            algorithm: self.options.algorithm,
            digest: Some(digest),
            container: None,
            crc32,
        });
        self.plain_size += u64::from(len);
        if self.options.aligned || self.options.version == Version::V6 {
            self.plain_size = self.plain_size.next_multiple_of(PAGE);
        }
        Ok(index)
    }

    /// Writes the small chunks that wait.
    fn write_batch(&mut self) -> io::Result<()> {
        let at = self.out.at;
        let Some(batch) = self
            .batches
            .as_mut()
            .and_then(|batches| batches.take(self.options.compressor, self.options.cipher.as_ref()))
        else {
            return Ok(());
        };
        self.out.write(&batch.stored)?;
        for index in batch.members {
            let member = &mut self.chunks[index.0 as usize];
            (member.stored, member.container) = (at..self.out.at, Some(Arc::clone(&batch.container)));
        }
        Ok(())
    }

    /// Returns the chunks appended so far, in the order of their index. Where those lie that wait to be packed
    /// together is not known yet.
    pub fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// Asks that all that was written so far be read ahead, as far as 32 bits can say so.
    pub fn mark_read_ahead(&mut self) {
        self.read_ahead = u32::try_from(self.out.at).unwrap_or(u32::MAX);
    }

    /// Ends the chunks and writes what follows from them: chunk table and digests.
    pub fn seal(mut self) -> io::Result<Sealed<W>> {
        self.write_batch()?;
        let mut toc = Toc::default();
        let form = self.options.form;
        if self.chunks.is_empty() {
            return Ok(Sealed { out: self.out, form, info: None, chunks: self.chunks, toc, toc_bytes: None });
        }
        let out = &mut self.out;
        let data = 0..out.at;
        if form.tar_headers() {
            out.write(&tar_header(Section::Data, data.end))?;
        }
        toc.entries.push(TocEntry {
            section: Section::Data,
            codec: Codec::Plain,
            // Established builders take the header into this one digest.
            digest: out.digest(),
            stored: data,
            plain_size: self.plain_size,
        });
        let containers = self.batches.as_ref().map_or(&[][..], Batches::written);
        let features = self.options.features();
        let mut info = BlobInfo {
            plain_size: self.plain_size,
            chunk_count: self.chunks.len() as u32,
            features,
            cipher: self.options.cipher.clone(),
            prefetch_size: self.read_ahead,
            ..BlobInfo::new(placeholder(), self.options.compressor, self.options.algorithm)
        };
        if self.options.version == Version::V6 {
            info.table = Some(write_tables(out, form, &info, &self.chunks, containers, info.compressor, &mut toc)?);
        }
        info.stored_size = out.at;
        let mut toc_bytes = None;
        if form == Form::Toc {
            // The bootstrap lies elsewhere and names the table of contents, which is complete by now.
            toc_bytes = Some(write_toc(out, &toc, &mut info)?);
            info.stored_size = out.at;
        }
        if !form.inline() {
            info.id = out.digest().into();
        }
        Ok(Sealed { out: self.out, form, info: Some(info), chunks: self.chunks, toc, toc_bytes })
    }
}

fn placeholder() -> BlobId {
    BlobInfo::PLACEHOLDER.parse().expect("64 letters name a blob")
}

/// Writes the chunk table, and the digests where there is a table of contents to find them by.
fn write_tables<W: Write>(
    out: &mut Hashing<W>,
    form: Form,
    info: &BlobInfo,
    chunks: &[Chunk],
    containers: &[Arc<Container>],
    compressor: Compressor,
    toc: &mut Toc,
) -> io::Result<TableLocation> {
    let encrypt = |bytes: &[u8]| match &info.cipher {
        Some(cipher) => cipher.encrypt(bytes),
        None => bytes.to_vec(),
    };
    let contexts = info.has(features::CHUNK_INFO_V2).then(|| BlobTable::to_v2(chunks, containers));
    let plain = contexts.as_ref().map_or_else(|| BlobTable::to_v1(chunks), |contexts| contexts.plain.clone());
    let (codec, stored) = codec::encode(compressor, &plain);
    let at = out.at;
    out.write(&encrypt(&stored))?;
    let table = TableLocation {
        stored: at..out.at,
        plain_size: plain.len() as u64,
        compressor: if codec == Codec::Plain { Compressor::None } else { compressor },
    };
    // Where the bootstrap is, is not known to the table.
    let bits = info.features;
    let mut header = TableHeader::new(bits, chunks.len() as u32, &table);
    if let Some(contexts) = &contexts {
        header = header.with(contexts);
    }
    out.write(&encrypt(header.as_bytes()))?;
    let sha256 = |bytes: &[u8]| Algorithm::Sha256.digest(bytes);
    let mut entry = |section, codec, digest, stored: std::ops::Range<u64>, plain_size| {
        toc.entries.push(TocEntry { section, codec, digest, stored, plain_size });
    };
    entry(Section::Table, codec, sha256(&plain), table.stored.clone(), table.plain_size);
    let header_size = out.at - table.stored.end;
    entry(Section::TableHeader, Codec::Plain, sha256(header.as_bytes()), table.stored.end..out.at, header_size);
    if form.tar_headers() {
        out.write(&tar_header(Section::Table, out.at - at))?;
    }
    if form.toc() {
        let digests: Vec<u8> =
            chunks.iter().flat_map(|chunk| chunk.digest.map_or([0; 32], |digest| digest.0)).collect();
        let at = out.at;
        out.builder = Some(out.sha256.clone());
        out.write_unnoticed(&digests)?;
        entry(Section::Digests, Codec::Plain, sha256(&digests), at..out.at, digests.len() as u64);
        out.write(&tar_header(Section::Digests, digests.len() as u64))?;
    }
    Ok(table)
}

/// Writes the table of contents and notes it in what a bootstrap says of the blob.
fn write_toc<W: Write>(out: &mut Hashing<W>, toc: &Toc, info: &mut BlobInfo) -> io::Result<Vec<u8>> {
    let bytes = toc_with_header(toc);
    info.toc_size = bytes.len() as u32;
    info.toc_digest = Algorithm::Sha256.digest(&bytes);
    out.write(&bytes)?;
    Ok(bytes)
}

fn toc_with_header(toc: &Toc) -> Vec<u8> {
    let mut bytes = toc.to_bytes();
    let header = tar_header(Section::Toc, bytes.len() as u64);
    bytes.extend_from_slice(&header);
    bytes
}

/// Chunks that lie in an object that is there already: an original layer.
#[derive(Debug)]
pub struct Reference {
    /// Name of the object.
    pub id: BlobId,
    /// Its size.
    pub stored_size: u64,
    /// Gzip if it is a gzip stream, else none.
    pub compressor: Compressor,
    /// How chunks are named.
    pub algorithm: Algorithm,
    /// The chunks, in the order of their index.
    pub chunks: Vec<Chunk>,
    /// The points at which the stream is entered, in the order of their index.
    pub points: Vec<Arc<Container>>,
}

impl<W: Write> Sealed<W> {
    /// Writes the chunk table of `reference` and what follows it into an object of its own.
    ///
    /// # Errors
    ///
    /// If `out` cannot be written.
    pub fn reference(out: W, form: Form, reference: Reference) -> io::Result<Self> {
        let Reference { id, stored_size, compressor, algorithm, chunks, points } = reference;
        let mut out = Hashing::new(out);
        let mut toc = Toc::default();
        if chunks.is_empty() {
            return Ok(Self { out, form, info: None, chunks, toc, toc_bytes: None });
        }
        let zran = if compressor == Compressor::Gzip { features::ZRAN } else { 0 };
        let mut info = BlobInfo {
            stored_size,
            plain_size: chunks.last().map_or(0, |chunk| chunk.plain.end.next_multiple_of(PAGE)),
            chunk_count: chunks.len() as u32,
            features: form.features() | features::ALIGNED | features::CHUNK_INFO_V2 | features::SEPARATE | zran,
            ..BlobInfo::new(id, compressor, algorithm)
        };
        // What is stored elsewhere tells nothing of how the table is: it always is zstd.
        info.table = Some(write_tables(&mut out, form, &info, &chunks, &points, Compressor::Zstd, &mut toc)?);
        let mut toc_bytes = None;
        if form == Form::Toc {
            toc_bytes = Some(write_toc(&mut out, &toc, &mut info)?);
        }
        if !form.inline() {
            (info.meta_digest, info.meta_size) = (out.digest(), out.at);
        }
        Ok(Self { out, form, info: Some(info), chunks, toc, toc_bytes })
    }
}

/// A blob whose chunks are complete.
#[derive(Debug)]
pub struct Sealed<W> {
    out: Hashing<W>,
    form: Form,
    info: Option<BlobInfo>,
    chunks: Vec<Chunk>,
    toc: Toc,
    toc_bytes: Option<Vec<u8>>,
}

/// A blob that is written.
#[derive(Debug)]
pub struct Finished<W> {
    /// The writer given at the beginning, not flushed.
    pub out: W,
    /// SHA-256 of all bytes: the name under which a registry keeps the blob.
    pub digest: Digest,
    /// Number of bytes; 0 for a plain blob without chunks.
    pub size: u64,
    /// The name that an established builder gives the blob: the same, but for blobs with a digest section.
    pub builder_id: Digest,
    /// SHA-256 and size of the table of contents with its tar header, if there is one.
    pub toc: Option<(Digest, u32)>,
}

impl<W: Write> Sealed<W> {
    /// Returns what a bootstrap must say of the blob; `None` without chunks, when there is nothing to say.
    ///
    /// A bootstrap that goes into the blob cannot know its name: it says [`BlobInfo::PLACEHOLDER`].
    pub fn info(&self) -> Option<&BlobInfo> {
        self.info.as_ref()
    }

    /// Returns the chunks, in the order of their index.
    pub fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// Takes the chunks, in the order of their index; what is still to be written does not need them.
    pub fn take_chunks(&mut self) -> Vec<Chunk> {
        std::mem::take(&mut self.chunks)
    }

    /// Returns the name that an established builder gives a blob of which this is all.
    pub fn builder_id(&self) -> Digest {
        self.out.builder_digest()
    }

    /// Writes the bootstrap, if the form has it in the blob, and the table of contents.
    pub fn finish(self, bootstrap: &[u8]) -> io::Result<Finished<W>> {
        self.finish_from(bootstrap, bootstrap.len() as u64)
    }

    /// As [`Self::finish`], with a bootstrap of `len` bytes that is read from somewhere. A large one is not held in memory.
    pub fn finish_from(mut self, mut bootstrap: impl Read, len: u64) -> io::Result<Finished<W>> {
        let out = &mut self.out;
        let mut toc = self.toc_bytes;
        if self.form.inline() {
            let at = out.at;
            let mut plain = Digesting { from: bootstrap.by_ref().take(len), sha256: Sha256::new(), len: 0 };
            let codec = match self.form.toc() {
                false => {
                    io::copy(&mut plain, &mut Forward(out))?;
                    Codec::Plain
                }
                true if len > AT_ONCE => {
                    codec::compress_stream(&mut plain, len, Forward(out))?;
                    Codec::Zstd
                }
                true => {
                    let mut bytes = Vec::new();
                    plain.read_to_end(&mut bytes)?;
                    let (codec, stored) = codec::encode(Compressor::Zstd, &bytes);
                    out.write(&stored)?;
                    codec
                }
            };
            if plain.len != len {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let digest = Digest(plain.sha256.finalize().into());
            let section = Section::Bootstrap;
            self.toc.entries.push(TocEntry { section, codec, digest, stored: at..out.at, plain_size: len });
            out.write(&tar_header(Section::Bootstrap, out.at - at))?;
            if self.form.toc() {
                let bytes = toc_with_header(&self.toc);
                out.write(&bytes)?;
                toc = Some(bytes);
            }
        }
        Ok(Finished {
            digest: self.out.digest(),
            size: self.out.at,
            builder_id: self.out.builder_digest(),
            toc: toc.map(|bytes| (Algorithm::Sha256.digest(&bytes), bytes.len() as u32)),
            out: self.out.out,
        })
    }
}

/// Counts and hashes what is read.
struct Digesting<R> {
    from: R,
    sha256: Sha256,
    len: u64,
}

impl<R: Read> Read for Digesting<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let len = self.from.read(into)?;
        self.sha256.update(&into[..len]);
        self.len += len as u64;
        Ok(len)
    }
}

/// Lets a blob be written by what writes to anything.
struct Forward<'h, W>(&'h mut Hashing<W>);

impl<W: Write> Write for Forward<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use proptest::prelude::*;

    use super::*;
    use crate::blob::section;
    use crate::verified::Verified;

    fn write(options: &Options, contents: &[Vec<u8>], bootstrap: &[u8]) -> (Vec<u8>, Option<BlobInfo>, Vec<Chunk>) {
        let mut writer = BlobWriter::new(Vec::new(), options.clone());
        for plain in contents {
            let (codec, bytes) = codec::encode(options.compressor, plain);
            let digest = Algorithm::Blake3.digest(plain);
            if options.batch_size.is_some_and(|limit| plain.len() < limit as usize / 2) {
                writer.append_small(digest, None, plain).expect("memory");
                continue;
            }
            let chunk = StoredChunk { digest, crc32: None, plain_len: plain.len() as u32, codec, bytes: &bytes };
            writer.append(chunk).expect("memory");
        }
        let sealed = writer.seal().expect("memory");
        let (info, chunks) = (sealed.info().cloned(), sealed.chunks().to_vec());
        let finished = sealed.finish(bootstrap).expect("memory");
        assert_eq!(finished.digest, Algorithm::Sha256.digest(&finished.out));
        assert_eq!(finished.size, finished.out.len() as u64);
        (finished.out, info, chunks)
    }

    fn options() -> impl Strategy<Value = Options> {
        let form = prop_oneof![Just(Form::Plain), Just(Form::Toc), Just(Form::Inline), Just(Form::InlineToc)];
        let compressor = prop_oneof![Just(Compressor::None), Just(Compressor::Lz4Block), Just(Compressor::Zstd)];
        let cipher = prop::option::of((any::<[u8; 32]>(), any::<[u8; 16]>()));
        let batch_size = prop::option::of(prop_oneof![Just(4096), Just(8192)]);
        (form, compressor, cipher, batch_size).prop_map(|(form, compressor, cipher, batch_size)| Options {
            cipher: cipher.map(|(key, iv)| Cipher { key, iv }),
            batch_size,
            ..Options::new(form, compressor, Algorithm::Blake3)
        })
    }

    proptest! {
        #[test]
        fn a_blob_of_any_form_gives_back_table_digests_and_bootstrap(
            contents in prop::collection::vec(prop_oneof![
                prop::collection::vec(0u8..4, 1..6000),
                prop::collection::vec(any::<u8>(), 1..30),
            ], 0..12),
            bootstrap in prop::collection::vec(0u8..9, 0..5000),
            options in options(),
        ) {
            let form = options.form;
            let (blob, info, chunks) = write(&options, &contents, &bootstrap);
            prop_assert_eq!(info.is_some(), !contents.is_empty());
            if let Some(info) = info {
                let range = info.table.as_ref().expect("a table").with_header();
                let table = BlobTable::read(&info, &blob[range.start as usize..range.end as usize]).expect("own table");
                prop_assert_eq!(table.chunks().len(), chunks.len());
                let joined = table.with_digests(&crate::ChunkTable::new(chunks)).expect("own chunks");
                for (chunk, plain) in joined.all().iter().zip(&contents) {
                    let stored = &blob[chunk.stored.start as usize..chunk.stored.end as usize];
                    let verified = Verified::decode(chunk, stored).expect("own chunk");
                    prop_assert_eq!(verified.bytes(), &plain[..]);
                }
                if form == Form::Plain {
                    prop_assert_eq!(info.id.digest(), Some(Algorithm::Sha256.digest(&blob)));
                    prop_assert_eq!(info.stored_size, blob.len() as u64);
                }
            }
            let mut blob = Cursor::new(blob);
            match form.inline() {
                true => prop_assert_eq!(section::read_bootstrap(&mut blob).expect("own bootstrap"), bootstrap),
                false => prop_assert!(section::read_bootstrap(&mut blob).is_err()),
            }
            prop_assert_eq!(section::read_toc(&mut blob).expect("readable").is_some(), form == Form::InlineToc || form == Form::Toc && !contents.is_empty());
        }
    }

    #[test]
    fn a_bootstrap_too_large_to_be_held_is_the_same_again() {
        let bootstrap: Vec<u8> = (0..AT_ONCE + 4096).map(|at| (at / 1000 * at % 251) as u8).collect();
        for form in [Form::Inline, Form::InlineToc] {
            let options = Options::new(form, Compressor::Zstd, Algorithm::Blake3);
            let (blob, ..) = write(&options, &[vec![7; 5000]], &bootstrap);
            let mut blob = Cursor::new(blob);
            assert!(section::read_bootstrap(&mut blob).expect("own bootstrap") == bootstrap, "{form:?}");
            let sealed = BlobWriter::new(Vec::new(), options).seal().expect("memory");
            assert!(
                sealed.finish_from(&bootstrap[1..], bootstrap.len() as u64).is_err(),
                "a bootstrap that is cut short"
            );
        }
    }

    #[test]
    fn a_chunk_that_the_second_table_has_no_room_for_is_refused() {
        let plain = vec![0; MAX_CHUNK_V2 as usize + 1];
        let (codec, bytes) = codec::encode(Compressor::Zstd, &plain);
        let digest = Digest([0; 32]);
        let chunk = StoredChunk { digest, crc32: None, plain_len: plain.len() as u32, codec, bytes: &bytes };
        let plain = Options::new(Form::Plain, Compressor::Zstd, Algorithm::Blake3);
        assert!(BlobWriter::new(Vec::new(), plain.clone()).append(chunk).is_ok());
        let encrypted = Options { cipher: Some(Cipher { key: [1; 32], iv: [2; 16] }), ..plain.clone() };
        for options in [encrypted, Options { batch_size: Some(4096), ..plain }] {
            assert!(BlobWriter::new(Vec::new(), options).append(chunk).is_err());
        }
    }

    #[test]
    fn a_chunk_whose_codec_and_sizes_disagree_is_refused() {
        let mut writer = BlobWriter::new(Vec::new(), Options::new(Form::Plain, Compressor::Zstd, Algorithm::Blake3));
        let digest = Digest([0; 32]);
        for (plain_len, codec) in [(3, Codec::Zstd), (4, Codec::Plain), (0, Codec::Plain)] {
            let chunk = StoredChunk { digest, crc32: None, plain_len, codec, bytes: b"abc" };
            assert!(writer.append(chunk).is_err());
        }
    }
}
