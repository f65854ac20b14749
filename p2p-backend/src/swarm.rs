//! The decisions of the swarm: who asks whom for which piece, who sends whom on, whom to believe, when to give up.
//!
//! [`Swarm`] is one node's mind. It has no sockets, no disk and no clock: a driver tells it what happened
//! ([`Input`]) and does what it says ([`Output`]); the daemon's driver has real ones, the simulator's has models of a
//! thousand nodes. The same inputs and the same seed give the same outputs, always.
//!
//! A piece that a reader [wants](Input::Want) and that is not here is a *fetch*. It is asked from somebody who is *known* to
//! have it (`known`), else from the *home* of its group (`members`), which sends it, refers the asker to others (`home`),
//! or gets it from the registry: of all nodes only the home does that. `source` chooses whom to ask, `ask` asks as many as there
//! is room for, `heard` takes what they say, `watch` ends patience with them; `serve` answers others and `line` sends in order;
//! `read` is about the registry, `trust` and `standing` are about belief, `grant` is about readers' rights,
//! and `leave` about deletion and departure.
//!
//! Four rules keep a crowd from hurting itself:
//!
//! * Nobody waits in a circle: who lets others wait says how deep it stands (0 reads the registry), nobody waits for one
//!   who does not stand above every depth that it ever told others, and so depths fall along every chain of waits.
//! * Every wait ends: a source that is silent is left, one that only promises is left after a while, and a node without
//!   progress reads the registry itself.
//! * A referral is a hint, two are the limit: then the home has to give the bytes.
//! * Nothing is kept, served or forwarded before its hash matched.

mod ask;
mod blob;
pub mod config;
mod grant;
pub mod grid;
mod heard;
mod home;
mod intake;
mod known;
pub mod leave;
mod line;
pub mod members;
pub mod message;
pub mod port;
mod read;
mod report;
mod serve;
mod source;
mod standing;
pub mod time;
mod trust;
mod want;
mod watch;
pub mod wire;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

pub use config::Config;
pub use grid::Object;
pub use members::{Member, Peer, View, Zone};
pub use port::{Input, Output};
pub use time::Time;

use ask::Asked;
use blob::{Blob, Fetch, Place, Via};
use grant::Grants;
use intake::Intake;
use leave::Tombs;
use line::Counter;
use message::Urgency;
use port::{Exchange, Inbound, Order, Want};
use read::Register;
use report::News;
use standing::Standings;
use want::Wanted;

/// What a node does, as a function of what happened to it.
#[derive(Debug)]
pub struct Swarm {
    me: Peer,
    config: Config,
    rng: fastrand::Rng,
    now: Time,
    started: Time,
    generation: u64,
    view: Arc<View>,
    /// Rises with every view; none has been seen at zero.
    views: u64,
    blobs: BTreeMap<Object, Blob>,
    wants: BTreeMap<Want, Wanted>,
    asked: BTreeMap<Exchange, Asked>,
    counter: Counter,
    intake: Intake,
    register: Register,
    standings: Standings,
    grants: Grants,
    news: News,
    tombs: Tombs,
    timers: BTreeSet<(Time, Timer)>,
    /// Objects whose fetches may have got something to do.
    dirty: BTreeSet<Object>,
    /// Objects whose fetches wait until this node asks for less.
    starved: BTreeSet<(std::cmp::Reverse<Urgency>, Object)>,
    next: u64,
    out: Vec<Output>,
}

/// What is to be looked at later. A timer that has become pointless rings and is not answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    Exchange(Exchange),
    Inbound(Inbound),
    Fetch(Place),
    Source(Object),
    News(Peer),
    Leases,
    Summary,
    Moved,
    Upload,
    Unlink(Object),
    Tidy,
}

/// How often what is over is forgotten.
const TIDY: Duration = Duration::from_secs(60);

impl Swarm {
    /// Returns the mind of node `me`, which knows nobody yet. `generation` rises with every life of the cache; equal seeds
    /// make equal choices.
    pub fn new(me: Peer, generation: u64, config: Config, seed: u64, now: Time) -> Self {
        let mut swarm = Self {
            me,
            rng: fastrand::Rng::with_seed(seed),
            now,
            started: now,
            generation,
            view: Arc::default(),
            views: 0,
            blobs: BTreeMap::new(),
            wants: BTreeMap::new(),
            asked: BTreeMap::new(),
            counter: Counter::new(),
            intake: Intake::default(),
            register: Register::default(),
            standings: Standings::default(),
            grants: Grants::default(),
            news: News::default(),
            tombs: Tombs::default(),
            timers: BTreeSet::new(),
            dirty: BTreeSet::new(),
            starved: BTreeSet::new(),
            next: 0,
            out: Vec::new(),
            config,
        };
        swarm.timer(now + TIDY, Timer::Tidy);
        swarm
    }

    /// Returns when [`Input::Tick`] is due, if nothing else happens first.
    pub fn wake(&self) -> Option<Time> {
        self.timers.first().map(|(at, _)| *at)
    }

    /// Takes what happened, and returns what is to be done, in order.
    pub fn step(&mut self, now: Time, input: Input) -> Vec<Output> {
        self.now = self.now.max(now);
        self.ring();
        match input {
            Input::Tick => {}
            Input::View(view) => self.see(view),
            Input::Want { want, object, size, origin, pieces, urgency, order, reader } => {
                let terms = want::Terms { origin, urgency, order, reader };
                self.want(want, object, size, pieces, terms);
            }
            Input::Unwant { want } => self.unwant(want),
            Input::Checked { caller, object, origin, verdict } => self.checked(caller, object, &origin, verdict),
            Input::Restored { object, size, pieces, sealed } => self.restored(object, size, pieces, sealed),
            Input::Evict { object } => self.withdraw(object),
            Input::Lost { object, piece } => self.lost(object, piece),
            Input::Sized { object, size } => self.sized(object, size),
            Input::Sealed { object } => self.sealed(object),
            Input::Wrong { object, pieces } => self.wrong(object, &pieces),
            Input::Forget { object, lasts } => self.forget(object, lasts),
            Input::Drain => self.drain(),
            Input::Asked { from, inbound, ask } => self.asked_by(from, inbound, ask),
            Input::Sent { inbound, piece } => self.sent(inbound, piece),
            Input::Hung { inbound } => self.hung(inbound),
            Input::Reported { from, report } => self.reported(from, report),
            Input::Summarized { from, summary } => self.summarized(from, summary),
            Input::Framed { exchange, frame } => self.framed(exchange, frame),
            Input::Bytes { exchange, piece, got } => self.bytes(exchange, piece, got),
            Input::Arrived { exchange, piece, sum, vouch } => self.arrived(exchange, piece, sum, vouch),
            Input::Ended { exchange, end } => self.ended(exchange, end),
            Input::ReadBytes { reading, piece, got } => self.read_bytes(reading, piece, got),
            Input::ReadPiece { reading, piece, sum } => self.read_piece(reading, piece, sum),
            Input::ReadEnded { reading, end } => self.read_ended(reading, end),
        }
        self.settle();
        std::mem::take(&mut self.out)
    }

    /// Returns, for a person, what is being done to get a piece.
    pub fn explain(&self, object: &Object, piece: u32) -> Option<String> {
        let fetch = self.blobs.get(object)?.fetches.get(&piece)?;
        Some(format!("at {:?}, {:?}: {fetch:?}", self.now, self.blobs[object].is_todo(piece)))
    }

    /// Does what became possible.
    fn settle(&mut self) {
        loop {
            while let Some(object) = self.dirty.pop_first() {
                self.pump(object);
            }
            match self.starved.first().copied() {
                Some((urgency, object)) if self.has_room(urgency.0) => {
                    self.starved.remove(&(urgency, object));
                    self.dirty.insert(object);
                }
                _ => break,
            }
        }
        self.upload();
    }

    fn timer(&mut self, at: Time, timer: Timer) {
        self.timers.insert((at, timer));
    }

    fn ring(&mut self) {
        while let Some((at, timer)) = self.timers.first().copied()
            && at <= self.now
        {
            self.timers.pop_first();
            match timer {
                Timer::Exchange(exchange) => self.watch_exchange(exchange),
                Timer::Inbound(inbound) => self.watch_inbound(inbound),
                Timer::Fetch(place) => self.watch_fetch(place),
                Timer::Source(object) => {
                    self.dirty.insert(object);
                }
                Timer::News(home) => self.send_news(home),
                Timer::Leases => self.renew_leases(),
                Timer::Summary => self.summarize(),
                Timer::Moved => self.tell_new_homes(),
                Timer::Upload => {}
                Timer::Unlink(object) => self.unlink(object),
                Timer::Tidy => self.tidy(),
            }
        }
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn see(&mut self, view: Arc<View>) {
        self.view = view;
        self.views += 1;
        let jitter = self.config.rereport.mul_f64(self.rng.f64());
        self.timer(self.now + jitter, Timer::Moved);
        self.dirty.extend(self.blobs.iter().filter(|(_, blob)| !blob.todo.is_empty()).map(|(object, _)| *object));
    }

    /// Returns what is known of an object, from now on if it was not known.
    fn blob(&mut self, object: Object) -> &mut Blob {
        let shuffle = &mut self.rng;
        self.blobs.entry(object).or_insert_with(|| Blob::new(shuffle.u32(..)))
    }

    /// Begins to fetch a piece, or makes its fetch more urgent. None if it is there.
    fn begin(&mut self, object: Object, piece: u32, urgency: Urgency, order: Order) -> Option<&mut Fetch> {
        let (now, alone) = (self.now, self.config.alone);
        let patience = self.config.alone_spread.mul_f64(self.rng.f64());
        self.hurry(object, piece, urgency);
        let blob = self.blobs.get_mut(&object)?;
        if blob.have.has(piece) {
            return None;
        }
        if !blob.fetches.contains_key(&piece) {
            self.timers.insert((now + alone + patience, Timer::Fetch(Place { object, piece })));
        }
        self.dirty.insert(object);
        Some(blob.fetch(piece, urgency, order, now, patience))
    }

    /// A piece is here, and good.
    fn gain(&mut self, from: Option<Exchange>, object: Object, piece: u32) {
        self.out.push(Output::Keep { from, object, piece });
        let Some(blob) = self.blobs.get_mut(&object) else { return };
        let first = blob.have.is_empty();
        blob.have.insert(piece);
        let fetch = blob.end_fetch(piece);
        if blob.pieces() == Some(blob.have.len()) && !blob.sealed {
            self.out.push(Output::Whole { object });
        }
        self.dirty.insert(object);
        for via in fetch.into_iter().flat_map(|fetch| fetch.sources) {
            self.let_go(via, object, piece);
        }
        self.believe(object, piece);
        self.serve_waiting(object, piece);
        if first {
            self.plan_summary();
        }
    }

    /// One piece is not needed from a source any more; one that has nothing else to do is left.
    fn let_go(&mut self, via: Via, object: Object, piece: u32) {
        match via {
            Via::Ask(exchange) => self.drop_from_ask(exchange, piece),
            Via::Read(reading) => self.drop_from_read(reading, object, piece),
        }
    }

    fn tidy(&mut self) {
        let view = self.view.clone();
        let member = |peer: &Peer| view.member(peer).is_some();
        self.standings.tidy(self.now, member);
        self.tombs.tidy(self.now);
        self.news.tidy(member);
        let mut listed = BTreeMap::new();
        for blob in self.blobs.values_mut() {
            blob.ledgers.retain(|_, ledger| {
                ledger.tidy(self.now, member, &mut listed);
                !ledger.is_empty()
            });
        }
        self.news.count(listed);
        self.blobs.retain(|_, blob| !blob.is_idle());
        self.timer(self.now + TIDY, Timer::Tidy);
    }

    fn withdrawn(&self, object: &Object) -> bool {
        self.blobs.get(object).is_some_and(|blob| blob.withdrawn.is_some())
    }

    /// Whether a member may be asked now.
    fn usable(&self, peer: &Peer) -> bool {
        *peer != self.me && self.standings.usable(peer, self.now)
    }

    /// Notes that a peer refused or was silent.
    fn bury(&mut self, peer: Peer) {
        self.standings.dead(peer, self.now + self.config.dead);
    }

    /// Notes that a peer promised for too long, or hardly sent: what it says does not help it any more, only what it gives.
    fn despair(&mut self, peer: Peer) {
        self.standings.useless(peer, self.now + self.config.deadline * 2);
        let stuck =
            |asked: &Asked| asked.to == peer && asked.flowing.is_none() && self.now.since(asked.at) >= ask::STUCK;
        let others: Vec<Exchange> =
            self.asked.iter().filter(|(_, asked)| stuck(asked)).map(|(exchange, _)| *exchange).collect();
        for exchange in others {
            self.leave(exchange, blob::Vain { until: self.now + ask::RETRY, skip: true });
        }
    }

    /// Whether a peer is somebody who can be asked at all: names that others make up are not remembered.
    fn is_member(&self, peer: &Peer) -> bool {
        *peer != self.me && self.view.member(peer).is_some()
    }

    /// Forgets what a peer has, as far as it or others said so.
    fn forget_claims(&mut self, peer: &Peer) {
        for blob in self.blobs.values_mut() {
            blob.known.forget(peer);
            blob.ledgers.values_mut().for_each(|ledger| ledger.forget(peer));
        }
    }

    /// Puts a peer in quarantine, on our own evidence.
    fn quarantine(&mut self, peer: Peer, blame: port::Blame, object: Object, piece: u32) {
        if peer != self.me && self.standings.quarantine(peer, self.now, self.now + self.config.quarantine) {
            self.out.push(Output::Quarantine { peer, blame, object, piece });
        }
        self.forget_claims(&peer);
        if blame != port::Blame::Bytes {
            self.discard_vouched(peer);
        }
    }
}

#[cfg(test)]
mod tests;
