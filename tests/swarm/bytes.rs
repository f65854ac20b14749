//! Bytes on their way, from node to node and from the registry.

use std::time::Duration;

use nydus_backend::swarm::Input;
use nydus_backend::swarm::grid::{Mask, PIECE};
use nydus_backend::swarm::message::{Frame, Vouch};
use nydus_backend::swarm::port::{Credential, Exchange, Inbound, ReadEnd, Reading};

use crate::event::Event;
use crate::liar::Lie;
use crate::net::{Cargo, Flow, WINDOW};
use crate::node::{Stored, peer, sum};
use crate::registry::Mood;
use crate::world::{HALF, TELL, World};

impl World<'_> {
    pub(crate) fn flow(&mut self, flow: Flow) -> usize {
        if let Some(at) = self.spare_flows.pop() {
            self.flows[at] = flow;
            return at;
        }
        self.flows.push(flow);
        self.flows.len() - 1
    }

    pub(crate) fn send(&mut self, from: usize, inbound: Inbound, object: u32, piece: u32, offset: u64, map: Frame) {
        let Some(call) = self.calls.get(&inbound.0) else { return };
        let to = call.from;
        let node = &self.nodes[from];
        let unproved = match node.disk.get(&(object, piece)) {
            Some(stored) => sum(stored.taint) != stored.vouch.sum,
            None => !node.coming.contains_key(&(object, piece)),
        };
        if unproved && !node.full {
            self.outcome.wrong(format!("node {from} sends on piece {piece}, which is not here or was not checked"));
        }
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

    pub(crate) fn stop_call_flow(&mut self, id: u64) {
        if let Some(flow) = self.calls.get_mut(&id).and_then(|call| call.flow.take()) {
            self.flows[flow].dead = true;
        }
    }

    pub(crate) fn read(
        &mut self,
        number: usize,
        reading: Reading,
        object: u32,
        pieces: std::ops::Range<u32>,
        offset: u64,
        credential: Credential,
    ) {
        self.registry.requests += 1;
        let there = self.nodes[number].coming.get(&(object, pieces.start)).copied().unwrap_or(0);
        if offset > there {
            self.outcome
                .wrong(format!("node {number} goes on with piece {} at {offset}, and has {there} of it", pieces.start));
        }
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

    pub(crate) fn open(&mut self, node: usize, reading: u64, object: u32, pieces: std::ops::Range<u32>, offset: u64) {
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

    pub(crate) fn segment(&self) -> u64 {
        self.scenario.segment
    }

    /// Puts the next segment of a flow on the sender's line, if there is one and the window lets it.
    pub(crate) fn feed(&mut self, at: usize) {
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

    pub(crate) fn left(&mut self, at: usize) {
        self.flows[at].queued = false;
        self.feed(at);
    }

    pub(crate) fn landed(&mut self, at: usize, bytes: u64) {
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

    pub(crate) fn retire(&mut self, at: usize) {
        if !self.flows[at].queued && self.flows[at].in_flight == 0 {
            self.flows[at].dead = true;
            self.spare_flows.push(at);
        }
    }

    pub(crate) fn piece_arrives(
        &mut self,
        from: usize,
        to: usize,
        id: u64,
        exchange: Exchange,
        object: u32,
        piece: u32,
    ) {
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
    pub(crate) fn registry_bytes(
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
}
