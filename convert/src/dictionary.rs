//! Chunks that blobs of other images hold already, so that a new blob need not hold them again.

use std::collections::HashMap;

use nydus_rafs::tree::ChunkRef;
use nydus_rafs::{BlobInfo, Bootstrap, Chunk, Digest, FormatError};

use crate::pack::Recipe;

/// Why an image cannot be a dictionary for another.
#[derive(Debug, thiserror::Error)]
pub enum DictionaryError {
    /// Its tables cannot be read.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// Its chunks do not fit.
    #[error("its {what} is {found}, the image to build has {wanted}: chunks of one cannot be used in the other")]
    Unlike {
        /// What differs.
        what: &'static str,
        /// In the dictionary.
        found: String,
        /// In the image to build.
        wanted: String,
    },
}

/// Blobs that exist, and where their chunks are.
///
/// Bodies and layers name blob 0 for the blob that is being made, and `n + 1` for blob `n` of the dictionary.
#[derive(Debug, Default)]
pub struct Dictionary {
    blobs: Vec<KnownBlob>,
    /// By digest and number of plain bytes.
    chunks: HashMap<(Digest, u64), ChunkRef>,
}

/// A blob that exists.
#[derive(Debug, Clone)]
pub struct KnownBlob {
    /// What a bootstrap says of it.
    pub info: BlobInfo,
    /// Its chunks, as far as the image that brought it refers to them.
    pub chunks: Vec<Chunk>,
}

impl Dictionary {
    /// Adds the blobs of an image that are not known yet.
    ///
    /// # Errors
    ///
    /// If the image is of another kind than what `recipe` makes.
    pub fn add<B: AsRef<[u8]>>(&mut self, image: &Bootstrap<B>, recipe: Recipe) -> Result<(), DictionaryError> {
        let pairs = [
            ("RAFS version", u32::from(image.version()), u32::from(recipe.version.number())),
            ("chunk size", image.chunk_size(), recipe.chunk_size),
        ];
        for (what, found, wanted) in pairs {
            if found != wanted {
                return Err(DictionaryError::Unlike { what, found: found.to_string(), wanted: wanted.to_string() });
            }
        }
        for (index, info) in image.blobs().iter().enumerate() {
            if self.find(info).is_some() {
                continue;
            }
            if info.algorithm != recipe.algorithm {
                tracing::warn!(blob = %info.id, "a dictionary whose chunks are named by another digest saves nothing");
            }
            let chunks = image.chunks(u16::try_from(index).unwrap_or(u16::MAX))?.all().to_vec();
            self.push(KnownBlob { info: info.clone(), chunks });
        }
        Ok(())
    }

    fn push(&mut self, blob: KnownBlob) {
        let number = u16::try_from(self.blobs.len() + 1).unwrap_or(u16::MAX);
        for chunk in &blob.chunks {
            if let Some(digest) = chunk.digest {
                let place = ChunkRef { blob: number, chunk: chunk.index };
                self.chunks.entry((digest, chunk.plain_len())).or_insert(place);
            }
        }
        self.blobs.push(blob);
    }

    /// Returns the blobs.
    pub fn blobs(&self) -> &[KnownBlob] {
        &self.blobs
    }

    /// Returns the number of a blob in bodies and layers.
    pub fn find(&self, info: &BlobInfo) -> Option<u16> {
        let position = self.blobs.iter().position(|blob| blob.info.id == info.id)?;
        u16::try_from(position + 1).ok()
    }

    /// Returns where a chunk is.
    pub fn get(&self, digest: Digest, plain_len: usize) -> Option<ChunkRef> {
        self.chunks.get(&(digest, plain_len as u64)).copied()
    }
}
