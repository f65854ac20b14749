//! A folder of one's own, with everything that was mounted below it taken down at the end.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};

/// A temporary folder. Paths are short, because unix sockets lie in it.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
}

impl Scratch {
    /// Makes a folder below `/tmp`.
    pub fn new(purpose: &str) -> io::Result<Self> {
        let dir = tempfile::Builder::new().prefix(&format!("shoal-{purpose}-")).tempdir_in("/tmp")?;
        Ok(Self { path: dir.keep() })
    }

    /// Returns the folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes a folder in it and returns its path.
    pub fn dir(&self, name: &str) -> io::Result<PathBuf> {
        let path = self.path.join(name);
        fs::create_dir_all(&path)?;
        Ok(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        unmount_below(&self.path);
        if std::env::var_os("SHOAL_KEEP").is_some() {
            println!("kept {}", self.path.display());
        } else if let Err(error) = fs::remove_dir_all(&self.path) {
            println!("could not remove {}: {error}", self.path.display());
        }
    }
}

/// Lists the mount points below `dir` that the calling thread sees, the deepest first.
pub fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let Ok(table) = fs::read_to_string("/proc/thread-self/mountinfo") else { return Vec::new() };
    let mut points: Vec<PathBuf> = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|point| PathBuf::from(point.replace("\\040", " ")))
        .filter(|point| point.starts_with(dir))
        .collect();
    points.sort();
    points.reverse();
    points
}

fn unmount_below(dir: &Path) {
    for point in mounts_below(dir) {
        if let Err(error) = umount2(&point, MntFlags::MNT_DETACH) {
            println!("could not unmount {}: {error}", point.display());
        }
    }
}
