//! What an operator says about the swarm: the section `[swarm]`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Deserializer};

use crate::quantity::{size, span};
use crate::swarm;
use crate::swarm::config::Trust;

use super::member::MOST_ZONE;

/// With less, members would take us for dead.
const LEAST_RATE: u64 = 64 << 10;

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
    /// Pieces of a blob that are asked for at once.
    pub window: usize,
    /// A member that has so many pieces to send is not asked.
    pub backlog: u32,
    /// Uploads of one piece at a time.
    pub uploads_per_piece: usize,
    /// Uploads at a time.
    pub uploads: usize,
    /// Bytes per second that prefetch may read from registries on this node; zero is no limit.
    #[serde(deserialize_with = "size")]
    pub prefetch_rate: u64,
    /// Bytes per second to members; zero is no limit.
    #[serde(deserialize_with = "size")]
    pub upload_rate: u64,
    /// Bytes per second from members; zero is no limit.
    #[serde(deserialize_with = "size")]
    pub download_rate: u64,
    /// Bytes per second from registries; zero is no limit.
    #[serde(deserialize_with = "size")]
    pub source_rate: u64,
    /// What is enough for readers that do not verify for themselves: `members` or `proof`.
    #[serde(deserialize_with = "trust")]
    pub trust: Trust,
    /// The least time without an answer after which a second source is asked.
    #[serde(deserialize_with = "span")]
    pub hedge: Duration,
    /// A source that is silent for so long is left.
    #[serde(deserialize_with = "span")]
    pub silence: Duration,
    /// After so long without progress a node reads the registry itself.
    #[serde(deserialize_with = "span")]
    pub alone: Duration,
    /// How long one who refused or was silent is not asked.
    #[serde(deserialize_with = "span")]
    pub dead: Duration,
    /// What is held is told to everybody at most once in this time.
    #[serde(deserialize_with = "span")]
    pub summary: Duration,
}

impl Default for Config {
    fn default() -> Self {
        let decisions = swarm::Config::default();
        Self {
            listen: SocketAddr::from(([0, 0, 0, 0], super::discovery::PORT)),
            advertise: None,
            gossip_listen: SocketAddr::from(([0, 0, 0, 0], super::discovery::PORT + 1)),
            cluster_key_file: PathBuf::from("/etc/nydus/cluster.key"),
            seeds: Vec::new(),
            zone: String::new(),
            tls: true,
            window: decisions.window,
            backlog: decisions.backlog,
            uploads_per_piece: decisions.uploads_per_piece,
            uploads: decisions.most_uploads,
            prefetch_rate: decisions.prefetch_rate,
            upload_rate: 0,
            download_rate: 0,
            source_rate: 0,
            trust: decisions.trust,
            hedge: decisions.hedge,
            silence: decisions.silence,
            alone: decisions.alone,
            dead: decisions.dead,
            summary: decisions.summary,
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
        for (key, count, most) in [
            ("swarm.window", self.window, 1024),
            ("swarm.backlog", self.backlog as usize, 1024),
            ("swarm.uploads_per_piece", self.uploads_per_piece, 64),
            ("swarm.uploads", self.uploads, 1024),
        ] {
            if count == 0 || count > most {
                return Err((key, format!("{count} is out of range; give 1 to {most}")));
            }
        }
        for (key, span, least) in [
            ("swarm.hedge", self.hedge, 1),
            ("swarm.silence", self.silence, 50),
            ("swarm.alone", self.alone, 100),
            ("swarm.dead", self.dead, 100),
            ("swarm.summary", self.summary, 1000),
        ] {
            if span < Duration::from_millis(least) || span > Duration::from_secs(600) {
                return Err((key, format!("{span:?} is out of range; give {least}ms to 600s")));
            }
        }
        for (key, rate) in [
            ("swarm.upload_rate", self.upload_rate),
            ("swarm.download_rate", self.download_rate),
            ("swarm.source_rate", self.source_rate),
        ] {
            if (1..LEAST_RATE).contains(&rate) {
                let reason = format!("{rate} bytes per second is too little; give at least 64KiB, or 0 for no limit");
                return Err((key, reason));
            }
        }
        if self.silence <= self.hedge {
            let reason = format!("{:?} is not longer than swarm.hedge ({:?})", self.silence, self.hedge);
            return Err(("swarm.silence", reason));
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

impl Config {
    /// Returns the numbers by which the swarm decides; `registries` are those that may be read.
    pub fn decisions(&self, registries: Vec<String>) -> swarm::Config {
        swarm::Config {
            window: self.window,
            backlog: self.backlog,
            uploads_per_piece: self.uploads_per_piece,
            most_uploads: self.uploads,
            prefetch_rate: self.prefetch_rate,
            trust: self.trust,
            hedge: self.hedge,
            silence: self.silence,
            alone: self.alone,
            dead: self.dead,
            summary: self.summary,
            registries,
            ..swarm::Config::default()
        }
    }
}

fn trust<'de, D: Deserializer<'de>>(from: D) -> Result<Trust, D::Error> {
    match String::deserialize(from)?.as_str() {
        "members" => Ok(Trust::Members),
        "proof" => Ok(Trust::Proof),
        other => Err(serde::de::Error::custom(format!("`{other}` is neither `members` nor `proof`"))),
    }
}

fn some_address<'de, D: Deserializer<'de>>(from: D) -> Result<Option<SocketAddr>, D::Error> {
    let text = String::deserialize(from)?;
    if text.is_empty() {
        return Ok(None);
    }
    let wrong = |_| serde::de::Error::custom(format!("`{text}` is not an address with a port such as 10.0.0.3:4011"));
    text.parse().map(Some).map_err(wrong)
}
