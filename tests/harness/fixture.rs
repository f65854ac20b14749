//! Images made by the established builder, unpacked into a folder.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::tree::{self, Table};

/// The unpacked archive.
#[derive(Debug)]
pub struct Fixtures {
    dir: PathBuf,
}

impl Fixtures {
    /// Unpacks the archive below `dir`.
    pub fn unpack(dir: &Path) -> Result<Self> {
        let archive = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/upstream.tar.zst");
        let mut zstd = zstd::Decoder::new(File::open(archive)?)?;
        // The images share most of their chunks, which only a window of this size makes use of.
        zstd.window_log_max(27)?;
        tar::Archive::new(zstd).unpack(dir).context("unpacking the fixtures")?;
        Ok(Self { dir: dir.to_owned() })
    }

    /// Returns the path of a file in the archive.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Reads a manifest.
    pub fn manifest(&self, name: &str) -> Result<Table> {
        tree::from_manifest(&std::fs::read_to_string(self.path(name))?).with_context(|| name.to_owned())
    }
}
