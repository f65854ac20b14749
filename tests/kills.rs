//! `kill -9` of the snapshotter, nydusd, the mirror and containerd at random moments of a container's life: the next container works, and
//! nothing is left that the same kill would not leave on containerd's own overlayfs.
//!
//! A containerd that dies while a shim makes or buries its container leaves that shim behind, whatever the snapshotter: where
//! ours leaves something, overlayfs is killed at the same step, and has to leave as much.
//!
//! The moments come from a seed, which is printed; `SHOAL_SEED` gives one, `SHOAL_ROUNDS` the number of kills of each program.
#![expect(clippy::print_stdout, reason = "what was killed when is for people to read")]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
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
    Mirror,
    Containerd,
}

/// The program that stands by a container.
const SHIM: &str = "containerd-shim-runc-v2";

/// How far the life of a container has come, by what any snapshotter shows of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// It has no shim, yet or any more.
    Alone,
    /// Its shim makes it.
    Starting,
    /// Its process runs.
    Running,
    /// Its process has ended, its shim has not.
    Ending,
}

impl Step {
    fn now(stack: &Stack, container: &str) -> Self {
        if stack.processes(SHIM).is_empty() {
            return Self::Alone;
        }
        let tasks = stack.containerd.dir.join("state/io.containerd.runtime.v2.task/k8s.io");
        let bundle = tasks.join(container);
        let Ok(pid) = std::fs::read_to_string(bundle.join("init.pid")) else {
            return if bundle.exists() { Self::Starting } else { Self::Ending };
        };
        let state = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
        if state.is_empty() || state.contains(") Z ") { Self::Ending } else { Self::Running }
    }
}

/// When something is killed.
#[derive(Debug, Clone, Copy)]
enum Moment {
    /// So long after the beginning of a life.
    Life(Duration),
    /// So long after a step of it has begun.
    Step(Step, Duration),
}

impl Moment {
    /// Waits for it; returns at which step it was.
    async fn come(self, stack: &Stack, container: &str) -> Self {
        let begun = Instant::now();
        let (mut step, mut since) = (Step::Alone, begun);
        loop {
            let now = Step::now(stack, container);
            if now != step {
                (step, since) = (now, Instant::now());
            }
            match self {
                Self::Life(after) if begun.elapsed() < after => {}
                Self::Life(_) if step == Step::Alone => return self,
                Self::Life(_) => return Self::Step(step, since.elapsed()),
                Self::Step(wanted, after) if step == wanted && since.elapsed() >= after => return self,
                Self::Step(..) => {}
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Returns moments of the same step in a life that takes `length` times as long. What a kill leaves there is a matter of
    /// chance, and of when in the step it is: so there are some of them.
    fn alike(self, length: f64) -> impl Iterator<Item = Self> {
        (0..=CONTROLS).rev().map(move |part| match self {
            Self::Life(after) => Self::Life(after.mul_f64(length)),
            Self::Step(step, after) => Self::Step(step, after * part / CONTROLS),
        })
    }
}

/// How often a kill is tried on overlayfs at most before it is believed to leave less there.
const CONTROLS: u32 = 11;

/// Pulls, prepares, mounts, reads and removes; what fails because of a kill fails, and is told.
async fn life(stack: &Stack, image: &str, name: &str) -> Result<()> {
    let cri = stack.cri().await?;
    cri.pull(image).await?;
    let mut container = stack.run(image, name, &["/bin/sh", "-c", smoke::CHECK]);
    let output = tokio::task::spawn_blocking(move || run(&mut container)).await??;
    ensure!(output.trim_end().ends_with("checked"), "{output}");
    cri.remove_image(image).await
}

/// Something that is left of images when nobody wants any.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Left {
    kind: Kind,
    what: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    /// A record, a directory, or a part of our own store of them.
    Snapshot,
    Mount,
    Shim,
    Daemon,
}

fn counts(left: &[Left]) -> BTreeMap<Kind, usize> {
    let mut counts = BTreeMap::new();
    for left in left {
        *counts.entry(left.kind).or_default() += 1;
    }
    counts
}

/// Returns what is left of those kinds of which there is more than allowed.
fn excess<'l>(left: &'l [Left], allowed: &BTreeMap<Kind, usize>) -> Vec<&'l Left> {
    let counts = counts(left);
    left.iter().filter(|left| counts[&left.kind] > allowed.get(&left.kind).copied().unwrap_or(0)).collect()
}

async fn leftovers(stack: &Stack) -> Result<Vec<Left>> {
    let names = |dir: &Path| -> Vec<String> {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        entries.map(|entry| entry.path().display().to_string()).collect()
    };
    let mut left = Vec::new();
    let mut add = |kind: Kind, what: Vec<String>| left.extend(what.into_iter().map(|what| Left { kind, what }));
    if stack.snapshotter.is_some() {
        add(Kind::Snapshot, stack.records().await?.into_iter().map(|info| format!("record {}", info.name)).collect());
        for place in ["snap/snapshots", "snap/mnt", "snap/config/shared", "snap/cache"] {
            add(Kind::Snapshot, names(&stack.dir.join(place)));
        }
    } else {
        let overlayfs = stack.containerd.dir.join("root/io.containerd.snapshotter.v1.overlayfs/snapshots");
        add(Kind::Snapshot, names(&overlayfs));
    }
    let own = stack.dir.join("snap/mnt");
    let mounts = mounts_below(&stack.dir).into_iter().filter(|at| *at != own);
    add(Kind::Mount, mounts.map(|at| at.display().to_string()).collect());
    add(Kind::Shim, stack.processes(SHIM).into_iter().map(|pid| pid.to_string()).collect());
    add(Kind::Daemon, stack.processes("nydusd").into_iter().skip(1).map(|pid| pid.to_string()).collect());
    Ok(left)
}

/// Waits until nothing is left, because directories and shims go a moment after the call that removes them.
async fn settled(stack: &Stack) -> Result<Vec<Left>> {
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
        Victim::Mirror => {
            stack.mirror.as_mut().context("there is none")?.crash()?;
            stack.restart_mirror()
        }
        Victim::Containerd => {
            stack.containerd.process.crash()?;
            stack.containerd.restart()
        }
    }
}

/// One life with a kill in its middle, another that must work, and what is left of both. Returns the step of the kill too.
async fn round(
    stack: &mut Stack,
    image: &str,
    victim: Victim,
    moment: Moment,
    name: &str,
) -> Result<(Moment, Vec<Left>)> {
    let doomed = format!("doomed-{name}-{}", std::process::id());
    let begun = Instant::now();
    let moment = {
        let living = life(stack, image, &doomed);
        let coming = moment.come(stack, &doomed);
        tokio::pin!(living, coming);
        tokio::select! {
            ended = &mut living => {
                ended.context("nothing was killed yet")?;
                // It was over before.
                tokio::time::timeout(Duration::ZERO, coming).await.unwrap_or(moment)
            }
            moment = &mut coming => moment,
        }
        // The call under way is dropped with its connection, as when its client is killed too.
    };
    strike(stack, victim).with_context(|| format!("{victim:?} at {moment:?}"))?;
    let next = format!("next-{name}-{}", std::process::id());
    // An image whose pull was cut is pulled again; containerd itself may need a moment for its shims.
    let limit = Duration::from_secs(20);
    let struck = Instant::now();
    while let Err(error) = life(stack, image, &next).await {
        let _ = run(stack.ctr().args(["containers", "rm", &next]));
        if struck.elapsed() > limit {
            bail!("{victim:?} at {moment:?}: no container works any more: {error:#}\n{}", stack.log());
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    ensure!(begun.elapsed() < Duration::from_secs(90), "a round took {:?}", begun.elapsed());
    let worked = struck.elapsed();
    tidy(stack).await?;
    let left = settled(stack).await?;
    println!(
        "{victim:?} killed at {moment:?} on {}; the next container had worked after {worked:?}; left: {left:?}",
        if stack.snapshotter.is_some() { "ours" } else { "overlayfs" }
    );
    for shim in left.iter().filter(|left| left.kind == Kind::Shim) {
        // It would be taken for the next round's.
        kill(Pid::from_raw(shim.what.parse()?), Signal::SIGKILL)?;
    }
    Ok((moment, left))
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
    let mut ours = Stack::mirrored(&scratch.path().join("n"), &registry.host)?;
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

    let asked = ours.mirror.as_ref().is_some_and(|mirror| mirror.log().contains("blob finished"));
    ensure!(asked, "lives go past the mirror");
    for number in 0..rounds(3)? {
        for victim in [Victim::Snapshotter, Victim::Nydusd, Victim::Mirror, Victim::Containerd] {
            let moment = match (victim, number % 3) {
                // When containerd has most in its hands.
                (Victim::Containerd, 1) => Moment::Step(Step::Starting, moments.within(whole[0] / 8)),
                (Victim::Containerd, 2) => Moment::Step(Step::Ending, moments.within(whole[0] / 32)),
                _ => Moment::Life(moments.within(whole[0])),
            };
            let name = format!("{number}-{victim:?}");
            let (moment, left) = round(&mut ours, &named("nydus"), victim, moment, &name).await?;
            let mut allowed = BTreeMap::new();
            // overlayfs has no other process to kill; there a kill of ours must leave nothing at all.
            if victim == Victim::Containerd {
                for (again, moment) in moment.alike(whole[1].div_duration_f64(whole[0])).enumerate() {
                    if excess(&left, &allowed).is_empty() {
                        break;
                    }
                    let name = format!("{name}-{again}");
                    let (_, theirs) = round(&mut control, &named("oci"), victim, moment, &name).await?;
                    for (kind, count) in counts(&theirs) {
                        let most = allowed.entry(kind).or_default();
                        *most = count.max(*most);
                    }
                }
            }
            let left = excess(&left, &allowed);
            ensure!(left.is_empty(), "{victim:?} at {moment:?} leaves {left:#?}\n{}", ours.log());
        }
    }
    Ok(())
}
