//! The whole road: containerd, our snapshotter, nydusd and mirror, and real containers that read lazily.
#![expect(clippy::print_stdout, reason = "that nerdctl was not tried is for people to read")]

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nydus_tests::containerd::{Containerd, Options};
use nydus_tests::cri::Cri;
use nydus_tests::gate::{Gate, Pace};
use nydus_tests::needs::{CONTAINERD, met, program};
use nydus_tests::nerdctl::Nerdctl;
use nydus_tests::node::{Node, Setup};
use nydus_tests::process::{run, shoal};
use nydus_tests::registry::Registry;
use nydus_tests::scratch::{Scratch, mounts_below};
use nydus_tests::{debian, image, smoke};
use serde_json::json;

/// A registry with the smoke image in both forms, behind a gate.
struct Bed {
    gate: Gate,
    _registry: Registry,
    scratch: Scratch,
}

/// Pushes the smoke image and the pods' pause image as they are.
async fn push_oci(registry: &str, scratch: &Scratch) -> Result<()> {
    let client = image::client(registry)?;
    let pause = debian::pause(&scratch.dir("pause")?)?;
    image::push(&client, "pause", "1", &[pause], json!({"Entrypoint": ["/pause"]})).await?;
    let config = json!({"Cmd": ["/bin/sh"], "Env": ["PATH=/bin"]});
    image::push(&client, "lib/smoke", "oci", &smoke::layers()?, config).await?;
    Ok(())
}

impl Bed {
    async fn new(purpose: &str) -> Result<Self> {
        let scratch = Scratch::new(purpose)?;
        let registry = Registry::start(&scratch.dir("registry")?)?;
        push_oci(&registry.host, &scratch).await?;
        let mut convert = Command::new(shoal("nydusify")?);
        convert.arg("convert").arg("--source").arg(format!("{}/lib/smoke:oci", registry.host));
        convert.arg("--target").arg(format!("{}/lib/smoke:nydus", registry.host));
        run(convert.arg("--work-dir").arg(scratch.path().join("work")))?;
        let gate = Gate::open(&registry.host, Pace::default())?;
        Ok(Self { gate, _registry: registry, scratch })
    }

    fn image(&self, tag: &str) -> String {
        format!("{}/lib/smoke:{tag}", self.gate.host)
    }

    fn node(&self, name: &str) -> Result<Node> {
        let setup = Setup::new(&self.gate.host, format!("{}/pause:1", self.gate.host));
        Node::start(&self.scratch.dir(name)?, &setup)
    }
}

async fn cri(node: &Node) -> Result<Cri> {
    Cri::connect(&node.containerd.socket, &node.dir.join("pods")).await
}

const SHELL: [&str; 2] = ["/bin/sh", "-c"];

fn shell(script: &str) -> [&str; 3] {
    [SHELL[0], SHELL[1], script]
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_checks_pass_on_containerds_own_overlayfs() -> Result<()> {
    if !met(CONTAINERD) {
        return Ok(());
    }
    let scratch = Scratch::new("ovl")?;
    let registry = Registry::start(&scratch.dir("registry")?)?;
    push_oci(&registry.host, &scratch).await?;
    let options = Options { pause: format!("{}/pause:1", registry.host), ..Options::plain(&registry.host) };
    let containerd = Containerd::start(&scratch.dir("ctd")?, &options)?;
    let cri = Cri::connect(&containerd.socket, &scratch.path().join("pods")).await?;
    let image = format!("{}/lib/smoke:oci", registry.host);
    cri.pull(&image).await?;
    let ended = cri.run("control", &image, &shell(smoke::CHECK)).await?;
    ensure!(ended.code == 0 && ended.output.ends_with("checked\n"), "{ended:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_converted_image_runs_lazily_through_cri() -> Result<()> {
    if !met(CONTAINERD) {
        return Ok(());
    }
    let bed = Bed::new("lazy").await?;
    let node = bed.node("n")?;
    let cri = cri(&node).await?;

    let before = bed.gate.passed();
    cri.pull(&bed.image("nydus")).await?;
    let pulled = bed.gate.passed() - before;
    ensure!(pulled.bytes < 400_000, "a pull of metadata alone took {pulled:?}");

    let ended = cri.run("check", &bed.image("nydus"), &shell(smoke::CHECK)).await?;
    ensure!(ended.code == 0 && ended.output.ends_with("checked\n"), "{ended:?}");
    let read = bed.gate.passed() - before;
    ensure!(read.bytes > pulled.bytes, "nothing was read lazily: {read:?}");

    // Writes go to the container's own layer; the sum of a file of several chunks is right.
    let script = "echo new > /data/written && cat /data/written && sha256sum < /data/random | cut -d' ' -f1";
    let ended = cri.run("write", &bed.image("nydus"), &shell(script)).await?;
    let sum = nydus_rafs::Algorithm::Sha256.digest(&smoke::random());
    ensure!(ended.output == format!("new\n{sum}\n"), "{ended:?}");

    // A second run asks the registry for no chunk: only nydusd's cache and the kernel's are read.
    let before = bed.gate.passed();
    let ended = cri.run("again", &bed.image("nydus"), &shell(script)).await?;
    ensure!(ended.code == 0, "{ended:?}");
    ensure!(bed.gate.passed() - before == Default::default(), "the second run asked the registry");

    let log = node.nydusd_log();
    let mirrors: Vec<&str> = log.lines().filter(|line| line.contains("mirrors")).collect();
    ensure!(mirrors.len() == 1 && mirrors[0].contains(&node.mirror_url), "the log names the mirrors {mirrors:?}");

    cri.remove_image(&bed.image("nydus")).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plain_image_runs_through_the_same_snapshotter() -> Result<()> {
    if !met(CONTAINERD) {
        return Ok(());
    }
    let bed = Bed::new("plain").await?;
    let node = bed.node("n")?;
    let cri = cri(&node).await?;
    cri.pull(&bed.image("oci")).await?;
    let ended = cri.run("plain", &bed.image("oci"), &shell(smoke::CHECK)).await?;
    ensure!(ended.code == 0 && ended.output.ends_with("checked\n"), "{ended:?}");
    ensure!(
        node.nydusd_sockets().is_empty() || mounts_below(&node.dir.join("snap/mnt")).len() <= 1,
        "no RAFS is mounted"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_container_outlives_restarts_of_mirror_and_snapshotter() -> Result<()> {
    if !met(CONTAINERD) {
        return Ok(());
    }
    let bed = Bed::new("restart").await?;
    let mut node = bed.node("n")?;
    let cri = cri(&node).await?;
    cri.pull(&bed.image("nydus")).await?;
    // Reads one more small file every 50 ms, and says how it went.
    let script = "for i in $(ls /data/small); do cat /data/small/$i > /tmp/sum || exit 1; sleep 0.05; done; echo read";
    let script = script.replace("$(ls /data/small)", "$(ls /data/small | head -n 100 2>/dev/null || ls /data/small)");
    let container = cri.start("reader", &bed.image("nydus"), &shell(&script)).await?;

    node.mirror.crash()?;
    tokio::time::sleep(Duration::from_millis(500)).await;
    node.restart_mirror()?;
    node.snapshotter.crash()?;
    tokio::time::sleep(Duration::from_millis(500)).await;
    node.restart_snapshotter()?;

    let ended = cri.wait(&container, Duration::from_secs(60)).await?;
    ensure!(ended.code == 0 && ended.output.ends_with("read\n"), "{ended:?}\n{}", node.nydusd_log());
    cri.remove(container).await?;

    // The snapshotter that came back serves the old image and new containers of it.
    let ended = cri.run("after", &bed.image("nydus"), &shell(smoke::CHECK)).await?;
    ensure!(ended.code == 0, "{ended:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_node_takes_its_chunks_from_the_first_nodes_mirror() -> Result<()> {
    if !met(CONTAINERD) {
        return Ok(());
    }
    let bed = Bed::new("two").await?;
    let first = bed.node("n1")?;
    let script = "sha256sum < /data/random | cut -d' ' -f1";
    let sum = nydus_rafs::Algorithm::Sha256.digest(&smoke::random());
    let read = async |node: &Node| -> Result<()> {
        let cri = cri(node).await?;
        cri.pull(&bed.image("nydus")).await?;
        let ended = cri.run("read", &bed.image("nydus"), &shell(script)).await?;
        ensure!(ended.output == format!("{sum}\n"), "{ended:?}\n{}", node.nydusd_log());
        Ok(())
    };
    read(&first).await?;

    let setup = Setup {
        upstream_mirrors: vec![first.mirror_url.clone()],
        ..Setup::new(&bed.gate.host, format!("{}/pause:1", bed.gate.host))
    };
    let second = Node::start(&bed.scratch.dir("n2")?, &setup)?;
    let before = bed.gate.passed();
    read(&second).await?;
    let passed = bed.gate.passed() - before;
    // What containerd pulls (manifest, config, bootstrap layer) still comes from the registry; chunks do not.
    ensure!(passed.bytes < 500_000, "the second node took {passed:?} from the registry");
    let from_first = second.mirror_metric("nydus_p2p_source_bytes_total", "mirror")?;
    ensure!(from_first as usize >= smoke::RANDOM_BYTES, "only {from_first} bytes came from the first node");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn nerdctl_runs_both_forms_where_it_is_installed() -> Result<()> {
    if !met(CONTAINERD) {
        return Ok(());
    }
    // Not a need: nerdctl is in no Debian release, and CRI above proves the same road.
    if program("nerdctl").is_none() {
        println!("nerdctl is not on PATH: CRI alone was tried");
        return Ok(());
    }
    let bed = Bed::new("nerd").await?;
    let node = bed.node("n")?;
    let nerdctl = Nerdctl::find(&node.containerd).context("nerdctl was on PATH")?;
    for tag in ["nydus", "oci"] {
        let image = bed.image(tag);
        let args = ["run", "--rm", "--net", "host", &image, "/bin/sh", "-c", smoke::CHECK];
        let output = run(&mut nerdctl.command("nydus", &args))?;
        ensure!(output.ends_with("checked\n"), "{tag}: {output}");
        run(&mut nerdctl.command("nydus", &["rmi", "-f", &image]))?;
    }
    Ok(())
}
