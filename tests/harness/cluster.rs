//! Nodes of one swarm in network namespaces, and what they read: a registry that everybody may read, and the same one as
//! only callers with a token may.
//!
//! ```text
//!     docker-registry ── gate (20 ms)  ── bridge ── node 0: nydus-p2p, nydusd
//!                    └── front (TLS, tokens) ─┘  └─ node 1: …
//! ```
//!
//! What passes gate and front is all that leaves the registry, requests for tokens included.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use nydus_rafs::Algorithm;
use serde_json::json;

use crate::authority::Authority;
use crate::containerd::{Containerd, Options};
use crate::front::{Front, PASSWORD, USER};
use crate::fuse::Mounted;
use crate::gate::{Gate, Pace, Passed};
use crate::image;
use crate::lab::Lab;
use crate::process::{Process, run, shoal};
use crate::registry::Registry;
use crate::scratch::Scratch;
use crate::tree::{self, Table};

/// Where what is read lies.
pub const REPOSITORY: &str = "team/model";

/// Through which door the registry is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Door {
    /// Plain HTTP, for everybody.
    Open,
    /// TLS, for those who show a token.
    Private,
}

/// How a cluster is.
#[derive(Debug, Clone, Copy)]
pub struct Manner<'k> {
    /// Keys of `[swarm]` in the nodes' configurations; none where every node is by itself.
    pub keys: Option<&'k str>,
    /// The link before the registry.
    pub pace: Pace,
}

/// A swarm in a lab, and its registry.
#[derive(Debug)]
pub struct Cluster {
    nodes: Vec<Option<Process>>,
    front: Front,
    gate: Gate,
    authority: Authority,
    /// The registry behind both doors.
    pub registry: Registry,
    /// The network.
    pub lab: Lab,
    /// Everybody's folders.
    pub scratch: Scratch,
    /// As in [`Manner`].
    keys: Option<String>,
}

impl Cluster {
    /// Starts so many nodes that know each other; `keys` are further ones of `[swarm]`.
    pub async fn start(tag: u8, nodes: usize, keys: &str) -> Result<Self> {
        let pace = Pace { bits_per_second: 0, round_trip: Duration::from_millis(20) };
        Self::start_in(tag, nodes, Manner { keys: Some(keys), pace }).await
    }

    /// Starts so many nodes in a manner of one's own.
    pub async fn start_in(tag: u8, nodes: usize, manner: Manner<'_>) -> Result<Self> {
        let Manner { keys, pace } = manner;
        let scratch = Scratch::new("swarm")?;
        let lab = Lab::new(tag, nodes)?;
        let registry = Registry::start(&scratch.dir("registry")?)?;
        let gate = Gate::open_at(&format!("{}:0", lab.gateway()), &registry.host, pace)?;
        let authority = Authority::make_for(&scratch.dir("authority")?, lab.gateway())?;
        let front = Front::start_at(lab.gateway(), &registry.host, &authority, pace).await?;
        let key = scratch.path().join("cluster.key");
        std::fs::write(&key, "5f".repeat(32))?;
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600))?;
        let nodes = std::iter::repeat_with(|| None).take(nodes).collect();
        let mut cluster = Self { nodes, front, gate, authority, registry, lab, scratch, keys: keys.map(str::to_owned) };
        cluster.start_all()?;
        Ok(cluster)
    }

    /// Returns the numbers of all nodes.
    pub fn everybody(&self) -> Vec<usize> {
        (0..self.nodes.len()).collect()
    }

    fn start_all(&mut self) -> Result<()> {
        let all = self.everybody();
        all.iter().try_for_each(|node| self.start_node(*node))?;
        if self.keys.is_some() { self.settle() } else { Ok(()) }
    }

    /// Starts all nodes anew, with nothing in their caches.
    pub fn empty(&mut self) -> Result<()> {
        for node in self.everybody() {
            if let Some(mut process) = self.nodes[node].take() {
                process.crash()?;
            }
            std::fs::remove_dir_all(self.dir(node).join("data"))?;
        }
        self.start_all()
    }

    /// Returns the folder of a node.
    pub fn dir(&self, node: usize) -> PathBuf {
        self.scratch.path().join(format!("node{node}"))
    }

    /// Starts a node, again if it ran before.
    pub fn start_node(&mut self, node: usize) -> Result<()> {
        let (dir, address, open, private) = (self.dir(node), self.lab.address(node), &self.gate.host, &self.front.host);
        std::fs::create_dir_all(&dir)?;
        let config = dir.join("p2p.toml");
        let text = format!(
            "listen = \"{address}:4001\"\nhealth_listen = \"{address}:4003\"\nmetrics_listen = \"{address}:4002\"\n\
             data_dir = \"{}/data\"\ndefault_registry = \"{open}\"\nlog_level = \"info,nydus_backend=debug\"\n\
             [[registry]]\nname = \"{open}\"\nurl = \"http://{open}\"\n\
             [[registry]]\nname = \"{private}\"\nca_files = [{:?}]\n",
            dir.display(),
            self.authority.ca(),
        );
        let swarm = self.keys.as_ref().map(|keys| {
            let (scratch, seed) = (self.scratch.path().display(), self.lab.address(usize::from(node == 0)));
            format!("[swarm]\ncluster_key_file = \"{scratch}/cluster.key\"\nseeds = [\"{seed}\"]\n{keys}\n")
        });
        std::fs::write(&config, text + &swarm.unwrap_or_default())?;
        let mut command = self.lab.command(node, shoal("nydus-p2p")?);
        command.arg("--config").arg(&config);
        let mut process = Process::start("nydus-p2p", command, &dir.join("log"))?;
        process.wait_until(Duration::from_secs(20), || TcpStream::connect((address, 4001)).is_ok())?;
        self.nodes[node] = Some(process);
        Ok(())
    }

    /// Takes a node's process out, to be killed.
    pub fn take(&mut self, node: usize) -> Result<Process> {
        self.nodes[node].take().context("a node that runs")
    }

    /// Waits until all nodes know each other, and have for a while: after a cut, what half of them believed comes around once more.
    pub fn settle(&self) -> Result<()> {
        let (begin, all) = (Instant::now(), self.nodes.len() as u64);
        let mut since = begin;
        while since.elapsed() < Duration::from_secs(2) {
            for node in self.everybody() {
                let seen = self.metric(node, "nydus_p2p_swarm_members")?;
                if seen != all {
                    ensure!(begin.elapsed() < Duration::from_secs(90), "node {node} counts {seen} members, not {all}");
                    since = Instant::now();
                }
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Returns a metric without labels of a node.
    pub fn metric(&self, node: usize, name: &str) -> Result<u64> {
        let text = String::from_utf8(self.ask(node, 4002, "/metrics", "")?.1)?;
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        Ok(value.context("a metric of that name")?.parse()?)
    }

    /// Returns what the nodes decided, for people to read.
    pub fn decisions(&self) -> String {
        let told = |node: usize| {
            let text = self.ask(node, 4002, "/metrics", "").unwrap_or_default().1;
            let text = String::from_utf8_lossy(&text).into_owned();
            let lines = text
                .lines()
                .filter(|line| line.starts_with("nydus_p2p_swarm_decisions") || line.starts_with("nydus_p2p_source"));
            format!("node {node}: {}", lines.collect::<Vec<_>>().join(", ").replace("nydus_p2p_", ""))
        };
        self.everybody().into_iter().map(told).collect::<Vec<_>>().join("\n")
    }

    /// Returns `host:port` of the registry's door.
    pub fn host(&self, door: Door) -> &str {
        match door {
            Door::Open => &self.gate.host,
            Door::Private => &self.front.host,
        }
    }

    /// Returns what has left the registry so far.
    pub fn passed(&self) -> Passed {
        let (open, private) = (self.gate.passed(), self.front.passed());
        Passed { requests: open.requests + private.requests, bytes: open.bytes + private.bytes }
    }

    /// Pushes `size` bytes of noise; returns the path of the blob and its bytes.
    pub async fn push(&self, seed: u64, size: usize) -> Result<(String, Vec<u8>)> {
        let bytes = noise(seed, size);
        let digest = format!("sha256:{}", Algorithm::Sha256.digest(&bytes));
        image::client(&self.registry.host)?.push_blob(REPOSITORY, &digest, bytes.clone().into()).await?;
        Ok((format!("/v2/{REPOSITORY}/blobs/{digest}"), bytes))
    }

    /// Returns the headers of somebody who may read through `door`.
    pub fn caller(&self, door: Door) -> String {
        match door {
            Door::Open => String::new(),
            Door::Private => format!(
                "X-Dragonfly-Registry: https://{}\r\nAuthorization: Bearer {}\r\n",
                self.front.host,
                self.front.token(REPOSITORY)
            ),
        }
    }

    /// Returns the headers of somebody who may not read through the private door.
    pub fn stranger(&self) -> String {
        format!("X-Dragonfly-Registry: https://{}\r\nAuthorization: Bearer token-of-nobody\r\n", self.front.host)
    }

    /// Asks a node; returns the status and the body.
    pub fn ask(&self, node: usize, port: u16, path: &str, headers: &str) -> Result<(u16, Vec<u8>)> {
        let mut stream = TcpStream::connect((self.lab.address(node), port))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\n{headers}Connection: close\r\n\r\n")?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        let head = answer.windows(4).position(|window| window == b"\r\n\r\n").context("an answer has a head")?;
        let status = std::str::from_utf8(answer.get(9..12).context("a status line")?)?.parse()?;
        Ok((status, answer.split_off(head + 4)))
    }

    /// Reads something through a node.
    pub fn read(&self, node: usize, path: &str, headers: &str) -> Result<Vec<u8>> {
        let (status, body) = self.ask(node, 4001, path, headers)?;
        ensure!(status == 200, "node {node} answers {status} to {path}: {}", String::from_utf8_lossy(&body));
        Ok(body)
    }

    /// Has `work` done for each of these nodes at once, and something `meanwhile`; all of it must succeed.
    pub fn at_once(
        nodes: &[usize],
        work: impl Fn(usize) -> Result<()> + Sync,
        meanwhile: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        std::thread::scope(|scope| {
            let work = &work;
            let working: Vec<_> = nodes.iter().map(|node| scope.spawn(move || work(*node))).collect();
            let done = meanwhile();
            working.into_iter().try_for_each(|worker| worker.join().expect("a worker does not panic"))?;
            done
        })
    }

    /// Reads a blob through all of these nodes at once; each must get all of it, and right.
    pub fn read_at_once(&self, nodes: &[usize], door: Door, path: &str, bytes: &[u8]) -> Result<()> {
        self.read_while(nodes, door, path, bytes, || Ok(()))
    }

    /// The same, with something happening meanwhile.
    pub fn read_while(
        &self,
        nodes: &[usize],
        door: Door,
        path: &str,
        bytes: &[u8],
        meanwhile: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let read = |node: usize| {
            let got = self.read(node, path, &self.caller(door))?;
            ensure!(got == bytes, "node {node} gave {} bytes, and not the right ones", got.len());
            Ok(())
        };
        Self::at_once(nodes, read, meanwhile)
    }

    /// Mounts a converted image on a node, its blobs through the node's mirror; `round` tells mounts of one node apart.
    pub fn mount(&self, node: usize, door: Door, bootstrap: &Path, round: &str) -> Result<Mounted> {
        let dir = self.dir(node).join(round);
        std::fs::create_dir_all(&dir)?;
        let mirror = self.lab.address(node);
        let mut backend = json!({
            "repo": REPOSITORY, "timeout": 60, "connect_timeout": 10, "retry_limit": 2,
            "mirrors": [{"host": format!("http://{mirror}:4001"), "ping_url": format!("http://{mirror}:4003/healthy")}],
        });
        match door {
            Door::Open => {
                backend["scheme"] = json!("http");
                backend["host"] = json!(self.gate.host);
            }
            Door::Private => {
                backend["scheme"] = json!("https");
                backend["host"] = json!(self.front.host);
                backend["ca_cert_files"] = json!([self.authority.ca()]);
                backend["auth"] = json!(STANDARD.encode(format!("{USER}:{PASSWORD}")));
            }
        }
        let config = json!({
            "device": {
                "backend": {"type": "registry", "config": backend},
                "cache": {"type": "blobcache", "config": {"work_dir": dir.join("cache")}},
            },
            "mode": "direct", "digest_validate": false, "enable_xattr": true,
        });
        Mounted::launch(self.lab.command(node, shoal("nydusd")?), bootstrap, &config, &dir)
    }

    /// Starts a containerd on a node that asks the node's mirror first; `round` tells those of one node apart.
    pub fn containerd(&self, node: usize, door: Door, round: &str) -> Result<Containerd> {
        let mut options = Options::plain(self.host(door));
        if door == Door::Private {
            options.private = options.plain_http.drain(..).map(|host| (host, self.authority.ca().to_owned())).collect();
        }
        options.mirror = Some(format!("http://{}:4001", self.lab.address(node)));
        options.network = Some(self.lab.network(node));
        Containerd::start(&self.dir(node).join(round), &options)
    }

    /// Has a node's containerd pull and unpack an image; returns what is in it.
    pub fn pull(&self, containerd: &Containerd, door: Door, tag: &str) -> Result<Table> {
        let image = format!("{}/{REPOSITORY}:{tag}", self.host(door));
        let mut pull = containerd.ctr();
        pull.args(["images", "pull", "--snapshotter", "overlayfs", "--hosts-dir"]).arg(containerd.dir.join("certs.d"));
        if door == Door::Private {
            pull.args(["--user", &format!("{USER}:{PASSWORD}")]);
        }
        run(pull.arg(&image))?;
        let root = containerd.dir.join("unpacked");
        std::fs::create_dir_all(&root)?;
        run(containerd.ctr().args(["images", "mount", "--snapshotter", "overlayfs", &image]).arg(&root))?;
        let table = tree::read(&root);
        run(containerd.ctr().args(["images", "unmount"]).arg(&root))?;
        table.context("reading what containerd unpacked")
    }
}

/// Returns bytes that cannot be compressed, the same ones for the same `seed`.
pub fn noise(seed: u64, size: usize) -> Vec<u8> {
    let mut state = seed;
    let mut bytes = Vec::with_capacity(size + 8);
    while bytes.len() < size {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&(state ^ (state >> 29)).to_le_bytes());
    }
    bytes.truncate(size);
    bytes
}
