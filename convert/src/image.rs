//! The commands of `nydus-image`: images in files.

mod cache;
pub mod check;
mod contents;
pub mod create;
pub mod inspect;
pub mod merge;
pub mod output;
#[cfg(test)]
mod properties;
pub mod report;
pub mod stat;
pub mod unpack;

use std::io::Cursor;
use std::path::Path;

use anyhow::Context as _;
use nydus_rafs::blob::section::{self, SectionError};
use nydus_rafs::{BlobId, Bootstrap};

/// Reads the bootstrap at `path`, or that at the end of the blob at `path`.
///
/// # Errors
///
/// If there is none, or it is damaged.
pub fn open(path: &Path) -> anyhow::Result<Bootstrap<Vec<u8>>> {
    let context = || format!("reading {}", path.display());
    let bytes = std::fs::read(path).with_context(context)?;
    let mut image = match section::read_bootstrap(&mut Cursor::new(&bytes)) {
        Ok(boot) => Bootstrap::open(boot),
        Err(SectionError::Missing(_)) => Bootstrap::open(bytes),
        Err(error) => return Err(error).with_context(context),
    }
    .with_context(context)?;
    // A bootstrap inside its blob is named by the blob's file.
    if let Some(id) = stem(path).and_then(|name| name.parse::<BlobId>().ok()) {
        image.name_inlined_blob(&id);
    }
    Ok(image)
}

/// Returns a file's name up to the first dot: bootstraps of layers are named by their blobs.
fn stem(path: &Path) -> Option<&str> {
    path.file_name()?.to_str()?.split('.').next()
}
