//! Images in archives and OCI layouts, on either side of a conversion: what containerd exports and imports, what old
//! dockers saved, and directories.
#![expect(clippy::print_stdout, reason = "why nothing can be run is for people to read")]

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nydus_backend::registry::Client;
use nydus_tests::containerd::{Containerd, Options};
use nydus_tests::converted::Converted;
use nydus_tests::fuse::Mounted;
use nydus_tests::needs::{CONTAINERD, met};
use nydus_tests::process::{run, shoal};
use nydus_tests::registry::Registry;
use nydus_tests::scratch::Scratch;
use nydus_tests::stack::Stack;
use nydus_tests::{image, smoke, tree};
use serde_json::{Value, json};

struct Bed {
    scratch: Scratch,
    registry: Registry,
    client: Client,
    /// The layers of the image as a registry gets it.
    wanted: Value,
}

impl Bed {
    async fn new(purpose: &str) -> Result<Self> {
        let scratch = Scratch::new(purpose)?;
        let registry = Registry::start(&scratch.dir("registry")?)?;
        let client = image::client(&registry.host)?;
        image::push(&client, "app", "1", &smoke::layers()?, json!({"Cmd": ["/bin/sh"]})).await?;
        let mut bed = Self { scratch, registry, client, wanted: Value::Null };
        bed.convert(&[])?;
        bed.wanted = bed.layers_in_registry().await?;
        Ok(bed)
    }

    fn name(&self, tag: &str) -> String {
        format!("{}/app:{tag}", self.registry.host)
    }

    fn convert(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(shoal("nydusify")?);
        command.args(["convert", "--source", &self.name("1"), "--target", &self.name("nydus")]);
        run(command.arg("--work-dir").arg(self.scratch.path().join("work")).args(arguments))
    }

    async fn layers_in_registry(&self) -> Result<Value> {
        let manifest: Value = serde_json::from_slice(&self.client.manifest("app", "nydus").await?.bytes)?;
        Ok(manifest["layers"].clone())
    }

    /// Checks the layers of an OCI layout directory: that they are those of the registry, and that all are there.
    fn check_layout(&self, dir: &Path) -> Result<()> {
        let read = |path: PathBuf| -> Result<Value> {
            let bytes = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
            Ok(serde_json::from_slice(&bytes)?)
        };
        let blob = |descriptor: &Value| {
            dir.join("blobs").join(descriptor["digest"].as_str().unwrap_or_default().replace(':', "/"))
        };
        ensure!(read(dir.join("oci-layout"))? == json!({"imageLayoutVersion": "1.0.0"}), "oci-layout is odd");
        let index = read(dir.join("index.json"))?;
        let root = &index["manifests"][0];
        ensure!(root["annotations"]["io.containerd.image.name"] == self.name("nydus"), "the image has no name: {root}");
        let manifest = read(blob(root))?;
        ensure!(manifest["layers"] == self.wanted, "other layers than from the registry: {manifest}");
        for descriptor in manifest["layers"].as_array().into_iter().flatten().chain([&manifest["config"]]) {
            let path = blob(descriptor);
            let bytes = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
            let digest = format!("sha256:{}", nydus_rafs::Algorithm::Sha256.digest(&bytes));
            ensure!(descriptor["digest"] == digest.as_str(), "{} has other bytes", path.display());
        }
        Ok(())
    }

    fn unpacked(&self, archive: &Path) -> Result<PathBuf> {
        let dir = self.scratch.dir("unpacked")?;
        std::fs::remove_dir_all(&dir)?;
        tar::Archive::new(File::open(archive)?).unpack(&dir)?;
        Ok(dir)
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("scratch folders have plain names")
}

#[tokio::test(flavor = "multi_thread")]
async fn what_containerd_exports_is_converted_and_what_is_made_it_imports() -> Result<()> {
    if !met(CONTAINERD) {
        return Ok(());
    }
    let bed = Bed::new("archive").await?;
    let options = Options::plain(&bed.registry.host);
    let containerd = Containerd::start(&bed.scratch.dir("ctd")?, &options)?;
    run(containerd.ctr().args(["images", "pull", "--plain-http", "--snapshotter", "overlayfs", &bed.name("1")]))?;
    let (exported, packed) = (bed.scratch.path().join("exported.tar"), bed.scratch.path().join("exported.tar.gz"));
    run(containerd.ctr().args(["images", "export", text(&exported), &bed.name("1")]))?;
    let mut gzip = flate2::write::GzEncoder::new(File::create(&packed)?, flate2::Compression::fast());
    gzip.write_all(&std::fs::read(&exported)?)?;
    gzip.finish()?;

    let made = bed.scratch.path().join("made.tar");
    bed.convert(&["--source-archive", text(&exported), "--target-archive", text(&made)])?;
    bed.check_layout(&bed.unpacked(&made)?)?;
    run(containerd.ctr().args(["images", "import", "--no-unpack", text(&made)]))?;
    let images = run(containerd.ctr().args(["images", "ls", "-q"]))?;
    ensure!(images.lines().any(|line| line == bed.name("nydus")), "containerd did not import it by name: {images}");
    ensure!(run(containerd.ctr().args(["images", "check"]))?.contains("complete"), "containerd lacks a part of it");

    let dir = bed.scratch.dir("layout")?;
    bed.convert(&["--source-archive", text(&packed), "--target-archive", text(&dir)])?;
    bed.check_layout(&dir)?;
    // It is served from where it lies: from the directory, and from what containerd imported.
    let image = Converted::pull(&bed.client, "app", "nydus", &bed.scratch.dir("pulled")?).await?;
    let imported = containerd.dir.join("root/io.containerd.content.v1.content/blobs/sha256");
    for (name, blobs) in [("from-layout", dir.join("blobs/sha256")), ("from-import", imported)] {
        let fuse = Mounted::localfs(&image.bootstrap, &blobs, &bed.scratch.dir(name)?)?;
        let sum = nydus_rafs::Algorithm::Sha256.digest(&std::fs::read(fuse.path.join("data/random"))?);
        ensure!(sum == nydus_rafs::Algorithm::Sha256.digest(&smoke::random()), "{name}: a file is another one");
        ensure!(tree::read(&fuse.path)?.len() > 200, "{name}: files are missing");
    }
    // Into the registry again, from a directory.
    let source = bed.unpacked(&exported)?;
    bed.convert(&["--source-archive", text(&source)])?;
    ensure!(bed.layers_in_registry().await? == bed.wanted, "from a directory something else is made");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_imported_image_runs_from_containerds_own_store() -> Result<()> {
    if !met(CONTAINERD) {
        return Ok(());
    }
    let bed = Bed::new("imported").await?;
    let made = bed.scratch.path().join("made.tar");
    bed.convert(&["--target-archive", text(&made)])?;
    let binary = std::env::var_os("SHOAL_CONTAINERD").map(PathBuf::from);
    let stack = Stack::of_imports(&bed.scratch.dir("stack")?, binary)?;
    let name = bed.name("nydus");
    drop(bed.registry);
    // Before the transfer service a client unpacked what it imported, and told the snapshotter nothing of layers.
    let version = stack.containerd.version();
    if version.trim_start_matches('v').starts_with("1.6.") {
        println!("containerd {version} imports without annotations: nothing to run");
        return Ok(());
    }
    run(stack.ctr().args(["images", "import", "--local=false", "--snapshotter", "nydus", text(&made)]))?;
    let sum = nydus_rafs::Algorithm::Sha256.digest(&smoke::random());
    let said = run(&mut stack.run(&name, "imported", &["/bin/sh", "-c", "sha256sum /data/random"]))
        .with_context(|| stack.log())?;
    ensure!(said.starts_with(&sum.to_string()), "it shows {said}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_old_dockers_saved_is_converted() -> Result<()> {
    if !met(CONTAINERD) {
        return Ok(());
    }
    let bed = Bed::new("docker").await?;
    let tars = smoke::tars()?;
    let diff_ids: Vec<_> =
        tars.iter().map(|tar| format!("sha256:{}", nydus_rafs::Algorithm::Sha256.digest(tar))).collect();
    let config = json!({"architecture": "amd64", "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": diff_ids}});
    let names: Vec<_> = (0..tars.len()).map(|number| format!("{number}/layer.tar")).collect();
    let saved = json!([{"Config": "config.json", "RepoTags": ["app:1"], "Layers": names}]);
    let path = bed.scratch.path().join("saved.tar");
    let mut archive = tar::Builder::new(File::create(&path)?);
    let mut add = |name: &str, bytes: &[u8]| -> Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, name, bytes)?;
        Ok(())
    };
    for (name, tar) in names.iter().zip(&tars) {
        add(name, tar)?;
    }
    add("config.json", config.to_string().as_bytes())?;
    add("manifest.json", saved.to_string().as_bytes())?;
    archive.into_inner()?;
    let dir = bed.scratch.path().join("layout/");
    bed.convert(&["--source-archive", text(&path), "--oci", "--target-archive", &format!("{}/", text(&dir))])?;
    bed.check_layout(&dir)
}

#[tokio::test(flavor = "multi_thread")]
async fn archives_that_hold_no_image_or_a_damaged_one_are_named() -> Result<()> {
    if !met(CONTAINERD) {
        return Ok(());
    }
    let bed = Bed::new("odd").await?;
    let dir = bed.scratch.path().join("layout/");
    bed.convert(&["--target-archive", &format!("{}/", text(&dir))])?;
    let target = bed.scratch.path().join("never.tar");
    let fails = |source: &Path, words: &[&str]| -> Result<()> {
        let arguments = ["--source-archive", text(source), "--target-archive", text(&target)];
        let said = format!("{:#}", bed.convert(&arguments).err().context("it is taken")?);
        for word in words {
            ensure!(said.contains(word), "`{word}` is not in: {said}");
        }
        ensure!(!target.exists(), "something is left under the target's name");
        Ok(())
    };
    let junk = bed.scratch.path().join("junk");
    fails(&junk, &["--source-archive", "junk", "No such file"])?;
    std::fs::write(&junk, "no archive at all")?;
    fails(&junk, &["--source-archive", "junk"])?;
    std::fs::write(&junk, nydus_tests::rawtar::tar(&[]))?;
    fails(&junk, &["junk", "index.json", "manifest.json"])?;
    let index = dir.join("index.json");
    let good = std::fs::read_to_string(&index)?;
    std::fs::write(&index, "{")?;
    fails(&dir, &["index.json", "cannot be understood"])?;
    std::fs::write(&index, json!({"schemaVersion": 2, "manifests": []}).to_string())?;
    fails(&dir, &["any image"])?;
    let mut two: Value = serde_json::from_str(&good)?;
    let mut other = two["manifests"][0].clone();
    other["annotations"] = json!({"io.containerd.image.name": "elsewhere/app:2"});
    two["manifests"].as_array_mut().context("a list")?.push(other);
    std::fs::write(&index, two.to_string())?;
    fails(&dir, &["several images", "elsewhere/app:2", "--source"])?;
    Ok(())
}
