//! What goes wrong, when it does.

use std::collections::BTreeSet;

use nydus_backend::swarm::Input;
use nydus_backend::swarm::grid::GROUP;
use nydus_backend::swarm::port::{End, Inbound, ReadEnd, Reading};

use crate::call::Call;
use crate::event::Event;
use crate::node::{number, peer};
use crate::registry::Mood;
use crate::scenario::Fault;
use crate::world::{HALF, World, object};

impl World<'_> {
    pub(crate) fn fault(&mut self, at: usize) {
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
            Fault::Evict { node } => self.evict(*node),
            Fault::EvictDone { share } => {
                let done: Vec<usize> =
                    (0..self.nodes.len()).filter(|number| self.nodes[*number].done.is_some()).collect();
                let count = (done.len() as f64 * share) as usize;
                done.into_iter().take(count).for_each(|number| self.evict(number));
            }
        }
    }

    fn evict(&mut self, number: usize) {
        for name in 0..self.scenario.objects {
            self.step(number, Input::Evict { object: object(name) });
        }
    }

    /// Kills some nodes, half of them homes of what is being read.
    pub(crate) fn kill(&mut self, count: usize, homes: bool) {
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
    pub(crate) fn break_cut(&mut self) {
        let across = |world: &Self, call: &Call| world.nodes[call.from].side != world.nodes[call.to].side;
        let hurt: Vec<u64> = self.calls.iter().filter(|(_, call)| across(self, call)).map(|(id, _)| *id).collect();
        for id in hurt {
            self.stop_call_flow(id);
            let to = self.calls[&id].to;
            self.plan(self.now + 1_000_000, Event::Input(to, Box::new(Input::Hung { inbound: Inbound(id) })));
        }
    }

    pub(crate) fn break_readings(&mut self) {
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
}
