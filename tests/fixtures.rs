//! Images of the established builder, mounted by our nydusd and checked by our nydus-image.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nydus_tests::fixture::Fixtures;
use nydus_tests::fuse::Mounted;
use nydus_tests::needs::{Need, met};
use nydus_tests::process::{run, shoal};
use nydus_tests::scratch::Scratch;
use nydus_tests::tree::{self, Record};

/// An image, where it is, and what its mount must show.
struct Variant {
    name: &'static str,
    bootstrap: &'static str,
    manifest: &'static str,
    /// Built from a tar: no nanoseconds, and no time before 1970.
    tar: bool,
}

const VARIANTS: &[Variant] = &[
    Variant { name: "v6-zstd", bootstrap: "bootstrap", manifest: "manifest-base.jsonl", tar: false },
    Variant { name: "v6-lz4_block", bootstrap: "bootstrap", manifest: "manifest-base.jsonl", tar: false },
    Variant { name: "v6-none", bootstrap: "bootstrap", manifest: "manifest-base.jsonl", tar: false },
    Variant { name: "v6-prefetch", bootstrap: "bootstrap", manifest: "manifest-base.jsonl", tar: false },
    Variant { name: "v6-toc", bootstrap: "bootstrap", manifest: "manifest-base.jsonl", tar: false },
    Variant { name: "v6-tar", bootstrap: "bootstrap", manifest: "manifest-base-tar.jsonl", tar: true },
    Variant { name: "merge6", bootstrap: "bootstrap", manifest: "out/merge6/mount.jsonl", tar: false },
    Variant { name: "v6-inline", bootstrap: "", manifest: "out/v6-inline/mount.jsonl", tar: false },
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
        blobs(&fixtures, variant.name, &blob_dir)?;
        let bootstrap = if variant.bootstrap.is_empty() {
            // The bootstrap lies inside the only blob, which then names itself by its file name.
            let mut files = fs::read_dir(&blob_dir)?;
            files.next().context("an inline image has a blob")??.path()
        } else {
            fixtures.path(&format!("out/{}/{}", variant.name, variant.bootstrap))
        };
        let mut check = Command::new(shoal("nydus-image")?);
        check.arg("check").arg("--blob-dir").arg(&blob_dir).arg(&bootstrap);
        run(&mut check).with_context(|| variant.name)?;

        let mounted = Mounted::localfs(&bootstrap, &blob_dir, &dir).with_context(|| variant.name)?;
        let got = tree::read(&mounted.path).with_context(|| variant.name)?;
        let want = fixtures.manifest(variant.manifest)?;
        let lines = tree::differences(&got, &want, |path, got, want| ignore(variant, path, got, want));
        ensure!(lines.is_empty(), "{}: {} differences:\n{}", variant.name, lines.len(), lines.join("\n"));
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
