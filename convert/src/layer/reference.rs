//! A layer whose files stay where they are: in the original tar or gzip stream.
//!
//! The layer is read as when it is packed, but its bytes are only named. What is made is a chunk table: where in the
//! stream each chunk is, and for a gzip stream the points at which it can be entered.

use std::collections::HashMap;
use std::io::{self, BufRead as _, BufReader, Read};
use std::sync::Arc;

use nydus_rafs::blob::format::features;
use nydus_rafs::blob::write::{MAX_CHUNK_V2, Reference};
use nydus_rafs::tree::ChunkRef;
use nydus_rafs::{Algorithm, BlobInfo, Chunk, ChunkIndex, Codec, Compressor, Container, Digest};

use super::stream::{Hashing, Packing, StreamError, attach};
use super::{Layer, LayerBuilder, Rules};
use crate::layer::BodyId;
use crate::pack::{Body, BodyDigest, fold};
use crate::tar::{Archive, TarError};
use crate::zran::Indexer;

/// Plain addresses of chunks are multiples of this.
pub(super) const PAGE: u64 = 4096;

/// Why a layer cannot be referred to.
#[derive(Debug, thiserror::Error)]
pub enum ReferenceError {
    /// It cannot be read.
    #[error(transparent)]
    Layer(#[from] StreamError),
    /// A sparse file: its holes are nowhere in the stream.
    #[error("`{0}` is a sparse file, whose bytes are not in the layer as they are: convert the layer instead")]
    Sparse(String),
    /// It is compressed with something that cannot be entered in the middle.
    #[error(
        "it is compressed with zstd: only gzip layers and plain tars can be referred to; convert the layer instead"
    )]
    Zstd,
    /// Raw tars are not compressed.
    #[error("it is compressed: an image of a raw tar wants the tar itself")]
    Compressed,
    /// Chunks too large for the table.
    #[error("a chunk size of {0} bytes is too large: chunks of layers that are referred to have 8 MiB at most")]
    ChunkSize(u32),
}

impl From<TarError> for ReferenceError {
    fn from(error: TarError) -> Self {
        Self::Layer(error.into())
    }
}

impl From<super::LayerError> for ReferenceError {
    fn from(error: super::LayerError) -> Self {
        Self::Layer(error.into())
    }
}

/// What is made of a layer.
#[derive(Debug)]
pub struct Referred {
    /// The tree; its files refer to blob 0.
    pub layer: Layer,
    /// What the files hold.
    pub bodies: Vec<BodyDigest>,
    /// The chunk table in the making.
    pub reference: Reference,
    /// Digest of the tar.
    pub tar: Digest,
}

/// Where the plain bytes of a tar come from.
enum Stream<R> {
    Gzip(Box<Indexer<R>>),
    Plain(R),
}

impl<R: Read> Read for Stream<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Gzip(indexer) => indexer.read(into),
            Self::Plain(input) => input.read(into),
        }
    }
}

/// Reads the layer `input`, a gzip stream or a tar, to its end.
///
/// # Errors
///
/// If it is neither, is damaged, or holds what cannot be referred to.
pub fn read(input: impl Read, rules: Rules, chunk_size: u32) -> Result<Referred, ReferenceError> {
    if chunk_size > MAX_CHUNK_V2 {
        return Err(ReferenceError::ChunkSize(chunk_size));
    }
    let mut input = BufReader::with_capacity(256 << 10, Hashing::new(input));
    let start = input.fill_buf().map_err(|source| TarError::Read { at: 0, source })?;
    let (stream, compressor) = match Packing::of(start) {
        Packing::Gzip => (Stream::Gzip(Box::new(Indexer::new(input))), Compressor::Gzip),
        Packing::Plain => (Stream::Plain(input), Compressor::None),
        Packing::Zstd => return Err(ReferenceError::Zstd),
    };
    let mut reading = Reading {
        archive: Archive::new(Hashing::new(stream)),
        chunk_size,
        chunks: Vec::new(),
        plain_size: 0,
        known: HashMap::new(),
        bodies: Vec::new(),
    };
    let (layer, bodies) = reading.layer(rules, true)?;
    let Reading { archive, chunks, .. } = reading;
    let (stream, tar) = archive.into_inner().finish();
    let (input, points) = match stream {
        Stream::Gzip(indexer) => indexer.finish(),
        Stream::Plain(input) => (input, Vec::new()),
    };
    let (id, stored_size) = finish(input)?;
    let algorithm = Algorithm::Sha256;
    let reference = Reference { id: id.into(), stored_size, compressor, algorithm, chunks, points };
    Ok(Referred { layer, bodies, reference, tar })
}

/// Reads what is left and returns digest and size of all.
fn finish<R: Read>(mut input: BufReader<Hashing<R>>) -> Result<(Digest, u64), ReferenceError> {
    io::copy(&mut input, &mut io::sink()).map_err(|source| TarError::Read { at: 0, source })?;
    let hashing = input.into_inner();
    let size = hashing.len();
    Ok((hashing.finish().1, size))
}

/// A layer that is a blob as it is.
#[derive(Debug)]
pub struct Raw {
    /// The tree; its files refer to blob 0.
    pub layer: Layer,
    /// What a bootstrap says of the blob; `None` if it holds no data.
    pub info: Option<BlobInfo>,
    /// Where the files are in it.
    pub chunks: Vec<Chunk>,
}

/// Reads the tar `input` to its end, to be mounted as it is.
///
/// # Errors
///
/// If it is compressed, damaged, or holds what cannot be referred to.
pub fn read_raw(input: impl Read, rules: Rules, chunk_size: u32) -> Result<Raw, ReferenceError> {
    let mut input = BufReader::with_capacity(256 << 10, Hashing::new(input));
    let start = input.fill_buf().map_err(|source| TarError::Read { at: 0, source })?;
    if Packing::of(start) != Packing::Plain {
        return Err(ReferenceError::Compressed);
    }
    let mut reading = Reading {
        archive: Archive::new(Hashing::new(Stream::Plain(input))),
        chunk_size,
        chunks: Vec::new(),
        plain_size: 0,
        known: HashMap::new(),
        bodies: Vec::new(),
    };
    let (layer, _) = reading.layer(rules, false)?;
    let Reading { archive, chunks, .. } = reading;
    let (Stream::Plain(input), _) = archive.into_inner().finish() else { unreachable!("it was made of a plain one") };
    let (id, size) = finish(input)?;
    let info = (!chunks.is_empty()).then(|| BlobInfo {
        stored_size: size,
        plain_size: size,
        chunk_count: u32::try_from(chunks.len()).unwrap_or(u32::MAX),
        features: features::TARFS | features::CAP_TAR_TOC,
        ..BlobInfo::new(id.into(), Compressor::None, Algorithm::Sha256)
    });
    Ok(Raw { layer, info, chunks })
}

struct Reading<R> {
    archive: Archive<Hashing<Stream<R>>>,
    chunk_size: u32,
    chunks: Vec<Chunk>,
    plain_size: u64,
    known: HashMap<Digest, ChunkIndex>,
    bodies: Vec<Body>,
}

impl<R: Read> Reading<R> {
    /// Reads all entries; `named` tells whether chunks get digests, and so are found again.
    fn layer(&mut self, rules: Rules, named: bool) -> Result<(Layer, Vec<BodyDigest>), ReferenceError> {
        let mut builder = LayerBuilder::new(rules);
        while let Some(entry) = self.archive.next_entry()? {
            let (size, name) = (entry.size, entry.name());
            let body = LayerBuilder::wants_body(&entry).then(|| {
                self.bodies.push(Body::default());
                BodyId(self.bodies.len() - 1)
            });
            builder.add(entry, body)?;
            let Some(body) = body else { continue };
            if !self.archive.is_whole() {
                return Err(ReferenceError::Sparse(name));
            }
            let mut left = size;
            while left > 0 {
                let len = left.min(u64::from(self.chunk_size));
                left -= len;
                let place = if named { self.chunk(len, body)? } else { self.raw_chunk(len)? };
                self.bodies[body.0].chunks.push(ChunkRef { blob: 0, chunk: place });
            }
        }
        self.archive.drain()?;
        let mut layer = builder.finish()?;
        let digests = attach(&mut layer, std::mem::take(&mut self.bodies));
        Ok((layer, digests))
    }

    fn chunk(&mut self, len: u64, body: BodyId) -> Result<ChunkIndex, ReferenceError> {
        let position = self.archive.position();
        if let Stream::Gzip(indexer) = self.archive.input_mut().inner_mut() {
            indexer.begin_chunk(u64::from(self.chunk_size));
        }
        let mut plain = vec![0; usize::try_from(len).expect("at most 8 MiB")];
        self.archive.read_body_exact(&mut plain)?;
        let (codec, stored) = match self.archive.input_mut().inner_mut() {
            Stream::Gzip(indexer) => indexer.end_chunk(),
            Stream::Plain(_) => (Codec::Plain, position..position + len),
        };
        let digest = Algorithm::Sha256.digest(&plain);
        let folded = &mut self.bodies[body.0].digest;
        *folded = Some(fold(Algorithm::Sha256, *folded, digest));
        if let Some(&index) = self.known.get(&digest) {
            return Ok(index);
        }
        let (start, crc32) = (self.plain_size, Some(crc32c::crc32c(&plain)));
        self.plain_size = (start + len).next_multiple_of(PAGE);
        let index = self.push(Chunk {
            index: ChunkIndex(0),
            plain: start..start + len,
            stored,
            codec,
            encrypted: false,
            algorithm: Algorithm::Sha256,
            digest: Some(digest),
            container: None,
            crc32,
        });
        self.known.insert(digest, index);
        Ok(index)
    }

    /// Nothing is named or found again in a raw tar: the kernel reads it as it is.
    fn raw_chunk(&mut self, len: u64) -> Result<ChunkIndex, ReferenceError> {
        let at = self.archive.position();
        self.archive.skip_part(len)?;
        Ok(self.push(Chunk {
            index: ChunkIndex(0),
            plain: at..at + len,
            stored: at..at + len,
            codec: Codec::Plain,
            encrypted: false,
            algorithm: Algorithm::Sha256,
            digest: None,
            container: None,
            crc32: None,
        }))
    }

    fn push(&mut self, chunk: Chunk) -> ChunkIndex {
        let index = ChunkIndex(u32::try_from(self.chunks.len()).unwrap_or(u32::MAX));
        self.chunks.push(Chunk { index, ..chunk });
        index
    }
}

/// Gives chunks of a gzip stream the points that they are read through, to be read as a node reads them.
pub fn with_points(chunks: &[Chunk], points: &[Arc<Container>]) -> Vec<Chunk> {
    let place = |chunk: &Chunk| {
        let mut chunk = chunk.clone();
        if let Codec::Zran { context, .. } = chunk.codec
            && let Some(container) = points.get(context as usize)
            && let Container::Point(point) = &**container
        {
            chunk.stored = point.stored.clone();
            chunk.container = Some(Arc::clone(container));
        }
        chunk
    };
    chunks.iter().map(place).collect()
}

#[cfg(test)]
mod tests;
