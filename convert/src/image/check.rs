//! `nydus-image check`: whether a bootstrap can be read, and which blobs it refers to.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context as _;
use nydus_rafs::blob::format::features;
use nydus_rafs::{BlobId, BlobInfo, Compressor, Tree, Version};

use super::open;
use super::report::{Report, Trace};

/// Checks a bootstrap: every inode, name and chunk list is read. Prints what it refers to.
///
/// # Errors
///
/// If anything in it cannot be read.
pub fn check(path: &Path, verbose: bool, out: &mut impl Write, json: Option<&PathBuf>) -> anyhow::Result<()> {
    let begun = Instant::now();
    let image = open(path)?;
    let tree = Tree::read(&image).with_context(|| format!("reading the files of {}", path.display()))?;
    for blob in 0..image.blobs().len() {
        let index = u16::try_from(blob).context("too many blobs")?;
        image.chunks(index).with_context(|| format!("reading the chunks of blob {}", image.blobs()[blob].id))?;
    }
    let mut trace = Trace::default();
    trace.took("load_tree_from_bootstrap", begun.elapsed());
    if verbose {
        print_tree(&tree, out)?;
    }
    writeln!(out, "RAFS filesystem metadata is valid, referenced data blobs: ")?;
    for (index, blob) in image.blobs().iter().enumerate() {
        writeln!(out, "{}", line(index, blob, image.chunk_size()))?;
    }
    let ids: Vec<BlobId> = image.blobs().iter().map(|blob| blob.id.clone()).collect();
    let version = Version::from_number(image.version()).unwrap_or_default();
    let compressor = if image.blobs().is_empty() { Compressor::Zstd } else { image.flags().compressor() };
    Report::new(Some(path), &ids, version, compressor, trace).save_compact(json)
}

fn print_tree(tree: &Tree, out: &mut impl Write) -> std::io::Result<()> {
    let mut todo = vec![(Tree::ROOT, std::ffi::OsString::from("/"))];
    while let Some((id, path)) = todo.pop() {
        let node = tree.node(id);
        writeln!(
            out,
            "inode: path {} mode {:o} uid {} gid {}",
            path.display(),
            node.stat.permissions,
            node.stat.uid,
            node.stat.gid
        )?;
        for (name, &child) in tree.children(id).into_iter().flatten().rev() {
            let mut below = path.clone();
            if below != "/" {
                below.push("/");
            }
            below.push(name);
            todo.push((child, below));
        }
    }
    Ok(())
}

fn line(index: usize, blob: &BlobInfo, chunk_size: u32) -> String {
    let names = [
        (features::ALIGNED, "aligned"),
        (features::BATCH, "batch"),
        (features::CAP_TAR_TOC, "cap_toc"),
        (features::INLINED_CHUNK_DIGEST, "chunk-digest"),
        (features::CHUNK_INFO_V2, "chunk-v2"),
        (features::INLINED_FS_META, "fs-meta"),
        (features::SEPARATE, "separate"),
        (features::HAS_TAR_HEADER, "tar-header"),
        (features::HAS_TOC, "toc"),
        (features::ZRAN, "zran"),
        (features::ENCRYPTED, "encrypted"),
    ];
    let found: Vec<_> = names.into_iter().filter(|&(bit, _)| blob.has(bit)).map(|(_, name)| name).collect();
    format!(
        "\t {index}: {}, compressed size {}, uncompressed size {}, chunk size: {chunk_size}, chunk count: {}, features: {}",
        blob.id,
        blob.stored_size,
        blob.plain_size,
        blob.chunk_count,
        found.join(" ")
    )
}
