//! The image read back from where it was brought, and compared with its source.

use std::sync::Arc;

use anyhow::Context as _;
use bytes::Bytes;
use nydus_rafs::{Algorithm, Bootstrap, ChunkTable, Tree};
use tokio::sync::{Semaphore, mpsc};

use super::bundle;
use super::fetch::{self, persist};
use super::layer::{Pieces, TRIES, pause};
use super::place::{Place, PlaceError};
use crate::oci::Descriptor;
use crate::verify::{self, Contents, Rigour, Sound};

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

/// Reads everything back, `at_once` blobs at a time, and compares it with the source; returns how many entries there are.
pub(super) async fn compare(
    place: &Place,
    image: Image,
    expected: Expected,
    algorithm: Algorithm,
    at_once: usize,
    rigour: Rigour,
) -> anyhow::Result<u64> {
    let image = Arc::new(image);
    let turn = Semaphore::new(at_once);
    let checks = (0..image.blobs().len()).map(|blob| {
        let (image, turn) = (Arc::clone(&image), &turn);
        async move {
            let _turn = turn.acquire().await.context("stopped")?;
            check_blob(place, image, blob).await
        }
    });
    let sound = futures::future::try_join_all(checks).await?;
    let compare = tokio::task::spawn_blocking(move || {
        verify::compare(&image, &sound, &expected.tree, &expected.contents, algorithm, rigour)
    });
    Ok(compare.await.context("the comparison stopped")??)
}

/// Reads a blob's own table, from the object that holds it.
async fn chunks(place: &Place, image: Arc<Image>, blob: usize) -> anyhow::Result<ChunkTable> {
    let info = &image.blobs()[blob];
    let table = match &info.table {
        None => None,
        Some(table) => {
            let object = format!("sha256:{}", info.table_object());
            let range = table.with_header();
            let len = range.end - range.start;
            Some(
                persist("reading a chunk table back", async || {
                    place.blob(&object, Some(range.clone())).await?.read(len).await
                })
                .await?,
            )
        }
    };
    Ok(tokio::task::spawn_blocking(move || verify::chunks(&image, blob, table.as_deref())).await??)
}

async fn check_blob(place: &Place, image: Arc<Image>, blob: usize) -> anyhow::Result<Sound> {
    let digest = format!("sha256:{}", image.blobs()[blob].id);
    let chunks = Arc::new(chunks(place, Arc::clone(&image), blob).await?);
    let mut attempt = 0;
    loop {
        let (sender, receiver) = mpsc::channel(16);
        let (image, chunks) = (Arc::clone(&image), Arc::clone(&chunks));
        let checking = tokio::task::spawn_blocking(move || {
            verify::check_blob(&image.blobs()[blob], &chunks, Pieces { receiver, piece: Bytes::new() })
        });
        let sending = async {
            let mut stream = place.blob(&digest, None).await?;
            while let Some(piece) = stream.next().await? {
                // The checker stops after the last chunk.
                if sender.send(Ok(piece)).await.is_err() {
                    break;
                }
            }
            Ok::<_, PlaceError>(())
        };
        let sent = sending.await;
        drop(sender);
        let checked = checking.await.context("the check stopped")?;
        match sent {
            Ok(()) => return checked.map_err(Into::into),
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
