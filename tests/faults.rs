//! Damage on the way from the blob to the reader.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nydus_rafs::{Bootstrap, Kind};
use nydus_tests::fixture::Fixtures;
use nydus_tests::fuse::Mounted;
use nydus_tests::needs::{Need, met};
use nydus_tests::scratch::Scratch;

/// The largest regular file of an image.
struct Largest {
    path: PathBuf,
    blob: String,
    /// Of its first chunk, in the blob as stored.
    stored: Range<u64>,
    /// First plain byte of each of its chunks.
    chunks: Vec<u64>,
}

fn largest(bootstrap: &Bootstrap<Vec<u8>>) -> Result<Largest> {
    let mut best: Option<(u64, PathBuf, nydus_rafs::Ino)> = None;
    let mut open = vec![(PathBuf::new(), bootstrap.root())];
    while let Some((path, dir)) = open.pop() {
        for entry in bootstrap.entries(dir, 0)? {
            let entry = entry?;
            if entry.name == "." || entry.name == ".." {
                continue;
            }
            let path = path.join(entry.name);
            match entry.kind {
                Kind::Directory => open.push((path, entry.ino)),
                Kind::Regular => {
                    let size = bootstrap.attr(entry.ino)?.size;
                    if best.as_ref().is_none_or(|(most, ..)| size > *most) {
                        best = Some((size, path, entry.ino));
                    }
                }
                _ => {}
            }
        }
    }
    let (size, path, ino) = best.context("the image has files")?;
    let extents = bootstrap.extents(ino, 0..size)?.collect::<Result<Vec<_>, _>>()?;
    let blob = extents.first().context("the file has a chunk")?.blob;
    let table = bootstrap.chunks(blob)?;
    let chunks: Vec<_> = extents.iter().flat_map(|extent| table.covering(extent.plain.clone())).collect();
    let stored = chunks.first().context("the chunk is in the table")?.stored.clone();
    let blob = bootstrap.blobs()[usize::from(blob)].id.to_string();
    Ok(Largest { path, blob, stored, chunks: chunks.iter().map(|chunk| chunk.plain.start).collect() })
}

/// Waits until the ready map knows these chunks: readers are answered while they are being written.
fn wait_recorded(map: &Path, chunks: &[u64]) -> Result<()> {
    let begin = Instant::now();
    loop {
        let bytes = fs::read(map)?;
        let (records, _) = bytes.get(128..).unwrap_or_default().as_chunks::<64>();
        let known: Vec<u64> =
            records.iter().map(|record| u64::from_le_bytes(*record.first_chunk().expect("64 bytes have 8"))).collect();
        if chunks.iter().all(|chunk| known.contains(chunk)) {
            return Ok(());
        }
        ensure!(begin.elapsed() < Duration::from_secs(10), "not recorded: {chunks:?}, only {known:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Option<i32>> {
    fs::read(path).map_err(|error| error.raw_os_error())
}

#[test]
fn a_flipped_byte_is_eio_and_a_log_line_and_good_again_once_the_source_is() -> Result<()> {
    if !met(&[Need::Root, Need::Fuse]) {
        return Ok(());
    }
    let scratch = Scratch::new("flip")?;
    let fixtures = Fixtures::unpack(&scratch.dir("in")?)?;
    let bootstrap = fixtures.path("out/v6-zstd/bootstrap");
    let Largest { path, blob, stored, .. } = largest(&Bootstrap::open(fs::read(&bootstrap)?)?)?;
    let file = fixtures.path(&format!("out/v6-zstd/blobs/{blob}"));
    let good = fs::read(&file)?;
    let mut bad = good.clone();
    bad[usize::try_from(stored.start + (stored.end - stored.start) / 2)?] ^= 0x10;
    fs::write(&file, &bad)?;

    let mounted = Mounted::localfs(&bootstrap, &fixtures.path("out/v6-zstd/blobs"), &scratch.dir("m")?)?;
    ensure!(read(&mounted.path.join(&path)) == Err(Some(nix::libc::EIO)), "the flipped byte was served");
    // `digest_validate` is false in this configuration, as in the guide: it must not matter.
    let log = mounted.process.log();
    ensure!(log.lines().any(|line| line.contains(&blob) && line.contains("chunk")), "no line names the blob:\n{log}");

    // Everything that does not need the chunk is readable.
    let mut readable = 0;
    let mut open = vec![mounted.path.clone()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                open.push(entry.path());
            } else if entry.file_type()?.is_file() && read(&entry.path()).is_ok() {
                readable += 1;
            }
        }
    }
    ensure!(readable > 50, "only {readable} files were readable beside the damaged chunk");

    fs::write(&file, &good)?;
    ensure!(read(&mounted.path.join(&path)).is_ok(), "a failure was remembered as the answer");
    Ok(())
}

#[test]
fn a_killed_nydusd_serves_no_wrong_byte_from_its_cache_when_it_comes_back() -> Result<()> {
    if !met(&[Need::Root, Need::Fuse]) {
        return Ok(());
    }
    let scratch = Scratch::new("kill")?;
    let fixtures = Fixtures::unpack(&scratch.dir("in")?)?;
    let bootstrap = fixtures.path("out/v6-zstd/bootstrap");
    let blobs = fixtures.path("out/v6-zstd/blobs");
    let Largest { path, blob, chunks, .. } = largest(&Bootstrap::open(fs::read(&bootstrap)?)?)?;
    let dir = scratch.dir("m")?;

    let want = {
        let mut mounted = Mounted::localfs(&bootstrap, &blobs, &dir)?;
        let want = read(&mounted.path.join(&path)).map_err(|errno| anyhow::anyhow!("reading: {errno:?}"))?;
        wait_recorded(&dir.join("cache").join(format!("{blob}.chunk_map")), &chunks)?;
        mounted.process.crash()?;
        nix::mount::umount2(&mounted.path, nix::mount::MntFlags::MNT_DETACH)?;
        want
    };
    // With the source gone, what was read before the kill is still there...
    fs::rename(&blobs, scratch.path().join("away"))?;
    fs::create_dir(&blobs)?;
    {
        let mut mounted = Mounted::localfs(&bootstrap, &blobs, &dir)?;
        ensure!(read(&mounted.path.join(&path)) == Ok(want.clone()), "the ready map did not survive the kill");
        mounted.process.crash()?;
        nix::mount::umount2(&mounted.path, nix::mount::MntFlags::MNT_DETACH)?;
    }
    // ... and a map that says more than the data file holds is not believed.
    let data = dir.join("cache").join(format!("{blob}.blob.data"));
    let len = fs::metadata(&data)?.len();
    fs::File::options().write(true).open(&data)?.set_len(0)?;
    fs::File::options().write(true).open(&data)?.set_len(len)?;
    let mounted = Mounted::localfs(&bootstrap, &blobs, &dir)?;
    match read(&mounted.path.join(&path)) {
        Ok(bytes) => ensure!(bytes == want, "zeros of a hole were served as the file"),
        Err(errno) => ensure!(errno == Some(nix::libc::EIO), "reading gave {errno:?}"),
    }
    Ok(())
}
