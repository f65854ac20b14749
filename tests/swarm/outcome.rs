//! What a run came to.

use std::collections::BTreeMap;

use nydus_backend::swarm::port::Event;

/// The figures of a run, and what was wrong with it.
#[derive(Debug, Default, Clone)]
pub struct Outcome {
    /// Nodes that read something, and pieces that each of them wanted.
    pub nodes: usize,
    /// Distinct bytes that anybody wanted.
    pub wanted: u64,
    /// Bytes that left the registry.
    pub egress: u64,
    /// Requests for bytes that the registry got, and those of them that it sent away.
    pub requests: u64,
    /// Requests that the registry sent away.
    pub refused: u64,
    /// Microseconds from each node's start to its last piece: the last node's, and the median.
    pub slowest: u64,
    /// The median of the same.
    pub median: u64,
    /// Microseconds from the first node's start to the last one's last piece.
    pub last: u64,
    /// Control messages: asks, answers that are no bytes, reports.
    pub messages: u64,
    /// The same by kind.
    pub kinds: BTreeMap<&'static str, u64>,
    /// Pieces that nodes got, in all.
    pub pieces: u64,
    /// Asks that the busiest node got.
    pub busiest: u64,
    /// Bytes that the node that gave most gave.
    pub most_given: u64,
    /// What the nodes counted.
    pub events: BTreeMap<Event, u64>,
    /// Microseconds between the bytes of a reader that a fault added at most: the longest time without any progress.
    pub longest_stall: u64,
    /// Microseconds from each node's start until it had what it waited for, where the rest was only prefetched: the last one's.
    pub urgent: u64,
    /// Rules that were broken, in words. Empty in a good run.
    pub wrongs: Vec<String>,
    /// Stands for every event of the run; equal seeds have equal ones.
    pub fingerprint: u64,
    /// Events that were simulated.
    pub steps: u64,
}

impl Outcome {
    /// Registry bytes in multiples of what was wanted.
    pub fn egress_ratio(&self) -> f64 {
        self.egress as f64 / self.wanted.max(1) as f64
    }

    /// Control messages per piece and node.
    pub fn messages_per_piece(&self) -> f64 {
        self.messages as f64 / self.pieces.max(1) as f64
    }

    /// Seconds of the slowest node, from its own start.
    pub fn slowest_seconds(&self) -> f64 {
        self.slowest as f64 / 1e6
    }

    /// Notes a broken rule; the first few are enough.
    pub fn wrong(&mut self, what: String) {
        if self.wrongs.len() < 8 {
            self.wrongs.push(what);
        }
    }
}
