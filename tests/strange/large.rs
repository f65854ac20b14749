//! Large images: many entries, and files beyond what a tar header's size field holds.
//!
//! `SHOAL_SOAK=1` makes them ten times larger: a million entries, and 8 GiB of bytes that are all there.

use std::io::{Read as _, Seek as _, SeekFrom};

use anyhow::{Result, ensure};
use nydus_rafs::Digest;
use nydus_tests::converted::Converted;
use nydus_tests::fuse::Mounted;
use nydus_tests::oracle::Erofs;
use nydus_tests::rawtar::{Entry, dir, file, gone, hardlink, symlink, unended};
use sha2::{Digest as _, Sha256};

use super::Court;
use super::cases::{Case, Source, Verdict};
use super::made::{Image, Layer, gzip};

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

fn soak() -> bool {
    std::env::var_os("SHOAL_SOAK").is_some()
}

/// Half of the entries lie in one directory, the rest in directories of a thousand.
fn many(entries: usize) -> Image {
    let mut lower = vec![dir("flat").mode(0o711)];
    lower.extend((0..entries / 2).map(|i| file(format!("flat/{i:07}"), i.to_string())));
    for folder in 0..entries / 2 / 1000 {
        lower.push(dir(format!("deep/{folder}")).owner(1, 2));
        lower.extend((0..999).map(|i| {
            let name = format!("deep/{folder}/{i}");
            match i % 10 {
                1 => symlink(name, format!("{}", i - 1)),
                2 => hardlink(name, format!("deep/{folder}/{}", i - 2)),
                3 => file(name, ""),
                4 => file(name, format!("{folder}-{i}")).pax("SCHILY.xattr.user.n", i.to_string()),
                _ => file(name, format!("{folder}-{i}")),
            }
        }));
    }
    let mut upper: Vec<Entry> = (0..entries / 2).step_by(7).map(|i| gone(format!("flat/.wh.{i:07}"))).collect();
    upper.extend([dir("deep/0"), gone("deep/0/.wh..wh..opq"), gone("deep/.wh.1")]);
    upper.extend((0..entries / 20).map(|i| file(format!("deep/0/{i}"), i.to_string())));
    Image::new(vec![Layer::of(&lower), Layer::of(&upper)])
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_of_many_entries_is_what_containerd_makes_of_it() -> Result<()> {
    let Some(court) = Court::open("many").await? else { return Ok(()) };
    let entries = if soak() { 1_000_000 } else { 100_000 };
    let source = Source::Pushed(many(entries));
    court.judge(&Case { name: "many entries", verdict: Verdict::Same, source, arguments: &[] }).await
}

/// A sparse file with bytes at both sides of where 32 bits and eleven octal digits end.
const PIECES: [(u64, &[u8]); 4] =
    [(0, b"head"), (4 * GIB - 2, b"four"), (8 * GIB - 3, b"eight!"), (8 * GIB + 70_000, b"tail")];

fn sparse() -> Entry {
    let mut body = format!("{}\n", PIECES.len());
    for (offset, bytes) in PIECES {
        body.push_str(&format!("{offset}\n{}\n", bytes.len()));
    }
    let mut body = body.into_bytes();
    body.resize(512, 0);
    PIECES.iter().for_each(|(_, bytes)| body.extend(*bytes));
    file("GNUSparseFile.1/s", body)
        .pax("GNU.sparse.major", "1")
        .pax("GNU.sparse.minor", "0")
        .pax("GNU.sparse.name", "s")
        .pax("GNU.sparse.realsize", (8 * GIB + 70_004).to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sparse_file_of_8_gib_has_its_bytes_where_they_belong() -> Result<()> {
    let Some(court) = Court::open("sparse").await? else { return Ok(()) };
    let work = court.scratch.dir("image")?;
    let layers = vec![Layer::of(&[sparse(), file("after", "1")])];
    Image::new(layers).push(&court.client, "sparse", &court.scratch.path().join("registry/data")).await?;
    let source = format!("{}/sparse:oci", court.registry.host);
    let case = Case { name: "sparse", verdict: Verdict::Same, source: Source::Told(|_| ()), arguments: &[] };
    tokio::task::block_in_place(|| court.convert(&case, &source, "sparse", &work))?;
    let image = Converted::pull(&court.client, "sparse", "nydus", &work).await?;
    tokio::task::block_in_place(|| {
        let erofs = Erofs::mount(&image.bootstrap, &image.devices(&work.join("devices"))?, &work.join("erofs"))?;
        let fuse = Mounted::localfs(&image.bootstrap, &image.blobs, &work)?;
        for root in [&fuse.path, &erofs.path] {
            let mut opened = std::fs::File::open(root.join("s"))?;
            ensure!(opened.metadata()?.len() == 8 * GIB + 70_004, "the size is {}", opened.metadata()?.len());
            for (offset, bytes) in PIECES {
                // A byte of the hole at each side, but where there is none.
                let from = offset.saturating_sub(1);
                let mut want = if offset == 0 { Vec::new() } else { vec![0] };
                want.extend(bytes);
                opened.seek(SeekFrom::Start(from))?;
                let mut found = vec![0xff; want.len()];
                opened.read_exact(&mut found)?;
                ensure!(found == want, "at {from} of {} there is {found:?}", root.display());
            }
            ensure!(std::fs::read(root.join("after"))? == b"1", "what follows the sparse file is lost");
        }
        Ok(())
    })
}

/// A file of 8 GiB and a bit, each GiB of other bytes, as members that each hold 16 MiB of it.
fn full() -> Layer {
    let mut hash = Sha256::new();
    let mut stored = Vec::new();
    let header = unended(&[file("full", "").size(8 * GIB - 1), Entry::new(b'0', "end")]);
    // The body ends a byte before the block, and the next header follows it.
    let (before, after) = header.split_at(512);
    hash.update(before);
    stored.extend(gzip(before));
    for gib in 0..8_u64 {
        let mut block: Vec<u8> =
            (0..16 * MIB).map(|i| (i.wrapping_mul(2_654_435_761) >> (gib + 9)).to_le_bytes()[0]).collect();
        let member = gzip(&block);
        for _ in 0..GIB / (16 * MIB) - 1 {
            hash.update(&block);
            stored.extend_from_slice(&member);
        }
        if gib == 7 {
            *block.last_mut().expect("16 MiB") = 0;
        }
        hash.update(&block);
        stored.extend(gzip(&block));
    }
    let end = [after, &[0; 1024]].concat();
    hash.update(&end);
    stored.extend(gzip(&end));
    Layer::streamed(stored, &Digest(hash.finalize().into()))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_file_of_8_gib_is_what_containerd_makes_of_it() -> Result<()> {
    if !soak() {
        // The sparse file above is as large; its holes are all that is not read here.
        return Ok(());
    }
    let Some(court) = Court::open("full").await? else { return Ok(()) };
    let source = Source::Pushed(Image::new(vec![full()]));
    court.judge(&Case { name: "full", verdict: Verdict::Same, source, arguments: &[] }).await
}
