//! A file tree as a table that can be compared: path to everything `stat` and `read` tell.
//!
//! Left out on purpose: atime, ctime, inode numbers, blocks, and the size and nlink of directories, which
//! differ between file systems without anybody being wrong.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nydus_rafs::Digest;
use serde_json::Value;
use sha2::{Digest as _, Sha256};

/// What one path is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Type letter as `find -printf %y` gives it.
    pub kind: char,
    /// Permission bits with set-uid, set-gid and sticky.
    pub permissions: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time: seconds and nanoseconds.
    pub mtime: (i64, i64),
    /// Number of names, of anything but directories.
    pub nlink: Option<u64>,
    /// Size, of regular files and symbolic links.
    pub size: Option<u64>,
    /// Device number, of devices.
    pub rdev: Option<u64>,
    /// SHA-256 of the content, of regular files.
    pub content: Option<Digest>,
    /// Target, of symbolic links.
    pub target: Option<Vec<u8>>,
    /// Extended attributes.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// All paths of a tree, relative to its root (the root itself is empty).
pub type Table = BTreeMap<PathBuf, Record>;

/// Reads the tree at `root`, all contents included.
pub fn read(root: &Path) -> io::Result<Table> {
    walk(root, false)
}

/// Reads an overlay mount. It lists whiteouts in directories that only one layer has, though they are not there.
pub fn read_overlay(root: &Path) -> io::Result<Table> {
    walk(root, true)
}

fn walk(root: &Path, listed_may_lack: bool) -> io::Result<Table> {
    let mut table = Table::new();
    let mut open = vec![PathBuf::new()];
    while let Some(relative) = open.pop() {
        let path = root.join(&relative);
        let record = match record(&path) {
            Err(error) if listed_may_lack && error.kind() == io::ErrorKind::NotFound => continue,
            record => record?,
        };
        if record.kind == 'd' {
            for entry in fs::read_dir(&path)? {
                open.push(relative.join(entry?.file_name()));
            }
        }
        table.insert(relative, record);
    }
    Ok(table)
}

fn record(path: &Path) -> io::Result<Record> {
    let meta = fs::symlink_metadata(path)?;
    let kind = meta.file_type();
    let letter = if kind.is_file() {
        'f'
    } else if kind.is_dir() {
        'd'
    } else if kind.is_symlink() {
        'l'
    } else if kind.is_char_device() {
        'c'
    } else if kind.is_block_device() {
        'b'
    } else if kind.is_fifo() {
        'p'
    } else {
        's'
    };
    let mut xattrs = BTreeMap::new();
    for name in xattr::list(path)? {
        if let Some(value) = xattr::get(path, &name)? {
            xattrs.insert(name.as_bytes().to_vec(), value);
        }
    }
    Ok(Record {
        kind: letter,
        permissions: meta.mode() & 0o7777,
        uid: meta.uid(),
        gid: meta.gid(),
        mtime: (meta.mtime(), meta.mtime_nsec()),
        nlink: (letter != 'd').then(|| meta.nlink()),
        size: matches!(letter, 'f' | 'l').then(|| meta.size()),
        rdev: matches!(letter, 'b' | 'c').then(|| meta.rdev()),
        content: if letter == 'f' { Some(content(path)?) } else { None },
        target: if letter == 'l' { Some(fs::read_link(path)?.into_os_string().into_vec()) } else { None },
        xattrs,
    })
}

fn content(path: &Path) -> io::Result<Digest> {
    let mut file = fs::File::open(path)?;
    let mut hash = Sha256::new();
    let mut piece = vec![0; 128 << 10];
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(Digest(hash.finalize().into())),
            len => hash.update(&piece[..len]),
        }
    }
}

/// Reads a table from lines as `manifest.py` prints them.
pub fn from_manifest(lines: &str) -> Result<Table> {
    lines.lines().map(from_line).collect()
}

fn from_line(line: &str) -> Result<(PathBuf, Record)> {
    let line: Value = serde_json::from_str(line)?;
    let text = |key: &str| line[key].as_str().with_context(|| format!("no {key} in {line}"));
    let number = |key: &str| line[key].as_i64().with_context(|| format!("no {key} in {line}"));
    let kind = match text("type")? {
        "reg" => 'f',
        "dir" => 'd',
        "symlink" => 'l',
        "chr" => 'c',
        "blk" => 'b',
        "fifo" => 'p',
        _ => 's',
    };
    let mut xattrs = BTreeMap::new();
    for (name, value) in line["xattrs"].as_object().into_iter().flatten() {
        xattrs.insert(name.clone().into_bytes(), hex::decode(value.as_str().context("a value is text")?)?);
    }
    let path = PathBuf::from(OsString::from_vec(hex::decode(text("path_hex")?)?));
    let record = Record {
        kind,
        permissions: u32::from_str_radix(text("mode")?, 8)?,
        uid: u32::try_from(number("uid")?)?,
        gid: u32::try_from(number("gid")?)?,
        mtime: (number("mtime")?, number("mtime_nsec")?),
        nlink: if kind == 'd' { None } else { Some(u64::try_from(number("nlink")?)?) },
        size: line["size"].as_u64(),
        rdev: match (line["rdev"][0].as_u64(), line["rdev"][1].as_u64()) {
            (Some(major), Some(minor)) => Some(nix::sys::stat::makedev(major, minor)),
            _ => None,
        },
        content: line["sha256"].as_str().map(str::parse).transpose()?,
        target: line["target_hex"].as_str().map(hex::decode).transpose()?,
        xattrs,
    };
    Ok((path, record))
}

/// Returns one line for every difference between two tables, `ignore` deciding what is left out.
pub fn differences(got: &Table, want: &Table, mut ignore: impl FnMut(&Path, &mut Record, &mut Record)) -> Vec<String> {
    let mut lines = Vec::new();
    for path in got.keys().filter(|path| !want.contains_key(*path)) {
        lines.push(format!("/{} should not be there", path.display()));
    }
    for (path, wanted) in want {
        let Some(found) = got.get(path) else {
            lines.push(format!("/{} is missing", path.display()));
            continue;
        };
        let (mut found, mut wanted) = (found.clone(), wanted.clone());
        ignore(path, &mut found, &mut wanted);
        if found != wanted {
            lines.push(format!("/{} is {found:?}, should be {wanted:?}", path.display()));
        }
    }
    lines
}
