//! The two shapes of a configuration document, and their way into a [`Config`].
//!
//! Each shape is a plain serde structure. Whatever a document holds beyond what the structure gives back
//! when it is written out again was not understood: that is how unknown keys are found, without a second
//! list of names that could disagree with the first.

use std::path::PathBuf;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::registry;
use super::{Cache, CacheKind, Config, ConfigError, Dialect, Parsed, Prefetch, READ_DEADLINE, Rafs};

/// Largest batch of requests, in bytes.
const MAX_BATCH: u64 = 0x1000_0000;

/// Version 1.
#[derive(Serialize, Deserialize)]
struct V1 {
    device: V1Device,
    #[serde(default = "direct")]
    mode: String,
    #[serde(default)]
    digest_validate: bool,
    #[serde(default)]
    iostats_files: bool,
    #[serde(default)]
    enable_xattr: bool,
    #[serde(default)]
    access_pattern: bool,
    #[serde(default)]
    latest_read_files: bool,
    #[serde(default = "one_mebibyte")]
    amplify_io: u64,
    #[serde(default)]
    fs_prefetch: Option<V1Prefetch>,
    #[serde(default)]
    read_deadline: Option<u64>,
    /// Written by snapshotters, never used by a daemon.
    #[serde(default)]
    warmup: Option<Value>,
    #[serde(default)]
    id_mapping: Option<Value>,
}

#[derive(Serialize, Deserialize)]
struct V1Device {
    #[serde(default)]
    id: String,
    backend: V1Backend,
    #[serde(default)]
    external_backends: Vec<Value>,
    #[serde(default)]
    cache: V1Cache,
}

#[derive(Serialize, Deserialize)]
struct V1Backend {
    #[serde(rename = "type")]
    kind: String,
    config: Value,
}

#[derive(Default, Serialize, Deserialize)]
struct V1Cache {
    #[serde(default, rename = "type")]
    kind: String,
    #[serde(default)]
    compressed: bool,
    #[serde(default)]
    validate: bool,
    #[serde(default)]
    skip_verification: bool,
    #[serde(default)]
    config: Option<FileCache>,
}

#[derive(Serialize, Deserialize)]
struct V1Prefetch {
    #[serde(default)]
    enable: bool,
    #[serde(default = "eight")]
    threads_count: usize,
    #[serde(default = "one_mebibyte")]
    merging_size: u64,
    #[serde(default)]
    bandwidth_rate: u32,
    // True here and false in version 2: so it is in the program we replace.
    #[serde(default = "yes")]
    prefetch_all: bool,
    #[serde(default)]
    stream_prefetch: bool,
}

/// Version 2.
#[derive(Serialize, Deserialize)]
struct V2 {
    version: u32,
    #[serde(default)]
    id: String,
    #[serde(default)]
    backend: Option<V2Backend>,
    #[serde(default)]
    external_backends: Vec<Value>,
    #[serde(default)]
    cache: Option<V2Cache>,
    #[serde(default)]
    rafs: Option<V2Rafs>,
    #[serde(default)]
    overlay: Option<Value>,
}

#[derive(Serialize, Deserialize)]
struct V2Backend {
    #[serde(rename = "type")]
    kind: String,
    #[serde(flatten)]
    tables: Map<String, Value>,
}

#[derive(Default, Serialize, Deserialize)]
struct V2Cache {
    #[serde(default, rename = "type")]
    kind: String,
    #[serde(default)]
    compressed: bool,
    #[serde(default)]
    validate: bool,
    #[serde(default)]
    skip_verification: bool,
    #[serde(default)]
    prefetch: Option<V2Prefetch>,
    #[serde(default)]
    filecache: Option<FileCache>,
    #[serde(default)]
    fscache: Option<Value>,
}

#[derive(Serialize, Deserialize)]
struct FileCache {
    #[serde(default = "here")]
    work_dir: String,
    #[serde(default)]
    disable_indexed_map: bool,
    #[serde(default)]
    enable_encryption: bool,
    #[serde(default)]
    enable_convergent_encryption: bool,
    #[serde(default)]
    encryption_key: String,
}

#[derive(Serialize, Deserialize)]
struct V2Rafs {
    #[serde(default = "direct")]
    mode: String,
    #[serde(default = "one_mebibyte")]
    batch_size: u64,
    #[serde(default)]
    validate: bool,
    #[serde(default)]
    enable_xattr: bool,
    #[serde(default)]
    iostats_files: bool,
    #[serde(default)]
    access_pattern: bool,
    #[serde(default)]
    latest_read_files: bool,
    #[serde(default)]
    prefetch: Option<V2Prefetch>,
    #[serde(default)]
    read_deadline: Option<u64>,
}

#[derive(Clone, Serialize, Deserialize)]
struct V2Prefetch {
    enable: bool,
    #[serde(default = "eight")]
    threads: usize,
    #[serde(default = "one_mebibyte")]
    batch_size: u64,
    #[serde(default)]
    bandwidth_limit: u32,
    #[serde(default)]
    prefetch_all: bool,
    #[serde(default)]
    stream_prefetch: bool,
}

fn direct() -> String {
    "direct".to_owned()
}

fn here() -> String {
    ".".to_owned()
}

fn one_mebibyte() -> u64 {
    1 << 20
}

fn eight() -> usize {
    8
}

fn yes() -> bool {
    true
}

/// Turns a document into a configuration.
pub(super) fn resolve(document: &Value) -> Result<Parsed, ConfigError> {
    let Value::Object(map) = document else {
        return Err(ConfigError::Unrecognised);
    };
    match (map.get("version"), map.get("device")) {
        (Some(_), _) => second(document),
        (None, Some(_)) => first(document),
        (None, None) => Err(ConfigError::Unrecognised),
    }
}

fn first(document: &Value) -> Result<Parsed, ConfigError> {
    let v1: V1 = typed(document, "")?;
    let mut ignored = Vec::new();
    unknown("", document, &kept(&v1), &mut ignored);
    let at = "device.backend.config";
    let backend = backend(&v1.device.backend.kind, "device.backend.type", &v1.device.backend.config, at, &mut ignored)?;
    let cache = v1.device.cache;
    let kind = cache_kind(&cache.kind, "device.cache.type")?;
    if kind != CacheKind::None && cache.config.is_none() {
        return Err(ConfigError::key("device.cache.config", "is missing: give at least {\"work_dir\": \"...\"}"));
    }
    let prefetch = match v1.fs_prefetch {
        None => Prefetch::OFF,
        Some(given) => prefetch(
            "fs_prefetch",
            Prefetch {
                enable: given.enable,
                threads: given.threads_count,
                batch_size: given.merging_size,
                bandwidth_limit: u64::from(given.bandwidth_rate),
                prefetch_all: given.prefetch_all,
                stream: given.stream_prefetch,
            },
            ["threads_count", "merging_size"],
        )?,
    };
    let config = Config {
        dialect: Dialect::V1,
        id: v1.device.id,
        backend,
        external_backends: v1.device.external_backends,
        cache: Cache {
            kind,
            work_dir: work_dir(cache.config, "device.cache.config")?,
            compressed: cache.compressed,
            validate: cache.validate,
            skip_verification: cache.skip_verification,
        },
        rafs: Rafs {
            mode: mode(v1.mode, "mode")?,
            batch_size: batch(v1.amplify_io, "amplify_io")?,
            validate: v1.digest_validate,
            enable_xattr: v1.enable_xattr,
            iostats_files: v1.iostats_files,
            access_pattern: v1.access_pattern,
            latest_read_files: v1.latest_read_files,
            prefetch,
        },
        read_deadline: deadline(v1.read_deadline, "read_deadline")?,
    };
    Ok(Parsed { config, ignored })
}

fn second(document: &Value) -> Result<Parsed, ConfigError> {
    let v2: V2 = typed(document, "")?;
    if v2.version != 2 {
        return Err(ConfigError::key("version", format!("{} is not known: 2 is wanted", v2.version)));
    }
    let mut ignored = Vec::new();
    unknown("", document, &kept(&v2), &mut ignored);
    let missing = |key: &str| ConfigError::key(key, "is missing: a mount needs it");
    let given = v2.backend.ok_or_else(|| missing("backend"))?;
    let at = format!("backend.{}", given.kind);
    let empty = json!({});
    let table = given.tables.get(&given.kind).filter(|table| !table.is_null()).unwrap_or(&empty);
    let backend = backend(&given.kind, "backend.type", table, &at, &mut ignored)?;
    let known = ["localdisk", "localfs", "oss", "s3", "registry", "http-proxy"];
    ignored
        .extend(given.tables.keys().filter(|key| !known.contains(&key.as_str())).map(|key| format!("backend.{key}")));
    let cache = v2.cache.ok_or_else(|| missing("cache"))?;
    let kind = cache_kind(&cache.kind, "cache.type")?;
    if kind == CacheKind::Files && cache.filecache.is_none() {
        return Err(ConfigError::key("cache.filecache", "is missing: give at least `work_dir`"));
    }
    let rafs = v2.rafs.ok_or_else(|| missing("rafs"))?;
    if v2.overlay.is_some_and(|overlay| !overlay.is_null()) {
        ignored.push("overlay".to_owned());
    }
    // Upstream starts its prefetch workers only if both tables are enabled; `rafs.prefetch` says what to do.
    let enabled = cache.prefetch.as_ref().is_none_or(|table| table.enable);
    let prefetch = match rafs.prefetch {
        None => Prefetch::OFF,
        Some(given) => prefetch(
            "rafs.prefetch",
            Prefetch {
                enable: given.enable && enabled,
                threads: given.threads,
                batch_size: given.batch_size,
                bandwidth_limit: u64::from(given.bandwidth_limit),
                prefetch_all: given.prefetch_all,
                stream: given.stream_prefetch,
            },
            ["threads", "batch_size"],
        )?,
    };
    let config = Config {
        dialect: Dialect::V2,
        id: v2.id,
        backend,
        external_backends: v2.external_backends,
        cache: Cache {
            kind,
            work_dir: work_dir(cache.filecache, "cache.filecache")?,
            compressed: cache.compressed,
            validate: cache.validate,
            skip_verification: cache.skip_verification,
        },
        rafs: Rafs {
            mode: mode(rafs.mode, "rafs.mode")?,
            batch_size: batch(rafs.batch_size, "rafs.batch_size")?,
            validate: rafs.validate,
            enable_xattr: rafs.enable_xattr,
            iostats_files: rafs.iostats_files,
            access_pattern: rafs.access_pattern,
            latest_read_files: rafs.latest_read_files,
            prefetch,
        },
        read_deadline: deadline(rafs.read_deadline, "rafs.read_deadline")?,
    };
    Ok(Parsed { config, ignored })
}

/// Reads a value as `T`; the error names the path of the key below `at`.
fn typed<T: DeserializeOwned + Serialize>(value: &Value, at: &str) -> Result<T, ConfigError> {
    let typed: T = serde_path_to_error::deserialize(value).map_err(|error| {
        let inner = error.path().to_string();
        let why = error.into_inner().to_string();
        // A missing field is reported at its parent: name the field itself.
        let (inner, why) = match why.strip_prefix("missing field `").and_then(|rest| rest.split_once('`')) {
            Some((field, _)) => (join(&inner, field), "is missing".to_owned()),
            None => (inner, why),
        };
        ConfigError::Key { key: join(at, &inner), why }
    })?;
    no_lists(at, value, &kept(&typed))?;
    Ok(typed)
}

/// Refuses a list where a table is wanted: serde takes it for the table's values without their keys.
fn no_lists(at: &str, given: &Value, kept: &Value) -> Result<(), ConfigError> {
    match (given, kept) {
        (Value::Array(_), Value::Object(_)) => {
            let key = if at.is_empty() { "." } else { at };
            Err(ConfigError::key(key, "is a list: a table with named keys is wanted"))
        }
        (Value::Object(given), Value::Object(kept)) => given
            .iter()
            .filter_map(|(key, value)| Some((key, value, kept.get(key)?)))
            .try_for_each(|(key, value, kept)| no_lists(&join(at, key), value, kept)),
        (Value::Array(given), Value::Array(kept)) => {
            let mut items = given.iter().zip(kept).enumerate();
            items.try_for_each(|(index, (value, kept))| no_lists(&format!("{at}[{index}]"), value, kept))
        }
        _ => Ok(()),
    }
}

fn join(parent: &str, child: &str) -> String {
    match (parent, child) {
        ("" | ".", child) => child.to_owned(),
        (parent, "" | ".") => parent.to_owned(),
        (parent, child) => format!("{parent}.{child}"),
    }
}

/// Returns what the typed form gives back.
fn kept<T: Serialize>(typed: &T) -> Value {
    serde_json::to_value(typed).unwrap_or_default()
}

/// Collects the paths of keys in `given` that are not in `kept`.
fn unknown(at: &str, given: &Value, kept: &Value, found: &mut Vec<String>) {
    match (given, kept) {
        (Value::Object(given), Value::Object(kept)) => {
            for (key, value) in given {
                match kept.get(key) {
                    Some(kept) => unknown(&join(at, key), value, kept, found),
                    None if value.is_null() => {}
                    None => found.push(join(at, key)),
                }
            }
        }
        (Value::Array(given), Value::Array(kept)) => {
            for (index, (value, kept)) in given.iter().zip(kept).enumerate() {
                unknown(&format!("{at}[{index}]"), value, kept, found);
            }
        }
        _ => {}
    }
}

/// Reads the backend's own table.
fn backend(
    kind: &str,
    kind_key: &str,
    table: &Value,
    at: &str,
    ignored: &mut Vec<String>,
) -> Result<nydus_backend::Config, ConfigError> {
    use nydus_backend::Config as Backend;
    if !table.is_object() {
        return Err(ConfigError::key(at, "is not a table of the backend's own keys"));
    }
    // Reading the tagged enum at once would lose the path of a wrong key.
    let backend = match kind {
        "localfs" => Backend::LocalFs(typed(table, at)?),
        "registry" => Backend::Registry(typed(table, at)?),
        _ => Backend::from_parts(kind, table.clone()).map_err(|error| ConfigError::key(kind_key, error.to_string()))?,
    };
    if let Backend::Registry(registry) = &backend {
        registry::check(registry, at)?;
    }
    ignored.extend(backend.unknown_keys(table).into_iter().map(|key| join(at, &key)));
    Ok(backend)
}

fn cache_kind(kind: &str, key: &str) -> Result<CacheKind, ConfigError> {
    match kind {
        "blobcache" | "filecache" => Ok(CacheKind::Files),
        "fscache" => Ok(CacheKind::Fscache),
        "" | "dummycache" => Ok(CacheKind::None),
        other => Err(ConfigError::key(key, format!("`{other}` is not known: use `blobcache`"))),
    }
}

fn work_dir(cache: Option<FileCache>, at: &str) -> Result<PathBuf, ConfigError> {
    let Some(cache) = cache else {
        return Ok(PathBuf::from("."));
    };
    if cache.work_dir.is_empty() {
        return Err(ConfigError::key(format!("{at}.work_dir"), "is empty: name a directory"));
    }
    if cache.enable_encryption || cache.enable_convergent_encryption {
        return Err(ConfigError::key(
            format!("{at}.enable_encryption"),
            "encryption of cache files is not supported: set it to false and use an encrypted disk",
        ));
    }
    Ok(PathBuf::from(cache.work_dir))
}

fn mode(mode: String, key: &str) -> Result<String, ConfigError> {
    match mode.as_str() {
        "direct" | "cached" => Ok(mode),
        other => Err(ConfigError::key(key, format!("`{other}` is not known: use `direct` or `cached`"))),
    }
}

fn batch(size: u64, key: &str) -> Result<u64, ConfigError> {
    if size <= MAX_BATCH {
        Ok(size)
    } else {
        Err(ConfigError::key(key, format!("{size} is too large: at most {MAX_BATCH} bytes (256 MiB)")))
    }
}

fn prefetch(at: &str, prefetch: Prefetch, [threads, size]: [&str; 2]) -> Result<Prefetch, ConfigError> {
    if prefetch.enable {
        if !(1..=1024).contains(&prefetch.threads) {
            return Err(ConfigError::key(format!("{at}.{threads}"), "is out of range: 1 to 1024"));
        }
        batch(prefetch.batch_size, &format!("{at}.{size}"))?;
    }
    Ok(prefetch)
}

fn deadline(seconds: Option<u64>, key: &str) -> Result<Duration, ConfigError> {
    match seconds {
        None => Ok(READ_DEADLINE),
        Some(seconds @ 5..=100) => Ok(Duration::from_secs(seconds)),
        Some(seconds) => Err(ConfigError::key(key, format!("{seconds} is out of range: 5 to 100 seconds"))),
    }
}
