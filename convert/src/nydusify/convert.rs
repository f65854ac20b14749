//! `nydusify convert`: an image to a RAFS image, each in a registry or in an OCI layout.
//!
//! The layers of a platform are fetched and converted at the same time, as many as memory allows, the largest first. Each is
//! pushed, read back and checked while others are still made. Once their
//! trees are known, [`crate::overlay`] makes one of them, which becomes the bootstrap layer. That is read back too and
//! compared with the source ([`crate::verify`]), and only then the manifest gets its name. Until that
//! moment nobody who asks for the target sees anything of this.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use nydus_backend::registry::Reference;
use nydus_rafs::{BlobInfo, ChunkTable, Digest};
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use tokio::sync::{Semaphore, oneshot};

use super::assembly;
use super::copy;
pub use super::fetch::Wanted;
use super::fetch::{self, Found};
use super::known::Known;
use super::layer::{self, Made, Workshop};
use super::place::Place;
use super::progress::{LayerBar, Progress};
use super::push::Destination;
use super::readback::{self, Checked, Expected};
use crate::layer::Rules;
use crate::oci::{Descriptor, Index, Manifest, Platform, names};
use crate::pack::{Pool, Recipe, chunks_in_memory};
use crate::verify::Rigour;

/// Memory that chunks under way may take, in bytes; trees and the program itself come on top.
const CHUNK_MEMORY: u64 = 40 << 20;

/// The most layers worked on at once: more would only make each wait longer. And the most that are pushed at once.
const MAX_LAYERS: u64 = 4;

/// What to convert, and how.
#[derive(Debug, Clone)]
pub struct Request {
    /// The source image.
    pub source: Reference,
    /// Where it lies.
    pub origin: Place,
    /// The target image; a tag.
    pub target: Reference,
    /// Where it goes.
    pub destination: Place,
    /// Which platforms of an index.
    pub wanted: Wanted,
    /// How chunks are made.
    pub recipe: Recipe,
    /// Where spool files go; must exist.
    pub work_dir: PathBuf,
    /// An image whose chunks need not be stored again.
    pub dictionary: Option<Known>,
    /// Whether layers are referred to where they are rather than packed anew.
    pub refer: bool,
    /// Whether docker media types become OCI ones.
    pub oci: bool,
    /// Whether the original images stand in the target's index beside the converted ones.
    pub merge_platform: bool,
    /// Whether manifests refer to the source's as their subject.
    pub referrer: bool,
    /// Paths that a node shall fetch first; none by default.
    pub prefetch: Vec<PathBuf>,
    /// Whether the pushed image is read back and compared.
    pub verify: bool,
}

/// What a conversion cost.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Metrics {
    /// Bytes of the source's layers, as stored.
    pub source_image_size: u64,
    /// Bytes of the target's layers, as stored.
    pub target_image_size: u64,
    /// Nanoseconds until the source's manifests were read; layers are read while they are converted.
    pub source_pull_elapsed: u64,
    /// Nanoseconds from then until all layers were converted and their blobs pushed.
    pub conversion_elapsed: u64,
    /// Nanoseconds for everything that was pushed after that.
    pub target_push_elapsed: u64,
    /// Nanoseconds that nothing but the comparison with the source took, at the end; 0 without one.
    pub verify_elapsed: u64,
    /// Nanoseconds that the processors spent on it, most of them while layers were still made.
    pub verify_cpu: u64,
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Converts an image; returns the digest of what the target's tag names.
///
/// # Errors
///
/// If the source is not a readable image, if anything cannot be pushed, or if what was pushed is not the source.
pub async fn convert(request: &Request, progress: &Progress, metrics: &mut Metrics) -> anyhow::Result<String> {
    let begun = Instant::now();
    if request.target.digest().is_some() {
        bail!("the target {} names a digest; name a tag", request.target);
    }
    let (found, index) = fetch::manifests(&request.origin, request.source.target(), &request.wanted, false)
        .await
        .with_context(|| format!("reading {}", request.source))?;
    metrics.source_pull_elapsed = nanos(begun.elapsed());
    let pool = Pool::for_this_machine().context("starting worker threads")?;
    let workshop = Workshop {
        pool: Arc::new(pool),
        recipe: request.recipe,
        refer: request.refer,
        dictionary: match &request.dictionary {
            Some(known) => Arc::new(known.load(request.recipe).await?),
            None => Arc::default(),
        },
        work_dir: Arc::from(request.work_dir.as_path()),
    };
    let destination = Destination::new(request.destination.clone(), request.target.clone(), &request.origin);
    let mut manifests = Vec::new();
    let mut originals = Vec::new();
    for mut found in found {
        if request.merge_platform {
            copy::image(&request.origin, &destination, &found, &request.work_dir, progress).await?;
            destination.put(&found.descriptor.digest, &found.descriptor.media_type, &found.bytes).await?;
            if found.descriptor.platform.is_none() {
                let config = fetch::config(&request.origin, &found.manifest.config).await?;
                found.descriptor.platform = serde_json::from_value(config).ok();
            }
            originals.push(found.descriptor.clone());
        }
        let platform = found.descriptor.platform.as_ref().map_or_else(String::new, Platform::to_string);
        let image = Image { request, workshop: &workshop, destination: &destination, progress };
        let made = image.convert(found, metrics).await;
        manifests.push(made.with_context(|| {
            if platform.is_empty() { "converting".to_owned() } else { format!("converting {platform}") }
        })?);
    }
    let pushing = Instant::now();
    let (media_type, bytes) = match (manifests.as_slice(), originals.is_empty()) {
        ([one], true) => (one.descriptor.media_type.clone(), one.bytes.clone()),
        (several, _) => {
            for one in several {
                destination.put(&one.descriptor.digest, &one.descriptor.media_type, &one.bytes).await?;
            }
            // The originals come first: who knows no nydus images takes the first of its platform.
            let made = several.iter().map(|one| match request.merge_platform {
                true => Descriptor { artifact_type: Some(names::NYDUS_MANIFEST.to_owned()), ..one.descriptor.clone() },
                false => one.descriptor.clone(),
            });
            let entries = originals.into_iter().chain(made).collect();
            join(entries, index, request.oci || request.merge_platform)?
        }
    };
    destination.tag(&media_type, &bytes).await?;
    if request.referrer {
        for one in manifests {
            destination.refer(one.descriptor, &one.bytes).await?;
        }
    }
    metrics.target_push_elapsed += nanos(pushing.elapsed());
    Ok(format!("sha256:{}", hex::encode(Sha256::digest(&bytes))))
}

/// Makes the index of several manifests, with what the source's index says.
pub(super) fn join(manifests: Vec<Descriptor>, index: Option<Index>, oci: bool) -> anyhow::Result<(String, Bytes)> {
    let docker = index.as_ref().is_some_and(|index| index.media_type == names::DOCKER_INDEX);
    let media_type = if docker && !oci { names::DOCKER_INDEX } else { names::OCI_INDEX };
    let index = Index {
        schema_version: 2,
        media_type: media_type.to_owned(),
        manifests,
        annotations: index.map(|index| index.annotations).unwrap_or_default(),
    };
    Ok((media_type.to_owned(), serde_json::to_vec(&index).context("writing the index")?.into()))
}

/// A manifest of the target, not pushed yet.
struct Converted {
    descriptor: Descriptor,
    bytes: Bytes,
}

/// The conversion of one platform.
struct Image<'r> {
    request: &'r Request,
    workshop: &'r Workshop,
    destination: &'r Destination,
    progress: &'r Progress,
}

impl Image<'_> {
    async fn convert(&self, source: Found, metrics: &mut Metrics) -> anyhow::Result<Converted> {
        if source.manifest.layers.last().is_some_and(Descriptor::is_nydus) {
            tracing::info!(source_image = %self.request.source, "it is a nydus image already, and copied as it is");
            let Request { origin, work_dir, .. } = self.request;
            copy::image(origin, self.destination, &source, work_dir, self.progress).await?;
            return Ok(Converted { descriptor: source.descriptor, bytes: source.bytes });
        }
        let Found { descriptor, manifest, .. } = source;
        if let Some(layer) = manifest.layers.iter().find(|layer| layer.is_nydus()) {
            bail!(
                "layer {} is one of a nydus image, and other layers lie above it: convert the original image with these layers",
                layer.digest
            );
        }
        fetch::refuse_artifact(&manifest)?;
        let begun = Instant::now();
        let mut config = fetch::config(&self.request.origin, &manifest.config).await?;
        let diff_ids = diff_ids(&config, manifest.layers.len())?;
        metrics.source_pull_elapsed += nanos(begun.elapsed());
        let begun = Instant::now();
        metrics.source_image_size += manifest.layers.iter().map(|layer| layer.size).sum::<u64>();
        let docker = !self.request.oci && manifest.media_type == names::DOCKER_MANIFEST;
        let (made, arriving) = manifest.layers.iter().map(|_| oneshot::channel()).unzip();
        let ((checked, pushed), assembled) = tokio::try_join!(
            async { Ok((self.layers(&manifest.layers, &diff_ids, made).await?, begun.elapsed())) },
            self.assemble(arriving, &mut config, docker)
        )?;
        let Assembled { layers, config_digest, config, expected } = assembled;
        metrics.conversion_elapsed += nanos(pushed);
        metrics.target_push_elapsed += nanos(begun.elapsed().saturating_sub(pushed));
        metrics.target_image_size += layers.iter().map(|layer| layer.size).sum::<u64>();

        if self.request.verify {
            let begun = Instant::now();
            let place = &self.destination.place;
            let bootstrap = layers.last().context("an image without a bootstrap layer")?;
            let verify = async {
                let image = readback::bootstrap(place, bootstrap).await?;
                let at_once = self.workshop.pool.threads();
                let how = (self.workshop.recipe.algorithm, Rigour::Everything);
                let checked = checked.into_iter().map(|checked| (checked.id().clone(), checked)).collect();
                readback::compare(place, image, expected, how, at_once, checked).await
            };
            let (entries, cpu) = verify.await.context(NOT_THE_SOURCE)?;
            metrics.verify_elapsed += nanos(begun.elapsed());
            metrics.verify_cpu += nanos(cpu);
            tracing::info!(
                entries,
                seconds = begun.elapsed().as_secs_f32(),
                cpu_seconds = cpu.as_secs_f32(),
                "read the pushed image back: it equals the source"
            );
        } else {
            tracing::warn!("the pushed image was not compared with the source, because --no-verify was given");
        }

        let media_type = if docker { names::DOCKER_MANIFEST } else { names::OCI_MANIFEST };
        let config_type = match (self.request.merge_platform, docker) {
            (true, _) => names::NYDUS_CONFIG,
            (false, true) => names::DOCKER_CONFIG,
            (false, false) => names::OCI_CONFIG,
        };
        let subject = Descriptor { platform: None, ..descriptor.clone() };
        let mut annotations = manifest.annotations;
        annotations.insert(names::ANNOTATION_SOURCE_DIGEST.into(), descriptor.digest.clone());
        annotations.insert(names::ANNOTATION_SOURCE_REFERENCE.into(), self.request.source.to_string());
        annotations.insert(names::ANNOTATION_FS_VERSION.into(), self.workshop.recipe.version.number().to_string());
        annotations.insert(names::ANNOTATION_BUILDER.into(), format!("v{}", env!("CARGO_PKG_VERSION")));
        let manifest = Manifest {
            schema_version: 2,
            media_type: media_type.to_owned(),
            config: Descriptor::new(config_type, &config_digest, config.len() as u64),
            layers,
            subject: self.request.referrer.then_some(subject),
            annotations,
        };
        let bytes = Bytes::from(serde_json::to_vec(&manifest).context("writing the manifest")?);
        let digest = format!("sha256:{}", hex::encode(Sha256::digest(&bytes)));
        let mut out = Descriptor::new(media_type, &digest, bytes.len() as u64);
        out.platform = descriptor.platform;
        Ok(Converted { descriptor: out, bytes })
    }

    /// Fetches, converts, pushes and checks all layers, several at once and the largest first. Each is handed to whoever
    /// assembles the image as soon as it is made.
    async fn layers(
        &self,
        layers: &[Descriptor],
        diff_ids: &[String],
        made: Vec<oneshot::Sender<Made>>,
    ) -> anyhow::Result<Vec<Checked>> {
        let per_layer = chunks_in_memory(self.workshop.pool.threads(), self.workshop.recipe.chunk_size);
        let at_once = (CHUNK_MEMORY / per_layer).clamp(1, MAX_LAYERS);
        let turns = |count: u64| Semaphore::new(usize::try_from(count).expect("a small number"));
        let (making, pushing) = (turns(at_once), turns(MAX_LAYERS));
        let mut work: Vec<_> = layers.iter().zip(diff_ids).zip(made).enumerate().collect();
        work.sort_by_key(|(_, ((layer, _), _))| std::cmp::Reverse(layer.size));
        let work = work.into_iter().map(|(number, ((layer, diff_id), arrived))| {
            let (making, pushing) = (&making, &pushing);
            let work = async move {
                let turn = making.acquire().await.context("stopped")?;
                let bar = self.progress.layer(short(&layer.digest), layer.size);
                bar.say("converting");
                let rules = if number == 0 { Rules::Lowest } else { Rules::Upper };
                let made = layer::make(self.workshop, &self.request.origin, layer, diff_id, rules, bar.clone()).await?;
                drop(turn);
                let blob = Pushed::of(&made);
                // If nobody waits for it any more, that has failed for a reason of its own.
                drop(arrived.send(made));
                let _turn = pushing.acquire().await.context("stopped")?;
                self.push(layer, blob, &bar).await
            };
            async { work.await.with_context(|| format!("layer {}", layer.digest)) }
        });
        let checked = futures::future::try_join_all(work).await?;
        Ok(checked.into_iter().flatten().collect())
    }

    /// Brings a layer's blob to the target, and checks what is there then.
    async fn push(&self, layer: &Descriptor, blob: Pushed, bar: &LayerBar) -> anyhow::Result<Option<Checked>> {
        bar.say("pushing");
        let place = &self.destination.place;
        let sent = self.destination.push(&format!("sha256:{}", blob.digest), blob.size, &blob.file).await?;
        if blob.refers {
            bar.say("bringing the original layer");
            self.destination.bring(&self.request.origin, layer, &self.workshop.work_dir).await?;
        }
        let mut checked = None;
        if let (Some(info), true) = (blob.info, self.request.verify) {
            bar.say("reading back");
            checked = Some(readback::blob(place, &info, blob.chunks).await.context(NOT_THE_SOURCE)?);
        }
        bar.end(if sent { "pushed" } else { "was there" });
        Ok(checked)
    }

    /// Waits for all layers, makes and pushes the bootstrap layer, and the image's configuration.
    async fn assemble(
        &self,
        arriving: Vec<oneshot::Receiver<Made>>,
        config: &mut serde_json::Value,
        docker: bool,
    ) -> anyhow::Result<Assembled> {
        let mut made = Vec::new();
        for layer in arriving {
            made.push(layer.await.context("a layer was not made")?);
        }
        let mut layers: Vec<Descriptor> = made.iter().map(blob_descriptor).collect();
        let merge = tokio::task::spawn_blocking({
            let recipe = self.workshop.recipe;
            let prefetch = self.request.prefetch.clone();
            let dictionary = Arc::clone(&self.workshop.dictionary);
            let work_dir = Arc::clone(&self.workshop.work_dir);
            move || assembly::merge(made, &dictionary, recipe, &prefetch, &work_dir)
        });
        let assembly::Merge { bundle, known, expected } = merge.await.context("merging the layers stopped")??;
        for info in &known {
            let digest = format!("sha256:{}", info.id);
            if let Some(known) = self.request.dictionary.as_ref()
                && layers.iter().all(|layer| layer.digest != digest)
            {
                layers.push(known.bring(info, self.destination, &self.request.work_dir).await?);
            }
        }
        let diff_ids: Vec<String> = layers.iter().map(|layer| layer.digest.clone()).collect();
        let media_type = if docker { names::DOCKER_LAYER_GZIP } else { names::OCI_LAYER_GZIP };
        let size = bundle.out.metadata().context("measuring the bootstrap layer")?.len();
        let mut bootstrap = Descriptor::new(media_type, &format!("sha256:{}", bundle.digest), size);
        self.destination.push(&bootstrap.digest, size, &bundle.out).await?;
        bootstrap.annotations.insert(names::ANNOTATION_BOOTSTRAP.into(), "true".into());
        let version = self.workshop.recipe.version.number().to_string();
        bootstrap.annotations.insert(names::ANNOTATION_FS_VERSION.into(), version);
        layers.push(bootstrap);

        extend_config(config, diff_ids, format!("sha256:{}", bundle.diff_id))?;
        let config = Bytes::from(serde_json::to_vec(config).context("writing the image's configuration")?);
        let config_digest = format!("sha256:{}", hex::encode(Sha256::digest(&config)));
        self.destination.push_bytes(&config_digest, config.clone()).await?;
        Ok(Assembled { layers, config_digest, config, expected })
    }
}

/// What is said when the target holds something else than was meant.
const NOT_THE_SOURCE: &str = "the pushed image is not the source image; nothing was tagged";

/// The blob of a layer on its way.
struct Pushed {
    digest: Digest,
    size: u64,
    file: Arc<File>,
    /// What the image's bootstrap will say of it, if it has data.
    info: Option<BlobInfo>,
    chunks: Arc<ChunkTable>,
    /// Whether it is nothing without the original layer.
    refers: bool,
}

impl Pushed {
    fn of(made: &Made) -> Self {
        Self {
            digest: made.digest,
            size: made.size,
            file: Arc::clone(&made.file),
            info: made.info.clone().map(|info| assembly::named(info, made.digest)),
            chunks: Arc::clone(&made.chunks),
            refers: made.original.is_some(),
        }
    }
}

/// An image that is in the target, and whose manifest is missing.
struct Assembled {
    /// All layers, the bootstrap's the last.
    layers: Vec<Descriptor>,
    config_digest: String,
    config: Bytes,
    expected: Expected,
}

fn blob_descriptor(made: &Made) -> Descriptor {
    let mut descriptor = Descriptor::new(names::NYDUS_BLOB, &format!("sha256:{}", made.digest), made.size);
    descriptor.annotations.insert(names::ANNOTATION_BLOB.into(), "true".into());
    if let Some(original) = &made.original {
        descriptor.annotations.insert(names::ANNOTATION_REF.into(), original.clone());
    }
    descriptor
}

/// Returns the digests of the uncompressed layers, which must be as many as the layers.
pub(super) fn diff_ids(config: &serde_json::Value, layers: usize) -> anyhow::Result<Vec<String>> {
    let listed = config.pointer("/rootfs/diff_ids").and_then(serde_json::Value::as_array);
    // An image without layers needs no list of them.
    let listed = listed.map_or(&[][..], Vec::as_slice);
    let ids: Option<Vec<String>> = listed.iter().map(|id| id.as_str().map(str::to_owned)).collect();
    let ids = ids.context("rootfs.diff_ids of the image's configuration holds something other than text")?;
    if ids.len() != layers {
        bail!(
            "the manifest has {layers} layers and rootfs.diff_ids of the image's configuration has {}: one of the two is damaged",
            ids.len()
        );
    }
    Ok(ids)
}

fn extend_config(config: &mut serde_json::Value, mut diff_ids: Vec<String>, bootstrap: String) -> anyhow::Result<()> {
    diff_ids.push(bootstrap);
    let object = config.as_object_mut().context("the image's configuration is not an object")?;
    let mut entry = serde_json::json!({ "created_by": "Nydus Converter", "comment": "Nydus Bootstrap Layer" });
    // nerdctl takes the last entry's time without looking whether there is one. The source's, so that the same source
    // always makes the same image.
    let created = object.get("created").filter(|created| created.is_string()).cloned();
    entry["created"] = created.unwrap_or_else(|| "1970-01-01T00:00:00Z".into());
    match object.entry("history").or_insert_with(|| serde_json::json!([])) {
        serde_json::Value::Array(history) => history.push(entry),
        other => *other = serde_json::json!([entry]),
    }
    let rootfs = object.entry("rootfs").or_insert_with(|| serde_json::json!({ "type": "layers" }));
    let rootfs = rootfs.as_object_mut().context("rootfs of the image's configuration is not an object")?;
    rootfs.insert("diff_ids".into(), diff_ids.into());
    Ok(())
}

pub(super) fn short(digest: &str) -> &str {
    let hex = digest.split_once(':').map_or(digest, |(_, hex)| hex);
    hex.get(..12).unwrap_or(hex)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::extend_config;

    #[test]
    fn every_entry_of_the_history_that_is_added_has_a_time() -> anyhow::Result<()> {
        for (source, time) in [
            (
                json!({ "created": "2025-01-01T00:00:00Z", "history": [{ "created": "2024-01-01T00:00:00Z" }] }),
                "2025-01-01T00:00:00Z",
            ),
            (json!({ "created": null, "history": null }), "1970-01-01T00:00:00Z"),
            (json!({}), "1970-01-01T00:00:00Z"),
        ] {
            let mut config = source.clone();
            extend_config(&mut config, Vec::new(), "sha256:0".into())?;
            let last = config["history"].as_array().and_then(|history| history.last()).map(|entry| &entry["created"]);
            assert_eq!(last, Some(&json!(time)), "from {source}");
        }
        Ok(())
    }
}
