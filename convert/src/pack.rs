//! File bodies to a blob: cut, name, compress, append.
//!
//! The thread that reads the tar cuts bodies into chunks and hands them to a [`Pool`] that all layers share, small ones
//! several at a time: waking a thread costs as much as compressing a few kilobytes. A
//! worker names each chunk (its digest) and compresses it. The reading thread takes the results back in the order in
//! which it handed them out and appends them to the blob, so the blob does not depend on which worker was quick, is written
//! forwards only, and no lock is held anywhere while bytes are worked on.
//!
//! The pool serves the weightiest layer first: it takes longest, and what remains to be done for the last layer to
//! end (its push) can then be small.
//!
//! A chunk whose digest the blob or a [`Dictionary`] already holds is not stored again. Workers know what was handed out
//! before them and skip compressing such a chunk; the reading thread has the last word. Small chunks that are to be
//! packed together are compressed together, by the reading thread.
//!
//! Memory: the reading thread waits for the oldest result once [`Packer`] has [`depth`] jobs under way, so a layer
//! holds at most [`chunks_in_memory`] bytes, plain and compressed.

use std::borrow::Cow;
use std::collections::{HashMap, VecDeque};
use std::io::{self, Write};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nydus_rafs::blob::write::{BlobWriter, Form, Options, StoredChunk};
use nydus_rafs::tree::{ChunkList, ChunkRef};
use nydus_rafs::{Algorithm, ChunkIndex, Cipher, Codec, Compressor, Digest, Version, codec};

use crate::dictionary::Dictionary;
use crate::layer::BodyId;

mod pool;

use pool::Job;
pub use pool::Pool;

/// Chunks are handed out together up to this many bytes.
const TOGETHER: usize = 256 << 10;

/// And up to this number of them.
const MANY: usize = 256;

/// Room is made for so many chunks of a body before they come: a size is only a promise.
const FORESEEN: u64 = 64;

/// Why a blob cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// Its bytes could not be written.
    #[error("could not write chunk {chunk} of the blob")]
    Write {
        /// Number of the chunk.
        chunk: usize,
        /// What failed.
        #[source]
        source: io::Error,
    },
    /// The pool is gone.
    #[error("the worker threads have stopped")]
    Stopped,
    /// There is nothing to make a key of.
    #[error("the system has no random bytes for a key")]
    Key(#[source] getrandom::Error),
}

/// How chunks are named and compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recipe {
    /// The version of the format.
    pub version: Version,
    /// The compressor.
    pub compressor: Compressor,
    /// The digest.
    pub algorithm: Algorithm,
    /// The size of all chunks of a file but the last: a power of two from 4 KiB to 16 MiB.
    pub chunk_size: u32,
    /// Whether plain addresses are multiples of 4 KiB; those of version 6 always are.
    pub aligned: bool,
    /// Below which number of bytes small files are packed together, if at all; version 6 only.
    pub batch_size: Option<u32>,
    /// Whether chunks are encrypted; version 6 only.
    pub encrypt: bool,
}

impl Default for Recipe {
    /// What established builders do when they are not told otherwise.
    fn default() -> Self {
        Self {
            version: Version::V6,
            compressor: Compressor::Zstd,
            algorithm: Algorithm::Blake3,
            chunk_size: 1 << 20,
            aligned: false,
            batch_size: None,
            encrypt: false,
        }
    }
}

impl Recipe {
    /// Returns the options of a blob of this form; one that is encrypted gets a key of its own.
    fn options(self, form: Form) -> Result<Options, PackError> {
        let cipher = if self.encrypt { Some(random_cipher().map_err(PackError::Key)?) } else { None };
        Ok(Options {
            version: self.version,
            aligned: self.aligned,
            batch_size: self.batch_size,
            cipher,
            ..Options::new(form, self.compressor, self.algorithm)
        })
    }
}

fn random_cipher() -> Result<Cipher, getrandom::Error> {
    let mut cipher = Cipher { key: [0; 32], iv: [0; 16] };
    getrandom::fill(&mut cipher.key)?;
    getrandom::fill(&mut cipher.iv)?;
    Ok(cipher)
}

/// A chunk that was worked on.
struct Done {
    digest: Digest,
    crc32: u32,
    plain_len: usize,
    stored: Stored,
}

enum Stored {
    /// As compressed, or as it is where compression does not make it smaller.
    Bytes(Codec, Vec<u8>),
    /// As it is, to be compressed with others.
    Small(Vec<u8>),
    /// An earlier chunk of the blob has the same bytes.
    Earlier,
    /// A blob that exists has them.
    Known(ChunkRef),
}

/// A chunk as it was read.
struct Plain {
    number: usize,
    bytes: Vec<u8>,
    /// Whether it is to be packed together with others.
    small: bool,
}

/// What all jobs of a packer share.
struct Shared {
    recipe: Recipe,
    dictionary: Arc<Dictionary>,
    seen: Seen,
}

/// The digests of the chunks of a blob.
#[derive(Debug, Default)]
struct Seen(Mutex<Digests>);

#[derive(Debug, Default)]
struct Digests {
    /// Of chunks that the blob has, or that wait in it to be packed together.
    appended: HashMap<Digest, ChunkIndex>,
    /// Of those handed out since, each with the lowest number that has it.
    under_way: HashMap<Digest, usize>,
}

impl Seen {
    fn lock(&self) -> MutexGuard<'_, Digests> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a digest; tells whether a chunk with a lower number has it.
    fn is_earlier(&self, digest: Digest, number: usize) -> bool {
        let mut digests = self.lock();
        if digests.appended.contains_key(&digest) {
            return true;
        }
        let first = digests.under_way.entry(digest).or_insert(number);
        if *first < number {
            return true;
        }
        *first = number;
        false
    }

    /// Returns the chunk of the blob that has this digest.
    fn appended(&self, digest: Digest) -> Option<ChunkIndex> {
        self.lock().appended.get(&digest).copied()
    }

    /// Notes that a chunk is in the blob.
    fn append(&self, digest: Digest, chunk: ChunkIndex) {
        let mut digests = self.lock();
        digests.under_way.remove(&digest);
        digests.appended.insert(digest, chunk);
    }
}

/// Names and compresses a chunk.
fn process(shared: &Shared, Plain { number, bytes: plain, small }: Plain) -> Done {
    let digest = shared.recipe.algorithm.digest(&plain);
    let crc32 = crc32c::crc32c(&plain);
    let plain_len = plain.len();
    let stored = if let Some(place) = shared.dictionary.get(digest, plain_len) {
        Stored::Known(place)
    } else if shared.seen.is_earlier(digest, number) {
        Stored::Earlier
    } else if small {
        Stored::Small(plain)
    } else {
        match codec::encode(shared.recipe.compressor, &plain) {
            (codec, Cow::Owned(compressed)) => Stored::Bytes(codec, compressed),
            (codec, Cow::Borrowed(_)) => Stored::Bytes(codec, plain),
        }
    };
    Done { digest, crc32, plain_len, stored }
}

/// Returns how many jobs a packer has under way at most: one for each worker, and what keeps it busy while one is written.
fn depth(threads: usize) -> usize {
    threads + 2
}

/// Returns how many bytes of chunks a packer holds at most, each plain and, once compressed, stored.
pub fn chunks_in_memory(threads: usize, chunk_size: u32) -> u64 {
    let job = u64::from(chunk_size) + TOGETHER as u64;
    2 * job * (depth(threads) as u64 + 1)
}

/// What the bytes of a body are known by, if it has any: see [`Body::digest`].
pub type BodyDigest = Option<Digest>;

/// A file body, packed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Body {
    /// Its chunks, in the order of the file; blobs are numbered as [`Dictionary`] says.
    pub chunks: ChunkList,
    /// The digests of the pieces of the file, taken from the bytes of the layer, folded into one by [`fold`].
    pub digest: BodyDigest,
}

/// Folds the digest of the next piece of a file into that of the pieces before it.
pub fn fold(algorithm: Algorithm, before: Option<Digest>, piece: Digest) -> Digest {
    match before {
        None => piece,
        Some(before) => algorithm.digest(&[before.0, piece.0].concat()),
    }
}

/// Packs the bodies of one layer into one blob.
pub struct Packer<'p, W> {
    pool: &'p Pool,
    shared: Arc<Shared>,
    blob: BlobWriter<W>,
    /// What the pool serves first.
    weight: u64,
    /// Chunks that are handed out together, of these bodies, and their bytes.
    gathered: Vec<Plain>,
    owners: Vec<BodyId>,
    bytes: usize,
    under_way: VecDeque<(Vec<BodyId>, Receiver<Vec<Done>>)>,
    /// How many chunks came so far.
    came: usize,
    bodies: Vec<Body>,
    /// Whether the body that was begun last has one chunk.
    single: bool,
}

impl<W: std::fmt::Debug> std::fmt::Debug for Packer<'_, W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Packer").field("recipe", &self.shared.recipe).field("blob", &self.blob).finish_non_exhaustive()
    }
}

impl<'p, W: Write> Packer<'p, W> {
    /// Begins a blob of this form that is written to `out` and holds nothing that `dictionary` does.
    ///
    /// # Errors
    ///
    /// If the blob is to be encrypted and there are no random bytes for its key.
    pub fn new(
        pool: &'p Pool,
        recipe: Recipe,
        dictionary: &Arc<Dictionary>,
        form: Form,
        out: W,
    ) -> Result<Self, PackError> {
        let shared = Shared { recipe, dictionary: Arc::clone(dictionary), seen: Seen::default() };
        Ok(Self {
            pool,
            shared: Arc::new(shared),
            blob: BlobWriter::new(out, recipe.options(form)?),
            weight: 0,
            gathered: Vec::new(),
            owners: Vec::new(),
            bytes: 0,
            under_way: VecDeque::new(),
            came: 0,
            bodies: Vec::new(),
            single: false,
        })
    }

    /// Has the pool serve this blob before lighter ones.
    #[must_use]
    pub fn weighing(mut self, weight: u64) -> Self {
        self.weight = weight;
        self
    }

    /// Begins the next body, of `size` bytes.
    pub fn begin(&mut self, size: u64) -> BodyId {
        let chunks = size.div_ceil(u64::from(self.shared.recipe.chunk_size)).min(FORESEEN);
        self.bodies.push(Body { chunks: ChunkList::with_capacity(chunks as usize), digest: None });
        self.single = size <= u64::from(self.shared.recipe.chunk_size);
        BodyId(self.bodies.len() - 1)
    }

    /// Appends a chunk to body `body`: exactly the recipe's chunk size, or less at the end of the body.
    ///
    /// # Errors
    ///
    /// If this or an earlier chunk cannot be compressed or written.
    pub fn push(&mut self, body: BodyId, plain: Vec<u8>) -> Result<(), PackError> {
        let batch_size = self.shared.recipe.batch_size.filter(|_| self.single);
        let small = batch_size.is_some_and(|size| plain.len() < size as usize / 2);
        self.bytes += plain.len();
        self.gathered.push(Plain { number: self.came, bytes: plain, small });
        self.owners.push(body);
        self.came += 1;
        if self.bytes >= TOGETHER || self.gathered.len() >= MANY {
            self.hand_out()?;
        }
        Ok(())
    }

    fn hand_out(&mut self) -> Result<(), PackError> {
        if self.gathered.is_empty() {
            return Ok(());
        }
        while self.under_way.len() >= depth(self.pool.threads()) {
            self.take_oldest()?;
        }
        let chunks = std::mem::take(&mut self.gathered);
        self.bytes = 0;
        let shared = Arc::clone(&self.shared);
        let (reply, result) = sync_channel(1);
        let work = move || {
            let done = chunks.into_iter().map(|chunk| process(&shared, chunk)).collect();
            // A packer that failed does not wait for its chunks.
            drop(reply.send(done));
        };
        self.pool.hand_out(Job { weight: self.weight, work: Box::new(work) })?;
        self.under_way.push_back((std::mem::take(&mut self.owners), result));
        Ok(())
    }

    /// Asks that all that was pushed so far be read ahead: version 5 can say so of the first bytes of a blob.
    ///
    /// # Errors
    ///
    /// As [`Self::push`].
    pub fn mark_read_ahead(&mut self) -> Result<(), PackError> {
        self.drain()?;
        self.blob.mark_read_ahead();
        Ok(())
    }

    fn drain(&mut self) -> Result<(), PackError> {
        self.hand_out()?;
        while !self.under_way.is_empty() {
            self.take_oldest()?;
        }
        Ok(())
    }

    /// Writes what is under way and returns the bodies, in the order in which they came, and the blob.
    ///
    /// # Errors
    ///
    /// As [`Self::push`].
    pub fn finish(mut self) -> Result<(Vec<Body>, BlobWriter<W>), PackError> {
        self.drain()?;
        Ok((self.bodies, self.blob))
    }

    fn take_oldest(&mut self) -> Result<(), PackError> {
        let Some((owners, result)) = self.under_way.pop_front() else { return Ok(()) };
        let done = result.recv().map_err(|_| PackError::Stopped)?;
        for (body, done) in owners.into_iter().zip(done) {
            self.take(body, &done)?;
        }
        Ok(())
    }

    /// Gives a body its next chunk.
    fn take(&mut self, body: BodyId, done: &Done) -> Result<(), PackError> {
        let place = match (&done.stored, self.shared.seen.appended(done.digest)) {
            (&Stored::Known(place), _) => place,
            (_, Some(chunk)) => ChunkRef { blob: 0, chunk },
            (_, None) => self.append(done)?,
        };
        let algorithm = self.shared.recipe.algorithm;
        let body = &mut self.bodies[body.0];
        body.chunks.push(place);
        body.digest = Some(fold(algorithm, body.digest, done.digest));
        Ok(())
    }

    fn append(&mut self, done: &Done) -> Result<ChunkRef, PackError> {
        let number = self.blob.chunks().len();
        let crc32 = Some(done.crc32);
        let appended = match &done.stored {
            Stored::Bytes(codec, bytes) => {
                let plain_len = u32::try_from(done.plain_len).expect("at most 16 MiB");
                self.blob.append(StoredChunk { digest: done.digest, crc32, plain_len, codec: *codec, bytes })
            }
            Stored::Small(plain) => self.blob.append_small(done.digest, crc32, plain),
            Stored::Earlier | Stored::Known(_) => {
                unreachable!("a chunk is called a repetition only of one handed out, and so appended, before it")
            }
        };
        let chunk = appended.map_err(|source| PackError::Write { chunk: number, source })?;
        self.shared.seen.append(done.digest, chunk);
        Ok(ChunkRef { blob: 0, chunk })
    }
}

#[cfg(test)]
mod tests;
