//! The way from a document into a [`Config`]: every value is checked, and errors name keys as the document does.
//!
//! Whatever a document holds beyond what its [shape](super::shapes) gives back when it is written out again was not
//! understood: that is how unknown keys are found, without a second list of names that could disagree with the first.

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::registry;
use super::shapes::{FileCache, V1, V2};
use super::{Cache, CacheKind, Config, ConfigError, Dialect, Parsed, Prefetch, READ_DEADLINE, Rafs};

/// Largest batch of requests, in bytes.
const MAX_BATCH: u64 = 0x1000_0000;

/// What the two versions call the same things, for errors.
struct Names {
    backend: &'static str,
    cache: &'static str,
    filecache: &'static str,
    mode: &'static str,
    batch: &'static str,
    prefetch: &'static str,
    /// The keys of threads and batch size in the table of the prefetch.
    prefetched: [&'static str; 2],
    deadline: &'static str,
}

impl Names {
    fn of(dialect: Dialect) -> Self {
        match dialect {
            Dialect::V1 => Self {
                backend: "device.backend.type",
                cache: "device.cache.type",
                filecache: "device.cache.config",
                mode: "mode",
                batch: "amplify_io",
                prefetch: "fs_prefetch",
                prefetched: ["threads_count", "merging_size"],
                deadline: "read_deadline",
            },
            Dialect::V2 => Self {
                backend: "backend.type",
                cache: "cache.type",
                filecache: "cache.filecache",
                mode: "rafs.mode",
                batch: "rafs.batch_size",
                prefetch: "rafs.prefetch",
                prefetched: ["threads", "batch_size"],
                deadline: "rafs.read_deadline",
            },
        }
    }
}

/// Turns a document into a configuration.
pub(super) fn resolve(document: &Value) -> Result<Parsed, ConfigError> {
    let Value::Object(map) = document else {
        return Err(ConfigError::Unrecognised);
    };
    let mut ignored = Vec::new();
    match (map.get("version"), map.get("device")) {
        (Some(_), _) => {
            let v2: V2 = typed(document, "")?;
            unknown("", document, &kept(&v2), &mut ignored);
            checked(v2, Dialect::V2, ignored)
        }
        (None, Some(_)) => {
            let v1: V1 = typed(document, "")?;
            unknown("", document, &kept(&v1), &mut ignored);
            checked(v1.into(), Dialect::V1, ignored)
        }
        (None, None) => Err(ConfigError::Unrecognised),
    }
}

/// Checks every value; errors name keys as `dialect` does.
fn checked(given: V2, dialect: Dialect, mut ignored: Vec<String>) -> Result<Parsed, ConfigError> {
    if given.version != 2 {
        return Err(ConfigError::key("version", format!("{} is not known: 2 is wanted", given.version)));
    }
    let names = Names::of(dialect);
    let missing = |key: &str| ConfigError::key(key, "is missing: a mount needs it");
    let place = given.backend.ok_or_else(|| missing("backend"))?;
    let at = match dialect {
        Dialect::V1 => "device.backend.config".to_owned(),
        Dialect::V2 => format!("backend.{}", place.kind),
    };
    let empty = json!({});
    let table = place.tables.get(&place.kind).filter(|table| !table.is_null()).unwrap_or(&empty);
    let backend = backend(&place.kind, names.backend, table, &at, &mut ignored)?;
    let known = ["localdisk", "localfs", "oss", "s3", "registry", "http-proxy"];
    ignored
        .extend(place.tables.keys().filter(|key| !known.contains(&key.as_str())).map(|key| format!("backend.{key}")));
    let cache = given.cache.ok_or_else(|| missing("cache"))?;
    let kind = cache_kind(&cache.kind, names.cache)?;
    if kind != CacheKind::None && cache.filecache.is_none() && (kind == CacheKind::Files || dialect == Dialect::V1) {
        return Err(ConfigError::key(names.filecache, "is missing: give at least `work_dir`"));
    }
    let rafs = given.rafs.ok_or_else(|| missing("rafs"))?;
    if given.overlay.is_some_and(|overlay| !overlay.is_null()) {
        ignored.push("overlay".to_owned());
    }
    // Upstream starts its prefetch workers only if both tables are enabled; `rafs.prefetch` says what to do.
    let enabled = cache.prefetch.as_ref().is_none_or(|table| table.enable);
    let prefetch = match rafs.prefetch {
        None => Prefetch::OFF,
        Some(wanted) => prefetch(
            names.prefetch,
            Prefetch {
                enable: wanted.enable && enabled,
                threads: wanted.threads,
                batch_size: wanted.batch_size,
                bandwidth_limit: u64::from(wanted.bandwidth_limit),
                prefetch_all: wanted.prefetch_all,
                stream: wanted.stream_prefetch,
            },
            names.prefetched,
        )?,
    };
    let config = Config {
        dialect,
        id: given.id,
        backend,
        external_backends: given.external_backends,
        cache: Cache {
            kind,
            work_dir: work_dir(cache.filecache, names.filecache)?,
            compressed: cache.compressed,
            validate: cache.validate,
            skip_verification: cache.skip_verification,
        },
        rafs: Rafs {
            mode: mode(rafs.mode, names.mode)?,
            batch_size: batch(rafs.batch_size, names.batch)?,
            validate: rafs.validate,
            enable_xattr: rafs.enable_xattr,
            iostats_files: rafs.iostats_files,
            access_pattern: rafs.access_pattern,
            latest_read_files: rafs.latest_read_files,
            prefetch,
        },
        read_deadline: deadline(rafs.read_deadline, names.deadline)?,
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
