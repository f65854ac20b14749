//! Reading from the registry, as the home of a group or in its stead.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use http::{Method, StatusCode};
use nydus_rafs::Digest;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::flights::Owner;
use super::{Driver, Mind, narrow};
use crate::mirror::fetch::Errand;
use crate::mirror::filling::{Filling, Launch};
use crate::mirror::quota::Pin;
use crate::mirror::request::is_repo;
use crate::mirror::upstream::{Answer, Call, UpstreamError, Via};
use crate::node::Vouched;
use crate::registry::head::{content_range, length, no_blob};
use crate::swarm::Object;
use crate::swarm::grid::PIECE;
use crate::swarm::message::Origin;
use crate::swarm::port::{Caller, Credential, Input, ReadEnd, Reading};

/// How often the swarm hears that bytes come.
const STEP: u64 = 64 << 10;

/// A request that is out.
#[derive(Debug)]
pub(super) struct Read {
    pub(super) task: AbortHandle,
    pub(super) digest: Digest,
    pub(super) pieces: Range<u32>,
    caller: Caller,
    origin: Origin,
    /// Turns true once the registry has said whether it may be read.
    said: watch::Receiver<bool>,
}

impl Read {
    /// Whether its answer tells if `caller` may have the blob.
    pub(super) fn tells(&self, digest: &Digest, caller: Caller, origin: &Origin) -> bool {
        self.digest == *digest && self.caller == caller && self.origin == *origin
    }

    /// Waits for that answer; false if it ends without one.
    pub(super) fn told(&self) -> impl Future<Output = bool> + Send + use<> {
        let mut said = self.said.clone();
        async move { said.wait_for(|said| *said).await.is_ok() }
    }
}

/// A request that is to be made.
struct Plan {
    reading: Reading,
    object: Object,
    size: Option<u64>,
    registry: String,
    repo: String,
    pieces: Range<u32>,
    /// The beginning of the first piece, which came before.
    begun: Vec<Bytes>,
    /// Whose token it is read with.
    errand: Option<Arc<Errand>>,
    said: watch::Sender<bool>,
}

impl Driver {
    #[expect(clippy::too_many_arguments, reason = "they are the fields of one output")]
    pub(super) fn read(
        self: &Arc<Self>,
        mind: &mut Mind,
        reading: Reading,
        object: Object,
        size: Option<u64>,
        origin: &Origin,
        pieces: Range<u32>,
        offset: u32,
        credential: Credential,
    ) {
        let errand = match credential {
            Credential::Own => None,
            Credential::Caller(caller) => {
                // A token is shown to the registry that its owner named, and to no other.
                let of = |errand: &&Arc<Errand>| {
                    errand.caller == Some(caller) && *super::origin(&errand.registry, &errand.repo) == **origin
                };
                let found = mind.wants.values().map(|wanted| &wanted.errand).find(of).cloned();
                if found.is_none() {
                    // The caller is gone, and its token with it.
                    mind.inputs.push_back(Input::ReadEnded { reading, end: ReadEnd::Denied });
                    return;
                }
                found
            }
        };
        let Some((registry, repo)) = origin.split_once('/').filter(|(_, repo)| is_repo(repo)) else {
            mind.inputs.push_back(Input::ReadEnded { reading, end: ReadEnd::Failed });
            return;
        };
        let (registry, repo) = (registry.to_owned(), repo.to_owned());
        let range = pieces.clone();
        tracing::debug!(digest = %object.0, ?pieces, ?credential, "reading the registry");
        let filling = mind.flights.filling(&object.0, pieces.start).filter(|_| offset > 0);
        let begun = filling.map(|filling| filling.segments()).unwrap_or_default();
        let (sender, said) = watch::channel(false);
        let caller = errand.as_ref().and_then(|errand| errand.caller);
        let plan = Plan { reading, object, size, registry, repo, pieces, begun, errand, said: sender };
        let own = self.clone();
        let task = self.spawn(async move {
            let outcome = own.carry_reading_out(&plan).await;
            let mut mind = own.mind();
            let end = match outcome {
                Ok(()) => ReadEnd::Finished,
                Err(error) => {
                    let end = match &error {
                        UpstreamError::Refused { status, .. } if [401, 403, 404].contains(&status.as_u16()) => {
                            ReadEnd::Denied
                        }
                        UpstreamError::Busy { retry_after, .. } => {
                            ReadEnd::Later(retry_after.unwrap_or(std::time::Duration::from_secs(1)))
                        }
                        // Another 4xx is about this object, such as a range behind its end.
                        UpstreamError::Odd { .. } | UpstreamError::Refused { .. } => ReadEnd::Odd,
                        _ => ReadEnd::Failed,
                    };
                    // Members may ask for anything; what is told to nobody is not remembered.
                    if mind.wants.values().any(|wanted| wanted.digest == plan.object.0) {
                        mind.errors.insert(plan.object.0, Arc::new(error));
                    }
                    end
                }
            };
            mind.reading.remove(&plan.reading);
            own.feed_all(&mut mind, [Input::ReadEnded { reading: plan.reading, end }]);
            if end == ReadEnd::Denied {
                plan.said.send_replace(true);
            }
            mind.flights.give_back(Owner::Reading(plan.reading), |_, _| None);
        });
        let origin = origin.clone();
        mind.reading.insert(reading, Read { task, digest: object.0, pieces: range, caller, origin, said });
    }

    async fn carry_reading_out(self: &Arc<Self>, plan: &Plan) -> Result<(), UpstreamError> {
        let upstream = &self.fetcher.upstream;
        let odd = |reason: String| UpstreamError::Odd { by: plan.registry.clone(), reason };
        let path = format!("/v2/{}/blobs/sha256:{}", plan.repo, plan.object.0);
        let begun: u64 = plan.begun.iter().map(|bytes| bytes.len() as u64).sum();
        let from = u64::from(plan.pieces.start) * PIECE + begun;
        let to = u64::from(plan.pieces.end) * PIECE;
        let call = Call {
            method: Method::GET,
            registry: &plan.registry,
            repo: &plan.repo,
            path: &path,
            range: Some(from..plan.size.map_or(to, |size| size.min(to))),
            accept: None,
            authorization: plan.errand.as_ref().and_then(|errand| errand.authorization.as_ref()),
            hops: &[],
        };
        let mut answer = upstream.send(Via::Registry, &call).await?;
        if let Some(reason) = no_blob(&answer.headers) {
            return Err(odd(format!("answers a range {reason}")));
        }
        let (start, size) = match answer.status {
            StatusCode::PARTIAL_CONTENT => match content_range(&answer.headers) {
                Some((got, total)) if got.start == from => (from, total.or(plan.size)),
                got => return Err(odd(format!("answers the range from {from} with {got:?}"))),
            },
            StatusCode::OK => (0, length(&answer.headers).or(plan.size)),
            status => return Err(odd(format!("answers a range with {status}"))),
        };
        let Some(size) = size.filter(|size| plan.size.is_none_or(|known| known == *size)) else {
            return Err(odd(format!("says {size:?} where the blob has {:?} bytes", plan.size)));
        };
        let (store, digest) = (self.store.clone(), plan.object.0);
        let pinned = tokio::task::spawn_blocking(move || store.pin(digest, size)).await.ok().flatten();
        let pin = pinned.ok_or_else(|| odd("disagrees with others about the size of the blob".into()))?;
        if plan.size.is_none() {
            let mut mind = self.mind();
            mind.sized(&digest, size);
            self.feed_all(&mut mind, [Input::Sized { object: plan.object, size }]);
        }
        let end = pin.pieces().min(u64::from(plan.pieces.end));
        let mut at = start;
        let mut rest = Bytes::new();
        for piece in u64::from(plan.pieces.start)..end {
            self.receive_piece(plan, &pin, piece, &mut answer, &mut at, &mut rest).await?;
        }
        Ok(())
    }

    /// Takes the bytes of one piece; `at` is where the next ones belong, `rest` those that came already.
    async fn receive_piece(
        self: &Arc<Self>,
        plan: &Plan,
        pin: &Pin,
        piece: u64,
        answer: &mut Answer,
        at: &mut u64,
        rest: &mut Bytes,
    ) -> Result<(), UpstreamError> {
        let Some(number) = narrow(piece) else { return Ok(()) };
        let (extent, digest) = (pin.extent(piece), plan.object.0);
        let filling = self.filling(plan.reading, pin, number);
        let mut hash = blake3::Hasher::new();
        // A host that ignores ranges sends it again.
        for bytes in plan.begun.iter().filter(|_| *at > extent.start) {
            hash.update(bytes);
        }
        let mut told = 0;
        while *at < extent.end {
            if rest.is_empty() {
                *rest = self.fetcher.upstream.next(answer).await?.ok_or_else(|| UpstreamError::Odd {
                    by: plan.registry.clone(),
                    reason: "ended the body early".into(),
                })?;
                self.limits.source.take(rest.len() as u64).await;
            }
            // A host that ignores ranges sends what is before it, too.
            let skip = extent.start.saturating_sub(*at).min(rest.len() as u64);
            if skip > 0 {
                let _ = rest.split_to(usize::try_from(skip).unwrap_or(usize::MAX));
                *at += skip;
                continue;
            }
            let take = (extent.end - *at).min(rest.len() as u64);
            let bytes = rest.split_to(usize::try_from(take).unwrap_or(usize::MAX));
            hash.update(&bytes);
            let place = *at - extent.start;
            *at += take;
            if let Some(filling) = &filling {
                filling.go_on(place, &bytes);
            }
            let got = *at - extent.start;
            if told == 0 || got >= told + STEP {
                told = got;
                let got = u32::try_from(got).unwrap_or(u32::MAX);
                self.feed(Input::ReadBytes { reading: plan.reading, piece: number, got });
                plan.said.send_replace(true);
            }
        }
        let sum = *hash.finalize().as_bytes();
        if filling.is_none() && pin.sum(piece).is_some_and(|stored| stored != sum) {
            // What lies here from an earlier life is not what the registry has.
            pin.drop_piece(piece);
            self.feed(Input::Lost { object: plan.object, piece: number });
            return Ok(());
        }
        if let Some(node) = self.node() {
            self.vouches.note(&digest, number, Vouched::sign(node.identity(), &digest, number, sum));
        }
        self.feed(Input::ReadPiece { reading: plan.reading, piece: number, sum });
        Ok(())
    }

    /// Returns where the bytes of a piece go; none if it is here already.
    fn filling(&self, reading: Reading, pin: &Pin, piece: u32) -> Option<Arc<Filling>> {
        let mut mind = self.mind();
        let digest = pin.digest();
        if mind.flights.filling(&digest, piece).is_none() {
            // For others: nobody here has claimed it.
            let launch = Launch::new([0; 32], true);
            let within = u64::from(piece)..u64::from(piece) + 1;
            let claim = pin.blob().claim(within, &launch).0.pop()?;
            mind.flights.board(&digest, claim, Owner::Reading(reading));
        }
        mind.flights.filling(&digest, piece)
    }
}
