//! Pulling and running, with nerdctl where it is installed and through CRI where it is not.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::containerd::Containerd;
use crate::cri::Cri;
use crate::nerdctl::Nerdctl;

/// A client of one containerd.
#[derive(Debug)]
pub struct Runner {
    client: Client,
    snapshotter: &'static str,
    interrupted: Arc<AtomicBool>,
}

#[derive(Debug)]
enum Client {
    Nerdctl(Nerdctl),
    Cri(Cri),
}

impl Runner {
    /// Connects to a containerd. What runs is killed when `interrupted` becomes true.
    pub async fn new(
        containerd: &Containerd,
        snapshotter: &'static str,
        logs: &Path,
        interrupted: &Arc<AtomicBool>,
    ) -> Result<Self> {
        let client = match Nerdctl::find(containerd) {
            Some(nerdctl) => Client::Nerdctl(nerdctl),
            None => Client::Cri(Cri::connect(&containerd.socket, logs).await?),
        };
        Ok(Self { client, snapshotter, interrupted: Arc::clone(interrupted) })
    }

    /// Names the client, for people.
    pub fn name(&self) -> &'static str {
        match self.client {
            Client::Nerdctl(_) => "nerdctl",
            Client::Cri(_) => "CRI (nerdctl is not on PATH)",
        }
    }

    /// Pulls the pod's pause image, so that no run is charged for it.
    pub async fn warm_up(&self, pause: &str) -> Result<()> {
        match &self.client {
            Client::Nerdctl(_) => Ok(()),
            Client::Cri(cri) => cri.pull(pause).await,
        }
    }

    /// Pulls an image.
    pub async fn pull(&self, image: &str) -> Result<()> {
        match &self.client {
            Client::Nerdctl(nerdctl) => {
                let command = nerdctl.command(self.snapshotter, &["pull", "--quiet", image]);
                run(command, &self.interrupted).map(drop)
            }
            Client::Cri(cri) => cri.pull(image).await,
        }
    }

    /// Runs a command to its end and returns what it printed.
    pub async fn run(&self, image: &str, command: &[String]) -> Result<String> {
        let command: Vec<&str> = command.iter().map(String::as_str).collect();
        match &self.client {
            Client::Nerdctl(nerdctl) => {
                let mut words = vec!["run", "--rm", "--net", "host", "--pull", "never", image];
                words.extend(&command);
                run(nerdctl.command(self.snapshotter, &words), &self.interrupted)
            }
            Client::Cri(cri) => {
                let name =
                    format!("run-{}", std::time::UNIX_EPOCH.elapsed().context("the clock is before 1970")?.as_nanos());
                let ended = cri.run(&name, image, &command).await?;
                ensure!(ended.code == 0, "{command:?} ended with {}:\n{}", ended.code, ended.output);
                Ok(ended.output)
            }
        }
    }
}

/// Runs a command whose output the user sees.
pub fn run_visibly(mut command: Command, interrupted: &AtomicBool) -> Result<()> {
    command.stdin(Stdio::null());
    wait(command, interrupted).map(drop)
}

fn run(mut command: Command, interrupted: &AtomicBool) -> Result<String> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    wait(command, interrupted)
}

/// Waits for a command, and kills it when the user interrupts.
fn wait(mut command: Command, interrupted: &AtomicBool) -> Result<String> {
    let mut child = command.spawn().with_context(|| format!("starting {:?}", command.get_program()))?;
    while child.try_wait()?.is_none() {
        if interrupted.load(Ordering::Relaxed) {
            child.kill()?;
            child.wait()?;
            bail!("interrupted");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let output = child.wait_with_output()?;
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success(),
        "{command:?} ended with {}:\n{printed}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(printed)
}
