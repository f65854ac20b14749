//! One blob's place in the cache, shared by all images of this process that agree about it.
//!
//! Images share what they agree on, chunk by chunk: same plain bytes, same digest. An image that contradicts a
//! living one gets a cache file of its own; one that contradicts only what is left from earlier ones takes their
//! place, and what the map says of the chunks in its way is erased before anything is overwritten.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

use bytes::Bytes;
use nydus_rafs::{BlobId, Chunk};

use super::cache_file::{CacheFile, TOUCHED, Written};
use super::claim::{Claim, Claims, Slot, State};
use super::layout::{Layout, same_bytes};
use super::ready::overlapping;
use super::shelf::Shelf;

/// The cache file of a blob, the chunks of its images, and who fetches them.
#[derive(Debug)]
pub(super) struct Cache {
    blob: BlobId,
    /// `None`: the directory does not take the blob; what is fetched is served and not kept.
    file: Option<CacheFile>,
    claims: Arc<Claims>,
    layouts: Mutex<Vec<Weak<Layout>>>,
    shelf: Arc<Shelf>,
    verify: bool,
    /// Shared by those who write and commit a chunk, exclusive to who says that all is lost: a chunk written before
    /// the loss is not committed after it.
    keeping: RwLock<()>,
    /// How often all was lost. A reader that sees it change does not believe what it read.
    losses: AtomicU64,
}

/// The image contradicts another about this blob.
#[derive(Debug)]
pub(super) struct Disagreement;

/// What became of verified bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kept {
    /// They are in the cache file.
    InFile,
    /// They are in memory for a while.
    OnShelf,
}

impl Cache {
    pub(super) fn new(blob: BlobId, file: Option<CacheFile>, shelf: Arc<Shelf>, verify: bool) -> Self {
        Self {
            blob,
            file,
            claims: Arc::default(),
            layouts: Mutex::default(),
            shelf,
            verify,
            keeping: RwLock::default(),
            losses: AtomicU64::new(0),
        }
    }

    pub(super) fn file(&self) -> Option<&CacheFile> {
        self.file.as_ref()
    }

    pub(super) fn claims(&self) -> &Arc<Claims> {
        &self.claims
    }

    /// Returns the layout of an image with these chunks (in order, without overlaps).
    pub(super) fn adopt(&self, chunks: &[Chunk]) -> Result<Arc<Layout>, Disagreement> {
        let mut layouts = self.layouts.lock().unwrap_or_else(PoisonError::into_inner);
        layouts.retain(|layout| layout.strong_count() > 0);
        let living: Vec<Arc<Layout>> = layouts.iter().filter_map(Weak::upgrade).collect();
        if let Some(same) = living.iter().find(|layout| layout.chunks() == chunks) {
            return Ok(same.clone());
        }
        let mut slots: Vec<Option<Arc<Slot>>> = vec![None; chunks.len()];
        for layout in &living {
            share(layout, chunks, &mut slots)?;
        }
        self.recall(chunks, &mut slots)?;
        let slots = slots.into_iter().map(|slot| slot.unwrap_or_else(|| Arc::new(Slot::new(State::Absent)))).collect();
        let layout = Arc::new(Layout::new(chunks.to_vec(), slots));
        layouts.push(Arc::downgrade(&layout));
        Ok(layout)
    }

    /// Gives chunks that no living image has the state that the map knows.
    fn recall(&self, chunks: &[Chunk], slots: &mut [Option<Arc<Slot>>]) -> Result<(), Disagreement> {
        let Some(map) = self.file().and_then(CacheFile::map) else { return Ok(()) };
        let known = map.known().map_err(|error| {
            tracing::warn!(blob = %self.blob, %error, "ready map not readable");
            Disagreement
        })?;
        let mut in_the_way = Vec::new();
        for (chunk, slot) in chunks.iter().zip(slots).filter(|(_, slot)| slot.is_none()) {
            match known.get(&chunk.plain.start) {
                Some(one) if one.is(chunk) => *slot = Some(Arc::new(Slot::new(self.belief(one, chunk)))),
                _ => in_the_way.extend(overlapping(&known, &chunk.plain)),
            }
        }
        in_the_way.sort_unstable();
        in_the_way.dedup();
        map.erase(in_the_way.iter().filter_map(|start| known.get(start))).map_err(|error| {
            tracing::warn!(blob = %self.blob, %error, "ready map not writable");
            Disagreement
        })
    }

    fn belief(&self, known: &super::ready::Known, chunk: &Chunk) -> State {
        let checkable = chunk.digest.is_some();
        match (known.sure, known.verified || !self.verify, checkable) {
            (true, true, _) | (true, false, false) => State::Ready,
            (_, _, true) => State::Unsure,
            (false, _, false) => State::Absent,
        }
    }

    /// Puts a chunk's verified bytes where they can be read again, and settles the claim.
    pub(super) fn keep(&self, claim: Claim, bytes: &Bytes, verified: bool) -> Kept {
        claim.publish(bytes.clone());
        for _ in 0..2 {
            let keeping = self.keeping.read().unwrap_or_else(PoisonError::into_inner);
            let Some(file) = &self.file else { break };
            match file.write(claim.chunk(), bytes, verified) {
                Ok(Written::Yes) => {
                    claim.commit();
                    return Kept::InFile;
                }
                Ok(Written::Touched) => {
                    drop(keeping);
                    self.forget(TOUCHED);
                }
                Err(error) => {
                    self.shelf.complain(&self.blob, &error);
                    break;
                }
            }
        }
        self.shelf.put(self.key(claim.chunk()), bytes.clone());
        drop(claim);
        Kept::OnShelf
    }

    /// Returns the bytes of a chunk that the cache file did not take, if they are still at hand.
    pub(super) fn shelved(&self, chunk: &Chunk) -> Option<Bytes> {
        self.shelf.get(self.key(chunk))
    }

    fn key(&self, chunk: &Chunk) -> (usize, u64) {
        (std::ptr::from_ref(self).addr(), chunk.plain.start)
    }

    /// Believes nothing that the cache file holds until it was checked.
    pub(super) fn forget(&self, why: &'static str) {
        tracing::warn!(blob = %self.blob, why, "the cache file cannot be believed: its chunks are checked when next used");
        let _alone = self.keeping.write().unwrap_or_else(PoisonError::into_inner);
        let layouts = self.layouts.lock().unwrap_or_else(PoisonError::into_inner);
        self.losses.fetch_add(1, Ordering::SeqCst);
        for layout in layouts.iter().filter_map(Weak::upgrade) {
            for (chunk, slot) in layout.chunks().iter().zip(layout.slots()) {
                // What has no digest cannot be checked.
                self.claims.lost(slot, if chunk.digest.is_some() { State::Unsure } else { State::Absent });
            }
        }
        // Last: as long as the file is short, a reader that still believes in it gets an error and not zeros.
        if let Some(file) = &self.file
            && let Err(error) = file.restore()
        {
            tracing::warn!(blob = %self.blob, %error, "the cache file could not be taken up again");
        }
    }

    /// Returns how often all was lost.
    pub(super) fn losses(&self) -> u64 {
        self.losses.load(Ordering::SeqCst)
    }

    /// Returns whether nobody else changed the cache file since its bytes were believed; if somebody did, nothing in it is
    /// believed any more.
    pub(super) fn intact(&self) -> bool {
        let intact = self.file.as_ref().is_none_or(CacheFile::intact);
        if !intact {
            self.forget(TOUCHED);
        }
        intact
    }

    /// Records that the cache file holds what was left in it, and settles the claim. `losses` is their number before the
    /// file was read.
    pub(super) fn confirm(&self, claim: Claim, bytes: Bytes, losses: u64) {
        claim.publish(bytes);
        let _keeping = self.keeping.read().unwrap_or_else(PoisonError::into_inner);
        if self.losses() != losses {
            return;
        }
        if let Some(file) = &self.file {
            file.record(claim.chunk(), true);
        }
        claim.commit();
    }

    /// Looks at a chunk that could not be read although it was ready.
    pub(super) fn unreadable(&self, slot: &Slot, error: &io::Error) {
        match &self.file {
            Some(file) if !file.intact() => self.forget(TOUCHED),
            _ => {
                self.shelf.complain(&self.blob, error);
                self.claims.lost(slot, State::Absent);
            }
        }
    }

    /// Leaves the cache to the next process.
    pub(super) fn leave(&self) {
        self.seal();
        if let Some(file) = &self.file {
            file.discard_copy();
        }
    }

    /// Brings all to the disk.
    pub(super) fn seal(&self) {
        let Some(file) = &self.file else { return };
        if let Err(error) = file.seal() {
            tracing::warn!(blob = %self.blob, %error, "cache not synced: its chunks are checked when they are next used");
            // After a failed sync the kernel may drop pages that it could not write, and show what was there before.
            self.forget("it could not be brought to the disk");
        }
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        // The address names the cache on the shelf, and may be another's next.
        self.shelf.forget(std::ptr::from_ref(self).addr());
    }
}

/// Takes over the slots of chunks that `layout` means as well.
fn share(layout: &Layout, chunks: &[Chunk], slots: &mut [Option<Arc<Slot>>]) -> Result<(), Disagreement> {
    let mut at = 0;
    for (chunk, slot) in chunks.iter().zip(slots) {
        while at < layout.chunks().len() && layout.chunk(at).plain.end <= chunk.plain.start {
            at += 1;
        }
        match layout.chunks().get(at) {
            Some(other) if same_bytes(other, chunk) => *slot = Some(layout.slot(at).clone()),
            Some(other) if other.plain.start < chunk.plain.end => return Err(Disagreement),
            _ => {}
        }
    }
    Ok(())
}
