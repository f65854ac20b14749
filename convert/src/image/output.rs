//! Where blobs and bootstraps go: files, pipes, directories in which a blob gets its name once that is known.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use nydus_rafs::BlobId;

/// Where the bootstrap goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BootstrapPlace {
    /// Into the blob.
    Inline,
    /// Into this file.
    File(PathBuf),
    /// Into the directory of the blobs, named by its digest.
    Directory,
}

/// Where the blob goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BlobPlace {
    /// Into this file, which may be a pipe.
    File(PathBuf),
    /// Into this directory, named by its id.
    Directory(PathBuf),
    /// Into this directory, in the form in which a daemon's cache holds it.
    Cache(PathBuf),
    /// Nowhere: only its table and digests matter.
    Nowhere,
}

/// An open blob.
pub(super) enum Output {
    /// A file under its own name, or a pipe.
    Named(File),
    /// A file of the blob directory that gets its name at the end.
    Unnamed(tempfile::NamedTempFile),
    Nowhere,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Named(file) => file.write(bytes),
            Self::Unnamed(file) => file.write(bytes),
            Self::Nowhere => Ok(bytes.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Named(file) => file.flush(),
            Self::Unnamed(file) => file.flush(),
            Self::Nowhere => Ok(()),
        }
    }
}

/// Opens a file to be written from its beginning, or a pipe.
pub(super) fn open_stream(path: &Path) -> anyhow::Result<File> {
    // A pipe can be neither truncated nor sought; whoever made it reads what we write.
    let pipe = fs::metadata(path).is_ok_and(|metadata| !metadata.is_file());
    let file = File::options().write(true).create(!pipe).truncate(!pipe).open(path);
    file.with_context(|| format!("opening {}", path.display()))
}

/// Returns where something too large for memory lies until it goes to `path`: beside it, unless that is a pipe.
pub(super) fn beside(path: &Path) -> PathBuf {
    match fs::metadata(path).is_ok_and(|metadata| !metadata.is_file()) {
        true => std::env::temp_dir(),
        false => path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned(),
    }
}

pub(super) fn open_blob(place: &BlobPlace) -> anyhow::Result<(Output, Option<&Path>)> {
    match place {
        BlobPlace::File(path) => Ok((Output::Named(open_stream(path)?), None)),
        BlobPlace::Directory(dir) => {
            let file = tempfile::Builder::new().prefix(".blob-").tempfile_in(dir);
            Ok((Output::Unnamed(file.with_context(|| format!("making a file in {}", dir.display()))?), Some(dir)))
        }
        BlobPlace::Cache(dir) => {
            let file = tempfile::tempfile_in(dir).with_context(|| format!("making a file in {}", dir.display()))?;
            Ok((Output::Named(file), None))
        }
        BlobPlace::Nowhere => Ok((Output::Nowhere, None)),
    }
}

pub(super) fn keep_blob(out: Output, dir: Option<&Path>, id: &BlobId, wrote: bool) -> anyhow::Result<()> {
    if let (Output::Unnamed(file), Some(dir), true) = (out, dir, wrote) {
        let path = dir.join(id.as_str());
        file.persist(&path).map_err(|error| error.error).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

/// Writes a file so that under its name there is all of it or what was there before.
pub(super) fn write_whole(path: &Path, mut bytes: impl Read) -> anyhow::Result<()> {
    let context = || format!("writing {}", path.display());
    if fs::metadata(path).is_ok_and(|metadata| !metadata.is_file()) {
        let copied = File::options().write(true).open(path).and_then(|mut file| io::copy(&mut bytes, &mut file));
        return copied.map(|_| ()).with_context(context);
    }
    let dir = beside(path);
    let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    let mut file = tempfile::Builder::new().permissions(permissions).tempfile_in(dir).with_context(context)?;
    io::copy(&mut bytes, &mut file).with_context(context)?;
    file.persist(path).map_err(|error| error.error).with_context(context)?;
    Ok(())
}
