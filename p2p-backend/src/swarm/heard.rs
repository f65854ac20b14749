//! What those who were asked say and send, and what is believed of it.

use std::time::Duration;

use super::Swarm;
use super::ask::{RETRY, SOON};
use super::blob::{Vain, Via};
use super::grid::{Mask, Object, Pieces, group_of};
use super::members::Peer;
use super::message::{Frame, HaveMap, Holder, Manner, Sum, Vouch};
use super::port::{Blame, End, Exchange, Output};

impl Swarm {
    pub(super) fn sign_of_life(&mut self, exchange: Exchange) -> Option<(Peer, Object, u32, Manner)> {
        let now = self.now;
        let asked = self.asked.get_mut(&exchange)?;
        if asked.heard.is_none() {
            self.standings.answered(now.since(asked.at));
        }
        asked.heard = Some(now);
        let found = (asked.to, asked.object, asked.group, asked.manner);
        self.standings.heard(asked.to);
        Some(found)
    }

    pub(super) fn framed(&mut self, exchange: Exchange, frame: Frame) {
        let Some((to, object, group, manner)) = self.sign_of_life(exchange) else { return };
        let Some(asked) = self.asked.get(&exchange) else { return };
        let mask = frame.mask().and(asked.mask);
        let now = self.now;
        match frame {
            Frame::Pending { depth, retry_after, .. } => {
                if retry_after > 0 && depth == Some(0) && matches!(manner, Manner::Home | Manner::BytesOnly) {
                    let origin = self.blobs.get(&object).map(|blob| blob.origin.clone()).unwrap_or_default();
                    self.register.said_to_rest(&origin, now + Duration::from_millis(u64::from(retry_after)), now);
                }
                for piece in mask.pieces(group) {
                    self.promised(exchange, object, piece, depth, to);
                }
            }
            Frame::Refer { holders, .. } => {
                let useful = manner == Manner::Home && holders.iter().any(|holder| self.usable(&holder.peer));
                if useful {
                    self.hear_of(object, group, &holders);
                }
                for piece in mask.pieces(group) {
                    // A referral that was not asked for is no answer.
                    let until = if useful { now } else { now + RETRY };
                    self.give_back(exchange, object, piece, to, Vain { until, skip: !useful });
                    if let Some(fetch) = self.blobs.get_mut(&object).and_then(|blob| blob.fetches.get_mut(&piece)) {
                        fetch.referrals = fetch.referrals.saturating_add(1);
                        fetch.progress = now;
                    }
                }
            }
            Frame::Busy { holders, .. } => {
                self.hear_of(object, group, &holders);
                let backlog = u8::try_from(2 * self.config.backlog).unwrap_or(u8::MAX);
                self.standings.busy(to, backlog, self.counter.pace(), now);
                for piece in mask.pieces(group) {
                    self.give_back(exchange, object, piece, to, Vain { until: now + RETRY / 4, skip: false });
                    if manner == Manner::Home || manner == Manner::BytesOnly {
                        self.rebuffed(object, piece);
                    }
                }
            }
            Frame::Gone { .. } | Frame::Denied { .. } => {
                for piece in mask.pieces(group) {
                    if let Some(blob) = self.blobs.get_mut(&object) {
                        blob.known.miss(&to, piece);
                    }
                    self.give_back(exchange, object, piece, to, Vain { until: now + RETRY, skip: true });
                }
            }
            Frame::Lease { .. } => {
                for piece in mask.pieces(group) {
                    let asks_home = matches!(manner, Manner::Home | Manner::BytesOnly);
                    let may = asks_home && self.token_for(object, piece).is_some();
                    // Who leases what we cannot read, or has nothing to lease, is not asked at once again.
                    let until = if may { now } else { now + RETRY };
                    self.give_back(exchange, object, piece, to, Vain { until, skip: !may });
                    if may {
                        self.take_lease(object, piece, to);
                    }
                }
            }
            Frame::Map(map) => self.mapped(object, to, map),
        }
    }

    /// A home has too much to do: that is a sign of life, but not for ever.
    pub(super) fn rebuffed(&mut self, object: Object, piece: u32) {
        let now = self.now;
        let Some(fetch) = self.blobs.get_mut(&object).and_then(|blob| blob.fetches.get_mut(&piece)) else { return };
        fetch.rebuffs = fetch.rebuffs.saturating_add(1);
        if fetch.begun.is_some_and(|begun| now.since(begun) < self.config.deadline) {
            fetch.progress = now;
        }
    }

    /// Somebody names holders of a group.
    pub(super) fn hear_of(&mut self, object: Object, group: u32, holders: &[Holder]) {
        let (most, now, pace) = (self.config.neighbours, self.now, self.counter.pace());
        for holder in holders {
            let set = |mask: Mask| mask.pieces(group).collect();
            if self.is_member(&holder.peer)
                && let Some(blob) = self.blobs.get_mut(&object)
            {
                blob.known.hear_of(holder.peer, &set(holder.have), &set(holder.coming), most, now);
                self.standings.hint(holder.peer, self.believable(holder.backlog), pace, now);
            }
        }
    }

    /// Returns how much to do another one has as somebody says, who cannot make it look busier than not to be asked.
    pub(super) fn believable(&self, backlog: u8) -> u8 {
        backlog.min(u8::try_from(2 * self.config.backlog).unwrap_or(u8::MAX))
    }

    /// A source says that a piece will come.
    pub(super) fn promised(&mut self, exchange: Exchange, object: Object, piece: u32, depth: Option<u8>, to: Peer) {
        let now = self.now;
        let Some(fetch) = self.blobs.get_mut(&object).and_then(|blob| blob.fetches.get_mut(&piece)) else { return };
        let stands = depth.map_or(0, |depth| depth.saturating_add(1));
        if depth.is_some_and(|depth| depth >= fetch.ceiling) {
            // It fell behind where we stand: waiting for it could be waiting for ourselves.
            self.drop_from_ask(exchange, piece);
            if let Some(fetch) = self.blobs.get_mut(&object).and_then(|blob| blob.fetches.get_mut(&piece)) {
                fetch.tried.insert(to, Vain { until: now + RETRY, skip: true });
            }
            return;
        }
        fetch.progress = now;
        let mine = stands.max(1);
        // With two sources it is the deeper one that counts: the other may go, and then we wait for this.
        fetch.depth = fetch.depth.max(Some(mine));
        // A registry that was only asked to be sure is not needed, unless it was faster, or is the last hope.
        let readings: Vec<Via> = fetch.sources.iter().filter(|via| matches!(via, Via::Read(_))).copied().collect();
        if fetch.got == 0 && !fetch.no_peer && !fetch.alone {
            for via in readings {
                self.let_go(via, object, piece);
            }
        }
    }

    pub(super) fn mapped(&mut self, object: Object, from: Peer, map: HaveMap) {
        let (most, now, pace) = (self.config.neighbours, self.now, self.counter.pace());
        let Some(blob) = self.blobs.get_mut(&object) else { return };
        let end = blob.of_interest();
        blob.known.map(from, map.have.below(end), map.coming.below(end), most, now);
        self.standings.busy(from, map.backlog, pace, now);
        for other in map.others {
            if self.is_member(&other.peer)
                && !self.standings.quarantined(&other.peer, now)
                && let Some(blob) = self.blobs.get_mut(&object)
            {
                blob.known.hear_of(other.peer, &other.have.below(end), &Pieces::new(), most, now);
                self.standings.hint(other.peer, self.believable(other.backlog), pace, now);
            }
        }
    }

    pub(super) fn bytes(&mut self, exchange: Exchange, piece: u32, got: u32) {
        let Some((_, object, group, _)) = self.sign_of_life(exchange) else { return };
        let now = self.now;
        let Some(asked) = self.asked.get_mut(&exchange) else { return };
        if group_of(piece) != group || !asked.mask.has(piece) {
            return;
        }
        let begins = asked.flowing != Some(piece);
        asked.flowing = Some(piece);
        asked.got = got;
        if begins {
            asked.mark = (now, got);
        }
        let Some(fetch) = self.blobs.get_mut(&object).and_then(|blob| blob.fetches.get_mut(&piece)) else { return };
        fetch.progress = now;
        fetch.got = fetch.got.max(got);
        fetch.pure = false;
        fetch.depth = fetch.depth.or(Some(1));
        if !begins {
            return;
        }
        // What flows wins; whoever else was asked for it need not begin.
        let others: Vec<Via> = fetch.sources.iter().copied().filter(|via| *via != Via::Ask(exchange)).collect();
        for via in others {
            let flows = match via {
                Via::Ask(other) => self.asked.get(&other).is_some_and(|asked| asked.flowing == Some(piece)),
                Via::Read(reading) => self.register.flows(reading, piece),
            };
            if !flows {
                self.let_go(via, object, piece);
            }
        }
    }

    pub(super) fn arrived(&mut self, exchange: Exchange, piece: u32, sum: Sum, vouch: Option<Vouch>) {
        let Some((to, object, _, manner)) = self.sign_of_life(exchange) else {
            self.out.push(Output::Reject { exchange, piece });
            return;
        };
        let fetch = self.blobs.get_mut(&object).and_then(|blob| blob.fetches.get_mut(&piece));
        let asked_for =
            self.asked.get(&exchange).is_some_and(|asked| group_of(piece) == asked.group && asked.mask.has(piece));
        let Some(fetch) = fetch.filter(|_| asked_for) else {
            self.out.push(Output::Reject { exchange, piece });
            return;
        };
        let mixed = fetch.mixed;
        let vouch = vouch.filter(|vouch| vouch.sum == sum);
        if let Some(vouch) = vouch
            && self.standings.quarantined(&vouch.by, self.now)
        {
            // The sender is as good as it knew. Those who have the same are no better, so the home has to see to it.
            self.out.push(Output::Reject { exchange, piece });
            (fetch.got, fetch.mixed, fetch.doubted) = (0, false, true);
            let until = self.now + RETRY;
            self.give_back(exchange, object, piece, to, Vain { until, skip: manner != Manner::Home });
            return;
        }
        let Some(vouch) = vouch else {
            self.out.push(Output::Reject { exchange, piece });
            fetch.got = 0;
            fetch.mixed = false;
            self.give_back(exchange, object, piece, to, Vain { until: self.now + RETRY, skip: true });
            // With two senders of one piece nobody knows whose part was wrong.
            if !mixed {
                self.quarantine(to, Blame::Bytes, object, piece);
            }
            return;
        };
        let finding = self.blobs.get_mut(&object).map(|blob| blob.records.vouched(piece, vouch)).unwrap_or_default();
        self.judge(object, piece, &finding);
        if finding.disputed || finding.two_faced.is_some() {
            self.out.push(Output::Reject { exchange, piece });
            self.give_back(exchange, object, piece, to, Vain { until: self.now, skip: false });
            if let Some(fetch) = self.blobs.get_mut(&object).and_then(|blob| blob.fetches.get_mut(&piece)) {
                fetch.no_peer = true;
            }
            return;
        }
        if let Some(asked) = self.asked.get_mut(&exchange) {
            asked.deadline = self.now + self.config.deadline;
        }
        self.standings.gave(to);
        self.settle_piece(exchange, piece);
        self.intake.took(self.now);
        self.gain(Some(exchange), object, piece);
        // A home knows what it gave us.
        if manner == Manner::Holder || manner == Manner::Spare {
            self.tell(object, piece);
        }
    }

    pub(super) fn ended(&mut self, exchange: Exchange, end: End) {
        let Some(asked) = self.asked.get(&exchange) else { return };
        let (object, group, mask, to) = (asked.object, asked.group, asked.mask, asked.to);
        // A connection that broke may have lost only what was on it: whoever is dead refuses the next one.
        let mut vain = Vain { until: self.now + RETRY, skip: true };
        if end == End::Broken && !self.standings.broke(to, self.now) {
            vain = Vain { until: self.now + SOON, skip: false };
        } else if end != End::Finished {
            self.bury(to);
        }
        for piece in mask.pieces(group) {
            self.give_back(exchange, object, piece, to, vain);
        }
    }
}
