//! Everything read and in memory: walks and reads of our mount beside containerd's overlayfs, in turn.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
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

    let theirs = Mount::new(&plain, "overlayfs", &bed.over_the_link(Form::Source), &bed.dir("warm-overlay")?)?;
    let ours = Mount::new(&node.containerd, "nydus", &bed.over_the_link(Form::Nydus), &bed.dir("warm-nydus")?)?;
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

/// A view of an image as a container's root is mounted; unmounted when dropped.
struct Mount(PathBuf);

impl Mount {
    fn new(containerd: &Containerd, snapshotter: &str, image: &str, path: &Path) -> Result<Self> {
        let has = |namespace: &&&str| {
            run_command(containerd.ctr().args(["-n", namespace, "images", "ls", "-q"]))
                .is_ok_and(|names| names.lines().any(|name| name == image))
        };
        let namespace =
            ["k8s.io", "default"].iter().find(has).with_context(|| format!("containerd does not have {image}"))?;
        let mut mount = containerd.ctr();
        mount.args(["-n", namespace, "images", "mount", "--rw", "--snapshotter", snapshotter, image]).arg(path);
        run_command(&mut mount)?;
        Ok(Self(path.to_owned()))
    }
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
