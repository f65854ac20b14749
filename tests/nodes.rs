//! Nodes of a swarm in network namespaces, with a real registry: what leaves it, whatever happens.
#![expect(clippy::print_stdout, reason = "what was measured is for people to read")]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::ops::Range;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nydus_rafs::Algorithm;
use nydus_tests::gate::{Gate, Pace};
use nydus_tests::image;
use nydus_tests::lab::{LAB, Lab};
use nydus_tests::needs::{Need, met};
use nydus_tests::process::{Process, run, shoal};
use nydus_tests::registry::Registry;
use nydus_tests::scratch::Scratch;

const REPOSITORY: &str = "team/model";

/// A swarm in a lab, and the registry behind its gate.
struct Bed {
    nodes: Vec<Option<Process>>,
    gate: Gate,
    registry: Registry,
    lab: Lab,
    scratch: Scratch,
}

impl Bed {
    fn new(tag: u8, nodes: usize) -> Result<Self> {
        let scratch = Scratch::new("swarm")?;
        let lab = Lab::new(tag, nodes)?;
        let registry = Registry::start(&scratch.dir("registry")?)?;
        let pace = Pace { bits_per_second: 0, round_trip: Duration::from_millis(20) };
        let gate = Gate::open_at(&format!("{}:0", lab.gateway()), &registry.host, pace)?;
        let key = scratch.path().join("cluster.key");
        std::fs::write(&key, "5f".repeat(32))?;
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600))?;
        let mut bed = Self { nodes: Vec::new(), gate, registry, lab, scratch };
        for node in 0..nodes {
            bed.nodes.push(None);
            bed.start(node)?;
        }
        for node in 0..nodes {
            bed.sees(node, nodes as u64)?;
        }
        Ok(bed)
    }

    /// Pushes `size` bytes of noise; returns the path of the blob and its bytes.
    async fn push(&self, seed: u64, size: usize) -> Result<(String, Vec<u8>)> {
        let mut state = seed;
        let noise = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state ^ (state >> 29)).to_le_bytes()
        });
        let bytes: Vec<u8> = noise.flatten().take(size).collect();
        let digest = format!("sha256:{}", Algorithm::Sha256.digest(&bytes));
        image::client(&self.registry.host)?.push_blob(REPOSITORY, &digest, bytes.clone().into()).await?;
        Ok((format!("/v2/{REPOSITORY}/blobs/{digest}"), bytes))
    }

    fn dir(&self, node: usize) -> PathBuf {
        self.scratch.path().join(format!("node{node}"))
    }

    fn start(&mut self, node: usize) -> Result<()> {
        let (dir, address, registry) = (self.dir(node), self.lab.address(node), &self.gate.host);
        std::fs::create_dir_all(&dir)?;
        let config = dir.join("p2p.toml");
        // The program is not optimised, and the machine has as many cores as a phone: members are slower than they should be.
        let text = format!(
            "listen = \"{address}:4001\"\nhealth_listen = \"{address}:4003\"\nmetrics_listen = \"{address}:4002\"\n\
             data_dir = \"{}/data\"\ndefault_registry = \"{registry}\"\n\
             [[registry]]\nname = \"{registry}\"\nurl = \"http://{registry}\"\n\
             [swarm]\ncluster_key_file = \"{}/cluster.key\"\nseeds = [\"{}\"]\nhedge = \"300ms\"\nsilence = \"2s\"\nalone = \"10s\"\ndead = \"2s\"\n",
            dir.display(),
            self.scratch.path().display(),
            self.lab.address(usize::from(node == 0)),
        );
        std::fs::write(&config, text)?;
        let mut command = self.lab.command(node, shoal("nydus-p2p")?);
        command.arg("--config").arg(&config);
        let mut process = Process::start("nydus-p2p", command, &dir.join("log"))?;
        process.wait_until(Duration::from_secs(20), || TcpStream::connect((address, 4001)).is_ok())?;
        self.nodes[node] = Some(process);
        Ok(())
    }

    /// Waits until a node counts so many members.
    fn sees(&self, node: usize, members: u64) -> Result<()> {
        let begin = Instant::now();
        loop {
            let seen = self.metric(node, "nydus_p2p_swarm_members")?;
            if seen == members {
                return Ok(());
            }
            ensure!(begin.elapsed() < Duration::from_secs(60), "node {node} counts {seen} members, not {members}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn metric(&self, node: usize, name: &str) -> Result<u64> {
        let (_, text) = self.ask(node, 4002, "/metrics", "")?;
        let text = String::from_utf8(text)?;
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        Ok(value.context("a metric of that name")?.parse()?)
    }

    /// Returns what the nodes decided, for people to read.
    fn decisions(&self) -> String {
        let told = |node: usize| {
            let (_, text) = self.ask(node, 4002, "/metrics", "").unwrap_or_default();
            let text = String::from_utf8_lossy(&text).into_owned();
            let lines = text
                .lines()
                .filter(|line| line.starts_with("nydus_p2p_swarm_decisions") || line.starts_with("nydus_p2p_source"));
            format!("node {node}: {}", lines.collect::<Vec<_>>().join(", ").replace("nydus_p2p_", ""))
        };
        (0..self.nodes.len()).map(told).collect::<Vec<_>>().join("\n")
    }

    /// Reads a part of a blob through a node.
    fn part(&self, node: usize, path: &str, range: Range<usize>) -> Result<()> {
        let headers = format!("Range: bytes={}-{}\r\n", range.start, range.end - 1);
        let (status, body) = self.ask(node, 4001, path, &headers)?;
        ensure!(status == 206 && body.len() == range.len(), "node {node} answers {status}");
        Ok(())
    }

    /// Reads a blob through a node.
    fn read(&self, node: usize, path: &str) -> Result<Vec<u8>> {
        let (status, body) = self.ask(node, 4001, path, "")?;
        ensure!(status == 200, "node {node} answers {status}: {}", String::from_utf8_lossy(&body));
        Ok(body)
    }

    fn ask(&self, node: usize, port: u16, path: &str, headers: &str) -> Result<(u16, Vec<u8>)> {
        let mut stream = TcpStream::connect((self.lab.address(node), port))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\n{headers}Connection: close\r\n\r\n")?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        let head = answer.windows(4).position(|window| window == b"\r\n\r\n").context("an answer has a head")?;
        let status = std::str::from_utf8(answer.get(9..12).context("a status line")?)?.parse()?;
        Ok((status, answer.split_off(head + 4)))
    }

    /// Reads a blob through all of these nodes at once; each must get all of it, and right.
    fn read_at_once(&self, nodes: &[usize], path: &str, bytes: &[u8], meanwhile: impl FnOnce() + Send) -> Result<()> {
        std::thread::scope(|scope| {
            let reading: Vec<_> = nodes
                .iter()
                .map(|node| {
                    scope.spawn(move || {
                        let got = self.read(*node, path)?;
                        ensure!(got == bytes, "node {node} gave {} bytes, and not the right ones", got.len());
                        Ok(())
                    })
                })
                .collect();
            meanwhile();
            reading.into_iter().try_for_each(|reader| reader.join().expect("a reader does not panic"))
        })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_crowd_reads_leaves_the_registry_once_whatever_happens_to_its_members() -> Result<()> {
    if !met(&[LAB, &[Need::Program("docker-registry")]].concat()) {
        return Ok(());
    }
    let mut bed = Bed::new(0, 4)?;
    let everybody = [0, 1, 2, 3];

    let (path, bytes) = bed.push(1, 100 << 20).await?;
    let before = bed.gate.passed();
    bed.read_at_once(&everybody, &path, &bytes, || {})?;
    let sent = (bed.gate.passed() - before).bytes;
    ensure!(sent * 100 <= bytes.len() as u64 * 125, "{sent} bytes left the registry for {}", bytes.len());

    // The operator sees it.
    let show = |view: &str| {
        let address = format!("{}:4002", bed.lab.address(0));
        run(Command::new(shoal("nydusctl")?).args(["swarm", "--address", &address, view]))
    };
    let (status, peers, blobs) = (show("status")?, show("peers")?, show("blobs")?);
    println!("{status}\n{peers}\n{blobs}");
    ensure!(
        status.contains("Standing:               ready") && status.contains("Members ready:          4"),
        "{status}"
    );
    ensure!(peers.lines().count() == 5 && peers.contains("(this node)"), "{peers}");
    let digest = path.rsplit_once('/').context("a path")?.1;
    ensure!(blobs.lines().any(|line| line.contains(digest) && line.contains("100.0 MiB")), "{blobs}");

    // One dies while all read.
    let (path, bytes) = bed.push(3, 40 << 20).await?;
    let before = bed.gate.passed();
    let mut victim = bed.nodes[3].take().context("a node that runs")?;
    let (gate, enough) = (&bed.gate, bytes.len() as u64 / 3);
    bed.read_at_once(&[0, 1, 2], &path, &bytes, || {
        let begin = Instant::now();
        while (gate.passed() - before).bytes < enough && begin.elapsed() < Duration::from_secs(30) {
            std::thread::sleep(Duration::from_millis(5));
        }
        victim.crash().expect("a process can be killed");
    })?;
    let sent = (bed.gate.passed() - before).bytes;
    println!("{sent} bytes left the registry for {} when one was killed", bytes.len());
    println!("{}", bed.decisions());
    ensure!(sent * 10 <= bytes.len() as u64 * 15, "{sent} bytes left the registry for {}", bytes.len());
    bed.start(3)?;
    for node in everybody {
        bed.sees(node, 4)?;
    }

    // Cut in two, each half takes it once; together again, they are one.
    bed.lab.cut(0, [2, 3])?;
    bed.lab.cut(1, [2, 3])?;
    let (path, bytes) = bed.push(2, 24 << 20).await?;
    let before = bed.gate.passed();
    bed.read_at_once(&everybody, &path, &bytes, || {})?;
    let sent = (bed.gate.passed() - before).bytes;
    println!("{sent} bytes left the registry for {} in two halves", bytes.len());
    println!("{}", bed.decisions());
    ensure!(sent * 10 <= bytes.len() as u64 * 25, "{sent} bytes left the registry for two halves of {}", bytes.len());
    bed.lab.heal(0, [2, 3])?;
    bed.lab.heal(1, [2, 3])?;
    for node in everybody {
        bed.sees(node, 4)?;
    }

    // The registry dies once one has it all, and the others were let in.
    let (path, bytes) = bed.push(4, 24 << 20).await?;
    for node in everybody {
        bed.sees(node, 4)?;
        bed.part(node, &path, 0..1)?;
    }
    bed.read_at_once(&[0], &path, &bytes, || {})?;
    bed.registry.process.crash()?;
    bed.read_at_once(&everybody, &path, &bytes, || {})
}
