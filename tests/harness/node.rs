//! A node: its mirror, its snapshotter with nydusd below it, and its containerd.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::containerd::{Containerd, Options};
use crate::process::{Process, end_all_below, free_port, run, shoal};

/// How a node is set up.
#[derive(Debug, Clone)]
pub struct Setup {
    /// The registry (`host:port`, plain HTTP unless it is private).
    pub registry: String,
    /// Present if the registry has TLS and wants credentials.
    pub private: Option<Private>,
    /// nydusd's `read_deadline`, if not the default.
    pub read_deadline: Option<u64>,
    /// The pod's pause image.
    pub pause: String,
    /// URLs of other nodes' mirrors, asked before the registry.
    pub upstream_mirrors: Vec<String>,
    /// Present if the node is one of a swarm; its containerd asks the mirror first then.
    pub member: Option<Member>,
    /// The snapshotter that CRI uses.
    pub cri_snapshotter: &'static str,
    /// containerd's binary, if not the one on `PATH`.
    pub containerd: Option<PathBuf>,
    /// Whether nydusd prefetches in the background.
    pub prefetch: bool,
    /// Whether the snapshotter serves kubelet's image service, on its own socket.
    pub image_service: bool,
    /// Bytes that the mirror keeps, if not the default.
    pub mirror_quota: Option<u64>,
    /// Variables for the mirror and the snapshotter, which hands them on to nydusd.
    pub environment: Vec<(String, String)>,
}

impl Setup {
    /// The usual node: containerd with our snapshotter, for a plain registry, with a given pause image.
    pub fn new(registry: impl Into<String>, pause: impl Into<String>) -> Self {
        Self {
            registry: registry.into(),
            private: None,
            read_deadline: None,
            pause: pause.into(),
            upstream_mirrors: Vec::new(),
            member: None,
            cri_snapshotter: "nydus",
            containerd: None,
            prefetch: false,
            image_service: false,
            mirror_quota: None,
            environment: Vec::new(),
        }
    }

    /// Starts a containerd alone, for plain images on its own overlayfs.
    pub fn plain_containerd(&self, dir: &Path) -> Result<Containerd> {
        let options =
            Options { pause: self.pause.clone(), binary: self.containerd.clone(), ..Options::plain(&self.registry) };
        Containerd::start(dir, &options).context("starting a containerd without snapshotter")
    }
}

/// A node's place in a swarm.
#[derive(Debug, Clone)]
pub struct Member {
    /// The file with the cluster's key.
    pub key: PathBuf,
    /// Where it listens for members.
    pub listen: String,
    /// Where it listens for gossip.
    pub gossip: String,
    /// Where other members listen.
    pub seeds: Vec<String>,
}

/// What a node is told about a private registry.
#[derive(Debug, Clone)]
pub struct Private {
    /// The authority that containerd believes.
    pub ca: PathBuf,
    /// The authority that mirror and nydusd believe.
    pub lazy_ca: PathBuf,
    /// The folder of docker's configuration, which only the snapshotter is shown.
    pub docker_config: PathBuf,
}

/// A running node; everything ends when it is dropped.
#[derive(Debug)]
pub struct Node {
    /// containerd; first, so that containers end before what they read from.
    pub containerd: Containerd,
    /// The snapshotter.
    pub snapshotter: Process,
    /// The mirror.
    pub mirror: Process,
    /// The node's folder.
    pub dir: PathBuf,
    /// URL of the node's mirror.
    pub mirror_url: String,
    health: u16,
    metrics: u16,
    mirror_config: PathBuf,
    snapshotter_config: PathBuf,
    docker_config: Option<PathBuf>,
    environment: Vec<(String, String)>,
}

impl Node {
    /// Starts a node with its data below `dir`.
    pub fn start(dir: &Path, setup: &Setup) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let (port, health, metrics) = (free_port()?, free_port()?, free_port()?);
        let mirror_url = format!("http://127.0.0.1:{port}");
        let mirror_config = dir.join("p2p.toml");
        let mut text = format!(
            "listen = \"127.0.0.1:{port}\"\nhealth_listen = \"127.0.0.1:{health}\"\n\
             metrics_listen = \"127.0.0.1:{metrics}\"\ndata_dir = \"{}/p2p\"\n",
            dir.display()
        );
        if let Some(bytes) = setup.mirror_quota {
            text.push_str(&format!("quota = \"{bytes}\"\n"));
        }
        for url in &setup.upstream_mirrors {
            text.push_str(&format!("[[mirror]]\nurl = \"{url}\"\ntrusted = true\n"));
        }
        text.push_str(&match &setup.private {
            None => format!("[[registry]]\nname = \"{0}\"\nurl = \"http://{0}\"\n", setup.registry),
            Some(private) => {
                format!("[[registry]]\nname = \"{}\"\nca_files = [{:?}]\n", setup.registry, private.lazy_ca)
            }
        });
        if let Some(Member { key, listen, gossip, seeds }) = &setup.member {
            text.push_str(&format!(
                "[swarm]\ncluster_key_file = {key:?}\nlisten = {listen:?}\ngossip_listen = {gossip:?}\nseeds = {seeds:?}\n"
            ));
        }
        std::fs::write(&mirror_config, text)?;
        let mirror = start_mirror(dir, &mirror_config, health, &setup.environment)?;

        let template = dir.join("nydusd-config.json");
        std::fs::write(&template, nydusd_config(dir, &mirror_url, health, setup).to_string())?;
        let snapshotter_config = dir.join("snapshotter.toml");
        let containerd = dir.join("ctd/c.sock");
        let image_service = setup
            .image_service
            .then(|| format!("\n[remote.auth]\nenable_cri_keychain = true\nimage_service_address = {containerd:?}\n"));
        std::fs::write(
            &snapshotter_config,
            format!(
                "version = 1\nroot = \"{0}/snap\"\naddress = \"{0}/snap.sock\"\ndaemon_mode = \"shared\"\n\n[daemon]\n\
                 nydusd_config = \"{0}/nydusd-config.json\"\nnydusd_path = \"{1}\"\n\n[log]\nlevel = \"debug\"\nlog_to_stdout = true\n{2}",
                dir.display(),
                shoal("nydusd")?.display(),
                image_service.unwrap_or_default()
            ),
        )?;
        let docker_config = setup.private.as_ref().map(|private| private.docker_config.clone());
        let snapshotter = start_snapshotter(dir, &snapshotter_config, docker_config.as_deref(), &setup.environment)?;
        let containerd = Containerd::start(
            &dir.join("ctd"),
            &Options {
                cri_snapshotter: setup.cri_snapshotter,
                snapshotter: Some(dir.join("snap.sock")),
                pause: setup.pause.clone(),
                plain_http: if setup.private.is_some() { Vec::new() } else { vec![setup.registry.clone()] },
                private: setup.private.iter().map(|private| (setup.registry.clone(), private.ca.clone())).collect(),
                mirror: setup.member.is_some().then(|| mirror_url.clone()),
                binary: setup.containerd.clone(),
                network: None,
            },
        )?;
        Ok(Self {
            containerd,
            snapshotter,
            mirror,
            dir: dir.to_owned(),
            mirror_url,
            health,
            metrics,
            mirror_config,
            snapshotter_config,
            docker_config,
            environment: setup.environment.clone(),
        })
    }

    /// Starts the mirror again after it was stopped or killed.
    pub fn restart_mirror(&mut self) -> Result<()> {
        self.mirror = start_mirror(&self.dir, &self.mirror_config, self.health, &self.environment)?;
        Ok(())
    }

    /// Starts the snapshotter again after it was stopped or killed.
    pub fn restart_snapshotter(&mut self) -> Result<()> {
        self.snapshotter =
            start_snapshotter(&self.dir, &self.snapshotter_config, self.docker_config.as_deref(), &self.environment)?;
        Ok(())
    }

    /// Returns the log files of all nydusd daemons, joined.
    pub fn nydusd_log(&self) -> String {
        let Ok(dirs) = std::fs::read_dir(self.dir.join("snap/logs")) else { return String::new() };
        dirs.flatten().filter_map(|dir| std::fs::read_to_string(dir.path().join("nydusd.log")).ok()).collect()
    }

    /// Asks every nydusd of the node for `path` of its API and returns the answers.
    pub fn nydusd(&self, path: &str) -> Result<Vec<Value>> {
        let mut answers = Vec::new();
        for socket in self.nydusd_sockets() {
            let text =
                run(Command::new("curl").args(["-sS", "--unix-socket"]).arg(&socket).arg(format!("http://d{path}")))?;
            answers.push(serde_json::from_str(&text).with_context(|| format!("{path} answered {text:?}"))?);
        }
        Ok(answers)
    }

    /// Returns the API sockets of the node's nydusd daemons.
    pub fn nydusd_sockets(&self) -> Vec<PathBuf> {
        let Ok(dirs) = std::fs::read_dir(self.dir.join("snap/socket")) else { return Vec::new() };
        dirs.flatten().map(|dir| dir.path().join("api.sock")).filter(|socket| socket.exists()).collect()
    }

    /// Returns the process ids of the node's nydusd daemons.
    pub fn nydusd_pids(&self) -> Vec<Pid> {
        let mine = format!("{}/", self.dir.display());
        let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let daemons = processes.filter(|entry| {
            let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line);
            let mut words = line.split('\0');
            words.next().is_some_and(|program| program.ends_with("/nydusd")) && words.any(|word| word.contains(&mine))
        });
        daemons.filter_map(|entry| Some(Pid::from_raw(entry.file_name().to_str()?.parse().ok()?))).collect()
    }

    /// Returns the sum of a metric of the mirror, over all its labels that contain `label`.
    pub fn mirror_metric(&self, name: &str, label: &str) -> Result<u64> {
        let text = run(Command::new("curl").args(["-sS", &format!("http://127.0.0.1:{}/metrics", self.metrics)]))?;
        let values = text.lines().filter(|line| {
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])) && line.contains(label)
        });
        Ok(values.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum::<f64>() as u64)
    }
}

impl Drop for Node {
    /// A stopped snapshotter leaves nydusd alive, as it must; a test has to end it.
    fn drop(&mut self) {
        if let Err(error) = self.containerd.end_containers() {
            println!("could not end the containers of {}: {error:#}", self.dir.display());
        }
        for process in [&mut self.containerd.process, &mut self.snapshotter] {
            if let Err(error) = process.stop(Duration::from_secs(10)) {
                println!("could not stop a process of {}: {error}", self.dir.display());
            }
        }
        end_all_below(&self.dir);
    }
}

/// Starts a mirror that answers on the port `health` once it is ready.
pub(crate) fn start_mirror(
    dir: &Path,
    config: &Path,
    health: u16,
    environment: &[(String, String)],
) -> Result<Process> {
    let mut command = Command::new(shoal("nydus-p2p")?);
    command.arg("--config").arg(config).envs(environment.iter().cloned());
    let mut mirror = Process::start("nydus-p2p", command, &dir.join("p2p.log"))?;
    mirror.wait_until(Duration::from_secs(10), || std::net::TcpStream::connect(("127.0.0.1", health)).is_ok())?;
    Ok(mirror)
}

fn start_snapshotter(
    dir: &Path,
    config: &Path,
    docker_config: Option<&Path>,
    environment: &[(String, String)],
) -> Result<Process> {
    let mut command = Command::new(shoal("containerd-nydus-grpc")?);
    command.arg("--config").arg(config).envs(environment.iter().cloned());
    if let Some(docker_config) = docker_config {
        command.env("DOCKER_CONFIG", docker_config);
    }
    let mut snapshotter = Process::start("containerd-nydus-grpc", command, &dir.join("snapshotter.log"))?;
    let socket = dir.join("snap.sock");
    snapshotter.wait_until(Duration::from_secs(20), || std::os::unix::net::UnixStream::connect(&socket).is_ok())?;
    Ok(snapshotter)
}

/// The template that users write, as the guide shows it.
fn nydusd_config(dir: &Path, mirror: &str, health: u16, setup: &Setup) -> Value {
    let mut config = json!({
        "device": {
            "backend": {"type": "registry", "config": {
                "mirrors": [{
                    "host": mirror, "auth_through": false,
                    "headers": {"X-Dragonfly-Registry": "https://index.docker.io"},
                    "ping_url": format!("http://127.0.0.1:{health}/healthy"),
                }],
                "scheme": "http", "skip_verify": true, "timeout": 10, "connect_timeout": 10, "retry_limit": 2,
            }},
            "cache": {"type": "blobcache", "config": {"work_dir": dir.join("cache")}},
        },
        "mode": "direct", "digest_validate": false, "iostats_files": false, "enable_xattr": true,
        "fs_prefetch": {
            "enable": setup.prefetch, "threads_count": 10, "merging_size": 131_072, "bandwidth_rate": 0,
            "prefetch_all": setup.prefetch,
        },
    });
    if let Some(private) = &setup.private {
        let backend = &mut config["device"]["backend"]["config"];
        backend["scheme"] = json!("https");
        backend["skip_verify"] = json!(false);
        backend["ca_cert_files"] = json!([private.lazy_ca]);
    }
    if let Some(seconds) = setup.read_deadline {
        config["read_deadline"] = json!(seconds);
    }
    config
}
