//! Blobs as plain files, named by their ids.

use std::fs::File;
use std::io::ErrorKind;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use nydus_rafs::BlobId;

use crate::config;
use crate::route::SourceError;

/// Directories with blobs, or one file that is every blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalFs {
    blob_file: Option<PathBuf>,
    dirs: Vec<PathBuf>,
}

impl LocalFs {
    /// Takes the places from a configuration; none is opened yet.
    ///
    /// # Errors
    ///
    /// [`SourceError::Config`] if there is neither `blob_file` nor `dir`.
    pub fn open(config: &config::LocalFs) -> Result<Self, SourceError> {
        let set = |text: &String| (!text.is_empty()).then(|| PathBuf::from(text));
        let blob_file = set(&config.blob_file);
        let dirs: Vec<_> = set(&config.dir).into_iter().chain(config.alt_dirs.iter().filter_map(set)).collect();
        if blob_file.is_none() && dirs.is_empty() {
            return Err(SourceError::Config("backend `localfs` needs `dir` or `blob_file`".to_owned()));
        }
        Ok(Self { blob_file, dirs })
    }

    /// Returns the first place, for messages.
    pub fn place(&self) -> &Path {
        self.blob_file.as_deref().or(self.dirs.first().map(PathBuf::as_path)).unwrap_or(Path::new(""))
    }

    /// Reads exactly the bytes `stored`.
    ///
    /// # Errors
    ///
    /// [`SourceError`] naming the file.
    pub async fn read(&self, blob: &BlobId, stored: Range<u64>) -> Result<Bytes, SourceError> {
        let (this, id) = (self.clone(), blob.clone());
        let reading = tokio::task::spawn_blocking(move || {
            let (file, path) = this.find(&id)?;
            let failed = |reason: String| SourceError::File { path: path.clone(), blob: id.clone(), reason };
            // The length is known before memory is taken for it.
            let size = file.metadata().map_err(|error| failed(error.to_string()))?.len();
            if stored.start > stored.end || stored.end > size {
                return Err(SourceError::Outside { place: path.display().to_string(), blob: id.clone(), stored, size });
            }
            let length = usize::try_from(stored.end - stored.start).map_err(|error| failed(error.to_string()))?;
            let mut bytes = vec![0; length];
            file.read_exact_at(&mut bytes, stored.start).map_err(|error| failed(error.to_string()))?;
            Ok(Bytes::from(bytes))
        });
        joined(reading.await, self, blob)
    }

    /// Returns the size of a blob.
    ///
    /// # Errors
    ///
    /// [`SourceError`] naming the file.
    pub async fn size(&self, blob: &BlobId) -> Result<u64, SourceError> {
        let (this, id) = (self.clone(), blob.clone());
        let asking = tokio::task::spawn_blocking(move || {
            let (file, path) = this.find(&id)?;
            let meta = file.metadata();
            meta.map(|meta| meta.len()).map_err(|error| SourceError::File { path, blob: id, reason: error.to_string() })
        });
        joined(asking.await, self, blob)
    }

    fn find(&self, blob: &BlobId) -> Result<(File, PathBuf), SourceError> {
        let name = blob.as_str();
        let candidates: Vec<PathBuf> = match &self.blob_file {
            Some(file) => vec![file.clone()],
            None => self.dirs.iter().map(|dir| dir.join(name)).collect(),
        };
        let mut first = None;
        for path in candidates {
            match File::open(&path) {
                Ok(file) => {
                    // An empty file is what a broken download leaves behind; another directory may have all of it.
                    let empty = file.metadata().is_ok_and(|meta| meta.len() == 0);
                    if !empty || self.dirs.len() < 2 {
                        return Ok((file, path));
                    }
                }
                Err(error) => {
                    let reason = match error.kind() {
                        ErrorKind::NotFound => "it is not there; copy the blob into the directory".to_owned(),
                        _ => error.to_string(),
                    };
                    first.get_or_insert((path, reason));
                }
            }
        }
        let (path, reason) = first.unwrap_or_else(|| (self.place().to_owned(), "it is empty".to_owned()));
        Err(SourceError::File { path, blob: blob.clone(), reason })
    }
}

fn joined<T>(
    outcome: Result<Result<T, SourceError>, tokio::task::JoinError>,
    from: &LocalFs,
    blob: &BlobId,
) -> Result<T, SourceError> {
    outcome.unwrap_or_else(|error| {
        Err(SourceError::File { path: from.place().to_owned(), blob: blob.clone(), reason: error.to_string() })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn bytes_come_exactly_or_not_at_all() {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let blob: BlobId = "b".parse().unwrap();
        std::fs::write(dirs[0].path().join("b"), "").unwrap();
        std::fs::write(dirs[1].path().join("b"), "0123456789").unwrap();
        let [first, second] = dirs.each_ref().map(|dir| dir.path().to_str().unwrap().to_owned());
        let config = config::LocalFs { dir: first.clone(), alt_dirs: vec![second], ..Default::default() };
        let local = LocalFs::open(&config).unwrap();
        assert_eq!(local.read(&blob, 2..5).await.unwrap(), "234");
        assert_eq!(local.read(&blob, 3..3).await.unwrap(), "");
        assert_eq!(local.size(&blob).await.unwrap(), 10);
        assert!(matches!(local.read(&blob, 8..11).await, Err(SourceError::Outside { size: 10, .. })));
        let absent: BlobId = "absent".parse().unwrap();
        let error = local.read(&absent, 0..1).await.unwrap_err().to_string();
        assert!(error.contains(&first) && error.contains("absent"), "{error}");
        assert!(LocalFs::open(&config::LocalFs::default()).is_err());
    }
}
