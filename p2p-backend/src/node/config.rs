//! What an operator says about the swarm: the section `[swarm]`.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::Deserialize;

use super::member::MOST_ZONE;

/// The section. Where it is missing there is no swarm.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where members reach us: TCP for bytes, UDP of the same port for membership.
    pub listen: SocketAddr,
    /// The address that members are told, if it is not the one where they see us.
    #[serde(deserialize_with = "some_address")]
    pub advertise: Option<SocketAddr>,
    /// Where gossip is heard (libp2p, TCP).
    pub gossip_listen: SocketAddr,
    /// A file with the key of the cluster.
    pub cluster_key_file: PathBuf,
    /// `host[:port]` of other members: addresses, or names that have those of many.
    pub seeds: Vec<String>,
    /// The name of this node's zone: members of one zone ask each other first.
    pub zone: String,
    /// Whether members' connections are encrypted.
    pub tls: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([0, 0, 0, 0], super::discovery::PORT)),
            advertise: None,
            gossip_listen: SocketAddr::from(([0, 0, 0, 0], super::discovery::PORT + 1)),
            cluster_key_file: PathBuf::from("/etc/nydus/cluster.key"),
            seeds: Vec::new(),
            zone: String::new(),
            tls: true,
        }
    }
}

impl Config {
    /// Checks what types cannot say; tells which key is wrong, and why.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        if !self.cluster_key_file.is_absolute() {
            let path = self.cluster_key_file.display();
            return Err(("swarm.cluster_key_file", format!("`{path}` is not an absolute path")));
        }
        if let Some(address) = self.advertise
            && (address.ip().is_unspecified() || address.port() == 0)
        {
            let reason = format!("`{address}` is no address that others can reach; give this node's own, with a port");
            return Err(("swarm.advertise", reason));
        }
        if self.zone.len() > MOST_ZONE || !self.zone.bytes().all(|byte| byte.is_ascii_graphic()) {
            let reason = format!("`{}` is not a name of at most {MOST_ZONE} visible ASCII characters", self.zone);
            return Err(("swarm.zone", reason));
        }
        for seed in &self.seeds {
            let odd = |byte: u8| !byte.is_ascii_graphic() || matches!(byte, b'/' | b'@' | b'?' | b'#' | b',');
            if seed.is_empty() || seed.bytes().any(odd) {
                return Err(("swarm.seeds", format!("`{seed}` is not host[:port]")));
            }
        }
        Ok(())
    }
}

fn some_address<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<SocketAddr>, D::Error> {
    let text = String::deserialize(from)?;
    if text.is_empty() {
        return Ok(None);
    }
    let wrong = |_| serde::de::Error::custom(format!("`{text}` is not an address with a port such as 10.0.0.3:4011"));
    text.parse().map(Some).map_err(wrong)
}
