//! What the kernel is told of an inode.

use fuse_backend_rs::abi::fuse_abi::{self as abi, stat64};
use nydus_rafs::{Attr, Kind};

use crate::fuse::inodes::NodeId;
use crate::instance::Instance;

/// Describes an inode of an image.
pub(super) fn stat_of(instance: &Instance, node: NodeId, attr: &Attr) -> stat64 {
    // The image knows one time; all three are shown as that, as an unpacked layer would nearly have it.
    let seconds = attr.mtime.cast_unsigned();
    abi::Attr {
        ino: node.0,
        size: attr.size,
        blocks: attr.size.div_ceil(512),
        atime: seconds,
        mtime: seconds,
        ctime: seconds,
        atimensec: attr.mtime_nsec,
        mtimensec: attr.mtime_nsec,
        ctimensec: attr.mtime_nsec,
        mode: attr.kind.mode() | u32::from(attr.permissions),
        nlink: attr.nlink,
        uid: attr.uid.unwrap_or(instance.owner().0),
        gid: attr.gid.unwrap_or(instance.owner().1),
        rdev: attr.rdev,
        blksize: 4096,
        flags: 0,
    }
    .into()
}

/// Describes a directory of the pseudo tree.
pub(super) fn pseudo_stat(number: u64) -> stat64 {
    abi::Attr { ino: number, mode: Kind::Directory.mode() | 0o755, nlink: 2, blksize: 4096, ..abi::Attr::default() }
        .into()
}
