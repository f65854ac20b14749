//! Small chunks that are compressed together.
//!
//! They keep plain addresses of their own; in the decoded batch they lie back to back.

use std::sync::Arc;

use super::table::Batch;
use crate::chunk::{ChunkIndex, Codec, Compressor, Container};
use crate::cipher::Cipher;
use crate::codec;

/// The batches of a blob: those that are written and the one that is being filled.
#[derive(Debug)]
pub(super) struct Batches {
    /// What a batch stays below, in plain bytes.
    limit: usize,
    plain: Vec<u8>,
    members: Vec<ChunkIndex>,
    written: Vec<Arc<Container>>,
}

/// A batch that is complete.
pub(super) struct Complete {
    /// Its chunks.
    pub(super) members: Vec<ChunkIndex>,
    /// What they are parts of.
    pub(super) container: Arc<Container>,
    /// Its bytes.
    pub(super) stored: Vec<u8>,
}

impl Batches {
    pub(super) fn new(limit: u32) -> Self {
        Self { limit: limit as usize, plain: Vec::new(), members: Vec::new(), written: Vec::new() }
    }

    /// Returns whether `plain` fits into the batch that is being filled.
    pub(super) fn has_room_for(&self, plain: &[u8]) -> bool {
        self.plain.len() + plain.len() < self.limit
    }

    /// Adds a chunk and returns how it is coded.
    pub(super) fn add(&mut self, index: ChunkIndex, plain: &[u8]) -> Codec {
        // Chunks have 16 MiB at most and a blob fewer than 2^24 of them.
        let codec = Codec::Batch { batch: self.written.len() as u32, offset: self.plain.len() as u32 };
        self.plain.extend_from_slice(plain);
        self.members.push(index);
        codec
    }

    /// Completes the batch that is being filled, if there is anything in it.
    pub(super) fn take(&mut self, compressor: Compressor, cipher: Option<&Cipher>) -> Option<Complete> {
        if self.members.is_empty() {
            return None;
        }
        let plain = std::mem::take(&mut self.plain);
        let (codec, stored) = match codec::compress(compressor, &plain) {
            // Readers tell a raw batch by its size, which encryption changes if there are less than 16 bytes.
            Some(tiny) if cipher.is_some() && plain.len() < 16 => (compressor.codec(), tiny),
            Some(smaller) if smaller.len() < plain.len() => (compressor.codec(), smaller),
            _ => (Codec::Plain, plain.clone()),
        };
        let stored = match cipher {
            Some(cipher) => cipher.encrypt(&stored),
            None => stored,
        };
        let batch = Batch { stored_size: stored.len() as u32, plain_size: plain.len() as u32 };
        let container = Arc::new(Container::Batch { batch, codec, cipher: cipher.cloned() });
        self.written.push(Arc::clone(&container));
        Some(Complete { members: std::mem::take(&mut self.members), container, stored })
    }

    /// Returns what the chunks of all complete batches are parts of.
    pub(super) fn written(&self) -> &[Arc<Container>] {
        &self.written
    }
}
