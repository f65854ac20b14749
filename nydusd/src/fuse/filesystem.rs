//! Answers the kernel's requests from the images of the [`Namespace`].
//!
//! Images never change, so whatever is said about them may be cached for ever, absent names included. Pseudo
//! directories change with each mount: nothing is cached about them but that an image is mounted there, and that is
//! revoked at unmount.

use std::ffi::{CStr, OsStr};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fuse_backend_rs::abi::fuse_abi::{CreateIn, FsOptions, OpenOptions, SetattrValid, stat64, statvfs64};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, GetxattrReply, ListxattrReply, ZeroCopyReader, ZeroCopyWriter,
};
use nydus_rafs::Ino;
use tokio::runtime::Handle;

use super::errno::FsError;
use super::inodes::{MountIndex, NodeId, ROOT};
use super::namespace::{Namespace, Node, Table};
use super::slot::Slot;
use crate::instance::Instance;
use crate::metrics::Op;
use crate::sys::reply::empty_statvfs;

mod list;
mod read;
mod stat;

use stat::{pseudo_stat, stat_of};

/// For ever, as long as the kernel understands it (the value of the program we replace).
const FOREVER: Duration = Duration::from_secs(1 << 32);

/// How a session treats its mounts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// One image, mounted before the kernel saw anything, for the life of the session.
    Single,
    /// Images come and go.
    Shared,
}

/// What one serving thread answers with.
pub(super) struct Filesystem {
    pub(super) namespace: Namespace,
    pub(super) runtime: Handle,
    pub(super) mode: Mode,
    pub(super) slot: Arc<Slot>,
}

impl Filesystem {
    /// Runs `answer` on the image that `node` belongs to, and counts the call; a pseudo directory is answered by `pseudo`.
    fn image<T>(
        &self,
        op: Op,
        node: u64,
        answer: impl FnOnce(&Instance, MountIndex, Ino) -> Result<T, FsError>,
        pseudo: impl FnOnce(&Table, u64) -> Result<T, FsError>,
    ) -> io::Result<T> {
        let table = self.namespace.table();
        match table.node(NodeId(node)) {
            Some(Node::Image(mount, instance, ino)) => {
                let began = Instant::now();
                let result = answer(instance, mount, ino);
                instance.counters().call(op, ino, result.is_ok(), began.elapsed());
                Ok(result?)
            }
            Some(Node::Pseudo(number, _)) => Ok(pseudo(&table, number)?),
            None => Err(FsError::Unmounted.into()),
        }
    }

    fn entry(&self, instance: &Instance, mount: MountIndex, ino: Ino) -> Result<Entry, FsError> {
        let attr = instance.bootstrap().attr(ino)?;
        Ok(Entry {
            inode: NodeId::new(mount, ino).0,
            generation: 0,
            attr: stat_of(instance, NodeId::new(mount, ino), &attr),
            attr_flags: 0,
            attr_timeout: FOREVER,
            entry_timeout: FOREVER,
        })
    }

    /// Describes what a node of the pseudo tree leads to.
    fn pseudo_entry(&self, table: &Table, node: NodeId) -> Result<Entry, FsError> {
        match table.node(node) {
            Some(Node::Image(mount, instance, ino)) => self.entry(instance, mount, ino),
            Some(Node::Pseudo(..)) => Ok(Entry {
                inode: node.0,
                attr: pseudo_stat(node.0),
                attr_timeout: Duration::ZERO,
                entry_timeout: Duration::ZERO,
                ..Entry::default()
            }),
            None => Err(FsError::NoEntry),
        }
    }
}

impl FileSystem for Filesystem {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, _capable: FsOptions) -> io::Result<FsOptions> {
        // Not ASYNC_DIO: a direct reader then waits where no signal reaches it, until its deadline.
        let wanted = FsOptions::ASYNC_READ
            | FsOptions::PARALLEL_DIROPS
            | FsOptions::BIG_WRITES
            | FsOptions::ATOMIC_O_TRUNC
            | FsOptions::MAX_PAGES
            | FsOptions::CACHE_SYMLINKS
            | FsOptions::DO_READDIRPLUS
            | FsOptions::READDIRPLUS_AUTO
            | FsOptions::EXPLICIT_INVAL_DATA
            | FsOptions::ZERO_MESSAGE_OPEN
            | FsOptions::ZERO_MESSAGE_OPENDIR
            | FsOptions::INIT_EXT
            | FsOptions::HAS_RESEND;
        Ok(wanted)
    }

    fn lookup(&self, _ctx: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        let name = OsStr::from_bytes(name.to_bytes());
        self.image(
            Op::Lookup,
            parent,
            |instance, mount, dir| match instance.bootstrap().lookup(dir, name)? {
                Some(ino) => self.entry(instance, mount, ino),
                // Node 0: the name is absent, and stays so.
                None => Ok(Entry { entry_timeout: FOREVER, ..Entry::default() }),
            },
            |table, number| match table.node(NodeId(number)) {
                Some(Node::Pseudo(_, pseudo)) => {
                    let child = table.child(pseudo, name).ok_or(FsError::NoEntry)?;
                    self.pseudo_entry(table, child)
                }
                _ => Err(FsError::NoEntry),
            },
        )
    }

    fn getattr(&self, _ctx: &Context, node: u64, _handle: Option<u64>) -> io::Result<(stat64, Duration)> {
        self.image(
            Op::Getattr,
            node,
            |instance, mount, ino| {
                let attr = instance.bootstrap().attr(ino)?;
                // An image at `/` shows itself under node 1, where it may be replaced.
                let timeout = if node == ROOT.0 && self.mode == Mode::Shared { Duration::ZERO } else { FOREVER };
                Ok((stat_of(instance, NodeId::new(mount, ino), &attr), timeout))
            },
            |_, number| Ok((pseudo_stat(number), Duration::ZERO)),
        )
    }

    fn readlink(&self, _ctx: &Context, node: u64) -> io::Result<Vec<u8>> {
        self.image(
            Op::Readlink,
            node,
            |instance, _, ino| Ok(instance.bootstrap().readlink(ino)?.as_encoded_bytes().to_vec()),
            |_, _| Err(FsError::NoEntry),
        )
    }

    fn open(
        &self,
        _ctx: &Context,
        _node: u64,
        _flags: u32,
        _fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        // There is nothing to do for an open file, and the kernel never asks again.
        Err(FsError::NotSupported.into())
    }

    fn opendir(&self, _ctx: &Context, node: u64, _flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        if self.mode == Mode::Single {
            return Err(FsError::NotSupported.into());
        }
        self.image(
            Op::Opendir,
            node,
            |_, _, _| Ok((None, OpenOptions::KEEP_CACHE | OpenOptions::CACHE_DIR)),
            // The listing of a pseudo directory changes with each mount.
            |_, _| Ok((None, OpenOptions::empty())),
        )
    }

    fn read(
        &self,
        _ctx: &Context,
        node: u64,
        _handle: u64,
        reply: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _lock_owner: Option<u64>,
        _flags: u32,
    ) -> io::Result<usize> {
        let began = Instant::now();
        self.image(
            Op::Read,
            node,
            |instance, _, ino| {
                let end = offset.saturating_add(u64::from(size)).min(instance.bootstrap().attr(ino)?.size);
                if offset >= end {
                    return Ok(0);
                }
                let result = self.copy(instance, ino, offset..end, reply);
                match &result {
                    Ok(bytes) => instance.counters().read(ino, *bytes as u64, began.elapsed()),
                    Err(FsError::Interrupted) => {}
                    Err(error) => {
                        let mountpoint = instance.mountpoint();
                        instance.events().push(&error.to_string());
                        if error.is_logged() {
                            tracing::debug!(mountpoint, ino = ino.0, offset, size, %error, "a read failed");
                        } else {
                            tracing::error!(mountpoint, ino = ino.0, offset, size, %error, "a read failed");
                        }
                    }
                }
                result
            },
            |_, _| Err(FsError::NoEntry),
        )
    }

    fn statfs(&self, _ctx: &Context, node: u64) -> io::Result<statvfs64> {
        let mut answer = empty_statvfs();
        answer.f_namemax = 255;
        answer.f_bsize = 512;
        answer.f_frsize = 512;
        self.image(
            Op::Statfs,
            node,
            |instance, _, _| {
                answer.f_files = instance.bootstrap().inode_count();
                Ok(())
            },
            |_, _| Ok(()),
        )?;
        Ok(answer)
    }

    fn getxattr(&self, _ctx: &Context, node: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        self.image(
            Op::Getxattr,
            node,
            |instance, _, ino| {
                self.xattrs_on(instance, FsError::NoAttribute)?;
                if self.mode == Mode::Single && !instance.any_xattrs() {
                    return Err(FsError::NotSupported);
                }
                let attributes = instance.bootstrap().xattrs(ino)?;
                let found = attributes.into_iter().find(|(key, _)| key.as_bytes() == name.to_bytes());
                let (_, value) = found.ok_or(FsError::NoAttribute)?;
                match (size, u32::try_from(value.len()).map_err(|_| FsError::Range)?) {
                    // The exact size: what a caller allocates and asks for again.
                    (0, len) => Ok(GetxattrReply::Count(len)),
                    (room, len) if room < len => Err(FsError::Range),
                    _ => Ok(GetxattrReply::Value(value)),
                }
            },
            |_, _| Err(FsError::NoAttribute),
        )
    }

    fn listxattr(&self, _ctx: &Context, node: u64, size: u32) -> io::Result<ListxattrReply> {
        let names = self.image(
            Op::Listxattr,
            node,
            |instance, _, ino| {
                if self.mode == Mode::Shared && !instance.xattrs() {
                    return Ok(Vec::new());
                }
                self.xattrs_on(instance, FsError::NotSupported)?;
                let mut names = Vec::new();
                for (name, _) in instance.bootstrap().xattrs(ino)? {
                    names.extend_from_slice(name.as_bytes());
                    names.push(0);
                }
                Ok(names)
            },
            |_, _| Ok(Vec::new()),
        )?;
        match (size, u32::try_from(names.len()).map_err(|_| FsError::Range)?) {
            (0, len) => Ok(ListxattrReply::Count(len)),
            (room, len) if room < len => Err(FsError::Range.into()),
            _ => Ok(ListxattrReply::Names(names)),
        }
    }

    fn readdir(
        &self,
        _ctx: &Context,
        node: u64,
        _handle: u64,
        _size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        self.list(Op::Readdir, node, offset, |entry, _| Ok(add_entry(entry)? > 0))
    }

    fn readdirplus(
        &self,
        _ctx: &Context,
        node: u64,
        _handle: u64,
        _size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let table = self.namespace.table();
        self.list(Op::Readdirplus, node, offset, |entry, id| {
            // `.` and `..` have no attributes of their own here: the kernel knows them already.
            let described = match entry.name {
                b"." | b".." => Entry::default(),
                _ => self.pseudo_entry(&table, id)?,
            };
            Ok(add_entry(entry, described)? > 0)
        })
    }

    fn releasedir(&self, _ctx: &Context, _node: u64, _flags: u32, _handle: u64) -> io::Result<()> {
        Ok(())
    }

    fn release(
        &self,
        _ctx: &Context,
        _node: u64,
        _flags: u32,
        _handle: u64,
        _flush: bool,
        _flock_release: bool,
        _lock_owner: Option<u64>,
    ) -> io::Result<()> {
        Ok(())
    }

    fn fsync(&self, _ctx: &Context, _node: u64, _datasync: bool, _handle: u64) -> io::Result<()> {
        Ok(())
    }

    fn fsyncdir(&self, _ctx: &Context, _node: u64, _datasync: bool, _handle: u64) -> io::Result<()> {
        Ok(())
    }

    // The kernel keeps writers away from a read-only mount; these answers are for whoever remounts it.

    fn setattr(
        &self,
        _ctx: &Context,
        _node: u64,
        _attr: stat64,
        _handle: Option<u64>,
        _valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        Err(FsError::ReadOnly.into())
    }

    fn symlink(&self, _ctx: &Context, _target: &CStr, _parent: u64, _name: &CStr) -> io::Result<Entry> {
        Err(FsError::ReadOnly.into())
    }

    fn mknod(
        &self,
        _ctx: &Context,
        _parent: u64,
        _name: &CStr,
        _mode: u32,
        _rdev: u32,
        _umask: u32,
    ) -> io::Result<Entry> {
        Err(FsError::ReadOnly.into())
    }

    fn mkdir(&self, _ctx: &Context, _parent: u64, _name: &CStr, _mode: u32, _umask: u32) -> io::Result<Entry> {
        Err(FsError::ReadOnly.into())
    }

    fn unlink(&self, _ctx: &Context, _parent: u64, _name: &CStr) -> io::Result<()> {
        Err(FsError::ReadOnly.into())
    }

    fn rmdir(&self, _ctx: &Context, _parent: u64, _name: &CStr) -> io::Result<()> {
        Err(FsError::ReadOnly.into())
    }

    fn rename(&self, _ctx: &Context, _from: u64, _old: &CStr, _to: u64, _new: &CStr, _flags: u32) -> io::Result<()> {
        Err(FsError::ReadOnly.into())
    }

    fn link(&self, _ctx: &Context, _node: u64, _parent: u64, _name: &CStr) -> io::Result<Entry> {
        Err(FsError::ReadOnly.into())
    }

    fn create(
        &self,
        _ctx: &Context,
        _parent: u64,
        _name: &CStr,
        _args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        Err(FsError::ReadOnly.into())
    }

    fn write(
        &self,
        _ctx: &Context,
        _node: u64,
        _handle: u64,
        _data: &mut dyn ZeroCopyReader,
        _size: u32,
        _offset: u64,
        _lock_owner: Option<u64>,
        _delayed: bool,
        _flags: u32,
        _fuse_flags: u32,
    ) -> io::Result<usize> {
        Err(FsError::ReadOnly.into())
    }

    fn fallocate(
        &self,
        _ctx: &Context,
        _node: u64,
        _handle: u64,
        _mode: u32,
        _offset: u64,
        _length: u64,
    ) -> io::Result<()> {
        Err(FsError::ReadOnly.into())
    }

    fn setxattr(&self, _ctx: &Context, _node: u64, _name: &CStr, _value: &[u8], _flags: u32) -> io::Result<()> {
        Err(FsError::ReadOnly.into())
    }

    fn removexattr(&self, _ctx: &Context, _node: u64, _name: &CStr) -> io::Result<()> {
        Err(FsError::ReadOnly.into())
    }
}

impl Filesystem {
    /// Fails if the image has no extended attributes to show. Where it is the only one the kernel is told not to
    /// ask again, which saves overlayfs a question per file; among others it just has none.
    fn xattrs_on(&self, instance: &Instance, shared: FsError) -> Result<(), FsError> {
        match (instance.xattrs(), self.mode) {
            (true, _) => Ok(()),
            (false, Mode::Single) => Err(FsError::NotSupported),
            (false, Mode::Shared) => Err(shared),
        }
    }
}
