//! Getting pieces from others: whom to ask, how long to wait, what to do with what comes.

use std::time::Duration;

use super::blob::{Place, Vain, Via};
use super::grid::{GROUP, Mask, Object, Pieces, group_of};
use super::members::{Homes, Peer};
use super::message::{Ask, Frame, HaveMap, Holder, Manner, Origin, Sum, Urgency, Vouch};
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
    /// It took so long that we looked whether others lost patience with it.
    doubted: bool,
    /// A piece whose bytes are coming on it.
    flowing: Option<u32>,
}

/// Where to get a piece.
#[derive(Debug)]
enum Source {
    Ask(Peer, Manner),
    /// From the registry; these may have copies and are asked at the same time.
    Read(Origin, Credential, Vec<Peer>),
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
    /// The home, but not before then.
    Busy(Time),
    /// Nobody can be reached at the moment.
    Nobody,
}

/// How long one who was busy, or had not got it, is not asked for the same piece again.
const RETRY: Duration = Duration::from_millis(500);
/// Referrals after which the home has to give the bytes.
const REFERRALS: u8 = 2;
/// When to look again for somebody who is just too busy.
const SOON: Duration = Duration::from_millis(10);
/// Whom a home asks for copies at most.
const SPARES: usize = 4;
/// A wait without any byte for so long takes no room from other pieces.
const STUCK: Duration = Duration::from_secs(1);
/// Times that a home sends another one away before that one reads the registry.
const REBUFFS: u8 = 2;
/// A node does not ask for more than it can take within this time.
const AHEAD: Duration = Duration::from_millis(150);

impl Swarm {
    /// Finds sources for what needs one, as far as the window goes.
    pub(super) fn pump(&mut self, object: Object) {
        let Some(blob) = self.blobs.get(&object) else { return };
        let window = self.intake.window(self.config.window, AHEAD) + self.stuck(Some(object));
        let todo: Vec<u32> = blob.todo.iter().map(|(_, _, piece)| *piece).collect();
        for piece in todo {
            let Some(blob) = self.blobs.get(&object) else { return };
            let Some(fetch) = blob.fetches.get(&piece).filter(|_| blob.is_todo(piece)) else { continue };
            if !fetch.hedge && !fetch.duty && blob.assigned >= window {
                // It only waits its turn, which is no lack of progress.
                if let Some(fetch) = self.blobs.get_mut(&object).and_then(|blob| blob.fetches.get_mut(&piece)) {
                    fetch.begun = None;
                }
                continue;
            }
            if !fetch.duty && !self.has_room(fetch.urgency) {
                // Somebody's end will wake this.
                self.starved.insert((std::cmp::Reverse(fetch.urgency), object));
                break;
            }
            match self.source(object, piece) {
                Source::Ask(to, manner) => self.ask(object, piece, to, manner),
                Source::Read(origin, credential, spares) => {
                    for peer in spares {
                        self.ask(object, piece, peer, Manner::Spare);
                    }
                    self.read(object, piece, origin, credential);
                }
                Source::Wait(until) => self.timer(until, Timer::Source(object)),
                Source::None(why) => self.fail(object, piece, why),
                Source::Done => {}
            }
        }
    }

    /// Whether this node may ask for more.
    pub(super) fn has_room(&self, urgency: Urgency) -> bool {
        let most = if urgency == Urgency::Demand { self.config.node_window } else { self.config.prefetch_window };
        self.asked.len() + self.register.len() < most + self.stuck(None)
    }

    /// Returns how many pieces, of an object or in all, wait for long at somebody who only promises.
    fn stuck(&self, object: Option<Object>) -> usize {
        let waits = |asked: &&Asked| asked.flowing.is_none() && self.now.since(asked.at) > STUCK;
        let of = |asked: &&Asked| object.is_none_or(|object| asked.object == object);
        let all = self.asked.values().filter(waits).filter(of);
        all.map(|asked| if object.is_some() { asked.mask.len() as usize } else { 1 }).sum()
    }

    fn source(&mut self, object: Object, piece: u32) -> Source {
        let now = self.now;
        let Some(blob) = self.blobs.get_mut(&object) else { return Source::None(Failure::Unavailable) };
        let Some(fetch) = blob.fetches.get_mut(&piece) else { return Source::None(Failure::Unavailable) };
        if fetch.begun.is_none() {
            fetch.begun = Some(now);
            fetch.progress = now;
        }
        fetch.next_is_registry = false;
        let (no_peer, leased, doubted) = (fetch.no_peer, fetch.lessor.is_some(), fetch.doubted);
        // Others take us for the home, and whom we take for it has nothing for us: their view is as good as ours.
        let ours = fetch.duty && fetch.rebuffs >= REBUFFS;
        let tired = now.since(fetch.progress) >= self.config.alone + fetch.patience;
        if no_peer || leased || tired {
            let source = self.by_registry(object, piece, Vec::new());
            if tired
                && matches!(source, Source::Read(..))
                && self.homes(object, group_of(piece)).all.first() != Some(&self.me)
            {
                self.out.push(Output::Count(Event::Alone));
            }
            if no_peer || leased || !matches!(source, Source::Wait(_)) {
                return source;
            }
        }
        if !doubted && let Some(peer) = self.known_holder(object, piece) {
            return Source::Ask(peer, Manner::Holder);
        }
        if self.views == 0 {
            let end = self.started + self.config.no_view;
            return if now < end { Source::Wait(end) } else { self.by_registry(object, piece, Vec::new()) };
        }
        match if ours { Above::Us } else { self.above(object, piece) } {
            Above::Home(home) => {
                let fetch = &self.blobs[&object].fetches[&piece];
                let manner =
                    if fetch.referrals >= REFERRALS || fetch.doubted { Manner::BytesOnly } else { Manner::Home };
                Source::Ask(home, manner)
            }
            Above::Us => {
                if let Some(until) = self.holder_later(object, piece).filter(|_| !doubted) {
                    return Source::Wait(until);
                }
                let spares =
                    if !doubted && self.may_exist(object, piece) { self.spares(object, piece) } else { Vec::new() };
                self.by_registry(object, piece, spares)
            }
            Above::Busy(until) => Source::Wait(until),
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
            let load = self.standings.load(peer, pace, now);
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

    /// Tells when a holder can be asked again that was busy, or that reads the piece in our stead: better late than twice.
    fn holder_later(&mut self, object: Object, piece: u32) -> Option<Time> {
        let now = self.now;
        let blob = self.blobs.get_mut(&object)?;
        let leased = blob.ledgers.get_mut(&group_of(piece)).is_some_and(|ledger| ledger.leased(now).has(piece));
        let blob = self.blobs.get(&object)?;
        let fetch = blob.fetches.get(&piece)?;
        let soon = leased.then(|| now + SOON);
        let known = blob.known.iter().filter(|(_, neighbour)| neighbour.have.has(piece)).map(|(peer, _)| peer);
        let ledger = blob.ledgers.get(&group_of(piece));
        let listed = ledger.into_iter().flat_map(|ledger| ledger.holders(Mask::of(piece))).map(|(peer, _)| peer);
        let able = known.chain(listed).filter(|peer| self.usable(peer));
        let until =
            |peer: &Peer| fetch.tried.get(peer).map_or(Some(now + SOON), |vain| (!vain.skip).then_some(vain.until));
        able.filter_map(until).map(|until| until.max(now + SOON)).chain(soon).min()
    }

    /// Whether a peer is worth asking for a piece: not asked at the moment, and not in vain just now.
    fn fresh(&self, fetch: &super::blob::Fetch, peer: &Peer) -> bool {
        let asked = |via: &Via| matches!(via, Via::Ask(exchange) if self.asked.get(exchange).is_some_and(|asked| asked.to == *peer));
        !fetch.sources.iter().any(asked) && fetch.tried.get(peer).is_none_or(|vain| vain.until <= self.now)
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
        for line in [&homes.zone, &homes.all] {
            for peer in line {
                if *peer == self.me {
                    if std::ptr::eq(line, &homes.all) {
                        return Above::Us;
                    }
                    break;
                }
                if self.usable(peer) {
                    if self.fresh(fetch, peer) {
                        return Above::Home(*peer);
                    }
                    // One that has much to do is the home all the same: another one would read the registry again.
                    if let Some(vain) = fetch.tried.get(peer).filter(|vain| !vain.skip && vain.until > self.now) {
                        return Above::Busy(vain.until);
                    }
                }
            }
        }
        // All that were to be asked are dead for us: the cluster is cut, or falling apart. Whoever is left has homes, too.
        let rest = self.view.homes_among(&object, group_of(piece), |peer| *peer == self.me || self.usable(peer));
        match rest.into_iter().find(|peer| *peer == self.me || self.fresh(fetch, peer)) {
            Some(peer) if peer == self.me => Above::Us,
            Some(peer) => Above::Home(peer),
            None => Above::Us,
        }
    }

    /// Whether there may be copies of a piece that we as its home do not know of: we are new, the home was another one
    /// until now, or somebody says so.
    fn may_exist(&mut self, object: Object, piece: u32) -> bool {
        let first = self.homes(object, group_of(piece)).all.first() == Some(&self.me);
        !first || self.now.since(self.started) < self.config.newcomer || self.news.claims(&object)
    }

    /// Returns whom a home asks for copies before it believes that there are none: those who were home before it or will
    /// be after it, those who say that they have some, and those who are known to have the most.
    fn spares(&mut self, object: Object, piece: u32) -> Vec<Peer> {
        let homes = self.homes(object, group_of(piece));
        let Some(blob) = self.blobs.get(&object) else { return Vec::new() };
        let Some(fetch) = blob.fetches.get(&piece) else { return Vec::new() };
        let mut rich: Vec<(u32, Peer)> = blob.known.iter().map(|(peer, other)| (other.have.len(), *peer)).collect();
        rich.sort_unstable_by(|a, b| b.cmp(a));
        let rich = rich.into_iter().map(|(_, peer)| peer).take(SPARES);
        let claimed = self.news.claimants(&object);
        let mut spares: Vec<Peer> = Vec::new();
        for peer in homes.all.into_iter().take(SPARES - 1).chain(rich).chain(claimed) {
            if self.usable(&peer) && self.fresh(fetch, &peer) && !spares.contains(&peer) && spares.len() < SPARES {
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
            if let Some(fetch) = self.blobs.get_mut(&object).and_then(|blob| blob.fetches.get_mut(&piece)) {
                fetch.next_is_registry = fetch.sources.is_empty();
            }
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
            Some((caller, origin)) => Source::Read(origin, Credential::Caller(caller), spares),
            None if !denied => Source::Read(blob.origin.clone(), Credential::Own, spares),
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
        // What the registry sent of it, no peer goes on with: nobody has signed that.
        let (urgency, offset) = (first.urgency, if first.pure { 0 } else { first.got });
        let mut mask = Mask::of(piece);
        // Neighbours that need the same: one ask for all, except that a broken off piece is continued by itself.
        for (other, fetch) in blob.fetches.range(group * GROUP..(group + 1) * GROUP) {
            let needs = blob.is_todo(*other) && fetch.hedge == first.hedge && !fetch.no_peer && fetch.lessor.is_none();
            if offset > 0 || !needs || (fetch.got > 0 && !fetch.pure) || *other == piece || !self.fresh(fetch, &to) {
                continue;
            }
            let useful = match manner {
                Manner::Home | Manner::Spare => fetch.referrals < REFERRALS && !fetch.doubted,
                Manner::BytesOnly => fetch.referrals >= REFERRALS || fetch.doubted,
                Manner::Holder => {
                    let neighbour = blob.known.get(&to);
                    let load = self.standings.load(&to, self.counter.pace(), now);
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
            // Whoever looks for copies reads the registry meanwhile: it waits for nobody.
            below: if manner == Manner::Spare { 0 } else { below.unwrap_or(u8::MAX) },
            urgency,
            can_read: self.token_for(object, piece).is_some(),
            have: blob.told(),
            backlog: self.counter.backlog(),
        };
        let exchange = Exchange(self.number());
        let Some(blob) = self.blobs.get_mut(&object) else { return };
        for piece in mask.pieces(group) {
            blob.assign(piece, Via::Ask(exchange));
            if let Some(fetch) = blob.fetches.get_mut(&piece) {
                fetch.mixed |= offset > 0;
                if std::mem::take(&mut fetch.pure) {
                    fetch.got = 0;
                }
            }
        }
        self.standings.asked(to, mask.len());
        let deadline = now + self.config.deadline * if manner == Manner::Holder { 2 } else { 1 };
        let asked = Asked {
            to,
            object,
            group,
            mask,
            manner,
            at: now,
            heard: None,
            deadline,
            hedged: false,
            doubted: false,
            flowing: None,
        };
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
        }
        if let Some(blob) = self.blobs.get_mut(&object) {
            blob.unassign(piece, Via::Ask(exchange));
            self.standings.settled(&to);
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
        let vain = Vain { until, skip: true };
        let Some(asked) = self.asked.get(&exchange) else { return };
        let (object, group, mask, to) = (asked.object, asked.group, asked.mask, asked.to);
        self.out.push(Output::Leave { exchange });
        for piece in mask.pieces(group) {
            self.give_back(exchange, object, piece, to, vain);
        }
    }

    /// A source will not give a piece.
    fn give_back(&mut self, exchange: Exchange, object: Object, piece: u32, to: Peer, vain: Vain) {
        if self.settle_piece(exchange, piece)
            && let Some(fetch) = self.blobs.get_mut(&object).and_then(|blob| blob.fetches.get_mut(&piece))
        {
            fetch.tried.insert(to, vain);
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
                    self.give_back(exchange, object, piece, to, Vain { until: now, skip: false });
                    self.take_lease(object, piece, to);
                }
            }
            Frame::Map(map) => self.mapped(object, to, map),
        }
    }

    /// A home has too much to do: that is a sign of life, but not for ever.
    fn rebuffed(&mut self, object: Object, piece: u32) {
        let now = self.now;
        let Some(fetch) = self.blobs.get_mut(&object).and_then(|blob| blob.fetches.get_mut(&piece)) else { return };
        fetch.rebuffs = fetch.rebuffs.saturating_add(1);
        if fetch.begun.is_some_and(|begun| now.since(begun) < self.config.deadline) {
            fetch.progress = now;
        }
    }

    /// Somebody names holders of a group.
    fn hear_of(&mut self, object: Object, group: u32, holders: &[Holder]) {
        let (most, now, pace) = (self.config.neighbours, self.now, self.counter.pace());
        let Some(blob) = self.blobs.get_mut(&object) else { return };
        for holder in holders.iter().filter(|holder| holder.peer != self.me) {
            let set = |mask: Mask| mask.pieces(group).collect();
            blob.known.hear_of(holder.peer, &set(holder.have), &set(holder.coming), most, now);
            self.standings.hint(holder.peer, holder.backlog, pace, now);
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
            self.drop_from_ask(exchange, piece);
            if let Some(fetch) = self.blobs.get_mut(&object).and_then(|blob| blob.fetches.get_mut(&piece)) {
                fetch.tried.insert(to, Vain { until: now + RETRY, skip: true });
            }
            return;
        }
        let mine = stands.max(1);
        // With two sources it is the deeper one that counts: the other may go, and then we wait for this.
        fetch.depth = fetch.depth.max(Some(mine));
        // A registry that was only asked to be sure is not needed, unless it was faster.
        let readings: Vec<Via> = fetch.sources.iter().filter(|via| matches!(via, Via::Read(_))).copied().collect();
        if fetch.got == 0 && !fetch.no_peer {
            for via in readings {
                self.let_go(via, object, piece);
            }
        }
    }

    fn mapped(&mut self, object: Object, from: Peer, map: HaveMap) {
        let (most, now, me, pace) = (self.config.neighbours, self.now, self.me, self.counter.pace());
        let Some(blob) = self.blobs.get_mut(&object) else { return };
        blob.known.map(from, map.have, map.coming, most, now);
        self.standings.busy(from, map.backlog, pace, now);
        for other in map.others {
            if other.peer != me && !self.standings.quarantined(&other.peer, now) {
                blob.known.hear_of(other.peer, &other.have, &Pieces::new(), most, now);
                self.standings.hint(other.peer, other.backlog, pace, now);
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

    pub(super) fn watch_exchange(&mut self, exchange: Exchange) {
        let now = self.now;
        let (hedge, silence) = (self.standings.hedge(self.config.hedge), self.config.silence);
        let Some(asked) = self.asked.get(&exchange) else { return };
        let silent_at = asked.heard.unwrap_or(asked.at) + silence;
        let hedge_at = asked.at + hedge;
        let (patience, doubted) = (asked.at + STUCK, asked.doubted);
        let (object, group, mask, to) = (asked.object, asked.group, asked.mask, asked.to);
        if now >= silent_at {
            self.out.push(Output::Count(Event::Silent));
            self.bury(to);
            self.leave(exchange, now + RETRY);
            return;
        }
        if now >= asked.deadline {
            // A home that promised, or anybody who dripped, for so long is as good as silent. Who waits itself is not to
            // blame, and gets more time: if whom it waits for is left, it may have the piece soon.
            if asked.manner != Manner::Holder || asked.flowing.is_some() {
                self.bury(to);
            }
            self.leave(exchange, now + RETRY);
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
        // Others came to us because they gave up on this one: we do not wait for as long as they did.
        if now >= patience && !doubted {
            let stands_in = mask.pieces(group).any(|piece| self.stands_in(object, piece));
            if let Some(asked) = self.asked.get_mut(&exchange) {
                asked.doubted = true;
            }
            if let Some(blob) = self.blobs.get_mut(&object).filter(|_| stands_in) {
                mask.pieces(group).for_each(|piece| blob.hedge(piece));
                self.dirty.insert(object);
            }
        } else if !doubted {
            next = next.min(patience);
        }
        self.timer(next, Timer::Exchange(exchange));
    }

    /// Whether others take us for the home of a piece for which we ask another home.
    fn stands_in(&mut self, object: Object, piece: u32) -> bool {
        let duty = self.blobs.get(&object).and_then(|blob| blob.fetches.get(&piece)).is_some_and(|fetch| fetch.duty);
        duty && self.homes(object, group_of(piece)).all.first() != Some(&self.me)
    }

    /// Looks whether a fetch gets on; one that does not will read the registry itself.
    pub(super) fn watch_fetch(&mut self, place: Place) {
        let now = self.now;
        let Some(blob) = self.blobs.get_mut(&place.object) else { return };
        let Some(fetch) = blob.fetches.get(&place.piece) else { return };
        let since = if fetch.begun.is_some() { fetch.progress } else { now };
        let end = since + (self.config.alone + fetch.patience);
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
