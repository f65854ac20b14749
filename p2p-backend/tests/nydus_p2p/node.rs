//! A node of a swarm as a real process on loopback.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::daemon::program;
use crate::registry::Registry;

/// A node's folder and process.
pub(crate) struct Node {
    pub(crate) dir: TempDir,
    pub(crate) child: Option<Child>,
    pub(crate) listen: String,
    pub(crate) metrics: String,
    pub(crate) swarm: String,
}

impl Node {
    /// Starts a node of the cluster with this key, which looks for others at `seeds`.
    ///
    /// Programs that were not optimised, on a machine that does other things as well, are slower than members should be.
    pub(crate) fn start(registry: &str, key: u8, seeds: &[&Node]) -> Self {
        Self::start_with(registry, key, seeds, "")
    }

    /// The same with further keys of `[swarm]`.
    pub(crate) fn start_with(registry: &str, key: u8, seeds: &[&Node], keys: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut node = Self { dir, child: None, listen: String::new(), metrics: String::new(), swarm: String::new() };
        let seeds: Vec<String> = seeds.iter().map(|seed| format!("{:?}", seed.swarm)).collect();
        let path = node.dir.path().join("key");
        std::fs::write(&path, hex::encode([key; 32])).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        let text = format!(
            "listen = \"127.0.0.1:0\"\nhealth_listen = \"127.0.0.1:0\"\nmetrics_listen = \"127.0.0.1:0\"\n\
             data_dir = \"{dir}/data\"\ndefault_registry = \"{registry}\"\n\
             log_level = \"info,nydus_backend=debug\"\n\
             [[registry]]\nname = \"{registry}\"\nurl = \"http://{registry}\"\n\
             [swarm]\nlisten = \"127.0.0.1:0\"\ngossip_listen = \"127.0.0.1:0\"\ncluster_key_file = \"{dir}/key\"\nseeds = [{seeds}]\n\
             hedge = \"2s\"\nsilence = \"6s\"\nalone = \"10s\"\n{keys}\n",
            dir = node.dir.path().display(),
            seeds = seeds.join(", "),
        );
        std::fs::write(node.dir.path().join("config.toml"), text).unwrap();
        node.run();
        node
    }

    pub(crate) fn run(&mut self) {
        let before = self.log().len();
        let log = std::fs::File::options().append(true).create(true).open(self.dir.path().join("log")).unwrap();
        let config = self.dir.path().join("config.toml");
        let child = program().arg("--config").arg(config).stdin(Stdio::null()).stderr(log).spawn().unwrap();
        self.child = Some(child);
        let line = until(self.dir.path(), || {
            self.log()[before..].lines().find(|line| line.contains("nydus-p2p is ready")).map(str::to_owned)
        });
        let value = |key: &str| line.split_once(&format!(" {key}=\"")).unwrap().1.split_once('"').unwrap().0.to_owned();
        (self.listen, self.metrics, self.swarm) = (value("listen"), value("metrics"), value("swarm"));
    }

    /// Starts it again with something else in its configuration.
    pub(crate) fn configure(&mut self, part: &str, instead: &str) {
        let config = self.dir.path().join("config.toml");
        let text = std::fs::read_to_string(&config).unwrap();
        assert!(text.contains(part), "{text}");
        std::fs::write(&config, text.replace(part, instead)).unwrap();
        self.kill(Signal::SIGKILL);
        self.run();
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// Waits until it counts so many members.
    pub(crate) fn sees(&self, members: usize) {
        until(self.dir.path(), || (self.metric("nydus_p2p_swarm_members") == members as u64).then_some(()));
    }

    pub(crate) fn metric(&self, name: &str) -> u64 {
        let (_, text) = ask(&self.metrics, "GET", "/metrics", "").unwrap();
        let text = String::from_utf8(text).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.map_or(0, |value| value.parse().unwrap())
    }

    pub(crate) fn get(&self, path: &str) -> (u16, Vec<u8>) {
        ask(&self.listen, "GET", path, "").unwrap()
    }

    pub(crate) fn get_as(&self, path: &str, token: &str) -> (u16, Vec<u8>) {
        ask(&self.listen, "GET", path, &format!("Authorization: {token}\r\n")).unwrap()
    }

    pub(crate) fn peer_bytes(&self) -> u64 {
        self.metric("nydus_p2p_source_bytes_total{source=\"peer\"}")
    }

    /// Waits until a line of its log has all of these.
    pub(crate) fn says(&self, words: &[&str]) {
        let told = || self.log().lines().any(|line| words.iter().all(|word| line.contains(word))).then_some(());
        until(self.dir.path(), told);
    }

    pub(crate) fn kill(&mut self, signal: Signal) -> Option<i32> {
        let mut child = self.child.take().unwrap();
        kill(Pid::from_raw(child.id() as i32), signal).unwrap();
        child.wait().unwrap().code()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            let numbers = ask(&self.metrics, "GET", "/metrics", "").map(|(_, text)| text).unwrap_or_default();
            let numbers = String::from_utf8_lossy(&numbers).into_owned();
            let told = numbers.lines().filter(|line| line.contains("_swarm_") && !line.starts_with('#'));
            println!("{}", told.collect::<Vec<_>>().join("\n"));
            println!("--- {}\n{}", self.swarm, lines[lines.len().saturating_sub(60)..].join("\n"));
        }
        if self.child.is_some() {
            self.kill(Signal::SIGKILL);
        }
    }
}

pub(crate) fn until<T>(what: &Path, found: impl Fn() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(begin.elapsed() < Duration::from_secs(60), "{} did not get there", what.display());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Asks and returns the status and what came of the body.
pub(crate) fn ask(address: &str, method: &str, path: &str, headers: &str) -> std::io::Result<(u16, Vec<u8>)> {
    let mut stream = TcpStream::connect(address)?;
    write!(stream, "{method} {path} HTTP/1.1\r\nHost: x\r\n{headers}Connection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let head = answer.windows(4).position(|window| window == b"\r\n\r\n").ok_or(std::io::ErrorKind::UnexpectedEof)?;
    let status = std::str::from_utf8(&answer[9..12]).unwrap().parse().unwrap();
    Ok((status, answer.split_off(head + 4)))
}

/// Starts so many nodes that know each other.
pub(crate) fn cluster(registry: &Registry, count: usize) -> Vec<Node> {
    cluster_with(registry, count, "")
}

/// The same with further keys of `[swarm]`.
pub(crate) fn cluster_with(registry: &Registry, count: usize, keys: &str) -> Vec<Node> {
    let mut nodes = vec![Node::start_with(&registry.name, 7, &[], keys)];
    while nodes.len() < count {
        nodes.push(Node::start_with(&registry.name, 7, &[&nodes[0]], keys));
    }
    nodes.iter().for_each(|node| node.sees(count));
    nodes
}
