//! `nydusify convert`: an image to a RAFS image, each in a registry or in an OCI layout.
//!
//! All layers of a platform are fetched, converted and pushed at the same time, as many as memory allows. Once their
//! trees are known, [`crate::overlay`] makes one of them, which becomes the bootstrap layer. Then everything that was pushed
//! is read back and compared with the source ([`crate::verify`]), and only then the manifest gets its name. Until that
//! moment nobody who asks for the target sees anything of this.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use nydus_backend::registry::Reference;
use nydus_rafs::blob::format::features;
use nydus_rafs::{BlobInfo, Chunk, Digest, codec};
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use tokio::sync::Semaphore;

use super::bundle::{self, Member};
use super::copy;
pub use super::fetch::Wanted;
use super::fetch::{self, Found};
use super::known::Known;
use super::layer::{self, Made, Workshop};
use super::place::Place;
use super::progress::Progress;
use super::push::Destination;
use super::readback::{self, Expected};
use crate::bootstrap::{self, Blob, Style};
use crate::dictionary::Dictionary;
use crate::layer::Rules;
use crate::oci::{Descriptor, Index, Manifest, Platform, names};
use crate::overlay;
use crate::pack::{Pool, Recipe};
use crate::verify::Rigour;

/// Memory that chunks under way may take, in bytes; trees and the program itself come on top.
const CHUNK_MEMORY: u64 = 96 << 20;

/// The most layers worked on at once: more would only make each wait longer.
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
    /// Nanoseconds of the comparison with the source; 0 without one.
    pub verify_elapsed: u64,
}

fn nanos(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)
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
    metrics.source_pull_elapsed = nanos(begun);
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
    metrics.target_push_elapsed += nanos(pushing);
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

/// A blob of the image, whichever layers have it.
struct ImageBlob {
    info: BlobInfo,
    chunks: Vec<Chunk>,
    /// Digest of the object that was made for it, and the object; nothing for a blob of the dictionary.
    made: Option<(Digest, Arc<File>)>,
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
        metrics.source_pull_elapsed += nanos(begun);
        let begun = Instant::now();
        metrics.source_image_size += manifest.layers.iter().map(|layer| layer.size).sum::<u64>();
        let made = self.layers(&manifest.layers, &diff_ids).await?;
        metrics.conversion_elapsed += nanos(begun);

        let begun = Instant::now();
        let mut layers: Vec<Descriptor> = made.iter().map(blob_descriptor).collect();
        let merge = tokio::task::spawn_blocking({
            let recipe = self.workshop.recipe;
            let prefetch = self.request.prefetch.clone();
            let dictionary = Arc::clone(&self.workshop.dictionary);
            move || merge(made, &dictionary, recipe, &prefetch)
        });
        let merged = merge.await.context("merging the layers stopped")??;
        for info in &merged.known {
            let digest = format!("sha256:{}", info.id);
            if let Some(known) = self.request.dictionary.as_ref()
                && layers.iter().all(|layer| layer.digest != digest)
            {
                layers.push(known.bring(info, self.destination, &self.request.work_dir).await?);
            }
        }
        let diff_ids: Vec<String> = layers.iter().map(|layer| layer.digest.clone()).collect();
        let bundle = merged.bundle;
        let bundle_digest = format!("sha256:{}", bundle.digest);
        let bundle_size = bundle.bytes.len() as u64;
        self.destination.push_bytes(&bundle_digest, bundle.bytes.into()).await?;

        let version = self.workshop.recipe.version.number().to_string();
        let docker = !self.request.oci && manifest.media_type == names::DOCKER_MANIFEST;
        extend_config(&mut config, diff_ids, format!("sha256:{}", bundle.diff_id))?;
        let config = Bytes::from(serde_json::to_vec(&config).context("writing the image's configuration")?);
        let config_digest = format!("sha256:{}", hex::encode(Sha256::digest(&config)));
        self.destination.push_bytes(&config_digest, config.clone()).await?;
        let mut bootstrap = Descriptor::new(
            if docker { names::DOCKER_LAYER_GZIP } else { names::OCI_LAYER_GZIP },
            &bundle_digest,
            bundle_size,
        );
        bootstrap.annotations.insert(names::ANNOTATION_BOOTSTRAP.into(), "true".into());
        bootstrap.annotations.insert(names::ANNOTATION_FS_VERSION.into(), version.clone());
        layers.push(bootstrap.clone());
        metrics.target_image_size += layers.iter().map(|layer| layer.size).sum::<u64>();
        metrics.target_push_elapsed += nanos(begun);

        if self.request.verify {
            let begun = Instant::now();
            let place = &self.destination.place;
            let verify = async {
                let image = readback::bootstrap(place, &bootstrap).await?;
                let at_once = self.workshop.pool.threads();
                let algorithm = self.workshop.recipe.algorithm;
                readback::compare(place, image, merged.expected, algorithm, at_once, Rigour::Everything).await
            };
            let entries = verify.await.context("the pushed image is not the source image; nothing was tagged")?;
            metrics.verify_elapsed += nanos(begun);
            tracing::info!(
                entries,
                seconds = begun.elapsed().as_secs_f32(),
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
        annotations.insert(names::ANNOTATION_FS_VERSION.into(), version);
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

    /// Fetches, converts and pushes all layers, several at once.
    async fn layers(&self, layers: &[Descriptor], diff_ids: &[String]) -> anyhow::Result<Vec<Made>> {
        let chunk = u64::from(self.workshop.recipe.chunk_size);
        // Each chunk under way is held plain and, once compressed, stored.
        let per_layer = 2 * chunk * (self.workshop.pool.threads() as u64 + 2);
        let at_once = (CHUNK_MEMORY / per_layer).clamp(1, MAX_LAYERS);
        let turn = Semaphore::new(usize::try_from(at_once).expect("a small number"));
        let work = layers.iter().zip(diff_ids).enumerate().map(|(number, (layer, diff_id))| {
            let turn = &turn;
            async move {
                let name = short(&layer.digest);
                let _turn = turn.acquire().await.context("stopped")?;
                let bar = self.progress.layer(name, layer.size);
                bar.say("converting");
                let rules = if number == 0 { Rules::Lowest } else { Rules::Upper };
                let origin = &self.request.origin;
                let made = layer::make(self.workshop, origin, layer, diff_id, rules, bar.clone()).await?;
                bar.say("pushing");
                let digest = format!("sha256:{}", made.digest);
                let sent = self.destination.push(&digest, made.size, &made.file).await?;
                if made.original.is_some() {
                    bar.say("bringing the original layer");
                    self.destination.bring(origin, layer, &self.workshop.work_dir).await?;
                }
                bar.end(if sent { "pushed" } else { "was there" });
                anyhow::Ok(made)
            }
        });
        let named = work
            .zip(layers)
            .map(|(work, layer)| async { work.await.with_context(|| format!("layer {}", layer.digest)) });
        futures::future::try_join_all(named).await
    }
}

struct Merge {
    bundle: bundle::Bundle,
    /// The blobs of the dictionary that the image uses.
    known: Vec<BlobInfo>,
    expected: Expected,
}

/// Lays the layers on one another and writes the bootstrap layer.
fn merge(made: Vec<Made>, dictionary: &Dictionary, recipe: Recipe, prefetch: &[PathBuf]) -> anyhow::Result<Merge> {
    let mut layers = Vec::new();
    let mut bodies = Vec::new();
    let mut blobs: Vec<Option<ImageBlob>> = Vec::new();
    let mut by_digest: HashMap<Digest, u16> = HashMap::new();
    // Which blob a layer's chunks are in: two layers may have made the same one.
    let mut blob_of = Vec::new();
    for (index, made) in made.into_iter().enumerate() {
        let Made { layer, bodies: layer_bodies, info, chunks, file, digest, .. } = made;
        layers.push(layer);
        bodies.push(layer_bodies);
        let index = u16::try_from(index).context("an image has at most 65,535 layers")?;
        blob_of.push(*by_digest.entry(digest).or_insert(index));
        blobs.push(info.map(|info| ImageBlob { info: named(info, digest), chunks, made: Some((digest, file)) }));
    }
    for known in dictionary.blobs() {
        blob_of.push(u16::try_from(blob_of.len()).context("an image has at most 65,535 blobs")?);
        blobs.push(Some(ImageBlob { info: known.info.clone(), chunks: known.chunks.clone(), made: None }));
    }
    let mut merged = overlay::merge(layers)?;
    let order = bootstrap::number_blobs(&mut merged.tree, &blob_of, &[]);
    let mut used = Vec::new();
    for index in order {
        used.push(blobs[usize::from(index)].take().context("a file refers to a layer without data")?);
    }
    let slots: Vec<Blob<'_>> = used.iter().map(|blob| Blob { info: blob.info.clone(), chunks: &blob.chunks }).collect();
    let boot = bootstrap::write(&merged.tree, &slots, recipe, prefetch, Style { merged: true, ..Style::default() })?;
    let mut members = vec![Member { name: "image/image.boot".into(), bytes: boot }];
    for blob in &used {
        if let (Some(_), Some((digest, file))) = (&blob.info.table, &blob.made) {
            let bytes = cached_table(&blob.info, file).context("reading a chunk table back")?;
            members.push(Member { name: format!("image/{digest}.blob.meta"), bytes });
        }
    }
    let bundle = bundle::pack(&members).context("packing the bootstrap layer")?;
    let contents = merged
        .bodies
        .iter()
        .filter_map(|(&node, &(layer, body))| bodies[layer][body.0].map(|digest| (node, digest)))
        .collect();
    let known = used.into_iter().filter(|blob| blob.made.is_none()).map(|blob| blob.info).collect();
    Ok(Merge { bundle, known, expected: Expected { tree: merged.tree, contents } })
}

/// Gives a blob the name that only its digest tells; one that refers to a layer is named by the layer.
fn named(info: BlobInfo, digest: Digest) -> BlobInfo {
    let info = match info.has(features::SEPARATE) {
        true => BlobInfo { meta_digest: digest, ..info },
        false => BlobInfo { id: digest.into(), ..info },
    };
    let id = info.id.clone();
    bootstrap::named(info, id)
}

/// Returns a blob's chunk table in the form of nydusd's cache: plain, padded to 4,096, and its header.
fn cached_table(info: &BlobInfo, file: &File) -> anyhow::Result<Vec<u8>> {
    let table = info.table.as_ref().context("a blob without a chunk table")?;
    let len = usize::try_from(table.stored.end - table.stored.start)?;
    let mut stored = vec![0; len + 4096];
    file.read_exact_at(&mut stored, table.stored.start)?;
    let plain_size = usize::try_from(table.plain_size)?;
    let mut bytes = codec::decode(table.compressor.codec(), &stored[..len], plain_size)?;
    bytes.resize(bytes.len().next_multiple_of(4096), 0);
    bytes.extend_from_slice(&stored[len..]);
    Ok(bytes)
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
