//! What `nydus-image` writes, in every form: byte for byte what the established builder writes where that can be, and
//! always what strangers read.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use nydus_rafs::Algorithm;
use nydus_tests::fixture::Fixtures;
use nydus_tests::fuse::Mounted;
use nydus_tests::needs::{Need, met};
use nydus_tests::oracle;
use nydus_tests::process::{run, shoal};
use nydus_tests::scratch::Scratch;
use nydus_tests::tree::{self, Table};

const NEEDS: &[Need] = &[Need::Root, Need::Fuse, Need::Program("python3")];

/// A tree with everything in it: a golden image, mounted.
struct Source {
    mounted: Mounted,
    table: Table,
}

impl Source {
    fn mount(fixtures: &Fixtures, dir: &Path) -> Result<Self> {
        let image = fixtures.path("out/v6-none");
        let mounted = Mounted::localfs(&image.join("bootstrap"), &image.join("blobs"), dir)?;
        let table = tree::read(&mounted.path)?;
        ensure!(table.len() > 2000, "the golden tree has only {} entries", table.len());
        Ok(Self { mounted, table })
    }
}

/// An image made by our `nydus-image`.
struct Made {
    bootstrap: PathBuf,
    blobs: PathBuf,
}

/// Runs `nydus-image create` with blob and bootstrap in `dir`; `stdin` holds prefetch patterns.
fn create(dir: &Path, flags: &[&str], source: &Path, stdin: &str) -> Result<Made> {
    let made = Made { bootstrap: dir.join("bootstrap"), blobs: dir.join("blobs") };
    fs::create_dir_all(&made.blobs)?;
    let mut command = Command::new(shoal("nydus-image")?);
    command.args(["create", "--log-level", "warn"]).args(flags).arg("--bootstrap").arg(&made.bootstrap);
    let mut child = command.arg("--blob-dir").arg(&made.blobs).arg(source).stdin(Stdio::piped()).spawn()?;
    child.stdin.take().context("a pipe")?.write_all(stdin.as_bytes())?;
    ensure!(child.wait()?.success(), "nydus-image create {flags:?} failed");
    Ok(made)
}

/// Reads the files of a folder.
fn files(dir: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        files.insert(entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path())?);
    }
    Ok(files)
}

#[test]
fn blobs_of_a_golden_tree_are_those_of_the_established_builder() -> Result<()> {
    if !met(NEEDS) {
        return Ok(());
    }
    let scratch = Scratch::new("golden")?;
    let fixtures = Fixtures::unpack(&scratch.dir("in")?)?;
    let source = Source::mount(&fixtures, &scratch.dir("source")?)?;
    let variants: [(&str, &[&str]); 5] = [
        ("v6-none", &["--compressor", "none"]),
        ("v6-lz4_block", &["--compressor", "lz4_block"]),
        ("v5-lz4_block", &["--compressor", "lz4_block", "--fs-version", "5"]),
        ("v5-aligned", &["--compressor", "lz4_block", "--fs-version", "5", "--aligned-chunk"]),
        ("v6-meta-only", &["--compressor", "zstd"]),
    ];
    for (variant, flags) in variants {
        let dir = scratch.dir(variant)?;
        let path = source.mounted.path.join(if variant == "v6-meta-only" { "many" } else { "" });
        let (one, again) = (create(&dir.join("1"), flags, &path, "")?, create(&dir.join("2"), flags, &path, "")?);
        let golden = files(&fixtures.path(&format!("out/{variant}/blobs")))?;
        ensure!(files(&one.blobs)?.keys().eq(golden.keys()), "{variant}: another blob than the established builder's");
        ensure!(files(&one.blobs)? == golden, "{variant}: the same name for other bytes");
        let boot = fs::read(&one.bootstrap)?;
        ensure!(boot == fs::read(&again.bootstrap)?, "{variant}: two bootstraps of one tree");
        let golden = fs::read(fixtures.path(&format!("out/{variant}/bootstrap")))?;
        ensure!(boot.len() == golden.len(), "{variant}: a bootstrap of another length");
        // Where an inode has several extended attributes, the established builder leaves them in the order of a hash map.
        let differing = boot.iter().zip(&golden).filter(|(ours, theirs)| ours != theirs).count();
        ensure!(differing < 500, "{variant}: {differing} bytes of the bootstrap differ");
        ensure!(differing == 0 || variant != "v6-meta-only", "{variant}: it has no attributes to differ in");
    }
    Ok(())
}

/// A form, and the patterns on standard input.
type Form = (&'static str, &'static [&'static str], &'static str);

const FORMS: &[Form] = &[
    ("v5", &["--fs-version", "5"], ""),
    ("v5-prefetch", &["--fs-version", "5", "--digester", "sha256", "--prefetch-policy", "fs"], "/sizes/m3_5\n/small\n"),
    ("v5-read-ahead", &["--fs-version", "5", "--prefetch-policy", "blob", "--chunk-size", "0x1000"], "/sizes/m3_5\n"),
    ("v6-sha256-4k", &["--digester", "sha256", "--chunk-size", "0x1000", "--compressor", "lz4_block"], ""),
    ("v6-toc-16m", &["--features", "blob-toc", "--chunk-size", "0x1000000"], ""),
    ("v6-batch", &["--batch-size", "0x40000", "--prefetch-policy", "fs"], "/"),
    ("v6-encrypt", &["--encrypt", "--compressor", "lz4_block"], ""),
    ("v6-encrypt-batch", &["--encrypt", "--batch-size", "0x8000", "--features", "blob-toc"], ""),
];

#[test]
fn every_form_of_a_golden_tree_is_read_by_a_stranger_and_by_our_daemon() -> Result<()> {
    if !met(NEEDS) {
        return Ok(());
    }
    let scratch = Scratch::new("forms")?;
    let fixtures = Fixtures::unpack(&scratch.dir("in")?)?;
    let source = Source::mount(&fixtures, &scratch.dir("source")?)?;
    let manifest = scratch.path().join("manifest.jsonl");
    oracle::manifest(&source.mounted.path, &manifest)?;
    let mut tars = Vec::new();
    for &(name, flags, stdin) in FORMS {
        let dir = scratch.dir(name)?;
        let made = create(&dir, flags, &source.mounted.path, stdin)?;
        run(Command::new(shoal("nydus-image")?).args(["check", "-D"]).arg(&made.blobs).arg(&made.bootstrap))?;
        oracle::verify(&made.bootstrap, &made.blobs, &manifest, "").with_context(|| format!("{name}: verify.py"))?;
        if name.starts_with("v6") {
            oracle::layout(&made.bootstrap).with_context(|| format!("{name}: layout_check.py"))?;
        }
        let mounted = Mounted::localfs(&made.bootstrap, &made.blobs, &dir)?;
        let lines = tree::differences(&tree::read(&mounted.path)?, &source.table, |_, _, _| {});
        ensure!(lines.is_empty(), "{name}: {} differences:\n{}", lines.len(), lines.join("\n"));
        tars.push(unpack(&made, &dir.join("tar"))?);
    }
    // A tar knows nothing of forms.
    ensure!(tars.iter().all(|tar| *tar == tars[0]), "two forms of one tree unpack to different tars");
    layers(&scratch, &tars[0], &source.table)
}

fn unpack(made: &Made, to: &Path) -> Result<Vec<u8>> {
    let mut command = Command::new(shoal("nydus-image")?);
    run(command
        .args(["unpack", "--log-level", "error", "-D"])
        .arg(&made.blobs)
        .arg("--output")
        .arg(to)
        .arg(&made.bootstrap))?;
    Ok(fs::read(to)?)
}

/// The same tree as a tar, packed and referred to: all of them hold what the tar does.
fn layers(scratch: &Scratch, tar: &[u8], tree: &Table) -> Result<()> {
    let dir = scratch.dir("layers")?;
    let (plain, gzip) = (dir.join("tar"), dir.join("tar.gz"));
    fs::write(&plain, tar)?;
    let mut encoder = flate2::write::GzEncoder::new(File::create(&gzip)?, flate2::Compression::fast());
    encoder.write_all(tar)?;
    encoder.finish()?;
    let forms: [(&str, &Path, &[&str]); 6] = [
        ("v5-tar", &plain, &["--type", "tar-rafs", "--fs-version", "5"]),
        ("v6-tar-batch", &plain, &["--type", "tar-rafs", "--batch-size", "0x40000"]),
        ("v6-targz", &gzip, &["--type", "targz-rafs", "--compressor", "lz4_block"]),
        ("v6-zran", &gzip, &["--type", "targz-ref", "--features", "blob-toc"]),
        ("v6-tar-ref", &plain, &["--type", "targz-ref"]),
        ("v6-tarfs", &plain, &["--type", "tar-tarfs"]),
    ];
    for (name, source, flags) in forms {
        let dir = scratch.dir(name)?;
        let made = create(&dir, flags, source, "")?;
        // What refers to a layer finds it under its digest.
        fs::copy(source, made.blobs.join(Algorithm::Sha256.digest(&fs::read(source)?).to_string()))?;
        let mounted = Mounted::localfs(&made.bootstrap, &made.blobs, &dir)?;
        let mut want = tree.clone();
        want.retain(|_, record| record.kind != 's');
        let lines = tree::differences(&tree::read(&mounted.path)?, &want, |path, got, want| {
            // Times before 1970 are those of 1970 when a layer is unpacked, and a tar has no root.
            if want.mtime.0 < 0 || path.as_os_str().is_empty() {
                got.mtime = want.mtime;
            }
        });
        ensure!(lines.is_empty(), "{name}: {} differences:\n{}", lines.len(), lines.join("\n"));
        let again = unpack(&made, &dir.join("tar"))?;
        // The time before 1970 took a header and a record of its own.
        let wanted = tar.len() - 1024;
        ensure!(again.len() == wanted, "{name}: unpacks to a tar of {} bytes, not {wanted}", again.len());
    }
    Ok(())
}
