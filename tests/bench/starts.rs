//! Time and bytes to a container's first answer over the link: a plain image on overlayfs, ours on a fresh node, ours again,
//! and ours on a second node beside one that has run it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nydus_tests::node::{Node, Setup};
use nydus_tests::runner::Runner;

use crate::bed::{Bed, Form, Workload};
use crate::series::Series;

/// What is compared; the first is what the others are ratios of.
const RIVALS: [&str; 4] = ["OCI, pull and run", "ours, cold", "ours, again", "ours, second node"];

#[derive(Default)]
struct Row {
    seconds: Series,
    /// From the registry, headers included.
    megabytes: Series,
}

/// What the daemons of a node hold at the end, in MB.
#[derive(Default)]
struct Memory {
    nydusd: Series,
    snapshotter: Series,
    mirror: Series,
}

pub(crate) async fn run(bed: &Bed) -> Result<()> {
    let mut memory = Memory::default();
    for (number, workload) in bed.workloads.iter().enumerate() {
        let mut rows: [Row; 4] = Default::default();
        for round in 0..bed.rounds {
            one_round(bed, workload, &format!("{number}-{round}"), &mut rows, &mut memory).await?;
        }
        println!("\n## Time to the answer of `{}`, over 200 Mbit/s and 20 ms\n", workload.name);
        println!("| | seconds | of OCI | MB from the registry |\n| --- | ---: | ---: | ---: |");
        for (name, row) in RIVALS.iter().zip(&rows) {
            println!("| {name} | {} | {:.2} | {} |", row.seconds, row.seconds.ratio(&rows[0].seconds), row.megabytes);
        }
    }
    println!("\n## Resident memory of the daemons after two runs, MB\n");
    println!("| nydusd | containerd-nydus-grpc | nydus-p2p |\n| ---: | ---: | ---: |");
    println!("| {} | {} | {} |", memory.nydusd, memory.snapshotter, memory.mirror);
    Ok(())
}

async fn one_round(
    bed: &Bed,
    workload: &Workload,
    unique: &str,
    rows: &mut [Row; 4],
    memory: &mut Memory,
) -> Result<()> {
    let setup = bed.setup();
    let (oci, nydus) = (bed.over_the_link(Form::Source), bed.over_the_link(Form::Nydus));
    {
        let dir = bed.dir(&format!("plain-{unique}"))?;
        let containerd = setup.plain_containerd(&dir)?;
        let runner = bed.runner(&containerd, "overlayfs").await?;
        rows[0].add(bed, &runner, workload, &oci, true).await?;
    }
    let first = Node::start(&bed.dir(&format!("n1-{unique}"))?, &setup)?;
    let runner = bed.runner(&first.containerd, "nydus").await?;
    rows[1].add(bed, &runner, workload, &nydus, true).await?;
    rows[2].add(bed, &runner, workload, &nydus, false).await?;
    for pid in first.nydusd_pids() {
        memory.nydusd.push(resident(pid)?);
    }
    memory.snapshotter.push(resident(first.snapshotter.pid())?);
    memory.mirror.push(resident(first.mirror.pid())?);

    let beside = Setup { upstream_mirrors: vec![first.mirror_url.clone()], ..setup };
    let second = Node::start(&bed.dir(&format!("n2-{unique}"))?, &beside)?;
    let runner = bed.runner(&second.containerd, "nydus").await?;
    rows[3].add(bed, &runner, workload, &nydus, true).await?;
    Ok(())
}

impl Row {
    /// Pulls (if asked) and runs, and counts both.
    async fn add(&mut self, bed: &Bed, runner: &Runner, workload: &Workload, image: &str, pull: bool) -> Result<()> {
        let (begin, before) = (Instant::now(), bed.gate.passed());
        if pull {
            runner.pull(image).await.with_context(|| format!("pulling {image}"))?;
        }
        runner.run(image, &workload.command).await.with_context(|| format!("running `{}`", workload.name))?;
        self.seconds.push(begin.elapsed().as_secs_f64());
        // What is read ahead after the answer belongs to it too.
        tokio::time::sleep(Duration::from_millis(500)).await;
        self.megabytes.push((bed.gate.passed() - before).bytes as f64 / 1e6);
        Ok(())
    }
}

/// Returns the resident memory of a process in MB.
fn resident(pid: nix::unistd::Pid) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kilobytes = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
    Ok(kilobytes.context("the kernel tells no VmRSS")?.trim().parse::<f64>()? * 1024.0 / 1e6)
}
