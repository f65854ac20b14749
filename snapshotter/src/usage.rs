//! How much disk a directory uses.
//!
//! Counted as containerd counts: allocated blocks, each inode once however many names it has.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Disk space and inodes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Bytes allocated.
    pub size: u64,
    /// Distinct inodes, the directory itself included.
    pub inodes: u64,
}

impl std::ops::AddAssign for Usage {
    fn add_assign(&mut self, other: Self) {
        self.size += other.size;
        self.inodes += other.inodes;
    }
}

/// Walks `root` and adds up what it uses. What vanishes meanwhile is not counted.
///
/// # Errors
/// When a directory cannot be read.
pub fn of(root: &Path) -> io::Result<Usage> {
    let mut usage = Usage::default();
    let mut seen = HashSet::new();
    let mut waiting: Vec<PathBuf> = vec![root.to_path_buf()];
    while let Some(path) = waiting.pop() {
        let Some(found) = present(fs::symlink_metadata(&path))? else { continue };
        if seen.insert((found.dev(), found.ino())) {
            usage.inodes += 1;
            usage.size += found.blocks() * 512;
        }
        if found.is_dir() {
            let Some(entries) = present(fs::read_dir(&path))? else { continue };
            for entry in entries {
                waiting.push(entry?.path());
            }
        }
    }
    Ok(usage)
}

fn present<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_with_two_names_counts_once() {
        let dir = tempfile::tempdir().expect("a directory");
        let one = dir.path().join("one");
        fs::write(&one, vec![7; 100_000]).expect("written");
        let before = of(dir.path()).expect("walked");
        fs::hard_link(&one, dir.path().join("two")).expect("linked");
        let after = of(dir.path()).expect("walked");
        assert_eq!(after, before);
        assert!(after.size >= 100_000);
        assert_eq!(after.inodes, 2);
    }

    #[test]
    fn a_link_is_counted_and_not_followed() {
        let dir = tempfile::tempdir().expect("a directory");
        std::os::unix::fs::symlink("/", dir.path().join("root")).expect("linked");
        assert_eq!(of(dir.path()).expect("walked").inodes, 2);
    }

    #[test]
    fn what_is_not_there_uses_nothing() {
        assert_eq!(of(Path::new("/nonexistent/x")).expect("nothing to walk"), Usage::default());
    }
}
