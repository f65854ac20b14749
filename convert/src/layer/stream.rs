//! The bytes of a layer to its tree and the data of its blob, in one pass.

use std::io::{self, BufRead, BufReader, Read, Write};

use nydus_rafs::NodeKind;
use nydus_rafs::blob::write::BlobWriter;
use sha2::{Digest as _, Sha256};

use super::{Layer, LayerBuilder, LayerError, Rules};
use crate::pack::{Body, BodyDigest, PackError, Packer};
use crate::tar::{Archive, TarError};

/// How much is decoded at once, in bytes: a decoder that is asked for a header of 512 does little else than begin and end.
const PIECE: usize = 128 << 10;

/// Why a layer cannot be made into a blob.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The layer is at fault.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// The blob is.
    #[error(transparent)]
    Pack(#[from] PackError),
}

impl From<TarError> for StreamError {
    fn from(error: TarError) -> Self {
        Self::Layer(error.into())
    }
}

/// Reads the tar `input` to its very end, packs the bodies of its files, and returns the tree, the digests of the bodies and the
/// blob.
///
/// The tree's files refer to blobs as [`crate::dictionary::Dictionary`] numbers them.
///
/// # Errors
///
/// If the tar or one of its entries is unusable, or the blob cannot be written.
pub fn pack_tar<R: Read, W: Write>(
    input: R,
    rules: Rules,
    chunk_size: u32,
    mut packer: Packer<'_, W>,
) -> Result<(Layer, Vec<BodyDigest>, BlobWriter<W>), StreamError> {
    let mut archive = Archive::new(BufReader::with_capacity(PIECE, input));
    let mut builder = LayerBuilder::new(rules);
    while let Some(entry) = archive.next_entry()? {
        let size = entry.size;
        let body = LayerBuilder::wants_body(&entry).then(|| packer.begin(size));
        // Placed first: an entry that is refused is refused before its bytes are worked on.
        builder.add(entry, body)?;
        let Some(body) = body else { continue };
        let mut left = size;
        while left > 0 {
            let len = left.min(u64::from(chunk_size));
            left -= len;
            let mut chunk = vec![0; usize::try_from(len).expect("at most 16 MiB")];
            archive.read_body_exact(&mut chunk)?;
            packer.push(body, chunk)?;
        }
    }
    archive.drain()?;
    let (bodies, blob) = packer.finish()?;
    let mut layer = builder.finish()?;
    let digests = attach(&mut layer, bodies);
    Ok((layer, digests, blob))
}

/// Gives the regular files of a layer their chunks, and returns what else is known of each body.
pub(crate) fn attach(layer: &mut Layer, mut bodies: Vec<Body>) -> Vec<BodyDigest> {
    for (&id, &body) in &layer.bodies {
        if let NodeKind::Regular { chunks, .. } = &mut layer.tree.node_mut(id).kind {
            *chunks = std::mem::take(&mut bodies[body.0].chunks);
        }
    }
    let mut digests: Vec<BodyDigest> = bodies.into_iter().map(|body| body.digest).collect();
    // They may still lie where the bodies lay, which is twice the room.
    digests.shrink_to_fit();
    digests
}

/// How a layer is compressed, as its first bytes say; what manifests say is sometimes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// gzip, of one member or several.
    Gzip,
    /// zstd, of one frame or several.
    Zstd,
    /// A bare tar.
    Plain,
}

impl Packing {
    /// Tells from the first bytes.
    pub fn of(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, 0x08, ..] => Self::Gzip,
            // A zstd frame, or a skippable one (seekable variants begin with it).
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            _ => Self::Plain,
        }
    }

    /// Returns a reader of the tar inside `input`.
    ///
    /// # Errors
    ///
    /// If the decoder cannot be made.
    pub fn open<'r>(self, input: impl BufRead + Send + 'r) -> io::Result<Box<dyn Read + Send + 'r>> {
        Ok(match self {
            Self::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(input)),
            Self::Zstd => Box::new(zstd::stream::read::Decoder::with_buffer(input)?),
            Self::Plain => Box::new(input),
        })
    }
}

/// A reader or writer that takes the SHA-256 of what passes.
#[derive(Debug)]
pub struct Hashing<T> {
    inner: T,
    hash: Sha256,
    len: u64,
}

impl<T> Hashing<T> {
    /// Wraps `inner`.
    pub fn new(inner: T) -> Self {
        Self { inner, hash: Sha256::new(), len: 0 }
    }

    /// Returns what was wrapped, for looking at; bytes that pass it directly are not seen here.
    pub(crate) fn inner_mut(&mut self) -> &mut T {
        &mut self.inner
    }

    /// Returns how many bytes passed.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Returns whether nothing passed yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns what was wrapped, and the digest.
    pub fn finish(self) -> (T, nydus_rafs::Digest) {
        (self.inner, nydus_rafs::Digest(self.hash.finalize().into()))
    }

    /// Returns the digest so far.
    pub fn digest(&self) -> nydus_rafs::Digest {
        nydus_rafs::Digest(self.hash.clone().finalize().into())
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let len = self.inner.read(into)?;
        self.hash.update(&into[..len]);
        self.len += len as u64;
        Ok(len)
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = self.inner.write(bytes)?;
        self.hash.update(&bytes[..len]);
        self.len += len as u64;
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
