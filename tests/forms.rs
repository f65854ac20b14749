//! Every form in which `nydusify convert` writes an image shows the same files.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nydus_backend::registry::Client;
use nydus_rafs::{Bootstrap, Compressor};
use nydus_tests::converted::Converted;
use nydus_tests::fuse::Mounted;
use nydus_tests::needs::{Need, met};
use nydus_tests::process::{run, shoal};
use nydus_tests::registry::Registry;
use nydus_tests::scratch::Scratch;
use nydus_tests::tree::{self, Table};
use nydus_tests::{image, smoke};
use serde_json::json;

const NEEDS: &[Need] = &[Need::Root, Need::Fuse, Need::Program("docker-registry"), Need::Program("busybox")];

struct Bed {
    scratch: Scratch,
    registry: Registry,
    client: Client,
}

impl Bed {
    async fn new(purpose: &str) -> Result<Self> {
        let scratch = Scratch::new(purpose)?;
        let registry = Registry::start(&scratch.dir("registry")?)?;
        let client = image::client(&registry.host)?;
        image::push(&client, "app", "1", &smoke::layers()?, json!({"Cmd": ["/bin/sh"]})).await?;
        Ok(Self { scratch, registry, client })
    }

    /// Converts to `target:nydus`.
    fn convert(&self, target: &str, arguments: &[&str]) -> Result<String> {
        let host = &self.registry.host;
        let mut command = Command::new(shoal("nydusify")?);
        command.args(["convert", "--source", &format!("{host}/app:1"), "--target", &format!("{host}/{target}:nydus")]);
        run(command.arg("--work-dir").arg(self.scratch.path().join("work")).args(arguments))
    }

    async fn pulled(&self, target: &str) -> Result<Converted> {
        Converted::pull(&self.client, target, "nydus", &self.scratch.dir(target)?).await
    }

    fn mounted(&self, image: &Converted, target: &str) -> Result<Table> {
        let fuse = Mounted::localfs(&image.bootstrap, &image.blobs, &self.scratch.dir(&format!("{target}-mount"))?)?;
        tree::read(&fuse.path).context("reading the mount")
    }
}

fn opened(path: &Path) -> Result<Bootstrap<Vec<u8>>> {
    Ok(Bootstrap::open(std::fs::read(path)?)?)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_form_shows_the_same_files() -> Result<()> {
    if !met(NEEDS) {
        return Ok(());
    }
    let bed = Bed::new("forms").await?;
    bed.convert("plain", &[])?;
    let plain = bed.pulled("plain").await?;
    let wanted = tokio::task::block_in_place(|| bed.mounted(&plain, "plain"))?;
    ensure!(wanted.len() > 200, "the image has only {} entries", wanted.len());
    let forms: [(&str, &[&str], u8, Compressor); 7] = [
        ("v5", &["--fs-version", "5"], 5, Compressor::Zstd),
        ("v5-lz4", &["--fs-version", "5", "--compressor", "lz4_block", "--fs-align-chunk"], 5, Compressor::Lz4Block),
        ("none", &["--compressor", "none"], 6, Compressor::None),
        ("lz4", &["--compressor", "lz4_block", "--fs-chunk-size", "0x1000"], 6, Compressor::Lz4Block),
        ("batch", &["--batch-size", "0x40000"], 6, Compressor::Zstd),
        ("ref", &["--oci-ref"], 6, Compressor::Gzip),
        ("oci", &["--oci", "--no-verify"], 6, Compressor::Zstd),
    ];
    for (name, arguments, version, compressor) in forms {
        bed.convert(name, arguments).context(name)?;
        let image = bed.pulled(name).await.context(name)?;
        let found = tokio::task::block_in_place(|| bed.mounted(&image, name)).context(name)?;
        let lines = tree::differences(&found, &wanted, |_, _, _| ());
        ensure!(lines.is_empty(), "{name} shows other files:\n  {}", lines.join("\n  "));
        let bootstrap = opened(&image.bootstrap)?;
        ensure!(bootstrap.version() == version, "{name} has version {}", bootstrap.version());
        let stored = bootstrap.flags().compressor();
        ensure!(stored == compressor, "{name} is compressed with {stored:?}");
        let last = image.manifest["layers"].as_array().and_then(|layers| layers.last()).context("a bootstrap layer")?;
        let told = &last["annotations"]["containerd.io/snapshot/nydus-fs-version"];
        ensure!(*told == version.to_string().as_str(), "{name} says version {told}");
    }
    Ok(())
}
