//! The chunks of one blob as one image knows them, each with the slot that says whether it can be read.
//!
//! Images are strangers to each other and to us. A layout is checked once, when the image is opened: its chunks
//! do not overlap, and none is so large that fetching it would be an attack on our memory. After that a chunk is
//! known by its position here, and the address of its plain bytes is its name in the cache file.

use std::ops::Range;
use std::sync::Arc;

use nydus_rafs::{Chunk, ChunkTable};

use super::claim::Slot;

/// The largest chunk believed, plain: twice what the format allows, for builders who round up.
const MAX_PLAIN: u64 = 32 << 20;
/// The largest chunk believed, stored; incompressible bytes grow a little.
const MAX_STORED: u64 = 64 << 20;
/// Files lie at multiples of this in the plain address space; what is between belongs to nobody and reads as zeros.
pub(super) const BLOCK: u64 = 4096;

/// The chunks, in the order of their plain bytes, and their slots.
#[derive(Debug)]
pub(super) struct Layout {
    chunks: Box<[Chunk]>,
    slots: Box<[Arc<Slot>]>,
}

/// Puts a table in order: no overlaps, no doubles, no monsters. The text says what is wrong.
pub(super) fn checked(table: &ChunkTable) -> Result<Vec<Chunk>, String> {
    let mut chunks: Vec<Chunk> = Vec::with_capacity(table.all().len());
    for chunk in table.all() {
        let (plain, stored) = (&chunk.plain, &chunk.stored);
        if plain.start > plain.end || stored.start > stored.end || plain.end > i64::MAX as u64 {
            return Err(format!("chunk {} lies at plain bytes {plain:?}, stored bytes {stored:?}", chunk.index.0));
        }
        if plain.is_empty() {
            continue;
        }
        if plain.end - plain.start > MAX_PLAIN || stored.end - stored.start > MAX_STORED {
            return Err(format!(
                "chunk {} is larger than any chunk may be: plain bytes {plain:?}, stored bytes {stored:?}",
                chunk.index.0
            ));
        }
        match chunks.last() {
            // A chunk that two layers share may be listed once for each.
            Some(last) if last.plain == *plain && same_bytes(last, chunk) => continue,
            Some(last) if last.plain.end > plain.start => {
                return Err(format!(
                    "chunks {} and {} overlap: plain bytes {:?} and {plain:?}",
                    last.index.0, chunk.index.0, last.plain
                ));
            }
            _ => chunks.push(chunk.clone()),
        }
    }
    Ok(chunks)
}

/// Returns whether two images mean the same bytes by a chunk of the same blob.
///
/// Two chunks of one digest are one content, wherever each image finds it in the blob. Without a digest only
/// the same place is the same content.
pub(super) fn same_bytes(a: &Chunk, b: &Chunk) -> bool {
    a.plain == b.plain
        && match (a.digest, b.digest) {
            (Some(x), Some(y)) => x == y && a.algorithm == b.algorithm,
            (None, None) => a.stored == b.stored && a.codec == b.codec && a.encrypted == b.encrypted,
            _ => false,
        }
}

impl Layout {
    /// Joins chunks from [`checked`] and their slots.
    pub(super) fn new(chunks: Vec<Chunk>, slots: Vec<Arc<Slot>>) -> Self {
        debug_assert_eq!(chunks.len(), slots.len());
        Self { chunks: chunks.into(), slots: slots.into() }
    }

    /// Returns all chunks.
    pub(super) fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// Returns the chunk at position `at`.
    pub(super) fn chunk(&self, at: usize) -> &Chunk {
        &self.chunks[at]
    }

    /// Returns its slot.
    pub(super) fn slot(&self, at: usize) -> &Arc<Slot> {
        &self.slots[at]
    }

    /// Returns all slots.
    pub(super) fn slots(&self) -> &[Arc<Slot>] {
        &self.slots
    }

    /// Returns the positions of the chunks that hold at least one byte of `plain`.
    pub(super) fn covering(&self, plain: &Range<u64>) -> Range<usize> {
        if plain.is_empty() {
            return 0..0;
        }
        let from = self.chunks.partition_point(|chunk| chunk.plain.end <= plain.start);
        let mut to = from;
        // A read covers few chunks: walking is cheaper than a second search.
        while to < self.chunks.len() && self.chunks[to].plain.start < plain.end {
            to += 1;
        }
        from..to
    }

    /// Returns the first bytes of `plain` that are neither in a chunk nor between a chunk's end and its block's end.
    pub(super) fn outside(&self, plain: &Range<u64>) -> Option<Range<u64>> {
        let at = self.covering(plain);
        let padded = |end: u64| end.next_multiple_of(BLOCK);
        let mut known = match at.start.checked_sub(1) {
            Some(before) if !plain.is_empty() => padded(self.chunks[before].plain.end).max(plain.start),
            _ => plain.start,
        };
        for chunk in &self.chunks[at] {
            if chunk.plain.start > known {
                return Some(known..chunk.plain.start);
            }
            known = padded(chunk.plain.end);
        }
        (known < plain.end).then_some(known..plain.end)
    }

    /// Returns whether all of `plain` can be read at once, and nobody asked to hear of it.
    pub(super) fn ready(&self, plain: &Range<u64>) -> bool {
        let at = self.covering(plain);
        self.slots[at].iter().all(|slot| slot.plainly_ready()) && self.outside(plain).is_none()
    }
}
