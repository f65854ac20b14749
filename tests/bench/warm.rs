//! Everything read and in memory: walks and reads of our mount beside containerd's overlayfs, in turn.

use std::collections::HashMap;
use std::fs;
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MntFlags, umount2};
use nydus_tests::containerd::Containerd;
use nydus_tests::node::Node;
use nydus_tests::process::run as run_command;

use crate::bed::{Bed, Form};
use crate::series::Series;

/// Rounds of one measurement for one of `ROUNDS`: each takes a fraction of a second.
const TURNS: usize = 5;
/// Larger files are read for the figure of reading in order, smaller ones for small files.
const LARGE: u64 = 1 << 20;

type Measure = fn(&Files) -> Result<f64>;
const MEASURES: [(&str, Measure); 5] = [
    ("stat walk", walk),
    ("files under 1 MiB, read whole", read_small),
    ("files of 1 MiB and more, read in order", read_large),
    ("10,000 reads of 4 KiB at random", read_random),
    ("open, read 4 KiB, close: each file", open_each),
];

/// What a mount holds.
struct Files {
    root: PathBuf,
    small: Vec<PathBuf>,
    large: Vec<PathBuf>,
}

pub(crate) async fn run(bed: &Bed) -> Result<()> {
    let setup = bed.setup();
    let plain = setup.plain_containerd(&bed.dir("warm-plain")?)?;
    bed.runner(&plain, "overlayfs").await?.pull(&bed.over_the_link(Form::Source)).await?;
    let node = Node::start(&bed.dir("warm-node")?, &setup)?;
    bed.runner(&node.containerd, "nydus").await?.pull(&bed.over_the_link(Form::Nydus)).await?;

    let theirs = Mount::new(&plain, "overlayfs", &bed.dir("warm-overlay")?)?;
    let ours = Mount::new(&node.containerd, "nydus", &bed.dir("warm-nydus")?)?;
    let (theirs, ours) = (Files::of(&theirs.0)?, Files::of(&ours.0)?);
    ensure!(theirs.small.len() == ours.small.len(), "the two mounts hold different files");
    for (_, measure) in MEASURES {
        measure(&theirs)?;
        measure(&ours)?;
    }
    println!("\n## Warm, milliseconds: containerd's overlayfs and ours\n");
    println!("| | overlayfs | ours | ratio |\n| --- | ---: | ---: | ---: |");
    for (name, measure) in MEASURES {
        let (mut a, mut b) = (Series::default(), Series::default());
        for _ in 0..bed.rounds * TURNS {
            a.push(measure(&theirs)?);
            b.push(measure(&ours)?);
        }
        println!("| {name} | {a} | {b} | {:.2} |", b.ratio(&a));
    }
    Ok(())
}

/// What containerd would give a new container of an image as its root; unmounted when dropped.
struct Mount(PathBuf);

impl Mount {
    fn new(containerd: &Containerd, snapshotter: &str, path: &Path) -> Result<Self> {
        for namespace in ["default", "k8s.io"] {
            let snapshots = |arguments: &[&str]| {
                let mut command = containerd.ctr();
                command.args(["-n", namespace, "snapshots", "--snapshotter", snapshotter]).args(arguments);
                run_command(&mut command)
            };
            let listed = snapshots(&["ls"])?;
            let Some(top) = largest_chain(&listed) else { continue };
            let target = path.to_str().context("a temporary folder has a plain name")?;
            let mount = snapshots(&["prepare", "--target", target, "bench", top])?;
            run_command(Command::new("sh").args(["-c", &mount]))?;
            return Ok(Self(path.to_owned()));
        }
        bail!("containerd has no image of {snapshotter}")
    }
}

/// Returns the top of the longest chain in what `ctr snapshots ls` prints: the image, not the pod's pause process.
fn largest_chain(listed: &str) -> Option<&str> {
    let parents: HashMap<&str, &str> = listed
        .lines()
        .skip(1)
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let (key, second) = (words.next()?, words.next()?);
            Some((key, if second == "Committed" { "" } else { second }))
        })
        .collect();
    let depth = |key: &str| std::iter::successors(Some(key), |key| parents.get(key).copied()).count();
    parents.keys().copied().max_by_key(|key| depth(key))
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Err(error) = umount2(&self.0, MntFlags::MNT_DETACH) {
            println!("could not unmount {}: {error}", self.0.display());
        }
    }
}

impl Files {
    fn of(root: &Path) -> Result<Self> {
        let mut files = Self { root: root.to_owned(), small: Vec::new(), large: Vec::new() };
        let mut seen = std::collections::HashSet::new();
        visit(root, &mut |path, metadata| {
            if metadata.is_file() && seen.insert(metadata.ino()) {
                let list = if metadata.len() < LARGE { &mut files.small } else { &mut files.large };
                list.push(path.to_owned());
            }
        })?;
        files.small.sort();
        files.large.sort();
        Ok(files)
    }
}

fn visit(dir: &Path, each: &mut impl FnMut(&Path, &fs::Metadata)) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let metadata = fs::symlink_metadata(&path)?;
        each(&path, &metadata);
        if metadata.is_dir() {
            visit(&path, each)?;
        }
    }
    Ok(())
}

/// Returns the milliseconds that `work` takes.
fn timed(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let begin = Instant::now();
    work()?;
    Ok(begin.elapsed().as_secs_f64() * 1e3)
}

fn walk(files: &Files) -> Result<f64> {
    timed(|| visit(&files.root, &mut |_, _| {}))
}

fn read_small(files: &Files) -> Result<f64> {
    timed(|| files.small.iter().try_for_each(|path| read_whole(path)))
}

fn read_large(files: &Files) -> Result<f64> {
    timed(|| files.large.iter().try_for_each(|path| read_whole(path)))
}

fn read_whole(path: &Path) -> Result<()> {
    let mut file = fs::File::open(path)?;
    let mut buffer = vec![0; 128 << 10];
    while file.read(&mut buffer)? > 0 {}
    Ok(())
}

/// The same places each time, from a small generator of our own.
fn read_random(files: &Files) -> Result<f64> {
    let mut open = Vec::new();
    for path in &files.large {
        let file = fs::File::open(path)?;
        open.push((file.metadata()?.len() / 4096, file));
    }
    let mut state = 88_172_645_463_325_252_u64;
    let mut buffer = [0; 4096];
    timed(|| {
        for _ in 0..10_000 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let (pages, file) = &open[state as usize % open.len()];
            file.read_exact_at(&mut buffer, (state >> 32) % pages * 4096)?;
        }
        Ok(())
    })
}

fn open_each(files: &Files) -> Result<f64> {
    let mut buffer = [0; 4096];
    timed(|| {
        for path in &files.small {
            let _ = fs::File::open(path)?.read(&mut buffer)?;
        }
        Ok(())
    })
}
