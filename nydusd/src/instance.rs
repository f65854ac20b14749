//! One mounted image: its bootstrap, its blobs, and what is fetched before anybody asks.
//!
//! Opening an image reads its bootstrap, which is a local file, and opens no connection: an image can be mounted
//! while its registry is down, and its metadata can be walked. The first read of data is the first request.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use nydus_backend::http::Pools;
use nydus_backend::{Credential, CredentialSource, Route, RouteOptions, SourceError};
use nydus_rafs::blob::section::SectionError;
use nydus_rafs::{BlobId, Bootstrap, FormatError, Ino};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::config::{Config, ConfigError};
use crate::events::EventLog;
use crate::metrics::FsCounters;
use crate::store::{Blob, Counters, Options, Store, StoreError};

mod attributes;
mod bootstrap;
mod prefetch;

/// Why an image cannot be mounted. The texts begin as those of the program we replace do, for whoever looks for them.
#[derive(Debug, thiserror::Error)]
pub enum InstanceError {
    /// The configuration is not usable.
    #[error("RAFS failed to handle request, Failed to load config: {0}")]
    Config(#[from] ConfigError),
    /// The bootstrap cannot be read.
    #[error("RAFS failed to handle request, Failed to fill superBlock: {source} ({})", path.display())]
    ReadBootstrap {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The bootstrap is too large to be one.
    #[error("RAFS failed to handle request, Failed to fill superBlock: {} is {size} bytes long", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        size: u64,
    },
    /// The bootstrap is damaged, or none.
    #[error("RAFS failed to handle request, Failed to fill superBlock: {source} ({})", path.display())]
    Bootstrap {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: FormatError,
    },
    /// The blob does not hold a bootstrap.
    #[error("RAFS failed to handle request, Failed to fill superBlock: {source} ({})", path.display())]
    Inlined {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: Box<SectionError>,
    },
    /// The bootstrap leaves the name of its blob to its own file name, which cannot be one.
    #[error("RAFS failed to handle request, Failed to fill superBlock: {} does not name a blob", path.display())]
    Unnamed {
        /// The file.
        path: PathBuf,
    },
    /// The cache cannot be used.
    #[error("RAFS failed to handle request, Failed to configure device: {0}")]
    Store(#[from] StoreError),
    /// The backend cannot be used.
    #[error("RAFS failed to handle request, Failed to configure device: {0}")]
    Backend(Box<SourceError>),
    /// A path to prefetch is not absolute.
    #[error("RAFS failed to handle request, prefetch file path `{0}` is not absolute")]
    PrefetchPath(String),
}

/// What to mount.
#[derive(Debug, Clone)]
pub struct Spec {
    /// Where in the daemon's tree.
    pub mountpoint: String,
    /// The bootstrap, or a blob that holds one.
    pub source: PathBuf,
    /// How.
    pub config: Config,
    /// What is fetched first, instead of what the image says.
    pub prefetch_files: Option<Vec<String>>,
}

/// One mounted image.
#[derive(Debug)]
pub struct Instance {
    spec: Spec,
    bootstrap: Bootstrap<Vec<u8>>,
    blobs: Vec<Arc<Blob>>,
    route: Route,
    store: Store,
    counters: FsCounters,
    events: Arc<EventLog>,
    mounted_at: SystemTime,
    owner: (u32, u32),
    stop: CancellationToken,
    /// Found out when somebody asks.
    any_xattrs: OnceLock<bool>,
}

impl Instance {
    /// Opens an image; its connections are taken from `pools`, and `renewal` is asked when its credential is refused. Blocks
    /// for as long as the bootstrap takes to read.
    pub fn open(
        spec: Spec,
        store: &Store,
        events: Arc<EventLog>,
        pools: Pools,
        renewal: Option<CredentialSource>,
    ) -> Result<Self, InstanceError> {
        if let Some(wrong) = spec.prefetch_files.iter().flatten().find(|path| !path.starts_with('/')) {
            return Err(InstanceError::PrefetchPath(wrong.clone()));
        }
        let bootstrap = bootstrap::load(&spec.source)?;
        let deadline = spec.config.request_deadline();
        let options = RouteOptions { deadline, pools, renewal, ..RouteOptions::default() };
        let route =
            Route::open(&spec.config.backend, options).map_err(|error| InstanceError::Backend(Box::new(error)))?;
        let reading = Options {
            deadline: spec.config.request_deadline(),
            amplify: spec.config.rafs.batch_size,
            ..Options::default()
        };
        let store = store.image(reading, Arc::new(Counters::default()));
        let mut blobs = Vec::new();
        for (index, info) in (0u16..).zip(bootstrap.blobs()) {
            let damaged = |source| InstanceError::Bootstrap { path: spec.source.clone(), source };
            let table = bootstrap::table(info, bootstrap.chunks(index).map_err(damaged)?, &route);
            blobs.push(store.blob(info, table, route.clone())?);
        }
        let rafs = &spec.config.rafs;
        Ok(Self {
            counters: FsCounters::new(rafs.iostats_files, rafs.access_pattern, rafs.latest_read_files),
            bootstrap,
            blobs,
            route,
            store,
            events,
            mounted_at: SystemTime::now(),
            owner: (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw()),
            stop: CancellationToken::new(),
            any_xattrs: OnceLock::new(),
            spec,
        })
    }

    /// Says in the log what is mounted, in one line. Which mirrors are asked is said by the route when it is opened.
    pub fn announce(&self) {
        let blobs: Vec<&str> = self.blobs.iter().map(|blob| blob.id().as_str()).collect();
        tracing::info!(
            mountpoint = %self.spec.mountpoint,
            bootstrap = %self.spec.source.display(),
            backend = self.route.kind(),
            image = self.route.place(),
            ?blobs,
            "mounted"
        );
    }

    /// Begins to fetch in the background what the configuration says.
    pub fn start_prefetch(self: &Arc<Self>, runtime: &Handle) {
        if self.store.keeps() {
            prefetch::start(self, runtime);
        }
    }

    /// Changes a value while mounted: `registry_auth`, the base64 of `user:password`. Other keys are named in the log.
    pub fn change(&self, key: &str, value: &str) {
        let mountpoint = self.mountpoint();
        match key {
            "registry_auth" if value.is_empty() => self.route.set_credential(Credential::Anonymous),
            "registry_auth" => match Credential::from_auth(value) {
                Ok(credential) => {
                    self.route.set_credential(credential);
                    tracing::info!(mountpoint, "the pull credential was replaced");
                }
                Err(error) => tracing::warn!(mountpoint, %error, "the pull credential was not replaced"),
            },
            _ => tracing::warn!(mountpoint, key, "this value cannot be changed while mounted"),
        }
    }

    /// Stops fetching in the background. Readers are served to their end.
    pub fn stop(&self) {
        self.stop.cancel();
    }

    /// Returns where it is mounted in the daemon's tree.
    pub fn mountpoint(&self) -> &str {
        &self.spec.mountpoint
    }

    /// Returns what it was mounted from.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// Returns the metadata.
    pub fn bootstrap(&self) -> &Bootstrap<Vec<u8>> {
        &self.bootstrap
    }

    /// Returns the root directory.
    pub fn root(&self) -> Ino {
        self.bootstrap.root()
    }

    /// Returns the blob that extents call `index`.
    pub fn blob(&self, index: u16) -> Option<&Arc<Blob>> {
        self.blobs.get(usize::from(index))
    }

    /// Returns the blobs.
    pub fn blobs(&self) -> &[Arc<Blob>] {
        &self.blobs
    }

    /// Returns the way to the blobs.
    pub fn route(&self) -> &Route {
        &self.route
    }

    /// Returns the cache.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Returns the counters of the filesystem.
    pub fn counters(&self) -> &FsCounters {
        &self.counters
    }

    /// Returns where failures are remembered.
    pub fn events(&self) -> &EventLog {
        &self.events
    }

    /// Returns when it was mounted.
    pub fn mounted_at(&self) -> SystemTime {
        self.mounted_at
    }

    /// Returns who owns files whose owner the image does not say.
    pub fn owner(&self) -> (u32, u32) {
        self.owner
    }

    /// Returns whether extended attributes are shown.
    pub fn xattrs(&self) -> bool {
        self.spec.config.rafs.enable_xattr || self.bootstrap.has_xattrs()
    }

    /// Returns whether any inode may have extended attributes. The first call looks through the image, for at most
    /// some 30 ms.
    pub fn any_xattrs(&self) -> bool {
        *self.any_xattrs.get_or_init(|| attributes::any(&self.bootstrap))
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Returns the blob id that a file name stands for: what is before its first dot.
fn named_by(path: &Path) -> Option<BlobId> {
    path.file_name()?.to_str()?.split('.').next()?.parse().ok()
}
