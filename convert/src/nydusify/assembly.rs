//! Layers to the image's bootstrap layer.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Cursor};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use nydus_rafs::blob::format::features;
use nydus_rafs::{BlobInfo, ChunkTable, Digest, codec};

use super::bundle::{self, Member};
use super::layer::Made;
use super::readback::Expected;
use crate::bootstrap::{self, Blob, Style};
use crate::dictionary::Dictionary;
use crate::overlay;
use crate::pack::Recipe;

/// A blob of the image, whichever layers have it.
struct ImageBlob {
    info: BlobInfo,
    chunks: Arc<ChunkTable>,
    /// Digest of the object that was made for it, and the object; nothing for a blob of the dictionary.
    made: Option<(Digest, Arc<File>)>,
}

/// An image of which only the bootstrap was missing.
#[derive(Debug)]
pub(super) struct Merge {
    pub(super) bundle: bundle::Bundle<Arc<File>>,
    /// The blobs of the dictionary that the image uses.
    pub(super) known: Vec<BlobInfo>,
    pub(super) expected: Expected,
}

/// Lays the layers on one another and writes the bootstrap layer.
pub(super) fn merge(
    made: Vec<Made>,
    dictionary: &Dictionary,
    recipe: Recipe,
    prefetch: &[PathBuf],
    work_dir: &Path,
) -> anyhow::Result<Merge> {
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
        blobs.push(Some(ImageBlob {
            info: known.info.clone(),
            chunks: Arc::new(ChunkTable::new(known.chunks.clone())),
            made: None,
        }));
    }
    let mut merged = overlay::merge(layers)?;
    let order = bootstrap::number_blobs(&mut merged.tree, &blob_of, &[]);
    let mut used = Vec::new();
    for index in order {
        used.push(blobs[usize::from(index)].take().context("a file refers to a layer without data")?);
    }
    let slots: Vec<Blob<'_>> =
        used.iter().map(|blob| Blob { info: blob.info.clone(), chunks: blob.chunks.all() }).collect();
    let style = Style { merged: true, ..Style::default() };
    let mut boot = bootstrap::write(work_dir, &merged.tree, &slots, recipe, prefetch, style)?;
    let len = boot.len();
    let bytes = Box::new(boot.read().context("reading the bootstrap back")?);
    let mut members = vec![Member { name: "image/image.boot".into(), len, bytes }];
    for blob in &used {
        if let (Some(_), Some((digest, file))) = (&blob.info.table, &blob.made) {
            let bytes = cached_table(&blob.info, file).context("reading a chunk table back")?;
            let name = format!("image/{digest}.blob.meta");
            members.push(Member { name, len: bytes.len() as u64, bytes: Box::new(Cursor::new(bytes)) });
        }
    }
    let trouble = || format!("packing the bootstrap layer in the work directory {}", work_dir.display());
    let out = BufWriter::new(tempfile::tempfile_in(work_dir).with_context(trouble)?);
    let bundle::Bundle { out, digest, diff_id } = bundle::pack(members, out).with_context(trouble)?;
    let out = out.into_inner().map_err(io::IntoInnerError::into_error).with_context(trouble)?;
    let bundle = bundle::Bundle { out: Arc::new(out), digest, diff_id };
    let contents = merged
        .bodies
        .iter()
        .filter_map(|(&node, &(layer, body))| bodies[layer][body.0].map(|digest| (node, digest)))
        .collect();
    let known = used.into_iter().filter(|blob| blob.made.is_none()).map(|blob| blob.info).collect();
    Ok(Merge { bundle, known, expected: Expected { tree: merged.tree, contents } })
}

/// Gives a blob the name that only its digest tells; one that refers to a layer is named by the layer.
pub(super) fn named(info: BlobInfo, digest: Digest) -> BlobInfo {
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
