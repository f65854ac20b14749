//! `make demo`: a real image, converted and run lazily, on two nodes and by a swarm of three, with a table of what came from where.
//!
//! Everything lives in one folder below /tmp and on free ports of 127.0.0.1, and is taken down at the end,
//! after a failure and after Ctrl-C too. The registry lies behind a link of 200 Mbit/s and 20 ms, because
//! on loopback nobody would need to be lazy; `LINK=none` takes the link away.
#![expect(clippy::print_stdout, reason = "the demo is a program for people")]

mod table;
mod together;

use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use nydus_tests::gate::{Gate, Pace};
use nydus_tests::needs::{CONTAINERD, Need, met};
use nydus_tests::node::{Node, Setup};
use nydus_tests::process::shoal;
use nydus_tests::registry::Registry;
use nydus_tests::runner::{self, Runner};
use nydus_tests::scratch::Scratch;
use nydus_tests::{debian, image};
use serde_json::json;

use crate::table::{Row, Table};
use crate::together::Swarm;

/// What the demo runs: a short command, and one that needs more of the image.
struct Commands {
    short: (&'static str, Vec<String>),
    long: (&'static str, Vec<String>),
}

impl Commands {
    fn of(own_image: bool) -> Self {
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        if own_image {
            let script = std::env::var("COMMAND").unwrap_or_else(|_| "cat /usr/bin/* | wc -c".to_owned());
            Self {
                short: ("sh -c true", words(&["/bin/sh", "-c", "true"])),
                long: ("COMMAND", words(&["/bin/sh", "-c", &script])),
            }
        } else {
            Self {
                short: ("python3 -V", words(&["python3", "-V"])),
                long: ("import numpy", words(&["python3", "/app/main.py"])),
            }
        }
    }
}

fn main() -> ExitCode {
    let interrupted = Arc::new(AtomicBool::new(false));
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            println!("demo: could not start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let flag = Arc::clone(&interrupted);
    runtime.spawn(async move {
        use tokio::signal::unix::{SignalKind, signal};
        let (Ok(mut int), Ok(mut term)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate())) else {
            return;
        };
        tokio::select! { _ = int.recv() => {}, _ = term.recv() => {} }
        println!("\ninterrupted: cleaning up");
        flag.store(true, Ordering::Relaxed);
    });
    match runtime.block_on(demo(&interrupted)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Says what happens now, and stops where the user has asked for it.
fn step(interrupted: &AtomicBool, text: &str) -> Result<()> {
    ensure!(!interrupted.load(Ordering::Relaxed), "interrupted");
    println!("==> {text}");
    Ok(())
}

async fn demo(interrupted: &Arc<AtomicBool>) -> Result<()> {
    if !met(CONTAINERD) {
        bail!("run `make demo` as root on Debian 12: it installs what it needs");
    }
    let scratch = Scratch::new("demo")?;
    let registry = Registry::start(&scratch.dir("registry")?)?;
    let client = image::client(&registry.host)?;

    let own_image = std::env::var("IMAGE").ok();
    let Commands { short, long } = Commands::of(own_image.is_some());
    let pause = debian::pause(&scratch.dir("pause")?)?;
    image::push(&client, "pause", "1", &[pause], json!({"Entrypoint": ["/pause"]})).await?;
    let source = format!("{}/python:oci", registry.host);
    if let Some(image) = &own_image {
        step(interrupted, &format!("nydusify copy --source {image} --target {source}"))?;
        let mut copy = Command::new(shoal("nydusify")?);
        copy.args(["copy", "--source", image, "--target", &source, "--work-dir"]).arg(scratch.path().join("work"));
        runner::run_visibly(copy, interrupted)?;
    } else {
        if !met(&[Need::Program("mmdebstrap")]) {
            bail!("mmdebstrap makes the demo's image: install it, or name an image with IMAGE=");
        }
        step(
            interrupted,
            "making an image of Debian packages: a minimal system, python3 with numpy, an application (a minute)",
        )?;
        let layers = debian::python(&scratch.dir("image")?)?;
        let size = image::push(&client, "python", "oci", &layers, json!({"Cmd": ["python3"]})).await?;
        println!("    {} layers, {} compressed", layers.len(), table::megabytes(size));
    }

    let pace = match std::env::var("LINK").as_deref() {
        Ok("none") => Pace::default(),
        _ => Pace { bits_per_second: 200_000_000, round_trip: Duration::from_millis(20) },
    };
    let gate = Gate::open(&registry.host, pace)?;
    let target = format!("{}/python:nydus", registry.host);

    step(interrupted, &format!("nydusify convert --source {source} --target {target}"))?;
    let begin = Instant::now();
    let mut convert = Command::new(shoal("nydusify")?);
    convert.args(["convert", "--source", &source, "--target", &target, "--work-dir"]).arg(scratch.path().join("work"));
    runner::run_visibly(convert, interrupted)?;
    println!("    converted and verified in {:.1} s", begin.elapsed().as_secs_f64());

    // From here on everybody reads through the link.
    let source = format!("{}/python:oci", gate.host);
    let target = format!("{}/python:nydus", gate.host);
    let setup = Setup::new(&gate.host, format!("{}/pause:1", gate.host));
    let mut table = Table::default();

    step(interrupted, "plain OCI image on overlayfs: everything is pulled before anything runs")?;
    {
        let plain = setup.plain_containerd(&scratch.dir("plain")?)?;
        let runner = Runner::new(&plain, "overlayfs", &scratch.dir("plain/logs")?, interrupted).await?;
        println!("    through {}", runner.name());
        table.client(runner.name(), &plain.version());
        runner.warm_up(&setup.pause).await?;
        table.push(Row::measure("OCI image", &short, &runner, &gate, None, &source, true).await?);
        table.push(Row::measure("OCI image", &long, &runner, &gate, None, &source, false).await?);
    }

    step(interrupted, "the converted image, cold, through nydus-p2p, containerd-nydus-grpc and nydusd")?;
    let first = Node::start(&scratch.dir("n1")?, &setup)?;
    let runner = Runner::new(&first.containerd, "nydus", &scratch.dir("n1/logs")?, interrupted).await?;
    runner.warm_up(&setup.pause).await?;
    table.push(Row::measure("nydus", &short, &runner, &gate, Some(&first), &target, true).await?);
    table.push(Row::measure("nydus", &long, &runner, &gate, Some(&first), &target, false).await?);
    step(interrupted, "again on the same node")?;
    table.push(Row::measure("nydus again", &long, &runner, &gate, Some(&first), &target, false).await?);

    step(interrupted, "a second node, with the first node's mirror as its upstream")?;
    let setup = Setup { upstream_mirrors: vec![first.mirror_url.clone()], ..setup };
    let second = Node::start(&scratch.dir("n2")?, &setup)?;
    let other = Runner::new(&second.containerd, "nydus", &scratch.dir("n2/logs")?, interrupted).await?;
    other.warm_up(&setup.pause).await?;
    table.push(Row::measure("second node", &short, &other, &gate, Some(&second), &target, true).await?);
    table.push(Row::measure("second node", &long, &other, &gate, Some(&second), &target, false).await?);

    drop((runner, other, second, first));
    step(interrupted, "three new nodes, one swarm: all start the image in the same moment")?;
    let swarm = Swarm::start(&scratch, &setup, interrupted).await?;
    for row in swarm.run(&long, &gate, &target)? {
        table.push(row);
    }

    step(interrupted, "done")?;
    println!();
    table.print(pace);
    println!("\ncleaning up");
    Ok(())
}
