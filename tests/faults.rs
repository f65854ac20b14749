//! Damage on the way from the blob to the reader.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nydus_rafs::{Bootstrap, Kind};
use nydus_tests::fixture::Fixtures;
use nydus_tests::fuse::Mounted;
use nydus_tests::needs::{Need, met};
use nydus_tests::scratch::Scratch;

/// Finds the largest regular file of an image: its path, blob, and the stored bytes of its first chunk.
fn largest(bootstrap: &Bootstrap<Vec<u8>>) -> Result<(PathBuf, String, std::ops::Range<u64>)> {
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
    let (_, path, ino) = best.context("the image has files")?;
    let extent = bootstrap.extents(ino, 0..1)?.next().context("the file has a chunk")??;
    let table = bootstrap.chunks(extent.blob)?;
    let chunk = table.covering(extent.plain.clone()).first().context("the chunk is in the table")?;
    Ok((path, bootstrap.blobs()[usize::from(extent.blob)].id.to_string(), chunk.stored.clone()))
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
    let (path, blob, stored) = largest(&Bootstrap::open(fs::read(&bootstrap)?)?)?;
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
    let (path, blob, _) = largest(&Bootstrap::open(fs::read(&bootstrap)?)?)?;
    let dir = scratch.dir("m")?;

    let want = {
        let mut mounted = Mounted::localfs(&bootstrap, &blobs, &dir)?;
        let want = read(&mounted.path.join(&path)).map_err(|errno| anyhow::anyhow!("reading: {errno:?}"))?;
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
