//! Letting callers in: the registry is asked for their right while the first pieces are on their way already.
//!
//! A caller whom nobody knows wants the first pieces of what it asks for *ahead* of its being let in: they are got, and nobody is
//! given a byte of them. Whether it may have them is what the swarm wants [checked](Driver::check): if the registry is just being
//! read with the same right, that tells, and else it is asked with HEAD. What comes from members before the size of the blob is known
//! waits here, a group at most.

use std::ops::Range;
use std::sync::Arc;

use nydus_rafs::Digest;
use tokio::sync::oneshot;

use super::asking::Arrived;
use super::reading::Read;
use super::{Driver, Mind, Wanted, narrow, origin};
use crate::mirror::fetch::Errand;
use crate::mirror::filling::Interest;
use crate::mirror::pieces::{Look, PIECE};
use crate::mirror::quota::Pin;
use crate::mirror::upstream::UpstreamError;
use crate::swarm::grid::{GROUP, group_of};
use crate::swarm::message::{Origin, Urgency};
use crate::swarm::port::{Caller, Input, Order, Reader, Verdict, Want};
use crate::swarm::{Object, grid};

/// Whether a caller may have a blob; its size, if that was told.
pub(super) type Admission = Result<Option<u64>, Arc<UpstreamError>>;

/// That pieces are got for a caller who is not let in yet; they are not wanted any more when it is dropped.
#[derive(Debug)]
pub(in super::super) struct Ahead {
    driver: Arc<Driver>,
    digest: Digest,
    want: Want,
    within: Range<u64>,
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.driver.unwant(self.want);
        let mut mind = self.driver.mind();
        if mind.is_ahead(&self.digest) {
            return;
        }
        let (object, left) = (Object(self.digest), mind.take_early(&self.digest));
        self.driver.feed_all(&mut mind, left.into_iter().map(|((_, piece), _)| Input::Lost { object, piece }));
    }
}

impl Ahead {
    /// Takes over what has come and what is on its way, now that the caller is let in and the size is known.
    pub(in super::super) fn take_over(self, pin: &Pin, errand: &Arc<Errand>) -> Vec<(u64, Interest)> {
        self.driver.unpack(pin);
        let (mut held, mut next) = (Vec::new(), self.within.start);
        let end = self.within.end.min(pin.pieces());
        while next < end {
            match pin.look(next) {
                Look::Ready => next += 1,
                Look::Filling(interest) => {
                    held.push((next, interest));
                    next += 1;
                }
                Look::Absent => {
                    let launched = self.driver.launch(pin, errand, next..end);
                    // Somebody else may have been first; whoever reads will see.
                    next = launched.last().map_or(end, |(piece, _)| piece + 1);
                    held.extend(launched);
                }
            }
        }
        held
    }
}

impl Mind {
    /// Whether somebody waits to be let in to a blob.
    pub(super) fn is_ahead(&self, digest: &Digest) -> bool {
        self.wants.values().any(|wanted| wanted.admission.is_some() && wanted.digest == *digest)
    }

    /// Keeps a piece that came before the size of its blob is known; false if nobody waits for that.
    pub(super) fn keep_early(&mut self, digest: Digest, piece: u32, arrived: Arrived) -> bool {
        let waits = self.is_ahead(&digest);
        if waits {
            tracing::debug!(%digest, piece, "a piece waits for its caller");
            self.early.insert((digest, piece), arrived);
        }
        waits
    }

    fn take_early(&mut self, digest: &Digest) -> Vec<((Digest, u32), Arrived)> {
        self.early.extract_if(|(of, _), _| of == digest).collect()
    }

    /// Notes how large a blob is, for those who wait to be let in.
    pub(super) fn sized(&mut self, digest: &Digest, size: u64) {
        for wanted in self.wants.values_mut().filter(|wanted| wanted.digest == *digest) {
            wanted.size = Some(size);
        }
    }

    /// Tells one who waits whether it may.
    pub(super) fn admit(&mut self, want: Want, admission: Admission) {
        if let Some(wanted) = self.wants.get_mut(&want)
            && let Some(waiting) = wanted.admission.take()
        {
            wanted.admitted = admission.is_ok();
            // Who is gone needs no answer.
            let _ = waiting.send(admission);
        }
    }
}

impl Driver {
    /// Finds out whether a caller may have a blob, and its size; `first` is the part that it wants first, if that is to be got
    /// meanwhile.
    pub(in super::super) async fn admit(
        self: &Arc<Self>,
        errand: &Arc<Errand>,
        digest: Digest,
        first: Range<u64>,
    ) -> Result<(Option<u64>, Ahead), Arc<UpstreamError>> {
        let pin = self.store.held(&digest);
        let mut within = ahead(&first, pin.as_ref());
        if self.wants_proof() && !errand.verifies {
            // It would be a part, and read from the registry by every node for itself.
            within.end = within.start;
        }
        let (sender, answer) = oneshot::channel();
        let ahead = {
            let mut mind = self.mind();
            mind.next += 1;
            let want = Want(mind.next);
            let waiting =
                Wanted { digest, errand: errand.clone(), admission: Some(sender), admitted: false, size: None };
            mind.wants.insert(want, waiting);
            let wish = Input::Want {
                want,
                object: Object(digest),
                size: pin.as_ref().map(|pin| pin.size()),
                origin: origin(&errand.registry, &errand.repo),
                pieces: narrow(within.start).unwrap_or(0)..narrow(within.end).unwrap_or(0),
                urgency: Urgency::Demand,
                order: Order::InOrder,
                reader: Reader { caller: errand.caller, verifies: errand.verifies, no_peer: errand.no_peer },
            };
            self.feed_all(&mut mind, [wish]);
            Ahead { driver: self.clone(), digest, want, within }
        };
        match answer.await {
            Ok(admission) => Ok((admission?, ahead)),
            Err(_) => {
                Err(Arc::new(UpstreamError::Odd { by: "the swarm".into(), reason: "this node is ending".into() }))
            }
        }
    }

    /// Asks whether a caller may have an object, and how large it is.
    pub(super) fn check(self: &Arc<Self>, mind: &mut Mind, caller: Caller, object: Object, place: Origin) {
        let same = |wanted: &&Wanted| {
            let errand = &wanted.errand;
            wanted.digest == object.0 && errand.caller == caller && origin(&errand.registry, &errand.repo) == place
        };
        let mut asking = mind.wants.values().filter(same);
        // Whom the server has let in is let in for as long as it reads.
        let known = asking.clone().any(|wanted| wanted.admitted);
        let Some(errand) = asking.next().map(|wanted| wanted.errand.clone()).filter(|_| !known) else {
            mind.inputs.push_back(Input::Checked { caller, object, origin: place, verdict: Verdict::Granted });
            return;
        };
        let own = self.clone();
        self.spawn(async move {
            let tells = |read: &&Read| read.tells(&object.0, caller, &place);
            let reading = own.mind().reading.values().find(tells).map(Read::told);
            if let Some(told) = reading
                && told.await
            {
                return;
            }
            let call = errand.question();
            let probed = own.fetcher.upstream.probe(&call, None, errand.no_peer).await;
            let mut mind = own.mind();
            let verdict = match probed {
                Ok(probed) => {
                    mind.sized(&object.0, probed.size);
                    Verdict::Granted
                }
                Err(error) => {
                    let verdict = if error.is_refusal() { Verdict::Denied } else { Verdict::Unknown };
                    mind.errors.insert(object.0, Arc::new(error));
                    verdict
                }
            };
            own.feed_all(&mut mind, [Input::Checked { caller, object, origin: place, verdict }]);
        });
    }

    /// Keeps what came of a blob before its size was known.
    fn unpack(self: &Arc<Self>, pin: &Pin) {
        let mut mind = self.mind();
        let digest = pin.digest();
        for ((_, piece), arrived) in mind.take_early(&digest) {
            self.keep_in(&mut mind, pin, piece, Some(arrived));
        }
        self.feed_all(&mut mind, []);
    }
}

/// Returns the pieces that are got for somebody who wants the bytes `first` and is not let in yet: those of one group that are not here,
/// and where nothing says that there are more, one.
fn ahead(first: &Range<u64>, pin: Option<&Pin>) -> Range<u64> {
    let start = first.start / PIECE;
    let wanted = match (pin, first.end) {
        (Some(pin), end) => end.min(pin.size()),
        (None, end) if end <= u64::from(grid::MOST_PIECES) * PIECE => end,
        (None, _) => first.start + 1,
    };
    let group = narrow(start).map_or(0, |piece| u64::from((group_of(piece) + 1) * GROUP));
    let end = wanted.div_ceil(PIECE).min(group);
    let absent = |piece: &u64| pin.is_none_or(|pin| matches!(pin.look(*piece), Look::Absent));
    let start = (start..end).find(absent).unwrap_or(end);
    start..(start..end).find(|piece| !absent(piece)).unwrap_or(end)
}
