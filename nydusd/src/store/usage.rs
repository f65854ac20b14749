//! What the cache directory holds, and how a blob leaves it.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use nydus_rafs::BlobId;

use super::{Store, StoreError, cache_file};

/// What the cache directory holds of one blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage {
    /// The name of the blob as its files spell it.
    pub blob: String,
    /// Bytes that its files take on the disk.
    pub bytes: u64,
    /// The files.
    pub files: Vec<PathBuf>,
}

impl Store {
    /// Returns what is in the cache directory, blob by blob.
    pub fn usage(&self) -> Result<Vec<Usage>, StoreError> {
        let failed = |source| StoreError::Directory { dir: self.dir().to_owned(), source };
        let mut all: BTreeMap<String, Usage> = BTreeMap::new();
        for entry in std::fs::read_dir(self.dir()).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            let Some((blob, _)) = name.split_once(".blob.").or_else(|| name.split_once(".chunk_map")) else { continue };
            // Deleted since it was listed: it takes nothing.
            let Ok(metadata) = entry.metadata() else { continue };
            let usage = all.entry(blob.to_owned()).or_insert_with(|| Usage {
                blob: blob.to_owned(),
                bytes: 0,
                files: Vec::new(),
            });
            usage.bytes += metadata.blocks() * 512;
            usage.files.push(entry.path());
        }
        Ok(all.into_values().collect())
    }

    /// Deletes the files of a blob that nobody has open. Copies in use by other processes stay.
    pub fn remove(&self, blob: &BlobId) -> Result<(), StoreError> {
        let caches = self.inner.caches();
        let open = caches.get(blob).is_some_and(|same| same.iter().any(|cache| cache.strong_count() > 0));
        if open {
            return Err(StoreError::InUse(blob.clone()));
        }
        let name = cache_file::data_name(blob);
        let mut in_use = false;
        for n in 0..cache_file::COPIES {
            let path = cache_file::data_path(self.dir(), blob, n);
            let failed = |source| StoreError::Directory { dir: path.clone(), source };
            match cache_file::lock(&path, false) {
                Ok(Some(_held)) => {
                    gone(std::fs::remove_file(cache_file::map_path(&path))).map_err(failed)?;
                    gone(std::fs::remove_file(&path)).map_err(failed)?;
                }
                Ok(None) => in_use = true,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed(error)),
            }
        }
        tracing::debug!(name, in_use, "removed from the cache");
        if in_use { Err(StoreError::InUse(blob.clone())) } else { Ok(()) }
    }
}

fn gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
