//! Getting pieces from others: whom to ask, how long to wait, what to do with what comes.

use std::time::Duration;

use super::blob::{Place, Via};
use super::grid::{GROUP, Mask, Object, group_of};
use super::members::{Homes, Peer};
use super::message::{Ask, Frame, HaveMap, Manner, Sum, Urgency, Vouch};
use super::port::{Blame, Credential, End, Event, Exchange, Failure, Output};
use super::time::Time;
use super::{Swarm, Timer};

/// An ask that is out.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) to: Peer,
    object: Object,
    group: u32,
    /// What is still to come of it.
    mask: Mask,
    manner: Manner,
    at: Time,
    /// When it last gave a sign of life; none before the first.
    heard: Option<Time>,
    /// When patience with mere promises ends.
    deadline: Time,
    hedged: bool,
    /// A piece whose bytes are coming on it.
    flowing: Option<u32>,
}

/// Where to get a piece.
#[derive(Debug)]
enum Source {
    Ask(Peer, Manner),
    /// From the registry; these may have copies and are asked at the same time.
    Read(Credential, Vec<Peer>),
    /// Nowhere before then.
    Wait(Time),
    /// Nowhere at all.
    None(Failure),
    /// It is not wanted any more.
    Done,
}

/// Whom to ask above us.
#[derive(Debug, PartialEq, Eq)]
enum Above {
    Home(Peer),
    /// Nobody: we are the home.
    Us,
    /// Nobody can be reached at the moment.
    Nobody,
}

/// How long one who was busy, or had not got it, is not asked for the same piece again.
const RETRY: Duration = Duration::from_millis(500);
/// Referrals after which the home has to give the bytes.
const REFERRALS: u8 = 2;

impl Swarm {
    /// Finds sources for what needs one, as far as the window goes.
    pub(super) fn pump(&mut self, object: Object) {
        let Some(blob) = self.blobs.get(&object) else { return };
        let todo: Vec<u32> = blob.todo.iter().take(4 * self.config.window).map(|(_, _, piece)| *piece).collect();
        for piece in todo {
            let Some(blob) = self.blobs.get(&object) else { return };
            let Some(fetch) = blob.fetches.get(&piece).filter(|_| blob.is_todo(piece)) else { continue };
            if !fetch.hedge && blob.assigned >= self.config.window {
                break;
            }
            let most =
                if fetch.urgency == Urgency::Demand { self.config.node_window } else { self.config.prefetch_window };
            if self.asked.len() + self.register.len() >= most {
                // Somebody's end will wake this.
                self.starved.insert(object);
                break;
            }
            match self.source(object, piece) {
                Source::Ask(to, manner) => self.ask(object, piece, to, manner),
                Source::Read(credential, spares) => {
                    for peer in spares {
                        self.ask(object, piece, peer, Manner::Spare);
                    }
                    self.read(object, piece, credential);
                }
                Source::Wait(until) => self.timer(until, Timer::Source(object)),
                Source::None(why) => self.fail(object, piece, why),
                Source::Done => {}
            }
        }
    }

    fn source(&mut self, object: Object, piece: u32) -> Source {
        let now = self.now;
        let Some(blob) = self.blobs.get(&object) else { return Source::None(Failure::Unavailable) };
        let Some(fetch) = blob.fetches.get(&piece) else { return Source::None(Failure::Unavailable) };
        let (no_peer, leased, stand_in) = (fetch.no_peer, fetch.lessor.is_some(), fetch.stand_in);
        let tired = now.since(fetch.progress) >= self.config.alone + fetch.patience;
        if no_peer || leased || tired {
            let source = self.by_registry(object, piece, Vec::new());
            if tired && matches!(source, Source::Read(..)) {
                self.out.push(Output::Count(Event::Alone));
            }
            if no_peer || leased || !matches!(source, Source::Wait(_)) {
                return source;
            }
        }
        if let Some(peer) = self.known_holder(object, piece) {
            return Source::Ask(peer, Manner::Holder);
        }
        if self.views == 0 {
            let end = self.started + self.config.no_view;
            return if now < end { Source::Wait(end) } else { self.by_registry(object, piece, Vec::new()) };
        }
        match self.above(object, piece) {
            Above::Home(home) if stand_in => {
                let spares = self.spares(object, piece, Some(home));
                self.by_registry(object, piece, spares)
            }
            Above::Home(home) => {
                let fetch = &self.blobs[&object].fetches[&piece];
                let manner = if fetch.referrals >= REFERRALS { Manner::BytesOnly } else { Manner::Home };
                Source::Ask(home, manner)
            }
            Above::Us => {
                let newcomer = now.since(self.started) < self.config.newcomer || self.news.claims(&object);
                let spares = if newcomer || stand_in { self.spares(object, piece, None) } else { Vec::new() };
                self.by_registry(object, piece, spares)
            }
            Above::Nobody => Source::Wait(now + RETRY / 4),
        }
    }

    /// Returns the holder that is known to be least busy, if any is idle enough.
    fn known_holder(&mut self, object: Object, piece: u32) -> Option<Peer> {
        let (now, pace, most) = (self.now, self.counter.pace(), self.config.backlog);
        let blob = self.blobs.get(&object)?;
        let fetch = blob.fetches.get(&piece)?;
        let mut best: Option<(u32, u32, Peer)> = None;
        for (peer, neighbour) in blob.known.iter() {
            let has = neighbour.have.has(piece);
            if !has && !neighbour.coming.has(piece) {
                continue;
            }
            let load = neighbour.load(now, pace);
            if load >= most || !self.usable(peer) || !self.fresh(fetch, peer) {
                continue;
            }
            // One who waits for it itself is as good as one with some pieces to send first.
            let cost = load + if has { 0 } else { 2 };
            if best.is_none_or(|(least, ..)| cost <= least) {
                let candidate = (cost, self.rng.u32(..), *peer);
                if best.is_none_or(|best| candidate < best) {
                    best = Some(candidate);
                }
            }
        }
        if best.is_none() && blob.ledgers.contains_key(&group_of(piece)) {
            return self.ledger_holder(object, piece);
        }
        best.map(|(.., peer)| peer)
    }

    /// Returns a holder that we know of because we are the home of the group.
    fn ledger_holder(&mut self, object: Object, piece: u32) -> Option<Peer> {
        let blob = self.blobs.get(&object)?;
        let fetch = blob.fetches.get(&piece)?;
        let ledger = blob.ledgers.get(&group_of(piece))?;
        let mut holders = ledger.holders(Mask::of(piece)).map(|(peer, _)| *peer);
        let found = holders.find(|peer| self.usable(peer) && self.fresh(fetch, peer))?;
        drop(holders);
        let most = self.config.neighbours;
        let now = self.now;
        self.blobs.get_mut(&object)?.known.hear(found, most, now).have.insert(piece);
        Some(found)
    }

    /// Whether a peer is worth asking for a piece: not asked at the moment, and not in vain just now.
    fn fresh(&self, fetch: &super::blob::Fetch, peer: &Peer) -> bool {
        let asked = |via: &Via| matches!(via, Via::Ask(exchange) if self.asked.get(exchange).is_some_and(|asked| asked.to == *peer));
        !fetch.sources.iter().any(asked) && fetch.tried.get(peer).is_none_or(|until| *until <= self.now)
    }

    /// Returns the homes of a group for us.
    pub(super) fn homes(&mut self, object: Object, group: u32) -> Homes {
        let (view, number, me) = (self.view.clone(), self.views, self.me);
        match self.blobs.get_mut(&object) {
            Some(blob) => blob.homes(group, number, || view.homes(&me, &object, group)).clone(),
            None => view.homes(&me, &object, group),
        }
    }

    fn above(&mut self, object: Object, piece: u32) -> Above {
        let homes = self.homes(object, group_of(piece));
        let Some(fetch) = self.blobs.get(&object).and_then(|blob| blob.fetches.get(&piece)) else {
            return Above::Nobody;
        };
        let mut alive = false;
        for line in [&homes.zone, &homes.all] {
            for peer in line {
                if *peer == self.me {
                    if std::ptr::eq(line, &homes.all) {
                        return Above::Us;
                    }
                    break;
                }
                if self.usable(peer) {
                    alive = true;
                    if self.fresh(fetch, peer) {
                        return Above::Home(*peer);
                    }
                }
            }
        }
        if alive {
            return Above::Nobody;
        }
        // All that were to be asked are dead for us: the cluster is cut, or falling apart. Whoever is left has homes, too.
        let rest = self.view.homes_among(&object, group_of(piece), |peer| *peer == self.me || self.usable(peer));
        match rest.into_iter().find(|peer| *peer == self.me || self.fresh(fetch, peer)) {
            Some(peer) if peer == self.me => Above::Us,
            Some(peer) => Above::Home(peer),
            None => Above::Us,
        }
    }

    /// Returns whom a home asks for copies before it believes that there are none.
    fn spares(&mut self, object: Object, piece: u32, home: Option<Peer>) -> Vec<Peer> {
        let homes = self.homes(object, group_of(piece));
        let Some(fetch) = self.blobs.get(&object).and_then(|blob| blob.fetches.get(&piece)) else { return Vec::new() };
        let claimed = self.news.claimants(&object);
        let all = home.into_iter().chain(homes.all).chain(homes.zone).take(4).chain(claimed);
        let mut spares = Vec::new();
        for peer in all {
            if self.usable(&peer) && self.fresh(fetch, &peer) && !spares.contains(&peer) && spares.len() < 3 {
                spares.push(peer);
            }
        }
        spares
    }

    /// Decides as whom the registry is read, and whether it may be now.
    fn by_registry(&mut self, object: Object, piece: u32, spares: Vec<Peer>) -> Source {
        let Some(blob) = self.blobs.get(&object) else { return Source::None(Failure::Unavailable) };
        let Some(fetch) = blob.fetches.get(&piece) else { return Source::None(Failure::Unavailable) };
        if let Some(until) = self.register.rests(&blob.origin, self.now) {
            return Source::Wait(until);
        }
        if fetch.urgency == Urgency::Prefetch
            && let Some(until) = self.register.budget(self.config.prefetch_rate, self.now)
        {
            return Source::Wait(until);
        }
        let token = self.token_for(object, piece);
        let denied = blob.denied.is_some_and(|until| until > self.now);
        match token {
            Some(caller) => Source::Read(Credential::Caller(caller), spares),
            None if !denied => Source::Read(Credential::Own, spares),
            None if !spares.is_empty() => Source::Ask(spares[0], Manner::Spare),
            None => self.lease_or_wait(object, piece),
        }
    }

    /// The registry does not let us read it: somebody who waits here may, or nobody.
    fn lease_or_wait(&mut self, object: Object, piece: u32) -> Source {
        let Some(fetch) = self.blobs.get(&object).and_then(|blob| blob.fetches.get(&piece)) else {
            return Source::None(Failure::Refused);
        };
        let tired = self.now.since(fetch.progress) >= self.config.alone + fetch.patience;
        match self.lease_out(object, piece) {
            None => Source::Done,
            Some(_) if tired => Source::None(Failure::Refused),
            Some(until) => Source::Wait(until),
        }
    }

    /// Whether an exchange only looks for copies.
    pub(super) fn is_spare(&self, exchange: Exchange) -> bool {
        self.asked.get(&exchange).is_some_and(|asked| asked.manner == Manner::Spare)
    }

    fn ask(&mut self, object: Object, piece: u32, to: Peer, manner: Manner) {
        let group = group_of(piece);
        let now = self.now;
        let Some(blob) = self.blobs.get(&object) else { return };
        let Some(first) = blob.fetches.get(&piece) else { return };
        let (urgency, offset) = (first.urgency, first.got);
        let mut mask = Mask::of(piece);
        // Neighbours that need the same: one ask for all, except that a broken off piece is continued by itself.
        for (other, fetch) in blob.fetches.range(group * GROUP..(group + 1) * GROUP) {
            let needs = blob.is_todo(*other) && fetch.hedge == first.hedge && !fetch.no_peer && fetch.lessor.is_none();
            if offset > 0 || !needs || fetch.got > 0 || *other == piece || !self.fresh(fetch, &to) {
                continue;
            }
            let useful = match manner {
                Manner::Home | Manner::Spare => fetch.referrals < REFERRALS,
                Manner::BytesOnly => fetch.referrals >= REFERRALS,
                Manner::Holder => {
                    let neighbour = blob.known.get(&to);
                    let load = neighbour.map_or(0, |neighbour| neighbour.load(now, self.counter.pace()));
                    neighbour.is_some_and(|neighbour| neighbour.have.has(*other))
                        && load + mask.len() < self.config.backlog
                        && mask.len() < self.config.run
                }
            };
            if useful {
                mask = mask.or(Mask::of(*other));
            }
        }
        let below = mask.pieces(group).filter_map(|piece| blob.fetches.get(&piece)).map(|fetch| fetch.ceiling).min();
        let ask = Ask {
            object,
            size: blob.size,
            origin: blob.origin.clone(),
            group,
            mask,
            offset,
            manner,
            below: below.unwrap_or(u8::MAX),
            urgency,
            can_read: self.token_for(object, piece).is_some(),
        };
        let exchange = Exchange(self.number());
        let Some(blob) = self.blobs.get_mut(&object) else { return };
        for piece in mask.pieces(group) {
            blob.assign(piece, Via::Ask(exchange));
            if let Some(fetch) = blob.fetches.get_mut(&piece) {
                fetch.mixed |= offset > 0;
            }
        }
        if let Some(neighbour) = blob.known.get_mut(&to) {
            neighbour.asked += mask.len();
        }
        let deadline = now + self.config.deadline;
        let asked =
            Asked { to, object, group, mask, manner, at: now, heard: None, deadline, hedged: false, flowing: None };
        self.asked.insert(exchange, asked);
        self.timer(now + self.standings.hedge(self.config.hedge), Timer::Exchange(exchange));
        self.out.push(Output::Ask { exchange, to, ask });
    }

    /// Takes a piece off an exchange; without any it is over. Tells whether it had it.
    fn settle_piece(&mut self, exchange: Exchange, piece: u32) -> bool {
        let Some(asked) = self.asked.get_mut(&exchange) else { return false };
        if group_of(piece) != asked.group || !asked.mask.has(piece) {
            return false;
        }
        asked.mask = asked.mask.without(Mask::of(piece));
        if asked.flowing == Some(piece) {
            asked.flowing = None;
        }
        let (to, object, over) = (asked.to, asked.object, asked.mask.is_empty());
        if over {
            self.asked.remove(&exchange);
            self.dirty.append(&mut self.starved);
        }
        if let Some(blob) = self.blobs.get_mut(&object) {
            blob.unassign(piece, Via::Ask(exchange));
            if let Some(neighbour) = blob.known.get_mut(&to) {
                neighbour.asked = neighbour.asked.saturating_sub(1);
            }
            self.dirty.insert(object);
        }
        true
    }

    /// A piece came from elsewhere, or is not wanted any more.
    pub(super) fn drop_from_ask(&mut self, exchange: Exchange, piece: u32) {
        if self.settle_piece(exchange, piece) && !self.asked.contains_key(&exchange) {
            self.out.push(Output::Leave { exchange });
        }
    }

    /// Leaves a source; its pieces need another one. Until then it is not asked for them.
    fn leave(&mut self, exchange: Exchange, until: Time) {
        let Some(asked) = self.asked.get(&exchange) else { return };
        let (object, group, mask, to) = (asked.object, asked.group, asked.mask, asked.to);
        self.out.push(Output::Leave { exchange });
        for piece in mask.pieces(group) {
            self.give_back(exchange, object, piece, to, until);
        }
    }

    /// A source will not give a piece.
    fn give_back(&mut self, exchange: Exchange, object: Object, piece: u32, to: Peer, until: Time) {
        if self.settle_piece(exchange, piece)
            && let Some(fetch) = self.blobs.get_mut(&object).and_then(|blob| blob.fetches.get_mut(&piece))
        {
            fetch.tried.insert(to, until);
        }
    }

    fn sign_of_life(&mut self, exchange: Exchange) -> Option<(Peer, Object, u32, Manner)> {
        let now = self.now;
        let asked = self.asked.get_mut(&exchange)?;
        if asked.heard.is_none() {
            self.standings.answered(now.since(asked.at));
        }
        asked.heard = Some(now);
        let found = (asked.to, asked.object, asked.group, asked.manner);
        self.standings.heard(asked.to, now);
        Some(found)
    }

    pub(super) fn framed(&mut self, exchange: Exchange, frame: Frame) {
        let Some((to, object, group, manner)) = self.sign_of_life(exchange) else { return };
        let Some(asked) = self.asked.get(&exchange) else { return };
        let mask = frame.mask().and(asked.mask);
        let now = self.now;
        match frame {
            Frame::Pending { depth, retry_after, .. } => {
                if retry_after > 0 && depth == Some(0) {
                    let origin = self.blobs.get(&object).map(|blob| blob.origin.clone()).unwrap_or_default();
                    self.register.rest(
                        &origin,
                        now + Duration::from_millis(u64::from(retry_after)).min(super::read::LONGEST_REST),
                    );
                }
                for piece in mask.pieces(group) {
                    self.promised(exchange, object, piece, depth, to);
                }
            }
            Frame::Refer { holders, .. } => {
                let most = self.config.neighbours;
                let useful = manner == Manner::Home && holders.iter().any(|holder| self.usable(&holder.peer));
                let Some(blob) = self.blobs.get_mut(&object) else { return };
                for holder in holders.iter().filter(|holder| useful && holder.peer != self.me) {
                    let neighbour = blob.known.hear(holder.peer, most, now);
                    for piece in holder.have.pieces(group) {
                        neighbour.have.insert(piece);
                    }
                    for piece in holder.coming.pieces(group) {
                        neighbour.coming.insert(piece);
                    }
                    blob.known.busy(&holder.peer, holder.backlog, now);
                }
                for piece in mask.pieces(group) {
                    // A referral that was not asked for is no answer.
                    let until = if useful { now } else { now + RETRY };
                    self.give_back(exchange, object, piece, to, until);
                    if let Some(fetch) = self.blobs.get_mut(&object).and_then(|blob| blob.fetches.get_mut(&piece)) {
                        fetch.referrals = fetch.referrals.saturating_add(1);
                        fetch.progress = now;
                    }
                }
            }
            Frame::Busy { .. } => {
                if let Some(blob) = self.blobs.get_mut(&object) {
                    blob.known.busy(&to, u8::try_from(2 * self.config.backlog).unwrap_or(u8::MAX), now);
                }
                mask.pieces(group).for_each(|piece| self.give_back(exchange, object, piece, to, now + RETRY / 4));
            }
            Frame::Gone { .. } | Frame::Denied { .. } => {
                for piece in mask.pieces(group) {
                    if let Some(blob) = self.blobs.get_mut(&object) {
                        blob.known.miss(&to, piece);
                    }
                    self.give_back(exchange, object, piece, to, now + RETRY);
                }
            }
            Frame::Lease { .. } => {
                for piece in mask.pieces(group) {
                    self.give_back(exchange, object, piece, to, now);
                    self.take_lease(object, piece, to);
                }
            }
            Frame::Map(map) => self.mapped(object, to, map),
        }
    }

    /// A source says that a piece will come.
    fn promised(&mut self, exchange: Exchange, object: Object, piece: u32, depth: Option<u8>, to: Peer) {
        let now = self.now;
        let Some(fetch) = self.blobs.get_mut(&object).and_then(|blob| blob.fetches.get_mut(&piece)) else { return };
        fetch.progress = now;
        let stands = depth.map_or(0, |depth| depth.saturating_add(1));
        if depth.is_some_and(|depth| depth >= fetch.ceiling) {
            // It fell behind where we stand: waiting for it could be waiting for ourselves.
            self.give_back(exchange, object, piece, to, now + RETRY);
            return;
        }
        let mine = stands.max(1);
        fetch.depth = Some(fetch.depth.map_or(mine, |depth| depth.min(mine)));
        // A registry that was only asked to be sure is not needed, unless it was faster.
        let readings: Vec<Via> = fetch.sources.iter().filter(|via| matches!(via, Via::Read(_))).copied().collect();
        if fetch.got == 0 && !fetch.no_peer {
            for via in readings {
                self.let_go(via, object, piece);
            }
        }
    }

    fn mapped(&mut self, object: Object, from: Peer, map: HaveMap) {
        let (most, now, me) = (self.config.neighbours, self.now, self.me);
        let quarantined: Vec<bool> = map.others.iter().map(|(peer, _)| self.standings.quarantined(peer, now)).collect();
        let Some(blob) = self.blobs.get_mut(&object) else { return };
        blob.known.map(from, map.have, map.coming, map.backlog, most, now);
        for ((peer, have), quarantined) in map.others.into_iter().zip(quarantined) {
            if peer != me && !quarantined {
                blob.known.hear_of(peer, have, most, now);
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
        let Some(fetch) = self.blobs.get_mut(&object).and_then(|blob| blob.fetches.get_mut(&piece)) else { return };
        fetch.progress = now;
        fetch.got = fetch.got.max(got);
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
        let vouch = vouch.filter(|vouch| vouch.sum == sum && !self.standings.quarantined(&vouch.by, self.now));
        let Some(vouch) = vouch else {
            self.out.push(Output::Reject { exchange, piece });
            fetch.got = 0;
            fetch.mixed = false;
            self.give_back(exchange, object, piece, to, self.now + RETRY);
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
            self.give_back(exchange, object, piece, to, self.now);
            if let Some(fetch) = self.blobs.get_mut(&object).and_then(|blob| blob.fetches.get_mut(&piece)) {
                fetch.no_peer = true;
            }
            return;
        }
        if let Some(asked) = self.asked.get_mut(&exchange) {
            asked.deadline = self.now + self.config.deadline;
        }
        self.settle_piece(exchange, piece);
        self.gain(Some(exchange), object, piece);
        // A home knows what it gave us.
        if manner == Manner::Holder || manner == Manner::Spare {
            self.tell(object, piece);
        }
    }

    pub(super) fn ended(&mut self, exchange: Exchange, end: End) {
        let Some(asked) = self.asked.get(&exchange) else { return };
        let (object, group, mask, to) = (asked.object, asked.group, asked.mask, asked.to);
        if end != End::Finished {
            self.bury(to);
        }
        for piece in mask.pieces(group) {
            self.give_back(exchange, object, piece, to, self.now + RETRY);
        }
    }

    pub(super) fn watch_exchange(&mut self, exchange: Exchange) {
        let now = self.now;
        let (hedge, silence) = (self.standings.hedge(self.config.hedge), self.config.silence);
        let Some(asked) = self.asked.get(&exchange) else { return };
        let silent_at = asked.heard.unwrap_or(asked.at) + silence;
        let hedge_at = asked.at + hedge;
        let (object, group, mask, to) = (asked.object, asked.group, asked.mask, asked.to);
        if now >= silent_at {
            self.out.push(Output::Count(Event::Silent));
            self.bury(to);
            self.leave(exchange, now + RETRY);
            return;
        }
        if now >= asked.deadline {
            self.leave(exchange, now + self.config.deadline);
            return;
        }
        let mut next = silent_at.min(asked.deadline);
        if asked.heard.is_none() && !asked.hedged {
            if now >= hedge_at {
                if let Some(asked) = self.asked.get_mut(&exchange) {
                    asked.hedged = true;
                }
                self.out.push(Output::Count(Event::Hedge));
                if let Some(blob) = self.blobs.get_mut(&object) {
                    mask.pieces(group).for_each(|piece| blob.hedge(piece));
                }
                self.dirty.insert(object);
            } else {
                next = next.min(hedge_at);
            }
        }
        self.timer(next, Timer::Exchange(exchange));
    }

    /// Looks whether a fetch gets on; one that does not will read the registry itself.
    pub(super) fn watch_fetch(&mut self, place: Place) {
        let now = self.now;
        let Some(blob) = self.blobs.get_mut(&place.object) else { return };
        let Some(fetch) = blob.fetches.get(&place.piece) else { return };
        let end = fetch.progress + (self.config.alone + fetch.patience);
        if now < end {
            self.timer(end, Timer::Fetch(place));
            return;
        }
        let reads = fetch.sources.iter().any(|via| matches!(via, Via::Read(_)));
        if !reads && !fetch.sources.is_empty() {
            blob.hedge(place.piece);
        }
        self.dirty.insert(place.object);
        self.timer(now + self.config.alone, Timer::Fetch(place));
    }
}
