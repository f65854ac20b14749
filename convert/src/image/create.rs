//! `nydus-image create`: a directory or tar to a blob and a bootstrap.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead as _, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, bail};
use nydus_rafs::blob::write::{Finished, Form, Sealed};
use nydus_rafs::{BlobId, BlobInfo, Bootstrap, Chunk, NodeKind, Tree};

pub use super::output::{BlobPlace, BootstrapPlace};
use super::output::{Output, beside, keep_blob, open_blob, write_whole};
use super::report::{Report, Trace};
use super::{cache, open};
use crate::bootstrap::{self, Blob, Style};
use crate::dictionary::Dictionary;
use crate::layer::stream::{self, Packing};
use crate::layer::{Layer, Rules, Whiteouts, estargz, reference};
use crate::overlay;
use crate::pack::{Packer, Pool, Recipe};
use crate::source::directory;

/// What to make an image from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A directory.
    Directory(Whiteouts),
    /// A tar, compressed or not.
    Tar,
    /// A tar or gzip stream whose files stay where they are; what is made is a chunk table.
    Reference,
    /// A tar that is mounted as it is.
    RawTar,
    /// The table of contents of an eStargz layer, whose files stay where they are.
    Toc {
        /// Where the layer's chunks end, in bytes.
        data_size: u64,
        /// The chunk size that the image shall have; that of the layer, or of its parent, otherwise.
        chunk_size: Option<u32>,
        /// Whether what is made is an image. It is a layer for a later merge otherwise, which keeps its whiteouts.
        image: bool,
    },
}

/// What is made of the patterns of files that are needed first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PrefetchPolicy {
    /// Nothing.
    #[default]
    None,
    /// They come first in the blob, and the bootstrap lists them.
    Table,
    /// They come first in the blob, and the bootstrap tells how far to read ahead (version 5 only).
    ReadAhead,
}

/// What to make, and how.
#[derive(Debug, Clone)]
pub struct Request {
    /// The kind of source.
    pub source: Source,
    /// The source.
    pub path: PathBuf,
    /// Where the blob goes.
    pub blob: BlobPlace,
    /// Where the bootstrap goes.
    pub bootstrap: BootstrapPlace,
    /// Whether the blob ends with a table of contents.
    pub toc: bool,
    /// The blob's id, if it shall not be its digest.
    pub blob_id: Option<BlobId>,
    /// How chunks are made.
    pub recipe: Recipe,
    /// What is fetched first.
    pub prefetch: Vec<PathBuf>,
    /// What is made of that.
    pub prefetch_policy: PrefetchPolicy,
    /// Whether owners are left out.
    pub repeatable: bool,
    /// The bootstrap of the image on which the source is laid.
    pub parent: Option<PathBuf>,
    /// The bootstrap of an image whose chunks need not be stored again.
    pub dictionary: Option<PathBuf>,
}

impl Request {
    fn form(&self) -> Form {
        match (self.bootstrap == BootstrapPlace::Inline, self.toc) {
            (true, true) => Form::InlineToc,
            (true, false) => Form::Inline,
            (false, true) => Form::Toc,
            (false, false) => Form::Plain,
        }
    }

    /// Returns where a bootstrap too large for memory lies until it is where it belongs.
    fn spool_dir(&self) -> PathBuf {
        match (&self.bootstrap, &self.blob) {
            (BootstrapPlace::File(path), _) | (BootstrapPlace::Inline, BlobPlace::File(path)) => beside(path),
            (_, BlobPlace::Directory(dir) | BlobPlace::Cache(dir)) => dir.clone(),
            _ => std::env::temp_dir(),
        }
    }
}

/// The image below, as a layer.
struct Parent {
    layer: Layer,
    /// How many blobs it has; they are the first of the dictionary.
    blobs: usize,
}

/// A blob whose chunks are complete, and the tree of its files.
struct Packed<W> {
    layer: Layer,
    sealed: Option<Sealed<W>>,
    info: Option<BlobInfo>,
    chunks: Vec<Chunk>,
}

/// Makes an image.
///
/// # Errors
///
/// If the source cannot be read or the result cannot be written.
pub fn create(request: &Request) -> anyhow::Result<Report> {
    let begun = Instant::now();
    let mut trace = Trace::default();
    let mut dictionary = Dictionary::default();
    let below = request.parent.as_deref().map(open).transpose()?;
    let (toc, request) = match request.source {
        Source::Toc { chunk_size, .. } => {
            let context = || format!("reading the table of contents {}", request.path.display());
            let toc =
                estargz::Toc::parse(&std::fs::read(&request.path).with_context(context)?).with_context(context)?;
            let wanted = chunk_size.or_else(|| below.as_ref().map(Bootstrap::chunk_size));
            let recipe = Recipe { chunk_size: toc.chunk_size(wanted)?, ..request.recipe };
            (Some(toc), &Request { recipe, ..request.clone() })
        }
        _ => (None, request),
    };
    let parent = match (&request.parent, &below) {
        (Some(path), Some(image)) => Some(parent(path, image, &mut dictionary, request.recipe)?),
        _ => None,
    };
    drop(below);
    if let Some(path) = &request.dictionary {
        let image = open(path)?;
        let context = || format!("using {} as a chunk dictionary", path.display());
        dictionary.add(&image, request.recipe).with_context(context)?;
    }
    let dictionary = Arc::new(dictionary);
    let (out, place) = open_blob(&request.blob)?;
    let lowest = parent.is_none();
    let Packed { mut layer, sealed, info, chunks } = match (toc, request.source) {
        (Some(toc), Source::Toc { data_size, image, .. }) => {
            let rules = match (image, lowest) {
                (false, _) => Rules::Alone,
                (true, true) => Rules::Lowest,
                (true, false) => Rules::Upper,
            };
            let id = request.blob_id.clone().context("--blob-id is needed: the name of the layer")?;
            let raw = toc.layer(rules, id, data_size).with_context(|| format!("reading {}", request.path.display()))?;
            Packed { layer: raw.layer, sealed: None, info: raw.info, chunks: raw.chunks }
        }
        _ => read(request, &dictionary, lowest, BufWriter::with_capacity(256 << 10, out))?,
    };
    // Nobody asks any more which body was whose.
    layer.bodies = HashMap::new();
    trace.took("build_tree", begun.elapsed());

    let writing = Instant::now();
    let inline = request.bootstrap == BootstrapPlace::Inline;
    let marked = !matches!(request.source, Source::Toc { image: true, .. });
    let (tree, used) = lay(layer, parent, &dictionary, marked)?;
    let own = info.as_ref().map(|info| Blob { info: info.clone(), chunks: &chunks });
    let mut blobs = Vec::new();
    for number in used {
        blobs.push(match number.checked_sub(1) {
            None => own.clone().context("a file refers to a blob without data")?,
            Some(known) => {
                let known = &dictionary.blobs()[usize::from(known)];
                Blob { info: known.info.clone(), chunks: &known.chunks }
            }
        });
    }
    let prefetch = if request.prefetch_policy == PrefetchPolicy::Table { &request.prefetch[..] } else { &[] };
    let tarfs = request.source == Source::RawTar;
    let style = Style { repeatable: request.repeatable, tarfs, merged: false };
    let mut boot = bootstrap::write(&request.spool_dir(), &tree, &blobs, request.recipe, prefetch, style)?;
    drop(tree);
    trace.took("dump_bootstrap", writing.elapsed());

    let mut ids: Vec<BlobId> = blobs.iter().map(|blob| blob.info.id.clone()).collect();
    if let Some(sealed) = sealed {
        let len = boot.len();
        let finished = boot.read().and_then(|boot| sealed.finish_from(boot, len));
        let Finished { out, size, builder_id, .. } = finished.context("writing the blob")?;
        let out = out.into_inner().map_err(io::IntoInnerError::into_error).context("writing the blob")?;
        // A bootstrap inside the blob could not know the blob's name, nor that of the object with the chunk table.
        let name = if request.source == Source::Reference || inline || info.is_none() {
            builder_id.into()
        } else {
            info.as_ref().map_or_else(|| builder_id.into(), |info| info.id.clone())
        };
        for id in &mut ids {
            if id.as_str() == BlobInfo::PLACEHOLDER {
                *id = BlobId::clone(&name);
            }
        }
        if let (BlobPlace::Cache(dir), Output::Named(file)) = (&request.blob, &out) {
            if let Some(info) = &info {
                let layer = (request.source == Source::Reference).then(|| File::open(&request.path)).transpose()?;
                cache::keep(dir, layer.as_ref().unwrap_or(file), file, info, &chunks)?;
            }
        } else {
            keep_blob(out, place, &name, size > 0)?;
        }
    }
    let bootstrap_path = match &request.bootstrap {
        BootstrapPlace::Inline => None,
        BootstrapPlace::File(path) => Some(path.clone()),
        BootstrapPlace::Directory => {
            let BlobPlace::Directory(dir) = &request.blob else {
                bail!("the bootstrap needs --bootstrap or --blob-dir")
            };
            Some(dir.join(boot.digest().context("reading the bootstrap back")?.to_string()))
        }
    };
    if let Some(path) = &bootstrap_path {
        write_whole(path, boot.read().context("reading the bootstrap back")?)?;
    }
    trace.took("total_build", begun.elapsed());
    let size: u64 = chunks.iter().map(|chunk| chunk.plain.end - chunk.plain.start).sum();
    trace.registered_events.insert("blob_uncompressed_size", size.into());
    Ok(Report::new(bootstrap_path.as_deref(), &ids, request.recipe.version, request.recipe.compressor, trace))
}

/// Takes the image below, and adds its blobs to the dictionary.
fn parent(
    path: &Path,
    image: &Bootstrap<Vec<u8>>,
    dictionary: &mut Dictionary,
    recipe: Recipe,
) -> anyhow::Result<Parent> {
    let context = || format!("using {} as parent", path.display());
    dictionary.add(image, recipe).with_context(context)?;
    let mut layer = Layer::of_image(image).with_context(context)?;
    // Whatever it holds by now is meant to be seen.
    layer.whiteouts = Whiteouts::None;
    for id in bootstrap::nodes(&layer.tree) {
        if let NodeKind::Regular { chunks, .. } = &mut layer.tree.node_mut(id).kind {
            chunks.iter_mut().for_each(|chunk| chunk.blob += 1);
        }
    }
    Ok(Parent { layer, blobs: image.blobs().len() })
}

/// Lays the new layer on its parent, if it has one, and numbers the blobs that files use. Without a parent implied
/// directories are marked, if a later merge shall find them `marked`.
///
/// Returns the tree and, in their order, the blobs as bodies number them.
fn lay(
    mut layer: Layer,
    parent: Option<Parent>,
    dictionary: &Dictionary,
    marked: bool,
) -> anyhow::Result<(Tree, Vec<u16>)> {
    let known = u16::try_from(dictionary.blobs().len()).context("too many blobs")?;
    let Some(parent) = parent else {
        if marked {
            layer.mark_implied();
        }
        let same: Vec<u16> = (0..=known).collect();
        let order = bootstrap::number_blobs(&mut layer.tree, &same, &[]);
        return Ok((layer.tree, order));
    };
    let root = layer.tree.node(Tree::ROOT);
    let listed = (!root.implied).then(|| (root.stat.clone(), root.xattrs.clone()));
    let below = parent.layer.tree.node(Tree::ROOT);
    let (stat, xattrs) = listed.unwrap_or_else(|| (below.stat.clone(), below.xattrs.clone()));
    let mut tree = overlay::merge(vec![parent.layer, layer])?.tree;
    let root = tree.node_mut(Tree::ROOT);
    (root.stat, root.xattrs) = (stat, xattrs);
    // Two layers, the second of which has the own blob; the dictionary's follow.
    let same: Vec<u16> = (0..known + 2).collect();
    let first: Vec<u16> = (2..).take(parent.blobs).collect();
    let order = bootstrap::number_blobs(&mut tree, &same, &first);
    Ok((tree, order.into_iter().map(|number| number - 1).collect()))
}

fn read<W: Write>(request: &Request, dictionary: &Arc<Dictionary>, lowest: bool, out: W) -> anyhow::Result<Packed<W>> {
    let (path, chunk_size) = (&request.path, request.recipe.chunk_size);
    let context = || format!("reading {}", path.display());
    let open = || File::open(path).with_context(|| format!("opening {}", path.display()));
    match request.source {
        Source::Reference => {
            let referred = reference::read(open()?, Rules::Alone, chunk_size).with_context(context)?;
            let mut sealed = Sealed::reference(out, request.form(), referred.reference).context("writing the blob")?;
            let (info, chunks) = (sealed.info().cloned(), sealed.take_chunks());
            let info = info.map(|info| match info.meta_size {
                0 => info,
                _ => BlobInfo { meta_digest: sealed.builder_id(), ..info },
            });
            Ok(Packed { layer: referred.layer, sealed: Some(sealed), info, chunks })
        }
        Source::RawTar => {
            let raw = reference::read_raw(open()?, Rules::Alone, chunk_size).with_context(context)?;
            Ok(Packed { layer: raw.layer, sealed: None, info: raw.info, chunks: raw.chunks })
        }
        Source::Toc { .. } => unreachable!("a table of contents is read before the layers below"),
        Source::Directory(_) | Source::Tar => {
            let pool = Pool::for_this_machine().context("starting worker threads")?;
            let packer = Packer::new(&pool, request.recipe, dictionary, request.form(), out)?;
            let (layer, _, blob) = match request.source {
                Source::Directory(whiteouts) => {
                    let order = directory::Order {
                        prefetch: &request.prefetch,
                        read_ahead: request.prefetch_policy == PrefetchPolicy::ReadAhead,
                    };
                    directory::pack(path, whiteouts, lowest, order, chunk_size, packer)?
                }
                _ => {
                    let mut input = BufReader::with_capacity(256 << 10, open()?);
                    let packing = Packing::of(input.fill_buf().with_context(context)?);
                    let tar = packing.open(input).context("opening the archive")?;
                    stream::pack_tar(tar, Rules::Alone, chunk_size, packer)
                        .with_context(|| format!("unpacking {}", path.display()))?
                }
            };
            let mut sealed = blob.seal().context("writing the blob")?;
            let id = request.blob_id.clone().unwrap_or_else(|| sealed.builder_id().into());
            let info = sealed.info().cloned().map(|info| match request.bootstrap {
                BootstrapPlace::Inline => info,
                BootstrapPlace::File(_) | BootstrapPlace::Directory => BlobInfo { id, ..info },
            });
            let chunks = sealed.take_chunks();
            Ok(Packed { layer, sealed: Some(sealed), info, chunks })
        }
    }
}

#[cfg(test)]
mod tests;
