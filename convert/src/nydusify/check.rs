//! `nydusify check`: whether an image is one that nodes can run, and shows what its original holds.
//!
//! Three rules, in this order: the manifest names what a snapshotter looks for; the bootstrap is sound, and the manifest names
//! all of its blobs; every file is that of the original, read back as a node reads it. The last one needs the original,
//! which is unpacked by the rules of the conversion.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use nydus_backend::registry::Reference;
use nydus_rafs::{Compressor, Version};

use super::convert::diff_ids;
use super::fetch::{self, Found, Wanted};
use super::layer::{self, Workshop};
use super::place::Place;
use super::progress::Progress;
use super::readback::{self, Expected};
use crate::layer::Rules;
use crate::oci::{Descriptor, names};
use crate::overlay;
use crate::pack::{Pool, Recipe};
use crate::verify::Rigour;

/// What to check, and with what.
#[derive(Debug)]
pub struct Request {
    /// Where the image lies.
    pub place: Place,
    /// Its name there.
    pub target: Reference,
    /// The original and where it lies, if it is to be compared with.
    pub source: Option<(Place, Reference)>,
    /// Which image of an index.
    pub wanted: Wanted,
    /// A directory for temporary files.
    pub work_dir: PathBuf,
}

/// What was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// A plain image: there is nothing to check.
    Plain,
    /// Manifest and bootstrap are sound.
    Sound,
    /// So are all files: so many entries were compared.
    Same(u64),
}

/// Checks.
///
/// # Errors
///
/// The first rule that is broken, or what cannot be read.
pub async fn check(request: &Request, progress: &Progress) -> anyhow::Result<Verdict> {
    let place = &request.place;
    let (found, _) = fetch::manifests(place, request.target.target(), &request.wanted, true)
        .await
        .with_context(|| format!("reading {}", request.target))?;
    let Some((image, bootstrap)) = found.iter().find_map(|found| Some((found, nydus(found)?))) else {
        return Ok(Verdict::Plain);
    };
    let source = match &request.source {
        None => None,
        Some((origin, name)) => {
            let (found, _) = fetch::manifests(origin, name.target(), &request.wanted, false)
                .await
                .with_context(|| format!("reading {name}"))?;
            Some((origin, found.into_iter().next().context("the source has no image")?))
        }
    };
    let config = manifest(place, image).await.context("the manifest is not that of a nydus image")?;
    if let Some((origin, source)) = &source {
        let wanted = fetch::config(origin, &source.manifest.config).await?;
        same_run(&config, &wanted).context("the image's configuration is not the source's")?;
    }
    let boot = readback::bootstrap(place, bootstrap).await.context("the bootstrap cannot be read")?;
    let named: Vec<&str> = image.manifest.layers.iter().flat_map(blobs).collect();
    for blob in boot.blobs() {
        let digest = format!("sha256:{}", blob.id);
        if !named.contains(&digest.as_str()) {
            bail!("the bootstrap refers to blob {digest}, and the manifest does not name it");
        }
        place.size(&digest).await.with_context(|| format!("blob {digest} of the bootstrap is not in {place}"))?;
    }
    let Some((origin, source)) = source else { return Ok(Verdict::Sound) };

    let pool = Arc::new(Pool::for_this_machine().context("starting worker threads")?);
    let at_once = pool.threads();
    let recipe = Recipe {
        version: Version::V6,
        // Only digests are wanted.
        compressor: Compressor::None,
        algorithm: boot.flags().algorithm(),
        chunk_size: boot.chunk_size(),
        ..Recipe::default()
    };
    if let Some(other) = boot.blobs().iter().find(|blob| blob.algorithm != recipe.algorithm) {
        bail!("blob {} names its chunks by another digest than the image, which cannot be compared", other.id);
    }
    let workshop =
        Workshop { pool, recipe, refer: false, dictionary: Arc::default(), work_dir: Arc::from(&*request.work_dir) };
    let expected = expected(&workshop, origin, &source, progress).await.context("reading the source")?;
    let how = (recipe.algorithm, Rigour::Established);
    let compared = readback::compare(place, boot, expected, how, at_once, HashMap::new()).await;
    Ok(Verdict::Same(compared.context("the image is not the source")?.0))
}

/// Returns the bootstrap layer of a nydus image.
pub(super) fn nydus(found: &Found) -> Option<&Descriptor> {
    found.manifest.layers.last().filter(|layer| layer.annotations.contains_key(names::ANNOTATION_BOOTSTRAP))
}

/// Returns the blobs that a layer stands for.
fn blobs(layer: &Descriptor) -> impl Iterator<Item = &str> {
    [Some(layer.digest.as_str()), layer.annotations.get(names::ANNOTATION_REF).map(String::as_str)]
        .into_iter()
        .flatten()
}

/// Checks what a snapshotter looks for, and returns the image's configuration.
async fn manifest(place: &Place, found: &Found) -> anyhow::Result<serde_json::Value> {
    let config = fetch::config(place, &found.manifest.config).await?;
    let layers = &found.manifest.layers;
    diff_ids(&config, layers.len())?;
    for layer in &layers[..layers.len().saturating_sub(1)] {
        if layer.media_type != names::NYDUS_BLOB {
            bail!("layer {} has the media type {}, not {}", layer.digest, layer.media_type, names::NYDUS_BLOB);
        }
        if !layer.annotations.contains_key(names::ANNOTATION_BLOB) {
            bail!("layer {} lacks the annotation {}", layer.digest, names::ANNOTATION_BLOB);
        }
    }
    Ok(config)
}

/// Compares what containers are run with.
fn same_run(image: &serde_json::Value, source: &serde_json::Value) -> anyhow::Result<()> {
    let run = |config: &serde_json::Value| {
        let mut run = config.get("config").cloned().unwrap_or_default();
        // A word for Windows that docker writes or not.
        run.as_object_mut().map(|run| run.remove("ArgsEscaped"));
        run
    };
    let (found, wanted) = (run(image), run(source));
    if found != wanted {
        bail!("it is {found}, the source's is {wanted}");
    }
    Ok(())
}

/// Unpacks the source, layer by layer.
async fn expected(
    workshop: &Workshop,
    origin: &Place,
    source: &Found,
    progress: &Progress,
) -> anyhow::Result<Expected> {
    if source.manifest.layers.iter().any(Descriptor::is_nydus) {
        bail!("it is a nydus image itself: name the original");
    }
    fetch::refuse_artifact(&source.manifest)?;
    let config = fetch::config(origin, &source.manifest.config).await?;
    let diff_ids = diff_ids(&config, source.manifest.layers.len())?;
    let (mut layers, mut bodies) = (Vec::new(), Vec::new());
    for (number, (layer, diff_id)) in source.manifest.layers.iter().zip(&diff_ids).enumerate() {
        let rules = if number == 0 { Rules::Lowest } else { Rules::Upper };
        let bar = progress.layer(super::convert::short(&layer.digest), layer.size);
        bar.say("reading");
        let made = layer::make(workshop, origin, layer, diff_id, rules, bar.clone()).await;
        let made = made.with_context(|| format!("layer {}", layer.digest))?;
        bar.end("read");
        layers.push(made.layer);
        bodies.push(made.bodies);
    }
    let merged = overlay::merge(layers)?;
    let digest = |&(layer, body): &(usize, crate::layer::BodyId)| bodies[layer][body.0];
    let contents = merged.bodies.iter().filter_map(|(&node, place)| Some((node, digest(place)?))).collect();
    Ok(Expected { tree: merged.tree, contents })
}
