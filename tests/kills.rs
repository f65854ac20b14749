//! `kill -9` of the snapshotter, nydusd and containerd at random moments of a container's life: the next container works, and
//! nothing is left that the same kill leaves on containerd's own overlayfs.
//!
//! The moments come from a seed, which is printed; `SHOAL_SEED` gives one, `SHOAL_ROUNDS` the number of kills of each program.
#![expect(clippy::print_stdout, reason = "what was killed when is for people to read")]

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nydus_tests::moments::{Moments, rounds};
use nydus_tests::needs::{CONTAINERD, met};
use nydus_tests::process::{run, shoal};
use nydus_tests::registry::Registry;
use nydus_tests::scratch::{Scratch, mounts_below};
use nydus_tests::stack::Stack;
use nydus_tests::{image, smoke};
use serde_json::json;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Snapshotter,
    Nydusd,
    Containerd,
}

/// Pulls, prepares, mounts, reads and removes; what fails because of a kill fails, and is told.
async fn life(stack: &Stack, image: &str, name: &str) -> Result<()> {
    let cri = stack.cri().await?;
    cri.pull(image).await?;
    let mut container = stack.run(image, name, &["/bin/sh", "-c", smoke::CHECK]);
    let output = tokio::task::spawn_blocking(move || run(&mut container)).await??;
    ensure!(output.trim_end().ends_with("checked"), "{output}");
    cri.remove_image(image).await
}

/// What is left of images when nobody wants any.
async fn leftovers(stack: &Stack) -> Result<Vec<String>> {
    let names = |dir: &Path| -> Vec<String> {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        entries.map(|entry| entry.path().display().to_string()).collect()
    };
    let mut left = Vec::new();
    if stack.snapshotter.is_some() {
        left.extend(stack.records().await?.into_iter().map(|info| format!("record {}", info.name)));
        for place in ["snap/snapshots", "snap/mnt", "snap/config/shared", "snap/cache"] {
            left.extend(names(&stack.dir.join(place)));
        }
    } else {
        let overlayfs = stack.containerd.dir.join("root/io.containerd.snapshotter.v1.overlayfs/snapshots");
        left.extend(names(&overlayfs));
    }
    let own = stack.dir.join("snap/mnt");
    left.extend(mounts_below(&stack.dir).into_iter().filter(|at| *at != own).map(|at| at.display().to_string()));
    left.extend(stack.processes("containerd-shim-runc-v2").into_iter().map(|pid| format!("shim {pid}")));
    if stack.processes("nydusd").len() > 1 {
        left.push("a second nydusd".to_owned());
    }
    Ok(left)
}

/// Waits until nothing is left, because directories and shims go a moment after the call that removes them.
async fn settled(stack: &Stack) -> Result<Vec<String>> {
    let begun = Instant::now();
    loop {
        let left = leftovers(stack).await?;
        if left.is_empty() || begun.elapsed() > Duration::from_secs(10) {
            return Ok(left);
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

fn strike(stack: &mut Stack, victim: Victim) -> Result<()> {
    match victim {
        Victim::Snapshotter => {
            stack.snapshotter.as_mut().context("the control has none")?.crash()?;
            stack.restart_snapshotter()
        }
        Victim::Nydusd => {
            // Before the first container there is none.
            for pid in stack.processes("nydusd") {
                kill(pid, Signal::SIGKILL)?;
            }
            Ok(())
        }
        Victim::Containerd => {
            stack.containerd.process.crash()?;
            stack.containerd.restart()
        }
    }
}

/// One life with a kill in its middle, another that must work, and what is left of both.
async fn round(stack: &mut Stack, image: &str, victim: Victim, moment: Duration, number: usize) -> Result<Vec<String>> {
    let doomed = format!("doomed-{number}-{}", std::process::id());
    let begun = Instant::now();
    {
        let living = life(stack, image, &doomed);
        tokio::pin!(living);
        tokio::select! {
            ended = &mut living => ended.context("nothing was killed yet")?,
            () = tokio::time::sleep(moment) => {}
        }
        // The call under way is dropped with its connection, as when its client is killed too.
    }
    strike(stack, victim).with_context(|| format!("{victim:?} after {moment:?}"))?;
    let next = format!("next-{number}-{}", std::process::id());
    // An image whose pull was cut is pulled again; containerd itself may need a moment for its shims.
    let limit = Duration::from_secs(20);
    let struck = Instant::now();
    while let Err(error) = life(stack, image, &next).await {
        let _ = run(stack.ctr().args(["containers", "rm", &next]));
        if struck.elapsed() > limit {
            bail!("{victim:?} after {moment:?}: no container works any more: {error:#}\n{}", stack.log());
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    println!("{victim:?} killed after {moment:?}; the next container had worked after {:?}", struck.elapsed());
    ensure!(begun.elapsed() < Duration::from_secs(90), "a round took {:?}", begun.elapsed());
    tidy(stack).await?;
    let mut left = settled(stack).await?;
    if victim == Victim::Containerd {
        // A shim that a dying containerd had just started is nobody's, on overlayfs too; whether one is there depends on the moment.
        left.retain(|what| !what.starts_with("shim "));
    }
    Ok(left)
}

/// Removes everything, once the client whose call was cut has ended: it tidies up too, and may be in the way of ours.
async fn tidy(stack: &Stack) -> Result<()> {
    let begun = Instant::now();
    while !stack.processes("ctr").is_empty() && begun.elapsed() < Duration::from_secs(60) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    while let Err(error) = stack.remove_everything() {
        if begun.elapsed() > Duration::from_secs(75) {
            return Err(error);
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_left_after_a_kill_that_overlayfs_would_not_leave() -> Result<()> {
    if !met(CONTAINERD) {
        return Ok(());
    }
    let scratch = Scratch::new("kills")?;
    let registry = Registry::start(&scratch.dir("registry")?)?;
    let client = image::client(&registry.host)?;
    let config = json!({"Cmd": ["/bin/sh"], "Env": ["PATH=/bin"]});
    image::push(&client, "lib/smoke", "oci", &smoke::layers()?, config).await?;
    let named = |tag: &str| format!("{}/lib/smoke:{tag}", registry.host);
    let mut convert = Command::new(shoal("nydusify")?);
    convert.args(["convert", "--source", &named("oci"), "--target", &named("nydus")]);
    run(convert.arg("--work-dir").arg(scratch.path().join("work")))?;

    let mut moments = Moments::from_environment()?;
    let mut ours = Stack::start(&scratch.path().join("n"), &registry.host, "nydus", None)?;
    let mut control = Stack::start(&scratch.path().join("o"), &registry.host, "overlayfs", None)?;

    // How long a life takes when nobody interferes (the first is slower), and that a life alone leaves nothing.
    let mut whole = Vec::new();
    for (stack, tag) in [(&ours, "nydus"), (&control, "oci")] {
        let mut took = Duration::ZERO;
        for number in 0..2 {
            let begun = Instant::now();
            let name = format!("quiet-{number}-{tag}-{}", std::process::id());
            life(stack, &named(tag), &name).await.with_context(|| stack.log())?;
            took = begun.elapsed();
            stack.remove_everything()?;
            let left = settled(stack).await?;
            ensure!(left.is_empty(), "a life without a kill leaves {left:?}");
        }
        whole.push(took);
    }

    for number in 0..rounds(3)? {
        for victim in [Victim::Snapshotter, Victim::Nydusd, Victim::Containerd] {
            let moment = moments.within(whole[0]);
            let left = round(&mut ours, &named("nydus"), victim, moment, number * 3 + victim as usize).await?;
            // overlayfs has no other process to kill; there a kill of ours must leave nothing at all.
            let allowed = match victim {
                Victim::Containerd => {
                    let moment = moments.within(whole[1]);
                    round(&mut control, &named("oci"), victim, moment, 1000 + number).await?.len()
                }
                _ => 0,
            };
            ensure!(left.len() <= allowed, "{victim:?} after {moment:?} leaves {left:#?}\n{}", ours.log());
        }
    }
    Ok(())
}
