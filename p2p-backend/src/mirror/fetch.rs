//! Getting pieces: one upstream request per run of missing neighbours, however many callers wait for them.
//!
//! A run asks the mirrors in order, then the registry; where one breaks off, the next continues at that byte. It ends
//! early when nobody waits for what it still has to get, but not within a piece: a caller that hangs up and comes back
//! would otherwise never get further. Two requests must never wait for each other through two mirrors, so a request
//! that came through a mirror does not join a run that is asking one.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock, Weak};

use bytes::Bytes;
use http::{HeaderValue, Method, StatusCode};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::driver::Driver;
use super::filling::{Interest, Launch, Step};
use super::metrics::Metrics;
use super::pieces::{Claim, Giver, Look, Verdict};
use super::quota::Pin;
use super::upstream::{Answer, Call, Upstream, UpstreamError, Via};
use crate::registry::head::{content_range, length, no_blob};

/// Pieces that one request asks for at most.
pub(super) const WINDOW: u64 = 8;
/// Runs at a time; each holds about a piece of memory.
const RUNS: usize = 64;

/// On whose behalf bytes of a blob are fetched, and from where.
#[derive(Debug)]
pub(super) struct Errand {
    pub(super) registry: String,
    pub(super) repo: String,
    /// `/v2/<repo>/blobs/<digest>`.
    pub(super) path: String,
    pub(super) authorization: Option<HeaderValue>,
    /// Stands for the caller, the registry and the path together.
    pub(super) key: [u8; 32],
    pub(super) hops: Vec<String>,
    /// Only the registry's own bytes will do.
    pub(super) no_peer: bool,
    /// The reader compares what it gets with digests of its own.
    pub(super) verifies: bool,
    /// Stands for the caller's token; none if it has none.
    pub(super) caller: Option<[u8; 32]>,
    /// Nobody waits for it yet.
    pub(super) prefetch: bool,
}

impl Errand {
    /// Returns the request that asks whether the caller may have the blob, and how large it is.
    pub(super) fn question(&self) -> Call<'_> {
        Call {
            method: Method::HEAD,
            registry: &self.registry,
            repo: &self.repo,
            path: &self.path,
            range: None,
            accept: None,
            authorization: self.authorization.as_ref(),
            hops: &self.hops,
        }
    }
}

/// What fetches.
#[derive(Debug)]
pub(super) struct Fetcher {
    pub(super) upstream: Upstream,
    pub(super) metrics: Arc<Metrics>,
    runs: Semaphore,
    tasks: TaskTracker,
    stop: CancellationToken,
    /// Who gets pieces where this node is one of a swarm.
    pub(super) driver: OnceLock<Weak<Driver>>,
}

impl Fetcher {
    pub(super) fn new(upstream: Upstream, metrics: Arc<Metrics>, stop: CancellationToken) -> Arc<Self> {
        Arc::new(Self {
            upstream,
            metrics,
            runs: Semaphore::new(RUNS),
            tasks: TaskTracker::new(),
            stop,
            driver: OnceLock::new(),
        })
    }

    /// Waits for what it started; nothing may be started any more.
    pub(super) async fn finish(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Starts to fetch the run of absent pieces at the beginning of `within`; the interests keep it going.
    pub(super) fn launch(
        self: &Arc<Self>,
        pin: &Pin,
        errand: &Arc<Errand>,
        within: Range<u64>,
    ) -> Vec<(u64, Interest)> {
        self.launch_with(pin, errand, within, None)
    }

    /// As [`Fetcher::launch`], with an answer to the request for `within` from its beginning.
    pub(super) fn launch_with(
        self: &Arc<Self>,
        pin: &Pin,
        errand: &Arc<Errand>,
        within: Range<u64>,
        opened: Option<(Via, Answer)>,
    ) -> Vec<(u64, Interest)> {
        if let Some(driver) = self.driver.get().and_then(Weak::upgrade) {
            return driver.launch(pin, errand, within);
        }
        let at_registry = match &opened {
            Some((via, _)) => *via == Via::Registry,
            None => {
                let no_mirror = self.upstream.mirrors(false).next().is_none();
                no_mirror || errand.no_peer || pin.registry_only.load(Ordering::Relaxed)
            }
        };
        let start = within.start;
        let launch = Launch::new(errand.key, at_registry);
        let (claims, interests) = pin.blob().claim(within, &launch);
        if claims.is_empty() {
            return Vec::new();
        }
        let numbers: Vec<u64> = claims.iter().map(Claim::piece).collect();
        let run = Run {
            fetcher: self.clone(),
            pin: pin.clone(),
            errand: errand.clone(),
            launch,
            // Somebody else may have claimed the first pieces meanwhile; then it is an answer to another question.
            opened: opened.filter(|_| numbers.first() == Some(&start)),
            claims: claims.into(),
            asked_whole: false,
        };
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = run.go() => {}
                () = stop.cancelled() => {}
            }
        });
        numbers.into_iter().zip(interests).collect()
    }

    /// Fetches what is missing of a blob, for nobody in particular.
    pub(super) async fn fill(self: &Arc<Self>, pin: &Pin, errand: &Arc<Errand>) {
        let mut piece = 0;
        while piece < pin.pieces() {
            let (number, mut interest) = match pin.look(piece) {
                Look::Ready => {
                    piece += 1;
                    continue;
                }
                Look::Filling(interest) => (piece, interest),
                Look::Absent => {
                    let mut held = self.launch(pin, errand, piece..(piece + WINDOW).min(pin.pieces()));
                    match held.pop() {
                        Some((number, interest)) => (number, interest),
                        None => continue,
                    }
                }
            };
            let length = pin.extent(number).end - pin.extent(number).start;
            match interest.after(length).await {
                Step::Bytes(_) | Step::End(super::filling::End::Stored | super::filling::End::Abandoned) => {}
                Step::End(super::filling::End::Unstored | super::filling::End::Failed(_)) => return,
            }
        }
    }

    /// Runs `job`, owned by this fetcher, until it ends or the daemon stops.
    pub(super) fn spawn(&self, job: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = job => {}
                () = stop.cancelled() => {}
            }
        });
    }

    /// Compares a complete blob with its name, in the background, if nobody has.
    pub(super) fn prove(self: &Arc<Self>, pin: &Pin) {
        if !pin.wants_proof() {
            return;
        }
        let (fetcher, pin) = (self.clone(), pin.clone());
        self.tasks.spawn_blocking(move || fetcher.prove_now(&pin).is_some());
    }

    /// Compares a complete blob with its name, if nobody has; tells whether they match. Blocks.
    pub(super) fn prove_now(&self, pin: &Pin) -> Option<bool> {
        let bytes = |givers: &[(Giver, u64)], is: fn(&Giver) -> bool| -> u64 {
            givers.iter().filter(|(giver, _)| is(giver)).map(|(_, bytes)| bytes).sum()
        };
        let matches = match pin.prove() {
            Verdict::NotNow => None,
            Verdict::Proved(givers) => {
                self.metrics.finished.inc();
                tracing::info!(
                    digest = %format_args!("sha256:{}", pin.digest()),
                    size = pin.size(),
                    from_registry = bytes(&givers, |giver| *giver == Giver::Registry),
                    from_mirrors = bytes(&givers, |giver| matches!(giver, Giver::Mirror(_))),
                    from_peers = bytes(&givers, |giver| matches!(giver, Giver::Peer(_))),
                    from_before = bytes(&givers, |giver| *giver == Giver::Earlier),
                    "blob finished"
                );
                Some(true)
            }
            Verdict::Refuted(givers) => {
                self.metrics.refuted.inc();
                let from: Vec<String> = givers
                    .iter()
                    .map(|(giver, bytes)| match giver {
                        Giver::Registry => format!("the registry: {bytes}"),
                        Giver::Mirror(number) => {
                            format!("{}: {bytes}", self.upstream.name(Via::Mirror(*number), "?"))
                        }
                        Giver::Peer(peer) => format!("member {peer}: {bytes}"),
                        Giver::Earlier => format!("an earlier run: {bytes}"),
                    })
                    .collect();
                tracing::error!(
                    digest = %format_args!("sha256:{}", pin.digest()),
                    size = pin.size(),
                    from = %from.join(", "),
                    "a complete blob does not match its digest; its pieces are dropped and will be read from the registry"
                );
                Some(false)
            }
        };
        pin.store().report();
        matches
    }

    /// Keeps a piece whose bytes are all there; tells whether it is on the disk. Blocks.
    pub(super) fn commit_now(&self, pin: &Pin, claim: Claim, giver: Giver) -> bool {
        let piece = claim.piece();
        let length = pin.extent(piece).end - pin.extent(piece).start;
        let room = pin.store().make_room(length);
        let outcome = claim.commit(giver, room);
        match &outcome {
            Ok(true) => {}
            Ok(false) => {
                self.metrics.unkept.inc();
                tracing::debug!(digest = %pin.digest(), piece, "no room for a piece within the quota; passed on without keeping it");
            }
            Err(error) => {
                if error.kind() == std::io::ErrorKind::StorageFull {
                    // Too late for this piece; the next ones find room.
                    pin.store().give_up(WINDOW * length);
                }
                self.metrics.unkept.inc();
                tracing::warn!(digest = %pin.digest(), piece, %error, "could not write a piece to the cache; passed on without keeping it");
            }
        }
        pin.store().report();
        matches!(outcome, Ok(true))
    }
}

/// One request upstream, and its continuations.
struct Run {
    fetcher: Arc<Fetcher>,
    pin: Pin,
    errand: Arc<Errand>,
    launch: Arc<Launch>,
    /// Neighbours, in order; the first may have begun. After a whole answer there may be gaps.
    claims: VecDeque<Claim>,
    /// What the first upstream has answered already.
    opened: Option<(Via, Answer)>,
    /// The upstream sends the whole blob or nothing: take all of it, once.
    asked_whole: bool,
}

/// Why a run stopped listening to one upstream.
enum Stop {
    /// All pieces are there, or nobody wants the others.
    Done,
    /// This one is of no use any more.
    Next(UpstreamError),
}

impl Run {
    async fn go(mut self) {
        let fetcher = self.fetcher.clone();
        let Some(Ok(_permit)) = self.unless_left(fetcher.runs.acquire()).await else { return };
        let at_registry = self.launch.at_registry.load(Ordering::Relaxed);
        let mut sources: VecDeque<Via> =
            if at_registry { VecDeque::new() } else { fetcher.upstream.mirrors(false).collect() };
        // The registry twice: a connection that broke says little about the next one.
        sources.extend([Via::Registry, Via::Registry]);
        if let Some((via @ Via::Mirror(_), _)) = self.opened {
            sources.retain(|other| *other != via);
            sources.push_front(via);
        }
        let mut last = None;
        while let Some(via) = sources.pop_front() {
            if via == Via::Registry {
                self.launch.at_registry.store(true, Ordering::Relaxed);
            }
            let before = self.left();
            match self.listen(via).await {
                Stop::Done => return,
                Stop::Next(error) => {
                    let name = fetcher.upstream.name(via, &self.errand.registry);
                    tracing::debug!(by = name, %error, path = self.errand.path, "an upstream gave nothing or broke off");
                    // As long as the registry gives something, it may break off.
                    if via == Via::Registry && self.left() < before && sources.is_empty() {
                        sources.push_back(via);
                    }
                    let hopeless = match &error {
                        UpstreamError::Refused { .. } | UpstreamError::Busy { .. } => true,
                        // A second silence would outlast every caller's patience.
                        UpstreamError::Silent { .. } => self.left() == before,
                        _ => false,
                    };
                    last = Some(error);
                    if via == Via::Registry && hopeless {
                        break;
                    }
                }
            }
        }
        if let Some(error) = last {
            let error = Arc::new(error);
            for claim in self.claims.drain(..) {
                claim.fail(error.clone());
            }
        }
    }

    fn left(&self) -> u64 {
        self.claims.iter().map(|claim| claim.filling().missing()).sum()
    }

    fn wanted(&self) -> bool {
        self.asked_whole || self.claims.iter().any(|claim| claim.filling().wanted())
    }

    /// Waits for `work` as long as somebody waits for us.
    async fn unless_left<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        let left = async {
            while self.wanted() {
                self.launch.left.notified().await;
            }
        };
        tokio::select! {
            done = work => Some(done),
            () = left => None,
        }
    }

    /// Takes bytes from `via` until there are no more to take.
    async fn listen(&mut self, via: Via) -> Stop {
        let fetcher = self.fetcher.clone();
        let errand = self.errand.clone();
        let Some((first, last)) = self.claims.front().zip(self.claims.back()) else { return Stop::Done };
        let start = self.pin.extent(first.piece()).start + first.filling().got();
        let range = start..self.pin.extent(last.piece()).end;
        let call = Call {
            method: Method::GET,
            registry: &errand.registry,
            repo: &errand.repo,
            path: &errand.path,
            range: Some(range.clone()),
            accept: None,
            authorization: errand.authorization.as_ref(),
            hops: &errand.hops,
        };
        let mut answer = match self.opened.take() {
            Some((from, answer)) if from == via => answer,
            _ => match self.unless_left(fetcher.upstream.send(via, &call)).await {
                None => return Stop::Done,
                Some(Err(error)) => return Stop::Next(error),
                Some(Ok(answer)) => answer,
            },
        };
        let odd = |reason: String| {
            Stop::Next(UpstreamError::Odd { by: fetcher.upstream.name(via, &errand.registry).to_owned(), reason })
        };
        let size = self.pin.size();
        if let Some(reason) = no_blob(&answer.headers) {
            return odd(format!("answers a range {reason}"));
        }
        let mut at = match answer.status {
            StatusCode::PARTIAL_CONTENT => match content_range(&answer.headers) {
                // A larger blob of this name is another one; an answer that does not tell is as good as its bytes.
                Some((got, total)) if total.is_none_or(|total| total == size) && got.start == start => start,
                got => return odd(format!("answers range {range:?} of {size} bytes with {got:?}")),
            },
            StatusCode::OK => {
                if length(&answer.headers).is_some_and(|length| length != size) {
                    return odd("answers a range with something that is not the blob".into());
                }
                self.take_whole();
                0
            }
            status => return odd(format!("answers a range with {status}")),
        };
        loop {
            let Some(front) = self.claims.front() else { return Stop::Done };
            if front.filling().got() == 0 && !self.wanted() {
                return Stop::Done;
            }
            let bytes = match fetcher.upstream.next(&mut answer).await {
                Ok(Some(bytes)) => bytes,
                Ok(None) => return odd("ended the body early".into()),
                Err(error) => return Stop::Next(error),
            };
            self.take(via, &mut at, bytes).await;
        }
    }

    /// A host that ignores ranges is listened to once, to the end: the next range would cost the same again.
    fn take_whole(&mut self) {
        if self.pin.size() > 0 && !self.asked_whole {
            self.asked_whole = true;
            let mut claims: Vec<Claim> = self.claims.drain(..).collect();
            claims.extend(self.pin.blob().claim_all(&self.launch));
            claims.sort_by_key(Claim::piece);
            self.claims = claims.into();
        }
    }

    /// Puts bytes that begin at offset `at` of the blob where they belong.
    async fn take(&mut self, via: Via, at: &mut u64, mut bytes: Bytes) {
        while let Some(front) = self.claims.front()
            && !bytes.is_empty()
        {
            let place = self.pin.extent(front.piece()).start + front.filling().got();
            let skip = place.saturating_sub(*at).min(bytes.len() as u64);
            if skip > 0 {
                let _ = bytes.split_to(usize::try_from(skip).unwrap_or(usize::MAX));
                *at += skip;
                continue;
            }
            let take = front.filling().missing().min(bytes.len() as u64);
            front.filling().push(bytes.split_to(usize::try_from(take).unwrap_or(usize::MAX)));
            *at += take;
            if front.filling().missing() == 0
                && let Some(claim) = self.claims.pop_front()
            {
                self.commit(via, claim).await;
            }
        }
    }

    async fn commit(&self, via: Via, claim: Claim) {
        let giver = match via {
            Via::Registry => Giver::Registry,
            Via::Mirror(number) => Giver::Mirror(number),
        };
        let (fetcher, pin) = (self.fetcher.clone(), self.pin.clone());
        let kept = tokio::task::spawn_blocking(move || fetcher.commit_now(&pin, claim, giver)).await;
        if let Err(error) = kept {
            // The claim went with the thread, and gave the piece back.
            tracing::error!(%error, "the thread that writes a piece died");
        }
        self.fetcher.prove(&self.pin);
    }
}
