//! The nydusd processes, and the images that they mount.
//!
//! One daemon serves all images (the default), or each image has its own. An image is mounted when the first snapshot on it is
//! prepared and stays until its bootstrap snapshot is removed; containers do not count. Order: the intent is recorded, then
//! nydusd mounts, then the image is recorded as live; so after a kill at any moment the records name everything that
//! nydusd may have.
//!
//! Whoever wants an image that is being mounted joins the one attempt, and waits no longer than [`SERVE_LIMIT`]; the attempt
//! goes on, so that a repeat finds it further along.

use std::collections::{HashMap, HashSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use nydusd::api::client::{Client, ClientError};
use nydusd::api::types::{DaemonState, MountRequest};
use nydusd::config::Template;
use tokio_util::sync::CancellationToken;

use crate::bootstrap::{self, BootstrapError};
use crate::configure::{self, ConfigureError};
use crate::layout::Layout;
use crate::meta::{Instance, Meta, Record, Stage};
use crate::status::SnapshotError;

mod process;
mod recover;
mod spawn;

pub use process::Process;

/// How long a call waits for its image, the start of nydusd included.
const SERVE_LIMIT: Duration = Duration::from_secs(20);

/// How long nydusd may take for one mount or unmount.
const API_LIMIT: Duration = Duration::from_secs(5);

/// How long the root directory of a mount may take to answer.
const LOOK_LIMIT: Duration = Duration::from_secs(5);

/// Name of the daemon that serves all images.
const SHARED: &str = "shared";

/// How images are spread over daemons.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// One daemon for all.
    Shared,
    /// One daemon for each.
    Dedicated,
}

/// What happens when a daemon dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recovery {
    /// It is started again and its images are mounted again.
    Restart,
    /// Nothing, until somebody wants one of its images.
    None,
}

/// How daemons are run.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The program.
    pub nydusd: PathBuf,
    /// How images are spread.
    pub mode: Mode,
    /// What happens after a death.
    pub recovery: Recovery,
    /// Threads that answer the kernel; `None`: the program's default.
    pub threads: Option<u32>,
    /// Its log level.
    pub log_level: String,
    /// Size in MB after which it begins a new log; 0: never.
    pub log_rotation: u64,
    /// Whether daemons end with us.
    pub end_on_close: bool,
    /// Where blobs are cached.
    pub work_dir: PathBuf,
    /// Whether registries' certificates go unchecked.
    pub skip_verify: bool,
}

/// Why an image is not mounted.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The snapshot does not hold a bootstrap that can be mounted.
    #[error(transparent)]
    Bootstrap(#[from] BootstrapError),
    /// There is no configuration for it.
    #[error(transparent)]
    Configure(#[from] ConfigureError),
    /// The daemon did not start.
    #[error("could not start {}: {why}", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// What happened.
        why: String,
    },
    /// The daemon did not mount it.
    #[error("nydusd could not mount the image: {0}")]
    Mount(#[from] ClientError),
    /// The mount is there and does not answer.
    #[error("the mount at {} does not answer: {why}", path.display())]
    Dead {
        /// Where.
        path: PathBuf,
        /// How it fails.
        why: String,
    },
    /// A file or directory of ours could not be written.
    #[error("{doing} {}: {source}", path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The records.
    #[error("{0}")]
    Records(String),
}

impl ServeError {
    fn io(doing: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { doing, path, source }
    }

    fn status(&self, image: u64) -> SnapshotError {
        let text = format!("image of snapshot {image}: {self}");
        match self {
            Self::Start { .. } | Self::Dead { .. } => SnapshotError::Unavailable(text),
            Self::Mount(error) if !matches!(error, ClientError::Refused { .. }) => SnapshotError::Unavailable(text),
            _ => SnapshotError::Image(text),
        }
    }
}

impl From<SnapshotError> for ServeError {
    fn from(error: SnapshotError) -> Self {
        Self::Records(error.full_text())
    }
}

/// Owner of the root directory of an image.
type Owner = (u32, u32);

type Attempt = Shared<BoxFuture<'static, Result<Owner, Arc<ServeError>>>>;

/// All daemons of one root. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Daemons {
    inner: Arc<Inner>,
}

struct Inner {
    layout: Layout,
    settings: Settings,
    template: Template,
    meta: Arc<Meta>,
    /// Set at start, where images of the other mode may still be mounted.
    mode: Mutex<Mode>,
    daemons: Mutex<HashMap<String, Arc<Daemon>>>,
    attempts: Mutex<HashMap<u64, Attempt>>,
    closing: CancellationToken,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The template may hold credentials, and attempts have nothing to show.
        f.debug_struct("Daemons").field("settings", &self.settings).finish_non_exhaustive()
    }
}

/// Whom a daemon serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Serves {
    All,
    One(u64),
}

/// One nydusd, running or not.
#[derive(Debug)]
struct Daemon {
    name: String,
    serves: Serves,
    mountpoint: PathBuf,
    socket: PathBuf,
    /// Held while the daemon is started or asked to change something, so that these never overlap.
    turn: tokio::sync::Mutex<()>,
    state: Mutex<State>,
}

/// What we know of it. Locked for moments only.
#[derive(Debug, Default)]
struct State {
    process: Option<Process>,
    mounted: HashMap<u64, Owner>,
    watched: bool,
}

impl Daemon {
    fn alive(&self) -> bool {
        self.lock().process.as_ref().is_some_and(Process::alive)
    }

    /// The owner of a mounted image's root, if the image is mounted by a living process.
    fn serving(&self, image: u64) -> Option<Owner> {
        let state = self.lock();
        let owner = state.mounted.get(&image)?;
        state.process.as_ref()?.alive().then_some(*owner)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("no code panics while it holds this lock")
    }

    fn client(&self) -> Client {
        Client::new(&self.socket).with_timeout(API_LIMIT)
    }
}

/// One line about a daemon, for operators.
#[derive(Debug, Clone)]
pub struct Report {
    /// Its name.
    pub name: String,
    /// Its process, if it runs.
    pub pid: Option<i32>,
    /// Its API.
    pub socket: PathBuf,
    /// Where it mounts.
    pub mountpoint: PathBuf,
    /// The bootstrap snapshots that it serves.
    pub images: Vec<u64>,
}

impl Daemons {
    /// Nothing runs yet; [`Daemons::recover`] finds what ran before.
    pub fn new(layout: Layout, settings: Settings, template: Template, meta: Arc<Meta>) -> Self {
        let mode = Mutex::new(settings.mode);
        let inner = Inner {
            layout,
            settings,
            template,
            meta,
            mode,
            daemons: Mutex::default(),
            attempts: Mutex::default(),
            closing: CancellationToken::new(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Makes sure that the image of the bootstrap snapshot `record` is mounted; returns the owner of its root.
    ///
    /// # Errors
    /// `Unavailable` when nydusd does not start or it takes more than 20 seconds, else what is wrong with the image.
    pub async fn serve(&self, record: &Record) -> Result<Owner, SnapshotError> {
        let image = record.id;
        if let Some(owner) = self.inner.daemon_of(image).and_then(|daemon| daemon.serving(image)) {
            return Ok(owner);
        }
        let attempt = self.attempt(record);
        match tokio::time::timeout(SERVE_LIMIT, attempt).await {
            Ok(Ok(owner)) => Ok(owner),
            Ok(Err(error)) => Err(error.status(image)),
            Err(_) => Err(SnapshotError::Unavailable(format!(
                "the image of snapshot {image} is not mounted after {} s; the attempt goes on, and a repeat will join it",
                SERVE_LIMIT.as_secs()
            ))),
        }
    }

    fn attempt(&self, record: &Record) -> Attempt {
        let image = record.id;
        let mut attempts = self.inner.attempts.lock().expect("no code panics while it holds this lock");
        if let Some(running) = attempts.get(&image) {
            return running.clone();
        }
        let inner = self.inner.clone();
        let record = record.clone();
        // A task of its own: it outlives the call that began it.
        let task = tokio::spawn(async move {
            let result = inner.mount(&record).await.map_err(Arc::new);
            inner.attempts.lock().expect("no code panics while it holds this lock").remove(&record.id);
            result
        });
        let joined =
            task.map(|ended| ended.unwrap_or_else(|error| Err(Arc::new(ServeError::Records(error.to_string())))));
        let attempt = joined.boxed().shared();
        attempts.insert(image, attempt.clone());
        attempt
    }

    /// Unmounts the image of a bootstrap snapshot that was removed. What fails is tried again by
    /// [`Daemons::release_orphans`].
    pub async fn release(&self, image: u64) {
        if let Err(error) = self.inner.unmount(image).await {
            tracing::warn!(image, %error, "an unused image is still mounted");
        }
    }

    /// Unmounts images whose bootstrap snapshot is gone.
    pub async fn release_orphans(&self) {
        let meta = self.inner.meta.clone();
        let found = tokio::task::spawn_blocking(move || -> Result<Vec<u64>, SnapshotError> {
            let mut orphans = Vec::new();
            for instance in meta.instances()? {
                if meta.by_id(instance.id)?.is_none() {
                    orphans.push(instance.id);
                }
            }
            Ok(orphans)
        })
        .await;
        match found {
            Ok(Ok(orphans)) => {
                for image in orphans {
                    self.release(image).await;
                }
            }
            Ok(Err(error)) => tracing::warn!(error = error.full_text(), "unused images were not looked for"),
            Err(error) => tracing::warn!(%error, "unused images were not looked for"),
        }
    }

    /// What runs.
    pub fn report(&self) -> Vec<Report> {
        let daemons = self.inner.daemons.lock().expect("no code panics while it holds this lock");
        let mut reports: Vec<Report> = daemons
            .values()
            .map(|daemon| {
                let state = daemon.lock();
                let mut images: Vec<u64> = state.mounted.keys().copied().collect();
                images.sort_unstable();
                Report {
                    name: daemon.name.clone(),
                    pid: state.process.as_ref().filter(|process| process.alive()).map(|process| process.pid()),
                    socket: daemon.socket.clone(),
                    mountpoint: daemon.mountpoint.clone(),
                    images,
                }
            })
            .collect();
        reports.sort_by(|one, other| one.name.cmp(&other.name));
        reports
    }

    /// Ends watching; daemons go on, unless they are to end with us.
    pub async fn close(&self) {
        self.inner.closing.cancel();
        if !self.inner.settings.end_on_close {
            return;
        }
        let daemons: Vec<_> = {
            let daemons = self.inner.daemons.lock().expect("no code panics while it holds this lock");
            daemons.values().cloned().collect()
        };
        for daemon in daemons {
            let _turn = daemon.turn.lock().await;
            spawn::stop(&daemon).await;
        }
    }
}

impl Inner {
    fn mode(&self) -> Mode {
        *self.mode.lock().expect("no code panics while it holds this lock")
    }

    fn name_for(&self, image: u64) -> String {
        match self.mode() {
            Mode::Shared => SHARED.to_owned(),
            Mode::Dedicated => format!("image-{image}"),
        }
    }

    fn daemon_of(&self, image: u64) -> Option<Arc<Daemon>> {
        let name = self.name_for(image);
        self.daemons.lock().expect("no code panics while it holds this lock").get(&name).cloned()
    }

    /// The daemon of this name, known from now on.
    fn daemon(&self, name: &str) -> Arc<Daemon> {
        let mut daemons = self.daemons.lock().expect("no code panics while it holds this lock");
        let known = daemons.entry(name.to_owned()).or_insert_with(|| {
            let serves = match name.strip_prefix("image-").and_then(|number| number.parse().ok()) {
                Some(image) => Serves::One(image),
                None => Serves::All,
            };
            let mountpoint = match serves {
                Serves::All => self.layout.mounts(),
                Serves::One(image) => self.layout.rafs(image),
            };
            Arc::new(Daemon {
                name: name.to_owned(),
                serves,
                mountpoint,
                socket: self.layout.api_socket(name),
                turn: tokio::sync::Mutex::new(()),
                state: Mutex::default(),
            })
        });
        known.clone()
    }

    /// Mounts one image, starting its daemon if need be.
    async fn mount(self: &Arc<Self>, record: &Record) -> Result<Owner, ServeError> {
        let image = record.id;
        let daemon = self.daemon(&self.name_for(image));
        let _turn = daemon.turn.lock().await;
        if let Some(owner) = daemon.serving(image) {
            return Ok(owner);
        }
        let prepared = self.prepare(&daemon, record, Stage::Intended).await?;
        if !daemon.alive() {
            self.start(&daemon).await?;
            if daemon.serves == Serves::All {
                self.mount_recorded(&daemon, Some(image)).await;
            }
        }
        self.finish(&daemon, prepared).await
    }

    /// Writes the configuration of an image and records that it is to be mounted.
    async fn prepare(&self, daemon: &Daemon, record: &Record, stage: Stage) -> Result<Prepared, ServeError> {
        let image = record.id;
        let (upper, labels) = (self.layout.upper(image), record.labels.clone());
        let (template, settings) = (self.template.clone(), self.settings.clone());
        let file = self.layout.image_config(&daemon.name, image);
        let meta = self.meta.clone();
        let daemon = daemon.name.clone();
        let work = tokio::task::spawn_blocking(move || -> Result<Prepared, ServeError> {
            let found = bootstrap::find(&upper)?;
            let filled =
                configure::fill(template, image, &labels, &settings.work_dir, settings.skip_verify, Some(&file))?;
            configure::write(&file, &filled.text)?;
            let instance = Instance { id: image, daemon, image: filled.image, blobs: found.blobs, stage };
            meta.set_instance(&instance)?;
            Ok(Prepared { instance, bootstrap: found.path, config: filled.text })
        });
        work.await.map_err(|error| ServeError::Records(error.to_string()))?
    }

    /// Has a running daemon mount a prepared image, and records it as live.
    async fn finish(&self, daemon: &Daemon, prepared: Prepared) -> Result<Owner, ServeError> {
        let Prepared { mut instance, bootstrap, config } = prepared;
        let image = instance.id;
        if daemon.serves == Serves::All {
            let request = MountRequest::rafs(bootstrap.to_string_lossy(), config);
            match daemon.client().mount(&format!("/{image}"), &request).await {
                Ok(()) => {}
                // Asked for before, by us or by our predecessor.
                Err(error) if error.already_mounted() => {}
                Err(error) => return Err(error.into()),
            }
        }
        let owner = look(self.layout.rafs(image)).await?;
        instance.stage = Stage::Live;
        let meta = self.meta.clone();
        let (reference, blobs) = (instance.image.clone(), instance.blobs.as_ref().map_or(0, Vec::len));
        let recorded = tokio::task::spawn_blocking(move || meta.set_instance(&instance)).await;
        if let Err(error) = recorded.map_err(|error| ServeError::Records(error.to_string())).and_then(|done| Ok(done?))
        {
            // Its snapshot was removed meanwhile, so nobody else would ever unmount it.
            if daemon.serves == Serves::All
                && let Err(error) = daemon.client().umount(&format!("/{image}")).await
            {
                tracing::warn!(image, %error, "an image that is not recorded is still mounted");
            }
            return Err(error);
        }
        daemon.lock().mounted.insert(image, owner);
        tracing::info!(image, reference, blobs, daemon = daemon.name, "image mounted");
        Ok(owner)
    }

    /// Mounts every image that is recorded for a daemon that was just started, but `except`.
    async fn mount_recorded(self: &Arc<Self>, daemon: &Arc<Daemon>, except: Option<u64>) {
        let present = match daemon.client().info().await {
            Ok(info) if info.state == DaemonState::Running => {
                info.backend_collection.unwrap_or_default().into_keys().collect()
            }
            _ => HashSet::new(),
        };
        let instances = match self.meta.instances() {
            Ok(instances) => instances,
            Err(error) => {
                tracing::error!(error = error.full_text(), "images could not be mounted again");
                return;
            }
        };
        for instance in instances.into_iter().filter(|found| found.daemon == daemon.name && Some(found.id) != except) {
            let image = instance.id;
            match self.mount_again(daemon, image, present.contains(&format!("/{image}"))).await {
                Ok(true) => {}
                Ok(false) => tracing::debug!(image, "the bootstrap is gone, and its image is not mounted again"),
                // Whoever asks for its mounts will try again, and hear the reason.
                Err(error) => tracing::warn!(image, %error, "an image could not be mounted again"),
            }
        }
    }

    async fn mount_again(&self, daemon: &Daemon, image: u64, present: bool) -> Result<bool, ServeError> {
        let Some(record) = self.meta.by_id(image)? else { return Ok(false) };
        if present && let Ok(owner) = look(self.layout.rafs(image)).await {
            daemon.lock().mounted.insert(image, owner);
            return Ok(true);
        }
        let prepared = self.prepare(daemon, &record, Stage::Live).await?;
        self.finish(daemon, prepared).await?;
        Ok(true)
    }

    async fn unmount(&self, image: u64) -> Result<(), ServeError> {
        let Some(instance) = self.meta.instance(image)? else { return Ok(()) };
        let daemon = self.daemon(&instance.daemon);
        let _turn = daemon.turn.lock().await;
        match daemon.serves {
            Serves::All => match daemon.client().umount(&format!("/{image}")).await {
                Ok(()) => {}
                Err(error) if error.not_mounted() || error.nobody_there() => {}
                Err(error) => return Err(error.into()),
            },
            Serves::One(_) => spawn::stop(&daemon).await,
        }
        daemon.lock().mounted.remove(&image);
        let meta = self.meta.clone();
        let forgotten = tokio::task::spawn_blocking(move || meta.forget_instance(image)).await;
        forgotten.map_err(|error| ServeError::Records(error.to_string()))??;
        let config = self.layout.image_config(&daemon.name, image);
        if let Some(directory) = config.parent() {
            remove_quietly(std::fs::remove_dir_all(directory), directory);
        }
        if daemon.serves == Serves::One(image) {
            self.daemons.lock().expect("no code panics while it holds this lock").remove(&daemon.name);
            remove_quietly(std::fs::remove_dir_all(self.layout.daemon_config(&daemon.name)), &daemon.mountpoint);
            remove_quietly(std::fs::remove_dir(&daemon.mountpoint), &daemon.mountpoint);
        }
        tracing::info!(image, daemon = daemon.name, "image unmounted");
        Ok(())
    }
}

/// An image that is ready to be mounted.
struct Prepared {
    instance: Instance,
    bootstrap: PathBuf,
    config: String,
}

fn remove_quietly(result: std::io::Result<()>, path: &Path) {
    if let Err(error) = result
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::debug!(path = %path.display(), %error, "something unused is still there");
    }
}

/// Asks a mount for its root directory, and gives up on one that does not answer.
async fn look(path: PathBuf) -> Result<Owner, ServeError> {
    let asked = path.clone();
    let answer = tokio::task::spawn_blocking(move || std::fs::metadata(&asked).map(|found| (found.uid(), found.gid())));
    let dead = |why: String| ServeError::Dead { path: path.clone(), why };
    match tokio::time::timeout(LOOK_LIMIT, answer).await {
        Ok(Ok(Ok(owner))) => Ok(owner),
        Ok(Ok(Err(error))) => Err(dead(error.to_string())),
        Ok(Err(error)) => Err(dead(error.to_string())),
        Err(_) => Err(dead(format!("no answer within {} s", LOOK_LIMIT.as_secs()))),
    }
}
