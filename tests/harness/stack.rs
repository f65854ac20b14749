//! The least that runs an image: containerd with our snapshotter, or with its own overlayfs for comparison.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use containerd_snapshots::api::snapshots::v1::snapshots_client::SnapshotsClient;
use containerd_snapshots::api::snapshots::v1::{Info, ListSnapshotsRequest};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tonic::transport::{Endpoint, Uri};

use crate::containerd::{Containerd, Options};
use crate::cri::Cri;
use crate::node::start_mirror;
use crate::process::{Process, end_all_below, free_port, run, shoal};

/// The namespace that CRI keeps its images in.
const NAMESPACE: &str = "k8s.io";

/// A running stack; everything ends when it is dropped.
#[derive(Debug)]
pub struct Stack {
    /// containerd.
    pub containerd: Containerd,
    /// Our snapshotter, unless this is the control.
    pub snapshotter: Option<Process>,
    /// The mirror that containerd and nydusd ask first, if there is one.
    pub mirror: Option<Process>,
    /// The port on which it says that it is well.
    health: u16,
    /// The folder of both.
    pub dir: PathBuf,
    name: &'static str,
}

impl Stack {
    /// Starts containerd below `dir`, with our snapshotter unless `name` is `overlayfs`; images come from `registry`, over plain
    /// HTTP. `binary` is a containerd that is not the system's.
    pub fn start(dir: &Path, registry: &str, name: &'static str, binary: Option<PathBuf>) -> Result<Self> {
        let backend = json!({"type": "registry", "config": {"scheme": "http"}});
        Self::build(dir, registry, name, binary, backend, None)
    }

    /// Starts containerd with our snapshotter, whose daemons find blobs in containerd's own store: only images that were
    /// imported can run.
    pub fn of_imports(dir: &Path, binary: Option<PathBuf>) -> Result<Self> {
        let store = dir.join("ctd/root/io.containerd.content.v1.content/blobs/sha256");
        let backend = json!({"type": "localfs", "config": {"dir": store}});
        Self::build(dir, "registry.invalid", "nydus", binary, backend, None)
    }

    /// Starts the system's containerd with our snapshotter and a mirror before the registry.
    pub fn mirrored(dir: &Path, registry: &str) -> Result<Self> {
        let backend = json!({"type": "registry", "config": {"scheme": "http"}});
        Self::build(dir, registry, "nydus", None, backend, Some((free_port()?, free_port()?)))
    }

    /// `mirror` are the ports of one: for requests and for its health.
    fn build(
        dir: &Path,
        registry: &str,
        name: &'static str,
        binary: Option<PathBuf>,
        mut backend: Value,
        mirror: Option<(u16, u16)>,
    ) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let ours = name != "overlayfs";
        let mut options = Options {
            cri_snapshotter: name,
            snapshotter: ours.then(|| dir.join("snap.sock")),
            pause: String::new(),
            plain_http: vec![registry.to_owned()],
            private: Vec::new(),
            mirror: None,
            binary,
            network: None,
        };
        let (mut process, mut health) = (None, 0);
        if let Some((port, healthy)) = mirror {
            let (host, ping) = (format!("http://127.0.0.1:{port}"), format!("http://127.0.0.1:{healthy}/healthy"));
            let config = format!(
                "listen = \"127.0.0.1:{port}\"\nhealth_listen = \"127.0.0.1:{healthy}\"\nmetrics_listen = \"127.0.0.1:0\"\n\
                 data_dir = \"{}/p2p\"\n[[registry]]\nname = \"{registry}\"\nurl = \"http://{registry}\"\n",
                dir.display()
            );
            std::fs::write(mirror_config(dir), config)?;
            (process, health) = (Some(start_mirror(dir, &mirror_config(dir), healthy, &[])?), healthy);
            backend["config"]["mirrors"] = json!([{"host": host, "ping_url": ping}]);
            options.mirror = Some(host);
        }
        let template = json!({
            "device": {"backend": backend, "cache": {"type": "blobcache", "config": {}}},
            "mode": "direct", "digest_validate": false, "enable_xattr": true,
        });
        std::fs::write(dir.join("template.json"), template.to_string())?;
        let snapshotter = ours.then(|| start_snapshotter(dir)).transpose()?;
        let containerd = Containerd::start(&dir.join("ctd"), &options)?;
        Ok(Self { containerd, snapshotter, mirror: process, health, dir: dir.to_owned(), name })
    }

    /// Starts the mirror again after it was killed.
    pub fn restart_mirror(&mut self) -> Result<()> {
        self.mirror = Some(start_mirror(&self.dir, &mirror_config(&self.dir), self.health, &[])?);
        Ok(())
    }

    /// Starts the snapshotter again after it was killed.
    pub fn restart_snapshotter(&mut self) -> Result<()> {
        self.snapshotter = Some(start_snapshotter(&self.dir)?);
        Ok(())
    }

    /// Connects to CRI, which passes on what a lazy pull needs.
    pub async fn cri(&self) -> Result<Cri> {
        Cri::connect(&self.containerd.socket, &self.dir.join("pods")).await
    }

    /// Returns a `ctr` command in CRI's namespace, ended after a minute.
    pub fn ctr(&self) -> Command {
        let ctr = self.containerd.ctr();
        let mut command = Command::new("timeout");
        command.args(["-k", "1", "60"]).arg(ctr.get_program()).args(ctr.get_args()).args(["-n", NAMESPACE]);
        command
    }

    /// Returns a command that runs `words` in a container of a pulled image, and removes it.
    pub fn run(&self, image: &str, container: &str, words: &[&str]) -> Command {
        let mut command = self.ctr();
        command.args(["run", "--rm", "--snapshotter", self.name, image, container]).args(words);
        command
    }

    /// Removes all containers, images and leases, and waits for one round of garbage collection.
    pub fn remove_everything(&self) -> Result<()> {
        self.containerd.end_containers()?;
        let list = |what: &str| run(self.ctr().args([what, "ls", "-q"]));
        for image in list("images")?.split_whitespace() {
            run(self.ctr().args(["images", "rm", image]))?;
        }
        for lease in list("leases")?.split_whitespace() {
            run(self.ctr().args(["leases", "rm", lease]))?;
        }
        // Only a removal that waits for the collector makes sure that there was a round after all the others.
        let last = run(self.ctr().args(["leases", "create"]))?;
        run(self.ctr().args(["leases", "rm", "--sync", last.trim()])).map(drop)
    }

    /// Returns every record of our snapshotter, whatever containerd knows of it.
    pub async fn records(&self) -> Result<Vec<Info>> {
        let socket = self.dir.join("snap.sock");
        let channel = Endpoint::from_static("http://snapshotter.invalid")
            .connect_with_connector(tower_04::service_fn(move |_: Uri| tokio::net::UnixStream::connect(socket.clone())))
            .await
            .context("connecting to the snapshotter")?;
        let mut stream = SnapshotsClient::new(channel).list(ListSnapshotsRequest::default()).await?.into_inner();
        let mut all = Vec::new();
        while let Some(part) = stream.message().await? {
            all.extend(part.info);
        }
        Ok(all)
    }

    /// Returns the processes of `program` whose command line names something of this stack.
    pub fn processes(&self, program: &str) -> Vec<Pid> {
        let mine = self.dir.display().to_string();
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line);
            let mut words = line.split('\0');
            let named = words.next().is_some_and(|first| first.rsplit('/').next() == Some(program));
            if named && words.any(|word| word.contains(&mine)) {
                found.extend(entry.file_name().to_str().and_then(|name| name.parse().ok()).map(Pid::from_raw));
            }
        }
        found
    }

    /// Returns what the snapshotter and all its daemons logged.
    pub fn log(&self) -> String {
        let own = self.snapshotter.as_ref().map(Process::log).unwrap_or_default();
        let daemon = std::fs::read_to_string(self.dir.join("snap/logs/shared/nydusd.log")).unwrap_or_default();
        format!("{own}\n{daemon}")
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        if let Err(error) = self.containerd.end_containers() {
            println!("could not end the containers of {}: {error:#}", self.dir.display());
        }
        for process in
            [Some(&mut self.containerd.process), self.snapshotter.as_mut(), self.mirror.as_mut()].into_iter().flatten()
        {
            if let Err(error) = process.stop(Duration::from_secs(10)) {
                println!("could not stop a process of {}: {error}", self.dir.display());
            }
        }
        end_all_below(&self.dir);
    }
}

fn mirror_config(dir: &Path) -> PathBuf {
    dir.join("p2p.toml")
}

fn start_snapshotter(dir: &Path) -> Result<Process> {
    let mut command = Command::new(shoal("containerd-nydus-grpc")?);
    command.arg("--root").arg(dir.join("snap")).arg("--address").arg(dir.join("snap.sock"));
    command.arg("--nydusd").arg(shoal("nydusd")?).arg("--nydusd-config").arg(dir.join("template.json"));
    command.args(["--log-to-stdout", "--log-level", "debug"]).env("DOCKER_CONFIG", dir.join("docker"));
    let mut snapshotter = Process::start("containerd-nydus-grpc", command, &dir.join("snapshotter.log"))?;
    let socket = dir.join("snap.sock");
    snapshotter.wait_until(Duration::from_secs(30), || std::os::unix::net::UnixStream::connect(&socket).is_ok())?;
    Ok(snapshotter)
}
