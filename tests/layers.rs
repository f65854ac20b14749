//! As many layers as containerd takes: their directories do not fit the page that `mount(2)` reads.
//!
//! `SHOAL_CONTAINERD` names another containerd than the system's.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use nydus_backend::registry::Client;
use nydus_tests::image::{self, Layer};
use nydus_tests::needs::{CONTAINERD, met};
use nydus_tests::process::{run, shoal};
use nydus_tests::registry::Registry;
use nydus_tests::scratch::Scratch;
use nydus_tests::smoke;
use nydus_tests::stack::Stack;
use serde_json::{Value, json};

/// What overlayfs takes at most in containerd's own snapshotter.
const LAYERS: usize = 127;

/// A layer with one file, `/many/NUMBER`.
fn thin(number: usize) -> Result<Layer> {
    let mut tar = tar::Builder::new(Vec::new());
    let text = format!("{number}\n");
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o644);
    header.set_size(text.len() as u64);
    header.set_mtime(1_700_000_000);
    tar.append_data(&mut header, format!("many/{number}"), text.as_bytes())?;
    Layer::new(&tar.into_inner()?)
}

/// Puts ordinary layers on top of an image, as a build does that begins with it.
async fn put_on_top(client: &Client, repository: &str, tag: &str, layers: &[Layer]) -> Result<()> {
    let manifest = client.manifest(repository, tag).await?;
    let mut manifest: Value = serde_json::from_slice(&manifest.bytes)?;
    let digest = manifest["config"]["digest"].as_str().context("a manifest has a config")?.to_owned();
    let size = manifest["config"]["size"].as_u64().context("a config has a size")?;
    let mut config: Value = serde_json::from_slice(&client.blob_range(repository, &digest, 0..size).await?)?;
    for layer in layers {
        let digest = format!("sha256:{}", nydus_rafs::Algorithm::Sha256.digest(&layer.gzip));
        client.push_blob(repository, &digest, layer.gzip.clone().into()).await?;
        let all = manifest["layers"].as_array_mut().context("a manifest has layers")?;
        all.push(json!({
            "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": digest, "size": layer.gzip.len(),
        }));
        let ids = config["rootfs"]["diff_ids"].as_array_mut().context("a config has diff ids")?;
        ids.push(json!(format!("sha256:{}", layer.diff_id)));
    }
    config.as_object_mut().context("a config is an object")?.remove("history");
    let config = serde_json::to_vec(&config)?;
    let digest = format!("sha256:{}", nydus_rafs::Algorithm::Sha256.digest(&config));
    client.push_blob(repository, &digest, config.clone().into()).await?;
    manifest["config"]["digest"] = json!(digest);
    manifest["config"]["size"] = json!(config.len());
    let kind = manifest["mediaType"].as_str().unwrap_or("application/vnd.oci.image.manifest.v1+json").to_owned();
    client.put_manifest(repository, "topped", &kind, serde_json::to_vec(&manifest)?.into()).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn images_of_127_layers_run_plain_and_on_top_of_a_nydus_image() -> Result<()> {
    if !met(CONTAINERD) {
        return Ok(());
    }
    let scratch = Scratch::new("layers")?;
    let registry = Registry::start(&scratch.dir("registry")?)?;
    let client = image::client(&registry.host)?;
    let config = json!({"Cmd": ["/bin/sh"], "Env": ["PATH=/bin"]});
    let base = smoke::layers()?;
    image::push(&client, "base", "oci", &base, config.clone()).await?;
    let mut plain = base.clone();
    for number in base.len()..LAYERS {
        plain.push(thin(number)?);
    }
    image::push(&client, "many", "oci", &plain, config).await?;
    let mut convert = Command::new(shoal("nydusify")?);
    let named = |name: &str| format!("{}/{name}", registry.host);
    convert.args(["convert", "--source", &named("base:oci"), "--target", &named("base:nydus")]);
    run(convert.arg("--work-dir").arg(scratch.path().join("work")))?;
    // The converted base has a bootstrap besides its blobs.
    let on_top = &plain[base.len() + 1..];
    put_on_top(&client, "base", "nydus", on_top).await?;

    // Deep, as roots are: their names alone would fill the page three times.
    let deep = scratch.path().join("var/lib/containerd");
    let binary = std::env::var_os("SHOAL_CONTAINERD").map(Into::into);
    let stack = Stack::start(&deep, &registry.host, "nydus", binary)?;
    let cri = stack.cri().await?;
    for (image, many) in [(named("many:oci"), plain.len() - base.len()), (named("base:topped"), on_top.len())] {
        cri.pull(&image).await.with_context(|| format!("pulling {image}\n{}", stack.log()))?;
        let script = format!("{} && ls /many | wc -l && cat /many/* | wc -l", smoke::CHECK);
        let name = format!("many-{many}-{}", std::process::id());
        let output = run(&mut stack.run(&image, &name, &["/bin/sh", "-c", &script])).with_context(|| stack.log())?;
        ensure!(output.ends_with(&format!("checked\n{many}\n{many}\n")), "{image}: {output:?}");
    }
    Ok(())
}
