//! From a blob's name to its bytes: mirrors in order, then the origin, until a deadline.
//!
//! A read goes round the sources that are well. What a mirror cannot give, the next one or the origin may,
//! so a mirror's refusal is never final; the origin's is, if it is about the blob (not there, not allowed).
//! If a round ends without an answer, the read waits (0.1 s, doubling to 5 s, with jitter) and goes round
//! again until its deadline: whatever time limits, sources and attempts multiply to, a reader waits no longer.
//!
//! A source's ill health is remembered (`health`), a blob's failure never: the next read asks again. If no
//! source is well, those that fail quickly are tried anyway, because a probe knows less than a real request.

mod error;
mod health;
mod renewal;
mod source;
mod sources;
mod whole;

use std::collections::HashMap;
use std::fmt;
use std::mem::Discriminant;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use nydus_rafs::BlobId;
use tokio::time::{Instant, timeout_at};

pub use error::SourceError;
pub use renewal::CredentialSource;
use source::{Answer, Ask};
use sources::Sources;
pub use whole::WholeBlob;

use crate::config::Config;
use crate::credentials::Credential;
use crate::http::{HttpError, Pools, Timeouts};
use crate::localfs::LocalFs;
use crate::memory::Memory;
use crate::metrics::Counters;
use crate::registry::{RegistryError, lock};
use health::Weight;

/// First and longest wait between two rounds.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// Rounds that may end with an answer that makes no sense, until that is taken for the source's last word.
const ODD_ROUNDS: u32 = 4;
/// Rounds of a prefetch: nobody waits for it, and a demand will ask again.
const PREFETCH_ROUNDS: u32 = 2;
/// Between two lines about the same failure of one blob; the others are logged at the level `debug`.
const LOG_INTERVAL: Duration = Duration::from_secs(1);
/// Failures whose lines are remembered.
const MAX_LOGGED: usize = 256;

/// How soon the bytes are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Urgency {
    /// Somebody may read them later.
    Prefetch,
    /// A reader waits.
    Demand,
}

/// Which sources a read must not trust.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Avoid {
    /// None.
    #[default]
    Nothing,
    /// What mirrors and peers hold: the bytes that came last were wrong. The origin is asked first; mirrors,
    /// if they must be asked, are told `Cache-Control: no-cache`.
    Mirrors,
}

/// Bytes, and who gave them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Served {
    /// Exactly the bytes that were asked for.
    pub bytes: Bytes,
    /// The mirror, registry, directory or store, for messages.
    pub source: Arc<str>,
    /// The source was a mirror or proxy.
    pub from_mirror: bool,
    /// The source ignores ranges and sent the whole blob up to these bytes: reading it once as a whole is cheaper
    /// than asking for further parts.
    pub ignores_ranges: bool,
}

/// What a route can be told besides the configuration of its backend.
#[derive(Debug, Clone)]
pub struct RouteOptions {
    /// How long a read with [`Urgency::Demand`] may take.
    pub deadline: Duration,
    /// How long a read with [`Urgency::Prefetch`] may take.
    pub prefetch_deadline: Duration,
    /// After all sources have been down for so long, nobody waits for them as long as usual.
    pub outage: Duration,
    /// How long a read waits then.
    pub outage_wait: Duration,
    /// Counts what the route does.
    pub counters: Arc<Counters>,
    /// Takes the place of the credential in the configuration.
    pub credential: Option<Credential>,
    /// Asked for the current credential when the registry refuses the one in use.
    pub renewal: Option<CredentialSource>,
    /// How long mirrors and proxies may be silent; the configuration may lower it.
    pub mirror_limits: Timeouts,
    /// How long the registry may be silent; the configuration may lower it.
    pub registry_limits: Timeouts,
    /// Where connections are taken from. A program with many routes gives all of them the same.
    pub pools: Pools,
}

impl Default for RouteOptions {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(60),
            prefetch_deadline: Duration::from_secs(15),
            outage: Duration::from_secs(60),
            outage_wait: Duration::from_secs(5),
            counters: Arc::default(),
            credential: None,
            renewal: None,
            mirror_limits: Timeouts::MIRROR,
            registry_limits: Timeouts::REGISTRY,
            pools: Pools::default(),
        }
    }
}

/// A way to the blobs of one repository. Cheap to clone.
#[derive(Clone)]
pub struct Route(Arc<Inner>);

struct Inner {
    backend: Backend,
    options: RouteOptions,
    /// When the log told of which failure of which blob.
    logged: Mutex<HashMap<(BlobId, Discriminant<SourceError>), Instant>>,
}

enum Backend {
    LocalFs(LocalFs),
    Memory(Memory),
    Registry(Arc<Sources>),
}

impl fmt::Debug for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Route").field(&self.place()).finish()
    }
}

impl From<Memory> for Route {
    /// Makes a route to a store in memory, with short deadlines.
    fn from(memory: Memory) -> Self {
        Self::memory(memory, RouteOptions::default())
    }
}

impl Route {
    /// Makes a route and logs which mirrors are in force; opens no connection.
    ///
    /// # Errors
    ///
    /// [`SourceError::Config`] if the configuration lacks something or contradicts itself.
    pub fn open(config: &Config, options: RouteOptions) -> Result<Self, SourceError> {
        let backend = match config {
            Config::LocalFs(config) => Backend::LocalFs(LocalFs::open(config)?),
            Config::Registry(config) => Backend::Registry(Arc::new(Sources::open(config, &options)?)),
        };
        Ok(Self(Arc::new(Inner { backend, options, logged: Mutex::default() })))
    }

    /// Makes a route to a store in memory.
    pub fn memory(memory: Memory, options: RouteOptions) -> Self {
        Self(Arc::new(Inner { backend: Backend::Memory(memory), options, logged: Mutex::default() }))
    }

    /// Returns the counters.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.0.options.counters
    }

    /// Returns the type of the backend as in configurations: `registry`, `localfs`, `memory`.
    pub fn kind(&self) -> &'static str {
        match &self.0.backend {
            Backend::LocalFs(_) => "localfs",
            Backend::Memory(_) => "memory",
            Backend::Registry(_) => "registry",
        }
    }

    /// Returns where the route leads in the end, for messages.
    pub fn place(&self) -> String {
        match &self.0.backend {
            Backend::LocalFs(local) => local.place().display().to_string(),
            Backend::Memory(_) => "memory".to_owned(),
            Backend::Registry(sources) => sources.place.to_string(),
        }
    }

    /// Replaces the credential while the route is in use; reads under way finish with the old one.
    pub fn set_credential(&self, credential: Credential) {
        if let Backend::Registry(sources) = &self.0.backend {
            sources.set_credential(credential);
        }
    }

    /// Returns exactly the bytes `stored` of blob `blob`.
    ///
    /// # Errors
    ///
    /// [`SourceError`], at the latest when the deadline of the options has passed.
    pub async fn read(&self, blob: &BlobId, stored: Range<u64>, urgency: Urgency) -> Result<Bytes, SourceError> {
        Ok(self.read_from(blob, stored, urgency, Avoid::Nothing).await?.bytes)
    }

    /// As [`Route::read`], with a word about whom not to ask, and an answer that names who gave the bytes.
    ///
    /// # Errors
    ///
    /// As [`Route::read`].
    pub async fn read_from(
        &self,
        blob: &BlobId,
        stored: Range<u64>,
        urgency: Urgency,
        avoid: Avoid,
    ) -> Result<Served, SourceError> {
        let length = stored.end.saturating_sub(stored.start);
        if length == 0 {
            return Ok(Served {
                bytes: Bytes::new(),
                source: self.place().into(),
                from_mirror: false,
                ignores_ranges: false,
            });
        }
        let began = Instant::now();
        let local = match &self.0.backend {
            Backend::Registry(sources) => {
                let ask = Ask::Bytes { range: stored, urgency, avoid };
                return match self.go_round(sources, blob, &ask, urgency).await? {
                    (Answer::Bytes(stream, ignores_ranges), name, from_mirror) => {
                        Ok(Served { bytes: stream, source: name, from_mirror, ignores_ranges })
                    }
                    _ => unreachable!("bytes were asked for"),
                };
            }
            Backend::LocalFs(local) => local.read(blob, stored.clone()).await,
            Backend::Memory(memory) => {
                let limit = began + self.budget(urgency);
                match timeout_at(limit, memory.read(blob, stored.clone())).await {
                    Ok(Ok(bytes)) if bytes.len() as u64 != length => Err(SourceError::Outside {
                        place: "memory".to_owned(),
                        blob: blob.clone(),
                        size: stored.start + bytes.len() as u64,
                        stored,
                    }),
                    Ok(outcome) => outcome,
                    Err(_) => Err(SourceError::Deadline {
                        place: self.place(),
                        blob: blob.clone(),
                        after: began.elapsed(),
                        last: None,
                        advice: "",
                    }),
                }
            }
        };
        self.0.options.counters.attempt(length, began.elapsed(), local.is_ok());
        let bytes = local.inspect_err(|error| self.log(blob, error, urgency))?;
        self.0.options.counters.arrived(length, false);
        Ok(Served { bytes, source: self.place().into(), from_mirror: false, ignores_ranges: false })
    }

    /// Returns the size of blob `blob` as stored.
    ///
    /// # Errors
    ///
    /// As [`Route::read`].
    pub async fn size(&self, blob: &BlobId) -> Result<u64, SourceError> {
        match &self.0.backend {
            Backend::LocalFs(local) => local.size(blob).await,
            Backend::Memory(memory) => memory.size(blob).await,
            Backend::Registry(sources) => match self.go_round(sources, blob, &Ask::Size, Urgency::Demand).await? {
                (Answer::Size(size), ..) => Ok(size),
                _ => unreachable!("the size was asked for"),
            },
        }
    }

    /// Opens all of blob `blob` as a stream: for sources that ignore ranges ([`Served::ignores_ranges`]), and for
    /// whoever wants everything anyway. Finding a source that begins is tried as for a read; a stream that breaks
    /// is not repeated.
    ///
    /// # Errors
    ///
    /// As [`Route::read`].
    pub async fn stream(&self, blob: &BlobId, urgency: Urgency) -> Result<WholeBlob, SourceError> {
        if let Backend::Registry(sources) = &self.0.backend {
            return match self.go_round(sources, blob, &Ask::Whole { urgency }, urgency).await? {
                (Answer::Whole(stream), source, from_mirror) => {
                    Ok(WholeBlob::from_registry(self.clone(), blob.clone(), stream, source, from_mirror))
                }
                _ => unreachable!("all of it was asked for"),
            };
        }
        let size = self.size(blob).await?;
        Ok(WholeBlob::in_pieces(self.clone(), blob.clone(), size, urgency))
    }

    fn budget(&self, urgency: Urgency) -> Duration {
        match urgency {
            Urgency::Demand => self.0.options.deadline,
            Urgency::Prefetch => self.0.options.prefetch_deadline.min(self.0.options.deadline),
        }
    }

    /// Asks the sources round after round until one answers, one refuses for good, or time is up.
    async fn go_round(
        &self,
        sources: &Arc<Sources>,
        blob: &BlobId,
        ask: &Ask,
        urgency: Urgency,
    ) -> Result<(Answer, Arc<str>, bool), SourceError> {
        let began = Instant::now();
        let mut budget = self.budget(urgency);
        if sources.down_since().is_some_and(|since| began.duration_since(since) >= self.0.options.outage) {
            budget = budget.min(self.0.options.outage_wait);
        }
        let deadline = began + budget;
        let outcome = self.rounds(sources, blob, ask, urgency, deadline).await;
        outcome.map_err(|failure| {
            let error = failure.into_error(sources.place.to_string(), blob.clone(), began.elapsed());
            self.log(blob, &error, urgency);
            error
        })
    }

    async fn rounds(
        &self,
        sources: &Arc<Sources>,
        blob: &BlobId,
        ask: &Ask,
        urgency: Urgency,
        deadline: Instant,
    ) -> Result<(Answer, Arc<str>, bool), Failure> {
        let mut last: Option<RegistryError> = None;
        let mut backoff = BACKOFF.0;
        let mut odd = 0;
        let mut renewed = false;
        'rounds: for round in 1_u32.. {
            sources.note_traffic();
            let credentials = sources.credentials_seen();
            let chosen = sources.choose(ask.avoid());
            let count = chosen.len();
            for (index, source) in chosen.into_iter().enumerate() {
                let now = Instant::now();
                // Another source is left, so this one may not use up all the time with a trickle.
                let limit =
                    if index + 1 < count { now + deadline.saturating_duration_since(now) / 2 } else { deadline };
                let outcome = timeout_at(limit, source.ask(&sources.repository, blob, ask)).await;
                self.0.options.counters.attempt(ask.length(), now.elapsed(), matches!(outcome, Ok(Ok(_))));
                let error = match outcome {
                    Ok(Ok(answer)) => {
                        source.succeeded();
                        self.0.options.counters.arrived(ask.length(), source.is_mirror());
                        return Ok((answer, Arc::clone(source.name()), source.is_mirror()));
                    }
                    Ok(Err(error)) => error,
                    Err(_) => {
                        source.failed(Weight::Silent);
                        last = last.or(Some(
                            HttpError::Silent { host: source.name().to_string(), limit: now.elapsed() }.into(),
                        ));
                        if limit >= deadline {
                            return Err(Failure::Deadline(last));
                        }
                        continue;
                    }
                };
                tracing::debug!(source = %source.name(), %blob, %error, "a source did not answer as wanted");
                match source.judge(&error, urgency) {
                    Judgement::Ask => {}
                    Judgement::Odd => odd += 1,
                    Judgement::Stop(failure) => {
                        let failure = failure(error);
                        let denied = matches!(failure, Failure::Denied(_));
                        if denied && !renewed && sources.has_newer_credential(credentials, deadline).await {
                            renewed = true;
                            continue 'rounds;
                        }
                        return Err(failure);
                    }
                }
                last = Some(error);
            }
            let enough = odd >= ODD_ROUNDS || (urgency == Urgency::Prefetch && round >= PREFETCH_ROUNDS);
            if enough && let Some(error) = last {
                return Err(Failure::Unavailable(error));
            }
            let now = Instant::now();
            let (pause, wish) = sources.pause(now);
            let left = deadline.saturating_duration_since(now);
            if pause >= left || left < BACKOFF.0 {
                return Err(match last.or(wish) {
                    Some(error) if pause > Duration::ZERO => Failure::Unavailable(error),
                    last => Failure::Deadline(last),
                });
            }
            // Towards the end the waits become short again: a source may come back in the last seconds too.
            let wait = jittered(backoff).min(left / 2).max(pause);
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = sources.revived() => {}
            }
            backoff = (backoff * 2).min(BACKOFF.1);
        }
        unreachable!("the rounds end by a return")
    }

    /// Logs a failed read, unless it failed in the same way just now: many readers wait for one blob.
    fn log(&self, blob: &BlobId, error: &SourceError, urgency: Urgency) {
        let now = Instant::now();
        let mut logged = lock(&self.0.logged);
        logged.retain(|_, when| now.duration_since(*when) < LOG_INTERVAL);
        let key = (blob.clone(), std::mem::discriminant(error));
        if urgency == Urgency::Prefetch || logged.contains_key(&key) || logged.len() >= MAX_LOGGED {
            tracing::debug!(%error, "could not read from the backend");
        } else {
            logged.insert(key, now);
            tracing::warn!(%error, "could not read from the backend");
        }
    }
}

/// What to do after a source's error.
pub(crate) enum Judgement {
    /// Ask the next source, and all of them again later.
    Ask,
    /// The same, but not often: the answer makes no sense and may never do.
    Odd,
    /// It is of no use to ask anybody.
    Stop(fn(RegistryError) -> Failure),
}

/// Why the rounds ended.
pub(crate) enum Failure {
    Denied(RegistryError),
    Missing(RegistryError),
    Unavailable(RegistryError),
    Deadline(Option<RegistryError>),
}

impl Failure {
    fn into_error(self, place: String, blob: BlobId, after: Duration) -> SourceError {
        match self {
            Self::Denied(source) => SourceError::Denied { place, blob, source: Box::new(source) },
            Self::Missing(source) => SourceError::Missing { place, blob, source: Box::new(source) },
            Self::Unavailable(source) => {
                let advice = error::advice(&source);
                SourceError::Unavailable { place, blob, source: Box::new(source), advice }
            }
            Self::Deadline(last) => {
                let advice = last.as_ref().map_or("", error::advice);
                SourceError::Deadline { place, blob, after, last: last.map(Box::new), advice }
            }
        }
    }
}

/// Returns a time between half of `wait` and `wait`, so that readers who failed together return apart.
fn jittered(wait: Duration) -> Duration {
    use std::hash::{BuildHasher as _, RandomState};
    // The keys of a hasher are random enough to keep readers apart.
    let random = RandomState::new().hash_one(0) % 512;
    wait / 2 + wait * u32::try_from(random).unwrap_or(0) / 1024
}
