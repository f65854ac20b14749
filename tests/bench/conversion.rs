//! Converting an image: seconds, CPU seconds and peak memory, in turn with another `nydusify` if one is named.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use nydus_tests::process::shoal;

use crate::bed::Bed;
use crate::series::Series;

#[derive(Default)]
struct Row {
    seconds: Series,
    cpu: Series,
    peak: Series,
}

pub(crate) fn run(bed: &Bed) -> Result<()> {
    let own = shoal("nydusify")?;
    let other = std::env::var_os("OTHER_NYDUSIFY").map(std::path::PathBuf::from);
    let mut rows = vec![("ours", own, Row::default())];
    rows.extend(other.map(|path| ("OTHER_NYDUSIFY", path, Row::default())));
    for round in 0..bed.rounds {
        for (name, program, row) in &mut rows {
            // A repository of its own, so that nothing is found there.
            let target = format!("{}/converted/{}-{round}:1", bed.registry.host, name.to_lowercase());
            row.add(program, bed.source(), &target, &bed.dir(&format!("work-{name}-{round}"))?)?;
        }
    }
    println!("\n## Conversion, registry on loopback\n");
    println!("| | seconds | CPU seconds | peak memory of the program, MB |\n| --- | ---: | ---: | ---: |");
    for (name, _, row) in &rows {
        println!("| {name} | {} | {} | {} |", row.seconds, row.cpu, row.peak);
    }
    if let [(_, _, ours), (_, _, other)] = &rows[..] {
        println!("| ratio | {:.2} | {:.2} | |", ours.seconds.ratio(&other.seconds), ours.cpu.ratio(&other.cpu));
    }
    Ok(())
}

impl Row {
    fn add(&mut self, program: &Path, source: &str, target: &str, work: &Path) -> Result<()> {
        let before = children_cpu()?;
        let begin = Instant::now();
        let mut child = Command::new(program)
            .args(["convert", "--source", source, "--target", target, "--work-dir"])
            .arg(work)
            .args(["--source-insecure", "--target-insecure"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
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
