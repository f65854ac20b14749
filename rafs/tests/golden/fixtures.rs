//! Images made with the established builder, unpacked into memory.
//!
//! They share most of their chunks, which only one long-range compressed archive makes use of.

use std::collections::BTreeMap;
use std::io::Read;
use std::sync::OnceLock;

/// All files of the archive by their path.
pub(crate) struct Fixtures(BTreeMap<String, Vec<u8>>);

/// Returns the fixtures, unpacked once per process.
pub(crate) fn fixtures() -> &'static Fixtures {
    static FIXTURES: OnceLock<Fixtures> = OnceLock::new();
    FIXTURES.get_or_init(|| {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/upstream.tar.zst");
        let mut zstd =
            zstd::Decoder::new(std::fs::File::open(path).expect("the archive is in the tree")).expect("zstd");
        zstd.window_log_max(27).expect("a window of 128 MiB");
        let mut files = BTreeMap::new();
        for entry in tar::Archive::new(zstd).entries().expect("a tar") {
            let mut entry = entry.expect("an entry");
            let name = entry.path().expect("a name").to_string_lossy().into_owned();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).expect("its bytes");
            files.insert(name, bytes);
        }
        Fixtures(files)
    })
}

impl Fixtures {
    /// Returns a file.
    pub(crate) fn get(&self, path: &str) -> &[u8] {
        self.0.get(path).unwrap_or_else(|| panic!("no fixture {path}"))
    }

    /// Returns the blobs below `out/<variant>/`, layers included, by name.
    pub(crate) fn blobs(&self, variant: &str) -> BTreeMap<&str, &[u8]> {
        let prefix = format!("out/{variant}/");
        let of_variant = self
            .0
            .iter()
            .filter(|(path, bytes)| path.starts_with(&prefix) && path.contains("/blobs/") && !bytes.is_empty());
        of_variant.map(|(path, bytes)| (path.rsplit('/').next().expect("a name"), &bytes[..])).collect()
    }
}
