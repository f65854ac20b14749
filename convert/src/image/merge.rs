//! `nydus-image merge`: the bootstraps of layers, lowest first, to the bootstrap of an image.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, bail};
use nydus_rafs::blob::format::features;
use nydus_rafs::{BlobId, BlobInfo, Bootstrap, Digest, Flags, NodeKind, Version};

use super::output::{beside, write_whole};
use super::report::{Report, Trace};
use super::{open, stem};
use crate::bootstrap::{self, Blob, Style};
use crate::dictionary::{Dictionary, KnownBlob};
use crate::layer::Layer;
use crate::overlay;
use crate::pack::Recipe;

/// Layers that cannot be in one image.
#[derive(Debug, thiserror::Error)]
#[error("Inconsistent RAFS Filesystem: Inconsistent configuration of {what}: {one} vs {other}")]
pub struct Incompatible {
    what: &'static str,
    one: String,
    other: String,
}

/// What to merge, and how. Lists are empty or have one value for each source.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// The bootstraps, lowest first.
    pub sources: Vec<PathBuf>,
    /// Where the result goes; named by its digest in `blob_dir` otherwise.
    pub bootstrap: Option<PathBuf>,
    /// A directory for the result.
    pub blob_dir: Option<PathBuf>,
    /// What is fetched first.
    pub prefetch: Vec<PathBuf>,
    /// Names of the blobs; of the objects with the chunk tables where these are separate.
    pub blob_digests: Vec<String>,
    /// Names of the blobs.
    pub original_blob_ids: Vec<String>,
    /// Sizes of the blobs, or of the objects with the chunk tables.
    pub blob_sizes: Vec<u64>,
    /// Digests of the tables of contents.
    pub toc_digests: Vec<String>,
    /// Sizes of the tables of contents.
    pub toc_sizes: Vec<u32>,
    /// The bootstrap of the image on which the layers are laid.
    pub parent: Option<PathBuf>,
    /// The bootstrap of an image whose blobs layers may refer to besides their own.
    pub dictionary: Option<PathBuf>,
}

/// A layer and its own blob.
struct Part {
    layer: Layer,
    blob: Option<KnownBlob>,
}

/// What all layers have in common.
fn common(image: &Bootstrap<Vec<u8>>) -> (Recipe, Flags) {
    let flags = image.flags();
    let recipe = Recipe {
        version: Version::from_number(image.version()).unwrap_or_default(),
        compressor: flags.compressor(),
        algorithm: flags.algorithm(),
        chunk_size: image.chunk_size(),
        ..Recipe::default()
    };
    (recipe, flags)
}

/// Merges.
///
/// # Errors
///
/// [`Incompatible`] if the layers cannot be in one image, and whatever reading and writing brings.
pub fn merge(request: &Request) -> anyhow::Result<Report> {
    let begun = Instant::now();
    let mut trace = Trace::default();
    request.check_lists()?;
    let mut images = Vec::new();
    for path in &request.sources {
        images.push(open(path)?);
    }
    let parent = request.parent.as_deref().map(open).transpose()?;
    let (recipe, flags) = parent.iter().chain(&images).next().map(common).context("nothing to merge")?;
    for image in &images {
        let (own, own_flags) = common(image);
        compatible(recipe, flags, own, own_flags)?;
    }
    let mut dictionary = Dictionary::default();
    if let (Some(path), Some(image)) = (&request.parent, &parent) {
        dictionary.add(image, recipe).with_context(|| format!("using {} as parent", path.display()))?;
    }
    if let Some(path) = &request.dictionary {
        let context = || format!("using {} as a chunk dictionary", path.display());
        dictionary.add(&open(path)?, recipe).with_context(context)?;
    }
    let mut parts = Vec::new();
    if let Some(image) = &parent {
        parts.push(part(image, image.blobs(), &dictionary)?);
    }
    for (index, (path, image)) in request.sources.iter().zip(&images).enumerate() {
        let context = || format!("reading {}", path.display());
        let infos = request.names(index, image.blobs(), &dictionary).with_context(context)?;
        parts.push(part(image, &infos, &dictionary).with_context(context)?);
    }
    trace.took("load_tree_from_bootstrap", begun.elapsed());

    let writing = Instant::now();
    let mut layers = Vec::new();
    let mut blobs = Vec::new();
    let mut same = Vec::new();
    let mut by_id: HashMap<BlobId, u16> = HashMap::new();
    let known = dictionary.blobs().iter().map(|blob| (None, Some(blob.clone())));
    let parts = parts.into_iter().map(|part| (Some(part.layer), part.blob));
    for (index, (layer, blob)) in parts.chain(known).enumerate() {
        let index = u16::try_from(index).context("at most 65,535 layers can be merged")?;
        same.push(blob.as_ref().map_or(index, |blob| *by_id.entry(blob.info.id.clone()).or_insert(index)));
        layers.extend(layer);
        blobs.push(blob);
    }
    let mut merged = overlay::merge(layers)?;
    let mut used = Vec::new();
    for index in bootstrap::number_blobs(&mut merged.tree, &same, &[]) {
        used.push(blobs[usize::from(index)].take().context("a file refers to a layer without data")?);
    }
    let slots: Vec<Blob<'_>> = used.iter().map(|blob| Blob { info: blob.info.clone(), chunks: &blob.chunks }).collect();
    let style = Style { repeatable: !flags.has(Flags::EXPLICIT_IDS), tarfs: flags.has(Flags::TARFS), merged: true };
    let dir = match (&request.bootstrap, &request.blob_dir) {
        (Some(path), _) => beside(path),
        (None, Some(dir)) => dir.clone(),
        (None, None) => std::env::temp_dir(),
    };
    let mut boot = bootstrap::write(&dir, &merged.tree, &slots, recipe, &request.prefetch, style)?;
    let path = match (&request.bootstrap, &request.blob_dir) {
        (Some(path), _) => path.clone(),
        (None, Some(dir)) => dir.join(boot.digest().context("reading the bootstrap back")?.to_string()),
        (None, None) => bail!("--bootstrap or --blob-dir is needed"),
    };
    write_whole(&path, boot.read().context("reading the bootstrap back")?)?;
    trace.took("dump_bootstrap", writing.elapsed());
    let ids: Vec<BlobId> = used.into_iter().map(|blob| blob.info.id).collect();
    Ok(Report::new(Some(&path), &ids, recipe.version, recipe.compressor, trace))
}

/// Takes a layer out of its bootstrap; its files refer to blobs as [`Dictionary`] numbers them.
fn part(image: &Bootstrap<Vec<u8>>, infos: &[BlobInfo], dictionary: &Dictionary) -> anyhow::Result<Part> {
    let mut layer = Layer::of_image(image)?;
    let mut blob = None;
    let mut numbers = Vec::new();
    for (index, info) in (0..).zip(infos) {
        let known = dictionary.find(info);
        numbers.push(known.unwrap_or(0));
        if known.is_none() {
            if blob.is_some() {
                bail!(
                    "it refers to {} blobs, and more than one of them is in no chunk dictionary: give --chunk-dict the bootstrap that it was built with",
                    infos.len()
                );
            }
            blob = Some(KnownBlob { info: info.clone(), chunks: image.chunks(index)?.all().to_vec() });
        }
    }
    for id in bootstrap::nodes(&layer.tree) {
        if let NodeKind::Regular { chunks, .. } = &mut layer.tree.node_mut(id).kind {
            for chunk in chunks {
                chunk.blob = numbers[usize::from(chunk.blob)];
            }
        }
    }
    Ok(Part { layer, blob })
}

fn compatible(one: Recipe, one_flags: Flags, other: Recipe, other_flags: Flags) -> Result<(), Incompatible> {
    let ids = |flags: Flags| flags.has(Flags::EXPLICIT_IDS).to_string();
    let tarfs = |flags: Flags| flags.has(Flags::TARFS).to_string();
    let pairs = [
        ("chunk_size", other.chunk_size.to_string(), one.chunk_size.to_string()),
        ("explicit_uidgid", ids(other_flags), ids(one_flags)),
        ("tarfs_mode", tarfs(other_flags), tarfs(one_flags)),
        ("version", other.version.number().to_string(), one.version.number().to_string()),
    ];
    // The older form names one digest and one compressor for all blobs.
    let of_v5 = [
        ("digester", format!("{:?}", other.algorithm), format!("{:?}", one.algorithm)),
        ("compressor", format!("{:?}", other.compressor), format!("{:?}", one.compressor)),
    ];
    let of_v5 = of_v5.into_iter().filter(|_| one.version == Version::V5);
    match pairs.into_iter().chain(of_v5).find(|(_, one, other)| one != other) {
        Some((what, one, other)) => Err(Incompatible { what, one, other }),
        None => Ok(()),
    }
}

impl Request {
    fn check_lists(&self) -> anyhow::Result<()> {
        let sources = self.sources.len();
        let lists = [
            ("blob digest", self.blob_digests.len()),
            ("original blob id", self.original_blob_ids.len()),
            ("blob size", self.blob_sizes.len()),
            ("blob toc digest", self.toc_digests.len()),
            ("blob toc size", self.toc_sizes.len()),
        ];
        for (what, len) in lists {
            if len != 0 && len != sources {
                bail!("number of {what} entries {len} doesn't match number of sources {sources}");
            }
        }
        Ok(())
    }

    /// Names the blobs of a source, all but those of the dictionary.
    fn names(&self, index: usize, infos: &[BlobInfo], dictionary: &Dictionary) -> anyhow::Result<Vec<BlobInfo>> {
        let name = |info: &BlobInfo| match dictionary.find(info) {
            Some(_) => Ok(info.clone()),
            None => self.name(index, info.clone()),
        };
        infos.iter().map(name).collect()
    }

    /// Gives a blob what only the caller knows: its name, size and table of contents.
    fn name(&self, index: usize, info: BlobInfo) -> anyhow::Result<BlobInfo> {
        let separate = info.has(features::SEPARATE);
        let mut info = info.clone();
        let id = match self.original_blob_ids.get(index) {
            Some(id) => Some(id.clone()),
            None => {
                let stem = stem(&self.sources[index]).filter(|stem| stem.len() == 64);
                stem.filter(|stem| stem.parse::<Digest>().is_ok()).map(str::to_owned)
            }
        };
        if let Some(id) = id.as_deref() {
            info.id = id.parse()?;
        }
        if let Some(digest) = self.blob_digests.get(index) {
            if separate {
                info.meta_digest = digest.parse()?;
            } else {
                info.id = digest.parse()?;
            }
        }
        if info.id.as_str() == BlobInfo::PLACEHOLDER {
            bail!("its blob has no name: save it under the digest of its blob, or give --original-blob-ids");
        }
        if let Some(&size) = self.blob_sizes.get(index) {
            if separate {
                info.meta_size = size;
            } else {
                info.stored_size = size;
            }
        }
        if let Some(digest) = self.toc_digests.get(index) {
            info.toc_digest = digest.parse()?;
        }
        if let Some(&size) = self.toc_sizes.get(index) {
            info.toc_size = size;
        }
        let id = info.id.clone();
        Ok(bootstrap::named(info, id))
    }
}
