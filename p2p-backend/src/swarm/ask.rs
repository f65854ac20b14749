//! Getting pieces from others: how much is asked for at once, and what is out.

use std::time::Duration;

use super::blob::{Vain, Via};
use super::grid::{GROUP, Mask, Object, group_of};
use super::members::Peer;
use super::message::{Ask, Manner, Urgency};
use super::port::{Exchange, Output};
use super::source::Source;
use super::time::Time;
use super::{Swarm, Timer};

/// An ask that is out.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) to: Peer,
    pub(super) object: Object,
    pub(super) group: u32,
    /// What is still to come of it.
    pub(super) mask: Mask,
    pub(super) manner: Manner,
    pub(super) at: Time,
    /// When it last gave a sign of life; none before the first.
    pub(super) heard: Option<Time>,
    /// When patience with mere promises ends.
    pub(super) deadline: Time,
    pub(super) hedged: bool,
    /// It took so long that we looked whether others lost patience with it.
    pub(super) doubted: bool,
    /// A piece whose bytes are coming on it.
    pub(super) flowing: Option<u32>,
    /// How much of that piece was there at a moment from which on we measure.
    pub(super) mark: (Time, u32),
    /// How much of it is there now.
    pub(super) got: u32,
    /// It sends so little that another one was asked, too.
    pub(super) drips: bool,
    /// Of what it is for, the most urgent.
    pub(super) urgency: Urgency,
    /// Whether readers here wait for it, and not only others.
    pub(super) own: bool,
}

/// How long one who was busy, or had not got it, is not asked for the same piece again.
pub(super) const RETRY: Duration = Duration::from_millis(500);
/// Referrals after which the home has to give the bytes.
pub(super) const REFERRALS: u8 = 2;
/// When to look again for somebody who is just too busy.
pub(super) const SOON: Duration = Duration::from_millis(10);
/// A wait without any byte for so long takes no room from other pieces.
pub(super) const STUCK: Duration = Duration::from_secs(1);
/// A node does not ask for more than it can take within this time.
const AHEAD: Duration = Duration::from_millis(150);
/// One that looks for copies while it reads the registry waits no longer for those who only promise.
const SPARE_PATIENCE: Duration = Duration::from_millis(500);

impl Swarm {
    /// Finds sources for what needs one, as far as the window goes.
    pub(super) fn pump(&mut self, object: Object) {
        let Some(blob) = self.blobs.get(&object) else { return };
        let window = self.intake.window(self.config.window, AHEAD);
        let window = window + self.stuck(Some(object)).max(self.ahead(object).min(self.config.window));
        let todo: Vec<u32> = blob.todo.iter().map(|(_, _, piece)| *piece).collect();
        for piece in todo {
            let Some(blob) = self.blobs.get(&object) else { return };
            let Some(fetch) = blob.fetches.get(&piece).filter(|_| blob.is_todo(piece)) else { continue };
            if !fetch.hedge && !fetch.duty && blob.under_way(fetch.urgency) >= window {
                // It only waits its turn, which is no lack of progress, unless others were asked in vain for very long.
                let long = self.now.since(fetch.wanted) >= 2 * self.config.deadline;
                if let Some(fetch) = self.blobs.get_mut(&object).and_then(|blob| blob.fetches.get_mut(&piece))
                    && (fetch.tried.is_empty() || !long)
                {
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

    /// Whether this node may ask for more for its readers. What is fetched for others alone takes no room from them, nor does
    /// prefetch from what somebody waits for.
    pub(super) fn has_room(&self, urgency: Urgency) -> bool {
        let most = if urgency == Urgency::Demand { self.config.node_window } else { self.config.prefetch_window };
        let asked = self.asked.values().filter(|asked| asked.own && asked.urgency >= urgency).count();
        asked + self.register.for_readers(urgency) < most + self.stuck(None)
    }

    /// A piece is wanted sooner than those who were asked for it were told: they are asked again, unless its bytes flow.
    pub(super) fn hurry(&mut self, object: Object, piece: u32, urgency: Urgency) {
        let Some(fetch) = self.blobs.get(&object).and_then(|blob| blob.fetches.get(&piece)) else { return };
        if fetch.urgency >= urgency {
            return;
        }
        let sources: Vec<Via> = fetch.sources.clone();
        for via in sources {
            if let Via::Ask(exchange) = via
                && self.asked.get(&exchange).is_some_and(|asked| asked.flowing.is_none())
            {
                self.leave(exchange, Vain { until: self.now, skip: false });
            }
        }
    }

    /// Returns how many pieces of an object wait at homes that are reading them: meanwhile others can be asked for, so that a
    /// crowd that reads in order does not wait for the registry group by group.
    fn ahead(&self, object: Object) -> usize {
        let of = |asked: &&Asked| {
            asked.object == object
                && asked.flowing.is_none()
                && asked.heard.is_some()
                && matches!(asked.manner, Manner::Home | Manner::BytesOnly)
        };
        self.asked.values().filter(of).map(|asked| asked.mask.len() as usize).sum()
    }

    /// Returns how many pieces, of an object or in all, wait for long at somebody who only promises.
    pub(super) fn stuck(&self, object: Option<Object>) -> usize {
        let waits = |asked: &&Asked| asked.flowing.is_none() && self.now.since(asked.at) > STUCK;
        let of = |asked: &&Asked| object.is_none_or(|object| asked.object == object);
        let all = self.asked.values().filter(waits).filter(of);
        all.map(|asked| if object.is_some() { asked.mask.len() as usize } else { 1 }).sum()
    }

    /// Whether an exchange only looks for copies.
    pub(super) fn is_spare(&self, exchange: Exchange) -> bool {
        self.asked.get(&exchange).is_some_and(|asked| asked.manner == Manner::Spare)
    }

    pub(super) fn ask(&mut self, object: Object, piece: u32, to: Peer, manner: Manner) {
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
        let own = mask.pieces(group).filter_map(|piece| blob.fetches.get(&piece)).any(|fetch| !fetch.wants.is_empty());
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
        let deadline = now
            + match manner {
                Manner::Holder => self.config.deadline * 2,
                Manner::Home | Manner::BytesOnly => self.config.deadline,
                Manner::Spare => self.config.deadline.min(SPARE_PATIENCE),
            };
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
            mark: (now, 0),
            got: 0,
            drips: false,
            urgency,
            own,
        };
        self.asked.insert(exchange, asked);
        self.timer(now + self.standings.hedge(self.config.hedge), Timer::Exchange(exchange));
        self.out.push(Output::Ask { exchange, to, ask });
    }

    /// Takes a piece off an exchange; without any it is over. Tells whether it had it.
    pub(super) fn settle_piece(&mut self, exchange: Exchange, piece: u32) -> bool {
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
        let drips = self.asked.get(&exchange).filter(|asked| asked.drips).map(|asked| asked.to);
        if self.settle_piece(exchange, piece) && !self.asked.contains_key(&exchange) {
            self.out.push(Output::Leave { exchange });
            if let Some(peer) = drips {
                // Somebody else was faster: it is not that we cannot take more.
                self.despair(peer);
            }
        }
    }

    /// Leaves a source; its pieces need another one. Until then it is not asked for them.
    pub(super) fn leave(&mut self, exchange: Exchange, vain: Vain) {
        let Some(asked) = self.asked.get(&exchange) else { return };
        let (object, group, mask, to) = (asked.object, asked.group, asked.mask, asked.to);
        self.out.push(Output::Leave { exchange });
        for piece in mask.pieces(group) {
            self.give_back(exchange, object, piece, to, vain);
        }
    }

    /// A source will not give a piece.
    pub(super) fn give_back(&mut self, exchange: Exchange, object: Object, piece: u32, to: Peer, vain: Vain) {
        if self.settle_piece(exchange, piece)
            && let Some(fetch) = self.blobs.get_mut(&object).and_then(|blob| blob.fetches.get_mut(&piece))
        {
            fetch.tried.insert(to, vain);
        }
    }
}
