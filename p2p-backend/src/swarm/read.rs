//! Reading the registry: joined into runs, within its patience, with whose right.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use super::Swarm;
use super::blob::{Blob, Via};
use super::grid::{GROUP, Object, PIECE, group_of};
use super::members::Peer;
use super::message::{Origin, Sum, Urgency};
use super::port::{Credential, Event, Failure, Output, ReadEnd, Reading, Verdict};
use super::time::Time;

/// A request to a registry.
#[derive(Debug)]
struct Run {
    object: Object,
    origin: Origin,
    /// What is still to come.
    pieces: Range<u32>,
    credential: Credential,
    urgency: Urgency,
    begun: Time,
    /// Whether readers here wait for it, and not only others.
    own: bool,
    /// The piece whose bytes are coming.
    flowing: Option<u32>,
}

/// All requests to registries.
#[derive(Debug, Default)]
pub(super) struct Register {
    runs: BTreeMap<Reading, Run>,
    /// Until when a registry wants to be left alone.
    rests: BTreeMap<String, Time>,
    /// The same, as homes say.
    said: BTreeMap<String, Time>,
    /// When prefetch may read again, within its budget.
    prefetch: Time,
    /// When it is this node's turn to prefetch again, beside the other homes.
    turn: Time,
    /// Smoothed time that a request of prefetch took.
    took: Duration,
}

/// When a home looks again who reads in its stead.
const LOOK_AGAIN: Duration = Duration::from_millis(10);
/// The longest time that a registry is left alone because it, or somebody, says so.
pub(super) const LONGEST_REST: Duration = Duration::from_secs(60);
/// How long we do not try a registry that lets us not read an object.
const DENIED: Duration = Duration::from_secs(300);
/// How long a request of prefetch is thought to take before one was made: a group at 1 Gbit/s, and a round trip.
const TOOK: Duration = Duration::from_millis(60);
/// How long a registry that failed is left alone, doubled with every time.
const FAILED: Duration = Duration::from_millis(250);
/// Failures after which those who wait are told.
const FAILURES: u8 = 5;
/// The least time until then: somebody may bring the piece, or the registry come back.
const HOPELESS: Duration = Duration::from_secs(10);

/// Returns the registry of an origin.
fn registry(origin: &Origin) -> &str {
    origin.split('/').next().unwrap_or_default()
}

impl Register {
    /// Returns how many requests are out for readers here that are as urgent or more.
    pub(super) fn for_readers(&self, urgency: Urgency) -> usize {
        self.runs.values().filter(|run| run.own && run.urgency >= urgency).count()
    }

    /// Tells when a home may prefetch, if that is not now. `homes` may have something to prefetch, and `most` requests shall be
    /// out in all of them together: who has made one lets the others have theirs. `luck` is from zero to one.
    pub(super) fn prefetch_turn(&mut self, homes: usize, most: usize, luck: f64, now: Time) -> Option<Time> {
        let out = self.runs.values().filter(|run| run.urgency == Urgency::Prefetch).count();
        if out >= (most / homes.max(1)).max(1) {
            return Some(now + LOOK_AGAIN);
        }
        if homes <= most {
            return None;
        }
        if self.took.is_zero() {
            self.took = TOOK;
            self.turn = now + self.others(homes, most, luck);
        }
        Some(self.turn).filter(|turn| *turn > now)
    }

    /// Returns how long the others need for their requests.
    fn others(&self, homes: usize, most: usize, luck: f64) -> Duration {
        self.took.mul_f64((homes as f64 / most as f64 - 1.0).max(0.0) * (0.5 + luck))
    }

    /// A request of prefetch is over.
    fn prefetched(&mut self, took: Duration, homes: usize, most: usize, luck: f64, now: Time) {
        self.took = if self.took.is_zero() { took } else { (self.took * 3 + took) / 4 };
        self.turn = now + self.others(homes, most, luck);
    }

    /// Tells until when a registry wants to be left alone, by what it said to us or, with `hearsay`, to others.
    pub(super) fn rests(&self, origin: &Origin, hearsay: bool, now: Time) -> Option<Time> {
        let said = self.said.get(registry(origin)).filter(|_| hearsay);
        self.rests.get(registry(origin)).max(said).copied().filter(|until| *until > now)
    }

    /// Notes what a home says of a registry's wish.
    pub(super) fn said_to_rest(&mut self, origin: &Origin, until: Time, now: Time) {
        let rest = self.said.entry(registry(origin).to_owned()).or_default();
        *rest = until.min(now + LONGEST_REST).max(*rest);
    }

    /// Leaves a registry alone.
    pub(super) fn rest(&mut self, origin: &Origin, until: Time) {
        let rest = self.rests.entry(registry(origin).to_owned()).or_default();
        *rest = until.max(*rest);
    }

    /// Takes the time of one piece from the budget of prefetch; tells when to come back if it is used up.
    pub(super) fn budget(&mut self, rate: u64, now: Time) -> Option<Time> {
        if rate == 0 {
            return None;
        }
        if self.prefetch > now {
            return Some(self.prefetch);
        }
        // What was not used lately may be used at once, up to a group.
        let cost = Duration::from_micros(PIECE * 1_000_000 / rate);
        self.prefetch = self.prefetch.max(now - cost * GROUP) + cost;
        None
    }

    /// Whether the bytes of a piece are coming on a request.
    pub(super) fn flows(&self, reading: Reading, piece: u32) -> bool {
        self.runs.get(&reading).is_some_and(|run| run.flowing == Some(piece))
    }

    /// Whether the bytes of a piece are coming.
    pub(super) fn flowing(&self, object: Object, piece: u32) -> bool {
        self.runs.values().any(|run| run.object == object && run.flowing == Some(piece))
    }
}

impl Swarm {
    /// Reads a piece, and those behind it in its group that need the same.
    pub(super) fn read(&mut self, object: Object, piece: u32, origin: Origin, credential: Credential) {
        let Some(blob) = self.blobs.get(&object) else { return };
        let Some(first) = blob.fetches.get(&piece) else { return };
        let joins = |other: u32| {
            let fetch = blob.fetches.get(&other)?;
            // With spares out, the neighbours have a source already, but need the registry, too.
            let needs = blob.is_todo(other)
                || fetch.sources.iter().all(|via| matches!(via, Via::Ask(exchange) if self.is_spare(*exchange)));
            (needs
                && fetch.got == 0
                && fetch.no_peer == first.no_peer
                && fetch.lessor == first.lessor
                && !blob.have.has(other))
            .then_some(())
        };
        let last = (group_of(piece) + 1) * GROUP;
        let end = (piece + 1..last).find(|other| joins(*other).is_none()).unwrap_or(last);
        let size = blob.size;
        let offset = if first.pure && !first.mixed { first.got } else { 0 };
        let (urgency, begun) = (first.urgency, self.now);
        let own = (piece..end).filter_map(|piece| blob.fetches.get(&piece)).any(|fetch| !fetch.wants.is_empty());
        let reading = Reading(self.number());
        let run =
            Run { object, origin: origin.clone(), pieces: piece..end, credential, urgency, begun, own, flowing: None };
        self.register.runs.insert(reading, run);
        if let Some(blob) = self.blobs.get_mut(&object) {
            for other in piece..end {
                blob.assign(other, Via::Read(reading));
                if let Some(fetch) = blob.fetches.get_mut(&other) {
                    // Not above another source that we still wait for.
                    fetch.depth = fetch.depth.or(Some(0));
                    fetch.got = if other == piece { offset } else { 0 };
                    (fetch.pure, fetch.mixed) = (true, false);
                }
            }
        }
        self.out.push(Output::Read { reading, object, size, origin, pieces: piece..end, offset, credential });
    }

    /// Returns how many homes may have something of an object to prefetch.
    pub(super) fn prefetching_homes(&self, object: Object) -> usize {
        let groups =
            self.blobs.get(&object).and_then(Blob::pieces).map_or(usize::MAX, |all| all.div_ceil(GROUP) as usize);
        self.view.home_count().min(groups).max(1)
    }

    /// A piece came from elsewhere, or is not wanted any more.
    pub(super) fn drop_from_read(&mut self, reading: Reading, object: Object, piece: u32) {
        if let Some(blob) = self.blobs.get_mut(&object) {
            blob.unassign(piece, Via::Read(reading));
        }
        let Some(run) = self.register.runs.get_mut(&reading) else { return };
        let left = run.pieces.clone().any(|piece| {
            self.blobs
                .get(&object)
                .and_then(|blob| blob.fetches.get(&piece))
                .is_some_and(|fetch| fetch.sources.contains(&Via::Read(reading)))
        });
        if !left {
            self.register.runs.remove(&reading);
            self.out.push(Output::StopRead { reading });
        }
    }

    pub(super) fn read_bytes(&mut self, reading: Reading, piece: u32, got: u32) {
        let now = self.now;
        let Some(run) = self.register.runs.get_mut(&reading) else { return };
        if !run.pieces.contains(&piece) {
            return;
        }
        let object = run.object;
        let begins = run.flowing != Some(piece);
        run.flowing = Some(piece);
        if begins {
            let (credential, origin) = (run.credential, run.origin.clone());
            self.checked(credential.caller(), object, &origin, Verdict::Granted);
        }
        let Some(fetch) = self.blobs.get_mut(&object).and_then(|blob| blob.fetches.get_mut(&piece)) else { return };
        fetch.progress = now;
        (fetch.got, fetch.pure) = (got, true);
        if !begins {
            return;
        }
        let others: Vec<Via> = fetch.sources.iter().copied().filter(|via| *via != Via::Read(reading)).collect();
        for via in others {
            self.let_go(via, object, piece);
        }
        self.serve_waiting(object, piece);
    }

    pub(super) fn read_piece(&mut self, reading: Reading, piece: u32, sum: Sum) {
        let me = self.me;
        let Some(run) = self.register.runs.get_mut(&reading) else { return };
        if !run.pieces.contains(&piece) {
            return;
        }
        run.pieces.start = piece + 1;
        run.flowing = None;
        let object = run.object;
        let Some(blob) = self.blobs.get_mut(&object) else { return };
        if blob.have.has(piece) {
            return;
        }
        let finding = blob.records.read(piece, me, sum);
        blob.unassign(piece, Via::Read(reading));
        self.judge(object, piece, &finding);
        self.intake.took(self.now);
        self.gain(None, object, piece);
        self.tell(object, piece);
    }

    pub(super) fn read_ended(&mut self, reading: Reading, end: ReadEnd) {
        let Some(run) = self.register.runs.remove(&reading) else { return };
        let object = run.object;
        if run.urgency == Urgency::Prefetch {
            let (homes, most, luck) = (self.prefetching_homes(object), self.config.prefetch_reads, self.rng.f64());
            self.register.prefetched(self.now.since(run.begun), homes, most, luck, self.now);
        }
        if let Some(piece) = run.flowing {
            self.abort(object, piece);
        }
        let now = self.now;
        let Some(blob) = self.blobs.get_mut(&object) else { return };
        let origin = run.origin;
        let mut failures = 0;
        let mut hopeless = Vec::new();
        for piece in run.pieces.clone() {
            blob.unassign(piece, Via::Read(reading));
            let Some(fetch) = blob.fetches.get_mut(&piece) else { continue };
            fetch.lessor = None;
            if matches!(end, ReadEnd::Failed | ReadEnd::Odd) {
                fetch.failures = fetch.failures.saturating_add(1);
                failures = failures.max(fetch.failures);
                let long = fetch.begun.is_some_and(|begun| now.since(begun) >= HOPELESS);
                if fetch.failures >= FAILURES && long {
                    hopeless.push(piece);
                }
            }
        }
        match end {
            ReadEnd::Finished => {}
            ReadEnd::Denied => {
                if run.credential == Credential::Own {
                    blob.denied = Some(now + DENIED);
                }
                self.checked(run.credential.caller(), object, &origin, Verdict::Denied);
            }
            ReadEnd::Later(wait) => self.register.rest(&origin, now + wait.min(LONGEST_REST)),
            // That is about this object and not about the registry, and the size may be what a member said.
            ReadEnd::Odd => {
                blob.doubt_size();
                blob.odd = Some(now + FAILED * (1 << failures.min(3)) / 2);
            }
            ReadEnd::Failed => self.register.rest(&origin, now + FAILED * (1 << failures.min(3)) / 2),
        }
        for piece in hopeless {
            self.fail(object, piece, Failure::Unavailable);
        }
        self.dirty.insert(object);
    }

    /// The registry lets us not read a piece: one who waits here and may is told to; else everybody looks elsewhere.
    pub(super) fn lease_out(&mut self, object: Object, piece: u32) -> Option<Time> {
        let now = self.now;
        let until = now + self.config.lease;
        let most = self.config.neighbours;
        let ledger = self.blobs.get_mut(&object)?.ledgers.entry(group_of(piece)).or_default();
        let leased = ledger.leased(now);
        if leased.has(piece) {
            // Somebody is at it.
        } else if let Some((to, mask)) = self.lessee(object, piece, leased) {
            self.out.push(Output::Count(Event::Lease));
            let blob = self.blobs.get_mut(&object)?;
            blob.ledgers.entry(group_of(piece)).or_default().lease(to, mask, until, now);
            let neighbour = blob.known.hear(to, most, now);
            mask.pieces(group_of(piece)).for_each(|piece| {
                neighbour.coming.insert(piece);
            });
        } else {
            self.refuse_waiting(object, piece);
        }
        let blob = self.blobs.get(&object)?;
        let waits = blob.waiting.get(&piece).is_some_and(|waiting| !waiting.is_empty());
        let fetch = blob.fetches.get(&piece)?;
        if !waits && fetch.wants.is_empty() {
            self.give_up(object, piece);
            return None;
        }
        Some(now + LOOK_AGAIN)
    }

    /// The home told us to read a piece in its stead.
    pub(super) fn take_lease(&mut self, object: Object, piece: u32, lessor: Peer) {
        if let Some(fetch) = self.blobs.get_mut(&object).and_then(|blob| blob.fetches.get_mut(&piece)) {
            fetch.lessor = Some(lessor);
        }
        self.plan_leases(self.now);
        self.dirty.insert(object);
    }
}
