//! `make bench`: what a user waits for and pays, as ratios of things measured side by side in one run.
//!
//! Four parts, each in turn for all that is compared, so that a busy machine is busy for everybody:
//! [`starts`] over a link of 200 Mbit/s and 20 ms, [`warm`] walks and reads beside containerd's overlayfs,
//! [`conversion`], and the [`swarm`]. `ROUNDS` says how often (3), `ONLY=starts,warm,conversion,swarm` picks parts, `IMAGE` names an image of a
//! registry to take the place of our own (with `SHORT` and `LONG`, what its `/bin/sh` runs), and `OTHER_NYDUSIFY` and
//! `OTHER_NYDUS_IMAGE` a second `nydusify` and `nydus-image` to convert with in turn.
//!
//! Nothing here asserts a time: what it prints is for people and for docs/PERFORMANCE.md.
#![expect(clippy::print_stdout, reason = "a bench is a program for people")]

mod bed;
mod conversion;
mod series;
mod starts;
mod swarm;
mod warm;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, bail};
use nydus_tests::needs::{CONTAINERD, Need, met};

use crate::bed::Bed;

fn main() -> ExitCode {
    let interrupted = Arc::new(AtomicBool::new(false));
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            println!("bench: could not start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let flag = Arc::clone(&interrupted);
    runtime.spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            println!("\ninterrupted: cleaning up");
            flag.store(true, Ordering::Relaxed);
        }
    });
    match runtime.block_on(bench(interrupted)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn bench(interrupted: Arc<AtomicBool>) -> Result<()> {
    if !met(CONTAINERD) || !met(&[Need::Program("mmdebstrap")]) {
        bail!("run `make bench` as root on Debian 12: it installs what it needs");
    }
    let parts = std::env::var("ONLY").unwrap_or_else(|_| "starts,warm,conversion,swarm".to_owned());
    let parts: Vec<&str> = parts.split(',').collect();
    if let Some(unknown) = parts.iter().find(|part| !["starts", "warm", "conversion", "swarm"].contains(part)) {
        bail!("`ONLY` names `{unknown}`; there are starts, warm, conversion and swarm");
    }
    // It needs no image, whose making takes a minute.
    if parts.contains(&"swarm") {
        swarm::run(bed::rounds()?).await?;
    }
    let parts: Vec<&str> = parts.into_iter().filter(|part| *part != "swarm").collect();
    if parts.is_empty() {
        return Ok(());
    }
    let bed = Bed::new(interrupted).await?;
    bed.print_machine()?;
    for part in parts {
        match part {
            "starts" => starts::run(&bed).await?,
            "warm" => warm::run(&bed).await?,
            _ => conversion::run(&bed)?,
        }
    }
    Ok(())
}
