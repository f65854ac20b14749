//! Requests between nodes: asks on their way, what is said in answer, how it ends.

use nydus_backend::swarm::grid::Mask;
use nydus_backend::swarm::message::{Ask, Frame, Holder, Manner};
use nydus_backend::swarm::port::{End, Exchange, Inbound};
use nydus_backend::swarm::wire::Message;
use nydus_backend::swarm::{Input, Peer};

use crate::call::Call;
use crate::event::Event;
use crate::liar::silent;
use crate::node::peer;
use crate::world::{CONNECT, HALF, World, number_of, object_number};

impl World<'_> {
    pub(crate) fn call(&mut self, from: usize, exchange: Exchange, to: Peer, ask: Ask) {
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

    pub(crate) fn ask_arrives(&mut self, id: u64, bytes: &[u8], ask: Option<Box<Ask>>) {
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

    pub(crate) fn answer(&mut self, _by: usize, inbound: Inbound, frame: Frame) {
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
        if let Frame::Refer { holders, .. } = &frame {
            self.check_referral(inbound.0, holders);
        }
        self.say(inbound.0, frame);
    }

    /// Notes who is sent to one that deleted what it is sent for; those who were told long ago should know.
    fn check_referral(&mut self, id: u64, holders: &[Holder]) {
        let Some(object) = self.calls.get(&id).map(|call| call.object) else { return };
        for holder in holders {
            let Some(to) = number_of(&holder.peer, self.nodes.len()) else { continue };
            let deleted = self.nodes[to].unlinked.get(&object).copied();
            let there = self.nodes[to].disk.keys().any(|(other, _)| *other == object);
            if deleted.is_some_and(|at| self.now > at + 500_000) && !there && self.nodes[to].alive {
                let now = self.now;
                self.outcome.wrong(format!("{now} us: somebody is sent to node {to}, which deleted it and said so"));
            }
        }
    }

    pub(crate) fn say(&mut self, id: u64, frame: Frame) {
        let frame = if self.scenario.encode { recode(&frame) } else { frame };
        self.plan(self.now + HALF, Event::Frame { call: id, frame: Box::new(frame) });
    }

    pub(crate) fn frame_arrives(&mut self, id: u64, frame: Frame) {
        let Some(call) = self.calls.get_mut(&id) else { return };
        if call.left {
            return;
        }
        let (from, to, exchange) = (call.from, call.to, call.exchange);
        let promised = match &frame {
            Frame::Pending { mask, .. } => {
                let new = mask.without(call.promised);
                call.promised = call.promised.or(*mask);
                new
            }
            other => {
                call.promised = call.promised.without(other.mask());
                Mask::NONE
            }
        };
        let (object, group) = (call.object, call.group);
        if self.reaches(from, to) {
            self.step(from, Input::Framed { exchange, frame });
            for piece in promised.pieces(group) {
                self.promises.entry((object, piece, from)).or_default().push(id);
                self.check_waits(object, piece, from);
            }
        }
    }

    /// The one asked has said all, or the connection is gone.
    pub(crate) fn end_call(&mut self, id: u64, end: End) {
        if let Some(call) = self.calls.get_mut(&id)
            && !call.closed
        {
            call.closed = true;
            self.plan(self.now + HALF, Event::Closed { call: id, end });
        }
    }

    pub(crate) fn closed(&mut self, id: u64, end: End) {
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

    pub(crate) fn leave(&mut self, from: usize, exchange: Exchange) {
        let Some(id) = self.by_exchange.get(&(from, exchange.0)).copied() else { return };
        let Some(call) = self.calls.get_mut(&id) else { return };
        call.left = true;
        let closed = call.closed;
        self.stop_call_flow(id);
        if !closed {
            self.plan(self.now + HALF, Event::Hung { call: id });
        }
    }

    pub(crate) fn hung(&mut self, id: u64) {
        let Some(call) = self.calls.remove(&id) else { return };
        self.by_exchange.remove(&(call.from, call.exchange.0));
        if self.reaches(call.from, call.to) && !call.closed && self.nodes[call.to].lie.is_none_or(|lie| !silent(lie)) {
            self.step(call.to, Input::Hung { inbound: Inbound(id) });
        }
    }
}

/// A message after its way over the wire.
pub(crate) fn recode<M: Message>(message: &M) -> M {
    M::decode(&message.encode()).expect("what a node says can be read")
}
