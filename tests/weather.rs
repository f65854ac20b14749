//! The whole road in bad weather: a private registry with TLS, tokens and redirects, and everything that can go away.
//!
//! Only the callers hold credentials: docker's configuration is shown to `nydusify` and to the snapshotter, CRI gets a pull
//! secret; the mirror has none.

use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nydus_rafs::Algorithm;
use nydus_tests::authority::Authority;
use nydus_tests::bed::{Bed, REPOSITORY};
use nydus_tests::cri::{Container, Cri, Ended};
use nydus_tests::front::{PASSWORD, USER};
use nydus_tests::needs::{CONTAINERD, Need, met};
use nydus_tests::node::{Node, Private, Setup};
use nydus_tests::process::run;
use nydus_tests::registry::Registry;
use nydus_tests::{image, smoke};

/// Files below `/cold`, of one chunk each. Neighbours are fetched together, so tests use every fourth.
const FILES: usize = 24;
const FILE_BYTES: usize = 1 << 20;

/// How long anything may take that a test waits for; far more than it does take.
const PATIENCE: Duration = Duration::from_secs(60);

/// The bytes of `/cold/NUMBER`: not compressible, and different for each.
fn cold(number: usize) -> Vec<u8> {
    let mut bytes = smoke::random();
    bytes.truncate(FILE_BYTES);
    for byte in &mut bytes {
        *byte = byte.rotate_left(3) ^ u8::try_from(number * 7 + 1).unwrap_or(0);
    }
    bytes
}

fn cold_layer() -> Result<image::Layer> {
    let mut tar = tar::Builder::new(Vec::new());
    for number in 0..FILES {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(FILE_BYTES as u64);
        header.set_mtime(1_700_000_000);
        tar.append_data(&mut header, format!("cold/{number}"), &*cold(number))?;
    }
    image::Layer::new(&tar.into_inner()?)
}

async fn bed(purpose: &str) -> Result<Bed> {
    let mut layers = smoke::layers()?;
    layers.push(cold_layer()?);
    Bed::new(purpose, &layers).await
}

fn skip() -> bool {
    !met(CONTAINERD) || !met(&[Need::Program("openssl"), Need::Program("curl")])
}

/// Reads `/cold/NUMBER` in a container.
async fn read(cri: &Cri, container: &Container, number: usize) -> Result<Ended> {
    let script = format!("sha256sum < /cold/{number}");
    cri.exec(container, &["/bin/sh", "-c", &script], PATIENCE).await
}

fn is_right(ended: &Ended, number: usize) -> bool {
    ended.code == 0 && ended.output.starts_with(&Algorithm::Sha256.digest(&cold(number)).to_string())
}

/// Reads `/cold/NUMBER` in a container and compares it.
async fn check(cri: &Cri, container: &Container, number: usize, node: &Node) -> Result<()> {
    let ended = read(cri, container, number).await?;
    ensure!(is_right(&ended, number), "/cold/{number}: {ended:?}\n{}", node.nydusd_log());
    Ok(())
}

async fn idle(cri: &Cri, name: &str, bed: &Bed) -> Result<Container> {
    cri.start(name, &bed.image(), &["/bin/sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.2; done"]).await
}

/// Asks a node's mirror for the first bytes of a blob; returns the status and the number of bytes that came.
fn ask_mirror(node: &Node, registry: &str, path: &str, token: Option<&str>) -> Result<(String, usize)> {
    let body = node.dir.join("asked");
    let mut curl = Command::new("curl");
    curl.args(["-sS", "-r", "0-65535", "-o"]).arg(&body).args(["-w", "%{http_code}", "-D", "-"]);
    curl.arg("-H").arg(format!("X-Dragonfly-Registry: https://{registry}"));
    if let Some(token) = token {
        curl.arg("-H").arg(format!("Authorization: Bearer {token}"));
    }
    let told = run(curl.arg(format!("{}{path}", node.mirror_url)))?;
    Ok((told, std::fs::read(body)?.len()))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_private_registry_with_tokens_and_redirects_serves_those_who_may_read() -> Result<()> {
    if skip() {
        return Ok(());
    }
    let bed = bed("private").await?;
    let node = Node::start(&bed.scratch.dir("n")?, &bed.setup())?;
    let cri = bed.pull(&node).await?;
    let ended = cri.run("check", &bed.image(), &["/bin/sh", "-c", smoke::CHECK]).await?;
    ensure!(ended.code == 0 && ended.output.ends_with("checked\n"), "{ended:?}\n{}", node.nydusd_log());
    let container = idle(&cri, "reader", &bed).await?;
    check(&cri, &container, 0, &node).await?;

    // Through the mirror, and only through it.
    let mirrored = node.mirror_metric("nydus_p2p_served_bytes_total", "")?;
    ensure!(mirrored as usize >= FILE_BYTES, "only {mirrored} bytes came through the mirror\n{}", node.nydusd_log());
    ensure!(bed.front.seen.blobs.load(Ordering::Relaxed) > 0, "the store was not used");

    // What the mirror holds by now is not for those whom the registry refuses.
    for digest in bed.blobs().await? {
        let path = format!("/v2/{REPOSITORY}/blobs/{digest}");
        let (told, bytes) = ask_mirror(&node, &bed.front.host, &path, Some(&bed.front.token(REPOSITORY)))?;
        ensure!(told.ends_with("206") && bytes > 0, "a caller who may read was told {told}");
        for token in [None, Some("token-nobody-gave".to_owned()), Some(bed.front.token("another/image"))] {
            let (told, bytes) = ask_mirror(&node, &bed.front.host, &path, token.as_deref())?;
            ensure!(told.ends_with("401"), "{token:?} was told {told}");
            let challenge = told.to_ascii_lowercase().contains("www-authenticate: bearer realm=");
            ensure!(challenge && bytes < 1024, "{token:?} was given {bytes} bytes and told {told}");
            let body = std::fs::read_to_string(node.dir.join("asked"))?;
            ensure!(body.contains("errors"), "{token:?} was given {body:?}");
        }
    }

    // Tokens, and the addresses of blobs, that end between two reads.
    bed.front.set_life(Duration::from_secs(1));
    // A second node has none of the old ones.
    let short = Node::start(&bed.scratch.dir("n2")?, &bed.setup())?;
    let short_cri = bed.pull(&short).await?;
    let short_container = idle(&short_cri, "short", &bed).await?;
    let before = bed.front.seen.tokens.load(Ordering::Relaxed);
    for number in [0, 6, 12, 18] {
        check(&short_cri, &short_container, number, &short).await?;
        tokio::time::sleep(Duration::from_millis(1200)).await;
    }
    ensure!(bed.front.seen.tokens.load(Ordering::Relaxed) > before, "no token was renewed");
    ensure!(bed.front.seen.leaked.load(Ordering::Relaxed) == 0, "the store was shown an Authorization");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn reads_live_through_outages_of_mirror_registry_and_both() -> Result<()> {
    if skip() {
        return Ok(());
    }
    let mut bed = bed("outage").await?;
    let setup = Setup { read_deadline: Some(20), ..bed.setup() };
    let mut node = Node::start(&bed.scratch.dir("n")?, &setup)?;
    let cri = bed.pull(&node).await?;
    let container = idle(&cri, "reader", &bed).await?;
    check(&cri, &container, 0, &node).await?;

    // Without the mirror the registry itself is asked, with the caller's own credential.
    node.mirror.crash()?;
    check(&cri, &container, 4, &node).await?;

    // Without both, what was read is readable, and what was not waits.
    bed.front.shut();
    let waiting = {
        let cri = cri.clone();
        let id = container.clone();
        tokio::spawn(async move { read(&cri, &id, 8).await })
    };
    check(&cri, &container, 0, &node).await?;
    let second = idle(&cri, "second", &bed).await?;
    check(&cri, &second, 4, &node).await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    ensure!(!waiting.is_finished(), "a cold read did not wait for its source: {:?}", waiting.await??);
    bed.front.reopen();
    let ended = waiting.await??;
    ensure!(is_right(&ended, 8), "{ended:?}\n{}", node.nydusd_log());

    // The registry's process stops and starts behind a front that stays: 502 meanwhile.
    node.restart_mirror()?;
    let port = bed.registry.host.rsplit_once(':').context("a host has a port")?.1.parse()?;
    bed.registry.process.crash()?;
    let waiting = {
        let cri = cri.clone();
        let id = container.clone();
        tokio::spawn(async move { read(&cri, &id, 12).await })
    };
    tokio::time::sleep(Duration::from_secs(1)).await;
    check(&cri, &container, 8, &node).await?;
    bed.registry = Registry::start_at(&bed.scratch.path().join("registry"), port)?;
    let ended = waiting.await??;
    ensure!(is_right(&ended, 12), "{ended:?}\n{}\n{}", node.nydusd_log(), node.mirror.log());

    // An outage longer than the deadline is an error, and is not remembered.
    bed.front.shut();
    let ended = read(&cri, &container, 16).await?;
    ensure!(ended.code != 0 && ended.output.contains("Input/output error"), "{ended:?}");
    let log = node.nydusd_log();
    ensure!(
        log.lines().any(|line| line.contains("WARN") && line.contains(&bed.front.host)),
        "no warning names the registry:\n{log}"
    );
    bed.front.reopen();
    let begin = Instant::now();
    while !is_right(&read(&cri, &container, 16).await?, 16) {
        ensure!(begin.elapsed() < PATIENCE, "the failure was remembered:\n{}", node.nydusd_log());
    }

    // nydusd dies under its containers while nobody has bytes for it: the old ones get errors at once, new ones work with what
    // is there, and their cold reads wait.
    node.mirror.crash()?;
    bed.front.shut();
    let daemons = node.nydusd_pids();
    ensure!(daemons.len() == 1, "{daemons:?}");
    kill(daemons[0], Signal::SIGKILL)?;
    let begin = Instant::now();
    let third = loop {
        match idle(&cri, &format!("third-{}", begin.elapsed().as_millis()), &bed).await {
            Ok(container) => break container,
            Err(error) => ensure!(begin.elapsed() < PATIENCE, "no new container works: {error:#}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    check(&cri, &third, 0, &node).await?;
    let waiting = {
        let cri = cri.clone();
        let id = third.clone();
        tokio::spawn(async move { read(&cri, &id, 20).await })
    };
    tokio::time::sleep(Duration::from_secs(1)).await;
    ensure!(!waiting.is_finished(), "a cold read did not wait for its source: {:?}", waiting.await??);
    bed.front.reopen();
    node.restart_mirror()?;
    let ended = waiting.await??;
    ensure!(is_right(&ended, 20), "{ended:?}\n{}", node.nydusd_log());
    ensure!(!node.nydusd_pids().contains(&daemons[0]), "the killed daemon lives");
    // Its files are gone, or an error, and never other bytes.
    let gone = read(&cri, &container, 22).await;
    ensure!(gone.is_err() || gone.as_ref().is_ok_and(|ended| ended.code != 0 || is_right(ended, 22)), "{gone:?}");
    ensure!(bed.front.seen.leaked.load(Ordering::Relaxed) == 0, "the store was shown an Authorization");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_whole_road_holds_while_mirror_and_registry_come_and_go_in_the_middle_of_reads() -> Result<()> {
    if skip() {
        return Ok(());
    }
    let mut bed = bed("road").await?;
    let mut node = Node::start(&bed.scratch.dir("n")?, &bed.setup())?;
    let cri = bed.pull(&node).await?;

    // One container reads everything, slowly; meanwhile everything below goes away and comes back.
    let script = format!("for i in $(ls /cold); do sha256sum < /cold/$i || exit 1; sleep 0.2; done; {}", smoke::CHECK);
    let reader = cri.start("reader", &bed.image(), &["/bin/sh", "-c", &script]).await?;
    let some = Duration::from_millis(700);
    tokio::time::sleep(some).await;
    node.mirror.crash()?;
    tokio::time::sleep(some).await;
    let port = bed.registry.host.rsplit_once(':').context("a host has a port")?.1.parse()?;
    bed.registry.process.crash()?;
    tokio::time::sleep(some).await;
    node.snapshotter.crash()?;
    bed.registry = Registry::start_at(&bed.scratch.path().join("registry"), port)?;
    tokio::time::sleep(some).await;
    node.restart_mirror()?;
    node.restart_snapshotter()?;
    bed.front.shut();
    tokio::time::sleep(some).await;
    bed.front.reopen();
    let ended = cri.wait(&reader, PATIENCE).await?;
    ensure!(ended.code == 0 && ended.output.ends_with("checked\n"), "{ended:?}\n{}", node.nydusd_log());
    for number in 0..FILES {
        let sum = Algorithm::Sha256.digest(&cold(number)).to_string();
        ensure!(ended.output.contains(&sum), "/cold/{number} was read as something else: {ended:?}");
    }
    cri.remove(reader).await?;

    // The image as it was before its conversion goes through the same snapshotter, unpacked.
    let plain = format!("{}/{REPOSITORY}:oci", bed.front.host);
    cri.pull_as(&plain, USER, PASSWORD).await?;
    let ended = cri.run("plain", &plain, &["/bin/sh", "-c", smoke::CHECK]).await?;
    ensure!(ended.code == 0 && ended.output.ends_with("checked\n"), "{ended:?}");

    // A second node has its chunks from the first one's mirror, with tokens of its own.
    let setup = Setup { upstream_mirrors: vec![node.mirror_url.clone()], ..bed.setup() };
    let second = Node::start(&bed.scratch.dir("n2")?, &setup)?;
    let second_cri = bed.pull(&second).await?;
    let container = idle(&second_cri, "second", &bed).await?;
    for number in [12, 16, 20] {
        check(&second_cri, &container, number, &second).await?;
    }
    let lent = second.mirror_metric("nydus_p2p_source_bytes_total", "mirror")?;
    ensure!(lent as usize >= FILE_BYTES, "only {lent} bytes came from the first node");
    ensure!(bed.front.seen.leaked.load(Ordering::Relaxed) == 0, "the store was shown an Authorization");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_authority_that_is_not_believed_is_an_error_that_names_the_registry() -> Result<()> {
    if skip() {
        return Ok(());
    }
    let bed = bed("wrongca").await?;
    let other = Authority::make(&bed.scratch.dir("other")?)?;
    let mut setup = bed.setup();
    setup.private = setup.private.map(|private| Private { lazy_ca: other.ca(), ..private });
    let node = Node::start(&bed.scratch.dir("n")?, &setup)?;
    let cri = bed.pull(&node).await?;
    let tokens = bed.front.seen.tokens.load(Ordering::Relaxed);
    let started = idle(&cri, "never", &bed).await;
    ensure!(started.is_err(), "a container runs from a registry that is not believed");
    for (program, log) in [("nydusd", node.nydusd_log()), ("nydus-p2p", node.mirror.log())] {
        let told = log
            .lines()
            .any(|line| line.contains("WARN") && line.contains(&bed.front.host) && line.contains("certificate"));
        ensure!(told, "{program} does not say whose certificate is wrong:\n{log}");
    }
    ensure!(bed.front.seen.tokens.load(Ordering::Relaxed) == tokens, "a credential was shown to a stranger");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_kubelet_pulls_with_serves_lazy_reads_and_its_next_pull_those_of_old_containers() -> Result<()> {
    if skip() {
        return Ok(());
    }
    let bed = bed("kubelet").await?;
    let mut setup = Setup { image_service: true, ..bed.setup() };
    // Nobody has logged in on this node.
    let nobody = bed.scratch.dir("nobody")?;
    setup.private = setup.private.map(|private| Private { docker_config: nobody, ..private });
    let node = Node::start(&bed.scratch.dir("n")?, &setup)?;
    let containers = Cri::connect(&node.containerd.socket, &node.dir.join("pods")).await?;
    let images = Cri::connect(&node.dir.join("snap.sock"), &node.dir.join("pods")).await?;
    images.pull_as(&setup.pause, USER, PASSWORD).await?;
    images.pull_as(&bed.image(), USER, PASSWORD).await?;
    // Addresses of blobs are signed and need no secret: they must not outlive one here.
    bed.front.set_life(Duration::from_secs(2));
    let container = idle(&containers, "reader", &bed).await?;
    check(&containers, &container, 0, &node).await?;

    // The secret expires under the running container: an error that says what to do.
    bed.front.set_password("the next one");
    tokio::time::sleep(Duration::from_millis(3000)).await;
    let begin = Instant::now();
    let refused = read(&containers, &container, 8).await?;
    ensure!(refused.code != 0, "a revoked secret still reads: {refused:?}");
    ensure!(begin.elapsed() < Duration::from_secs(30), "a refusal took {:?}", begin.elapsed());
    ensure!(node.snapshotter.log().contains("pull the image again"), "{}", node.snapshotter.log());

    // kubelet pulls for another pod, and the old one reads on, with the file that failed too.
    images.pull_as(&bed.image(), USER, "the next one").await?;
    for number in [8, 16] {
        check(&containers, &container, number, &node).await?;
    }
    for (name, log) in [("snapshotter", node.snapshotter.log()), ("nydusd", node.nydusd_log())] {
        ensure!(!log.contains(PASSWORD) && !log.contains("the next one"), "{name} logs a secret");
    }
    containers.remove(container).await
}
