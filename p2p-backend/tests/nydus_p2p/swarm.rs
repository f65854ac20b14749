//! Several nodes as real processes on loopback, in one swarm: what leaves the registry, and what does not.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use nydus_backend::overview::{Blob, Peer, Status};
use tempfile::TempDir;

use crate::daemon::program;
use crate::registry::{Mode, Registry, TOKEN, blob, noise};

/// A node's folder and process.
struct Node {
    dir: TempDir,
    child: Option<Child>,
    listen: String,
    metrics: String,
    swarm: String,
}

impl Node {
    /// Starts a node of the cluster with this key, which looks for others at `seeds`.
    ///
    /// Programs that were not optimised, on a machine that does other things as well, are slower than members should be.
    fn start(registry: &str, key: u8, seeds: &[&Node]) -> Self {
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
             hedge = \"300ms\"\nsilence = \"2s\"\n",
            dir = node.dir.path().display(),
            seeds = seeds.join(", "),
        );
        std::fs::write(node.dir.path().join("config.toml"), text).unwrap();
        node.run();
        node
    }

    fn run(&mut self) {
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

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// Waits until it counts so many members.
    fn sees(&self, members: usize) {
        until(self.dir.path(), || (self.metric("nydus_p2p_swarm_members") == members as u64).then_some(()));
    }

    fn metric(&self, name: &str) -> u64 {
        let (_, text) = ask(&self.metrics, "GET", "/metrics", "").unwrap();
        let text = String::from_utf8(text).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.map_or(0, |value| value.parse().unwrap())
    }

    fn get(&self, path: &str) -> (u16, Vec<u8>) {
        ask(&self.listen, "GET", path, "").unwrap()
    }

    fn get_as(&self, path: &str, token: &str) -> (u16, Vec<u8>) {
        ask(&self.listen, "GET", path, &format!("Authorization: {token}\r\n")).unwrap()
    }

    fn peer_bytes(&self) -> u64 {
        self.metric("nydus_p2p_source_bytes_total{source=\"peer\"}")
    }

    /// Waits until a line of its log has all of these.
    fn says(&self, words: &[&str]) {
        let told = || self.log().lines().any(|line| words.iter().all(|word| line.contains(word))).then_some(());
        until(self.dir.path(), told);
    }

    fn kill(&mut self, signal: Signal) -> Option<i32> {
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

fn until<T>(what: &Path, found: impl Fn() -> Option<T>) -> T {
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
fn ask(address: &str, method: &str, path: &str, headers: &str) -> std::io::Result<(u16, Vec<u8>)> {
    let mut stream = TcpStream::connect(address)?;
    write!(stream, "{method} {path} HTTP/1.1\r\nHost: x\r\n{headers}Connection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let head = answer.windows(4).position(|window| window == b"\r\n\r\n").ok_or(std::io::ErrorKind::UnexpectedEof)?;
    let status = std::str::from_utf8(&answer[9..12]).unwrap().parse().unwrap();
    Ok((status, answer.split_off(head + 4)))
}

#[test]
fn nodes_that_start_at_once_take_a_blob_from_the_registry_once() {
    let content = noise(24_500_000);
    let path = blob("some/repo", &content);
    let registry = Registry::start(content.clone());
    let first = Node::start(&registry.name, 7, &[]);
    let nodes = [Node::start(&registry.name, 7, &[&first]), Node::start(&registry.name, 7, &[&first]), first];
    for node in &nodes {
        node.sees(3);
    }
    std::thread::scope(|scope| {
        for node in &nodes {
            scope.spawn(|| {
                let (status, bytes) = node.get(&path);
                assert_eq!(status, 200);
                assert!(bytes == *content, "{} bytes, and not the right ones", bytes.len());
            });
        }
    });
    let sent = registry.sent.load(Ordering::SeqCst);
    assert!(sent <= content.len() * 3 / 2, "the registry sent {sent} bytes of {}", content.len());
    let from_peers: u64 = nodes.iter().map(Node::peer_bytes).sum();
    assert!(from_peers as usize >= content.len() * 3 / 2, "{from_peers} bytes came from peers");
    // Each finishes with the whole proved, and says so in a line and to its operator.
    for node in &nodes {
        until(node.dir.path(), || node.log().contains("blob finished").then_some(()));
        let (code, status) = ask(&node.metrics, "GET", "/swarm/status", "").unwrap();
        let status: Status = serde_json::from_slice(&status).unwrap();
        assert_eq!((code, status.members, status.standing.as_str()), (200, 3, "ready"));
        assert_eq!(status.registry_bytes + status.peer_bytes, content.len() as u64);
        let (_, peers) = ask(&node.metrics, "GET", "/swarm/peers", "").unwrap();
        let peers: Vec<Peer> = serde_json::from_slice(&peers).unwrap();
        assert_eq!(peers.iter().filter(|peer| peer.own).map(|peer| &peer.peer).collect::<Vec<_>>(), [&status.peer]);
        let (_, blobs) = ask(&node.metrics, "GET", "/swarm/blobs", "").unwrap();
        let blobs: Vec<Blob> = serde_json::from_slice(&blobs).unwrap();
        assert!(blobs[0].proved && blobs[0].stored_bytes == content.len() as u64);
    }
}

/// Starts so many nodes that know each other.
fn cluster(registry: &Registry, count: usize) -> Vec<Node> {
    let mut nodes = vec![Node::start(&registry.name, 7, &[])];
    while nodes.len() < count {
        nodes.push(Node::start(&registry.name, 7, &[&nodes[0]]));
    }
    nodes.iter().for_each(|node| node.sees(count));
    nodes
}

#[test]
fn a_node_that_is_killed_in_the_middle_costs_no_read() {
    let content = noise(25_000_000);
    let path = blob("some/repo", &content);
    let registry = Registry::start(content.clone());
    let mut nodes = cluster(&registry, 4);
    registry.set(Mode::Slow(200_000, 20));
    let mut victim = nodes.pop().unwrap();
    let (victims, others) = (victim.listen.clone(), &nodes);
    std::thread::scope(|scope| {
        let path = &path;
        // What becomes of its own readers is their affair.
        scope.spawn(move || drop(ask(&victims, "GET", path, "")));
        for node in others {
            let content = content.clone();
            scope.spawn(move || {
                let (status, bytes) = node.get(path);
                assert_eq!(status, 200);
                assert!(bytes == *content, "{} bytes, and not the right ones", bytes.len());
            });
        }
        while registry.sent.load(Ordering::SeqCst) < content.len() / 3 {
            std::thread::sleep(Duration::from_millis(5));
        }
        victim.kill(Signal::SIGKILL);
    });
    let sent = registry.sent.load(Ordering::SeqCst);
    assert!(sent <= content.len() * 2, "the registry sent {sent} bytes of {}", content.len());
}

#[test]
fn a_token_that_only_callers_have_opens_its_own_caller_s_way_and_nobody_else_s() {
    let content = noise(9_000_000);
    let path = blob("secret/repo", &content);
    let registry = Registry::start(content.clone());
    registry.set(Mode::Private);
    let nodes = cluster(&registry, 3);
    for token in ["Bearer wrong", "Basic b25seS10aGU="] {
        let (status, body) = nodes[1].get_as(&path, token);
        assert_eq!(status, 401, "{}", String::from_utf8_lossy(&body));
    }
    std::thread::scope(|scope| {
        for node in &nodes {
            scope.spawn(|| assert!(node.get_as(&path, TOKEN) == (200, content.to_vec())));
        }
    });
    let sent = registry.sent.load(Ordering::SeqCst);
    assert!(sent <= content.len() * 3 / 2, "the registry sent {sent} bytes of {}", content.len());
    // All of it is here now, for those who may have it.
    for node in &nodes {
        for token in ["", "Bearer wrong"] {
            let (status, body) = node.get_as(&path, token);
            assert_eq!(status, 401);
            assert!(!content.windows(64).step_by(1 << 20).any(|part| body.windows(64).any(|told| told == part)));
        }
        // The digest under a name of the caller's own is another question.
        assert_eq!(node.get_as(&blob("own/repo", &content), "Bearer wrong").0, 401);
        assert!(!node.log().contains("only-the-callers-have-it"), "a token is in a log");
    }
}

#[test]
fn the_registry_may_go_once_one_node_has_it_all() {
    let content = noise(12_000_000);
    let path = blob("some/repo", &content);
    let registry = Registry::start(content.clone());
    let mut nodes = cluster(&registry, 3);
    // Who may read it was asked while the registry was there.
    for node in &nodes {
        assert_eq!(ask(&node.listen, "HEAD", &path, "").unwrap().0, 200);
    }
    let [seed, first, second] = &mut nodes[..] else { panic!("three nodes") };
    assert!(first.get(&path) == (200, content.to_vec()));
    registry.set(Mode::Down);
    assert!(second.get(&path) == (200, content.to_vec()));
    // One that comes back has what it had, and says so.
    assert_eq!(first.kill(Signal::SIGTERM), Some(0));
    seed.sees(2);
    first.run();
    seed.sees(3);
    assert_eq!(second.kill(Signal::SIGTERM), Some(0));
    seed.sees(2);
    assert!(seed.get(&path) == (200, content.to_vec()));
}

#[test]
fn wrong_bytes_of_a_member_reach_no_reader_and_cost_it_its_trust() {
    let content = noise(24_000_000);
    let path = blob("some/repo", &content);
    let registry = Registry::start(content.clone());
    let nodes = cluster(&registry, 3);
    let [reader, others @ ..] = &nodes[..] else { panic!("three nodes") };
    assert!(others[0].get(&path) == (200, content.to_vec()));
    // What these processes have checked once is on disks that lie now.
    for node in others {
        let data = node.dir.path().join(format!("data/blobs/{}.data", path.rsplit_once(':').unwrap().1));
        // Who is no home of any of its groups (peer ids are drawn) has never seen it.
        if !data.exists() {
            continue;
        }
        let mut bytes = std::fs::read(&data).unwrap();
        bytes.iter_mut().step_by(1000).for_each(|byte| *byte ^= 1);
        std::fs::write(&data, bytes).unwrap();
    }
    let (status, bytes) = reader.get(&path);
    assert_eq!(status, 200);
    assert!(bytes == *content, "wrong bytes reached a reader");
    assert!(reader.metric("nydus_p2p_swarm_quarantines_total") >= 1);
    // A reader that finds a chunk wrong is given the registry's own bytes of these pieces.
    let before = registry.sent.load(Ordering::SeqCst);
    let headers = "Range: bytes=3000000-5000000\r\nX-Shoal-No-Peer: 1\r\n";
    let (status, part) = ask(&reader.listen, "GET", &path, headers).unwrap();
    assert!(status == 206 && part == content[3_000_000..=5_000_000]);
    let again = registry.sent.load(Ordering::SeqCst) - before;
    assert!((2_000_000..=4 << 20).contains(&again), "the registry sent {again} bytes again");
    reader.says(&["WARN", "it is not asked for an hour", "Bytes"]);
}

#[test]
fn strangers_copies_and_the_unreachable_are_told_what_to_do_and_read_by_themselves() {
    let content = noise(3_000_000);
    let path = blob("some/repo", &content);
    let registry = Registry::start(content.clone());
    let first = Node::start(&registry.name, 7, &[]);
    first.sees(1);
    let stranger = Node::start(&registry.name, 8, &[&first]);
    stranger.says(&["WARN", "the cluster keys differ", "cluster_key_file"]);
    let mut copy = Node::start(&registry.name, 7, &[&first]);
    first.sees(2);
    copy.kill(Signal::SIGKILL);
    std::fs::copy(first.dir.path().join("data/identity"), copy.dir.path().join("data/identity")).unwrap();
    copy.run();
    copy.says(&["ERROR", "a data directory was copied", "remove `identity`"]);
    first.says(&["ERROR", "a data directory was copied"]);
    let hidden = Node::start(&registry.name, 7, &[]);
    let config = hidden.dir.path().join("config.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    let text = text.replace("seeds = []", &format!("seeds = [{:?}]\nadvertise = \"127.0.0.1:1\"", first.swarm));
    std::fs::write(&config, text).unwrap();
    let mut hidden = hidden;
    hidden.kill(Signal::SIGKILL);
    hidden.run();
    hidden.says(&["ERROR", "a member cannot reach us", "swarm.advertise", "127.0.0.1:1"]);
    for node in [&stranger, &copy, &hidden, &first] {
        assert!(node.get(&path) == (200, content.to_vec()));
        assert!(!node.log().contains(&hex::encode([7; 32])) && !node.log().contains(&hex::encode([8; 32])));
    }
}

#[test]
fn a_cache_that_is_nearly_full_withdraws_what_is_to_leave_and_keeps_serving() {
    let registries: Vec<(Registry, String, Arc<Vec<u8>>)> = (0..4)
        .map(|number| {
            let content = noise(6_000_000 + number);
            (Registry::start(content.clone()), blob("some/repo", &content), content)
        })
        .collect();
    let names: Vec<String> = registries.iter().map(|(registry, ..)| registry.name.clone()).collect();
    let mut small = Node::start(&names[0], 7, &[]);
    let config = small.dir.path().join("config.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    let more = names[1..].iter().map(|name| format!("[[registry]]\nname = \"{name}\"\nurl = \"http://{name}\"\n"));
    let text = text.replace("[swarm]", &format!("{}[swarm]", more.collect::<String>()));
    std::fs::write(&config, format!("quota = \"16MiB\"\n{text}")).unwrap();
    small.kill(Signal::SIGKILL);
    small.run();
    for round in 0..2 {
        for (registry, path, content) in &registries {
            let headers = format!("X-Dragonfly-Registry: {}\r\n", registry.name);
            let (status, bytes) = ask(&small.listen, "GET", path, &headers).unwrap();
            assert!(status == 200 && bytes == **content, "round {round}");
        }
    }
    // What is above nine tenths leaves by itself, ten seconds after it was withdrawn.
    let limit = (16 << 20) * 9 / 10;
    until(small.dir.path(), || (small.metric("nydus_p2p_disk_usage_bytes") <= limit).then_some(()));
    assert!(small.metric("nydus_p2p_disk_usage_bytes") > 0);
}
