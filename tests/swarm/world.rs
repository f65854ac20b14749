//! The world: events in order, cards, connections, and what nodes do because of what they decide.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::sync::Arc;
use std::time::Duration;

use nydus_backend::swarm::grid::{GROUP, Mask, PIECE, Pieces, group_of};
use nydus_backend::swarm::message::{Ask, Frame, HaveMap, Holder, Manner, Report, Summary, Urgency, Vouch};
use nydus_backend::swarm::port::{
    Blame, Caller, Credential, End, Exchange, Inbound, ReadEnd, Reader, Reading, Verdict, Want,
};
use nydus_backend::swarm::wire::Message;
use nydus_backend::swarm::{Input, Member, Object, Output, Peer, Time, View};
use nydus_rafs::Digest;

use crate::call::Call;
use crate::liar::Lie;
use crate::net::{Cargo, Flow, Line, WINDOW};
use crate::node::{Node, Stored, number, peer, sum};
use crate::outcome::Outcome;
use crate::registry::{Mood, Registry};
use crate::scenario::{Fault, Scenario};

/// Half of a round trip, in microseconds.
const HALF: u64 = 150;
/// What a new connection costs: two round trips and a millisecond of work.
const CONNECT: u64 = 4 * HALF + 1000;
/// Segments between two times that a driver tells how far a piece is.
const TELL: u64 = 4;
/// The one place where everything can be read.
const ORIGIN: &str = "registry.example/team/image";

/// Something that will happen.
#[derive(Debug)]
enum Event {
    Tick(usize),
    Input(usize, Box<Input>),
    Ask { call: u64, bytes: Vec<u8>, ask: Option<Box<Ask>> },
    Frame { call: u64, frame: Box<Frame> },
    Closed { call: u64, end: End },
    Hung { call: u64 },
    Report { from: usize, to: usize, report: Box<Report> },
    Open { node: usize, reading: u64, object: u32, pieces: std::ops::Range<u32>, offset: u64 },
    Left(usize),
    Landed(usize, u64),
    Drip { call: u64, piece: u32, got: u32 },
    Begin(usize),
    Fault(usize),
    Check,
}

#[derive(Debug)]
struct Planned(u64, u64, Event);

impl PartialEq for Planned {
    fn eq(&self, other: &Self) -> bool {
        (self.0, self.1) == (other.0, other.1)
    }
}

impl Eq for Planned {}

impl PartialOrd for Planned {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Planned {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.0, self.1).cmp(&(other.0, other.1))
    }
}

/// Everything.
#[derive(Debug)]
pub struct World<'s> {
    scenario: &'s Scenario,
    now: u64,
    turn: u64,
    events: BinaryHeap<Reverse<Planned>>,
    nodes: Vec<Node>,
    up: Vec<Line>,
    down: Vec<Line>,
    registry: Registry,
    flows: Vec<Flow>,
    spare_flows: Vec<usize>,
    calls: BTreeMap<u64, Call>,
    by_exchange: BTreeMap<(usize, u64), u64>,
    next: u64,
    rng: fastrand::Rng,
    view: Arc<View>,
    outcome: Outcome,
    unfinished: usize,
}

/// Returns the object of this number.
pub fn object(number: u32) -> Object {
    let mut name = [7; 32];
    name[..4].copy_from_slice(&number.to_le_bytes());
    Object(Digest(name))
}

fn object_number(object: &Object) -> u32 {
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

    fn new(scenario: &'s Scenario, seed: u64) -> Self {
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

    fn begin(&mut self) {
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
        self.plan(scenario.epoch + 50_000, Event::Check);
    }

    /// Returns how long after the others a node joins.
    fn joins(&self, node: usize) -> u64 {
        let scenario = self.scenario;
        if node < scenario.settled || scenario.storm == 0 {
            return 0;
        }
        scenario.storm * (node - scenario.settled) as u64 / (scenario.nodes - scenario.settled).max(1) as u64
    }

    fn plan(&mut self, at: u64, event: Event) {
        self.turn += 1;
        self.events.push(Reverse(Planned(at.max(self.now), self.turn, event)));
    }

    /// Everybody learns who is there. In a split, each side has its own view.
    fn look_around(&mut self, all: bool) {
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

    fn reaches(&self, from: usize, to: usize) -> bool {
        self.nodes[from].alive && self.nodes[to].alive && self.nodes[from].side == self.nodes[to].side
    }

    // ---- nodes --------------------------------------------------------------------------------------------------

    fn step(&mut self, number: usize, input: Input) {
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

    fn carry_out(&mut self, number: usize, output: Output) {
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
                self.nodes[number].disk.retain(|(other, _), _| *other != object);
            }
            Output::Quarantine { peer, blame, object, piece } => self.blamed(number, peer, blame, object, piece),
            Output::Whole { object } => self.whole(number, object),
            Output::Count(event) => *self.outcome.events.entry(event).or_default() += 1,
        }
    }

    /// Gossip reaches a few dozen others at once; who is asked about it is one of many anyway.
    fn gossip(&mut self, from: usize, summary: Summary) {
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

    fn blamed(&mut self, by: usize, peer: Peer, blame: Blame, object: Object, piece: u32) {
        let culprit = number(&peer);
        let guilty = matches!(self.nodes[culprit].lie, Some(Lie::WrongBytes | Lie::FalseVouch));
        if !guilty {
            let what =
                format!("node {by} put honest node {culprit} in quarantine for {blame:?}, {object:?} piece {piece}");
            self.outcome.wrong(what);
        }
    }

    /// All pieces are there: the disk compares them with the digest.
    fn whole(&mut self, number: usize, object: Object) {
        let name = object_number(&object);
        let bad = self.nodes[number].disk.range((name, 0)..(name + 1, 0)).any(|(_, stored)| stored.taint > 0);
        let input = if bad {
            Input::Wrong { object, pieces: (0..self.scenario.pieces).collect() }
        } else {
            Input::Sealed { object }
        };
        self.plan(self.now + 1000, Event::Input(number, Box::new(input)));
    }

    fn keep(&mut self, number: usize, from: Option<Exchange>, object: u32, piece: u32) {
        let now = self.now;
        let node = &mut self.nodes[number];
        if let Some(exchange) = from {
            let Some(arrived) = node.arrived.remove(&(exchange.0, piece)) else {
                self.outcome.wrong(format!("node {number} keeps piece {piece} that never arrived"));
                return;
            };
            if sum(arrived.taint) != arrived.vouch.sum {
                self.outcome.wrong(format!("node {number} keeps piece {piece} although its hash does not match"));
            }
            node.disk.insert((object, piece), arrived);
        }
        let stored = node.disk[&(object, piece)];
        self.outcome.pieces += 1;
        if node.full {
            // It is passed on from memory for a while.
            let input = Input::Lost { object: crate::world::object(object), piece };
            self.plan(now + 500_000, Event::Input(number, Box::new(input)));
        }
        let node = &mut self.nodes[number];
        if node.missing.contains(&(object, piece)) {
            self.outcome.longest_stall = self.outcome.longest_stall.max(now - node.progress);
            node.progress = now;
            if stored.taint > 0 && self.scenario.verify {
                // The reader compares it with its own digest, and does not take it.
                let input =
                    Input::Wrong { object: crate::world::object(object), pieces: Pieces::from(piece..piece + 1) };
                self.plan(now, Event::Input(number, Box::new(input)));
                return;
            }
            node.missing.remove(&(object, piece));
        }
        self.look_at_reader(number);
    }

    /// Whether a node's reader has what it wanted.
    fn look_at_reader(&mut self, number: usize) {
        let node = &self.nodes[number];
        let wants = u64::from(self.scenario.objects);
        if node.began.is_some() && node.done.is_none() && node.missing.is_empty() && node.granted.len() as u64 == wants
        {
            self.finish_reader(number);
        }
    }

    fn finish_reader(&mut self, number: usize) {
        let now = self.now;
        let node = &mut self.nodes[number];
        if node.done.is_some() || node.began.is_none() {
            return;
        }
        if !node.right && !node.granted.is_empty() {
            self.outcome.wrong(format!("node {number} has no right to what its reader was given"));
        }
        let node = &mut self.nodes[number];
        node.done = Some(now);
        if node.lie.is_none() {
            self.unfinished -= 1;
        }
        for object in 0..self.scenario.objects {
            self.plan(now, Event::Input(number, Box::new(Input::Unwant { want: Want(u64::from(object)) })));
        }
    }

    // ---- calls --------------------------------------------------------------------------------------------------

    fn call(&mut self, from: usize, exchange: Exchange, to: Peer, ask: Ask) {
        self.outcome.messages += 1;
        let kind = match ask.manner {
            Manner::Holder => "ask holder",
            Manner::Home => "ask home",
            Manner::BytesOnly => "ask bytes only",
            Manner::Spare => "ask spare",
        };
        *self.outcome.kinds.entry(kind).or_default() += 1;
        let Some(to) = number_of(&to, self.nodes.len()) else {
            // Somebody made it up.
            let input = Input::Ended { exchange, end: End::Refused };
            self.plan(self.now + HALF, Event::Input(from, Box::new(input)));
            return;
        };
        self.next += 1;
        let id = self.next;
        let call = Call {
            from,
            to,
            exchange,
            object: object_number(&ask.object),
            group: ask.group,
            promised: Mask::NONE,
            flow: None,
            left: false,
            closed: false,
        };
        self.calls.insert(id, call);
        self.by_exchange.insert((from, exchange.0), id);
        let idle = self.nodes[from].idle.entry(to).or_default();
        let connect = if *idle > 0 {
            *idle -= 1;
            0
        } else {
            CONNECT
        };
        let (bytes, ask) = if self.scenario.encode { (ask.encode(), None) } else { (Vec::new(), Some(Box::new(ask))) };
        self.plan(self.now + connect + HALF, Event::Ask { call: id, bytes, ask });
    }

    fn ask_arrives(&mut self, id: u64, bytes: &[u8], ask: Option<Box<Ask>>) {
        let Some(call) = self.calls.get(&id) else { return };
        let (from, to) = (call.from, call.to);
        if !self.reaches(from, to) {
            // A dead process refuses; a dead host, or one behind a cut, is silent.
            if self.nodes[to].side == self.nodes[from].side && !self.nodes[to].silent {
                self.end_call(id, End::Refused);
            }
            return;
        }
        self.nodes[to].asked += 1;
        let ask = match ask {
            Some(ask) => *ask,
            None => match Ask::decode(bytes) {
                Ok(ask) => ask,
                Err(error) => {
                    self.outcome.wrong(format!("an ask cannot be read: {error}"));
                    return;
                }
            },
        };
        let lie = self.nodes[to].lie;
        match lie {
            Some(lie) if self.lies(lie, id, to, &ask) => {}
            _ => self.step(to, Input::Asked { from: peer(from), inbound: Inbound(id), ask }),
        }
    }

    /// What a liar says to an ask; not everything is a lie.
    fn lies(&mut self, lie: Lie, id: u64, liar: usize, ask: &Ask) -> bool {
        let mask = ask.mask;
        let everything = || Frame::Map(HaveMap { have: Pieces::from(0..self.scenario.pieces), ..HaveMap::default() });
        match lie {
            Lie::WrongBytes | Lie::FalseVouch | Lie::Floods => return false,
            Lie::FalseMaps => {
                let map = everything();
                self.say(id, map);
                self.say(id, Frame::Gone { mask });
                self.end_call(id, End::Finished);
            }
            Lie::Referrals => {
                let holder = |peer| Holder { peer, have: Mask::ALL, coming: Mask::NONE, backlog: 0 };
                let made_up = Peer([self.rng.u8(..); 32]);
                let other = peer(self.rng.usize(..self.nodes.len()));
                let holders = vec![holder(peer(liar)), holder(other), holder(made_up)];
                self.say(id, Frame::Refer { mask, holders });
                self.end_call(id, End::Finished);
            }
            Lie::Stalls => {}
            Lie::Promises => {
                for turn in 0..100 {
                    let frame = Frame::Pending { mask, depth: Some(0), retry_after: 0 };
                    self.plan(self.now + HALF + turn * 100_000, Event::Frame { call: id, frame: Box::new(frame) });
                }
            }
            Lie::Drips => {
                if let Some(piece) = mask.pieces(ask.group).next() {
                    for turn in 0..100_u32 {
                        let at = self.now + HALF + u64::from(turn) * 200_000;
                        self.plan(at, Event::Drip { call: id, piece, got: (turn + 1) * 100 });
                    }
                }
            }
            Lie::HugeFrames => self.end_call(id, End::Broken),
        }
        true
    }

    fn flood(&mut self, liar: usize) {
        for _ in 0..self.nodes.len().min(20) {
            let to = self.rng.usize(..self.nodes.len());
            if to == liar {
                continue;
            }
            let ask = Ask {
                object: object(0),
                size: None,
                origin: ORIGIN.into(),
                group: self.rng.u32(..self.scenario.pieces.div_ceil(GROUP)),
                mask: Mask::ALL,
                offset: 0,
                manner: Manner::BytesOnly,
                below: u8::MAX,
                urgency: Urgency::Demand,
                can_read: false,
                have: Pieces::new(),
                backlog: 0,
            };
            self.next += 1;
            let exchange = Exchange(u64::MAX - self.next);
            self.call(liar, exchange, peer(to), ask);
            self.outcome.messages -= 1;
        }
    }

    fn answer(&mut self, _by: usize, inbound: Inbound, frame: Frame) {
        self.outcome.messages += 1;
        *self
            .outcome
            .kinds
            .entry(match &frame {
                Frame::Pending { depth: None, .. } => "pending queue",
                Frame::Pending { .. } => "pending",
                Frame::Refer { .. } => "refer",
                Frame::Busy { mask, .. } => {
                    let Some(c) = self.calls.get(&inbound.0) else { return };
                    if mask.pieces(c.group).all(|p| self.nodes[_by].disk.contains_key(&(c.object, p))) {
                        "busy have"
                    } else {
                        "busy coming"
                    }
                }
                Frame::Gone { .. } => "gone",
                Frame::Lease { .. } => "lease",
                Frame::Denied { .. } => "denied",
                Frame::Map(_) => "map",
            })
            .or_default() += 1;
        self.say(inbound.0, frame);
    }

    fn say(&mut self, id: u64, frame: Frame) {
        let frame = if self.scenario.encode { recode(&frame) } else { frame };
        self.plan(self.now + HALF, Event::Frame { call: id, frame: Box::new(frame) });
    }

    fn frame_arrives(&mut self, id: u64, frame: Frame) {
        let Some(call) = self.calls.get_mut(&id) else { return };
        if call.left {
            return;
        }
        let (from, to, exchange) = (call.from, call.to, call.exchange);
        match &frame {
            Frame::Pending { mask, .. } => call.promised = call.promised.or(*mask),
            other => call.promised = call.promised.without(other.mask()),
        }
        if self.reaches(from, to) {
            self.step(from, Input::Framed { exchange, frame });
        }
    }

    /// The one asked has said all, or the connection is gone.
    fn end_call(&mut self, id: u64, end: End) {
        if let Some(call) = self.calls.get_mut(&id)
            && !call.closed
        {
            call.closed = true;
            self.plan(self.now + HALF, Event::Closed { call: id, end });
        }
    }

    fn closed(&mut self, id: u64, end: End) {
        let Some(call) = self.calls.remove(&id) else { return };
        self.by_exchange.remove(&(call.from, call.exchange.0));
        if call.left {
            return;
        }
        if end == End::Finished {
            *self.nodes[call.from].idle.entry(call.to).or_default() += 1;
        }
        let cut = self.nodes[call.from].side != self.nodes[call.to].side;
        if self.nodes[call.from].alive && !cut {
            self.step(call.from, Input::Ended { exchange: call.exchange, end });
        }
    }

    fn leave(&mut self, from: usize, exchange: Exchange) {
        let Some(id) = self.by_exchange.get(&(from, exchange.0)).copied() else { return };
        let Some(call) = self.calls.get_mut(&id) else { return };
        call.left = true;
        let closed = call.closed;
        self.stop_call_flow(id);
        if !closed {
            self.plan(self.now + HALF, Event::Hung { call: id });
        }
    }

    fn hung(&mut self, id: u64) {
        let Some(call) = self.calls.remove(&id) else { return };
        self.by_exchange.remove(&(call.from, call.exchange.0));
        if self.reaches(call.from, call.to) && !call.closed && self.nodes[call.to].lie.is_none_or(|lie| !silent(lie)) {
            self.step(call.to, Input::Hung { inbound: Inbound(id) });
        }
    }

    // ---- bytes --------------------------------------------------------------------------------------------------

    fn flow(&mut self, flow: Flow) -> usize {
        if let Some(at) = self.spare_flows.pop() {
            self.flows[at] = flow;
            return at;
        }
        self.flows.push(flow);
        self.flows.len() - 1
    }

    fn send(&mut self, from: usize, inbound: Inbound, object: u32, piece: u32, offset: u64, map: Frame) {
        let Some(call) = self.calls.get(&inbound.0) else { return };
        let to = call.from;
        self.say(inbound.0, map);
        let flow = self.flow(Flow {
            from: Some(from),
            to,
            cargo: Cargo::Call(inbound.0),
            object,
            piece,
            left_at: offset,
            landing: piece,
            landed: offset,
            end: piece + 1,
            in_flight: 0,
            queued: false,
            told: 0,
            dead: false,
        });
        if let Some(call) = self.calls.get_mut(&inbound.0) {
            call.flow = Some(flow);
        }
        self.feed(flow);
    }

    fn stop_call_flow(&mut self, id: u64) {
        if let Some(flow) = self.calls.get_mut(&id).and_then(|call| call.flow.take()) {
            self.flows[flow].dead = true;
        }
    }

    fn read(
        &mut self,
        number: usize,
        reading: Reading,
        object: u32,
        pieces: std::ops::Range<u32>,
        offset: u64,
        credential: Credential,
    ) {
        self.registry.requests += 1;
        let end = match (self.registry.mood, credential) {
            (Mood::Down, _) => Some(ReadEnd::Failed),
            (Mood::Strict, Credential::Own) => Some(ReadEnd::Denied),
            (Mood::Strict, Credential::Caller(_)) if !self.nodes[number].right => Some(ReadEnd::Denied),
            _ if self.registry.too_many(self.now) => Some(ReadEnd::Later(Duration::from_secs(1))),
            _ => None,
        };
        let at = self.now + self.registry.latency;
        match end {
            Some(end) => self.plan(at, Event::Input(number, Box::new(Input::ReadEnded { reading, end }))),
            None => self.plan(at, Event::Open { node: number, reading: reading.0, object, pieces, offset }),
        }
    }

    fn open(&mut self, node: usize, reading: u64, object: u32, pieces: std::ops::Range<u32>, offset: u64) {
        if self.nodes[node].readings.remove(&reading).is_some() || !self.nodes[node].alive {
            return;
        }
        let flow = self.flow(Flow {
            from: None,
            to: node,
            cargo: Cargo::Read(node, reading),
            object,
            piece: pieces.start,
            left_at: offset,
            landing: pieces.start,
            landed: offset,
            end: pieces.end,
            in_flight: 0,
            queued: false,
            told: 0,
            dead: false,
        });
        self.nodes[node].readings.insert(reading, flow);
        self.feed(flow);
    }

    fn segment(&self) -> u64 {
        self.scenario.segment
    }

    /// Puts the next segment of a flow on the sender's line, if there is one and the window lets it.
    fn feed(&mut self, at: usize) {
        let segment = self.segment();
        let flow = &self.flows[at];
        if flow.dead || flow.queued || flow.in_flight >= WINDOW || flow.piece >= flow.end {
            return;
        }
        let mut bytes = segment.min(PIECE - flow.left_at);
        if let Some(from) = flow.from {
            let key = (flow.object, flow.piece);
            if !self.nodes[from].disk.contains_key(&key) {
                // It is just coming from the registry, or it is gone.
                let there = self.nodes[from].coming.get(&key).copied().unwrap_or(0);
                if there <= flow.left_at {
                    self.nodes[from].blocked.entry(key).or_default().push(at);
                    return;
                }
                bytes = bytes.min(there - flow.left_at);
            }
        }
        let through = match flow.from {
            Some(from) => self.up[from].carry(self.now, bytes),
            None => {
                self.outcome.egress += bytes;
                self.registry.line.carry(self.now, bytes)
            }
        };
        let flow = &mut self.flows[at];
        flow.queued = true;
        flow.left_at += bytes;
        if flow.left_at >= PIECE {
            flow.left_at = 0;
            flow.piece += 1;
        }
        flow.in_flight += 1;
        let lost = self.scenario.loss > 0.0 && self.rng.f64() < self.scenario.loss;
        self.plan(through, Event::Left(at));
        // A lost segment comes a round trip and a bit later.
        let delay = if lost { 3 * HALF + 1000 } else { HALF };
        let to = self.flows[at].to;
        let landed = self.down[to].carry(through + delay, bytes);
        self.plan(landed, Event::Landed(at, bytes));
    }

    fn left(&mut self, at: usize) {
        self.flows[at].queued = false;
        self.feed(at);
    }

    fn landed(&mut self, at: usize, bytes: u64) {
        let flow = &mut self.flows[at];
        flow.in_flight -= 1;
        let (cargo, object, piece, dead, to) = (flow.cargo, flow.object, flow.landing, flow.dead, flow.to);
        if dead {
            if flow.in_flight == 0 && !flow.queued {
                self.retire(at);
            }
            return;
        }
        let before = flow.landed;
        flow.landed += bytes;
        let got = flow.landed;
        let whole = got >= PIECE;
        if whole {
            flow.landed = 0;
            flow.landing += 1;
        }
        let over = flow.landing >= flow.end;
        let segment = self.scenario.segment;
        let told = before == 0 || got / (segment * TELL) != before / (segment * TELL) || self.now - flow.told > 40_000;
        if told {
            flow.told = self.now;
        }
        match cargo {
            Cargo::Call(id) => {
                let Some(call) = self.calls.get(&id) else { return };
                let (from, exchange) = (call.to, call.exchange);
                if !self.reaches(from, to) {
                    self.flows[at].dead = true;
                    return;
                }
                if told {
                    let got = u32::try_from(got).unwrap_or(u32::MAX);
                    self.step(to, Input::Bytes { exchange, piece, got });
                }
                if whole {
                    if let Some(call) = self.calls.get_mut(&id) {
                        call.flow = None;
                        call.promised = call.promised.without(Mask::of(piece));
                    }
                    self.piece_arrives(from, to, id, exchange, object, piece);
                }
            }
            Cargo::Read(node, reading) => {
                if self.nodes[node].alive {
                    self.registry_bytes(node, reading, object, piece, got, whole, told, over);
                }
            }
        }
        if over && !self.flows[at].dead {
            self.retire(at);
        } else {
            self.feed(at);
        }
    }

    fn retire(&mut self, at: usize) {
        if !self.flows[at].queued && self.flows[at].in_flight == 0 {
            self.flows[at].dead = true;
            self.spare_flows.push(at);
        }
    }

    fn piece_arrives(&mut self, from: usize, to: usize, id: u64, exchange: Exchange, object: u32, piece: u32) {
        let honest = Stored { taint: 0, vouch: Vouch { by: peer(from), sum: sum(0) } };
        let mut stored = self.nodes[from].disk.get(&(object, piece)).copied().unwrap_or(honest);
        if self.nodes[from].lie == Some(Lie::WrongBytes) {
            stored.taint = 2;
        }
        self.nodes[to].arrived.insert((exchange.0, piece), stored);
        let input = Input::Arrived { exchange, piece, sum: sum(stored.taint), vouch: Some(stored.vouch) };
        self.step(to, input);
        self.plan(self.now + HALF, Event::Input(from, Box::new(Input::Sent { inbound: Inbound(id), piece })));
    }

    #[expect(clippy::too_many_arguments, reason = "it is what a segment from the registry is")]
    fn registry_bytes(
        &mut self,
        node: usize,
        reading: u64,
        object: u32,
        piece: u32,
        got: u64,
        whole: bool,
        told: bool,
        over: bool,
    ) {
        let key = (object, piece);
        self.nodes[node].coming.insert(key, got);
        if told {
            let got = u32::try_from(got).unwrap_or(u32::MAX);
            self.step(node, Input::ReadBytes { reading: Reading(reading), piece, got });
        }
        if whole {
            let taint = if self.nodes[node].lie == Some(Lie::FalseVouch) { 1 } else { 0 };
            let vouch = Vouch { by: peer(node), sum: sum(taint) };
            self.nodes[node].disk.insert(key, Stored { taint, vouch });
            self.nodes[node].coming.remove(&key);
            self.step(node, Input::ReadPiece { reading: Reading(reading), piece, sum: sum(taint) });
        }
        for flow in self.nodes[node].blocked.remove(&key).unwrap_or_default() {
            self.feed(flow);
        }
        if over {
            self.nodes[node].readings.remove(&reading);
            self.step(node, Input::ReadEnded { reading: Reading(reading), end: ReadEnd::Finished });
        }
    }

    // ---- what happens -------------------------------------------------------------------------------------------

    fn happen(&mut self, event: Event) {
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
            Event::Check => {
                self.check();
                self.plan(self.now + 50_000, Event::Check);
            }
        }
    }

    fn begin_reader(&mut self, number: usize) {
        if !self.nodes[number].alive {
            return;
        }
        let now = self.now;
        let scenario = self.scenario;
        self.nodes[number].began = Some(now);
        self.nodes[number].progress = now;
        if number >= scenario.settled {
            // A joiner has pulled the list of members; the others hear of it in a while.
            let view = self.view.clone();
            self.step(number, Input::View(view));
        }
        if self.nodes[number].lie == Some(Lie::Floods) {
            self.flood(number);
            self.plan(now + 100_000, Event::Begin(number));
            return;
        }
        if self.nodes[number].lie.is_some_and(silent) {
            return;
        }
        let caller: Caller = scenario.tokens.then(|| [u8::try_from(number % 251).unwrap_or(0) + 1; 32]);
        for name in 0..scenario.objects {
            self.nodes[number].missing.extend((0..scenario.pieces).map(|piece| (name, piece)));
        }
        for name in 0..scenario.objects {
            let want = Input::Want {
                want: Want(u64::from(name)),
                object: object(name),
                size: Some(u64::from(scenario.pieces) * PIECE),
                origin: ORIGIN.into(),
                pieces: 0..scenario.pieces,
                urgency: scenario.urgency,
                order: scenario.order,
                reader: Reader { caller, verifies: scenario.verify, no_peer: false },
            };
            self.step(number, want);
        }
        let held: Vec<(u32, u32)> = self.nodes[number].disk.keys().copied().collect();
        for key in held {
            self.nodes[number].missing.remove(&key);
        }
        self.look_at_reader(number);
    }

    fn fault(&mut self, at: usize) {
        let (_, fault) = &self.scenario.faults[at];
        match fault {
            Fault::Kill { nodes, homes } => self.kill(*nodes, *homes),
            Fault::Cut { share } => {
                for number in 0..self.nodes.len() {
                    self.nodes[number].side = u8::from((number as f64) < *share * self.nodes.len() as f64);
                }
                self.break_cut();
            }
            Fault::Heal => self.nodes.iter_mut().for_each(|node| node.side = 0),
            Fault::Notice => self.look_around(false),
            Fault::Registry(mood) => {
                self.registry.mood = *mood;
                if *mood == Mood::Down {
                    self.break_readings();
                }
            }
            Fault::Evict { node } => {
                let number = *node;
                for name in 0..self.scenario.objects {
                    self.step(number, Input::Evict { object: object(name) });
                }
            }
        }
    }

    /// Kills some nodes, half of them homes of what is being read.
    fn kill(&mut self, count: usize, homes: bool) {
        let mut doomed = BTreeSet::new();
        if homes {
            let groups = self.scenario.pieces.div_ceil(GROUP);
            let mut all: Vec<usize> = (0..groups)
                .filter_map(|group| self.view.homes(&peer(0), &object(0), group).all.first().map(number))
                .collect();
            self.rng.shuffle(&mut all);
            doomed.extend(all.into_iter().filter(|number| self.nodes[*number].alive).take(count.div_ceil(2)));
        }
        while doomed.len() < count {
            let number = self.rng.usize(..self.nodes.len());
            if self.nodes[number].alive {
                doomed.insert(number);
            }
        }
        for number in doomed {
            let node = &mut self.nodes[number];
            node.alive = false;
            node.silent = number % 2 == 0;
            if node.done.is_none() && node.lie.is_none() {
                self.unfinished -= 1;
            }
            let silent = node.silent;
            let hurt: Vec<u64> = self
                .calls
                .iter()
                .filter(|(_, call)| call.to == number || call.from == number)
                .map(|(id, _)| *id)
                .collect();
            for id in hurt {
                self.stop_call_flow(id);
                let call = &self.calls[&id];
                if call.from == number {
                    // Its connections are reset, or just silent: then the other side sends into the void and finds out.
                    let (to, closed) = (call.to, call.closed);
                    self.calls.remove(&id);
                    if !closed && self.nodes[to].alive {
                        self.plan(
                            self.now + if silent { 200_000 } else { HALF },
                            Event::Input(to, Box::new(Input::Hung { inbound: Inbound(id) })),
                        );
                    }
                } else if !silent {
                    self.end_call(id, End::Broken);
                }
            }
            for flow in
                std::mem::take(&mut self.nodes[number].readings).into_values().filter(|flow| *flow != usize::MAX)
            {
                self.flows[flow].dead = true;
            }
        }
    }

    /// Calls across a cut are silent from now on; the one asked finds out some time.
    fn break_cut(&mut self) {
        let across = |world: &Self, call: &Call| world.nodes[call.from].side != world.nodes[call.to].side;
        let hurt: Vec<u64> = self.calls.iter().filter(|(_, call)| across(self, call)).map(|(id, _)| *id).collect();
        for id in hurt {
            self.stop_call_flow(id);
            let to = self.calls[&id].to;
            self.plan(self.now + 1_000_000, Event::Input(to, Box::new(Input::Hung { inbound: Inbound(id) })));
        }
    }

    fn break_readings(&mut self) {
        for number in 0..self.nodes.len() {
            for (reading, flow) in std::mem::take(&mut self.nodes[number].readings) {
                if flow != usize::MAX {
                    self.flows[flow].dead = true;
                    let input = Input::ReadEnded { reading: Reading(reading), end: ReadEnd::Failed };
                    self.plan(self.now + HALF, Event::Input(number, Box::new(input)));
                }
            }
        }
    }

    /// Looks for circles of waits: promises between nodes that lack the piece.
    fn check(&mut self) {
        let mut waits: BTreeMap<(u32, u32), BTreeMap<usize, Vec<usize>>> = BTreeMap::new();
        for call in self.calls.values().filter(|call| !call.left && !call.closed && !call.promised.is_empty()) {
            if self.nodes[call.to].lie.is_some() || !self.reaches(call.from, call.to) {
                continue;
            }
            for piece in call.promised.pieces(call.group) {
                let key = (call.object, piece);
                if !self.nodes[call.to].disk.contains_key(&key) && !self.nodes[call.to].coming.contains_key(&key) {
                    waits.entry(key).or_default().entry(call.from).or_default().push(call.to);
                }
            }
        }
        for ((_, piece), edges) in waits {
            if let Some(node) = circle(&edges) {
                let now = self.now;
                self.outcome.wrong(format!(
                    "{now} us: a circle of waits for piece {piece} (group {}) through node {node}: {edges:?}",
                    group_of(piece)
                ));
            }
        }
    }

    fn finish(mut self) -> Outcome {
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
                    self.outcome.wrong(what);
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

/// Whether a liar answers nothing by the rules.
fn silent(lie: Lie) -> bool {
    !matches!(lie, Lie::WrongBytes | Lie::FalseVouch)
}

fn number_of(peer: &Peer, nodes: usize) -> Option<usize> {
    let found = number(peer);
    (found < nodes && crate::node::peer(found) == *peer).then_some(found)
}

/// A message after its way over the wire.
fn recode<M: Message>(message: &M) -> M {
    M::decode(&message.encode()).expect("what a node says can be read")
}

/// Returns a node on a circle of these edges, if there is one.
fn circle(edges: &BTreeMap<usize, Vec<usize>>) -> Option<usize> {
    let mut done = BTreeSet::new();
    for start in edges.keys() {
        let mut path = vec![(*start, 0)];
        let mut on_path = BTreeSet::from([*start]);
        while let Some((node, next)) = path.last_mut() {
            let to = edges.get(node).and_then(|to| to.get(*next)).copied();
            *next += 1;
            match to {
                Some(to) if on_path.contains(&to) => return Some(to),
                Some(to) if done.contains(&to) => {}
                Some(to) => {
                    on_path.insert(to);
                    path.push((to, 0));
                }
                None => {
                    let (node, _) = path.pop().expect("it was the last");
                    on_path.remove(&node);
                    done.insert(node);
                }
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_circle_is_found_and_a_tree_is_none() {
        let edges = |pairs: &[(usize, usize)]| {
            let mut edges = BTreeMap::<usize, Vec<usize>>::new();
            pairs.iter().for_each(|(from, to)| edges.entry(*from).or_default().push(*to));
            edges
        };
        assert_eq!(circle(&edges(&[(1, 2), (2, 3), (1, 3), (4, 1)])), None);
        assert!(circle(&edges(&[(1, 2), (2, 3), (3, 4), (4, 2)])).is_some());
    }
}
