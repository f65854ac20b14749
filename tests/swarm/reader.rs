//! Who reads: what each wants, what it is given, and when it has all.

use nydus_backend::swarm::grid::{PIECE, Pieces};
use nydus_backend::swarm::message::Urgency;
use nydus_backend::swarm::port::{Caller, Exchange, Reader, Want};
use nydus_backend::swarm::{Input, Object};

use crate::event::Event;
use crate::liar::{Lie, silent};
use crate::node::sum;
use crate::world::{ORIGIN, World, object, object_number};

impl World<'_> {
    pub(crate) fn begin_reader(&mut self, number: usize) {
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
                urgency: if scenario.is_urgent(name) { Urgency::Demand } else { scenario.urgency },
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

    pub(crate) fn keep(&mut self, number: usize, from: Option<Exchange>, object: u32, piece: u32) {
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
            let (scenario, began) = (self.scenario, node.began.unwrap_or(now));
            if scenario.is_urgent(object) && !node.missing.iter().any(|(object, _)| scenario.is_urgent(*object)) {
                self.outcome.urgent = self.outcome.urgent.max(now - began);
            }
        }
        self.look_at_reader(number);
    }

    /// All pieces are there: the disk compares them with the digest.
    pub(crate) fn whole(&mut self, number: usize, object: Object) {
        let name = object_number(&object);
        let bad = self.nodes[number].disk.range((name, 0)..(name + 1, 0)).any(|(_, stored)| stored.taint > 0);
        let input = if bad {
            Input::Wrong { object, pieces: (0..self.scenario.pieces).collect() }
        } else {
            Input::Sealed { object }
        };
        self.plan(self.now + 1000, Event::Input(number, Box::new(input)));
    }

    /// Whether a node's reader has what it wanted.
    pub(crate) fn look_at_reader(&mut self, number: usize) {
        let node = &self.nodes[number];
        let wants = u64::from(self.scenario.objects);
        if node.began.is_some() && node.done.is_none() && node.missing.is_empty() && node.granted.len() as u64 == wants
        {
            self.finish_reader(number);
        }
    }

    pub(crate) fn finish_reader(&mut self, number: usize) {
        let now = self.now;
        let node = &mut self.nodes[number];
        if node.done.is_some() || node.began.is_none() {
            return;
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
}
