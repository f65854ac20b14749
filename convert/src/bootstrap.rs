//! From a tree and the blobs that hold its files to a bootstrap.

use std::collections::HashMap;
use std::io::{self, Read, Seek as _};
use std::path::{Path, PathBuf};

use nydus_rafs::blob::format::features;
use nydus_rafs::write::{self, WriteError};
use nydus_rafs::{BlobId, BlobInfo, Chunk, Digest, NodeId, NodeKind, Tree};
use tempfile::{SpooledTempFile, spooled_tempfile_in};

use crate::layer::stream::Hashing;
use crate::pack::Recipe;

/// A blob that a tree refers to.
#[derive(Debug, Clone)]
pub struct Blob<'c> {
    /// What the bootstrap says of it.
    pub info: BlobInfo,
    /// Its chunks.
    pub chunks: &'c [Chunk],
}

/// Which of the optional things a bootstrap says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Style {
    /// Owners are left out, so that readers report their own.
    pub repeatable: bool,
    /// The blob is a raw tar.
    pub tarfs: bool,
    /// Extended attributes are announced whether there are any or not, as established tools do when they merge.
    pub merged: bool,
}

/// Bootstraps up to this many bytes are kept in memory.
const IN_MEMORY: usize = 4 << 20;

/// A bootstrap that is written. A large one lies in a file without a name.
#[derive(Debug)]
pub struct Written {
    file: SpooledTempFile,
    len: u64,
}

impl Written {
    /// Returns the number of bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Returns false: there always is a superblock.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Reads it from its beginning.
    ///
    /// # Errors
    ///
    /// From the system.
    pub fn read(&mut self) -> io::Result<impl Read> {
        self.file.rewind()?;
        Ok((&mut self.file).take(self.len))
    }

    /// Returns its SHA-256.
    ///
    /// # Errors
    ///
    /// From the system.
    pub fn digest(&mut self) -> io::Result<Digest> {
        let mut hashing = Hashing::new(io::sink());
        io::copy(&mut self.read()?, &mut hashing)?;
        Ok(hashing.finish().1)
    }
}

/// Writes the bootstrap of a tree; `prefetch` lists the paths that a node shall fetch first. If it is large, it goes into `dir`.
///
/// # Errors
///
/// If the format cannot hold the tree, or the file cannot be written.
pub fn write(
    dir: &Path,
    tree: &Tree,
    blobs: &[Blob<'_>],
    recipe: Recipe,
    prefetch: &[PathBuf],
    style: Style,
) -> Result<Written, WriteError> {
    let infos: Vec<BlobInfo> = blobs.iter().map(|blob| blob.info.clone()).collect();
    let tables: Vec<&[Chunk]> = blobs.iter().map(|blob| blob.chunks).collect();
    let options = write::Options {
        version: recipe.version,
        chunk_size: recipe.chunk_size,
        compressor: recipe.compressor,
        algorithm: recipe.algorithm,
        explicit_ids: !style.repeatable,
        claim_xattrs: style.merged,
        tarfs: style.tarfs,
        prefetch: tree.prefetch(prefetch.iter().map(PathBuf::as_path)),
    };
    let mut file = spooled_tempfile_in(IN_MEMORY, dir);
    let len = write::write_into(tree, &infos, &tables, &options, &mut file)?;
    Ok(Written { file, len })
}

/// Gives a blob that was made with its bootstrap inside the name that it has now.
pub fn named(info: BlobInfo, id: BlobId) -> BlobInfo {
    BlobInfo { id, features: info.features & !features::INLINED_FS_META, ..info }
}

/// Numbers the blobs of a tree by their first use and returns the old numbers in the new order.
///
/// `same` maps old numbers to the one that stands for them, for layers that made the same blob. Those of `first` come
/// first, used or not; else blobs that no file uses are not in the result. Files are met as the format visits them: those
/// of a directory, then its directories.
pub fn number_blobs(tree: &mut Tree, same: &[u16], first: &[u16]) -> Vec<u16> {
    let mut order = first.to_vec();
    let mut new: HashMap<u16, u16> = (0..).zip(first).map(|(position, &old)| (old, position)).collect();
    let mut todo = vec![Tree::ROOT];
    while let Some(dir) = todo.pop() {
        let NodeKind::Directory(children) = &tree.node(dir).kind else { continue };
        let children: Vec<NodeId> = children.values().copied().collect();
        let mut directories = Vec::new();
        for id in children {
            match &tree.node(id).kind {
                NodeKind::Directory(_) => directories.push(id),
                NodeKind::Regular { chunks, .. } => {
                    for chunk in chunks {
                        let old = same[usize::from(chunk.blob)];
                        new.entry(old).or_insert_with(|| {
                            order.push(old);
                            u16::try_from(order.len() - 1).expect("no more than there are old ones")
                        });
                    }
                }
                _ => {}
            }
        }
        todo.extend(directories.into_iter().rev());
    }
    for id in nodes(tree) {
        if let NodeKind::Regular { chunks, .. } = &mut tree.node_mut(id).kind {
            for chunk in chunks {
                chunk.blob = new[&same[usize::from(chunk.blob)]];
            }
        }
    }
    order
}

/// Returns every node that has a name, once.
pub(crate) fn nodes(tree: &Tree) -> Vec<NodeId> {
    let mut found = vec![Tree::ROOT];
    let mut seen = std::collections::HashSet::from([Tree::ROOT]);
    let mut next = 0;
    while let Some(&id) = found.get(next) {
        next += 1;
        if let NodeKind::Directory(children) = &tree.node(id).kind {
            found.extend(children.values().copied().filter(|child| seen.insert(*child)));
        }
    }
    found
}
