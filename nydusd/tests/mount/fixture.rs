//! Images made by the established builder, and what they must look like when mounted.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde_json::{Value, json};
use sha2::Digest;

/// Unpacks the fixtures once per build folder and version of the archive.
pub(crate) fn fixtures() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let archive = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/upstream.tar.zst");
        let place = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let dir = place.join(format!("fixtures-{}", std::fs::metadata(&archive).unwrap().len()));
        if !dir.exists() {
            let fresh = tempfile::tempdir_in(place).unwrap();
            let mut zstd = zstd::Decoder::new(File::open(archive).unwrap()).unwrap();
            zstd.window_log_max(27).unwrap();
            tar::Archive::new(zstd).unpack(fresh.path()).unwrap();
            // Another test program may have been faster; its folder is as good.
            let _ = std::fs::rename(fresh.path(), &dir);
        }
        dir
    })
}

/// Returns a file of a variant.
pub(crate) fn file(variant: &str, name: &str) -> PathBuf {
    fixtures().join("out").join(variant).join(name)
}

/// Reads a manifest: path to description. Paths are hexadecimal, since names may be any bytes.
pub(crate) fn manifest(name: &str) -> BTreeMap<String, Value> {
    let text = std::fs::read_to_string(fixtures().join(name)).unwrap();
    let rows = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    rows.map(|row| (row["path_hex"].as_str().unwrap().to_owned(), row)).collect()
}

/// Describes a tree as the manifests do: every attribute, extended attribute and byte.
pub(crate) fn describe(root: &Path) -> BTreeMap<String, Value> {
    let mut rows = BTreeMap::new();
    let mut inodes: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    let mut todo = vec![PathBuf::new()];
    while let Some(relative) = todo.pop() {
        let path = if relative.as_os_str().is_empty() { root.to_owned() } else { root.join(&relative) };
        let meta = std::fs::symlink_metadata(&path).unwrap();
        let kind = meta.file_type();
        let key = hex::encode(relative.as_os_str().as_bytes());
        let name = if kind.is_dir() {
            "dir"
        } else if kind.is_symlink() {
            "symlink"
        } else if kind.is_char_device() {
            "chr"
        } else if kind.is_block_device() {
            "blk"
        } else if kind.is_fifo() {
            "fifo"
        } else if kind.is_socket() {
            "sock"
        } else {
            "reg"
        };
        let mut row = json!({
            "type": name, "mode": format!("{:04o}", meta.mode() & 0o7777), "uid": meta.uid(), "gid": meta.gid(),
            "mtime": meta.mtime(), "mtime_nsec": meta.mtime_nsec(), "nlink": meta.nlink(),
        });
        match name {
            "reg" => {
                let bytes = std::fs::read(&path).unwrap();
                assert_eq!(bytes.len() as u64, meta.len(), "{}", path.display());
                row["size"] = json!(meta.len());
                row["sha256"] = json!(hex::encode(sha2::Sha256::digest(&bytes)));
                if meta.nlink() > 1 {
                    inodes.entry(meta.ino()).or_default().push(key.clone());
                }
            }
            "symlink" => {
                let target = std::fs::read_link(&path).unwrap();
                row["size"] = json!(meta.len());
                row["target_hex"] = json!(hex::encode(target.as_os_str().as_bytes()));
            }
            "chr" | "blk" => {
                let device = meta.rdev();
                row["rdev"] = json!([nix::sys::stat::major(device), nix::sys::stat::minor(device)]);
            }
            "dir" => {
                for entry in std::fs::read_dir(&path).unwrap() {
                    todo.push(relative.join(entry.unwrap().file_name()));
                }
            }
            _ => {}
        }
        let mut attributes = serde_json::Map::new();
        for name in xattr::list(&path).unwrap() {
            let value = xattr::get(&path, &name).unwrap().unwrap();
            attributes.insert(String::from_utf8(name.into_vec()).unwrap(), json!(hex::encode(value)));
        }
        if !attributes.is_empty() {
            row["xattrs"] = Value::Object(attributes);
        }
        rows.insert(key, row);
    }
    for mut names in inodes.into_values() {
        names.sort();
        for name in &names {
            rows.get_mut(name).unwrap()["ino_group"] = json!(names);
        }
    }
    rows
}

/// Compares a tree with a manifest and returns what differs, but for the `known` differences (`key` or `key:/path`).
pub(crate) fn differences(
    got: &BTreeMap<String, Value>,
    want: &BTreeMap<String, Value>,
    known: &[&str],
) -> Vec<String> {
    let mut found = Vec::new();
    for path in want.keys().chain(got.keys()).collect::<std::collections::BTreeSet<_>>() {
        let text = format!("/{}", String::from_utf8_lossy(&hex::decode(path).unwrap()));
        let (Some(got), Some(want)) = (got.get(path), want.get(path)) else {
            found.push(format!("{text}: only in the {}", if got.contains_key(path) { "mount" } else { "manifest" }));
            continue;
        };
        for key in [
            "type",
            "mode",
            "uid",
            "gid",
            "mtime",
            "mtime_nsec",
            "nlink",
            "size",
            "sha256",
            "target_hex",
            "rdev",
            "xattrs",
            "ino_group",
        ] {
            let excused = known.iter().any(|known| *known == key || *known == format!("{key}:{text}"));
            if got.get(key) != want.get(key) && !excused {
                found.push(format!("{text}: {key} is {:?}, not {:?}", got.get(key), want.get(key)));
            }
        }
    }
    // More would hide the first.
    found.truncate(20);
    found
}
