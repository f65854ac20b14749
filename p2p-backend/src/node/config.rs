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
    /// Pieces of all blobs that readers here wait for and that are asked for at once.
    pub node_window: usize,
    /// A member that has so many pieces to send is not asked.
    pub backlog: u32,
    /// Uploads of one piece at a time.
    pub uploads_per_piece: usize,
    /// Members that may wait for one piece that is on its way here.
    pub waiters_per_piece: usize,
    /// Uploads at a time.
    pub uploads: usize,
    /// Members' requests that are being answered or wait.
    pub queue: usize,
    /// Pieces that prefetch asks for at once.
    pub prefetch_window: usize,
    /// Requests of prefetch to registries at a time, of all members together.
    pub prefetch_reads: usize,
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
    /// How often one who waits is told that it is not in vain.
    #[serde(deserialize_with = "span")]
    pub pending: Duration,
    /// A home that only promises is left after so long; another member after twice that.
    #[serde(deserialize_with = "span")]
    pub deadline: Duration,
    /// A member that reads in a home's stead and is silent for so long is replaced.
    #[serde(deserialize_with = "span")]
    pub lease: Duration,
    /// What finishes within this time is reported together.
    #[serde(deserialize_with = "span")]
    pub report: Duration,
    /// After so long without progress a node reads the registry itself.
    #[serde(deserialize_with = "span")]
    pub alone: Duration,
    /// Over so long such reads are spread.
    #[serde(deserialize_with = "span")]
    pub alone_spread: Duration,
    /// How long one who refused or was silent is not asked.
    #[serde(deserialize_with = "span")]
    pub dead: Duration,
    /// How long one who gave wrong bytes, or vouched for them, is not asked.
    #[serde(deserialize_with = "span")]
    pub quarantine: Duration,
    /// How long a blob that is to be deleted is still served after members were told.
    #[serde(deserialize_with = "span")]
    pub withdrawn: Duration,
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
            node_window: decisions.node_window,
            backlog: decisions.backlog,
            uploads_per_piece: decisions.uploads_per_piece,
            waiters_per_piece: decisions.waiters_per_piece,
            uploads: decisions.most_uploads,
            queue: decisions.queue,
            prefetch_window: decisions.prefetch_window,
            prefetch_reads: decisions.prefetch_reads,
            prefetch_rate: decisions.prefetch_rate,
            upload_rate: 0,
            download_rate: 0,
            source_rate: 0,
            trust: decisions.trust,
            hedge: decisions.hedge,
            silence: decisions.silence,
            pending: decisions.pending,
            deadline: decisions.deadline,
            lease: decisions.lease,
            report: decisions.report,
            alone: decisions.alone,
            alone_spread: decisions.alone_spread,
            dead: decisions.dead,
            quarantine: decisions.quarantine,
            withdrawn: decisions.withdrawn,
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
            ("swarm.node_window", self.node_window, 1024),
            ("swarm.backlog", self.backlog as usize, 1024),
            ("swarm.uploads_per_piece", self.uploads_per_piece, 64),
            ("swarm.waiters_per_piece", self.waiters_per_piece, 64),
            ("swarm.uploads", self.uploads, 1024),
            ("swarm.queue", self.queue, 65_536),
            ("swarm.prefetch_window", self.prefetch_window, 1024),
            ("swarm.prefetch_reads", self.prefetch_reads, 64),
        ] {
            if count == 0 || count > most {
                return Err((key, format!("{count} is out of range; give 1 to {most}")));
            }
        }
        for (key, span, least, most) in [
            ("swarm.hedge", self.hedge, 1, 600),
            ("swarm.silence", self.silence, 50, 600),
            ("swarm.pending", self.pending, 10, 60),
            ("swarm.deadline", self.deadline, 100, 600),
            ("swarm.lease", self.lease, 50, 600),
            ("swarm.report", self.report, 1, 10),
            ("swarm.alone", self.alone, 100, 600),
            ("swarm.alone_spread", self.alone_spread, 0, 600),
            ("swarm.dead", self.dead, 100, 600),
            ("swarm.quarantine", self.quarantine, 1000, 604_800),
            ("swarm.withdrawn", self.withdrawn, 0, 600),
            ("swarm.summary", self.summary, 1000, 600),
        ] {
            if span < Duration::from_millis(least) || span > Duration::from_secs(most) {
                return Err((key, format!("{span:?} is out of range; give {least}ms to {most}s")));
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
        // Who waits, or reads in another's stead, is heard of every `pending`; whoever is left sooner was left for nothing.
        for (key, span, than, shorter) in [
            ("swarm.silence", self.silence, "swarm.hedge", self.hedge),
            ("swarm.silence", self.silence, "swarm.pending", self.pending),
            ("swarm.lease", self.lease, "swarm.pending", self.pending),
        ] {
            if span <= shorter {
                return Err((key, format!("{span:?} is not longer than {than} ({shorter:?})")));
            }
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
            node_window: self.node_window,
            backlog: self.backlog,
            uploads_per_piece: self.uploads_per_piece,
            waiters_per_piece: self.waiters_per_piece,
            most_uploads: self.uploads,
            queue: self.queue,
            prefetch_window: self.prefetch_window,
            prefetch_reads: self.prefetch_reads,
            prefetch_rate: self.prefetch_rate,
            trust: self.trust,
            hedge: self.hedge,
            silence: self.silence,
            pending: self.pending,
            deadline: self.deadline,
            lease: self.lease,
            report: self.report,
            alone: self.alone,
            alone_spread: self.alone_spread,
            dead: self.dead,
            quarantine: self.quarantine,
            withdrawn: self.withdrawn,
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
