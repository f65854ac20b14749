//! The sudden death of the converter: at every step of a push, and at any moment of all it does.
//!
//! The moments come from a seed, which is printed; `SHOAL_SEED` gives one, `SHOAL_ROUNDS` the number of kills.
#![expect(clippy::print_stdout, reason = "what was killed when is for people to read")]

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use axum::http::StatusCode;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use nydus_tests::converted::Converted;
use nydus_tests::gate::{Gate, Pace};
use nydus_tests::image;
use nydus_tests::moments::{Moments, rounds};
use nydus_tests::moody::{Asked, Mood, Moody};
use nydus_tests::needs::met;
use nydus_tests::process::shoal;
use nydus_tests::registry::Registry;
use serde_json::Value;

use super::{Bed, NEEDS, Tally, ended, has_tag, said, step};

/// Where the converter is killed: at the n-th request (from 0) of a kind.
const DEATHS: [(&str, usize); 7] =
    [("ask", 0), ("open", 1), ("send", 0), ("close", 0), ("close", 2), ("read", 1), ("manifest", 0)];

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_conversion_leaves_nothing_half_done_and_the_next_one_goes_on() -> Result<()> {
    if !met(NEEDS) {
        return Ok(());
    }
    let bed = Bed::new("kill").await?;
    let other = Registry::start(&bed.scratch.dir("other")?)?;
    std::fs::create_dir(bed.work())?;
    for (at, number) in DEATHS {
        let tally = Tally::default();
        let victim = Arc::new(Mutex::new(None));
        let moods = {
            let (tally, victim) = (tally.clone(), Arc::clone(&victim));
            move |asked: &Asked<'_>| {
                let step = step(asked);
                if tally.add(step) == number
                    && step == at
                    && let Some(pid) = *victim.lock().expect("no holder of this lock panics")
                {
                    kill(pid, Signal::SIGKILL).expect("it waits for this answer");
                    return Mood::Refuse(StatusCode::BAD_GATEWAY, None);
                }
                Mood::Fair
            }
        };
        let moody = Moody::start(&other.host, moods).await?;
        let mut command = bed.convert(&bed.registry.host, &moody.host)?;
        let output_json = bed.scratch.path().join("output.json");
        command.arg("--output-json").arg(&output_json).stdin(Stdio::null()).stderr(Stdio::null());
        let status = {
            let mut held = victim.lock().expect("no holder of this lock panics");
            let child = command.spawn()?;
            *held = Some(Pid::from_raw(i32::try_from(child.id())?));
            child
        };
        let status = tokio::task::spawn_blocking(move || {
            let mut child = status;
            child.wait()
        })
        .await??;
        ensure!(status.code().is_none(), "it was not killed at {at} {number}: {status}, {tally:?}");
        ensure!(!has_tag(&other.host).await?, "killed at {at} {number}, it left a tag");
        let left: Vec<_> = std::fs::read_dir(bed.work())?.flatten().map(|entry| entry.file_name()).collect();
        ensure!(left.is_empty(), "killed at {at} {number}, it left {left:?} in the work directory");
        ensure!(!output_json.exists(), "killed at {at} {number}, it left a report");
    }
    let tally = Tally::default();
    let counting = tally.clone();
    let moody = Moody::start(&other.host, move |asked| {
        counting.add(step(asked));
        Mood::Fair
    });
    let moody = moody.await?;
    let output = ended(&mut bed.convert(&bed.registry.host, &moody.host)?).await?;
    ensure!(output.status.success(), "the conversion after the kills failed:\n{}", said(&output));
    // The last death was when everything but the manifest was there.
    ensure!(tally.get("send") == 0 && tally.get("close") == 0, "what was there was sent again: {tally:?}");
    bed.is_right(&other.host).await
}

/// The repository of a round of random kills, or the archive.
#[derive(Debug)]
enum Target<'t> {
    Repository { host: &'t str, name: String },
    Archive(PathBuf),
}

impl Target<'_> {
    /// Returns the layers of the image that is there under its final name, all of whose bytes are there too.
    async fn layers(&self, scratch: &Path) -> Result<Option<Value>> {
        let manifest = match self {
            Self::Repository { host, name } => {
                let client = image::client(host)?;
                if client.has_manifest(name, "nydus").await?.is_none() {
                    return Ok(None);
                }
                let dir = scratch.join(name);
                let found = Converted::pull(&client, name, "nydus", &dir).await;
                std::fs::remove_dir_all(&dir)?;
                found?.manifest
            }
            Self::Archive(path) => {
                if !path.exists() {
                    return Ok(None);
                }
                let dir = path.with_extension("unpacked");
                tar::Archive::new(std::fs::File::open(path)?).unpack(&dir)?;
                let read = |path: PathBuf| -> Result<Value> { Ok(serde_json::from_slice(&std::fs::read(path)?)?) };
                let blob = |descriptor: &Value| {
                    dir.join("blobs").join(descriptor["digest"].as_str().unwrap_or_default().replace(':', "/"))
                };
                let manifest = read(blob(&read(dir.join("index.json"))?["manifests"][0]))?;
                for layer in manifest["layers"].as_array().into_iter().flatten() {
                    let digest =
                        format!("sha256:{}", nydus_rafs::Algorithm::Sha256.digest(&std::fs::read(blob(layer))?));
                    ensure!(layer["digest"] == digest.as_str(), "{layer} has other bytes");
                }
                std::fs::remove_dir_all(&dir)?;
                manifest
            }
        };
        Ok(Some(manifest["layers"].clone()))
    }
}

impl Bed {
    /// A conversion of the image at `source` to a target of one's own.
    fn convert_into(&self, source: &str, target: &Target<'_>) -> Result<Command> {
        let mut command = Command::new(shoal("nydusify")?);
        command.args(["convert", "--source", &format!("{source}/source:oci")]);
        match target {
            Target::Repository { host, name } => command.args(["--target", &format!("{host}/{name}:nydus")]),
            Target::Archive(path) => {
                command.arg("--target").arg("example.org/target:nydus").arg("--target-archive").arg(path)
            }
        };
        command.arg("--work-dir").arg(self.work()).env_remove("DOCKER_CONFIG").env("HOME", self.scratch.path());
        command.stdin(Stdio::null());
        Ok(command)
    }
}

/// Runs it for so long, unless it ends by itself.
async fn killed_after(moment: Duration, mut command: Command) -> Result<ExitStatus> {
    let mut child = command.stderr(Stdio::null()).spawn()?;
    let begun = Instant::now();
    while begun.elapsed() < moment && child.try_wait()?.is_none() {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    child.kill().context("killing nydusify")?;
    Ok(child.wait()?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversion_killed_at_any_moment_leaves_nothing_under_a_final_name_and_nothing_in_the_way() -> Result<()> {
    if !met(NEEDS) {
        return Ok(());
    }
    let bed = Bed::new("moments").await?;
    let other = Registry::start(&bed.scratch.dir("other")?)?;
    // Pulling and pushing shall take about as long as what lies between.
    let pace = Pace { bits_per_second: 150_000_000, round_trip: Duration::from_millis(5) };
    let (from, to) = (Gate::open(&bed.registry.host, pace)?, Gate::open(&other.host, pace)?);
    let archives = bed.scratch.dir("archives")?;
    let target = |number: usize| match number % 3 {
        2 => Target::Archive(archives.join(format!("{number}.tar"))),
        _ => Target::Repository { host: &to.host, name: format!("target-{number}") },
    };
    let mut wanted = None;
    let mut whole = [Duration::ZERO; 3];
    for kind in [1, 2] {
        let quiet = target(kind);
        let begun = Instant::now();
        let output = ended(&mut bed.convert_into(&from.host, &quiet)?).await?;
        ensure!(output.status.success(), "without a kill it failed:\n{}", said(&output));
        whole[kind] = begun.elapsed();
        let layers = quiet.layers(bed.scratch.path()).await?.context("without a kill nothing is there")?;
        ensure!(*wanted.get_or_insert_with(|| layers.clone()) == layers, "an archive holds another image");
    }
    whole[0] = whole[1];

    let mut moments = Moments::from_environment()?;
    let mut deaths = 0;
    for number in 3..3 + rounds(10)? {
        let target = target(number);
        let moment = moments.within(whole[number % 3]);
        let report = bed.scratch.path().join(format!("{number}.json"));
        let mut command = bed.convert_into(&from.host, &target)?;
        command.arg("--output-json").arg(&report);
        let status = killed_after(moment, command).await?;
        deaths += usize::from(status.code().is_none());
        println!("killed after {moment:.2?} of {:.2?} on the way to {target:?}: {status}", whole[number % 3]);
        // At the very end it may be there, and then all of it is.
        let found = target.layers(bed.scratch.path()).await.with_context(|| format!("killed after {moment:?}"))?;
        ensure!(found.is_none() || found == wanted, "killed after {moment:?}, it left {found:?}");
        let left: Vec<_> = std::fs::read_dir(bed.work())?.flatten().map(|entry| entry.file_name()).collect();
        ensure!(left.is_empty(), "killed after {moment:?}, it left {left:?} in the work directory");
        if report.exists() {
            ensure!(found.is_some(), "killed after {moment:?}, it left a report of an image that is not there");
            serde_json::from_slice::<Value>(&std::fs::read(&report)?).context("the report is cut")?;
        }
        let output = ended(&mut bed.convert_into(&bed.registry.host, &target)?).await?;
        ensure!(output.status.success(), "killed after {moment:?}, it is in its own way:\n{}", said(&output));
        let found = target.layers(bed.scratch.path()).await?;
        ensure!(found == wanted, "killed after {moment:?}, the next one makes something else: {found:?}");
    }
    ensure!(deaths > 0, "it was never killed");
    Ok(())
}
