//! A node of the world: its mind, its disk, its readers.

use std::collections::{BTreeMap, BTreeSet};

use nydus_backend::swarm::message::{Sum, Vouch};
use nydus_backend::swarm::{Peer, Swarm};

use crate::liar::Lie;

/// What is wrong with the bytes of a piece; zero is nothing.
pub type Taint = u8;

/// Returns the hash of a piece with this taint.
pub fn sum(taint: Taint) -> Sum {
    [taint; 32]
}

/// Returns who node `number` is.
pub fn peer(number: usize) -> Peer {
    let mut name = [0; 32];
    let mut rng = fastrand::Rng::with_seed(number as u64 ^ 0x05ea_5eed);
    rng.fill(&mut name);
    name[28..].copy_from_slice(&u32::try_from(number).unwrap_or(u32::MAX).to_le_bytes());
    Peer(name)
}

/// Returns which node that is.
pub fn number(peer: &Peer) -> usize {
    let [.., a, b, c, d] = peer.0;
    u32::from_le_bytes([a, b, c, d]) as usize
}

/// A piece as it lies on a disk.
#[derive(Debug, Clone, Copy)]
pub struct Stored {
    /// What is wrong with it.
    pub taint: Taint,
    /// Who says what it is.
    pub vouch: Vouch,
}

/// A node.
#[derive(Debug)]
pub struct Node {
    /// Its mind.
    pub swarm: Swarm,
    /// What is on its disk, by object and piece.
    pub disk: BTreeMap<(u32, u32), Stored>,
    /// Pieces that are coming from the registry, and how much of each is there.
    pub coming: BTreeMap<(u32, u32), u64>,
    /// Flows that wait for bytes that are coming.
    pub blocked: BTreeMap<(u32, u32), Vec<usize>>,
    /// What arrived and was neither kept nor rejected yet, by request and piece.
    pub arrived: BTreeMap<(u64, u32), Stored>,
    /// Flows from the registry, by request.
    pub readings: BTreeMap<u64, usize>,
    /// Whether it lives.
    pub alive: bool,
    /// A dead host is silent, a dead process refuses.
    pub silent: bool,
    /// On which side of a cut it is.
    pub side: u8,
    /// It lies.
    pub lie: Option<Lie>,
    /// Its disk keeps nothing.
    pub full: bool,
    /// When its reader began; none before.
    pub began: Option<u64>,
    /// When its reader had everything.
    pub done: Option<u64>,
    /// When its reader last got something.
    pub progress: u64,
    /// What its reader still wants.
    pub missing: BTreeSet<(u32, u32)>,
    /// Whether the registry accepts its reader's token.
    pub right: bool,
    /// Whether the reader may have bytes yet, by want.
    pub granted: BTreeSet<u64>,
    /// When a tick is planned.
    pub tick: u64,
    /// Asks that it got.
    pub asked: u64,
    /// When objects were deleted here.
    pub unlinked: BTreeMap<u32, u64>,
    /// Connections without a request on them, by peer.
    pub idle: BTreeMap<usize, u32>,
}

impl Node {
    /// Returns a node that has nothing.
    pub fn new(swarm: Swarm) -> Self {
        Self {
            swarm,
            disk: BTreeMap::new(),
            coming: BTreeMap::new(),
            blocked: BTreeMap::new(),
            arrived: BTreeMap::new(),
            readings: BTreeMap::new(),
            alive: true,
            silent: false,
            side: 0,
            lie: None,
            full: false,
            began: None,
            done: None,
            progress: 0,
            missing: BTreeSet::new(),
            right: true,
            granted: BTreeSet::new(),
            tick: u64::MAX,
            asked: 0,
            unlinked: BTreeMap::new(),
            idle: BTreeMap::new(),
        }
    }
}
