//! The image read back from where it was brought, and compared with its source.
//!
//! A blob can be checked as soon as it has been pushed, while others are still made: [`blob`] reads it whole and checks every chunk
//! by the digest that it was made with. [`compare`] then takes the bootstrap as it was pushed, finds that it names these chunks
//! at these places by these digests, and compares its files with the source. Blobs that nobody has checked are read then.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use nix::time::{ClockId, clock_gettime};
use nydus_rafs::{Algorithm, BlobId, BlobInfo, Bootstrap, ChunkTable, Tree};
use tokio::sync::Semaphore;

use super::bundle;
use super::fetch::{self, persist};
use super::layer::{self, TRIES, pause};
use super::place::{Place, PlaceError};
use crate::oci::Descriptor;
use crate::verify::{self, Contents, Rigour, Sound, VerifyError};

/// The largest bootstrap that is read back.
const MAX_BOOTSTRAP: u64 = 2 << 30;

/// What the source holds, to compare with.
#[derive(Debug)]
pub(super) struct Expected {
    pub(super) tree: Tree,
    pub(super) contents: Contents,
}

type Image = Bootstrap<Vec<u8>>;

/// Reads the bootstrap of an image.
pub(super) async fn bootstrap(place: &Place, layer: &Descriptor) -> anyhow::Result<Image> {
    let bytes = bootstrap_bytes(place, layer).await?;
    Ok(tokio::task::spawn_blocking(move || Bootstrap::open(bytes)).await.context("reading the bootstrap stopped")??)
}

/// Reads the bootstrap of an image as it is.
pub(super) async fn bootstrap_bytes(place: &Place, layer: &Descriptor) -> anyhow::Result<Vec<u8>> {
    let gzip = fetch::blob(place, layer, layer.size).await?;
    let bytes = tokio::task::spawn_blocking(move || bundle::bootstrap(&gzip, MAX_BOOTSTRAP));
    bytes.await.context("reading the bootstrap stopped")?
}

/// A blob that was read back and whose chunks are sound.
#[derive(Debug)]
pub(super) struct Checked {
    info: BlobInfo,
    /// As they were made, or as its own table has them.
    chunks: Arc<ChunkTable>,
    sound: Sound,
    /// What decoding and comparing took of the processors, without what reading did.
    pub(super) cpu: Duration,
}

impl Checked {
    /// Returns the blob's name.
    pub(super) fn id(&self) -> &BlobId {
        &self.info.id
    }

    /// Tells whether a bootstrap that describes the blob so leads to what was checked.
    fn is(&self, info: &BlobInfo) -> bool {
        let of = |info: &BlobInfo| (info.table.clone(), info.compressor, info.algorithm, info.cipher.clone());
        of(&self.info) == of(info)
    }
}

/// Reads everything back that is not among `checked`, `at_once` blobs at a time, and compares the image with the source.
/// Returns how many entries there are, and what that took of the processors, the checks before included.
pub(super) async fn compare(
    place: &Place,
    image: Image,
    expected: Expected,
    (algorithm, rigour): (Algorithm, Rigour),
    at_once: usize,
    checked: HashMap<BlobId, Checked>,
) -> anyhow::Result<(u64, Duration)> {
    let image = Arc::new(image);
    let turn = Semaphore::new(at_once);
    let mut checked = checked;
    let before: Duration = checked.values().map(|checked| checked.cpu).sum();
    let blobs = image.blobs().iter().enumerate().map(|(number, info)| {
        let known = checked.remove(&info.id).filter(|known| known.is(info));
        let (image, turn) = (Arc::clone(&image), &turn);
        async move {
            let _turn = turn.acquire().await.context("stopped")?;
            let named = named(Arc::clone(&image), number).await?;
            match known {
                None => Ok((blob(place, info, Arc::new(named)).await?.sound, Duration::ZERO)),
                Some(Checked { info, chunks, sound, .. }) => {
                    let agreeing = timed(move || verify::agree(&info, &named, &chunks)).await?;
                    agreeing.0?;
                    anyhow::Ok((sound, agreeing.1))
                }
            }
        }
    });
    let (sound, cpu): (Vec<_>, Vec<_>) =
        futures::future::try_join_all(blobs.collect::<Vec<_>>()).await?.into_iter().unzip();
    let shared = Arc::clone(&image);
    let (entries, comparing) =
        timed(move || verify::compare(&shared, &sound, &expected.tree, &expected.contents, algorithm, rigour)).await?;
    Ok((entries?, before + cpu.into_iter().sum::<Duration>() + comparing))
}

/// Does what computes where that is allowed, and tells how long the processor was at it.
async fn timed<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> anyhow::Result<(T, Duration)> {
    let spent = || clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from);
    let work = move || {
        let before = spent();
        let done = work();
        (done, spent().saturating_sub(before))
    };
    tokio::task::spawn_blocking(work).await.context("the comparison stopped")
}

/// Returns the chunks of a blob as the bootstrap has them.
async fn named(image: Arc<Image>, blob: usize) -> anyhow::Result<ChunkTable> {
    let named = move || image.chunks(u16::try_from(blob).unwrap_or(u16::MAX));
    Ok(timed(named).await?.0.map_err(VerifyError::Tables)?)
}

/// Reads a blob's own table, from the object that holds it, and joins it with what is known of the chunks.
async fn own_table(place: &Place, info: &BlobInfo, named: Arc<ChunkTable>) -> anyhow::Result<Arc<ChunkTable>> {
    let Some(table) = &info.table else { return Ok(named) };
    let object = format!("sha256:{}", info.table_object());
    let range = table.with_header();
    let len = range.end - range.start;
    let bytes =
        persist("reading a chunk table back", async || place.blob(&object, Some(range.clone())).await?.read(len).await)
            .await?;
    let info = info.clone();
    Ok(Arc::new(timed(move || verify::chunks(&info, &named, &bytes)).await?.0?))
}

/// Reads a blob back and checks every chunk that is named.
pub(super) async fn blob(place: &Place, info: &BlobInfo, named: Arc<ChunkTable>) -> anyhow::Result<Checked> {
    let digest = format!("sha256:{}", info.id);
    let table = own_table(place, info, Arc::clone(&named)).await?;
    let mut attempt = 0;
    loop {
        let (download, input) = layer::pieces();
        let (of, read) = (info.clone(), Arc::clone(&table));
        let checking = tokio::spawn(timed(move || verify::check_blob(&of, &read, input)));
        let sending = async {
            let mut stream = place.blob(&digest, None).await?;
            while let Some(piece) = stream.next().await? {
                // The checker stops after the last chunk.
                if !download.send(piece).await {
                    break;
                }
            }
            Ok::<_, PlaceError>(())
        };
        let sent = sending.await;
        drop(download);
        let (checked, cpu) = checking.await.context("the check stopped")??;
        match sent {
            Ok(()) => {
                // Of parts of something larger only the blob's own table tells where they are.
                let parts = table.all().iter().any(|chunk| chunk.container.is_some());
                let chunks = if parts { table } else { named };
                return Ok(Checked { info: info.clone(), chunks, sound: checked?, cpu });
            }
            Err(error) => {
                attempt += 1;
                if attempt >= TRIES || !error.is_transient() {
                    return Err(error).with_context(|| format!("reading blob {digest} back"));
                }
                tokio::time::sleep(pause(attempt, error.retry_after())).await;
            }
        }
    }
}
