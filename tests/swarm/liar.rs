//! Members that lie. They have the key of the cluster, so all that protects from them is what the others decide.

use nydus_backend::swarm::Peer;
use nydus_backend::swarm::grid::{GROUP, Mask, Pieces};
use nydus_backend::swarm::message::{Ask, Frame, HaveMap, Holder, Manner, Urgency};
use nydus_backend::swarm::port::{End, Exchange};

use crate::event::Event;
use crate::node::peer;
use crate::world::{HALF, ORIGIN, World, object};

/// How a member lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lie {
    /// It changes the bytes that it sends.
    WrongBytes,
    /// It signs hashes of wrong bytes when it has read the registry, and sends those.
    FalseVouch,
    /// It claims to have everything, and has nothing when it is asked.
    FalseMaps,
    /// It sends everybody on to others, for ever.
    Referrals,
    /// It takes asks and never says anything.
    Stalls,
    /// It promises for ever.
    Promises,
    /// It sends, but hardly.
    Drips,
    /// It asks everybody for everything, all the time.
    Floods,
    /// What it says is no message.
    HugeFrames,
    /// It has too much to do, always.
    Busy,
}

/// All of them.
pub const ALL: [Lie; 10] = [
    Lie::WrongBytes,
    Lie::FalseVouch,
    Lie::FalseMaps,
    Lie::Referrals,
    Lie::Stalls,
    Lie::Promises,
    Lie::Drips,
    Lie::Floods,
    Lie::HugeFrames,
    Lie::Busy,
];

impl World<'_> {
    /// What a liar says to an ask; not everything is a lie.
    pub(crate) fn lies(&mut self, lie: Lie, id: u64, liar: usize, ask: &Ask) -> bool {
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
            Lie::Busy => {
                self.say(id, Frame::Busy { mask, holders: Vec::new() });
                self.end_call(id, End::Finished);
            }
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

    pub(crate) fn flood(&mut self, liar: usize) {
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
}

/// Whether a liar answers nothing by the rules.
pub(crate) fn silent(lie: Lie) -> bool {
    !matches!(lie, Lie::WrongBytes | Lie::FalseVouch)
}
