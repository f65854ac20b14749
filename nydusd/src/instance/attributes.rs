//! Whether an image has extended attributes at all.
//!
//! Overlayfs asks for one per file and directory that it meets, and the kernel remembers no "there is none": on a walk
//! these questions outnumber all others by five to one. Only the answer "never ask again" stops them, and it may
//! be given only where no inode has any. The flag in the superblock does not say so: merged images set it without need.

use nydus_rafs::{Bootstrap, FormatError, Ino, Kind};

/// Most inodes that are looked at: some 30 ms. Images of more are taken to have attributes.
const MOST: usize = 100_000;

/// Returns whether any inode may have extended attributes; damage counts as yes.
pub(super) fn any(bootstrap: &Bootstrap<Vec<u8>>) -> bool {
    search(bootstrap).unwrap_or(true)
}

fn search(bootstrap: &Bootstrap<Vec<u8>>) -> Result<bool, FormatError> {
    let mut left = MOST;
    let mut directories = vec![bootstrap.root()];
    let has = |ino: Ino| bootstrap.xattrs(ino).map(|found| !found.is_empty());
    if has(bootstrap.root())? {
        return Ok(true);
    }
    while let Some(directory) = directories.pop() {
        for entry in bootstrap.entries(directory, 0)? {
            let entry = entry?;
            if entry.name == "." || entry.name == ".." {
                continue;
            }
            // Also what ends a walk in circles.
            let Some(rest) = left.checked_sub(1) else { return Ok(true) };
            left = rest;
            if has(entry.ino)? {
                return Ok(true);
            }
            if entry.kind == Kind::Directory {
                directories.push(entry.ino);
            }
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use nydus_rafs::{Node, NodeKind, Stat, Tree, write};

    use super::*;

    /// A bootstrap of `/directory/file` that claims to have attributes; only the file may.
    fn bootstrap(xattrs: &[(&str, &[u8])]) -> Bootstrap<Vec<u8>> {
        let node = |kind| Node { stat: Stat::default(), xattrs: BTreeMap::new(), kind, implied: false };
        let mut tree = Tree::new(Stat::default());
        let mut file = node(NodeKind::Regular { size: 0, chunks: nydus_rafs::tree::ChunkList::new() });
        file.xattrs = xattrs.iter().map(|(name, value)| ((*name).into(), value.to_vec())).collect();
        let file = tree.add(file);
        let directory = tree.add(node(NodeKind::Directory([("file".into(), file)].into())));
        tree.node_mut(Tree::ROOT).kind = NodeKind::Directory([("directory".into(), directory)].into());
        let options = write::Options { claim_xattrs: true, ..write::Options::default() };
        Bootstrap::open(write::write::<nydus_rafs::ChunkTable>(&tree, &[], &[], &options).unwrap()).unwrap()
    }

    #[test]
    fn the_inodes_are_believed_and_not_the_flag() {
        let (without, with) = (bootstrap(&[]), bootstrap(&[("security.capability", b"value")]));
        assert!(without.has_xattrs() && with.has_xattrs(), "both claim it");
        assert!(!any(&without));
        assert!(any(&with));
    }
}
