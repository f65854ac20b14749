//! Carries plans out: records, directories, and images that must be mounted first.
//!
//! Each call is one transaction of the records ([`Meta`]); directories are made before it commits and removed after, so that a
//! kill at any moment leaves at most a directory without a record, which [`Snapshots::cleanup`] removes. What blocks runs on
//! threads that may block.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::bootstrap;
use crate::cache::Cache;
use crate::daemons::Daemons;
use crate::filter::{Filters, Subject as Filtered};
use crate::labels::{self, Content, Labels, Layer};
use crate::layout::Layout;
use crate::meta::{Fresh, Kind, Meta, Record};
use crate::mounts::{self, Chain, Mount, Overlay, Subject};
use crate::overlay;
use crate::plan::{self, Ancestor, Plan};
use crate::status::SnapshotError;
use crate::usage::{self, Usage};

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
    ) -> Self {
        Self { inner: Arc::new(Inner { meta, layout, overlay, always_volatile, daemons, cache }) }
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
        let layer = labels::parse(&labels).map_err(|error| SnapshotError::InvalidArgument(error.to_string()))?;
        let (plan, ancestors) = {
            let (key, parent, layer) = (key.clone(), parent.clone(), layer.clone());
            self.blocking(move |inner| inner.plan(kind, &key, &parent, &layer)).await?
        };
        let (chain, owner) = match plan {
            Plan::Supply { target } => {
                self.blocking(move |inner| inner.supply(&target, &key, &parent, &labels)).await?;
                unreachable!("supplying a layer always ends in AlreadyExists")
            }
            Plan::Unpack(chain) => (chain, None),
            Plan::Serve { chain, image } => {
                let owner = self.serve(image, &ancestors).await?;
                // Only a snapshot right on the image starts with its root; one on a local layer has that layer's.
                let direct = chain.local.is_empty();
                (chain, direct.then_some(owner))
            }
        };
        self.blocking(move |inner| {
            let record = inner.meta.create(&key, &parent, kind, &labels, |fresh| {
                let made = inner.make_directories(fresh, kind == Kind::Active, &layer, owner).and_then(|()| {
                    if gone.is_cancelled() {
                        let text = format!("snapshot {key:?} is not wanted any more: its caller is gone");
                        return Err(SnapshotError::Unavailable(text));
                    }
                    Ok(())
                });
                if made.is_err() {
                    inner.discard_or_warn(fresh.id);
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
        let chain = match plan {
            Plan::Supply { .. } => unreachable!("only a new snapshot is supplied"),
            Plan::Unpack(chain) => chain,
            Plan::Serve { chain, image } => {
                self.serve(image, &ancestors).await?;
                chain
            }
        };
        self.blocking(move |inner| {
            overlay::forget_volatile(&inner.layout.upper(record.id), &inner.layout.work(record.id))
                .map_err(SnapshotError::io("clearing", inner.layout.work(record.id)))?;
            Ok(inner.mounts(&record, &layer, &chain))
        })
        .await
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
        let record = self
            .blocking(move |inner| {
                if labels::content(&labels) == Content::Bootstrap {
                    inner.keep_bootstrap(&key)?;
                }
                inner.meta.commit(&name, &key, &labels)
            })
            .await?;
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
        if content == Content::Bootstrap {
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

    /// Commits a layer that needs no download, and says so by the error that containerd waits for.
    fn supply(&self, target: &str, key: &str, parent: &str, labels: &Labels) -> Result<()> {
        let layer = labels::parse(labels).map_err(|error| SnapshotError::InvalidArgument(error.to_string()))?;
        let leftover =
            self.meta.supply(target, key, parent, labels, |fresh| self.make_directories(fresh, false, &layer, None))?;
        if let Some(id) = leftover {
            self.discard_or_warn(id);
        }
        tracing::debug!(target, "a data layer needs no download");
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

    /// Makes the directories of a snapshot whose record is about to be committed.
    fn make_directories(&self, fresh: Fresh, writable: bool, layer: &Layer, owner: Option<Owner>) -> Result<()> {
        let top = self.layout.snapshot(fresh.id);
        // Left by a transaction that was never committed: nobody knows it.
        remove_tree(&top)?;
        make_directory(&top, 0o700)?;
        let upper = self.layout.upper(fresh.id);
        make_directory(&upper, 0o755)?;
        if writable {
            make_directory(&self.layout.work(fresh.id), 0o711)?;
        }
        // The root of the mount is our directory, so it needs its owner from below, as in containerd.
        let owner = match (&layer.id_map, owner, fresh.parent) {
            (Some(map), _, _) => Some((map.root_user, map.root_group)),
            (None, Some(owner), _) => Some(owner),
            (None, None, Some(parent)) => {
                let below = self.layout.upper(parent);
                let found = fs::metadata(&below).map_err(SnapshotError::io("looking at", &below))?;
                Some((found.uid(), found.gid()))
            }
            (None, None, None) => None,
        };
        if let Some((user, group)) = owner {
            std::os::unix::fs::lchown(&upper, Some(user), Some(group))
                .map_err(SnapshotError::io("giving away", &upper))?;
        }
        // The record will be on the disk: so must be what it names.
        for directory in [&top, &self.layout.snapshots()] {
            sync(directory)?;
        }
        Ok(())
    }

    /// Has the bootstrap in the active snapshot `key` reach the disk, for half of one would cost the image another pull.
    fn keep_bootstrap(&self, key: &str) -> Result<()> {
        let upper = self.layout.upper(self.meta.stat(key)?.id);
        for place in bootstrap::PLACES.map(|place| upper.join(place)).iter().filter(|place| place.is_file()) {
            sync(place)?;
            sync(place.parent().expect("a file below a directory"))?;
        }
        sync(&upper)
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

    /// Removes a snapshot's directory: out of the way first, so that half a directory is never taken for one.
    fn discard(&self, id: u64) -> Result<()> {
        let top = self.layout.snapshot(id);
        let doomed = self.layout.snapshots().join(format!("rm-{id}"));
        remove_tree(&doomed)?;
        match fs::rename(&top, &doomed) {
            Ok(()) => remove_tree(&doomed),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(SnapshotError::io("removing", &top)(error)),
        }
    }

    fn discard_or_warn(&self, id: u64) {
        if let Err(error) = self.discard(id) {
            tracing::warn!(id, error = error.full_text(), "a removed snapshot is still on disk");
        }
    }

    /// Removes directories without a record.
    fn sweep(&self) -> Result<()> {
        let snapshots = self.layout.snapshots();
        let mut doomed = Vec::new();
        let mut failed = None;
        self.meta.frozen(|frozen| {
            match orphans(&snapshots, &frozen.records) {
                Ok(found) => doomed = found,
                Err(error) => failed = Some(error),
            }
            Vec::new()
        })?;
        if let Some(error) = failed {
            return Err(SnapshotError::io("reading", &snapshots)(error));
        }
        for path in doomed {
            if let Err(error) = remove_tree(&path) {
                tracing::warn!(path = %path.display(), error = error.full_text(), "an unused directory is still there");
            }
        }
        Ok(())
    }
}

/// Waits for unmounting, but no longer than a call may take. A nydusd that is being started, or does not answer, is not a
/// reason to let containerd wait: what stays mounted goes at a later cleanup.
async fn in_time(release: impl Future<Output = ()> + Send + 'static) {
    if tokio::time::timeout(RELEASE_LIMIT, tokio::spawn(release)).await.is_err() {
        tracing::warn!("unmounting images that nobody uses takes long and goes on");
    }
}

/// Renames directories that no record names, so that no new snapshot meets them, and tells the new names.
fn orphans(snapshots: &Path, records: &[Record]) -> io::Result<Vec<std::path::PathBuf>> {
    let known: std::collections::HashSet<u64> = records.iter().map(|record| record.id).collect();
    let mut found = Vec::new();
    for entry in fs::read_dir(snapshots)? {
        let entry = entry?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.parse::<u64>().ok());
        match number {
            Some(id) if known.contains(&id) => {}
            Some(id) => {
                let doomed = snapshots.join(format!("rm-{id}"));
                if doomed.exists() {
                    found.push(entry.path());
                } else {
                    fs::rename(entry.path(), &doomed)?;
                    found.push(doomed);
                }
            }
            None if name.to_str().is_some_and(|name| name.starts_with("rm-")) => found.push(entry.path()),
            // Not ours: left alone.
            None => {}
        }
    }
    Ok(found)
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

/// Makes a directory with exactly this mode, whatever the umask.
fn make_directory(path: &Path, mode: u32) -> Result<()> {
    fs::create_dir(path).map_err(SnapshotError::io("creating", path))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(SnapshotError::io("setting the mode of", path))
}

/// Has a file or directory reach the disk.
fn sync(path: &Path) -> Result<()> {
    fs::File::open(path).and_then(|file| file.sync_all()).map_err(SnapshotError::io("syncing", path))
}

fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(SnapshotError::io("removing", path)(error)),
        _ => Ok(()),
    }
}
