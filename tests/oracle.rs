//! What our converter makes is what containerd would have unpacked, and others read it as we do.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nydus_tests::containerd::{Containerd, Options};
use nydus_tests::converted::Converted;
use nydus_tests::fuse::Mounted;
use nydus_tests::needs::{CONTAINERD, Need, met};
use nydus_tests::oracle::Erofs;
use nydus_tests::process::{run, shoal};
use nydus_tests::registry::Registry;
use nydus_tests::scratch::Scratch;
use nydus_tests::tree::{self, Record, Table};
use nydus_tests::{image, oracle, smoke};
use serde_json::json;

/// Lets containerd's overlayfs unpack an image and returns where it is mounted.
fn unpacked(containerd: &Containerd, reference: &str, at: &Path) -> Result<()> {
    std::fs::create_dir_all(at)?;
    run(containerd.ctr().args(["images", "pull", "--plain-http", "--snapshotter", "overlayfs", reference]))?;
    run(containerd.ctr().args(["images", "mount", "--snapshotter", "overlayfs", reference]).arg(at))?;
    Ok(())
}

/// A directory that a layer changes without listing it gets the time of unpacking from containerd.
fn unpacked_now(record: &Record) -> bool {
    record.kind == 'd' && record.mtime.0 > 1_750_000_000
}

fn must_equal(who: &str, got: &Table, want: &Table) -> Result<()> {
    let lines = tree::differences(got, want, |_, got, want| {
        if unpacked_now(want) {
            got.mtime = want.mtime;
        }
    });
    ensure!(lines.is_empty(), "{who} shows {} differences from containerd:\n{}", lines.len(), lines.join("\n"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_reader_sees_what_containerd_unpacks() -> Result<()> {
    if !met(CONTAINERD) || !met(&[Need::ErofsFiles, Need::Program("fsck.erofs"), Need::Program("python3")]) {
        return Ok(());
    }
    let scratch = Scratch::new("oracle")?;
    let registry = Registry::start(&scratch.dir("registry")?)?;
    let client = image::client(&registry.host)?;
    image::push(&client, "smoke", "oci", &smoke::layers()?, json!({})).await?;
    let options = Options::plain(&registry.host);
    let containerd = Containerd::start(&scratch.dir("ctd")?, &options)?;
    let root = scratch.dir("overlay")?;
    unpacked(&containerd, &format!("{}/smoke:oci", registry.host), &root)?;
    let want = tree::read(&root)?;
    ensure!(want.len() > 230, "containerd unpacked only {} entries", want.len());
    let manifest = scratch.path().join("manifest.jsonl");
    oracle::manifest(&root, &manifest)?;
    // Overlay tells link counts of its own for directories that several layers share.
    let directories = want.iter().filter(|(_, record)| record.kind == 'd');
    let keys = directories.flat_map(|(path, record)| {
        let keys: &[_] = if unpacked_now(record) { &["nlink", "mtime", "mtime_nsec"] } else { &["nlink"] };
        keys.iter().map(move |key| format!("{key}:/{}", path.display()))
    });
    let known = keys.collect::<Vec<_>>().join(",");

    for (compressor, chunk_size) in
        [("zstd", "0x100000"), ("lz4_block", "0x100000"), ("none", "0x100000"), ("zstd", "0x1000")]
    {
        let tag = format!("{compressor}-{chunk_size}");
        let dir = scratch.dir(&tag)?;
        let mut convert = Command::new(shoal("nydusify")?);
        convert.arg("convert").arg("--source").arg(format!("{}/smoke:oci", registry.host));
        convert.arg("--target").arg(format!("{}/smoke:{tag}", registry.host)).arg("--work-dir").arg(dir.join("work"));
        run(convert.args(["--compressor", compressor, "--fs-chunk-size", chunk_size]))?;
        let image = Converted::pull(&client, "smoke", &tag, &dir).await?;

        run(Command::new(shoal("nydus-image")?).arg("check").arg("--bootstrap").arg(&image.bootstrap))?;
        oracle::verify(&image.bootstrap, &image.blobs, &manifest, &known)
            .with_context(|| format!("{tag}: verify.py"))?;
        oracle::layout(&image.bootstrap).with_context(|| format!("{tag}: layout_check.py"))?;
        for layer in image.manifest["layers"].as_array().into_iter().flatten() {
            let digest = layer["digest"].as_str().context("a layer has a digest")?;
            if layer["mediaType"] == "application/vnd.oci.image.layer.nydus.blob.v1" {
                let sections = oracle::sections(&image.blobs.join(digest.trim_start_matches("sha256:")))?;
                ensure!(sections.contains("image.boot") && sections.contains("rafs.blob.toc"), "{tag}: {sections}");
            }
        }
        let devices = image.devices(&dir.join("devices"))?;
        oracle::fsck(&image.bootstrap, &devices).with_context(|| format!("{tag}: fsck.erofs"))?;

        let kernel = Erofs::mount(&image.bootstrap, &devices, &dir.join("erofs"))?;
        must_equal("the kernel's EROFS", &tree::read(&kernel.path)?, &want).context(tag.clone())?;
        let fuse = Mounted::localfs(&image.bootstrap, &image.blobs, &dir)?;
        must_equal("nydusd", &tree::read(&fuse.path)?, &want).context(tag)?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_independent_reader_fails_on_a_flipped_bit_a_missing_blob_and_a_wrong_manifest() -> Result<()> {
    if !met(CONTAINERD) || !met(&[Need::Program("python3")]) {
        return Ok(());
    }
    let scratch = Scratch::new("checker")?;
    let registry = Registry::start(&scratch.dir("registry")?)?;
    let client = image::client(&registry.host)?;
    image::push(&client, "smoke", "oci", &smoke::layers()?, json!({})).await?;
    let mut convert = Command::new(shoal("nydusify")?);
    convert.arg("convert").arg("--source").arg(format!("{}/smoke:oci", registry.host));
    convert.arg("--target").arg(format!("{}/smoke:nydus", registry.host));
    run(convert.arg("--work-dir").arg(scratch.path().join("work")))?;
    let image = Converted::pull(&client, "smoke", "nydus", scratch.path()).await?;
    let fuse = Mounted::localfs(&image.bootstrap, &image.blobs, scratch.path())?;
    let manifest = scratch.path().join("manifest.jsonl");
    oracle::manifest(&fuse.path, &manifest)?;
    oracle::verify(&image.bootstrap, &image.blobs, &manifest, "")?;

    let text = std::fs::read_to_string(&manifest)?;
    std::fs::write(&manifest, text.replacen("\"uid\": 0", "\"uid\": 1", 1))?;
    ensure!(oracle::verify(&image.bootstrap, &image.blobs, &manifest, "").is_err(), "a wrong owner went unseen");
    std::fs::write(&manifest, &text)?;

    // The size of the root directory, which says how much room it takes: behind the superblock's word for where inodes begin.
    oracle::layout(&image.bootstrap)?;
    let bytes = std::fs::read(&image.bootstrap)?;
    let block = u32::from_le_bytes(bytes[1024 + 40..1024 + 44].try_into()?);
    let size_at = (usize::try_from(block)? + 1) * 4096 + 8;
    for (at, what) in [(size_at, "a directory's size"), (size_at - 8, "an inode's layout")] {
        let mut flipped = bytes.clone();
        flipped[at] ^= 4;
        let path = scratch.path().join("flipped.boot");
        std::fs::write(&path, flipped)?;
        ensure!(oracle::layout(&path).is_err(), "a flipped bit in {what} went unseen");
    }

    let mut largest = std::fs::read_dir(&image.blobs)?.collect::<std::io::Result<Vec<_>>>()?;
    largest.sort_by_key(|entry| entry.metadata().map(|meta| meta.len()).unwrap_or(0));
    let blob = largest.pop().context("there are blobs")?.path();
    let bytes = std::fs::read(&blob)?;
    let mut flipped = bytes.clone();
    flipped[1000] ^= 1;
    std::fs::write(&blob, flipped)?;
    ensure!(oracle::verify(&image.bootstrap, &image.blobs, &manifest, "").is_err(), "a flipped bit went unseen");
    std::fs::remove_file(&blob)?;
    ensure!(oracle::verify(&image.bootstrap, &image.blobs, &manifest, "").is_err(), "a missing blob went unseen");
    Ok(())
}
