//! The golden image, and a pull of it as containerd does.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tonic::Code;

use crate::bed::{Bed, code, labels, localfs_template, mounted};

const TARGET: &str = "containerd.io/snapshot.ref";
pub(crate) const LAYERS: [&str; 2] = [
    "9fa12c0ba8d88fee2711b767f01bdaeb4ed75b066b211796953b77c1ddef6456",
    "bb7d01dd80085b9c2d9d45de9acfb91846aa2edaeea6482fb2c2dfa33b683a2d",
];

/// The golden image, unpacked once per test.
pub(crate) struct Golden {
    dir: tempfile::TempDir,
}

impl Golden {
    pub(crate) fn unpack() -> Option<Self> {
        let archive = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/upstream.tar.zst");
        let Ok(file) = fs::File::open(&archive) else {
            println!("skipped: there is no {}", archive.display());
            return None;
        };
        let dir = tempfile::tempdir().expect("a directory");
        let mut tar = tar::Archive::new(zstd::Decoder::new(file).expect("zstd"));
        for entry in tar.entries().expect("a tar") {
            let mut entry = entry.expect("an entry");
            if entry.path().expect("a path").starts_with("out/merge6") {
                entry.unpack_in(dir.path()).expect("unpacked");
            }
        }
        let golden = Self { dir };
        fs::create_dir(golden.blobs()).expect("made");
        for (number, blob) in LAYERS.iter().enumerate() {
            let from = golden.image().join(format!("layer{}/blobs/{blob}", number + 1));
            fs::copy(from, golden.blobs().join(blob)).expect("copied");
        }
        Some(golden)
    }

    pub(crate) fn image(&self) -> PathBuf {
        self.dir.path().join("out/merge6")
    }

    pub(crate) fn blobs(&self) -> PathBuf {
        self.dir.path().join("blobs")
    }

    pub(crate) fn template(&self) -> String {
        localfs_template(&self.blobs())
    }

    /// Compares type, size, mode and content of everything with the golden manifest.
    pub(crate) fn compare(&self, at: &Path) {
        let manifest = fs::read_to_string(self.image().join("mount.jsonl")).expect("read");
        let mut files = 0;
        for line in manifest.lines() {
            let want: serde_json::Value = serde_json::from_str(line).expect("JSON");
            let hex = want["path_hex"].as_str().expect("text");
            let bytes: Vec<u8> =
                (0..hex.len() / 2).map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).expect("hex")).collect();
            let path = at.join(Path::new(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(&bytes)));
            let found = path.symlink_metadata().unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            let mode = u32::from_str_radix(want["mode"].as_str().expect("text"), 8).expect("octal");
            assert_eq!(found.mode() & 0o7777, mode & 0o7777, "{}", path.display());
            if let Some(sum) = want["sha256"].as_str().filter(|_| found.is_file()) {
                let got = Sha256::digest(fs::read(&path).expect("read"));
                let got: String = got.iter().map(|byte| format!("{byte:02x}")).collect();
                assert_eq!(got, sum, "{}", path.display());
                files += 1;
            }
        }
        assert!(files > 20, "the manifest lists files");
    }
}

/// Pulls the golden image as containerd does.
pub(crate) async fn pull(bed: &mut Bed, golden: &Golden, namespace: &str) -> String {
    pull_as(bed, golden, namespace, &[]).await
}

/// Pulls it with further labels on every layer.
pub(crate) async fn pull_as(bed: &mut Bed, golden: &Golden, namespace: &str, further: &[(&str, &str)]) -> String {
    let mut parent = String::new();
    for (number, blob) in LAYERS.iter().enumerate() {
        let target = format!("sha256:chain{number}");
        let mut ask = labels(&[
            (TARGET, &target),
            ("containerd.io/snapshot/nydus-blob", "true"),
            ("containerd.io/snapshot/cri.layer-digest", &format!("sha256:{blob}")),
        ]);
        ask.extend(labels(further));
        assert_eq!(code(bed.prepare(&format!("{namespace}/x{number}"), &parent, ask).await), Code::AlreadyExists);
        parent = target;
    }
    let mut boot = labels(&[(TARGET, "sha256:top"), ("containerd.io/snapshot/nydus-bootstrap", "true")]);
    boot.extend(labels(further));
    let key = format!("{namespace}/extract");
    let mounts = bed.prepare(&key, &parent, boot.clone()).await.expect("prepared");
    let at = mounted(&mounts);
    fs::create_dir(at.path().join("image")).expect("made");
    fs::copy(golden.image().join("bootstrap"), at.path().join("image/image.boot")).expect("copied");
    drop(at);
    let name = format!("{namespace}/sha256:top");
    bed.commit(&name, &key, boot).await.expect("committed");
    name
}
