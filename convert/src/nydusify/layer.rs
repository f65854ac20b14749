//! One layer of the source to one blob of the target, in one streaming pass.
//!
//! registry -> digest -> gunzip -> digest -> tar -> chunks -> blob file. The blob is spooled to a file in the work
//! directory, because its name is its digest and because a push that breaks off must be able to start again
//! without the source. The file has no name, so nothing is left behind whatever happens.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, BufWriter, Read};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::{Buf as _, Bytes};
use nydus_rafs::blob::write::{Finished, Form, Sealed};
use nydus_rafs::{BlobInfo, ChunkTable, Digest, Version};
use sha2::{Digest as _, Sha256};
use tokio::sync::{Semaphore, mpsc};

use super::place::Place;
use super::progress::LayerBar;
use crate::bootstrap::{self, Blob, Style, Written};
use crate::dictionary::Dictionary;
use crate::layer::reference::{self, Referred};
use crate::layer::stream::{self, Hashing, Packing, StreamError};
use crate::layer::{Layer, Rules};
use crate::oci::Descriptor;
use crate::pack::{BodyDigest, Packer, Pool, Recipe};

/// How often a broken transfer is begun again.
pub(super) const TRIES: u32 = 5;

/// Bytes of a download that may wait to be worked on.
const WAITING: u32 = 2 << 20;

/// Returns how long to wait before try number `attempt` (from 1), unless the other side said.
pub(super) fn pause(attempt: u32, asked: Option<Duration>) -> Duration {
    asked.unwrap_or(Duration::from_millis(500 << attempt.min(5))).min(Duration::from_secs(60))
}

/// A converted layer.
#[derive(Debug)]
pub(super) struct Made {
    pub(super) layer: Layer,
    pub(super) bodies: Vec<BodyDigest>,
    /// What a bootstrap says of the blob; `None` if the layer has no data.
    pub(super) info: Option<BlobInfo>,
    pub(super) chunks: Arc<ChunkTable>,
    /// The blob.
    pub(super) file: Arc<File>,
    pub(super) digest: Digest,
    pub(super) size: u64,
    /// The layer that it refers to, if it does not hold the data itself.
    pub(super) original: Option<String>,
}

/// What all layers of a run share.
#[derive(Debug, Clone)]
pub(super) struct Workshop {
    pub(super) pool: Arc<Pool>,
    pub(super) recipe: Recipe,
    /// Whether layers are referred to where they are.
    pub(super) refer: bool,
    /// What need not be stored again.
    pub(super) dictionary: Arc<Dictionary>,
    pub(super) work_dir: Arc<Path>,
}

/// Fetches and converts one layer.
pub(super) async fn make(
    workshop: &Workshop,
    place: &Place,
    source: &Descriptor,
    diff_id: &str,
    rules: Rules,
    bar: LayerBar,
) -> anyhow::Result<Made> {
    let stated = stated(&source.media_type)?;
    if let Some((kind, _)) = source.digest.split_once(':').filter(|(kind, _)| *kind != "sha256") {
        bail!(
            "its digest is of the kind {kind}, and only sha256 is supported: push the source image with sha256 digests"
        );
    }
    let (download, input) = pieces();
    let fetching = tokio::spawn(fetch(place.clone(), source.clone(), download, bar.clone()));
    let workshop = workshop.clone();
    let (original, weight) = (source.digest.clone(), source.size);
    let making = tokio::task::spawn_blocking(move || match workshop.refer {
        true => refer(&workshop, input, rules, original),
        false => convert(&workshop, input, stated, rules, weight),
    });
    let (fetched, made) = tokio::join!(fetching, making);
    // A layer that is not what its digest says explains whatever else went wrong.
    fetched.context("the download stopped")??;
    let (made, plain) = made.context("the conversion stopped")??;
    let plain = format!("sha256:{plain}");
    if plain != diff_id {
        bail!(
            "uncompressed it has the digest {plain}, and the image's configuration says {diff_id}: one of the two is damaged, push the source image again"
        );
    }
    bar.done();
    Ok(made)
}

/// Downloads a blob piece by piece and checks its digest and size; goes on where a broken transfer stopped.
async fn fetch(place: Place, source: Descriptor, download: Download, bar: LayerBar) -> anyhow::Result<()> {
    let mut hash = Sha256::new();
    let mut at = 0;
    let mut attempt = 0;
    let mut wanted = true;
    'again: while at < source.size {
        let failure = match place.blob(&source.digest, (at > 0).then_some(at..source.size)).await {
            Ok(mut stream) => loop {
                match stream.next().await {
                    Ok(Some(piece)) => {
                        attempt = 0;
                        at += piece.len() as u64;
                        if at > source.size {
                            bail!("{place} sends more than the {} bytes that the manifest tells of", source.size);
                        }
                        hash.update(&piece);
                        bar.add(piece.len() as u64);
                        // A decoder that has seen enough hangs up; the digest still wants the rest.
                        wanted = wanted && download.send(piece).await;
                    }
                    Ok(None) if at < source.size => {
                        bail!("{place} has {at} bytes and the manifest tells of {}", source.size);
                    }
                    Ok(None) => break 'again,
                    Err(error) => break error,
                }
            },
            Err(error) => error,
        };
        attempt += 1;
        if attempt >= TRIES || !failure.is_transient() {
            download.fail();
            return Err(failure).context("the download failed");
        }
        tracing::warn!(digest = source.digest, at, error = %failure, "download broke off, going on");
        tokio::time::sleep(pause(attempt, failure.retry_after())).await;
    }
    let found = format!("sha256:{}", hex::encode(hash.finalize()));
    if found != source.digest {
        bail!("its bytes have the digest {found}: the copy in {place} is damaged, push the source image again");
    }
    Ok(())
}

/// Downloads a blob as it is into a file without a name.
pub(super) async fn keep(place: &Place, blob: &Descriptor, work_dir: &Path) -> anyhow::Result<Arc<File>> {
    let trouble = || format!("writing to the work directory {}", work_dir.display());
    let mut file = tempfile::tempfile_in(work_dir).with_context(trouble)?;
    let (download, mut input) = pieces();
    let fetching = tokio::spawn(fetch(place.clone(), blob.clone(), download, LayerBar::hidden()));
    let writing = tokio::task::spawn_blocking(move || io::copy(&mut input, &mut file).map(|_| file));
    let (fetched, written) = tokio::join!(fetching, writing);
    fetched.context("the download stopped")?.with_context(|| format!("reading blob {}", blob.digest))?;
    Ok(Arc::new(written.context("the download stopped")?.with_context(trouble)?))
}

/// Returns how a layer is packed if its media type settles that, as containerd reads media types.
pub(super) fn stated(media_type: &str) -> anyhow::Result<Option<Packing>> {
    let plain = ["application/vnd.oci.image.layer.v1.tar", "application/vnd.oci.image.layer.nondistributable.v1.tar"];
    if plain.contains(&media_type) {
        return Ok(Some(Packing::Plain));
    }
    let docker = media_type.starts_with("application/vnd.docker.image.rootfs.");
    if !docker && !plain.iter().any(|plain| media_type.strip_prefix(plain).is_some_and(|rest| rest.starts_with('+'))) {
        bail!("it has the media type `{media_type}`, which is not that of a layer with files");
    }
    Ok(None)
}

/// Makes a blob of the layer's files.
fn convert(
    workshop: &Workshop,
    input: Pieces,
    stated: Option<Packing>,
    rules: Rules,
    weight: u64,
) -> anyhow::Result<(Made, Digest)> {
    let out = workshop.spool()?;
    let recipe = workshop.recipe;
    let packer = Packer::new(&workshop.pool, recipe, &workshop.dictionary, workshop.form(), out)?.weighing(weight);
    let mut input = BufReader::with_capacity(256 << 10, input);
    let packing = match stated {
        Some(packing) => packing,
        None => Packing::of(input.fill_buf().context("reading the layer")?),
    };
    let mut tar = Hashing::new(packing.open(input).context("opening the layer")?);
    let packed = stream::pack_tar(&mut tar, rules, recipe.chunk_size, packer);
    let (layer, bodies, blob) = packed.map_err(|error| match error {
        StreamError::Pack(error) => anyhow::Error::new(error).context(workshop.trouble()),
        error @ StreamError::Layer(_) => error.into(),
    })?;
    let (_, plain) = tar.finish();
    let sealed = blob.seal().with_context(|| workshop.trouble())?;
    Ok((workshop.finish(layer, bodies, sealed, None)?, plain))
}

/// Makes a chunk table of the layer, whose files stay where they are.
fn refer(workshop: &Workshop, input: Pieces, rules: Rules, original: String) -> anyhow::Result<(Made, Digest)> {
    let out = workshop.spool()?;
    let Referred { layer, bodies, reference, tar } = reference::read(input, rules, workshop.recipe.chunk_size)?;
    let sealed = Sealed::reference(out, workshop.form(), reference).with_context(|| workshop.trouble())?;
    Ok((workshop.finish(layer, bodies, sealed, Some(original))?, tar))
}

type Spool = BufWriter<File>;

impl Workshop {
    /// Opens a file without a name in the work directory.
    fn spool(&self) -> anyhow::Result<Spool> {
        let file = tempfile::tempfile_in(&self.work_dir)
            .with_context(|| format!("making a file in the work directory {}", self.work_dir.display()))?;
        Ok(BufWriter::with_capacity(256 << 10, file))
    }

    fn trouble(&self) -> String {
        format!("writing to the work directory {}; another can be named with --work-dir", self.work_dir.display())
    }

    /// Version 5 knows no tables of contents.
    fn form(&self) -> Form {
        if self.recipe.version == Version::V5 { Form::Inline } else { Form::InlineToc }
    }

    /// Writes the layer's own bootstrap.
    fn bootstrap(&self, layer: &Layer, own: Option<Blob<'_>>) -> anyhow::Result<Written> {
        let write = |tree, blobs: &[Blob<'_>]| {
            bootstrap::write(&self.work_dir, tree, blobs, self.recipe, &[], Style::default())
        };
        let known = self.dictionary.blobs();
        if known.is_empty() {
            let blobs: Vec<_> = own.into_iter().collect();
            return Ok(write(&layer.tree, &blobs)?);
        }
        // The image's bootstrap will number the blobs in another way.
        let mut tree = layer.tree.clone();
        let same: Vec<u16> = (0..=u16::try_from(known.len()).context("too many blobs")?).collect();
        let mut blobs = Vec::new();
        for number in bootstrap::number_blobs(&mut tree, &same, &[]) {
            blobs.push(match usize::from(number).checked_sub(1) {
                None => own.clone().context("a file refers to a blob without data")?,
                Some(index) => Blob { info: known[index].info.clone(), chunks: &known[index].chunks },
            });
        }
        Ok(write(&tree, &blobs)?)
    }

    /// Adds what the layer's own bootstrap says to its blob.
    fn finish(
        &self,
        mut layer: Layer,
        bodies: Vec<BodyDigest>,
        mut sealed: Sealed<Spool>,
        original: Option<String>,
    ) -> anyhow::Result<Made> {
        let (info, chunks) = (sealed.info().cloned(), Arc::new(ChunkTable::new(sealed.take_chunks())));
        layer.mark_implied();
        let own = info.as_ref().map(|info| Blob { info: info.clone(), chunks: chunks.all() });
        let mut boot = self.bootstrap(&layer, own)?;
        layer.unmark_implied();
        let len = boot.len();
        let finished = boot.read().and_then(|boot| sealed.finish_from(boot, len)).with_context(|| self.trouble())?;
        let Finished { out, digest, size, .. } = finished;
        let file = out.into_inner().map_err(io::IntoInnerError::into_error).with_context(|| self.trouble())?;
        Ok(Made { layer, bodies, info, chunks, file: Arc::new(file), digest, size, original })
    }
}

/// Makes the two ends of a download.
pub(super) fn pieces() -> (Download, Pieces) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let room = Arc::new(Semaphore::new(WAITING as usize));
    (Download { sender, room: Arc::clone(&room) }, Pieces { receiver, piece: Bytes::new(), room })
}

/// The end of a download that the network feeds. What one read of a connection gives has anything from a few bytes to some
/// 400 KiB, so what waits is bounded by its bytes.
#[derive(Debug)]
pub(super) struct Download {
    sender: mpsc::UnboundedSender<io::Result<Bytes>>,
    room: Arc<Semaphore>,
}

impl Download {
    /// Waits for room and sends a piece; tells whether anybody still wants it.
    pub(super) async fn send(&self, piece: Bytes) -> bool {
        let len = u32::try_from(piece.len()).unwrap_or(WAITING).min(WAITING);
        tokio::select! {
            // What is taken is given back by whoever reads the piece.
            room = self.room.acquire_many(len) => match room {
                Ok(room) => room.forget(),
                Err(_) => return false,
            },
            () = self.sender.closed() => return false,
        }
        self.sender.send(Ok(piece)).is_ok()
    }

    /// Ends the download before its time.
    fn fail(&self) {
        drop(self.sender.send(Err(io::Error::other("the download failed"))));
    }
}

/// The download, as the thread that converts reads it.
#[derive(Debug)]
pub(super) struct Pieces {
    receiver: mpsc::UnboundedReceiver<io::Result<Bytes>>,
    piece: Bytes,
    room: Arc<Semaphore>,
}

impl Read for Pieces {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.receiver.blocking_recv() {
                Some(piece) => self.piece = piece?,
                None => return Ok(0),
            }
            self.room.add_permits(self.piece.len().min(WAITING as usize));
        }
        let len = self.piece.len().min(into.len());
        self.piece.copy_to_slice(&mut into[..len]);
        Ok(len)
    }
}
