//! Every form in which `nydusify convert` writes an image shows the same files.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nydus_backend::registry::{BlobRequest, Client};
use nydus_rafs::{Bootstrap, Compressor};
use nydus_tests::authority::Authority;
use nydus_tests::containerd::{Containerd, Options};
use nydus_tests::converted::Converted;
use nydus_tests::front::Front;
use nydus_tests::fuse::Mounted;
use nydus_tests::liar::descriptor;
use nydus_tests::needs::{CONTAINERD, Need, met};
use nydus_tests::process::{Process, run, shoal};
use nydus_tests::registry::Registry;
use nydus_tests::scratch::{Scratch, mounts_below};
use nydus_tests::tree::{self, Table};
use nydus_tests::{image, smoke};
use serde_json::{Value, json};

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
        if name == "ref" {
            // The original layers come from the registry, their table from another object there.
            let dir = bed.scratch.dir("ref-registry")?;
            let config = json!({
                "device": {
                    "backend": {"type": "registry", "config": {"scheme": "http", "host": bed.registry.host, "repo": name}},
                    "cache": {"type": "blobcache", "config": {"work_dir": dir.join("cache")}},
                },
                "mode": "direct", "digest_validate": true, "enable_xattr": true,
            });
            let fuse = Mounted::start(&image.bootstrap, &config, &dir)?;
            let found = tokio::task::block_in_place(|| tree::read(&fuse.path))?;
            let lines = tree::differences(&found, &wanted, |_, _, _| ());
            ensure!(lines.is_empty(), "{name} shows other files over a registry:\n  {}", lines.join("\n  "));
        }
        let told = &last["annotations"]["containerd.io/snapshot/nydus-fs-version"];
        ensure!(*told == version.to_string().as_str(), "{name} says version {told}");
    }
    Ok(())
}

impl Bed {
    /// Pushes an index of the image for two platforms under `app:both`; returns the digests of its manifests.
    async fn push_index(&self) -> Result<Vec<String>> {
        let mut entries = Vec::new();
        let manifest: Value = serde_json::from_slice(&self.client.manifest("app", "1").await?.bytes)?;
        for architecture in [HOST, OTHER] {
            let mut manifest = manifest.clone();
            let digest = manifest["config"]["digest"].as_str().context("a digest")?;
            let bytes = self.client.blob("app", digest, &BlobRequest::default()).await?.read(1 << 20).await?;
            let mut config: Value = serde_json::from_slice(&bytes)?;
            config["architecture"] = architecture.into();
            let bytes = serde_json::to_vec(&config)?;
            let config = descriptor(CONFIG, &bytes);
            self.client.push_blob("app", config["digest"].as_str().unwrap_or_default(), bytes.into()).await?;
            manifest["config"] = config;
            let bytes = serde_json::to_vec(&manifest)?;
            let mut entry = descriptor(MANIFEST, &bytes);
            let digest = entry["digest"].as_str().unwrap_or_default().to_owned();
            self.client.put_manifest("app", &digest, MANIFEST, bytes.into()).await?;
            entry["platform"] = json!({"architecture": architecture, "os": "linux"});
            entries.push(entry);
        }
        let digests = entries.iter().map(|entry| entry["digest"].as_str().unwrap_or_default().to_owned()).collect();
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries});
        self.client.put_manifest("app", "both", INDEX, serde_json::to_vec(&index)?.into()).await?;
        Ok(digests)
    }

    fn convert_both(&self, target: &str, arguments: &[&str]) -> Result<String> {
        let host = &self.registry.host;
        let mut command = Command::new(shoal("nydusify")?);
        command.args(["convert", "--source", &format!("{host}/app:both")]);
        command.args(["--target", &format!("{host}/{target}:nydus")]);
        run(command.arg("--work-dir").arg(self.scratch.path().join("work")).args(arguments))
    }

    async fn document(&self, repo: &str, target: &str) -> Result<Value> {
        Ok(serde_json::from_slice(&self.client.manifest(repo, target).await?.bytes)?)
    }
}

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const HOST: &str = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
const OTHER: &str = "s390x";

#[tokio::test(flavor = "multi_thread")]
async fn an_index_is_converted_whole_in_part_or_beside_the_original() -> Result<()> {
    if !met(CONTAINERD) {
        return Ok(());
    }
    let bed = Bed::new("index").await?;
    let sources = bed.push_index().await?;
    bed.convert_both("all", &["--all-platforms"])?;
    let all = bed.document("all", "nydus").await?;
    let platforms = |index: &Value| -> Vec<String> {
        let entries = index["manifests"].as_array().into_iter().flatten();
        entries.map(|entry| entry["platform"]["architecture"].as_str().unwrap_or("none").to_owned()).collect()
    };
    ensure!(platforms(&all) == [HOST, OTHER], "the index is {all}");

    bed.convert_both("one", &["--platform", &format!("linux/{OTHER}")])?;
    let one = bed.document("one", "nydus").await?;
    let from = &one["annotations"]["containerd.io/snapshot/nydus-source-digest"];
    ensure!(*from == sources[1].as_str(), "the platform was not heeded: {one}");

    bed.convert_both("merged", &["--merge-platform"])?;
    let merged = bed.document("merged", "nydus").await?;
    ensure!(platforms(&merged) == [HOST, HOST], "the merged index is {merged}");
    ensure!(merged["manifests"][0]["digest"] == sources[0].as_str(), "the original is not first, or not the original");
    let kind = "application/vnd.nydus.image.manifest.v1+json";
    ensure!(merged["manifests"][1]["artifactType"] == kind, "the converted one is not told apart: {merged}");

    // Who knows no nydus images still gets the original.
    let options = Options::plain(&bed.registry.host);
    let containerd = Containerd::start(&bed.scratch.dir("ctd")?, &options)?;
    let name = format!("{}/merged:nydus", bed.registry.host);
    run(containerd.ctr().args(["images", "pull", "--plain-http", "--snapshotter", "overlayfs", &name]))?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_converted_image_is_found_from_its_original() -> Result<()> {
    if !met(NEEDS) {
        return Ok(());
    }
    let bed = Bed::new("referrer").await?;
    bed.convert("app", &["--with-referrer"])?;
    let source = bed.client.manifest("app", "1").await?;
    let made = bed.client.manifest("app", "nydus").await?;
    let manifest: Value = serde_json::from_slice(&made.bytes)?;
    ensure!(manifest["subject"]["digest"] == source.digest.as_str(), "the subject is {}", manifest["subject"]);
    let known = bed.client.referrers("app", &source.digest, None).await?;
    let found: Vec<_> = known.manifests().iter().map(|entry| entry.digest().to_string()).collect();
    ensure!(found == [made.digest], "the referrers are {found:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_is_the_same_image_with_everything_that_it_needs() -> Result<()> {
    if !met(NEEDS) {
        return Ok(());
    }
    let bed = Bed::new("copy").await?;
    bed.convert("ref", &["--oci-ref"])?;
    let made = bed.client.manifest("ref", "nydus").await?;
    let other = Registry::start(&bed.scratch.dir("other")?)?;
    let archive = bed.scratch.path().join("copy.tar");
    let copy = |from: String, to: String| -> Result<String> {
        let mut command = Command::new(shoal("nydusify")?);
        command.args(["copy", "--source", &from, "--target", &to]);
        run(command.arg("--work-dir").arg(bed.scratch.path().join("work")))
    };
    copy(format!("{}/ref:nydus", bed.registry.host), format!("file://{}", archive.display()))?;
    copy(format!("file://{}", archive.display()), format!("{}/far:copied", other.host))?;
    let client = image::client(&other.host)?;
    ensure!(client.manifest("far", "copied").await?.digest == made.digest, "the copy is another image");
    // With the layers that it refers to.
    Converted::pull(&client, "far", "copied", &bed.scratch.dir("pulled")?).await?;
    // Converting what is converted copies it too.
    let mut convert = Command::new(shoal("nydusify")?);
    convert.args(["convert", "--source", &format!("{}/ref:nydus", bed.registry.host)]);
    convert.args(["--target", &format!("{}/near:passed", other.host)]);
    run(convert.arg("--work-dir").arg(bed.scratch.path().join("work")))?;
    ensure!(client.manifest("near", "passed").await?.digest == made.digest, "a nydus image was changed");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_that_fails_is_explained() -> Result<()> {
    if !met(NEEDS) || !met(&[Need::Program("openssl")]) {
        return Ok(());
    }
    let bed = Bed::new("login").await?;
    let authority = Authority::make(&bed.scratch.dir("authority")?)?;
    let front = Front::start(&bed.registry.host, &authority).await?;
    let docker = bed.scratch.dir("docker")?;
    let config = docker.join("config.json");
    let refused = || -> Result<String> {
        let mut command = Command::new(shoal("nydusify")?);
        command.args(["convert", "--source", &format!("{}/app:1", front.host), "--target", "localhost:1/x:1"]);
        command.arg("--work-dir").arg(bed.scratch.path().join("work"));
        command.env("DOCKER_CONFIG", &docker).env("SSL_CERT_FILE", authority.ca());
        Ok(format!("{:#}", run(&mut command).err().context("it was let in")?))
    };
    let says = |said: &str, words: &[&str]| -> Result<()> {
        for word in words {
            ensure!(said.contains(word), "`{word}` is not in: {said}");
        }
        Ok(())
    };
    says(&refused()?, &["no docker configuration", &format!("docker login {}", front.host), "401"])?;
    std::fs::write(&config, "{}")?;
    says(&refused()?, &["holds no entry", &config.display().to_string(), "docker login", "401"])?;
    std::fs::write(&config, front.docker_config().replace("\"auth\":\"", "\"auth\":\"eDp5\", \"was\":\""))?;
    says(&refused()?, &[&format!("used entry `{}`", front.host), &config.display().to_string(), "/token", "401"])?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_chunk_dictionary_holds_is_used_and_brought_along() -> Result<()> {
    if !met(NEEDS) {
        return Ok(());
    }
    let bed = Bed::new("dictionary").await?;
    bed.convert("base", &[])?;
    let base = bed.pulled("base").await?;
    let wanted = tokio::task::block_in_place(|| bed.mounted(&base, "base"))?;
    let named = format!("bootstrap:registry:{}/base:nydus", bed.registry.host);
    bed.convert("derived", &["--chunk-dict", &named])?;
    let derived = bed.pulled("derived").await?;
    let found = tokio::task::block_in_place(|| bed.mounted(&derived, "derived"))?;
    let lines = tree::differences(&found, &wanted, |_, _, _| ());
    ensure!(lines.is_empty(), "with a dictionary it shows other files:\n  {}", lines.join("\n  "));
    let ids = |image: &Converted| -> Result<Vec<String>> {
        Ok(opened(&image.bootstrap)?.blobs().iter().map(|blob| blob.id.to_string()).collect())
    };
    let (mut known, mut used) = (ids(&base)?, ids(&derived)?);
    known.sort();
    used.sort();
    ensure!(used == known, "the same image was stored again: {used:?}, not {known:?}");
    let local = format!("bootstrap:local:{}", base.bootstrap.display());
    let said = bed.convert("elsewhere", &["--chunk-dict", &local]).err().context("blobs that nobody brings")?;
    ensure!(format!("{said:#}").contains("of the chunk dictionary is not in"), "{said:#}");
    bed.convert("base", &["--chunk-dict", &local])?;
    Ok(())
}

impl Bed {
    fn check(&self, target: &str, source: Option<&str>) -> Result<String> {
        let host = &self.registry.host;
        let mut command = Command::new(shoal("nydusify")?);
        command.args(["check", "--target", &format!("{host}/{target}:nydus")]);
        if let Some(source) = source {
            command.args(["--source", &format!("{host}/{source}")]);
        }
        run(command.arg("--work-dir").arg(self.scratch.path().join("output")))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_tells_an_image_from_one_that_is_not_its_source() -> Result<()> {
    if !met(NEEDS) {
        return Ok(());
    }
    let bed = Bed::new("check").await?;
    for (name, arguments) in [("six", &[][..]), ("five", &["--fs-version", "5"]), ("original", &["--oci-ref"])] {
        bed.convert(name, arguments)?;
        bed.check(name, None).with_context(|| name.to_owned())?;
        bed.check(name, Some("app:1")).with_context(|| name.to_owned())?;
    }
    let at = bed.scratch.path().join("image-fs");
    let mut mount = Command::new(shoal("nydusify")?);
    mount.args(["mount", "--target", &format!("{}/six:nydus", bed.registry.host), "--mount-path"]).arg(&at);
    mount.arg("--work-dir").arg(bed.scratch.path().join("mount"));
    let mut mounted = Process::start("nydusify", mount, &bed.scratch.path().join("mount.log"))?;
    mounted.wait_until(Duration::from_secs(20), || at.join("data/random").exists())?;
    ensure!(std::fs::read(at.join("data/random"))? == smoke::random(), "the mount shows another file");
    mounted.stop(Duration::from_secs(20))?;
    ensure!(
        mounts_below(&at).is_empty() && !bed.scratch.path().join("mount").exists(),
        "something is left of the mount"
    );

    // A file more, another command, a layer without its mark, a blob that is not there.
    let mut layers = smoke::layers()?;
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(4);
    tar.append_data(&mut header, "etc/more", &b"more"[..])?;
    let more = image::Layer::new(&tar.into_inner()?)?;
    let told = |result: Result<String>| result.err().map(|error| format!("{error:#}")).unwrap_or_default();
    image::push(&bed.client, "app", "other", &[&layers[..], &[more]].concat(), json!({"Cmd": ["/bin/sh"]})).await?;
    let text = told(bed.check("six", Some("app:other")));
    ensure!(text.contains("etc"), "another source is not told: {text}");
    image::push(&bed.client, "app", "command", &layers.split_off(0), json!({"Cmd": ["/bin/other"]})).await?;
    let text = told(bed.check("six", Some("app:command")));
    ensure!(text.contains("configuration") && text.contains("/bin/other"), "another command is not told: {text}");

    let mut manifest: Value = serde_json::from_slice(&bed.client.manifest("six", "nydus").await?.bytes)?;
    let media_type = manifest["mediaType"].as_str().context("a media type")?.to_owned();
    let whole = manifest.clone();
    manifest["layers"][0]["annotations"] = json!({});
    bed.client.put_manifest("six", "nydus", &media_type, serde_json::to_vec(&manifest)?.into()).await?;
    let text = told(bed.check("six", None));
    ensure!(text.contains("nydus-blob"), "a layer without its mark is not told: {text}");
    manifest.clone_from(&whole);
    manifest["layers"][0]["digest"] = manifest["layers"][1]["digest"].clone();
    bed.client.put_manifest("six", "nydus", &media_type, serde_json::to_vec(&manifest)?.into()).await?;
    let text = told(bed.check("six", None));
    ensure!(text.contains("does not name it"), "a blob that is not named is not told: {text}");
    Ok(())
}
