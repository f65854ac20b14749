//! What all parts of the bench stand on: a registry with the image in both forms, and a link to it.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nydus_tests::containerd::Containerd;
use nydus_tests::gate::{Gate, Pace};
use nydus_tests::node::Setup;
use nydus_tests::process::shoal;
use nydus_tests::registry::Registry;
use nydus_tests::runner::{Runner, run_visibly};
use nydus_tests::scratch::Scratch;
use nydus_tests::{debian, image};
use serde_json::json;

/// The link between the nodes and the registry.
pub(crate) const LINK: Pace = Pace { bits_per_second: 200_000_000, round_trip: Duration::from_millis(20) };

/// A command to its first answer.
pub(crate) struct Workload {
    pub(crate) name: &'static str,
    pub(crate) command: Vec<String>,
}

/// The bed; all of it is gone when dropped.
pub(crate) struct Bed {
    pub(crate) registry: Registry,
    /// To the registry over [`LINK`].
    pub(crate) gate: Gate,
    pub(crate) rounds: usize,
    pub(crate) workloads: Vec<Workload>,
    interrupted: Arc<AtomicBool>,
    /// The image as its makers have it, as `host:port/name:tag`.
    source: String,
    scratch: Scratch,
}

/// Returns how often everything is to be measured.
pub(crate) fn rounds() -> Result<usize> {
    let rounds = match std::env::var("ROUNDS") {
        Ok(text) => text.parse().with_context(|| format!("`ROUNDS` is `{text}`, and no number"))?,
        Err(_) => 3,
    };
    ensure!((1..=100).contains(&rounds), "`ROUNDS` is {rounds}; from 1 to 100 are possible");
    Ok(rounds)
}

impl Bed {
    pub(crate) async fn new(interrupted: Arc<AtomicBool>) -> Result<Self> {
        let rounds = rounds()?;
        let scratch = Scratch::new("bench")?;
        let registry = Registry::start(&scratch.dir("registry")?)?;
        let client = image::client(&registry.host)?;
        let pause = debian::pause(&scratch.dir("pause")?)?;
        image::push(&client, "pause", "1", &[pause], json!({"Entrypoint": ["/pause"]})).await?;
        let shell = |variable: &str, default: &str| {
            let script = std::env::var(variable).unwrap_or_else(|_| default.to_owned());
            vec!["/bin/sh".to_owned(), "-c".to_owned(), script]
        };
        let (source, workloads) = match std::env::var("IMAGE") {
            Ok(source) => {
                let workloads = vec![
                    Workload { name: "SHORT", command: shell("SHORT", "true") },
                    Workload { name: "LONG", command: shell("LONG", "cat /usr/bin/* | wc -c") },
                ];
                (source, workloads)
            }
            Err(_) => {
                println!(
                    "==> making an image of Debian packages: a minimal system, python3 with numpy, an application"
                );
                let layers = debian::python(&scratch.dir("image")?)?;
                image::push(&client, "image", "source", &layers, json!({"Cmd": ["python3"]})).await?;
                let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
                let workloads = vec![
                    Workload { name: "python3 -V", command: words(&["python3", "-V"]) },
                    Workload { name: "import numpy", command: words(&["python3", "/app/main.py"]) },
                ];
                (format!("{}/image:source", registry.host), workloads)
            }
        };
        let gate = Gate::open(&registry.host, LINK)?;
        let bed = Self { registry, gate, rounds, workloads, interrupted, source, scratch };
        println!("==> nydusify convert");
        let mut convert = Command::new(shoal("nydusify")?);
        convert.args(["convert", "--source", &bed.source, "--target", &format!("{}/image:nydus", bed.registry.host)]);
        convert.arg("--work-dir").arg(bed.scratch.path().join("work"));
        run_visibly(convert, &bed.interrupted)?;
        Ok(bed)
    }

    /// Says on what all this was measured.
    pub(crate) fn print_machine(&self) -> Result<()> {
        let cpu = std::fs::read_to_string("/proc/cpuinfo")?;
        let model = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("unknown");
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
        let load = std::fs::read_to_string("/proc/loadavg")?;
        let cores = std::thread::available_parallelism()?;
        let load: Vec<&str> = load.split(' ').take(1).collect();
        println!(
            "\n{} rounds, medians (least-most); {cores} cores of {}, Linux {}, load {}",
            self.rounds,
            model.trim_start_matches(['\t', ':', ' ']),
            kernel.trim(),
            load.concat()
        );
        Ok(())
    }

    /// Returns the image's name for readers who come over the link.
    pub(crate) fn over_the_link(&self, form: Form) -> String {
        match form {
            Form::Source => self.source.replace(&self.registry.host, &self.gate.host),
            Form::Nydus => format!("{}/image:nydus", self.gate.host),
        }
    }

    /// Returns the image's name without the link.
    pub(crate) fn source(&self) -> &str {
        &self.source
    }

    /// Returns the setup of a node behind the link.
    pub(crate) fn setup(&self) -> Setup {
        Setup::new(&self.gate.host, self.pause())
    }

    fn pause(&self) -> String {
        format!("{}/pause:1", self.gate.host)
    }

    /// Makes a folder that no other measurement uses.
    pub(crate) fn dir(&self, name: &str) -> Result<PathBuf> {
        ensure!(!self.interrupted.load(Ordering::Relaxed), "interrupted");
        Ok(self.scratch.dir(name)?)
    }

    /// Connects a client to a containerd.
    pub(crate) async fn runner(&self, containerd: &Containerd, snapshotter: &'static str) -> Result<Runner> {
        let runner =
            Runner::new(containerd, snapshotter, &containerd.dir.join("client-logs"), &self.interrupted).await?;
        runner.warm_up(&self.pause()).await?;
        Ok(runner)
    }
}

/// The form of the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// As its makers have it.
    Source,
    /// As we convert it.
    Nydus,
}
