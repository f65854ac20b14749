//! A real registry: `docker-registry` on a port of its own.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::needs::program;
use crate::process::{Process, free_port};

/// A registry without authentication, over plain HTTP, on 127.0.0.1.
#[derive(Debug)]
pub struct Registry {
    /// The process.
    pub process: Process,
    /// `host:port`.
    pub host: String,
}

impl Registry {
    /// Starts a registry that keeps its data below `dir`.
    pub fn start(dir: &Path) -> Result<Self> {
        Self::start_at(dir, free_port()?)
    }

    /// Starts a registry on a given port, as a restart does.
    pub fn start_at(dir: &Path, port: u16) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let host = format!("127.0.0.1:{port}");
        let config = dir.join("registry.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: warn, accesslog: {{disabled: true}}}}\n\
             storage: {{filesystem: {{rootdirectory: {}}}, delete: {{enabled: true}}}}\nhttp: {{addr: \"{host}\"}}\n",
            dir.join("data").display()
        );
        std::fs::write(&config, text)?;
        let mut command = Command::new(program("docker-registry").context("docker-registry is not installed")?);
        command.arg("serve").arg(&config);
        let mut process = Process::start("docker-registry", command, &dir.join("registry.log"))?;
        process.wait_until(Duration::from_secs(20), || std::net::TcpStream::connect(&host).is_ok())?;
        Ok(Self { process, host })
    }
}
