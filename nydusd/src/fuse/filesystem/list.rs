//! Directories, entry by entry: of images, and of the pseudo tree above them.

use std::io;
use std::os::unix::ffi::OsStrExt;

use fuse_backend_rs::api::filesystem::DirEntry;
use nydus_rafs::Kind;

use super::Filesystem;
use crate::fuse::errno::FsError;
use crate::fuse::inodes::NodeId;
use crate::fuse::namespace::Node;
use crate::metrics::Op;

impl Filesystem {
    /// Lists a directory from `from` on; `add` returns whether there was room.
    pub(super) fn list(
        &self,
        op: Op,
        node: u64,
        from: u64,
        mut add: impl FnMut(DirEntry<'_>, NodeId) -> io::Result<bool>,
    ) -> io::Result<()> {
        let mut add = |entry: DirEntry<'_>, node| add(entry, node).map_err(FsError::Reply);
        let add = std::cell::RefCell::new(&mut add);
        self.image(
            op,
            node,
            |instance, mount, ino| {
                for (position, entry) in (from..).zip(instance.bootstrap().entries(ino, from)?) {
                    let entry = entry?;
                    let id = NodeId::new(mount, entry.ino);
                    let listed = DirEntry {
                        ino: id.0,
                        offset: position + 1,
                        type_: directory_type(entry.kind),
                        name: entry.name.as_bytes(),
                    };
                    if !(add.borrow_mut())(listed, id)? {
                        break;
                    }
                }
                Ok(())
            },
            |table, number| {
                let Some(Node::Pseudo(_, pseudo)) = table.node(NodeId(number)) else {
                    return Err(FsError::NoEntry);
                };
                let from = usize::try_from(from).unwrap_or(usize::MAX);
                for (position, (name, &child)) in pseudo.children.iter().enumerate().skip(from) {
                    let id = table.covered(child);
                    let listed = DirEntry {
                        ino: id.0,
                        offset: position as u64 + 1,
                        type_: directory_type(Kind::Directory),
                        name: name.as_bytes(),
                    };
                    if !(add.borrow_mut())(listed, id)? {
                        break;
                    }
                }
                Ok(())
            },
        )
    }
}

/// Returns the type in a directory entry: the upper bits of the mode, as `d_type` has them.
fn directory_type(kind: Kind) -> u32 {
    kind.mode() >> 12
}
