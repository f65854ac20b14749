//! Writes a native blob strictly forward, as a pipe wants it.
//!
//! [`BlobWriter`] takes chunks; [`BlobWriter::seal`] ends them, writes the chunk table and tells what a
//! bootstrap must know of the blob; [`Sealed::finish`] takes that bootstrap, where it goes into the blob, and
//! tells digest and size of the whole. Both are computed on the way: nothing is read back.

use std::io::{self, Write};

use sha2::{Digest as _, Sha256};
use zerocopy::IntoBytes;

use super::format::{TableHeader, features};
use super::section::{Section, tar_header};
use super::table::BlobTable;
use super::toc::{Toc, TocEntry};
use crate::bootstrap::{BlobInfo, TableLocation};
use crate::chunk::{Chunk, ChunkIndex, Codec, Compressor};
use crate::codec;
use crate::digest::{Algorithm, BlobId, Digest};

/// Plain addresses of chunks are multiples of this.
const PAGE: u64 = 4096;
/// Chunk indexes have 24 bits, the last of which upstream does not use.
const MAX_CHUNKS: usize = 0xff_ffff;
/// Offsets of stored chunks have 40 bits.
const MAX_STORED: u64 = 1 << 40;

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
        let base = features::ALIGNED | features::CAP_TAR_TOC;
        let headers = if self.tar_headers() { features::HAS_TAR_HEADER } else { 0 };
        let toc = if self.toc() { features::HAS_TOC | features::INLINED_CHUNK_DIGEST } else { 0 };
        let inline = if self.inline() { features::INLINED_FS_META } else { 0 };
        base | headers | toc | inline
    }
}

/// A chunk's bytes in the form in which they are stored.
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
    form: Form,
    compressor: Compressor,
    algorithm: Algorithm,
    chunks: Vec<Chunk>,
    plain_size: u64,
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

impl<W: Write> BlobWriter<W> {
    /// Begins a blob. `compressor` is that of the chunk table and what chunks are expected to be coded with.
    pub fn new(out: W, form: Form, compressor: Compressor, algorithm: Algorithm) -> Self {
        let out = Hashing { out, sha256: Sha256::new(), builder: None, at: 0 };
        Self { out, form, compressor, algorithm, chunks: Vec::new(), plain_size: 0 }
    }

    /// Appends a chunk and returns its place.
    ///
    /// A chunk that says that it is compressed and has as many stored as plain bytes is refused: readers tell
    /// raw chunks from compressed ones by their sizes alone.
    pub fn append(&mut self, chunk: StoredChunk<'_>) -> io::Result<ChunkIndex> {
        let raw = chunk.bytes.len() == chunk.plain_len as usize;
        if raw != (chunk.codec == Codec::Plain) || chunk.plain_len == 0 || chunk.plain_len > 16 << 20 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a chunk's codec and sizes disagree"));
        }
        if self.chunks.len() >= MAX_CHUNKS || self.out.at + chunk.bytes.len() as u64 > MAX_STORED {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "a blob holds 2^24 - 1 chunks and 1 TiB at most"));
        }
        let index = ChunkIndex(self.chunks.len() as u32);
        let at = self.out.at;
        self.out.write(chunk.bytes)?;
        self.chunks.push(Chunk {
            index,
            plain: self.plain_size..self.plain_size + u64::from(chunk.plain_len),
            stored: at..self.out.at,
            codec: chunk.codec,
            encrypted: false,
            algorithm: self.algorithm,
            digest: Some(chunk.digest),
            container: None,
            crc32: chunk.crc32,
        });
        self.plain_size = (self.plain_size + u64::from(chunk.plain_len)).next_multiple_of(PAGE);
        Ok(index)
    }

    /// Returns the chunks appended so far, in the order of their index.
    pub fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// Ends the chunks and writes what follows from them: chunk table and digests.
    pub fn seal(mut self) -> io::Result<Sealed<W>> {
        let mut toc = Toc::default();
        let features = self.form.features();
        if self.chunks.is_empty() {
            return Ok(Sealed {
                out: self.out,
                form: self.form,
                info: None,
                chunks: self.chunks,
                toc,
                toc_bytes: None,
            });
        }
        let out = &mut self.out;
        let data = 0..out.at;
        if self.form.tar_headers() {
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
        let table = write_table(out, &self.chunks, self.compressor, features, &mut toc)?;
        if self.form.tar_headers() {
            out.write(&tar_header(Section::Table, out.at - table.stored.start))?;
        }
        if self.form.toc() {
            let digests: Vec<u8> =
                self.chunks.iter().flat_map(|chunk| chunk.digest.map_or([0; 32], |digest| digest.0)).collect();
            let at = out.at;
            out.builder = Some(out.sha256.clone());
            out.write_unnoticed(&digests)?;
            toc.entries.push(TocEntry {
                section: Section::Digests,
                codec: Codec::Plain,
                digest: Algorithm::Sha256.digest(&digests),
                stored: at..out.at,
                plain_size: digests.len() as u64,
            });
            out.write(&tar_header(Section::Digests, digests.len() as u64))?;
        }
        let placeholder: BlobId = BlobInfo::PLACEHOLDER.parse().expect("64 letters name a blob");
        let mut info = BlobInfo {
            stored_size: out.at,
            plain_size: self.plain_size,
            chunk_count: self.chunks.len() as u32,
            features,
            table: Some(table),
            ..BlobInfo::new(placeholder, self.compressor, self.algorithm)
        };
        let mut toc_bytes = None;
        if self.form == Form::Toc {
            // The bootstrap lies elsewhere and names the table of contents, which is complete by now.
            let bytes = toc_with_header(&toc);
            info.toc_size = bytes.len() as u32;
            info.toc_digest = Algorithm::Sha256.digest(&bytes);
            info.stored_size += bytes.len() as u64;
            out.write(&bytes)?;
            toc_bytes = Some(bytes);
        }
        if !self.form.inline() {
            info.id = out.digest().into();
        }
        Ok(Sealed { out: self.out, form: self.form, info: Some(info), chunks: self.chunks, toc, toc_bytes })
    }
}

fn write_table<W: Write>(
    out: &mut Hashing<W>,
    chunks: &[Chunk],
    compressor: Compressor,
    features: u32,
    toc: &mut Toc,
) -> io::Result<TableLocation> {
    let plain = BlobTable::to_v1(chunks);
    let (codec, stored) = codec::encode(compressor, &plain);
    let at = out.at;
    out.write(&stored)?;
    let table = TableLocation {
        stored: at..out.at,
        plain_size: plain.len() as u64,
        compressor: if codec == Codec::Plain { Compressor::None } else { compressor },
    };
    let header = TableHeader::new(features, chunks.len() as u32, &table);
    out.write(header.as_bytes())?;
    let entry = |section, codec, digest, stored: std::ops::Range<u64>, plain_size| TocEntry {
        section,
        codec,
        digest,
        stored,
        plain_size,
    };
    toc.entries.push(entry(
        Section::Table,
        codec,
        Algorithm::Sha256.digest(&plain),
        table.stored.clone(),
        table.plain_size,
    ));
    let digest = Algorithm::Sha256.digest(header.as_bytes());
    toc.entries.push(entry(
        Section::TableHeader,
        Codec::Plain,
        digest,
        table.stored.end..out.at,
        out.at - table.stored.end,
    ));
    Ok(table)
}

fn toc_with_header(toc: &Toc) -> Vec<u8> {
    let mut bytes = toc.to_bytes();
    let header = tar_header(Section::Toc, bytes.len() as u64);
    bytes.extend_from_slice(&header);
    bytes
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

    /// Returns the name that an established builder gives a blob of which this is all.
    pub fn builder_id(&self) -> Digest {
        self.out.builder_digest()
    }

    /// Writes the bootstrap, if the form has it in the blob, and the table of contents.
    pub fn finish(mut self, bootstrap: &[u8]) -> io::Result<Finished<W>> {
        let out = &mut self.out;
        let mut toc = self.toc_bytes;
        if self.form.inline() {
            let (codec, stored) = match self.form.toc() {
                true => codec::encode(Compressor::Zstd, bootstrap),
                false => (Codec::Plain, bootstrap.into()),
            };
            let at = out.at;
            out.write(&stored)?;
            self.toc.entries.push(TocEntry {
                section: Section::Bootstrap,
                codec,
                digest: Algorithm::Sha256.digest(bootstrap),
                stored: at..out.at,
                plain_size: bootstrap.len() as u64,
            });
            out.write(&tar_header(Section::Bootstrap, stored.len() as u64))?;
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

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use proptest::prelude::*;

    use super::*;
    use crate::blob::section;
    use crate::verified::Verified;

    fn write(
        form: Form,
        compressor: Compressor,
        contents: &[Vec<u8>],
        bootstrap: &[u8],
    ) -> (Vec<u8>, Option<BlobInfo>, Vec<Chunk>) {
        let mut writer = BlobWriter::new(Vec::new(), form, compressor, Algorithm::Blake3);
        for plain in contents {
            let (codec, bytes) = codec::encode(compressor, plain);
            let digest = Algorithm::Blake3.digest(plain);
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

    fn forms() -> impl Strategy<Value = Form> {
        prop_oneof![Just(Form::Plain), Just(Form::Toc), Just(Form::Inline), Just(Form::InlineToc)]
    }

    proptest! {
        #[test]
        fn a_blob_of_any_form_gives_back_table_digests_and_bootstrap(
            contents in prop::collection::vec(prop::collection::vec(0u8..4, 1..6000), 0..12),
            bootstrap in prop::collection::vec(0u8..9, 0..5000),
            form in forms(),
            compressor in prop_oneof![Just(Compressor::None), Just(Compressor::Lz4Block), Just(Compressor::Zstd)],
        ) {
            let (blob, info, chunks) = write(form, compressor, &contents, &bootstrap);
            prop_assert_eq!(info.is_some(), !contents.is_empty());
            if let Some(info) = info {
                let range = info.table.as_ref().expect("a table").with_header();
                let table = BlobTable::read(&info, &blob[range.start as usize..range.end as usize]).expect("own table");
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
    fn a_chunk_whose_codec_and_sizes_disagree_is_refused() {
        let mut writer = BlobWriter::new(Vec::new(), Form::Plain, Compressor::Zstd, Algorithm::Blake3);
        let digest = Digest([0; 32]);
        for (plain_len, codec) in [(3, Codec::Zstd), (4, Codec::Plain), (0, Codec::Plain)] {
            let chunk = StoredChunk { digest, crc32: None, plain_len, codec, bytes: b"abc" };
            assert!(writer.append(chunk).is_err());
        }
    }
}
