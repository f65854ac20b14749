//! Who may fetch a chunk, who waits for it, and when it can be read.
//!
//! ```text
//!             claim                 commit
//!   absent ----------> claimed -------------------> ready
//!   unsure -------^       |  ^                        |
//!     ^                   |  bytes are published      | the cache file lost it
//!     +------ drop -------+  to those who wait        v
//!                                              absent, unsure
//! ```
//!
//! *Unsure* chunks were left by an earlier process whose end was not seen; they count as absent until their bytes
//! in the cache file were checked against the digest. A reader that saw *ready* reads without a lock. Whoever may
//! fetch a chunk holds a [`Claim`]; dropping it (error, panic, cancelled future) puts the chunk back as it was and
//! wakes the waiters, who then try themselves: no failure is remembered. Waiters are answered from the verified
//! bytes, before the cache file has them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::layout::Layout;

const STATE: u8 = 0x7f;
const MARK: u8 = 0x80;

/// What is known of a chunk's bytes in the cache file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum State {
    /// Nothing that could be read.
    Absent = 0,
    /// Perhaps right; to be checked before use.
    Unsure = 1,
    /// Somebody is fetching or checking them.
    Claimed = 2,
    /// Verified and there.
    Ready = 3,
}

/// The state of one chunk, and a mark that asks to be told when a reader comes by.
#[derive(Debug)]
pub(super) struct Slot(AtomicU8);

impl Slot {
    pub(super) fn new(state: State) -> Self {
        Self(AtomicU8::new(state as u8))
    }

    pub(super) fn state(&self) -> State {
        match self.0.load(Ordering::Acquire) & STATE {
            0 => State::Absent,
            1 => State::Unsure,
            2 => State::Claimed,
            _ => State::Ready,
        }
    }

    /// Returns whether the chunk is ready and carries no mark.
    pub(super) fn plainly_ready(&self) -> bool {
        self.0.load(Ordering::Acquire) == State::Ready as u8
    }

    /// Asks that the next reader be noticed.
    pub(super) fn mark(&self) {
        self.0.fetch_or(MARK, Ordering::AcqRel);
    }

    /// Takes the mark away; returns whether there was one.
    pub(super) fn unmark(&self) -> bool {
        self.0.fetch_and(STATE, Ordering::AcqRel) & MARK != 0
    }

    /// Changes the state and leaves the mark. Only under the lock of [`Claims`].
    fn set(&self, state: State) {
        let keep = |old: u8| Some(old & MARK | state as u8);
        let _ = self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, keep);
    }
}

/// How a reader tells a fetch made ahead of readers that it now waits.
#[derive(Debug, Clone, Default)]
pub(super) struct Raise(CancellationToken);

impl Raise {
    /// A reader waits.
    pub(super) fn raise(&self) {
        self.0.cancel();
    }

    /// Returns when a reader waits.
    pub(super) async fn raised(&self) {
        self.0.cancelled().await;
    }
}

/// A fetch under way, as those see it who wait for it.
#[derive(Debug, Clone)]
pub(super) struct Flight {
    outcome: watch::Receiver<Option<Bytes>>,
    raise: Raise,
}

impl Flight {
    /// Tells the fetch that a reader waits.
    pub(super) fn raise(&self) {
        self.raise.raise();
    }

    /// Returns the chunk's plain bytes, or `None` when the claim was given back.
    pub(super) async fn landed(mut self) -> Option<Bytes> {
        match self.outcome.wait_for(Option::is_some).await {
            Ok(bytes) => bytes.clone(),
            Err(_) => None,
        }
    }
}

/// The claims on the chunks of one cache file.
#[derive(Debug, Default)]
pub(super) struct Claims {
    /// By the start of the chunk's plain bytes.
    flights: Mutex<HashMap<u64, Flight>>,
}

/// What came of asking for a claim.
#[derive(Debug)]
pub(super) enum Look {
    /// The chunk can be read.
    Ready,
    /// The caller is to fetch it.
    Mine(Claim),
    /// Somebody else fetches it.
    Busy(Flight),
}

impl Claims {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Flight>> {
        // The map is changed by single inserts and removes, which a panic elsewhere cannot leave half done.
        self.flights.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Claims the chunk at position `at`, if it is free.
    pub(super) fn claim(self: &Arc<Self>, layout: &Arc<Layout>, at: usize, raise: &Raise) -> Look {
        let slot = layout.slot(at);
        if slot.state() == State::Ready {
            return Look::Ready;
        }
        let key = layout.chunk(at).plain.start;
        let mut flights = self.lock();
        let before = slot.state();
        match before {
            State::Ready => Look::Ready,
            State::Claimed => match flights.get(&key) {
                Some(flight) => Look::Busy(flight.clone()),
                // State and flight change together under the lock, and claims keep their layout alive.
                None => unreachable!("a claimed chunk has a flight"),
            },
            State::Absent | State::Unsure => {
                let (sender, outcome) = watch::channel(None);
                flights.insert(key, Flight { outcome, raise: raise.clone() });
                slot.set(State::Claimed);
                drop(flights);
                Look::Mine(Claim { claims: self.clone(), layout: layout.clone(), at, sender, otherwise: before })
            }
        }
    }

    /// Says that the cache file does not hold what was believed ready, or perhaps not; `now` is what is known. A chunk
    /// claimed meanwhile is left alone.
    pub(super) fn lost(&self, slot: &Slot, now: State) {
        let _flights = self.lock();
        if slot.state() == State::Ready {
            slot.set(now);
        }
    }
}

/// The right and duty to bring one chunk.
#[derive(Debug)]
#[must_use = "dropping a claim gives the chunk back"]
pub(super) struct Claim {
    claims: Arc<Claims>,
    layout: Arc<Layout>,
    at: usize,
    sender: watch::Sender<Option<Bytes>>,
    otherwise: State,
}

impl Claim {
    /// Returns the chunk's position.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    /// Returns the chunk.
    pub(super) fn chunk(&self) -> &nydus_rafs::Chunk {
        self.layout.chunk(self.at)
    }

    /// Returns whether the cache file may hold the chunk already.
    pub(super) fn unsure(&self) -> bool {
        self.otherwise == State::Unsure
    }

    /// Says that what the cache file holds is not the chunk.
    pub(super) fn disprove(&mut self) {
        self.otherwise = State::Absent;
    }

    /// Answers those who wait, with verified bytes.
    pub(super) fn publish(&self, bytes: Bytes) {
        self.sender.send_replace(Some(bytes));
    }

    /// Says that the cache file holds the verified bytes.
    pub(super) fn commit(mut self) {
        self.otherwise = State::Ready;
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut flights = self.claims.lock();
        flights.remove(&self.chunk().plain.start);
        self.layout.slot(self.at).set(self.otherwise);
        // The sender goes after the lock: waiters wake to a chunk that is ready, or theirs to claim.
    }
}

#[cfg(test)]
mod tests {
    use nydus_rafs::{Algorithm, Chunk, ChunkIndex, Codec};

    use super::*;

    fn layout(states: &[State]) -> Arc<Layout> {
        let chunk = |at: usize| Chunk {
            index: ChunkIndex(u32::try_from(at).unwrap()),
            plain: at as u64 * 4096..at as u64 * 4096 + 4096,
            stored: at as u64 * 100..at as u64 * 100 + 100,
            codec: Codec::Plain,
            encrypted: false,
            algorithm: Algorithm::Blake3,
            digest: None,
            container: None,
            crc32: None,
        };
        let slots = states.iter().map(|&state| Arc::new(Slot::new(state))).collect();
        Arc::new(Layout::new((0..states.len()).map(chunk).collect(), slots))
    }

    fn mine(look: Look) -> Claim {
        match look {
            Look::Mine(claim) => claim,
            other => panic!("not mine: {other:?}"),
        }
    }

    #[tokio::test]
    async fn a_dropped_claim_gives_the_chunk_back_and_wakes_those_who_wait() {
        let (claims, layout) = (Arc::new(Claims::default()), layout(&[State::Absent]));
        let claim = mine(claims.claim(&layout, 0, &Raise::default()));
        let Look::Busy(flight) = claims.claim(&layout, 0, &Raise::default()) else { panic!("claimed twice") };
        let waiter = tokio::spawn(flight.landed());
        drop(claim);
        assert_eq!(waiter.await.unwrap(), None);
        assert_eq!(layout.slot(0).state(), State::Absent);
        drop(mine(claims.claim(&layout, 0, &Raise::default())));
    }

    #[tokio::test]
    async fn a_panic_gives_the_chunk_back() {
        let (claims, layout) = (Arc::new(Claims::default()), layout(&[State::Unsure]));
        let claim = mine(claims.claim(&layout, 0, &Raise::default()));
        let task = tokio::spawn(async move {
            let _held = claim;
            panic!("on purpose");
        });
        assert!(task.await.is_err());
        assert_eq!(layout.slot(0).state(), State::Unsure);
    }

    #[tokio::test]
    async fn those_who_wait_are_answered_before_the_cache_file_has_the_bytes() {
        let (claims, layout) = (Arc::new(Claims::default()), layout(&[State::Absent]));
        let claim = mine(claims.claim(&layout, 0, &Raise::default()));
        let Look::Busy(flight) = claims.claim(&layout, 0, &Raise::default()) else { panic!("claimed twice") };
        claim.publish(Bytes::from_static(b"chunk"));
        assert_eq!(flight.clone().landed().await.unwrap(), "chunk");
        assert_eq!(layout.slot(0).state(), State::Claimed);
        claim.commit();
        assert_eq!(flight.landed().await.unwrap(), "chunk");
        assert!(matches!(claims.claim(&layout, 0, &Raise::default()), Look::Ready));
    }

    #[tokio::test]
    async fn bytes_published_and_then_not_cached_still_answer() {
        let (claims, layout) = (Arc::new(Claims::default()), layout(&[State::Absent]));
        let claim = mine(claims.claim(&layout, 0, &Raise::default()));
        let Look::Busy(flight) = claims.claim(&layout, 0, &Raise::default()) else { panic!("claimed twice") };
        claim.publish(Bytes::from_static(b"chunk"));
        drop(claim);
        assert_eq!(flight.landed().await.unwrap(), "chunk");
        assert_eq!(layout.slot(0).state(), State::Absent);
    }

    #[test]
    fn a_mark_survives_changes_of_state_and_is_taken_once() {
        let (claims, layout) = (Arc::new(Claims::default()), layout(&[State::Absent]));
        let slot = layout.slot(0);
        let claim = mine(claims.claim(&layout, 0, &Raise::default()));
        slot.mark();
        claim.commit();
        assert_eq!(slot.state(), State::Ready);
        assert!(!slot.plainly_ready());
        assert!(slot.unmark());
        assert!(!slot.unmark());
        assert!(slot.plainly_ready());
    }
}
