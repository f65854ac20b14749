//! The real `nerdctl`, where it is installed.

use std::path::PathBuf;
use std::process::Command;

use crate::containerd::Containerd;
use crate::needs::program;

/// nerdctl bound to one containerd, with its own data kept in that containerd's folder.
#[derive(Debug, Clone)]
pub struct Nerdctl {
    binary: PathBuf,
    socket: PathBuf,
    data: PathBuf,
    hosts: PathBuf,
}

impl Nerdctl {
    /// Finds nerdctl on `PATH`.
    pub fn find(containerd: &Containerd) -> Option<Self> {
        let binary = program("nerdctl")?;
        let (socket, dir) = (containerd.socket.clone(), &containerd.dir);
        Some(Self { binary, socket, data: dir.join("nerdctl"), hosts: dir.join("certs.d") })
    }

    /// Returns `nerdctl --snapshotter SNAPSHOTTER ARGS`.
    pub fn command(&self, snapshotter: &str, args: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command
            .env("CONTAINERD_ADDRESS", &self.socket)
            .arg("--data-root")
            .arg(&self.data)
            .arg("--hosts-dir")
            .arg(&self.hosts)
            .args(["--insecure-registry", "--snapshotter", snapshotter])
            .args(args);
        command
    }
}
