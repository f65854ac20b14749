//! An owned file tree: what layers are parsed into, what writers take, and what tests generate.
//!
//! Nodes live in an arena. A directory maps names to [`NodeId`]s, so that hard links are simply several
//! names for one node.

mod read;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Component, Path};

use smallvec::SmallVec;

use crate::bootstrap::Kind;
use crate::chunk::ChunkIndex;

pub(crate) use read::ENTRY_WEIGHT;
pub use read::Reading;

/// A node of a [`Tree`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub usize);

/// Attributes of a node that do not depend on its kind.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Stat {
    /// Permission bits, with set-uid, set-gid and sticky (`0..=0o7777`).
    pub permissions: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds of the modification time; may be negative.
    pub mtime: i64,
    /// Nanoseconds of the modification time (0 to 999,999,999).
    pub mtime_nsec: u32,
    /// Names that are counted though the tree has them no more: what an upper layer takes away of a hard-linked file
    /// stays in the count that an overlay mount shows. Written, and not read back; 0 for directories.
    pub hidden_links: u32,
}

/// A piece of a regular file's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ChunkRef {
    /// Index of the blob in the blob table that goes with the tree.
    pub blob: u16,
    /// The chunk in that blob.
    pub chunk: ChunkIndex,
}

/// The chunks of a file. Most files have one, which needs no allocation of its own.
pub type ChunkList = SmallVec<[ChunkRef; 1]>;

/// What a node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeKind {
    /// A directory, with its entries in the order of their bytes.
    Directory(BTreeMap<OsString, NodeId>),
    /// A regular file: its size and the chunks that hold it, in order.
    Regular {
        /// Size in bytes.
        size: u64,
        /// Chunks; all but the last hold exactly the image's chunk size.
        chunks: ChunkList,
    },
    /// A symbolic link and its target.
    Symlink(OsString),
    /// A character device with its number in the encoding of `stat(2)`, low 32 bits.
    CharDevice(u32),
    /// A block device, likewise.
    BlockDevice(u32),
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

impl NodeKind {
    /// Returns the type of the file.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Directory(_) => Kind::Directory,
            Self::Regular { .. } => Kind::Regular,
            Self::Symlink(_) => Kind::Symlink,
            Self::CharDevice(_) => Kind::CharDevice,
            Self::BlockDevice(_) => Kind::BlockDevice,
            Self::Fifo => Kind::Fifo,
            Self::Socket => Kind::Socket,
        }
    }
}

/// One node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Attributes.
    pub stat: Stat,
    /// Extended attributes, full names.
    pub xattrs: BTreeMap<OsString, Vec<u8>>,
    /// What it is.
    pub kind: NodeKind,
    /// Whether a layer did not list this directory but something below it: at a merge the lower layer's
    /// attributes stay.
    pub implied: bool,
}

/// A tree; the root is [`Tree::ROOT`] and always a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    nodes: Vec<Node>,
}

impl Tree {
    /// The root directory.
    pub const ROOT: NodeId = NodeId(0);

    /// Makes a tree of one empty directory.
    pub fn new(stat: Stat) -> Self {
        let root = Node { stat, xattrs: BTreeMap::new(), kind: NodeKind::Directory(BTreeMap::new()), implied: true };
        Self { nodes: vec![root] }
    }

    /// Adds a node without a name.
    pub fn add(&mut self, node: Node) -> NodeId {
        self.nodes.push(node);
        NodeId(self.nodes.len() - 1)
    }

    /// Returns a node. Panics if `id` is of another tree.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0]
    }

    /// Returns a node for changing. Panics if `id` is of another tree.
    pub fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id.0]
    }

    /// Returns the number of nodes, those without a name included.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Returns false: there is always a root.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Returns the entries of a directory; `None` for anything else.
    pub fn children(&self, id: NodeId) -> Option<&BTreeMap<OsString, NodeId>> {
        match &self.node(id).kind {
            NodeKind::Directory(children) => Some(children),
            _ => None,
        }
    }

    /// Finds a path from the root; symbolic links are not followed, `..` finds nothing.
    pub fn find(&self, path: &Path) -> Option<NodeId> {
        let mut id = Self::ROOT;
        for component in path.components() {
            match component {
                Component::RootDir | Component::CurDir => {}
                Component::Normal(name) => id = *self.children(id)?.get(name)?,
                Component::ParentDir | Component::Prefix(_) => return None,
            }
        }
        Some(id)
    }

    /// Returns the nodes that prefetch patterns name, in their order.
    ///
    /// Patterns are absolute paths; relative ones, those below an earlier one, those that name nothing and
    /// empty files are passed over.
    pub fn prefetch<'p>(&self, patterns: impl IntoIterator<Item = &'p Path>) -> Vec<NodeId> {
        let mut taken: Vec<&Path> = Vec::new();
        let mut nodes = Vec::new();
        for pattern in patterns {
            if !pattern.is_absolute() || taken.iter().any(|earlier| pattern.starts_with(earlier)) {
                continue;
            }
            taken.push(pattern);
            let found = self.find(pattern);
            nodes.extend(found.filter(|&id| !matches!(self.node(id).kind, NodeKind::Regular { size: 0, .. })));
        }
        nodes
    }
}
