//! One nydusd on one mount point, as `nydusd fuse` is started by hand.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use crate::process::{Process, shoal};
use crate::scratch::mounts_below;

/// A mounted image; unmounted when dropped.
#[derive(Debug)]
pub struct Mounted {
    /// nydusd.
    pub process: Process,
    /// The mount point.
    pub path: PathBuf,
    /// The API socket.
    pub socket: PathBuf,
}

impl Mounted {
    /// Mounts `bootstrap` with its blobs in `blobs`; works in `dir`.
    pub fn localfs(bootstrap: &Path, blobs: &Path, dir: &Path) -> Result<Self> {
        let cache = dir.join("cache");
        let config = serde_json::json!({
            "device": {
                "backend": {"type": "localfs", "config": {"dir": blobs}},
                "cache": {"type": "blobcache", "config": {"work_dir": cache}},
            },
            "mode": "direct", "digest_validate": false, "enable_xattr": true,
        });
        Self::start(bootstrap, &config, dir)
    }

    /// Mounts `bootstrap` with a configuration; works in `dir`.
    pub fn start(bootstrap: &Path, config: &serde_json::Value, dir: &Path) -> Result<Self> {
        Self::launch(Command::new(shoal("nydusd")?), bootstrap, config, dir)
    }

    /// The same with a command that runs nydusd somewhere.
    pub fn launch(mut command: Command, bootstrap: &Path, config: &serde_json::Value, dir: &Path) -> Result<Self> {
        let path = dir.join("mnt");
        std::fs::create_dir_all(&path)?;
        let (file, socket) = (dir.join("nydusd.json"), dir.join("api.sock"));
        std::fs::write(&file, config.to_string())?;
        command.arg("fuse").arg("--config").arg(&file).arg("--bootstrap").arg(bootstrap);
        command.arg("--mountpoint").arg(&path).arg("--apisock").arg(&socket);
        let mut process = Process::start("nydusd", command, &dir.join("nydusd.log"))?;
        process.wait_until(Duration::from_secs(20), || !mounts_below(&path).is_empty() && socket.exists())?;
        Ok(Self { process, path, socket })
    }
}
