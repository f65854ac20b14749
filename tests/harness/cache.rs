//! nydusd's cache directory, as somebody sees it who takes it away.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};

/// Lists the files that hold blobs' bytes.
pub fn data_files(dir: &Path) -> Vec<PathBuf> {
    with_ending(dir, ".blob.data")
}

/// Lists the files that say what is in them.
pub fn maps(dir: &Path) -> Vec<PathBuf> {
    with_ending(dir, ".chunk_map")
}

/// Cuts a file to nothing, so that its readers go cold again.
pub fn cut(path: &Path) {
    // A file that is gone has nothing to be taken.
    drop(OpenOptions::new().write(true).open(path).and_then(|file| file.set_len(0)));
}

fn with_ending(dir: &Path, ending: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> =
        entries.map(|entry| entry.path()).filter(|path| path.to_string_lossy().ends_with(ending)).collect();
    paths.sort();
    paths
}
