//! Images of the established builder, mounted by our nydusd and checked by our nydus-image.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nydus_rafs::Algorithm;
use nydus_tests::fixture::Fixtures;
use nydus_tests::fuse::Mounted;
use nydus_tests::image;
use nydus_tests::needs::{Need, met};
use nydus_tests::process::{run, shoal};
use nydus_tests::registry::Registry;
use nydus_tests::scratch::Scratch;
use nydus_tests::tree::{self, Record};

/// An image, where it is, and what its mount must show.
struct Variant {
    name: &'static str,
    bootstrap: &'static str,
    manifest: &'static str,
    /// Built from a tar: no nanoseconds, and no time before 1970.
    tar: bool,
    /// The image on which it is built, whose blobs it needs too.
    below: &'static str,
    /// Its blobs are named by digests of their bytes, as a registry wants them.
    registry: bool,
}

const BASE: Variant = Variant {
    name: "",
    bootstrap: "bootstrap",
    manifest: "manifest-base.jsonl",
    tar: false,
    below: "",
    registry: true,
};

const TAR: Variant = Variant { manifest: "manifest-base-tar.jsonl", tar: true, ..BASE };

const VARIANTS: &[Variant] = &[
    Variant { name: "v6-zstd", ..BASE },
    Variant { name: "v6-lz4_block", ..BASE },
    Variant { name: "v6-none", ..BASE },
    Variant { name: "v6-prefetch", ..BASE },
    Variant { name: "v6-prefetch-root", manifest: "out/v6-inline/mount.jsonl", ..BASE },
    Variant { name: "v6-batch", ..BASE },
    // The established builder leaves the digests out of the name that it gives such a blob.
    Variant { name: "v6-toc", registry: false, ..BASE },
    Variant { name: "v6-tar", ..TAR },
    Variant { name: "v6-zran", registry: false, ..TAR },
    // Targets of more than 511 bytes were written over their neighbours, so that only what is next to them is right.
    Variant { name: "v6-tarfs", manifest: "manifest-tarfs.jsonl", ..TAR },
    Variant { name: "v6-meta-only", manifest: "out/v6-meta-only/mount.jsonl", ..BASE },
    Variant { name: "v6-empty", manifest: "out/v6-empty/mount.jsonl", registry: false, ..BASE },
    Variant { name: "merge6", manifest: "out/merge6/mount.jsonl", ..BASE },
    Variant { name: "v6-inline", bootstrap: "", manifest: "out/v6-inline/mount.jsonl", ..BASE },
    Variant { name: "parent-oci", manifest: "out/parent-oci/mount.jsonl", below: "v6-zstd", ..BASE },
    Variant { name: "chunk-dict", manifest: "out/chunk-dict/mount.jsonl", below: "v6-zstd", ..BASE },
    Variant { name: "v5-zstd", ..BASE },
    Variant { name: "v5-lz4_block", ..BASE },
    Variant { name: "v5-aligned", ..BASE },
    Variant { name: "v5-prefetch", ..BASE },
    Variant { name: "v5-prefetch-blob", manifest: "out/v5-prefetch-blob/mount.jsonl", ..BASE },
    Variant { name: "v5-inline", bootstrap: "", manifest: "out/v5-inline/mount.jsonl", ..BASE },
];

/// What the fixtures' description names as expected differences.
fn ignore(variant: &Variant, path: &Path, got: &mut Record, want: &mut Record) {
    if path.starts_with("hard") && want.kind == 'l' {
        // Names of one symlink were made separate inodes.
        got.nlink = want.nlink;
    }
    if variant.tar {
        want.mtime.1 = 0;
        want.mtime.0 = want.mtime.0.max(0);
    }
    if variant.name == "v6-tarfs" && want.target.as_ref().is_some_and(|target| target.len() > 511) {
        got.target.clone_from(&want.target);
    }
    if path.as_os_str().is_empty() {
        // A directory build stores no time for the root; the manifest has the source directory's.
        got.mtime = want.mtime;
    }
}

/// Collects the blobs of a variant, layers' blobs too, in one folder.
fn blobs(fixtures: &Fixtures, variant: &str, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    let mut open = vec![fixtures.path(&format!("out/{variant}"))];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path();
            if path.is_dir() {
                open.push(path);
            } else if dir.ends_with("blobs") {
                fs::copy(&path, to.join(path.file_name().context("a file has a name")?))?;
            }
        }
    }
    Ok(())
}

/// Brings a variant's blobs into `dir` and returns the file with its bootstrap.
fn lay_out(fixtures: &Fixtures, variant: &Variant, dir: &Path) -> Result<PathBuf> {
    blobs(fixtures, variant.name, dir)?;
    if variant.bootstrap.is_empty() {
        // The bootstrap lies inside the only blob, which then names itself by its file name.
        return Ok(fs::read_dir(dir)?.next().context("an inline image has a blob")??.path());
    }
    if !variant.below.is_empty() {
        blobs(fixtures, variant.below, dir)?;
    }
    Ok(fixtures.path(&format!("out/{}/{}", variant.name, variant.bootstrap)))
}

fn must_show(mounted: &Mounted, fixtures: &Fixtures, variant: &Variant) -> Result<()> {
    let got = tree::read(&mounted.path).with_context(|| variant.name)?;
    let want = fixtures.manifest(variant.manifest)?;
    let lines = tree::differences(&got, &want, |path, got, want| ignore(variant, path, got, want));
    ensure!(lines.is_empty(), "{}: {} differences:\n{}", variant.name, lines.len(), lines.join("\n"));
    Ok(())
}

#[test]
fn every_attribute_and_byte_of_the_golden_images_shows_through_the_mount() -> Result<()> {
    if !met(&[Need::Root, Need::Fuse]) {
        return Ok(());
    }
    let scratch = Scratch::new("fixtures")?;
    let fixtures = Fixtures::unpack(&scratch.dir("in")?)?;
    for variant in VARIANTS {
        let dir = scratch.dir(variant.name)?;
        let blob_dir = dir.join("blobs");
        let bootstrap = lay_out(&fixtures, variant, &blob_dir)?;
        let mut check = Command::new(shoal("nydus-image")?);
        check.arg("check").arg("--blob-dir").arg(&blob_dir).arg(&bootstrap);
        run(&mut check).with_context(|| variant.name)?;
        let mounted = Mounted::localfs(&bootstrap, &blob_dir, &dir).with_context(|| variant.name)?;
        must_show(&mounted, &fixtures, variant)?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn golden_images_are_the_same_over_a_registry() -> Result<()> {
    if !met(&[Need::Root, Need::Fuse, Need::Program("docker-registry")]) {
        return Ok(());
    }
    let scratch = Scratch::new("golden-registry")?;
    let fixtures = Fixtures::unpack(&scratch.dir("in")?)?;
    let registry = Registry::start(&scratch.dir("registry")?)?;
    let client = image::client(&registry.host)?;
    for variant in VARIANTS.iter().filter(|variant| variant.registry) {
        let dir = scratch.dir(variant.name)?;
        let blob_dir = dir.join("blobs");
        let bootstrap = lay_out(&fixtures, variant, &blob_dir)?;
        for entry in fs::read_dir(&blob_dir)? {
            let bytes = fs::read(entry?.path())?;
            let digest = format!("sha256:{}", Algorithm::Sha256.digest(&bytes));
            client.push_blob("golden", &digest, bytes.into()).await?;
        }
        let config = serde_json::json!({
            "device": {
                "backend": {"type": "registry", "config": {"scheme": "http", "host": registry.host, "repo": "golden"}},
                "cache": {"type": "blobcache", "config": {"work_dir": dir.join("cache")}},
            },
            "mode": "direct", "digest_validate": true, "enable_xattr": true,
        });
        let mounted = Mounted::start(&bootstrap, &config, &dir).with_context(|| variant.name)?;
        must_show(&mounted, &fixtures, variant)?;
    }
    Ok(())
}

/// The files of the encrypted golden images, as their description tells.
fn encrypted_files() -> Vec<(String, Vec<u8>)> {
    let small =
        (0..10).map(|number| (format!("small/f{number}"), format!("{number}\n").repeat(number + 1).into_bytes()));
    let big = (0..9000_u32).map(|at| (at * 7 % 251) as u8).collect();
    let text = || b"some text\n".to_vec();
    let files = [
        ("big".to_owned(), big),
        ("empty".to_owned(), Vec::new()),
        ("hard".to_owned(), text()),
        ("text".to_owned(), text()),
    ];
    files.into_iter().chain(small).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn encrypted_golden_images_show_their_files_from_a_folder_and_over_a_registry() -> Result<()> {
    if !met(&[Need::Root, Need::Fuse, Need::Program("docker-registry")]) {
        return Ok(());
    }
    let scratch = Scratch::new("golden-encrypted")?;
    let registry = Registry::start(&scratch.dir("registry")?)?;
    let client = image::client(&registry.host)?;
    // The established daemon cannot read its own encrypted batches; ours can.
    for variant in ["plain", "batch"] {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/encrypted").join(variant);
        for entry in fs::read_dir(golden.join("blobs"))? {
            let bytes = fs::read(entry?.path())?;
            let digest = format!("sha256:{}", Algorithm::Sha256.digest(&bytes));
            ensure!(!bytes.windows(9).any(|window| window == b"some text"), "{variant} is not encrypted");
            client.push_blob("golden", &digest, bytes.into()).await?;
        }
        let backends = [
            ("folder", serde_json::json!({"type": "localfs", "config": {"dir": golden.join("blobs")}})),
            (
                "registry",
                serde_json::json!({"type": "registry", "config": {"scheme": "http", "host": registry.host, "repo": "golden"}}),
            ),
        ];
        for (kind, backend) in backends {
            let dir = scratch.dir(&format!("{variant}-{kind}"))?;
            let config = serde_json::json!({
                "device": {"backend": backend, "cache": {"type": "blobcache", "config": {"work_dir": dir.join("cache")}}},
                "mode": "direct", "enable_xattr": true,
            });
            let mounted = Mounted::start(&golden.join("bootstrap"), &config, &dir)?;
            for (name, want) in encrypted_files() {
                ensure!(
                    fs::read(mounted.path.join(&name))? == want,
                    "{variant} from a {kind}: {name} is not what it was"
                );
            }
            ensure!(fs::read_link(mounted.path.join("link"))? == Path::new("small/f3"), "{variant}: the link");
        }
    }
    Ok(())
}

#[test]
fn damaged_bootstraps_are_refused_with_a_reason_and_no_panic() -> Result<()> {
    let scratch = Scratch::new("damaged")?;
    let fixtures = Fixtures::unpack(&scratch.dir("in")?)?;
    let whole = fs::read(fixtures.path("out/v6-zstd/bootstrap"))?;
    let random: Vec<u8> = nydus_tests::smoke::random().into_iter().take(whole.len()).collect();
    let cut = |len: usize| whole[..len].to_vec();
    let file = scratch.path().join("bootstrap");
    for bytes in [Vec::new(), cut(100), cut(1024), cut(4095), cut(4096), cut(whole.len() / 2), random] {
        fs::write(&file, &bytes)?;
        let output = Command::new(shoal("nydus-image")?).arg("check").arg("--bootstrap").arg(&file).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(1), "{} bytes: {} {said}", bytes.len(), output.status);
        ensure!(!said.contains("panicked") && said.contains("rror"), "{} bytes: {said}", bytes.len());
    }
    Ok(())
}
