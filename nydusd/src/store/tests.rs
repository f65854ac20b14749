//! The store against a backend whose faults are known.

mod basics;
mod disks;
pub(super) mod fake;
mod kills;
mod model;
mod prefetching;
mod sharing;

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use nydus_rafs::{Algorithm, BlobId, BlobInfo, Chunk, ChunkIndex, ChunkTable, Compressor, Digest, codec};
use tokio::runtime::{Builder, Handle, Runtime};

use super::source::Source;
use super::{Blob, Options, Store, StoreError, Table};
use fake::Fake;

/// A generator that needs no crate: xorshift.
#[derive(Debug, Clone)]
pub(super) struct Dice(u64);

impl Dice {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % sides
    }
}

/// A blob that was made up, and what it should read as.
#[derive(Debug, Clone)]
pub(super) struct Sample {
    info: BlobInfo,
    chunks: Vec<Chunk>,
    stored: Bytes,
    plain: Vec<u8>,
}

impl Sample {
    /// A blob of `sizes`, each chunk at the next block.
    fn new(seed: u64, sizes: &[usize]) -> Self {
        let mut dice = Dice::new(seed);
        let (mut stored, mut plain, mut chunks) = (Vec::new(), Vec::new(), Vec::new());
        for (at, &size) in sizes.iter().enumerate() {
            let tone = dice.roll(256) as u8;
            let bytes: Vec<u8> = (0..size).map(|_| tone.wrapping_add(dice.roll(4) as u8) | 1).collect();
            let compressor = [Compressor::None, Compressor::Lz4Block, Compressor::Zstd][dice.roll(3) as usize];
            let (codec, packed) = codec::encode(compressor, &bytes);
            let algorithm = Algorithm::Blake3;
            plain.resize(plain.len().next_multiple_of(4096), 0);
            chunks.push(Chunk {
                index: ChunkIndex(at as u32),
                plain: plain.len() as u64..(plain.len() + size) as u64,
                stored: stored.len() as u64..(stored.len() + packed.len()) as u64,
                codec,
                encrypted: false,
                algorithm,
                digest: Some(algorithm.digest(&bytes)),
                container: None,
                crc32: None,
            });
            stored.extend_from_slice(&packed);
            plain.extend_from_slice(&bytes);
        }
        plain.resize(plain.len().next_multiple_of(4096), 0);
        let info = BlobInfo {
            id: BlobId::from(Algorithm::Sha256.digest(&stored)),
            stored_size: stored.len() as u64,
            plain_size: plain.len() as u64,
            chunk_count: chunks.len() as u32,
            compressor: Compressor::Zstd,
            algorithm: Algorithm::Blake3,
            features: 0,
            table: None,
            toc_size: 0,
            toc_digest: Digest([0; 32]),
            meta_digest: Digest([0; 32]),
            meta_size: 0,
            cipher: None,
            prefetch_size: 0,
        };
        Self { info, chunks, stored: stored.into(), plain }
    }

    fn small() -> Self {
        Self::new(7, &[4096, 100, 5000, 1, 70_000, 4096, 12_288, 999])
    }

    fn table(&self) -> ChunkTable {
        ChunkTable::new(self.chunks.clone())
    }

    fn len(&self) -> u64 {
        self.plain.len() as u64
    }

    fn plain(&self, range: Range<u64>) -> &[u8] {
        &self.plain[range.start as usize..range.end as usize]
    }

    /// Reads `range` and compares.
    fn check(&self, blob: &Blob, range: Range<u64>) {
        let mut buf = vec![0xee; (range.end - range.start) as usize];
        blob.read_at(&mut buf, range.start).unwrap();
        assert!(buf == self.plain(range.clone()), "wrong bytes in {range:?}");
    }
}

/// A process of its own, as far as a store can tell.
#[derive(Debug)]
pub(super) struct Lab {
    store: Store,
    fake: Arc<Fake>,
    runtime: Option<Runtime>,
}

pub(super) fn exact() -> Options {
    Options { readahead: 0, amplify: 0, deadline: Duration::from_secs(20) }
}

impl Lab {
    fn new(dir: &Path, options: Options, fake: Fake) -> Self {
        Self::over(Store::open, dir, options, fake)
    }

    fn over<'d>(
        open: impl FnOnce(&'d Path, Handle) -> Result<Store, StoreError>,
        dir: &'d Path,
        options: Options,
        fake: Fake,
    ) -> Self {
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let store = open(dir, runtime.handle().clone()).unwrap().image(options, Arc::default());
        Self { store, fake: Arc::new(fake), runtime: Some(runtime) }
    }

    fn serve(&self, sample: &Sample) {
        self.fake.blobs.lock().unwrap().insert(sample.info.id.clone(), sample.stored.clone());
    }

    fn try_open(&self, sample: &Sample, table: impl Into<Table>) -> Result<Arc<Blob>, StoreError> {
        self.serve(sample);
        self.store.blob_from(&sample.info, table.into(), Source::Fake(self.fake.clone()))
    }

    fn open(&self, sample: &Sample) -> Arc<Blob> {
        self.try_open(sample, sample.table()).unwrap()
    }

    fn runtime(&self) -> &Runtime {
        self.runtime.as_ref().unwrap()
    }

    fn requests(&self) -> usize {
        self.fake.requests.lock().unwrap().len()
    }

    /// Ends the process without a chance to tidy up.
    fn kill(mut self, blobs: Vec<Arc<Blob>>) {
        self.runtime.take().unwrap().shutdown_timeout(Duration::from_secs(10));
        drop(blobs);
    }

    /// Ends the process in good order.
    fn end(mut self, blobs: Vec<Arc<Blob>>) {
        self.store.close();
        self.runtime.take().unwrap().shutdown_timeout(Duration::from_secs(10));
        drop(blobs);
    }
}

/// Waits for something that happens beside the test; fails after a generous while.
fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    for _ in 0..2000 {
        if done() {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("never: {what}");
}
