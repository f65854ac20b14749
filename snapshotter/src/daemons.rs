//! The nydusd processes, and the images that they mount.
//!
//! One daemon serves all images (the default), or each image has its own. An image is mounted when the first snapshot on it is
//! prepared and stays until its bootstrap snapshot is removed; containers do not count. Order: the intent is recorded, then
//! nydusd mounts, then the image is recorded as live; so after a kill at any moment the records name everything that
//! nydusd may have.
//!
//! Whoever wants an image that is being mounted joins the one attempt, and waits no longer than 19 seconds; the attempt
//! goes on, so that a repeat finds it further along.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use nydusd::api::client::Client;
use nydusd::config::Template;
use tokio_util::sync::CancellationToken;

use crate::credentials::Found;
use crate::keychain::Keychain;
use crate::layout::Layout;
use crate::meta::{Meta, Record};
use crate::status::SnapshotError;

mod error;
mod instance;
mod process;
mod recover;
mod renewal;
mod spawn;

pub use error::ServeError;
pub use process::Process;

/// How long a call waits for its image, the start of nydusd included. The call itself has 20 s, for records and directories
/// too.
const SERVE_LIMIT: Duration = Duration::from_secs(19);

/// How long nydusd may take for one mount or unmount.
const API_LIMIT: Duration = Duration::from_secs(5);

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
    /// What kubelet pulled with.
    pub keychain: Keychain,
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
    /// Credentials that the registry of an image refused.
    refusals: Mutex<HashMap<u64, Vec<Found>>>,
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
            refusals: Mutex::default(),
            closing: CancellationToken::new(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Makes sure that the image of the bootstrap snapshot `record` is mounted; returns the owner of its root.
    ///
    /// # Errors
    /// `Unavailable` when nydusd does not start or it takes more than 19 seconds, else what is wrong with the image.
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
}
