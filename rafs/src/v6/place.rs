//! Gives every inode its place, by the rules that the established builder follows.
//!
//! Inodes lie in 32-byte slots one after the other. A directory or symbolic link keeps the last, incomplete
//! block of its data right behind its inode, if both fit into one block together; what such an inode leaves
//! of a block goes to a free list, from which later ones are served. The rules decide every nid, and a
//! bootstrap with other nids is another image to whoever compares digests: so they are followed to the letter.

use std::collections::VecDeque;
use std::ffi::OsStr;

use super::format::{CHUNK_BASED, FLAT_INLINE, FLAT_PLAIN, PAGE, SLOT};
use super::write::inode_size;
use crate::tree::{Node, NodeId, NodeKind, Tree};
use crate::write::{WriteError, check_name};

/// Where a node lies, were the inode area to begin at byte 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// Of the inode.
    pub(crate) at: u64,
    /// Of the whole blocks of its data; without whole blocks the place where they would be.
    pub(crate) blocks_at: u64,
    /// How its data lies.
    pub(crate) layout: u16,
    /// The number that the kernel shows as inode number.
    pub(crate) number: u32,
    /// The directory that names it (first).
    pub(crate) parent: NodeId,
}

impl Place {
    pub(crate) fn nid(&self) -> u64 {
        self.at / SLOT
    }
}

/// The places of all nodes of a tree.
#[derive(Debug)]
pub(crate) struct Places {
    /// By node; `None` for nodes without a name.
    pub(crate) by_node: Vec<Option<Place>>,
    /// Nodes in the order in which they were visited, once per name.
    pub(crate) visited: Vec<NodeId>,
    /// Number of names of each node.
    pub(crate) links: Vec<u32>,
    /// Where the inode area ends.
    pub(crate) end: u64,
}

impl Places {
    /// Visits a tree: each directory before its entries, its entries before theirs.
    pub(crate) fn assign(tree: &Tree, block: u64, chunk_size: u32) -> Result<Self, WriteError> {
        let mut space = Space::new(block);
        let mut places =
            Self { by_node: vec![None; tree.len()], visited: Vec::new(), links: vec![0; tree.len()], end: 0 };
        let mut directories = vec![(Tree::ROOT, Tree::ROOT, 1)];
        let mut counter = 1;
        places.visited.push(Tree::ROOT);
        places.links[Tree::ROOT.0] = 1;
        while let Some((id, parent, number)) = directories.pop() {
            let Some(children) = tree.children(id) else { return Err(WriteError::Root) };
            if places.by_node[id.0].is_some() {
                return Err(WriteError::DirectoryTwice(id));
            }
            let size = directory_size(children.keys().map(|name| name.as_os_str()), block);
            let (at, blocks_at, layout) = space.tailed(inode_size(tree.node(id))?, size);
            places.by_node[id.0] = Some(Place { at, blocks_at, layout, number, parent });
            let first_below = directories.len();
            for (name, &child) in children {
                check_name(name)?;
                counter += 1;
                if counter > 0x7fff_ffff {
                    return Err(WriteError::TooMany("inodes"));
                }
                places.visited.push(child);
                places.links[child.0] += 1;
                let node = tree.node(child);
                if let NodeKind::Directory(_) = node.kind {
                    directories.push((child, id, counter));
                } else if places.by_node[child.0].is_none() {
                    let (at, blocks_at, layout) = place(&mut space, node, chunk_size)?;
                    places.by_node[child.0] = Some(Place { at, blocks_at, layout, number: counter, parent: id });
                }
            }
            directories[first_below..].reverse();
        }
        places.end = space.at;
        Ok(places)
    }
}

/// Places anything but a directory.
fn place(space: &mut Space, node: &Node, chunk_size: u32) -> Result<(u64, u64, u16), WriteError> {
    let inode = inode_size(node)?;
    Ok(match &node.kind {
        NodeKind::Regular { size, .. } => {
            let list = size.div_ceil(u64::from(chunk_size)).saturating_mul(8);
            let at = space.take(inode.next_multiple_of(8).saturating_add(list));
            (at, at, CHUNK_BASED)
        }
        NodeKind::Symlink(target) => space.tailed(inode, target.len() as u64),
        _ => {
            let at = space.append(inode);
            (at, at, FLAT_PLAIN)
        }
    })
}

/// Returns the names of a directory with `.` and `..` where they belong.
pub(crate) fn with_dots<'a>(names: impl Iterator<Item = &'a OsStr>) -> Vec<&'a OsStr> {
    let mut all: Vec<&OsStr> = names.chain([OsStr::new("."), OsStr::new("..")]).collect();
    all.sort_unstable();
    all
}

fn directory_size<'a>(names: impl Iterator<Item = &'a OsStr>, block: u64) -> u64 {
    let mut size = 0;
    for name in with_dots(names) {
        let entry = 12 + name.len() as u64;
        if size % block + entry > block {
            size = size.next_multiple_of(block);
        }
        size += entry;
    }
    size
}

/// The inode area while it is filled.
struct Space {
    block: u64,
    at: u64,
    /// Blocks with free bytes at their end, by the number of free slots.
    free: Vec<VecDeque<u64>>,
}

impl Space {
    fn new(block: u64) -> Self {
        // The root takes nid 128: nid 0 would be hidden by readdir.
        Self { block, at: PAGE, free: vec![VecDeque::new(); (block / SLOT) as usize] }
    }

    /// Puts what is left of the block that holds `at` on the free list.
    fn release_rest(&mut self, at: u64) {
        let used = at % self.block;
        if used != 0 {
            self.free[((self.block - used) / SLOT) as usize].push_back(at - used);
        }
    }

    /// Takes `size` bytes from the free list.
    fn reuse(&mut self, size: u64) -> Option<u64> {
        if size >= self.block {
            return None;
        }
        let slots = size.div_ceil(SLOT);
        let found = (slots as usize..self.free.len()).find(|&free| !self.free[free].is_empty())?;
        let block = self.free[found].pop_front()?;
        let at = block + self.block - SLOT * found as u64;
        self.release_rest(at + SLOT * slots);
        Some(at)
    }

    fn append(&mut self, size: u64) -> u64 {
        let at = self.at;
        self.at = (at + size).next_multiple_of(SLOT);
        at
    }

    fn take(&mut self, size: u64) -> u64 {
        self.reuse(size).unwrap_or_else(|| self.append(size))
    }

    fn next_block(&mut self) {
        self.release_rest(self.at);
        self.at = self.at.next_multiple_of(self.block);
    }

    /// Places an inode of `inode` bytes with `size` bytes of data; returns where both lie, and the layout.
    fn tailed(&mut self, inode: u64, size: u64) -> (u64, u64, u16) {
        let tail = size % self.block;
        if tail != 0 && inode + tail <= self.block {
            let at = self.reuse(inode + tail).unwrap_or_else(|| {
                if self.block - self.at % self.block < inode + tail {
                    self.next_block();
                }
                let at = self.at;
                self.at += inode + tail;
                at
            });
            if size != tail {
                self.next_block();
            }
            let blocks_at = self.at;
            self.at = (self.at + size - tail).next_multiple_of(SLOT);
            (at, blocks_at, FLAT_INLINE)
        } else {
            let at = self.reuse(inode).unwrap_or_else(|| {
                let at = self.at;
                self.at += inode;
                at
            });
            self.next_block();
            let blocks_at = self.at;
            self.at = (self.at + size).next_multiple_of(self.block);
            (at, blocks_at, FLAT_PLAIN)
        }
    }
}
