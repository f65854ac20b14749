//! `nydus-image merge`: the bootstraps of layers, lowest first, to the bootstrap of an image.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, bail};
use nydus_rafs::blob::format::features;
use nydus_rafs::{BlobId, BlobInfo, Bootstrap, Chunk, Digest, Flags, NodeKind, Tree};

use super::create::write_whole;
use super::report::{Report, Trace};
use crate::bootstrap::{self, Blob, Style};
use crate::layer::{IMPLIED_XATTR, Implied, Layer};
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
}

struct Part {
    layer: Layer,
    blob: Option<(BlobInfo, Vec<Chunk>)>,
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
    let mut recipe: Option<(Recipe, Flags)> = None;
    let mut parts = Vec::new();
    for (index, path) in request.sources.iter().enumerate() {
        let context = || format!("reading {}", path.display());
        let image = Bootstrap::open(std::fs::read(path).with_context(context)?).with_context(context)?;
        let flags = image.flags();
        let own =
            Recipe { compressor: flags.compressor(), algorithm: flags.algorithm(), chunk_size: image.chunk_size() };
        match &recipe {
            None => recipe = Some((own, flags)),
            Some((first, first_flags)) => compatible(*first, *first_flags, own, flags)?,
        }
        parts.push(request.part(index, &image).with_context(context)?);
    }
    let (recipe, flags) = recipe.context("nothing to merge")?;
    trace.took("load_tree_from_bootstrap", begun.elapsed());
    let writing = Instant::now();
    let mut layers = Vec::new();
    let mut blobs = Vec::new();
    let mut same = Vec::new();
    let mut by_id: HashMap<BlobId, u16> = HashMap::new();
    for (index, Part { layer, blob }) in parts.into_iter().enumerate() {
        let index = u16::try_from(index).context("at most 65,535 layers can be merged")?;
        same.push(blob.as_ref().map_or(index, |(info, _)| *by_id.entry(info.id.clone()).or_insert(index)));
        layers.push(layer);
        blobs.push(blob);
    }
    let mut merged = overlay::merge(layers)?;
    let mut used = Vec::new();
    for index in bootstrap::number_blobs(&mut merged.tree, &same) {
        used.push(blobs[usize::from(index)].take().context("a file refers to a layer without data")?);
    }
    let slots: Vec<Blob<'_>> = used.iter().map(|(info, chunks)| Blob { info: info.clone(), chunks }).collect();
    let style = Style { repeatable: !flags.has(Flags::EXPLICIT_IDS), merged: true };
    let boot = bootstrap::write(&merged.tree, &slots, recipe, &request.prefetch, style)?;
    let path = match (&request.bootstrap, &request.blob_dir) {
        (Some(path), _) => path.clone(),
        (None, Some(dir)) => dir.join(nydus_rafs::Algorithm::Sha256.digest(&boot).to_string()),
        (None, None) => bail!("--bootstrap or --blob-dir is needed"),
    };
    write_whole(&path, &boot)?;
    trace.took("dump_bootstrap", writing.elapsed());
    let ids: Vec<BlobId> = used.into_iter().map(|(info, _)| info.id).collect();
    Ok(Report::new(Some(&path), &ids, 6, recipe.compressor, trace))
}

fn compatible(one: Recipe, one_flags: Flags, other: Recipe, other_flags: Flags) -> Result<(), Incompatible> {
    let ids = |flags: Flags| flags.has(Flags::EXPLICIT_IDS).to_string();
    let tarfs = |flags: Flags| flags.has(Flags::TARFS).to_string();
    let pairs = [
        ("chunk_size", other.chunk_size.to_string(), one.chunk_size.to_string()),
        ("explicit_uidgid", ids(other_flags), ids(one_flags)),
        ("tarfs_mode", tarfs(other_flags), tarfs(one_flags)),
    ];
    match pairs.into_iter().find(|(_, one, other)| one != other) {
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

    fn part(&self, index: usize, image: &Bootstrap<Vec<u8>>) -> anyhow::Result<Part> {
        let tree = Tree::read(image)?;
        let mut layer = Layer { tree, implied: BTreeMap::new(), bodies: HashMap::new() };
        for id in bootstrap::nodes(&layer.tree) {
            let node = layer.tree.node_mut(id);
            if node.xattrs.remove(OsStr::new(IMPLIED_XATTR)).is_some() && matches!(node.kind, NodeKind::Directory(_)) {
                layer.implied.insert(id, Implied::All);
            }
        }
        let blob = match image.blobs() {
            [] => None,
            [info] => Some((self.name(index, info.clone())?, image.chunks(0)?.all().to_vec())),
            several => bail!(
                "it refers to {} blobs; a layer may refer to one, chunk dictionaries are not supported yet",
                several.len()
            ),
        };
        Ok(Part { layer, blob })
    }

    /// Gives a blob what only the caller knows: its name, size and table of contents.
    fn name(&self, index: usize, info: BlobInfo) -> anyhow::Result<BlobInfo> {
        let separate = info.has(features::SEPARATE);
        let mut info = info.clone();
        let id = match self.original_blob_ids.get(index) {
            Some(id) => Some(id.clone()),
            None => stem(&self.sources[index]).filter(|stem| stem.len() == 64 && stem.parse::<Digest>().is_ok()),
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

fn stem(path: &Path) -> Option<String> {
    path.file_name()?.to_str()?.split('.').next().map(str::to_owned)
}
