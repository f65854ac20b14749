//! Carries plans out: records, directories, and images that must be mounted first.
//!
//! Each call is one transaction of the records ([`Meta`]); directories are made before it commits and removed after, so that a
//! kill at any moment leaves at most a directory without a record, which [`Snapshots::cleanup`] removes. What blocks runs on
//! threads that may block.

mod directories;

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::bootstrap;
use crate::cache::Cache;
use crate::daemons::Daemons;
use crate::estargz::{Fresh, Indexer};
use crate::filter::{Filters, Subject as Filtered};
use crate::labels::{self, Content, Labels, Layer, Table};
use crate::layout::Layout;
use crate::meta::{Kind, Meta, Record};
use crate::mounts::{self, Chain, Mount, Overlay, Subject};
use crate::overlay;
use crate::plan::{self, Ancestor, Plan};
use crate::status::{SnapshotError, full_text};
use crate::usage::{self, Usage};
use directories::make_directory;

/// How long a call waits for images to be unmounted; that goes on without it.
const RELEASE_LIMIT: Duration = Duration::from_secs(3);

type Result<T> = std::result::Result<T, SnapshotError>;

/// The snapshots of one root. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Snapshots {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    meta: Arc<Meta>,
    layout: Layout,
    overlay: Overlay,
    always_volatile: bool,
    daemons: Daemons,
    cache: Arc<Cache>,
    /// `None`: layers with a table of contents are unpacked like any other.
    indexer: Option<Indexer>,
}

/// Who owns a directory.
type Owner = (u32, u32);

impl Snapshots {
    /// Puts the parts together.
    pub fn new(
        meta: Arc<Meta>,
        layout: Layout,
        overlay: Overlay,
        always_volatile: bool,
        daemons: Daemons,
        cache: Arc<Cache>,
        indexer: Option<Indexer>,
    ) -> Self {
        Self { inner: Arc::new(Inner { meta, layout, overlay, always_volatile, daemons, cache, indexer }) }
    }

    /// Creates a view or active snapshot and tells how to mount it; creates nothing once its caller is `gone`.
    ///
    /// # Errors
    /// `AlreadyExists` also when the layer was supplied without a download. See [`Meta::create`] and [`Daemons::serve`].
    pub async fn create(
        &self,
        kind: Kind,
        key: String,
        parent: String,
        labels: Labels,
        gone: CancellationToken,
    ) -> Result<Vec<Mount>> {
        not_empty("key", &key)?;
        // Only what we made ourselves is marked so.
        let mut labels = labels;
        labels.remove(labels::STARGZ_LAYER);
        let mut layer = labels::parse(&labels).map_err(|error| SnapshotError::InvalidArgument(error.to_string()))?;
        if self.inner.indexer.is_none() {
            layer.table = None;
        }
        let (mut plan, mut ancestors) = self.plan(kind, &key, &parent, &layer).await?;
        if let Plan::Index { target, table, below } = &plan {
            if let Some(fresh) = self.index(table, &labels, *below).await {
                labels.insert(labels::STARGZ_LAYER.to_owned(), "true".to_owned());
                let target = target.clone();
                self.blocking(move |inner| inner.supply(&target, &key, &parent, &labels, Some(&fresh))).await?;
                unreachable!("supplying a layer always ends in AlreadyExists")
            }
            layer.table = None;
            (plan, ancestors) = self.plan(kind, &key, &parent, &layer).await?;
        }
        let (chain, served) = match plan {
            Plan::Supply { target } => {
                self.blocking(move |inner| inner.supply(&target, &key, &parent, &labels, None)).await?;
                unreachable!("supplying a layer always ends in AlreadyExists")
            }
            Plan::Index { .. } => unreachable!("only a layer with a table is indexed"),
            Plan::Unpack(chain) => (chain, None),
            Plan::Serve { chain, image } => (chain, Some(self.serve(image, &ancestors).await?)),
        };
        self.blocking(move |inner| {
            let owner = inner.root_owner(&layer, &chain, served)?;
            let record = inner.meta.create(&key, &parent, kind, &labels, |id| {
                let made = inner.make_directories(id, kind == Kind::Active, owner).and_then(|()| {
                    if gone.is_cancelled() {
                        let text = format!("snapshot {key:?} is not wanted any more: its caller is gone");
                        return Err(SnapshotError::Unavailable(text));
                    }
                    Ok(())
                });
                if made.is_err() {
                    inner.discard_or_warn(id);
                }
                made
            })?;
            Ok(inner.mounts(&record, &layer, &chain))
        })
        .await
    }

    /// Tells how to mount a view or active snapshot that exists, bringing its image back if need be.
    ///
    /// # Errors
    /// `NotFound`, `FailedPrecondition` for a committed snapshot, or what [`Daemons::serve`] gave.
    pub async fn mounts(&self, key: String) -> Result<Vec<Mount>> {
        let (record, layer, plan, ancestors) = self.blocking(move |inner| inner.existing(&key)).await?;
        let (chain, served) = match plan {
            Plan::Supply { .. } | Plan::Index { .. } => unreachable!("only a new snapshot is supplied"),
            Plan::Unpack(chain) => (chain, None),
            Plan::Serve { chain, image } => (chain, Some(self.serve(image, &ancestors).await?)),
        };
        self.blocking(move |inner| {
            inner.restore_directories(&record, &layer, &chain, served)?;
            overlay::forget_volatile(&inner.layout.upper(record.id), &inner.layout.work(record.id))
                .map_err(SnapshotError::io("clearing", inner.layout.work(record.id)))?;
            Ok(inner.mounts(&record, &layer, &chain))
        })
        .await
    }

    async fn plan(&self, kind: Kind, key: &str, parent: &str, layer: &Layer) -> Result<(Plan, Vec<Record>)> {
        let (key, parent, layer) = (key.to_owned(), parent.to_owned(), layer.clone());
        self.blocking(move |inner| inner.plan(kind, &key, &parent, &layer)).await
    }

    /// Makes the bootstrap of a layer of its table of contents; says in one line why there is none.
    async fn index(&self, table: &Table, labels: &Labels, below: Option<u64>) -> Option<Fresh> {
        let indexer = self.inner.indexer.as_ref()?;
        let below = below.map(|below| self.inner.layout.upper(below).join(bootstrap::PLACE));
        match indexer.index(table, labels, below).await {
            Ok(fresh) => Some(fresh),
            Err(error) => {
                tracing::warn!(
                    layer = table.layer,
                    error = full_text(&error),
                    "an eStargz layer is unpacked instead of read lazily"
                );
                None
            }
        }
    }

    async fn serve(&self, image: u64, ancestors: &[Record]) -> Result<Owner> {
        let record = ancestors.iter().find(|record| record.id == image).expect("the image is one of the ancestors");
        self.inner.daemons.serve(record).await
    }

    /// Turns an active snapshot into a committed one. What it uses is measured afterwards, because containerd holds its
    /// own database locked meanwhile.
    ///
    /// # Errors
    /// See [`Meta::commit`].
    pub async fn commit(&self, name: String, key: String, labels: Labels) -> Result<()> {
        not_empty("name", &name)?;
        let mut labels = labels;
        labels.remove(labels::STARGZ_LAYER);
        let record = self.blocking(move |inner| inner.meta.commit(&name, &key, &labels)).await?;
        let inner = self.inner.clone();
        tokio::task::spawn_blocking(move || {
            if let Err(error) = inner.measure(record.id) {
                tracing::debug!(id = record.id, error = error.full_text(), "a committed snapshot was not measured yet");
            }
        });
        Ok(())
    }

    /// Removes a snapshot, what it has on disk, and the image that it was the bootstrap of.
    ///
    /// # Errors
    /// See [`Meta::remove`].
    pub async fn remove(&self, key: String) -> Result<()> {
        let record = self.blocking(move |inner| inner.meta.remove(&key)).await?;
        let content = labels::content(&record.labels);
        if content.is_image() {
            let daemons = self.inner.daemons.clone();
            in_time(async move { daemons.release(record.id).await }).await;
        }
        self.blocking(move |inner| {
            // The record is gone, so the call succeeded, and an error now would make containerd give up its round of
            // garbage collection. What is left goes at the next cleanup.
            inner.discard_or_warn(record.id);
            if content != Content::Files
                && let Err(error) = inner.cache.reclaim(&inner.meta)
            {
                tracing::warn!(error = error.full_text(), "unused cached blobs are still there");
            }
            Ok(())
        })
        .await
    }

    /// What is recorded about a snapshot.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn stat(&self, key: String) -> Result<Record> {
        self.blocking(move |inner| inner.meta.stat(&key)).await
    }

    /// Changes labels.
    ///
    /// # Errors
    /// See [`Meta::update`].
    pub async fn update(&self, key: String, labels: Labels, fields: Vec<String>) -> Result<Record> {
        self.blocking(move |inner| inner.meta.update(&key, &labels, &fields)).await
    }

    /// Every snapshot that one of the filters admits, by key.
    ///
    /// # Errors
    /// `InvalidArgument` for a filter that cannot be read.
    pub async fn list(&self, filters: Vec<String>) -> Result<Vec<(String, Record)>> {
        let filters = Filters::parse(&filters).map_err(|error| SnapshotError::InvalidArgument(error.to_string()))?;
        let mut all = self.blocking(|inner| inner.meta.list()).await?;
        all.retain(|(name, record)| {
            filters.admit(Filtered { kind: record.kind.name(), name, parent: &record.parent, labels: &record.labels })
        });
        Ok(all)
    }

    /// What a snapshot itself uses, without its parents; for a data layer what of its blob is cached.
    ///
    /// # Errors
    /// `NotFound`, or a directory that cannot be read.
    pub async fn usage(&self, key: String) -> Result<Usage> {
        self.blocking(move |inner| {
            let record = inner.meta.stat(&key)?;
            let mut usage = match (record.kind, record.usage) {
                (Kind::Committed, Some(stored)) => stored,
                (Kind::Committed, None) => inner.measure(record.id)?,
                (Kind::Active | Kind::View, _) => inner.walk(record.id)?,
            };
            if let Some(blob) = labels::data_blob(&record.labels) {
                usage += inner.cache.usage(&blob);
            }
            Ok(usage)
        })
        .await
    }

    /// Removes what no record wants: directories, mounted images, cached blobs.
    ///
    /// # Errors
    /// When the records or the directory of snapshots cannot be read.
    pub async fn cleanup(&self) -> Result<()> {
        let daemons = self.inner.daemons.clone();
        in_time(async move { daemons.release_orphans().await }).await;
        self.blocking(|inner| {
            inner.sweep()?;
            inner.cache.reclaim(&inner.meta)
        })
        .await
    }

    async fn blocking<T: Send + 'static>(&self, act: impl FnOnce(&Inner) -> Result<T> + Send + 'static) -> Result<T> {
        let inner = self.inner.clone();
        let task = tokio::task::spawn_blocking(move || act(&inner));
        task.await.map_err(|error| SnapshotError::Task(error.to_string()))?
    }
}

impl Inner {
    fn plan(&self, kind: Kind, key: &str, parent: &str, layer: &Layer) -> Result<(Plan, Vec<Record>)> {
        let (ancestors, records): (Vec<Ancestor>, Vec<Record>) = self.meta.ancestors(parent)?.into_iter().unzip();
        let plan = plan::create(kind, layer, &ancestors).map_err(refused)?;
        // Checked again when the record is made; here it spares mounting an image in vain.
        if !matches!(plan, Plan::Supply { .. }) && self.meta.stat(key).is_ok() {
            return Err(SnapshotError::AlreadyExists(key.to_owned()));
        }
        Ok((plan, records))
    }

    fn existing(&self, key: &str) -> Result<(Record, Layer, Plan, Vec<Record>)> {
        let record = self.meta.stat(key)?;
        if record.kind == Kind::Committed {
            return Err(SnapshotError::FailedPrecondition(format!("snapshot {key:?} is neither active nor a view")));
        }
        let layer = labels::parse(&record.labels).map_err(|error| SnapshotError::InvalidArgument(error.to_string()))?;
        let (ancestors, records): (Vec<Ancestor>, Vec<Record>) =
            self.meta.ancestors(&record.parent)?.into_iter().unzip();
        let plan = plan::mount(record.kind, &layer, &ancestors).map_err(refused)?;
        Ok((record, layer, plan, records))
    }

    /// Commits a layer that needs no download, with its bootstrap if it has one of its own, and says so by the error that
    /// containerd waits for.
    fn supply(&self, target: &str, key: &str, parent: &str, labels: &Labels, bootstrap: Option<&Fresh>) -> Result<()> {
        let make = |id| {
            self.make_directories(id, false, None)?;
            let Some(fresh) = bootstrap else { return Ok(()) };
            let place = self.layout.upper(id).join(bootstrap::PLACE);
            make_directory(place.parent().expect("it is below the snapshot"), 0o755)?;
            fresh.put(&place).map_err(SnapshotError::io("placing", &place))
        };
        let leftover = self.meta.supply(target, key, parent, labels, make)?;
        if let Some(id) = leftover {
            self.discard_or_warn(id);
        }
        tracing::debug!(target, "a layer needs no download");
        Err(SnapshotError::AlreadyExists(target.to_owned()))
    }

    fn mounts(&self, record: &Record, layer: &Layer, chain: &Chain) -> Vec<Mount> {
        let subject = Subject {
            id: record.id,
            kind: record.kind,
            volatile: layer.volatile || self.always_volatile,
            id_map: layer.id_map.as_ref(),
        };
        mounts::of(subject, chain, &self.layout, self.overlay)
    }

    /// Who owns the root of a snapshot. The root of its mount is our directory, so it needs its owner from below, as in
    /// containerd: from the uppermost layer with files, else from the image that nydusd serves.
    fn root_owner(&self, layer: &Layer, chain: &Chain, served: Option<Owner>) -> Result<Option<Owner>> {
        if let Some(map) = &layer.id_map {
            return Ok(Some((map.root_user, map.root_group)));
        }
        let Some(below) = chain.local.first().map(|id| self.layout.upper(*id)) else { return Ok(served) };
        match fs::metadata(&below) {
            Ok(found) => Ok(Some((found.uid(), found.gid()))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(SnapshotError::Image(format!(
                "the files of a layer below, {}, are gone, as after a power cut: remove the image and pull it again",
                below.display()
            ))),
            Err(error) => Err(SnapshotError::io("looking at", &below)(error)),
        }
    }

    fn walk(&self, id: u64) -> Result<Usage> {
        let upper = self.layout.upper(id);
        usage::of(&upper).map_err(SnapshotError::io("measuring", &upper))
    }

    fn measure(&self, id: u64) -> Result<Usage> {
        let usage = self.walk(id)?;
        self.meta.measured(id, usage)?;
        Ok(usage)
    }
}

/// Waits for unmounting, but no longer than a call may take. A nydusd that is being started, or does not answer, is not a
/// reason to let containerd wait: what stays mounted goes at a later cleanup.
async fn in_time(release: impl Future<Output = ()> + Send + 'static) {
    if tokio::time::timeout(RELEASE_LIMIT, tokio::spawn(release)).await.is_err() {
        tracing::warn!("unmounting images that nobody uses takes long and goes on");
    }
}

/// Refuses a name that could not be told from "no parent".
fn not_empty(what: &str, name: &str) -> Result<()> {
    match name {
        "" => Err(SnapshotError::InvalidArgument(format!("the {what} of a snapshot must not be empty"))),
        _ => Ok(()),
    }
}

fn refused(refusal: plan::Refusal) -> SnapshotError {
    match refusal {
        plan::Refusal::DataOnly => SnapshotError::Image(refusal.to_string()),
        plan::Refusal::MappedImage => SnapshotError::Unimplemented(refusal.to_string()),
    }
}
