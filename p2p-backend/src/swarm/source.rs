//! Whom to ask for a piece: a holder that is known, the home, the registry, or nobody yet.

use std::time::Duration;

use super::Swarm;
use super::ask::{REFERRALS, RETRY, SOON};
use super::blob::Via;
use super::grid::{Mask, Object, group_of};
use super::members::{Homes, Peer};
use super::message::{Manner, Origin, Urgency};
use super::port::{Credential, Event, Failure, Output};
use super::time::Time;

/// Where to get a piece.
#[derive(Debug)]
pub(super) enum Source {
    Ask(Peer, Manner),
    /// From the registry, there, as that; these may have copies and are asked at the same time.
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
pub(super) enum Above {
    Home(Peer),
    /// Nobody: we are the home.
    Us,
    /// The home, but not before then.
    Busy(Time),
    /// Nobody can be reached at the moment.
    Nobody,
}

/// Whom a home asks for copies at most.
const SPARES: usize = 4;
/// Times that a home sends another one away before that one reads the registry.
const REBUFFS: u8 = 2;
/// Times that a home says that it has too much to do, after which the next in rank is asked if nothing else helped for long.
const MOST_REBUFFS: u8 = 8;
/// How many times as long as others what is fetched in advance waits before this node reads the registry for it.
const PREFETCH_PATIENCE: u32 = 5;
/// How long what others say of a registry's rests keeps a piece from being read.
const HEARSAY: Duration = Duration::from_secs(10);

impl Swarm {
    pub(super) fn source(&mut self, object: Object, piece: u32) -> Source {
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
        // What is fetched in advance waits while homes take turns at the registry: that is not being forgotten.
        let times = if fetch.urgency == Urgency::Prefetch { PREFETCH_PATIENCE } else { 1 };
        let tired = now.since(fetch.progress) >= self.config.alone * times + fetch.patience;
        if no_peer || leased || tired {
            let source = self.by_registry(object, piece, Vec::new());
            if tired
                && matches!(source, Source::Read(..))
                && self.homes(object, group_of(piece)).all.first() != Some(&self.me)
            {
                self.out.push(Output::Count(Event::Alone));
                if let Some(fetch) = self.blobs.get_mut(&object).and_then(|blob| blob.fetches.get_mut(&piece)) {
                    fetch.alone = true;
                }
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
    pub(super) fn known_holder(&mut self, object: Object, piece: u32) -> Option<Peer> {
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
    pub(super) fn ledger_holder(&mut self, object: Object, piece: u32) -> Option<Peer> {
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
    pub(super) fn holder_later(&mut self, object: Object, piece: u32) -> Option<Time> {
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
    pub(super) fn fresh(&self, fetch: &super::blob::Fetch, peer: &Peer) -> bool {
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

    pub(super) fn above(&mut self, object: Object, piece: u32) -> Above {
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
                    // One that has much to do is the home all the same: another one would read the registry again. But not
                    // for ever.
                    let weary = fetch.rebuffs >= MOST_REBUFFS
                        && fetch.begun.is_some_and(|begun| self.now.since(begun) >= self.config.deadline / 2);
                    let busy = fetch.tried.get(peer).filter(|vain| !vain.skip);
                    if weary && busy.is_some() {
                        continue;
                    }
                    if self.fresh(fetch, peer) {
                        return Above::Home(*peer);
                    }
                    if let Some(vain) = busy.filter(|vain| vain.until > self.now) {
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
    pub(super) fn may_exist(&mut self, object: Object, piece: u32) -> bool {
        let first = self.homes(object, group_of(piece)).all.first() == Some(&self.me);
        !first || self.now.since(self.started) < self.config.newcomer || self.news.claims(&object)
    }

    /// Returns whom a home asks for copies before it believes that there are none: those who were home before it or will
    /// be after it, those who say that they have some, and those who are known to have the most.
    pub(super) fn spares(&mut self, object: Object, piece: u32) -> Vec<Peer> {
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
    pub(super) fn by_registry(&mut self, object: Object, piece: u32, spares: Vec<Peer>) -> Source {
        let Some(blob) = self.blobs.get(&object) else { return Source::None(Failure::Unavailable) };
        let Some(fetch) = blob.fetches.get(&piece) else { return Source::None(Failure::Unavailable) };
        let token = self.token_for(object, piece);
        let origin = token.as_ref().map_or(&blob.origin, |(_, origin)| origin).clone();
        if !self.config.reads(&origin) {
            return Source::None(Failure::Refused);
        }
        let believes = fetch.begun.is_none_or(|begun| self.now.since(begun) < HEARSAY);
        let odd = blob.odd.filter(|until| *until > self.now);
        if let Some(until) = self.register.rests(&origin, believes, self.now).max(odd) {
            if let Some(fetch) = self.blobs.get_mut(&object).and_then(|blob| blob.fetches.get_mut(&piece)) {
                fetch.next_is_registry = fetch.sources.is_empty();
            }
            return Source::Wait(until);
        }
        if fetch.urgency == Urgency::Prefetch {
            let (homes, luck) = (self.prefetching_homes(object), self.rng.f64());
            if let Some(until) = self.register.prefetch_turn(homes, self.config.prefetch_reads, luck, self.now) {
                return Source::Wait(until);
            }
            if let Some(until) = self.register.budget(self.config.prefetch_rate, self.now) {
                return Source::Wait(until);
            }
        }
        let denied = blob.denied.is_some_and(|until| until > self.now);
        match token {
            Some((caller, origin)) => Source::Read(origin, Credential::Caller(caller), spares),
            None if !denied => Source::Read(origin, Credential::Own, spares),
            None if !spares.is_empty() => Source::Ask(spares[0], Manner::Spare),
            None => self.lease_or_wait(object, piece),
        }
    }

    /// The registry does not let us read it: somebody who waits here may, or nobody.
    pub(super) fn lease_or_wait(&mut self, object: Object, piece: u32) -> Source {
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

    /// Whether others take us for the home of a piece for which we ask another home.
    pub(super) fn stands_in(&mut self, object: Object, piece: u32) -> bool {
        let duty = self.blobs.get(&object).and_then(|blob| blob.fetches.get(&piece)).is_some_and(|fetch| fetch.duty);
        duty && self.homes(object, group_of(piece)).all.first() != Some(&self.me)
    }
}
