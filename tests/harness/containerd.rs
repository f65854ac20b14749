//! A containerd of one's own: root, state and socket in a given folder.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::needs::program;
use crate::process::{Process, run};

/// What a containerd is started with.
#[derive(Debug, Clone)]
pub struct Options {
    /// The snapshotter that CRI uses: `nydus` or `overlayfs`.
    pub cri_snapshotter: &'static str,
    /// Socket of the proxy snapshotter `nydus`, if there is one.
    pub snapshotter: Option<PathBuf>,
    /// Image of the pod's pause process.
    pub pause: String,
    /// Registries (`host:port`) to be spoken to over plain HTTP.
    pub plain_http: Vec<String>,
    /// Registries (`host:port`) with TLS, each with the file of the authority to believe.
    pub private: Vec<(String, PathBuf)>,
    /// URL of a mirror that is asked before the registries.
    pub mirror: Option<String>,
    /// The binary; `None` looks on `PATH`.
    pub binary: Option<PathBuf>,
    /// The network namespace in which it and its `ctr` run, if not this process's.
    pub network: Option<PathBuf>,
}

impl Options {
    /// The system's containerd as it comes, with its own overlayfs; images come from `registry`, over plain HTTP.
    pub fn plain(registry: impl Into<String>) -> Self {
        Self {
            cri_snapshotter: "overlayfs",
            snapshotter: None,
            pause: String::new(),
            plain_http: vec![registry.into()],
            private: Vec::new(),
            mirror: None,
            binary: None,
            network: None,
        }
    }
}

/// A running containerd; ended, with all its containers, when dropped.
#[derive(Debug)]
pub struct Containerd {
    /// The process.
    pub process: Process,
    /// Its socket.
    pub socket: PathBuf,
    /// Its folder.
    pub dir: PathBuf,
    binary: PathBuf,
    /// The folder of a containerd that is not the system's.
    own: Option<PathBuf>,
    network: Option<PathBuf>,
}

impl Containerd {
    /// Starts containerd in `dir`.
    pub fn start(dir: &Path, options: &Options) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let binary = match &options.binary {
            Some(binary) => binary.clone(),
            None => program("containerd").context("containerd is not installed")?,
        };
        let socket = dir.join("c.sock");
        let plain = options.plain_http.iter().map(|host| (host, "http", String::new()));
        let private = options.private.iter().map(|(host, ca)| (host, "https", format!("  ca = {ca:?}\n")));
        for (host, scheme, ca) in plain.chain(private) {
            let certs = dir.join("certs.d").join(host);
            std::fs::create_dir_all(&certs)?;
            // The mirror hands on whom to ask for tokens: that one's authority is looked for in the mirror's section.
            let mirror =
                options.mirror.as_ref().map(|url| format!("[host.\"{url}\"]\n  capabilities = [\"pull\"]\n{ca}"));
            let text = format!(
                "server = \"{scheme}://{host}\"\n{}[host.\"{scheme}://{host}\"]\n  \
                 capabilities = [\"pull\", \"resolve\", \"push\"]\n{ca}",
                mirror.unwrap_or_default()
            );
            std::fs::write(certs.join("hosts.toml"), text)?;
        }
        std::fs::write(dir.join("config.toml"), toml(dir, &socket, options))?;
        let own = options.binary.as_ref().and_then(|binary| binary.parent()).map(Path::to_owned);
        let network = options.network.clone();
        let process = launch(dir, &binary, &socket, own.as_deref(), network.as_deref())?;
        Ok(Self { process, socket, dir: dir.to_owned(), binary, own, network })
    }

    /// Starts it again after it was stopped or killed; its containers have gone on meanwhile.
    pub fn restart(&mut self) -> Result<()> {
        self.process = launch(&self.dir, &self.binary, &self.socket, self.own.as_deref(), self.network.as_deref())?;
        Ok(())
    }

    /// Returns a `ctr` command for this containerd.
    pub fn ctr(&self) -> Command {
        let mut command = within(self.network.as_deref(), &self.binary.with_file_name("ctr"));
        command.arg("-a").arg(&self.socket);
        command
    }

    /// Returns the version that containerd tells.
    pub fn version(&self) -> String {
        let line = run(Command::new(&self.binary).arg("--version")).unwrap_or_default();
        line.split_whitespace().nth(2).unwrap_or("unknown").to_owned()
    }

    /// Ends and removes all containers; one that cannot be ended does not keep the others.
    pub fn end_containers(&self) -> Result<()> {
        // What ends by itself in the moment in which it is to be ended is told as an error; at the next look it is gone.
        for _ in 0..3 {
            if self.end_listed().is_ok() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(300));
        }
        self.end_listed()
    }

    fn end_listed(&self) -> Result<()> {
        let mut outcome = Ok(());
        for namespace in run(self.ctr().args(["namespaces", "ls", "-q"]))?.split_whitespace() {
            for (kind, end) in [("tasks", &["rm", "-f"][..]), ("containers", &["rm"])] {
                for name in run(self.ctr().args(["-n", namespace, kind, "ls", "-q"]))?.split_whitespace() {
                    // A client waits for ever for a process whose end was told while it did not listen yet.
                    let mut command = Command::new("timeout");
                    command.arg("20").arg(self.binary.with_file_name("ctr")).arg("-a").arg(&self.socket);
                    let ended = run(command.args(["-n", namespace, kind]).args(end).arg(name));
                    outcome = outcome.and(ended.map(drop));
                }
            }
        }
        outcome
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if !self.process.is_running() {
            return;
        }
        if let Err(error) = self.end_containers() {
            println!("could not end the containers of {}: {error:#}", self.dir.display());
        }
    }
}

/// Returns a command in a network namespace, or in this process's.
fn within(network: Option<&Path>, program: &Path) -> Command {
    let Some(network) = network else { return Command::new(program) };
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", network.display())).arg(program);
    command
}

fn launch(dir: &Path, binary: &Path, socket: &Path, own: Option<&Path>, network: Option<&Path>) -> Result<Process> {
    let mut command = within(network, binary);
    command.arg("-c").arg(dir.join("config.toml"));
    // The shim and runc are looked for beside containerd first, so that versions match.
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/sbin:/usr/bin:/sbin:/bin");
    if let Some(own) = own {
        let mut first = own.as_os_str().to_owned();
        first.push(":");
        first.push(&path);
        path = first;
    }
    command.env("PATH", path);
    // What it makes of a damaged layer shall not depend on which gunzip the machine has.
    command.env("CONTAINERD_DISABLE_PIGZ", "1");
    let mut process = Process::start("containerd", command, &dir.join("containerd.log"))?;
    let ctr = binary.with_file_name("ctr");
    process.wait_until(Duration::from_secs(30), || {
        socket.exists() && run(Command::new(&ctr).arg("-a").arg(socket).arg("version")).is_ok()
    })?;
    Ok(process)
}

fn toml(dir: &Path, socket: &Path, options: &Options) -> String {
    let (dir, socket) = (dir.display(), socket.display());
    let (cri, pause) = (options.cri_snapshotter, &options.pause);
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    // Version 2 is read by containerd 1.6 to 2.x. `opt` is moved so that nothing outside `dir` is touched.
    let mut text = format!(
        r#"version = 2
root = "{dir}/root"
state = "{dir}/state"
[grpc]
  address = "{socket}"
[ttrpc]
  address = "{socket}.ttrpc"
[plugins."io.containerd.internal.v1.opt"]
  path = "{dir}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  disable_apparmor = true
  restrict_oom_score_adj = true
  disable_tcp_service = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "{cri}"
    disable_snapshot_annotations = false
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "{dir}/certs.d"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{dir}/cni.d"
[plugins."io.containerd.transfer.v1.local"]
  config_path = "{dir}/certs.d"
  [[plugins."io.containerd.transfer.v1.local".unpack_config]]
    platform = "linux/{architecture}"
    snapshotter = "overlayfs"
"#
    );
    if let Some(nydus) = &options.snapshotter {
        text.push_str(&format!(
            r#"  [[plugins."io.containerd.transfer.v1.local".unpack_config]]
    platform = "linux/{architecture}"
    snapshotter = "nydus"
[proxy_plugins.nydus]
  type = "snapshot"
  address = "{}"
  [proxy_plugins.nydus.exports]
    enable_remote_snapshot_annotations = "true"
"#,
            nydus.display()
        ));
    }
    text
}
