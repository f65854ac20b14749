//! The EROFS tools and the kernel take what is written.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use nydus_rafs::{Bootstrap, Node, NodeKind, Stat, Tree};
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;

use crate::trees::{blobs, listing, options, to_bytes, trees};

/// A folder that goes away with the value.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("rafs-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).expect("a scratch folder");
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Writes image and empty blobs; returns their paths.
fn lay_out(dir: &Path, bytes: &[u8]) -> (PathBuf, Vec<PathBuf>) {
    let image = dir.join("image.boot");
    fs::write(&image, bytes).expect("the image");
    let mut devices = Vec::new();
    for (index, info) in blobs().0.iter().enumerate() {
        let path = dir.join(format!("blob{index}"));
        File::create(&path).expect("a blob").set_len(info.plain_size).expect("its size");
        devices.push(path);
    }
    (image, devices)
}

/// Trees as the kernel can show them: with times after 1970, owners that are not reserved, and without ACLs,
/// whose values it checks.
fn sample() -> Vec<Tree> {
    let mut runner = TestRunner::deterministic();
    (0..12)
        .map(|_| {
            let mut tree = trees().new_tree(&mut runner).expect("a tree").current();
            for index in 0..tree.len() {
                let node = tree.node_mut(nydus_rafs::NodeId(index));
                node.stat.mtime = node.stat.mtime.rem_euclid(1 << 33);
                (node.stat.uid, node.stat.gid) = (node.stat.uid >> 1, node.stat.gid >> 1);
                node.xattrs.retain(|name, _| !name.to_string_lossy().starts_with("system."));
                node.xattrs.retain(|_, value| value.len() < 3900);
            }
            tree
        })
        .collect()
}

#[test]
fn fsck_accepts_what_is_written() {
    if Command::new("fsck.erofs").arg("--version").output().is_err() {
        skip("fsck.erofs is not installed");
        return;
    }
    let scratch = Scratch::new("fsck");
    for tree in sample() {
        let (image, devices) = lay_out(&scratch.0, &to_bytes(&tree, &options()));
        let devices = devices.iter().map(|path| format!("--device={}", path.display()));
        let output = Command::new("fsck.erofs").args(devices).arg(&image).output().expect("it runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn the_kernel_shows_what_is_written() {
    let scratch = Scratch::new("mount");
    let at = scratch.0.join("mnt");
    fs::create_dir(&at).expect("a mount point");
    for tree in sample() {
        let bytes = to_bytes(&tree, &options());
        let image = scratch.0.join("disk");
        fs::write(&image, disk(&bytes)).expect("the image");
        let mount = Command::new("mount").args(["-t", "erofs", "-o", "ro,loop"]).arg(&image).arg(&at).output();
        match mount {
            Ok(output) if output.status.success() => {}
            Ok(output) => {
                return skip(&format!("EROFS cannot be mounted: {}", String::from_utf8_lossy(&output.stderr)));
            }
            Err(error) => return skip(&format!("mount(8) cannot be run: {error}")),
        }
        let seen = std::panic::catch_unwind(|| {
            let mut seen = BTreeMap::new();
            look(&at, PathBuf::new(), &mut seen);
            seen
        });
        let unmounted = Command::new("umount").arg(&at).status().expect("umount(8)");
        assert!(unmounted.success());
        let seen = seen.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let bootstrap = Bootstrap::open(&bytes[..]).expect("own bytes");
        let wanted = listing(&Tree::read(&bootstrap).expect("own bytes"));
        assert_eq!(seen.keys().collect::<Vec<_>>(), wanted.keys().collect::<Vec<_>>());
        for (path, (stat, kind)) in seen {
            let node = &wanted[&path];
            assert_eq!(stat, node.0, "{path:?}");
            let as_wanted = match (&node.2, &kind) {
                (None, Seen::Directory) => true,
                (Some(NodeKind::Regular { size, chunks }), Seen::File(content)) => {
                    let page = |at: usize| fill(chunks[at / 4096].blob, chunks[at / 4096].chunk);
                    content.len() as u64 == *size && content.iter().enumerate().all(|(at, &byte)| byte == page(at))
                }
                (Some(wanted), Seen::Other(seen)) => wanted == seen,
                _ => false,
            };
            assert!(as_wanted, "{path:?}: {kind:?} is not {:?}", node.2);
        }
    }
}

/// The byte that fills a chunk.
fn fill(blob: u16, chunk: nydus_rafs::ChunkIndex) -> u8 {
    blob as u8 ^ chunk.0 as u8 ^ 0xa5
}

/// An image with its blobs behind it, each where its device slot says: the kernel reads such a disk without
/// being given other devices.
fn disk(bytes: &[u8]) -> Vec<u8> {
    let mut disk = bytes.to_vec();
    let (_, tables) = blobs();
    for (index, table) in tables.iter().enumerate() {
        let slot = &bytes[1408 + 128 * index..];
        let word = |at: usize| u32::from_le_bytes(slot[at..at + 4].try_into().expect("4 bytes")) as usize * 4096;
        let (len, at) = (word(64), word(68));
        assert!(at >= disk.len());
        disk.resize(at + len, 0);
        for chunk in table.all() {
            let page = at + chunk.plain.start as usize;
            disk[page..page + 4096].fill(fill(index as u16, chunk.index));
        }
    }
    disk
}

/// What the kernel shows at a path.
#[derive(Debug)]
enum Seen {
    Directory,
    File(Vec<u8>),
    Other(NodeKind),
}

/// What the kernel says of every path.
fn look(base: &Path, path: PathBuf, seen: &mut BTreeMap<PathBuf, (Stat, Seen)>) {
    let full = base.join(&path);
    let meta = fs::symlink_metadata(&full).expect("attributes");
    let stat = Stat {
        permissions: (meta.mode() & 0o7777) as u16,
        uid: meta.uid(),
        gid: meta.gid(),
        mtime: meta.mtime(),
        mtime_nsec: meta.mtime_nsec() as u32,
        hidden_links: 0,
    };
    let kind = meta.file_type();
    // The device number as the image keeps it: 12 bits of major, 20 of minor.
    let (major, minor) = ((meta.rdev() >> 8 & 0xfff) as u32, (meta.rdev() & 0xff | meta.rdev() >> 12 & 0xfff00) as u32);
    let number = minor & 0xff | major << 8 | (minor & 0xfff00) << 12;
    let kind = if kind.is_dir() {
        for entry in fs::read_dir(&full).expect("entries") {
            look(base, path.join(entry.expect("an entry").file_name()), seen);
        }
        Seen::Directory
    } else if kind.is_symlink() {
        Seen::Other(NodeKind::Symlink(fs::read_link(&full).expect("a target").into_os_string()))
    } else if kind.is_fifo() {
        Seen::Other(NodeKind::Fifo)
    } else if kind.is_socket() {
        Seen::Other(NodeKind::Socket)
    } else if kind.is_char_device() {
        Seen::Other(NodeKind::CharDevice(number))
    } else if kind.is_block_device() {
        Seen::Other(NodeKind::BlockDevice(number))
    } else {
        Seen::File(fs::read(&full).expect("data"))
    };
    seen.insert(path, (stat, kind));
}

#[expect(clippy::print_stderr, reason = "whoever runs the tests must see what was not tested")]
fn skip(why: &str) {
    eprintln!("skipped: {why}");
}

/// Hard links of anything but directories are one inode to the kernel.
#[test]
fn hard_linked_symlinks_and_devices_are_one_inode() {
    let mut tree = Tree::new(Stat::default());
    for (name, kind) in
        [("s", NodeKind::Symlink("t".into())), ("d", NodeKind::CharDevice(0x103)), ("f", NodeKind::Fifo)]
    {
        let id = tree.add(Node { stat: Stat::default(), xattrs: BTreeMap::new(), kind, implied: false });
        let NodeKind::Directory(children) = &mut tree.node_mut(Tree::ROOT).kind else { panic!("a directory") };
        children.insert(name.into(), id);
        children.insert(format!("{name}2").into(), id);
    }
    let bytes = to_bytes(&tree, &options());
    let bootstrap = Bootstrap::open(&bytes[..]).expect("own bytes");
    for name in ["s", "d", "f"] {
        let find = |name: &str| bootstrap.lookup(bootstrap.root(), name.as_ref()).expect("own bytes").expect("a name");
        assert_eq!(find(name), find(&format!("{name}2")));
        assert_eq!(bootstrap.attr(find(name)).expect("own bytes").nlink, 2);
    }
}
