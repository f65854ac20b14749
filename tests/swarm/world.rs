//! The world: events in order, cards, connections, and what nodes do because of what they decide.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::sync::Arc;

use nydus_backend::swarm::grid::PIECE;
use nydus_backend::swarm::message::Summary;
use nydus_backend::swarm::port::{End, Verdict};
use nydus_backend::swarm::{Input, Member, Object, Output, Peer, Time, View};
use nydus_rafs::Digest;

use crate::call::Call;
use crate::calls::recode;
use crate::event::{Event, Planned};
use crate::liar::silent;
use crate::net::{Flow, Line};
use crate::node::{Node, number, peer};
use crate::outcome::Outcome;
use crate::registry::{Mood, Registry};
use crate::scenario::Scenario;

/// Half of a round trip, in microseconds.
pub(crate) const HALF: u64 = 150;
/// What a new connection costs: two round trips and a millisecond of work.
pub(crate) const CONNECT: u64 = 4 * HALF + 1000;
/// Segments between two times that a driver tells how far a piece is.
pub(crate) const TELL: u64 = 4;
/// The one place where everything can be read.
pub(crate) const ORIGIN: &str = "registry.example/team/image";

/// Everything.
#[derive(Debug)]
pub struct World<'s> {
    pub(crate) scenario: &'s Scenario,
    pub(crate) now: u64,
    pub(crate) turn: u64,
    pub(crate) events: BinaryHeap<Reverse<Planned>>,
    pub(crate) nodes: Vec<Node>,
    pub(crate) up: Vec<Line>,
    pub(crate) down: Vec<Line>,
    pub(crate) registry: Registry,
    pub(crate) flows: Vec<Flow>,
    pub(crate) spare_flows: Vec<usize>,
    pub(crate) calls: BTreeMap<u64, Call>,
    /// The requests on which a node is promised a piece of an object; some of them are over.
    pub(crate) promises: BTreeMap<(u32, u32, usize), Vec<u64>>,
    pub(crate) by_exchange: BTreeMap<(usize, u64), u64>,
    pub(crate) next: u64,
    pub(crate) rng: fastrand::Rng,
    pub(crate) view: Arc<View>,
    pub(crate) outcome: Outcome,
    pub(crate) unfinished: usize,
}

/// Returns the object of this number.
pub fn object(number: u32) -> Object {
    let mut name = [7; 32];
    name[..4].copy_from_slice(&number.to_le_bytes());
    Object(Digest(name))
}

pub(crate) fn object_number(object: &Object) -> u32 {
    let [a, b, c, d, ..] = object.0.0;
    u32::from_le_bytes([a, b, c, d])
}

impl<'s> World<'s> {
    /// Runs a scenario to its end.
    pub fn run(scenario: &'s Scenario, seed: u64) -> Outcome {
        let mut world = World::new(scenario, seed);
        while let Some(Reverse(Planned(at, _, event))) = world.events.pop() {
            if at > scenario.limit || world.unfinished == 0 {
                break;
            }
            world.now = at;
            world.outcome.steps += 1;
            world.happen(event);
        }
        world.finish()
    }

    pub(crate) fn new(scenario: &'s Scenario, seed: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let start = scenario.epoch;
        let mut nodes = Vec::new();
        for number in 0..scenario.nodes {
            let mut config = scenario.config.clone();
            config.registries = vec!["registry.example".to_owned()];
            let began = Time(if number < scenario.settled { 0 } else { start });
            let swarm = nydus_backend::swarm::Swarm::new(peer(number), 1, config, rng.u64(..), began);
            nodes.push(Node::new(swarm));
        }
        let line = |_| Line::new(scenario.rate);
        let mut world = World {
            scenario,
            now: start,
            turn: 0,
            events: BinaryHeap::new(),
            up: (0..nodes.len()).map(line).collect(),
            down: (0..nodes.len()).map(line).collect(),
            nodes,
            registry: Registry::new(scenario.registry_rate, scenario.registry_latency),
            flows: Vec::new(),
            spare_flows: Vec::new(),
            calls: BTreeMap::new(),
            promises: BTreeMap::new(),
            by_exchange: BTreeMap::new(),
            next: 0,
            rng,
            view: Arc::default(),
            outcome: Outcome::default(),
            unfinished: 0,
        };
        world.registry.mood = scenario.mood;
        // Other nodes in every seed, so that their duties differ.
        let mut odd: Vec<usize> = (0..scenario.nodes).collect();
        world.rng.shuffle(&mut odd);
        if let Some(lie) = scenario.lie {
            odd.iter().take(scenario.odd).for_each(|node| world.nodes[*node].lie = Some(lie));
        }
        for node in odd.iter().take(scenario.odd) {
            world.nodes[*node].full = scenario.full;
            world.nodes[*node].right = !scenario.strangers;
            if let Some(rate) = scenario.slow {
                (world.up[*node].rate, world.down[*node].rate) = (rate, rate);
            }
        }
        world.begin();
        world
    }

    pub(crate) fn begin(&mut self) {
        let scenario = self.scenario;
        self.look_around(true);
        for number in 0..scenario.nodes {
            let within = if scenario.spread > 0 { self.rng.u64(..scenario.spread) } else { 0 };
            let join = self.joins(number);
            self.plan(scenario.epoch + join + within, Event::Begin(number));
            self.unfinished += usize::from(self.nodes[number].lie.is_none());
        }
        for (at, _) in scenario.faults.iter().enumerate() {
            self.plan(scenario.epoch + scenario.faults[at].0, Event::Fault(at));
        }
    }

    /// Returns how long after the others a node joins.
    pub(crate) fn joins(&self, node: usize) -> u64 {
        let scenario = self.scenario;
        if node < scenario.settled || scenario.storm == 0 {
            return 0;
        }
        scenario.storm * (node - scenario.settled) as u64 / (scenario.nodes - scenario.settled).max(1) as u64
    }

    pub(crate) fn plan(&mut self, at: u64, event: Event) {
        self.turn += 1;
        self.events.push(Reverse(Planned(at.max(self.now), self.turn, event)));
    }

    /// Everybody learns who is there. In a split, each side has its own view.
    pub(crate) fn look_around(&mut self, all: bool) {
        let now = Time(self.now);
        let scenario = self.scenario;
        let member = |number: usize| Member {
            peer: peer(number),
            zone: scenario.zone(number),
            since: Time(if number < scenario.settled { 0 } else { scenario.epoch + self.joins(number) }),
            home: true,
        };
        let joined = |world: &Self, number: usize| {
            world.nodes[number].alive
                && (number < scenario.settled || scenario.epoch + world.joins(number) <= world.now)
        };
        let mut views = BTreeMap::new();
        let splits = scenario.views.max(1);
        for side in self.nodes.iter().map(|node| node.side).collect::<BTreeSet<_>>() {
            for split in 0..splits {
                let known = (0..self.nodes.len()).filter(|number| {
                    joined(self, *number)
                        && self.nodes[*number].side == side
                        // A split view lacks every seventh node, another one in each.
                        && (splits == 1 || number % 7 != split)
                });
                let view = Arc::new(View::new(known.map(member).collect(), now));
                views.insert((side, split), view);
            }
        }
        self.view = views.values().next().cloned().unwrap_or_default();
        let numbers: Vec<usize> = (0..self.nodes.len()).filter(|number| joined(self, *number)).collect();
        for number in numbers {
            let view = views[&(self.nodes[number].side, number % splits)].clone();
            if all || self.nodes[number].began.is_some() || number < scenario.settled {
                self.step(number, Input::View(view));
            }
        }
    }

    pub(crate) fn reaches(&self, from: usize, to: usize) -> bool {
        self.nodes[from].alive && self.nodes[to].alive && self.nodes[from].side == self.nodes[to].side
    }

    pub(crate) fn step(&mut self, number: usize, input: Input) {
        let node = &mut self.nodes[number];
        if !node.alive {
            return;
        }
        let outputs = node.swarm.step(Time(self.now), input);
        if let Some(wake) = node.swarm.wake()
            && wake.0 < node.tick
        {
            node.tick = wake.0.max(self.now);
            let at = node.tick;
            self.plan(at, Event::Tick(number));
        }
        for output in outputs {
            self.carry_out(number, output);
        }
    }

    pub(crate) fn carry_out(&mut self, number: usize, output: Output) {
        match output {
            Output::Ask { exchange, to, ask } => self.call(number, exchange, to, ask),
            Output::Leave { exchange } => self.leave(number, exchange),
            Output::Keep { from, object, piece } => self.keep(number, from, object_number(&object), piece),
            Output::Reject { exchange, piece } => {
                self.nodes[number].arrived.remove(&(exchange.0, piece));
            }
            Output::Drop { object, pieces } => {
                for piece in pieces.iter() {
                    self.nodes[number].disk.remove(&(object_number(&object), piece));
                    if self.nodes[number].done.is_none() && self.nodes[number].began.is_some() {
                        self.nodes[number].missing.insert((object_number(&object), piece));
                    }
                }
            }
            Output::Trust { .. } | Output::Drained => {}
            Output::Answer { inbound, frame } => self.answer(number, inbound, frame),
            Output::Send { inbound, object, piece, offset, map } => {
                self.send(number, inbound, object_number(&object), piece, u64::from(offset), map);
            }
            Output::Abort { inbound } => {
                self.stop_call_flow(inbound.0);
                self.end_call(inbound.0, End::Broken);
            }
            Output::Close { inbound } => self.end_call(inbound.0, End::Finished),
            Output::Read { reading, object, pieces, offset, credential, .. } => {
                self.read(number, reading, object_number(&object), pieces, u64::from(offset), credential);
            }
            Output::StopRead { reading } => {
                if let Some(flow) = self.nodes[number].readings.remove(&reading.0) {
                    self.flows[flow].dead = true;
                } else {
                    self.nodes[number].readings.insert(reading.0, usize::MAX);
                }
            }
            Output::Check { caller, object, origin } => {
                let may = self.nodes[number].right;
                let verdict = match self.registry.mood {
                    Mood::Down => Verdict::Unknown,
                    Mood::Strict if caller.is_none() || !may => Verdict::Denied,
                    _ if !may => Verdict::Denied,
                    _ => Verdict::Granted,
                };
                let input = Input::Checked { caller, object, origin, verdict };
                self.plan(self.now + self.registry.latency, Event::Input(number, Box::new(input)));
            }
            Output::Grant { want } => {
                self.nodes[number].granted.insert(want.0);
                if !self.nodes[number].right {
                    self.outcome.wrong(format!("node {number} gives its reader what that has no right to"));
                }
                self.look_at_reader(number);
            }
            Output::Fail { want, why, pieces } => {
                if self.nodes[number].right {
                    let now = self.now;
                    self.outcome
                        .wrong(format!("{now} us: node {number} failed want {} for {pieces:?}: {why:?}", want.0));
                }
                self.finish_reader(number);
            }
            Output::Report { to, report } => {
                self.outcome.messages += 1;
                *self.outcome.kinds.entry("report").or_default() += 1;
                let to = number_of(&to, self.nodes.len());
                let report = if self.scenario.encode { recode(&report) } else { report };
                if let Some(to) = to.filter(|to| self.reaches(number, *to)) {
                    self.plan(self.now + HALF, Event::Report { from: number, to, report: Box::new(report) });
                }
            }
            Output::Gossip { summary } => self.gossip(number, summary),
            Output::Unlink { object } => {
                let object = object_number(&object);
                let now = self.now;
                let node = &mut self.nodes[number];
                node.disk.retain(|(other, _), _| *other != object);
                node.unlinked.insert(object, now);
            }
            Output::Quarantine { peer, blame, object, piece } => self.blamed(number, peer, blame, object, piece),
            Output::Whole { object } => self.whole(number, object),
            Output::Count(event) => *self.outcome.events.entry(event).or_default() += 1,
        }
    }

    /// Gossip reaches a few dozen others at once; who is asked about it is one of many anyway.
    pub(crate) fn gossip(&mut self, from: usize, summary: Summary) {
        let summary = if self.scenario.encode { recode(&summary) } else { summary };
        let count = self.nodes.len().min(32);
        for _ in 0..count {
            let to = self.rng.usize(..self.nodes.len());
            if to != from && self.reaches(from, to) {
                let input = Input::Summarized { from: peer(from), summary: summary.clone() };
                let delay = self.rng.u64(100_000..1_000_000);
                self.plan(self.now + delay, Event::Input(to, Box::new(input)));
            }
        }
    }

    pub(crate) fn happen(&mut self, event: Event) {
        let print = &mut self.outcome.fingerprint;
        *print = (*print ^ self.now).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(7);
        match event {
            Event::Tick(number) => {
                self.nodes[number].tick = u64::MAX;
                self.step(number, Input::Tick);
                if let Some(wake) = self.nodes[number].swarm.wake()
                    && self.nodes[number].tick == u64::MAX
                    && self.nodes[number].alive
                {
                    self.nodes[number].tick = wake.0;
                    self.plan(wake.0, Event::Tick(number));
                }
            }
            Event::Input(number, input) => {
                if let Input::Lost { object, piece } = &*input {
                    self.nodes[number].disk.remove(&(object_number(object), *piece));
                }
                self.step(number, *input);
            }
            Event::Ask { call, bytes, ask } => self.ask_arrives(call, &bytes, ask),
            Event::Frame { call, frame } => self.frame_arrives(call, *frame),
            Event::Closed { call, end } => self.closed(call, end),
            Event::Hung { call } => self.hung(call),
            Event::Report { from, to, report } => {
                if self.reaches(from, to) && self.nodes[to].lie.is_none_or(|lie| !silent(lie)) {
                    self.step(to, Input::Reported { from: peer(from), report: *report });
                }
            }
            Event::Open { node, reading, object, pieces, offset } => self.open(node, reading, object, pieces, offset),
            Event::Left(flow) => self.left(flow),
            Event::Landed(flow, bytes) => self.landed(flow, bytes),
            Event::Drip { call, piece, got } => {
                if let Some(call) = self.calls.get(&call).filter(|call| !call.left) {
                    let (from, exchange) = (call.from, call.exchange);
                    self.step(from, Input::Bytes { exchange, piece, got });
                }
            }
            Event::Begin(number) => self.begin_reader(number),
            Event::Fault(at) => self.fault(at),
        }
    }

    pub(crate) fn finish(mut self) -> Outcome {
        let scenario = self.scenario;
        let mut times = Vec::new();
        for (number, node) in self.nodes.iter().enumerate() {
            if !node.alive || node.lie.is_some() {
                continue;
            }
            match (node.began, node.done) {
                (Some(began), Some(done)) => {
                    times.push(done - began);
                    self.outcome.last = self.outcome.last.max(done - scenario.epoch);
                }
                _ => {
                    let missing: Vec<_> = node.missing.iter().take(4).collect();
                    let what = format!("node {number} is stranded, {} pieces missing: {missing:?}", node.missing.len());
                    let fetch =
                        node.missing.first().and_then(|(name, piece)| node.swarm.explain(&object(*name), *piece));
                    self.outcome.wrong(format!("{what}; {fetch:?}"));
                }
            }
        }
        times.sort_unstable();
        self.outcome.nodes = times.len();
        self.outcome.slowest = times.last().copied().unwrap_or(0);
        self.outcome.median = times.get(times.len() / 2).copied().unwrap_or(0);
        self.outcome.wanted = u64::from(scenario.pieces) * PIECE * u64::from(scenario.objects);
        self.outcome.requests = self.registry.requests;
        self.outcome.refused = self.registry.refused;
        self.outcome.busiest = self.nodes.iter().map(|node| node.asked).max().unwrap_or(0);
        self.outcome.most_given = self.up.iter().map(|line| line.carried).max().unwrap_or(0);
        self.outcome
    }
}

pub(crate) fn number_of(peer: &Peer, nodes: usize) -> Option<usize> {
    let found = number(peer);
    (found < nodes && crate::node::peer(found) == *peer).then_some(found)
}
