//! Makes an owned tree of a bootstrap.

use std::collections::HashMap;

use super::{ChunkRef, Node, NodeId, NodeKind, Stat, Tree};
use crate::bootstrap::{Bootstrap, FormatError, Ino, Kind};
use crate::view::invalid;

/// The bytes that an entry of a directory takes besides its name.
pub(crate) const ENTRY_WEIGHT: u64 = 12;

/// A tree and where its nodes were found.
#[derive(Debug)]
pub struct Reading {
    /// The tree. Its chunks are those of [`Bootstrap::chunks`], its blobs those of [`Bootstrap::blobs`].
    pub tree: Tree,
    /// The node of each inode; names of one inode share one node.
    pub nodes: HashMap<Ino, NodeId>,
}

impl Tree {
    /// Reads the tree of a bootstrap.
    pub fn read<B: AsRef<[u8]>>(bootstrap: &Bootstrap<B>) -> Result<Self, FormatError> {
        Ok(Reading::of(bootstrap)?.tree)
    }
}

impl Reading {
    /// Reads the tree of a bootstrap.
    pub fn of<B: AsRef<[u8]>>(bootstrap: &Bootstrap<B>) -> Result<Self, FormatError> {
        let root = bootstrap.root();
        let mut tree = Tree::new(Stat::default());
        let mut nodes = HashMap::from([(root, Tree::ROOT)]);
        // Inodes and directories of a hostile image may share bytes; what is copied out of an honest one has
        // its own, so that the length of the bootstrap bounds it.
        let mut budget = Budget(bootstrap.bytes().len() as u64);
        *tree.node_mut(Tree::ROOT) = read_node(bootstrap, root, &mut budget)?;
        let mut directories = vec![(root, Tree::ROOT)];
        while let Some((dir, id)) = directories.pop() {
            let mut children = std::collections::BTreeMap::new();
            for entry in bootstrap.entries(dir, 0)? {
                let entry = entry?;
                if entry.name == "." || entry.name == ".." {
                    continue;
                }
                budget.spend(ENTRY_WEIGHT)?;
                let child = match nodes.get(&entry.ino) {
                    Some(&known) if tree.children(known).is_some() => {
                        return Err(invalid("directory", dir.0, format!("{:?} has a second name", entry.ino)));
                    }
                    Some(&known) => known,
                    None => {
                        let child = tree.add(read_node(bootstrap, entry.ino, &mut budget)?);
                        nodes.insert(entry.ino, child);
                        if tree.children(child).is_some() {
                            directories.push((entry.ino, child));
                        }
                        child
                    }
                };
                if children.insert(entry.name.to_owned(), child).is_some() {
                    return Err(invalid("directory", dir.0, format!("{:?} is there twice", entry.name)));
                }
            }
            tree.node_mut(id).kind = NodeKind::Directory(children);
        }
        Ok(Self { tree, nodes })
    }
}

/// How many more bytes may be copied.
struct Budget(u64);

impl Budget {
    fn spend(&mut self, bytes: u64) -> Result<(), FormatError> {
        let left = self.0.checked_sub(bytes);
        self.0 = left.ok_or_else(|| invalid("bootstrap", 0, "its inodes or directories share bytes"))?;
        Ok(())
    }
}

fn read_node<B: AsRef<[u8]>>(bootstrap: &Bootstrap<B>, ino: Ino, budget: &mut Budget) -> Result<Node, FormatError> {
    let attr = bootstrap.attr(ino)?;
    budget.spend(bootstrap.weight(ino)?)?;
    let kind = match attr.kind {
        Kind::Directory => NodeKind::Directory(Default::default()),
        Kind::Regular => {
            let extents = bootstrap.extents(ino, 0..attr.size)?;
            let chunks = extents.map(|extent| extent.map(|extent| ChunkRef { blob: extent.blob, chunk: extent.chunk }));
            NodeKind::Regular { size: attr.size, chunks: chunks.collect::<Result<_, _>>()? }
        }
        Kind::Symlink => NodeKind::Symlink(bootstrap.readlink(ino)?),
        Kind::CharDevice => NodeKind::CharDevice(attr.rdev),
        Kind::BlockDevice => NodeKind::BlockDevice(attr.rdev),
        Kind::Fifo => NodeKind::Fifo,
        Kind::Socket => NodeKind::Socket,
    };
    let stat = Stat {
        permissions: attr.permissions,
        uid: attr.uid.unwrap_or(0),
        gid: attr.gid.unwrap_or(0),
        mtime: attr.mtime,
        mtime_nsec: attr.mtime_nsec,
        hidden_links: 0,
    };
    Ok(Node { stat, xattrs: bootstrap.xattrs(ino)?.into_iter().collect(), kind, implied: false })
}
