//! A directory of this machine as a tree, and its files as bodies.
//!
//! The order in which bodies are packed is part of the result: first what prefetch patterns name, then directory by
//! directory, the files of each before the directories below it. Files of several names are read once.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read as _, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use nydus_rafs::blob::write::BlobWriter;
use nydus_rafs::tree::ChunkList;
use nydus_rafs::{Node, NodeId, NodeKind, Stat, Tree};

use crate::layer::stream::attach;
use crate::layer::{BodyId, Layer, Whiteouts};
use crate::pack::{BodyDigest, PackError, Packer};
use crate::path::{OPAQUE, WHITEOUT};

/// Marks a directory that hides what lies below it, where whiteouts are overlayfs's.
const OVERLAY_OPAQUE: &str = "trusted.overlay.opaque";

/// Why a directory cannot be packed.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// Something in it cannot be read.
    #[error("could not read {}", path.display())]
    Read {
        /// What.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file became shorter while it was read.
    #[error("{} became shorter while it was read", .0.display())]
    Shrunk(PathBuf),
    /// The blob cannot be written.
    #[error(transparent)]
    Pack(#[from] PackError),
}

/// What comes first in the blob.
#[derive(Debug, Clone, Copy)]
pub struct Order<'a> {
    /// Files, or directories with all below them.
    pub prefetch: &'a [PathBuf],
    /// Whether the blob shall say how far these reach.
    pub read_ahead: bool,
}

/// Reads the directory `root`, packs its files and returns tree, bodies and blob.
///
/// The tree's files refer to blobs as [`crate::dictionary::Dictionary`] numbers them. Whiteouts of the `lowest` layer are
/// left out, for there is nothing below; those of another stay in the tree in the form that [`crate::overlay`] knows.
///
/// # Errors
///
/// If something cannot be read or the blob cannot be written.
pub fn pack<W: Write>(
    root: &Path,
    whiteouts: Whiteouts,
    lowest: bool,
    order: Order<'_>,
    chunk_size: u32,
    mut packer: Packer<'_, W>,
) -> Result<(Layer, Vec<BodyDigest>, BlobWriter<W>), DirectoryError> {
    let metadata = fs::metadata(root).map_err(|source| DirectoryError::Read { path: root.to_owned(), source })?;
    if !metadata.is_dir() {
        let source = io::Error::from(io::ErrorKind::NotADirectory);
        return Err(DirectoryError::Read { path: root.to_owned(), source });
    }
    // The time of a root says when somebody made the folder, not what is in it.
    let stat = Stat { mtime: 0, mtime_nsec: 0, ..stat_of(&metadata) };
    let mut reading = Reading { tree: Tree::new(stat), whiteouts, lowest, seen: HashMap::new(), paths: HashMap::new() };
    let xattrs = xattrs_of(root).map_err(|source| DirectoryError::Read { path: root.to_owned(), source })?;
    let node = reading.tree.node_mut(Tree::ROOT);
    (node.xattrs, node.implied) = (xattrs, false);
    reading.directory(Tree::ROOT, root)?;
    let Reading { tree, paths, .. } = reading;
    let mut layer = Layer { tree, whiteouts, implied: BTreeMap::new(), bodies: HashMap::new() };
    let mut first = Vec::new();
    for id in layer.tree.prefetch(order.prefetch.iter().map(PathBuf::as_path)) {
        files(&layer.tree, id, &mut first);
    }
    let mut rest = Vec::new();
    files(&layer.tree, Tree::ROOT, &mut rest);
    let mark = first.len();
    for (position, id) in first.into_iter().chain(rest).enumerate() {
        if order.read_ahead && position == mark && mark > 0 {
            packer.mark_read_ahead()?;
        }
        let NodeKind::Regular { size, .. } = layer.tree.node(id).kind else { continue };
        if size == 0 || layer.bodies.contains_key(&id) {
            continue;
        }
        let body = packer.begin(size);
        layer.bodies.insert(id, body);
        push(&mut packer, body, &paths[&id], size, chunk_size)?;
    }
    let (bodies, blob) = packer.finish()?;
    let digests = attach(&mut layer, bodies);
    Ok((layer, digests, blob))
}

/// Lists the files at and below `id`, those of a directory before its directories.
fn files(tree: &Tree, id: NodeId, order: &mut Vec<NodeId>) {
    let Some(children) = tree.children(id) else {
        order.push(id);
        return;
    };
    order.extend(children.values().filter(|&&child| tree.children(child).is_none()));
    for &child in children.values().filter(|&&child| tree.children(child).is_some()) {
        files(tree, child, order);
    }
}

fn push<W: Write>(
    packer: &mut Packer<'_, W>,
    body: BodyId,
    path: &Path,
    size: u64,
    chunk_size: u32,
) -> Result<(), DirectoryError> {
    let read = |source| DirectoryError::Read { path: path.to_owned(), source };
    let mut file = File::open(path).map_err(read)?;
    let mut left = size;
    while left > 0 {
        let len = left.min(u64::from(chunk_size));
        left -= len;
        let mut chunk = vec![0; usize::try_from(len).expect("at most 16 MiB")];
        file.read_exact(&mut chunk).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => DirectoryError::Shrunk(path.to_owned()),
            _ => read(error),
        })?;
        packer.push(body, chunk)?;
    }
    Ok(())
}

struct Reading {
    tree: Tree,
    whiteouts: Whiteouts,
    lowest: bool,
    /// Device and inode of files of several names.
    seen: HashMap<(u64, u64), NodeId>,
    paths: HashMap<NodeId, PathBuf>,
}

impl Reading {
    fn directory(&mut self, dir: NodeId, path: &Path) -> Result<(), DirectoryError> {
        let read = |path: &Path, source| DirectoryError::Read { path: path.to_owned(), source };
        let mut children = BTreeMap::new();
        for entry in fs::read_dir(path).map_err(|source| read(path, source))? {
            let entry = entry.map_err(|source| read(path, source))?;
            let path = entry.path();
            let metadata = fs::symlink_metadata(&path).map_err(|source| read(&path, source))?;
            let name = entry.file_name();
            if self.lowest && self.is_whiteout(&name, &metadata) {
                continue;
            }
            let id = self.entry(&path, &metadata).map_err(|source| read(&path, source))?;
            if let NodeKind::Directory(_) = self.tree.node(id).kind {
                self.directory(id, &path)?;
            }
            children.insert(name, id);
        }
        let opaque = self.tree.node(dir).xattrs.get(OsStr::new(OVERLAY_OPAQUE)).is_some_and(|value| value == b"y");
        if self.whiteouts == Whiteouts::Overlayfs {
            self.tree.node_mut(dir).xattrs.remove(OsStr::new(OVERLAY_OPAQUE));
            if opaque && !self.lowest {
                let kind = NodeKind::Regular { size: 0, chunks: ChunkList::new() };
                let node = Node { stat: Stat::default(), xattrs: BTreeMap::new(), kind, implied: false };
                children.insert(OsStr::from_bytes(OPAQUE).to_owned(), self.tree.add(node));
            }
        }
        if let NodeKind::Directory(all) = &mut self.tree.node_mut(dir).kind {
            *all = children;
        }
        Ok(())
    }

    fn is_whiteout(&self, name: &OsStr, metadata: &fs::Metadata) -> bool {
        match self.whiteouts {
            Whiteouts::None => false,
            Whiteouts::Oci => name.as_bytes() == OPAQUE || name.as_bytes().starts_with(WHITEOUT),
            Whiteouts::Overlayfs | Whiteouts::Unpacked => metadata.file_type().is_char_device() && metadata.rdev() == 0,
        }
    }

    fn entry(&mut self, path: &Path, metadata: &fs::Metadata) -> io::Result<NodeId> {
        let kind = metadata.file_type();
        let several = kind.is_file() && metadata.nlink() > 1;
        let key = (metadata.dev(), metadata.ino());
        if several && let Some(&id) = self.seen.get(&key) {
            return Ok(id);
        }
        let number = u32::try_from(metadata.rdev() & 0xffff_ffff).expect("32 bits");
        let node = if kind.is_dir() {
            NodeKind::Directory(BTreeMap::new())
        } else if kind.is_symlink() {
            NodeKind::Symlink(fs::read_link(path)?.into_os_string())
        } else if kind.is_char_device() {
            NodeKind::CharDevice(number)
        } else if kind.is_block_device() {
            NodeKind::BlockDevice(number)
        } else if kind.is_fifo() {
            NodeKind::Fifo
        } else if kind.is_socket() {
            NodeKind::Socket
        } else {
            NodeKind::Regular { size: metadata.len(), chunks: ChunkList::new() }
        };
        let xattrs = xattrs_of(path)?;
        let id = self.tree.add(Node { stat: stat_of(metadata), xattrs, kind: node, implied: false });
        if kind.is_file() {
            self.paths.insert(id, path.to_owned());
        }
        if several {
            self.seen.insert(key, id);
        }
        Ok(id)
    }
}

fn stat_of(metadata: &fs::Metadata) -> Stat {
    Stat {
        permissions: u16::try_from(metadata.mode() & 0o7777).expect("twelve bits"),
        uid: metadata.uid(),
        gid: metadata.gid(),
        mtime: metadata.mtime(),
        mtime_nsec: u32::try_from(metadata.mtime_nsec()).unwrap_or(0),
        hidden_links: 0,
    }
}

fn xattrs_of(path: &Path) -> io::Result<BTreeMap<OsString, Vec<u8>>> {
    let names = match xattr::list(path) {
        Ok(names) => names,
        Err(error) if error.kind() == io::ErrorKind::Unsupported => return Ok(BTreeMap::new()),
        Err(error) => return Err(error),
    };
    let mut xattrs = BTreeMap::new();
    for name in names {
        // It may be gone by now.
        if let Some(value) = xattr::get(path, &name)? {
            xattrs.insert(name, value);
        }
    }
    Ok(xattrs)
}
