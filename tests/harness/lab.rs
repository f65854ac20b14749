//! A small network of its own: a bridge, and nodes in network namespaces behind it.
//!
//! ```text
//!     this process and the registry       10.N.0.1   on the bridge
//!     node 1, 2, …                        10.N.0.11, 10.N.0.12, …
//! ```
//!
//! Links can be shaped, and a node can be cut off from others by routes that lead nowhere. N is of the process, so that tests do
//! not meet. Everything goes when the lab is dropped.

use std::ffi::OsStr;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::needs::{Need, program};
use crate::process::run;

/// What a lab needs of the machine.
pub const LAB: &[Need] = &[Need::Root, Need::Program("ip"), Need::Program("tc"), Need::Program("nsenter")];

/// The network.
#[derive(Debug)]
pub struct Lab {
    name: String,
    subnet: u8,
    nodes: usize,
}

impl Lab {
    /// Builds a network of so many nodes. `tag` tells labs of one process apart.
    pub fn new(tag: u8, nodes: usize) -> Result<Self> {
        let process = std::process::id();
        let subnet =
            64 + u8::try_from((process.wrapping_mul(4) + u32::from(tag)) % 128).context("a number below 128")?;
        let lab = Self { name: format!("sl{subnet}"), subnet, nodes };
        // What a killed run left.
        lab.remove();
        let bridge = lab.bridge();
        ip(&["link", "add", &bridge, "type", "bridge"])?;
        ip(&["addr", "add", &format!("{}/24", lab.gateway()), "dev", &bridge])?;
        ip(&["link", "set", &bridge, "up"])?;
        for node in 0..nodes {
            let (namespace, host) = (lab.namespace(node), lab.host_end(node));
            ip(&["netns", "add", &namespace])?;
            ip(&["link", "add", &host, "type", "veth", "peer", "name", "eth0", "netns", &namespace])?;
            ip(&["link", "set", &host, "master", &bridge, "up"])?;
            let address = format!("{}/24", lab.address(node));
            ip(&["-n", &namespace, "addr", "add", &address, "dev", "eth0"])?;
            ip(&["-n", &namespace, "link", "set", "eth0", "up"])?;
            ip(&["-n", &namespace, "link", "set", "lo", "up"])?;
        }
        Ok(lab)
    }

    /// Returns the address of this process and of what runs beside it.
    pub fn gateway(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, self.subnet, 0, 1)
    }

    /// Returns the address of a node.
    pub fn address(&self, node: usize) -> Ipv4Addr {
        Ipv4Addr::new(10, self.subnet, 0, 11 + u8::try_from(node).unwrap_or(0))
    }

    fn bridge(&self) -> String {
        format!("{}-br", self.name)
    }

    fn namespace(&self, node: usize) -> String {
        format!("{}-n{node}", self.name)
    }

    fn host_end(&self, node: usize) -> String {
        format!("{}-h{node}", self.name)
    }

    /// Returns the network namespace of a node.
    pub fn network(&self, node: usize) -> PathBuf {
        Path::new("/run/netns").join(self.namespace(node))
    }

    /// Returns a command that runs `program` on a node.
    pub fn command(&self, node: usize, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.network(node).display())).arg(program);
        command
    }

    /// Limits a node's link in both directions to a rate as `tc` writes it, such as `1gbit`.
    pub fn shape(&self, node: usize, rate: &str) -> Result<()> {
        // At least one segment train of 64 KB, or all trains would be dropped.
        let limit = ["root", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms"];
        run(Command::new("tc").args(["qdisc", "replace", "dev", &self.host_end(node)]).args(limit))?;
        run(self.command(node, "tc").args(["qdisc", "replace", "dev", "eth0"]).args(limit)).map(drop)
    }

    /// Cuts a node off from others: what either sends the other goes nowhere.
    pub fn cut(&self, node: usize, others: impl IntoIterator<Item = usize>) -> Result<()> {
        self.routes("add", node, others)
    }

    /// Undoes [`Lab::cut`].
    pub fn heal(&self, node: usize, others: impl IntoIterator<Item = usize>) -> Result<()> {
        self.routes("del", node, others)
    }

    fn routes(&self, what: &str, node: usize, others: impl IntoIterator<Item = usize>) -> Result<()> {
        for other in others {
            for (here, there) in [(node, other), (other, node)] {
                let to = format!("{}/32", self.address(there));
                ip(&["-n", &self.namespace(here), "route", what, "blackhole", &to])?;
            }
        }
        Ok(())
    }

    fn remove(&self) {
        // What is not there is not removed, which is as well.
        for node in 0..self.nodes {
            let _ = ip(&["netns", "del", &self.namespace(node)]);
        }
        let _ = ip(&["link", "del", &self.bridge()]);
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.remove();
    }
}

fn ip(words: &[&str]) -> Result<()> {
    let mut command = Command::new(program("ip").context("ip is not installed")?);
    run(command.args(words)).map(drop)
}
