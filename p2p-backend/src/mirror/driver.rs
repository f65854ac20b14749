//! Does what the swarm decides: the one place where its decisions meet sockets, the disk and the clock.
//!
//! Whatever happens is told to [`Swarm::step`] under one lock, and what it wants done is begun there in order; nothing in here
//! waits. What takes time is a task that tells of its end: `asking` (a request to a member), `answering` (a member's request to
//! us), `reading` (a request to the registry), `admitting` (a question about a caller's right). The pieces on their way are `flights`,
//! and who vouches for those that are here is kept by `vouches`. There are no opinions in here: who is asked, believed or refused is decided in [`swarm`](crate::swarm).

mod admitting;
mod answering;
mod asking;
mod belief;
mod flights;
mod overview;
mod reading;
mod tombs;
mod view;
mod vouches;

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Instant, SystemTime};

use nydus_rafs::Digest;
use tokio::sync::{Notify, oneshot};
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::fetch::{Errand, Fetcher};
use super::filling::{Filling, Interest, Launch};
use super::metrics::Decided;
use super::pace::Limits;
use super::pieces::{Claim, Giver};
use super::quota::{Pin, Store};
use super::upstream::UpstreamError;
use crate::node::{self, Node};
use crate::swarm::config::Trust;
use crate::swarm::grid::Pieces;
use crate::swarm::message::{Origin, Urgency};
use crate::swarm::port::{Event, Exchange, Failure, Inbound, Input, Order, Output, Reader, Reading, Want};
use crate::swarm::wire::Message as _;
use crate::swarm::{Config, Object, Peer, Swarm, Time};
use admitting::Admission;
use answering::Saying;
use asking::Arrived;
use flights::{Flights, Owner};
use tombs::Tombs;
use vouches::Vouches;

/// How long news may take.
const NEWS: std::time::Duration = std::time::Duration::from_secs(3);
/// How often it is looked whether the cache is nearly full.
const LOOK: std::time::Duration = std::time::Duration::from_secs(1);

/// The driver of one node; a handle is shared by all its tasks.
#[derive(Debug)]
pub(super) struct Driver {
    me: Weak<Self>,
    mind: Mutex<Mind>,
    /// What there is to be looked at at another time than was thought.
    sooner: Notify,
    begin: Instant,
    store: Arc<Store>,
    fetcher: Arc<Fetcher>,
    vouches: Vouches,
    limits: Limits,
    tombs: Tombs,
    /// What is enough for readers that do not verify.
    trust: Trust,
    /// Told when more may be given to them.
    believed: Notify,
    node: OnceLock<Node>,
    tasks: TaskTracker,
    stop: CancellationToken,
    drained: Notify,
}

/// What is behind the lock.
#[derive(Debug)]
struct Mind {
    swarm: Swarm,
    inputs: VecDeque<Input>,
    next: u64,
    flights: Flights,
    wants: HashMap<Want, Wanted>,
    asking: HashMap<Exchange, asking::Asking>,
    answering: HashMap<Inbound, Saying>,
    reading: HashMap<Reading, reading::Read>,
    /// Pieces behind which there is more than a member's word; kept only where that is asked for.
    proved: HashMap<Digest, Pieces>,
    /// Pieces from members whose blob has no known size yet.
    early: HashMap<(Digest, u32), Arrived>,
    /// What the registry last said about an object that could not be had.
    errors: HashMap<Digest, Arc<UpstreamError>>,
}

/// What a local reader wants.
#[derive(Debug)]
struct Wanted {
    digest: Digest,
    errand: Arc<Errand>,
    /// Through which it hears whether it may.
    admission: Option<oneshot::Sender<Admission>>,
    /// It may.
    admitted: bool,
    /// What was said of the blob's size since.
    size: Option<u64>,
}

impl Driver {
    /// Makes the driver of a node that has what is in `store`. It does nothing before [`Driver::attach`].
    pub(super) fn new(
        identity: &node::identity::Identity,
        config: Config,
        store: Arc<Store>,
        fetcher: Arc<Fetcher>,
        limits: Limits,
        stop: CancellationToken,
    ) -> Arc<Self> {
        let trust = config.trust;
        let seed = u64::from_le_bytes(identity.peer().0[..8].try_into().expect("eight of 32 bytes"));
        let seed = seed ^ u64::from(identity.boot());
        let swarm = Swarm::new(identity.peer(), identity.generation(), config, seed, Time(0));
        let vouches = Vouches::new(store.dir());
        // Beside the blobs: among them it would be a stray file.
        let tombs = Tombs::new(store.dir().parent().unwrap_or(store.dir()));
        Arc::new_cyclic(|me| Self {
            me: me.clone(),
            mind: Mutex::new(Mind {
                swarm,
                inputs: VecDeque::new(),
                next: 0,
                flights: Flights::default(),
                wants: HashMap::new(),
                asking: HashMap::new(),
                answering: HashMap::new(),
                reading: HashMap::new(),
                proved: HashMap::new(),
                early: HashMap::new(),
                errors: HashMap::new(),
            }),
            sooner: Notify::new(),
            begin: Instant::now(),
            store,
            fetcher,
            vouches,
            limits,
            tombs,
            trust,
            believed: Notify::new(),
            node: OnceLock::new(),
            tasks: TaskTracker::new(),
            stop,
            drained: Notify::new(),
        })
    }

    /// Tells what the cache has, and begins to drive on the connections of `node`.
    pub(super) async fn attach(self: &Arc<Self>, node: Node) {
        let (driver, identity) = (self.clone(), node.identity().clone());
        let restoring = tokio::task::spawn_blocking(move || {
            for input in driver.vouches.restore(&driver.store, &identity) {
                driver.feed(input);
            }
            for (object, lasts) in driver.tombs.read(SystemTime::now()) {
                driver.bury(object, lasts);
            }
        });
        // A part of the cache that cannot be told of is fetched again.
        let _ = restoring.await;
        let table = node.watch();
        if self.node.set(node).is_err() {
            return;
        }
        self.spawn(self.clone().watch_members(table));
        self.spawn(self.clone().keep_time());
        self.spawn(self.clone().keep_room());
    }

    fn node(&self) -> Option<&Node> {
        self.node.get()
    }

    fn mind(&self) -> MutexGuard<'_, Mind> {
        self.mind.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Time {
        Time(u64::try_from(self.begin.elapsed().as_micros()).unwrap_or(u64::MAX))
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
        let stop = self.stop.clone();
        let task = self.tasks.spawn(async move {
            tokio::select! {
                () = task => {}
                () = stop.cancelled() => {}
            }
        });
        task.abort_handle()
    }

    /// Tells the swarm what happened, and begins what it wants done.
    fn feed(&self, input: Input) {
        let mut mind = self.mind();
        self.feed_all(&mut mind, [input]);
    }

    fn feed_all(&self, mind: &mut Mind, inputs: impl IntoIterator<Item = Input>) {
        let Some(own) = self.me.upgrade() else { return };
        let before = mind.swarm.wake();
        mind.inputs.extend(inputs);
        while let Some(input) = mind.inputs.pop_front() {
            if let Input::Lost { object, piece } = &input {
                mind.doubt(&object.0, *piece);
            }
            let outputs = mind.swarm.step(self.now(), input);
            for output in outputs {
                own.carry_out(mind, output);
            }
        }
        if mind.swarm.wake() != before {
            self.sooner.notify_one();
        }
    }

    /// Wakes the swarm when it wants to be.
    async fn keep_time(self: Arc<Self>) {
        loop {
            let wake = self.mind().swarm.wake();
            let sleeping = async {
                match wake {
                    Some(at) => tokio::time::sleep(at.since(self.now())).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = sleeping => self.feed(Input::Tick),
                () = self.sooner.notified() => {}
            }
        }
    }

    /// Withdraws what will have to leave the cache before it leaves, so that members do not come for it in vain.
    async fn keep_room(self: Arc<Self>) {
        let mut evicted = self.store.watch_evictions();
        let mut look = tokio::time::interval(LOOK);
        loop {
            let digests = tokio::select! {
                // It had to go at once.
                digest = evicted.recv() => digest.into_iter().collect(),
                _ = look.tick() => {
                    let store = self.store.clone();
                    tokio::task::spawn_blocking(move || store.next_to_leave()).await.unwrap_or_default()
                }
            };
            for digest in digests {
                self.feed(Input::Evict { object: Object(digest) });
            }
        }
    }

    /// Begins one thing that the swarm wants done.
    fn carry_out(self: &Arc<Self>, mind: &mut Mind, output: Output) {
        match output {
            Output::Ask { exchange, to, ask } => self.ask(mind, exchange, to, ask),
            Output::Leave { exchange } => {
                if let Some(asking) = mind.asking.remove(&exchange) {
                    asking.leave();
                }
            }
            Output::Keep { from, object, piece } => self.keep(mind, from, object, piece),
            Output::Reject { exchange, piece } => {
                if let Some(asking) = mind.asking.get_mut(&exchange) {
                    asking.take(piece);
                }
            }
            Output::Drop { object, pieces } => {
                if let Some(pin) = self.store.held(&object.0) {
                    for piece in pieces.iter() {
                        pin.drop_piece(u64::from(piece));
                        self.vouches.forget(&object.0, piece);
                        mind.doubt(&object.0, piece);
                    }
                }
            }
            Output::Trust { object, pieces } => self.believe(mind, object.0, &pieces),
            Output::Answer { inbound, frame } => {
                if let Some(saying) = mind.answering.get(&inbound) {
                    saying.frame(&frame);
                }
            }
            Output::Send { inbound, object, piece, offset, map } => {
                self.send(mind, inbound, object, piece, offset, &map);
            }
            Output::Abort { inbound } => {
                if let Some(saying) = mind.answering.remove(&inbound) {
                    saying.abort();
                }
            }
            // Dropping what it is said through ends an answer.
            Output::Close { inbound } => drop(mind.answering.remove(&inbound)),
            Output::Read { reading, object, size, origin, pieces, offset, credential } => {
                self.read(mind, reading, object, size, &origin, pieces, offset, credential);
            }
            Output::StopRead { reading } => {
                if let Some(read) = mind.reading.remove(&reading) {
                    read.task.abort();
                    mind.flights.give_back(Owner::Reading(reading), |_, _| None);
                }
            }
            Output::Check { caller, object, origin } => self.check(mind, caller, object, origin),
            Output::Grant { want } => {
                let Some(wanted) = mind.wants.get(&want) else { return };
                let size = wanted.size.or_else(|| self.store.held(&wanted.digest).map(|pin| pin.size()));
                mind.admit(want, Ok(size));
            }
            Output::Fail { want, pieces, why } => {
                let Some(wanted) = mind.wants.get(&want) else { return };
                let digest = wanted.digest;
                let told = mind.errors.get(&digest).filter(|_| why != Failure::Forgotten).cloned();
                let error = told.unwrap_or_else(|| Arc::new(failure(why)));
                if matches!(why, Failure::Denied | Failure::Unproved | Failure::Forgotten) {
                    mind.admit(want, Err(error.clone()));
                }
                for piece in pieces.iter() {
                    mind.flights.fail(&digest, piece, Owner::Want(want), &error);
                }
            }
            Output::Report { to, report } => self.report(to, report),
            Output::Gossip { summary } => {
                self.keep_tombs(&summary.forgotten);
                if let Some(node) = self.node() {
                    node.gossip(summary.encode().into());
                }
            }
            Output::Unlink { object } => {
                self.unlink(object.0);
                self.vouches.forget_all(&object.0);
                mind.proved.remove(&object.0);
            }
            Output::Drained => self.drained.notify_one(),
            Output::Quarantine { peer, blame, object, piece } => {
                self.fetcher.metrics.quarantines.inc();
                tracing::warn!(
                    %peer, ?blame, digest = %format_args!("sha256:{}", object.0), piece,
                    "a member gave wrong bytes or vouched for them; it is not asked for a while (`swarm.quarantine`)"
                );
            }
            Output::Whole { object } => {
                if let Some(pin) = self.store.held(&object.0) {
                    self.prove(pin);
                }
            }
            Output::Count(event) => {
                let event = match event {
                    Event::Hedge => "hedge",
                    Event::Silent => "silent",
                    Event::Alone => "alone",
                    Event::Referral => "referral",
                    Event::Lease => "lease",
                };
                self.fetcher.metrics.decisions.get_or_create(&Decided { event }).inc();
            }
        }
    }

    /// Starts to get the run of absent pieces at the beginning of `within`, as [`Fetcher::launch`] does.
    pub(super) fn launch(&self, pin: &Pin, errand: &Arc<Errand>, within: Range<u64>) -> Vec<(u64, Interest)> {
        let Some(own) = self.me.upgrade() else { return Vec::new() };
        let launch = Launch::new(errand.key, errand.no_peer);
        let mut mind = self.mind();
        let (claims, interests) = pin.blob().claim(within, &launch);
        let (Some(first), Some(last)) = (claims.first(), claims.last()) else { return Vec::new() };
        let Some(pieces) = narrow(first.piece()).zip(narrow(last.piece() + 1)) else { return Vec::new() };
        let pieces = pieces.0..pieces.1;
        let object = Object(pin.digest());
        let numbers: Vec<u64> = claims.iter().map(Claim::piece).collect();
        let fillings: Vec<Arc<Filling>> = claims.iter().filter_map(Claim::shared).collect();
        mind.next += 1;
        let want = Want(mind.next);
        for claim in claims {
            mind.flights.board(&pin.digest(), claim, Owner::Want(want));
        }
        let wanted =
            Wanted { digest: pin.digest(), errand: errand.clone(), admission: None, admitted: true, size: None };
        mind.wants.insert(want, wanted);
        // What is absent here is lost, whatever was believed; but a piece that did not verify was somebody's lie.
        let lost = pieces.clone().filter(|_| !errand.no_peer).map(|piece| Input::Lost { object, piece });
        let reader = Reader { caller: errand.caller, verifies: errand.verifies, no_peer: errand.no_peer };
        let wish = Input::Want {
            want,
            object,
            size: Some(pin.size()),
            origin: origin(&errand.registry, &errand.repo),
            pieces: pieces.clone(),
            urgency: if errand.prefetch { Urgency::Prefetch } else { Urgency::Demand },
            order: Order::InOrder,
            reader,
        };
        let inputs: Vec<Input> = lost.chain([wish]).collect();
        self.feed_all(&mut mind, inputs);
        drop(mind);
        self.spawn(async move {
            while fillings.iter().any(|filling| filling.wanted() && !filling.ended()) {
                launch.left.notified().await;
            }
            own.unwant(want);
        });
        numbers.into_iter().zip(interests).collect()
    }

    fn unwant(&self, want: Want) {
        let mut mind = self.mind();
        self.feed_all(&mut mind, [Input::Unwant { want }]);
        if let Some(gone) = mind.wants.remove(&want) {
            let digest = gone.digest;
            if !mind.wants.values().any(|wanted| wanted.digest == digest) {
                mind.errors.remove(&digest);
            }
        }
        let Mind { flights, reading, .. } = &mut *mind;
        // What comes from the registry all the same goes where it went.
        flights.give_back(Owner::Want(want), |digest, piece| {
            let reads = |(_, read): &(&Reading, &reading::Read)| read.digest == *digest && read.pieces.contains(&piece);
            reading.iter().find(reads).map(|(reading, _)| Owner::Reading(*reading))
        });
    }

    /// Keeps a piece that has come.
    fn keep(self: &Arc<Self>, mind: &mut Mind, from: Option<Exchange>, object: Object, piece: u32) {
        let digest = object.0;
        let arrived = match from {
            None => None,
            Some(exchange) => {
                let Some(arrived) = mind.asking.get_mut(&exchange).and_then(|asking| asking.take(piece)) else {
                    mind.inputs.push_back(Input::Lost { object, piece });
                    return;
                };
                Some(arrived)
            }
        };
        let Some(pin) = self.store.held(&digest) else {
            if !arrived.is_some_and(|arrived| mind.keep_early(digest, piece, arrived)) {
                mind.inputs.push_back(Input::Lost { object, piece });
            }
            return;
        };
        self.keep_in(mind, &pin, piece, arrived);
    }

    /// Keeps a piece of a blob: what has arrived from a member, or what has come from the registry.
    fn keep_in(self: &Arc<Self>, mind: &mut Mind, pin: &Pin, piece: u32, arrived: Option<Arrived>) {
        let digest = pin.digest();
        let object = Object(digest);
        let claim = mind.flights.land(&digest, piece).or_else(|| {
            // Fetched for others: nobody here has claimed it.
            let launch = Launch::new([0; 32], true);
            pin.blob().claim(u64::from(piece)..u64::from(piece) + 1, &launch).0.pop()
        });
        // It is here already, from a time before the swarm knew of it.
        let Some(claim) = claim else { return };
        let whole = match &arrived {
            Some(arrived) => claim.filling().complete(&arrived.bytes),
            None => claim.filling().missing() == 0,
        };
        if !whole {
            // What the registry sent of it is something else.
            drop(claim);
            mind.inputs.push_back(Input::Wrong { object, pieces: std::iter::once(piece).collect() });
            return;
        }
        let mut giver = Giver::Registry;
        if let Some(arrived) = arrived {
            giver = Giver::Peer(arrived.from);
            self.vouches.note(&digest, piece, arrived.vouched);
            self.fetcher.metrics.count_peers(claim.filling().got());
        }
        let (own, pin) = (self.clone(), pin.clone());
        self.tasks.spawn_blocking(move || {
            if !own.fetcher.commit_now(&pin, claim, giver) {
                own.feed(Input::Lost { object, piece });
                return;
            }
            own.vouches.keep(&digest, piece);
            own.prove(pin);
        });
    }

    /// Compares a whole object with its name, if that was not done.
    fn prove(self: &Arc<Self>, pin: Pin) {
        if !pin.wants_proof() {
            return;
        }
        let own = self.clone();
        self.tasks.spawn_blocking(move || {
            let object = Object(pin.digest());
            match own.fetcher.prove_now(&pin) {
                Some(true) => own.feed(Input::Sealed { object }),
                Some(false) => {
                    let pieces = (0..pin.pieces()).filter_map(narrow).collect();
                    own.feed(Input::Wrong { object, pieces });
                }
                None => {}
            }
        });
    }

    fn report(self: &Arc<Self>, to: Peer, report: crate::swarm::message::Report) {
        let own = self.clone();
        self.spawn(async move {
            let Some(node) = own.node() else { return };
            let Some(member) = view::find(&node.table(), &to) else { return };
            // On a connection that a cut has swallowed the next ones would wait as long as TCP does.
            match tokio::time::timeout(NEWS, node.report(&member, report.encode().into())).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%to, %error, "news did not arrive"),
                Err(_) => tracing::debug!(%to, limit = ?NEWS, "news was not acknowledged"),
            }
        });
    }

    /// Has a blob forgotten here and everywhere, for as long as may be.
    pub(super) fn forget(&self, digest: Digest) {
        tracing::warn!(digest = %format_args!("sha256:{digest}"), "the operator has a blob forgotten by all members, for a day");
        self.bury(Object(digest), crate::swarm::leave::TOMB);
    }

    /// Leaves the cluster: withdraws what is here, lets what is being sent end, for at most `limit`.
    pub(super) async fn leave(&self, limit: std::time::Duration) {
        if let Some(node) = self.node() {
            node.say_leaving().await;
        }
        self.feed(Input::Drain);
        let _ = tokio::time::timeout(limit, self.drained.notified()).await;
        if let Some(node) = self.node() {
            node.leave().await;
        }
    }

    /// Waits for what it started; its stop must have been said.
    pub(super) async fn finish(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }
}

/// Returns where an object is read, as members tell each other.
fn origin(registry: &str, repo: &str) -> Origin {
    format!("{registry}/{repo}").into()
}

/// Returns the number of a piece as members say it; none beyond the largest object.
fn narrow(piece: u64) -> Option<u32> {
    u32::try_from(piece).ok().filter(|piece| *piece <= crate::swarm::grid::MOST_PIECES)
}

fn failure(why: Failure) -> UpstreamError {
    let reason = match why {
        Failure::Denied | Failure::Unproved => "the caller's right could not be proved",
        Failure::Refused => "the registry refuses it to this node and to every member that was asked",
        Failure::Unavailable => "no member has it, and the registry fails",
        Failure::Forgotten => "the operator had it forgotten; see `nydusctl swarm forget`",
    };
    UpstreamError::Odd { by: "the swarm".into(), reason: reason.into() }
}
