//! The metadata file that containerd unpacked into a bootstrap snapshot.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nydus_rafs::bootstrap::Bootstrap;

/// Where it usually is.
pub const PLACE: &str = "image/image.boot";

/// Where it may be.
const PLACES: [&str; 2] = [PLACE, "image.boot"];

/// Where a version 6 superblock begins, and how.
const V6_AT: usize = 1024;
const V6_MAGIC: [u8; 4] = 0xE0F5_E1E2_u32.to_le_bytes();

/// How a version 5 superblock begins.
const V5_MAGIC: [u8; 4] = 0x5241_4653_u32.to_le_bytes();

/// Version 6 files are made of blocks of this size.
const V6_BLOCK: usize = 4096;

/// Why a snapshot has no metadata to mount.
#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    /// There is none.
    #[error("there is neither image/image.boot nor image.boot in {}: remove the image and pull it again", in_dir.display())]
    Missing {
        /// Where it was looked for.
        in_dir: PathBuf,
    },
    /// There is something else.
    #[error("{} is not a complete RAFS bootstrap ({why}): remove the image and pull it again", path.display())]
    Incomplete {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: &'static str,
    },
    /// It cannot be read.
    #[error("reading {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

/// A bootstrap that looks complete.
#[derive(Debug)]
pub struct Found {
    /// The file.
    pub path: PathBuf,
    /// Ids of its blobs; `None` if our reader cannot tell.
    pub blobs: Option<Vec<String>>,
}

/// Finds the bootstrap below `upper`, the files of a bootstrap snapshot.
///
/// The snapshot is committed, so nobody writes the file any more; it can be incomplete only after a power cut.
///
/// # Errors
/// When there is none, or not a whole one.
pub fn find(upper: &Path) -> Result<Found, BootstrapError> {
    for place in PLACES {
        let path = upper.join(place);
        match fs::read(&path) {
            Ok(bytes) => {
                complete(&bytes).map_err(|why| BootstrapError::Incomplete { path: path.clone(), why })?;
                // What our reader does not know yet is for nydusd to judge; then only the cache is kept longer.
                let blobs = Bootstrap::open(bytes)
                    .map(|boot| boot.blobs().iter().map(|blob| blob.id.to_string()).collect())
                    .inspect_err(
                        |error| tracing::debug!(path = %path.display(), %error, "the blobs of an image are not known"),
                    )
                    .ok();
                return Ok(Found { path, blobs });
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
            Err(source) => return Err(BootstrapError::Io { path, source }),
        }
    }
    Err(BootstrapError::Missing { in_dir: upper.to_path_buf() })
}

fn complete(bytes: &[u8]) -> Result<(), &'static str> {
    if bytes.get(V6_AT..V6_AT + 4) == Some(&V6_MAGIC) {
        return if bytes.len().is_multiple_of(V6_BLOCK) {
            Ok(())
        } else {
            Err("its size is not a multiple of 4096 bytes")
        };
    }
    match bytes.get(..4) {
        Some(start) if start == V5_MAGIC => Ok(()),
        Some(_) => Err("neither a version 5 nor a version 6 superblock is in it"),
        None => Err("it is empty"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v6(len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        bytes[V6_AT..V6_AT + 4].copy_from_slice(&V6_MAGIC);
        bytes
    }

    #[test]
    fn both_places_are_looked_at() {
        let dir = tempfile::tempdir().expect("a directory");
        assert!(matches!(find(dir.path()), Err(BootstrapError::Missing { .. })));
        fs::write(dir.path().join("image.boot"), v6(8192)).expect("written");
        assert_eq!(find(dir.path()).expect("found").path, dir.path().join("image.boot"));
        fs::create_dir(dir.path().join("image")).expect("made");
        fs::write(dir.path().join("image/image.boot"), v6(8192)).expect("written");
        assert_eq!(find(dir.path()).expect("found").path, dir.path().join("image/image.boot"));
    }

    #[test]
    fn half_a_bootstrap_is_refused() {
        for bytes in [vec![], vec![1, 2, 3, 4, 5], v6(8191), v6(8192)[..1026].to_vec()] {
            let dir = tempfile::tempdir().expect("a directory");
            fs::write(dir.path().join("image.boot"), bytes).expect("written");
            assert!(matches!(find(dir.path()), Err(BootstrapError::Incomplete { .. })));
        }
    }
}
