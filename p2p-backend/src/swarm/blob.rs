//! What a node knows of one object: what it has, what is on its way, who has the rest.

use std::collections::{BTreeMap, BTreeSet};

use super::grid::{GROUP, Mask, Object, Pieces, group_of};
use super::home::Ledger;
use super::known::Known;
use super::members::{Homes, Peer};
use super::message::{Origin, Urgency};
use super::port::{Exchange, Inbound, Order, Reading, Want};
use super::time::Time;
use super::trust::Records;

/// Where a piece comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Via {
    Ask(Exchange),
    Read(Reading),
}

/// An ask that was in vain.
#[derive(Debug, Clone, Copy)]
pub(super) struct Vain {
    /// Not to be repeated before.
    pub(super) until: Time,
    /// As a home it is out of the question until then; one that is only busy stays the home.
    pub(super) skip: bool,
}

/// A piece on its way to us.
#[derive(Debug)]
pub(super) struct Fetch {
    pub(super) urgency: Urgency,
    /// Readers here that want it.
    pub(super) wants: BTreeSet<Want>,
    /// Whether it is fetched for others, who wait here.
    pub(super) duty: bool,
    /// Somebody wants the registry's own bytes.
    pub(super) no_peer: bool,
    /// From whom it was asked; two while a slow source is hedged.
    pub(super) sources: Vec<Via>,
    /// A second source is wanted.
    pub(super) hedge: bool,
    /// How many stand between us and the registry, once we know.
    pub(super) depth: Option<u8>,
    /// The least depth that we told anybody; we never stand deeper again, or people would wait in circles.
    pub(super) ceiling: u8,
    /// How often we were sent on.
    pub(super) referrals: u8,
    /// Times that a home had too much to do for it.
    pub(super) rebuffs: u8,
    /// It came with the word of one who lies: only the home's bytes will do, and if that is us the registry's.
    pub(super) doubted: bool,
    /// Who could not help, and until when it is not asked again.
    pub(super) tried: BTreeMap<Peer, Vain>,
    /// A source was looked for. Until then it only waits its turn.
    pub(super) begun: Option<Time>,
    /// Since when it is wanted.
    pub(super) wanted: Time,
    /// When something last happened.
    pub(super) progress: Time,
    /// How much longer than others we wait before we read the registry ourselves.
    pub(super) patience: std::time::Duration,
    /// The home told us to read the registry, and wants to hear of it.
    pub(super) lessor: Option<Peer>,
    /// We went to the registry although we are not the home, because nothing else helped.
    pub(super) alone: bool,
    /// It waits for nothing but the registry's patience: nobody stands between.
    pub(super) next_is_registry: bool,
    /// Times that the registry failed.
    pub(super) failures: u8,
    /// Bytes that are here of it.
    pub(super) got: u32,
    /// All of these bytes are the registry's.
    pub(super) pure: bool,
    /// These bytes came from more than one sender.
    pub(super) mixed: bool,
    /// Its place in the order of what is to be fetched.
    pub(super) rank: u32,
}

/// An object.
#[derive(Debug)]
pub(super) struct Blob {
    pub(super) size: Option<u64>,
    /// The size is known from a reader here or the cache, not only from what others said.
    sure: bool,
    pub(super) origin: Origin,
    /// The origin is one that a reader here named.
    own_origin: bool,
    pub(super) have: Pieces,
    pub(super) records: Records,
    /// The whole matched its digest.
    pub(super) sealed: bool,
    /// Not told to anybody any more, and to be deleted then.
    pub(super) withdrawn: Option<Time>,
    pub(super) fetches: BTreeMap<u32, Fetch>,
    /// Fetches that need a source, the most urgent first.
    pub(super) todo: BTreeSet<(std::cmp::Reverse<Urgency>, u32, u32)>,
    /// Fetches that have one.
    pub(super) assigned: usize,
    /// Those of them that somebody waits for.
    assigned_demand: usize,
    homes: BTreeMap<u32, (u64, Homes)>,
    /// What we know as the home of groups.
    pub(super) ledgers: BTreeMap<u32, Ledger>,
    pub(super) known: Known,
    /// Asks that wait for a piece on its way.
    pub(super) waiting: BTreeMap<u32, Vec<Inbound>>,
    /// Until when the registry lets us not read this; we ask others to.
    pub(super) denied: Option<Time>,
    /// Until when the registry is not asked for this: what it said of it made no sense.
    pub(super) odd: Option<Time>,
    /// Distinguishes the order in which nodes fetch.
    shuffle: u32,
}

impl Blob {
    pub(super) fn new(shuffle: u32) -> Self {
        Self {
            size: None,
            sure: false,
            origin: Origin::default(),
            own_origin: false,
            have: Pieces::new(),
            records: Records::default(),
            sealed: false,
            withdrawn: None,
            fetches: BTreeMap::new(),
            todo: BTreeSet::new(),
            assigned: 0,
            assigned_demand: 0,
            homes: BTreeMap::new(),
            ledgers: BTreeMap::new(),
            known: Known::default(),
            waiting: BTreeMap::new(),
            denied: None,
            odd: None,
            shuffle,
        }
    }

    /// Takes what a reader here, or the cache, knows of it.
    pub(super) fn learn(&mut self, size: Option<u64>, origin: &Origin) {
        if size.is_some() {
            (self.size, self.sure) = (size, true);
        }
        if !origin.is_empty() && (!self.own_origin || self.denied.is_some()) {
            self.set_origin(origin);
            self.own_origin = true;
        }
    }

    /// Takes what a member says of it: less than what readers here say, and no more once the registry refuted it.
    pub(super) fn hear(&mut self, size: Option<u64>, origin: &Origin) {
        if !self.sure {
            self.size = size.or(self.size);
        }
        if !origin.is_empty() && !self.own_origin && (self.origin.is_empty() || self.denied.is_some()) {
            self.set_origin(origin);
        }
    }

    fn set_origin(&mut self, origin: &Origin) {
        if self.origin != *origin {
            self.origin = origin.clone();
            (self.denied, self.odd) = (None, None);
        }
    }

    /// The registry's answer made no sense: a size that only others said is forgotten.
    pub(super) fn doubt_size(&mut self) {
        if !self.sure {
            self.size = None;
        }
    }

    /// Whether it can have a piece, as far as is known for sure.
    pub(super) fn may_have(&self, piece: u32) -> bool {
        !self.sure || self.pieces().is_none_or(|all| piece < all)
    }

    /// Returns how many pieces of what others say that they have are remembered: all that there are, or few of an object that
    /// nobody here wants.
    pub(super) fn of_interest(&self) -> u32 {
        match self.pieces().filter(|_| self.sure) {
            Some(all) => all,
            None => MOST_OF_STRANGERS,
        }
    }

    /// Returns the homes of a group in the view of this number, found by `find` if that is new.
    pub(super) fn homes(&mut self, group: u32, view: u64, find: impl FnOnce() -> Homes) -> &Homes {
        if self.homes.len() >= MOST_HOMES && !self.homes.contains_key(&group) {
            self.homes.clear();
        }
        let entry = self.homes.entry(group).or_default();
        if entry.0 != view {
            *entry = (view, find());
        }
        &entry.1
    }

    /// Returns the homes of a group in the last view in which they were looked for.
    pub(super) fn last_homes(&self, group: u32) -> Option<&Homes> {
        self.homes.get(&group).map(|(_, homes)| homes)
    }

    /// Returns the fetch of a piece, begun if there was none.
    pub(super) fn fetch(
        &mut self,
        piece: u32,
        urgency: Urgency,
        order: Order,
        now: Time,
        patience: std::time::Duration,
    ) -> &mut Fetch {
        if !self.fetches.contains_key(&piece) {
            let rank = match order {
                Order::InOrder => piece,
                // Groups in an order of our own, so that not all nodes begin at the same home.
                Order::Any => (group_of(piece) ^ 0x9e37).wrapping_add(self.shuffle).wrapping_mul(0x9e37_79b1) | 1 << 31,
            };
            let fetch = Fetch {
                urgency,
                wants: BTreeSet::new(),
                duty: false,
                no_peer: false,
                sources: Vec::new(),
                hedge: false,
                depth: None,
                ceiling: u8::MAX,
                referrals: 0,
                rebuffs: 0,
                doubted: false,
                tried: BTreeMap::new(),
                begun: None,
                wanted: now,
                progress: now,
                patience,
                lessor: None,
                alone: false,
                next_is_registry: false,
                failures: 0,
                got: 0,
                pure: false,
                mixed: false,
                rank,
            };
            self.todo.insert((std::cmp::Reverse(urgency), rank, piece));
            self.fetches.insert(piece, fetch);
        }
        let known = self.fetches.get(&piece).expect("it was inserted above");
        if urgency > known.urgency {
            let key = (std::cmp::Reverse(known.urgency), known.rank, piece);
            let queued = self.todo.remove(&key);
            if queued {
                self.todo.insert((std::cmp::Reverse(urgency), known.rank, piece));
            }
            self.assigned_demand += usize::from(!known.sources.is_empty());
        }
        let fetch = self.fetches.get_mut(&piece).expect("it was inserted above");
        fetch.urgency = fetch.urgency.max(urgency);
        fetch
    }

    fn key(&self, piece: u32) -> Option<(std::cmp::Reverse<Urgency>, u32, u32)> {
        self.fetches.get(&piece).map(|fetch| (std::cmp::Reverse(fetch.urgency), fetch.rank, piece))
    }

    /// Whether a piece's fetch needs a source.
    pub(super) fn is_todo(&self, piece: u32) -> bool {
        self.key(piece).is_some_and(|key| self.todo.contains(&key))
    }

    /// Gives a fetch a source.
    pub(super) fn assign(&mut self, piece: u32, via: Via) {
        if let Some(key) = self.key(piece) {
            self.todo.remove(&key);
        }
        if let Some(fetch) = self.fetches.get_mut(&piece) {
            if fetch.sources.is_empty() {
                self.assigned += 1;
                self.assigned_demand += usize::from(fetch.urgency == Urgency::Demand);
            }
            fetch.sources.push(via);
            fetch.hedge = false;
        }
    }

    /// Takes a source from a fetch; without any it needs one.
    pub(super) fn unassign(&mut self, piece: u32, via: Via) {
        let key = self.key(piece);
        if let Some(fetch) = self.fetches.get_mut(&piece)
            && let Some(at) = fetch.sources.iter().position(|source| *source == via)
        {
            fetch.sources.remove(at);
            if fetch.sources.is_empty() {
                self.assigned -= 1;
                self.assigned_demand -= usize::from(fetch.urgency == Urgency::Demand);
                fetch.depth = None;
                fetch.hedge = false;
                self.todo.extend(key);
            }
        }
    }

    /// Asks for a second source of a piece.
    pub(super) fn hedge(&mut self, piece: u32) {
        let key = self.key(piece);
        if let Some(fetch) = self.fetches.get_mut(&piece)
            && fetch.sources.len() == 1
            && !fetch.hedge
        {
            fetch.hedge = true;
            self.todo.extend(key);
        }
    }

    /// Ends a fetch, and returns it.
    pub(super) fn end_fetch(&mut self, piece: u32) -> Option<Fetch> {
        if let Some(key) = self.key(piece) {
            self.todo.remove(&key);
        }
        let fetch = self.fetches.remove(&piece)?;
        if !fetch.sources.is_empty() {
            self.assigned -= 1;
            self.assigned_demand -= usize::from(fetch.urgency == Urgency::Demand);
        }
        Some(fetch)
    }

    /// Returns how many fetches have a source, of those that are as urgent or more.
    pub(super) fn under_way(&self, urgency: Urgency) -> usize {
        match urgency {
            Urgency::Demand => self.assigned_demand,
            Urgency::Prefetch => self.assigned,
        }
    }

    /// Returns the pieces of a group that we read in their home's stead.
    pub(super) fn leased(&self, group: u32) -> Mask {
        let fetches = self.fetches.range(group * GROUP..(group + 1) * GROUP);
        fetches.filter(|(_, fetch)| fetch.lessor.is_some()).fold(Mask::NONE, |all, (piece, _)| all.or(Mask::of(*piece)))
    }

    /// Returns the homes in whose stead we read, with the groups.
    pub(super) fn lessors(&self) -> impl Iterator<Item = (Peer, u32)> {
        self.fetches.iter().filter_map(|(piece, fetch)| fetch.lessor.map(|lessor| (lessor, group_of(*piece))))
    }

    /// Returns what others are told that we have.
    pub(super) fn told(&self) -> Pieces {
        if self.withdrawn.is_some() { Pieces::new() } else { self.have.clone() }
    }

    /// Returns the number of pieces, if the size is known.
    pub(super) fn pieces(&self) -> Option<u32> {
        self.size.map(|size| u32::try_from(size.div_ceil(super::grid::PIECE)).unwrap_or(u32::MAX))
    }

    /// Whether nothing is known that would be missed.
    pub(super) fn is_idle(&self) -> bool {
        self.have.is_empty() && self.fetches.is_empty() && self.waiting.is_empty() && self.ledgers.is_empty()
    }
}

/// Groups whose homes are remembered at most.
const MOST_HOMES: usize = 4096;
/// Pieces of an object that nobody here wants, of which it is remembered who has them: 4 GiB.
const MOST_OF_STRANGERS: u32 = 4096;

/// A piece of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) object: Object,
    pub(super) piece: u32,
}
