//! The EROFS tools and the kernel take what is written.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
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

/// Writes image and blobs; returns the image's path and the arguments that name the blobs as `prefix=path`.
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
        let (image, devices) = lay_out(&scratch.0, &bytes);
        let devices: String = devices.iter().map(|path| format!(",device={}", path.display())).collect();
        // By file and not by loop device where the kernel can: mount(8) makes loop devices for the image alone.
        let mount =
            Command::new("mount").args(["-t", "erofs", "-o"]).arg(format!("ro{devices}")).arg(&image).arg(&at).output();
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
        for (path, (stat, size, kind)) in seen {
            let node = &wanted[&path];
            assert_eq!(stat, node.0, "{path:?}");
            let as_wanted = match (&node.2, &kind) {
                (None, Some(NodeKind::Directory(_))) => true,
                (Some(NodeKind::Regular { size: wanted, .. }), Some(NodeKind::Regular { .. })) => *wanted == size,
                (Some(wanted), Some(seen)) => wanted == seen,
                _ => false,
            };
            assert!(as_wanted, "{path:?}: {kind:?} is not {:?}", node.2);
        }
    }
}

/// What the kernel says of every path.
fn look(base: &Path, path: PathBuf, seen: &mut BTreeMap<PathBuf, (Stat, u64, Option<NodeKind>)>) {
    let full = base.join(&path);
    let meta = fs::symlink_metadata(&full).expect("attributes");
    let stat = Stat {
        permissions: (meta.mode() & 0o7777) as u16,
        uid: meta.uid(),
        gid: meta.gid(),
        mtime: meta.mtime(),
        mtime_nsec: meta.mtime_nsec() as u32,
    };
    let kind = meta.file_type();
    // The device number as the image keeps it: 12 bits of major, 20 of minor.
    let (major, minor) = ((meta.rdev() >> 8 & 0xfff) as u32, (meta.rdev() & 0xff | meta.rdev() >> 12 & 0xfff00) as u32);
    let number = minor & 0xff | major << 8 | (minor & 0xfff00) << 12;
    let kind = if kind.is_dir() {
        for entry in fs::read_dir(&full).expect("entries") {
            look(base, path.join(entry.expect("an entry").file_name()), seen);
        }
        Some(NodeKind::Directory(BTreeMap::new()))
    } else if kind.is_symlink() {
        Some(NodeKind::Symlink(fs::read_link(&full).expect("a target").into_os_string()))
    } else if kind.is_fifo() {
        Some(NodeKind::Fifo)
    } else if kind.is_socket() {
        Some(NodeKind::Socket)
    } else if kind.is_char_device() {
        Some(NodeKind::CharDevice(number))
    } else if kind.is_block_device() {
        Some(NodeKind::BlockDevice(number))
    } else {
        // All blobs are zeros; that the addresses are right is the golden images' matter.
        let content = fs::read(&full).expect("data");
        assert!(content.iter().all(|&byte| byte == 0));
        Some(NodeKind::Regular { size: meta.len(), chunks: Vec::new() })
    };
    assert!(path.as_os_str().as_bytes().len() < 100_000);
    seen.insert(path, (stat, meta.len(), kind));
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
