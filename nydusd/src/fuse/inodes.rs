//! Node ids: one number space for all images of a daemon.
//!
//! The upper 16 bits say which mount, the lower 48 which inode of its image. Mount 0 is the tree of pseudo
//! directories in which images are mounted; its root is node 1, as FUSE demands. An image mounted at `/` takes the place of
//! that root: node 1 then stands for the image's root.

use nydus_rafs::Ino;

const INO_BITS: u32 = 48;

/// Node 1: the root of what the kernel sees.
pub const ROOT: NodeId = NodeId(1);

/// Which mount of the daemon; 0 for pseudo directories.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MountIndex(pub u16);

impl MountIndex {
    /// The tree of pseudo directories.
    pub const PSEUDO: Self = Self(0);
}

/// A node as the kernel names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NodeId(pub u64);

impl NodeId {
    /// Composes the id of an image's inode (which has at most 48 bits; more are cut off).
    pub fn new(mount: MountIndex, ino: Ino) -> Self {
        Self(u64::from(mount.0) << INO_BITS | (ino.0 & ((1 << INO_BITS) - 1)))
    }

    /// Returns the mount.
    pub fn mount(self) -> MountIndex {
        // 64 - 48 bits remain.
        MountIndex((self.0 >> INO_BITS) as u16)
    }

    /// Returns the inode in the mount's image.
    pub fn ino(self) -> Ino {
        Ino(self.0 & ((1 << INO_BITS) - 1))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_node_id_gives_back_its_parts(mount: u16, ino in 0..1u64 << INO_BITS) {
            let node = NodeId::new(MountIndex(mount), Ino(ino));
            prop_assert_eq!((node.mount(), node.ino()), (MountIndex(mount), Ino(ino)));
        }
    }
}
