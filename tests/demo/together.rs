//! Nodes of one swarm that start the same image in the same moment.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nydus_tests::gate::Gate;
use nydus_tests::node::{Member, Node, Setup};
use nydus_tests::process::free_port;
use nydus_tests::runner::Runner;
use nydus_tests::scratch::Scratch;

use crate::table::Row;

/// How many.
pub(crate) const NODES: usize = 3;

/// The nodes of a swarm, and who runs images on each.
pub(crate) struct Swarm {
    nodes: Vec<(Node, Runner)>,
}

impl Swarm {
    /// Starts all nodes and waits until they know each other.
    pub(crate) async fn start(scratch: &Scratch, setup: &Setup, interrupted: &Arc<AtomicBool>) -> Result<Self> {
        let key = scratch.path().join("cluster.key");
        write_key(&key)?;
        let mut nodes: Vec<(Node, Runner)> = Vec::new();
        let mut seeds = Vec::new();
        for number in 1..=NODES {
            let name = format!("s{number}");
            let listen = format!("127.0.0.1:{}", free_port()?);
            let gossip = format!("127.0.0.1:{}", free_port()?);
            let member = Member { key: key.clone(), listen: listen.clone(), gossip, seeds: seeds.clone() };
            let setup = Setup { upstream_mirrors: Vec::new(), member: Some(member), ..setup.clone() };
            let node = Node::start(&scratch.dir(&name)?, &setup)?;
            seeds.push(listen);
            let runner =
                Runner::new(&node.containerd, "nydus", &scratch.dir(&format!("{name}/logs"))?, interrupted).await?;
            runner.warm_up(&setup.pause).await?;
            nodes.push((node, runner));
        }
        let begin = Instant::now();
        for (node, _) in &nodes {
            while node.mirror_metric("nydus_p2p_swarm_members", "")? < NODES as u64 {
                ensure!(
                    begin.elapsed() < Duration::from_secs(30),
                    "the nodes do not find each other: {}",
                    node.mirror.log()
                );
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        Ok(Self { nodes })
    }

    /// Pulls and runs on all nodes at once; a row for each, and one for what left the registry in all.
    pub(crate) fn run(
        &self,
        (label, command): &(&'static str, Vec<String>),
        gate: &Gate,
        image: &str,
    ) -> Result<Vec<Row>> {
        let runtime = tokio::runtime::Handle::current();
        let (begin, before) = (Instant::now(), gate.passed());
        let ended: Vec<Result<Row>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (1..)
                .zip(&self.nodes)
                .map(|(number, (node, runner))| {
                    let (name, runtime) = (format!("swarm {number} of {NODES}, {label}"), &runtime);
                    scope.spawn(move || runtime.block_on(Row::of_member(name, command, runner, node, image)))
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().expect("no node panics")).collect()
        });
        let mut rows = ended.into_iter().collect::<Result<Vec<_>>>()?;
        rows.push(Row::of_all(format!("swarm of {NODES} together"), begin.elapsed(), before, gate.passed()));
        Ok(rows)
    }
}

fn write_key(path: &PathBuf) -> Result<()> {
    use std::io::{Read as _, Write as _};
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut key = [0; 32];
    std::fs::File::open(Path::new("/dev/urandom"))?.read_exact(&mut key)?;
    let mut file = std::fs::File::options().write(true).create_new(true).mode(0o600).open(path)?;
    let text: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
    file.write_all(text.as_bytes()).context("writing the cluster's key")
}
