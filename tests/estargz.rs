//! eStargz images: read lazily by their own tables of contents where these can be believed, else unpacked like any other.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nydus_backend::registry::Client;
use nydus_convert::tar::Archive;
use nydus_rafs::Algorithm;
use nydus_tests::estargz::{TOC_DIGEST, layer, layer_with};
use nydus_tests::gate::{Gate, Pace};
use nydus_tests::image::{self, Layer};
use nydus_tests::needs::{CONTAINERD, met};
use nydus_tests::process::run;
use nydus_tests::registry::Registry;
use nydus_tests::scratch::Scratch;
use nydus_tests::smoke;
use nydus_tests::stack::Stack;
use nydus_tests::tree::{self, Table};
use serde_json::json;

/// Into what the files of the layers are cut: the largest has four chunks.
const CUT: usize = 1 << 20;
/// What the snapshotter says of a layer that it does not serve.
const UNPACKED: &str = "an eStargz layer is unpacked instead of read lazily";

struct Bed {
    stack: Stack,
    gate: Gate,
    client: Client,
    _registry: Registry,
    scratch: Scratch,
}

impl Bed {
    async fn new(purpose: &str) -> Result<Self> {
        let scratch = Scratch::new(purpose)?;
        let registry = Registry::start(&scratch.dir("registry")?)?;
        let client = image::client(&registry.host)?;
        let gate = Gate::open(&registry.host, Pace::default())?;
        let stack = Stack::start(&scratch.dir("stack")?, &gate.host, "nydus", None)?;
        Ok(Self { stack, gate, client, _registry: registry, scratch })
    }

    async fn push(&self, repository: &str, layers: &[Layer]) -> Result<String> {
        let config = json!({"Cmd": ["/bin/sh"], "Env": ["PATH=/bin"]});
        image::push(&self.client, repository, "1", layers, config).await?;
        Ok(format!("{}/{repository}:1", self.gate.host))
    }

    /// Mounts the image of `layers` by a view of its uppermost snapshot, and reads all of it.
    fn read(&self, layers: &[Layer], snapshotter: &str) -> Result<Table> {
        let at = self.scratch.dir(snapshotter)?;
        let target = at.to_string_lossy();
        let mut view = self.stack.ctr();
        view.args(["snapshots", "--snapshotter", snapshotter, "view", "--target", &target, "look", &chain_id(layers)]);
        let told = run(&mut view)?;
        let words: Vec<&str> = told.split_whitespace().collect();
        run(Command::new(words.first().context("a command")?).args(&words[1..]))?;
        let found = tree::read_overlay(&at);
        run(Command::new("umount").arg(&at))?;
        found.with_context(|| format!("reading the image on {snapshotter}"))
    }

    /// Runs the check of the smoke image.
    fn check(&self, image: &str, container: &str) -> Result<()> {
        let output = run(&mut self.stack.run(image, container, &["/bin/sh", "-c", smoke::CHECK]))?;
        ensure!(output.ends_with("checked\n"), "{output}\n{}", self.stack.log());
        Ok(())
    }
}

/// The name under which containerd keeps the uppermost layer.
fn chain_id(layers: &[Layer]) -> String {
    let ids = layers.iter().map(|layer| format!("sha256:{}", layer.diff_id));
    let joined =
        ids.reduce(|below, id| format!("sha256:{}", Algorithm::Sha256.digest(format!("{below} {id}").as_bytes())));
    joined.unwrap_or_default()
}

/// The tars of the smoke image without the one name that JSON cannot tell.
fn tars() -> Result<Vec<Vec<u8>>> {
    smoke::tars()?.into_iter().map(told_in_json).collect()
}

/// Takes entries out of a tar whose names are not UTF-8.
fn told_in_json(mut tar: Vec<u8>) -> Result<Vec<u8>> {
    let mut archive = Archive::new(&tar[..]);
    let mut lost = None;
    while let Some(entry) = archive.next_entry()? {
        if std::str::from_utf8(&entry.path).is_err() {
            lost = Some(
                usize::try_from(entry.at)?..usize::try_from(archive.position() + entry.size)?.next_multiple_of(512),
            );
        }
    }
    drop(lost.map(|lost| tar.drain(lost)));
    Ok(tar)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_read_lazily_and_looks_as_if_it_had_been_unpacked() -> Result<()> {
    if !met(CONTAINERD) {
        return Ok(());
    }
    let bed = Bed::new("estargz").await?;
    let layers = tars()?.iter().map(|tar| layer(tar, CUT)).collect::<Result<Vec<_>>>()?;
    let image = bed.push("lib/stargz", &layers).await?;
    let size: u64 = layers.iter().map(|layer| layer.gzip.len() as u64).sum();

    let cri = bed.stack.cri().await?;
    let before = bed.gate.passed();
    cri.pull(&image).await?;
    let pulled = (bed.gate.passed() - before).bytes;
    // The ends of three layers; some of them are smaller than what is asked for at once.
    ensure!(pulled < size / 4, "a pull took {pulled} of {size} bytes\n{}", bed.stack.log());
    ensure!(!bed.stack.log().contains(UNPACKED), "a layer was unpacked:\n{}", bed.stack.log());
    bed.check(&image, "check")?;

    let lazy = bed.read(&layers, "nydus")?;
    run(bed.stack.ctr().args(["images", "pull", "--plain-http", "--snapshotter", "overlayfs", &image]))?;
    let mut unpacked = bed.read(&layers, "overlayfs")?;
    // The table's own file is for those who read such layers; it is no file of the image.
    unpacked.remove(Path::new("stargz.index.json"));
    let lines = tree::differences(&lazy, &unpacked, |_, got, want| {
        // A directory that a layer changes without listing it gets the time of unpacking from containerd.
        if want.kind == 'd' && want.mtime.0 > 1_750_000_000 {
            got.mtime = want.mtime;
        }
    });
    ensure!(lines.is_empty() && lazy.len() > 230, "{} entries, other than unpacked:\n{}", lazy.len(), lines.join("\n"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_that_cannot_be_believed_or_served_are_unpacked_and_one_line_says_why() -> Result<()> {
    if !met(CONTAINERD) {
        return Ok(());
    }
    let bed = Bed::new("notstargz").await?;
    let cri = bed.stack.cri().await?;
    let plain = smoke::tars()?;
    let good = tars()?;
    let all = |cut| good.iter().map(|tar| layer(tar, cut)).collect::<Result<Vec<_>>>();
    let mut wrong_digest = all(CUT)?;
    wrong_digest[0].annotations.insert(TOC_DIGEST.to_owned(), format!("sha256:{}", "0".repeat(64)));
    let mut gzip = good.iter().map(|tar| Layer::new(tar)).collect::<Result<Vec<_>>>()?;
    gzip[0].annotations.clone_from(&all(CUT)?[0].annotations);
    let mut lost_name = all(CUT)?;
    lost_name[1] = layer(&plain[1], CUT)?;
    let mut uneven = all(CUT)?;
    uneven[1] = layer(&good[1], 1_000_000)?;
    let mut hostile = all(CUT)?;
    hostile[1] = layer_with(&good[1], CUT, |entries| {
        for entry in entries.iter_mut().filter(|entry| entry["type"] == "chunk") {
            entry["chunkOffset"] = json!(u64::MAX);
        }
    })?;
    let mut unnamed = all(CUT)?;
    unnamed.iter_mut().for_each(|layer| layer.annotations.clear());
    let table: [(&str, &[Layer], Option<&str>); 6] = [
        ("digest", &wrong_digest, Some("does not match the digest in the manifest")),
        ("footer", &gzip, Some("no eStargz footer")),
        ("name", &lost_name, Some("not UTF-8")),
        ("uneven", &uneven, Some("1000000 bytes")),
        ("hostile", &hostile, Some("has a chunk at byte 18446744073709551615")),
        ("unnamed", &unnamed, None),
    ];
    for (name, layers, why) in table {
        let image = bed.push(&format!("lib/{name}"), layers).await?;
        let before = bed.stack.log().matches(UNPACKED).count();
        cri.pull(&image).await?;
        bed.check(&image, name)?;
        let log = bed.stack.log();
        let lines: Vec<&str> = log.lines().filter(|line| line.contains(UNPACKED)).skip(before).collect();
        let told = why.is_none_or(|why| lines.first().is_some_and(|line| line.contains(why)));
        ensure!(lines.len() == usize::from(why.is_some()) && told, "{name}: {lines:#?}");
        bed.stack.remove_everything()?;
    }
    Ok(())
}
