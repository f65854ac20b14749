//! The tree that the kernel sees: pseudo directories, and images mounted on them.
//!
//! The tree is an immutable `Table` behind a lock that is held for the time of one pointer's copy; a mount or
//! an unmount makes the next table. So a request sees one consistent tree from its beginning to its end, and an
//! image that is unmounted meanwhile lives until its last request is answered.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::sync::{Arc, PoisonError, RwLock};

use nydus_rafs::Ino;

use super::inodes::{MountIndex, NodeId, ROOT};
use crate::instance::Instance;

/// Why the tree cannot be changed so.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    /// Something is mounted there.
    #[error("object or filesystem already exists")]
    Exists,
    /// Nothing is mounted there.
    #[error("object or filesystem doesn't exist")]
    Missing,
    /// The path is not one.
    #[error("mountpoint `{0}` is not an absolute path without `.` and `..`")]
    Path(String),
    /// All mount numbers are taken.
    #[error("{} filesystems are mounted already", u16::MAX)]
    Full,
}

/// A name whose meaning changed, which the kernel has to be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changed {
    /// The directory.
    pub parent: NodeId,
    /// The name in it.
    pub name: OsString,
}

/// A pseudo directory.
#[derive(Debug, Clone, Default)]
pub(crate) struct Pseudo {
    pub(crate) parent: u64,
    pub(crate) name: OsString,
    pub(crate) children: BTreeMap<OsString, u64>,
    pub(crate) mount: Option<MountIndex>,
}

/// The tree at one moment.
#[derive(Debug, Clone)]
pub(crate) struct Table {
    nodes: HashMap<u64, Pseudo>,
    mounts: HashMap<MountIndex, Arc<Instance>>,
    next_node: u64,
    next_mount: u16,
}

/// What a node id stands for.
#[derive(Debug)]
pub(crate) enum Node<'a> {
    /// A pseudo directory.
    Pseudo(u64, &'a Pseudo),
    /// An inode of an image.
    Image(MountIndex, &'a Arc<Instance>, Ino),
}

impl Table {
    fn new() -> Self {
        Self {
            nodes: HashMap::from([(ROOT.0, Pseudo { parent: ROOT.0, ..Pseudo::default() })]),
            mounts: HashMap::new(),
            next_node: ROOT.0 + 1,
            next_mount: 1,
        }
    }

    /// Returns what `node` stands for; `None` if it was unmounted.
    pub(crate) fn node(&self, node: NodeId) -> Option<Node<'_>> {
        let mount = node.mount();
        if mount != MountIndex::PSEUDO {
            return self.mounts.get(&mount).map(|instance| Node::Image(mount, instance, node.ino()));
        }
        let pseudo = self.nodes.get(&node.0)?;
        match pseudo.mount {
            // Only the root is met as a pseudo node although it is covered.
            Some(index) if node == ROOT => {
                let instance = self.mounts.get(&index)?;
                Some(Node::Image(index, instance, instance.root()))
            }
            _ => Some(Node::Pseudo(node.0, pseudo)),
        }
    }

    /// Returns the node that the name of a pseudo directory leads to.
    pub(crate) fn child(&self, parent: &Pseudo, name: &OsStr) -> Option<NodeId> {
        parent.children.get(name).map(|&child| self.covered(child))
    }

    /// Returns the root of what is mounted on a pseudo directory, or the directory itself.
    pub(crate) fn covered(&self, node: u64) -> NodeId {
        let mount = self.nodes.get(&node).and_then(|pseudo| pseudo.mount);
        match mount.and_then(|index| Some((index, self.mounts.get(&index)?))) {
            Some((index, instance)) => NodeId::new(index, instance.root()),
            None => NodeId(node),
        }
    }

    fn find(&self, path: &[&OsStr]) -> Option<u64> {
        path.iter().try_fold(ROOT.0, |node, name| self.nodes.get(&node)?.children.get(*name).copied())
    }

    fn free_index(&mut self) -> Option<MountIndex> {
        for _ in 0..=u16::MAX {
            let index = MountIndex(self.next_mount);
            self.next_mount = self.next_mount.checked_add(1).unwrap_or(1);
            if index != MountIndex::PSEUDO && !self.mounts.contains_key(&index) {
                return Some(index);
            }
        }
        None
    }
}

/// The tree of one daemon. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Namespace(Arc<RwLock<Arc<Table>>>);

impl Default for Namespace {
    fn default() -> Self {
        Self(Arc::new(RwLock::new(Arc::new(Table::new()))))
    }
}

impl Namespace {
    /// Returns the tree as it is now.
    pub(crate) fn table(&self) -> Arc<Table> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns what is mounted at `path`.
    pub fn get(&self, path: &str) -> Option<Arc<Instance>> {
        let table = self.table();
        let index = table.nodes.get(&table.find(&components(path).ok()?)?)?.mount?;
        table.mounts.get(&index).cloned()
    }

    /// Returns all that is mounted.
    pub fn all(&self) -> Vec<Arc<Instance>> {
        let mut all: Vec<_> = self.table().mounts.values().cloned().collect();
        all.sort_by(|a, b| a.mountpoint().cmp(b.mountpoint()));
        all
    }

    /// Mounts `instance` at its mountpoint, making the directories on the way.
    pub fn mount(&self, instance: Arc<Instance>) -> Result<Vec<Changed>, TreeError> {
        let path = instance.mountpoint().to_owned();
        let path = components(&path)?;
        self.change(|table| {
            let mut node = ROOT.0;
            let mut changed = Vec::new();
            for name in &path {
                let known = table.nodes.get(&node).and_then(|pseudo| pseudo.children.get(*name)).copied();
                let child = match known {
                    Some(child) => child,
                    None => {
                        let child = table.next_node;
                        table.next_node += 1;
                        let pseudo = Pseudo { parent: node, name: (*name).to_owned(), ..Pseudo::default() };
                        table.nodes.insert(child, pseudo);
                        if let Some(parent) = table.nodes.get_mut(&node) {
                            parent.children.insert((*name).to_owned(), child);
                        }
                        child
                    }
                };
                changed = vec![Changed { parent: NodeId(node), name: (*name).to_owned() }];
                node = child;
            }
            if table.nodes.get(&node).is_some_and(|pseudo| pseudo.mount.is_some()) {
                return Err(TreeError::Exists);
            }
            let index = table.free_index().ok_or(TreeError::Full)?;
            table.mounts.insert(index, instance);
            if let Some(pseudo) = table.nodes.get_mut(&node) {
                pseudo.mount = Some(index);
            }
            Ok(changed)
        })
    }

    /// Puts `instance` in the place of what is mounted at its mountpoint, under the same node ids.
    pub fn replace(&self, instance: Arc<Instance>) -> Result<Arc<Instance>, TreeError> {
        let path = instance.mountpoint().to_owned();
        let path = components(&path)?;
        self.change(|table| {
            let node = table.find(&path).ok_or(TreeError::Missing)?;
            let index = table.nodes.get(&node).and_then(|pseudo| pseudo.mount).ok_or(TreeError::Missing)?;
            table.mounts.insert(index, instance).ok_or(TreeError::Missing)
        })
    }

    /// Unmounts what is mounted at `path`, and removes the directories that were only there for it.
    pub fn umount(&self, path: &str) -> Result<(Arc<Instance>, Vec<Changed>), TreeError> {
        let path = components(path)?;
        self.change(|table| {
            let mut node = table.find(&path).ok_or(TreeError::Missing)?;
            let index = table.nodes.get_mut(&node).and_then(|pseudo| pseudo.mount.take()).ok_or(TreeError::Missing)?;
            let instance = table.mounts.remove(&index).ok_or(TreeError::Missing)?;
            let mut changed = Vec::new();
            while node != ROOT.0 {
                let Some(pseudo) = table.nodes.get(&node).cloned() else { break };
                changed.push(Changed { parent: NodeId(pseudo.parent), name: pseudo.name.clone() });
                if pseudo.mount.is_some() || !pseudo.children.is_empty() {
                    break;
                }
                table.nodes.remove(&node);
                if let Some(parent) = table.nodes.get_mut(&pseudo.parent) {
                    parent.children.remove(&pseudo.name);
                }
                node = pseudo.parent;
            }
            Ok((instance, changed))
        })
    }

    fn change<T>(&self, change: impl FnOnce(&mut Table) -> Result<T, TreeError>) -> Result<T, TreeError> {
        let mut current = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let mut next = Table::clone(&current);
        let result = change(&mut next)?;
        *current = Arc::new(next);
        Ok(result)
    }
}

/// Splits a mountpoint; `/` has no components.
pub(crate) fn components(path: &str) -> Result<Vec<&OsStr>, TreeError> {
    let wrong = || TreeError::Path(path.to_owned());
    let rest = path.strip_prefix('/').ok_or_else(wrong)?;
    let names: Vec<_> = rest.split('/').filter(|name| !name.is_empty()).collect();
    if names.iter().any(|name| matches!(*name, "." | "..") || name.len() > 255 || name.contains('\0')) {
        return Err(wrong());
    }
    Ok(names.into_iter().map(OsStr::new).collect())
}
