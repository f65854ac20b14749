//! The line of those who are to be sent something: what is urgent first, then in turn, no piece and no member taking all.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use super::config::Config;
use super::grid::{Mask, Object};
use super::members::Peer;
use super::message::{Frame, HaveMap, MOST_HOLDERS, Manner, Other, Urgency};
use super::port::{Inbound, Output};
use super::serve::Serving;
use super::time::Time;
use super::{Swarm, Timer};

/// Everybody who is being answered.
#[derive(Debug)]
pub(super) struct Counter {
    pub(super) serving: BTreeMap<Inbound, Serving>,
    pub(super) per_peer: BTreeMap<Peer, u32>,
    pub(super) line: BTreeSet<(Reverse<Urgency>, u64, Inbound, u32)>,
    pub(super) sending: BTreeMap<Inbound, Time>,
    /// Those of `sending` that are not slow yet, the oldest first.
    pub(super) quick: VecDeque<Upload>,
    /// Pieces that were sent.
    pub(super) done: u64,
    /// The turn that is being served; one who has nothing in line gets the next one, whoever has gets later ones.
    pub(super) turn: u64,
    pub(super) last_turn: BTreeMap<Peer, u64>,
    /// Smoothed time between two pieces that we send, when there is always one to send.
    pub(super) pace: Duration,
    pub(super) last: Time,
    pub(super) draining: bool,
}

/// Uploads to one member at a time: one that takes all that it can get leaves room for others.
const MOST_TO_ONE: usize = 2;
/// The longest time that is taken for a piece's.
const SLOWEST: Duration = Duration::from_secs(1);
/// A pace to begin with: a piece at 1 Gbit/s.
const PACE: Duration = Duration::from_micros(8500);

/// An upload when it began.
#[derive(Debug, Clone, Copy)]
pub(super) struct Upload {
    begun: Time,
    inbound: Inbound,
    /// Pieces that had been sent by then.
    done: u64,
}

impl Counter {
    pub(super) fn new() -> Self {
        Self {
            serving: BTreeMap::new(),
            per_peer: BTreeMap::new(),
            line: BTreeSet::new(),
            sending: BTreeMap::new(),
            quick: VecDeque::new(),
            done: 0,
            turn: 0,
            last_turn: BTreeMap::new(),
            pace: PACE,
            last: Time::default(),
            draining: false,
        }
    }

    /// Returns the time that a piece takes on our line.
    pub(super) fn pace(&self) -> Duration {
        self.pace
    }

    /// Returns how many pieces we have to send.
    pub(super) fn backlog(&self) -> u8 {
        u8::try_from(self.line.len() + self.sending.len()).unwrap_or(u8::MAX)
    }

    /// Whether one who is next in line may be sent a piece beside what is being sent: neither a piece nor a member takes all.
    pub(super) fn may_send(&self, inbound: Inbound, piece: u32, config: &Config) -> bool {
        let Some(next) = self.serving.get(&inbound) else { return true };
        let (mut same, mut to_it) = (0, 0);
        for other in self.sending.keys().filter_map(|inbound| self.serving.get(inbound)) {
            same += usize::from(other.object == next.object && other.sending == Some(piece));
            to_it += usize::from(other.from == next.from);
        }
        same < config.uploads_per_piece && to_it < MOST_TO_ONE
    }

    pub(super) fn sent(&mut self, begun: Time, now: Time) {
        let took = now.since(begun.max(self.last)).clamp(Duration::from_micros(100), SLOWEST);
        self.pace = (self.pace * 7 + took) / 8;
        self.last = now;
        self.done += 1;
    }
}

impl Swarm {
    pub(super) fn queue(&mut self, inbound: Inbound, piece: u32) {
        let Some(serving) = self.counter.serving.get_mut(&inbound) else { return };
        serving.queued = serving.queued.or(Mask::of(piece));
        serving.held = serving.held.without(Mask::of(piece));
        let last = self.counter.last_turn.entry(serving.from).or_default();
        *last = self.counter.turn.max(*last) + 1;
        self.counter.line.insert((Reverse(serving.urgency), *last, inbound, piece));
    }

    /// Begins to send, as far as the line allows.
    pub(super) fn upload(&mut self) {
        let now = self.now;
        while let Some(first) = self.counter.quick.front().copied() {
            let over = self.counter.sending.get(&first.inbound) != Some(&first.begun);
            let old = now.since(first.begun) >= self.config.slow_upload;
            // Others got through meanwhile: it is the receiver that is slow. Else it may be our own line, and more uploads would
            // only make each of them slower, until all look silent.
            let passed = self.counter.done - first.done >= 2 * self.counter.sending.len() as u64;
            if !over && !(old && (passed || self.counter.sending.len() < 2 * self.config.uploads)) {
                break;
            }
            self.counter.quick.pop_front();
        }
        while self.counter.quick.len() < self.config.uploads && self.counter.sending.len() < self.config.most_uploads {
            let free = |(_, _, inbound, piece): &&(Reverse<Urgency>, u64, Inbound, u32)| {
                !self.counter.sending.contains_key(inbound) && self.counter.may_send(*inbound, *piece, &self.config)
            };
            let Some(next) = self.counter.line.iter().find(free).copied() else { return };
            self.counter.line.remove(&next);
            let (_, turn, inbound, piece) = next;
            self.counter.turn = self.counter.turn.max(turn);
            self.send(inbound, piece);
        }
        if !self.counter.line.is_empty()
            && let Some(first) = self.counter.quick.front()
        {
            let at = first.begun + self.config.slow_upload;
            if at > now {
                self.timer(at, Timer::Upload);
            }
        }
    }

    pub(super) fn send(&mut self, inbound: Inbound, piece: u32) {
        let now = self.now;
        let Some(serving) = self.counter.serving.get_mut(&inbound) else { return };
        let (object, offset) = (serving.object, serving.offset);
        let here = self.blobs.get(&object).is_some_and(|blob| blob.have.has(piece));
        if !here && !self.register.flowing(object, piece) {
            // It was lost while the asker stood in line.
            serving.queued = serving.queued.without(Mask::of(piece));
            self.out.push(Output::Answer { inbound, frame: Frame::Gone { mask: Mask::of(piece) } });
            self.close_if_done(inbound);
            return;
        }
        serving.sending = Some(piece);
        self.counter.sending.insert(inbound, now);
        let done = self.counter.done;
        self.counter.quick.push_back(Upload { begun: now, inbound, done });
        let map = Frame::Map(self.have_map(object));
        self.out.push(Output::Send { inbound, object, piece, offset, map });
    }

    pub(super) fn have_map(&mut self, object: Object) -> HaveMap {
        let backlog = self.counter.backlog();
        let skip = self.rng.usize(..self.config.neighbours.max(1));
        let Some(blob) = self.blobs.get(&object) else { return HaveMap::default() };
        if blob.withdrawn.is_some() {
            return HaveMap::default();
        }
        let coming = blob.fetches.iter().filter(|(_, fetch)| fetch.depth.is_some()).map(|(piece, _)| *piece).collect();
        // Those with the least to do: who is known to everybody has the most.
        let (now, pace) = (self.now, self.counter.pace());
        let known = blob.known.iter().filter(|(peer, other)| !other.have.is_empty() && self.usable(peer));
        let mut known: Vec<_> =
            known.map(|(peer, other)| (self.standings.load(peer, pace, now), peer, other)).collect();
        let turn = skip % known.len().max(1);
        known.rotate_left(turn);
        known.sort_by_key(|(load, ..)| *load);
        let other = |(load, peer, other): &(u32, &Peer, &super::known::Neighbour)| Other {
            peer: **peer,
            have: other.have.clone(),
            backlog: u8::try_from(*load).unwrap_or(u8::MAX),
        };
        let others = known.iter().take(MOST_HOLDERS).map(other).collect();
        HaveMap { have: blob.have.clone(), coming, backlog, others }
    }

    pub(super) fn sent(&mut self, inbound: Inbound, piece: u32) {
        let now = self.now;
        let Some(serving) = self.counter.serving.get_mut(&inbound) else { return };
        if serving.sending != Some(piece) {
            return;
        }
        serving.sending = None;
        serving.queued = serving.queued.without(Mask::of(piece));
        serving.since = now;
        let (object, from, group, home) =
            (serving.object, serving.from, serving.group, serving.manner != Manner::Holder);
        if let Some(begun) = self.counter.sending.remove(&inbound) {
            self.counter.sent(begun, now);
        }
        if let Some(blob) = self.blobs.get_mut(&object) {
            if home && let Some(ledger) = blob.ledgers.get_mut(&group) {
                ledger.has(from, Mask::of(piece), false, now);
            }
            if let Some(neighbour) = blob.known.get_mut(&from) {
                neighbour.have.insert(piece);
            }
        }
        self.close_if_done(inbound);
    }

    /// A piece that was flowing from the registry broke off: whoever was being sent it is told by a broken connection.
    pub(super) fn abort(&mut self, object: Object, piece: u32) {
        let of = |serving: &Serving| serving.object == object && serving.sending == Some(piece);
        let serving = self.counter.serving.iter().filter(|(_, serving)| of(serving));
        let broken: Vec<Inbound> = serving.map(|(inbound, _)| *inbound).collect();
        for inbound in broken {
            self.out.push(Output::Abort { inbound });
            self.remove(inbound);
        }
    }
}
