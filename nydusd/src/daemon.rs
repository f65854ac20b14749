//! The daemon: one mount of the kernel, the images in it, and what state all that is in.
//!
//! States are those of the program we replace: INIT until the kernel has its mount, READY in between, RUNNING while
//! requests are served, STOPPED at the end. What happens to images (mount, unmount, remount) blocks and may
//! take a while; callers run it on a thread of its own, and each mountpoint is worked on by one of them at a time.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nydus_backend::http::Pools;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::api::types::{DaemonInfo, DaemonState, MountInfo, MountRequest};
use crate::backend_source::BackendSource;
use crate::build;
use crate::clock::Moment;
use crate::config::{self, CacheKind, Config};
use crate::events::EventLog;
use crate::fuse::namespace::{TreeError, components};
use crate::fuse::{Namespace, Session};
use crate::instance::{Instance, InstanceError, Spec};
use crate::log::LevelControl;
use crate::store::Store;

/// How long the end may take while reads are under way. With what follows it stays below 5 s.
const PATIENCE: Duration = Duration::from_secs(2);

/// How long a change at a mountpoint waits for the one before it.
const TURN: Duration = Duration::from_secs(4);

/// How long the cache may take to reach the disk at the end.
const CLOSING: Duration = Duration::from_millis(1000);

/// Why the daemon does not do what it is asked.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The image cannot be opened.
    #[error(transparent)]
    Instance(Box<InstanceError>),
    /// The mountpoint does not fit.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// The kind of filesystem does not exist here.
    #[error("invalid argument `only 'rafs' and 'passthrough_fs' are supported, but {0} was specified`")]
    FsType(String),
    /// The kind of filesystem exists elsewhere.
    #[error("invalid argument `passthrough_fs is not supported by this daemon`")]
    Passthrough,
    /// Another image has other ideas about the same cache directory.
    #[error(
        "RAFS failed to handle request, Failed to configure device: cache directory {} is in use with chunk \
         verification switched {}: give this image another work_dir", dir.display(), if *verified { "on" } else { "off" }
    )]
    Verification {
        /// The directory.
        dir: PathBuf,
        /// Whether it is on there.
        verified: bool,
    },
    /// The event does not fit the state.
    #[error("UnexpectedEvent(\"{0}\")")]
    Unexpected(&'static str),
    /// Not yet.
    #[error("NotReady")]
    NotReady,
    /// Somebody else changes what is mounted there, and takes long.
    #[error("another change at {0} is still under way: try again")]
    Busy(String),
    /// Never.
    #[error("Unsupported")]
    Unsupported,
    /// The level of the log is none.
    #[error("`{0}` is not a log level")]
    LogLevel(String),
    /// The kernel does not mount.
    #[error("could not mount at {}: {source}", mountpoint.display())]
    Kernel {
        /// Where.
        mountpoint: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
}

impl From<InstanceError> for DaemonError {
    fn from(error: InstanceError) -> Self {
        Self::Instance(Box::new(error))
    }
}

/// What a daemon is told at its start.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `--id`.
    pub id: Option<String>,
    /// `--supervisor`.
    pub supervisor: Option<PathBuf>,
    /// `--backend-source`.
    pub backend_source: Option<BackendSource>,
    /// What the kernel is told.
    pub session: crate::fuse::session::Options,
    /// Changes the level of the log.
    pub log: LevelControl,
}

/// How a daemon ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The mount goes, too.
    Stop,
    /// The mount stays, for a successor.
    Leave,
}

/// A running daemon. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Daemon(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    settings: Settings,
    runtime: Handle,
    namespace: Namespace,
    events: Arc<EventLog>,
    /// Connections and certificates, shared by all images.
    pools: Pools,
    state: Mutex<State>,
    stores: Mutex<HashMap<PathBuf, Store>>,
    /// Mountpoints at which something is being done, and a bell for those who wait for their turn.
    changing: Mutex<HashSet<String>>,
    changed: Condvar,
    dynamic: Mutex<BTreeMap<String, BTreeMap<String, String>>>,
    ending: CancellationToken,
}

#[derive(Debug)]
struct State {
    reported: DaemonState,
    session: Option<Arc<Session>>,
    ending: Ending,
}

impl Daemon {
    /// Makes a daemon in state INIT.
    pub fn new(settings: Settings, runtime: Handle) -> Self {
        let state = State { reported: DaemonState::Init, session: None, ending: Ending::Stop };
        Self(Arc::new(Inner {
            settings,
            runtime,
            namespace: Namespace::default(),
            events: Arc::new(EventLog::default()),
            pools: Pools::default(),
            state: Mutex::new(state),
            stores: Mutex::default(),
            changing: Mutex::default(),
            changed: Condvar::new(),
            dynamic: Mutex::default(),
            ending: CancellationToken::new(),
        }))
    }

    /// Mounts and serves: INIT to RUNNING.
    pub fn run(&self) -> Result<(), DaemonError> {
        let mut state = self.state();
        if state.reported != DaemonState::Init {
            return Err(DaemonError::Unexpected("Mount"));
        }
        let options = self.0.settings.session.clone();
        let mountpoint = options.mountpoint.clone();
        let session = Session::mount(options, self.0.namespace.clone(), self.0.runtime.clone())
            .map_err(|source| DaemonError::Kernel { mountpoint, source })?;
        state.session = Some(Arc::new(session));
        state.reported = DaemonState::Running;
        Ok(())
    }

    /// Answers the event Start.
    pub fn start(&self) -> Result<(), DaemonError> {
        // READY is only met after a takeover.
        match self.state().reported {
            DaemonState::Ready => Ok(()),
            _ => Err(DaemonError::Unexpected("Start")),
        }
    }

    /// Answers the event Takeover.
    pub fn take_over(&self) -> Result<(), DaemonError> {
        match self.state().reported {
            DaemonState::Init => Err(DaemonError::Unsupported),
            _ => Err(DaemonError::Unexpected("Takeover")),
        }
    }

    /// Answers the request to hand everything to the supervisor.
    pub fn send_fd(&self) -> Result<(), DaemonError> {
        match (self.state().reported, &self.0.settings.supervisor) {
            (DaemonState::Init, _) => Err(DaemonError::NotReady),
            _ => Err(DaemonError::Unsupported),
        }
    }

    /// Asks the daemon to end. [`Daemon::ended`] carries it out.
    pub fn end(&self, ending: Ending) {
        self.state().ending = ending;
        self.0.ending.cancel();
    }

    /// Fires when the daemon was asked to end.
    pub fn ending(&self) -> CancellationToken {
        self.0.ending.clone()
    }

    /// Waits until the daemon was asked to end, or its mount is gone; then ends within 5 s.
    pub async fn ended(&self) {
        let session = self.state().session.clone();
        let gone = match &session {
            Some(session) => tokio::select! {
                biased;
                () = session.ended() => {
                    tracing::info!("unmounted by somebody else");
                    true
                }
                () = self.0.ending.cancelled() => false,
            },
            None => {
                self.0.ending.cancelled().await;
                false
            }
        };
        self.0.ending.cancel();
        let ending = {
            let mut state = self.state();
            state.reported = DaemonState::Stopped;
            state.ending
        };
        for instance in self.0.namespace.all() {
            instance.stop();
        }
        if let Some(session) = session
            && ending == Ending::Stop
            && !gone
        {
            session.umount(PATIENCE).await;
        }
        let stores: Vec<Store> = self.stores().values().cloned().collect();
        let closing = tokio::task::spawn_blocking(move || stores.iter().for_each(Store::close));
        if tokio::time::timeout(CLOSING, closing).await.is_err() {
            tracing::warn!("the cache did not reach the disk in time: its chunks are checked at the next start");
        }
    }

    /// Does what is better done once the kernel is being served.
    pub fn tune(&self) {
        let session = self.state().session.clone();
        if let Some(session) = session {
            session.tune();
        }
    }

    /// Returns the requests of the kernel that are being served.
    pub fn inflight(&self) -> Vec<crate::api::types::Inflight> {
        let session = self.state().session.clone();
        session.map(|session| session.slots().inflight()).unwrap_or_default()
    }

    /// Returns the last failures.
    pub fn events(&self) -> &EventLog {
        &self.0.events
    }

    /// Returns what is mounted.
    pub fn namespace(&self) -> &Namespace {
        &self.0.namespace
    }

    /// Changes the level of the log.
    pub fn set_log_level(&self, level: &str) -> Result<(), DaemonError> {
        if self.0.settings.log.set(level) { Ok(()) } else { Err(DaemonError::LogLevel(level.to_owned())) }
    }

    /// Describes the daemon; `mounts` asks for what is mounted, too.
    pub fn info(&self, mounts: bool) -> DaemonInfo {
        let state = self.state().reported;
        let collection = mounts && state != DaemonState::Init;
        DaemonInfo {
            version: build::info(),
            id: self.0.settings.id.clone(),
            supervisor: self.0.settings.supervisor.as_ref().map(|path| path.to_string_lossy().into_owned()),
            state,
            backend_collection: collection.then(|| self.mounts()),
        }
    }

    fn mounts(&self) -> BTreeMap<String, MountInfo> {
        let describe = |instance: Arc<Instance>| {
            let info = MountInfo {
                backend_type: "Rafs".to_owned(),
                mountpoint: instance.mountpoint().to_owned(),
                mounted_time: Moment::from(instance.mounted_at()).api().to_string(),
                config: instance.spec().config.echo(),
            };
            (instance.mountpoint().to_owned(), info)
        };
        self.0.namespace.all().into_iter().map(describe).collect()
    }

    /// Mounts what an API request describes. Blocks.
    pub fn mount_request(&self, mountpoint: &str, request: &MountRequest) -> Result<(), DaemonError> {
        let _changing = self.changing(mountpoint)?;
        if self.0.namespace.get(mountpoint).is_some() {
            return Err(TreeError::Exists.into());
        }
        let spec = spec(mountpoint, request)?;
        self.mount(spec)
    }

    /// Mounts an image. Blocks.
    pub fn mount(&self, spec: Spec) -> Result<(), DaemonError> {
        let instance = self.open(spec)?;
        let changed = self.0.namespace.mount(instance.clone())?;
        let session = self.state().session.clone();
        if let Some(session) = session {
            session.revoke(&changed);
        }
        instance.announce();
        instance.start_prefetch(&self.0.runtime);
        Ok(())
    }

    /// Puts another description in the place of a mounted image. Blocks.
    pub fn remount_request(&self, mountpoint: &str, request: &MountRequest) -> Result<(), DaemonError> {
        let _changing = self.changing(mountpoint)?;
        if self.0.namespace.get(mountpoint).is_none() {
            return Err(TreeError::Missing.into());
        }
        let instance = self.open(spec(mountpoint, request)?)?;
        let old = self.0.namespace.replace(instance.clone())?;
        old.stop();
        instance.announce();
        instance.start_prefetch(&self.0.runtime);
        Ok(())
    }

    /// Unmounts an image. Blocks while the kernel forgets its names.
    pub fn umount(&self, mountpoint: &str) -> Result<(), DaemonError> {
        let _changing = self.changing(mountpoint)?;
        let (instance, changed) = self.0.namespace.umount(mountpoint)?;
        instance.stop();
        lock(&self.0.dynamic).remove(instance.mountpoint());
        let session = self.state().session.clone();
        if let Some(session) = session {
            session.revoke(&changed);
        }
        tracing::info!(mountpoint, "unmounted");
        Ok(())
    }

    /// Returns the values that were changed while mounted: of one mount, or of all with its mountpoint before each key.
    pub fn dynamic(&self, id: Option<&str>) -> BTreeMap<String, String> {
        let all = lock(&self.0.dynamic);
        match id {
            Some(id) => all.get(id).cloned().unwrap_or_default(),
            None => all
                .iter()
                .flat_map(|(id, values)| values.iter().map(move |(key, value)| (format!("{id}:{key}"), value.clone())))
                .collect(),
        }
    }

    /// Changes values while mounted; false if a key is not known, or if it is not clear which mount is meant.
    pub fn set_dynamic(&self, id: Option<&str>, values: &BTreeMap<String, String>) -> bool {
        const KNOWN: [&str; 3] = ["registry_auth", "proxy_url", "dragonfly_scheduler_endpoint"];
        let instance = match (id, self.0.namespace.all().as_slice()) {
            (Some(id), _) => self.0.namespace.get(id),
            (None, [only]) => Some(only.clone()),
            (None, _) => None,
        };
        let Some(instance) = instance else { return false };
        if values.keys().any(|key| !KNOWN.contains(&key.as_str())) {
            return false;
        }
        for (key, value) in values {
            instance.change(key, value);
        }
        let mut all = lock(&self.0.dynamic);
        all.entry(instance.mountpoint().to_owned()).or_default().extend(values.clone());
        true
    }

    fn open(&self, spec: Spec) -> Result<Arc<Instance>, DaemonError> {
        spec.config.ready_to_mount().map_err(InstanceError::from)?;
        let store = self.store(&spec.config)?;
        let renewal = self.0.settings.backend_source.as_ref().map(|source| source.of_mount(&spec.mountpoint));
        Ok(Arc::new(Instance::open(spec, &store, self.0.events.clone(), self.0.pools.clone(), renewal)?))
    }

    /// Returns the store of a cache directory, opened once however many images use it.
    fn store(&self, config: &Config) -> Result<Store, DaemonError> {
        let (dir, verify) = (&config.cache.work_dir, !config.cache.skip_verification);
        if config.cache.kind == CacheKind::None {
            return Ok(Store::without_files(verify, self.0.runtime.clone()));
        }
        let open = if verify { Store::open } else { Store::unverified };
        let mut stores = self.stores();
        // One directory may have several names; one that does not exist yet has only this one.
        if let Some(store) = dir.canonicalize().ok().and_then(|dir| stores.get(&dir)) {
            if store.verifies() != verify {
                return Err(DaemonError::Verification { dir: dir.clone(), verified: !verify });
            }
            return Ok(store.clone());
        }
        let store = open(dir, self.0.runtime.clone()).map_err(InstanceError::from)?;
        // A directory whose disk is in trouble has no store to share: the next mount tries again.
        if let Ok(dir) = dir.canonicalize() {
            stores.insert(dir, store.clone());
        }
        Ok(store)
    }

    /// Takes a mountpoint for a change, which nobody else may do meanwhile.
    fn changing(&self, mountpoint: &str) -> Result<Changing<'_>, DaemonError> {
        let key = components(mountpoint)?.join(std::ffi::OsStr::new("/")).to_string_lossy().into_owned();
        let changing = lock(&self.0.changing);
        // Whoever repeats a call that is under way finds what came of it, not that it was under way.
        let free = self.0.changed.wait_timeout_while(changing, TURN, |changing| changing.contains(&key));
        let (mut changing, waited) = free.unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() {
            return Err(DaemonError::Busy(mountpoint.to_owned()));
        }
        changing.insert(key.clone());
        Ok(Changing { daemon: self, key })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.0.state)
    }

    fn stores(&self) -> MutexGuard<'_, HashMap<PathBuf, Store>> {
        lock(&self.0.stores)
    }
}

/// The right to change what is mounted at one place.
struct Changing<'a> {
    daemon: &'a Daemon,
    key: String,
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        lock(&self.daemon.0.changing).remove(&self.key);
        self.daemon.0.changed.notify_all();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads what an API request describes.
fn spec(mountpoint: &str, request: &MountRequest) -> Result<Spec, DaemonError> {
    match request.fs_type.as_str() {
        "rafs" => {}
        "passthrough" | "passthroughfs" | "passthrough_fs" => return Err(DaemonError::Passthrough),
        other => return Err(DaemonError::FsType(other.to_owned())),
    }
    let parsed = config::parse(&request.config).map_err(InstanceError::from)?;
    parsed.warn();
    Ok(Spec {
        mountpoint: mountpoint.to_owned(),
        source: Path::new(&request.source).to_owned(),
        config: parsed.config,
        prefetch_files: request.prefetch_files.clone(),
    })
}
