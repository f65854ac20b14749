//! What a node of a swarm tells its operator: the JSON at `/swarm/…` beside its metrics, and what `nydusctl swarm` reads.

use serde::{Deserialize, Serialize};

/// `/swarm/status`: the node itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Its peer id.
    pub peer: String,
    /// Where members reach it.
    pub address: String,
    /// Its zone; may be empty.
    pub zone: String,
    /// `joining`, `ready` or `leaving`.
    pub standing: String,
    /// Members that are ready, itself included.
    pub members: u64,
    /// Bytes of pieces on its disk.
    pub stored_bytes: u64,
    /// Bytes that it took from registries since its start.
    pub registry_bytes: u64,
    /// Bytes that it took from members since its start.
    pub peer_bytes: u64,
    /// Bytes that it sent to members since its start.
    pub sent_bytes: u64,
    /// Of the bytes that it took, the part that came from registries; none if it took nothing.
    pub egress_ratio: Option<f64>,
    /// Members in quarantine since its start.
    pub quarantines: u64,
}

/// One of `/swarm/peers`: a member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Its peer id.
    pub peer: String,
    /// Where it is reached.
    pub address: String,
    /// Its zone; may be empty.
    pub zone: String,
    /// `joining`, `ready` or `leaving`.
    pub standing: String,
    /// How often it has started.
    pub boot: u32,
    /// Which life of its cache it speaks of.
    pub generation: u64,
    /// Whether it is this node.
    pub own: bool,
}

/// One of `/swarm/blobs`: a blob of which something is here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blob {
    /// `sha256:` and its digest.
    pub digest: String,
    /// Its size as stored.
    pub size: u64,
    /// Bytes of it that are here.
    pub stored_bytes: u64,
    /// Whether the whole matched its digest.
    pub proved: bool,
}
