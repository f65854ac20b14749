//! Whether a caller may have what it asks for, as the registry says.
//!
//! A right that is not remembered is asked for upstream with the caller's own Authorization. If nothing of the blob is
//! here yet, the question is the request for the bytes that are wanted first, so that they cost no further round trip;
//! else it is a HEAD. In a swarm the question is asked beside the transfer of these bytes (`driver/admitting.rs`).
//! Callers who ask the same at the same time share one question.

use std::ops::Range;
use std::sync::{Arc, Mutex, Weak};
use std::time::Instant;

use futures::future::{BoxFuture, FutureExt, Shared, WeakShared};
use http::{HeaderValue, Method};
use nydus_rafs::Digest;

use super::{Server, lock};
use crate::mirror::allow::{Caller, Claimed, Known};
use crate::mirror::answer::Failure;
use crate::mirror::fetch::{Errand, WINDOW};
use crate::mirror::filling::Interest;
use crate::mirror::metrics::Checked;
use crate::mirror::pieces::PIECE;
use crate::mirror::request::Ask;
use crate::mirror::upstream::{Call, UpstreamError};

/// Pieces on their way that nobody has taken yet.
pub(super) type Held = Vec<(u64, Interest)>;

/// That somebody may have a blob.
#[derive(Debug, Clone)]
pub(super) struct Granted {
    size: u64,
    /// For the first who comes for them.
    held: Arc<Mutex<Held>>,
}

type Question = Shared<BoxFuture<'static, Result<Granted, Arc<UpstreamError>>>>;
pub(super) type WeakQuestion = WeakShared<BoxFuture<'static, Result<Granted, Arc<UpstreamError>>>>;

/// A blob or manifest that is asked for, on somebody's behalf.
pub(super) struct Wish<'a> {
    pub(super) ask: &'a Ask,
    pub(super) registry: &'a str,
    pub(super) repo: &'a str,
    pub(super) digest: &'a Digest,
    pub(super) path: String,
    pub(super) caller: Caller,
}

impl<'a> Wish<'a> {
    pub(super) fn what(&self) -> Claimed<'_> {
        Claimed { registry: self.registry, repo: self.repo, digest: self.digest }
    }

    pub(super) fn call<'b>(&'b self, accept: Option<&'b HeaderValue>) -> Call<'b> {
        Call {
            method: Method::GET,
            registry: self.registry,
            repo: self.repo,
            path: &self.path,
            range: None,
            accept,
            authorization: self.ask.authorization.as_ref(),
            hops: &self.ask.hops,
        }
    }

    /// Returns the same on behalf of the same caller, for a fetch that outlives the request.
    pub(super) fn errand(&self, key: [u8; 32]) -> Arc<Errand> {
        Arc::new(Errand {
            registry: self.registry.to_owned(),
            repo: self.repo.to_owned(),
            path: self.path.clone(),
            authorization: self.ask.authorization.clone(),
            key,
            hops: self.ask.hops.clone(),
            no_peer: self.ask.no_peer,
            verifies: self.ask.verifies,
            caller: self.ask.authorization.is_some().then_some(self.caller),
            prefetch: false,
        })
    }
}

impl Server {
    /// Returns the size of a blob if the caller may have it; takes no longer than a caller waits for headers.
    ///
    /// `first` is where the bytes begin and end that are wanted of the blob, if they are wanted. Those that are on their
    /// way already come along.
    pub(super) async fn admit(
        self: &Arc<Self>,
        wish: &Wish<'_>,
        first: Option<Range<u64>>,
    ) -> Result<(u64, Held), Failure> {
        let now = Instant::now();
        let known = lock(&self.rights).known(&wish.caller, wish.what(), now);
        let count = |result| self.metrics.checks.get_or_create(&Checked { result }).inc();
        if let Known::Fresh(size) = known {
            count("remembered");
            return Ok((size, Held::new()));
        }
        let limit = self.headers_within;
        let asked = tokio::time::timeout(limit, self.question(wish, first)).await;
        let silent = || Err(Arc::new(UpstreamError::Silent { by: wish.registry.to_owned(), limit }));
        match asked.unwrap_or_else(|_| silent()) {
            Ok(Granted { size, held }) => {
                count("granted");
                lock(&self.rights).grant(&wish.caller, wish.what(), size, now);
                Ok((size, std::mem::take(&mut *lock(&held))))
            }
            Err(error) if error.is_refusal() => {
                count("denied");
                lock(&self.rights).revoke(&wish.caller, wish.what());
                Err(Failure::Upstream(error))
            }
            Err(error) => match known {
                Known::Stale(size) => {
                    count("unknown_but_known_before");
                    tracing::debug!(%error, path = wish.path, "the registry cannot say who may read; an earlier grant stands");
                    Ok((size, Held::new()))
                }
                Known::Fresh(_) | Known::Nothing => {
                    count("unknown");
                    Err(match &*error {
                        UpstreamError::Busy { .. } => Failure::Upstream(error),
                        _ => Failure::Unchecked(error),
                    })
                }
            },
        }
    }

    /// Asks upstream about a wish; callers who ask the same share one question.
    async fn question(
        self: &Arc<Self>,
        wish: &Wish<'_>,
        first: Option<Range<u64>>,
    ) -> Result<Granted, Arc<UpstreamError>> {
        // Two mirrors that ask each other must not wait for each other: what came another way is another question.
        let mut key = blake3::Hasher::new();
        key.update(&lock(&self.rights).key(&wish.caller, wish.what()));
        key.update(wish.ask.hops.join(",").as_bytes()).update(&[u8::from(wish.ask.no_peer)]);
        let key = *key.finalize().as_bytes();
        let question = {
            let mut questions = lock(&self.questions);
            match questions.get(&key).and_then(WeakShared::upgrade) {
                Some(question) => question,
                None => {
                    let question = self.ask(wish, first);
                    questions.retain(|_, other| other.upgrade().is_some());
                    if let Some(weak) = question.downgrade() {
                        questions.insert(key, weak);
                    }
                    question
                }
            }
        };
        let outcome = question.await;
        lock(&self.questions).remove(&key);
        outcome
    }

    fn ask(self: &Arc<Self>, wish: &Wish<'_>, first: Option<Range<u64>>) -> Question {
        let errand = wish.errand(lock(&self.rights).key(&wish.caller, wish.what()));
        let (server, digest) = (self.clone(), *wish.digest);
        let driver = self.fetcher.driver.get().and_then(Weak::upgrade);
        // Who wants the registry's own bytes has been let in before, as a rule.
        let ahead = driver.clone().zip(first.clone()).filter(|_| !wish.ask.no_peer);
        // What is here already would be moved for nothing; and bytes are asked of mirrors whose word does not count.
        let at_once = driver.is_none() && (self.fetcher.upstream.all_trusted() || wish.ask.no_peer);
        let part = first.filter(|_| at_once && !self.store.has(wish.digest)).map(|first| window(&first));
        async move {
            if let Some((driver, first)) = ahead {
                let (size, ahead) = driver.admit(&errand, digest, first).await?;
                // What the swarm remembers may have no size.
                if let Some(size) = size {
                    let held = match server.pin(digest, size).await {
                        Some(pin) => ahead.take_over(&pin, &errand),
                        None => Held::new(),
                    };
                    return Ok(Granted { size, held: Arc::new(Mutex::new(held)) });
                }
            }
            let call = errand.question();
            let part = part.map(|pieces| pieces.start * PIECE..pieces.end * PIECE);
            let probed = server.fetcher.upstream.probe(&call, part.clone(), errand.no_peer).await.map_err(Arc::new)?;
            let held = match (probed.opened, part) {
                (Some(opened), Some(part)) => server.begin(&errand, digest, probed.size, part.start, opened).await,
                _ => Held::new(),
            };
            Ok(Granted { size: probed.size, held: Arc::new(Mutex::new(held)) })
        }
        .boxed()
        .shared()
    }
}

/// Returns the pieces that are asked for first by who wants the bytes `wanted`.
fn window(wanted: &Range<u64>) -> Range<u64> {
    let first = wanted.start / PIECE;
    first..(first + WINDOW).min(wanted.end.div_ceil(PIECE)).max(first + 1)
}
