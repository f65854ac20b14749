//! Converting an image, and making one of a directory and of a tar: seconds, CPU seconds and peak memory, in turn with
//! another `nydusify` and another `nydus-image` where they are named.
//!
//! Other programs compare nothing with the source, so ours is measured without its verification as well.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use nydus_tests::process::{run as run_quietly, shoal};

use crate::bed::Bed;
use crate::series::Series;

#[derive(Default)]
struct Row {
    name: String,
    seconds: Series,
    cpu: Series,
    peak: Series,
}

/// Programs that do the same, measured in turn.
struct Table {
    rows: Vec<Row>,
    /// The row that is compared with all others.
    against: Option<usize>,
}

pub(crate) fn run(bed: &Bed) -> Result<()> {
    let other = |variable: &str| std::env::var_os(variable).map(PathBuf::from);
    let (nydusify, nydus_image) = (other("OTHER_NYDUSIFY"), other("OTHER_NYDUS_IMAGE"));
    whole(bed, nydusify.as_deref(), nydus_image.as_deref())?;
    create(bed, nydus_image.as_deref())
}

/// `nydusify convert` from and to the registry.
fn whole(bed: &Bed, other: Option<&Path>, builder: Option<&Path>) -> Result<()> {
    let own = shoal("nydusify")?;
    let mut programs = vec![("ours", own.as_path(), vec![]), ("ours, --no-verify", &own, vec!["--no-verify".into()])];
    if let Some(other) = other {
        let builder: Option<Vec<OsString>> = builder.map(|path| vec!["--nydus-image".into(), path.into()]);
        programs.push(("OTHER_NYDUSIFY", other, builder.unwrap_or_default()));
    }
    let mut table = Table::of(programs.iter().map(|(name, ..)| *name), other.map(|_| 2));
    for round in 0..bed.rounds {
        for (number, (_, program, more)) in programs.iter().enumerate() {
            // A repository of its own, so that nothing is found there.
            let target = format!("{}/converted/{number}-{round}:1", bed.registry.host);
            let mut command = Command::new(program);
            command.args(["convert", "--source", bed.source(), "--target", &target, "--work-dir"]);
            command.arg(bed.dir(&format!("work-{number}-{round}"))?).args(["--source-insecure", "--target-insecure"]);
            table.rows[number].add(command.args(more))?;
        }
    }
    table.print("nydusify convert, registry on loopback");
    Ok(())
}

/// `nydus-image create` of the image's largest layer.
fn create(bed: &Bed, other: Option<&Path>) -> Result<()> {
    let own = shoal("nydus-image")?;
    let (directory, tar) = largest_layer(bed)?;
    let programs: Vec<_> =
        [Some(("ours", own.as_path())), other.map(|path| ("OTHER_NYDUS_IMAGE", path))].into_iter().flatten().collect();
    for (kind, compressor, source) in
        [("directory", "zstd", &directory), ("directory", "lz4_block", &directory), ("tar-rafs", "zstd", &tar)]
    {
        let mut table = Table::of(programs.iter().map(|(name, _)| *name), other.map(|_| 1));
        for round in 0..bed.rounds {
            for ((_, program), row) in programs.iter().zip(&mut table.rows) {
                let out = bed.dir(&format!("create-{kind}-{compressor}-{round}-{}", row.name))?;
                let mut command = Command::new(program);
                command.args(["create", "--type", kind, "--fs-version", "6", "--compressor", compressor]);
                command.arg("--blob-dir").arg(&out).arg("--bootstrap").arg(out.join("bootstrap")).arg(source);
                row.add(&mut command)?;
                std::fs::remove_dir_all(out)?;
            }
        }
        table.print(&format!("nydus-image create, {kind}, {compressor}"));
    }
    Ok(())
}

/// Unpacks the image's largest layer; returns the directory, and a tar of it.
fn largest_layer(bed: &Bed) -> Result<(PathBuf, PathBuf)> {
    let layout = bed.dir("layout")?;
    let mut copy = Command::new(shoal("nydusify")?);
    copy.args(["copy", "--source", bed.source(), "--source-insecure", "--target"]);
    copy.arg(format!("file://{}", layout.display())).arg("--work-dir").arg(bed.dir("copying")?);
    run_quietly(&mut copy)?;
    let mut blobs: Vec<_> = std::fs::read_dir(layout.join("blobs/sha256"))?.collect::<std::io::Result<_>>()?;
    blobs.sort_by_key(|blob| blob.metadata().map(|metadata| metadata.len()).unwrap_or_default());
    let largest = blobs.pop().context("an image without layers")?.path();
    let (directory, tar) = (bed.dir("layer")?, bed.dir("tar")?.join("layer.tar"));
    run_quietly(Command::new("tar").arg("-xf").arg(largest).arg("-C").arg(&directory))?;
    run_quietly(Command::new("tar").arg("-cf").arg(&tar).arg("-C").arg(&directory).arg("."))?;
    Ok((directory, tar))
}

impl Table {
    fn of<'n>(names: impl Iterator<Item = &'n str>, against: Option<usize>) -> Self {
        let rows = names.map(|name| Row { name: name.to_owned(), ..Row::default() }).collect();
        Self { rows, against }
    }

    fn print(&self, title: &str) {
        println!("\n## {title}\n");
        println!("| | seconds | CPU seconds | peak memory of the program, MB | ratio, seconds | CPU |");
        println!("| --- | ---: | ---: | ---: | ---: | ---: |");
        for (number, row) in self.rows.iter().enumerate() {
            let ratio = match self.against.filter(|&against| against != number) {
                Some(other) => {
                    let other = &self.rows[other];
                    format!("{:.2}x | {:.2}x", row.seconds.ratio(&other.seconds), row.cpu.ratio(&other.cpu))
                }
                None => "|".to_owned(),
            };
            println!("| {} | {} | {} | {} | {ratio} |", row.name, row.seconds, row.cpu, row.peak);
        }
    }
}

impl Row {
    /// Runs a program to its end.
    fn add(&mut self, command: &mut Command) -> Result<()> {
        let program = OsString::from(command.get_program());
        let before = children_cpu()?;
        let begin = Instant::now();
        let command = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().with_context(|| format!("starting {}", program.display()))?;
        let mut peak = 0.0_f64;
        let status = loop {
            peak = peak.max(high_water(child.id()));
            if let Some(status) = child.try_wait()? {
                break status;
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        ensure!(status.success(), "{} ended with {status}", program.display());
        self.seconds.push(begin.elapsed().as_secs_f64());
        self.cpu.push(children_cpu()? - before);
        self.peak.push(peak);
        Ok(())
    }
}

/// Returns the CPU seconds of all processes that were started here and have ended, and of their children.
fn children_cpu() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Ok(micros as f64 / 1e6)
}

/// Returns the most memory that a process has held, in MB; 0 when it has ended.
fn high_water(pid: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kilobytes = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
    kilobytes.and_then(|text| text.trim().parse::<f64>().ok()).map_or(0.0, |kilobytes| kilobytes * 1024.0 / 1e6)
}
