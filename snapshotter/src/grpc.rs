//! containerd's snapshots service on [`Snapshots`].
//!
//! Only translation: strings and maps become our types, our answers become theirs. Each call runs as a task of its own, so a
//! client that hangs up in the middle does not stop it halfway. No call keeps its caller longer than its limit: what is not
//! done by then goes on, and the answer is `UNAVAILABLE`. A snapshot whose caller is gone is not created any more, so
//! that a repeat does not find a stranger under its key.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use containerd_snapshots as ctd;
use containerd_snapshots::api::types::Mount as WireMount;
use futures::Stream;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::meta::{Kind, Record};
use crate::metrics::{Metrics, Operation};
use crate::mounts::Mount;
use crate::snapshots::Snapshots;
use crate::status::SnapshotError;

/// How long Prepare, View and Mounts may take, the start of nydusd included.
const MOUNTS_LIMIT: Duration = Duration::from_secs(20);

/// How long any other call may take.
const CALL_LIMIT: Duration = Duration::from_secs(5);

type Result<T> = std::result::Result<T, SnapshotError>;

/// The service.
#[derive(Debug, Clone)]
pub struct Service {
    snapshots: Snapshots,
    metrics: Arc<Metrics>,
}

impl Service {
    /// Serves `snapshots`.
    pub fn new(snapshots: Snapshots, metrics: Arc<Metrics>) -> Self {
        Self { snapshots, metrics }
    }

    /// Runs a call to its end, whatever becomes of the caller, who hears of it within the call's limit.
    async fn run<T, F>(&self, span: tracing::Span, operation: Option<Operation>, call: F) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        let begun = Instant::now();
        let limit = match operation {
            Some(Operation::Prepare | Operation::Mounts) => MOUNTS_LIMIT,
            _ => CALL_LIMIT,
        };
        let metrics = Arc::clone(&self.metrics);
        // What became of it is said and counted where it ends: its caller may be gone by then.
        let whole = async move {
            let answer = call.await;
            if let Some(operation) = operation {
                metrics.took(operation, begun.elapsed());
            }
            tell(&answer, begun);
            answer
        };
        let answer = match tokio::time::timeout(limit, tokio::spawn(whole.instrument(span.clone()))).await {
            Ok(Ok(answer)) => return answer,
            Ok(Err(error)) => Err(SnapshotError::Task(error.to_string())),
            Err(_) => Err(SnapshotError::Unavailable(format!(
                "the call is not done after {} s and goes on without its caller: repeat it",
                limit.as_secs()
            ))),
        };
        span.in_scope(|| tell(&answer, begun));
        answer
    }

    async fn create(
        &self,
        kind: Kind,
        key: String,
        parent: String,
        labels: HashMap<String, String>,
    ) -> Result<Vec<WireMount>> {
        let span = match kind {
            Kind::View => tracing::info_span!("view", key, parent),
            _ => tracing::info_span!("prepare", key, parent),
        };
        let snapshots = self.snapshots.clone();
        let labels = labels.into_iter().collect();
        let gone = CancellationToken::new();
        // Dropped when the caller hangs up, and when the limit has passed.
        let _waiting = gone.clone().drop_guard();
        let call = async move { snapshots.create(kind, key, parent, labels, gone).await };
        Ok(self.run(span, Some(Operation::Prepare), call).await?.into_iter().map(wire).collect())
    }
}

#[tonic::async_trait]
impl ctd::Snapshotter for Service {
    type Error = SnapshotError;
    type InfoStream = Pin<Box<dyn Stream<Item = Result<ctd::Info>> + Send>>;

    async fn stat(&self, key: String) -> Result<ctd::Info> {
        let snapshots = self.snapshots.clone();
        let asked = key.clone();
        let span = tracing::debug_span!("stat", key);
        let record = self.run(span, None, async move { snapshots.stat(asked).await }).await?;
        Ok(info(key, record))
    }

    async fn update(&self, wanted: ctd::Info, fields: Option<Vec<String>>) -> Result<ctd::Info> {
        let snapshots = self.snapshots.clone();
        let name = wanted.name.clone();
        let span = tracing::debug_span!("update", name);
        let labels = wanted.labels.into_iter().collect();
        let call = async move { snapshots.update(wanted.name, labels, fields.unwrap_or_default()).await };
        Ok(info(name, self.run(span, None, call).await?))
    }

    async fn usage(&self, key: String) -> Result<ctd::Usage> {
        let snapshots = self.snapshots.clone();
        let span = tracing::debug_span!("usage", key);
        let usage = self.run(span, None, async move { snapshots.usage(key).await }).await?;
        let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        Ok(ctd::Usage { inodes: number(usage.inodes), size: number(usage.size) })
    }

    async fn mounts(&self, key: String) -> Result<Vec<WireMount>> {
        let snapshots = self.snapshots.clone();
        let span = tracing::info_span!("mounts", key);
        let mounts = self.run(span, Some(Operation::Mounts), async move { snapshots.mounts(key).await }).await?;
        Ok(mounts.into_iter().map(wire).collect())
    }

    async fn prepare(&self, key: String, parent: String, labels: HashMap<String, String>) -> Result<Vec<WireMount>> {
        self.create(Kind::Active, key, parent, labels).await
    }

    async fn view(&self, key: String, parent: String, labels: HashMap<String, String>) -> Result<Vec<WireMount>> {
        self.create(Kind::View, key, parent, labels).await
    }

    async fn commit(&self, name: String, key: String, labels: HashMap<String, String>) -> Result<()> {
        let snapshots = self.snapshots.clone();
        let span = tracing::info_span!("commit", name, key);
        let labels = labels.into_iter().collect();
        self.run(span, None, async move { snapshots.commit(name, key, labels).await }).await
    }

    async fn remove(&self, key: String) -> Result<()> {
        let snapshots = self.snapshots.clone();
        let span = tracing::info_span!("remove", key);
        self.run(span, Some(Operation::Remove), async move { snapshots.remove(key).await }).await
    }

    async fn clear(&self) -> Result<()> {
        let snapshots = self.snapshots.clone();
        let span = tracing::info_span!("cleanup");
        self.run(span, Some(Operation::Cleanup), async move { snapshots.cleanup().await }).await
    }

    async fn list(&self, _snapshotter: String, filters: Vec<String>) -> Result<Self::InfoStream> {
        let snapshots = self.snapshots.clone();
        let span = tracing::debug_span!("list", ?filters);
        let found = self.run(span, None, async move { snapshots.list(filters).await }).await?;
        Ok(Box::pin(futures::stream::iter(found.into_iter().map(|(name, record)| Ok(info(name, record))))))
    }
}

/// Logs how a call that began at `begun` ended.
fn tell<T>(answer: &Result<T>, begun: Instant) {
    match answer {
        Ok(_) => tracing::debug!(took = ?begun.elapsed(), "done"),
        // These are how the protocol works, not failures.
        Err(
            error @ (SnapshotError::NotFound(_)
            | SnapshotError::AlreadyExists(_)
            | SnapshotError::FailedPrecondition(_)),
        ) => tracing::debug!(took = ?begun.elapsed(), answer = %error, "done"),
        Err(error) => tracing::warn!(took = ?begun.elapsed(), error = error.full_text(), "failed"),
    }
}

fn info(name: String, record: Record) -> ctd::Info {
    ctd::Info {
        kind: match record.kind {
            Kind::View => ctd::Kind::View,
            Kind::Active => ctd::Kind::Active,
            Kind::Committed => ctd::Kind::Committed,
        },
        created_at: record.created_at(),
        updated_at: record.updated_at(),
        name,
        parent: record.parent,
        labels: record.labels.into_iter().collect(),
    }
}

fn wire(mount: Mount) -> WireMount {
    WireMount { r#type: mount.kind.to_owned(), source: mount.source, target: String::new(), options: mount.options }
}
