//! Answering others: what is sent at once, who waits, who is sent on, and in which order the line is used.

use std::collections::BTreeMap;
use std::time::Duration;

use super::grid::{Mask, Object, PIECE, Pieces};
use super::members::Peer;
use super::message::{Ask, Frame, Holder, MOST_HOLDERS, Manner, Urgency};
use super::port::{Event, Inbound, Order, Output};
use super::report::MOST_KNOWN;
use super::time::Time;
use super::{Swarm, Timer};

/// An ask that we are answering.
#[derive(Debug)]
pub(super) struct Serving {
    pub(super) from: Peer,
    pub(super) object: Object,
    pub(super) group: u32,
    pub(super) manner: Manner,
    pub(super) below: u8,
    pub(super) offset: u32,
    pub(super) urgency: Urgency,
    pub(super) can_read: bool,
    /// Pieces that stand in line to be sent, or are being sent.
    pub(super) queued: Mask,
    /// Pieces that are on their way to us.
    pub(super) held: Mask,
    pub(super) sending: Option<u32>,
    pub(super) since: Time,
}

/// Asks of one member at a time; more are refused, for whoever floods us.
const MOST_PER_PEER: u32 = 24;
/// First sign to one who waits; before the others' hedging sets in.
const FIRST_SIGN: Duration = Duration::from_millis(20);
/// An upload that takes longer is broken off: whoever takes less than 17 KiB a second takes the place of others.
const LONGEST_UPLOAD: Duration = Duration::from_secs(60);

impl Serving {
    pub(super) fn left(&self) -> Mask {
        self.queued.or(self.held)
    }
}

impl Swarm {
    pub(super) fn asked_by(&mut self, from: Peer, inbound: Inbound, ask: Ask) {
        let Ask { object, size, ref origin, group, mask, .. } = ask;
        let have = self.blobs.get(&object).map(|blob| blob.have.in_group(group)).unwrap_or_default();
        let beyond = |piece: u32| {
            size.is_some_and(|size| u64::from(piece) * PIECE >= size.max(1))
                || self.blobs.get(&object).is_some_and(|blob| !blob.may_have(piece))
        };
        if self.counter.draining || mask.pieces(group).any(beyond) {
            return self.refuse(inbound, Frame::Gone { mask });
        }
        if self.tombs.has(&object, self.now) || (!mask.without(have).is_empty() && !self.config.reads(origin)) {
            return self.refuse(inbound, Frame::Denied { mask });
        }
        let crowd = self.counter.per_peer.get(&from).copied().unwrap_or(0) >= MOST_PER_PEER
            || self.counter.serving.len() >= self.config.queue
            || self.standings.quarantined(&from, self.now)
            || (self.blobs.len() >= MOST_KNOWN && !self.blobs.contains_key(&object));
        if crowd {
            return self.refuse(inbound, Frame::Busy { mask, holders: Vec::new() });
        }
        let fetching = matches!(ask.manner, Manner::Home | Manner::BytesOnly) && self.may_be_home(object, group);
        if !fetching && !self.blobs.contains_key(&object) {
            return self.refuse(inbound, Frame::Gone { mask });
        }
        let (most, now) = (self.config.neighbours, self.now);
        let pace = self.counter.pace();
        let reads = self.config.reads(origin);
        let blob = self.blob(object);
        if reads {
            blob.hear(size, origin);
        }
        let end = blob.of_interest();
        blob.known.map(from, ask.have.below(end), Pieces::new(), most, now);
        self.standings.busy(from, ask.backlog, pace, now);
        *self.counter.per_peer.entry(from).or_default() += 1;
        let serving = Serving {
            from,
            object,
            group,
            manner: ask.manner,
            below: ask.below,
            offset: ask.offset,
            urgency: ask.urgency,
            can_read: ask.can_read,
            queued: Mask::NONE,
            held: Mask::NONE,
            sending: None,
            since: self.now,
        };
        self.counter.serving.insert(inbound, serving);
        if fetching {
            self.answer_as_home(inbound, mask, have);
            let known = self.blobs.get(&object).and_then(|blob| blob.ledgers.get(&group));
            if (known.is_some_and(|ledger| ledger.lists(&from)) || self.may_list(from, object))
                && let Some(blob) = self.blobs.get_mut(&object)
            {
                blob.ledgers.entry(group).or_default().expect(from, mask, now);
            }
        } else {
            self.answer_as_holder(inbound, mask, have);
        }
        if self.counter.serving.contains_key(&inbound) {
            self.timer(self.now + FIRST_SIGN, Timer::Inbound(inbound));
        }
    }

    pub(super) fn refuse(&mut self, inbound: Inbound, frame: Frame) {
        self.out.push(Output::Answer { inbound, frame });
        self.out.push(Output::Close { inbound });
    }

    pub(super) fn answer_as_holder(&mut self, inbound: Inbound, mask: Mask, have: Mask) {
        let (mut busy, mut gone) = (Mask::NONE, Mask::NONE);
        let Some(serving) = self.counter.serving.get(&inbound) else { return };
        let (object, group, manner) = (serving.object, serving.group, serving.manner);
        for piece in mask.pieces(group) {
            let one = Mask::of(piece);
            if have.has(piece) {
                // One who was told that we are idle may be late; twice as late is too late.
                if u32::from(self.counter.backlog()) < 2 * self.config.backlog || manner == Manner::Spare {
                    self.queue(inbound, piece);
                } else {
                    busy = busy.or(one);
                }
            } else if self.may_wait(inbound, piece) {
                self.hold(inbound, piece);
            } else if self.is_coming(object, piece) {
                busy = busy.or(one);
            } else {
                gone = gone.or(one);
            }
        }
        if !busy.is_empty() {
            self.say_busy(inbound, busy);
        }
        if !gone.is_empty() {
            self.out.push(Output::Answer { inbound, frame: Frame::Gone { mask: gone } });
        }
        self.close_if_done(inbound);
    }

    pub(super) fn answer_as_home(&mut self, inbound: Inbound, mask: Mask, have: Mask) {
        let Some(serving) = self.counter.serving.get(&inbound) else { return };
        let (object, group, manner, urgency, below) =
            (serving.object, serving.group, serving.manner, serving.urgency, serving.below);
        let (mine, missing) = (have.and(mask), mask.without(have));
        let stays = if manner == Manner::Home { self.refer(inbound, mine, missing) } else { mask };
        for piece in stays.pieces(group) {
            if have.has(piece) {
                self.queue(inbound, piece);
                continue;
            }
            if let Some(fetch) = self.begin(object, piece, urgency, Order::InOrder) {
                fetch.duty = true;
            }
            if self.depth_of(object, piece).is_some_and(|depth| depth >= below) {
                self.say_busy(inbound, Mask::of(piece));
            } else {
                self.hold(inbound, piece);
            }
        }
        self.close_if_done(inbound);
    }

    /// Sends the asker on, where others can do it better; returns the pieces that stay with us.
    pub(super) fn refer(&mut self, inbound: Inbound, mine: Mask, missing: Mask) -> Mask {
        let mask = mine.or(missing);
        let Some(serving) = self.counter.serving.get(&inbound) else { return mask };
        let (object, group, from, below) = (serving.object, serving.group, serving.from, serving.below);
        let busy = u32::from(self.counter.backlog()) + mine.len() > self.config.backlog;
        let now = self.now;
        let start = Peer(std::array::from_fn(|_| self.rng.u8(..)));
        let crowded = |piece: u32, blob: &super::blob::Blob| {
            blob.waiting.get(&piece).is_some_and(|waiting| waiting.len() >= self.config.waiters_per_piece)
        };
        let Some(blob) = self.blobs.get(&object) else { return mask };
        // Sent on are: what we have while we are busy, and what we lack where somebody has it, or many wait here already.
        let full = missing
            .pieces(group)
            .filter(|piece| crowded(*piece, blob))
            .fold(Mask::NONE, |all, piece| all.or(Mask::of(piece)));
        let leased = self
            .blobs
            .get_mut(&object)
            .and_then(|blob| blob.ledgers.get_mut(&group))
            .map(|ledger| ledger.leased(now))
            .unwrap_or_default();
        let coming = if busy { mine.or(full) } else { full }.or(leased.and(missing));
        let pace = self.counter.pace();
        let load = |peer: &Peer| (*peer != from && self.usable(peer)).then(|| self.standings.load(peer, pace, now));
        let Some(ledger) = self.blobs.get(&object).and_then(|blob| blob.ledgers.get(&group)) else { return mask };
        let mut stays = mask;
        let mut referrals = Vec::new();
        for (wish, complete) in [(missing.without(coming), true), (coming, below < u8::MAX)] {
            let (covered, holders) = ledger.refer(wish, start, complete, load, now);
            let referred = covered.and(wish);
            if !referred.is_empty() {
                stays = stays.without(referred);
                referrals.push((referred, holders));
            }
        }
        for (mask, holders) in referrals {
            if let Some(first) = holders.first() {
                self.standings.charge(first.peer, first.have.or(first.coming).and(mask).len(), pace, now);
            }
            self.out.push(Output::Answer { inbound, frame: Frame::Refer { mask, holders } });
            self.out.push(Output::Count(Event::Referral));
        }
        stays
    }

    /// Whether somebody can honestly take us for the home of a group: else anyone could make us read anything.
    pub(super) fn may_be_home(&mut self, object: Object, group: u32) -> bool {
        let homes = self.homes(object, group);
        let mut all = homes.all.iter().chain(&homes.zone);
        all.clone().any(|peer| *peer == self.me) || all.all(|peer| !self.usable(peer))
    }

    pub(super) fn is_coming(&self, object: Object, piece: u32) -> bool {
        self.blobs.get(&object).is_some_and(|blob| blob.fetches.contains_key(&piece))
    }

    /// Returns how deep we stand for a piece that is on its way to us, if we know.
    pub(super) fn depth_of(&self, object: Object, piece: u32) -> Option<u8> {
        let fetch = self.blobs.get(&object)?.fetches.get(&piece)?;
        // Whoever only waits until the registry may be read stands where one stands who reads it.
        fetch.depth.or(fetch.next_is_registry.then_some(0))
    }

    /// Whether an asker may wait here for a piece on its way to us: few others do, and we stand above all that it ever said.
    pub(super) fn may_wait(&self, inbound: Inbound, piece: u32) -> bool {
        let Some(serving) = self.counter.serving.get(&inbound) else { return false };
        let Some(depth) = self.depth_of(serving.object, piece) else { return false };
        let waiting = self.blobs.get(&serving.object).and_then(|blob| blob.waiting.get(&piece)).map_or(0, Vec::len);
        depth < serving.below && waiting < self.config.waiters_per_piece
    }

    pub(super) fn hold(&mut self, inbound: Inbound, piece: u32) {
        let Some(serving) = self.counter.serving.get_mut(&inbound) else { return };
        serving.held = serving.held.or(Mask::of(piece));
        let object = serving.object;
        if let Some(blob) = self.blobs.get_mut(&object) {
            blob.waiting.entry(piece).or_default().push(inbound);
            // Now somebody relies on where we stand.
            if let Some(fetch) = blob.fetches.get_mut(&piece)
                && let Some(depth) = fetch.depth.or(fetch.next_is_registry.then_some(0))
            {
                fetch.ceiling = fetch.ceiling.min(depth);
            }
        }
        if self.register.flowing(object, piece) {
            self.serve_waiting(object, piece);
        }
    }

    /// A piece is here, or flows from the registry: those who waited for it stand in line.
    pub(super) fn serve_waiting(&mut self, object: Object, piece: u32) {
        let waiting = self.blobs.get_mut(&object).and_then(|blob| blob.waiting.remove(&piece));
        for inbound in waiting.into_iter().flatten() {
            self.queue(inbound, piece);
        }
    }

    /// A piece will not come: those who waited for it look elsewhere.
    pub(super) fn refuse_waiting(&mut self, object: Object, piece: u32) {
        let waiting = self.blobs.get_mut(&object).and_then(|blob| blob.waiting.remove(&piece));
        for inbound in waiting.into_iter().flatten() {
            self.stop_holding(inbound, piece);
        }
    }

    /// A piece is not here any more: those who stand in line for it look elsewhere.
    pub(super) fn refuse_queued(&mut self, object: Object, piece: u32) {
        let in_line: Vec<Inbound> =
            self.counter.line.iter().filter(|(.., other)| *other == piece).map(|(_, _, inbound, _)| *inbound).collect();
        for inbound in in_line {
            let Some(serving) = self.counter.serving.get_mut(&inbound).filter(|serving| serving.object == object)
            else {
                continue;
            };
            serving.queued = serving.queued.without(Mask::of(piece));
            self.counter.line.retain(|(_, _, other, of)| (*other, *of) != (inbound, piece));
            self.out.push(Output::Answer { inbound, frame: Frame::Gone { mask: Mask::of(piece) } });
            self.close_if_done(inbound);
        }
    }

    pub(super) fn stop_holding(&mut self, inbound: Inbound, piece: u32) {
        if let Some(serving) = self.counter.serving.get_mut(&inbound) {
            serving.held = serving.held.without(Mask::of(piece));
            self.say_busy(inbound, Mask::of(piece));
        }
        self.close_if_done(inbound);
    }

    /// Tells an asker that we cannot, and who perhaps can.
    pub(super) fn say_busy(&mut self, inbound: Inbound, mask: Mask) {
        let (now, pace) = (self.now, self.counter.pace());
        let Some(serving) = self.counter.serving.get(&inbound) else { return };
        let (group, from) = (serving.group, serving.from);
        let mut found = Vec::new();
        for (peer, other) in self.blobs.get(&serving.object).into_iter().flat_map(|blob| blob.known.iter()) {
            let have = other.have.in_group(group);
            if !have.and(mask).is_empty() && *peer != from && self.usable(peer) {
                found.push((self.standings.load(peer, pace, now), self.rng.u32(..), *peer, have));
            }
        }
        found.sort_unstable();
        let holder = |(load, _, peer, have): (u32, u32, Peer, Mask)| {
            let backlog = u8::try_from(load).unwrap_or(u8::MAX);
            Holder { peer, have, coming: Mask::NONE, backlog }
        };
        let holders = found.into_iter().take(MOST_HOLDERS).map(holder).collect();
        self.out.push(Output::Answer { inbound, frame: Frame::Busy { mask, holders } });
    }

    /// Finds the first who waits for a piece and may read the registry, and tells it to read that and whatever else of
    /// the group it waits for, if nobody else does.
    pub(super) fn lessee(&mut self, object: Object, piece: u32, leased: Mask) -> Option<(Peer, Mask)> {
        let waiting = self.blobs.get(&object)?.waiting.get(&piece)?;
        let able = |inbound: &&Inbound| self.counter.serving.get(inbound).is_some_and(|serving| serving.can_read);
        let inbound = *waiting.iter().find(able)?;
        let serving = self.counter.serving.get_mut(&inbound)?;
        let (from, group) = (serving.from, serving.group);
        let blob = self.blobs.get_mut(&object)?;
        let idle = |piece: &u32| blob.fetches.get(piece).is_some_and(|fetch| fetch.sources.is_empty());
        let wanted = serving.held.without(leased);
        let mask = wanted.pieces(group).filter(idle).fold(Mask::of(piece), |all, piece| all.or(Mask::of(piece)));
        serving.held = serving.held.without(mask);
        for piece in mask.pieces(group) {
            if let Some(waiting) = blob.waiting.get_mut(&piece) {
                waiting.retain(|other| *other != inbound);
            }
        }
        self.out.push(Output::Answer { inbound, frame: Frame::Lease { mask } });
        self.close_if_done(inbound);
        Some((from, mask))
    }

    pub(super) fn close_if_done(&mut self, inbound: Inbound) {
        if self.counter.serving.get(&inbound).is_some_and(|serving| serving.left().is_empty()) {
            self.out.push(Output::Close { inbound });
            self.remove(inbound);
        }
    }

    pub(super) fn remove(&mut self, inbound: Inbound) {
        let Some(serving) = self.counter.serving.remove(&inbound) else { return };
        if let Some(count) = self.counter.per_peer.get_mut(&serving.from) {
            *count -= 1;
            if *count == 0 {
                self.counter.per_peer.remove(&serving.from);
                self.counter.last_turn.remove(&serving.from);
            }
        }
        if !serving.queued.is_empty() {
            self.counter.line.retain(|(_, _, other, _)| *other != inbound);
        }
        self.counter.sending.remove(&inbound);
        for piece in serving.held.pieces(serving.group) {
            let Some(blob) = self.blobs.get_mut(&serving.object) else { continue };
            let Some(waiting) = blob.waiting.get_mut(&piece) else { continue };
            waiting.retain(|other| *other != inbound);
            if waiting.is_empty() {
                blob.waiting.remove(&piece);
                let idle = blob.fetches.get_mut(&piece).is_some_and(|fetch| {
                    fetch.duty = false;
                    fetch.wants.is_empty() && fetch.got == 0
                });
                if idle {
                    self.give_up(serving.object, piece);
                }
            }
        }
        if self.counter.draining {
            self.drained();
        }
    }

    pub(super) fn hung(&mut self, inbound: Inbound) {
        self.remove(inbound);
    }

    /// Tells one who waits that it is not in vain, or that it is.
    pub(super) fn watch_inbound(&mut self, inbound: Inbound) {
        let Some(serving) = self.counter.serving.get(&inbound) else { return };
        let (object, group, below, held, queued) =
            (serving.object, serving.group, serving.below, serving.held, serving.queued);
        if self.counter.sending.get(&inbound).is_some_and(|begun| self.now.since(*begun) >= LONGEST_UPLOAD) {
            self.out.push(Output::Abort { inbound });
            self.remove(inbound);
            return;
        }
        if serving.sending.is_none() && self.now.since(serving.since) >= FIRST_SIGN {
            let rests = |blob: &super::blob::Blob| self.register.rests(&blob.origin, false, self.now);
            let retry_after = self.blobs.get(&object).and_then(rests);
            let retry_after =
                retry_after.map_or(0, |until| u32::try_from(until.since(self.now).as_millis()).unwrap_or(u32::MAX));
            let mut by_depth = BTreeMap::<u8, Mask>::new();
            for piece in held.pieces(group) {
                let depth = self.depth_of(object, piece);
                match depth {
                    Some(depth) if depth < below => {
                        let mask = by_depth.entry(depth).or_default();
                        *mask = mask.or(Mask::of(piece));
                        if let Some(fetch) = self.blobs.get_mut(&object).and_then(|blob| blob.fetches.get_mut(&piece)) {
                            fetch.ceiling = fetch.ceiling.min(depth);
                        }
                    }
                    // We do not know where we stand, or not above the asker: let nobody rely on it.
                    _ => {
                        if let Some(waiting) = self.blobs.get_mut(&object).and_then(|blob| blob.waiting.get_mut(&piece))
                        {
                            waiting.retain(|other| *other != inbound);
                        }
                        self.stop_holding(inbound, piece);
                    }
                }
            }
            for (depth, mask) in by_depth {
                let frame = Frame::Pending { mask, depth: Some(depth), retry_after };
                self.out.push(Output::Answer { inbound, frame });
            }
            if !queued.is_empty() {
                self.out.push(Output::Answer {
                    inbound,
                    frame: Frame::Pending { mask: queued, depth: None, retry_after: 0 },
                });
            }
        }
        if self.counter.serving.contains_key(&inbound) {
            self.timer(self.now + self.config.pending, Timer::Inbound(inbound));
        }
    }

    /// Whether an object is being sent to anybody.
    pub(super) fn is_sending(&self, object: &Object) -> bool {
        self.counter.serving.values().any(|serving| serving.object == *object)
    }

    /// Says that we are done, if we leave and nobody waits any more.
    pub(super) fn drained(&mut self) {
        if self.counter.serving.is_empty() {
            self.out.push(Output::Drained);
        }
    }
}
