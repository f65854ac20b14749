//! Writing an OCI layout: blobs as they come, `index.json` last.
//!
//! A blob of a directory is written under another name first; an archive gets its name when it is whole. So nothing
//! half-written is ever found under a name that somebody would look for.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write as _};
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use nydus_backend::registry::Reference;
use tempfile::NamedTempFile;

use super::{IMAGE_NAME, Layout, LayoutError, REF_NAME, Span, State, blob_name};
use crate::nydusify::bundle;
use crate::oci::{Descriptor, Index, names};

/// What `oci-layout` holds.
const VERSION: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;

/// A layout in the making.
#[derive(Debug)]
pub(super) enum Writing {
    Directory(PathBuf),
    Archive(Tar),
}

/// An archive in the making.
#[derive(Debug)]
pub(super) struct Tar {
    temporary: Option<NamedTempFile>,
    file: Arc<File>,
    path: PathBuf,
    spans: HashMap<String, Range<u64>>,
    end: u64,
}

impl Writing {
    pub(super) fn span(&self, name: &str) -> Option<Span> {
        match self {
            Self::Directory(dir) => {
                let path = dir.join(name);
                let file = File::open(&path).ok()?;
                let len = file.metadata().ok()?.len();
                Some(Span { file: Arc::new(file), path, range: 0..len })
            }
            Self::Archive(tar) => {
                let range = tar.spans.get(name)?.clone();
                Some(Span { file: Arc::clone(&tar.file), path: tar.path.clone(), range })
            }
        }
    }

    /// Adds a member of `size` bytes, which `fill` writes.
    fn add(&mut self, name: &str, size: u64, fill: &mut dyn FnMut(&mut File) -> io::Result<()>) -> io::Result<()> {
        match self {
            Self::Directory(dir) => {
                let path = dir.join(name);
                let mut temporary = NamedTempFile::new_in(path.parent().unwrap_or(dir))?;
                fill(temporary.as_file_mut())?;
                temporary.as_file().set_permissions(std::fs::Permissions::from_mode(0o644))?;
                temporary.persist(&path)?;
                Ok(())
            }
            Self::Archive(tar) => tar.add(name, size, fill),
        }
    }
}

impl Tar {
    fn add(&mut self, name: &str, size: u64, fill: &mut dyn FnMut(&mut File) -> io::Result<()>) -> io::Result<()> {
        let Some(temporary) = &mut self.temporary else { return Err(io::ErrorKind::NotConnected.into()) };
        let file = temporary.as_file_mut();
        let mut header = Vec::new();
        let directory = name.ends_with('/');
        bundle::header(
            &mut header,
            name,
            if directory { 0o755 } else { 0o444 },
            size,
            if directory { b'5' } else { b'0' },
        );
        file.write_all(&header)?;
        let begin = self.end + header.len() as u64;
        fill(file)?;
        self.end = (begin + size).next_multiple_of(512);
        let padding = self.end - begin - size;
        file.write_all(&vec![0; usize::try_from(padding).expect("less than a block")])?;
        self.spans.insert(name.to_owned(), begin..begin + size);
        Ok(())
    }
}

impl Layout {
    /// Begins to write a layout: into `path` if that is a directory or ends in `/`, else an archive of that name.
    ///
    /// # Errors
    ///
    /// [`LayoutError`], where nothing can be written there.
    pub fn create(path: &Path) -> Result<Self, LayoutError> {
        let failed = |source| LayoutError::File { what: "writing", path: path.to_owned(), source };
        let writing = if path.is_dir() || path.as_os_str().as_encoded_bytes().ends_with(b"/") {
            std::fs::create_dir_all(path.join("blobs/sha256")).map_err(failed)?;
            Writing::Directory(path.to_owned())
        } else {
            let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let temporary = NamedTempFile::new_in(dir).map_err(failed)?;
            let file = Arc::new(temporary.as_file().try_clone().map_err(failed)?);
            let mut tar =
                Tar { temporary: Some(temporary), file, path: path.to_owned(), spans: HashMap::new(), end: 0 };
            for name in ["blobs/", "blobs/sha256/"] {
                tar.add(name, 0, &mut |_| Ok(())).map_err(failed)?;
            }
            Writing::Archive(tar)
        };
        Ok(Self { path: path.to_owned(), root: None, state: Mutex::new(State::Writing(writing)) })
    }

    fn write<T>(&self, write: impl FnOnce(&mut Writing) -> io::Result<T>) -> Result<T, LayoutError> {
        let result = match &mut *self.state() {
            State::Writing(writing) => write(writing),
            State::Directory | State::Archive(_) => Err(io::ErrorKind::ReadOnlyFilesystem.into()),
        };
        result.map_err(|source| LayoutError::File { what: "writing", path: self.path.clone(), source })
    }

    /// Adds a blob whose bytes are the first `size` of `file`; returns whether it was not there yet.
    pub(in crate::nydusify) fn add(&self, digest: &str, size: u64, file: &File) -> Result<bool, LayoutError> {
        let name = blob_name(digest);
        self.write(|writing| {
            if writing.span(&name).is_some() {
                return Ok(false);
            }
            let mut at = 0;
            let mut piece = vec![0; 256 << 10];
            writing.add(&name, size, &mut |out| {
                while at < size {
                    let len = usize::try_from(size - at).unwrap_or(usize::MAX).min(piece.len());
                    file.read_exact_at(&mut piece[..len], at)?;
                    out.write_all(&piece[..len])?;
                    at += len as u64;
                }
                Ok(())
            })?;
            Ok(true)
        })
    }

    /// Adds a blob or document that is in memory; returns whether it was not there yet.
    pub(in crate::nydusify) fn add_bytes(&self, digest: &str, bytes: &Bytes) -> Result<bool, LayoutError> {
        let name = blob_name(digest);
        self.write(|writing| {
            if writing.span(&name).is_some() {
                return Ok(false);
            }
            writing.add(&name, bytes.len() as u64, &mut |out| out.write_all(bytes))?;
            Ok(true)
        })
    }

    /// Names the document `bytes` as the image `name`: the last step, after which the layout is whole.
    pub(in crate::nydusify) fn name(
        &self,
        name: &Reference,
        media_type: &str,
        bytes: &Bytes,
    ) -> Result<(), LayoutError> {
        let mut root = Descriptor::of(media_type, bytes);
        self.add_bytes(&root.digest, bytes)?;
        root.annotations.insert(IMAGE_NAME.into(), name.to_string());
        root.annotations.insert(REF_NAME.into(), name.tag().unwrap_or("latest").to_owned());
        // Other images of a directory stay.
        let mut index = match self.member("index.json") {
            Ok(span) => self.document("index.json", &span)?,
            Err(LayoutError::Missing { .. }) => Index {
                schema_version: 2,
                media_type: names::OCI_INDEX.to_owned(),
                manifests: Vec::new(),
                annotations: Default::default(),
            },
            Err(error) => return Err(error),
        };
        let earlier = root.annotations[IMAGE_NAME].clone();
        index.manifests.retain(|entry| entry.annotations.get(IMAGE_NAME) != Some(&earlier));
        index.manifests.push(root);
        let index = serde_json::to_vec(&index).map_err(|error| self.odd("index.json", error.to_string()))?;
        self.write(|writing| {
            writing.add("oci-layout", VERSION.len() as u64, &mut |out| out.write_all(VERSION))?;
            writing.add("index.json", index.len() as u64, &mut |out| out.write_all(&index))?;
            if let Writing::Archive(tar) = writing
                && let Some(mut temporary) = tar.temporary.take()
            {
                temporary.write_all(&[0; 1024])?;
                temporary.as_file().set_permissions(std::fs::Permissions::from_mode(0o644))?;
                temporary.persist(&tar.path)?;
            }
            Ok(())
        })
    }
}
