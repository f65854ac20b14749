//! Nodes of a swarm in network namespaces, with a real registry: what leaves it, whatever happens.
#![expect(clippy::print_stdout, reason = "what was measured is for people to read")]

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nydus_tests::cluster::{Cluster, Door, REPOSITORY, noise};
use nydus_tests::converted::Converted;
use nydus_tests::fuse::Mounted;
use nydus_tests::lab::LAB;
use nydus_tests::needs::{CONTAINERD, Need, met};
use nydus_tests::process::{run, shoal};
use nydus_tests::tree::{self, Table};
use nydus_tests::{image, smoke};
use serde_json::json;

/// The program is not optimised, and the machine has as many cores as a phone: members are slower than they should be.
const KEYS: &str = "hedge = \"1s\"\nsilence = \"5s\"\nalone = \"20s\"\ndead = \"2s\"\nsummary = \"1s\"";

/// An image as it was pushed, and as it was converted.
struct Image {
    converted: Converted,
    tree: Table,
    /// Bytes of the converted image's blobs, and of the pushed one's.
    lazy: u64,
    plain: u64,
}

impl Image {
    async fn make(cluster: &Cluster) -> Result<Self> {
        let (host, begin) = (&cluster.registry.host, Instant::now());
        let client = image::client(host)?;
        let mut layers = smoke::layers()?;
        for (seed, name) in [(11, "one"), (12, "two")] {
            layers.push(smoke::noise(name, &noise(seed, 52 << 20), 3 << 20)?);
        }
        println!("layers: {:.1} s", begin.elapsed().as_secs_f64());
        let plain = image::push(&client, REPOSITORY, "oci", &layers, json!({"Cmd": ["/bin/sh"]})).await?;
        println!("pushed: {:.1} s", begin.elapsed().as_secs_f64());
        let mut convert = Command::new(shoal("nydusify")?);
        convert.args(["convert", "--source", &format!("{host}/{REPOSITORY}:oci")]);
        convert.args(["--target", &format!("{host}/{REPOSITORY}:nydus"), "--work-dir"]);
        run(convert.arg(cluster.scratch.dir("work")?))?;
        println!("converted: {:.1} s", begin.elapsed().as_secs_f64());
        let converted = Converted::pull(&client, REPOSITORY, "nydus", &cluster.scratch.dir("image")?).await?;
        let blobs = std::fs::read_dir(&converted.blobs)?;
        let lazy = blobs.map(|blob| Ok(blob?.metadata()?.len())).sum::<std::io::Result<u64>>()?;
        let local = Mounted::localfs(&converted.bootstrap, &converted.blobs, &cluster.scratch.dir("local")?)?;
        let tree = tree::read(&local.path)?;
        println!("read: {:.1} s", begin.elapsed().as_secs_f64());
        Ok(Self { tree, converted, lazy, plain })
    }
}

/// Counts what leaves the registry during `work`, which takes `size` different bytes from it: at most `percent` of them.
fn leaves(cluster: &Cluster, what: &str, size: u64, percent: u64, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let (before, begin) = (cluster.passed(), Instant::now());
    work()?;
    let (passed, took) = (cluster.passed() - before, begin.elapsed());
    let times = passed.bytes as f64 / size as f64;
    println!("{what}: {times:.3}x of {size} bytes in {} requests, {:.1} s", passed.requests, took.as_secs_f64());
    ensure!(
        passed.bytes * 100 <= size * percent,
        "{what}: {times:.3}x of {size} bytes left the registry\n{}",
        cluster.decisions()
    );
    Ok(())
}

fn lazily(cluster: &Cluster, door: Door, image: &Image) -> Result<()> {
    let look = |node: usize| {
        let mounted = cluster.mount(node, door, &image.converted.bootstrap, &format!("{door:?}"))?;
        let found = tree::differences(&tree::read(&mounted.path)?, &image.tree, |_, _, _| {});
        ensure!(found.is_empty(), "node {node}: {found:#?}");
        Ok(())
    };
    leaves(cluster, &format!("lazy image, {door:?} door"), image.lazy, 105, || {
        Cluster::at_once(&cluster.everybody(), look, || Ok(()))
    })
}

/// The plain image, pulled and unpacked by the containerds of all nodes.
fn wholly(cluster: &Cluster, door: Door, image: &Image) -> Result<()> {
    let start = |node: usize| cluster.containerd(node, door, &format!("containerd-{door:?}"));
    let mut containerds = cluster.everybody().into_iter().map(start).collect::<Result<Vec<_>>>()?;
    let pull = |node: usize| {
        let got = cluster.pull(&containerds[node], door, "oci")?;
        let found = tree::differences(&got, &image.tree, |_, got, want| {
            // A directory that a layer changes without listing it gets the time of unpacking.
            if got.kind == 'd' {
                got.mtime = want.mtime;
            }
        });
        ensure!(found.is_empty(), "node {node}: {found:#?}");
        Ok(())
    };
    leaves(cluster, &format!("plain image, {door:?} door"), image.plain, 105, || {
        Cluster::at_once(&cluster.everybody(), pull, || Ok(()))
    })?;
    for containerd in &mut containerds {
        ensure!(
            containerd.process.stop(Duration::from_secs(10))?,
            "a containerd does not end: {}",
            containerd.process.log()
        );
    }
    Ok(())
}

/// Nobody without a good token gets a byte of what all nodes hold.
fn strangers_get_nothing(cluster: &Cluster, image: &Image) -> Result<()> {
    for blob in std::fs::read_dir(&image.converted.blobs)? {
        let name = blob?.file_name();
        let path = format!("/v2/{REPOSITORY}/blobs/sha256:{}", name.to_str().context("a digest")?);
        for node in cluster.everybody() {
            let ask = |who: &str| cluster.ask(node, 4001, &path, &format!("Range: bytes=0-99999\r\n{who}"));
            let (status, body) = ask(&cluster.stranger())?;
            let told = String::from_utf8_lossy(&body);
            ensure!(status == 401 && body.len() < 1000, "node {node} answers a stranger {status}: {told}");
            ensure!(ask(&cluster.caller(Door::Private))?.0 == 206, "node {node}: {path}");
        }
    }
    Ok(())
}

fn the_operator_sees_it(cluster: &Cluster) -> Result<()> {
    let show = |view: &str| {
        let address = format!("{}:4002", cluster.lab.address(0));
        run(Command::new(shoal("nydusctl")?).args(["swarm", "--address", &address, view]))
    };
    let (status, peers, blobs) = (show("status")?, show("peers")?, show("blobs")?);
    println!("{status}\n{peers}\n{blobs}");
    let ready = status.contains("Standing:               ready") && status.contains("Members ready:          4");
    ensure!(ready, "{status}");
    ensure!(peers.lines().count() == 5 && peers.contains("(this node)"), "{peers}");
    // What it has forgotten is gone.
    let digest = blobs.lines().find_map(|line| line.split(' ').find(|word| word.starts_with("sha256:")));
    let (digest, socket) = (digest.context("a blob")?, cluster.dir(1).join("data/control.sock"));
    run(Command::new(shoal("nydusctl")?).args(["swarm", "forget", digest, "--socket"]).arg(socket))?;
    let begin = Instant::now();
    while show("blobs")?.contains(digest) {
        ensure!(begin.elapsed() < Duration::from_secs(60), "{digest} is not forgotten");
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

async fn one_dies_while_all_read(cluster: &mut Cluster, door: Door, seed: u64) -> Result<()> {
    let (path, bytes) = cluster.push(seed, 100 << 20).await?;
    let mut victim = cluster.take(3)?;
    let (size, before) = (bytes.len() as u64, cluster.passed());
    leaves(cluster, &format!("one of four dies, {door:?} door"), size, 110, || {
        // What becomes of its own readers is their affair; the others' never notice.
        std::thread::scope(|scope| {
            scope.spawn(|| drop(cluster.ask(3, 4001, &path, &cluster.caller(door))));
            cluster.read_while(&[0, 1, 2], door, &path, &bytes, || {
                let begin = Instant::now();
                while (cluster.passed() - before).bytes < size / 3 && begin.elapsed() < Duration::from_secs(30) {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Ok(victim.crash()?)
            })
        })
    })?;
    cluster.start_node(3)?;
    cluster.settle()
}

/// Cut in two, each half takes it once; together again, they are one.
async fn halves_are_two_swarms_and_then_one(cluster: &Cluster) -> Result<()> {
    for node in [0, 1] {
        cluster.lab.cut(node, [2, 3])?;
    }
    let (path, bytes) = cluster.push(22, 24 << 20).await?;
    let size = bytes.len() as u64;
    leaves(cluster, "two halves", size * 2, 110, || {
        cluster.read_at_once(&cluster.everybody(), Door::Open, &path, &bytes)
    })?;
    for node in [0, 1] {
        cluster.lab.heal(node, [2, 3])?;
    }
    cluster.settle()?;
    // Until then some take others for dead, whom they could not reach: twice as long as `dead`.
    std::thread::sleep(Duration::from_secs(4));
    let (path, bytes) = cluster.push(23, 24 << 20).await?;
    leaves(cluster, "healed", size, 105, || cluster.read_at_once(&cluster.everybody(), Door::Open, &path, &bytes))
}

/// The registry dies once one has it all, and the others were let in.
async fn the_registry_dies_after_the_first_copy(cluster: &mut Cluster) -> Result<()> {
    let (path, bytes) = cluster.push(24, 24 << 20).await?;
    for node in cluster.everybody() {
        let (status, body) = cluster.ask(node, 4001, &path, "Range: bytes=0-0\r\n")?;
        ensure!(status == 206 && body == bytes[..1], "node {node} answers {status}");
    }
    cluster.read_at_once(&[0], Door::Open, &path, &bytes)?;
    cluster.registry.process.crash()?;
    cluster.read_at_once(&cluster.everybody(), Door::Open, &path, &bytes)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_crowd_reads_leaves_the_registry_once_whatever_happens_to_its_members() -> Result<()> {
    let needs = [Need::Program("openssl")];
    if !met(&[LAB, CONTAINERD, &needs].concat()) {
        return Ok(());
    }
    let mut cluster = Cluster::start(0, 4, KEYS).await?;
    for node in cluster.everybody() {
        cluster.lab.shape(node, "1gbit")?;
    }
    let image = Image::make(&cluster).await?;
    ensure!(image.lazy.min(image.plain) >= 100 << 20, "an image of {} and {} bytes", image.lazy, image.plain);
    lazily(&cluster, Door::Open, &image)?;
    wholly(&cluster, Door::Open, &image)?;
    the_operator_sees_it(&cluster)?;
    cluster.empty()?;
    lazily(&cluster, Door::Private, &image)?;
    wholly(&cluster, Door::Private, &image)?;
    strangers_get_nothing(&cluster, &image)?;
    one_dies_while_all_read(&mut cluster, Door::Private, 20).await?;
    one_dies_while_all_read(&mut cluster, Door::Open, 21).await?;
    halves_are_two_swarms_and_then_one(&cluster).await?;
    the_registry_dies_after_the_first_copy(&mut cluster).await
}
