//! A blob in the cache: which of its pieces are there, and who is getting the others.
//!
//! A piece is 1 MiB of the blob as stored, the last one shorter. It is absent, being filled by whoever holds its
//! [`Claim`], or ready in the data file. A dropped claim makes it absent again and tells those who wait for it.
//! Ready does not mean true: bytes from upstream are unproved until all pieces are there and the sha256 of the whole is
//! the blob's name. If it is not, all pieces go, and readers that verify for themselves were the only safe ones until then.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use bytes::Bytes;
use nydus_rafs::Digest;
use sha2::Digest as _;

use super::filling::{End, Filling, Interest, Launch};
use super::map::Map;
use super::quota::Room;
use crate::swarm::Peer;

/// The grid.
pub(super) const PIECE: u64 = 1 << 20;

/// The blake3 of a piece.
pub(super) type Sum = [u8; 32];

/// Who gave the bytes of a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Giver {
    /// The registry.
    Registry,
    /// The configured mirror of this number.
    Mirror(usize),
    /// A member of the swarm.
    Peer(Peer),
    /// Somebody, before this process began.
    Earlier,
}

#[derive(Debug)]
enum Piece {
    Absent,
    Filling(Arc<Filling>),
    Ready { sum: Sum, checked: bool, giver: Giver },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Proof {
    None,
    Running,
    Done,
}

#[derive(Debug)]
struct State {
    pieces: Vec<Piece>,
    ready: usize,
    proof: Proof,
    /// Raised when a ready piece is dropped, so that a proof knows that it hashed something else.
    drops: u64,
}

#[derive(Debug)]
struct Files {
    data: File,
    map: File,
}

/// A blob in the cache.
#[derive(Debug)]
pub(super) struct Blob {
    digest: Digest,
    size: u64,
    path: PathBuf,
    /// Opened when first needed; none if the disk did not let us, and then nothing is kept.
    files: OnceLock<Option<Files>>,
    state: Mutex<State>,
    /// Bytes of ready pieces of all blobs.
    usage: Arc<AtomicU64>,
    /// Readers and fetches; an evictor keeps away while there are any.
    pub(super) pins: AtomicUsize,
    /// When it was last pinned, on the store's own clock.
    pub(super) used: AtomicU64,
    /// Set when mirrors gave bytes that did not prove: from then on only the registry is asked.
    pub(super) registry_only: AtomicBool,
}

/// What became of a proof.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// There is nothing to prove: pieces are missing, it was done, or somebody is at it.
    NotNow,
    /// The bytes are the blob; how many came from whom.
    Proved(Vec<(Giver, u64)>),
    /// They are not, and are gone; how many came from whom.
    Refuted(Vec<(Giver, u64)>),
}

/// How a piece can be had.
#[derive(Debug)]
pub(super) enum Look {
    /// From upstream.
    Absent,
    /// From the one who is getting it.
    Filling(Interest),
    /// From the disk.
    Ready,
}

impl Blob {
    /// A blob of which nothing is there.
    pub(super) fn create(dir: &Path, digest: Digest, size: u64, usage: Arc<AtomicU64>) -> Self {
        let map = Map { size, sums: vec![None; usize::try_from(size.div_ceil(PIECE)).unwrap_or(0)], sealed: false };
        let blob = Self::with(dir, digest, map, usage);
        let files = blob.make_files();
        if let Err(error) = &files {
            tracing::warn!(blob = %digest, %error, "could not make the cache files; passing bytes through");
        }
        let _ = blob.files.set(files.ok());
        blob
    }

    /// A blob as an earlier process left it; none if its files do not fit together.
    pub(super) fn reopen(dir: &Path, digest: Digest, usage: Arc<AtomicU64>) -> Option<Self> {
        let path = dir.join(digest.to_string());
        let map = Map::parse(&digest, &std::fs::read(path.with_extension("pieces")).ok()?)?;
        let length = path.with_extension("data").metadata().ok()?.len();
        if length != map.size || map.sums.iter().all(Option::is_none) {
            return None;
        }
        Some(Self::with(dir, digest, map, usage))
    }

    fn with(dir: &Path, digest: Digest, map: Map, usage: Arc<AtomicU64>) -> Self {
        let pieces: Vec<Piece> = map
            .sums
            .iter()
            .map(|sum| match sum {
                Some(sum) => Piece::Ready { sum: *sum, checked: false, giver: Giver::Earlier },
                None => Piece::Absent,
            })
            .collect();
        let ready = map.sums.iter().flatten().count();
        let proof = if map.sealed { Proof::Done } else { Proof::None };
        let blob = Self {
            digest,
            size: map.size,
            path: dir.join(digest.to_string()),
            files: OnceLock::new(),
            state: Mutex::new(State { pieces, ready, proof, drops: 0 }),
            usage,
            pins: AtomicUsize::new(0),
            used: AtomicU64::new(0),
            registry_only: AtomicBool::new(false),
        };
        blob.usage.fetch_add(blob.stored(), Ordering::Relaxed);
        blob
    }

    fn make_files(&self) -> io::Result<Files> {
        let open = |extension| {
            let path = self.path.with_extension(extension);
            OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)
        };
        // The map goes first: data without a map is rubbish that the next start removes.
        let map = open("pieces")?;
        let data = open("data")?;
        data.set_len(self.size)?;
        Map::create(&map, &self.digest, self.size)?;
        Ok(Files { data, map })
    }

    fn files(&self) -> Option<&Files> {
        let open = |extension| OpenOptions::new().read(true).write(true).open(self.path.with_extension(extension));
        self.files.get_or_init(|| Some(Files { data: open("data").ok()?, map: open("pieces").ok()? })).as_ref()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change of the state is one assignment, so a panic elsewhere leaves it whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the disk gave it no files, so that nothing of it can be kept.
    pub(super) fn fileless(&self) -> bool {
        matches!(self.files.get(), Some(None))
    }

    /// Returns its name.
    pub(super) fn digest(&self) -> Digest {
        self.digest
    }

    /// Returns its size as stored.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Returns the number of its pieces.
    pub(super) fn pieces(&self) -> u64 {
        self.size.div_ceil(PIECE)
    }

    /// Returns where `piece` lies in the blob.
    pub(super) fn extent(&self, piece: u64) -> Range<u64> {
        piece * PIECE..((piece + 1) * PIECE).min(self.size)
    }

    /// Returns the bytes of its ready pieces.
    pub(super) fn stored(&self) -> u64 {
        let state = self.state();
        let ready = state.pieces.iter().enumerate().filter(|(_, piece)| matches!(piece, Piece::Ready { .. }));
        ready.map(|(index, _)| self.length(index)).sum()
    }

    fn length(&self, index: usize) -> u64 {
        let extent = self.extent(index as u64);
        extent.end - extent.start
    }

    /// Tells how `piece` can be had now. A [`Look::Filling`] keeps its fetch going.
    pub(super) fn look(&self, piece: u64) -> Look {
        match self.state().pieces.get(slot(piece)) {
            Some(Piece::Filling(filling)) => Look::Filling(Interest::new(filling)),
            Some(Piece::Ready { .. }) => Look::Ready,
            Some(Piece::Absent) | None => Look::Absent,
        }
    }

    /// Claims the run of absent pieces that begins at `within.start` and ends with `within` at the latest.
    ///
    /// The interests keep the fetch going; the claims are for the one who fetches. Both are empty if somebody else was first.
    pub(super) fn claim(self: &Arc<Self>, within: Range<u64>, launch: &Arc<Launch>) -> (Vec<Claim>, Vec<Interest>) {
        let mut state = self.state();
        let (mut claims, mut interests) = (Vec::new(), Vec::new());
        for piece in within {
            let Some(place @ Piece::Absent) = state.pieces.get_mut(slot(piece)) else { break };
            let extent = self.extent(piece);
            let filling = Arc::new(Filling::new(extent.end - extent.start, launch.clone()));
            *place = Piece::Filling(filling.clone());
            interests.push(Interest::new(&filling));
            claims.push(Claim { blob: self.clone(), piece, filling: Some(filling) });
        }
        (claims, interests)
    }

    /// Claims every absent piece, for an upstream that sends the whole blob or nothing.
    pub(super) fn claim_all(self: &Arc<Self>, launch: &Arc<Launch>) -> Vec<Claim> {
        (0..self.pieces()).flat_map(|piece| self.claim(piece..piece + 1, launch).0).collect()
    }

    /// Reads `within` (offsets in the blob, inside `piece`) from the disk; blocks.
    ///
    /// None if the piece is not there, or cannot be read, or is not what was once stored: then it is absent now.
    pub(super) fn read(&self, piece: u64, within: Range<u64>) -> Option<Bytes> {
        let (sum, checked) = match self.state().pieces.get(slot(piece)) {
            Some(Piece::Ready { sum, checked, .. }) => (*sum, *checked),
            _ => return None,
        };
        let read = |range: Range<u64>| -> io::Result<Bytes> {
            let files = self.files().ok_or(io::ErrorKind::NotFound)?;
            let mut bytes = vec![0; usize::try_from(range.end - range.start).map_err(io::Error::other)?];
            files.data.read_exact_at(&mut bytes, range.start)?;
            Ok(bytes.into())
        };
        let extent = self.extent(piece);
        let got = if checked { read(within.clone()) } else { read(extent.clone()) };
        match got {
            Err(error) => {
                tracing::warn!(blob = %self.digest, piece, %error, "could not read a cached piece; it is fetched again");
            }
            Ok(bytes) if checked => return Some(bytes),
            Ok(bytes) if *blake3::hash(&bytes).as_bytes() == sum => {
                if let Some(Piece::Ready { sum: now, checked, .. }) = self.state().pieces.get_mut(slot(piece)) {
                    *checked |= *now == sum;
                }
                let at = |offset: u64| usize::try_from(offset - extent.start).ok();
                return Some(bytes.slice(at(within.start)?..at(within.end)?));
            }
            Ok(_) => {
                tracing::warn!(blob = %self.digest, piece, "a cached piece is not what was stored; it is fetched again");
            }
        }
        self.drop_piece(piece);
        None
    }

    /// Makes a ready piece absent; returns who had given it.
    pub(super) fn drop_piece(&self, piece: u64) -> Option<Giver> {
        let mut state = self.state();
        let place = state.pieces.get_mut(slot(piece))?;
        let Piece::Ready { giver, .. } = *place else { return None };
        *place = Piece::Absent;
        state.ready -= 1;
        state.drops += 1;
        if state.proof == Proof::Done {
            state.proof = Proof::None;
        }
        self.usage.fetch_sub(self.length(slot(piece)), Ordering::Relaxed);
        // Under the lock, so that it cannot come after the record of the next filler. If it cannot be written, the sum
        // stays and is compared with the data again, which is all that a sum is good for.
        if let Some(files) = self.files()
            && let Err(error) = Map::record(&files.map, piece, None)
        {
            tracing::debug!(blob = %self.digest, piece, %error, "could not record a dropped piece");
        }
        Some(giver)
    }

    /// Returns the pieces that are there with their sums, and whether the whole was compared with its name.
    pub(super) fn inventory(&self) -> (Vec<(u64, Sum)>, bool) {
        let state = self.state();
        let ready = state.pieces.iter().enumerate().filter_map(|(index, piece)| match piece {
            Piece::Ready { sum, .. } => Some((index as u64, *sum)),
            _ => None,
        });
        (ready.collect(), state.proof == Proof::Done)
    }

    /// Returns the sum of a piece that is there.
    pub(super) fn sum(&self, piece: u64) -> Option<Sum> {
        match self.state().pieces.get(slot(piece)) {
            Some(Piece::Ready { sum, .. }) => Some(*sum),
            _ => None,
        }
    }

    /// Whether all pieces are there and nobody has compared the whole with its name yet.
    pub(super) fn wants_proof(&self) -> bool {
        let state = self.state();
        state.ready == state.pieces.len() && state.proof == Proof::None
    }

    /// Whether the whole was compared with its name.
    pub(super) fn proved(&self) -> bool {
        self.state().proof == Proof::Done
    }

    /// Compares the whole with its name, if all pieces are there and nobody has done so; blocks for about 1 s per GB.
    pub(super) fn prove(&self) -> Verdict {
        let drops = {
            let mut state = self.state();
            if state.ready < state.pieces.len() || state.proof != Proof::None {
                return Verdict::NotNow;
            }
            state.proof = Proof::Running;
            state.drops
        };
        let mut hash = sha2::Sha256::new();
        let mut broken = false;
        for piece in 0..self.pieces() {
            // Through `read`, so that a piece that the disk lost is found as such, not as a lie of its giver.
            match self.read(piece, self.extent(piece)) {
                Some(bytes) => hash.update(&bytes),
                None => {
                    broken = true;
                    break;
                }
            }
        }
        let same = Digest(hash.finalize().into()) == self.digest;
        let mut state = self.state();
        state.proof = Proof::None;
        if broken || state.drops != drops {
            return Verdict::NotNow;
        }
        let mut givers: Vec<(Giver, u64)> = Vec::new();
        for (index, piece) in state.pieces.iter().enumerate() {
            if let Piece::Ready { giver, .. } = piece {
                match givers.iter_mut().find(|(known, _)| known == giver) {
                    Some((_, bytes)) => *bytes += self.length(index),
                    None => givers.push((*giver, self.length(index))),
                }
            }
        }
        givers.sort_unstable();
        if !same {
            drop(state);
            for piece in 0..self.pieces() {
                self.drop_piece(piece);
            }
            if givers.iter().any(|(giver, _)| *giver != Giver::Registry) {
                self.registry_only.store(true, Ordering::Relaxed);
            }
            return Verdict::Refuted(givers);
        }
        state.proof = Proof::Done;
        let sums: Vec<Option<Sum>> = state
            .pieces
            .iter()
            .map(|piece| if let Piece::Ready { sum, .. } = piece { Some(*sum) } else { None })
            .collect();
        if let Some(files) = self.files()
            && let Err(error) = Map::seal(&files.map, &sums)
        {
            tracing::debug!(blob = %self.digest, %error, "could not record a proof; it is made again after a restart");
        }
        Verdict::Proved(givers)
    }

    /// Removes its files, and its bytes from the account. For the store, when nobody has it pinned.
    pub(super) fn unlink(&self) {
        self.usage.fetch_sub(self.stored(), Ordering::Relaxed);
        for extension in ["pieces", "data"] {
            if let Err(error) = std::fs::remove_file(self.path.with_extension(extension))
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(blob = %self.digest, %error, "could not remove a cache file");
            }
        }
    }

    fn store(&self, piece: u64, bytes: &[Bytes], sum: &Sum) -> io::Result<()> {
        let files = self.files().ok_or(io::ErrorKind::NotFound)?;
        let mut at = piece * PIECE;
        for segment in bytes {
            files.data.write_all_at(segment, at)?;
            at += segment.len() as u64;
        }
        Map::record(&files.map, piece, Some(sum))
    }
}

fn slot(piece: u64) -> usize {
    usize::try_from(piece).unwrap_or(usize::MAX)
}

/// The right and the duty to fill one piece.
#[derive(Debug)]
#[must_use = "dropping a claim gives the piece back"]
pub(super) struct Claim {
    blob: Arc<Blob>,
    piece: u64,
    /// Taken when the claim ends.
    filling: Option<Arc<Filling>>,
}

impl Claim {
    /// Returns which piece it is.
    pub(super) fn piece(&self) -> u64 {
        self.piece
    }

    /// Returns where readers see the bytes come.
    pub(super) fn filling(&self) -> &Filling {
        self.filling.as_ref().expect("a claim has its filling until it ends, and ending takes the claim")
    }

    /// Returns a hold on the place where readers see the bytes come, which outlives the claim.
    pub(super) fn shared(&self) -> Option<Arc<Filling>> {
        self.filling.clone()
    }

    /// Ends with all bytes received: keeps them if there is room; blocks. Returns whether they are on the disk.
    pub(super) fn commit(mut self, giver: Giver, room: Option<Room>) -> io::Result<bool> {
        let Some(filling) = self.filling.take() else { return Ok(false) };
        let bytes = filling.segments();
        let mut hash = blake3::Hasher::new();
        for segment in &bytes {
            hash.update(segment);
        }
        let sum = *hash.finalize().as_bytes();
        let stored = if room.is_some() { self.blob.store(self.piece, &bytes, &sum).map(|()| true) } else { Ok(false) };
        let kept = matches!(stored, Ok(true));
        {
            let mut state = self.blob.state();
            let now = if kept { Piece::Ready { sum, checked: true, giver } } else { Piece::Absent };
            if let Some(place) = state.pieces.get_mut(slot(self.piece)) {
                *place = now;
                state.ready += usize::from(kept);
            }
        }
        if let Some(room) = room.filter(|_| kept) {
            room.keep();
        }
        filling.end(if kept { End::Stored } else { End::Unstored });
        stored
    }

    /// Ends with the reason why there are no bytes.
    pub(super) fn fail(mut self, error: Arc<super::upstream::UpstreamError>) {
        self.give_back(End::Failed(error));
    }

    fn give_back(&mut self, end: End) {
        if let Some(filling) = self.filling.take() {
            if let Some(place) = self.blob.state().pieces.get_mut(slot(self.piece)) {
                *place = Piece::Absent;
            }
            filling.end(end);
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.give_back(End::Abandoned);
    }
}

#[cfg(test)]
mod tests;
