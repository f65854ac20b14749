//! The configuration of a mounted image, from the documents that people already have.
//!
//! Three dialects mean the same thing: "version 1" JSON (`device`, `mode`, `fs_prefetch`, ...), which every
//! snapshotter writes, and "version 2" in JSON or TOML (`version = 2`, `backend`, `cache`, `rafs`). All become
//! one [`Config`] without optional parts. Keys that nobody knows are accepted and named in
//! [`Parsed::ignored`], because the programs we replace accept them too; wrong types and values never are,
//! and the error names the key.
//!
//! A document without `host` and `repo` is valid: it is the template that a snapshotter fills in per image
//! ([`template::Template`]). Only mounting needs them ([`Config::ready_to_mount`]).
//!
//! Nothing in a document of theirs turns the verification of chunks off: `digest_validate` and
//! `cache.validate` may ask for it, which is moot, since it is always on. Our own key
//! `cache.skip_verification` does.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

mod document;
mod registry;
mod shapes;
pub mod template;

pub use template::Template;

/// Largest document that is read, in bytes (the limit of the program we replace).
pub const MAX_SIZE: u64 = 1 << 20;

/// Longest time a cold read may take unless configured otherwise.
pub const READ_DEADLINE: Duration = Duration::from_secs(60);

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read configuration file {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The document is larger than [`MAX_SIZE`].
    #[error("configuration is {size} bytes long, at most {MAX_SIZE} are accepted")]
    TooLarge {
        /// Its size in bytes.
        size: u64,
    },
    /// The text is not JSON.
    #[error("failed to parse configuration information: invalid JSON: {0}")]
    Json(#[source] serde_json::Error),
    /// The text is not TOML either.
    #[error("failed to parse configuration information: neither JSON nor TOML: {0}")]
    Toml(#[source] Box<toml::de::Error>),
    /// The document is neither version 1 nor version 2.
    #[error(
        "failed to parse configuration information: neither `device` (version 1) nor `version` (2) is there: give one of them"
    )]
    Unrecognised,
    /// A key has a wrong type or a value that is out of range.
    #[error("invalid configuration: key `{key}`: {why}")]
    Key {
        /// The path of the key, such as `device.cache.config.work_dir`.
        key: String,
        /// What is wrong and what is wanted.
        why: String,
    },
}

impl ConfigError {
    fn key(key: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Key { key: key.into(), why: why.into() }
    }
}

/// The dialect in which a document is written, for naming its keys as its author did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// `device`, `mode`, `fs_prefetch`.
    V1,
    /// `version`, `backend`, `cache`, `rafs`.
    V2,
}

impl Dialect {
    /// Returns the path of a key of the backend's own table.
    pub fn backend_key(self, kind: &str, key: &str) -> String {
        match self {
            Self::V1 => format!("device.backend.config.{key}"),
            Self::V2 => format!("backend.{kind}.{key}"),
        }
    }
}

/// Where chunks are kept once fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheKind {
    /// Plain files in a directory (`blobcache`, `filecache`).
    Files,
    /// The kernel's cachefiles (`fscache`); not supported.
    Fscache,
    /// Nowhere (`dummycache` or empty): chunks are fetched for each read.
    None,
}

/// The cache of fetched chunks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cache {
    /// Its kind.
    pub kind: CacheKind,
    /// The directory of the cache files.
    pub work_dir: PathBuf,
    /// Whether the author asked to keep stored instead of plain bytes. Accepted, never done: a warm read would
    /// pay for decompression each time.
    pub compressed: bool,
    /// Whether the author asked for verification (it happens anyway).
    pub validate: bool,
    /// Our own switch: chunks are *not* checked against their digests.
    pub skip_verification: bool,
}

/// How the metadata tree is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rafs {
    /// `direct` or `cached`; both are served from the bootstrap's bytes.
    pub mode: String,
    /// Window in bytes within which a reader's request may be enlarged (0 to 256 MiB).
    pub batch_size: u64,
    /// `digest_validate` of version 1.
    pub validate: bool,
    /// Whether extended attributes are served even if the image does not say that it has any.
    pub enable_xattr: bool,
    /// Whether reads are counted per file.
    pub iostats_files: bool,
    /// Whether the first access to each file is recorded.
    pub access_pattern: bool,
    /// Whether recently read files are recorded.
    pub latest_read_files: bool,
    /// What is fetched before anybody asks.
    pub prefetch: Prefetch,
}

/// What is fetched before anybody asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefetch {
    /// Whether anything is.
    pub enable: bool,
    /// Requests under way at once (1 to 1,024).
    pub threads: usize,
    /// Bytes asked for at once (0 to 256 MiB).
    pub batch_size: u64,
    /// Bytes per second, 0 for no limit.
    pub bandwidth_limit: u64,
    /// Whether everything is fetched after what was named.
    pub prefetch_all: bool,
    /// Whether the author asked for one long request per blob.
    pub stream: bool,
}

impl Prefetch {
    /// No prefetch at all.
    pub const OFF: Self =
        Self { enable: false, threads: 8, batch_size: 1 << 20, bandwidth_limit: 0, prefetch_all: false, stream: false };
}

/// What one mounted image needs to know.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The dialect of the document.
    pub dialect: Dialect,
    /// Identifies the instance in the metrics of the cache.
    pub id: String,
    /// Where blobs come from.
    pub backend: nydus_backend::Config,
    /// Further places, carried for others and not used here.
    pub external_backends: Vec<Value>,
    /// Where chunks are kept.
    pub cache: Cache,
    /// How the tree is served.
    pub rafs: Rafs,
    /// How long a cold read may take (5 to 100 s).
    pub read_deadline: Duration,
}

/// A configuration together with what was not understood in its document.
#[derive(Debug, Clone, PartialEq)]
pub struct Parsed {
    /// The configuration.
    pub config: Config,
    /// Paths of the keys that mean nothing to us.
    pub ignored: Vec<String>,
}

impl Parsed {
    /// Logs one warning per key that means nothing to us. (That verification is off is said by the store.)
    pub fn warn(&self) {
        for key in &self.ignored {
            tracing::warn!(key = %key, "unknown configuration key ignored");
        }
        if self.config.cache.compressed {
            tracing::warn!("cache.compressed is ignored: the cache holds plain bytes");
        }
    }
}

/// Parses a document of any dialect.
pub fn parse(text: &str) -> Result<Parsed, ConfigError> {
    document::resolve(&to_value(text)?)
}

/// Reads and parses a file of any dialect.
pub fn load(path: &Path) -> Result<Parsed, ConfigError> {
    parse(&read(path)?)
}

/// Reads a file of at most [`MAX_SIZE`] bytes.
fn read(path: &Path) -> Result<String, ConfigError> {
    let failed = |source| ConfigError::Read { path: path.to_owned(), source };
    let file = File::open(path).map_err(failed)?;
    let size = file.metadata().map_err(failed)?.len();
    if size > MAX_SIZE {
        return Err(ConfigError::TooLarge { size });
    }
    // Pipes and devices say nothing of their size.
    let mut text = String::new();
    file.take(MAX_SIZE + 1).read_to_string(&mut text).map_err(failed)?;
    Ok(text)
}

/// Brings JSON or TOML into one shape.
fn to_value(text: &str) -> Result<Value, ConfigError> {
    if text.len() as u64 > MAX_SIZE {
        return Err(ConfigError::TooLarge { size: text.len() as u64 });
    }
    match serde_json::from_str(text) {
        Ok(value) => Ok(value),
        // What begins like JSON is meant as JSON: an error of the TOML parser would only confuse its author.
        Err(error) if text.trim_start().starts_with(['{', '[']) && !text.trim_start().starts_with("[[") => {
            match toml::from_str(text) {
                Ok(value) => Ok(value),
                Err(_) => Err(ConfigError::Json(error)),
            }
        }
        Err(_) => toml::from_str(text).map_err(|error| ConfigError::Toml(Box::new(error))),
    }
}

impl Config {
    /// Returns the configuration that `--localfs-dir DIR` stands for: blobs and cache in one directory.
    pub fn localfs(dir: &Path) -> Result<Self, ConfigError> {
        let dir = dir.to_string_lossy();
        let document = json!({
            "version": 2,
            "backend": {"type": "localfs", "localfs": {"dir": dir}},
            "cache": {"type": "filecache", "filecache": {"work_dir": dir}},
            "rafs": {"mode": "direct"},
        });
        Ok(document::resolve(&document)?.config)
    }

    /// Returns how long one request of the kernel may take: half of [`Config::read_deadline`]. When bytes that it wanted to
    /// read ahead do not come, the kernel asks for them once more before it tells the reader.
    pub fn request_deadline(&self) -> Duration {
        self.read_deadline / 2
    }

    /// Checks what only a mount needs: that the backend names its place and that the cache is one that we have.
    pub fn ready_to_mount(&self) -> Result<(), ConfigError> {
        match &self.backend {
            nydus_backend::Config::Registry(registry) => {
                for (key, value) in [("host", &registry.host), ("repo", &registry.repo)] {
                    if value.is_empty() {
                        let key = self.dialect.backend_key("registry", key);
                        return Err(ConfigError::key(
                            key,
                            "is missing: a mount needs it (a snapshotter fills it in from the image reference)",
                        ));
                    }
                }
            }
            nydus_backend::Config::LocalFs(local) => {
                if local.dir.is_empty() && local.blob_file.is_empty() {
                    let key = self.dialect.backend_key("localfs", "dir");
                    return Err(ConfigError::key(key, "is missing: give `dir` or `blob_file`"));
                }
            }
        }
        let kind = match self.dialect {
            Dialect::V1 => "device.cache.type",
            Dialect::V2 => "cache.type",
        };
        match self.cache.kind {
            CacheKind::Files | CacheKind::None => Ok(()),
            CacheKind::Fscache => {
                Err(ConfigError::key(kind, "fscache is not supported for FUSE mounts: set it to `blobcache`"))
            }
        }
    }

    /// Returns the configuration as a version 2 document without secrets, for whoever asks over the API.
    pub fn echo(&self) -> Value {
        let kind = self.backend.kind();
        let mut table = serde_json::to_value(&self.backend).unwrap_or_default()["config"].take();
        hide_secrets(&mut table);
        let mut tables = json!({
            "type": kind, "localdisk": null, "localfs": null, "oss": null, "s3": null, "registry": null,
            "http-proxy": null,
        });
        tables[kind] = table;
        let prefetch = json!({
            "enable": self.rafs.prefetch.enable,
            "threads": self.rafs.prefetch.threads,
            "batch_size": self.rafs.prefetch.batch_size,
            "bandwidth_limit": self.rafs.prefetch.bandwidth_limit,
            "prefetch_all": self.rafs.prefetch.prefetch_all,
            "stream_prefetch": self.rafs.prefetch.stream,
        });
        let (cache_type, filecache) = match self.cache.kind {
            CacheKind::Files => (
                "blobcache",
                json!({
                    "work_dir": self.cache.work_dir.to_string_lossy(),
                    "disable_indexed_map": false,
                    "enable_encryption": false,
                    "enable_convergent_encryption": false,
                    "encryption_key": "",
                }),
            ),
            CacheKind::Fscache => ("fscache", Value::Null),
            CacheKind::None => ("dummycache", Value::Null),
        };
        json!({
            "version": 2,
            "id": self.id,
            "backend": tables,
            "external_backends": self.external_backends,
            "cache": {
                "type": cache_type,
                "compressed": self.cache.compressed,
                "validate": self.cache.validate,
                "skip_verification": self.cache.skip_verification,
                "prefetch": prefetch,
                "filecache": filecache,
                "fscache": null,
            },
            "rafs": {
                "mode": self.rafs.mode,
                "batch_size": self.rafs.batch_size,
                "validate": self.rafs.validate,
                "enable_xattr": self.rafs.enable_xattr,
                "iostats_files": self.rafs.iostats_files,
                "access_pattern": self.rafs.access_pattern,
                "latest_read_files": self.rafs.latest_read_files,
                "prefetch": prefetch,
                "read_deadline": self.read_deadline.as_secs(),
            },
            "overlay": null,
        })
    }
}

/// Removes what grants access, wherever it is in a backend's table.
fn hide_secrets(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|key, _| !matches!(key.as_str(), "auth" | "registry_token" | "Authorization" | "authorization"));
            for (key, value) in map.iter_mut() {
                if matches!(key.as_str(), "access_key_id" | "access_key_secret") {
                    *value = Value::String(String::new());
                } else {
                    hide_secrets(value);
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(hide_secrets),
        _ => {}
    }
}

#[cfg(test)]
mod tests;
