//! Who is there, who starts when, and what goes wrong.

use nydus_backend::swarm::message::Urgency;
use nydus_backend::swarm::port::Order;
use nydus_backend::swarm::{Config, Zone};

use crate::Outcome;
use crate::liar::Lie;
use crate::net::GIGABIT;
use crate::registry::Mood;
use crate::world::World;

/// Something that goes wrong.
#[derive(Debug, Clone)]
pub enum Fault {
    /// So many nodes die at once; with `homes`, half of them homes.
    Kill {
        /// How many.
        nodes: usize,
        /// Whether half of them are homes.
        homes: bool,
    },
    /// A share of the nodes is cut off from the others.
    Cut {
        /// The share.
        share: f64,
    },
    /// The cut is over.
    Heal,
    /// The membership protocol has noticed what happened.
    Notice,
    /// The registry is in another mood.
    Registry(Mood),
    /// A node deletes everything.
    Evict {
        /// Which.
        node: usize,
    },
    /// Of the nodes that have everything, a share deletes it.
    EvictDone {
        /// The share.
        share: f64,
    },
}

/// A run.
#[derive(Debug, Clone)]
pub struct Scenario {
    /// What it is called.
    pub name: String,
    /// Nodes in the end.
    pub nodes: usize,
    /// Of them, those that were members long before.
    pub settled: usize,
    /// Microseconds within which the others join, evenly.
    pub storm: u64,
    /// Microseconds within which each begins to read.
    pub spread: u64,
    /// Objects.
    pub objects: u32,
    /// Pieces of each.
    pub pieces: u32,
    /// How soon they are wanted.
    pub urgency: Urgency,
    /// Of the objects, so many, the last ones, are waited for in any case.
    pub urgent: u32,
    /// In which order.
    pub order: Order,
    /// Bytes per second of each card.
    pub rate: u64,
    /// Nodes that are not like the others, in the ways that follow.
    pub odd: usize,
    /// Bytes per second of their cards.
    pub slow: Option<u64>,
    /// How they lie.
    pub lie: Option<Lie>,
    /// Their disk is full.
    pub full: bool,
    /// The registry refuses their readers.
    pub strangers: bool,
    /// Bytes per second of the registry.
    pub registry_rate: u64,
    /// Microseconds until its first byte.
    pub registry_latency: u64,
    /// How it is.
    pub mood: Mood,
    /// Readers have tokens.
    pub tokens: bool,
    /// Readers compare what they get with digests.
    pub verify: bool,
    /// How many different views there are; one is all agree.
    pub views: usize,
    /// Zones, evenly filled.
    pub zones: u32,
    /// What happens when, in microseconds from the first start.
    pub faults: Vec<(u64, Fault)>,
    /// Bytes of a segment.
    pub segment: u64,
    /// Share of segments that are lost once.
    pub loss: f64,
    /// Messages are really encoded and decoded.
    pub encode: bool,
    /// When the clock starts: members that are settled were there at zero.
    pub epoch: u64,
    /// When whoever has not finished is stranded.
    pub limit: u64,
    /// The numbers of the nodes.
    pub config: Config,
}

/// A second, in microseconds.
pub const SECOND: u64 = 1_000_000;

impl Scenario {
    /// Returns a crowd that starts within a second: 100 MiB, cards of 1 Gbit/s, a registry of 10 Gbit/s that answers after 30 ms.
    pub fn crowd(nodes: usize) -> Self {
        let epoch = 100 * SECOND;
        Self {
            name: format!("crowd of {nodes}"),
            nodes,
            settled: nodes,
            storm: 0,
            spread: SECOND,
            objects: 1,
            pieces: 100,
            urgency: Urgency::Demand,
            urgent: 0,
            order: Order::Any,
            rate: GIGABIT,
            odd: 0,
            slow: None,
            lie: None,
            full: false,
            strangers: false,
            registry_rate: 10 * GIGABIT,
            registry_latency: 30_000,
            mood: Mood::Well,
            tokens: false,
            verify: true,
            views: 1,
            zones: 1,
            faults: Vec::new(),
            segment: if nodes > 2000 { 1 << 20 } else { 64 << 10 },
            loss: 0.0,
            encode: nodes <= 1000,
            epoch,
            limit: epoch + 60 * SECOND,
            config: Config::default(),
        }
    }

    /// Returns every scenario for so many nodes, the plain crowd first.
    pub fn all(nodes: usize) -> Vec<Self> {
        let crowd = |name: &str| Self { name: name.to_owned(), ..Self::crowd(nodes) };
        let some = |share: usize| (nodes / share).max(1);
        let liar = |lie: Lie| Self { lie: Some(lie), odd: some(20), ..crowd(&format!("lie: {lie:?}")) };
        let mut all = vec![
            crowd("crowd"),
            Self { order: Order::InOrder, ..crowd("stream") },
            Self { spread: 0, ..crowd("same instant") },
            Self { loss: 0.01, ..crowd("loss") },
            Self { zones: 3, ..crowd("zones") },
            Self { urgency: Urgency::Prefetch, ..crowd("prefetch") },
            Self { faults: vec![(SECOND / 2, Fault::Kill { nodes: some(20), homes: false })], ..crowd("kill") },
            Self {
                faults: vec![
                    (SECOND / 2, Fault::Kill { nodes: some(20).max(2), homes: true }),
                    (17 * SECOND, Fault::Notice),
                ],
                ..crowd("kill homes")
            },
            Self {
                faults: vec![(SECOND / 10, Fault::Kill { nodes: some(20).max(2), homes: true })],
                ..crowd("kill homes early")
            },
            Self {
                faults: vec![(SECOND / 2, Fault::Cut { share: 0.3 }), (5 * SECOND, Fault::Heal)],
                ..crowd("partition")
            },
            Self {
                settled: (nodes / 10).clamp(1, 10),
                storm: 5 * SECOND,
                spread: 0,
                faults: (1..8).map(|second| (second * SECOND, Fault::Notice)).collect(),
                ..crowd("join storm")
            },
            Self { slow: Some(GIGABIT / 20), odd: some(20), ..crowd("slow nodes") },
            Self { registry_rate: GIGABIT / 2, registry_latency: 300_000, ..crowd("slow registry") },
            Self { mood: Mood::Sparing(10), ..crowd("429") },
            Self {
                registry_rate: GIGABIT / 2,
                faults: vec![
                    (11 * SECOND / 10, Fault::Registry(Mood::Down)),
                    (3 * SECOND, Fault::Registry(Mood::Well)),
                ],
                ..crowd("registry down")
            },
            Self { mood: Mood::Strict, tokens: true, ..crowd("tokens") },
            Self { mood: Mood::Strict, tokens: true, strangers: true, odd: some(10), ..crowd("strangers") },
            Self { views: 3, ..crowd("split views") },
            Self { full: true, odd: some(5), ..crowd("full disks") },
            Self { faults: vec![(SECOND / 2, Fault::Evict { node: 1 })], ..crowd("eviction") },
            // Half of the first ones let it go after eight seconds and delete it ten seconds later; the last ones come then.
            Self {
                spread: 24 * SECOND,
                faults: vec![(8 * SECOND, Fault::EvictDone { share: 0.5 })],
                ..crowd("late eviction")
            },
            Self {
                mood: Mood::Strict,
                tokens: true,
                faults: (1..6).map(|turn| (turn * SECOND / 5, Fault::Kill { nodes: some(20), homes: false })).collect(),
                ..crowd("tokens, kill")
            },
            Self { spread: 0, config: Config { queue: 4, ..Config::default() }, ..crowd("busy homes") },
            Self {
                objects: 3,
                pieces: 32,
                urgency: Urgency::Prefetch,
                urgent: 1,
                spread: SECOND / 5,
                registry_rate: GIGABIT / 4,
                ..crowd("demand beside prefetch")
            },
            // Pieces take long, so that many are on their way, and those who send them die.
            Self {
                spread: 0,
                pieces: 24,
                rate: GIGABIT / 10,
                faults: (1..8).map(|turn| (turn * SECOND / 2, Fault::Kill { nodes: some(20), homes: false })).collect(),
                ..crowd("weak links")
            },
        ];
        all.extend(crate::liar::ALL.map(liar));
        all
    }

    /// Returns a few nodes that read a thousand small objects.
    pub fn many_objects(nodes: usize) -> Self {
        Self { name: "a thousand objects".to_owned(), objects: 1000, pieces: 1, ..Self::crowd(nodes) }
    }

    /// Returns the zone of a node.
    pub fn zone(&self, node: usize) -> Zone {
        Zone(u32::try_from(node).unwrap_or(0) % self.zones)
    }

    /// Whether somebody waits for an object although others are only prefetched.
    pub fn is_urgent(&self, object: u32) -> bool {
        object + self.urgent >= self.objects && self.urgent > 0
    }

    /// Returns what this seed of it comes to.
    pub fn run(&self, seed: u64) -> Outcome {
        World::run(self, seed)
    }
}
